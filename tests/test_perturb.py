"""Replacing tokens: content words, continuations from one cache, and what an interrupted run leaves."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnprobe
from attnprobe import (
    AttnprobeError,
    BatchError,
    ParameterError,
    Perturbations,
    Provenance,
    ResultError,
    TokenBatch,
    TokenScores,
    UnsupportedModelError,
)
from attnprobe.analysis.chosen_positions import choose_positions
from attnprobe.analysis.content_words import FUNCTION_WORDS, content_overlap, content_words
from attnprobe.analysis.forced_tokens import force_tokens
from attnprobe.analysis.perturbation import perturb
from attnprobe.analysis.trials import Continuation, PerturbationSummary, Trial
from attnprobe.testing.tiny_models import tiny_model, tiny_tokenizer

NAN = math.nan


# ---- content words --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat is on the mat.", {"cat", "mat"}),
        ("It costs $1,050.50 or 2.0.", {"costs", "1050.5", "2"}),
        (r"So \boxed{\frac{3}{4}} it is", {"3", "4"}),
        ("Tom's 3 APPLES aren't Tom’s.", {"tom", "3", "apples", "aren't"}),
        ("Not one of two", {"not", "one", "two"}),
        ("100 and 1e5", {"100", "1", "e", "5"}),
        ("naïve Äpfel 数学", {"naïve", "äpfel", "数学"}),
        ("", set()),
    ],
)
def test_content_words(text: str, expected: set[str]) -> None:
    assert content_words(text) == expected


WORDS = st.sampled_from(["apples", "Tom", "the", "of", "3", "4.0", "it's", "sum", "\\frac", ",", "Sum"])
TEXTS = st.lists(WORDS, max_size=8).map(" ".join)


@given(first=TEXTS, second=TEXTS)
def test_overlap_is_a_jaccard_index(first: str, second: str) -> None:
    overlap = content_overlap(first, second)
    ours, theirs = content_words(first), content_words(second)
    both, either = sum(word in theirs for word in ours), len(ours | theirs)
    assert overlap == (both / either if either else 1.0)
    assert overlap == content_overlap(second, first)
    assert content_overlap(first, first) == 1.0
    assert 0 <= overlap <= 1


@given(text=TEXTS, extra=st.lists(st.sampled_from(sorted(FUNCTION_WORDS)), max_size=5))
def test_function_words_change_nothing(text: str, extra: list[str]) -> None:
    assert content_words(f"{text} {' '.join(extra)}") == content_words(text)


# ---- continuations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mistral"])
def test_continuations_from_one_cache_are_those_of_each_token_alone(family: str) -> None:
    """Also where the text is longer than a sliding window, which holds part of it only."""
    model = tiny_model(family, bos_token_id=None, eos_token_id=None)
    model.generation_config.eos_token_id = None
    before = torch.randint(1, 99, (20,), generator=torch.Generator().manual_seed(0))
    forced = force_tokens(model, before, 7, candidates=3, max_new_tokens=12)
    probability = model(before[None]).logits[0, -1].softmax(-1)
    likeliest = [token for token in probability.argsort(descending=True).tolist() if token != 7][:3]
    assert forced.tokens == [7, *likeliest]
    torch.testing.assert_close(torch.tensor(forced.probabilities), probability[forced.tokens])
    for token, continuation in zip(forced.tokens, forced.continuations, strict=True):
        text = [*before.tolist(), token]
        for found in continuation:
            logits = model(torch.tensor([text])).logits[0, -1].detach()
            # Equal but for rounding counts as the greatest.
            assert float(logits[found]) >= float(logits.max()) - 1e-3
            text.append(found)
        assert len(continuation) == 12


def test_an_end_of_text_ends_a_continuation() -> None:
    model = tiny_model("llama")
    before = torch.tensor([3, 4, 5])
    free = force_tokens(model, before, 7, candidates=2, max_new_tokens=6)
    end = free.continuations[0][2]
    model.generation_config.eos_token_id = [end, 0]
    ended = force_tokens(model, before, 7, candidates=2, max_new_tokens=6)
    assert ended.continuations[0] == free.continuations[0][: free.continuations[0].index(end)]
    assert force_tokens(model, before, end, candidates=1, max_new_tokens=6).continuations[0] == []


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama").train()
    sampling = model.generation_config.to_dict()
    force_tokens(model, torch.tensor([3, 4]), 7, candidates=2, max_new_tokens=3)
    assert model.training
    assert model.generation_config.to_dict() == sampling


LARGE = 10**6


@pytest.mark.usefixtures("as_users_call")
def test_nothing_to_force_is_refused() -> None:
    good: dict[str, Any] = {"before": torch.ones(2).long(), "token": 1, "candidates": 1, "max_new_tokens": 1}
    wrong: dict[str, list[Any]] = {
        "before": [torch.tensor([]).long(), torch.ones(2), "text", None, torch.ones(1, 2).long()],
        "token": [-1, 1.5, LARGE, None],
        "candidates": [0, 2.5, True, None],
        "max_new_tokens": [0, "many", None],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(AttnprobeError, match="vocabulary" if value is LARGE else name):
                force_tokens(tiny_model("llama"), **{**good, name: value})
    with pytest.raises(UnsupportedModelError, match=r"torch\.nn.*Linear"):
        force_tokens(torch.nn.Linear(1, 1), **good)


# ---- positions --------------------------------------------------------------------------------------


@given(
    values=st.lists(st.one_of(st.integers(0, 4).map(float), st.just(NAN)), min_size=2, max_size=12),
    gaps=st.sets(st.integers(1, 11), max_size=3),
    prompt=st.integers(0, 3),
    positions=st.integers(1, 3),
    remaining=st.integers(1, 4),
)
def test_positions_are_those_of_extreme_fai(
    values: list[float], gaps: set[int], prompt: int, positions: int, remaining: int
) -> None:
    """With enough tokens after them, up to the end of their part of the response."""
    fai = torch.tensor([[NAN] * prompt + values])
    mask = torch.arange(fai.shape[1])[None] >= prompt
    for gap in gaps & set(range(len(values))):
        mask[0, prompt + gap] = False
    batch = TokenBatch.from_ids(torch.ones_like(fai).long(), response_mask=mask)
    scores = TokenScores(fai, fai, None, mask)
    chosen = choose_positions(batch, scores, 0, positions, remaining)
    allowed = []
    for i, value in enumerate(values):
        after = range(i, i + remaining + 1)
        if not math.isnan(value) and all(j < len(values) and j not in gaps for j in after):
            allowed.append((value, prompt + i))
    if len(allowed) < 2 * positions:
        assert chosen == []
        return
    highest = [column for _, column in sorted(allowed, key=lambda pair: (-pair[0], pair[1]))]
    lowest = [column for _, column in sorted(allowed)]
    assert chosen == [
        *(("highest", column) for column in highest[:positions]),
        *(("lowest", column) for column in lowest[:positions]),
    ]


@given(
    count=st.integers(4, 12),
    drawn=st.integers(0, 10),
    seed=st.integers(0, 2**63 - 1),
    padding=st.integers(0, 3),
)
def test_drawn_positions_are_others_and_the_same_in_any_batch(
    count: int, drawn: int, seed: int, padding: int
) -> None:
    ids = torch.arange(count)[None] + 1
    fai = ids.float()
    mask = torch.ones_like(ids).bool()
    alone = TokenBatch.from_ids(ids, mask, response_mask=mask)
    scores = TokenScores(fai, fai, None, mask)
    chosen = choose_positions(alone, scores, 0, 1, 1, drawn=drawn, seed=seed)
    columns = [column for _, column in chosen]
    assert len(set(columns)) == len(columns) == 2 + min(drawn, count - 3)
    assert [kind for kind, _ in chosen] == ["highest", "lowest", *["drawn"] * (len(chosen) - 2)]
    assert all(column < count - 1 for column in columns)
    fewer = choose_positions(alone, scores, 0, 1, 1, drawn=drawn // 2, seed=seed)
    assert fewer == chosen[: len(fewer)]
    # The same text after padding, as the second of two.
    wide = torch.nn.functional.pad(torch.cat([ids.flip(1), ids]), (padding, 0))
    real = wide > 0
    both = TokenBatch.from_ids(wide, real, response_mask=real)
    of_both = TokenScores(wide.float(), wide.float(), None, real)
    again = choose_positions(both, of_both, 1, 1, 1, drawn=drawn, seed=seed)
    assert again == [(kind, column + padding) for kind, column in chosen]


def test_draws_differ_by_seed_and_text_and_reach_every_token() -> None:
    ids = torch.arange(1, 41)[None].repeat(2, 1)
    ids[1, 0] = 99
    mask = torch.ones_like(ids).bool()
    batch = TokenBatch.from_ids(ids, mask, response_mask=mask)
    scores = TokenScores(ids.float(), ids.float(), None, mask)
    draws = [
        tuple(c for k, c in choose_positions(batch, scores, row, 1, 10, drawn=1, seed=seed) if k == "drawn")
        for row in range(2)
        for seed in range(200)
    ]
    assert draws[:200] != draws[200:]
    # All but the highest and the lowest, which are columns 0 and 29 of one text, and 0 and 1 of the other.
    assert {column for (column,) in draws} == set(range(1, 30))


# ---- perturb ----------------------------------------------------------------------------------------

TOKENIZER = tiny_tokenizer()


def case(side: str = "right") -> tuple:
    """A model, a batch of two responses, and its scores."""
    model = tiny_model("llama", vocab_size=300)
    responses = ["Read what it is that it reads, or more of it.", "What the model reads, it has read."]
    batch = TokenBatch.from_text(TOKENIZER, ["Read: ", "A"], responses)
    if side == "left":
        shifts = [int((~row).sum()) for row in batch.attention_mask]
        ids, real, response = (
            torch.stack([row.roll(by) for row, by in zip(rows, shifts, strict=True)])
            for rows in (batch.input_ids, batch.attention_mask, batch.response_mask)
        )
        batch = TokenBatch.from_ids(ids, real, response_mask=response)
    statistics = attnprobe.measure(model, batch, horizon=(2, None))
    return model, batch, attnprobe.score_tokens(statistics, attnprobe.classify_heads(statistics))


OPTIONS = {"candidates": 3, "max_new_tokens": 8, "min_remaining": 4}


@pytest.fixture(scope="module")
def done() -> tuple:
    model, batch, scores = case()
    return model, batch, scores, perturb(model, TOKENIZER, batch, scores, **OPTIONS)


def test_trials_are_what_forcing_each_token_gives(done: tuple) -> None:
    model, batch, scores, result = done
    assert [(trial.example, trial.kind) for trial in result.trials] == [
        (row, kind) for row in range(2) for kind in ("highest", "lowest")
    ]
    for trial in result.trials:
        columns = batch.response_mask[trial.example].nonzero()[:, 0]
        column = int(columns[0]) + trial.response_position
        assert trial.position == column
        assert trial.length == len(columns)
        assert trial.token == int(batch.input_ids[trial.example, column])
        assert trial.fai == float(scores.fai[trial.example, column])
        length = min(8, len(columns) - trial.response_position - 1)
        before = batch.input_ids[trial.example, :column]
        forced = force_tokens(model, before, trial.token, 3, length)
        after = TOKENIZER.decode(batch.input_ids[trial.example, column + 1 : column + 1 + length])
        texts = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in forced.continuations]
        continuations = [trial.own, *trial.others]
        assert [continuation.token for continuation in continuations] == forced.tokens
        for continuation, text in zip(continuations, texts, strict=True):
            assert continuation.text == text
            assert continuation.overlap == content_overlap(text, after)
            assert continuation.greedy_overlap == content_overlap(text, texts[0])
        assert trial.own.greedy_overlap == 1.0


def test_padding_changes_nothing(done: tuple) -> None:
    model, batch, scores = case("left")
    result = perturb(model, TOKENIZER, batch, scores, **OPTIONS)
    for ours, theirs in zip(result.trials, done[3].trials, strict=True):
        for name in ("digest", "kind", "response_position", "token", "length"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.token == int(batch.input_ids[ours.example, ours.position])
        assert [c.text for c in ours.others] == [c.text for c in theirs.others]
    assert result.parameters == done[3].parameters


def gapped_case() -> tuple:
    """The first response in two parts, with six tokens of something else between them."""
    model, batch, _ = case()
    mask = batch.response_mask.clone()
    mask[0, 18:24] = False
    batch = dataclasses.replace(batch, response_mask=mask)
    statistics = attnprobe.measure(model, batch, horizon=(2, None))
    return model, batch, attnprobe.score_tokens(statistics, attnprobe.classify_heads(statistics))


def test_a_continuation_ends_at_a_gap_and_is_not_compared_with_what_stands_there() -> None:
    model, batch, scores = gapped_case()
    columns = batch.response_mask[0].nonzero()[:, 0].tolist()
    options = {**OPTIONS, "positions": 4, "max_new_tokens": 50}
    result = perturb(model, TOKENIZER, batch.select(0), scores.select(0), **options)
    assert {trial.position < 18 for trial in result.trials} == {True, False}
    for trial in result.trials:
        assert columns[trial.response_position] == trial.position
        assert trial.length == len(columns)
        stop = 18 if trial.position < 18 else columns[-1] + 1
        length = stop - trial.position - 1
        assert length >= OPTIONS["min_remaining"]
        after = TOKENIZER.decode(batch.input_ids[0, trial.position + 1 : stop])
        before = batch.input_ids[0, : trial.position]
        forced = force_tokens(model, before, trial.token, 3, length)
        text = TOKENIZER.decode(forced.continuations[0], skip_special_tokens=True)
        assert trial.own.text == text
        assert trial.own.overlap == content_overlap(text, after)


def test_the_same_text_with_another_response_is_another_text(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    for make in (case, gapped_case):
        model, batch, scores = make()
        perturb(model, TOKENIZER, batch.select(0), scores.select(0), path=path, **OPTIONS)
    assert len({trial.digest for trial in Perturbations.load(path).trials}) == 2
    assert Perturbations.load(path).summary().responses == 2


def test_an_interrupted_run_goes_on(done: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, scores, result = done
    path = tmp_path / "trials.jsonl"
    calls = []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return force_tokens(*arguments)

    # Not by name: the package shows the function of that name, not the module.
    monkeypatch.setattr(sys.modules[perturb.__module__], "force_tokens", interrupted)
    with pytest.raises(KeyboardInterrupt):
        perturb(model, TOKENIZER, batch, scores, path=path, **OPTIONS)
    left = Perturbations.load(path)
    assert len(left.trials) == 2
    assert not left.is_complete
    assert "not complete" in repr(left)
    with path.open("a") as stream:
        stream.write('{"example": 1, "ki')
    again = perturb(model, TOKENIZER, batch, scores, path=path, **OPTIONS)
    assert again == result
    # Two before the interruption, the interrupted one, and the two that were left.
    assert len(calls) == 5
    assert Perturbations.load(path) == result
    assert perturb(model, TOKENIZER, batch, scores, path=path, **OPTIONS) == result
    assert len(calls) == 5


def test_trials_made_otherwise_are_not_mixed(done: tuple, tmp_path: Path) -> None:
    model, batch, scores, result = done
    path = result.save(tmp_path / "trials.jsonl")
    with pytest.raises(ResultError, match=r"'candidates': 3.*'candidates': 2"):
        perturb(model, TOKENIZER, batch, scores, path=path, **{**OPTIONS, "candidates": 2})


def test_drawn_positions_join_a_file_that_has_none(done: tuple, tmp_path: Path) -> None:
    model, batch, scores, result = done
    path = tmp_path / "trials.jsonl"
    result.save(path)
    grown = [
        perturb(model, TOKENIZER, batch, scores, path=path, drawn=drawn, seed=3, **OPTIONS)
        for drawn in (1, 2)
    ]
    assert [[trial.kind for trial in each.trials] for each in grown] == [
        ["highest", "lowest", *["drawn"] * drawn] * 2 for drawn in (1, 2)
    ]
    assert tuple(trial for trial in grown[1].trials if trial.kind != "drawn") == result.trials
    assert set(grown[0].trials) < set(grown[1].trials)
    assert set(Perturbations.load(path).trials) == set(grown[1].trials)
    assert grown[1].summary().drawn_responses == 2
    for fewer in ({"drawn": 1, "seed": 3}, {"drawn": 2, "seed": 4}):
        with pytest.raises(ResultError, match="another path"):
            perturb(model, TOKENIZER, batch, scores, path=path, **fewer, **OPTIONS)


def test_a_batch_may_grow(done: tuple, tmp_path: Path) -> None:
    """Trials are found by their text, wherever it now stands."""
    model, batch, scores, result = done
    path = tmp_path / "trials.jsonl"
    alone = perturb(model, TOKENIZER, batch.select(1), scores.select(1), path=path, **OPTIONS)
    assert [trial.example for trial in alone.trials] == [0, 0]
    assert perturb(model, TOKENIZER, batch, scores, path=path, **OPTIONS) == result
    loaded = Perturbations.load(path)
    assert len(loaded.trials) == 4
    assert loaded.summary() == result.summary()


def test_files_of_older_versions_can_be_read_and_go_on(done: tuple, tmp_path: Path) -> None:
    """They had other names, no number of trials, no columns, and the path of the model's folder."""
    model, batch, scores, result = done
    path = result.save(tmp_path / "trials.jsonl")
    header, *lines = (json.loads(line) for line in path.read_text().splitlines())
    del header["trials"], header["provenance"]
    header["parameters"]["model"] = f"/some/where/{header['parameters']['model']}"
    for line in lines:
        line["rollouts"] = line.pop("others")
        line["position"] = line.pop("response_position")
    path.write_text("".join(f"{json.dumps(line)}\n" for line in (header, *lines)))
    old = Perturbations.load(path)
    assert not old.is_complete
    assert old.parameters == result.parameters
    trials = tuple(dataclasses.replace(trial, position=None) for trial in result.trials)
    assert old == dataclasses.replace(result, trials=trials, provenance=Provenance(), is_complete=False)
    assert old.to_pandas()["position"].isna().all()
    try:
        model.generate = lambda *_, **__: pytest.fail("all of it was done before")
        assert perturb(model, TOKENIZER, batch, scores, path=path, **OPTIONS) == result
    finally:
        del model.generate
    assert Perturbations.load(path) == result


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ("", "x.jsonl"),
        ("no json\n", "x.jsonl"),
        ("[1]\n", "x.jsonl"),
        ('{"kind": "Rhythm"}\n', r"Rhythm.*Perturbations"),
        ('{"kind": "Perturbations"}\n', "parameters"),
        ('{"kind": "Perturbations", "parameters": []}\n', "x.jsonl"),
        ('{"kind": "Perturbations", "parameters": {}}\n{"a": 1}\n', "example"),
        ('{"kind": "Perturbations", "parameters": {}, "provenance": {"layers": "x"}}\n', "layers"),
        ('{"kind": "Perturbations", "parameters": {}, "trials": 3}\n', r"\b3\b.*\b0\b"),
    ],
)
def test_other_and_damaged_files_are_refused(tmp_path: Path, content: str, facts: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(ResultError, match=facts):
        Perturbations.load(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ResultError, match=r"x\.jsonl"):
        Perturbations.load(path)
    with pytest.raises(ResultError, match=r"none\.jsonl"):
        Perturbations.load(tmp_path / "none.jsonl")


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("wrong", [None, 3, "", b"x", ["x"]])
def test_what_is_no_path_is_refused(wrong: Any) -> None:
    with pytest.raises(ResultError):
        Perturbations.load(wrong)


def test_a_finished_file_knows_how_many_trials_it_holds(done: tuple, tmp_path: Path) -> None:
    model, batch, scores, result = done
    path = result.save(tmp_path / "trials.jsonl")
    assert Perturbations.load(path) == result
    whole = path.read_text()
    for cut in (whole[: whole.rindex("\n", 0, -1) + 1], whole[:-40]):
        path.write_text(cut)
        with pytest.raises(ResultError, match=r"\b4\b.*\b3\b"):
            Perturbations.load(path)
        with pytest.raises(ResultError, match=r"\b4\b.*\b3\b"):
            perturb(model, TOKENIZER, batch, scores, path=path, **OPTIONS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "middle"),
        ("fai", "high"),
        ("position", 1.5),
        ("own", None),
        ("others", [3]),
        ("length", None),
    ],
)
def test_a_trial_of_other_types_is_refused(done: tuple, tmp_path: Path, name: str, value: object) -> None:
    path = done[3].save(tmp_path / "trials.jsonl")
    header, first, *rest = path.read_text().splitlines()
    changed = json.dumps({**json.loads(first), name: value})
    path.write_text("".join(f"{line}\n" for line in (header, changed, *rest)))
    with pytest.raises(ResultError, match=name):
        Perturbations.load(path)


def test_the_table_has_a_line_for_each_continuation(done: tuple) -> None:
    _, batch, _, result = done
    table = result.to_pandas()
    assert len(table) == 4 * 4
    assert table["rank"].tolist() == [0, 1, 2, 3] * 4
    own = table[table["rank"] == 0]
    found = batch.input_ids[own["example"].tolist(), own["position"].tolist()]
    assert own["token_id"].tolist() == found.tolist()
    assert json.loads(table.to_json(orient="records"))[0]["kind"] == "highest"
    assert result.to_arrow().column_names == list(table.columns)


def test_perturbations_say_what_they_are_and_were_computed_from(done: tuple) -> None:
    _, _, scores, result = done
    assert result.provenance == scores.provenance
    for shown in (repr(result), result._repr_html_()):
        assert len(shown) < 800
        for told in ("4 trials of 2 responses", "candidates=3", "Llama", "highest"):
            assert told in shown


# ---- the summary ------------------------------------------------------------------------------------


def trial(example: int, kind: str, overlaps: list[float]) -> Trial:
    own = Continuation(0, 1.0, "", 1.0, 1.0)
    others = tuple(Continuation(1, 0.1, "", overlap, 1 - overlap) for overlap in overlaps)
    return Trial(example, "", kind, 3, 0, 10, 0.5, 0, own, others)


TRIALS = Perturbations(
    (
        trial(0, "highest", [1.0, 0.5]),
        trial(0, "lowest", [0.5, 0.0]),
        trial(1, "highest", [0.5, 0.5]),
        trial(1, "lowest", [0.5, 0.5]),
        trial(2, "highest", [0.0]),
    ),
    {},
)


def test_the_summary_pairs_positions_of_a_response() -> None:
    summary = TRIALS.summary(resamples=200)
    assert summary.responses == 2
    assert summary.highest.value == pytest.approx((0.25 + 0.5) / 2)
    assert summary.lowest.value == pytest.approx((0.75 + 0.5) / 2)
    assert summary.difference.value == pytest.approx(-0.25)
    # One lower, one tie.
    assert summary.lower_share.value == 0.75
    assert (summary.lower_share.low, summary.lower_share.high) == (0.5, 1.0)
    response = TRIALS.summary("response", resamples=200)
    assert response.difference.value == pytest.approx(0.25)
    # Nothing was drawn.
    assert summary.drawn_responses == 0
    assert math.isnan(summary.drawn.value)
    assert "drawn" not in repr(summary)


OVERLAPS = st.integers(0, 4).map(lambda quarter: quarter / 4)
KINDS = ("highest", "lowest", "drawn")


@given(
    responses=st.lists(
        st.fixed_dictionaries({kind: st.lists(OVERLAPS, max_size=3) for kind in KINDS}),
        min_size=1,
        max_size=6,
    )
)
def test_the_summary_is_of_means_and_medians_within_responses(responses: list[dict[str, Any]]) -> None:
    """However many positions a response has, it counts once, and only where it has both kinds."""
    result = Perturbations(
        tuple(
            trial(example, kind, [1 - overlap])
            for example, kinds in enumerate(responses)
            for kind in KINDS
            for overlap in kinds[kind]
        ),
        {},
    )
    found = [{kind: np.mean(values) for kind, values in kinds.items() if values} for kinds in responses]
    pairs = {
        other: np.array([(of["highest"], of[other]) for of in found if {"highest", other} <= of.keys()])
        for other in ("lowest", "drawn")
    }
    if len(pairs["lowest"]) == 0:
        with pytest.raises(ParameterError, match="lowest"):
            result.summary(resamples=3)
        return
    summary = result.summary(resamples=3)
    assert (summary.responses, summary.drawn_responses) == (len(pairs["lowest"]), len(pairs["drawn"]))
    for other, prefix in (("lowest", ""), ("drawn", "drawn_")):
        if len(pairs[other]) == 0:
            continue
        highest, others = pairs[other].T
        expected = {
            other: others.mean(),
            f"{other}_median": np.median(others),
            f"{prefix}difference": (highest - others).mean(),
            f"{prefix}difference_median": np.median(highest - others),
            f"{prefix}lower_share": ((highest < others) + (highest == others) / 2).mean(),
        }
        assert {name: getattr(summary, name).value for name in expected} == pytest.approx(expected)
    highest = pairs["lowest"][:, 0]
    assert (summary.highest.value, summary.highest_median.value) == pytest.approx(
        (highest.mean(), np.median(highest))
    )


def test_resamples_draw_whole_clusters() -> None:
    """Copies of a response in its cluster carry no more evidence than the response alone."""
    generator = np.random.default_rng(0)
    pairs = generator.random((8, 2))
    alone, copies = (
        Perturbations(
            tuple(
                trial(copy * 8 + i, kind, [float(value)])
                for copy in range(count)
                for i, pair in enumerate(pairs)
                for kind, value in zip(("highest", "lowest"), pair, strict=True)
            ),
            {},
        )
        for count in (1, 5)
    )
    expected = alone.summary()
    clustered = copies.summary(clusters=[f"problem {i % 8}" for i in range(40)])
    for name in ("highest", "difference", "lower_share", "lowest_median"):
        assert tuple(getattr(clustered, name)) == pytest.approx(tuple(getattr(expected, name)))
    assert clustered.responses == 40
    free = copies.summary().difference
    assert free.high - free.low < 0.7 * (expected.difference.high - expected.difference.low)


def test_a_summary_is_a_result(tmp_path: Path) -> None:
    summary = TRIALS.summary(resamples=200)
    assert summary == TRIALS.summary(resamples=np.int64(200))
    assert summary != TRIALS.summary("response", resamples=200)
    assert summary == PerturbationSummary.load(summary.save(tmp_path / "summary.safetensors"))
    assert summary.to_pandas()["value"].tolist() == [
        getattr(summary, name).value for name in summary.to_pandas()["quantity"]
    ]
    assert "lower_share" in repr(summary)
    assert "lower_share" in summary._repr_html_()


@pytest.mark.usefixtures("as_users_call")
def test_a_summary_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"highest.*lowest"):
        Perturbations(TRIALS.trials[-1:], {}).summary()
    for reference in ("own", None, 3):
        with pytest.raises(ParameterError, match=r"reference.*greedy.*response"):
            TRIALS.summary(reference)
    for name, value in (("resamples", 0), ("confidence", 1.0), ("seed", -1)):
        with pytest.raises(ParameterError, match=name):
            TRIALS.summary(**{name: value})
    for clusters, facts in (([1], r"example 1.*1 label"), ("ab", "clusters"), ([[1], [2]], "clusters")):
        with pytest.raises(ParameterError, match=facts):
            TRIALS.summary(clusters=clusters)
    several = dataclasses.replace(
        TRIALS, trials=(*TRIALS.trials, *(dataclasses.replace(t, digest="x") for t in TRIALS.trials))
    )
    assert several.summary().responses == 4
    with pytest.raises(ParameterError, match="several batches"):
        several.summary(clusters=[0, 1])


@pytest.mark.usefixtures("as_users_call")
def test_what_is_no_trial_is_refused() -> None:
    for trials, parameters in ((TRIALS.trials[0], {}), (("x",), {}), ((), None)):
        with pytest.raises(ResultError, match=r"trials|parameters"):
            Perturbations(trials, parameters)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    "name", ["candidates", "positions", "max_new_tokens", "min_remaining", "drawn", "seed"]
)
@pytest.mark.parametrize("value", [-1, 2.0, "10", None, True, NAN, torch.ones(2)])
def test_counts_that_make_no_sense_are_refused(done: tuple, name: str, value: Any) -> None:
    model, batch, scores, _ = done
    for wrong in (value,) if name in ("drawn", "seed") else (value, 0):
        with pytest.raises(ParameterError, match=f"{name}.*got"):
            perturb(model, TOKENIZER, batch, scores, **{name: wrong})


def test_numbers_of_numpy_and_torch_are_numbers(done: tuple) -> None:
    model, batch, scores, result = done
    fancy = {name: np.int64(value) for name, value in OPTIONS.items()} | {"positions": torch.tensor(1)}
    lists = {name: getattr(batch, name).tolist() for name in ("input_ids", "attention_mask", "response_mask")}
    assert perturb(model, TOKENIZER, lists, scores, **fancy) == result


@pytest.mark.usefixtures("as_users_call")
def test_what_does_not_belong_together_is_refused(done: tuple) -> None:
    model, batch, scores, _ = done
    with pytest.raises(ParameterError, match=r"\b500\b"):
        perturb(model, TOKENIZER, batch, scores, min_remaining=500)
    for wrong in (None, "scores", scores.fai, attnprobe.measure(model, batch), TokenScores):
        with pytest.raises(ParameterError, match="TokenScores"):
            perturb(model, TOKENIZER, batch, wrong)
    with pytest.raises(ResultError, match=r"\[2, \d+\].*\[1, \d+\]"):
        perturb(model, TOKENIZER, batch, scores.select(0))
    other = batch.input_ids.clone()
    other[1, 5] += 1
    with pytest.raises(ResultError, match=f"{int(other[1, 5])}"):
        perturb(model, TOKENIZER, dataclasses.replace(batch, input_ids=other), scores)
    longer = batch.response_mask.clone()
    longer[0, 0] = True
    count = int(longer[0].sum())
    with pytest.raises(ResultError, match=rf"example 0.*\b{count - 1}\b.*\b{count}\b"):
        perturb(model, TOKENIZER, dataclasses.replace(batch, response_mask=longer), scores)
    packed = dataclasses.replace(batch, segment_ids=torch.where(batch.attention_mask, 0, -1))
    with pytest.raises(ParameterError, match="packed"):
        perturb(model, TOKENIZER, packed, scores)
    with pytest.raises(BatchError, match=r"\b99\b"):
        perturb(tiny_model("llama"), TOKENIZER, batch, scores)
    elsewhere = dataclasses.replace(scores.provenance, model_name="another-model")
    with pytest.raises(ResultError, match="another-model"):
        perturb(model, TOKENIZER, batch, dataclasses.replace(scores, provenance=elsewhere))
    for wrong in (None, "tokenizer", b"x", 3, type(TOKENIZER)):
        with pytest.raises(ParameterError, match="tokenizer"):
            perturb(model, wrong, batch, scores)
    for wrong in (None, "model", torch.nn.Linear(1, 1), type(model)):
        with pytest.raises(UnsupportedModelError, match="generate"):
            perturb(wrong, TOKENIZER, batch, scores)
    for wrong in (None, "text", 3):
        with pytest.raises(BatchError):
            perturb(model, TOKENIZER, wrong, scores)
    for wrong in ("/nowhere/trials.jsonl", 3, ""):
        with pytest.raises(ResultError):
            perturb(model, TOKENIZER, batch, scores, path=wrong)

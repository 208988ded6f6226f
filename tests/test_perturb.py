"""Replacing tokens: content words, rollouts from one cache, and what an interrupted run leaves."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnprobe
from attnprobe import ParameterError, ResultError, TokenBatch, TokenScores, UnsupportedModelError
from attnprobe.analysis.content_words import FUNCTION_WORDS, content_overlap, content_words
from attnprobe.analysis.forced_tokens import force_tokens
from attnprobe.analysis.perturbation import Perturbations, Rollout, Trial, choose_positions, perturb
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


# ---- rollouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mistral"])
def test_rollouts_from_one_cache_are_those_of_each_token_alone(family: str) -> None:
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


def test_an_end_of_text_ends_a_rollout() -> None:
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


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("arguments", [(torch.tensor([]).long(), 1, 1), (torch.ones(2).long(), 0, 1)])
def test_nothing_to_force_is_refused(arguments: tuple) -> None:
    before, candidates, count = arguments
    with pytest.raises(ParameterError, match="forcing needs a text"):
        force_tokens(tiny_model("llama"), before, 1, candidates, count)


# ---- positions --------------------------------------------------------------------------------------


@given(
    values=st.lists(st.one_of(st.integers(0, 4).map(float), st.just(NAN)), min_size=2, max_size=12),
    prompt=st.integers(0, 3),
    positions=st.integers(1, 3),
    remaining=st.integers(1, 4),
)
def test_positions_are_those_of_extreme_fai(
    values: list[float], prompt: int, positions: int, remaining: int
) -> None:
    fai = torch.tensor([[NAN] * prompt + values])
    mask = torch.arange(fai.shape[1])[None] >= prompt
    batch = TokenBatch.from_ids(torch.ones_like(fai).long(), response_mask=mask)
    scores = TokenScores(fai, fai, None, mask)
    chosen = choose_positions(batch, scores, 0, positions, remaining)
    allowed = [
        (value, prompt + i)
        for i, value in enumerate(values)
        if not math.isnan(value) and len(values) - 1 - i >= remaining
    ]
    if len(allowed) < 2 * positions:
        assert chosen == []
        return
    highest = [column for _, column in sorted(allowed, key=lambda pair: (-pair[0], pair[1]))]
    lowest = [column for _, column in sorted(allowed)]
    assert chosen == [
        *(("highest", column) for column in highest[:positions]),
        *(("lowest", column) for column in lowest[:positions]),
    ]


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
        column = int(columns[0]) + trial.position
        assert trial.length == len(columns)
        assert trial.token == int(batch.input_ids[trial.example, column])
        assert trial.fai == float(scores.fai[trial.example, column])
        length = min(8, len(columns) - trial.position - 1)
        before = batch.input_ids[trial.example, :column]
        forced = force_tokens(model, before, trial.token, 3, length)
        after = TOKENIZER.decode(batch.input_ids[trial.example, column + 1 : column + 1 + length])
        texts = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in forced.continuations]
        rollouts = [trial.own, *trial.rollouts]
        assert [rollout.token for rollout in rollouts] == forced.tokens
        for rollout, text in zip(rollouts, texts, strict=True):
            assert rollout.text == text
            assert rollout.overlap == content_overlap(text, after)
            assert rollout.greedy_overlap == content_overlap(text, texts[0])
        assert trial.own.greedy_overlap == 1.0


def test_padding_changes_nothing(done: tuple) -> None:
    model, batch, scores = case("left")
    result = perturb(model, TOKENIZER, batch, scores, **OPTIONS)
    for ours, theirs in zip(result.trials, done[3].trials, strict=True):
        assert (ours.position, ours.token, ours.length) == (theirs.position, theirs.token, theirs.length)
        assert [r.text for r in ours.rollouts] == [r.text for r in theirs.rollouts]
    assert result.parameters == done[3].parameters


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
    assert len(Perturbations.load(path).trials) == 2
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
    with pytest.raises(ResultError, match="choose another path"):
        perturb(model, TOKENIZER, batch, scores, path=path, **{**OPTIONS, "candidates": 2})


def test_a_batch_may_grow(done: tuple, tmp_path: Path) -> None:
    """Trials are found by their text, wherever it now stands."""
    model, batch, scores, result = done
    path = tmp_path / "trials.jsonl"
    second = batch.select(slice(1, 2))
    columns = second.token_count
    of_second = TokenScores(
        *(values[1:, :columns] for values in (scores.waad, scores.fai)), None, second.response_mask
    )
    alone = perturb(model, TOKENIZER, second, of_second, path=path, **OPTIONS)
    assert [trial.example for trial in alone.trials] == [0, 0]
    assert perturb(model, TOKENIZER, batch, scores, path=path, **OPTIONS) == result
    assert len(Perturbations.load(path).trials) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no trials that can be read"),
        ("no json\n", "no trials that can be read"),
        ('{"kind": "Rhythm"}\n', "holds Rhythm, not Perturbations"),
        ('{"kind": "Perturbations", "parameters": {}}\n{"a": 1}\n', "no trials that can be read"),
    ],
)
def test_other_files_are_no_trials(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(ResultError, match=message):
        Perturbations.load(path)
    with pytest.raises(ResultError, match="there is no result"):
        Perturbations.load(tmp_path / "none.jsonl")


def test_the_table_has_a_row_for_each_rollout(done: tuple) -> None:
    table = done[3].to_pandas()
    assert len(table) == 4 * 4
    assert table["rank"].tolist() == [0, 1, 2, 3] * 4
    assert json.loads(table.to_json(orient="records"))[0]["kind"] == "highest"


# ---- the summary ------------------------------------------------------------------------------------


def trial(example: int, kind: str, overlaps: list[float]) -> Trial:
    own = Rollout(0, 1.0, "", 1.0, 1.0)
    rollouts = tuple(Rollout(1, 0.1, "", overlap, 1 - overlap) for overlap in overlaps)
    return Trial(example, "", kind, 0, 10, 0.5, 0, own, rollouts)


TRIALS = Perturbations(
    (
        trial(0, "highest", [0.0, 0.5]),
        trial(0, "lowest", [0.5, 1.0]),
        trial(1, "highest", [0.5, 0.5]),
        trial(1, "lowest", [0.5, 0.5]),
        trial(2, "highest", [1.0]),
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
    greedy = TRIALS.summary("greedy", resamples=200)
    assert greedy.difference.value == pytest.approx(0.25)


def test_a_summary_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ParameterError, match="both its highest and its lowest"):
        Perturbations(TRIALS.trials[-1:], {}).summary()


@pytest.mark.usefixtures("as_users_call")
def test_parameters_that_make_no_sense_are_refused(done: tuple) -> None:
    model, batch, scores, _ = done
    with pytest.raises(ParameterError, match="got 'own'"):
        TRIALS.summary("own")
    with pytest.raises(ParameterError, match="candidates is a whole number, at least 1; got 0"):
        perturb(model, TOKENIZER, batch, scores, candidates=0)
    with pytest.raises(ParameterError, match="at least 500 tokens after them"):
        perturb(model, TOKENIZER, batch, scores, min_remaining=500)
    short = TokenScores(scores.waad[:1], scores.fai[:1], None, scores.response_mask[:1])
    with pytest.raises(ParameterError, match="must be of the same tokens"):
        perturb(model, TOKENIZER, batch, short)
    packed = dataclasses.replace(batch, segment_ids=torch.zeros_like(batch.input_ids))
    with pytest.raises(ParameterError, match="rows are packed"):
        perturb(model, TOKENIZER, packed, scores)
    with pytest.raises(UnsupportedModelError, match=r"torch\.nn.*Linear cannot generate"):
        perturb(torch.nn.Linear(1, 1), TOKENIZER, batch, scores)
    with pytest.raises(ResultError, match="cannot write"):
        perturb(model, TOKENIZER, batch, scores, path="/nowhere/trials.jsonl")

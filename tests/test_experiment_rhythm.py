"""The rhythm experiment: its problems, its sampling, and that it goes on where it stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attnprobe
from attnprobe.analysis.coupling_results import NAMES
from attnprobe.models import LoadedModel
from attnprobe.testing.tiny_models import tiny_model, tiny_tokenizer
from experiments.rhythm import choices, generate, measure, page, raw, train
from experiments.rhythm.__main__ import main
from experiments.rhythm.problems import (
    boxed_answer,
    is_right,
    make_problems,
    template_of,
    training_problems,
)
from experiments.rhythm.records import append_record, read_records

# ---- problems -------------------------------------------------------------------------------------


def test_a_problem_does_not_depend_on_how_many_are_asked() -> None:
    assert make_problems(3) == make_problems(12)[:3]


def test_a_problem_is_split_before_what_it_asks() -> None:
    for problem in make_problems(40):
        assert problem.question.endswith("Give the result as your final answer. Do not include units.")
        assert problem.question.count("?") <= 1
        assert not problem.context or problem.context[-1] in ".!?"
        float(problem.answer)
        asked = problem.messages[1]["content"]
        assert asked == f"Context: {problem.context}\nQuestion: {problem.question}"
        assert asked in problem.plain_prompt


def test_the_model_is_trained_on_other_problems() -> None:
    asked = {problem.plain_prompt for problem in make_problems(100)}
    trained = training_problems(1500)
    assert len(trained) == 1500
    assert not asked & {problem.plain_prompt for problem, _ in trained}


@pytest.mark.parametrize(
    ("text", "boxed", "right"),
    [
        (r"So \boxed{1,050}.", "1,050", True),
        (r"\boxed{3} or rather \boxed{ 1050.0 }", "1050.0", True),
        ("it is 7, that is 1050.", None, True),
        (r"1050, so \boxed{51}", "51", False),
        ("no idea", None, False),
    ],
)
def test_an_answer_is_what_is_boxed_or_the_last_number(text: str, boxed: str | None, right: bool) -> None:
    assert boxed_answer(text) == boxed
    assert is_right(text, "1050") is right


# ---- records --------------------------------------------------------------------------------------


def test_records_survive_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "records.jsonl"
    assert read_records(path) == []
    append_record(path, {"a": "line\nbreak"})
    append_record(path, {"a": 2})
    with path.open("a") as stream:
        stream.write('{"a": 3')
    assert read_records(path) == [{"a": "line\nbreak"}, {"a": 2}]
    append_record(path, {"a": 3})
    assert [record["a"] for record in read_records(path)] == ["line\nbreak", 2, 3]


# ---- sampling -------------------------------------------------------------------------------------


def test_greedy_choice_under_gumbel_noise_is_sampling() -> None:
    """Shares of 4000 draws within five standard errors of the softmax at that temperature."""
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    noise = generate.GumbelNoise([3], temperature=0.7)
    drawn = torch.cat([noise(logits, logits).argmax(-1) for _ in range(4000)]).bincount(minlength=3) / 4000
    expected = (logits[0] / 0.7).softmax(-1)
    for found, wanted in zip(drawn.tolist(), expected.tolist(), strict=True):
        assert found == pytest.approx(wanted, abs=5 * math.sqrt(wanted * (1 - wanted) / 4000))


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel(tiny_model("llama", vocab_size=300, eos_token_id=0), tiny_tokenizer(), "tiny")


def test_an_answer_does_not_depend_on_its_neighbours(loaded: LoadedModel, tmp_path: Path) -> None:
    """Alone or beside longer prompts, in one run or with an interruption between."""
    problems = make_problems(4)
    asked = [generate.prompt_of(loaded, problem) for problem in problems]
    short = [prompt[-20 - 3 * i :] for i, prompt in enumerate(asked)]
    together = generate.sample(loaded, short, problems)
    for prompt, problem, answer in zip(short, problems, together, strict=True):
        assert generate.sample(loaded, [prompt], [problem]) == [answer]
    assert len({tuple(answer) for answer in together}) == 4


# ---- the page and its raw data --------------------------------------------------------------------

COMMITTED = list(page.MODELS.values())


def test_problems_of_one_template_differ_in_names_and_numbers_only() -> None:
    problems = make_problems(60)
    alike: dict[int, set[int]] = {}
    for problem in problems:
        words = [word for word in problem.plain_prompt.split() if word.islower() and word.isalpha()]
        alike.setdefault(template_of(problem.index), set()).add(len(words) // 20)
    assert len(alike) < 60
    assert all(max(lengths) - min(lengths) <= 2 for lengths in alike.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMITTED)
def test_every_number_follows_from_the_raw_data(name: str) -> None:
    """What is stored is what today's code computes from the committed raw data."""
    folder = page.RESULTS / name
    stored = json.loads((folder / "summary.json").read_text())
    # Draws decide p-values and intervals of nulls, and nothing else: fewer are drawn here.
    found = json.loads(json.dumps(page.summarise(folder, draws=100)))
    differing = list(differences(found, stored))
    allowed = {"draws", "p_value", "null"}
    assert [place for place in differing if place[0] != "adjusted" and not allowed & set(place)] == []
    for choice, nulls in stored["couplings"].items():
        for null, couplings in nulls.items():
            for coupling, line in couplings.items():
                again = found["couplings"][choice][null][coupling]
                assert again["null"][0] == pytest.approx(line["null"][0], rel=1e-6)
                # Three standard errors of a share of 100 draws, at most.
                assert again["p_value"] == pytest.approx(line["p_value"], abs=0.16)
    answers = read_records(folder / "responses.jsonl")
    assert len(measure.long_enough(answers)) == stored["answers"]


def differences(found: Any, stored: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield where two nested results differ."""
    if isinstance(stored, dict):
        assert found.keys() == stored.keys()
        for key in stored:
            yield from differences(found[key], stored[key], (*place, key))
    elif isinstance(stored, list):
        for ours, theirs in zip(found, stored, strict=True):
            yield from differences(ours, theirs, place)
    elif found != (pytest.approx(stored, rel=1e-6, abs=1e-9) if isinstance(stored, float) else stored):
        yield place


def test_the_page_states_the_stored_numbers() -> None:
    assert page.PAGE.read_text() == page.render(page.read_summaries())


def test_a_claim_that_does_not_hold_cannot_be_written() -> None:
    summaries = page.read_summaries()
    line = summaries["smol"]["couplings"]["main"]["heads"]["receiver_at_global"]
    line["position_lift"][0] = 100.0
    with pytest.raises(AssertionError, match="no longer holds"):
        page.render(summaries)


# ---- the whole ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.filterwarnings("ignore::attnprobe.AttnprobeWarning")
def test_one_command_makes_everything_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "MAX_NEW_TOKENS", 90)
    texts = [train.text_of(problem, solution) for problem, solution in training_problems(20)]
    tokenizer = train.make_tokenizer(texts, vocabulary=500)
    model = train.make_model(len(tokenizer))
    train.train(model, [tokenizer(text)["input_ids"] for text in texts], steps=2, size=4, rate=1e-3)
    folder = tmp_path / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    arguments = ["--model", str(folder), "--problems", "4", "--intervened", "2", "--draws", "5"]
    arguments += ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    main(arguments)
    results = tmp_path / "results" / "tiny"
    names = {path.name for path in results.iterdir()}
    tables = {"answers", "tokens", "heads", "random_heads", "perturbations"}
    tables |= {"knockouts", "knockout_fai"}
    assert names == {
        "responses.jsonl",
        *(f"{name}.parquet" for name in tables),
        "figure-2.png",
        "figure-9.png",
    }
    summary = page.summarise(results, draws=20)
    assert summary["asked"] == 4
    assert 2 <= summary["answers"] <= 4
    assert summary["perturbation"]["greedy"]["responses"] == summary["knockout"]["mask"]["responses"] == 2

    # The scores come back as they were, and so do the couplings.
    statistics = [
        attnprobe.HeadStatistics.load(path)
        for path in sorted((tmp_path / "work" / "tiny" / "statistics").glob("*-end.safetensors"))
    ]
    whole = attnprobe.HeadStatistics.concatenate(statistics)
    scores = attnprobe.score_tokens(whole, choices.classify(whole))
    direct = attnprobe.couplings(scores, null="token", draws=5, resamples=5)
    again = attnprobe.couplings(raw.read(results).scores(), null="token", draws=5, resamples=5)
    for name in NAMES:
        assert getattr(again, name).observed_sum.tolist() == getattr(direct, name).observed_sum.tolist()
        assert getattr(again, name).null.value == pytest.approx(getattr(direct, name).null.value)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this was done before")

    written = {path.name: path.read_bytes() for path in results.glob("*.parquet")}
    monkeypatch.setattr(generate, "sample", refuse)
    monkeypatch.setattr(attnprobe, "measure", refuse)
    main(arguments)
    assert {path.name: path.read_bytes() for path in results.glob("*.parquet")} == written

"""The rhythm experiment: its problems, its sampling, and that it goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pandas
import pytest
import torch

import attnprobe
from attnprobe.models import LoadedModel
from attnprobe.testing.tiny_models import tiny_model, tiny_tokenizer
from experiments.rhythm import document, generate, measure, suppress, tables, train
from experiments.rhythm.__main__ import main
from experiments.rhythm.problems import boxed_answer, is_right, make_problems, training_problems
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


# ---- tables ---------------------------------------------------------------------------------------


def test_receivers_over_all_tokens_need_no_second_pass() -> None:
    model = tiny_model("llama", implementation="eager")
    ids = torch.randint(1, 90, (1, 60), generator=torch.Generator().manual_seed(0))
    batch = attnprobe.TokenBatch.from_ids(ids.tolist(), response_start=torch.tensor([12]))
    statistics = attnprobe.measure(model, batch, **measure.SETTINGS["end"])
    found = tables._kurtosis_over_all_tokens(measure.Measured(batch, {"end": statistics}, [0]))
    with torch.no_grad():
        patterns = model(ids, output_attentions=True).attentions
    expected = [
        attnprobe.metrics.receiver_kurtosis(pattern, batch.response_mask, minimum_rows=1)
        for pattern in patterns
    ]
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-3, atol=1e-3)
    assert statistics.receiver_kurtosis is not None
    assert not torch.allclose(found, statistics.receiver_kurtosis, rtol=0.1)


@pytest.mark.parametrize(("place", "share"), [(49, 1.0), (41, 1.0), (40, 0.0), (0, 0.0)])
def test_a_receiver_peaks_among_the_last_nine_tokens(place: int, share: float) -> None:
    model = tiny_model("llama")
    batch = attnprobe.TokenBatch.from_ids([list(range(1, 61))], response_start=torch.tensor([0]))
    statistics = attnprobe.measure(model, batch, **measure.SETTINGS["end"])
    fai = torch.where(statistics.fai.isnan(), torch.nan, torch.zeros_like(statistics.fai))
    assert int((~fai.isnan()).any(0).any(0).any(0).nonzero()[-1]) == 49
    fai[..., place] = 1
    assert tables._peaks_at_the_end(dataclasses.replace(statistics, fai=fai)) == share


COMMITTED = sorted((Path(tables.__file__).parent / "results").iterdir())


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_results_can_be_read(folder: Path) -> None:
    """And today's code makes the committed tables of them."""
    summary = json.loads((folder / "summary.json").read_text())
    assert "\n".join(document._tables(summary)) + "\n" == (folder / "tables.md").read_text()
    suppressed = tables.suppression_table(read_records(folder / "suppression.jsonl"))
    for name, value in summary["suppression"].items():
        assert suppressed[name] == pytest.approx(value)
    answers = read_records(folder / "responses.jsonl")
    assert sum(record["right"] for record in answers) == summary["right"]
    assert len(measure.long_enough(answers)) == summary["answers"]


# ---- the whole ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")
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
    arguments = ["--model", str(folder), "--problems", "4", "--intervened", "2"]
    arguments += ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    main(arguments)
    results = tmp_path / "results" / "tiny"
    names = {path.name for path in results.iterdir()}
    assert names == {
        "responses.jsonl",
        "suppression.jsonl",
        "tokens.parquet",
        "couplings.parquet",
        "perturbations.parquet",
        "summary.json",
        "tables.md",
        "figure-2.png",
        "figure-8.png",
        "couplings.png",
    }
    written = (results / "summary.json").read_text()
    summary = json.loads(written)
    assert summary["perturbation"]["response"]["responses"] == 2
    assert set(summary["couplings"]["as in the paper"]) == set(tables.NAMES)

    tokens = pandas.read_parquet(results / "tokens.parquet")
    assert {"problem", "position", "response_position", "token_id", "text", "waad"} <= set(tokens.columns)
    trials = pandas.read_parquet(results / "perturbations.parquet")
    assert {"problem", "position", "response_position", "token_id", "overlap"} <= set(trials.columns)
    place = ["problem", "position", "response_position"]
    own = trials[trials["rank"] == 0].merge(tokens, on=[*place, "token_id"])
    assert len(own) == 4

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this was done before")

    for module, name in ((generate, "sample"), (suppress, "_of_answer")):
        monkeypatch.setattr(module, name, refuse)
    main(arguments)
    # As text: a value that is undefined here is not equal to itself.
    assert (results / "summary.json").read_text() == written

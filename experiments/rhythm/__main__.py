"""One command for what needs a model: answer, measure, perturb, knock out, and write the raw data.

    python -m experiments.rhythm

Each step stores what it has done, so that an interrupted run continues where it stopped. Afterwards
`python -m experiments.rhythm.page` computes all numbers. What is left to others: the steps themselves
(generate, measure, raw, figures) and the estimates (page).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import attnprobe
from attnprobe.models import LoadedModel, load_model
from experiments.rhythm import choices, figures, generate, measure, problems, raw

HERE = Path(__file__).parent
STEPS = ("perturb", "knockout")
"""The steps that can be skipped."""

POSITIONS = 2
"""How many tokens of highest FAI, and of lowest, are intervened on in each answer."""

DRAWN = {"knockout": 4, "perturb": 2}
"""How many others are drawn: a knock-out is one forward pass, a perturbation eleven continuations."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the steps."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model, progress=True)
    results = options.results / loaded.name
    work = options.work / loaded.name
    for folder in (results, work):
        folder.mkdir(parents=True, exist_ok=True)
    clock = _Clock()
    asked = problems.make_problems(options.problems)
    answers = generate.generate(loaded, asked, results / "responses.jsonl")
    clock.tell("answers")
    chosen = measure.long_enough(answers)
    measured = measure.measure(loaded, chosen, work / "statistics")
    clock.tell(f"statistics of {len(chosen)} answers")
    raw.write(measured, results, draws=options.draws)
    clock.tell("raw data of the couplings")
    scores = dict(choices.scores_of(measured))["main"]
    first = slice(options.intervened)
    tried: dict[str, Any] = {
        "batch": measured.batch.select(first),
        "scores": scores.select(first),
        "positions": POSITIONS,
        "progress": True,
    }
    if "knockout" not in options.without:
        knocked = attnprobe.knockout(
            loaded.model, **tried, drawn=DRAWN["knockout"], path=work / "knockouts.jsonl"
        )
        raw.write_trials(measured.problems, knocked, results / "knockouts.parquet")
        raw.write_knockout_fai(measured, knocked, results / "knockout_fai.parquet")
        clock.tell("knock-outs")
    if "perturb" not in options.without:
        perturbed = attnprobe.perturb(
            loaded.model,
            loaded.tokenizer,
            **tried,
            drawn=DRAWN["perturb"],
            path=work / "perturbations.jsonl",
        )
        raw.write_trials(measured.problems, perturbed, results / "perturbations.parquet")
        clock.tell("perturbations")
    _draw(loaded, chosen, measured, results)
    clock.tell("figures")


def _draw(
    loaded: LoadedModel, chosen: Sequence[dict[str, Any]], measured: measure.Measured, results: Path
) -> None:
    """Draw the figures of one answer."""
    statistics, heads = choices.groups_of(measured)["main"]
    scores = attnprobe.score_tokens(statistics, heads)
    example = figures.choose_example(scores)
    figures.figure_2(loaded, chosen[example], scores.select(example), heads, results / "figure-2.png")
    figures.figure_9(scores.select(example), results / "figure-9.png")


class _Clock:
    """Prints how long the run has taken so far."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def tell(self, step: str) -> None:
        print(f"{step}: done after {time.monotonic() - self._began:.0f} s", flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.rhythm", description=__doc__)
    parser.add_argument("--model", help="a GGUF file or a folder; default: the packaged SmolLM2")
    parser.add_argument("--problems", type=int, default=100, help="how many problems to ask")
    parser.add_argument("--intervened", type=int, default=75, help="how many answers to intervene on")
    parser.add_argument("--draws", type=int, default=raw.DRAWS, help="how many times random heads are drawn")
    parser.add_argument("--without", nargs="*", choices=STEPS, default=[], help="steps to skip")
    parser.add_argument("--threads", type=int, default=1, help="how many processor cores to use")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the raw data go")
    parser.add_argument("--work", type=Path, default=HERE / "cache", help="where large intermediate files go")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

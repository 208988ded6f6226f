"""One command for the whole experiment: answer, measure, perturb, and write tables and figures.

    python -m experiments.rhythm

Each step stores what it has done, so that an interrupted run continues where it stopped. What is left to
others: the steps themselves (generate, measure, suppress, tables, document, figures).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import attnprobe
from attnprobe.analysis.perturbation import perturb
from attnprobe.models import LoadedModel, load_model
from experiments.rhythm import document, figures, generate, measure, problems, suppress, tables

HERE = Path(__file__).parent
STEPS = ("perturb", "suppress")
"""The steps that can be skipped."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the steps."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model, progress=True)
    results = options.results / loaded.name
    work = options.work / loaded.name
    results.mkdir(parents=True, exist_ok=True)
    clock = _Clock()
    asked = problems.make_problems(options.problems)
    answers = generate.generate(loaded, asked, results / "responses.jsonl")
    clock.tell("answers")
    chosen = measure.long_enough(answers)
    measured = measure.measure(loaded, chosen, work / "statistics")
    clock.tell(f"statistics of {len(chosen)} answers")
    summary: dict[str, Any] = {
        "model": loaded.name,
        "answers": len(chosen),
        "tokens": int(measured.batch.response_mask.sum()),
        "right": sum(record["right"] for record in answers),
        "groups": tables.grouping_table(measured),
        "couplings": tables.coupling_tables(measured, loaded.model),
        "following_without_coincidence": tables.following_without_coincidence(measured),
    }
    clock.tell("couplings")
    scores = {name: tables.scores_for(measured, setting=name) for name in measure.SETTINGS}
    if "suppress" not in options.without:
        path = results / "suppression.jsonl"
        records = chosen[: options.intervened]
        suppressed = suppress.suppress(loaded, records, scores["end"], measured.batch, path)
        summary["suppression"] = tables.suppression_table(suppressed)
        clock.tell("suppression")
    if "perturb" not in options.without:
        intervened = slice(options.intervened)
        perturbations = perturb(
            loaded.model,
            loaded.tokenizer,
            measured.batch.select(intervened),
            scores["end"].select(intervened),
            path=work / "perturbations.jsonl",
            progress=True,
        )
        summary["perturbation"] = tables.perturbation_table(perturbations)
        document.write_perturbations(measured.problems, perturbations, results / "perturbations.parquet")
        clock.tell("perturbations")
    document.write_tokens(measured.problems, measured.batch, scores, results / "tokens.parquet")
    document.write_lines(tables.couplings_per_problem(measured), results / "couplings.parquet")
    document.write_summary(summary, results)
    _draw(loaded, chosen, measured, summary, results)
    clock.tell("tables and figures")


def _draw(
    loaded: LoadedModel,
    chosen: Sequence[dict[str, Any]],
    measured: measure.Measured,
    summary: dict[str, Any],
    results: Path,
) -> None:
    """Draw the figures of one answer and of the couplings."""
    near = measured.statistics["near"]
    scores = tables.scores_for(measured, setting="near")
    example = figures.choose_example(scores)
    heads = attnprobe.classify_heads(near)
    figures.figure_2(loaded, chosen[example], scores.select(example), heads, results / "figure-2.png")
    figures.figure_9(scores.select(example), results / "figure-8.png")
    paper = {name: line["lift"] for name, line in document.PAPER.items()}
    figures.couplings_figure(summary["couplings"], paper, results / "couplings.png")


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
    parser.add_argument("--without", nargs="*", choices=STEPS, default=[], help="steps to skip")
    parser.add_argument("--threads", type=int, default=1, help="how many processor cores to use")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where small results go")
    parser.add_argument("--work", type=Path, default=HERE / "cache", help="where large intermediate files go")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

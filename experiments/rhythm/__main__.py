"""One command for the whole experiment: answer, measure, perturb, and write tables and figures.

    python -m experiments.rhythm

Each step keeps what it has done, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from attnprobe.models import load_model
from attnprobe.perturb import perturb
from experiments.rhythm import generate, measure, problems, tables

HERE = Path(__file__).parent


def main() -> None:
    """Run the steps."""
    options = _parse()
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model, progress=True)
    results = options.results / loaded.name
    work = options.work / loaded.name
    results.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    asked = problems.make_problems(options.problems)
    records = generate.generate(loaded, asked, results / "responses.jsonl")
    print(f"answers: {time.monotonic() - began:.0f} s", flush=True)
    chosen = measure.long_enough(records)
    measured = measure.measure(loaded, chosen, work / "statistics")
    print(f"statistics of {len(chosen)} answers: {time.monotonic() - began:.0f} s", flush=True)
    scores = tables.scores_for(measured)
    perturbed = measured.batch.select(slice(options.perturbed))
    perturb(
        loaded.model,
        loaded.tokenizer,
        perturbed,
        tables.first_rows(scores, perturbed),
        path=work / "perturbations.jsonl",
        progress=True,
    )
    print(f"perturbations: {time.monotonic() - began:.0f} s", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.rhythm", description=__doc__)
    parser.add_argument("--model", help="a GGUF file or a folder; default: the packaged SmolLM2")
    parser.add_argument("--problems", type=int, default=100, help="how many problems are asked")
    parser.add_argument("--perturbed", type=int, default=75, help="how many answers are perturbed")
    parser.add_argument("--threads", type=int, default=1, help="how many processor cores may be used")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where small results go")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="where large, unfinished ones go")
    return parser.parse_args()


if __name__ == "__main__":
    main()

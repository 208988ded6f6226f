"""What reading a batch of mixed lengths costs, as people have them: 64 texts of 40 to 600 tokens.

    python -m benchmarks.mixed_lengths --rounds 5

The yardstick is the plain forward pass over batches of similar length, of at most 4,096 tokens with their
padding, which is how a careful user would run it. In turn, round by round: that pass without logits and with
logits and entropy; `measure` of the whole batch, as a user calls it, without and with entropy; and `measure`
of all texts at once, padded to the longest, as `measure` ran them before. What is reported are medians of the
ratios within each round. What is left to others: the model (subjects), and texts of one length (cost).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import attnprobe
from attnprobe.metrics import distribution_entropy
from benchmarks.subjects import SHAPE, build_model

FOLDER = Path(__file__).parent / "results"
TOKEN_BUDGET = 4096

app = typer.Typer(add_completion=False)


def texts(rows: int, shortest: int, longest: int) -> list[list[int]]:
    """Return made-up texts of lengths that are drawn evenly."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (rows,), generator=generator).tolist()
    return [torch.randint(1, SHAPE["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def careful_batches(rows: list[list[int]]) -> list[list[list[int]]]:
    """Return the rows in batches of similar length, under the token budget."""
    batches: list[list[list[int]]] = [[]]
    for row in sorted(rows, key=len):
        if batches[-1] and (len(batches[-1]) + 1) * len(row) > TOKEN_BUDGET:
            batches.append([])
        batches[-1].append(row)
    return batches


@torch.no_grad()
def plain(model: Any, batches: list[list[list[int]]], *, entropy: bool) -> None:
    """Run the model over batches, padded on the right; with entropy, that of every distribution."""
    for rows in batches:
        tensors = [torch.tensor(row) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        logits = model(ids, use_cache=False, logits_to_keep=0 if entropy else 1).logits
        if entropy:
            distribution_entropy(logits)


@app.command()
def run(
    rows: Annotated[int, typer.Option(help="How many texts.")] = 64,
    shortest: Annotated[int, typer.Option(help="Tokens of the shortest text.")] = 40,
    longest: Annotated[int, typer.Option(help="Tokens of the longest text.")] = 600,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 30,
    rounds: Annotated[int, typer.Option(help="Rounds of all ways.")] = 5,
    output: Annotated[Path, typer.Option(help="The folder for results.")] = FOLDER,
) -> None:
    """Measure, print the table, and save the numbers."""
    model, data = build_model(layers, "sdpa"), texts(rows, shortest, longest)
    batches = careful_batches(data)
    batch = attnprobe.TokenBatch.from_ids(data)
    together = {"batch_size": rows, "memory_budget": 2**50}
    padded = sum(len(part) * max(map(len, part)) for part in batches)
    ways: dict[str, tuple[str | None, Callable[[], object]]] = {
        "plain": (None, lambda: plain(model, batches, entropy=False)),
        "plain, logits and entropy": ("plain", lambda: plain(model, batches, entropy=True)),
        "measure, without entropy": ("plain", lambda: attnprobe.measure(model, batch, entropy=False)),
        "measure, as called": (
            "plain, logits and entropy",
            lambda: attnprobe.measure(model, batch),
        ),
        "measure, without entropy, all padded to the longest": (
            "plain",
            lambda: attnprobe.measure(model, batch, entropy=False, **together),
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds + 1):
        # Each round starts with another way, so that drift favours none; the first round warms up.
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            ways[name][1]()
            if number:
                seconds[name].append(time.perf_counter() - started)
    table = Table("way", "relative to", "ratio", "range")
    report: dict[str, Any] = {
        "rows": rows,
        "tokens": [shortest, longest],
        "layers": layers,
        "padding_of_careful_batches": 1 - sum(map(len, data)) / padded,
        "padding_to_the_longest": 1 - sum(map(len, data)) / (rows * max(map(len, data))),
        "seconds": seconds,
        "ratios": {},
    }
    for name, (yardstick, _) in ways.items():
        if yardstick is None:
            continue
        ratios = [a / b for a, b in zip(seconds[name], seconds[yardstick], strict=True)]
        report["ratios"][name] = statistics.median(ratios)
        span = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.add_row(name, yardstick, f"{statistics.median(ratios):.2f}", span)
    Console(width=120).print(table)
    output.mkdir(parents=True, exist_ok=True)
    (output / "mixed_lengths.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    app()

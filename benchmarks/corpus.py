"""What scoring a corpus costs: against the plain pass, in memory, in padding, and when it is continued.

    python -m benchmarks.corpus all --rounds 5

`throughput` runs the model over the same rows in the same batches, in turn, round by round: plainly, and as
`attnprobe.corpus.score` does, files included, with head groups that are known. Reported are medians of the
ratios within each round. `growth` scores 100, 1,000 and 10,000 short rows, each in a process of its own, and
reports peak memory and time per token. `resuming` calls `score` again on 100,000 finished rows. What is left
to others: the model (subjects), and what `measure` costs (cost, mixed_lengths).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from attnprobe import HeadGroups, adapter_for
from attnprobe.corpus import CorpusSettings, score
from attnprobe.corpus.batching import Budget, micro_batches
from attnprobe.corpus.rows import Row
from attnprobe.metrics import distribution_entropy
from benchmarks.cost import peak_bytes
from benchmarks.subjects import SHAPE, build_model

FOLDER = Path(__file__).parent / "results"

app = typer.Typer(add_completion=False, no_args_is_help=True)
LayersOption = Annotated[int, typer.Option(help="How many layers the model has; SmolLM2-135M has 30.")]


def write_rows(path: Path, count: int, shortest: int, longest: int, vocabulary: int) -> list[Row]:
    """Write made-up rows of lengths that are drawn evenly, a fifth of each prompt, and return them."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    with path.open("w") as stream:
        for number in range(count):
            length = int(torch.randint(shortest, longest + 1, (), generator=generator))
            ids = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
            prompt, response = ids[: length // 5], ids[length // 5 :]
            stream.write(json.dumps({"id": number, "prompt_ids": prompt, "response_ids": response}) + "\n")
            rows.append(Row(number, prompt=tuple(prompt), response=tuple(response)))
    return rows


def some_groups(layers: int, heads: int, folder: Path) -> Path:
    """Save groups of heads, made up: which heads they are does not matter for the cost."""
    span = torch.arange(layers * heads, dtype=torch.float32).view(layers, heads)
    local, far = span < 0.3 * layers * heads, span >= 0.7 * layers * heads
    return HeadGroups(local, far, None, span, None, tuple(range(layers))).save(folder / "groups.safetensors")


@torch.no_grad()
def plain(model: Any, batches: list[list[Row]], *, logits: str) -> None:
    """Run the model over batches, padded on the right."""
    for rows in batches:
        tensors = [torch.tensor(row.prompt + row.response) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        found = model(ids, use_cache=False, logits_to_keep=1 if logits == "none" else 0).logits
        if logits == "entropy":
            distribution_entropy(found)


def timed(call: Callable[[], object]) -> float:
    """Return how many seconds a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@app.command()
def throughput(
    rounds: Annotated[int, typer.Option(min=1)] = 5, layers: LayersOption = 30, rows: int = 64
) -> dict[str, Any]:
    """Compare with the plain forward pass over rows of 40 to 600 tokens."""
    model = build_model(layers, "sdpa")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "rows.jsonl"
        corpus = write_rows(source, rows, 40, 600, SHAPE["vocab_size"])
        adapter = adapter_for(model)
        groups = some_groups(layers, SHAPE["num_attention_heads"], folder)
        together = micro_batches(corpus, adapter, Budget.of(adapter), entropy=True)
        batches = [[corpus[place] for place in part] for part in together]
        runs = iter(range(1000))

        def scored(entropy: bool) -> None:
            settings = CorpusSettings(entropy=entropy)
            found.append(
                score(source, folder / str(next(runs)), model=model, groups=groups, settings=settings)
            )

        found: list[Any] = []
        calls: dict[str, Callable[[], object]] = {
            "plain, no logits": lambda: plain(model, batches, logits="none"),
            "plain, all logits": lambda: plain(model, batches, logits="all"),
            "plain, logits and entropy": lambda: plain(model, batches, logits="entropy"),
            "scored without entropy": lambda: scored(False),
            "scored": lambda: scored(True),
        }
        plain(model, batches[:1], logits="all")
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for each, call in calls.items():
                times[each].append(timed(call))
    pairs = {
        "scored / plain, all logits": ("plain, all logits", "scored"),
        "scored / plain, logits and entropy": ("plain, logits and entropy", "scored"),
        "scored without entropy / plain, all logits": ("plain, all logits", "scored without entropy"),
        "scored without entropy / plain, no logits": ("plain, no logits", "scored without entropy"),
    }
    ratios = {
        title: statistics.median(a / b for a, b in zip(times[under], times[over], strict=True))
        for title, (under, over) in pairs.items()
    }
    tokens = sum(row.length for row in corpus)
    result = {
        "rows": rows,
        "tokens": tokens,
        "batches": len(batches),
        "padding": found[0].padding_share,
        "seconds": {name: statistics.median(each) for name, each in times.items()},
        "throughput of the plain pass": ratios,
    }
    table = Table(
        title=f"{rows} rows, {tokens} tokens, {found[0].padding_share:.1%} padding, {rounds} rounds"
    )
    for title in ("", "seconds (median)", "tokens/s"):
        table.add_column(title)
    for each, seconds in times.items():
        middle = statistics.median(seconds)
        table.add_row(each, f"{middle:.2f}", f"{tokens / middle:,.0f}")
    Console().print(table)
    for title, ratio in ratios.items():
        Console().print(f"throughput, {title}: {ratio:.3f}")
    return result


@app.command(hidden=True)
def one(rows: int, layers: int) -> None:
    """Score so many short rows in this process, and print what it took."""
    torch.set_num_threads(1)
    model = build_model(layers, "sdpa")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_rows(folder / "rows.jsonl", rows, 8, 24, SHAPE["vocab_size"])
        tokens = sum(row.length for row in corpus)
        del corpus
        groups = some_groups(layers, SHAPE["num_attention_heads"], folder)
        seconds = timed(lambda: score(folder / "rows.jsonl", folder / "scores", model=model, groups=groups))
    peak = peak_bytes() / 2**20
    print(json.dumps({"rows": rows, "tokens": tokens, "seconds": seconds, "peak_mb": peak}))


@app.command()
def growth(layers: LayersOption = 30, counts: str = "100,1000,10000") -> list[dict[str, Any]]:
    """Show peak memory and time per token as the number of rows grows."""
    table = Table(title=f"Rows of 8 to 24 tokens, {layers} layers, one thread")
    for title in ("rows", "tokens", "peak MB", "ms per token"):
        table.add_column(title)
    found = []
    for count in counts.split(","):
        words = [sys.executable, "-m", "benchmarks.corpus", "one", count, str(layers)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        told = json.loads(done.stdout.splitlines()[-1])
        found.append(told)
        each = 1000 * told["seconds"] / told["tokens"]
        table.add_row(count, f"{told['tokens']}", f"{told['peak_mb']:.0f}", f"{each:.2f}")
    Console().print(table)
    return found


@app.command()
def resuming(rows: int = 100_000) -> dict[str, float]:
    """Show how long `score` takes to find that rows are finished, and to score the one shard that is not."""
    from attnprobe.testing.tiny_models import tiny_model

    model = tiny_model("llama", num_hidden_layers=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", rows, 40, 80, 99)
        groups = some_groups(1, 4, folder)

        def run() -> object:
            return score(folder / "rows.jsonl", folder / "scores", model=model, groups=groups)

        first = timed(run)
        (folder / "scores/shards/00000.parquet").unlink()
        again = timed(run)
    Console().print(f"{rows} rows: {first:.1f} s at first, {again:.2f} s when all but one shard are there")
    return {"rows": rows, "first": first, "again": again}


@app.command("all")
def everything(
    rounds: Annotated[int, typer.Option(min=1)] = 5, layers: LayersOption = 30, output: Path = FOLDER
) -> None:
    """Measure everything, and write the figures to corpus.json."""
    figures = {
        "throughput": throughput(rounds, layers),
        "growth": growth(layers),
        "resuming": resuming(),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "corpus.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    app()

"""Time and memory of reading attention, against the plain forward pass and against storing maps.

    python -m benchmarks.cost            # everything: about an hour on two cores
    python -m benchmarks.cost --quick    # up to 2048 tokens: about two minutes

Time: one process for each number of tokens runs all subjects in turn, round by round, and the median of
the rounds' ratios to the plain pass is reported: a machine that slows down slows all of them. Memory: one
process for each subject, and the most that it ever held. What is left to others: what is run (subjects).
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.cost_model import counted_ratio
from benchmarks.subjects import SUBJECTS, build_model

FOLDER = Path(__file__).parent / "results"
# Maps of 30 layers and 9 heads: 4.5 GB at 2048 tokens, 18 GB at 4096.
MOST_TOKENS_WITH_MAPS = 2048
OURS = ["measure", "without span", "attached", "five layers", "receive"]
PEERS = ["eager maps", "bridge patterns", "nnsight maps"]

app = typer.Typer(add_completion=False)
# Piped into a file, a table is not to be squeezed into 80 columns.
out = Console(width=None if sys.stdout.isatty() else 120)


@app.command()
def run(
    tokens: Annotated[str, typer.Option(help="Numbers of tokens.")] = "512,1024,2048,4096,8192",
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 30,
    long: Annotated[str, typer.Option(help="Numbers of tokens for two layers only.")] = "8192,16384,32768",
    rounds: Annotated[int, typer.Option(help="Rounds of all subjects.")] = 5,
    subjects: Annotated[str, typer.Option(help="Ways of reading.")] = ",".join(OURS),
    peers: Annotated[str, typer.Option(help="Ways of storing maps to compare with.")] = ",".join(PEERS),
    quick: Annotated[bool, typer.Option(help="512 to 2048 tokens, six layers, three rounds.")] = False,
    output: Annotated[Path, typer.Option(help="The folder for results.")] = FOLDER,
) -> None:
    """Measure, print the table, and save results and picture."""
    if quick:
        tokens, layers, long, rounds = "512,1024,2048", 6, "", 3
    ways = [name for name in f"{subjects},{peers}".split(",") if name]
    jobs = [(int(count), layers, ways) for count in tokens.split(",") if count]
    jobs += [(int(count), 2, OURS[:2]) for count in long.split(",") if count]
    records = []
    for count, depth, names in track(jobs, "measuring", console=Console(stderr=True)):
        chosen = [name for name in names if not SUBJECTS[name].maps or count <= MOST_TOKENS_WITH_MAPS]
        records += measured(count, depth, chosen, rounds if count <= 2048 else max(1, rounds // 2))
        save(records, output)
    out.print(table(records))
    for name in dict.fromkeys(record["subject"] for record in records):
        out.print(f"  {name}: {SUBJECTS[name].meaning}", highlight=False)
    picture(records, output)


def measured(tokens: int, layers: int, subjects: list[str], rounds: int) -> list[dict[str, Any]]:
    """Return a record for each subject that could be run."""
    times = child("time", tokens, layers, ["plain", *subjects], rounds)
    plain = None
    records = []
    for name in ["plain", *subjects]:
        if name not in times:
            continue
        memory = child("memory", tokens, layers, [name], 1)
        ratios = [ours / base for ours, base in zip(times[name], times["plain"], strict=True)]
        record = {
            "subject": name,
            "tokens": tokens,
            "layers": layers,
            "seconds": statistics.median(times[name]),
            "time_ratio": statistics.median(ratios),
            "time_ratio_range": [min(ratios), max(ratios)],
            "loaded_bytes": memory["loaded"],
            "peak_bytes": memory["peak"],
        }
        plain = plain or record
        record["peak_ratio"] = record["peak_bytes"] / plain["peak_bytes"]
        records.append(record)
    return records


def child(what: str, tokens: int, layers: int, subjects: list[str], rounds: int) -> dict[str, Any]:
    """Run a measurement in its own process and return what it found."""
    words = [sys.executable, "-m", "benchmarks.cost", "child", what, str(tokens), str(layers), str(rounds)]
    done = subprocess.run([*words, *subjects], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words[3:])} {subjects} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def prepared(name: str, models: dict[str, Any], layers: int, tokens: int) -> Any:
    """Return a subject's call, or None where its library is not installed."""
    subject = SUBJECTS[name]
    # A bridge changes the model that it is given.
    shared = subject.implementation if name != "bridge patterns" else name
    if shared not in models:
        models[shared] = build_model(layers, subject.implementation)
    ids = torch.randint(0, 49152, (1, tokens), generator=torch.Generator().manual_seed(0))
    try:
        return subject.prepare(models[shared], ids)
    except ImportError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return None


def time_in_turn(tokens: int, layers: int, rounds: int, subjects: list[str]) -> dict[str, list[float]]:
    """Run all subjects in turn, round by round, after one round that does not count."""
    models: dict[str, Any] = {}
    calls = {name: prepared(name, models, layers, tokens) for name in subjects}
    calls = {name: call for name, call in calls.items() if call is not None}
    times: dict[str, list[float]] = {name: [] for name in calls}
    calls["plain"]()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def memory_of(tokens: int, layers: int, name: str) -> dict[str, int]:
    """Return the bytes of this process with the model loaded, and the most that it held in a call."""
    call = prepared(name, {}, layers, tokens)
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        # What building the model needed is not the call's: Linux can forget the peak so far.
        forget.write_text("5")
    loaded = _peak_bytes()
    call()
    return {"loaded": loaded, "peak": _peak_bytes()}


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    import transformers

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attnprobe": __import__("attnprobe").__version__,
    }


def save(records: list[dict[str, Any]], folder: Path) -> None:
    """Write what has been measured so far: an interruption loses nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), "records": records}, indent=1)
    (folder / "cost.json").write_text(text + "\n")


def table(records: list[dict[str, Any]]) -> Table:
    """Return the records as a table."""
    shown = Table(title="Ratios to the plain forward pass", title_justify="left")
    for name in (
        "tokens",
        "layers",
        "subject",
        "seconds",
        "counted",
        "time",
        "range",
        "peak",
        "above the model",
    ):
        shown.add_column(name, justify="left" if name == "subject" else "right")
    for record in records:
        low, high = record["time_ratio_range"]
        counted = counted_ratio(record["subject"], record["tokens"], record["layers"])
        shown.add_row(
            str(record["tokens"]),
            str(record["layers"]),
            record["subject"],
            f"{record['seconds']:.3g}",
            "" if counted is None else f"{counted:.3f}x",
            f"{record['time_ratio']:.3f}x",
            f"{low:.2f} to {high:.2f}",
            f"{record['peak_ratio']:.2f}x",
            f"{(record['peak_bytes'] - record['loaded_bytes']) / 2**20:,.0f} MB",
        )
    return shown


def picture(records: list[dict[str, Any]], folder: Path) -> None:
    """Draw time and memory against tokens, each axis logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    deepest = max(record["layers"] for record in records)
    looks = {"plain": ("#6b6b6b", "o-"), "measure": ("#1f6fad", "s-"), "receive": ("#008a6e", "^-")}
    looks |= dict(zip(PEERS, (("#c8590c", "D--"), ("#b0208a", "v--"), ("#8a6d00", "x--")), strict=True))
    for name, (colour, style) in looks.items():
        found = [r for r in records if r["subject"] == name and r["layers"] == deepest]
        if not found:
            continue
        tokens = [record["tokens"] for record in found]
        label = "plain forward pass" if name == "plain" else name
        label = f"attnprobe: {name}" if name in OURS else label
        axes[0].loglog(tokens, [r["seconds"] for r in found], style, color=colour, label=label)
        above = [max(r["peak_bytes"] - r["loaded_bytes"], 2**20) / 2**30 for r in found]
        axes[1].loglog(tokens, above, style, color=colour)
    ticks = sorted({record["tokens"] for record in records if record["layers"] == deepest})
    for axis, title in zip(axes, ("seconds", "GiB above the loaded model"), strict=True):
        axis.set_xticks(ticks, [str(count) for count in ticks])
        axis.minorticks_off()
        axis.set_xlabel("tokens")
        axis.set_ylabel(title)
        axis.grid(True, which="both", alpha=0.25)
    axes[0].legend()
    figure.suptitle(f"Reading all heads of a SmolLM2-135M-shaped model ({deepest} layers)")
    figure.savefig(folder / "cost.png", dpi=110)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        what, tokens, layers, rounds = sys.argv[2], *map(int, sys.argv[3:6])
        if what == "time":
            found: Any = time_in_turn(tokens, layers, rounds, sys.argv[6:])
        else:
            found = memory_of(tokens, layers, sys.argv[6])
        print(json.dumps(found))
    else:
        app()

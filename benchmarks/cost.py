"""Time and memory of reading attention, against the plain forward pass and against storing maps.

    python -m benchmarks.cost            # everything: about an hour on two cores
    python -m benchmarks.cost --quick    # a few subjects, up to 2048 tokens: about a minute

Time: one process for each number of tokens runs all subjects in turn, round by round. A plain pass runs
before and after each round, and every other round runs backwards. A subject's ratio is to the mean of the two
plain passes around it, so that a machine that slows down evenly favours none. The median of the rounds'
ratios is reported.

Memory: two processes for each subject. `peak` is the most memory that an ordinary process held. It includes
some 150 MB that the program has freed and the C library's allocator keeps, more or less by chance. In the
second process the allocator returns every piece above 1 MB at once, and `held` is what the program itself
held.

What is left to others: what is run (subjects), the table of docs/performance.md (page).
"""

from __future__ import annotations

import itertools
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
from benchmarks.page import PAGE, markdown, replaced
from benchmarks.subjects import SUBJECTS, build_model

FOLDER = Path(__file__).parent / "results"
# Maps of 30 layers and 9 heads: 4.5 GB at 2048 tokens, 18 GB at 4096.
MOST_TOKENS_WITH_MAPS = 2048
# Above this many tokens a pass takes tens of seconds, and its ratios vary less.
MOST_TOKENS_WITH_ALL_ROUNDS, FEWER_ROUNDS = 2048, 3
# For glibc: return pieces of memory above this many bytes to the system when they are freed.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
OURS = ["measure", "without span", "attached", "five layers", "receive", "as called"]
PEERS = ["eager maps", "bridge patterns", "nnsight maps"]

app = typer.Typer(add_completion=False)
# A table that is piped into a file should not be squeezed into 80 columns.
out = Console(width=None if sys.stdout.isatty() else 120)


@app.command()
def run(
    tokens: Annotated[str, typer.Option(help="Numbers of tokens.")] = "512,1024,2048,4096,8192",
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 30,
    long: Annotated[str, typer.Option(help="Numbers of tokens for two layers only.")] = "8192,16384,32768",
    rounds: Annotated[int, typer.Option(help="Rounds of all subjects; at most 3 above 2048 tokens.")] = 5,
    subjects: Annotated[str, typer.Option(help="Ways of running and reading.")] = ",".join(
        [*OURS, "plain with entropy"]
    ),
    peers: Annotated[str, typer.Option(help="Ways of storing maps to compare with.")] = ",".join(PEERS),
    quick: Annotated[
        bool, typer.Option(help="512 and 2048 tokens, six layers, two rounds, few ways.")
    ] = False,
    output: Annotated[Path, typer.Option(help="The folder for results.")] = FOLDER,
    page: Annotated[
        Path | None,
        typer.Option(help="A page to write the table into; default: docs/performance.md after a full run."),
    ] = None,
) -> None:
    """Measure, print the table, and save results, picture and page."""
    if page is None and not quick and output == FOLDER:
        page = PAGE
    if quick:
        # Most of a quick run is starting processes: few sizes and subjects.
        tokens, layers, long, rounds = "512,2048", 6, "", 2
        subjects, peers = "measure,receive", "eager maps"
    ways = [name for name in f"{subjects},{peers}".split(",") if name]
    jobs = [(int(count), layers, ways) for count in tokens.split(",") if count]
    jobs += [(int(count), 2, OURS[:2]) for count in long.split(",") if count]
    records = []
    for count, depth, names in track(jobs, "measuring", console=Console(stderr=True)):
        chosen = [name for name in names if not SUBJECTS[name].maps or count <= MOST_TOKENS_WITH_MAPS]
        few = count > MOST_TOKENS_WITH_ALL_ROUNDS
        records += measured(count, depth, chosen, min(rounds, FEWER_ROUNDS) if few else rounds, quick)
        save(records, output)
    out.print(table(records))
    for name in dict.fromkeys(record["subject"] for record in records):
        out.print(f"  {name}: {SUBJECTS[name].meaning}", highlight=False)
    picture(records, output)
    if page is not None:
        page.write_text(replaced(page.read_text(), markdown(machine(), records)))


def measured(
    tokens: int, layers: int, subjects: list[str], rounds: int, quick: bool = False
) -> list[dict[str, Any]]:
    """Return a record for each subject that could be run; if quick, without the second memory process."""
    times = child("time", tokens, layers, ["plain", *subjects], rounds)
    plain = None
    records = []
    for name in ["plain", *subjects]:
        if name not in times:
            continue
        memory = child("memory", tokens, layers, [name], 1)
        held = memory if quick else child("memory", tokens, layers, [name], 1, GIVE_BACK)
        ratios = [1.0] if name == "plain" else ratios_to_plain(times[name], times["plain"])
        record = {
            "subject": name,
            "tokens": tokens,
            "layers": layers,
            "rounds": rounds,
            "seconds": statistics.median(times[name]),
            "time_ratio": statistics.median(ratios),
            "time_ratio_range": [min(ratios), max(ratios)],
            "loaded_bytes": held["loaded"],
            "peak_bytes": memory["peak"],
            "held_bytes": held["peak"],
        }
        plain = plain or record
        record["peak_ratio"] = record["peak_bytes"] / plain["peak_bytes"]
        record["held_ratio"] = record["held_bytes"] / plain["held_bytes"]
        records.append(record)
    return records


def ratios_to_plain(seconds: list[float], plain: list[float]) -> list[float]:
    """Return each round's seconds divided by the mean of the plain passes before and after it."""
    around = itertools.pairwise(plain)
    return [ours / statistics.mean(pair) for ours, pair in zip(seconds, around, strict=True)]


def child(
    what: str,
    tokens: int,
    layers: int,
    subjects: list[str],
    rounds: int,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run a measurement in its own process and return what it found."""
    words = [sys.executable, "-m", "benchmarks.cost", "child", what, str(tokens), str(layers), str(rounds)]
    surroundings = {**os.environ, **(environment or {})}
    done = subprocess.run([*words, *subjects], capture_output=True, text=True, check=False, env=surroundings)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words[3:])} {subjects} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def prepared(name: str, models: dict[str, Any], layers: int, tokens: int) -> Any:
    """Return a subject's call, or None if its library is not installed."""
    subject = SUBJECTS[name]
    # Not shared with a bridge, which changes the model that it is given.
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
    """Time all subjects in turn, round by round; the plain pass runs once more than the others.

    A first plain pass, to warm up, does not count.
    """
    models: dict[str, Any] = {}
    calls = {name: prepared(name, models, layers, tokens) for name in subjects}
    calls = {name: call for name, call in calls.items() if call is not None}
    others = [name for name in calls if name != "plain"]
    times: dict[str, list[float]] = {name: [] for name in calls}

    def timed(name: str) -> None:
        start = time.perf_counter()
        calls[name]()
        times[name].append(time.perf_counter() - start)

    calls["plain"]()
    timed("plain")
    for number in range(rounds):
        for name in others if number % 2 == 0 else reversed(others):
            timed(name)
        timed("plain")
    return times


def memory_of(tokens: int, layers: int, name: str) -> dict[str, int]:
    """Return the bytes of this process with the model loaded, and the most that it held in a call."""
    call = prepared(name, {}, layers, tokens)
    loaded = forget_peak()
    call()
    return {"loaded": loaded, "peak": peak_bytes()}


def forget_peak() -> int:
    """Forget what this process held so far, such as while it built a model; return what it holds now."""
    forget = Path("/proc/self/clear_refs")
    # On Linux only: elsewhere the peak stays.
    if forget.exists():
        forget.write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Return the most bytes that this process has held."""
    # What `getrusage` tells of a process on Linux is at least what its parent held when it was started.
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> dict[str, Any]:
    """Return the machine and library versions that the numbers depend on."""
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
    """Write what has been measured so far, so that an interruption loses nothing."""
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
        "held",
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
            f"{record['held_ratio']:.2f}x",
            f"{(record['held_bytes'] - record['loaded_bytes']) / 2**20:,.0f} MB",
        )
    return shown


def picture(records: list[dict[str, Any]], folder: Path) -> None:
    """Draw time and memory against tokens, on logarithmic axes."""
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
        above = [max(r["held_bytes"] - r["loaded_bytes"], 2**20) / 2**30 for r in found]
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

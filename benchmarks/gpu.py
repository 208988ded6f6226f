"""Time and memory of reading attention on a GPU, against the plain forward pass.

    python -m benchmarks.gpu                        # one GPU: under nine minutes, without the network
    python -m benchmarks.gpu --small --device cpu   # try the script itself: seconds

The model has Qwen3-4B's shape and random weights in bfloat16. In one process and in turn, round by round,
with a plain pass before and after each round, as in `cost`: a reading's ratio is to the mean of the plain
passes around it, and the median of the rounds is reported. The first call of each, which may compile, does
not count, and is reported apart. Memory is the most that the GPU's allocator held during a call.

It writes `gpu.json` and `gpu.md`, which say on what device. What is left to others: what is run (subjects).
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

from benchmarks.cost import FOLDER, ratios_to_plain
from benchmarks.subjects import SUBJECTS

# Qwen3-4B's own shape; a long context, so that long sequences can be run.
SHAPE = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 40960,
}
MEANINGS = {
    "measure": "span, WAAD, FAI[10,100] of all heads",
    "without span": "WAAD, FAI[10,100] of all heads",
    "attached": "WAAD, FAI[10,100] in the user's own pass",
    "five layers": "the training setting: five middle layers",
    "receive": "span, WAAD, FAI to the end, receiver kurtosis",
}


def build_model(device: torch.device, small: bool) -> Any:
    """Return the model with random weights, made where it will run."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = SMALL if small else SHAPE
    config = Qwen3Config(**shape, tie_word_embeddings=True, attn_implementation="sdpa", dtype=torch.bfloat16)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


class Clock:
    """Times calls, with the device's own work, and the memory that they take."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        """Return how long a call takes."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Return the most that was allocated during a call, the model included; None on a CPU."""
        if self.device.type != "cuda":
            call()
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device)


def measured(model: Any, tokens: int, rounds: int, clock: Clock, deadline: float) -> list[dict[str, Any]]:
    """Return a record of the plain pass and of each reading; fewer rounds if time is up."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator).to(clock.device)
    calls = {name: SUBJECTS[name].prepare(model, ids) for name in ("plain", *MEANINGS)}
    first = {name: clock.seconds(call) for name, call in calls.items()}
    peaks = {name: clock.peak_bytes(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    times["plain"].append(clock.seconds(calls["plain"]))
    for number in range(rounds):
        for name in MEANINGS if number % 2 == 0 else reversed(MEANINGS):
            times[name].append(clock.seconds(calls[name]))
        times["plain"].append(clock.seconds(calls["plain"]))
        if time.perf_counter() > deadline:
            break
    records = []
    for name in calls:
        ratios = [1.0] if name == "plain" else ratios_to_plain(times[name], times["plain"])
        peak, plain = peaks[name], peaks["plain"]
        records.append(
            {
                "subject": name,
                "tokens": tokens,
                "rounds": len(times[name]),
                "seconds": statistics.median(times[name]),
                "first_seconds": first[name],
                "time_ratio": statistics.median(ratios),
                "time_ratio_range": [min(ratios), max(ratios)],
                "peak_bytes": peak,
                "peak_ratio": peak / plain if peak and plain else None,
            }
        )
    return records


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU: only to try the script"
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "attnprobe": __import__("attnprobe").__version__,
    }


def page(where: dict[str, Any], shape: str, records: list[dict[str, Any]], left_out: list[int]) -> str:
    """Return the page."""
    lines = [
        "# Reading attention on a GPU",
        "",
        f"{where['device']}, torch {where['torch']}. {shape}, bfloat16, one example. Time and peak memory "
        "are ratios to the plain forward pass; *first* is the first call, compiling included.",
        "",
        "| tokens | what | time | range | peak | first |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        if record["subject"] == "plain":
            memory = "" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 2**30:.2f} GiB"
            cells = [f"*plain pass: {record['seconds']:.3f} s*", "1", "", memory]
        else:
            low, high = record["time_ratio_range"]
            memory = "" if record["peak_ratio"] is None else f"{record['peak_ratio']:.3f}x"
            cells = [
                MEANINGS[record["subject"]],
                f"**{record['time_ratio']:.2f}x**",
                f"{low:.2f} to {high:.2f}",
                memory,
            ]
        lines.append(f"| {record['tokens']} | {' | '.join(cells)} | {record['first_seconds']:.1f} s |")
    if left_out:
        lines += ["", f"Out of time before: {', '.join(map(str, left_out))} tokens."]
    return "\n".join([*lines, ""])


def run(
    device: Annotated[str, typer.Option(help="Where to run.")] = "cuda",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens.")] = "2048,8192,32768",
    rounds: Annotated[int, typer.Option(help="Rounds of all readings.")] = 5,
    small: Annotated[bool, typer.Option(help="A tiny model and few tokens, to try the script.")] = False,
    seconds: Annotated[float, typer.Option(help="Begin nothing new after this long.")] = 420.0,
    output: Annotated[Path, typer.Option(help="The folder for results.")] = FOLDER,
) -> None:
    """Measure, print the page, and save it with the numbers."""
    start, left_out = time.perf_counter(), []
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU with CUDA here: --small --device cpu tries the script")
    if place.type == "cpu" and output == FOLDER:
        output = Path("build") / "bench"
    if small:
        tokens, rounds = "128,256", 2
    output.mkdir(parents=True, exist_ok=True)
    model, clock = build_model(place, small), Clock(place)
    where, shape = machine(place), "A tiny model" if small else "Qwen3-4B's shape"
    records: list[dict[str, Any]] = []
    for count in map(int, tokens.split(",")):
        if time.perf_counter() - start > seconds:
            left_out.append(count)
        else:
            records += measured(model, count, rounds, clock, start + seconds)
        # After each number of tokens, so that an interruption loses little.
        text = json.dumps({"machine": where, "shape": shape, "records": records}, indent=1)
        (output / "gpu.json").write_text(text + "\n")
        (output / "gpu.md").write_text(page(where, shape, records, left_out))
    print(page(where, shape, records, left_out))


if __name__ == "__main__":
    typer.run(run)

"""Memory and time of `measure` through each backend, against the backend's own way to get attention maps.

    python -m benchmarks.backends                     # T = 2048, a SmolLM2-shaped model
    python -m benchmarks.backends --tokens 256 --layers 4 --repeats 1

Each way runs in its own process, since a process rarely returns memory: it loads the model with random
weights, runs a small pass to warm up, records the memory of the process, runs the pass, and reports how far
memory rose above that. The ways are interleaved over the repeats, and medians are printed. The usual ways end
with the maps of all layers, before anything is computed from them; `measure` ends with span, WAAD, FAI and
entropy.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.subjects import build_model

os.environ["HF_HUB_OFFLINE"] = "1"
MEBIBYTE = 2**20
BACKENDS = ("transformers", "transformer_lens", "nnsight")
USUAL = {
    "transformers": "eager, output_attentions=True",
    "transformer_lens": "run_with_cache of hook_pattern",
    "nnsight": "eager trace that saves the maps",
}


def measured(model: Any, ids: torch.Tensor) -> Any:
    """Measure span, WAAD, FAI and entropy of every head."""
    import attnprobe

    return attnprobe.measure(model, attnprobe.TokenBatch.from_ids(ids, response_start=ids.shape[1] // 4))


def usual(backend: str, model: Any, ids: torch.Tensor) -> Any:
    """Get the maps of all layers in the backend's own usual way."""
    if backend == "transformers":
        return model(ids, output_attentions=True, use_cache=False)
    if backend == "transformer_lens":
        return model.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_pattern"))
    maps = []
    with model.trace(ids, use_cache=False):
        for layer in model.model.layers:
            maps.append(layer.self_attn.output[1].save())
        logits = model.output.logits.save()
    return maps, logits


def run_one(backend: str, way: str, tokens: int, layers: int) -> None:
    """Run one way once, and print what it took."""
    warnings.simplefilter("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    # A bridge sets eager attention when it loads a model itself; nnsight has no maps without it.
    implementation = "eager" if way == "usual" or backend == "transformer_lens" else "sdpa"
    model = build_model(layers, implementation)
    from attnprobe.testing.backends import BACKENDS as WRAPS

    model = WRAPS[backend](model)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 49152, (1, tokens), generator=generator)
    act = measured if way == "measure" else lambda m, i: usual(backend, m, i)
    with torch.no_grad():
        act(model, ids[:, :32])
        before = resident()
        with Peak() as peak:
            start = time.perf_counter()
            result = act(model, ids)
            seconds = time.perf_counter() - start
    del result
    print(json.dumps({"seconds": seconds, "mebibytes": (peak.bytes - before) / MEBIBYTE}))


def compared(own: dict[str, float], ours: dict[str, float], unit: str) -> str:
    """Say how many times less, or more, time or memory our way took than the backend's own."""
    if ours[unit] <= own[unit]:
        return f"{own[unit] / ours[unit]:.1f} times less"
    return f"{ours[unit] / own[unit]:.1f} times more"


class Peak:
    """The largest resident memory of this process while the context is open."""

    def __enter__(self) -> Peak:
        self.bytes = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, resident())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, resident())


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    """Run every way in its own process, interleaved, and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="length of the sequence")
    parser.add_argument("--layers", type=int, default=30, help="layers of the model")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    parser.add_argument("--one", nargs=2, metavar=("BACKEND", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        torch.set_num_threads(arguments.threads)
        run_one(*arguments.one, arguments.tokens, arguments.layers)
        return
    ways = [(backend, way) for backend in BACKENDS for way in ("usual", "measure")]
    taken: dict[tuple[str, str], list[dict[str, float]]] = {way: [] for way in ways}
    for repeat in range(arguments.repeats):
        for backend, way in ways:
            command = [sys.executable, "-m", "benchmarks.backends", "--one", backend, way]
            command += ["--tokens", str(arguments.tokens), "--layers", str(arguments.layers)]
            command += ["--threads", str(arguments.threads)]
            print(f"run {repeat + 1}: {backend}, {way}", file=sys.stderr, flush=True)
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            taken[backend, way].append(json.loads(done.stdout.strip().splitlines()[-1]))
    print(
        f"T = {arguments.tokens}, {arguments.layers} layers, {arguments.threads} threads, torch "
        f"{torch.__version__}, medians of {arguments.repeats} runs, each in its own process\n"
    )
    print("| backend | way | memory above the model | time |")
    print("| --- | --- | --- | --- |")
    for backend in BACKENDS:
        median = {
            way: {
                unit: statistics.median(run[unit] for run in taken[backend, way])
                for unit in ("mebibytes", "seconds")
            }
            for way in ("usual", "measure")
        }
        own, ours = median["usual"], median["measure"]
        print(f"| {backend} | {USUAL[backend]} | {own['mebibytes']:.0f} MiB | {own['seconds']:.2f} s |")
        print(
            f"| | `attnprobe.measure` | {ours['mebibytes']:.0f} MiB, **{compared(own, ours, 'mebibytes')}** "
            f"| {ours['seconds']:.2f} s, **{compared(own, ours, 'seconds')}** |"
        )


if __name__ == "__main__":
    main()

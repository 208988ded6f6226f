"""What credit holds in memory: peak bytes of weighing a rollout, by step and by the number of its rows.

    python -m benchmarks.rollout_memory --rows 8 32 64

The model has as many layers and heads as SmolLM2-135M, but is narrow: what is held of each head and token
does not depend on its width, and would otherwise be hidden by what a pass needs. Each kind runs in a process
of its own: `RolloutCredit.weigh` at a step that does not regroup heads, at one that does, and
`measure_rollout` of the whole rollout followed by its scores, which holds the statistics of all heads until
then. What is printed is the peak above the loaded model, in MiB and in multiples of one float32 number for
each row, layer, head and completion token; and what each further row adds, in such multiples.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnprobe.rl import CoupledRhythmCredit, Rollout, RolloutCredit, measure_rollout, score_rollout
from benchmarks.cost import forget_peak, peak_bytes
from benchmarks.subjects import SHAPE

KINDS = ("weigh", "weigh and regroup", "all at once")
HEADS, VOCABULARY = SHAPE["num_attention_heads"], 4096


def made_up_rollout(rows: int, tokens: int) -> Rollout:
    """Return prompts of 64 tokens, and completions of one length."""
    generator = torch.Generator().manual_seed(0)
    prompts, completions = (
        torch.randint(1, VOCABULARY, (rows, count), generator=generator) for count in (64, tokens)
    )
    return Rollout(prompts, torch.ones_like(prompts), completions, torch.ones_like(completions))


def narrow_model(layers: int) -> Any:
    """Return a model of SmolLM2's heads, each 8 wide."""
    torch.manual_seed(0)
    narrow = {"hidden_size": 8 * HEADS, "intermediate_size": 24 * HEADS, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **{**SHAPE, **narrow})).eval()


def prepared(kind: str, options: argparse.Namespace, rows: int) -> Callable[[], object]:
    """Return the call to measure; the model is loaded, and has run."""
    model = narrow_model(options.layers)
    settings = {"layers": "all", "token_budget": options.token_budget}
    credit = RolloutCredit(model, CoupledRhythmCredit(), **settings)
    # Groups of heads, and everything that is made once.
    credit.weigh(made_up_rollout(2, 64), torch.ones(2), step=0)
    rollout, advantages = made_up_rollout(rows, options.tokens), torch.ones(rows)
    if kind == "all at once":
        return lambda: score_rollout(measure_rollout(model, rollout, **settings), credit.groups, rollout)
    step = 0 if kind == "weigh" else 10
    assert credit.regroups_at(step) == (kind == "weigh and regroup")
    return lambda: credit.weigh(rollout, advantages, step=step)


def measured(kind: str, options: argparse.Namespace, rows: int) -> int:
    """Return the peak of one kind above the loaded model, in bytes, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.rollout_memory", "--only", kind, "--rows", str(rows)]
    for name in ("layers", "tokens", "token_budget"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    """Measure, print a table, and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 64], help="completions in the rollout")
    parser.add_argument("--tokens", type=int, default=512, help="of each completion")
    parser.add_argument("--layers", type=int, default=30, help="of the model; all are measured")
    parser.add_argument("--token-budget", type=int, default=4096, help="tokens that run at a time")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only:
        call = prepared(options.only, options, options.rows[0])
        before = forget_peak()
        call()
        print(peak_bytes() - before)
        return
    each = options.layers * HEADS * options.tokens * 4
    peaks = {kind: {rows: measured(kind, options, rows) for rows in options.rows} for kind in KINDS}
    print("| " + " | ".join(["", *(f"{rows} rows" for rows in options.rows), "each further row"]) + " |")
    print("| --- |" + " --- |" * (len(options.rows) + 1))
    first, last = min(options.rows), max(options.rows)
    for kind, found in peaks.items():
        cells = [f"{peak / 2**20:.0f} MiB, {peak / (rows * each):.1f}" for rows, peak in found.items()]
        added = found[last] - found[first]
        cells.append(f"{added / ((last - first) * each):.2f}" if last > first else "")
        print("| " + " | ".join([kind, *cells]) + " |", flush=True)
    if options.output:
        options.output.write_text(
            json.dumps({**vars(options), "output": None, "peaks": peaks}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()

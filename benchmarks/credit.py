"""What credit costs: the wall time of a GRPO step, generation included, and peak memory.

    python benchmarks/credit.py --repeats 5 --output credit.json

One trainer on a model of SmolLM2-135M's shape with random weights takes whole steps (generate, score,
loss, backward, optimizer): in turn without credit, with credit, and with credit in a step that regroups
heads, which measures all completions rather than only those whose weights can matter. The kinds are
interleaved, so that other load on the machine affects all of them alike. The script reports medians and
ratios to the plain step, and the ratio for a run that regroups heads every tenth step. Peak memory is that of
a process that takes only one kind of step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from attnprobe.rl import CoupledRhythmCredit, attach_credit
from attnprobe.testing.tiny_models import tiny_tokenizer
from attnprobe.testing.tiny_trainers import even_ids

KINDS = ("plain", "credit", "regroup")
REGROUP_EVERY = 10


def make_trainer(options: argparse.Namespace, folder: str) -> Any:
    """Return a trainer on a model of SmolLM2-135M's shape, or a smaller one, with random weights."""
    small = {"num_hidden_layers": 6, "hidden_size": 192, "intermediate_size": 512, "vocab_size": 4096}
    shape = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152}
    config = LlamaConfig(
        **(small if options.small else shape),
        num_attention_heads=9 if not options.small else 3,
        num_key_value_heads=3 if not options.small else 1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    # The tiny tokenizer is byte-level: one letter is one token, so that prompts have the requested length.
    prompts = ["x" * options.prompt_tokens] * 64
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    return GRPOTrainer(
        model=LlamaForCausalLM(config),
        processing_class=tokenizer,
        reward_funcs=even_ids,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        args=GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=options.batch_size,
            num_generations=options.batch_size,
            max_completion_length=options.completion_tokens,
            generation_kwargs={"min_new_tokens": options.completion_tokens},
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            learning_rate=1e-6,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
    )


class Steps:
    """Takes single steps of a trainer, as its own training loop does."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.batches = iter(trainer.get_train_dataloader())
        self.optimizer = trainer.create_optimizer()
        self.heads: Any = None
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()

    def take(self, kind: str) -> tuple[float, float]:
        """Take one step of a kind; return its seconds, and those that credit itself reports."""
        trainer = self.trainer
        handle = None
        if kind != "plain":
            heads = None if kind == "regroup" else self.heads
            handle = attach_credit(trainer, CoupledRhythmCredit(), heads=heads)
        batch = next(self.batches)
        _synchronize()
        started = time.perf_counter()
        trainer.training_step(trainer.model, batch, None)
        self.optimizer.step()
        self.optimizer.zero_grad()
        _synchronize()
        seconds = time.perf_counter() - started
        own = trainer._metrics["train"].pop("credit/seconds", [0.0])[-1]
        if handle is not None:
            self.heads = handle.groups
            handle.detach()
        return seconds, own


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> float:
    """Return the peak memory of this process in MiB: on the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    # Not ru_maxrss: on Linux a process inherits it from its parent.
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def memory_of(kind: str, arguments: list[str]) -> float:
    """Return the peak memory of a separate process that takes two steps of a kind."""
    command = [sys.executable, __file__, *arguments, "--only", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measure, print, and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="steps of each kind")
    parser.add_argument("--batch-size", type=int, default=4, help="completions in a step: one group")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--completion-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--small", action="store_true", help="use a small model, to try the script")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--only", choices=KINDS, help="take two steps of one kind; print peak memory")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(make_trainer(options, folder))
        if options.only:
            for kind in ("regroup", "credit") if options.only == "credit" else (options.only,) * 2:
                steps.take(kind)
            print(peak_memory())
            return
        steps.take("plain")
        steps.take("regroup")
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        own: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for repeat in range(options.repeats):
            # Each round starts with a different kind, so that drift favours none.
            for kind in KINDS[repeat % 3 :] + KINDS[: repeat % 3]:
                taken, inside = steps.take(kind)
                seconds[kind].append(taken)
                own[kind].append(inside)
                print(f"{kind:8} {taken:8.2f} s, of which credit {inside:6.2f} s", flush=True)
    report = summary(options, seconds, own)
    if not options.no_memory:
        sizes = ("batch_size", "prompt_tokens", "completion_tokens")
        arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in sizes]
        arguments += [f"--threads={torch.get_num_threads()}", *(["--small"] if options.small else [])]
        report["peak_memory_mib"] = {kind: memory_of(kind, arguments) for kind in KINDS}
    print(json.dumps(report, indent=2))
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


def summary(options: argparse.Namespace, seconds: dict[str, list[float]], own: dict[str, list[float]]) -> Any:
    """Return medians and ratios to the plain step, by the clock and by the seconds that credit reports."""
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    ratios = {kind: medians[kind] / medians["plain"] for kind in KINDS}
    # Within each step, so that a slow moment of the machine affects both parts.
    shares = {
        kind: statistics.median(a / (s - a) for a, s in zip(own[kind], seconds[kind], strict=True))
        for kind in KINDS
    }
    once = 1 / REGROUP_EVERY
    return {
        "shape": "small" if options.small else "SmolLM2-135M",
        "batch": options.batch_size,
        "prompt_tokens": options.prompt_tokens,
        "completion_tokens": options.completion_tokens,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "step_seconds": seconds,
        "credit_seconds": own,
        "median_step_seconds": medians,
        "ratio_to_plain_step": ratios,
        "credit_over_rest_of_step": shares,
        "overhead_by_clock": (1 - once) * ratios["credit"] + once * ratios["regroup"] - 1,
        "overhead_by_credit_seconds": (1 - once) * shares["credit"] + once * shares["regroup"],
    }


if __name__ == "__main__":
    main()

"""What the weights of a rollout cost: by a pass of credit's own, and by watching the trainer's, by precision.

    python -m benchmarks.credit_pass --repeats 5 --output credit_pass.json

The yardstick is the log-probability pass that trainers run over a rollout: micro-batches of similar length
under a token budget, logits of the completions, no gradients. In turn, over the same rollout of mixed
lengths, on a model of SmolLM2-135M's shape with random weights: that pass alone; the same pass watched; and
credit's own pass, each with and without classifying heads. Kinds are interleaved, so that other load on the
machine affects all of them alike; what is reported are medians of the ratios within each round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from attnprobe.rl import CoupledRhythmCredit, Rollout, RolloutCredit
from benchmarks.subjects import SHAPE, build_model

KINDS = ("pass alone", "watched", "watched, regrouping", "own pass", "own pass, regrouping")
TOKEN_BUDGET = 4096


def made_up_rollout(rows: int, longest: int, vocabulary: int) -> Rollout:
    """Return prompts of 64 tokens, and completions of a tenth of the longest to the longest."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 10, longest + 1, (rows,), generator=generator).tolist()

    def ids(count: int) -> torch.Tensor:
        return torch.randint(1, vocabulary, (count,), generator=generator)

    return Rollout.from_lists([ids(64) for _ in lengths], [ids(length) for length in lengths])


class Policy:
    """A policy with the pass that trainers run over its rollouts."""

    def __init__(self, options: argparse.Namespace, precision: str) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build_model(options.layers, "sdpa").to(self.device)
        self.half = precision == "bfloat16"
        self.rollout = made_up_rollout(options.rows, options.completion_tokens, SHAPE["vocab_size"])
        asked, written = self.rollout.prompt_ids, self.rollout.per_completion(self.rollout.completion_ids)
        rows = [torch.cat(pair) for pair in zip(asked, written, strict=True)]
        self.batches: list[list[torch.Tensor]] = [[]]
        for row in sorted(rows, key=len):
            if (len(self.batches[-1]) + 1) * len(row) > TOKEN_BUDGET and self.batches[-1]:
                self.batches.append([])
            self.batches[-1].append(row)

    def precision(self) -> Any:
        """Return the autocast that a trainer puts around its passes."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.half else nullcontext()

    @torch.no_grad()
    def log_probabilities(self) -> None:
        """Run the pass: logits of the completions, and of each sampled token its log-probability."""
        for rows in self.batches:
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
            lengths = torch.tensor([len(row) for row in rows], device=self.device)
            mask = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
            with self.precision():
                keep = ids.shape[1] - 64
                logits = self.model(
                    input_ids=ids, attention_mask=mask.long(), use_cache=False, logits_to_keep=keep + 1
                ).logits
            lost = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), ids[:, -keep:].flatten(), reduction="none"
            )
            del logits, lost


class Credit(RolloutCredit):
    """Credit in the precision of the trainer's passes."""

    def __init__(self, of: Policy) -> None:
        super().__init__(of.model, CoupledRhythmCredit(), token_budget=TOKEN_BUDGET)
        self._of = of

    def precision(self) -> Any:
        """Return the autocast of the trainer's passes."""
        return self._of.precision()


def seconds_of(kind: str, policy: Policy, state: dict[str, Any]) -> float:
    """Return how long one kind of work over the rollout takes."""
    credit = Credit(policy)
    if "regrouping" not in kind:
        credit.load_state_dict(state)
    advantages = torch.ones(len(policy.rollout.completion_ids))
    _synchronize()
    started = time.perf_counter()
    if kind == "pass alone":
        policy.log_probabilities()
    elif kind.startswith("own pass"):
        credit.weigh(policy.rollout, advantages, 0)
    else:
        with credit.watching(policy.model, policy.rollout, 0) as watched:
            policy.log_probabilities()
        watched.weigh(advantages)
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios_of(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Return how long each kind takes, relative to the pass alone, and how much the weights differ."""
    policy = Policy(options, precision)
    credit = Credit(policy)
    advantages = torch.ones(options.rows)
    gamma = credit.weigh(policy.rollout, advantages, 0)
    state = credit.state_dict()
    with credit.watching(policy.model, policy.rollout, 0) as watched:
        policy.log_probabilities()
    # In half precision a score near the threshold may fall on its other side.
    differing = (watched.weigh(advantages) != gamma).double().mean()
    rounds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for repeat in range(options.repeats):
        # Each round starts with a different kind, so that drift favours none.
        first = repeat % len(KINDS)
        for kind in KINDS[first:] + KINDS[:first]:
            rounds[kind].append(seconds_of(kind, policy, state))
    ratios = {
        kind: [own / plain for own, plain in zip(rounds[kind], rounds["pass alone"], strict=True)]
        for kind in KINDS[1:]
    }
    for kind, values in ratios.items():
        low, high = min(values), max(values)
        print(
            f"{precision:9} {kind:22} {statistics.median(values):.3f} ({low:.3f} to {high:.3f})", flush=True
        )
    return {
        "ratio_to_pass": {kind: statistics.median(values) for kind, values in ratios.items()},
        "ratios": ratios,
        "seconds": rounds,
        "weights_that_differ": float(differing),
    }


def main() -> None:
    """Measure, print, and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="rounds of all kinds")
    parser.add_argument("--rows", type=int, default=16, help="completions in the rollout")
    parser.add_argument("--completion-tokens", type=int, default=512, help="of the longest")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--layers", type=int, default=30, help="of the model; few, to try the script")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "layers": options.layers,
        "rows": options.rows,
        "completion_tokens": options.completion_tokens,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{precision: ratios_of(options, precision) for precision in ("float32", "bfloat16")},
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

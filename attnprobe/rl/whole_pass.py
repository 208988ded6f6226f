"""Measuring a sharded policy: whole passes of the module that holds it, as many in every process.

Parameters that are sharded over processes are gathered by all of them together. `RolloutCredit` measures
such a policy by `measure_in_step`, through a `WholePassAdapter`. What is left to others: reading (adapters),
and what is measured (scoring).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnprobe.adapters.forward_output import logits_of
from attnprobe.adapters.transformers import TransformersAdapter
from attnprobe.batch import TokenBatch
from attnprobe.batch_run import BatchRun
from attnprobe.head_statistics import HeadStatistics
from attnprobe.rl.processes import Processes
from attnprobe.rl.rollout import Rollout
from attnprobe.rl.scoring import measure_rollout


class WholePassAdapter(TransformersAdapter):
    """Reads a policy in complete forward passes of the module that holds it.

    Sharded parameters (FSDP, DeepSpeed) are gathered by hooks around whole forward passes of the root
    module. So the root module is called, not the policy inside it, and a pass never stops after the last
    layer of interest.

    Args:
        policy: a transformers causal language model.
        root: the module around it that the trainer calls; it may be the policy itself.

    Raises:
        UnsupportedModelError: a policy whose attention cannot be read.
    """

    def __init__(self, policy: Any, root: nn.Module) -> None:
        super().__init__(policy)
        self._root = root

    def forward(
        self, batch: TokenBatch, *, logits_at: Int[Tensor, " position"] | None = None
    ) -> Float[Tensor, "batch position vocabulary"] | None:
        """Run the root module over right-padded sequences to its end, whether or not logits are needed."""
        # A pass that must return logits, here of one position, does not stop early.
        at = torch.zeros(1, dtype=torch.long) if logits_at is None else logits_at
        logits = super().forward(batch, logits_at=at)
        return None if logits_at is None else logits

    def _all_modules(self) -> Iterator[nn.Module]:
        return self._root.modules()

    def _logits(self, arguments: dict[str, Any]) -> Tensor | None:
        return logits_of(self._root(**arguments))


def measure_in_step(
    adapter: WholePassAdapter,
    rollout: Rollout | None,
    filler: Rollout,
    processes: Processes,
    *,
    batch_size: int | None,
    token_budget: int | None,
    **options: Any,
) -> HeadStatistics | None:
    """Return the statistics of this process's completions, after as many passes as in every other process.

    Args:
        adapter: reads the policy in whole passes.
        rollout: the completions to measure; None if there are none in this process.
        filler: any completion, for the passes of a process that has fewer to make than another.
        processes: those that hold the policy's parameters.
        batch_size, token_budget, options: the arguments of `measure_rollout`.
    """
    sizes: dict[str, Any] = {"batch_size": batch_size, "token_budget": token_budget}
    own, statistics = 0, None
    if rollout is not None:
        own = len(BatchRun.prepare(adapter, rollout.batch(), options["layers"], **sizes).together)
    passes = processes.largest(own, adapter.device)
    if rollout is not None:
        statistics = measure_rollout(adapter, rollout, **sizes, **options)
    for _ in range(passes - own):
        measure_rollout(adapter, filler, **options)
    return statistics

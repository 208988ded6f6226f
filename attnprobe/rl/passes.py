"""Measuring a rollout pass by pass, so that no more is held than the statistics of one pass.

The statistics of all heads over a whole rollout are many times as large as the scores that credit needs.
`RolloutCredit` turns those of each pass into scores before the next one. Parameters that are sharded are
gathered by all processes together: each then makes the same number of passes. What is left to others: what
runs together (batch_run), measuring (scoring), and what is done with it (rollout_credit).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from attnprobe.adapters import adapter_for
from attnprobe.batch_run import BatchRun
from attnprobe.head_statistics import HeadStatistics
from attnprobe.rl.processes import Processes
from attnprobe.rl.rollout import Rollout
from attnprobe.rl.scoring import measure_rollout


def measured_in_passes(
    model: Any,
    rollout: Rollout,
    measured: Bool[Tensor, " completion"],
    *,
    processes: Processes,
    in_step: bool,
    precision: Callable[[], AbstractContextManager[Any]],
    layers: tuple[int, ...],
    batch_size: int | None,
    token_budget: int | None,
    **options: Any,
) -> Iterator[tuple[Bool[Tensor, " completion"], HeadStatistics]]:
    """Yield the statistics of the completions of each pass, with the mask that chooses them.

    Args:
        model: the policy, or an adapter for it.
        rollout: prompts and completions.
        measured: which completions to measure; there may be none.
        processes: those that train the policy.
        in_step: whether every process makes as many passes as the one that needs most.
        precision: returns the context of a pass.
        layers, batch_size, token_budget, options: the arguments of `measure_rollout`.
    """
    adapter = adapter_for(model)
    rows, together = measured.nonzero()[:, 0], list[list[int]]()
    if len(rows):
        batch = rollout.select(measured).batch()
        together = BatchRun.prepare(adapter, batch, layers, batch_size, token_budget=token_budget).together
    passes = processes.largest(len(together), adapter.device) if in_step else len(together)
    first = torch.arange(len(measured), device=measured.device) == 0
    for number in range(passes):
        chosen = first
        if number < len(together):
            chosen = torch.zeros_like(measured)
            chosen[rows[together[number]]] = True
        # Not around the yield: the precision of a pass is not that of whoever asks for it.
        with precision():
            statistics = measure_rollout(
                adapter, rollout.select(chosen), layers=layers, batch_size=int(chosen.sum()), **options
            )
        if number < len(together):
            yield chosen, statistics

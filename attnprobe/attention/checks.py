"""Checks of numbers that a device is still computing: judged together when a forward pass ends.

To read a number from an accelerator is to wait for all that was queued before it, and a check in every layer
would keep the device from ever having work ahead. So a check gives its numbers to `judge_later`. While a
reading gathers them (`GatheredChecks.open`), they wait, and `settle` fetches those of all layers at once;
anywhere else they are judged on the spot. Row sums, the output check and the sums of a cache make checks,
and `Reading` settles them before a probe learns that the pass is complete. What is left to others: what is
checked, and what an error says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

Judge = Callable[[list[float]], None]
"""A function that is given the numbers of a check, and raises an error if they are wrong."""

MOST_HELD = 256 * 2**20
"""How many bytes checks may keep for their errors before the pass ends; with more, they are settled."""

_gathering: ContextVar[GatheredChecks | None] = ContextVar("attnprobe_gathered_checks", default=None)


@dataclass(frozen=True, eq=False)
class _Check:
    numbers: Sequence[Tensor]
    judge: Judge


class GatheredChecks:
    """Checks of a pass that wait to be judged, in the order in which they were made.

    >>> def judge(numbers):
    ...     assert numbers[0] < 1, f"{numbers[0]} is too much"
    >>> checks = GatheredChecks()
    >>> with checks.open():
    ...     judge_later([torch.tensor(2.0)], judge)
    >>> checks.settle()
    Traceback (most recent call last):
    AssertionError: 2.0 is too much
    """

    def __init__(self) -> None:
        self._checks: list[_Check] = []
        self._held = 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """Gather the checks that are made while the context is open."""
        token = _gathering.set(self)
        try:
            yield
        finally:
            _gathering.reset(token)

    def add(self, numbers: Sequence[Tensor], judge: Judge, held: int = 0) -> None:
        """Add a check; see `judge_later`."""
        self._checks.append(_Check(numbers, judge))
        self._held += held
        if self._held > MOST_HELD:
            self.settle()

    def settle(self) -> None:
        """Fetch the numbers of all checks, one transfer for each device, and judge them.

        Raises:
            AttnprobeError: what the first check that fails raises; those after it are dropped.
        """
        checks = self._checks
        self.clear()
        by_device: dict[torch.device, list[Tensor]] = {}
        for check in checks:
            for number in check.numbers:
                by_device.setdefault(number.device, []).append(number.detach().float())
        fetched = {device: iter(torch.stack(numbers).tolist()) for device, numbers in by_device.items()}
        for check in checks:
            check.judge([next(fetched[number.device]) for number in check.numbers])

    def clear(self) -> None:
        """Forget all checks: the pass has failed."""
        self._checks, self._held = [], 0


def judge_later(numbers: Sequence[Tensor], judge: Judge, held: int = 0) -> None:
    """Judge numbers when the pass that is being read ends; at once if none is.

    Args:
        numbers: tensors of one number each, without axes; they are judged in float32.
        judge: what raises the error. It is kept until then, with all that it refers to, so it should refer
            to little.
        held: how many bytes that is, if it is more than a few numbers for each token and head.
    """
    gathering = _gathering.get()
    if gathering is None:
        gathering = GatheredChecks()
        gathering.add(numbers, judge)
        gathering.settle()
    else:
        gathering.add(numbers, judge, held)

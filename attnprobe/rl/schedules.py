"""Schedules: how much of its bonus a strategy gives at each step of a run.

`RolloutCredit` takes one as `schedule`: any callable `step -> factor`. A weight gamma becomes
`1 + factor * (gamma - 1)`, so that 0 means no credit and 1 what the strategy says. `warmup` and `decay` make
the usual ones. What is left to others: the weights (credit).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

from attnprobe.errors import ParameterError
from attnprobe.validation import FloatField, FloatLike, IntField, IntLike, brief, real_number, whole_number


@dataclass(frozen=True)
class Ramp:
    """A factor that changes linearly between two steps, and is constant before and after.

    Attributes:
        begin, end: the first and the last step of the change.
        before, after: the factor until `begin`, and from `end` on.

    Raises:
        ParameterError: steps that are no whole numbers or in the wrong order, or a factor that is negative or
            not finite.

    >>> ramp = Ramp(10, 20, before=1.0, after=0.5)
    >>> ramp(0), ramp(15), ramp(100)
    (1.0, 0.75, 0.5)
    """

    begin: IntField
    end: IntField
    before: FloatField
    after: FloatField

    def __post_init__(self) -> None:
        begin = whole_number(self.begin, "begin")
        for name, value in (
            ("begin", begin),
            ("end", whole_number(self.end, "end", minimum=begin)),
            ("before", real_number(self.before, "before", minimum=0, below=inf)),
            ("after", real_number(self.after, "after", minimum=0, below=inf)),
        ):
            object.__setattr__(self, name, value)

    def __call__(self, step: int) -> float:
        """Return the factor at a step."""
        if step >= self.end:
            return self.after
        way = max(0, step - self.begin) / (self.end - self.begin) if self.end > self.begin else 0.0
        return self.before + way * (self.after - self.before)


def warmup(steps: IntLike) -> Ramp:
    """Return a schedule that rises from 0 to 1 in the first steps of a run.

    >>> [warmup(4)(step) for step in range(5)]
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    return Ramp(0, whole_number(steps, "steps", minimum=1), before=0.0, after=1.0)


def decay(steps: IntLike, *, begin: IntLike = 0, to: FloatLike = 0.0) -> Ramp:
    """Return a schedule that falls from 1 to `to` within some steps, from step `begin` on.

    >>> [decay(2, begin=1)(step) for step in range(5)]
    [1.0, 1.0, 0.5, 0.0, 0.0]
    """
    first = whole_number(begin, "begin")
    return Ramp(
        first,
        first + whole_number(steps, "steps", minimum=1),
        before=1.0,
        after=real_number(to, "to", minimum=0, below=inf),
    )


def factor_at(schedule: Any, step: int) -> float:
    """Return a schedule's factor at a step, after checking it; 1 without a schedule.

    Raises:
        ParameterError: a factor that is negative or not finite.

    >>> factor_at(None, 3), factor_at(lambda step: step / 10, 3)
    (1.0, 0.3)
    """
    if schedule is None:
        return 1.0
    return real_number(schedule(step), f"the schedule's factor at step {step}", minimum=0, below=inf)


def check_schedule(schedule: Any) -> Any:
    """Return a schedule, or None, after checking that it can be called, and gives a factor at step 0.

    Raises:
        ParameterError: it cannot, or it gives none.
    """
    if schedule is None:
        return None
    needed = "schedule must be a callable `step -> factor`, such as warmup(100)"
    if not callable(schedule) or isinstance(schedule, type):
        raise ParameterError(f"{needed}; got {brief(schedule)}")
    if schedule in (warmup, decay):
        raise ParameterError(f"{needed}; {schedule.__name__} returns one: call it")
    factor_at(schedule, 0)
    return schedule

"""The two routes by which weights enter a trainer's loss.

`through_advantages` gives the loss one advantage per token; `through_gradient` leaves the loss unchanged and
weights the gradient of its log-probabilities. What is left to others: which of them a trainer honours
(canary), computing the weights (trainer_credit), and installing the route (attach).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor

from attnprobe.rl.advantage import gate_gradient

Through = Literal["auto", "advantages", "gradient"]
Route = Callable[..., Tensor]

LOGPS = "_get_per_token_logps_and_entropies"
"""The method of a trainer from which its loss takes log-probabilities and entropies."""


def through_advantages(
    trainer: Any,
    compute_loss: Callable[..., Tensor],
    weights: Tensor,
    model: Any,
    inputs: Any,
    **options: Any,
) -> Tensor:
    """Return the trainer's loss with one weighted advantage per token."""
    advantages = inputs["advantages"]
    spread = advantages if advantages.ndim == 2 else advantages[:, None]
    weighted = (spread * weights).to(advantages.dtype)
    return compute_loss(model, {**inputs, "advantages": weighted}, **options)


def through_gradient(
    trainer: Any,
    compute_loss: Callable[..., Tensor],
    weights: Tensor,
    model: Any,
    inputs: Any,
    **options: Any,
) -> Tensor:
    """Return the trainer's own loss, with weighted gradients of the log-probabilities."""
    original = getattr(trainer, LOGPS)

    def gated(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        logps, *others = original(*args, **kwargs)
        return (gate_gradient(logps, weights), *others)

    with replaced(trainer, LOGPS, gated):
        return compute_loss(model, inputs, **options)


ROUTES: dict[str, Route] = {"advantages": through_advantages, "gradient": through_gradient}


@contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of one object, and afterwards restore the object's own, if it had one."""
    own = vars(target)
    missing = object()
    before = own.get(name, missing)
    setattr(target, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(target, name)
        else:
            setattr(target, name, before)

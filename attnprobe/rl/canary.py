"""`honours_weights`: whether a loss multiplies the gradient of each token by the token's weight.

Many losses do not: sequence-level importance ratios average the advantages of a completion, geometric means
take one advantage for all its tokens, and some normalise advantages again. Whoever weights advantages should
try the loss out once, on made-up log-probabilities, before a run. `differ` is the comparison that the trials
of TRL's trainers make too. What is left to others: trials of a whole trainer (trl), and the weights (credit).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.errors import ParameterError
from attnprobe.rl.advantage import gate_gradient
from attnprobe.validation import brief

_TOLERANCE = 1e-4

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A loss: `(log_probs, old_log_probs, advantages, mask) -> loss`, all `[completion, token]`, and a scalar."""


@dataclass(frozen=True)
class Verdict:
    """What came of trying a loss out; true if it honours a weighted advantage for each token.

    Attributes:
        advantages: why weighted advantages are not honoured; None if they are.
        gradient: why weighting the gradient of the log-probabilities instead (`gate_gradient`) does not work
            either; None if it does.
    """

    advantages: str | None
    gradient: str | None

    def __bool__(self) -> bool:
        return self.advantages is None


def honours_weights(loss: Loss) -> Verdict:
    """Try out a loss on made-up completions, and return whether it honours a weight for each token.

    The gradient of each log-probability must be multiplied by the token's weight, apart from what of it does
    not depend on the advantages (a KL or entropy term). The loss is called several times, with tensors of 3
    completions and 5 tokens, one of which is padding; it must not change anything.

    Args:
        loss: `(log_probs, old_log_probs, advantages, mask) -> loss`. Advantages are `[completion, token]`;
            for a loss that fails on those, `[completion]`.

    Raises:
        ParameterError: a loss that cannot be called, does not depend on advantages, or fails on all of these.

    >>> def clipped(log_probs, old_log_probs, advantages, mask):
    ...     ratio = (log_probs - old_log_probs).exp()
    ...     lost = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    ...     return (lost * mask).sum() / mask.sum()
    >>> bool(honours_weights(clipped))
    True
    >>> def by_sequence(log_probs, old_log_probs, advantages, mask):
    ...     ratio = ((log_probs - old_log_probs) * mask).sum(-1).exp()
    ...     return -(ratio * (advantages * mask).sum(-1) / mask.sum(-1)).mean()
    >>> verdict = honours_weights(by_sequence)
    >>> bool(verdict), verdict.advantages
    (False, 'the gradient of a token is not multiplied by its weight')
    >>> verdict.gradient is None  # but gate_gradient(log_probs, gamma) works
    True
    """
    if not callable(loss):
        raise ParameterError(
            f"a loss is a callable (log_probs, old_log_probs, advantages, mask) -> loss; got {brief(loss)}"
        )
    trial = _Trial(loss)
    return Verdict(trial.reason_against_advantages(), trial.reason_against_gradient())


class _Trial:
    """Runs a loss on made-up completions."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        generator = torch.Generator().manual_seed(0)
        # More tokens than completions: with equal numbers, [completion] times [completion, token] would not
        # fail.
        shape = (3, 5)
        self._log_probs = -0.5 - torch.rand(shape, generator=generator)
        # Some ratios lie outside the usual clip range, on either side.
        self._old = self._log_probs + 0.6 * (torch.rand(shape, generator=generator) - 0.5)
        self._mask = torch.ones(shape)
        self._mask[2, 4] = 0.0
        self._by_completion = torch.tensor([1.0, -0.7, 0.4])
        self._weights = 0.5 + torch.rand(shape, generator=generator)
        self._weights[:, 1] = 0.0  # as strategies that drop tokens give it
        self._weights = torch.where(self._mask.bool(), self._weights, 1.0)
        spread = self._by_completion[:, None].expand(shape)
        self._spread_refused: str | None = None
        try:
            self._run(spread)
            self._advantages = spread
        except _FailedError as error:
            self._spread_refused = str(error)
            self._advantages = self._by_completion
        try:
            self._value, self._plain = self._run(self._advantages)
            _, self._without = self._run(torch.zeros_like(self._advantages))
        except _FailedError as error:
            raise ParameterError(
                f"the loss could not be tried out: {self._spread_refused or error}"
            ) from error
        if not bool((self._plain != self._without).any()):
            raise ParameterError("the loss does not depend on the advantages: there is nothing to weight")

    def reason_against_advantages(self) -> str | None:
        """Return why weighted advantages are not honoured; None if they are."""
        if self._spread_refused is not None:
            return f"it takes one advantage for each completion ({self._spread_refused})"
        _, weighted = self._run(self._advantages * self._weights)
        return self._wrong(weighted)

    def reason_against_gradient(self) -> str | None:
        """Return why weighting the gradient does not work; None if it does."""
        value, weighted = self._run(self._advantages, gated=True)
        if differ(value, self._value):
            return "weighting the gradient changes the loss itself"
        _, without = self._run(torch.zeros_like(self._advantages), gated=True)
        if differ(without, self._without):
            return "a term that does not depend on the advantages, such as a KL term, would be weighted too"
        return self._wrong(weighted)

    def _wrong(self, weighted: Tensor) -> str | None:
        expected = self._without + self._weights * (self._plain - self._without)
        return (
            "the gradient of a token is not multiplied by its weight" if differ(weighted, expected) else None
        )

    def _run(self, advantages: Tensor, *, gated: bool = False) -> tuple[Tensor, Tensor]:
        """Return the loss, and its gradient with respect to the log-probabilities."""
        leaf = self._log_probs.clone().requires_grad_()
        shown = gate_gradient(leaf, self._weights) if gated else leaf.clone()
        try:
            value: Any = self._loss(shown, self._old.clone(), advantages.clone(), self._mask.clone())
        except Exception as error:
            raise _FailedError(f"{type(error).__name__}: {brief(str(error))}") from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise _FailedError(f"it must return a scalar, not {brief(value)}")
        if not value.requires_grad:
            raise _FailedError("it does not depend on the log-probabilities")
        (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
        if gradient is None:
            raise _FailedError("it does not depend on the log-probabilities")
        return value.detach().reshape(()), gradient


class _FailedError(Exception):
    """A loss that could not be run."""


def differ(actual: Float[Tensor, "*any"], expected: Float[Tensor, "*any"]) -> bool:
    """Return whether gradients, or losses, differ by more than rounding.

    >>> differ(torch.ones(2), torch.ones(2) + 1e-6), differ(torch.ones(2), torch.ones(2) + 1e-3)
    (False, True)
    """
    scale = max(float(expected.abs().max()), 1e-6)
    return not bool((actual - expected).abs().max() <= _TOLERANCE * scale)

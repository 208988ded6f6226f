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

_ROUNDING = 1e-2
"""What a loss in bfloat16 may round; a loss that does not honour weights is off by much more."""

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
    completions and 5 tokens in float32, one of which is padding; it must not change anything.

    Args:
        loss: `(log_probs, old_log_probs, advantages, mask) -> loss`. Advantages are `[completion, token]`;
            for a loss that fails on those, `[completion]`.

    Raises:
        ParameterError: a loss that cannot be called, is not finite, does not depend on advantages, fails on
            all of these, or differs between two equal calls.

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
        self._moved = torch.rand(shape, generator=generator) - 0.5
        # Some ratios lie outside the usual clip range, on either side.
        self._old = self._log_probs + 0.6 * self._moved
        self._mask = torch.ones(shape)
        self._mask[2, 4] = 0.0
        by_completion = torch.tensor([1.0, -0.7, 0.4])
        self._weights = 0.5 + torch.rand(shape, generator=generator)
        self._weights[:, 1] = 0.0  # as strategies that drop tokens give it
        self._weights = torch.where(self._mask.bool(), self._weights, 1.0)
        self._spread_refused: str | None = None
        self._advantages = by_completion[:, None].expand(shape)
        try:
            self._run(self._advantages)
        except _FailedError as error:
            self._spread_refused, self._advantages = str(error), by_completion
        try:
            self._without_fails = False
            try:
                self._run(torch.zeros_like(self._advantages))
            except _FailedError:
                # Advantages are normalised: 0 / 0. They are negated instead, within the clip range, where
                # only what does not depend on them stays the same.
                self._without_fails = True
                self._old = self._log_probs + 0.1 * self._moved
            self._value, self._plain = self._run(self._advantages)
            again, _ = self._run(self._advantages)
            self._without = self._independent()
        except _FailedError as error:
            raise ParameterError(
                f"the loss could not be tried out: {self._spread_refused or error}"
            ) from error
        if differ(again, self._value):
            raise ParameterError(
                f"the loss differs between two equal calls, {float(self._value)} and {float(again)}: try it "
                "out without what it draws at random or remembers"
            )
        if not differ(self._plain, self._without):
            raise ParameterError("the loss does not depend on the advantages: there is nothing to weight")

    def reason_against_advantages(self) -> str | None:
        """Return why weighted advantages are not honoured; None if they are."""
        if self._spread_refused is not None:
            return f"it takes one advantage for each completion ({self._spread_refused})"
        try:
            _, weighted = self._run(self._advantages * self._weights)
        except _FailedError as error:
            return f"it fails on weighted advantages ({error})"
        return self._wrong(weighted)

    def reason_against_gradient(self) -> str | None:
        """Return why weighting the gradient does not work; None if it does."""
        try:
            value, weighted = self._run(self._advantages, gated=True)
            without = self._independent(gated=True)
        except _FailedError as error:
            return f"it fails on log-probabilities whose gradient is weighted ({error})"
        if differ(value, self._value):
            return "weighting the gradient changes the loss itself"
        if differ(without, self._without, _ROUNDING):
            return "a term that does not depend on the advantages, such as a KL term, would be weighted too"
        return self._wrong(weighted)

    def _independent(self, *, gated: bool = False) -> Tensor:
        """Return the part of the gradient that does not depend on the advantages."""
        if not self._without_fails:
            return self._run(torch.zeros_like(self._advantages), gated=gated)[1]
        signs = [self._run(sign * self._advantages, gated=gated)[1] for sign in (1.0, -1.0)]
        return (signs[0] + signs[1]) / 2

    def _wrong(self, weighted: Tensor) -> str | None:
        expected = self._without + self._weights * (self._plain - self._without)
        if differ(weighted, expected, _ROUNDING):
            return "the gradient of a token is not multiplied by its weight"
        return None

    def _run(self, advantages: Tensor, *, gated: bool = False) -> tuple[Tensor, Tensor]:
        """Return the loss, and its gradient with respect to the log-probabilities; both are finite."""
        # Whoever tries out a loss may have switched gradients off.
        with torch.inference_mode(False), torch.enable_grad():
            leaf = self._log_probs.clone().requires_grad_()
            shown = gate_gradient(leaf, self._weights.clone()) if gated else leaf.clone()
            try:
                value: Any = self._loss(shown, self._old.clone(), advantages.clone(), self._mask.clone())
            except Exception as error:
                raise _FailedError(f"{type(error).__name__}: {brief(str(error))}") from error
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise _FailedError(f"it must return a scalar, not {brief(value)}")
            gradient = None
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
        if gradient is None:
            raise _FailedError("it does not depend on the log-probabilities")
        if not bool(value.isfinite().all() and gradient.isfinite().all()):
            raise _FailedError(f"it is {float(value.detach())}, or its gradient is not finite")
        return value.detach().reshape(()), gradient


class _FailedError(Exception):
    """A loss that could not be run."""


def differ(
    actual: Float[Tensor, "*any"], expected: Float[Tensor, "*any"], tolerance: float = _TOLERANCE
) -> bool:
    """Return whether gradients, or losses, differ by more than rounding.

    >>> differ(torch.ones(2), torch.ones(2) + 1e-6), differ(torch.ones(2), torch.ones(2) + 1e-3)
    (False, True)
    """
    scale = max(float(expected.abs().max()), 1e-6)
    return not bool((actual - expected).abs().max() <= tolerance * scale)

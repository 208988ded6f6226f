"""Advantages: where the weights of a strategy enter an objective.

`apply_credit` is Eq. 13 of arXiv 2510.13554v2: the advantage of token t becomes `A[t] * gamma[t]`, where
gamma is a constant. Training loops call it, and so does the reference PPO. `credit_weights` returns the
factors alone, as `RolloutCredit` does for a whole rollout. `gate_gradient` applies them to the gradient of
the log-probabilities, for objectives with a single advantage per completion; the routes into TRL's losses
call it. `is_weighted` says, for all of them, which advantages a setting of `signs` weights. What is left to
others: the weights (credit), and trainers (trl, ppo).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.errors import ParameterError
from attnprobe.validation import ArrayLike, as_float_tensor, as_mask, choice, finite

Signs = Literal["both", "positive", "negative"]

_AXES = "completion, token"


def check_signs(signs: Any) -> Signs:
    """Return a setting of `signs` after checking that it is one.

    Raises:
        ParameterError: anything else.
    """
    checked: Signs = choice(signs, "signs", get_args(Signs))  # type: ignore[assignment]
    return checked


def is_weighted(advantages: Float[Tensor, "*any"], signs: Signs) -> Bool[Tensor, "*any"]:
    """Return which advantages are weighted, by their sign.

    "both" weights all, as v2 of arXiv 2510.13554 does (Eq. 13); "positive" all but those below 0, as v1 does;
    "negative" those below 0. Which side 0 is on makes no difference: 0 times a weight is 0.

    Raises:
        ParameterError: another setting.

    >>> advantages = torch.tensor([-1.0, 0.0, 1.0])
    >>> is_weighted(advantages, "positive"), is_weighted(advantages, "negative")
    (tensor([False,  True,  True]), tensor([ True, False, False]))
    """
    check_signs(signs)
    if signs == "both":
        return torch.ones_like(advantages, dtype=torch.bool)
    return advantages >= 0 if signs == "positive" else advantages < 0


def credit_weights(
    advantages: ArrayLike, gamma: ArrayLike, mask: ArrayLike, *, signs: Signs = "both"
) -> Float[Tensor, "completion token"]:
    """Return the factor of each token's advantage: gamma, or 1 where gamma does not apply.

    Gamma does not apply to advantages of a sign that is left out, or where the mask is 0 (padding, tool
    output).

    Args:
        advantages: `[completion]`, or `[completion, token]`.
        gamma: `[completion, token]`, not negative.
        mask: `[completion, token]`, 1 where a token is trained on, else 0.
        signs: which advantages are weighted: "both" (v2 of the paper), "positive" (v1) or "negative".

    Raises:
        ParameterError: shapes that do not match, a mask that holds anything but 0 and 1, or values inside
            the mask that are not finite, or a negative gamma there; or unknown `signs`.

    >>> gamma, mask = torch.tensor([[1.5, 2.0, 9.0], [1.5, 2.0, 2.0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    >>> credit_weights(torch.tensor([1.0, -1.0]), gamma, mask)
    tensor([[1.5000, 2.0000, 1.0000],
            [1.5000, 2.0000, 2.0000]])
    >>> credit_weights(torch.tensor([1.0, -1.0]), gamma, mask, signs="positive")
    tensor([[1.5000, 2.0000, 1.0000],
            [1.0000, 1.0000, 1.0000]])
    """
    gamma = as_float_tensor(gamma, "gamma").detach()
    if gamma.ndim != 2:
        raise ParameterError(f"gamma must be [{_AXES}]; got {list(gamma.shape)}")
    inside = as_mask(mask, "mask", tuple(gamma.shape), axes=_AXES, device=gamma.device)
    spread = spread_advantages(advantages, inside).to(gamma.device)
    weights = finite(gamma.masked_fill(~inside, 1.0), "gamma", _AXES)
    check_not_negative(weights, "gamma")
    return torch.where(is_weighted(spread, signs), weights, torch.ones_like(weights))


def apply_credit(
    advantages: ArrayLike, gamma: ArrayLike, mask: ArrayLike, *, signs: Signs = "both"
) -> Float[Tensor, "completion token"]:
    """Return the weighted advantage of each token (Eq. 13 of arXiv 2510.13554v2); detached.

    Advantages of padding and tool output are left unchanged, and so are those of a sign that is left out.
    The result has the dtype of the advantages, or is float if they are whole numbers.

    Args:
        advantages: `[completion]`, or `[completion, token]`.
        gamma: `[completion, token]`, not negative.
        mask: `[completion, token]`, 1 where a token is trained on, else 0.
        signs: which advantages are weighted: "both" (v2 of the paper), "positive" (v1) or "negative". The
            weights of `RolloutCredit` are already 1 where its own `signs` leaves them out.

    Raises:
        ParameterError: shapes that do not match, a mask that holds anything but 0 and 1, or values inside
            the mask that are not finite, or a negative gamma there; or unknown `signs`.

    >>> gamma = torch.tensor([[1.5, 2.0], [1.5, 2.0]])
    >>> apply_credit(torch.tensor([2.0, -2.0]), gamma, torch.ones(2, 2))
    tensor([[ 3.,  4.],
            [-3., -4.]])
    >>> apply_credit(torch.tensor([2.0, -2.0]), gamma, torch.ones(2, 2), signs="positive")
    tensor([[ 3.,  4.],
            [-2., -2.]])
    """
    weights = credit_weights(advantages, gamma, mask, signs=signs)
    advantages = as_float_tensor(advantages, "advantages").detach()
    spread = advantages if advantages.ndim == 2 else advantages[:, None]
    weighted = (spread.to(weights.device) * weights).to(advantages.dtype)
    # What was finite may not fit into half precision any more. Outside the mask anything may stand.
    inside = as_mask(mask, "mask", tuple(weights.shape), axes=_AXES, device=weights.device)
    finite(weighted.masked_fill(~inside, 0.0), "the weighted advantages", _AXES)
    return weighted


def spread_advantages(
    advantages: ArrayLike, mask: Bool[Tensor, "completion token"]
) -> Float[Tensor, "completion token"]:
    """Return the advantage of each token, and 0 outside the mask, where it does not matter.

    Raises:
        ParameterError: advantages of another shape, or not finite inside the mask.

    >>> spread_advantages([1, 2], torch.tensor([[True, True], [True, False]]))
    tensor([[1., 1.],
            [2., 0.]])
    """
    values = as_float_tensor(advantages, "advantages").detach()
    if values.shape not in (mask.shape, mask.shape[:1]):
        raise ParameterError(
            f"advantages must be [completion] = {list(mask.shape[:1])} or [{_AXES}] = {list(mask.shape)}; "
            f"got {list(values.shape)}"
        )
    spread = values if values.ndim == 2 else values[:, None].expand(mask.shape)
    return finite(spread.masked_fill(~mask.to(spread.device), 0.0), "advantages", _AXES)


def check_not_negative(
    weights: Float[Tensor, "completion token"], name: str, error: type[Exception] = ParameterError
) -> None:
    """Raise an error that says where the first negative weight is, if there is one."""
    negative = weights < 0
    if bool(negative.any()):
        where = negative.nonzero()[0].tolist()
        raise error(
            f"{name} is {float(weights[tuple(where)])} at [{_AXES}] = {where}: a weight must not be "
            "negative, since that would reverse the sign of an advantage"
        )


def gate_gradient(values: ArrayLike, weights: ArrayLike) -> Float[Tensor, "completion token"]:
    """Return the values unchanged, but multiply their gradient by the weights.

    Applied to log-probabilities, this weights the tokens of any loss, including one with a single advantage
    per completion (RLOO, GSPO, GMPO). It weights everything that the loss computes from them, a KL term
    included.

    Args:
        values: `[completion, token]`; log-probabilities may be minus infinity.
        weights: `[completion, token]`, finite and not negative; treated as constants.

    Raises:
        ParameterError: values that are not numbers, or weights of another shape, negative or not finite.

    >>> logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    >>> gated = gate_gradient(logps, torch.tensor([[1.0, 3.0]]))
    >>> gated.sum().backward()
    >>> gated.detach(), logps.grad
    (tensor([[-1., -2.]]), tensor([[1., 3.]]))
    """
    values = as_float_tensor(values, "values")
    factors = as_float_tensor(weights, "weights", tuple(values.shape), axes=_AXES).detach()
    check_not_negative(finite(factors, "weights", _AXES), "weights")
    gated: Tensor = _GatedGradient.apply(values, factors.to(values))  # type: ignore[no-untyped-call]
    return gated


class _GatedGradient(torch.autograd.Function):
    """The identity with weighted gradients; `d + w * (x - d)` would turn infinite values into NaN."""

    @staticmethod
    def forward(context: Any, values: Tensor, weights: Tensor) -> Tensor:
        context.save_for_backward(weights)
        # A copy: whoever changes a view in place, as losses do when they mask, gets an error.
        return values.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weights,) = context.saved_tensors
        return gradients[0] * weights, None

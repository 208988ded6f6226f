"""Advantages: where the weights of a strategy enter an objective.

The advantage of token t becomes `A[t] * gamma[t]` (Eq. 12 of arXiv 2510.13554), where gamma is a
constant and only advantages that are not negative are weighted: what went wrong is not blamed on
its anchors. Objectives that know one advantage a sequence take the weights at the log-probabilities
instead, by `gate_gradient`. What is left to others: the weights (credit), and trainers (trl, ppo).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.errors import ParameterError


def credit_weights(
    advantages: Float[Tensor, " batch"] | Float[Tensor, "batch token"],
    gamma: Float[Tensor, "batch token"],
    mask: Tensor,
) -> Float[Tensor, "batch token"]:
    """Return the factor of each token's advantage: gamma, or 1 where gamma does not apply.

    It does not apply to negative advantages, nor where the mask is 0: padding, tool output.

    Args:
        advantages: `[batch]` or `[batch, token]`.
        gamma: `[batch, token]`, at least 0.
        mask: `[batch, token]`, 1 where a token is trained on.

    Raises:
        ParameterError: shapes that do not fit, or values in the mask that are negative or not finite.

    >>> gamma = torch.tensor([[1.5, 2.0, 9.0], [1.5, 2.0, 2.0]])
    >>> credit_weights(torch.tensor([1.0, -1.0]), gamma, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    tensor([[1.5000, 2.0000, 1.0000],
            [1.0000, 1.0000, 1.0000]])
    """
    if gamma.ndim != 2 or mask.shape != gamma.shape:
        raise ParameterError(
            f"gamma and mask must both be [batch, token], got {list(gamma.shape)} and {list(mask.shape)}"
        )
    if advantages.shape not in (gamma.shape, gamma.shape[:1]):
        raise ParameterError(
            f"advantages must be {list(gamma.shape[:1])} or {list(gamma.shape)} to fit gamma, got "
            f"{list(advantages.shape)}"
        )
    inside = mask.to(gamma.device).bool()
    advantages = advantages.to(gamma.device).detach()
    spread = advantages if advantages.ndim == 2 else advantages[:, None].expand_as(gamma)
    weights = gamma.detach().masked_fill(~inside, 1.0)
    for name, values in (("gamma", weights), ("advantages", spread.masked_fill(~inside, 0.0))):
        if not bool(values.isfinite().all()):
            row, token = (~values.isfinite()).nonzero()[0].tolist()
            raise ParameterError(f"{name} is {float(values[row, token])} at token {token} of row {row}")
    if bool((weights < 0).any()):
        row, token = (weights < 0).nonzero()[0].tolist()
        raise ParameterError(
            f"gamma is {float(weights[row, token])} at token {token} of row {row}: a weight must not be "
            "negative, or the advantage would change its sign"
        )
    return torch.where(spread >= 0, weights, torch.ones_like(weights))


def apply_credit(
    advantages: Float[Tensor, " batch"] | Float[Tensor, "batch token"],
    gamma: Float[Tensor, "batch token"],
    mask: Tensor,
) -> Float[Tensor, "batch token"]:
    """Return the advantage of each token, weighted (Eq. 12 of arXiv 2510.13554); detached.

    Negative advantages, padding and tool output keep what they had. The result has the dtype of the
    advantages.

    Args:
        advantages: `[batch]`, one for each sequence, or `[batch, token]`.
        gamma: `[batch, token]`, at least 0.
        mask: `[batch, token]`, 1 where a token is trained on.

    Raises:
        ParameterError: shapes that do not fit, or values in the mask that are negative or not finite.

    >>> gamma = torch.tensor([[1.5, 2.0], [1.5, 2.0]])
    >>> apply_credit(torch.tensor([2.0, -2.0]), gamma, torch.ones(2, 2))
    tensor([[ 3.,  4.],
            [-2., -2.]])
    """
    weights = credit_weights(advantages, gamma, mask)
    spread = advantages.detach() if advantages.ndim == 2 else advantages.detach()[:, None]
    return (spread.to(weights.device) * weights).to(advantages.dtype)


def gate_gradient(
    values: Float[Tensor, "batch token"], weights: Float[Tensor, "batch token"]
) -> Float[Tensor, "batch token"]:
    """Return the same values, through which gradients come back multiplied by the weights.

    Put at the log-probabilities, it weights the tokens of any loss, also of one that has a single
    advantage for each sequence (RLOO, GSPO, GMPO). It weights everything that the loss asks of the
    log-probabilities: a KL term of the loss too.

    >>> logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    >>> gated = gate_gradient(logps, torch.tensor([[1.0, 3.0]]))
    >>> gated.sum().backward()
    >>> gated.detach(), logps.grad
    (tensor([[-1., -2.]]), tensor([[1., 3.]]))
    """
    if values.shape != weights.shape:
        raise ParameterError(
            f"the values are {list(values.shape)}, their weights {list(weights.shape)}: they must agree"
        )
    gated: Tensor = _GatedGradient.apply(  # type: ignore[no-untyped-call]
        values, weights.detach().to(values.dtype)
    )
    return gated


class _GatedGradient(torch.autograd.Function):
    """The identity, with weighted gradients; `d + w * (x - d)` would make a NaN of an infinite value."""

    @staticmethod
    def forward(context: Any, values: Tensor, weights: Tensor) -> Tensor:
        context.save_for_backward(weights)
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weights,) = context.saved_tensors
        return gradients[0] * weights, None


def response_mask_of(completion_mask: Tensor, tool_mask: Tensor | None) -> Bool[Tensor, "batch token"]:
    """Return which tokens of the completions the policy wrote itself: neither padding nor tool output.

    >>> response_mask_of(torch.tensor([[1, 1, 1, 0]]), torch.tensor([[1, 0, 1, 1]])).int()
    tensor([[1, 0, 1, 0]], dtype=torch.int32)
    """
    mask = completion_mask.bool()
    return mask if tool_mask is None else mask & tool_mask.to(mask.device).bool()

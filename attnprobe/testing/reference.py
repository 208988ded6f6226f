"""The slow and obvious pattern of an attention call, in float64: the oracle of the operator's tests.

Every option is applied where a model applies it, one after the other, to the full T x T scores. Tests of the
operator call it. What is left to others: drawing inputs (strategies) and comparing results (tests).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def dense_pattern(
    query: Float[Tensor, "batch head query d"],
    key: Float[Tensor, "batch key_head key d"],
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Float[Tensor, "batch head query key"]:
    """Return the attention pattern in float64; rows that see nothing are zeros.

    >>> dense_pattern(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))[0, 0]
    tensor([[1.0000, 0.0000],
            [0.5000, 0.5000]], dtype=torch.float64)
    """
    query, key = query.double(), key.double()
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    scores = query @ key.mT * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    position = torch.arange(queries)[:, None] + keys - queries
    seen = (torch.arange(keys)[None, :] <= position).expand(batch, heads, -1, -1)
    if mask is not None and mask.dtype == torch.bool:
        seen = mask.expand(batch, heads, -1, -1)
    elif mask is not None:
        seen = (mask > torch.finfo(mask.dtype).min / 4).expand(batch, heads, -1, -1)
        scores = scores + mask.double()
    else:
        if window is not None:
            seen = seen & (position - torch.arange(keys)[None, :] < window)
        if key_mask is not None:
            seen = seen & key_mask[:, None, None, :]
    weight = torch.where(seen, (scores - scores.amax(-1, keepdim=True)).exp(), 0.0)
    total = weight.sum(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.double()[None, :, None, None]
        total = total + (sink - scores.amax(-1, keepdim=True)).exp()
    return torch.where(total > 0, weight / total.clamp(min=1e-300), 0.0)

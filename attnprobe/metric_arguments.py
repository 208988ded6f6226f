"""What the metrics are given: attention or a pattern, masks, norms, numbers of sequences, window and horizon.

Every metric turns what it was given into one form here (metrics, sentence_metrics), and so does whoever keeps
a window or a horizon for later. What is left to others: checks that know nothing of attention (validation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attnprobe.attention.operator import Attention, DenseAttention
from attnprobe.errors import ParameterError, PatternError
from attnprobe.reductions import Horizon
from attnprobe.validation import (
    ArrayLike,
    IntLike,
    as_float_tensor,
    as_mask,
    as_tensor,
    brief,
    finite,
    whole_number,
)

if TYPE_CHECKING:
    AttentionLike: TypeAlias = Attention | ArrayLike
    HorizonLike: TypeAlias = Horizon | Sequence[IntLike | None] | ArrayLike
else:
    AttentionLike = HorizonLike = Any


def as_attention(attention: AttentionLike) -> Attention:
    """Return an `Attention`: the one given, or one made from a pattern `[batch, head, query, key]`.

    Metrics describe whole sequences, so a cached pass, with more keys than queries, is refused.

    Raises:
        PatternError: an invalid pattern, or one with more keys than queries.
    """
    if not isinstance(attention, Attention):
        attention = DenseAttention(attention)
    if attention.query_offset != 0:
        raise PatternError(
            f"metrics need a whole forward pass: got {attention.query_count} queries for "
            f"{attention.key_count} keys. Measure the finished sequence instead of cached steps"
        )
    return attention


def check_mask(
    attention: Attention, mask: ArrayLike | None, name: str = "response_mask"
) -> Bool[Tensor, "batch token"]:
    """Return a mask of tokens on the attention's device, all True for None, or raise `ParameterError`."""
    expected = (attention.batch_size, attention.query_count)
    if mask is None:
        return torch.ones(expected, dtype=torch.bool, device=attention.device)
    return as_mask(mask, name, expected, device=attention.device)


def check_norms(attention: Attention, norms: ArrayLike | None) -> Tensor | float:
    """Return the norms of values on the attention's device, 1 for None, or raise `ParameterError`."""
    if norms is None:
        return 1.0
    shape = (attention.batch_size, attention.head_count, attention.key_count)
    values = as_float_tensor(norms, "value_norms", shape, axes="example, head, token")
    values = finite(
        values.to(device=attention.device, dtype=attention.dtype), "value_norms", "example, head, token"
    )
    if bool((values < 0).any()):
        raise ParameterError(f"value_norms are norms, at least 0; got {float(values.min()):.3g}")
    return values


def check_segments(attention: Attention, segment_ids: ArrayLike | None) -> Int[Tensor, "batch token"] | None:
    """Return the sequence number of each token on the attention's device, or raise `ParameterError`."""
    return None if segment_ids is None else token_numbers(attention, segment_ids, "segment_ids")


def token_numbers(attention: Attention, value: ArrayLike, name: str) -> Int[Tensor, "batch token"]:
    """Return whole numbers, one for each token, on the attention's device, or raise `ParameterError`."""
    numbers = as_tensor(value, name)
    expected = (attention.batch_size, attention.query_count)
    whole = not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
    if tuple(numbers.shape) != expected or not whole:
        raise ParameterError(f"{name} must be whole numbers {list(expected)}; got {brief(numbers)}")
    return numbers.to(attention.device).long()


def check_window(window: IntLike) -> int:
    """Return a WAAD window, or raise `ParameterError`."""
    return whole_number(window, "window", minimum=1)


def check_horizon(horizon: Any) -> Horizon:
    """Return a horizon `(low, high)` with `0 <= low <= high`, or `high` None, or raise `ParameterError`.

    >>> check_horizon([10, None])
    (10, None)
    """
    is_array = isinstance(horizon, Tensor) or type(horizon).__module__ == "numpy"
    parts: Any = horizon.tolist() if is_array else horizon
    if isinstance(parts, list | tuple) and len(parts) == 2:
        low, high = parts
        try:
            low = whole_number(low, "low")
            return low, None if high is None else whole_number(high, "high", minimum=low)
        except ParameterError:
            pass
    raise ParameterError(
        "a horizon must be (low, high) in whole tokens with 0 <= low <= high, or high=None for the end "
        f"of the response; got {brief(horizon)}"
    )

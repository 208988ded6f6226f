"""Removing what chosen queries read from chosen keys, while all attention weights stay as they are.

For removed pairs (t, s), the output of an attention call loses `A[t, s] v[s]`. It is subtracted from the
model's own output, so everything else keeps its bits: that of queries without a removed pair entirely. No
mask of pairs is needed, so this works under any attention implementation that can be read. The alternative, a
second call with those values set to zero, was rejected: it also removes what a token reads from itself, and
it cannot tell heads apart that share a value head.

Attention calls are intercepted with this (interception). What is left to others: which pairs are removed
(`Suppression`), and reading the call (attention_call).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.adapters.attention_call import AttentionCall, as_multiplied, without_autocast
from attnprobe.attention.factored import FactoredAttention
from attnprobe.errors import InterventionError

# The largest size of a block of probabilities; a few copies of it are made.
_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ValueRemoval:
    """Which values an attention call of a layer loses.

    Attributes:
        removed: returns the pairs, `[batch or 1, head or 1, query, key]`, True to remove.
        attention: returns the attention of a call, checked against the call's output.
    """

    removed: Callable[[AttentionCall], Tensor]
    attention: Callable[[AttentionCall], FactoredAttention]


def without_values(call: AttentionCall, removals: tuple[ValueRemoval, ...]) -> Tensor:
    """Return the output of a call without the values of the pairs that any of the removals names.

    Raises:
        InterventionError: gradients are needed, or the output comes from weights after dropout.
    """
    assert call.output is not None
    if call.output.requires_grad:
        raise InterventionError(
            'suppress_attention(mode="value") has no gradients: call the model under torch.no_grad(), or use '
            'mode="mask"'
        )
    if call.module.training and float(call.options.get("dropout") or 0.0) > 0:
        raise InterventionError(
            'suppress_attention(mode="value") removes what the weights read, and dropout changes them: call '
            "model.eval() first"
        )
    with torch.no_grad(), without_autocast(call.query.device):
        call = as_multiplied(call)
        removed = removals[0].removed(call)
        for removal in removals[1:]:
            # Not one after the other: a pair that two of them name is removed once.
            removed = removed | removal.removed(call)
        output: Tensor = call.output  # type: ignore[assignment]
        if not bool(removed.any()):
            return output
        return _without_pairs(output, removals[0].attention(call), call.value, removed)


def _without_pairs(
    output: Float[Tensor, "batch query head value_d"],
    attention: FactoredAttention,
    value: Float[Tensor, "batch value_head all_keys value_d"],
    removed: Bool[Tensor, "#batch #head query all_keys"],
) -> Float[Tensor, "batch query head value_d"]:
    # A cache of fixed size has room for keys still to come.
    removed = removed[..., : attention.key_count]
    columns = removed.any(0).any(0).any(0).nonzero()[:, 0]
    queries = removed.any(0).any(0).any(-1).nonzero()[:, 0]
    keys = slice(int(columns[0]), int(columns[-1]) + 1)
    read = value[:, :, keys].to(attention.dtype)
    # [batch, head, query, value_d]
    result = output.transpose(1, 2).clone()
    row_bytes = attention.batch_size * attention.head_count * read.shape[2] * attention.dtype.itemsize
    for rows in queries.split(max(1, _BLOCK_BYTES // row_bytes)):
        score = attention.scores.block(rows, keys)
        weight = score.sub_(attention.log_sum_exp()[:, :, rows, None]).exp_()
        weight *= removed[:, :, rows, keys]
        # Heads that share values go into one product, so that none are copied.
        grouped = weight.unflatten(1, (read.shape[1], -1)).flatten(2, 3)
        lost = (grouped @ read).view(*weight.shape[:3], -1)
        left = result[:, :, rows].to(attention.dtype) - lost
        # A query that has lost every key reads nothing, not the rounding of what it read.
        left.masked_fill_(removed[:, :, rows].all(-1, keepdim=True), 0.0)
        result[:, :, rows] = left.to(result.dtype)
    return result.transpose(1, 2).contiguous()

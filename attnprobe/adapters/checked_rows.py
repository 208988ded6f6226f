"""The rows of an attention call by which it is checked, and the output that they give.

`check_against_output` computes them from what was read from the call (output_check). What is left to others:
how far rounding can change them (rounding), and the comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.adapters.attention_call import AttentionCall
from attnprobe.attention.factored import FactoredAttention

_ROWS = {False: 4, True: 8}
"""How many queries of a call are checked, evenly spaced; more in 16 bits, where each says less."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of an attention, and the output that they give.

    They are normalized here, and not with `FactoredAttention.log_sum_exp`, so that a kernel's number is
    checked.
    """

    queries: slice | Tensor
    scaling: float
    softcap: float | None
    bias: Float[Tensor, "#batch #head row key"] | None
    query: Float[Tensor, "batch head row d"]
    key: Float[Tensor, "batch key_head key d"]
    value: Float[Tensor, "batch value_head key value_d"]
    sinks: Float[Tensor, "head 1 1"] | None
    score: Float[Tensor, "batch head row key"]
    log_sum_exp: Float[Tensor, "batch head row 1"]
    probability: Float[Tensor, "batch head row key"]
    output: Float[Tensor, "batch head row value_d"]
    unseeing: Bool[Tensor, "batch head row 1"] | None
    """Which rows see nothing; None if there are none."""

    @staticmethod
    def of_call(attention: FactoredAttention, call: AttentionCall, number: int) -> Rows:
        """Return the rows of a call by which it is checked: others for each `number`."""
        scores = attention.scores
        queries = _chosen_queries(attention, _ROWS[call.query.dtype.itemsize == 2], number)
        score = scores.block(queries, slice(0, attention.key_count))
        log_sum_exp, probability = score.logsumexp(-1, keepdim=True), score.softmax(-1)
        unseeing = None
        if not (scores.mask.plain and scores.are_products):
            unseeing = log_sum_exp == -torch.inf
            log_sum_exp.masked_fill_(unseeing, 0.0)
            probability.masked_fill_(unseeing, 0.0)
        sinks = call.options.get("s_aux")
        if sinks is not None:
            sinks = sinks.detach().to(score.dtype)[:, None, None]
            total = torch.logaddexp(log_sum_exp, sinks)
            probability *= (log_sum_exp - total).exp_()
            log_sum_exp = total
        value = call.value[:, :, : attention.key_count].detach().to(score.dtype)
        bias = scores.bias
        if bias is not None:
            bias = bias[:, :, queries, : attention.key_count].to(score.dtype)
        return Rows(
            queries,
            scores.scaling,
            scores.softcap,
            bias,
            scores.query[:, :, queries].to(score.dtype),
            scores.key.to(score.dtype),
            value,
            sinks,
            score,
            log_sum_exp,
            probability,
            mixed(probability, value),
            unseeing,
        )


def _chosen_queries(attention: FactoredAttention, count: int, number: int) -> slice | Tensor:
    """Return which rows are checked: evenly spaced ones and, behind padding, the first.

    Under a short window, no other row tells whether padding is seen.
    """
    last = attention.query_count - 1
    step = max(1, last // (count - 1))
    # A slice, since picking rows by their numbers takes several times as long.
    # The first call's include the last row; the golden ratio spreads those of the next ones evenly between.
    spaced = slice((last - int(number * 0.618 * step)) % step, None, step)
    mask = attention.scores.mask
    if mask.plain or last == 0:
        return spaced
    begins = (~mask.sees_none()).any(1).byte().argmax(-1)
    return torch.cat([begins.amax()[None], torch.arange(last + 1, device=attention.device)[spaced]])


def mixed(weights: Tensor, value: Tensor) -> Tensor:
    """Return the sums of values; heads that share values go into one product, so that none are copied."""
    grouped = weights.unflatten(1, (value.shape[1], -1)).flatten(2, 3)
    mixed: Tensor = (grouped @ value).view(*weights.shape[:3], -1)
    return mixed

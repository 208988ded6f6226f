"""What each row of an attention sums to: the log of the softmax's denominator, and the row's mass.

`FactoredAttention` computes them once, when it is made. If the model's own kernel has returned each row's
log-sum-exp, they are known already. Otherwise the table says what computes them: flash attention together
with what each query reads from the keys' positions, a fused kernel, or blocks of scores. What is left to
others: the scores (block_scores), the table (kernels), and listening to a model's kernel (listening).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.attention import fused_sums
from attnprobe.attention.block_scores import BlockScores
from attnprobe.attention.checks import judge_later
from attnprobe.attention.kernels import Kernel, Question
from attnprobe.attention.listening import FlashResult, carried_features, flash_attention
from attnprobe.attention.tiles import query_slices
from attnprobe.errors import PatternError

# The largest size of a block of scores over all keys: far below one layer's activations.
_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True, eq=False)
class RowSums:
    """What each row sums to.

    Attributes:
        log_sum_exp: of the row's scores, sinks included; 0 where nothing is seen, rather than minus
            infinity, so that `exp(score - log_sum_exp)` of an unseen key is 0.
        mass: the sum of the row's probabilities: 1, less with a sink, 0 where nothing is seen.
        mean_position: what the query reads when keys carry `key_positions`; None if no kernel computed it.
        past_first: what it reads when they carry `past_first_features`; None if no kernel computed it.
    """

    log_sum_exp: Float[Tensor, "batch head query"]
    mass: Float[Tensor, "batch head query"]
    mean_position: Float[Tensor, "batch head query"] | None
    past_first: Float[Tensor, "batch head query 2"] | None = None


def sum_rows(
    scores: BlockScores,
    sinks: Tensor | None,
    log_sum_exp: Float[Tensor, "batch head query"] | None = None,
    mean_position: Float[Tensor, "batch head query"] | None = None,
    past_first: Float[Tensor, "batch head query 2"] | None = None,
) -> RowSums:
    """Return the row sums of scores.

    Args:
        scores: the scores.
        sinks: `[head]` logits in the denominator that belong to no key.
        log_sum_exp: of each row's scores without sinks, if a kernel has computed it already.
        mean_position: what each query reads from the keys' positions, without sinks, if a kernel has
            computed it already.
        past_first: what each query reads from `past_first_features`, without sinks, likewise.

    Raises:
        PatternError: scores that are not finite, or sinks that do not fit.
    """
    head_count = scores.query.shape[1]
    if sinks is not None and sinks.shape != (head_count,):
        raise PatternError(f"expected one sink for each of {head_count} heads, got {list(sinks.shape)}")
    kernel = scores.kernel(Question.LOG_SUM_EXP) if log_sum_exp is None else Kernel.HEARD
    if kernel is not Kernel.BLOCKS:
        # A kernel's maximum ignores NaN: a NaN score would come out as a finite number.
        for name, tensor in (("query", scores.query), ("key", scores.key)):
            _check_finite(tensor.sum(-1, dtype=scores.dtype), f"the {name}", "token")
    if kernel is Kernel.FLASH:
        result = _flash_over_positions(scores)
        log_sum_exp, mean_position = result.log_sum_exp, result.output[..., 0]
        past_first = result.output[..., 1:3]
    elif kernel is Kernel.FUSED:
        log_sum_exp = fused_sums.log_sum_exp(scores)
    elif log_sum_exp is None:
        log_sum_exp = _log_sum_exp_by_blocks(scores)
    return _with_sinks(scores, sinks, log_sum_exp, mean_position, past_first)


def _flash_over_positions(scores: BlockScores) -> FlashResult:
    """Run the flash kernel over values that hold the keys' positions, also without the first.

    The kernel needs values as wide as the key: three columns hold the positions, the others zeros.
    """
    query, key = scores.query.to(scores.dtype), scores.key.to(scores.dtype)
    scaling = scores.scaling
    columns = carried_features(key.shape[2], scores.dtype, key.device)
    if (narrow := columns.shape[1] - key.shape[3]) > 0:
        query, key = (torch.nn.functional.pad(part, (0, narrow)) for part in (query, key))
    value = torch.nn.functional.pad(columns, (0, key.shape[3] - columns.shape[1])).expand(key.shape)
    return flash_attention(query, key, value, causal=True, scaling=scaling)


def _log_sum_exp_by_blocks(scores: BlockScores) -> Float[Tensor, "batch head query"]:
    """Return each row's log-sum-exp; minus infinity where nothing is seen."""
    batch, heads, query_count, _ = scores.query.shape
    key_count = scores.key.shape[2]
    shape = (batch, heads, query_count)
    answer = torch.full(shape, -torch.inf, dtype=scores.dtype, device=scores.query.device)
    bytes_per_query = batch * heads * key_count * scores.dtype.itemsize
    size = query_slices(query_count, bytes_per_query, _BLOCK_BYTES)[0].stop
    for reach in scores.mask.reaches(size):
        if reach.first < reach.stop:
            block = scores.block(reach.queries, slice(reach.first, reach.stop))
            answer[:, :, reach.queries] = block.logsumexp(-1)
    return answer


def _with_sinks(
    scores: BlockScores,
    sinks: Tensor | None,
    log_sum_exp: Tensor,
    mean_position: Tensor | None,
    past_first: Tensor | None,
) -> RowSums:
    """Add the sinks to the denominator, and replace the sums of rows that see nothing."""
    log_sum_exp = log_sum_exp.detach().to(scores.dtype)
    if scores.mask.plain and scores.are_products and sinks is None:
        # Every row sees its own key, and holds nothing but keys.
        _check_finite(log_sum_exp, "the attention score", "query")
        mean_position = None if mean_position is None else mean_position.detach().to(scores.dtype)
        past_first = None if past_first is None else past_first.detach().to(scores.dtype)
        return RowSums(log_sum_exp, torch.ones_like(log_sum_exp), mean_position, past_first)
    # A kernel's number for a row that sees nothing has no meaning.
    empty = scores.mask.sees_none() | (log_sum_exp == -torch.inf)
    log_sum_exp = log_sum_exp.masked_fill(empty, 0.0)
    _check_finite(log_sum_exp, "the attention score", "query")
    total, mass = log_sum_exp, (~empty).to(scores.dtype).expand_as(log_sum_exp)
    if sinks is not None:
        total = torch.logaddexp(log_sum_exp, sinks.detach().to(scores.dtype)[:, None]).masked_fill_(
            empty, 0.0
        )
        mass = (log_sum_exp - total).exp_().masked_fill_(empty, 0.0)
    if mean_position is not None:
        mean_position = (mean_position.detach().to(scores.dtype) * mass).masked_fill_(empty, 0.0)
    if past_first is not None:
        past_first = past_first.detach().to(scores.dtype) * mass[..., None]
        past_first = past_first.masked_fill_(empty[..., None], 0.0)
    return RowSums(total, mass, mean_position, past_first)


def _check_finite(values: Float[Tensor, "batch head token"], name: str, axis: str) -> None:
    """Check that values are finite, by their sum, which is finite only if they all are."""

    def judge(numbers: list[float]) -> None:
        wrong = ~torch.isfinite(values)
        # The sum of finite numbers can be too large too.
        if math.isfinite(numbers[0]) or not bool(wrong.any()):
            return
        where = wrong.nonzero()[0].tolist()
        raise PatternError(
            f"{name} is not finite at [batch, head, {axis}] = {where}: the model's activations hold "
            "NaN or infinity there"
        )

    judge_later([values.sum()], judge)

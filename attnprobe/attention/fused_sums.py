"""Sums over the rows and columns of an attention in one fused kernel: FlexAttention, compiled for the GPU.

A sum of probabilities with weights that are not negative is itself a log-sum-exp:

    sum over s of A[t, s] * w = exp(logsumexp over s of (score[t, s] - log_sum_exp[t] + log(w)))

so FlexAttention's own log-sum-exp answers `attend` and, with query and key exchanged, `receive`. It is summed
in float32 from products of the model's own dtype. The obvious alternative, features as the kernel's value,
was rejected: the kernel rounds probabilities and its output to the dtype of query and key, and in bfloat16 a
mean position at 32,000 tokens would be off by fifty tokens. In float32, it would take an order of magnitude
longer.

`FactoredAttention` and `sum_rows` call this where the table says so. On the CPU it runs without being
compiled and stores the map of all pairs: for tests only. What is left to others: when it is used (kernels).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from attnprobe.attention.block_scores import BlockScores
from attnprobe.attention.kernels import compiles
from attnprobe.attention.masks import CausalMask

BLOCK = 128
"""How many queries, and how many keys, share a block that the kernel visits or leaves out."""

# The narrowest query, key and value that the kernel takes.
_LEAST_WIDTH = 16

# Kinds of calls that may be compiled in one process: questions, head sizes, dtypes, forms of masks.
_MOST_VARIANTS = 64

# What changes a score: of the score, batch, head, query and key of a pair. Functions that are compiled into
# the kernel are not checked for shapes at run time: the checks could not be compiled.
_Change = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def log_sum_exp(scores: BlockScores) -> Float[Tensor, "batch head query"]:
    """Return each row's log-sum-exp, without sinks; minus infinity where nothing is seen."""
    change, heads = _of_scores(scores, columns=1)
    some, full = visited_blocks(scores.mask, scores.query.shape[2], scores.key.shape[2])
    return _sums_over_keys(scores, 1, change, _block_mask(scores, heads, some, full))[:, :, 0]


def attended(
    scores: BlockScores,
    log_sum_exp: Float[Tensor, "batch head query"],
    features: Float[Tensor, "batch key feature"],
) -> Float[Tensor, "batch head query feature"]:
    """Return `A @ features`; no feature is negative, so that every sum keeps its relative precision."""
    change, heads = _of_scores(scores, features.shape[2])
    column, head = heads.column, heads.head
    # Of each key, not of each pair: the kernel's own logarithm would take longer than its products.
    log_features = features.log().contiguous()

    @no_type_check
    def weighted(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return change(score, b, h, q, k) - log_sum_exp[b, head[h], q] + log_features[b, k, column[h]]

    some, full = visited_blocks(scores.mask, scores.query.shape[2], scores.key.shape[2])
    block_mask = _block_mask(scores, heads, some, full)
    return _sums_over_keys(scores, features.shape[2], weighted, block_mask).exp().transpose(2, 3)


def received(
    scores: BlockScores,
    log_sum_exp: Float[Tensor, "batch head query"],
    weights: Float[Tensor, "batch query feature"],
    start: int,
    stop: int | None,
) -> Float[Tensor, "batch head key feature"]:
    """Return `A.T @ weights` over the pairs at `start <= t - s < stop`; no weight is negative."""
    key_count, columns = scores.key.shape[2], weights.shape[2]
    change, heads = _of_scores(scores, columns)
    log_weights = weights.log().contiguous()
    column, head = heads.column, heads.head

    @no_type_check
    def weighted(score: Tensor, b: Tensor, h: Tensor, k: Tensor, q: Tensor) -> Tensor:
        return change(score, b, h, q, k) - log_sum_exp[b, head[h], q] + log_weights[b, q, column[h]]

    limits = (start, key_count if stop is None else stop)
    counted = (weights != 0).any(-1)
    some, full = visited_blocks(scores.mask, scores.query.shape[2], key_count, limits, counted)
    block_mask = _block_mask(scores, heads, some, full, limits)
    # Query and key change places: of each key, the kernel sums over the queries of one head.
    groups = scores.group_size * columns
    query = _wide_enough(scores.key).repeat_interleave(groups, dim=1)
    sums = _kernel(scores)(query, _wide_enough(scores.query), weighted, block_mask)
    by_column: Tensor = sums.unflatten(1, (-1, columns))
    return by_column.transpose(2, 3).exp()


# ---- what the kernel does to scores -----------------------------------------------------------


class _Heads:
    """The kernel's heads: one for each head and column of a question, so that one call answers all columns.

    `head` and `column` say what a head of the kernel stands for. They are tensors, as is everything that a
    compiled function reads: other numbers would be compiled in, once for each.
    """

    def __init__(self, count: int, columns: int, device: torch.device) -> None:
        number = torch.arange(count * columns, device=device, dtype=torch.int32)
        self.head = number // columns
        self.column = number % columns
        self.columns = columns


def _of_scores(scores: BlockScores, columns: int) -> tuple[_Change, _Heads]:
    """Return what makes a score of a scaled product, in the scores' own dtype, and the kernel's heads."""
    batch, device, dtype = scores.query.shape[0], scores.query.device, scores.dtype
    heads = _Heads(scores.query.shape[1], columns, device)
    head, cap, bias = heads.head, None, scores.bias
    scaling = torch.full((batch,), scores.scaling, device=device, dtype=dtype)
    if scores.softcap is not None:
        cap = torch.full((batch,), scores.softcap, device=device, dtype=dtype)
    if bias is not None:
        bias = bias.expand(*scores.query.shape[:3], scores.key.shape[2])

    @no_type_check
    def change(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # The kernel holds it in float32, but calls it by the dtype of query and key.
        score = score.to(dtype) * scaling[b]
        if cap is not None:
            score = (score / cap[b]).tanh() * cap[b]
        if bias is not None:
            score = score + bias[b, head[h], q, k]
        return score

    return change, heads


def _sums_over_keys(
    scores: BlockScores, columns: int, change: _Change, block_mask: BlockMask
) -> Float[Tensor, "batch head feature query"]:
    query = _wide_enough(scores.query).repeat_interleave(columns, dim=1) if columns > 1 else scores.query
    sums = _kernel(scores)(_wide_enough(query), _wide_enough(scores.key), change, block_mask)
    by_column: Tensor = sums.unflatten(1, (-1, columns))
    return by_column


def _wide_enough(vectors: Tensor) -> Tensor:
    lacking = _LEAST_WIDTH - vectors.shape[-1]
    return torch.nn.functional.pad(vectors, (0, lacking)) if lacking > 0 else vectors


# ---- which pairs the kernel visits ------------------------------------------------------------


def visited_blocks(
    mask: CausalMask,
    query_count: int,
    key_count: int,
    limits: tuple[int, int] | None = None,
    counted: Bool[Tensor, "batch query"] | None = None,
) -> tuple[Bool[Tensor, "#batch #head blocks key_blocks"], Bool[Tensor, "#batch #head blocks key_blocks"]]:
    """Return which blocks of queries and keys hold pairs that are seen, and which hold nothing else.

    Nothing is moved from the GPU, and nothing as large as a map is made unless the mask is one already.

    Args:
        mask: which keys a query sees.
        query_count, key_count: how many there are; the queries are the last tokens.
        limits: only pairs at a distance `limits[0] <= t - s < limits[1]` count.
        counted: only these queries count.
    """
    offset = key_count - query_count
    device = mask.first.device
    first_query = torch.arange(0, query_count, BLOCK, device=device)
    first_key = torch.arange(0, key_count, BLOCK, device=device)
    last_query = (first_query + BLOCK - 1).clamp(max=query_count - 1)[:, None]
    last_key = (first_key + BLOCK - 1).clamp(max=key_count - 1)
    whole = (first_query[:, None] + BLOCK <= query_count) & (first_key + BLOCK <= key_count)
    if mask.exact is not None:
        lacking = (-key_count % BLOCK, -query_count % BLOCK)
        padded = torch.nn.functional.pad(mask.exact, (0, lacking[0], 0, lacking[1]))
        pairs = padded.unflatten(-1, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        some, full = pairs.any(-1).any(3), pairs.all(-1).all(3)  # [batch, head, block, key_block]
    else:
        seeing = mask.last >= mask.first
        # Of the keys that the queries of a block see: the first of any, of all, the last of any, of all.
        first = mask.first.masked_fill(~seeing, key_count)
        last = mask.last.masked_fill(~seeing, -1)
        first_of_any, first_of_all = _by_block(first, key_count).amin(-1), _by_block(first, 0).amax(-1)
        last_of_any, last_of_all = _by_block(last, -1).amax(-1), _by_block(last, key_count).amin(-1)
        some = (last_key >= first_of_any[..., None]) & (first_key <= last_of_any[..., None])
        full = (first_key >= first_of_all[..., None]) & (last_key <= last_of_all[..., None])
        some, full = some[:, None], full[:, None]
    if limits is not None:
        farthest = last_query + offset - first_key
        nearest = first_query[:, None] + offset - last_key
        some = some & (farthest >= limits[0]) & (nearest < limits[1])
        full = full & (nearest >= limits[0]) & (farthest < limits[1])
    if counted is not None:
        some = some & _by_block(counted, False).any(-1)[:, None, :, None]
    return some, some & full & whole


def _by_block(values: Tensor, fill: int | bool) -> Tensor:
    """Split the last axis into blocks, filled up to a whole one."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % BLOCK), value=fill)
    blocks: Tensor = padded.unflatten(-1, (-1, BLOCK))
    return blocks


def _block_mask(
    scores: BlockScores,
    heads: _Heads,
    some: Bool[Tensor, "#batch #head blocks key_blocks"],
    full: Bool[Tensor, "#batch #head blocks key_blocks"],
    limits: tuple[int, int] | None = None,
) -> BlockMask:
    """Return the mask of a kernel that sums over keys or, with `limits`, over queries."""
    mask, batch, device = scores.mask, scores.query.shape[0], scores.query.device
    query_count, key_count = scores.query.shape[2], scores.key.shape[2]
    head = heads.head
    if mask.exact is not None:
        exact = mask.exact.expand(batch, scores.query.shape[1], -1, -1)

        @no_type_check
        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return exact[b, head[h], q, k]
    else:
        first, last = (end.to(torch.int32).expand(batch, -1).contiguous() for end in (mask.first, mask.last))

        @no_type_check
        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k >= first[b, q]) & (k <= last[b, q])

    if some.shape[1] > 1:
        some, full = (blocks.repeat_interleave(heads.columns, dim=1) for blocks in (some, full))
    if limits is None:
        return _as_block_mask(some, full, seen, (query_count, key_count))
    own = torch.arange(key_count - query_count, key_count, device=device, dtype=torch.int32)
    start, stop = (torch.full((batch,), limit, device=device, dtype=torch.int32) for limit in limits)

    @no_type_check
    def seen_by_key(b: Tensor, h: Tensor, k: Tensor, q: Tensor) -> Tensor:
        distance = own[q] - k
        return seen(b, h, q, k) & (distance >= start[b]) & (distance < stop[b])

    return _as_block_mask(some.mT, full.mT, seen_by_key, (key_count, query_count))


def _as_block_mask(some: Tensor, full: Tensor, seen: Any, lengths: tuple[int, int]) -> BlockMask:
    partial = some & ~full
    return BlockMask.from_kv_blocks(
        *_listed(partial),
        *_listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=lengths,
        # Only a backward pass needs them.
        compute_q_blocks=False,
    )


def _listed(
    blocks: Bool[Tensor, "batch head row column"],
) -> tuple[Int[Tensor, "batch head row"], Int[Tensor, "batch head row column"]]:
    """Return how many blocks each row visits, and the numbers of all blocks, those that it visits first."""
    order = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


# ---- the kernel -------------------------------------------------------------------------------


@no_type_check
def log_sums(
    query: Tensor, key: Tensor, change: _Change, block_mask: BlockMask
) -> Float[Tensor, "batch head query"]:
    """Return the log-sum-exp over the keys of all products, each changed by a function."""
    # Not what the user allows for the model, which may be TF32.
    options: Any = {"FLOAT32_PRECISION": "'ieee'"}
    _, more = flex_attention(
        query,
        key,
        # Nobody wants the output: the narrowest value that there is.
        key[..., :_LEAST_WIDTH],
        score_mod=change,
        block_mask=block_mask,
        scale=1.0,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
        kernel_options=options,
    )
    return more.lse


@cache
def _compiled() -> Callable[..., Tensor]:
    # In one piece or not at all: a piece that is left to Python would store the map of all pairs.
    compiled: Callable[..., Tensor] = torch.compile(log_sums, dynamic=True, fullgraph=True)
    return compiled


def _kernel(scores: BlockScores) -> Callable[..., Tensor]:
    """Return the kernel for the device of scores."""
    plain: Callable[..., Tensor] = log_sums
    if not compiles(scores.query.device.type):
        return plain

    def compiled(*inputs: Any) -> Tensor:
        # Models are read with everything that is compiled as plain Python: this must not be.
        with (
            torch.compiler.set_stance("default"),
            torch._dynamo.config.patch(recompile_limit=_MOST_VARIANTS),
            torch.no_grad(),
        ):
            return _compiled()(*inputs)

    return compiled

"""Sums over the pairs near the diagonal, from blocks of them: what WAAD and a short horizon of FAI need.

`FactoredAttention.near_sums` calls this. Blocks of queries meet the keys near any of them, as in a band, but
the products stay in their blocks: sorting them by distance would copy more than the sums take. A few blocks
at a time stay in a processor's cache, and nothing of the width of a band is kept. What is left to others:
which sums are wanted (reductions), and bands themselves (block_scores).
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from attnprobe.attention.block_scores import BAND_QUERIES, LOG2_E, BlockScores
from attnprobe.attention.kernels import add_product, piece_bytes
from attnprobe.attention.operator import NearSums


def near_sums(
    scores: BlockScores,
    log_sum_exp: Float[Tensor, "batch head query"],
    weights: Float[Tensor, " distance"],
    rows: Float[Tensor, "batch query"],
    low: int,
    high: int,
) -> NearSums:
    """Answer `Attention.near_sums` for scores that are products, without a cap or bias."""
    batch, heads, count = log_sum_exp.shape
    key_heads, key_count = scores.key.shape[1:3]
    # Distances count from `nearest` on from here.
    nearest = 0 if len(weights) else min(low, key_count - 1)
    low, high = low - nearest, high - nearest
    size, width = BAND_QUERIES, max(len(weights), high + 1)
    blocks, columns = -(-count // size), size + width - 1
    lacking = blocks * size - count
    # The key that the first query of the first block meets in column 0. There may be none.
    first = key_count - count - nearest - (width - 1)
    start, before = max(0, first), max(0, -first)
    key = torch.nn.functional.pad(scores.key[:, :, start:], (0, 0, before, lacking - nearest))
    near = key.unfold(2, columns, size)  # [batch, key_head, block, d, column]
    blocked = {"g": heads // key_heads, "r": size}
    query = torch.nn.functional.pad(scores.query, (0, 0, 0, lacking))
    query = rearrange(query, "b (k g) (n r) d -> b k n g r d", **blocked)
    change = torch.nn.functional.pad(log_sum_exp * -LOG2_E, (0, lacking))
    change = rearrange(change, "b (k g) (n r) -> b k n g r 1", **blocked)
    bias = _bias(scores, blocks, width, first)
    given = torch.nn.functional.pad(rows, (0, lacking)).view(batch, 1, blocks, 1, 1, size)
    by_query = log_sum_exp.new_empty(batch, key_heads, heads // key_heads, blocks * size)
    # Keys in blocks too: a block of queries adds to `reach` of them.
    reach = -(-columns // size)
    by_key = log_sum_exp.new_zeros(batch, key_heads, heads // key_heads, blocks + reach, size)
    bytes_per_block = batch * heads * size * columns * scores.dtype.itemsize
    step = max(1, piece_bytes(scores.query.device.type) // bytes_per_block)
    for begin in range(0, blocks, step):
        part = slice(begin, min(begin + step, blocks))
        # [batch, key_head, block, group, query, column]
        probability = _probability(
            scores, query[:, :, part], near[:, :, part], bias[:, :, part], change[:, :, part]
        )
        for block in range(part.start, min(part.stop, -(-before // size))):
            probability[:, :, block - part.start, ..., : before - block * size] = 0.0
        found = (_diagonals(probability, width, range(len(weights))) * weights.flip(0)).sum(-1)
        by_query[..., part.start * size : part.stop * size] = rearrange(found, "b k n g r -> b k g (n r)")
        for unwanted in (range(low), range(high + 1, width)):
            _diagonals(probability, width, unwanted).zero_()
        received = (given[:, :, part] @ probability)[..., 0, :]  # [batch, key_head, block, group, column]
        received = torch.nn.functional.pad(received, (0, reach * size - columns)).unflatten(-1, (reach, size))
        for place in range(reach):
            by_key[..., part.start + place : part.stop + place, :] += received[..., place, :].transpose(2, 3)
    by_key = by_key.flatten(-2)[..., before:]
    by_key = torch.nn.functional.pad(by_key, (start, key_count - start - by_key.shape[-1]))
    return NearSums(by_query[..., :count].flatten(1, 2), by_key.flatten(1, 2))


def _probability(
    scores: BlockScores,
    query: Float[Tensor, "batch key_head block group query d"],
    near: Float[Tensor, "batch key_head block d column"],
    bias: Float[Tensor, "#batch #key_head block #group query column"],
    change: Float[Tensor, "batch key_head block group query 1"],
) -> Float[Tensor, "batch key_head block group query column"]:
    """Return a few blocks of `A`: `exp2` of scores, less the log-sum-exp, where a pair is seen; else 0."""
    shape = (*query.shape[:5], near.shape[4])
    power = bias.new_empty(shape)
    torch.add(bias, change, out=power)
    # Windows of keys overlap: they are copied into factors of their own.
    left, right = query.flatten(3, 4), near.mT.contiguous().mT
    add_product(power.view(*left.shape[:-1], shape[-1]), left, right, scores.scaling * LOG2_E)
    power.exp2_()
    if not scores.mask.plain:
        # Padding may hold anything, and minus infinity plus NaN is NaN.
        power.masked_fill_(bias.isneginf(), 0.0)
    return power


def _diagonals(
    blocks: Float[Tensor, "*axes query column"], width: int, distances: range
) -> Float[Tensor, "*axes query distance"]:
    """Return a view of the pairs at some distances, the farthest first.

    Query r of a block meets the key at distance j in column `r + width - 1 - j`.
    """
    strides = (*blocks.stride()[:-2], blocks.stride(-2) + 1, 1)
    offset = blocks.storage_offset() + width - distances.stop
    return blocks.as_strided((*blocks.shape[:-1], len(distances)), strides, offset)


def _bias(
    scores: BlockScores, blocks: int, width: int, first: int
) -> Float[Tensor, "#batch #key_head block #group query column"]:
    """Return 0 where a pair is seen and nearer than `width`, and minus infinity elsewhere.

    Where all blocks are alike, that of one is returned for all: keys before the first one, which a few
    blocks meet, are up to the caller.
    """
    size, columns, device = BAND_QUERIES, BAND_QUERIES + width - 1, scores.query.device
    column, row = torch.arange(columns, device=device), torch.arange(size, device=device)[:, None]
    distance = row + (width - 1) - column
    near = (distance >= 0) & (distance < width)
    if scores.mask.plain:
        seen = near.expand(1, 1, blocks, 1, size, columns)
    else:
        count = scores.query.shape[2]
        block = torch.arange(blocks, device=device).repeat_interleave(size)[:count, None]
        keys = first + block * size + column  # [query, column]
        inside = keys < scores.key.shape[2]
        seen = scores.mask.diagonals(slice(0, count), keys.masked_fill(~inside, 0)) & inside
        seen = torch.nn.functional.pad(seen, (0, 0, 0, blocks * size - count))
        key_heads = scores.key.shape[1] if seen.shape[1] > 1 else 1
        seen = rearrange(seen, "b (k g) (n r) c -> b k n g r c", k=key_heads, r=size) & near
    return torch.zeros(seen.shape, dtype=scores.dtype, device=device).masked_fill_(~seen, -torch.inf)

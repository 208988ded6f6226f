"""Probabilities tile by tile: `exp(score - log_sum_exp)` of small blocks of query-key pairs.

`FactoredAttention` answers `attend` and `receive` from these tiles, and `group_sums` makes maps of them. A
tile stays in a processor's cache, and together they take no more memory than one of them. What is left to
others: which blocks there are (tiles), their scores (block_scores), and what is made of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from jaxtyping import Float
from torch import Tensor

from attnprobe.attention.block_scores import LOG2_E, BlockScores
from attnprobe.attention.tiles import TILE_KEYS, TILE_QUERIES, Tile, plan_tiles


def probability_tiles(
    scores: BlockScores,
    log_sum_exp: Float[Tensor, "batch head query"],
    start: int = 0,
    stop: int | None = None,
    counted: Sequence[bool] | None = None,
) -> Iterator[tuple[Tile, Float[Tensor, "batch head query key"]]]:
    """Yield the tiles that hold all pairs at a distance `start <= t - s < stop`, with their part of `A`.

    Pairs of a tile that are not seen or not at these distances are 0. Blocks of queries without a counted
    one are left out.
    """
    key_count = scores.key.shape[2]
    reaches = scores.mask.reaches(TILE_QUERIES)
    if counted is not None:
        reaches = [reach for reach in reaches if any(counted[reach.queries])]
    plan = plan_tiles(reaches, key_count - scores.query.shape[2], start, stop)
    for number, tiles in groupby(plan, key=lambda tile: tile.key_block):
        block = slice(number * TILE_KEYS, min((number + 1) * TILE_KEYS, key_count))
        scaled = scores.scaled_keys(block) if scores.are_products else None
        for tile in tiles:
            yield tile, _probability(scores, log_sum_exp[:, :, tile.queries, None], tile, block.start, scaled)


def _probability(
    scores: BlockScores,
    log_sum_exp: Float[Tensor, "batch head query 1"],
    tile: Tile,
    first_key: int,
    scaled: Float[Tensor, "batch_head block_key d"] | None,
) -> Float[Tensor, "batch head query key"]:
    """Return the part of `A` in a tile; `scaled` holds the scaled keys from `first_key` on, if usable."""
    if scaled is None:
        part = scores.block(tile.queries, tile.keys).sub_(log_sum_exp).exp_()
    else:
        near = scaled[:, tile.keys.start - first_key : tile.keys.stop - first_key]
        part = scores.products(tile.queries, near).sub_(log_sum_exp * LOG2_E).exp2_()
        if tile.needs_mask:
            part.masked_fill_(~scores.mask.block(tile.queries, tile.keys), 0.0)
    if tile.last_diagonal is not None:
        part.tril_(tile.last_diagonal)
    if tile.first_diagonal is not None:
        part.triu_(tile.first_diagonal)
    return part

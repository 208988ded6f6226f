"""Which blocks of query-key pairs answer a question: planned in whole numbers, before anything is computed.

`FactoredAttention` asks for a plan and follows it: `plan_tiles` covers every visible pair within the wanted
distances exactly once, and leaves out blocks that hold none. `query_slices` splits the queries so that what
is computed at a time stays within a limit of memory. Nothing here touches a tensor, so the plan can be tested
by counting pairs. What is left to others: which keys queries see (masks), and what is computed in a tile
(factored).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TILE_QUERIES, TILE_KEYS = 128, 512
"""The largest numbers of queries and keys in a tile, so that its scores stay in a processor's cache
(measured: 2.4 times the flash kernel's time over whole rows, 0.6 times over such tiles)."""


@dataclass(frozen=True)
class Reach:
    """Which keys a block of queries sees.

    Attributes:
        queries: the block.
        first, stop: no query of the block sees a key before `first`, or at `stop` or later.
        common_first, common_stop: every query of the block sees all keys from `common_first` up to
            `common_stop`, except those later than itself.
    """

    queries: slice
    first: int
    stop: int
    common_first: int
    common_stop: int


@dataclass(frozen=True)
class Tile:
    """A block of pairs to compute.

    Attributes:
        queries, keys: the block's queries and keys.
        key_block: the number of the block of `TILE_KEYS` keys in which it lies.
        needs_mask: whether the block holds pairs that may not be seen, later keys aside.
        first_diagonal, last_diagonal: which of the block's diagonals count (numbered as by `triu` and `tril`:
            key index less query index); None if all do.
    """

    queries: slice
    keys: slice
    key_block: int
    needs_mask: bool
    first_diagonal: int | None
    last_diagonal: int | None


def plan_tiles(
    reaches: Sequence[Reach], query_offset: int, start: int = 0, stop: int | None = None
) -> list[Tile]:
    """Return tiles that cover every visible pair at a distance `start <= t - s < stop` exactly once.

    All tiles of a block of keys come one after another, so that the keys are prepared once for all of them.

    Args:
        reaches: the blocks of queries.
        query_offset: the key index of the first query.
        start, stop: limits of the distance from a query back to a key; `stop=None`: back to the first key.

    >>> plan_tiles([Reach(slice(0, 3), 0, 3, 0, 3)], query_offset=0, start=1)
    [Tile(queries=slice(0, 3, None), keys=slice(0, 2, None), key_block=0, needs_mask=False, \
first_diagonal=None, last_diagonal=-1)]
    """
    met = []
    for reach in reaches:
        # Only keys at a wanted distance from some query of the block.
        last = min(reach.stop, reach.queries.stop + query_offset - start)
        first = reach.first
        if stop is not None:
            first = max(first, reach.queries.start + query_offset - stop + 1)
        if first < last:
            met.append((reach, first, last))
    tiles = []
    end = max((last for _, _, last in met), default=0)
    for begin in range(0, end, TILE_KEYS):
        for reach, first, last in met:
            keys = slice(max(first, begin), min(last, begin + TILE_KEYS))
            if keys.start < keys.stop:
                tiles.append(_tile(reach, keys, query_offset, start, stop))
    return tiles


def _tile(reach: Reach, keys: slice, query_offset: int, start: int, stop: int | None) -> Tile:
    # The pair of the block's query i and key j is at distance `corner + i - j`.
    corner = reach.queries.start + query_offset - keys.start
    nearest = corner - (keys.stop - keys.start - 1)
    farthest = corner + (reach.queries.stop - reach.queries.start - 1)
    return Tile(
        reach.queries,
        keys,
        keys.start // TILE_KEYS,
        needs_mask=keys.start < reach.common_first or keys.stop > reach.common_stop,
        first_diagonal=None if stop is None or farthest < stop else corner - stop + 1,
        last_diagonal=None if nearest >= start else corner - start,
    )


def query_slices(query_count: int, bytes_per_query: int, most_bytes: int, multiple: int = 1) -> list[slice]:
    """Return slices of queries within `most_bytes`; all but the last hold a multiple of `multiple` queries.

    >>> query_slices(10, bytes_per_query=8, most_bytes=40, multiple=2)
    [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
    """
    size = max(1, most_bytes // (bytes_per_query * multiple)) * multiple
    return [slice(begin, min(begin + size, query_count)) for begin in range(0, query_count, size)]

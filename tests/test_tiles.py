"""The plan of tiles: every visible pair within the distances is covered once, whatever the mask."""

from __future__ import annotations

from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st

from attnprobe.attention import tiles
from attnprobe.attention.masks import CausalMask
from attnprobe.attention.tiles import Reach, plan_tiles, query_slices
from attnprobe.testing.strategies import Draw


@st.composite
def masks(draw: Draw) -> tuple[CausalMask, torch.Tensor, int]:
    """Draw a mask, what it says pair by pair `[batch, query, key]`, and the key of the first query."""
    keys = draw(st.integers(1, 24))
    queries = draw(st.integers(1, keys))
    batch = draw(st.integers(1, 2))
    kept = torch.tensor(draw(st.lists(st.booleans(), min_size=batch * keys, max_size=batch * keys)))
    kept = kept.view(batch, keys)
    kind = draw(st.sampled_from(["plain", "window", "left", "right", "holes", "any"]))
    window = draw(st.integers(1, keys)) if kind == "window" else None
    causal = CausalMask.causal(queries, keys, window, kept.device)
    seen = causal.block(slice(0, queries), slice(0, keys))[:, 0].expand(batch, -1, -1)
    if kind in ("plain", "window"):
        return causal, seen, keys - queries
    if kind == "left":
        kept = kept.cummax(-1).values
    elif kind == "right":
        kept = kept.cummin(-1).values
    if kind == "any":
        noise = torch.rand(seen.shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
        seen = seen & (noise > 0.4)
        return CausalMask.from_mask(seen[:, None]), seen, keys - queries
    seen = seen & kept[:, None]
    from_keys = draw(st.booleans())
    mask = CausalMask.from_key_mask(kept, queries) if from_keys else CausalMask.from_mask(seen[:, None])
    return mask, seen, keys - queries


@given(
    drawn=masks(),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 9)),
    start=st.integers(0, 26),
    length=st.none() | st.integers(1, 26),
)
def test_every_visible_pair_is_covered_once(drawn, sizes, start: int, length: int | None) -> None:
    """Walking over the plan as the attention does gives exactly the visible pairs within the distances."""
    mask, seen, offset = drawn
    _, queries, keys = seen.shape
    stop = None if length is None else start + length
    covered = torch.zeros(seen.shape, dtype=torch.long)
    with patch.object(tiles, "TILE_KEYS", sizes[1]):
        plan = plan_tiles(mask.reaches(sizes[0]), offset, start, stop)
        for tile in plan:
            assert tile.key_block == tile.keys.start // sizes[1] == (tile.keys.stop - 1) // sizes[1]
            part = torch.ones(covered[:, tile.queries, tile.keys].shape, dtype=torch.long)
            if tile.needs_mask:
                part = part * mask.block(tile.queries, tile.keys)[:, 0]
            if tile.last_diagonal is not None:
                part = part.tril(tile.last_diagonal)
            if tile.first_diagonal is not None:
                part = part.triu(tile.first_diagonal)
            covered[:, tile.queries, tile.keys] += part
    distance = torch.arange(queries)[:, None] + offset - torch.arange(keys)
    within = (distance >= start) & (distance < (keys if stop is None else stop))
    assert torch.equal(covered, (seen & within).long())
    assert [tile.key_block for tile in plan] == sorted(tile.key_block for tile in plan)


def test_nothing_far_from_the_question_is_visited() -> None:
    """A window, or near distances, meet the tiles along the diagonal only, and most need no mask."""
    size, keys = tiles.TILE_QUERIES, 8192
    plain = CausalMask.causal(keys, keys, None, torch.device("cpu")).reaches(size)
    windowed = CausalMask.causal(keys, keys, 256, torch.device("cpu")).reaches(size)
    every = plan_tiles(plain, 0)
    assert not any(tile.needs_mask for tile in every)
    near = plan_tiles(plain, 0, 0, 256)
    assert sum(tile.keys.stop - tile.keys.start for tile in near) <= (keys // size) * (256 + size)
    seen = plan_tiles(windowed, 0)
    assert [(tile.queries, tile.keys) for tile in seen] == [(tile.queries, tile.keys) for tile in near]
    assert len(every) > 4 * len(near)


def test_where_nothing_counts_there_is_no_tile() -> None:
    reach = Reach(slice(0, 4), 2, 2, 0, 4)
    assert plan_tiles([reach], 0) == []
    assert plan_tiles([Reach(slice(0, 4), 0, 4, 0, 4)], 0, start=4) == []
    assert plan_tiles([], 0) == []


@given(count=st.integers(1, 50), each=st.integers(1, 9), most=st.integers(1, 60), multiple=st.integers(1, 5))
def test_slices_cover_all_queries_within_bounds(count: int, each: int, most: int, multiple: int) -> None:
    slices = query_slices(count, each, most, multiple)
    assert [i for part in slices for i in range(part.start, part.stop)] == list(range(count))
    for part in slices:
        size = part.stop - part.start
        assert size * each <= max(most, each * multiple)
        assert size % multiple == 0 or part is slices[-1]

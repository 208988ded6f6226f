"""Responses with gaps: two turns of an assistant, or text around a tool's output.

Span, WAAD, FAI and kurtosis are computed over the marked rows, against a float64 reference from eager maps;
the tokens in between are read, but do not count. The rhythm does not reach across a gap.
"""

from __future__ import annotations

import functools
import math
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnprobe
from attnprobe import HeadStatistics, TokenBatch, TokenScores, find_rhythm
from attnprobe.rhythm import dominated_anchors, near_preplans, waad_change
from attnprobe.testing.tiny_models import tiny_model, tiny_tokenizer

NAN = math.nan
WINDOW, HORIZON = 4, (2, 9)


@functools.cache
def models() -> tuple[Any, Any]:
    """The same tiny model twice: to be measured, and to give its maps."""
    return tiny_model("llama", vocab_size=300), tiny_model("llama", vocab_size=300, implementation="eager")


# ---- measuring, against eager maps -----------------------------------------------------------------


@st.composite
def conversations(draw: st.DrawFn, *, max_turns: int = 4) -> list[bool]:
    """Draw a response mask of turns with gaps in between, after a prompt."""
    mask = [False] * draw(st.integers(0, 6))
    for _ in range(draw(st.integers(2, max_turns))):
        mask += [True] * draw(st.integers(1, 9)) + [False] * draw(st.integers(1, 5))
    return mask[: len(mask) - draw(st.integers(0, 1))] if not mask[-1] else mask


def ids_of(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 290, (length,), generator=generator).tolist()


Reference = dict[str, Tensor]


def reference(ids: list[int], mask: list[bool]) -> Reference:
    """The definitions, entry by entry in float64, from the maps of one sequence alone; only marked rows."""
    with torch.no_grad():
        maps = models()[1](torch.tensor([ids]), output_attentions=True).attentions
    rows = [t for t, inside in enumerate(mask) if inside]
    found: dict[str, list] = {"span": [], "waad": [], "fai": [], "receiver_kurtosis": []}
    distance = (torch.arange(len(ids))[:, None] - torch.arange(len(ids))).clamp(min=0).double()
    for layer in maps:
        pattern = layer[0].double()  # [head, query, key]
        far = (pattern * distance).sum(-1)
        near = (pattern * distance.clamp(max=WINDOW)).sum(-1)
        found["span"].append(far[:, rows].mean(-1))
        inside = torch.tensor(mask)
        found["waad"].append(near.masked_fill(~inside, NAN))
        found["fai"].append(slow_influence(pattern, mask, *HORIZON, least=1))
        received = slow_influence(pattern, mask, 10, None, least=10)
        found["receiver_kurtosis"].append(torch.stack([slow_kurtosis(values) for values in received]))
    return {name: torch.stack(values) for name, values in found.items()}


def slow_influence(pattern: Tensor, mask: list[bool], low: int, high: int | None, least: int) -> Tensor:
    influence = torch.full((pattern.shape[0], len(mask)), NAN, dtype=torch.float64)
    for s in range(len(mask)):
        last = len(mask) - 1 if high is None else min(s + high, len(mask) - 1)
        later = [t for t in range(s + low, last + 1) if mask[t]]
        if mask[s] and len(later) >= least:
            influence[:, s] = pattern[:, later, s].mean(-1)
    return influence


def slow_kurtosis(values: Tensor) -> Tensor:
    defined = values[~values.isnan()]
    # Of fewer values, the spread is arithmetic.
    if len(defined) < 4:
        return torch.tensor(NAN, dtype=torch.float64)
    deviation = defined - defined.mean()
    return deviation.pow(4).mean() / deviation.square().mean().square() - 3


def check(statistics: HeadStatistics, example: int, columns: slice, expected: Reference) -> None:
    """Check the statistics of one example, which stands in some columns; NaN outside of them."""
    for name, values in expected.items():
        actual = getattr(statistics, name)[example].double()
        tolerance = 1e-3 if name == "receiver_kurtosis" else 1e-4
        if name in ("waad", "fai"):
            outside = torch.ones(actual.shape[-1], dtype=torch.bool)
            outside[columns] = False
            assert bool(actual[..., outside].isnan().all())
            actual = actual[..., columns]
        torch.testing.assert_close(actual, values, rtol=tolerance, atol=tolerance, equal_nan=True)


def measured(batch: TokenBatch, **options: Any) -> HeadStatistics:
    return attnprobe.measure(models()[0], batch, window=WINDOW, horizon=HORIZON, receiver=True, **options)


@settings(max_examples=15)
@given(mask=conversations(), seed=st.integers(0, 99), left=st.integers(0, 4), right=st.integers(0, 4))
def test_only_marked_rows_count(mask: list[bool], seed: int, left: int, right: int) -> None:
    """Whatever the padding, on either side."""
    ids = ids_of(seed, len(mask))
    batch = TokenBatch.from_ids(
        [[0] * left + ids + [0] * right],
        [[0] * left + [1] * len(ids) + [0] * right],
        response_mask=[[0] * left + mask + [0] * right],
    )
    check(measured(batch), 0, slice(left, left + len(ids)), reference(ids, mask))


def test_long_turns_have_a_kurtosis() -> None:
    """Enough rows for every number to be defined, over a gap of many tokens."""
    mask = [False] * 3 + [True] * 30 + [False] * 20 + [True] * 30
    ids = ids_of(0, len(mask))
    expected = reference(ids, mask)
    assert not bool(expected["receiver_kurtosis"].isnan().any())
    check(measured(TokenBatch.from_ids([ids], response_mask=[mask])), 0, slice(0, len(ids)), expected)


@settings(max_examples=10)
@given(masks=st.lists(conversations(max_turns=3), min_size=2, max_size=3), seed=st.integers(0, 99))
@pytest.mark.parametrize("batch_size", [None, 1])
def test_neighbours_in_the_batch_do_not_matter(
    batch_size: int | None, masks: list[list[bool]], seed: int
) -> None:
    """Rows of different lengths, padded together."""
    rows = [ids_of(seed + i, len(mask)) for i, mask in enumerate(masks)]
    statistics = measured(TokenBatch.from_ids(rows, response_mask=masks), batch_size=batch_size)
    for i, (ids, mask) in enumerate(zip(rows, masks, strict=True)):
        check(statistics, i, slice(0, len(ids)), reference(ids, mask))


@settings(max_examples=10)
@given(masks=st.lists(conversations(max_turns=3), min_size=2, max_size=3), seed=st.integers(0, 99))
def test_neighbours_in_a_packed_row_do_not_matter(masks: list[list[bool]], seed: int) -> None:
    """WAAD and FAI of each sequence are its own; span is the mean over all rows of the packed row."""
    rows = [ids_of(seed + i, len(mask)) for i, mask in enumerate(masks)]
    batch = TokenBatch.from_ids(
        [[*chain(*rows)]],
        response_mask=[[*chain(*masks)]],
        position_ids=[[t for row in rows for t in range(len(row))]],
    )
    statistics, begin = measured(batch), 0
    total, count = torch.zeros(3, 4, dtype=torch.float64), 0
    for ids, mask in zip(rows, masks, strict=True):
        expected, columns = reference(ids, mask), slice(begin, begin + len(ids))
        for name in ("waad", "fai"):
            actual = getattr(statistics, name)[0, ..., columns].double()
            torch.testing.assert_close(actual, expected[name], rtol=1e-4, atol=1e-4, equal_nan=True)
        total, count = total + expected["span"] * sum(mask), count + sum(mask)
        begin += len(ids)
    torch.testing.assert_close(statistics.span[0].double(), total / count, rtol=1e-4, atol=1e-4)


def test_the_entropy_of_marked_tokens_is_that_of_the_whole_text() -> None:
    """A gap changes only what is described: each token was sampled from the same distribution."""
    ids = ids_of(0, 20)
    mask = [False] * 4 + [True] * 5 + [False] * 4 + [True] * 7
    whole = measured(TokenBatch.from_ids([ids])).entropy
    parts = measured(TokenBatch.from_ids([ids], response_mask=[mask])).entropy
    assert whole is not None
    assert parts is not None
    expected = whole.masked_fill(~torch.tensor([mask]), NAN)
    torch.testing.assert_close(parts, expected, equal_nan=True)


def test_maps_are_of_the_marked_tokens() -> None:
    """In their order, with the columns that they stand in."""
    ids = ids_of(0, 12)
    mask = [False, True, True, False, False, True, True, True, False, True, False, False]
    maps = attnprobe.group_maps(models()[0], TokenBatch.from_ids([ids], response_mask=[mask]), [(1, 2)])
    rows = [t for t, inside in enumerate(mask) if inside]
    assert maps.columns_of(0) == rows
    with torch.no_grad():
        eager = models()[1](torch.tensor([ids]), output_attentions=True).attentions[1][0, 2]
    torch.testing.assert_close(maps.local_map[0], eager[rows][:, rows], rtol=1e-4, atol=1e-5)


# ---- the rhythm ------------------------------------------------------------------------------------


def scores_of(waad: list[float], fai: list[float]) -> TokenScores:
    """Scores with a gap wherever WAAD is undefined."""
    return TokenScores(torch.tensor([waad]), torch.tensor([fai]), None, ~torch.tensor([waad]).isnan())


grid = st.integers(0, 6).map(lambda step: step / 4)
turns = st.lists(
    st.tuples(st.lists(st.tuples(grid, grid), min_size=1, max_size=8), st.integers(1, 4)),
    min_size=1,
    max_size=4,
)
Turns = list[tuple[list[tuple[float, float]], int]]


def joined(drawn: Turns) -> tuple[TokenScores, list[slice]]:
    """The scores of turns with gaps behind each, and where each turn stands."""
    waad: list[float] = []
    fai: list[float] = []
    places = []
    for turn, gap in drawn:
        places.append(slice(len(waad), len(waad) + len(turn)))
        waad += [w for w, _ in turn] + [NAN] * gap
        fai += [f for _, f in turn] + [NAN] * gap
    return scores_of(waad, fai), places


@given(drawn=turns, lookback=st.integers(1, 9))
def test_each_turn_has_the_rhythm_that_it_has_alone(drawn: Turns, lookback: int) -> None:
    """With every peak kept: no peak at the edge of a gap, and no pair across one."""
    scores, places = joined(drawn)
    rhythm = find_rhythm(scores, quantile=1.0, lookback=lookback)
    assert not bool((rhythm.preplan | rhythm.anchor)[~scores.response_mask].any())
    for place in places:
        alone = find_rhythm(scores.at_columns(place), quantile=1.0, lookback=lookback)
        part = rhythm.at_columns(place)
        for name in ("preplan", "anchor", "anchor_preplan"):
            assert torch.equal(getattr(alone, name), getattr(part, name)), name
        torch.testing.assert_close(alone.delta, part.delta, equal_nan=True)
        for edge in (place.start, place.stop - 1):
            assert not bool(rhythm.preplan[0, edge] | rhythm.anchor[0, edge])


@given(drawn=turns, lookback=st.integers(1, 9), low=grid, high=grid)
def test_dominated_anchors_do_not_look_across_a_gap(
    drawn: Turns, lookback: int, low: float, high: float
) -> None:
    """With given thresholds, each turn has the dominated anchors that it has alone."""
    scores, places = joined(drawn)
    anchor = scores.fai > 0.5
    options: dict[str, Any] = {"lookback": lookback, "waad_threshold": low, "delta_threshold": high}
    whole = dominated_anchors(anchor, scores.waad, **options)
    for place in places:
        alone = dominated_anchors(anchor[:, place], scores.waad[:, place], **options)
        for ours, theirs in zip(whole, alone, strict=True):
            assert torch.equal(ours[:, place], theirs)


@given(drawn=turns, lookback=st.integers(0, 9))
def test_preplans_are_near_within_their_turn_only(drawn: Turns, lookback: int) -> None:
    scores, places = joined(drawn)
    preplan, mask = scores.fai > 0.5, scores.response_mask
    near = near_preplans(preplan, mask, lookback)
    for place in places:
        assert torch.equal(near[:, place], near_preplans(preplan[:, place], mask[:, place], lookback))
    assert not bool(near[~mask].any())


def test_an_edge_is_no_peak_however_high() -> None:
    scores = scores_of([0.0, 9.0, NAN, 9.0, 0.0, 1.0, 0.0], [0.0, 8.0, NAN, 8.0, 0.0, 2.0, 0.0])
    rhythm = find_rhythm(scores, quantile=1.0)
    assert rhythm.preplan[0].nonzero()[:, 0].tolist() == [5]
    assert rhythm.pairs() == [(5, 5)]


def test_an_anchor_is_not_paired_with_a_preplan_of_another_turn() -> None:
    """Though it lies within the lookback; without the gap it would be."""
    waad, fai = [0.0, 9.0, 0.0, NAN, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, NAN, 0.0, 5.0, 0.0]
    assert find_rhythm(scores_of(waad, fai), quantile=1.0, lookback=6).pairs() == []
    waad[3], fai[3] = 0.0, 0.0
    assert find_rhythm(scores_of(waad, fai), quantile=1.0, lookback=6).pairs() == [(1, 5)]


def test_the_change_of_waad_ends_at_a_gap() -> None:
    change = waad_change(torch.tensor([[1.0, 3.0, NAN, 8.0, 7.0]]))
    torch.testing.assert_close(change, torch.tensor([[2.0, NAN, NAN, 1.0, NAN]]), equal_nan=True)


def test_scores_of_predictions_start_anew_behind_a_gap() -> None:
    """The row that produced the first token of a turn is not one that was measured."""
    ids = ids_of(0, 16)
    mask = [False] * 2 + [True] * 5 + [False] * 3 + [True] * 6
    statistics = measured(TokenBatch.from_ids([ids], response_mask=[mask]))
    plain = attnprobe.score_tokens(statistics, "all").waad
    moved = attnprobe.score_tokens(statistics, "all", align="prediction").waad
    for t in range(16):
        if mask[t] and t > 0 and mask[t - 1]:
            assert float(moved[0, t]) == float(plain[0, t - 1])
        else:
            assert math.isnan(float(moved[0, t]))


def test_two_turns_go_all_the_way_through() -> None:
    """From texts to the table: statistics, sentences, groups, scores, rhythm."""
    tokenizer = tiny_tokenizer()
    first, tool, second = "Let us see. I call it.\n", "<tool> 4 </tool>", "It is four. So it is.\n"
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (first * 3, tool, second * 3)]
    mask = [i != 1 for i, part in enumerate(parts) for _ in part]
    batch = TokenBatch.from_ids([[*chain(*parts)]], response_mask=[mask], tokenizer=tokenizer)
    statistics = attnprobe.measure(models()[0], batch, receiver="sentence")
    scores = attnprobe.score_tokens(statistics, attnprobe.classify_heads(statistics))
    rhythm = find_rhythm(scores)
    table = scores.to_pandas()
    assert "".join(table["text"]) == first * 3 + second * 3
    sentences = attnprobe.sentence_ids(batch)[0]
    assert sentences.max() == 11
    gap = ~torch.tensor(mask)
    assert not bool((rhythm.preplan | rhythm.anchor | rhythm.dominated | rhythm.intro)[0, gap].any())
    for preplan, anchor in rhythm.pairs():
        assert bool(torch.tensor(mask)[preplan : anchor + 1].all())

"""The rhythm: peaks, quantiles, preplans, anchors and dominated anchors, against slow loops over lists."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnprobe import ParameterError, ResultError, Rhythm, TokenScores, find_rhythm
from attnprobe.rhythm import dominated_anchors, find_peaks, top_quantile, waad_change
from tests.refusals import refused

NAN = math.nan
Rows = list[list[float]]


# ---- the slow reference: float64 in Python lists, one response at a time --------------------------


def largest_first(row: list[float]) -> list[int]:
    """The positions with a defined value, the largest first, the earliest first among equals."""
    defined = [t for t in range(len(row)) if not math.isnan(row[t])]
    return sorted(defined, key=lambda t: (-row[t], t))


def kept(row: list[float], percent: int) -> int:
    """ceil(q * n) in whole numbers, where n counts the defined tokens."""
    return -(-percent * len(largest_first(row)) // 100)


def slow_top(row: list[float], percent: int) -> list[bool]:
    chosen = largest_first(row)[: kept(row, percent)]
    return [t in chosen for t in range(len(row))]


def slow_peaks(row: list[float], percent: int) -> list[bool]:
    """A strict local maximum (plateau: its first position) at or above the top-q threshold."""
    peaks = [False] * len(row)
    for t in range(1, len(row)):
        stop = t
        while stop < len(row) and row[stop] == row[t]:
            stop += 1
        if stop >= len(row) or stop == t:
            continue
        higher = row[t - 1] < row[t] and row[stop] < row[t]
        threshold = row[largest_first(row)[kept(row, percent) - 1]]
        peaks[t] = higher and row[t] >= threshold
    return peaks


def slow_change(row: list[float]) -> list[float]:
    return [abs(row[t] - row[t + 1]) for t in range(len(row) - 1)] + [NAN]


def slow_median(row: list[float]) -> float:
    values = sorted(value for value in row if not math.isnan(value))
    if not values:
        return NAN
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def slow_dominated(
    anchor: list[bool], waad: list[float], k: int, low: float | None, high: float | None
) -> tuple[list[bool], list[bool]]:
    delta = slow_change(waad)
    low = slow_median(waad) if low is None else low
    high = slow_median(delta) if high is None else high
    dominated, intro = [False] * len(waad), [False] * len(waad)
    for t in range(len(waad)):
        before = [u for u in range(max(0, t - k), t) if not math.isnan(delta[u])]
        if not anchor[t] or not before:
            continue
        opening = max(before, key=lambda u: (delta[u], u))
        if waad[t] <= low and delta[opening] >= high:
            dominated[t] = intro[opening] = True
    return dominated, intro


# ---- what is drawn --------------------------------------------------------------------------------

percents = st.integers(1, 100)
# A coarse grid makes ties and plateaus common, and sums of it are exact in float32.
coarse = st.integers(0, 6).map(lambda step: step / 4)
fine = st.floats(-100, 100, width=32)


@st.composite
def score_rows(draw: st.DrawFn, *, max_tokens: int = 16, batch: int | None = None) -> Rows:
    """Draw rows of scores, most of them as a response has them: defined in one run of the row."""
    count = draw(st.integers(1, 3)) if batch is None else batch
    tokens = draw(st.integers(1, max_tokens))
    value = draw(st.sampled_from([coarse, fine]))
    rows = []
    for _ in range(count):
        row = draw(st.lists(value, min_size=tokens, max_size=tokens))
        start, stop = sorted((draw(st.integers(0, tokens)), draw(st.integers(0, tokens))))
        row = [x if start <= t < stop else NAN for t, x in enumerate(row)]
        for t in draw(st.lists(st.integers(0, tokens - 1), max_size=2)):
            row[t] = NAN
        rows.append(row)
    return rows


def scores_of(waad: Rows, fai: Rows) -> TokenScores:
    waad_tensor = torch.tensor(waad)
    return TokenScores(waad_tensor, torch.tensor(fai), None, ~waad_tensor.isnan())


def assert_same(expected: Rows, actual: Tensor) -> None:
    torch.testing.assert_close(actual.double(), torch.tensor(expected).double(), equal_nan=True)


# ---- top_quantile ---------------------------------------------------------------------------------


@given(rows=score_rows(), percent=percents, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_top_quantile_marks_the_ceil_of_q_n_largest(rows: Rows, percent: int, dtype: torch.dtype) -> None:
    expected = [slow_top(row, percent) for row in rows]
    assert expected == top_quantile(torch.tensor(rows, dtype=dtype), percent / 100).tolist()


@given(tokens=st.integers(1, 300), percent=percents)
def test_top_quantile_counts_as_decimals_do(tokens: int, percent: int) -> None:
    """0.3 of 10 is 3, although 0.3 * 10 in binary may be a hair above it; and never fewer than one."""
    marked = top_quantile(torch.arange(tokens).float()[None], percent / 100)
    assert math.ceil(tokens * percent / 100 - 1e-9) == int(marked.sum())
    assert bool(marked[0, -1])


@pytest.mark.parametrize(
    ("row", "quantile", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], 0.5, [True, True, False, False]),
        ([2.0, NAN, 3.0, NAN], 0.5, [False, False, True, False]),
        ([2.0, NAN, 3.0, NAN], 1.0, [True, False, True, False]),
        ([NAN, NAN], 1.0, [False, False]),
        ([0.0, -math.inf, math.inf], 0.4, [True, False, True]),
        ([-math.inf, NAN], 1.0, [True, False]),
    ],
)
def test_top_quantile_by_hand(row: list[float], quantile: float, expected: list[bool]) -> None:
    """Ties go to the earliest; undefined tokens neither count nor are chosen."""
    assert [expected] == top_quantile(torch.tensor([row]), quantile).tolist()


# ---- find_peaks -----------------------------------------------------------------------------------


@given(rows=score_rows(), percent=percents, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_peaks_are_strict_local_maxima_in_the_top_quantile(
    rows: Rows, percent: int, dtype: torch.dtype
) -> None:
    expected = [slow_peaks(row, percent) for row in rows]
    assert expected == find_peaks(torch.tensor(rows, dtype=dtype), quantile=percent / 100).tolist()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0.0, 1.0, 2.0, 3.0], []),
        ([3.0, 2.0, 1.0, 0.0], []),
        ([1.0, 1.0, 1.0], []),
        ([1.0, 2.0, 1.0], [1]),
        ([5.0, 1.0, 5.0], []),
        ([0.0, 2.0, 2.0, 2.0, 1.0], [1]),
        ([0.0, 2.0, 2.0, 3.0, 1.0], [3]),
        ([0.0, 2.0, 2.0], []),
        ([2.0, 2.0, 0.0], []),
        ([0.0, 2.0, NAN, 2.0, 0.0], []),
        ([0.0, 2.0, NAN, 1.0, 3.0, 0.0], [4]),
        ([0.0, 2.0, 2.0, NAN], []),
        ([NAN, 2.0, 1.0, NAN], []),
        ([NAN, 1.0, 2.0, 1.0, NAN], [2]),
        ([NAN, NAN, NAN], []),
        ([1.0], []),
        ([1.0, 2.0], []),
        ([-3.0, -2.0, -3.0], [1]),
    ],
    ids=[
        "rising",
        "falling",
        "constant",
        "one peak",
        "first and last",
        "a plateau peaks at its first position",
        "a step is no peak",
        "a plateau that reaches the end",
        "a plateau that reaches the start",
        "undefined splits a plateau",
        "undefined is no neighbour",
        "a plateau that reaches the undefined",
        "first defined value",
        "inside padding",
        "nothing defined",
        "one token",
        "two tokens",
        "negative values",
    ],
)
def test_peaks_by_hand(row: list[float], expected: list[int]) -> None:
    assert expected == find_peaks(torch.tensor([row]), quantile=1.0)[0].nonzero()[:, 0].tolist()


def test_peaks_below_the_quantile_are_dropped() -> None:
    """7 values: the 3 largest are 9, 8 and 7, so the peak of 2 is none, and 7 is none but large."""
    row = torch.tensor([[0.0, 9.0, 7.0, 8.0, 1.0, 2.0, 0.0]])
    assert find_peaks(row, quantile=3 / 7)[0].nonzero()[:, 0].tolist() == [1, 3]
    assert find_peaks(row, quantile=1 / 7)[0].nonzero()[:, 0].tolist() == [1]
    assert find_peaks(row, quantile=1.0)[0].nonzero()[:, 0].tolist() == [1, 3, 5]


def test_peaks_equal_to_the_threshold_all_count() -> None:
    """At or above the threshold: two of seven may be kept, and all three that tie with them are peaks."""
    row = torch.tensor([[0.0, 5.0, 0.0, 5.0, 0.0, 5.0, 0.0]])
    assert find_peaks(row, quantile=2 / 7)[0].nonzero()[:, 0].tolist() == [1, 3, 5]


@given(rows=score_rows(), percent=percents, left=st.integers(0, 3), right=st.integers(0, 3))
def test_peaks_do_not_see_padding_or_other_rows(rows: Rows, percent: int, left: int, right: int) -> None:
    """A row alone, and a row within undefined columns, has the same peaks as in its batch."""
    together = find_peaks(torch.tensor(rows), quantile=percent / 100)
    for i, row in enumerate(rows):
        padded = torch.tensor([[NAN] * left + row + [NAN] * right])
        alone = find_peaks(padded, quantile=percent / 100)[0]
        assert [False] * left + together[i].tolist() + [False] * right == alone.tolist()


@given(rows=score_rows(), percent=percents)
def test_peaks_do_not_depend_on_scale(rows: Rows, percent: int) -> None:
    values = torch.tensor(rows, dtype=torch.float64)
    peaks = find_peaks(values, quantile=percent / 100)
    assert peaks.tolist() == find_peaks(values * 4.0, quantile=percent / 100).tolist()


@pytest.mark.parametrize("quantile", [0.0, -0.1, 1.01, NAN])
@pytest.mark.parametrize("function", ["top_quantile", "find_peaks", "find_rhythm"])
def test_a_quantile_outside_0_1_is_refused(function: str, quantile: float) -> None:
    values = torch.tensor([[1.0, 2.0, 1.0]])
    calls = {
        "top_quantile": lambda: top_quantile(values, quantile),
        "find_peaks": lambda: find_peaks(values, quantile=quantile),
        "find_rhythm": lambda: find_rhythm(scores_of([[1.0]], [[1.0]]), quantile=quantile),
    }
    refused(calls[function], "quantile", "(0, 1]", quantile, error=ParameterError)


# ---- waad_change and dominated anchors ------------------------------------------------------------


@given(rows=score_rows())
def test_waad_change_is_the_step_to_the_next_token(rows: Rows) -> None:
    """Eq. 13, undefined for the last token of the row and of the response."""
    assert_same(
        [slow_change(row) for row in torch.tensor(rows).double().tolist()],
        waad_change(torch.tensor(rows).double()),
    )


def test_waad_change_leaves_its_input_alone() -> None:
    waad = torch.tensor([[1.0, 3.0, 2.5]])
    waad_change(waad)
    assert waad.tolist() == [[1.0, 3.0, 2.5]]


thresholds = st.none() | coarse


@st.composite
def anchored_rows(draw: st.DrawFn) -> tuple[Rows, list[list[bool]]]:
    """Draw WAAD on a grid where medians are exact, and any tokens as anchors."""
    tokens, count = draw(st.integers(1, 14)), draw(st.integers(1, 3))
    rows, anchors = [], []
    for _ in range(count):
        row = draw(st.lists(coarse, min_size=tokens, max_size=tokens))
        start, stop = sorted((draw(st.integers(0, tokens)), draw(st.integers(0, tokens))))
        rows.append([x if start <= t < stop else NAN for t, x in enumerate(row)])
        anchors.append(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    return rows, anchors


@given(drawn=anchored_rows(), k=st.integers(1, 5), low=thresholds, high=thresholds)
def test_dominated_anchors_are_as_defined(
    drawn: tuple[Rows, list[list[bool]]], k: int, low: float | None, high: float | None
) -> None:
    """Low WAAD and a large change just before; thresholds default to the response's own medians."""
    rows, anchors = drawn
    expected = [slow_dominated(a, row, k, low, high) for a, row in zip(anchors, rows, strict=True)]
    dominated, intro = dominated_anchors(
        torch.tensor(anchors), torch.tensor(rows), lookback=k, waad_threshold=low, delta_threshold=high
    )
    assert [d for d, _ in expected] == dominated.tolist()
    assert [i for _, i in expected] == intro.tolist()


def mark(tokens: int, *positions: int) -> Tensor:
    marked = torch.zeros(1, tokens, dtype=torch.bool)
    marked[0, list(positions)] = True
    return marked


def columns(mask: Tensor) -> list[int]:
    return mask[0].nonzero()[:, 0].tolist()


def test_of_equal_changes_the_latest_opens_the_chunk() -> None:
    """The changes at 0, 1 and 2 are 4, 4 and 1: the anchor at 3 belongs to 1."""
    waad = torch.tensor([[0.0, 4.0, 0.0, 1.0]])
    dominated, intro = dominated_anchors(mark(4, 3), waad, waad_threshold=1.0, delta_threshold=4.0)
    assert (columns(dominated), columns(intro)) == ([3], [1])


def test_only_the_last_k_tokens_can_open_a_chunk() -> None:
    waad = torch.tensor([[0.0, 4.0, 0.0, 0.0, 0.0]])

    def found(lookback: int) -> tuple[list[int], list[int]]:
        dominated, intro = dominated_anchors(
            mark(5, 4), waad, lookback=lookback, waad_threshold=1.0, delta_threshold=4.0
        )
        return columns(dominated), columns(intro)

    assert ([], []) == found(1) == found(2)
    assert ([4], [1]) == found(3) == found(4) == found(50)


def test_an_anchor_at_the_start_of_its_response_is_not_dominated() -> None:
    """Nothing stands before it within the response, whatever the thresholds and the prompt."""
    waad = torch.tensor([[NAN, NAN, 0.0, 0.0]])
    dominated, intro = dominated_anchors(mark(4, 2), waad, waad_threshold=9.0, delta_threshold=0.0)
    assert (columns(dominated), columns(intro)) == ([], [])


def test_two_dominated_anchors_may_share_an_opening() -> None:
    waad = torch.tensor([[0.0, 4.0, 0.0, 0.0]])
    dominated, intro = dominated_anchors(mark(4, 2, 3), waad, waad_threshold=1.0, delta_threshold=4.0)
    assert (columns(dominated), columns(intro)) == ([2, 3], [1])


def test_default_thresholds_are_medians_over_the_defined_tokens() -> None:
    """WAAD 8 0 2 1 of the response has the median 1.5 (with the prompt's NaN left out), so 1 is low and 2
    is not; its changes 8 2 1 have the median 2, which is met."""
    waad = torch.tensor([[NAN, NAN, 8.0, 0.0, 2.0, 1.0, NAN]])
    dominated, intro = dominated_anchors(mark(7, 3, 4, 5), waad, lookback=1)
    assert columns(dominated) == [3]
    assert columns(intro) == [2]
    dominated, intro = dominated_anchors(mark(7, 3, 4, 5), waad, lookback=2)
    assert columns(dominated) == [3, 5]
    assert columns(intro) == [2, 3]


@pytest.mark.parametrize("lookback", [0, -1, True, 2.0, "3", None])
def test_a_lookback_below_one_is_refused(lookback: object) -> None:
    scores = scores_of([[0.0, 1.0, 0.0]], [[0.0, 1.0, 0.0]])
    for call in (
        lambda: dominated_anchors(mark(3, 1), scores.waad, lookback=lookback),
        lambda: find_rhythm(scores, lookback=lookback),
    ):
        refused(call, "lookback", "1", repr(lookback), error=ParameterError)


def test_a_lookback_may_be_as_long_as_one_likes() -> None:
    scores = scores_of([[0.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 0.0]])
    for lookback in (10, 2**40, 2**70):
        assert find_rhythm(scores, lookback=lookback, quantile=1.0).pairs() == [(1, 2)]


@pytest.mark.usefixtures("as_users_call")
def test_anchors_and_waad_must_have_one_shape() -> None:
    call = lambda: dominated_anchors(mark(3, 1), torch.zeros(1, 4))  # noqa: E731
    refused(call, "anchor", "[1, 3]", "[1, 4]", error=ParameterError)


# ---- find_rhythm ----------------------------------------------------------------------------------


@st.composite
def score_pairs(draw: st.DrawFn) -> tuple[Rows, Rows]:
    """Draw WAAD and FAI of the same tokens, on a grid where medians are exact."""
    waad, _ = draw(anchored_rows())
    tokens = len(waad[0])
    fai = []
    for row in waad:
        values = draw(st.lists(coarse, min_size=tokens, max_size=tokens))
        # FAI is undefined for late tokens too.
        late = draw(st.integers(0, 3))
        last = max((t for t in range(tokens) if not math.isnan(row[t])), default=0)
        fai.append(
            [NAN if math.isnan(row[t]) or t > last - late else value for t, value in enumerate(values)]
        )
    return waad, fai


@given(drawn=score_pairs(), percent=percents, k=st.integers(1, 4))
def test_rhythm_is_as_defined(drawn: tuple[Rows, Rows], percent: int, k: int) -> None:
    """Peaks of WAAD and FAI; each anchor with the latest preplan in t-k..t; dominated anchors; delta."""
    waad, fai = drawn
    rhythm = find_rhythm(scores_of(waad, fai), quantile=percent / 100, lookback=k)
    pairs = []
    for i in range(len(waad)):
        preplan, anchor = slow_peaks(waad[i], percent), slow_peaks(fai[i], percent)
        follows = [-1] * len(anchor)
        for t in range(len(anchor)):
            near = [u for u in range(max(0, t - k), t + 1) if preplan[u]]
            if anchor[t] and near:
                follows[t] = near[-1]
        dominated, intro = slow_dominated(anchor, waad[i], k, None, None)
        assert preplan == rhythm.preplan[i].tolist()
        assert anchor == rhythm.anchor[i].tolist()
        assert follows == rhythm.anchor_preplan[i].tolist()
        assert dominated == rhythm.dominated[i].tolist()
        assert intro == rhythm.intro[i].tolist()
        pairs.append([(follows[t], t) for t in range(len(anchor)) if follows[t] >= 0])
    assert pairs == [rhythm.pairs(i) for i in range(len(waad))]
    assert_same([slow_change(row) for row in waad], rhythm.delta)
    assert (percent / 100, k) == (rhythm.quantile, rhythm.lookback)


@given(drawn=score_pairs(), k=st.integers(1, 4))
def test_rhythm_stays_within_the_response(drawn: tuple[Rows, Rows], k: int) -> None:
    """No part of the rhythm lies on a token without scores."""
    scores = scores_of(*drawn)
    rhythm = find_rhythm(scores, quantile=1.0, lookback=k)
    marked = rhythm.preplan | rhythm.anchor | rhythm.dominated | rhythm.intro
    assert not bool((marked & ~scores.response_mask).any())


def test_scores_outside_the_response_are_not_looked_at() -> None:
    """Scores that were built by hand may be defined in the prompt as well."""
    waad, fai = [[9.0, 0.0, 4.0, 0.0, 1.0, 9.0]], [[0.0, 9.0, 0.0, 5.0, 1.0, 0.0]]
    mask = torch.tensor([[False, True, True, True, True, False]])
    scores = TokenScores(torch.tensor(waad), torch.tensor(fai), None, mask)
    inside = TokenScores(
        *(values.masked_fill(~mask, NAN) for values in (scores.waad, scores.fai)), None, mask
    )
    assert find_rhythm(scores, quantile=1.0) == find_rhythm(inside, quantile=1.0)
    assert columns(find_rhythm(scores, quantile=1.0).preplan) == [2]


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("scores", ["x", None, torch.ones(1, 3), TokenScores, {"waad": 1}])
def test_what_is_no_scores_is_refused(scores: object) -> None:
    refused(lambda: find_rhythm(scores), "scores", "TokenScores", error=ParameterError)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    "values", ["x", None, [1, 2], [[1, 2]], torch.ones(3), torch.ones(1, 3).int(), [["a"]]]
)
def test_what_is_no_row_of_scores_is_refused(values: object) -> None:
    for call in (top_quantile, find_peaks, waad_change):
        refused(lambda call=call: call(values), "values", error=ParameterError)


def test_scores_come_as_lists_and_arrays_too() -> None:
    row = [[0.0, 2.0, 1.0, 3.0, 0.0]]
    for values in (row, np.array(row), torch.tensor(row)):
        assert find_peaks(values, quantile=1.0).tolist() == [[False, True, False, True, False]]


def test_packed_rows_have_no_rhythm() -> None:
    """Tokens of one response would be ranked among those of another."""
    scores = replace(scores_of([[0.0, 1.0]], [[0.0, 1.0]]), segment_ids=torch.tensor([[0, 1]]))
    refused(lambda: find_rhythm(scores), "packed", "sequences", error=ParameterError)


@pytest.mark.parametrize("example_number", [1, -2, 5, "0", 0.0, None, True])
def test_pairs_are_of_an_example_that_there_is(example_number: object) -> None:
    refused(lambda: example().pairs(example_number), "example", repr(example_number), error=ParameterError)
    assert example().pairs(-1) == example().pairs(np.int64(0)) == [(1, 2)]


def example() -> Rhythm:
    """Preplan at 1, anchors at 2 and 6; the first follows the preplan, the second is too far away."""
    waad = [[0.0, 4.0, 0.0, 1.0, 2.0, 3.0, 3.0, 3.0]]
    fai = [[0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 4.0, 1.0]]
    return find_rhythm(scores_of(waad, fai), quantile=1.0, lookback=3)


def test_pairs_are_preplan_and_anchor_columns() -> None:
    rhythm = example()
    assert columns(rhythm.preplan) == [1]
    assert columns(rhythm.anchor) == [2, 6]
    assert rhythm.anchor_preplan.tolist() == [[-1, -1, 1, -1, -1, -1, -1, -1]]
    assert rhythm.pairs() == [(1, 2)]


def test_an_anchor_may_coincide_with_its_preplan() -> None:
    row = [[0.0, 1.0, 0.0]]
    assert find_rhythm(scores_of(row, row), quantile=1.0).pairs() == [(1, 1)]


def test_an_anchor_belongs_to_the_latest_preplan() -> None:
    waad = [[0.0, 9.0, 0.0, 1.0, 0.0, 0.0]]
    fai = [[0.0, 0.0, 0.0, 0.0, 1.0, 0.0]]
    assert find_rhythm(scores_of(waad, fai), quantile=1.0, lookback=3).pairs() == [(3, 4)]


def test_undefined_scores_have_no_rhythm() -> None:
    """Responses shorter than the horizon have no FAI at all: no anchors, and no error."""
    rhythm = find_rhythm(scores_of([[0.0, 1.0, 0.0]], [[NAN, NAN, NAN]]))
    assert columns(rhythm.preplan) == [1]
    assert (columns(rhythm.anchor), rhythm.pairs()) == ([], [])


def test_find_rhythm_leaves_scores_alone() -> None:
    scores = scores_of([[0.0, 1.0, NAN]], [[0.0, 1.0, NAN]])
    find_rhythm(scores)
    assert_same([[0.0, 1.0, NAN]], scores.waad)
    assert_same([[0.0, 1.0, NAN]], scores.fai)


# ---- keeping it -----------------------------------------------------------------------------------


def test_a_rhythm_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    rhythm = example()
    loaded = Rhythm.load(rhythm.save(tmp_path / "rhythm.safetensors"))
    for name in ("preplan", "anchor", "anchor_preplan", "dominated", "intro", "delta"):
        expected, actual = getattr(rhythm, name), getattr(loaded, name)
        assert expected.dtype == actual.dtype
        assert torch.equal(expected.nan_to_num(nan=-1.0), actual.nan_to_num(nan=-1.0))
    assert (loaded.quantile, loaded.lookback) == (1.0, 3)


def test_other_results_are_no_rhythm(tmp_path: Path) -> None:
    path = scores_of([[1.0]], [[1.0]]).save(tmp_path / "scores.safetensors")
    refused(lambda: Rhythm.load(path), path, "TokenScores", "Rhythm", error=ResultError)


def test_the_table_has_a_row_for_each_token_with_a_part() -> None:
    table = example().to_pandas()
    names = ["example", "position", "preplan", "anchor", "dominated", "intro", "anchor_preplan"]
    assert names == list(table.columns)
    assert table.to_numpy().tolist() == [
        [0, 1, True, False, False, True, -1],
        [0, 2, False, True, True, False, 1],
        [0, 6, False, True, False, False, -1],
    ]


def test_the_table_of_a_rhythm_without_parts_is_empty() -> None:
    table = find_rhythm(scores_of([[1.0, 1.0]], [[1.0, 1.0]])).to_pandas()
    assert table.shape == (0, 7)


def test_scores_in_half_precision_have_dominated_anchors_too() -> None:
    waad = torch.tensor([[1.0, 5.0, 1.0, 1.0, 1.0, 3.0]])
    anchor = torch.tensor([[False, False, True, False, False, True]])
    wide, narrow = (dominated_anchors(anchor, values) for values in (waad, waad.bfloat16()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(narrow, wide, strict=True))
    assert bool(wide[0].any())

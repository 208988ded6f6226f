"""Strategies: token scores to weights, against a slow reference and against hand-computed examples."""

from __future__ import annotations

import logging
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnprobe import ParameterError, ResultError, TokenScores
from attnprobe.rl import (
    ContinuousCredit,
    CoupledRhythmCredit,
    CreditStrategy,
    EntropyCredit,
    EntropySelection,
    GlobalAnchorCredit,
    LocalChunkCredit,
    RandomCredit,
    apply_credit,
    credit_of,
    credit_weights,
    gate_gradient,
    needs_of,
)

NAN = math.nan
AMPLIFYING = (
    LocalChunkCredit, GlobalAnchorCredit, CoupledRhythmCredit, EntropyCredit, RandomCredit, ContinuousCredit
)  # fmt: skip


def scores_of(waad, fai=None, entropy=None, mask=None) -> TokenScores:
    waad = torch.tensor(waad, dtype=torch.float64)
    fai = waad if fai is None else torch.tensor(fai, dtype=torch.float64)
    entropy = None if entropy is None else torch.tensor(entropy, dtype=torch.float64)
    mask = torch.ones(waad.shape, dtype=torch.bool) if mask is None else torch.tensor(mask).bool()
    return TokenScores(waad, fai, entropy, mask)


# ---- the slow reference: one response as a list of floats, by the words of the paper ------------


def slow_top(values: list[float], quantile: float, bottom: bool = False) -> set[int]:
    defined = [t for t, value in enumerate(values) if not math.isnan(value)]
    count = math.ceil(quantile * len(defined) - 1e-9)
    if defined:
        count = max(count, 1)
    return set(sorted(defined, key=lambda t: (values[t] if bottom else -values[t], t))[:count])


def slow_delta(waad: list[float]) -> list[float]:
    return [abs(waad[t] - waad[t + 1]) for t in range(len(waad) - 1)] + [NAN]


def slow_median(values: list[float]) -> float:
    defined = sorted(value for value in values if not math.isnan(value))
    if not defined:
        return NAN
    half = len(defined) // 2
    return defined[half] if len(defined) % 2 else (defined[half - 1] + defined[half]) / 2


def slow_coupled(waad, fai, *, quantile, gain, alpha, lookback, waad_threshold, delta_threshold, bottom):
    delta = slow_delta(waad)
    low = slow_median(waad) if waad_threshold is None else waad_threshold
    high = slow_median(delta) if delta_threshold is None else delta_threshold
    anchors = slow_top(fai, quantile, bottom)
    dominated, intro = set(), set()
    for t in anchors:
        before = [u for u in range(t - lookback, t) if u >= 0 and not math.isnan(delta[u])]
        if not before:
            continue
        largest = max(delta[u] for u in before)
        if waad[t] <= low and largest >= high:
            dominated.add(t)
            intro.add(max(u for u in before if delta[u] == largest))
    return [
        1
        + (gain - 1) * (t in anchors - dominated)
        + (1 - alpha) * (gain - 1) * (t in dominated)
        + alpha * (gain - 1) * (t in intro)
        for t in range(len(waad))
    ]


def padded(row: list[float], rows: int = 1) -> list[list[float]]:
    return [[*row, NAN, NAN]] * rows


# Few distinct values, so that ties are common.
values = st.lists(st.integers(0, 6).map(lambda i: i / 2), min_size=1, max_size=24)
quantiles = st.sampled_from([0.1, 0.2, 0.4, 0.6, 1.0])


@given(values, quantiles, st.sampled_from(["top", "bottom"]), st.floats(0, 3))
def test_local_chunk_credit_is_equation_14_and_15(row, quantile, select, gain) -> None:
    credit = LocalChunkCredit(quantile=quantile, select=select, amplification=gain)
    mask = [[True] * len(row) + [False] * 2]
    got = credit(scores_of(padded(row), mask=mask))[0].tolist()
    chosen = slow_top(slow_delta(row), quantile, select == "bottom")
    assert got == pytest.approx([gain if t in chosen else 1.0 for t in range(len(row))] + [1.0, 1.0])


@given(values, st.integers(0, 5), quantiles, st.sampled_from(["top", "bottom"]))
def test_global_anchor_credit_is_equation_16_and_17(row, undefined, quantile, select) -> None:
    row = row[: len(row) - undefined] + [NAN] * min(undefined, len(row))
    got = GlobalAnchorCredit(quantile=quantile, select=select)(scores_of([row]))[0].tolist()
    chosen = slow_top(row, quantile, select == "bottom")
    assert got == [1.5 if t in chosen else 1.0 for t in range(len(row))]


@given(
    st.data(),
    values,
    quantiles,
    st.floats(0.5, 3),
    st.floats(0, 1),
    st.integers(1, 4),
    st.sampled_from([None, 0.0, 1.0]),
    st.sampled_from([None, 0.5, 2.0]),
    st.booleans(),
)
def test_coupled_credit_is_equation_18_and_19(
    data, waad, quantile, gain, alpha, lookback, waad_threshold, delta_threshold, bottom
) -> None:
    fai = [data.draw(st.sampled_from([0.0, 0.5, 1.0, 1.5])) for _ in waad]
    cut = data.draw(st.integers(0, len(fai)))
    fai = fai[:cut] + [NAN] * (len(fai) - cut)
    credit = CoupledRhythmCredit(
        quantile=quantile,
        amplification=gain,
        alpha=alpha,
        lookback=lookback,
        waad_threshold=waad_threshold,
        delta_threshold=delta_threshold,
        select="bottom" if bottom else "top",
    )
    mask = [[True] * len(waad) + [False] * 2]
    got = credit(scores_of(padded(waad), padded(fai), mask=mask))[0].tolist()
    expected = slow_coupled(
        waad,
        fai,
        quantile=quantile,
        gain=gain,
        alpha=alpha,
        lookback=lookback,
        waad_threshold=waad_threshold,
        delta_threshold=delta_threshold,
        bottom=bottom,
    )
    assert got == pytest.approx([*expected, 1.0, 1.0])


@given(values, quantiles)
def test_entropy_credit_takes_the_highest_entropies(row, quantile) -> None:
    got = EntropyCredit(quantile=quantile)(scores_of([row], entropy=[row]))[0].tolist()
    assert got == [1.5 if t in slow_top(row, quantile) else 1.0 for t in range(len(row))]


@given(values, quantiles, st.integers(0, 5), st.booleans())
def test_entropy_selection_drops_all_but_the_highest_entropies(row, quantile, undefined, normalize) -> None:
    row = row[: len(row) - undefined] + [NAN] * min(undefined, len(row))
    mask = [[True] * len(row) + [False] * 2]
    scores = scores_of(padded(row), entropy=padded(row), mask=mask)
    got = EntropySelection(quantile=quantile)(scores)[0].tolist()
    kept = slow_top(row, quantile)
    expected = [1.0 if t in kept or math.isnan(value) else 0.0 for t, value in enumerate(row)]
    assert got == [*expected, 1.0, 1.0]
    scaled = EntropySelection(quantile=quantile, normalize=True)(scores)[0].tolist()
    mean = sum(expected) / len(row)
    assert scaled == pytest.approx([*(value / mean for value in expected), 1.0, 1.0])


SCALES = {
    None: None,
    "itself": lambda score: score,
    "falling": lambda score: -score,
    "curved": lambda score: (0.3 * score).exp(),
    "step": lambda score: (score > 1.2).float(),
}


def slow_continuous(row: list[float], scale, gain: float) -> list[float]:
    """Ranks are numbers of lower scores, plus half of those of other equal ones."""
    defined = [value for value in row if not math.isnan(value)]
    if scale is None:
        places = {v: sum(o < v for o in defined) + (defined.count(v) - 1) / 2 for v in defined}
    else:
        places = {v: float(scale(torch.tensor([v], dtype=torch.float64))[0]) for v in defined}
    low, high = min(places.values(), default=0.0), max(places.values(), default=0.0)
    if low == high:
        return [1.0] * len(row)
    return [1.0 if math.isnan(v) else 1 + (gain - 1) * (places[v] - low) / (high - low) for v in row]


@given(
    st.lists(values, min_size=1, max_size=3),
    st.integers(0, 4),
    st.sampled_from(list(SCALES)),
    st.floats(0, 4),
    st.sampled_from(["waad", "waad_change", "fai", "entropy"]),
)
def test_continuous_credit_is_monotone_and_between_its_bounds(rows, undefined, scale, gain, score) -> None:
    width = max(map(len, rows))
    mask = [[True] * len(row) + [False] * (width - len(row)) for row in rows]
    cut = [[NAN if t < undefined else value for t, value in enumerate(row)] for row in rows]
    given_scores = [row + [NAN] * (width - len(row)) for row in cut]
    scores = scores_of(given_scores, entropy=given_scores, mask=mask)
    credit = ContinuousCredit(score=score, scale=SCALES[scale], amplification=gain)
    assert needs_of(credit) == {score.removesuffix("_change")}
    weights = credit(scores)
    for row, got, own in zip(cut, weights.tolist(), mask, strict=True):
        known = slow_delta(row) if score == "waad_change" else row
        assert got == pytest.approx(slow_continuous(known, SCALES[scale], gain) + [1.0] * (width - len(row)))
        pairs = sorted((v, w) for v, w, inside in zip(known, got, own, strict=False) if not math.isnan(v))
        rises = 1 if (gain >= 1) != (scale == "falling") else -1
        assert all(rises * (b[1] - a[1]) >= -1e-12 for a, b in pairwise(pairs))
        assert all(a[1] == b[1] for a, b in pairwise(pairs) if a[0] == b[0])
        assert min(1.0, gain) - 1e-12 <= min(got) <= max(got) <= max(1.0, gain) + 1e-12
    if gain > 0:
        even = ContinuousCredit(score=score, scale=SCALES[scale], amplification=gain, normalize=True)(scores)
        for got, own in zip(even, scores.response_mask, strict=True):
            assert float(got[own].mean()) == pytest.approx(1.0, abs=1e-12)


def test_a_scale_must_be_a_monotone_function(as_users_call) -> None:
    scores = scores_of([[1.0, 2.0, 3.0]])
    for scale, told in (
        (lambda score: (score - 2).square(), "scale is not monotone"),
        (lambda score: score.log() * torch.inf, r"scale gave nan for a score of 1\.0"),
        (lambda score: score[:1], "a value for each of the 3 scores.*[1]"),
        (lambda score: 3.0, "a value for each of the 3 scores"),
    ):
        with pytest.raises(ResultError, match=told):
            ContinuousCredit(scale=scale)(scores)
    undefined = scores_of([[1.0, 2.0]], [[NAN, NAN]])
    assert ContinuousCredit(scale=lambda score: score / score.max())(undefined).tolist() == [[1.0, 1.0]]


@given(values, quantiles, st.integers(0, 3))
def test_random_credit_draws_the_right_number_whatever_stands_beside(row, quantile, seed) -> None:
    credit = RandomCredit(quantile=quantile, seed=seed)
    mask = [[True] * len(row) + [False] * 2]
    alone = credit(scores_of(padded(row), mask=mask))
    beside = credit(scores_of(padded(row, 3), mask=mask * 3))
    assert torch.equal(beside, alone.expand(3, -1))
    assert int((alone == 1.5).sum()) == max(math.ceil(quantile * len(row) - 1e-9), 1)
    assert alone[0, -2:].tolist() == [1.0, 1.0]


def test_random_credit_differs_by_seed_and_by_response() -> None:
    generator = torch.Generator().manual_seed(0)
    waad = torch.rand(4, 60, generator=generator).tolist()
    drawn = [RandomCredit(seed=seed)(scores_of(waad)) for seed in (0, 1)]
    assert not torch.equal(*drawn)
    assert len({tuple(row.tolist()) for row in drawn[0]}) == 4
    # Every position is drawn about as often as every other.
    many = torch.rand(400, 20, generator=generator).tolist()
    share = (RandomCredit(quantile=0.5)(scores_of(many)) > 1).float().mean(0)
    assert float((share - 0.5).abs().max()) < 0.12


# ---- by hand ------------------------------------------------------------------------------------


def test_local_chunk_credit_by_hand() -> None:
    """delta = 3, 2, 0, 3, -: ceil(0.4 * 4) = 2 of 4 are the largest, 0 and 3."""
    got = LocalChunkCredit(amplification=2.0)(scores_of([[1.0, 4.0, 2.0, 2.0, 5.0]]))
    assert got.tolist() == [[2.0, 1.0, 1.0, 2.0, 1.0]]


def test_coupled_credit_by_hand() -> None:
    """Anchors 2, 4, 5 of 7 (q = 0.4: 3). WAAD's median is 2, delta = 4 4 3 1 4 3 -, its median 3.5.

    2: WAAD 1 <= 2, largest delta before it is 4, at 0 and 1: dominated, introduced by 1, the latest.
    4: WAAD 3 > 2: not dominated. 5: WAAD 7: not dominated.
    """
    waad = [[1.0, 5.0, 1.0, 4.0, 3.0, 7.0, 4.0]]
    fai = [[0.1, 0.2, 0.9, 0.0, 0.8, 0.7, NAN]]
    got = CoupledRhythmCredit(alpha=0.25, amplification=3.0, waad_threshold=2.0)(scores_of(waad, fai))
    assert got.tolist() == [[1.0, 1.5, 2.5, 1.0, 3.0, 3.0, 1.0]]


def test_an_anchor_that_introduces_another_gets_both_parts() -> None:
    waad, fai = [[0.0, 0.0, 6.0, 0.0, 0.0]], [[0.0, 0.0, 0.9, 0.8, 0.0]]
    got = CoupledRhythmCredit(quantile=0.4, waad_threshold=1.0)(scores_of(waad, fai))
    assert got.tolist() == [[1.0, 1.0, 1.75, 1.25, 1.0]]


def test_one_introduction_of_two_anchors_counts_once() -> None:
    waad, fai = [[0.0, 6.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.9, 0.8, 0.0]]
    got = CoupledRhythmCredit(waad_threshold=1.0, delta_threshold=5.0)(scores_of(waad, fai))
    assert got.tolist() == [[1.0, 1.25, 1.25, 1.25, 1.0]]


def test_alignment_with_predictions_shifts_waad_and_not_fai() -> None:
    waad, fai = [[1.0, 4.0, 2.0, 2.0, 5.0]], [[0.0, 0.0, 0.9, 0.8, 0.0]]
    by_row, by_prediction = (
        LocalChunkCredit(quantile=0.25, align=align)(scores_of(waad)) for align in ("token", "prediction")
    )
    assert by_row.tolist() == [[1.5, 1.0, 1.0, 1.0, 1.0]]
    assert by_prediction.tolist() == [[1.0, 1.5, 1.0, 1.0, 1.0]]
    coupled = CoupledRhythmCredit(align="prediction", waad_threshold=-1.0)(scores_of(waad, fai))
    assert coupled.tolist() == [[1.0, 1.0, 1.5, 1.5, 1.0]]


def test_tokens_outside_the_response_are_neither_ranked_nor_weighted() -> None:
    waad = [[9.0, 1.0, 3.0, 3.5, 9.0]]
    mask = [[False, True, True, True, False]]
    for credit in (LocalChunkCredit(quantile=0.5), GlobalAnchorCredit(quantile=0.3)):
        weights = credit(scores_of(waad, mask=mask))
        assert weights[0, 0] == weights[0, 4] == 1.0
        assert int((weights > 1).sum()) == 1
    # What WAAD changes to behind the response is not known.
    assert LocalChunkCredit(quantile=1.0)(scores_of(waad, mask=mask)).tolist() == [[1, 1.5, 1.5, 1, 1]]


def test_no_fai_leaves_weights_of_one_and_warns_once(caplog) -> None:
    from attnprobe.rl.credit import _warn_once

    _warn_once.cache_clear()
    scores = scores_of([[1.0, 2.0]], [[NAN, NAN]])
    with caplog.at_level(logging.WARNING, logger="attnprobe.rl.credit"):
        for credit in (GlobalAnchorCredit(), CoupledRhythmCredit(), GlobalAnchorCredit()):
            assert credit(scores).tolist() == [[1.0, 1.0]]
    assert len(caplog.records) == 1
    assert "too short" in caplog.text


@pytest.mark.parametrize("size", [1, 2])
def test_very_short_responses(size) -> None:
    row = [[1.0, 2.0][:size]]
    scores = scores_of(row, [[NAN] * size], entropy=row)
    assert LocalChunkCredit()(scores).tolist() == [[1.5, 1.0][:size] if size == 2 else [1.0]]
    assert CoupledRhythmCredit()(scores).tolist() == [[1.0] * size]
    assert float(EntropyCredit()(scores).sum()) == size + 0.5
    assert float(RandomCredit()(scores).sum()) == size + 0.5


@given(values, st.floats(0.5, 4))
def test_normalized_weights_have_mean_one_over_the_response(row, gain) -> None:
    mask = [[True] * len(row) + [False] * 2]
    scores = scores_of(padded(row), padded(row), mask=mask)
    for kind in (LocalChunkCredit, GlobalAnchorCredit, CoupledRhythmCredit, RandomCredit):
        plain = kind(amplification=gain)(scores)
        weights = kind(amplification=gain, normalize=True)(scores)
        assert float(weights[0, : len(row)].mean()) == pytest.approx(1.0, abs=1e-12)
        assert weights[0, len(row) :].tolist() == [1.0, 1.0]
        ratio = weights[0, : len(row)] / plain[0, : len(row)]
        assert torch.allclose(ratio, ratio[:1])


def test_amplification_one_changes_nothing() -> None:
    scores = scores_of([[1.0, 3.0, 2.0]], entropy=[[1.0, 3.0, 2.0]])
    for kind in AMPLIFYING:
        assert torch.equal(kind(amplification=1.0)(scores), torch.ones(1, 3, dtype=torch.float64))
        assert torch.equal(
            kind(amplification=1.0, normalize=True)(scores), torch.ones(1, 3, dtype=torch.float64)
        )


def test_weights_of_half_precision_scores_are_single_precision() -> None:
    waad = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.bfloat16)
    scores = TokenScores(waad, waad, waad, torch.ones(1, 3, dtype=torch.bool))
    for kind in (*AMPLIFYING, EntropySelection):
        assert kind()(scores).dtype == torch.float32


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: LocalChunkCredit(amplification=-1.0), ["amplification", "[0, inf)", "-1.0"]),
        (lambda: LocalChunkCredit(amplification=NAN), ["amplification", "nan"]),
        (lambda: LocalChunkCredit(amplification=math.inf), ["amplification", "inf"]),
        (lambda: LocalChunkCredit(amplification="1.5"), ["amplification", "'1.5'"]),
        (lambda: LocalChunkCredit(amplification=torch.ones(2)), ["amplification", "[2]"]),
        (lambda: LocalChunkCredit(normalize="no"), ["normalize", "'no'"]),
        (lambda: LocalChunkCredit(quantile=0.0), ["quantile", "(0, 1]", "0.0"]),
        (lambda: RandomCredit(quantile=1.5), ["quantile", "(0, 1]", "1.5"]),
        (lambda: RandomCredit(quantile=None), ["quantile", "None"]),
        (lambda: RandomCredit(seed=0.5), ["seed", "0.5"]),
        (lambda: GlobalAnchorCredit(select="middle"), ["select", '"top" or "bottom"', "'middle'"]),
        (lambda: LocalChunkCredit(align="row"), ["align", '"token" or "prediction"', "'row'"]),
        (lambda: CoupledRhythmCredit(align=3), ["align", '"token" or "prediction"', "3"]),
        (lambda: CoupledRhythmCredit(alpha=2.0), ["alpha", "[0, 1]", "2.0"]),
        (lambda: CoupledRhythmCredit(lookback=0), ["lookback", "at least 1", "0"]),
        (lambda: CoupledRhythmCredit(lookback=True), ["lookback", "True"]),
        (lambda: CoupledRhythmCredit(waad_threshold=NAN), ["waad_threshold", "nan"]),
        (lambda: CoupledRhythmCredit(delta_threshold="high"), ["delta_threshold", "'high'"]),
        (lambda: CoupledRhythmCredit(amplification=0.1), ["0.1", "0.5", "0.333"]),
        (lambda: EntropySelection(quantile=0), ["quantile", "(0, 1]", "0"]),
        (lambda: EntropySelection(normalize=1), ["normalize", "1"]),
        (lambda: ContinuousCredit(score="span"), ['"waad", "waad_change", "fai" or "entropy"', "'span'"]),
        (lambda: ContinuousCredit(scale="rank"), ["scale", "function", "'rank'"]),
        (lambda: ContinuousCredit(align="row"), ["align", "'row'"]),
        (lambda: ContinuousCredit(amplification=-1.0), ["amplification", "-1.0"]),
        (lambda: needs_of("coupled"), ["CoupledRhythmCredit()", "'coupled'"]),
        (lambda: needs_of(CoupledRhythmCredit), ["CoupledRhythmCredit()", "the class CoupledRhythmCredit"]),
        (lambda: CoupledRhythmCredit()([1.0]), ["scores", "TokenScores", "list"]),
        (lambda: credit_of(CoupledRhythmCredit(), None), ["scores", "TokenScores", "NoneType"]),
        (lambda: credit_of(3, scores_of([[1.0]])), ["CoupledRhythmCredit()", "3"]),
    ],
)
def test_wrong_parameters(make, told, as_users_call) -> None:
    with pytest.raises(ParameterError) as error:
        make()
    assert [fact for fact in told if fact not in str(error.value)] == []


def test_numbers_of_any_library_are_parameters() -> None:
    plain = CoupledRhythmCredit(amplification=2.0, quantile=0.5, lookback=2, waad_threshold=1.0)
    numbers = CoupledRhythmCredit(
        amplification=np.int64(2),
        quantile=np.float32(0.5),
        lookback=torch.tensor(2),
        waad_threshold=torch.tensor(1.0),
    )
    assert numbers == plain
    assert repr(numbers) == repr(plain)


def test_smallest_amplification_that_is_accepted_gives_no_negative_weight() -> None:
    credit = CoupledRhythmCredit(amplification=0.3334, waad_threshold=9.0, delta_threshold=0.0)
    weights = credit(scores_of([[0.0, 0.0, 6.0, 0.0, 0.0]], [[0.0, 0.0, 0.9, 0.8, 0.0]]))
    assert bool((weights >= 0).all())


def test_scores_that_lack_what_is_needed() -> None:
    for credit in (EntropyCredit(), EntropySelection(), ContinuousCredit(score="entropy")):
        with pytest.raises(ResultError, match=r"no entropy.*entropy=True"):
            credit(scores_of([[1.0]]))
    packed = TokenScores(
        torch.ones(1, 2), torch.ones(1, 2), None, torch.ones(1, 2).bool(), segment_ids=torch.tensor([[0, 1]])
    )
    with pytest.raises(ParameterError, match="packed"):
        LocalChunkCredit()(packed)


@pytest.mark.parametrize(
    ("gamma", "told"),
    [
        (torch.ones(1, 2), ["[1, 3]", "[1, 2]"]),
        (torch.tensor([[1.0, -0.5, 1.0]]), ["-0.5", "[0, 1]", "negative"]),
        (torch.tensor([[1.0, 1.0, NAN]]), ["nan", "[0, 2]"]),
        (torch.ones(1, 3, dtype=torch.long), ["floats", "int64"]),
        ([1.0, 1.0, 1.0], ["floats", "a list"]),
        (None, ["floats", "NoneType"]),
    ],
)
def test_a_strategy_that_returns_nonsense(gamma, told, as_users_call) -> None:
    def mine(scores):
        return gamma

    with pytest.raises(ResultError, match="mine") as error:
        credit_of(mine, scores_of([[1.0, 2.0, 3.0]]))
    assert [fact for fact in told if fact not in str(error.value)] == []


@pytest.mark.parametrize("share", [torch.ones(1, 2), torch.ones(3), 1.0, None, "all"])
def test_a_share_of_another_shape(share, as_users_call) -> None:
    class Mine(CreditStrategy):
        def share(self, scores):
            return share

    with pytest.raises(ResultError, match=r"Mine\.share"):
        Mine()(scores_of([[1.0, 2.0, 3.0]]))


def test_a_strategy_of_your_own() -> None:
    def mine(scores):
        return scores.waad

    weights = credit_of(mine, scores_of([[2.0, NAN]], mask=[[True, False]]))
    assert weights.tolist() == [[2.0, 1.0]]
    assert needs_of(mine) == {"waad", "fai", "entropy"}
    mine.needs = {"fai"}
    assert needs_of(mine) == {"fai"}
    mine.needs = {"attention"}
    for needs in ({"attention"}, "attention", 3, [None]):
        mine.needs = needs
        with pytest.raises(ParameterError, match="mine"):
            needs_of(mine)
    assert issubclass(LocalChunkCredit, CreditStrategy)


# ---- advantages ---------------------------------------------------------------------------------


SIGNS = ("both", "positive", "negative")


@pytest.mark.parametrize(
    ("signs", "gains", "losses"),
    [
        ({}, [3.0, 1.0, 2.0], [-3.0, -1.0, -2.0]),
        ({"signs": "both"}, [3.0, 1.0, 2.0], [-3.0, -1.0, -2.0]),
        ({"signs": "positive"}, [3.0, 1.0, 2.0], [-2.0, -2.0, -2.0]),
        ({"signs": "negative"}, [2.0, 2.0, 2.0], [-3.0, -1.0, -2.0]),
    ],
)
def test_advantages_are_weighted_by_their_sign(signs, gains, losses) -> None:
    gamma = torch.tensor([[1.5, 0.5, 9.0]]).expand(3, -1)
    mask = torch.tensor([[1, 1, 0]]).expand(3, -1)
    got = apply_credit(torch.tensor([2.0, -2.0, 0.0]), gamma, mask, **signs)
    assert got.tolist() == [gains, losses, [0.0, 0.0, 0.0]]


@given(st.data(), st.integers(1, 3), st.integers(1, 5), st.sampled_from(SIGNS))
def test_mixed_advantages_are_weighted_token_by_token(data, rows, width, signs) -> None:
    def draw(of):
        return [data.draw(st.lists(of, min_size=width, max_size=width)) for _ in range(rows)]

    advantages = draw(st.sampled_from([-1.5, -0.25, 0.0, -0.0, 0.5, 2.0]))
    gamma, mask = draw(st.floats(0, 3, width=32)), draw(st.booleans())
    factors = []
    for row in zip(advantages, gamma, mask, strict=True):
        factors.append([])
        for advantage, weight, inside in zip(*row, strict=True):
            left_out = (signs == "positive" and advantage < 0) or (signs == "negative" and advantage >= 0)
            factors[-1].append(1.0 if left_out or not inside else weight)
    assert credit_weights(advantages, gamma, mask, signs=signs).tolist() == factors
    expected = [[a * f for a, f in zip(*row, strict=True)] for row in zip(advantages, factors, strict=True)]
    assert apply_credit(advantages, gamma, mask, signs=signs).tolist() == torch.tensor(expected).tolist()
    ones = torch.ones(rows, width)
    assert torch.equal(apply_credit(advantages, ones, mask, signs=signs), torch.tensor(advantages))


def test_signs_that_make_no_sense(as_users_call) -> None:
    for signs in ("nonnegative", None, 1):
        for function in (apply_credit, credit_weights):
            with pytest.raises(ParameterError, match='signs must be "both", "positive" or "negative"; got'):
                function([1.0], [[1.0]], [[1]], signs=signs)


def test_advantages_of_tokens_and_of_sequences_agree() -> None:
    advantages = torch.tensor([1.0, -1.0])
    gamma = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 4)
    spread = apply_credit(advantages[:, None].expand(-1, 4), gamma, mask)
    assert torch.equal(apply_credit(advantages, gamma, mask), spread)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_advantages_keep_their_type_and_carry_no_gradient(dtype) -> None:
    advantages = torch.tensor([1.0, -1.0], dtype=dtype, requires_grad=True)
    gamma = torch.full((2, 3), 1.5, requires_grad=True)
    got = apply_credit(advantages, gamma, torch.ones(2, 3))
    assert got.dtype == dtype
    assert not got.requires_grad
    assert not credit_weights(advantages, gamma, torch.ones(2, 3)).requires_grad


@pytest.mark.parametrize(
    ("advantages", "gamma", "mask", "told"),
    [
        (torch.ones(3), torch.ones(2, 4), torch.ones(2, 4), ["advantages", "[2]", "[2, 4]", "[3]"]),
        (torch.ones(2), torch.ones(2, 4), torch.ones(2, 3), ["mask", "[2, 4]", "[2, 3]"]),
        (torch.ones(2), torch.ones(2), torch.ones(2), ["gamma", "[2]"]),
        (1.0, torch.ones(1, 2), torch.ones(1, 2), ["advantages", "[1]", "[1, 2]", "[]"]),
        (["good"], torch.ones(1, 2), torch.ones(1, 2), ["advantages", "'good'"]),
        (torch.tensor([True]), torch.ones(1, 2), torch.ones(1, 2), ["advantages", "bool"]),
        ([1.0], None, torch.ones(1, 2), ["gamma", "None"]),
        ([1.0], [[1.0, 2.0]], None, ["mask", "None"]),
        ([1.0], torch.tensor([[1.0, NAN]]), torch.ones(1, 2), ["gamma", "nan", "[0, 1]"]),
        ([NAN], torch.ones(1, 2), torch.ones(1, 2), ["advantages", "nan", "[0, 0]"]),
        ([1.0], torch.tensor([[1.0, -2.0]]), torch.ones(1, 2), ["gamma", "-2.0", "[0, 1]", "negative"]),
        ([1.0], torch.ones(1, 2), torch.tensor([[1.0, 0.5]]), ["mask", "0 and 1", "0.5"]),
        ([1.0], torch.ones(1, 2), torch.tensor([[1.0, NAN]]), ["mask", "0 and 1", "nan"]),
        ([1.0], torch.ones(1, 2), [[1, 2]], ["mask", "0 and 1", "2"]),
    ],
)
def test_advantages_that_cannot_be_weighted(advantages, gamma, mask, told, as_users_call) -> None:
    for function in (apply_credit, credit_weights):
        with pytest.raises(ParameterError) as error:
            function(advantages, gamma, mask)
        assert [fact for fact in told if fact not in str(error.value)] == []


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_whole_advantages_keep_their_credit(kind) -> None:
    weighted = apply_credit(kind([1, 2]), kind([[1.5, 1.0], [1.25, 1.0]]), kind([[1, 1], [1, 0]]))
    assert weighted.tolist() == [[1.5, 1.0], [2.5, 2.0]]
    assert weighted.dtype == torch.float32 or kind is np.array
    assert apply_credit(kind([[1, 2]]), kind([[2, 3]]), kind([[1, 1]])).tolist() == [[2.0, 6.0]]


def test_nonsense_outside_the_mask_does_no_harm() -> None:
    gamma = torch.tensor([[1.5, NAN, -3.0]])
    got = apply_credit(torch.tensor([1.0]), gamma, torch.tensor([[1, 0, 0]]))
    assert got.tolist() == [[1.5, 1.0, 1.0]]


def test_the_gate_keeps_values_and_weights_gradients() -> None:
    logps = torch.tensor([[-0.1, -700.25, -torch.inf]], requires_grad=True)
    weights = torch.tensor([[0.0, 1.0, 2.5]])
    gated = gate_gradient(logps, weights)
    assert torch.equal(gated, logps)
    (gradient,) = torch.autograd.grad(gated, logps, torch.tensor([[3.0, 3.0, 3.0]]))
    assert gradient.tolist() == [[0.0, 3.0, 7.5]]


@pytest.mark.parametrize(
    ("values", "weights", "told"),
    [
        (torch.ones(1, 2), torch.ones(1, 3), ["weights", "[1, 2]", "[1, 3]"]),
        (torch.ones(1, 2), [[1.0, NAN]], ["weights", "nan", "[0, 1]"]),
        (torch.ones(1, 2), None, ["weights", "None"]),
        (torch.ones(1, 2), [[1.0, -2.0]], ["weights", "-2.0", "[0, 1]", "negative"]),
        (torch.ones(1, 2).bool(), torch.ones(1, 2), ["values", "bool"]),
        ("text", [[1.0]], ["values", "'text'"]),
    ],
)
def test_what_the_gate_refuses(values, weights, told, as_users_call) -> None:
    with pytest.raises(ParameterError) as error:
        gate_gradient(values, weights)
    assert [fact for fact in told if fact not in str(error.value)] == []

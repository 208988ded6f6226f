"""Nulls against their expectation: in closed form, by counting all arrangements, and over real statistics."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnprobe
from attnprobe import ParameterError, ResultError, TokenScores
from attnprobe import couplings as measure_couplings
from attnprobe.analysis.bootstrap import bootstrap_weights, holm_adjusted, median_estimate
from attnprobe.analysis.coupling_results import NAMES
from attnprobe.analysis.nulls import MovedPeaks
from attnprobe.analysis.random_heads import RandomHeads
from attnprobe.analysis.token_classes import TOKEN_CLASSES, token_class
from attnprobe.rhythm import find_peaks
from attnprobe.testing.tiny_models import tiny_model

NAN = math.nan


@st.composite
def problems(draw: st.DrawFn, most: int = 8) -> tuple[torch.Tensor, ...]:
    """Values, peaks, a pool that holds them, and strata of one response."""
    count = draw(st.integers(1, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.rand(count, generator=generator, dtype=torch.float64)
    pool = torch.rand(count, generator=generator) < 0.8
    peak = pool & (torch.rand(count, generator=generator) < 0.5)
    strata = torch.randint(draw(st.integers(1, 3)), (count,), generator=generator)
    return values, peak, pool, strata


def moved(draws: int = 4000, *, rotate: bool = False) -> MovedPeaks:
    return MovedPeaks(rotate, draws, torch.Generator().manual_seed(0))


def sums_of_all_arrangements(
    values: torch.Tensor, peak: torch.Tensor, pool: torch.Tensor, strata: torch.Tensor
) -> list[float]:
    """The sum over the peaks in every arrangement that leaves each stratum its number of peaks."""
    tokens = [t for t in range(len(values)) if pool[t]]
    wanted = {s: sum(bool(peak[t]) for t in tokens if strata[t] == s) for s in set(strata.tolist())}
    found = []
    for places in itertools.combinations(tokens, int(peak.sum())):
        if all(sum(int(strata[t]) == s for t in places) == number for s, number in wanted.items()):
            found.append(sum(float(values[t]) for t in places))
    return found


@settings(max_examples=30)
@given(problem=problems())
def test_moved_peaks_have_the_expectation_of_all_arrangements(problem: tuple[torch.Tensor, ...]) -> None:
    values, peak, pool, strata = problem
    found = moved(2000).ask(values, peak, pool, strata)
    everything = sums_of_all_arrangements(values, peak, pool, strata)
    assert found.expected == pytest.approx(sum(everything) / len(everything))
    # The draws are arrangements, and five standard errors of their mean contain the expectation.
    distinct = {round(each, 9) for each in everything}
    assert {round(each, 9) for each in found.sums.tolist()} <= distinct
    assert float(found.sums.mean()) == pytest.approx(found.expected, abs=5 * 3 / 2000**0.5)
    anywhere = sums_of_all_arrangements(values, peak, pool, torch.zeros_like(strata))
    assert found.position == pytest.approx(sum(anywhere) / len(anywhere))


@given(problem=problems(12))
def test_a_peak_that_is_alone_in_its_stratum_does_not_move(problem: tuple[torch.Tensor, ...]) -> None:
    values, peak, pool, _ = problem
    found = moved(5).ask(values, peak, pool, torch.arange(len(values)))
    assert found.movable == 0
    assert found.sums.tolist() == pytest.approx([found.observed] * 5)
    assert found.expected == pytest.approx(found.observed)
    whole = moved(5).ask(values, peak, pool, torch.zeros(len(values), dtype=torch.long))
    assert whole.movable == (whole.peaks if peak.sum() < pool.sum() else 0)


@given(problem=problems(12))
def test_rotations_visit_each_place_of_the_pool_equally(problem: tuple[torch.Tensor, ...]) -> None:
    values, peak, pool, strata = problem
    found = moved(500, rotate=True).ask(values, peak, pool, strata)
    inside, at = values[pool].tolist(), peak[pool].nonzero()[:, 0].tolist()
    rotations = [sum(inside[(t + r) % len(inside)] for t in at) for r in range(len(inside))]
    assert {round(each, 9) for each in found.sums.tolist()} <= {round(each, 9) for each in rotations} | {0.0}
    if rotations:
        assert found.expected == pytest.approx(sum(rotations) / len(rotations))


def test_tokens_at_the_edge_belong_to_no_pool() -> None:
    """One peak, and six tokens of eight that could be it: with the edges the null would be an eighth."""
    fai = torch.tensor([[0.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]])
    scores = TokenScores(fai, fai, None, torch.ones(1, 8, dtype=torch.bool), receiver_fai=fai)
    for null in ("position", "rotate"):
        found = measure_couplings(scores, null=null, draws=20_000, resamples=10).receiver_at_global
        assert found is not None
        assert found.observed.value == 1.0
        assert found.null.value == pytest.approx(1 / 6)
        assert found.lift.value == pytest.approx(5)
        # Every sixth draw is the order that was observed.
        assert found.p_value == pytest.approx(1 / 6, abs=0.02)


def scores_of(ids: list[int], texts: list[str] | None = None) -> TokenScores:
    generator = torch.Generator().manual_seed(1)
    waad, fai, entropy = torch.rand(3, 1, len(ids), generator=generator).unbind(0)
    return TokenScores(
        waad,
        fai,
        entropy,
        torch.ones(1, len(ids), dtype=torch.bool),
        receiver_fai=fai,
        input_ids=torch.tensor([ids]),
        texts=None if texts is None else (tuple(texts),),
    )


def test_what_a_token_explains_is_no_coupling_beyond_it() -> None:
    """Entropy that follows from the token id alone: high at peaks, but not higher than at equal tokens."""
    ids = torch.randint(4, (1, 400), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    waad = ids + 0.1 * torch.rand(1, 400, generator=generator)
    fai = torch.rand(1, 400, generator=generator)
    scores = TokenScores(waad, fai, ids.float(), torch.ones(1, 400, dtype=torch.bool), input_ids=ids)
    by_position, by_token = (
        measure_couplings(scores, null=null, draws=50, resamples=50).entropy_at_preplans
        for null in ("position", "token")
    )
    assert by_position is not None
    assert by_token is not None
    assert by_position.lift.value > 0.5
    assert by_token.lift.value == pytest.approx(0.0, abs=1e-12)
    assert by_token.p_value == 1.0
    assert by_token.position_lift == pytest.approx(by_position.lift, nan_ok=True)


def test_finer_strata_move_fewer_peaks() -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(6, (60,), generator=generator).tolist()
    scores = scores_of(ids, [" the" if i < 3 else "\n" for i in ids])
    movable = {
        null: measure_couplings(scores, null=null, draws=5, resamples=5).anchor_after_preplan.movable
        for null in ("position", "class", "token", "bigram")
    }
    assert movable["position"] == 1.0
    assert movable["position"] >= movable["class"] >= movable["token"] >= movable["bigram"]
    assert movable["bigram"] < 1.0
    own = measure_couplings(scores, null="class", classes=lambda text: 0, draws=5, resamples=5)
    assert own.anchor_after_preplan.lift == pytest.approx(own.anchor_after_preplan.position_lift, nan_ok=True)


def test_nulls_that_lack_what_they_need_are_refused() -> None:
    scores = scores_of([1, 2, 3, 4, 5])
    by_hand = dataclasses.replace(scores, input_ids=None)
    for null in ("token", "bigram"):
        with pytest.raises(ParameterError, match=f"null='{null}' needs the token ids"):
            measure_couplings(by_hand, null=null)
    with pytest.raises(ParameterError, match="needs the texts"):
        measure_couplings(scores, null="class")
    with pytest.raises(ParameterError, match="needs the statistics of every head"):
        measure_couplings(scores, null="heads")
    for options in ({"heads": "all"}, {"layers": "top third"}):
        with pytest.raises(ParameterError, match="these are token scores"):
            measure_couplings(scores, **options)
    with pytest.raises(ParameterError, match="hashable"):
        measure_couplings(scores_of([1, 2], ["a", "b"]), null="class", classes=lambda text: [text])
    with pytest.raises(ParameterError, match="classes say which tokens"):
        measure_couplings(scores, null="token", classes=len)
    with pytest.raises(ParameterError, match="between 0 and 1"):
        holm_adjusted([0.5, 2.0])
    with pytest.raises(ParameterError, match="clusters must be labels"):
        measure_couplings(scores, clusters=[None])
    with pytest.raises(ParameterError, match="each of the 1 problems; got 2"):
        measure_couplings(scores, clusters=["a", "b"])


# ---- random heads -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def statistics() -> attnprobe.HeadStatistics:
    """Of two responses, for 3 layers of 4 heads."""
    model = tiny_model("llama", num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    ids = torch.randint(1, 90, (2, 70), generator=torch.Generator().manual_seed(0))
    batch = attnprobe.TokenBatch.from_ids(ids, response_start=5)
    return attnprobe.measure(model, batch, horizon=(2, 20), receiver=True)


def test_drawn_groups_keep_their_sizes_and_what_they_share(statistics: attnprobe.HeadStatistics) -> None:
    groups = attnprobe.classify_heads(statistics, receivers=4)
    selections = {group: groups[group] for group in ("local", "global", "receiver")}
    drawn = RandomHeads.draw(statistics, selections, 200, seed=0)
    of = {group: shares > 0 for group, shares in drawn.shares.items()}
    for group, selection in selections.items():
        assert of[group].sum(-1).eq(len(selection)).all()
        torch.testing.assert_close(drawn.shares[group].sum(-1), torch.ones(200, dtype=torch.float64))
        # Each head comes as often as any other.
        frequency = of[group].double().mean(0)
        assert frequency.sub(len(selection) / 12).abs().max() < 0.2
    assert not (of["local"] & of["global"]).any()
    shared = int((groups.receiver_heads & groups.global_heads).sum())
    assert (of["receiver"] & of["global"]).sum(-1).eq(shared).all()


def test_random_heads_are_counted_as_the_heads_themselves(statistics: attnprobe.HeadStatistics) -> None:
    """Each draw against `couplings` of scores with that draw's own heads."""
    groups = attnprobe.classify_heads(statistics, receivers=3)
    result = measure_couplings(statistics, groups, null="heads", draws=4, resamples=5, seed=7)
    plain = measure_couplings(statistics, groups, draws=4, resamples=5, seed=7)
    selections = {group: groups[group] for group in ("local", "global", "receiver")}
    drawn = RandomHeads.draw(statistics, selections, 4, seed=7)
    expected: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    for draw in range(4):
        own = {group: shares[draw].view(3, 4) > 0 for group, shares in drawn.shares.items()}
        again = measure_couplings(attnprobe.score_tokens(statistics, own), draws=4, resamples=5)
        for name in NAMES:
            coupling = getattr(again, name)
            expected[name].append((coupling.observed.value, coupling.position_lift.value))
    for name in NAMES:
        found, alone = getattr(result, name), getattr(plain, name)
        assert found.observed == alone.observed
        assert found.position_lift == alone.position_lift
        means, lifts = (list(each) for each in zip(*expected[name], strict=True))
        assert found.null_values.tolist() == pytest.approx(means, rel=1e-5)
        assert found.null.value == pytest.approx(sum(means) / 4, rel=1e-5)
        assert found.null_position_lift.value == pytest.approx(sum(lifts) / 4, rel=1e-4, abs=1e-6)
        assert found.null_position_lifts.tolist() == pytest.approx(lifts, rel=1e-4, abs=1e-6)
        assert alone.null_position_lifts is None
        reached = sum(mean >= found.observed.value - 1e-6 for mean in means)
        assert found.p_value == pytest.approx((1 + reached) / 5)
        assert found.movable is None


def test_with_all_heads_in_each_group_no_draw_differs(statistics: attnprobe.HeadStatistics) -> None:
    result = measure_couplings(statistics, "all", null="heads", draws=6, resamples=5)
    for name in ("entropy_at_preplans", "anchor_after_preplan"):
        coupling = getattr(result, name)
        assert coupling.null_values.tolist() == pytest.approx([coupling.observed.value] * 6)
        assert coupling.p_value == coupling.position_lift_p_value == 1.0
        assert coupling.lift.value == pytest.approx(0.0, abs=1e-9)
    mean = attnprobe.score_tokens(statistics, "all")
    torch.testing.assert_close(mean.fai, statistics.fai.mean((1, 2)), equal_nan=True)
    torch.testing.assert_close(mean.waad, statistics.waad.mean((1, 2)), equal_nan=True)


def test_statistics_may_come_in_batches_and_by_thirds(statistics: attnprobe.HeadStatistics) -> None:
    options = {"null": "heads", "draws": 5, "resamples": 5}
    whole = measure_couplings(statistics, **options)
    parts = (statistics.select(example) for example in range(2))
    assert measure_couplings(parts, **options) == whole
    third = measure_couplings(statistics, layers="top third", **options)
    assert third.provenance.layers == (2,)
    assert third == measure_couplings(statistics.at_layers([2]), **options)
    with pytest.raises(ResultError, match="cannot pool"):
        measure_couplings([statistics, statistics.at_layers([2])], "all", **options)


def test_a_result_with_random_heads_comes_back(statistics: attnprobe.HeadStatistics, tmp_path) -> None:
    result = measure_couplings(statistics, null="heads", draws=5, resamples=5, clusters=["a", "a"])
    loaded = attnprobe.Couplings.load(result.save(tmp_path / "couplings.safetensors"))
    assert loaded == result
    assert "of random heads" in repr(result)
    assert "clusters=1" in repr(result)
    assert result.to_pandas()["movable"].isna().all()


# ---- clusters, medians, several comparisons, classes ------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(0, 5))
def test_clusters_are_drawn_whole(labels: list[int], seed: int) -> None:
    weights = bootstrap_weights(len(labels), 30, seed, labels)
    if len(set(labels)) == 1:
        # Nothing can be drawn: no interval is better than one of no width.
        assert weights.isnan().all()
        return
    first = {label: labels.index(label) for label in labels}
    for unit, label in enumerate(labels):
        assert torch.equal(weights[:, unit], weights[:, first[label]])
    of_clusters = weights[:, sorted(first.values())]
    assert of_clusters.sum(-1).eq(len(first)).all()
    alone = bootstrap_weights(len(labels), 30, seed, range(len(labels)))
    assert torch.equal(alone, bootstrap_weights(len(labels), 30, seed))


def test_problems_of_one_cluster_widen_the_interval() -> None:
    """Ten copies of each of four problems say no more than the four."""
    generator = torch.Generator().manual_seed(0)
    waad, fai = torch.rand(2, 4, 60, generator=generator).repeat_interleave(10, 1).unbind(0)
    scores = TokenScores(waad, fai, None, torch.ones(40, 60, dtype=torch.bool))
    widths = [
        measure_couplings(scores, draws=5, clusters=clusters).anchor_after_preplan.observed
        for clusters in (None, [i // 10 for i in range(40)])
    ]
    narrow, wide = (each.high - each.low for each in widths)
    assert wide > 2 * narrow


@given(st.lists(st.floats(-5, 5) | st.just(NAN), min_size=1, max_size=9))
def test_medians_are_the_middle_of_what_is_defined(values: list[float]) -> None:
    found = median_estimate(torch.tensor(values), resamples=20)
    defined = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.float32)
    if len(defined) == 0:
        assert math.isnan(found.value)
        return
    expected = float(defined.double().quantile(0.5))
    assert found.value == pytest.approx(expected, abs=1e-6)
    if len(values) > 1 and not math.isnan(found.low):
        assert float(defined.min()) <= found.low <= found.high <= float(defined.max())
    else:
        assert len(values) == 1


def test_what_has_no_peak_has_no_p_value(statistics: attnprobe.HeadStatistics) -> None:
    """And draws without a peak are not counted as lower than what was observed."""
    late = statistics.at_columns(slice(60, 70))
    for null in ("position", "rotate", "token", "heads"):
        found = measure_couplings(late, "all", null=null, draws=9, resamples=5)
        for name in NAMES[1:]:
            coupling = getattr(found, name)
            if coupling is not None and float(coupling.peaks.sum()) == 0:
                assert math.isnan(coupling.observed.value)
                assert math.isnan(coupling.p_value)
    fai = dataclasses.replace(statistics, fai=torch.full_like(statistics.fai, NAN))
    empty = measure_couplings(fai, null="heads", draws=9, resamples=5).anchor_after_preplan
    assert math.isnan(empty.p_value)
    assert math.isnan(empty.position_lift_p_value)


def test_a_response_without_tokens_adds_nothing(statistics: attnprobe.HeadStatistics) -> None:
    """As the statistics of a rollout have where a trainer masked a completion."""
    mask = statistics.response_mask.clone()
    mask[1] = False
    empty = {name: getattr(statistics, name).clone() for name in ("waad", "fai", "entropy")}
    for values in empty.values():
        values[1] = NAN
    masked = dataclasses.replace(statistics, response_mask=mask, **empty)
    for null in ("position", "rotate", "token", "heads"):
        found = measure_couplings(masked, "all", null=null, draws=9, resamples=5).anchor_after_preplan
        alone = measure_couplings(statistics.select(0), "all", null=null, draws=9, resamples=5)
        assert found.peaks.tolist() == [float(alone.anchor_after_preplan.peaks), 0.0]
        assert found.observed.value == alone.anchor_after_preplan.observed.value
        assert found.p_value == alone.anchor_after_preplan.p_value


def test_heads_may_come_from_a_generator(statistics: attnprobe.HeadStatistics) -> None:
    parts = [statistics.select(0), statistics.select(1)]
    heads = [(layer, head) for layer in range(3) for head in (0, 2)]
    options = {"null": "heads", "draws": 5, "resamples": 5}
    assert measure_couplings(parts, iter(heads), **options) == measure_couplings(parts, heads, **options)


def test_a_single_problem_has_no_interval() -> None:
    alone = measure_couplings(scores_of(list(range(40))), draws=9).anchor_after_preplan
    assert not math.isnan(alone.observed.value)
    assert math.isnan(alone.observed.low)
    assert math.isnan(alone.lift.high)


@given(st.lists(st.floats(0, 1) | st.just(NAN), max_size=8))
def test_adjusted_p_values_are_holms(p_values: list[float]) -> None:
    adjusted = holm_adjusted(p_values)
    defined = [p for p in p_values if p == p]
    for p, after in zip(p_values, adjusted, strict=True):
        if p != p:
            assert after != after
            continue
        # The definition, by looking at every smaller p-value.
        steps = [min(1.0, sum(other >= q for other in defined) * q) for q in defined if q <= p]
        assert after == pytest.approx(max(steps))
        assert p <= after <= 1


def test_classes_of_tokens() -> None:
    examples = {
        "line end": ["\n", ".\n\n", " \r\n"],
        "space": [" ", "", "\t"],
        "number": ["7", " 12", "3.5", "1,000"],
        "function word": [" the", "The", " it's"],
        "content word": [" apples", "Tom", " don"],
        "word part": ["ing", "the", "é"],
        "punctuation": [".", "),", " (", "…"],
        "mathematics": ["+", " =", "$", "\\frac", "{", "5%"],
    }
    assert set(examples) == set(TOKEN_CLASSES)
    for name, texts in examples.items():
        assert {token_class(text) for text in texts} == {name}


def test_peaks_of_many_draws_are_those_of_each() -> None:
    values = torch.rand(5, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    together = find_peaks(values)
    assert torch.equal(together, torch.cat([find_peaks(row[None]) for row in values]))

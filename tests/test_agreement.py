"""Bootstrap, agreement of groupings and their stability, against slow references."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnprobe import (
    GroupAgreement,
    GroupStability,
    HeadGroups,
    HeadStatistics,
    ParameterError,
    ResultError,
    classify_heads,
    compare_groups,
    group_stability,
)
from attnprobe.analysis.agreement import rank_correlation
from attnprobe.analysis.bootstrap import Estimate, bootstrap_weights, percentile_estimate, ratio_estimate
from attnprobe.heads import group_heads

NAN = math.nan
SPANS = st.lists(st.floats(0, 50, width=16), min_size=4, max_size=24)


def statistics_of(
    span: object, kurtosis: object = None, layers: tuple[int, ...] | None = None, model_name: str = ""
) -> HeadStatistics:
    """Statistics whose spans and kurtosis are given; nothing else of them matters here."""
    spans = torch.as_tensor(span)
    per_token = torch.zeros(*spans.shape, 2)
    return HeadStatistics(
        span=spans,
        waad=per_token,
        fai=per_token,
        entropy=None,
        receiver_kurtosis=None if kurtosis is None else torch.as_tensor(kurtosis),
        response_mask=torch.ones(len(spans), 2, dtype=torch.bool),
        layers=tuple(range(spans.shape[1])) if layers is None else layers,
        model_name=model_name,
    )


def grouping(span: list[float], kurtosis: list[float] | None = None, quantile: float = 0.3) -> HeadGroups:
    tensors = [None if values is None else torch.tensor([values]) for values in (span, kurtosis)]
    return group_heads(tensors[0], tensors[1], quantile=quantile, receivers=2)


# ---- bootstrap ------------------------------------------------------------------------------------


@given(units=st.integers(2, 12), resamples=st.integers(1, 30), seed=st.integers(0, 5))
def test_each_resample_draws_as_many_units_as_there_are(units: int, resamples: int, seed: int) -> None:
    weights = bootstrap_weights(units, resamples, seed)
    assert weights.shape == (resamples, units)
    assert bool((weights.sum(-1) == units).all())
    assert torch.equal(weights, bootstrap_weights(units, resamples, seed))


def test_an_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    """1.96 standard errors of the mean on either side."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double() + 3
    estimate = ratio_estimate(values, torch.ones(400), resamples=4000)
    half = 1.96 * float(values.std()) / 20
    assert estimate.value == pytest.approx(float(values.mean()))
    assert estimate.high - estimate.low == pytest.approx(2 * half, rel=0.08)


def test_ratios_pool_their_sums() -> None:
    estimate = ratio_estimate(torch.tensor([1.0, 9.0]), torch.tensor([1.0, 3.0]), resamples=500)
    assert estimate.value == 2.5
    assert (estimate.low, estimate.high) == (1.0, 3.0)
    assert str(estimate) == "2.5 [1, 3]"


def test_nothing_to_divide_by_is_undefined() -> None:
    estimate = ratio_estimate(torch.zeros(3), torch.zeros(3), resamples=5)
    assert all(math.isnan(value) for value in estimate)


def test_resamples_without_a_value_are_left_out() -> None:
    estimate = percentile_estimate(1.0, torch.tensor([NAN, 1.0, 2.0]), confidence=0.5)
    assert estimate == Estimate(1.0, 1.25, 1.75)


# ---- agreement ------------------------------------------------------------------------------------


def slow_rank_correlation(first: list[float], second: list[float]) -> float:
    """Pearson's correlation of ranks, equal values sharing the mean of theirs."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if not (math.isnan(a) or math.isnan(b))]
    if len(pairs) < 2:
        return NAN
    columns = []
    for values in zip(*pairs, strict=True):
        ranks = [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]
        mean = sum(ranks) / len(ranks)
        columns.append([rank - mean for rank in ranks])
    product = sum(a * b for a, b in zip(*columns, strict=True))
    size = math.sqrt(sum(a * a for a in columns[0]) * sum(b * b for b in columns[1]))
    return product / size if size else NAN


VALUES = st.one_of(st.integers(0, 5).map(float), st.just(NAN))


@given(pairs=st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=15))
def test_rank_correlation(pairs: list[tuple[float, float]]) -> None:
    first, second = (list(column) for column in zip(*pairs, strict=True))
    actual = rank_correlation(torch.tensor(first), torch.tensor(second))
    assert actual == pytest.approx(slow_rank_correlation(first, second), abs=1e-9, nan_ok=True)


@given(span=SPANS, other=st.randoms(use_true_random=False), percent=st.integers(5, 50))
def test_overlap_counts_heads(span: list[float], other: object, percent: int) -> None:
    shuffled = list(span)
    other.shuffle(shuffled)
    first, second = grouping(span, span, percent / 100), grouping(shuffled, shuffled, percent / 100)
    agreement = compare_groups(first, second)
    for group in ("local", "global", "receiver"):
        ours, theirs = set(first.pairs(group)), set(second.pairs(group))
        assert agreement.overlap[group] == len(ours & theirs) / min(len(ours), len(theirs))
        assert agreement.jaccard[group] == len(ours & theirs) / len(ours | theirs)
        assert agreement.chance_overlap[group] == len(ours) / len(span)
    assert agreement == compare_groups(second, first)


def test_a_grouping_agrees_with_itself() -> None:
    groups = grouping([1.0, 2.0, 3.0, 4.0], [4.0, 1.0, 2.0, 3.0])
    agreement = compare_groups(groups, groups)
    assert set(agreement.overlap.values()) == {1.0}
    assert agreement.span_correlation == pytest.approx(1)
    assert agreement.kurtosis_correlation == pytest.approx(1)


def test_receivers_are_compared_where_both_have_them() -> None:
    agreement = compare_groups(grouping([1.0, 2.0], [1.0, 2.0]), grouping([1.0, 2.0]))
    assert set(agreement.overlap) == {"local", "global"}
    assert agreement.kurtosis_correlation is None


def test_groupings_of_other_heads_are_not_compared() -> None:
    with pytest.raises(ResultError, match=r"\b2 and 3\b"):
        compare_groups(grouping([1.0, 2.0]), grouping([1.0, 2.0, 3.0]))
    other = dataclasses.replace(grouping([1.0, 2.0]), layers=(7,))
    with pytest.raises(ResultError, match=r"\b0 and 7\b"):
        compare_groups(grouping([1.0, 2.0]), other)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("wrong", [None, "local", 3, HeadGroups, {"local": [0]}, torch.ones(1, 2)])
def test_what_is_no_grouping_is_refused(wrong: Any) -> None:
    groups = grouping([1.0, 2.0])
    with pytest.raises(ParameterError, match=r"first.*HeadGroups"):
        compare_groups(wrong, groups)
    with pytest.raises(ParameterError, match=r"second.*HeadGroups"):
        compare_groups(groups, wrong)


def test_a_model_can_be_compared_with_what_was_trained_from_it(tmp_path: Path) -> None:
    first, second = (
        dataclasses.replace(grouping([1.0, 2.0, 3.0, 4.0]), model_name=name) for name in ("base", "tuned")
    )
    agreement = compare_groups(first, second)
    assert agreement.model_names == ("base", "tuned")
    assert agreement == GroupAgreement.load(agreement.save(tmp_path / "agreement.safetensors"))
    assert agreement.to_pandas()["group"].tolist() == ["local", "global"]
    for shown in (repr(agreement), agreement._repr_html_()):
        assert len(shown) < 800
        for told in ("base", "tuned", "local", "jaccard", "span_correlation=1"):
            assert told in shown


def test_an_agreement_without_a_correlation_equals_itself() -> None:
    agreement = compare_groups(grouping([1.0, 1.0]), grouping([1.0, 1.0]))
    assert math.isnan(agreement.span_correlation)
    assert agreement == compare_groups(grouping([1.0, 1.0]), grouping([1.0, 1.0]))
    assert agreement != compare_groups(grouping([1.0, 2.0]), grouping([1.0, 2.0]))


# ---- streaming and stability ----------------------------------------------------------------------

RESPONSES = st.lists(
    st.lists(st.one_of(st.floats(0, 50, width=16), st.just(NAN)), min_size=6, max_size=6),
    min_size=2,
    max_size=8,
)


@given(rows=RESPONSES, cut=st.integers(1, 7))
def test_classifying_batch_by_batch_is_classifying_all(rows: list[list[float]], cut: int) -> None:
    """Whatever the batches: only sums are kept."""
    span = torch.tensor(rows)[:, None]
    span[0] = torch.arange(6.0)
    whole = statistics_of(span, span.flip(-1))
    parts = (whole.select(slice(begin, begin + cut)) for begin in range(0, len(rows), cut))
    expected, actual = classify_heads(whole, receivers=2), classify_heads(parts, receivers=2)
    for name in ("local_heads", "global_heads", "receiver_heads", "span", "receiver_kurtosis"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), equal_nan=True)


def test_one_response_can_be_classified_over() -> None:
    whole = statistics_of([[[1.0, 2.0, 3.0, 4.0]], [[4.0, 3.0, 2.0, 1.0]]])
    second = classify_heads(whole.select(slice(1, 2)), quantile=0.25)
    assert second.pairs("local") == [(0, 3)]


def test_some_layers_can_be_classified_over() -> None:
    whole = statistics_of([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]], layers=(2, 5, 7))
    groups = classify_heads(whole.at_layers([7, 2]), quantile=0.25)
    assert groups.layers == (2, 7)
    assert groups.pairs("local") == [(2, 0)]
    assert groups.pairs("global") == [(7, 1)]
    with pytest.raises(ParameterError, match=r"\[3\].*\[2, 5, 7\]"):
        whole.at_layers([3])


@pytest.mark.parametrize("over", [classify_heads, group_stability])
@pytest.mark.parametrize(
    ("other", "facts"),
    [
        (statistics_of([[[1.0, 2.0, 3.0]]]), r"head_count.*2.*3"),
        (statistics_of([[[1.0, 2.0]]], layers=(4,)), r"layers.*0.*4"),
        (statistics_of([[[1.0, 2.0]]], model_name="other"), r"model_name.*other"),
        (statistics_of([[[1.0, 2.0]]], [[[1.0, 2.0]]]), r"receiver_kurtosis"),
    ],
)
def test_statistics_that_do_not_belong_together_are_refused(over: Any, other: object, facts: str) -> None:
    with pytest.raises(ResultError, match=facts):
        over(part for part in (statistics_of([[[1.0, 2.0]]]), other))


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("wrong", [None, "statistics", 3, 0.5, HeadStatistics, torch.ones(2), [None], [{}]])
def test_what_is_no_statistics_is_refused(wrong: Any) -> None:
    with pytest.raises(ParameterError, match="HeadStatistics"):
        group_stability(wrong)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("quantile", [0, 0.6, NAN, "0.3", None, True]),
        ("receivers", [0, 2.5, "20", None, True]),
        ("resamples", [0, 2.5, None, True]),
        ("confidence", [0, 1, NAN, "0.9"]),
        ("seed", [-1, 0.5, None]),
    ],
)
def test_parameters_that_make_no_sense_are_refused_before_anything_is_measured(
    name: str, values: list[Any]
) -> None:
    def measured_late() -> Any:
        raise AssertionError("nothing may be measured")
        yield

    for value in values:
        with pytest.raises(ParameterError, match=f"{name}.*got"):
            group_stability(measured_late(), **{name: value})


def test_no_statistics_are_refused() -> None:
    with pytest.raises(ResultError, match="statistics"):
        classify_heads([])
    without = dataclasses.replace(statistics_of([[[1.0, 2.0]]]), span=None)
    with pytest.raises(ParameterError, match="span"):
        group_stability(without)
    with pytest.raises(ParameterError, match=r"\b0\b"):
        group_stability([])
    with pytest.raises(ParameterError, match=r"\b1\b"):
        group_stability(statistics_of([[[1.0, 2.0]]]))


def test_heads_far_apart_are_grouped_the_same_by_every_resample() -> None:
    noise = torch.rand(12, 2, 5, generator=torch.Generator().manual_seed(0))
    span = noise + 10 * torch.arange(10.0).view(2, 5)
    stability = group_stability(statistics_of(span, span), receivers=3, resamples=40)
    assert all(estimate == Estimate(1, 1, 1) for estimate in stability.overlap.values())
    assert stability.selected["local"].tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    assert stability.span_correlation.value == pytest.approx(1)
    assert (stability.responses, stability.resamples) == (12, 40)


def test_heads_that_differ_by_noise_alone_are_grouped_as_chance_has_it() -> None:
    span = torch.rand(12, 4, 25, generator=torch.Generator().manual_seed(0))
    stability = group_stability(statistics_of(span), resamples=60)
    # The responses of a resample are among those of the whole: more than chance, far from all.
    assert 0.3 < stability.overlap["global"].value < 0.8
    assert stability.overlap["global"].low < stability.overlap["global"].high
    assert float(stability.selected["global"].sum()) == pytest.approx(30)
    again = group_stability([statistics_of(span[:5]), statistics_of(span[5:])], resamples=60)
    assert again.overlap == stability.overlap


def test_a_stability_shows_its_groups_and_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    span = torch.rand(6, 2, 5, generator=torch.Generator().manual_seed(0))
    statistics = statistics_of(span, span, layers=(3, 7), model_name="a/model")
    stability = group_stability(statistics, receivers=2, resamples=np.int64(8))
    table = stability.to_pandas()
    assert table["layer"].tolist() == [3] * 5 + [7] * 5
    assert table["receiver"].tolist() == stability.selected["receiver"].flatten().tolist()
    for shown in (repr(stability), stability._repr_html_()):
        assert len(shown) < 800
        for told in ("a/model", "responses=6", "receiver", "span_correlation"):
            assert told in shown
    loaded = GroupStability.load(stability.save(tmp_path / "stability.safetensors"))
    assert loaded == stability
    assert loaded != group_stability(statistics, receivers=2, resamples=8, seed=1)
    with pytest.raises(ResultError, match=r"groups.*\[3, 2, 5\]"):
        dataclasses.replace(stability, groups=("local",))

"""Head groups: local, global and receiver heads, against one sorted list of heads."""

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

from attnprobe import HeadGroups, HeadSelection, HeadStatistics, ParameterError, ResultError, classify_heads
from tests.refusals import refused

NAN = math.nan
Spans = list[list[list[float]]]
Place = tuple[int, int]


def statistics_of(
    span: Spans | Tensor,
    receiver_kurtosis: Spans | Tensor | None = None,
    layers: tuple[int, ...] | None = None,
    model_name: str = "",
    dtype: torch.dtype = torch.float32,
) -> HeadStatistics:
    """Statistics whose spans and kurtosis are given; nothing else of them matters here."""
    span = torch.as_tensor(span, dtype=dtype)
    per_token = torch.zeros(*span.shape, 2, dtype=dtype)
    return HeadStatistics(
        span=span,
        waad=per_token,
        fai=per_token.clone(),
        entropy=None,
        receiver_kurtosis=None
        if receiver_kurtosis is None
        else torch.as_tensor(receiver_kurtosis, dtype=dtype),
        response_mask=torch.ones(span.shape[0], 2, dtype=torch.bool),
        layers=tuple(range(span.shape[1])) if layers is None else layers,
        model_name=model_name,
    )


# ---- the slow reference ---------------------------------------------------------------------------


def slow_means(values: Spans) -> dict[Place, float]:
    """The mean over the responses that have a value, of each head that has one, by (layer, head)."""
    means = {}
    for layer in range(len(values[0])):
        for head in range(len(values[0][0])):
            defined = [row[layer][head] for row in values if not math.isnan(row[layer][head])]
            if defined:
                means[layer, head] = sum(defined) / len(defined)
    return means


def slow_order(values: Spans) -> list[Place]:
    """All heads that have a value, the lowest first, equal ones by layer and head."""
    means = slow_means(values)
    return sorted(means, key=lambda place: (means[place], place))


def places(mask: Tensor) -> list[Place]:
    return [(layer, head) for layer, head in mask.nonzero().tolist()]


# ---- what is drawn --------------------------------------------------------------------------------

# Means of 1, 2 or 4 such values are exact, so that ties are ties.
coarse = st.integers(0, 5).map(lambda step: step / 2)
percents = st.integers(1, 50)


@st.composite
def head_values(draw: st.DrawFn, *, distinct: bool = False, gaps: bool = False) -> Spans:
    """Draw `[batch, layer, head]` values; some heads do not exist, and with `gaps` some values neither."""
    batch = draw(st.sampled_from([1, 2, 4]))
    layers, heads = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    count = layers * heads
    missing = draw(st.sets(st.integers(0, count - 1), max_size=count - 2))
    order = draw(st.permutations(range(count)))
    rows = []
    for i in range(batch):
        flat = draw(st.lists(coarse, min_size=count, max_size=count))
        if distinct:
            # The same order in every response, so that means differ as well.
            flat = [float(order[j] * (i + 1)) for j in range(count)]
        flat = [NAN if j in missing else value for j, value in enumerate(flat)]
        if gaps and i > 0:
            flat = [NAN if draw(st.integers(0, 4)) == 0 else value for value in flat]
        rows.append([flat[j : j + heads] for j in range(0, count, heads)])
    return rows


# ---- local and global heads -----------------------------------------------------------------------


@given(
    span=head_values(distinct=True), percent=percents, dtype=st.sampled_from([torch.float32, torch.float64])
)
def test_groups_are_the_lowest_and_highest_spans(span: Spans, percent: int, dtype: torch.dtype) -> None:
    """Sec. 4.1: sort all heads by mean span over the batch, cut the quantile off at either end."""
    order = slow_order(span)
    count = max(1, percent * len(order) // 100)
    groups = classify_heads(statistics_of(span, dtype=dtype), quantile=percent / 100)
    assert sorted(order[:count]) == places(groups.local_heads)
    assert sorted(order[-count:]) == places(groups.global_heads)


@given(span=head_values(), percent=percents)
def test_groups_are_disjoint_also_when_spans_are_equal(span: Spans, percent: int) -> None:
    """As `HeadGroups` promises: no head is local and global at once."""
    groups = classify_heads(statistics_of(span), quantile=percent / 100)
    assert places(groups.local_heads & groups.global_heads) == []


@given(span=head_values(), percent=percents)
def test_equal_spans_are_ranked_by_layer_and_head(span: Spans, percent: int) -> None:
    """One ranking of all heads has the local ones at its start and the global ones at its end."""
    order = slow_order(span)
    count = max(1, percent * len(order) // 100)
    groups = classify_heads(statistics_of(span), quantile=percent / 100)
    assert sorted(order[:count]) == places(groups.local_heads)
    assert sorted(order[-count:]) == places(groups.global_heads)


@given(span=head_values(), percent=percents)
def test_groups_have_floor_q_n_heads_and_at_least_one(span: Spans, percent: int) -> None:
    means = slow_means(span)
    count = max(1, percent * len(means) // 100)
    groups = classify_heads(statistics_of(span), quantile=percent / 100)
    assert (count, count) == (int(groups.local_heads.sum()), int(groups.global_heads.sum()))
    assert set(places(groups.local_heads | groups.global_heads)) <= set(means)


@given(span=head_values())
def test_spans_order_the_groups(span: Spans) -> None:
    """No head outside a group has a span that is more typical of it."""
    means = slow_means(span)
    groups = classify_heads(statistics_of(span))
    local, remote = set(places(groups.local_heads)), set(places(groups.global_heads))
    assert max(means[place] for place in local) <= min([means[p] for p in means if p not in local])
    assert min(means[place] for place in remote) >= max([means[p] for p in means if p not in remote])


@given(span=head_values(), percent=percents, exponent=st.integers(-8, 8))
def test_groups_do_not_depend_on_the_scale_of_spans(span: Spans, percent: int, exponent: int) -> None:
    plain = classify_heads(statistics_of(span), quantile=percent / 100)
    scaled = classify_heads(statistics_of(torch.tensor(span) * 2.0**exponent), quantile=percent / 100)
    assert places(plain.local_heads) == places(scaled.local_heads)
    assert places(plain.global_heads) == places(scaled.global_heads)


@given(span=head_values())
def test_groups_do_not_depend_on_the_order_of_the_batch(span: Spans) -> None:
    plain, turned = classify_heads(statistics_of(span)), classify_heads(statistics_of(span[::-1]))
    assert places(plain.local_heads) == places(turned.local_heads)
    assert places(plain.global_heads) == places(turned.global_heads)


@given(span=head_values(gaps=True))
def test_what_was_ranked_is_the_mean_over_the_batch(span: Spans) -> None:
    """Over the responses that have a value; NaN for heads that do not exist."""
    means = slow_means(span)
    groups = classify_heads(statistics_of(span), quantile=0.3)
    expected = [
        [means.get((layer, head), NAN) for head in range(len(span[0][0]))] for layer in range(len(span[0]))
    ]
    torch.testing.assert_close(groups.span, torch.tensor(expected), equal_nan=True)


def test_ranking_is_over_all_layers_at_once() -> None:
    """Ten heads in two layers, 30%: all three local heads may stand in one layer."""
    span = [[[9.0, 8.0, 1.0, 7.0, 6.0], [0.5, 0.25, 0.75, 3.0, 2.0]]]
    groups = classify_heads(statistics_of(span))
    assert places(groups.local_heads) == [(1, 0), (1, 1), (1, 2)]
    assert places(groups.global_heads) == [(0, 0), (0, 1), (0, 3)]


def test_the_quantile_is_counted_as_decimals_are() -> None:
    """0.29 of 100 is 29, although 0.29 * 100 in binary is a hair below it."""
    groups = classify_heads(statistics_of(torch.arange(100.0).view(1, 10, 10)), quantile=0.29)
    assert (int(groups.local_heads.sum()), int(groups.global_heads.sum())) == (29, 29)


def test_spans_that_rank_heads_stay_as_they_were() -> None:
    statistics = statistics_of([[[1.0, NAN, 2.0]]])
    classify_heads(statistics)
    torch.testing.assert_close(statistics.span, torch.tensor([[[1.0, NAN, 2.0]]]), equal_nan=True)


@pytest.mark.parametrize("quantile", [0.0, -0.1, 0.51, 1.0, NAN])
def test_a_quantile_that_makes_groups_overlap_is_refused(quantile: float) -> None:
    statistics = statistics_of([[[1.0, 2.0]]])
    refused(
        lambda: classify_heads(statistics, quantile=quantile),
        "quantile",
        "0.5",
        quantile,
        error=ParameterError,
    )


@pytest.mark.parametrize(("span", "count"), [([[[1.0]]], 1), ([[[1.0, NAN]]], 1), ([[[NAN, NAN]]], 0)])
def test_ranking_needs_two_heads(span: Spans, count: int) -> None:
    refused(lambda: classify_heads(statistics_of(span)), "two heads", count, error=ParameterError)


# ---- receivers ------------------------------------------------------------------------------------


@given(kurtosis=head_values(gaps=True), receivers=st.integers(1, 30))
def test_receivers_have_the_highest_kurtosis(kurtosis: Spans, receivers: int) -> None:
    """The highest means over the responses that have one; undefined heads are none; ties: the first."""
    means = slow_means(kurtosis)
    expected = sorted(means, key=lambda place: (-means[place], place))[:receivers]
    span = torch.arange(len(kurtosis[0]) * len(kurtosis[0][0])).float().view(len(kurtosis[0]), -1)
    span = span.expand(len(kurtosis), -1, -1)
    # float64: the mean of three values is not exact.
    statistics = statistics_of(span, kurtosis, dtype=torch.float64)
    groups = classify_heads(statistics, receivers=receivers)
    assert sorted(expected) == places(groups.mask("receiver"))


def test_twenty_heads_are_receivers_unless_told_otherwise() -> None:
    values = torch.arange(32.0).view(1, 4, 8)
    groups = classify_heads(statistics_of(values, values))
    assert places(groups.mask("receiver")) == [(i // 8, i % 8) for i in range(12, 32)]


def test_without_kurtosis_receivers_are_unknown() -> None:
    groups = classify_heads(statistics_of([[[1.0, 2.0]]]))
    assert (groups.receiver_heads, groups.receiver_kurtosis) == (None, None)
    for call in (groups.mask, groups.pairs):
        refused(lambda call=call: call("receiver"), "receiver", error=ParameterError)
    refused(lambda: groups.receiver, "receiver", error=ParameterError)


@pytest.mark.parametrize("receivers", [0, -1])
def test_fewer_than_one_receiver_is_refused(receivers: int) -> None:
    statistics = statistics_of([[[1.0, 2.0]]])
    refused(
        lambda: classify_heads(statistics, receivers=receivers),
        "receivers",
        "1",
        receivers,
        error=ParameterError,
    )


# ---- reading groups -------------------------------------------------------------------------------


def example(model_name: str = "tiny") -> HeadGroups:
    """Layers 3 and 5 of four heads; the last head of layer 5 does not exist."""
    span = [[[4.0, 1.0, 7.0, 2.0], [9.0, 0.5, 3.0, NAN]]]
    kurtosis = [[[0.0, 5.0, NAN, 2.0], [8.0, 1.0, 1.5, NAN]]]
    statistics = statistics_of(span, kurtosis, layers=(3, 5), model_name=model_name)
    return classify_heads(statistics, quantile=0.3, receivers=3)


def test_pairs_are_layer_numbers_and_heads_the_most_typical_first() -> None:
    groups = example()
    assert groups.pairs("local") == [(5, 1), (3, 1)]
    assert groups.pairs("global") == [(5, 0), (3, 2)]
    assert groups.pairs("receiver") == [(5, 0), (3, 1), (3, 3)]


@given(span=head_values(gaps=True), percent=percents)
def test_pairs_name_the_heads_of_the_mask(span: Spans, percent: int) -> None:
    layers = tuple(range(10, 10 + 2 * len(span[0]), 2))
    groups = classify_heads(statistics_of(span, layers=layers), quantile=percent / 100)
    for name, sign in (("local", 1), ("global", -1)):
        pairs = groups.pairs(name)
        assert sorted(pairs) == [(layers[layer], head) for layer, head in places(groups.mask(name))]
        values = [sign * float(groups.span[layers.index(layer), head]) for layer, head in pairs]
        assert sorted(values) == values


def test_masks_have_names() -> None:
    groups = example()
    assert groups.mask("local") is groups.local_heads
    assert groups.mask("global") is groups.global_heads
    assert groups.mask("receiver") is groups.receiver_heads


@pytest.mark.usefixtures("as_users_call")
def test_an_unknown_group_is_refused() -> None:
    groups = example()
    for call in (groups.mask, groups.pairs, groups.__getitem__):
        for group in ("induction", 0, None, ["local"]):
            refused(
                lambda call=call, group=group: call(group),
                "local",
                "global",
                "receiver",
                repr(group),
                error=ParameterError,
            )


def test_groups_are_selections() -> None:
    """By name, also by attribute: the same heads with the same order, weight 1, and the model's name."""
    groups = example()
    for name, selection in (
        ("local", groups.local),
        ("global", groups.global_),
        ("receiver", groups.receiver),
    ):
        assert list(selection) == groups.pairs(name)
        assert selection == groups[name] == HeadSelection.of(groups.mask(name), (3, 5), 4)
        assert selection.model_name == "tiny"
        assert {weight for _, _, weight in selection.heads} == {1.0}
    assert (5, 1) in groups.local
    assert (5, 1) not in groups["global"]


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("statistics", ["x", None, 5, [], ["x"], torch.ones(2), [None], {"a": 1}])
def test_what_is_no_statistics_is_refused(statistics: object) -> None:
    refused(lambda: classify_heads(statistics), "statistics")


def test_groups_of_several_batches_are_those_of_all_their_responses() -> None:
    """Also from a generator, which is asked for one batch at a time."""
    spans = torch.rand(7, 2, 4)
    whole = classify_heads(statistics_of(spans))
    for parts in ([spans[:2], spans[2:]], spans.split(1)):
        assert classify_heads(statistics_of(part) for part in parts) == whole


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"layers": (0, 2)}, ["layers", "(0, 1)", "(0, 2)"]),
        ({"model_name": "other"}, ["model_name", "tiny", "other"]),
    ],
)
def test_batches_of_different_measurements_are_not_ranked_together(changes: dict, facts: list[str]) -> None:
    ours = statistics_of(torch.rand(1, 2, 3), model_name="tiny")
    theirs = replace(ours, **changes)
    refused(lambda: classify_heads([ours, theirs]), *facts, error=ResultError)


@pytest.mark.parametrize("layers", [[0, 1], range(2), torch.arange(2), (np.int64(0), 1)])
@pytest.mark.usefixtures("as_users_call")
def test_groups_made_by_hand_take_layers_in_any_form(layers: object) -> None:
    mask = torch.tensor([[True, False], [False, False]])
    groups = HeadGroups(mask, ~mask, None, torch.zeros(2, 2), None, layers)
    assert groups.layers == (0, 1)
    assert groups.pairs("local") == [(0, 0)]


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("layers", [(0,), (0, 1, 2), (0, 0), ("a", "b"), None, "01", (0.5, 1), (-1, 0)])
def test_groups_name_each_of_their_layers_once(layers: object) -> None:
    mask = torch.tensor([[True, False], [False, False]])
    refused(
        lambda: HeadGroups(mask, ~mask, None, torch.zeros(2, 2), None, layers), "layers", error=ResultError
    )


def test_the_table_has_a_row_for_each_head_that_exists() -> None:
    table = example().to_pandas()
    names = ["layer", "head", "span", "receiver_kurtosis", "local", "global", "receiver"]
    assert names == list(table.columns)
    rows = [
        [3, 0, 4.0, 0.0, False, False, False],
        [3, 1, 1.0, 5.0, True, False, True],
        [3, 2, 7.0, NAN, False, True, False],
        [3, 3, 2.0, 2.0, False, False, True],
        [5, 0, 9.0, 8.0, False, True, True],
        [5, 1, 0.5, 1.0, True, False, False],
        [5, 2, 3.0, 1.5, False, False, False],
    ]
    assert str(rows) == str(table.astype(object).to_numpy().tolist())


def test_the_table_without_kurtosis_says_nothing_of_receivers() -> None:
    table = classify_heads(statistics_of([[[1.0, 2.0]]])).to_pandas()
    assert list(table.columns) == ["layer", "head", "span", "local", "global"]


# ---- keeping groups, and using them again ---------------------------------------------------------


@pytest.mark.parametrize("measured", [True, False])
def test_groups_come_back_as_they_were_saved(tmp_path: Path, measured: bool) -> None:
    groups = example() if measured else classify_heads(statistics_of([[[1.0, NAN, 2.0]]]))
    loaded = HeadGroups.load(groups.save(tmp_path / "heads.safetensors"))
    for name in ("local_heads", "global_heads", "receiver_heads", "span", "receiver_kurtosis"):
        expected, actual = getattr(groups, name), getattr(loaded, name)
        assert (expected is None) == (actual is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, equal_nan=True)
    assert (groups.layers, groups.model_name) == (loaded.layers, loaded.model_name)


def test_other_results_are_no_groups(tmp_path: Path) -> None:
    path = statistics_of([[[1.0, 2.0]]]).save(tmp_path / "statistics.safetensors")
    refused(lambda: HeadGroups.load(path), path, "HeadStatistics", "HeadGroups", error=ResultError)


@pytest.mark.parametrize("ours", ["tiny", ""])
@pytest.mark.parametrize("theirs", ["tiny", ""])
def test_groups_fit_another_batch_of_the_model(ours: str, theirs: str) -> None:
    """A model that has no name is given the benefit of the doubt."""
    groups = example(model_name=ours)
    assert groups.check_fits((3, 5), 4, theirs) is None
    assert groups.check_fits((2, 3, 4, 5), 4, theirs) is None, "more layers were measured"
    assert groups.check_fits((3, 5), None, theirs) is None, "the number of heads is not known"


@pytest.mark.parametrize(
    ("layers", "head_count", "model_name", "facts"),
    [
        ((3, 6), 4, "tiny", ["layers 3, 6 of 4 heads"]),
        ((3, 4), 4, "tiny", ["layers 3-4 of 4 heads"]),
        ((3, 5), 6, "tiny", ["layers 3, 5 of 6 heads"]),
        ((3, 5), 4, "large", ["large"]),
        ((3,), 4, "", ["unnamed", "layers 3 of 4 heads"]),
    ],
    ids=["layer numbers", "layers missing", "head count", "model", "layers, no name"],
)
def test_groups_that_do_not_fit_are_refused(
    layers: tuple[int, ...], head_count: int, model_name: str, facts: list[str]
) -> None:
    """The message names both sides."""
    refused(
        lambda: example().check_fits(layers, head_count, model_name),
        "tiny",
        "layers 3, 5 of 4 heads",
        *facts,
        error=ResultError,
    )

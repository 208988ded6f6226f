"""Which heads, in every form that functions accept, and scores of any selection against a float64 mean."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnprobe import (
    HeadGroups,
    HeadSelection,
    HeadStatistics,
    ParameterError,
    ResultError,
    TokenScores,
    score_tokens,
)
from tests.refusals import refused

NAN = math.nan
LAYERS, HEADS = (2, 3, 7), 4
EVERY = [(layer, head) for layer in LAYERS for head in range(HEADS)]
Pair = tuple[int, int]

pairs = st.lists(st.sampled_from(EVERY), min_size=1, max_size=8, unique=True)


def of(value: Any, **options: Any) -> HeadSelection:
    return HeadSelection.of(value, LAYERS, HEADS, **options)


def matrix(weights: dict[Pair, float]) -> list[list[float]]:
    return [[weights.get((layer, head), 0.0) for head in range(HEADS)] for layer in LAYERS]


# ---- every form ------------------------------------------------------------------------------------


@given(chosen=pairs)
def test_heads_may_come_in_any_form(chosen: list[Pair]) -> None:
    """Pairs, masks and dictionaries of the same heads are one selection."""
    marks = [[cell > 0 for cell in row] for row in matrix(dict.fromkeys(chosen, 1.0))]
    by_layer = {layer: [head for i, head in chosen if i == layer] for layer, _ in chosen}
    forms: list[Any] = [
        chosen, tuple(chosen), set(chosen), frozenset(chosen), iter(chosen), [list(pair) for pair in chosen],
        [(np.int64(i), torch.tensor(h)) for i, h in chosen], np.array(chosen), torch.tensor(chosen),
        marks, [list(map(int, row)) for row in marks], [list(map(float, row)) for row in marks],
        np.array(marks), np.array(marks).astype(int), torch.tensor(marks), torch.tensor(marks).int(),
        torch.tensor(marks).float(), tuple(map(tuple, marks)),
        by_layer, {i: torch.tensor(heads) for i, heads in by_layer.items()},
        {np.int64(i): set(heads) for i, heads in by_layer.items()},
        dict.fromkeys(chosen, 1.0), dict.fromkeys(chosen, 1),
        {i: dict.fromkeys(heads, 1.0) for i, heads in by_layer.items()},
        HeadSelection(tuple((*pair, 1.0) for pair in chosen)),
    ]  # fmt: skip
    for form in forms:
        selection = of(form)
        assert selection == of(chosen), form
        assert set(selection) == set(chosen)
        assert not selection.is_weighted


@given(weights=st.dictionaries(st.sampled_from(EVERY), st.floats(0, 100, width=16), min_size=1))
def test_weights_may_come_in_any_form(weights: dict[Pair, float]) -> None:
    """A matrix, a dictionary by pair, a dictionary of dictionaries; heads of weight 0 are not chosen."""
    kept = {pair: weight for pair, weight in weights.items() if weight > 0}
    nested = {i: {head: w for (j, head), w in weights.items() if i == j} for i, _ in weights}
    forms: list[Any] = [weights, nested, matrix(weights), np.array(matrix(weights))]
    forms += [torch.tensor(matrix(weights)), torch.tensor(matrix(weights), dtype=torch.float64)]
    for form in forms:
        if not kept:
            refused(lambda form=form: of(form), "heads", error=ParameterError)
            continue
        selection = of(form)
        assert {(layer, head): weight for layer, head, weight in selection.heads} == kept
        assert selection.is_weighted == (len(set(kept.values())) > 1)


def test_numbers_mean_the_same_heads_in_every_layer() -> None:
    expected = [(layer, head) for layer in LAYERS for head in (0, 3)]
    for form in (
        [0, 3],
        (0, 3),
        {0, 3},
        np.array([0, 3]),
        torch.tensor([0, 3]),
        range(0, 4, 3),
        iter([0, 3]),
    ):
        assert list(of(form)) == expected
    for one in (1, np.int8(1), torch.tensor(1), [1]):
        assert list(of(one)) == [(layer, 1) for layer in LAYERS]
    assert list(of({3: 1})) == [(3, 1)]


def test_all_are_all() -> None:
    assert list(of("all")) == EVERY
    assert list(of({3: "all"})) == [(3, head) for head in range(HEADS)]
    refused(lambda: HeadSelection.of("all", LAYERS, None), "all", error=ParameterError)


def test_a_selection_stands_for_itself() -> None:
    selection = of([(2, 0)])
    assert of(selection) is selection


def test_the_order_of_pairs_is_kept() -> None:
    """The most typical first, in a group."""
    assert list(of([(7, 1), (2, 0), (3, 3)])) == [(7, 1), (2, 0), (3, 3)]


# ---- a selection as a value ------------------------------------------------------------------------


@given(chosen=pairs, order=st.randoms(use_true_random=False))
def test_selections_are_equal_in_any_order(chosen: list[Pair], order: Any) -> None:
    shuffled = list(chosen)
    order.shuffle(shuffled)
    assert of(chosen) == of(shuffled)
    assert hash(of(chosen)) == hash(of(shuffled))
    heavier = of(dict.fromkeys(chosen, 1.0) | {chosen[0]: 2.0})
    assert of(chosen) != heavier
    assert of(chosen) != of([pair for pair in EVERY if pair not in chosen] or [(2, 0)]) or chosen == [(2, 0)]


@pytest.mark.parametrize(
    "other", [None, 5, "all", [(2, 0)], ((2, 0, 1.0),), torch.ones(2), np.ones(2), HeadSelection]
)
def test_a_selection_equals_no_other_thing(other: Any) -> None:
    assert (of([(2, 0)]) == other) is False


@given(chosen=pairs)
def test_a_selection_is_a_collection_of_pairs(chosen: list[Pair]) -> None:
    selection = of(chosen)
    assert len(selection) == len(chosen)
    for pair in EVERY:
        assert (pair in selection) == (pair in chosen)
        assert (list(pair) in selection) == (pair in chosen)
        assert (tuple(np.array(pair)) in selection) == (pair in chosen)
    assert selection.layers == tuple(sorted({layer for layer, _ in chosen}))
    assert selection.by_layer() == {
        layer: tuple(sorted(head for i, head in chosen if i == layer)) for layer in selection.layers
    }
    for other in (None, 2, "20", (2,), (2, 0, 1.0), [[2, 0]], {}, (None, "a")):
        assert other not in selection


@given(weights=st.dictionaries(st.sampled_from(EVERY), st.floats(0.125, 8, width=16), min_size=1))
def test_weights_and_masks_stand_in_their_places(weights: dict[Pair, float]) -> None:
    selection = of(weights)
    assert selection.weights(LAYERS, HEADS).tolist() == matrix(weights)
    assert selection.mask(LAYERS, HEADS).tolist() == [[w > 0 for w in row] for row in matrix(weights)]
    turned = LAYERS[::-1]
    assert selection.weights(turned, HEADS + 1)[:, :HEADS].tolist() == matrix(weights)[::-1]


def test_weights_of_layers_that_there_are_not_are_refused() -> None:
    selection = of([(2, 0), (7, 3)])
    refused(lambda: selection.weights((2, 3), HEADS), "7", "[2, 3]", error=ParameterError)
    refused(lambda: selection.mask(LAYERS, 3), "(7, 3)", "0..2", error=ParameterError)


@pytest.mark.parametrize("chosen", [[(2, 0)], EVERY])
def test_a_selection_shows_itself_in_short(chosen: list[Pair]) -> None:
    shown = repr(of(chosen))
    assert f"{len(chosen)} heads" in shown
    assert "(2, 0)" in shown
    assert len(shown) < 120


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    "heads",
    [None, 5, "all", [(2, 0)], [(2, 0, 0.0)], [(2, 0, -1.0)], [(2, 0, NAN)], [(2, 0, math.inf)],
     [(2, 0, "1")], [(2, 0, True)], [(-1, 0, 1.0)], [(2, -1, 1.0)], [(0.5, 0, 1.0)], [("2", 0, 1.0)],
     [(2, 0, 1.0)] * 2, [5], {(2, 0): 1.0}],
)  # fmt: skip
def test_a_selection_made_by_hand_is_checked(heads: Any) -> None:
    refused(lambda: HeadSelection(heads), error=ParameterError)


@pytest.mark.usefixtures("as_users_call")
def test_a_selection_made_by_hand_may_be_of_lists() -> None:
    selection = HeadSelection([[2, 0, 1], (np.int64(3), 1, np.float32(0.5))])  # type: ignore[list-item]
    assert selection == HeadSelection(((2, 0, 1.0), (3, 1, 0.5)))
    assert hash(selection) == hash(HeadSelection(((3, 1, 0.5), (2, 0, 1.0))))


# ---- what is refused -------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("value", "facts"),
    [
        (None, ["None"]),
        ("local", ["'local'", '"all"']),
        ("", ["''"]),
        (b"all", ["b'all'"]),
        (True, ["True"]),
        (1.5, ["1.5"]),
        (NAN, ["nan"]),
        (object(), ["object"]),
        (HeadSelection, ["HeadSelection"]),
        ([], []),
        ((), []),
        ({}, []),
        (set(), []),
        (torch.zeros(3, 4), []),
        (torch.zeros(3, 4, dtype=torch.bool), []),
        ({2: []}, []),
        ([(2, 4)], ["(2, 4)", "0..3"]),
        ([(2, -1)], ["-1"]),
        ([(4, 0)], ["4", "[2, 3, 7]"]),
        ([(-1, 0)], ["-1"]),
        ([(2,)], ["(2,)"]),
        ([(2, 0, 1)], ["(2, 0, 1)"]),
        ([(2, 0.5)], ["0.5"]),
        ([("2", 0)], ["'2'"]),
        ([(2, True)], ["True"]),
        ([(2, 0), (2, 0)], ["(2, 0)"]),
        ([(2, 0), 3], []),
        ({(2, 0), 3}, []),
        ({"a", 3}, []),
        ([4], ["4", "0..3"]),
        ([-1], ["-1"]),
        ([0.0], ["0.0"]),
        ([True, False], ["True"]),
        (["0"], ["'0'"]),
        (4, ["0..3"]),
        (-1, ["-1"]),
        (torch.ones(2, 4), ["[3, 4]", "[2, 4]"]),
        (torch.ones(3, 5).bool(), ["[3, 4]", "[3, 5]"]),
        (np.ones((4, 3)), ["[3, 4]", "[4, 3]"]),
        (torch.ones(1, 3, 4), []),
        (torch.full((3, 4), 2), ["2"]),
        (torch.full((3, 4), -0.5), ["negative"]),
        (torch.full((3, 4), NAN), ["finite"]),
        (torch.full((3, 4), math.inf), ["finite"]),
        (torch.ones(3, 4).bool()[0], ["True"]),
        ({4: [0]}, ["4", "[2, 3, 7]"]),
        ({2: [4]}, ["(2, 4)"]),
        ({2: [(3, 0)]}, ["2", "3"]),
        ({2: [(2, 0)], 3: [(2, 1)]}, ["2", "3"]),
        ({2: None}, ["None"]),
        ({2: 1.5}, ["1.5"]),
        ({2: "some"}, ["'some'"]),
        ({"2": [0]}, ["'2'"]),
        ({2.0: [0]}, ["2.0"]),
        ({(2, 0): -1.0}, ["(2, 0)", "-1.0"]),
        ({(2, 0): NAN}, ["(2, 0)", "nan"]),
        ({(2, 0): "1"}, ["(2, 0)", "'1'"]),
        ({(2, 0): None}, ["(2, 0)", "None"]),
        ({(2,): 1.0}, ["(2,)"]),
        ({2: {0: "1"}}, ["(2, 0)", "'1'"]),
        ({2: {"0": 1.0}}, ["'0'"]),
        ({2: {9: 1.0}}, ["(2, 9)"]),
    ],
)
def test_what_chooses_no_heads_is_refused(value: Any, facts: list[str]) -> None:
    """The message names the argument, what was wrong, and what there is to choose from."""
    refused(lambda: of(value, name="chosen_heads"), "chosen_heads", *facts, error=ParameterError)


def test_numbers_that_are_pairs_or_a_mask_are_refused() -> None:
    """With two heads a layer, a tensor of 0 and 1 may be either; bools and lists of pairs are not."""
    numbers = torch.tensor([[0, 1], [1, 0]])
    refused(lambda: HeadSelection.of(numbers, (0, 1), 2), "[[0, 1], [1, 0]]", error=ParameterError)
    assert list(HeadSelection.of(numbers.bool(), (0, 1), 2)) == [(0, 1), (1, 0)]
    assert list(HeadSelection.of(numbers.tolist(), (0, 1), 2)) == [(0, 1), (1, 0)]
    assert list(HeadSelection.of(numbers, (0, 1, 2), 2)) == [(0, 1), (1, 0)]


def test_heads_of_another_model_are_refused() -> None:
    selection = of([(2, 0)], model_name="tiny")
    assert of(selection, model_name="tiny") is selection
    assert of(selection) is selection
    refused(lambda: of(selection, model_name="large"), "tiny", "large", error=ParameterError)


# ---- scoring any selection -------------------------------------------------------------------------


def statistics_of(seed: int, missing: Pair | None = None) -> HeadStatistics:
    generator = torch.Generator().manual_seed(seed)
    response = torch.rand(2, 9, generator=generator) < 0.7
    response[:, 0] = True
    shape = (2, len(LAYERS), HEADS, 9)
    waad, fai = (
        torch.rand(shape, generator=generator).masked_fill(~response[:, None, None], NAN) for _ in range(2)
    )
    span = torch.rand(shape[:3], generator=generator)
    if missing is not None:
        for values in (waad, fai, span):
            values[:, LAYERS.index(missing[0]), missing[1]] = NAN
    return HeadStatistics(span, waad, fai, None, None, response, LAYERS, model_name="tiny")


def slow_mean(values: Tensor, weights: dict[Pair, float]) -> Tensor:
    """The weighted mean over heads, in float64, head by head."""
    total, mass = torch.zeros(values.shape[0], values.shape[3], dtype=torch.float64), 0.0
    for (layer, head), weight in weights.items():
        total += weight * values[:, LAYERS.index(layer), head].double()
        mass += weight
    return total / mass


def check(scores: TokenScores, statistics: HeadStatistics, local: Any, remote: Any) -> None:
    for actual, values, weights in (
        (scores.waad, statistics.waad, local),
        (scores.fai, statistics.fai, remote),
    ):
        expected = slow_mean(values, weights)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


weighted = st.dictionaries(st.sampled_from(EVERY), st.floats(0.125, 8, width=16), min_size=1)


@given(seed=st.integers(0, 99), local=weighted, remote=weighted)
def test_scores_are_weighted_means(seed: int, local: dict[Pair, float], remote: dict[Pair, float]) -> None:
    """Of your own heads, with weights as a dictionary or as a matrix; and they say so."""
    statistics = statistics_of(seed)
    for scores in (
        score_tokens(statistics, local_heads=local, global_heads=remote),
        score_tokens(statistics, {"local": matrix(local), "global": torch.tensor(matrix(remote))}),
    ):
        check(scores, statistics, local, remote)
        told = scores.provenance.heads
        assert {(i, h): w for i, h, w in told["local"]} == local
        assert {(i, h): w for i, h, w in told["global"]} == remote


@given(seed=st.integers(0, 99), chosen=pairs)
def test_one_selection_stands_for_both_scores(seed: int, chosen: list[Pair]) -> None:
    statistics, weights = statistics_of(seed), dict.fromkeys(chosen, 1.0)
    for heads in (chosen, of(chosen), weights, torch.tensor(matrix(weights)), matrix(weights)):
        check(score_tokens(statistics, heads), statistics, weights, weights)
    everything = dict.fromkeys(EVERY, 1.0)
    check(score_tokens(statistics, "all"), statistics, everything, everything)


def test_own_heads_take_the_place_of_a_groups() -> None:
    statistics = statistics_of(0)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 1] = True
    groups = HeadGroups(mask, mask.roll(1), None, torch.zeros(3, 4), None, LAYERS, "tiny")
    plain = score_tokens(statistics, groups)
    check(plain, statistics, {(2, 1): 1.0}, {(2, 2): 1.0})
    assert plain.receiver_fai is None
    mixed = score_tokens(statistics, groups, local_heads=[(7, 0)], receiver_heads=[1])
    check(mixed, statistics, {(7, 0): 1.0}, {(2, 2): 1.0})
    assert mixed.receiver_fai is not None
    expected = slow_mean(statistics.fai, {(layer, 1): 1.0 for layer in LAYERS})
    torch.testing.assert_close(mixed.receiver_fai.double(), expected, equal_nan=True)
    for form in (groups.local, groups["local"], groups.local_heads, groups.pairs("local")):
        own = score_tokens(statistics, local_heads=form, global_heads=groups.global_)
        assert own == plain


def test_scores_of_the_same_heads_are_equal_in_any_order() -> None:
    """Whichever head came first: they can be joined."""
    statistics = statistics_of(0)
    ours, theirs = ([(7, 0), (2, 1)], [(2, 1), (7, 0)])
    assert score_tokens(statistics, ours) == score_tokens(statistics, theirs)
    assert TokenScores.concatenate([score_tokens(statistics, heads) for heads in (ours, theirs)])


def test_heads_that_a_layer_does_not_have_are_left_out() -> None:
    """Where layers differ in their number of heads; not all of the scores become NaN for it."""
    statistics = statistics_of(0, missing=(3, 2))
    rest = {pair: 1.0 for pair in EVERY if pair != (3, 2)}
    check(score_tokens(statistics, "all"), statistics, rest, rest)
    weights = {(3, 2): 5.0, (2, 0): 1.0, (2, 1): 3.0}
    check(
        score_tokens(statistics, weights), statistics, {(2, 0): 1.0, (2, 1): 3.0}, {(2, 0): 1.0, (2, 1): 3.0}
    )
    refused(lambda: score_tokens(statistics, [(3, 2)]), "(3, 2)", error=ParameterError)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ({}, ["local", "global"]),
        ({"heads": None}, ["local", "global"]),
        ({"heads": {}}, []),
        ({"local_heads": [(2, 0)]}, ["global"]),
        ({"heads": {"local": [(2, 0)]}}, ["global"]),
        ({"heads": {"global": "all"}}, ["local"]),
        ({"heads": {"local": "all", "globl": "all"}}, ["globl", "local", "global", "receiver"]),
        ({"heads": {"local": "all", "global": [(9, 9)]}}, ["global_heads", "9"]),
        ({"heads": "local"}, ["'local'"]),
        ({"heads": "all", "receiver_heads": [(2, 9)]}, ["receiver_heads", "(2, 9)"]),
        ({"heads": statistics_of(0)}, ["HeadStatistics"]),
        ({"heads": 1.5}, ["1.5"]),
        ({"heads": "all", "align": "tokens"}, ["align", "'tokens'"]),
        ({"heads": "all", "align": None}, ["align", "None"]),
    ],
)
def test_heads_that_cannot_be_scored_are_refused(arguments: dict[str, Any], facts: list[str]) -> None:
    refused(lambda: score_tokens(statistics_of(0), **arguments), *facts, error=ParameterError)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("statistics", [None, "x", torch.ones(1), HeadStatistics, [statistics_of(0)]])
def test_what_is_no_statistics_is_refused(statistics: Any) -> None:
    refused(lambda: score_tokens(statistics, "all"), "statistics", "HeadStatistics", error=ParameterError)


@pytest.mark.parametrize(
    ("layers", "heads", "model_name", "facts"),
    [
        ((2, 3, 8), 4, "tiny", ["layers 2-3, 8", "layers 2-3, 7"]),
        ((2, 3, 7), 5, "tiny", ["5 heads", "4 heads"]),
        ((2, 3, 7), 4, "large", ["large", "tiny"]),
    ],
)
def test_groups_of_something_else_are_refused(
    layers: tuple[int, ...], heads: int, model_name: str, facts: list[str]
) -> None:
    """Of other layers, another number of heads, or another model: both sides are named."""
    mask = torch.zeros(len(layers), heads, dtype=torch.bool)
    mask[0, 0] = True
    groups = HeadGroups(mask, mask.roll(1), None, torch.zeros(mask.shape), None, layers, model_name)
    refused(lambda: score_tokens(statistics_of(0), groups), *facts, error=ResultError)


def test_a_group_of_another_model_is_refused_too() -> None:
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 0] = True
    groups = HeadGroups(mask, mask.roll(1), None, torch.zeros(3, 4), None, LAYERS, "large")
    refused(lambda: score_tokens(statistics_of(0), groups.local), "large", "tiny", error=ParameterError)


@pytest.mark.parametrize("weight", [1e300, 1e-300, 1e31])
def test_weights_that_a_mean_cannot_hold_are_refused(weight: float) -> None:
    """They would be NaN or infinite in float32."""
    with pytest.raises(ParameterError, match="weights"):
        HeadSelection.of({(0, 1): weight, (1, 0): 1.0}, layers=(0, 1), head_count=2)


def test_a_generator_of_heads_serves_both_groups() -> None:
    statistics = statistics_of(3)
    once = score_tokens(statistics, (pair for pair in [(statistics.layers[0], 0)]))
    assert once == score_tokens(statistics, [(statistics.layers[0], 0)])

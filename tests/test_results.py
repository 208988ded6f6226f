"""What every result can do: be selected from, joined, moved, compared, shown, saved, and made a table of.

Each promise is checked for each class by the same code, against plain Python over its tensors.
"""

from __future__ import annotations

import copy
import dataclasses
import html
import itertools
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from attnprobe import (
    GroupMaps,
    HeadGroups,
    HeadStatistics,
    ParameterError,
    Provenance,
    ResultError,
    Rhythm,
    SentenceReceivers,
    TokenBatch,
    TokenScores,
)
from attnprobe.axes import setting_names, tensor_fields
from attnprobe.results import Result
from attnprobe.rhythm import find_rhythm
from tests.refusals import refused

NAN = math.nan
PROVENANCE = Provenance(
    "tiny/llama", (0, 2), 10, (10, None), {"local": ((0, 1, 1.0),), "global": ((2, 0, 0.25), (0, 0, 1.0))}
)

# ---- one result of each class ----------------------------------------------------------------------


def drawn(seed: int) -> Callable[..., Tensor]:
    """A source of random numbers `[*shape]` in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.rand(*shape, generator=generator)


def tokens_of(seed: int, examples: int, tokens: int) -> dict[str, Any]:
    """Ids, texts and a response mask, which has gaps and marks something in every example."""
    random = drawn(seed + 1000)
    response = random(examples, tokens) < 0.7
    response[:, 0] = True
    pieces = ["<script>", " a", "\n", "größer", "", "&amp;", '"', " 😀"]
    return {
        "input_ids": (random(examples, tokens) * 99).long(),
        "texts": tuple(tuple(pieces[(i * 3 + t) % 8] for t in range(tokens)) for i in range(examples)),
        "response_mask": response,
    }


def batch_of(seed: int = 0, examples: int = 4, tokens: int = 6) -> TokenBatch:
    common = tokens_of(seed, examples, tokens)
    real = torch.ones(examples, tokens, dtype=torch.bool)
    segments = (torch.arange(tokens) // 3).expand(examples, -1).clone()
    named = drawn(seed + 2000)(examples, 2, tokens) < 0.5
    return TokenBatch(
        attention_mask=real,
        segment_ids=segments,
        segments=named,
        segment_names=("plan", "answer"),
        **common,
    )


def statistics_of(seed: int = 0, examples: int = 4, tokens: int = 6) -> HeadStatistics:
    random, common = drawn(seed), tokens_of(seed, examples, tokens)
    outside = ~common["response_mask"][:, None, None]
    waad, fai = (random(examples, 2, 3, tokens).masked_fill(outside, NAN) for _ in range(2))
    return HeadStatistics(
        span=random(examples, 2, 3),
        waad=waad,
        fai=fai,
        entropy=random(examples, tokens),
        receiver_kurtosis=random(examples, 2, 3),
        receiver_gini=random(examples, 2, 3),
        layers=(0, 2),
        skipped_layers=(1,),
        horizon=(10, None),
        model_name="tiny/llama",
        receiver_level="token",
        sentence_receivers=SentenceReceivers(),
        segment_ids=torch.zeros(examples, tokens, dtype=torch.long),
        sequence_span=random(examples, 2, 3, 2),
        shares=random(examples, 2, 3, 2, 3),
        share_from=("response", "plan"),
        share_on=("first", "plan", "prompt"),
        span_ignoring=random(examples, 2, 3),
        span_ignores=("first",),
        influence_rows="answer",
        sequence_shares=random(examples, 2, 3, 2, 3, 2),
        sequence_span_ignoring=random(examples, 2, 3, 2),
        **common,
    )


def scores_of(seed: int = 0, examples: int = 4, tokens: int = 6) -> TokenScores:
    random, common = drawn(seed), tokens_of(seed, examples, tokens)
    outside = ~common["response_mask"]
    waad, fai, entropy, receiver = (random(examples, tokens).masked_fill(outside, NAN) for _ in range(4))
    segments = torch.zeros(examples, tokens, dtype=torch.long)
    return TokenScores(
        waad, fai, entropy, receiver_fai=receiver, segment_ids=segments, provenance=PROVENANCE, **common
    )


def rhythm_of(seed: int = 0, examples: int = 4, tokens: int = 6) -> Rhythm:
    random, common = drawn(seed), tokens_of(seed, examples, tokens)
    masks = [random(examples, tokens) < 0.4 for _ in range(4)]
    behind = torch.arange(tokens).expand(examples, -1)
    partner = torch.where(masks[1], behind, -1)
    return Rhythm(
        *masks[:2], partner, *masks[2:], random(examples, tokens), 0.3, 2, provenance=PROVENANCE, **common
    )


def maps_of(seed: int = 0, examples: int = 4, tokens: int = 6) -> GroupMaps:
    random = drawn(seed)
    columns = torch.arange(tokens).expand(examples, -1) + 5
    ids = (random(examples, tokens) * 99).long()
    maps, shares = (random(examples, tokens, tokens) for _ in range(2)), random(4, examples, tokens)
    return GroupMaps(*maps, columns, ids, PROVENANCE, *shares)


def groups_of(seed: int = 0) -> HeadGroups:
    random = drawn(seed)
    local = torch.tensor([[True, False, False], [False, False, False]])
    kurtosis = random(2, 3)
    kurtosis[0, 1] = NAN
    return HeadGroups(
        *(local, local.flip(0, 1), local.roll(1), random(2, 3), kurtosis, (0, 2), "tiny/llama", "sentence"),
        quantile=0.3,
        receiver_gini=random(2, 3),
    )


Maker = Callable[..., Any]
MAKERS: dict[str, Maker] = {
    "TokenBatch": batch_of,
    "HeadStatistics": statistics_of,
    "TokenScores": scores_of,
    "Rhythm": rhythm_of,
    "GroupMaps": maps_of,
}
ALL: dict[str, Maker] = {**MAKERS, "HeadGroups": groups_of}
every_class = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
every_result = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
as_users_call = pytest.mark.usefixtures("as_users_call")


def tensors_of(result: Result) -> dict[str, Tensor]:
    values = {each.name: getattr(result, each.name) for each in tensor_fields(type(result))}
    return {name: value for name, value in values.items() if value is not None}


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors are of one kind and hold the same numbers, NaN being NaN."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    return bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())


def check_same(ours: Result, theirs: Result) -> None:
    """Check two results field by field, without the `==` that is tested itself."""
    assert type(ours) is type(theirs)
    assert tensors_of(ours).keys() == tensors_of(theirs).keys()
    for name, value in tensors_of(ours).items():
        assert same(value, getattr(theirs, name)), name
    for name in setting_names(type(ours)):
        assert getattr(ours, name) == getattr(theirs, name), name


# ---- select ----------------------------------------------------------------------------------------


@st.composite
def selections(draw: st.DrawFn, count: int = 4) -> tuple[Any, list[int]]:
    """Draw examples in any form, with the numbers that are meant."""
    # One 0 or 1 for each example is a mask.
    drawn = st.lists(st.integers(-count, count - 1), min_size=1, max_size=6)
    numbers = draw(
        drawn.filter(lambda found: len(found) != count or not {n % count for n in found} <= {0, 1})
    )
    mask = draw(st.lists(st.booleans(), min_size=count, max_size=count).filter(any))
    first, step = draw(st.integers(-count, count - 1)), draw(st.sampled_from([1, 2, -1]))
    begin = draw(st.integers(0, count - 1))
    end = draw(st.integers(begin + 1, count))
    forms: dict[str, tuple[Any, list[int]]] = {
        "int": (first, [first]),
        "numpy int": (np.int32(first), [first]),
        "0-d tensor": (torch.tensor(first), [first]),
        "0-d array": (np.array(first), [first]),
        "list": (numbers, numbers),
        "tuple": (tuple(numbers), numbers),
        "numpy ints": ([np.int64(number) for number in numbers], numbers),
        "tensors": ([torch.tensor(number) for number in numbers], numbers),
        "tensor": (torch.tensor(numbers), numbers),
        "int8 tensor": (torch.tensor(numbers, dtype=torch.int8), numbers),
        "array": (np.array(numbers), numbers),
        "reversed array": (np.array(numbers)[::-1], numbers[::-1]),
        "unsigned array": (np.array([n % count for n in numbers], dtype=np.uint16), numbers),
        "set": ({n % count for n in numbers}, sorted({n % count for n in numbers})),
        "range": (range(begin, end), list(range(begin, end))),
        "slice": (slice(begin, end), list(range(begin, end))),
        "open slice": (slice(first, None, step), list(range(count))[first:None:step]),
        "bool list": (mask, [i for i in range(count) if mask[i]]),
        "bool tensor": (torch.tensor(mask), [i for i in range(count) if mask[i]]),
        "bool array": (np.array(mask), [i for i in range(count) if mask[i]]),
        "bits": ([int(bit) for bit in mask], [i for i in range(count) if mask[i]]),
        "uint8 tensor": (torch.tensor(mask).to(torch.uint8), [i for i in range(count) if mask[i]]),
    }
    return forms[draw(st.sampled_from(list(forms)))]


@every_class
@given(selection=selections())
def test_selecting_keeps_the_batch_axis_and_all_columns(
    make: Maker, selection: tuple[Any, list[int]]
) -> None:
    """Whatever form the examples come in: each in the order given, as often as given."""
    result = make()
    examples, numbers = selection
    selected = result.select(examples)
    assert type(selected) is type(result)
    for name, value in tensors_of(result).items():
        assert same(torch.stack([value[number] for number in numbers]), getattr(selected, name)), name
    for name in setting_names(type(result)):
        kept = getattr(result, name)
        if name == "texts":
            kept = tuple(kept[number] for number in numbers)
        assert kept == getattr(selected, name), name


@every_class
def test_selecting_leaves_the_result_as_it_was(make: Maker) -> None:
    result = make()
    selected = result.select([0, 1])
    for value in tensors_of(selected).values():
        value.zero_()
    check_same(result, make())


@pytest.mark.parametrize("name", ["TokenBatch", "HeadStatistics", "TokenScores", "Rhythm"])
def test_only_trimming_drops_columns(name: str) -> None:
    """Those behind the last column that any of the chosen examples uses."""
    result = MAKERS[name]()
    used = "attention_mask" if name == "TokenBatch" else "response_mask"
    mask = torch.ones(4, 6, dtype=torch.bool)
    for i, length in enumerate((2, 4, 6, 3)):
        mask[i, length:] = False
    changed: dict[str, Any] = {used: mask, "response_mask": mask}
    if getattr(result, "segment_ids", None) is not None:
        changed["segment_ids"] = None
    if isinstance(result, TokenBatch):
        changed["segments"] = result.segments & mask[:, None]
    result = dataclasses.replace(result, **changed)
    for examples, length in (([0], 2), ([0, 1], 4), ([3, 0], 3), (slice(None), 6)):
        trimmed = result.select(examples, trim=True)
        check_same(trimmed, result.select(examples).at_columns(slice(0, length)))
        by_column = {n: t for n, t in tensors_of(trimmed).items() if not n.startswith("sequence_")}
        assert {t.shape[-1] for t in by_column.values() if t.shape[-1] != 3} <= {length}


WRONG_EXAMPLES = [
    4, -5, 10**6, 2**70, [0, 4], [-5], [2**70], [], (), range(0), slice(2, 2), slice(4, None), slice("a"),
    slice(0, 3, 0), slice(0.0, 1.0), "0", "all", b"0", 0.0, 1.5, NAN, [0.0], [0.5, 1.0], [NAN], None, [None],
    True, False, [True, False], [True] * 5, [False] * 4, [True, 0, 1, True], {}, {"a": 1}, object(), Result,
    torch.tensor([0.0]), torch.tensor([True, False]), torch.zeros(4, dtype=torch.bool),
    torch.ones(2, 2).long(), torch.ones(4, 1).bool(), torch.tensor([]), np.array([0.0]), np.array(["a"]),
    np.array([True] * 3), np.True_, [[0], [1]], ["a"], torch.tensor([4]), 1j, iter([0]),
]  # fmt: skip


@as_users_call
@pytest.mark.parametrize("examples", WRONG_EXAMPLES)
def test_examples_that_there_are_not_are_refused(examples: Any) -> None:
    for make in MAKERS.values():
        refused(lambda make=make: make().select(examples), error=ParameterError)


def test_the_message_says_which_examples_there_are() -> None:
    refused(lambda: scores_of().select(4), "4", "0..3", error=ParameterError)
    refused(lambda: scores_of().select([True, False]), "[4]", error=ParameterError)
    refused(lambda: scores_of().select("two"), "'two'", error=ParameterError)


@as_users_call
@pytest.mark.parametrize("trim", ["yes", 1, None, torch.tensor(True)])
def test_trim_is_true_or_false(trim: Any) -> None:
    refused(lambda: scores_of().select(0, trim=trim), "trim", error=ParameterError)


def test_head_groups_have_no_examples() -> None:
    refused(lambda: groups_of().select(0), "HeadGroups", error=ParameterError)
    refused(lambda: HeadGroups.concatenate([groups_of(), groups_of()]), "HeadGroups", error=ResultError)


# ---- columns ---------------------------------------------------------------------------------------


@every_class
@given(begin=st.integers(-7, 7), end=st.none() | st.integers(-7, 8))
def test_columns_are_cut_as_slices_cut(make: Maker, begin: int, end: int | None) -> None:
    result, columns = make(), slice(begin, end)
    kept = list(range(6))[columns]
    if not kept:
        refused(lambda: result.at_columns(columns), "6", error=ParameterError)
        return
    part = result.at_columns(columns)
    for each in tensor_fields(type(result)):
        value, cut = getattr(result, each.name), getattr(part, each.name)
        for axis, name in enumerate(each.axes):
            if name in ("token", "query", "key"):
                value = value.index_select(axis, torch.tensor(kept))
        if each.name == "anchor_preplan":
            value = torch.where((value >= kept[0]) & (value <= kept[-1]), value - kept[0], -1)
        assert same(value, cut), each.name
    if getattr(result, "texts", None) is not None:
        assert part.texts == tuple(row[columns] for row in result.texts)


@as_users_call
@pytest.mark.parametrize(
    "columns", [3, [0, 1], None, "0:3", slice(0, 4, 2), slice(None, None, -1), slice("a")]
)
def test_what_is_no_run_of_columns_is_refused(columns: Any) -> None:
    for make in ALL.values():
        refused(lambda make=make: make().at_columns(columns), error=ParameterError)


# ---- concatenate -----------------------------------------------------------------------------------


@every_class
@given(borders=st.sets(st.integers(1, 3)))
def test_parts_of_a_result_join_to_the_result(make: Maker, borders: set[int]) -> None:
    result = make()
    cuts = [0, *sorted(borders), 4]
    parts = [result.select(slice(a, b)) for a, b in itertools.pairwise(cuts)]
    for joined in (type(result).concatenate(parts), type(result).concatenate(part for part in parts)):
        check_same(result, joined)
        assert joined == result


NOT_PER_TOKEN = ("span", "receiver_kurtosis", "receiver_gini", "span_ignoring", "shares")


@every_class
@given(shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=4))
def test_shorter_parts_are_padded_on_the_right(make: Maker, shapes: list[tuple[int, int]]) -> None:
    """Each part stands in the whole as it was; behind it nothing is defined and nothing is response."""
    parts = [make(seed, *shape) for seed, shape in enumerate(shapes)]
    joined = type(parts[0]).concatenate(parts)
    width, first = max(tokens for _, tokens in shapes), 0
    for part, (examples, tokens) in zip(parts, shapes, strict=True):
        alone = joined.select(slice(first, first + examples))
        check_same(alone.at_columns(slice(0, tokens)), part)
        if tokens < width:
            behind = alone.at_columns(slice(tokens, None))
            for name, value in tensors_of(behind).items():
                if name.startswith("sequence_") or name in NOT_PER_TOKEN:
                    continue
                if value.is_floating_point():
                    assert bool(value[..., tokens:].isnan().all() if value.ndim == 3 else value.isnan().all())
                elif value.dtype == torch.bool:
                    assert not bool(value.any()), name
            if getattr(behind, "texts", None) is not None:
                assert {text for row in behind.texts for text in row} == {""}
        first += examples


@every_class
def test_one_result_joins_to_itself(make: Maker) -> None:
    result = make()
    check_same(result, type(result).concatenate([result]))
    check_same(result, type(result).concatenate(result))


@every_class
@pytest.mark.usefixtures("as_users_call")
def test_what_cannot_be_joined_is_refused(make: Maker) -> None:
    """Nothing, other things, and results of another class; the message names the class."""
    kind = type(make())
    other = groups_of()
    for parts in ([], (), None, "ab", 5, [None], [make(), None], [make(), other], {"a": make()}, [kind]):
        refused(lambda parts=parts: kind.concatenate(parts), kind.__name__, error=ResultError)


@pytest.mark.parametrize(
    ("name", "ours", "theirs", "facts"),
    [
        ("model_name", "tiny/llama", "tiny/gpt2", ["model_name", "tiny/llama", "tiny/gpt2"]),
        ("layers", (0, 2), (0, 1), ["layers", "(0, 2)", "(0, 1)"]),
        ("skipped_layers", (1,), (), ["skipped_layers", "(1,)"]),
        ("window", 10, 5, ["window", "10", "5"]),
        ("horizon", (10, None), (10, 50), ["horizon", "(10, None)", "(10, 50)"]),
        ("receiver_level", "token", "sentence", ["receiver_level", "token", "sentence"]),
        ("entropy", torch.zeros(4, 6), None, ["entropy", "without"]),
        ("texts", (("a",) * 6,) * 4, None, ["texts", "without"]),
        ("segment_ids", torch.zeros(4, 6).long(), None, ["segment_ids", "without"]),
    ],
)
def test_statistics_of_different_measurements_do_not_join(
    name: str, ours: Any, theirs: Any, facts: list[str]
) -> None:
    parts = [dataclasses.replace(statistics_of(), **{name: value}) for value in (ours, theirs)]
    for pair in (parts, parts[::-1]):
        refused(lambda pair=pair: HeadStatistics.concatenate(pair), *facts, error=ResultError)


def test_statistics_of_different_heads_do_not_join() -> None:
    fewer = statistics_of()
    cut = {name: t[:, :, :2] for name, t in tensors_of(fewer).items() if "head" in axes_of(fewer, name)}
    parts = [statistics_of(), dataclasses.replace(fewer, **cut)]
    refused(lambda: HeadStatistics.concatenate(parts), "head", "3", "2", error=ResultError)


def axes_of(result: Result, name: str) -> tuple[str, ...]:
    return next(each.axes for each in tensor_fields(type(result)) if each.name == name)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"model_name": "tiny/gpt2"}, ["model_name", "tiny/llama", "tiny/gpt2"]),
        ({"layers": (0, 1)}, ["layers", "(0, 2)", "(0, 1)"]),
        ({"window": 5}, ["window", "10", "5"]),
        ({"horizon": (10, 50)}, ["horizon", "(10, None)", "(10, 50)"]),
        ({"heads": {"local": ((0, 2, 1.0),)}}, ["heads", "0, 2, 1.0"]),
        ({"align": "prediction"}, ["align", "token", "prediction"]),
    ],
)
@pytest.mark.parametrize("make", [scores_of, rhythm_of, maps_of])
def test_results_of_different_provenance_do_not_join(
    make: Maker, changes: dict[str, Any], facts: list[str]
) -> None:
    """The message says in what they differ, and both values."""
    other = dataclasses.replace(make(), provenance=dataclasses.replace(PROVENANCE, **changes))
    refused(lambda: type(other).concatenate([make(), other]), "provenance", *facts, error=ResultError)


@pytest.mark.parametrize(("name", "value"), [("quantile", 0.5), ("lookback", 7)])
def test_rhythms_of_different_parameters_do_not_join(name: str, value: Any) -> None:
    parts = [rhythm_of(), dataclasses.replace(rhythm_of(), **{name: value})]
    refused(lambda: Rhythm.concatenate(parts), name, value, error=ResultError)


# ---- to --------------------------------------------------------------------------------------------


@every_result
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cpu:0"])
def test_a_result_moves_to_a_device(make: Maker, device: Any) -> None:
    check_same(make(), make().to(device))


@every_result
@as_users_call
@pytest.mark.parametrize(
    "device",
    ["nonsense", "", "cuda:x", "meta", "hpu", "xla", None, 2.5, [], {}, object(), torch.ones(1), str],
)
def test_what_is_no_device_is_refused(make: Maker, device: Any) -> None:
    """Or one that this machine does not have, or that holds no numbers."""
    refused(lambda: make().to(device), "device", error=ParameterError)


# ---- == --------------------------------------------------------------------------------------------


@every_result
def test_results_are_equal_where_all_their_numbers_and_settings_are(make: Maker) -> None:
    result = make()
    assert result == result
    assert result == make()
    assert (result != make()) is False
    assert result == copy.deepcopy(result)
    assert result == pickle.loads(pickle.dumps(result))


@every_result
def test_results_differ_where_any_number_does(make: Maker) -> None:
    result = make()
    for name, value in tensors_of(result).items():
        changed = value.clone()
        last = (-1,) * value.ndim
        if name == "attention_mask":
            continue
        if value.dtype == torch.bool:
            changed[last] = ~changed[last]
        else:
            changed[last] = 1.5 if bool(changed[last].isnan()) else changed[last] + 1
        assert result != dataclasses.replace(result, **{name: changed}), name
        if value.is_floating_point():
            assert result != dataclasses.replace(result, **{name: value.double()}), name
            assert result != dataclasses.replace(result, **{name: torch.full_like(value, NAN)}), name
    for each in tensor_fields(type(result)):
        if each.optional:
            assert result != dataclasses.replace(result, **{each.name: None})


@every_class
def test_results_of_other_shapes_differ(make: Maker) -> None:
    assert make() != make(examples=3)
    assert make() != make(tokens=5)
    assert make() != make().select([0, 1, 2, 2])


CHANGED_SETTINGS: dict[str, Any] = {
    "texts": None,
    "layers": (5, 6),
    "skipped_layers": (),
    "window": 3,
    "horizon": (1, 2),
    "model_name": "other",
    "receiver_level": None,
    "sentence_receivers": SentenceReceivers(3),
    "selectivity": "gini",
    "quantile": 0.1,
    "lookback": 9,
    "provenance": Provenance(),
    "segment_names": ("answer", "plan"),
    "share_from": ("plan", "response"),
    "share_on": ("plan", "first", "answer"),
    "span_ignores": ("plan",),
    "influence_rows": "plan",
    "value_weighted": True,
}


@every_result
def test_results_differ_where_any_setting_does(make: Maker) -> None:
    result = make()
    for name in setting_names(type(result)):
        assert result != dataclasses.replace(result, **{name: CHANGED_SETTINGS[name]}), name


@every_result
@pytest.mark.parametrize("other", [None, 5, "x", [], object(), torch.ones(2), np.ones(2), Result, {}, NAN])
def test_results_differ_from_everything_else(make: Maker, other: Any) -> None:
    """Comparing never raises, with whatever it is."""
    result = make()
    assert (result == other) is False
    assert (result != other) is True
    assert all(result != made() for made in ALL.values() if made is not make)


@every_result
def test_results_have_no_hash(make: Maker) -> None:
    with pytest.raises(TypeError, match=type(make()).__name__):
        hash(make())


# ---- repr and html ---------------------------------------------------------------------------------


def large(name: str) -> Result:
    """A result of 30 layers, 9 heads and 2000 tokens, with a long model name."""
    model, heads = "organisation/" + "a-long-name-" * 10, tuple((i % 30, i % 9, 0.1) for i in range(80))
    provenance = Provenance(model, tuple(range(0, 60, 2)), 10, (10, 100), {"local": heads, "global": heads})
    if name == "HeadStatistics":
        layers = tuple(range(0, 60, 2))
        sizes = {"batch": 3, "layer": 30, "head": 9, "token": 2000, "sequence": 4, "source": 2, "target": 3}
        small = statistics_of(0, 3, 2000)
        wide = {
            each.name: torch.rand(*(sizes[axis] for axis in each.axes))
            for each in tensor_fields(HeadStatistics)
            if "head" in each.axes
        }
        skipped = tuple(range(1, 60, 2))
        return dataclasses.replace(small, **wide, layers=layers, skipped_layers=skipped, model_name=model)
    if name == "HeadGroups":
        mask = torch.rand(30, 9) < 0.3
        span = torch.rand(30, 9)
        return HeadGroups(mask, ~mask, mask, span, span, tuple(range(0, 60, 2)), model, "token", 0.3)
    result = MAKERS[name](0, 3, 200 if name == "GroupMaps" else 2000)
    return result if name == "TokenBatch" else dataclasses.replace(result, provenance=provenance)


@pytest.mark.parametrize("name", ALL)
def test_a_result_shows_itself_in_a_few_lines(name: str) -> None:
    """A line of settings and one for each tensor, with its sizes; at most 1500 characters."""
    for result in (ALL[name](), large(name)):
        shown = repr(result)
        assert len(shown) <= 1500
        lines = shown.split("\n")
        tensors = tensors_of(result)
        assert len(lines) == 1 + len(tensors)
        assert lines[0].startswith(f"{name}(")
        for (tensor_name, value), line in zip(tensors.items(), lines[1:], strict=True):
            assert tensor_name in line
            assert all(f"={size}" in line for size in value.shape)
            assert str(value.dtype).removeprefix("torch.") in line
        assert str(result) == shown


@pytest.mark.parametrize("name", [name for name in ALL if name != "TokenBatch"])
def test_a_result_says_what_it_was_computed_from(name: str) -> None:
    shown = repr(ALL[name]())
    assert "tiny/llama" in shown
    assert "layers=0, 2" in shown
    if name in ("HeadStatistics", "TokenScores", "Rhythm"):
        assert "horizon=(10, None)" in shown
        assert "window=10" in shown
    if name == "Rhythm":
        assert "quantile=0.3" in shown
        assert "lookback=2" in shown


def test_scores_made_by_hand_show_no_empty_settings() -> None:
    scores = TokenScores(torch.ones(1, 2), torch.ones(1, 2), None, torch.ones(1, 2).bool())
    assert repr(scores).startswith("TokenScores(align=token)\n")


@pytest.mark.parametrize("name", ALL)
def test_a_notebook_shows_a_result_as_a_table(name: str) -> None:
    """With its facts; well formed, and no text of a token is markup."""
    for result in (ALL[name](), large(name)):
        shown = result._repr_html_()
        assert name in shown or "measured" in shown
        if name != "TokenBatch":
            assert result.model_name[:30] in shown if hasattr(result, "model_name") else "layers" in shown
        assert "<script>" not in shown
        assert "&amp;lt;" not in shown, "escaped twice"
        # Nothing that reaches into the rest of a notebook, or that a second display would repeat.
        assert not re.search(r"<style|<link|<svg| (id|class|on\w+)=", shown)
        assert len(shown) < 300_000
        for tag in ("table", "tr", "td", "th", "div", "p", "span"):
            assert shown.count(f"<{tag}>") + shown.count(f"<{tag} ") == shown.count(f"</{tag}>")


def test_a_notebook_shows_the_texts_of_scores() -> None:
    """Escaped, with the score of each response token beside it; five examples at most."""
    scores = scores_of(examples=7)
    shown = scores._repr_html_()
    assert "&lt;script&gt;" in shown
    assert "&amp;amp;" in shown
    assert "2 more" in shown
    assert shown.count("<span") == int(scores.response_mask[:5].sum())
    assert "</script>" not in shown


def test_a_notebook_shows_the_preplans_and_anchors_of_a_rhythm() -> None:
    """As signs before the word, so that they can be seen without colours."""
    texts = ((" a", " <b>", " c", " d"),)
    waad, fai = torch.tensor([[1.0, 4.0, 1.0, 1.0]]), torch.tensor([[0.1, 0.1, 0.6, 0.1]])
    scores = TokenScores(waad, fai, None, torch.ones(1, 4, dtype=torch.bool), texts=texts)
    shown = find_rhythm(scores)._repr_html_()
    words = [html.unescape(part) for part in re.findall(r"<span[^>]*>(.*?)</span>", shown)]
    assert words == [" a", " \u25be<b>", " \u25c6c", " d"]
    assert "column 1: preplan" in shown


def test_of_a_long_answer_a_notebook_shows_the_beginning() -> None:
    waad, mask = torch.rand(1, 3000), torch.ones(1, 3000, dtype=torch.bool)
    scores = TokenScores(waad, waad, None, mask, texts=(("<word> " * 4,) * 3000,))
    shown = scores._repr_html_()
    assert len(shown) < 300_000
    assert re.search(r"and [\d,]+ more tokens", shown)


def test_a_model_name_is_no_markup_either() -> None:
    for make in (statistics_of, groups_of):
        result = dataclasses.replace(make(), model_name="<script>alert(1)</script>")
        assert "<script>" not in result._repr_html_()
    named = Provenance("<script>")
    for make in (scores_of, rhythm_of, maps_of):
        assert "<script>" not in dataclasses.replace(make(), provenance=named)._repr_html_()


@pytest.mark.parametrize("value", [NAN, math.inf, 0.0, -math.inf])
def test_scores_that_are_all_alike_can_be_shown(value: float) -> None:
    scores = dataclasses.replace(scores_of(), waad=torch.full((4, 6), value), fai=torch.full((4, 6), NAN))
    shown = re.sub(r'src="[^"]*"', "", scores._repr_html_())
    assert "nan" not in shown.split("title")[0]


# ---- save and load ---------------------------------------------------------------------------------


@every_result
def test_a_result_comes_back_as_it_was_saved(make: Maker, tmp_path: Path) -> None:
    """Tensors, dtypes, texts, provenance and settings; also without what is optional."""
    result = make()
    optional = {each.name: None for each in tensor_fields(type(result)) if each.optional}
    bare = dataclasses.replace(result, **optional)
    for i, each in enumerate((result, bare)):
        path = tmp_path / f"{i}.safetensors"
        assert each.save(path) == path
        check_same(each, type(result).load(path))
        assert type(result).load(str(path)) == each


@every_class
def test_selected_and_shared_tensors_can_be_saved(make: Maker, tmp_path: Path) -> None:
    part = make().select(slice(1, 3)).at_columns(slice(1, 5))
    assert type(part).load(part.save(tmp_path / "part.safetensors")) == part


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_keep_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {
        name: getattr(scores_of(), name).to(dtype) for name in ("waad", "fai", "entropy", "receiver_fai")
    }
    scores = dataclasses.replace(scores_of(), **values)
    check_same(scores, TokenScores.load(scores.save(tmp_path / "scores.safetensors")))


PATHS = [None, 5, 1.5, b"file", "", [], {}, True, object()]


@every_result
@as_users_call
def test_what_is_no_path_is_refused(make: Maker) -> None:
    for path in PATHS:
        refused(lambda path=path: make().save(path), error=ResultError)
        refused(lambda path=path: type(make()).load(path), error=ResultError)


@every_result
def test_files_that_are_missing_or_folders_are_refused(make: Maker, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "nowhere" / "nothing"):
        refused(lambda path=path: type(make()).load(path), path, error=ResultError)
    refused(lambda: make().save(tmp_path), tmp_path, error=ResultError)
    refused(lambda: make().save(tmp_path / "nowhere" / "file"), tmp_path / "nowhere", error=ResultError)
    assert list(tmp_path.iterdir()) == []


@every_result
def test_files_of_another_class_are_refused(make: Maker, tmp_path: Path) -> None:
    for name, other in ALL.items():
        if other is not make:
            path = other().save(tmp_path / name)
            kind = type(make())
            refused(
                lambda path=path, kind=kind: kind.load(path), path, name, kind.__name__, error=ResultError
            )


@every_result
def test_files_that_were_cut_off_are_refused(make: Maker, tmp_path: Path) -> None:
    path = make().save(tmp_path / "whole.safetensors")
    content, kind = path.read_bytes(), type(make())
    for length in [*range(0, len(content), max(1, len(content) // 40)), len(content) - 1]:
        path.write_bytes(content[:length])
        refused(lambda: kind.load(path), path, error=ResultError)


def saved_parts(result: Result, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what a saved file holds: tensors and header."""
    result.save(path)
    with safe_open(path, framework="pt") as stream:
        header = json.loads(stream.metadata()["attnprobe"])
        return {name: stream.get_tensor(name) for name in stream.keys()}, header  # noqa: SIM118


def rewritten(path: Path, tensors: dict[str, Tensor], header: Any) -> Path:
    written = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(
        written, path, metadata={"attnprobe": header if isinstance(header, str) else json.dumps(header)}
    )
    return path


@every_result
@as_users_call
def test_files_with_the_wrong_tensors_are_refused(make: Maker, tmp_path: Path) -> None:
    """Each missing, of another shape along any axis, with an axis more or less, and of another dtype."""
    path, kind = tmp_path / "file.safetensors", type(make())
    tensors, header = saved_parts(make(), path)
    for each in tensor_fields(kind):
        value = tensors[each.name]
        wrong = [value[None], value[0], value.to(torch.complex64)]
        wrong += [value.bool()] if each.kind != "Bool" else [value.long()]
        wrong += [value.nan_to_num().long(), value.half()] if each.kind == "Float" else [value.float()]
        if kind is not GroupMaps:
            wrong += [value.narrow(axis, 0, value.shape[axis] - 1) for axis in range(value.ndim)]
        for tensor in wrong:
            rewritten(path, tensors | {each.name: tensor}, header)
            refused(lambda: kind.load(path), path, "damaged", each.name, error=ResultError)
        without = {name: tensor for name, tensor in tensors.items() if name != each.name}
        rewritten(path, without, header)
        refused(lambda: kind.load(path), path, "damaged", each.name, error=ResultError)
        if each.optional:
            rewritten(path, without, {name: part for name, part in header.items() if name != "tensors"})
            assert getattr(kind.load(path), each.name) is None


WRONG_SETTINGS: dict[str, list[Any]] = {
    "texts": ["x", 5, [["a"]], [["a", 1]], {"a": 1}],
    "layers": ["x", None, 5, ["0", "2"], [0.5, 2], [], [0], [0, 0], [-1, 0]],
    "skipped_layers": ["x", None, ["1"]],
    "window": ["10", None, [10], 0, -1, 2.5, True],
    "horizon": [[1], "x", None, [None, 5], [5, 1], [1, 2, 3], [-1, 5], ["1", "2"]],
    "model_name": [None, 5, ["x"]],
    "receiver_level": ["word", 5, True],
    "sentence_receivers": ["x", 5, {"min_distance": 0}, {"splitting": "lines"}],
    "selectivity": [None, 5, "entropy"],
    "quantile": ["0.3", [0.3], True],
    "lookback": ["3", None, 2.5],
    "segment_names": ["x", None, 5, ["plan"], ["plan", "plan"], ["plan", "first"], ["plan", ""], [1, 2]],
    "share_from": ["x", None, 5, ["plan"], ["plan", "plan"], ["plan", ""], [1, 2]],
    "share_on": ["x", None, 5, ["plan"], ["plan", "plan", "first"], [1, 2, 3]],
    "span_ignores": ["x", None, 5, ["plan", "plan"], [""], [1]],
    "value_weighted": ["x", None, 1, [True]],
    "influence_rows": [None, 5, "", ["x"]],
    "provenance": [
        None, "x", 5, {"window": "10"}, {"layers": "x"}, {"horizon": [1]}, {"heads": []},
        {"heads": {"local": [[0, 1]]}}, {"align": "sideways"},
    ],
}  # fmt: skip


@every_result
@as_users_call
def test_files_with_the_wrong_settings_are_refused(make: Maker, tmp_path: Path) -> None:
    path, kind = tmp_path / "file.safetensors", type(make())
    tensors, header = saved_parts(make(), path)
    for name in setting_names(kind):
        for value in WRONG_SETTINGS[name]:
            rewritten(path, tensors, header | {"settings": header["settings"] | {name: value}})
            refused(lambda: kind.load(path), path, "damaged", error=ResultError)
        settings = {key: value for key, value in header["settings"].items() if key != name}
        rewritten(path, tensors, header | {"settings": settings})
        if name not in kind._ADDED_LATER:
            refused(lambda: kind.load(path), path, "damaged", name, error=ResultError)
    for wrong in ("not json", "[]", "null", '"HeadStatistics"', '{"kind": ', json.dumps(header)[:-5]):
        refused(lambda wrong=wrong: kind.load(rewritten(path, tensors, wrong)), path, error=ResultError)


@every_result
def test_what_a_later_version_may_add_is_left_aside(make: Maker, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    tensors, header = saved_parts(make(), path)
    later = header | {"settings": header["settings"] | {"later": 1}, "more": True}
    assert type(make()).load(rewritten(path, tensors | {"later": torch.ones(2)}, later)) == make()


# ---- built by hand ---------------------------------------------------------------------------------


@every_result
@as_users_call
def test_tensors_of_the_wrong_kind_or_shape_are_refused(make: Maker) -> None:
    """The message names the field, and what is expected of it."""
    result = make()
    for each in tensor_fields(type(result)):
        value = getattr(result, each.name)
        wrong: list[Any] = [
            "x",
            5,
            value.tolist(),
            value.numpy(),
            value[None],
            value[0],
            value.to(torch.complex64),
        ]
        wrong += [value.bool()] if each.kind != "Bool" else [value.long()]
        wrong += [value.nan_to_num().long()] if each.kind == "Float" else [value.float()]
        wrong += [] if each.optional else [None]
        for part in wrong:
            call = lambda each=each, part=part: dataclasses.replace(result, **{each.name: part})  # noqa: E731
            refused(call, type(result).__name__, each.name)


@every_class
@as_users_call
@pytest.mark.parametrize("axis", ["batch", "token", "query"])
def test_results_of_nothing_are_refused(make: Maker, axis: str) -> None:
    """Without an example or a token there is nothing to select, rank or show."""
    result = make()
    empty = {}
    for each in tensor_fields(type(result)):
        value = getattr(result, each.name)
        for place, name in enumerate(each.axes):
            if name == axis or (axis == "query" and name == "key"):
                value = value.narrow(place, 0, 0)
        empty[each.name] = value
    if any(value.numel() == 0 for value in empty.values()):
        refused(
            lambda: dataclasses.replace(result, **empty, **no_texts(result)), type(result).__name__, "empty"
        )


def no_texts(result: Result) -> dict[str, None]:
    return {"texts": None} if "texts" in setting_names(type(result)) else {}


@as_users_call
@pytest.mark.parametrize("provenance", [None, "tiny", {"model_name": "tiny"}, Provenance])
def test_what_is_no_provenance_is_refused(provenance: Any) -> None:
    for make in (scores_of, rhythm_of, maps_of):
        call = lambda make=make: dataclasses.replace(make(), provenance=provenance)  # noqa: E731
        refused(call, "provenance", "Provenance", error=ResultError)


@pytest.mark.parametrize("example", [4, -5, "0", None, 0.5])
def test_maps_tell_the_columns_of_an_example_that_there_is(example: Any) -> None:
    refused(lambda: maps_of().columns_of(example), "example", repr(example), error=ParameterError)
    assert maps_of().columns_of(-1) == maps_of().columns_of(np.int64(3)) == [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize(
    "layers", [[2], (2,), {2}, 2, np.int64(2), torch.tensor([2]), np.array([2, 2]), range(2, 3)]
)
def test_statistics_of_some_layers(layers: Any) -> None:
    """As if only these had been measured; in any form."""
    result = statistics_of()
    part = result.at_layers(layers)
    assert part.layers == (2,)
    for name, value in tensors_of(result).items():
        assert same(value[:, 1:] if "layer" in axes_of(result, name) else value, getattr(part, name))


@pytest.mark.parametrize("layers", [[1], 5, [0, 9], "last", [], None, [0.0], True, -1, torch.tensor([0.5])])
def test_layers_that_were_not_measured_are_refused(layers: Any) -> None:
    refused(lambda: statistics_of().at_layers(layers), "layers", error=ParameterError)
    refused(lambda: statistics_of().at_layers([0, 9]), "[9]", "[0, 2]", error=ParameterError)


# ---- tables ----------------------------------------------------------------------------------------

COLUMNS = {
    "example", "layer", "head", "position", "key_position", "token_id", "text", "response", "waad", "fai",
    "receiver_fai", "entropy", "span", "receiver_kurtosis", "receiver_gini", "local", "global", "receiver",
    "preplan", "anchor", "dominated", "intro", "anchor_preplan", "local_map", "global_map", "span_ignoring",
    "share_on_first", "share_on_plan", "share_on_prompt", "share_from_plan_on_first",
    "share_from_plan_on_plan", "share_from_plan_on_prompt", "local_prompt_share", "global_prompt_share",
    "local_first_share", "global_first_share",
}  # fmt: skip


@every_result
def test_a_table_of_arrow_is_that_of_pandas(make: Maker) -> None:
    """With the same names everywhere."""
    frame, table = make().to_pandas(), make().to_arrow()
    assert list(frame.columns) == table.column_names
    assert set(table.column_names) <= COLUMNS
    assert frame.equals(table.to_pandas())
    assert len(frame) > 0


@given(seed=st.integers(0, 99), examples=st.integers(1, 4), tokens=st.integers(1, 6))
def test_tables_join_on_example_and_position(seed: int, examples: int, tokens: int) -> None:
    """Statistics, scores and batches: every row finds its token, with the same id and text."""
    shape = (seed, examples, tokens)
    statistics, scores, batch = (make(*shape) for make in (statistics_of, scores_of, batch_of))
    long, lines = statistics.to_pandas(per="token"), scores.to_pandas()
    joined = long.merge(lines, on=["example", "position", "token_id", "text"], suffixes=("_head", ""))
    assert len(joined) == len(long) == 6 * len(lines) == 6 * int(scores.response_mask.sum())
    for row in joined.itertuples():
        layer = statistics.layers.index(row.layer)
        assert row.waad_head == float(statistics.waad[row.example, layer, row.head, row.position])
        assert row.waad == float(scores.waad[row.example, row.position])
        assert row.text == scores.texts[row.example][row.position]
        assert row.token_id == int(scores.input_ids[row.example, row.position])
    responses = batch.to_pandas().query("response")
    assert len(lines.merge(responses, on=["example", "position", "token_id", "text"])) == len(lines)
    heads = statistics.to_pandas()
    assert len(long.merge(heads, on=["example", "layer", "head"])) == len(long)


def test_heads_join_on_layer_and_head() -> None:
    groups = dataclasses.replace(groups_of(), span=torch.rand(2, 3))
    lines = statistics_of().to_pandas()
    assert len(lines.merge(groups.to_pandas(), on=["layer", "head"])) == len(lines)


@every_class
def test_numbers_in_half_precision_and_with_gradients_have_a_table(make: Maker) -> None:
    """Numpy has no bfloat16, and takes no tensor that a gradient hangs on."""
    result = make()
    floats = {n: t for n, t in tensors_of(result).items() if t.is_floating_point()}
    for changed in (
        {name: value.bfloat16() for name, value in floats.items()},
        {name: value.clone().requires_grad_() for name, value in floats.items()},
    ):
        assert len(dataclasses.replace(result, **changed).to_pandas()) == len(result.to_pandas())


@every_result
@pytest.mark.parametrize("call", ["to_pandas", "to_arrow"])
def test_arguments_that_a_table_does_not_take_are_refused(make: Maker, call: str) -> None:
    table = getattr(make(), call)
    name = type(make()).__name__
    refused(lambda: table(nonsense=1), name, "nonsense", error=ParameterError)
    refused(lambda: table(1, 2, 3), name, error=ParameterError)


@as_users_call
def test_the_table_of_statistics_is_per_head_or_per_token() -> None:
    for per in ("heads", None, 1, ["head"]):
        refused(lambda per=per: statistics_of().to_pandas(per=per), "head", "token", error=ParameterError)
    spanless = dataclasses.replace(statistics_of(), span=None)
    refused(spanless.to_pandas, "span", error=ResultError)
    assert len(spanless.to_pandas(per="token")) > 0


def test_the_table_of_maps_has_a_line_for_each_pair_of_tokens() -> None:
    """Of a query and what it may see; not behind the end of a shorter response."""
    short = maps_of(1, 1, 3)
    maps = GroupMaps.concatenate([maps_of(0, 1, 5), short])
    table = maps.to_pandas()
    assert len(table) == 15 + 6
    for row in table.itertuples():
        query, key = row.position - 5, row.key_position - 5
        assert row.local_map == float(maps.local_map[row.example, query, key])
        assert row.token_id == int(maps.input_ids[row.example, query])
        assert row.local_prompt_share == float(maps.local_prompt_share[row.example, query])
        assert row.global_first_share == float(maps.global_first_share[row.example, query])
        assert key <= query
    assert bool(maps.local_first_share[1, 3:].isnan().all())

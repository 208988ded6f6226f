"""The checks of what users hand in: each form of a value gives one form, and what is none is refused."""

from __future__ import annotations

import decimal
import fractions
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnprobe import AttnprobeError, BatchError, ParameterError, ResultError
from attnprobe.validation import (
    as_mask,
    as_tensor,
    brief,
    choice,
    finite,
    instance,
    real_number,
    truth,
    whole_number,
    whole_numbers,
)
from tests.refusals import refused

NAN, INF = math.nan, math.inf


class Unshowable:
    """An object of somebody else, whose repr fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


NO_NUMBERS = [
    "",
    "3",
    b"3",
    None,
    [],
    [3],
    (3,),
    {},
    {3},
    object(),
    int,
    np.add,
    1j,
    Unshowable(),
    torch.ones(1),
]
NO_NUMBERS += [np.ones(2), np.array(["3"]), np.str_("3"), iter([3])]
BOOLS = [True, False, np.True_, np.False_, torch.tensor(True), np.array(False)]


def shown(value: Any) -> str:
    try:
        return repr(value)[:20]
    except RuntimeError:
        return "unshowable"


# ---- whole_number ----------------------------------------------------------------------------------

INTEGERS = [np.int8, np.int32, np.int64, np.uint8, np.uint64, torch.tensor, np.array]


@given(number=st.integers(0, 127), form=st.sampled_from(INTEGERS))
def test_whole_numbers_of_numpy_and_torch_become_ints(number: int, form: Any) -> None:
    """0-d arrays and tensors too; always a Python int."""
    found = whole_number(form(number), "steps")
    assert (type(found), found) == (int, number)


@given(number=st.integers(-(10**30), 10**30), low=st.none() | st.integers(), high=st.none() | st.integers())
def test_whole_numbers_are_within_their_limits(number: int, low: int | None, high: int | None) -> None:
    """Of any size; the message has the name, the number and the limits."""
    inside = (low is None or number >= low) and (high is None or number <= high)
    if inside:
        assert whole_number(number, "steps", minimum=low, maximum=high) == number
    else:
        facts = [limit for limit in (low, high) if limit is not None]
        refused(lambda: whole_number(number, "steps", minimum=low, maximum=high), "steps", number, *facts)


FRACTIONS = [0.5, 2.0, NAN, INF, -INF, np.float64(2.0), np.float32(2.0), torch.tensor(2.0), np.array(2.0)]
FRACTIONS += [fractions.Fraction(2), decimal.Decimal(2)]


@pytest.mark.parametrize("value", [*NO_NUMBERS, *BOOLS, *FRACTIONS])
def test_what_is_no_whole_number_is_refused(value: Any) -> None:
    """A bool is none, nor is 2.0."""
    refused(lambda: whole_number(value, "steps", minimum=1), "steps", "1", error=ParameterError)


def test_zero_is_the_least_unless_told_otherwise() -> None:
    refused(lambda: whole_number(-1, "steps"), "-1")
    assert whole_number(-1, "steps", minimum=None) == -1


# ---- real_number -----------------------------------------------------------------------------------

REALS = [
    float,
    np.float16,
    np.float32,
    np.float64,
    torch.tensor,
    np.array,
    fractions.Fraction,
    decimal.Decimal,
]


@given(number=st.floats(-100, 100, width=16), form=st.sampled_from(REALS))
def test_numbers_of_any_kind_become_floats(number: float, form: Any) -> None:
    found = real_number(form(number), "share")
    assert (type(found), found) == (float, number)


@given(
    number=st.floats() | st.integers(),
    low=st.integers(-3, 3),
    high=st.integers(-3, 3),
    case=st.integers(0, 3),
)
def test_numbers_are_within_their_limits(number: float, low: int, high: int, case: int) -> None:
    """Above or at least, below or at most; NaN is within none."""
    options: dict[str, Any] = {
        "above" if case & 1 else "minimum": low,
        "below" if case & 2 else "maximum": high,
    }
    inside = (number > low if case & 1 else number >= low) and (number < high if case & 2 else number <= high)
    if inside:
        assert real_number(number, "share", **options) == number
    else:
        refused(lambda: real_number(number, "share", **options), "share", low, high, error=ParameterError)


def test_a_number_without_limits_may_be_infinite_but_is_some_number() -> None:
    assert real_number(INF, "share") == INF
    assert real_number(10**400 // 10**390, "share") == 1e10
    refused(lambda: real_number(NAN, "share"), "share", "nan")
    refused(lambda: real_number(10**400, "share"), "share")


@pytest.mark.parametrize("value", [*NO_NUMBERS, *BOOLS])
def test_what_is_no_number_is_refused(value: Any) -> None:
    refused(lambda: real_number(value, "share", above=0), "share", "0", error=ParameterError)


# ---- choice, truth, instance -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["tokens", "", "TOKEN", None, 0, True, ["token"], {}, np.array(["token"]), str]
)
def test_what_is_no_choice_is_refused(value: Any) -> None:
    options = ("token", "prediction", "both")
    refused(lambda: choice(value, "align", options), "align", *options, error=ParameterError)


def test_a_choice_is_returned() -> None:
    assert choice("token", "align", ("token", "prediction")) == "token"
    assert choice(np.str_("token"), "align", ["token"]) == "token"


def test_true_and_false_are_truths() -> None:
    for value in (True, np.True_, False, np.False_):
        assert truth(value, "span") is bool(value)


@pytest.mark.parametrize("value", [0, 1, "True", "", None, [], torch.tensor(True), np.array([True]), 1.0])
def test_other_values_are_no_truths(value: Any) -> None:
    refused(lambda: truth(value, "span"), "span", "True", "False", error=ParameterError)


@pytest.mark.parametrize("value", [*NO_NUMBERS, *BOOLS, *FRACTIONS])
def test_what_is_of_another_class_is_refused(value: Any) -> None:
    """The message says what is expected, where one comes from, and what came."""
    if not isinstance(value, dict):
        refused(
            lambda: instance(value, dict, "batch", "a tokenizer gives one"), "batch", "dict", "a tokenizer"
        )


def test_what_is_of_the_class_is_returned() -> None:
    value = [1]
    assert instance(value, list, "rows") is value


# ---- as_tensor and finite --------------------------------------------------------------------------


@given(rows=st.lists(st.lists(st.integers(-99, 99), min_size=2, max_size=2), min_size=1, max_size=3))
def test_arrays_and_lists_become_tensors(rows: list[list[int]]) -> None:
    array = np.array(rows)
    forms = [
        rows,
        tuple(map(tuple, rows)),
        array,
        array.astype(np.int16),
        torch.tensor(rows),
        array.T.copy().T,
    ]
    forms += [[torch.tensor(row) for row in rows], [np.array(row) for row in rows]]
    forms += [array[::-1].copy()[::-1], array[:, ::-1].copy()[:, ::-1], np.asfortranarray(array)]
    for form in forms:
        assert as_tensor(form, "ids").tolist() == rows


@pytest.mark.parametrize(
    "value",
    ["", "12", b"12", None, {}, {1: 2}, {1, 2}, object(), int, ["a"], [None], [[1], [1, 2]], [1, [2]],
     [2**70], np.array(["a"]), np.array([None]), [torch.ones(1), torch.ones(2)],
     np.add, iter([1]), Unshowable()],
)  # fmt: skip
def test_what_is_no_tensor_is_refused(value: Any) -> None:
    refused(lambda: as_tensor(value, "ids"), "ids", error=ParameterError)


@pytest.mark.parametrize(
    "value", [torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta"), torch.ones(2).to("meta")[0]]
)
def test_tensors_without_plain_numbers_are_refused(value: torch.Tensor) -> None:
    """Sparse ones, and those of the device that holds no numbers."""
    refused(lambda: as_tensor(value, "ids"), "ids", "dense", error=ParameterError)
    assert brief(value)


def test_a_tensor_is_returned_as_it_is() -> None:
    value = torch.ones(2)
    assert as_tensor(value, "ids") is value


@given(where=st.tuples(st.integers(0, 2), st.integers(0, 3)), value=st.sampled_from([NAN, INF, -INF]))
def test_the_first_number_that_is_none_is_named(where: tuple[int, int], value: float) -> None:
    values = torch.zeros(3, 4)
    assert finite(values, "rewards", "example, token") is values
    values[where] = value
    values[2, 3] = NAN if where != (2, 3) else value
    refused(lambda: finite(values, "rewards", "example, token"), "rewards", value, list(where))


# ---- as_mask ---------------------------------------------------------------------------------------


@given(
    rows=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=3),
    dtype=st.sampled_from([bool, int, float, np.uint8, np.uint16, np.uint32, np.float16]),
)
def test_masks_of_any_form_become_bools(rows: list[list[bool]], dtype: Any) -> None:
    array = np.array(rows).astype(dtype)
    for form in (array, array.tolist(), torch.as_tensor(array), array[:, ::-1].copy()[:, ::-1]):
        mask = as_mask(form, "mask", (len(rows), 3))
        assert (mask.dtype, mask.tolist()) == (torch.bool, rows)


@pytest.mark.parametrize("value", [2, -1, 0.5, NAN, INF, 255, 1e-9])
def test_a_mask_holds_zero_and_one_only(value: float) -> None:
    refused(lambda: as_mask([[1, value, 0]], "mask"), "mask", "0 and 1", error=ParameterError)
    refused(lambda: as_mask(torch.tensor([[0.0, value]]), "mask"), "mask", error=ParameterError)


def test_a_mask_has_its_shape() -> None:
    """A missing axis of size 1 is added; the message has both shapes."""
    assert as_mask([1, 0], "mask", (1, 2)).shape == (1, 2)
    for value in ([1, 0], [[1], [0]], [[[1, 0]], [[1, 0]]], 1):
        refused(lambda value=value: as_mask(value, "mask", (2, 2)), "mask", "[2, 2]", "example, token")
    refused(lambda: as_mask([1], "keys", (2,), axes="key"), "keys", "[2]", "key")


@pytest.mark.parametrize("value", ["10", None, {}, object(), [["a"]], [[1], [1, 0]]])
def test_what_is_no_mask_is_refused(value: Any) -> None:
    refused(lambda: as_mask(value, "mask", (1, 2)), "mask", error=ParameterError)


# ---- whole_numbers ---------------------------------------------------------------------------------


@given(numbers=st.lists(st.integers(0, 99), min_size=1, max_size=5))
def test_one_or_more_whole_numbers_become_a_list(numbers: list[int]) -> None:
    forms = [numbers, tuple(numbers), np.array(numbers), torch.tensor(numbers), (n for n in numbers)]
    forms += [
        [np.uint8(n) for n in numbers],
        [torch.tensor(n) for n in numbers],
        np.array(numbers)[::-1][::-1],
    ]
    for form in forms:
        found = whole_numbers(form, "layers")
        assert (found, {type(number) for number in found}) == (numbers, {int})
    assert sorted(whole_numbers(set(numbers), "layers")) == sorted(set(numbers))
    for single in (numbers[0], np.int64(numbers[0]), torch.tensor(numbers[0]), np.array(numbers[0])):
        assert whole_numbers(single, "layers") == numbers[:1]
    assert whole_numbers(range(2, 5), "layers") == [2, 3, 4]


NO_LISTS = [
    "",
    "all",
    b"01",
    None,
    0.5,
    True,
    {},
    {0: 1},
    [],
    (),
    range(0),
    [0.0],
    [True],
    ["0"],
    [None],
    [[0]],
]
NO_LISTS += [
    torch.tensor([]),
    torch.tensor([0.5]),
    torch.tensor([[0]]),
    torch.tensor([True]),
    np.array([0.5]),
]
NO_LISTS += [
    torch.tensor(True),
    np.float64(1.0),
    object(),
    np.add,
    [-1],
    [100],
    -1,
    100,
    torch.tensor([7, 100]),
]


@pytest.mark.parametrize("value", NO_LISTS)
def test_what_is_no_list_of_whole_numbers_is_refused(value: Any) -> None:
    refused(lambda: whole_numbers(value, "layers", maximum=99), "layers", error=ParameterError)


# ---- what messages are made of ---------------------------------------------------------------------


@pytest.mark.parametrize("value", [*NO_NUMBERS, *BOOLS, *FRACTIONS, "x" * 999, "a\nb", [0] * 999])
def test_any_value_can_be_shown_in_short(value: Any) -> None:
    """On one line."""
    text = brief(value)
    assert 0 < len(text) <= 80
    assert "\n" not in text


def test_tensors_and_arrays_show_their_dtype_and_shape() -> None:
    for value in (torch.zeros(2, 3), np.zeros((2, 3), dtype=np.float32)):
        assert "float32" in brief(value)
        assert "[2, 3]" in brief(value)
    assert "7" in brief(torch.tensor(7))


@pytest.mark.parametrize("error", [BatchError, ResultError])
def test_each_check_raises_the_error_that_its_caller_wants(error: type[AttnprobeError]) -> None:
    for call in (
        lambda: whole_number("x", "steps", error=error),
        lambda: whole_numbers("x", "steps", error=error),
        lambda: real_number("x", "share", error=error),
        lambda: choice("x", "align", ("token",), error),
        lambda: truth("x", "span", error),
        lambda: instance("x", int, "count", error=error),
        lambda: as_tensor("x", "ids", error),
        lambda: as_mask([2], "mask", error=error),
        lambda: finite(torch.tensor([NAN]), "rewards", "token", error),
    ):
        refused(call, error=error)

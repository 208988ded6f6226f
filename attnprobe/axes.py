"""The named axes of results: reading them from annotations, and what selecting, joining and comparing need.

`Result` calls these for every result class. What is left to others: what a result can do (results).
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_type_hints

import torch
from torch import Tensor

from attnprobe.errors import ParameterError
from attnprobe.validation import as_tensor, brief, whole_number

COLUMN_AXES = ("token", "query", "key")
"""The axes that are columns of the batch."""

PADDED_AXES = (*COLUMN_AXES, "sequence")
"""The axes along which examples differ in length: they are padded on the right when results are joined."""


@dataclass(frozen=True)
class TensorField:
    """A tensor field of a result: its name, kind of numbers and axes, and whether it may be None."""

    name: str
    kind: str
    axes: tuple[str, ...]
    optional: bool


def tensor_fields(kind: Any) -> tuple[TensorField, ...]:
    """Return the tensor fields of a result class, according to their annotations."""
    return _tensor_fields(kind)


@lru_cache(maxsize=64)
def _tensor_fields(kind: Any) -> tuple[TensorField, ...]:
    found = []
    for each in dataclasses.fields(kind):
        match = re.match(r"(Float|Int|Bool)\[Tensor, [\"']([^\"']*)[\"']\]( \| None)?$", str(each.type))
        if match:
            found.append(TensorField(each.name, match[1], tuple(match[2].split()), bool(match[3])))
    return tuple(found)


def setting_names(kind: Any) -> tuple[str, ...]:
    """Return the names of a result's fields that are not tensors, but for those that its class handles."""
    handled = {each.name for each in tensor_fields(kind)}
    handled |= {each.name for each in dataclasses.fields(kind) if each.metadata.get("handled_by_class")}
    return tuple(each.name for each in dataclasses.fields(kind) if each.name not in handled)


def setting_types(kind: Any) -> dict[str, Any]:
    """Return the types of a result's settings, for loading."""
    hints = get_type_hints(kind)
    return {name: hints[name] for name in setting_names(kind)}


def example_indices(examples: Any, count: int) -> list[int]:
    """Return the numbers of the examples that a number, list, slice or mask selects from `count`.

    One 0 or 1 for each of more than two examples is a mask, as everywhere in the library, and not a list of
    the numbers 0 and 1 over and over.

    >>> example_indices(slice(1, None), 3), example_indices([True, False, True], 3), example_indices(-1, 3)
    ([1, 2], [0, 2], [2])
    """
    expected = f"examples must be a number, a list of numbers, a slice or a mask of {count}"
    if isinstance(examples, slice):
        try:
            chosen = list(range(count))[examples]
        except (TypeError, ValueError) as error:
            raise ParameterError(f"{expected}; got {examples}") from error
        if not chosen:
            raise ParameterError(f"{examples} chooses none of {count} examples")
        return chosen
    is_mixed = isinstance(examples, list | tuple) and len({isinstance(each, bool) for each in examples}) > 1
    if isinstance(examples, str | bytes | bool | float) or examples is None or is_mixed:
        raise ParameterError(f"{expected}; got {brief(examples)}")
    try:
        numbers = as_tensor(list(examples) if isinstance(examples, set) else examples, "examples")
    except ParameterError:
        try:
            numbers = torch.tensor(whole_number(examples, "examples", minimum=-count, maximum=count - 1))
        except ParameterError as error:
            raise ParameterError(f"{expected}; got {brief(examples)}") from error
    if numbers.is_floating_point() or numbers.is_complex() or numbers.ndim > 1 or numbers.numel() == 0:
        raise ParameterError(f"{expected}; got {brief(examples)}")
    bits = numbers.shape == (count,) and count > 2 and bool(((numbers == 0) | (numbers == 1)).all())
    if numbers.dtype == torch.bool or bits:
        numbers = numbers.bool()
        if numbers.shape != (count,) or not bool(numbers.any()):
            raise ParameterError(
                f"a mask of examples must be [{count}] and choose at least one; got {brief(examples)}"
            )
        return numbers.nonzero()[:, 0].tolist()
    listed = numbers.reshape(-1).tolist()
    wrong = [number for number in listed if not -count <= number < count]
    if wrong:
        raise ParameterError(f"there are examples 0..{count - 1}, not {wrong}")
    return [number % count for number in listed]


def check_columns(columns: Any, count: int) -> None:
    """Check that columns are a slice of neighbouring ones that chooses some of `count`.

    Raises:
        ParameterError: they are not.
    """
    expected = "columns must be a slice without step, such as slice(8, None)"
    if not isinstance(columns, slice):
        raise ParameterError(f"{expected}; got {brief(columns)}")
    try:
        first, stop, step = columns.indices(count)
    except (TypeError, ValueError) as error:
        raise ParameterError(f"{expected}; got {columns}") from error
    if step != 1:
        raise ParameterError(f"{expected}; got {columns}")
    if stop <= first:
        raise ParameterError(f"{columns} chooses none of {count} columns")


def is_kind(value: Tensor, kind: str) -> bool:
    """Return whether a tensor is of a kind: "Float", "Int" or "Bool"."""
    if kind == "Bool":
        return value.dtype == torch.bool
    if kind == "Float":
        return value.is_floating_point()
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def padded(value: Tensor, axis: int, width: int, fill: Any) -> Tensor:
    """Return a tensor with one axis padded to a width, on the right."""
    missing = width - value.shape[axis]
    if missing == 0:
        return value
    behind = [0, 0] * (value.ndim - 1 - axis) + [0, missing]
    return torch.nn.functional.pad(value, behind, value=fill)


def fixed_sizes(each: TensorField, value: Tensor) -> dict[str, int]:
    """Return the sizes of the axes that must agree when results are joined."""
    pairs = zip(each.axes, value.shape, strict=True)
    return {axis: size for axis, size in pairs if axis not in ("batch", *PADDED_AXES)}


def equal_tensors(ours: Tensor | None, theirs: Tensor | None) -> bool:
    """Return whether two tensors hold the same values, on any device; NaN equals NaN."""
    if ours is None or theirs is None:
        return ours is theirs
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    ours, theirs = ours.cpu(), theirs.cpu()
    return bool(((ours == theirs) | ((ours != ours) & (theirs != theirs))).all())

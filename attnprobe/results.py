"""Result: what every result of the library can do.

A result is a frozen dataclass of settings and of tensors with named axes. A tensor's annotation names its
axes (`Float[Tensor, "batch layer head"]`), and everything here follows from that: the same code checks
results when they are made, selects and joins them along their examples, moves, compares, shows, saves and
loads them, and turns them into tables. TokenBatch, HeadStatistics, HeadGroups, TokenScores, Rhythm, GroupMaps
and Couplings are results. What is left to others: what the numbers mean (their own modules).
"""

from __future__ import annotations

import dataclasses
import html
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from attnprobe.axes import (
    COLUMN_AXES,
    PADDED_AXES,
    TensorField,
    check_columns,
    equal_tensors,
    example_indices,
    fixed_sizes,
    is_kind,
    padded,
    setting_names,
    setting_types,
    tensor_fields,
)
from attnprobe.errors import AttnprobeError, ParameterError, ResultError
from attnprobe.provenance import Provenance, ranges
from attnprobe.storage import PathLike, import_pandas, import_pyarrow, load_result, save_result
from attnprobe.validation import brief, instance, truth, whole_numbers

if TYPE_CHECKING:
    import pandas
    import pyarrow

# Not typing.Self, which run-time type checkers refuse in a method.
ResultT = TypeVar("ResultT", bound="Result")

_KINDS = {"Float": "floating point", "Int": "whole numbers", "Bool": "bool"}


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """Base of all results; subclass it as a frozen dataclass with `eq=False, repr=False`.

    Axes of the same name have the same size in all tensors of a result, and the tensors are on one device.
    `batch` is the axis of examples; results without it (head groups) cannot be selected from or joined.
    """

    _FILL: ClassVar[dict[str, Any]] = {}
    """What `concatenate` pads a field with, if not with NaN, False or -1."""
    _PER_EXAMPLE: ClassVar[tuple[str, ...]] = ("texts",)
    """The settings with an entry for each example, in the order of the batch axis."""
    _ADDED_LATER: ClassVar[dict[str, Any]] = {}
    """The settings that files of older versions lack, each with what it was then."""

    def __post_init__(self) -> None:
        """Check that tensors have the right dtype and that their shapes agree."""
        self._check()

    def _check(self, error: type[AttnprobeError] = ResultError) -> None:
        sizes: dict[str, tuple[int, str]] = {}
        for each in tensor_fields(type(self)):
            value = getattr(self, each.name)
            if value is None and each.optional:
                continue
            if not isinstance(value, Tensor) or not is_kind(value, each.kind):
                raise error(
                    f"{each.name} of {type(self).__name__} must be a tensor of {_KINDS[each.kind]}, "
                    f"[{', '.join(each.axes)}]; got {brief(value)}"
                )
            if value.ndim != len(each.axes):
                raise error(
                    f"{each.name} of {type(self).__name__} must be [{', '.join(each.axes)}]; "
                    f"got {list(value.shape)}"
                )
            if value.numel() == 0:
                raise error(f"{each.name} of {type(self).__name__} is empty: it is {list(value.shape)}")
            for axis, size in zip(each.axes, value.shape, strict=True):
                known, owner = sizes.setdefault(axis, (size, each.name))
                if size != known:
                    shapes = {f.name: list(t.shape) for f, t in self._tensors()}
                    raise error(
                        f"{type(self).__name__} must have a single size for its axis {axis}, but {owner} has "
                        f"{known} and {each.name} has {size}: {shapes}"
                    )
        if "provenance" in setting_names(type(self)):
            instance(getattr(self, "provenance"), Provenance, "provenance", error=error)  # noqa: B009
        for name in self._PER_EXAMPLE:
            of_examples = getattr(self, name, None)
            if of_examples is not None and "batch" in sizes:
                self._check_per_example(name, of_examples, sizes, error)

    def _check_per_example(
        self, name: str, entries: Any, sizes: dict[str, tuple[int, str]], error: type[AttnprobeError]
    ) -> None:
        examples, tokens = sizes["batch"][0], sizes.get("token", (None, ""))[0]
        lengths = [len(entry) for entry in entries] if isinstance(entries, tuple) else None
        if lengths is None or len(lengths) != examples or any(length != tokens for length in lengths):
            found = brief(entries) if lengths is None else f"{len(lengths)} of {sorted(set(lengths))}"
            raise error(
                f"{name} of {type(self).__name__} must hold a tuple for each of {examples} examples, each of "
                f"{tokens} tokens; got {found}"
            )

    def _tensors(self) -> list[tuple[TensorField, Tensor]]:
        """Return the tensor fields that are not None, each with its value."""
        pairs = ((each, getattr(self, each.name, None)) for each in tensor_fields(type(self)))
        return [(each, value) for each, value in pairs if isinstance(value, Tensor)]

    # ---- selecting, joining, moving, comparing --------------------------------------------------

    def select(self: ResultT, examples: Any, *, trim: bool = False) -> ResultT:
        """Return some of the examples, in the order given; the batch axis is kept.

        Args:
            examples: a number, a list of numbers, a slice, or a mask `[batch]` of True and False (or, for
                more than two examples, of 0 and 1).
            trim: whether to drop the columns after the last one that any selected example uses; without it,
                columns stay where they are, so that the same selection from several results still fits
                together.

        Raises:
            ParameterError: examples that do not exist, or a selection of none.
        """
        sizes = {axis: size for f, t in self._tensors() for axis, size in zip(f.axes, t.shape, strict=True)}
        if "batch" not in sizes:
            raise ParameterError(f"{type(self).__name__} has no examples to select from")
        chosen = example_indices(examples, sizes["batch"])
        truth(trim, "trim")
        changed: dict[str, Any] = {}
        for each, value in self._tensors():
            axis = each.axes.index("batch")
            changed[each.name] = value.index_select(axis, torch.tensor(chosen, device=value.device))
        for name in self._PER_EXAMPLE:
            if getattr(self, name, None) is not None:
                changed[name] = tuple(getattr(self, name)[example] for example in chosen)
        selected = dataclasses.replace(self, **changed)
        if not trim:
            return selected
        used = selected._used().any(0).nonzero()[:, 0]
        return selected.at_columns(slice(0, int(used.max()) + 1 if len(used) else 1))

    def at_columns(self: ResultT, columns: Any) -> ResultT:
        """Return the result with some of its columns: `at_columns(slice(8, None))` drops the first 8.

        Raises:
            ParameterError: anything but a slice, a slice with a step, or one that chooses no column.
        """
        count = max(
            (t.shape[i] for f, t in self._tensors() for i, a in enumerate(f.axes) if a in COLUMN_AXES),
            default=0,
        )
        check_columns(columns, count)
        changed: dict[str, Any] = {}
        for each, value in self._tensors():
            index = tuple(columns if axis in COLUMN_AXES else slice(None) for axis in each.axes)
            changed[each.name] = value[index]
        for name in self._PER_EXAMPLE:
            if getattr(self, name, None) is not None:
                changed[name] = tuple(entry[columns] for entry in getattr(self, name))
        return dataclasses.replace(self, **changed)

    def _used(self) -> Tensor:
        """Return which columns each example uses, `[batch, token]`."""
        mask: Tensor = getattr(self, "response_mask")  # noqa: B009
        return mask

    @classmethod
    def concatenate(cls: type[ResultT], parts: Any) -> ResultT:
        """Join results along their examples; shorter ones are padded on the right.

        Raises:
            ResultError: nothing to join, or parts whose models, layers or settings differ.
        """
        parts = list(parts) if isinstance(parts, Iterable) else [parts]
        if not parts:
            raise ResultError(f"there is no {cls.__name__} to join")
        for part in parts:
            instance(part, cls, f"each part to join as {cls.__name__}", error=ResultError)
        first: ResultT = parts[0]
        cls._check_joins(parts)
        joined: dict[str, Any] = {}
        for each, value in first._tensors():
            fill = cls._FILL.get(each.name, {"Float": torch.nan, "Bool": False, "Int": -1}[each.kind])
            values = [getattr(part, each.name).to(value.device) for part in parts]
            for axis, name in enumerate(each.axes):
                if name in PADDED_AXES:
                    width = max(part.shape[axis] for part in values)
                    values = [padded(part, axis, width, fill) for part in values]
            joined[each.name] = torch.cat(values, dim=each.axes.index("batch"))
        for name in cls._PER_EXAMPLE:
            if getattr(first, name, None) is not None:
                width = max(len(entry) for part in parts for entry in getattr(part, name))
                joined[name] = tuple(
                    (*entry, *[""] * (width - len(entry))) for part in parts for entry in getattr(part, name)
                )
        return dataclasses.replace(first, **joined)

    @classmethod
    def _check_joins(cls, parts: Sequence[Any]) -> None:
        first = parts[0]
        if not any("batch" in each.axes for each, _ in first._tensors()):
            raise ResultError(f"{cls.__name__} has no examples to join")
        fixed = {each.name: fixed_sizes(each, value) for each, value in first._tensors()}
        for part in parts[1:]:
            for name in setting_names(cls):
                ours, theirs = getattr(first, name), getattr(part, name)
                if name in cls._PER_EXAMPLE:
                    if (ours is None) != (theirs is None):
                        raise ResultError(f"{cls.__name__} results cannot be joined with and without {name}")
                elif ours != theirs:
                    what, ours, theirs = _difference(name, ours, theirs)
                    raise ResultError(
                        f"{cls.__name__} results cannot be joined if their {what} differ: {brief(ours)} and "
                        f"{brief(theirs)}"
                    )
            found = {each.name: fixed_sizes(each, value) for each, value in part._tensors()}
            for name in fixed.keys() ^ found.keys():
                raise ResultError(f"{cls.__name__} results cannot be joined with and without {name}")
            for name, sizes in fixed.items():
                if found[name] != sizes:
                    raise ResultError(
                        f"{cls.__name__} results cannot be joined if the sizes of their {name} differ: "
                        f"{sizes} and {found[name]}"
                    )

    def to(self: ResultT, device: Any) -> ResultT:
        """Return the result with its tensors on a device.

        Raises:
            ParameterError: something that is not a device.
        """
        try:
            place = torch.device(device)
            if place.type == "meta":
                raise RuntimeError("it holds no numbers")
            moved = {each.name: value.to(place) for each, value in self._tensors()}
        except (RuntimeError, TypeError, AssertionError, ImportError) as error:
            raise ParameterError(f"cannot move to the device {brief(device)}: {error}") from error
        return dataclasses.replace(self, **moved)

    def __eq__(self, other: object) -> bool:
        """Whether two results hold the same numbers and settings, on any device; NaN equals NaN."""
        # Not NotImplemented: arrays would then compare element by element.
        if type(other) is not type(self):
            return False
        names = setting_names(type(self))
        if any(getattr(self, name) != getattr(other, name) for name in names):
            return False
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in tensor_fields(type(self)))
        return all(equal_tensors(ours, theirs) for ours, theirs in pairs)

    def __hash__(self) -> int:
        raise TypeError(f"{type(self).__name__} holds tensors and cannot be hashed: use id() or a name")

    # ---- showing --------------------------------------------------------------------------------

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}({self._headline()})"]
        for each, value in self._tensors():
            sizes = ", ".join(f"{a}={s}" for a, s in zip(each.axes, value.shape, strict=True))
            lines.append(f"  {each.name}: {str(value.dtype).removeprefix('torch.')} [{sizes}]")
        return "\n".join(lines)

    def _headline(self) -> str:
        """Return a short summary of the settings."""
        told = []
        for name in setting_names(type(self)):
            value = getattr(self, name)
            if name in self._PER_EXAMPLE or value in (None, "", ()):
                continue
            if isinstance(value, Provenance):
                told += [text] if (text := str(value)) else []
            elif name in ("layers", "skipped_layers"):
                told.append(f"{name}={ranges(value)}")
            else:
                told.append(f"{name}={brief(value)}")
        return ", ".join(told)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the settings and the tensors, as a small table."""
        lines = [("", self._headline())]
        lines += [(f.name, f"{list(f.axes)} = {list(t.shape)}".replace("'", "")) for f, t in self._tensors()]
        return html_table(type(self).__name__, ("", ""), lines)

    # ---- files and tables -----------------------------------------------------------------------

    def save(self, path: PathLike) -> Path:
        """Save as one safetensors file with JSON metadata, and return its path.

        Raises:
            ResultError: a path that cannot be written.
        """
        settings = {name: getattr(self, name) for name in setting_names(type(self))}
        tensors: dict[str, Tensor | None] = {each.name: value for each, value in self._tensors()}
        return save_result(path, type(self).__name__, tensors, settings)

    @classmethod
    def load(cls: type[ResultT], path: PathLike) -> ResultT:
        """Load what `save` wrote.

        Raises:
            ResultError: a file that is missing or damaged, or that holds something else.
        """
        needed = [each.name for each in tensor_fields(cls) if not each.optional]
        tensors, settings = load_result(path, cls.__name__, needed, setting_types(cls), cls._ADDED_LATER)
        known = {each.name for each in tensor_fields(cls)}
        try:
            return cls(**{name: tensors.get(name) for name in known}, **settings)
        except AttnprobeError as error:
            raise ResultError(f"{path} is damaged: {error}") from error

    def _table(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Return the columns of the result's table, by name; subclasses say which arguments there are."""
        raise ResultError(f"{type(self).__name__} has no table")

    def to_pandas(self, *arguments: Any, **options: Any) -> pandas.DataFrame:
        """Return the result as a pandas table.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        frame: pandas.DataFrame = import_pandas().DataFrame(self._columns(arguments, options))
        return frame

    def to_arrow(self, *arguments: Any, **options: Any) -> pyarrow.Table:
        """Return the same table as arrow, which polars and others can read: `polars.from_arrow(...)`.

        Raises:
            MissingDependencyError: pyarrow is not installed.
        """
        return import_pyarrow().table(self._columns(arguments, options))

    def _columns(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        signature = inspect.signature(self._table)
        try:
            signature.bind(*arguments, **options)
        except TypeError as error:
            names = ", ".join(signature.parameters) or "no arguments"
            raise ParameterError(f"the table of {type(self).__name__} takes {names}: {error}") from error
        return self._table(*arguments, **options)


def check_layers(result: Any, count: int, error: type[AttnprobeError]) -> None:
    """Check that a result names the layer of each index of its layer axis, and store them as a tuple.

    Raises:
        AttnprobeError: of the given class, if it does not.
    """
    layers = tuple(whole_numbers(result.layers, "layers", error=error))
    if len(layers) != count or len(set(layers)) != count:
        raise error(
            f"{type(result).__name__} has {count} layers and must name each of them once; got "
            f"{brief(list(layers))}"
        )
    object.__setattr__(result, "layers", layers)


def table_column(values: Tensor, place: Tensor) -> Any:
    """Return the values at indices `[place, axis]` as a column of a table."""
    chosen = values.detach()[tuple(place.to(values.device).T)].cpu()
    # Numpy has no bfloat16.
    return (chosen.float() if chosen.dtype == torch.bfloat16 else chosen).numpy()


def _difference(name: str, ours: Any, theirs: Any) -> tuple[str, Any, Any]:
    """Return which setting differs or, for provenances, which part of it, with both values."""
    if isinstance(ours, Provenance) and isinstance(theirs, Provenance):
        for each in dataclasses.fields(Provenance):
            parts = getattr(ours, each.name), getattr(theirs, each.name)
            if parts[0] != parts[1]:
                return f"{name}.{each.name}", *parts
    return name, ours, theirs


def html_table(title: str, head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Return a small table for a notebook; every text is escaped.

    >>> html_table("t", ("a",), [("<b>",)])
    '<table><caption>t</caption><tr><th>a</th></tr><tr><td>&lt;b&gt;</td></tr></table>'
    """
    cells = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in line)}</tr>" for line in lines
    )
    return f"<table><caption>{html.escape(title)}</caption><tr>{cells}</tr>{body}</table>"

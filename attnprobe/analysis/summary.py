"""Summary: what the results of this package can do, each of which is a few numbers.

Couplings, perturbations, agreements and stabilities are results like all others: they can be compared,
shown, tabulated, saved and loaded. Unlike the others, they hold estimates rather than tensors of tokens, so
they are shown as their table, and undefined numbers count as equal. What is left to others: what the numbers
mean (the modules that make them).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnprobe.results import Result, html_table


@dataclass(frozen=True, eq=False, repr=False)
class Summary(Result):
    """Base of the results of the analysis; `_shown` of a subclass returns what is displayed."""

    def _shown(self) -> dict[str, Any]:
        """Return the columns of the small table that is displayed; default: the result's whole table."""
        return self._table()

    def __eq__(self, other: object) -> bool:
        """Whether two results hold the same numbers and settings; NaN equals NaN."""
        if type(other) is not type(self):
            return NotImplemented
        return same_values(self, other)

    __hash__ = Result.__hash__

    def __repr__(self) -> str:
        columns = {name: [_cell(value) for value in values] for name, values in self._shown().items()}
        widths = {name: max(len(name), *map(len, cells), 0) for name, cells in columns.items() if cells}
        lines = [f"{type(self).__name__}({self._headline()})"]
        for cells in [list(widths), *zip(*columns.values(), strict=True)]:
            padded = (cell.ljust(width) for cell, width in zip(cells, widths.values(), strict=False))
            lines.append("  " + "  ".join(padded).rstrip())
        return "\n".join(lines if widths else lines[:1])

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the settings, and the table."""
        columns = self._shown()
        lines = ([_cell(value) for value in line] for line in zip(*columns.values(), strict=True))
        return html_table(f"{type(self).__name__}({self._headline()})", list(columns), lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def same_values(ours: Any, theirs: Any) -> bool:
    """Whether two values are equal in all their parts; NaN equals NaN.

    >>> same_values({"a": (1, float("nan"))}, {"a": (1, float("nan"))})
    True
    """
    if isinstance(ours, Tensor):
        return isinstance(theirs, Tensor) and _same_tensors(ours.cpu(), theirs.cpu())
    if type(ours) is not type(theirs):
        return False
    if dataclasses.is_dataclass(ours):
        names = [field.name for field in dataclasses.fields(ours)]
        return all(same_values(getattr(ours, name), getattr(theirs, name)) for name in names)
    if isinstance(ours, Mapping):
        return ours.keys() == theirs.keys() and all(same_values(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, tuple | list):
        return len(ours) == len(theirs) and all(map(same_values, ours, theirs))
    return bool(ours == theirs or (ours != ours and theirs != theirs))


def _same_tensors(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    return bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())

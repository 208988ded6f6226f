"""Provenance: what token scores were computed from; they carry it, and so do all results made from them.

`score_tokens` and `group_maps` make it; rhythm, couplings, perturbations and the report compare it. What is
left to others: the results that carry it (results).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from attnprobe.validation import whole_numbers

Align = Literal["token", "prediction"]


@dataclass(frozen=True)
class Provenance:
    """What token scores were computed from.

    Attributes:
        model_name: the model's own name.
        layers: the layers that were measured.
        window, horizon: the parameters of WAAD and FAI.
        heads: the heads of each group ("local", "global", "receiver"), as (layer, head, weight).
        influence_rows: the segment whose rows count in FAI.
        value_weighted: whether FAI weighs attention by the norms of values.
        align: which token a row of the pattern describes: its own ("token") or the next one ("prediction").
    """

    model_name: str = ""
    layers: tuple[int, ...] = ()
    window: int | None = None
    horizon: tuple[int, int | None] | None = None
    heads: dict[str, tuple[tuple[int, int, float], ...]] = field(default_factory=dict)
    align: Align = "token"
    influence_rows: str = "response"
    value_weighted: bool = False

    def __post_init__(self) -> None:
        """Keep layers as a tuple."""
        object.__setattr__(self, "layers", tuple(whole_numbers(self.layers, "layers")) if self.layers else ())

    def __str__(self) -> str:
        groups = ", ".join(f"{len(heads)} {name}" for name, heads in self.heads.items())
        told = {
            "model": self.model_name,
            "layers": ranges(self.layers),
            "window": self.window,
            "horizon": self.horizon,
            "heads": groups,
            "align": self.align,
            "influence_rows": None if self.influence_rows == "response" else self.influence_rows,
            "value_weighted": self.value_weighted or None,
        }
        return ", ".join(f"{name}={value}" for name, value in told.items() if value not in ("", None))


def ranges(numbers: Iterable[int]) -> str:
    """Return ascending whole numbers in short form.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)

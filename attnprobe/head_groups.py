"""HeadGroups: which heads are local, which global, which receivers, and the forms in which groups are given.

`classify_heads` makes them (heads); they can be saved and used again for other batches of the same model.
Every function that takes head groups, `score_tokens` and `rl` among them, gets its heads from `head_groups`.
What is left to others: ranking heads (heads), and single selections (head_selection).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.displays import heads_display
from attnprobe.errors import AttnprobeError, ParameterError, ResultError
from attnprobe.head_selection import HeadSelection, HeadsLike
from attnprobe.head_statistics import ReceiverLevel
from attnprobe.provenance import ranges
from attnprobe.results import Result, check_layers, html_table, table_column
from attnprobe.segments import segment_names
from attnprobe.validation import choice

Group = Literal["local", "global", "receiver"]

SelectivityName = Literal["kurtosis", "gini"]
"""The measures of how selective inbound attention is, by which receivers are ranked."""

if TYPE_CHECKING:
    GroupsLike: TypeAlias = "HeadGroups | Mapping[str, HeadsLike] | HeadsLike"
else:
    GroupsLike = Any

GROUPS: tuple[Group, ...] = ("local", "global", "receiver")


@dataclass(frozen=True, eq=False, repr=False)
class HeadGroups(Result):
    """Which heads are local, global and receivers.

    `groups["local"]`, `groups.local` and so on (`groups.global_`, since `global` is a keyword of Python) are
    selections, which every function that takes heads accepts: `(4, 2) in groups.local`.

    Attributes:
        local_heads, global_heads: masks of the heads with the lowest and the highest span. They are disjoint.
        receiver_heads: a mask of the heads whose inbound attention is most selective; None if that was not
            measured.
        span, receiver_kurtosis, receiver_gini: the means over responses by which heads were ranked; NaN for
            heads that a layer does not have.
        layers: the layer number behind each index of the layer axis.
        model_name: the model that the groups belong to.
        receiver_level: whether receivers were found by token or by sentence; None if they were not.
        quantile: the share of heads in each of local and global; None if the groups were made by hand.
        selectivity: whether receivers were ranked by kurtosis or by Gini coefficient.
        span_ignores: the segments that the spans ignore by which heads were ranked; () if none.

    Raises:
        ResultError: tensors of other dtypes or shapes than these.
    """

    local_heads: Bool[Tensor, "layer head"]
    global_heads: Bool[Tensor, "layer head"]
    receiver_heads: Bool[Tensor, "layer head"] | None
    span: Float[Tensor, "layer head"]
    receiver_kurtosis: Float[Tensor, "layer head"] | None
    layers: tuple[int, ...]
    model_name: str = ""
    receiver_level: ReceiverLevel | None = None
    quantile: float | None = None
    receiver_gini: Float[Tensor, "layer head"] | None = None
    selectivity: SelectivityName = "kurtosis"
    span_ignores: tuple[str, ...] = ()

    _ADDED_LATER: ClassVar[dict[str, Any]] = {"selectivity": "kurtosis", "span_ignores": ()}

    def _check(self, error: type[AttnprobeError] = ResultError) -> None:
        super()._check(error)
        check_layers(self, self.span.shape[0], error)
        object.__setattr__(self, "span_ignores", segment_names(self.span_ignores, "span_ignores", error))

    @property
    def head_count(self) -> int:
        """The number of heads in a layer; the largest, where layers differ."""
        return self.span.shape[1]

    def mask(self, group: str) -> Bool[Tensor, "layer head"]:
        """Return the mask of a group.

        Raises:
            ParameterError: an unknown group, or receivers if kurtosis was not measured.
        """
        choice(group, "a group", GROUPS)
        mask: Tensor | None = getattr(self, f"{group}_heads")
        if mask is None:
            raise ParameterError("receiver heads are not known: measure(..., receiver=True)")
        return mask

    def pairs(self, group: str) -> list[tuple[int, int]]:
        """Return a group's heads as (layer number, head), the most typical first."""
        mask = self.mask(group)
        value = self.span if group == "local" else -self.span
        if group == "receiver" and self.receiver_selectivity is not None:
            value = -self.receiver_selectivity
        found = mask.nonzero().tolist()
        found.sort(key=lambda place: float(value[place[0], place[1]]))
        return [(self.layers[layer], head) for layer, head in found]

    def __getitem__(self, group: str) -> HeadSelection:
        """Return a group as a selection of heads, the most typical first.

        Raises:
            ParameterError: an unknown group, or receivers if kurtosis was not measured.
        """
        return HeadSelection(tuple((*pair, 1.0) for pair in self.pairs(group)), self.model_name)

    @property
    def receiver_selectivity(self) -> Float[Tensor, "layer head"] | None:
        """The measure that receivers were ranked by; None if it is not known."""
        return self.receiver_gini if self.selectivity == "gini" else self.receiver_kurtosis

    @property
    def local(self) -> HeadSelection:
        """The local heads."""
        return self["local"]

    @property
    def global_(self) -> HeadSelection:
        """The global heads."""
        return self["global"]

    @property
    def receiver(self) -> HeadSelection:
        """The receiver heads."""
        return self["receiver"]

    def check_fits(self, layers: tuple[int, ...], head_count: int | None, model_name: str) -> None:
        """Check that these groups can be used with what was measured, or with a model.

        Raises:
            ResultError: groups of other layers, another number of heads, or another model.
        """
        missing = [layer for layer in self.layers if layer not in layers]
        other_heads = head_count is not None and head_count != self.head_count
        if missing or other_heads or (self.model_name and model_name and self.model_name != model_name):
            raise ResultError(
                f"these head groups were made for "
                f"{_described(self.model_name, self.layers, self.head_count)}; they do not fit "
                f"{_described(model_name, layers, head_count)}"
            )

    def _table(self) -> dict[str, Any]:
        """Return a line for each head: layer, head, span, selectivity, and whether it is in each group."""
        place = (~self.span.isnan()).nonzero().cpu()
        layer, head = place.unbind(1)
        columns: dict[str, Any] = {
            "layer": torch.tensor(self.layers)[layer].numpy(),
            "head": head.numpy(),
            "span": table_column(self.span, place),
        }
        for name in ("receiver_kurtosis", "receiver_gini"):
            if (values := getattr(self, name)) is not None:
                columns[name] = table_column(values, place)
        for group in GROUPS:
            mask = getattr(self, f"{group}_heads")
            if mask is not None:
                columns[group] = table_column(mask, place)
        return columns

    def _repr_html_(self) -> str:
        """Return what a notebook shows: a picture of all heads, and the most typical ones of each group."""
        known = [group for group in GROUPS if getattr(self, f"{group}_heads") is not None]
        columns = []
        for group in known:
            values = self.receiver_selectivity if group == "receiver" else self.span
            digits = 2 if group == "receiver" and self.selectivity == "gini" else 1
            cells = []
            for layer, head in self.pairs(group)[:10]:
                place = self.layers.index(layer), head
                value = "" if values is None else f" {float(values[place]):.{digits}f}"
                cells.append(f"L{layer}H{head}{value}")
            columns.append(cells)
        names = {
            "local": "most local, span",
            "global": "most global, span",
            "receiver": f"receivers, {self.selectivity}",
        }
        title = f"HeadGroups({self._headline()})"
        lines = zip_longest(*columns, fillvalue="")
        return heads_display(self, html_table(title, [names[group] for group in known], lines))


def _described(model_name: str, layers: tuple[int, ...], head_count: int | None) -> str:
    heads = "" if head_count is None else f" of {head_count} heads"
    return f"{model_name or 'an unnamed model'} with layers {ranges(layers)}{heads}"


def head_groups(
    heads: GroupsLike | None,
    *,
    layers: tuple[int, ...],
    head_count: int | None,
    model_name: str,
    **own: HeadsLike | None,
) -> dict[Group, HeadSelection]:
    """Return the heads of each group, from any form in which functions accept them.

    `heads` is `HeadGroups`, a dictionary by group, or one selection for both local and global; `own` holds
    selections by group, which replace those.

    Raises:
        ParameterError: no heads for a group that is needed, or heads that do not exist.
        ResultError: `HeadGroups` of other layers, another number of heads, or another model.
    """
    given: dict[str, Any] = {}
    # One selection may serve several groups, and a generator gives its heads only once.
    heads = list(heads) if isinstance(heads, Iterator) else heads
    if isinstance(heads, HeadGroups):
        heads.check_fits(layers, head_count, model_name)
        given = {group: heads[group] for group in GROUPS if getattr(heads, f"{group}_heads") is not None}
        # A group can be empty: there are no receivers where no kurtosis is defined.
        given = {group: selection for group, selection in given.items() if len(selection)}
    elif isinstance(heads, Mapping) and heads and all(isinstance(key, str) for key in heads):
        given = {choice(key, "a group", GROUPS): value for key, value in heads.items()}
    elif heads is not None:
        given = {"local": heads, "global": heads}
    given |= {group: value for group, value in own.items() if value is not None}
    if missing := [group for group in ("local", "global") if group not in given]:
        raise ParameterError(
            f"there are no {' and no '.join(missing)} heads: pass HeadGroups, which classify_heads "
            f"returns, or {' and '.join(f'{group}_heads=...' for group in missing)}"
        )
    limits: dict[str, Any] = {"layers": layers, "head_count": head_count, "model_name": model_name}
    return {
        group: HeadSelection.of(given[group], name=f"{group}_heads", **limits)
        for group in GROUPS
        if group in given
    }

"""Classifying heads: which are local, which global, which receivers.

`classify_heads` ranks heads by what was measured and cuts off quantiles, as Sec. 4.1 of arXiv
2510.13554 does. A grouping can be saved and used again for other batches of the same model. What is
left to others: the measuring (measurement) and the use of groups (scores).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.errors import ParameterError, ResultError
from attnprobe.head_statistics import HeadStatistics, ReceiverLevel
from attnprobe.storage import import_pandas, load_result, save_result

if TYPE_CHECKING:
    import pandas

Group = Literal["local", "global", "receiver"]


@dataclass(frozen=True)
class HeadGroups:
    """Which heads are local, global and receivers.

    Attributes:
        local_heads, global_heads: masks; the heads of lowest and of highest span. They are disjoint.
        receiver_heads: a mask, the heads whose inbound attention is most selective; None where
            kurtosis was not measured.
        span, receiver_kurtosis: what was ranked: means over the batch; NaN for heads that a layer
            does not have.
        layers: the layer number behind each index of the layer axis.
        model_name: the model that the groups belong to.
        receiver_level: whether receivers were found by token or by sentence; None if they were not.
    """

    local_heads: Bool[Tensor, "layer head"]
    global_heads: Bool[Tensor, "layer head"]
    receiver_heads: Bool[Tensor, "layer head"] | None
    span: Float[Tensor, "layer head"]
    receiver_kurtosis: Float[Tensor, "layer head"] | None
    layers: tuple[int, ...]
    model_name: str = ""
    receiver_level: ReceiverLevel | None = None

    def mask(self, group: Group) -> Bool[Tensor, "layer head"]:
        """Return the mask of a group.

        Raises:
            ParameterError: an unknown group, or receivers where kurtosis was not measured.
        """
        masks = {
            "local": self.local_heads,
            "global": self.global_heads,
            "receiver": self.receiver_heads,
        }
        if group not in masks:
            raise ParameterError(f"there are local, global and receiver heads, not {group!r}")
        mask = masks[group]
        if mask is None:
            raise ParameterError("receiver heads are unknown: measure(..., receiver=True)")
        return mask

    def pairs(self, group: Group) -> list[tuple[int, int]]:
        """Return a group's heads as (layer number, head), the most typical first."""
        mask = self.mask(group)
        value = {
            "local": self.span,
            "global": -self.span,
            "receiver": -self.receiver_kurtosis if self.receiver_kurtosis is not None else None,
        }[group]
        assert value is not None
        found = mask.nonzero().tolist()
        found.sort(key=lambda place: float(value[place[0], place[1]]))
        return [(self.layers[layer], head) for layer, head in found]

    def to_pandas(self) -> pandas.DataFrame:
        """Return a table with a row for each head: layer, head, span, kurtosis and group.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        frame = import_pandas()
        rows = []
        for index, layer in enumerate(self.layers):
            for head in range(self.span.shape[1]):
                if bool(self.span[index, head].isnan()):
                    continue
                row = {"layer": layer, "head": head, "span": float(self.span[index, head])}
                if self.receiver_kurtosis is not None:
                    row["receiver_kurtosis"] = float(self.receiver_kurtosis[index, head])
                row["local"] = bool(self.local_heads[index, head])
                row["global"] = bool(self.global_heads[index, head])
                if self.receiver_heads is not None:
                    row["receiver"] = bool(self.receiver_heads[index, head])
                rows.append(row)
        table: pandas.DataFrame = frame.DataFrame(rows)
        return table

    def save(self, path: str | Path) -> Path:
        """Save as one safetensors file with JSON metadata, and return its path.

        Raises:
            ResultError: a place that cannot be written.
        """
        tensors = {name: getattr(self, name) for name in _TENSORS}
        metadata = {name: getattr(self, name) for name in ("layers", "model_name", "receiver_level")}
        return save_result(path, "HeadGroups", tensors, metadata)

    @staticmethod
    def load(path: str | Path) -> HeadGroups:
        """Load what `save` wrote.

        Raises:
            ResultError: a file that is missing, damaged, or holds something else.
        """
        tensors, metadata = load_result(
            path, "HeadGroups", ("local_heads", "global_heads", "span", "layers", "model_name")
        )
        return HeadGroups(
            **{name: tensors.get(name) for name in _TENSORS},  # type: ignore[arg-type]
            layers=tuple(metadata["layers"]),
            model_name=metadata["model_name"],
            receiver_level=metadata.get("receiver_level"),
        )

    def check_fits(self, statistics: HeadStatistics) -> None:
        """Check that these groups can be used with statistics of another batch.

        Raises:
            ResultError: statistics of other layers, another number of heads, or another model.
        """
        ours = (self.layers, self.span.shape[1], self.model_name)
        theirs = (statistics.layers, statistics.head_count, statistics.model_name)
        if ours[:2] != theirs[:2] or (self.model_name and theirs[2] and ours[2] != theirs[2]):
            raise ResultError(
                f"these head groups were made for {_describe(*ours)}, but the statistics are of "
                f"{_describe(*theirs)}"
            )


_TENSORS = ("local_heads", "global_heads", "receiver_heads", "span", "receiver_kurtosis")


def _describe(layers: tuple[int, ...], heads: int, model_name: str) -> str:
    return f"{model_name or 'an unnamed model'} with layers {list(layers)} of {heads} heads"


def classify_heads(
    statistics: HeadStatistics | Iterable[HeadStatistics], *, quantile: float = 0.3, receivers: int = 20
) -> HeadGroups:
    """Group heads by their mean span over responses, and by receiver kurtosis where measured.

    Sec. 4.1 of arXiv 2510.13554: of all heads of the layers measured, the lowest 30% in span are local
    and the highest 30% global. `quantile` is that share: `floor(quantile * heads)` heads, at least one.
    `receivers` heads of highest mean kurtosis are receivers, as in arXiv 2506.19143; a head whose
    kurtosis is undefined is none. Equal values are ranked by layer, then head.

    `statistics` are of a batch, or of any number of batches one after the other, such as a generator
    that measures one at a time: only sums are kept. `statistics.select(slice(i, i + 1))` classifies
    over a single response. Each response counts the same, whatever its length.

    Raises:
        ParameterError: a quantile outside (0, 0.5], fewer than one receiver, fewer than two heads, or
            statistics without span.
        ResultError: no statistics, or statistics of different models, layers, or receiver levels.
    """
    _check_shares(quantile, receivers)
    parts = [statistics] if isinstance(statistics, HeadStatistics) else statistics
    first: HeadStatistics | None = None
    span, kurtosis = _RunningMean(), _RunningMean()
    for part in parts:
        first = part if first is None else first
        if part.span is None:
            raise ParameterError("ranking heads needs their span: measure(..., span=True)")
        _check_same(first, part)
        span.add(part.span)
        if part.receiver_kurtosis is not None:
            kurtosis.add(part.receiver_kurtosis)
    if first is None:
        raise ResultError("there are no statistics to classify heads by")
    groups = group_heads(
        span.mean(),
        None if first.receiver_kurtosis is None else kurtosis.mean(),
        quantile=quantile,
        receivers=receivers,
    )
    return replace(
        groups, layers=first.layers, model_name=first.model_name, receiver_level=first.receiver_level
    )


class _RunningMean:
    """The mean over responses, leaving out NaN, of which only sums are kept."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count: Tensor | None = None
        self._dtype = torch.float32

    def add(self, values: Float[Tensor, "batch layer head"]) -> None:
        self._dtype = values.dtype
        total, count = values.double().nansum(0), (~values.isnan()).double().sum(0)
        self._total = total if self._total is None else self._total + total
        self._count = count if self._count is None else self._count + count

    def mean(self) -> Float[Tensor, "layer head"]:
        assert self._total is not None
        assert self._count is not None
        return (self._total / self._count.masked_fill(self._count == 0, torch.nan)).to(self._dtype)


def _check_same(first: HeadStatistics, part: HeadStatistics) -> None:
    for name in ("layers", "model_name", "receiver_level"):
        ours, theirs = getattr(first, name), getattr(part, name)
        if ours != theirs:
            raise ResultError(
                f"heads cannot be classified over statistics whose {name} differ: {ours!r} and {theirs!r}"
            )
    if first.head_count != part.head_count:
        raise ResultError(
            f"heads cannot be classified over statistics of {first.head_count} and {part.head_count} heads"
        )
    if (first.receiver_kurtosis is None) != (part.receiver_kurtosis is None):
        raise ResultError("heads cannot be classified over statistics with and without receiver kurtosis")


def _check_shares(quantile: float, receivers: int) -> None:
    if not 0 < quantile <= 0.5:
        raise ParameterError(f"quantile must be in (0, 0.5], so that groups do not overlap; got {quantile}")
    if receivers < 1:
        raise ParameterError(f"receivers must be at least 1, got {receivers}")


def group_heads(
    span: Float[Tensor, "layer head"],
    kurtosis: Float[Tensor, "layer head"] | None = None,
    *,
    quantile: float = 0.3,
    receivers: int = 20,
) -> HeadGroups:
    """Group heads by given spans and kurtoses, by the rules of `classify_heads`.

    Raises:
        ParameterError: a quantile outside (0, 0.5], fewer than one receiver, or fewer than two heads.

    >>> group_heads(torch.tensor([[1.0, 5.0, 3.0, 9.0]]), quantile=0.25).pairs("global")
    [(0, 3)]
    """
    _check_shares(quantile, receivers)
    defined = int((~span.isnan()).sum())
    if defined < 2:
        raise ParameterError(
            f"ranking needs at least two heads with a defined span, got {defined}: measure more layers"
        )
    count = max(1, math.floor(quantile * defined + 1e-9))
    return HeadGroups(
        local_heads=_lowest(span, count),
        # Counted from the other end, so that of equal spans none is in both groups.
        global_heads=_lowest(-span.flip(0, 1), count).flip(0, 1),
        receiver_heads=None if kurtosis is None else _lowest(-kurtosis, receivers),
        span=span,
        receiver_kurtosis=kurtosis,
        layers=tuple(range(span.shape[0])),
    )


def _lowest(values: Float[Tensor, "layer head"], count: int) -> Bool[Tensor, "layer head"]:
    """Return a mask of the `count` lowest defined values; ties: the first."""
    flat = values.flatten()
    order = flat.nan_to_num(nan=torch.inf).argsort(stable=True)[:count]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[order] = True
    return (mask & ~flat.isnan()).view(values.shape)

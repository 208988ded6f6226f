"""Classifying heads: which are local, which global, which receivers.

`classify_heads` ranks heads by what was measured and cuts off quantiles, as Sec. 4.1 of arXiv
2510.13554 does. A grouping can be saved and used again for other batches of the same model. What is
left to others: the measuring (measurement) and the use of groups (scores).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.errors import ParameterError, ResultError
from attnprobe.head_statistics import HeadStatistics
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
    """

    local_heads: Bool[Tensor, "layer head"]
    global_heads: Bool[Tensor, "layer head"]
    receiver_heads: Bool[Tensor, "layer head"] | None
    span: Float[Tensor, "layer head"]
    receiver_kurtosis: Float[Tensor, "layer head"] | None
    layers: tuple[int, ...]
    model_name: str = ""

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
        metadata = {"layers": self.layers, "model_name": self.model_name}
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


def classify_heads(statistics: HeadStatistics, *, quantile: float = 0.3, receivers: int = 20) -> HeadGroups:
    """Group heads by their mean span over the batch, and by receiver kurtosis where measured.

    Sec. 4.1 of arXiv 2510.13554: of all heads of the layers measured, the lowest 30% in span are local
    and the highest 30% global. `quantile` is that share: `floor(quantile * heads)` heads, at least one.
    `receivers` heads of highest mean kurtosis are receivers, as in arXiv 2506.19143; a head whose
    kurtosis is undefined is none. Equal values are ranked by layer, then head.

    Raises:
        ParameterError: a quantile outside (0, 0.5], fewer than one receiver, fewer than two heads, or
            statistics without span.
    """
    if not 0 < quantile <= 0.5:
        raise ParameterError(f"quantile must be in (0, 0.5], so that groups do not overlap; got {quantile}")
    if receivers < 1:
        raise ParameterError(f"receivers must be at least 1, got {receivers}")
    if statistics.span is None:
        raise ParameterError("ranking heads needs their span: measure(..., span=True)")
    span = statistics.span.nanmean(0)
    defined = int((~span.isnan()).sum())
    if defined < 2:
        raise ParameterError(
            f"ranking needs at least two heads with a defined span, got {defined}: measure more layers"
        )
    count = max(1, math.floor(quantile * defined + 1e-9))
    kurtosis = statistics.receiver_kurtosis
    mean_kurtosis = None if kurtosis is None else kurtosis.nanmean(0)
    return HeadGroups(
        local_heads=_lowest(span, count),
        # Counted from the other end, so that of equal spans none is in both groups.
        global_heads=_lowest(-span.flip(0, 1), count).flip(0, 1),
        receiver_heads=None if mean_kurtosis is None else _lowest(-mean_kurtosis, receivers),
        span=span,
        receiver_kurtosis=mean_kurtosis,
        layers=statistics.layers,
        model_name=statistics.model_name,
    )


def _lowest(values: Float[Tensor, "layer head"], count: int) -> Bool[Tensor, "layer head"]:
    """Return a mask of the `count` lowest defined values; ties: the first."""
    flat = values.flatten()
    order = flat.nan_to_num(nan=torch.inf).argsort(stable=True)[:count]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[order] = True
    return (mask & ~flat.isnan()).view(values.shape)

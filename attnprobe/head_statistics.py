"""HeadStatistics: what every head of every layer does, from one forward pass.

`HeadStatistics` holds span, WAAD, FAI and, if asked for, receiver kurtosis of each head, with the
entropy of each token. `HeadStatisticsProbe` collects them from the forward passes that it is shown.
Everything is reduced while a layer's attention is at hand and kept per head, so that head groups can be
chosen afterwards without a second pass.

What is left to others: the definitions (metrics), reading a model (adapters), running one over a batch
(measurement), grouping (heads).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnprobe import metrics
from attnprobe.adapters.base import Value
from attnprobe.attention import Attention
from attnprobe.batch import TokenBatch
from attnprobe.errors import ParameterError, ResultError
from attnprobe.metrics import Horizon
from attnprobe.probe import Probe
from attnprobe.storage import import_pandas, load_result, save_result

if TYPE_CHECKING:
    import pandas

ReceiverLevel = Literal["token", "sentence"]

_PER_TOKEN = ("waad", "fai", "entropy", "response_mask", "segment_ids")


@dataclass(frozen=True)
class HeadStatistics:
    """Per-head results of a batch; NaN where undefined, and for heads that a layer does not have.

    Attributes:
        span: mean backward distance over response rows, in tokens (Eq. 7 of arXiv 2510.13554).
        waad: windowed average attention distance (Eq. 9), in `[0, window]`.
        fai: future attention influence (Eq. 10), in `[0, 1]`.
        entropy: of the distribution that each token was sampled from, in nats; None if not measured.
        receiver_kurtosis: selectivity of inbound attention; None if not measured.
        response_mask: the tokens that the results describe.
        layers: the layer number behind each index of the layer axis.
        skipped_layers: the model's layers without attention.
        window, horizon: the parameters of WAAD and FAI.
        model_name: the model, as it calls itself.
        segment_ids: in packed rows, which sequence of the row a token belongs to; else None.
        receiver_level: whether the kurtosis is over tokens or over sentences; None if not measured.
    """

    span: Float[Tensor, "batch layer head"]
    waad: Float[Tensor, "batch layer head token"]
    fai: Float[Tensor, "batch layer head token"]
    entropy: Float[Tensor, "batch token"] | None
    receiver_kurtosis: Float[Tensor, "batch layer head"] | None
    response_mask: Bool[Tensor, "batch token"]
    layers: tuple[int, ...]
    skipped_layers: tuple[int, ...] = ()
    window: int = 10
    horizon: Horizon = (10, 50)
    model_name: str = ""
    segment_ids: Int[Tensor, "batch token"] | None = None
    receiver_level: ReceiverLevel | None = None

    def save(self, path: str | Path) -> Path:
        """Save as one safetensors file with JSON metadata, and return its path.

        Raises:
            ResultError: a place that cannot be written.
        """
        tensors = {name: getattr(self, name) for name in _TENSORS}
        metadata = {name: getattr(self, name) for name in _METADATA}
        return save_result(path, "HeadStatistics", tensors, metadata)

    @staticmethod
    def load(path: str | Path) -> HeadStatistics:
        """Load what `save` wrote.

        Raises:
            ResultError: a file that is missing, damaged, or holds something else.
        """
        required = ("span", "waad", "fai", "response_mask", *_METADATA)
        tensors, metadata = load_result(path, "HeadStatistics", required)
        low, high = metadata["horizon"]
        return HeadStatistics(
            **{name: tensors.get(name) for name in _TENSORS},  # type: ignore[arg-type]
            layers=tuple(metadata["layers"]),
            skipped_layers=tuple(metadata["skipped_layers"]),
            window=metadata["window"],
            horizon=(low, high),
            model_name=metadata["model_name"],
            receiver_level=metadata["receiver_level"],
        )

    def select(self, rows: slice) -> HeadStatistics:
        """Return the statistics of some responses: `select(slice(0, 1))` of the first."""
        chosen = {name: value[rows] for name in _TENSORS if (value := getattr(self, name)) is not None}
        return dataclasses.replace(self, **chosen)

    def at_layers(self, layers: Sequence[int]) -> HeadStatistics:
        """Return the statistics of some of the layers, as if only these had been measured.

        Raises:
            ParameterError: no layers, or layers that were not measured.
        """
        chosen = tuple(sorted(set(layers)))
        missing = [layer for layer in chosen if layer not in self.layers]
        if missing or not chosen:
            raise ParameterError(
                f"layers {missing or list(layers)} were not measured; there are {list(self.layers)}"
            )
        index = [self.layers.index(layer) for layer in chosen]
        kurtosis = self.receiver_kurtosis
        return dataclasses.replace(
            self,
            span=self.span[:, index],
            waad=self.waad[:, index],
            fai=self.fai[:, index],
            receiver_kurtosis=None if kurtosis is None else kurtosis[:, index],
            layers=chosen,
        )

    def to_pandas(self) -> pandas.DataFrame:
        """Return a table with a row for each response and head.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        frame = import_pandas()
        batch, layer, head = (index.flatten() for index in _indices(self.span.shape))
        columns = {
            "response": batch.numpy(),
            "layer": torch.tensor(self.layers)[layer].numpy(),
            "head": head.numpy(),
            "span": self.span.flatten().cpu().numpy(),
        }
        if self.receiver_kurtosis is not None:
            columns["receiver_kurtosis"] = self.receiver_kurtosis.flatten().cpu().numpy()
        table: pandas.DataFrame = frame.DataFrame(columns)
        return table.dropna(subset=["span"]).reset_index(drop=True)

    @staticmethod
    def concatenate(parts: Sequence[HeadStatistics]) -> HeadStatistics:
        """Join results of several batches along the batch axis, padding tokens on the right.

        Raises:
            ResultError: nothing to join, or results of different models, layers or parameters.
        """
        if not parts:
            raise ResultError("there are no statistics to join: no forward pass was observed")
        first = parts[0]
        for part in parts[1:]:
            for name in _METADATA:
                if getattr(part, name) != getattr(first, name):
                    raise ResultError(
                        f"cannot join statistics whose {name} differ: {getattr(first, name)!r} and "
                        f"{getattr(part, name)!r}"
                    )
            if part.span.shape[2] != first.span.shape[2]:
                raise ResultError(
                    f"cannot join statistics of {first.span.shape[2]} and {part.span.shape[2]} heads"
                )
            for name in _TENSORS:
                if (getattr(part, name) is None) != (getattr(first, name) is None):
                    raise ResultError(f"cannot join statistics with and without {name}")
        width = max(part.response_mask.shape[-1] for part in parts)
        joined: dict[str, Any] = {}
        for name in _TENSORS:
            values = [getattr(part, name) for part in parts]
            if getattr(first, name) is None:
                joined[name] = None
                continue
            if name in _PER_TOKEN:
                fill = {"response_mask": False, "segment_ids": -1}.get(name, torch.nan)
                values = [
                    torch.nn.functional.pad(value, (0, width - value.shape[-1]), value=fill)
                    for value in values
                ]
            joined[name] = torch.cat(values)
        return dataclasses.replace(first, **joined)


_TENSORS = tuple(field.name for field in dataclasses.fields(HeadStatistics) if "Tensor" in str(field.type))
_METADATA = tuple(field.name for field in dataclasses.fields(HeadStatistics) if field.name not in _TENSORS)


def _indices(shape: torch.Size) -> tuple[Tensor, ...]:
    return torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")


class HeadStatisticsProbe(Probe):
    """A probe that computes head statistics in every forward pass that it is shown.

    Args:
        window: WAAD's window, in tokens.
        horizon: FAI's horizon `(low, high)`, in tokens; `(low, None)` runs to the end of the response.
        receiver: whether to compute receiver kurtosis, which costs another pass over the attention.
        entropy: whether to compute token entropy from the logits.

    Raises:
        ParameterError: a window or horizon that makes no sense.

    >>> HeadStatisticsProbe(window=0)
    Traceback (most recent call last):
    attnprobe.errors.ParameterError: the window is a whole number of tokens, at least 1; got 0
    """

    def __init__(
        self,
        *,
        window: int = 10,
        horizon: Horizon = (10, 50),
        receiver: bool = False,
        entropy: bool = True,
    ) -> None:
        self.window = metrics.check_window(window)
        self.horizon = metrics.check_horizon(horizon)
        self.receiver = receiver
        self.sites = frozenset({"attention", "logits"} if entropy else {"attention"})
        self._layers: dict[int, dict[str, Tensor]] = {}
        self._entropy: Tensor | None = None
        self._finished: list[HeadStatistics] = []

    def begin(self, batch: TokenBatch) -> None:
        """Forget what an earlier pass may have left."""
        self.abort()

    def observe(self, site: str, layer: int | None, value: Value, batch: TokenBatch) -> None:
        """Reduce one layer's attention, or the logits."""
        if isinstance(value, Attention):
            assert layer is not None
            self._layers[layer] = self._reduce(value, batch)
        else:
            self._entropy = metrics.token_entropy(value, batch.response_mask)

    def _reduce(self, attention: Attention, batch: TokenBatch) -> dict[str, Tensor]:
        mask, segments = batch.response_mask, batch.segment_ids
        reduced = {
            "span": metrics.mean_attention_distance(attention, mask),
            "waad": metrics.windowed_attention_distance(attention, self.window, mask),
            "fai": metrics.future_attention_influence(attention, mask, self.horizon, segments),
        }
        if self.receiver:
            reduced["receiver_kurtosis"] = metrics.receiver_kurtosis(attention, mask, segment_ids=segments)
        return reduced

    def end(self, batch: TokenBatch) -> None:
        """Keep the statistics of a complete pass."""
        layers = sorted(self._layers)
        heads = max(self._layers[layer]["span"].shape[1] for layer in layers)
        joined: dict[str, Any] = {"receiver_kurtosis": None}
        for name in self._layers[layers[0]]:
            joined[name] = torch.stack(
                [_pad_heads(self._layers[layer][name], heads) for layer in layers], dim=1
            )
        self._finished.append(
            HeadStatistics(
                **joined,
                entropy=self._entropy,
                response_mask=batch.response_mask,
                segment_ids=batch.segment_ids,
                layers=tuple(layers),
                window=self.window,
                horizon=self.horizon,
                receiver_level="token" if self.receiver else None,
            )
        )
        self.abort()

    def abort(self) -> None:
        """Forget the pass that is under way; finished ones are kept."""
        self._layers, self._entropy = {}, None

    def result(self) -> HeadStatistics:
        """Return the statistics of all complete passes, joined along the batch axis.

        Raises:
            ResultError: no complete pass was observed.
        """
        return HeadStatistics.concatenate(self._finished)

    def reset(self) -> None:
        """Forget all passes."""
        self.abort()
        self._finished = []


def _pad_heads(values: Tensor, heads: int) -> Tensor:
    """Pad the head axis with NaN, for models whose layers differ in it."""
    missing = heads - values.shape[1]
    if missing == 0:
        return values
    padding = values.new_full((values.shape[0], missing, *values.shape[2:]), torch.nan)
    return torch.cat([values, padding], dim=1)

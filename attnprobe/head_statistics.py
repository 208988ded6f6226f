"""HeadStatistics: what every head of every layer does, from one forward pass.

`HeadStatistics` holds the span, WAAD, FAI and, if wanted, receiver kurtosis of each head, and the entropy
of each token. Results are kept per head, so that head groups can be chosen afterwards without a second pass.
`measure` returns one, and so does `HeadStatisticsProbe.result`. What is left to others: computing it
(statistics_probe), running a model over a batch (measurement), grouping (heads).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnprobe.displays import statistics_display
from attnprobe.errors import AttnprobeError, ParameterError, ResultError
from attnprobe.layer_selection import LayerName, named_layers
from attnprobe.layout import token_columns
from attnprobe.metric_arguments import check_horizon, check_window
from attnprobe.provenance import ranges
from attnprobe.reductions import TRAINING_HORIZON, Horizon
from attnprobe.results import Result, check_layers, html_table, table_column
from attnprobe.segments import segment_names
from attnprobe.sentences import SentenceReceivers
from attnprobe.validation import ArrayLike, IntLike, choice, instance, whole_numbers

if TYPE_CHECKING:
    StatisticsLike: TypeAlias = "HeadStatistics | Iterable[HeadStatistics]"
else:
    StatisticsLike = Any

ReceiverLevel = Literal["token", "sentence"]


@dataclass(frozen=True, eq=False, repr=False)
class HeadStatistics(Result):
    """Per-head results of a batch; NaN where undefined, and for heads that a layer does not have.

    Attributes:
        span: the mean backward distance over response rows, in tokens (Eq. 7 of arXiv 2510.13554v2); None if
            not measured.
        waad: windowed average attention distance (Eq. 9), in tokens, in `[0, window]`.
        fai: future attention influence (Eq. 10), in `[0, 1]`.
        entropy: that of the distribution that each token was sampled from, in nats; None if not measured.
        receiver_kurtosis: how selective inbound attention is; None if not measured.
        receiver_gini: the same by the Gini coefficient, in `[0, 1)`, which does not grow with length; None if
            not measured.
        response_mask: the tokens that the results describe.
        layers: the layer number behind each index of the layer axis.
        skipped_layers: the model's layers without attention.
        window, horizon: the parameters of WAAD and FAI.
        model_name: what the model calls itself.
        segment_ids: in packed examples, which sequence each token belongs to; else None.
        receiver_level: whether these two are over tokens or over sentences; None if not measured.
        sentence_receivers: how, if over sentences.
        input_ids, texts: the tokens that were measured, as in the batch; None where they are not known.
        sequence_span: the span of each packed sequence that has a response, in the order of their numbers in
            `segment_ids`; None unless examples are packed. `sequences` makes an example of each.
        shares: the mean share of the rows of a segment (`source`) that is on the keys of another (`target`),
            in `[0, 1]`; NaN where an example has no such row. None if not measured; `share` returns one.
        share_from, share_on: the names of the sources and targets.
        span_ignoring: the span if some keys are ignored, and what is left of each row is renormalised; a row
            with nothing left does not count. None if not measured.
        span_ignores: the segments that it ignores.
        influence_rows: the segment whose rows count in FAI.
        value_weighted: whether FAI and token-level kurtosis weigh attention by the norms of values; FAI then
            has the units of the residual stream.
        sequence_shares, sequence_span_ignoring: those of each packed sequence, as `sequence_span`.

    Raises:
        ResultError: tensors of other dtypes or shapes than these.
        ParameterError: an invalid window or horizon.
    """

    span: Float[Tensor, "batch layer head"] | None
    waad: Float[Tensor, "batch layer head token"]
    fai: Float[Tensor, "batch layer head token"]
    entropy: Float[Tensor, "batch token"] | None
    receiver_kurtosis: Float[Tensor, "batch layer head"] | None
    response_mask: Bool[Tensor, "batch token"]
    layers: tuple[int, ...]
    skipped_layers: tuple[int, ...] = ()
    window: int = 10
    horizon: Horizon = TRAINING_HORIZON
    model_name: str = ""
    segment_ids: Int[Tensor, "batch token"] | None = None
    receiver_level: ReceiverLevel | None = None
    receiver_gini: Float[Tensor, "batch layer head"] | None = None
    sentence_receivers: SentenceReceivers | None = None
    input_ids: Int[Tensor, "batch token"] | None = None
    texts: tuple[tuple[str, ...], ...] | None = None
    sequence_span: Float[Tensor, "batch layer head sequence"] | None = None
    shares: Float[Tensor, "batch layer head source target"] | None = None
    share_from: tuple[str, ...] = ()
    share_on: tuple[str, ...] = ()
    span_ignoring: Float[Tensor, "batch layer head"] | None = None
    span_ignores: tuple[str, ...] = ()
    influence_rows: str = "response"
    value_weighted: bool = False
    sequence_shares: Float[Tensor, "batch layer head source target sequence"] | None = None
    sequence_span_ignoring: Float[Tensor, "batch layer head sequence"] | None = None

    _FILL: ClassVar[dict[str, Any]] = {"input_ids": 0}
    _ADDED_LATER: ClassVar[dict[str, Any]] = {
        "sentence_receivers": None,
        "share_from": (),
        "share_on": (),
        "span_ignores": (),
        "influence_rows": "response",
        "value_weighted": False,
    }

    def _check(self, error: type[AttnprobeError] = ResultError) -> None:
        super()._check(error)
        check_layers(self, self.waad.shape[1], error)
        object.__setattr__(self, "window", check_window(self.window))
        object.__setattr__(self, "horizon", check_horizon(self.horizon))
        self._check_segments(error)

    def _check_segments(self, error: type[AttnprobeError]) -> None:
        """Check that segments are named as often as there are any; names of nothing are dropped."""
        (rows,) = segment_names((self.influence_rows,), "influence_rows", error)
        object.__setattr__(self, "influence_rows", rows)
        for name, known in (
            ("share_from", self.shares),
            ("share_on", self.shares),
            ("span_ignores", self.span_ignoring),
        ):
            names = () if known is None else segment_names(getattr(self, name), name, error)
            object.__setattr__(self, name, names)
        if self.shares is not None:
            expected = (len(self.share_from), len(self.share_on))
            if tuple(self.shares.shape[3:]) != expected:
                raise error(
                    f"shares of HeadStatistics must be [..., source, target] = {list(expected)}, as "
                    f"share_from and share_on name them; got {list(self.shares.shape)}"
                )
        if self.span_ignoring is not None and not self.span_ignores:
            raise error("span_ignoring of HeadStatistics needs span_ignores, the segments that it ignores")

    @property
    def head_count(self) -> int:
        """The number of heads in a layer; the largest, where layers differ."""
        return self.waad.shape[2]

    def share(self, target: str, rows: str = "response") -> Float[Tensor, "batch layer head"]:
        """Return the mean share of the attention of some rows that is on the keys of a segment.

        In `[0, 1]`; NaN where an example has no such row, and for heads that a layer does not have.

        Args:
            target: the segment of the keys, such as "first".
            rows: the segment of the rows.

        Raises:
            ParameterError: a share that was not measured.

        >>> from attnprobe import TokenBatch, measure
        >>> from attnprobe.testing.tiny_models import tiny_model
        >>> batch = TokenBatch.from_ids(torch.arange(1, 17)[None], response_start=4)
        >>> statistics = measure(tiny_model("llama"), batch, share_on=("prompt", "response"))
        >>> both = statistics.share("prompt") + statistics.share("response")
        >>> bool((both - 1).abs().max() < 1e-5)
        True
        """
        for name, value, known in (
            ("share_on", target, self.share_on),
            ("share_from", rows, self.share_from),
        ):
            if value not in known:
                there = ", ".join(known) or "none"
                raise ParameterError(
                    f"the share of {rows} on {target} was not measured: {name} was {there}. Name it in "
                    f"measure(..., {name}=...)"
                )
        assert self.shares is not None
        return self.shares[:, :, :, self.share_from.index(rows), self.share_on.index(target)]

    def at_layers(self, layers: ArrayLike | IntLike | LayerName) -> HeadStatistics:
        """Return the statistics of some of the layers, as if only these had been measured.

        Args:
            layers: numbers, or a name such as "top third" (see `named_layers`), of the measured layers.

        Raises:
            ParameterError: no layers, layers that were not measured, or an unknown name.
        """
        if isinstance(layers, str):
            chosen = named_layers(layers, self.layers)
        else:
            chosen = tuple(sorted(set(whole_numbers(layers, "layers"))))
        missing = [layer for layer in chosen if layer not in self.layers]
        if missing:
            raise ParameterError(f"layers {missing} were not measured; there are {list(self.layers)}")
        index = [self.layers.index(layer) for layer in chosen]
        changed: dict[str, Any] = {f.name: t[:, index] for f, t in self._tensors() if "layer" in f.axes}
        return dataclasses.replace(self, **changed, layers=chosen)

    def sequences(self) -> HeadStatistics:
        """Return the same statistics with an example for each sequence that has a response.

        Examples that are not packed stay as they are. Receiver kurtosis and its Gini coefficient are known
        only for whole examples, and are None for packed ones.
        """
        if self.segment_ids is None:
            return self
        parts = []
        for example in range(len(self.response_mask)):
            row = dataclasses.replace(self.select([example]), receiver_gini=None, sentence_receivers=None)
            segments = self.segment_ids[example]
            with_response = segments[self.response_mask[example].to(segments.device)].unique().tolist()
            for place, segment in enumerate(with_response):
                columns = (segments == segment).nonzero()[:, 0]
                part = dataclasses.replace(
                    row,
                    span=_of_sequence(row.sequence_span, place),
                    shares=_of_sequence(row.sequence_shares, place),
                    span_ignoring=_of_sequence(row.sequence_span_ignoring, place),
                    receiver_kurtosis=None,
                    receiver_level=None,
                    sequence_span=None,
                    sequence_shares=None,
                    sequence_span_ignoring=None,
                )
                cut = part.at_columns(slice(int(columns[0]), int(columns[-1]) + 1))
                parts.append(dataclasses.replace(cut, segment_ids=None))
        return HeadStatistics.concatenate(parts)

    def _table(self, *, per: Literal["head", "token"] = "head") -> dict[str, Any]:
        """Return a line for each example and head or, with `per="token"`, for each example, head and token.

        Raises:
            ParameterError: another `per`.
            ResultError: a line for each head is wanted, but span was not measured.
        """
        choice(per, "per", ("head", "token"))
        if per == "token":
            return self._token_table()
        if self.span is None:
            raise ResultError("span was not measured: measure(..., span=True)")
        place = (~self.span.isnan()).nonzero()
        example, layer, head = place.cpu().unbind(1)
        columns: dict[str, Any] = {
            "example": example.numpy(),
            "layer": torch.tensor(self.layers)[layer].numpy(),
            "head": head.numpy(),
        }
        for name in ("span", "span_ignoring", "receiver_kurtosis", "receiver_gini"):
            values = getattr(self, name)
            if values is not None:
                columns[name] = table_column(values, place)
        for source in self.share_from:
            for target in self.share_on:
                name = f"share_on_{target}" if source == "response" else f"share_from_{source}_on_{target}"
                columns[name] = table_column(self.share(target, source), place)
        return columns

    def _token_table(self) -> dict[str, Any]:
        """Return the long table: example, layer, head, position, token, WAAD and FAI."""
        inside = self.response_mask[:, None, None].expand(self.waad.shape).to(self.waad.device)
        place = (inside & ~self.waad.isnan()).nonzero()
        example, layer, head, position = place.cpu().unbind(1)
        tokens = token_columns(torch.stack([example, position], 1), self.input_ids, self.texts)
        return {
            "example": tokens.pop("example"),
            "layer": torch.tensor(self.layers)[layer].numpy(),
            "head": head.numpy(),
            **tokens,
            "waad": table_column(self.waad, place),
            "fai": table_column(self.fai, place),
        }

    def _repr_html_(self) -> str:
        """Return what a notebook shows: what was measured, and a picture of the mean span of every head."""
        rows: list[tuple[object, object]] = [
            ("model", self.model_name or "not known"),
            ("layers", f"{ranges(self.layers)} of {self.head_count} heads"),
            ("examples", f"{self.waad.shape[0]}, {int(self.response_mask.sum())} response tokens"),
            ("WAAD", f"window {self.window}, mean {_mean(self.waad)} tokens"),
            ("FAI", f"horizon {self.horizon}, mean {_mean(self.fai)}"),
        ]
        if self.span is not None:
            rows.append(("span", f"mean {_mean(self.span)} tokens"))
        if self.span_ignoring is not None:
            rows.append(
                (f"span ignoring {', '.join(self.span_ignores)}", f"mean {_mean(self.span_ignoring)} tokens")
            )
        for source in self.share_from:
            for target in self.share_on:
                rows.append((f"share of {source} on {target}", f"mean {_mean(self.share(target, source))}"))
        if self.entropy is not None:
            rows.append(("entropy", f"mean {_mean(self.entropy)} nats"))
        if self.receiver_kurtosis is not None:
            rows.append(
                ("receiver kurtosis", f"by {self.receiver_level}, mean {_mean(self.receiver_kurtosis)}")
            )
        if self.receiver_gini is not None:
            rows.append(("receiver Gini coefficient", f"mean {_mean(self.receiver_gini)}"))
        return statistics_display(self, html_table("HeadStatistics", ("measured", ""), rows))


def _of_sequence(values: Tensor | None, place: int) -> Tensor | None:
    return None if values is None else values[..., place]


def _mean(values: Tensor) -> str:
    return f"{float(values.double().nanmean()):.4g}"


def check_same_measurement(first: HeadStatistics, part: HeadStatistics, action: str) -> None:
    """Check that two parts of a data set were measured alike, so that heads can be ranked over both.

    Raises:
        ResultError: different models, layers, numbers of heads or receiver levels, or weighted and plain.
    """
    for name in (
        "layers",
        "head_count",
        "model_name",
        "receiver_level",
        "sentence_receivers",
        "value_weighted",
    ):
        ours, theirs = getattr(first, name), getattr(part, name)
        if ours != theirs:
            raise ResultError(f"cannot {action} statistics whose {name} differ: {ours!r} and {theirs!r}")
    for name in ("span", "receiver_kurtosis"):
        if (getattr(first, name) is None) != (getattr(part, name) is None):
            raise ResultError(f"cannot {action} statistics with and without {name}")


def statistics_parts(statistics: StatisticsLike) -> Iterable[HeadStatistics]:
    """Return one or several statistics as an iterable, which checks each.

    Raises:
        ParameterError: something else.
    """
    if isinstance(statistics, HeadStatistics):
        return (statistics,)
    if isinstance(statistics, str | bytes | Tensor) or not isinstance(statistics, Iterable):
        instance(statistics, HeadStatistics, "statistics", "measure returns them")
    return (
        instance(part, HeadStatistics, "each of the statistics", "measure returns them")
        for part in statistics
    )

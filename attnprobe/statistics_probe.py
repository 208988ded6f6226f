"""HeadStatisticsProbe: head statistics of the forward passes that it is shown.

`measure` attaches one, and so do users who run the model themselves. A layer's attention is reduced as
soon as it is seen. A pass that continues a KV cache adds to its sequence. What is left to others: the
result (head_statistics), the definitions (metrics), the passes so far (growing_sequence), adding rows up
(sequence_sums), reading a model (adapters).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnprobe import metrics, reductions
from attnprobe.adapters.base import GrowingCache, Value
from attnprobe.attention.operator import Attention
from attnprobe.batch import TokenBatch
from attnprobe.errors import ResultError
from attnprobe.growing_sequence import GrowingSequence
from attnprobe.head_statistics import HeadStatistics
from attnprobe.metric_arguments import HorizonLike, check_horizon, check_window
from attnprobe.probe import Probe
from attnprobe.reductions import TRAINING_HORIZON
from attnprobe.segment_marks import AskedSegments, SegmentMarks
from attnprobe.segments import NamesLike
from attnprobe.sequence_sums import LayerSums, MarkedRows, add_rows
from attnprobe.validation import IntLike, truth

# Of guesses in assisted decoding, which are usually fewer than twenty: each takes memory of its own.
_MOST_REMEMBERED = 64


class HeadStatisticsProbe(Probe):
    """A probe that computes head statistics in every forward pass that it is shown.

    A pass with a KV cache continues the sequences of the pass before, so that `generate` gives one result
    for each sequence: WAAD grows row by row, FAI and span add up, and the numbers are those of a single pass
    over the whole sequence. The last generated token is never run through the model, and has no row. Nor have
    guesses of assisted decoding that were taken from the cache again, and prompt tokens in layers that the
    model does not run for them (the last ones of Gemma 4 in `generate`): what depends on such a row of the
    response is NaN.

    Args:
        window: WAAD's window, in tokens.
        horizon: FAI's horizon `(low, high)`, in tokens; `(low, None)` runs to the end of the response.
        span: whether to compute span; without it heads cannot be grouped, but a saved grouping can be used.
        receiver: whether to compute receiver kurtosis and the Gini coefficient, which cost another pass over
            the attention.
        share_on: names of segments: the share of attention on each of them is kept, for every head. Besides
            "prompt", "response" and "first", names that are given to `attach`. None: "first", if span is
            computed, at next to no cost; any other costs a column of a pass over the attention.
        share_from: names of segments whose rows give these shares.
        span_ignores: names of segments that a second span ignores, with what is left of each row
            renormalised. None: "first", if span is computed; (): no second span.
        influence_rows: the segment whose rows count in FAI, in place of those of the response.
        value_weighted: whether FAI and receiver kurtosis weigh attention by the norm of the key's value after
            the head's output projection, in the units of the residual stream.
        entropy: whether to compute token entropy from the logits; NaN for tokens whose logits the model
            did not compute, such as prompt tokens in `generate`. None: where the model shows next-token
            logits. True: it is an error if it does not.

    Raises:
        ParameterError: an invalid window or horizon, names that are none or, in a pass, segments that are not
            there.

    >>> HeadStatisticsProbe(window=0)
    Traceback (most recent call last):
    attnprobe.errors.ParameterError: window must be a whole number, at least 1; got 0
    """

    def __init__(
        self,
        *,
        window: IntLike = 10,
        horizon: HorizonLike = TRAINING_HORIZON,
        span: bool = True,
        receiver: bool = False,
        entropy: bool | None = None,
        share_on: NamesLike | None = None,
        share_from: NamesLike = "response",
        span_ignores: NamesLike | None = None,
        influence_rows: str = "response",
        value_weighted: bool = False,
    ) -> None:
        self.window = check_window(window)
        self.horizon = check_horizon(horizon)
        self.span = truth(span, "span")
        self.receiver = truth(receiver, "receiver")
        self.asked = AskedSegments.of(share_on, share_from, span_ignores, influence_rows, span=self.span)
        logits = (
            frozenset() if entropy is not None and not truth(entropy, "entropy") else frozenset({"logits"})
        )
        self.value_weighted = truth(value_weighted, "value_weighted")
        self.sites = frozenset({"attention"}) | (logits if entropy else frozenset())
        if self.value_weighted:
            self.sites |= {"value_norms"}
        self.optional_sites = logits
        # Whether every example of every pass is one sequence that begins in column 0: `measure` knows, so the
        # device need not be asked.
        self.right_padded = False
        self._sequence = GrowingSequence()
        self._pass: dict[int, LayerSums] = {}
        self._norms: dict[int, Tensor] = {}
        self._continues = False
        self._marks: SegmentMarks | None = None
        self._giving: Tensor | None = None
        self._marked_rows = MarkedRows()
        self._cache: GrowingCache | None = None
        self._distribution_entropy: Tensor | None = None
        self._finished: list[_Finished] = []

    def follow(self, cache: GrowingCache | None) -> None:
        """Take back what is no longer in the last pass's cache, and remember the next one's."""
        self._sequence = dataclasses.replace(self._sequence.settled(), cache=None)
        self._cache = cache

    def begin(self, batch: TokenBatch) -> None:
        """Forget anything that a failed pass left behind, and check that the segments are there."""
        self.abort()
        self.asked.check_known(batch.segment_names, "attach(..., segments={})")

    def observe(self, site: str, layer: int | None, value: Value, batch: TokenBatch) -> None:
        """Reduce one layer's attention, or the logits, or keep the norms of its values."""
        if site == "value_norms":
            assert layer is not None
            assert isinstance(value, Tensor)
            self._norms[layer] = value
            return
        if not isinstance(value, Attention):
            self._distribution_entropy = metrics.distribution_entropy(value)
            return
        assert layer is not None
        # Not from the first query: a layer may be given only the last tokens of a pass.
        self._continues = value.key_start + value.key_count > batch.token_count
        before = self._sequence.layers.get(layer) if self._continues else None
        if self._marks is None:
            earlier = self._sequence.marks if self._continues else None
            self._marks = self.asked.marks(batch, earlier, right_padded=self.right_padded)
            self._giving = self._marks.influence_rows(batch.token_count)
        far = reductions.RECEIVER_HORIZON if self.receiver else None
        self._pass[layer] = add_rows(
            before,
            value,
            batch.response_mask,
            self.window,
            self.horizon,
            far,
            span=self.span,
            drafted=0 if self._cache is None else min(self._cache.drafted, _MOST_REMEMBERED),
            influence_rows=self._giving,
            keys=self._marks.keys,
            marked=self._marked_rows,
        )

    def end(self, batch: TokenBatch) -> None:
        """Add the complete pass to its sequence."""
        earlier = self._sequence.layers if self._continues else {}
        for layer, norms in self._norms.items():
            self._pass[layer] = self._pass[layer].with_norms(norms, earlier.get(layer))
        if not self._continues:
            self._finished += self._current()
            self._sequence = GrowingSequence()
        self._sequence = self._sequence.extended(
            self._pass, batch, self._distribution_entropy, self._cache, self._marks
        )
        self.abort()

    def abort(self) -> None:
        """Forget the pass that is under way; earlier ones are kept."""
        self._pass, self._continues, self._distribution_entropy, self._marks = {}, False, None, None
        self._norms, self._giving, self._marked_rows = {}, None, MarkedRows()

    def result(self) -> HeadStatistics:
        """Return the statistics of all sequences so far, joined along the batch axis.

        Raises:
            ResultError: no complete pass was observed.
            PatternError: more guesses were taken from the KV cache than are remembered.
        """
        parts = [*self._finished, *self._current()]
        if not parts:
            raise ResultError("there are no statistics yet: no complete forward pass was observed")
        return HeadStatistics.concatenate([part.statistics for part in parts])

    def rows_left(self) -> Int[Tensor, "batch layer head"] | None:
        """Return of how many response rows the span that ignores keys is a mean; None without that span."""
        counts = [part.rows_left for part in (*self._finished, *self._current())]
        known = [each for each in counts if each is not None]
        return torch.cat(known) if known else None

    def reset(self) -> None:
        """Forget all passes."""
        self.abort()
        self._sequence, self._cache = GrowingSequence(), None
        self._finished = []

    def _current(self) -> list[_Finished]:
        """Return the statistics of the sequences that may still grow, as a list of one or none."""
        sequence = self._sequence.settled()
        if not sequence.layers:
            return []
        assert sequence.response_mask is not None
        assert sequence.marks is not None
        mask, segments = sequence.response_mask, sequence.segment_ids
        layers = sorted(sequence.layers)
        heads = [sequence.layers[layer].waad.shape[1] for layer in layers]
        # All layers go as one with many heads. They may lie on different devices.
        sums = LayerSums.of_layers([sequence.layers[layer] for layer in layers], mask.device)
        reduced = self._reduced(sums, heads, mask, segments, sequence.marks.to(mask.device))
        joined: dict[str, Any] = {"span": None, "receiver_kurtosis": None}
        joined |= {name: _by_layer(values, heads) for name, values in reduced.items()}
        rows_left = joined.pop("rows_left", None)
        statistics = HeadStatistics(
            **joined,
            entropy=sequence.entropy,
            response_mask=mask,
            segment_ids=segments,
            input_ids=sequence.input_ids,
            layers=tuple(layers),
            window=self.window,
            horizon=self.horizon,
            receiver_level="token" if self.receiver else None,
            share_from=self.asked.share_from,
            share_on=self.asked.share_on,
            span_ignores=self.asked.span_ignores,
            influence_rows=self.asked.influence_rows,
            value_weighted=self.value_weighted,
        )
        return [_Finished(statistics, None if rows_left is None else rows_left.nan_to_num().long())]

    def _reduced(
        self, sums: LayerSums, heads: list[int], mask: Tensor, segments: Tensor | None, marks: SegmentMarks
    ) -> dict[str, Tensor]:
        """Return the statistics of all layers from their sums, with the heads of all layers on one axis."""
        giving = marks.rows(self.asked.influence_rows)
        reduced = {
            "waad": sums.waad.masked_fill(~mask[:, None], torch.nan),
            "fai": reductions.influence_of(
                _weighted(sums.received, sums.value_norms), mask, self.horizon, segments, giving
            ),
        }
        members = None if segments is None else _sequences_with_response(mask, segments.to(mask.device))
        if sums.distance is not None:
            reduced["span"] = reductions.mean_over_rows(sums.distance, mask)
            if members is not None:
                spans = [reductions.mean_over_rows(sums.distance, mask & member) for member in members]
                reduced["sequence_span"] = torch.stack(spans, dim=-1)
        if sums.left is not None:
            left = sums.left
            reduced["span_ignoring"] = reductions.mean_distance_left(left, mask)
            reduced["rows_left"] = reductions.rows_with_rest(left, mask).sum(-1).to(left.dtype)
            if members is not None:
                spans = [reductions.mean_distance_left(left, mask & member) for member in members]
                reduced["sequence_span_ignoring"] = torch.stack(spans, dim=-1)
        if sums.shares is not None:
            sources = [marks.rows(name) for name in self.asked.share_from]
            reduced["shares"] = _shares(sums.shares, sources)
            if members is not None:
                parts = [_shares(sums.shares, [rows & member for rows in sources]) for member in members]
                reduced["sequence_shares"] = torch.stack(parts, dim=-1)
        if sums.received_far is not None:
            received = _weighted(sums.received_far, sums.value_norms)
            # Layer by layer: it takes several copies in float64.
            by_layer = [
                reductions.selectivity_of(of_layer, mask, segment_ids=segments)
                for of_layer in received.split(heads, dim=1)
            ]
            reduced["receiver_kurtosis"] = torch.cat([each.kurtosis for each in by_layer], dim=1)
            reduced["receiver_gini"] = torch.cat([each.gini for each in by_layer], dim=1)
        return reduced


@dataclass(frozen=True)
class _Finished:
    """The statistics of sequences, and of how many rows their second span is a mean; None without one."""

    statistics: HeadStatistics
    rows_left: Int[Tensor, "batch layer head"] | None


def _weighted(
    received: Float[Tensor, "batch head token"], norms: Float[Tensor, "batch head token"] | None
) -> Float[Tensor, "batch head token"]:
    """Return what each token received, times the norm of its value: that depends on the key only."""
    return received if norms is None else received * norms.to(received)


def _shares(
    shares: Float[Tensor, "batch head token target"], sources: list[Tensor]
) -> Float[Tensor, "batch head source target"]:
    """Return the mean share of the rows of each source on each target."""
    by_target = shares.unbind(-1)
    return torch.stack(
        [
            torch.stack([reductions.mean_over_rows(share, rows) for share in by_target], dim=-1)
            for rows in sources
        ],
        dim=-2,
    )


def _sequences_with_response(
    response: Bool[Tensor, "batch token"], segment_ids: Int[Tensor, "batch token"]
) -> list[Bool[Tensor, "batch token"]]:
    """Return the tokens of the first packed sequence with a response of each example, of the second, ..."""
    numbers = [ids[marked].unique() for ids, marked in zip(segment_ids, response, strict=True)]
    count = max(1, *(len(each) for each in numbers))
    members = []
    for place in range(count):
        number = torch.stack(
            [
                each[place] if place < len(each) else -response.new_ones((), dtype=torch.long)
                for each in numbers
            ]
        )
        members.append((segment_ids == number[:, None]) & (number[:, None] >= 0))
    return members


def _by_layer(values: Tensor, heads: list[int]) -> Tensor:
    """Return values with an axis for layers before that for heads; NaN for heads that a layer lacks."""
    most = max(heads)
    if min(heads) < most:
        parts = values.split(heads, dim=1)
        behind = [0, 0] * (values.ndim - 2)
        padded = [
            torch.nn.functional.pad(part, (*behind, 0, most - part.shape[1]), value=torch.nan)
            for part in parts
        ]
        values = torch.cat(padded, dim=1)
    return values.reshape(len(values), len(heads), most, *values.shape[2:])

"""The sums behind head statistics, while a sequence grows step by step with a KV cache.

Each forward pass adds rows to the attention matrix, and what the metrics need from a row can be accumulated:
its distance for span, its WAAD, its shares, and what it gives each token for FAI. A whole sequence in one
pass is the case of one step. A step must continue the last one: the same examples in the same order, with as
many columns before it as were observed. In assisted decoding the last rows of a step may be guesses that are
taken back: what they added is kept apart, row by row, until the next step.

`HeadStatisticsProbe` calls `add_rows` for each layer of each pass. What is left to others: the definitions
(metrics) and the results (head_statistics).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe import reductions
from attnprobe.attention.checks import judge_later
from attnprobe.attention.operator import Attention
from attnprobe.errors import PatternError
from attnprobe.metric_arguments import check_mask
from attnprobe.reductions import Horizon, MarkedKeys


@dataclass(frozen=True)
class LayerSums:
    """What the rows of one layer's attention add up to so far.

    Attributes:
        distance: the mean distance of each row; None if not wanted.
        waad: the WAAD of each row.
        received: what each column received within FAI's horizon.
        received_far: what each column received within the horizon of receiver kurtosis; None if not wanted.
        fingerprint: a number for each column's key; None where only patterns are known.
        shares: the share of each row that is on the keys of each target; None if not wanted.
        left: of each row without the keys to ignore, its mass and its distance (see `RowReads`); None if not
            wanted.
        value_norms: of each column's value after each head's output projection; None if not wanted.
        drafts: what the last rows added, if they may be taken back.
    """

    distance: Float[Tensor, "batch head token"] | None
    waad: Float[Tensor, "batch head token"]
    received: Float[Tensor, "batch head token"]
    received_far: Float[Tensor, "batch head token"] | None
    fingerprint: Float[Tensor, "batch token"] | None
    drafts: _Drafts | None = None
    shares: Float[Tensor, "batch head token target"] | None = None
    left: Float[Tensor, "batch head token 2"] | None = None
    value_norms: Float[Tensor, "batch head token"] | None = None

    @staticmethod
    def of_layers(layers: Sequence[LayerSums], device: torch.device) -> LayerSums:
        """Return the sums of several layers, on a device, as those of one layer with the heads of all.

        They cannot be continued.
        """

        def joined(name: str) -> Tensor | None:
            parts = [getattr(layer, name) for layer in layers]
            known = [part.to(device) for part in parts if part is not None]
            return torch.cat(known, dim=1) if known else None

        waad, received = joined("waad"), joined("received")
        assert waad is not None
        assert received is not None
        return LayerSums(
            joined("distance"),
            waad,
            received,
            joined("received_far"),
            None,
            shares=joined("shares"),
            left=joined("left"),
            value_norms=joined("value_norms"),
        )

    def without_last(self, count: int) -> LayerSums:
        """Return the sums without the last rows, of which there must be as many drafts."""
        drafts, columns = self.drafts, self.column_count - count
        assert drafts is not None
        drafts = drafts.without_last(count)
        return replace(
            self,
            distance=None if self.distance is None else self.distance[..., :columns],
            waad=self.waad[..., :columns],
            received=drafts.received.total(columns),
            received_far=None if drafts.received_far is None else drafts.received_far.total(columns),
            fingerprint=None if self.fingerprint is None else self.fingerprint[:, :columns],
            drafts=drafts,
            shares=None if self.shares is None else self.shares[:, :, :columns],
            left=None if self.left is None else self.left[:, :, :columns],
            value_norms=None if self.value_norms is None else self.value_norms[..., :columns],
        )

    def with_norms(
        self, norms: Float[Tensor, "batch head pass_token"], before: LayerSums | None
    ) -> LayerSums:
        """Return the sums with the norms of this pass's values, behind those of earlier passes."""
        if before is not None and before.value_norms is not None:
            norms = torch.cat([before.value_norms, norms.to(before.value_norms.device)], dim=-1)
        return replace(self, value_norms=norms)

    @property
    def remembered(self) -> int:
        """How many of the last rows can be taken back."""
        return 0 if self.drafts is None else self.drafts.received.rows.shape[2]

    @property
    def column_count(self) -> int:
        """How many columns the sequence has so far."""
        return self.waad.shape[-1]


@dataclass(frozen=True)
class _Addends:
    """A sum, with what each of its last rows added to it.

    Attributes:
        before: the sum without these rows.
        rows: what each row added, with an axis for rows after the heads, from the first column on.
        first: the column that the rows' first number belongs to.
    """

    before: Float[Tensor, "batch head column"]
    rows: Float[Tensor, "batch head row reach"]
    first: int = 0

    def total(self, columns: int) -> Float[Tensor, "batch head column"]:
        """Return the sum, of so many columns."""
        total = self.before[..., :columns].clone()
        total[..., self.first :] += self.rows[..., : columns - self.first].sum(2)
        return total


@dataclass(frozen=True)
class _Drafts:
    """What the last rows, which may be taken back, added to the sums of a layer."""

    received: _Addends
    received_far: _Addends | None

    def without_last(self, count: int) -> _Drafts:
        """Return the drafts without the last rows."""

        def kept(part: _Addends | None) -> _Addends | None:
            return None if part is None else replace(part, rows=part.rows[:, :, : part.rows.shape[2] - count])

        received = kept(self.received)
        assert received is not None
        return _Drafts(received, kept(self.received_far))


class MarkedRows:
    """Which rows of a pass are marked in some example, asked of the device once for all layers."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, list[bool]]] = []

    def of(self, rows: Bool[Tensor, "batch pass_token"]) -> list[bool]:
        """Return which rows a mask marks in some example."""
        for mask, known in self._known:
            if mask is rows:
                return known
        self._known.append((rows, rows.any(0).tolist()))
        return self._known[-1][1]


def add_rows(
    before: LayerSums | None,
    attention: Attention,
    response_mask: Bool[Tensor, "batch pass_token"],
    window: int,
    horizon: Horizon,
    far_horizon: Horizon | None,
    *,
    span: bool = True,
    drafted: int = 0,
    influence_rows: Bool[Tensor, "batch pass_token"] | None = None,
    keys: MarkedKeys = MarkedKeys(),  # noqa: B008 (frozen)
    marked: MarkedRows | None = None,
) -> LayerSums:
    """Return the sums with the rows of another pass added; the last `drafted` rows may be taken back.

    FAI's rows are `influence_rows`, or else those of the response; `keys` are columns of the whole sequence.
    `marked` remembers what is the same for all layers of the pass. A layer may be given only the last tokens
    of a pass (Gemma 4 in the prefill of `generate`). Sums that need a row which it did not compute are NaN.

    Raises:
        PatternError: a pass that does not continue the one before.
    """
    columns = attention.key_start + attention.key_count
    start = columns - response_mask.shape[1]
    _check_continues(before, attention, start)
    missing = response_mask.shape[1] - attention.query_count
    known_rows = MarkedRows() if marked is None else marked
    giving = response_mask if influence_rows is None else influence_rows
    drafted = min(drafted, attention.query_count)
    guesses = None
    if drafted:
        last = torch.arange(attention.query_count - drafted, attention.query_count)
        guesses = attention.rows(last)
    reads = reductions.read_rows(attention, keys, span=span)

    def lasting(rows: Tensor) -> Tensor:
        """Return which rows of this pass are marked and will not be taken back."""
        rows = check_mask(attention, rows[:, missing:])
        return rows & (torch.arange(rows.shape[1], device=rows.device) < rows.shape[1] - drafted)

    # One look at the near pairs serves both WAAD and FAI.
    near = reductions.near_reductions(attention, window, horizon, lasting(giving))
    waad = reductions.windowed_distance_by_row(attention, window, None if near is None else near.shortfall)

    def with_earlier(now: Tensor | None, earlier: Tensor | None) -> Tensor | None:
        """Put rows `[batch, head, row, ...]` behind those of earlier passes; NaN where none was computed."""
        if now is None:
            return None
        behind = [0, 0] * (now.ndim - 3)
        now = torch.nn.functional.pad(now, (*behind, missing, 0), value=torch.nan) if missing else now
        return now if before is None or earlier is None else torch.cat([earlier, now], dim=2)

    def received(
        rows: Tensor, earlier: Tensor | None, within: Horizon, now: Tensor | None, unknown: Tensor | None
    ) -> tuple[Tensor, _Addends | None]:
        """Add what this pass's keys received to what the columns had received before; NaN where unknown."""
        if now is None:
            now = reductions.received_by_key(
                attention, lasting(rows), within, lambda: known_rows.of(rows)[missing:]
            )
        total = now.new_zeros(*now.shape[:2], columns)
        if earlier is not None:
            total[..., : earlier.shape[-1]] = earlier
        total[..., attention.key_start :] += now
        if unknown is not None:
            total = total.masked_fill(unknown.to(total.device)[:, None], torch.nan)
        if guesses is None:
            return total, None
        given = guesses * rows[:, None, rows.shape[1] - drafted :, None].to(guesses.device)
        drafts = _Addends(total, *_within(given, attention, within))
        return drafts.total(columns), drafts

    def absent(rows: Tensor) -> Tensor | None:
        """Return which rows were not computed, by column; None if all were."""
        if not missing:
            return None
        return torch.nn.functional.pad(rows[:, :missing], (start, columns - start - missing))

    lacking = absent(giving)
    unknown = None if lacking is None else reductions.rows_in_horizon(lacking, *horizon, None) > 0
    now = None if near is None else near.received
    sums, drafts = received(giving, None if before is None else before.received, horizon, now, unknown)
    sums_far, drafts_far = None, None
    if far_horizon == horizon and not missing and influence_rows is None:
        sums_far, drafts_far = sums, drafts
    elif far_horizon is not None:
        lacking = absent(response_mask)
        # Kurtosis leaves NaN out, but is not known unless all tokens are.
        unknown = None if lacking is None else lacking.any(-1, keepdim=True)
        earlier = None if before is None else before.received_far
        sums_far, drafts_far = received(response_mask, earlier, far_horizon, None, unknown)
    fingerprint = attention.key_fingerprint()
    if before is not None and fingerprint is not None and before.fingerprint is not None:
        fingerprint = torch.cat([before.fingerprint[:, : attention.key_start], fingerprint], dim=-1)
    all_waad = with_earlier(waad, None if before is None else before.waad)
    assert all_waad is not None
    return LayerSums(
        with_earlier(reads.distance, None if before is None else before.distance),
        all_waad,
        sums,
        sums_far,
        fingerprint,
        None if drafts is None else _Drafts(drafts, drafts_far),
        with_earlier(reads.shares, None if before is None else before.shares),
        with_earlier(reads.left, None if before is None else before.left),
    )


def _within(
    rows: Float[Tensor, "batch head row key"], attention: Attention, horizon: Horizon
) -> tuple[Float[Tensor, "batch head row reach"], int]:
    """Return the part of an attention's last rows that lies within a horizon, and its first column."""
    low, high = horizon
    count, key_count = rows.shape[2:]
    key = torch.arange(key_count, device=rows.device)
    distance = torch.arange(key_count - count, key_count, device=rows.device)[:, None] - key
    inside = distance >= low
    first = 0
    if high is not None:
        inside &= distance <= high
        first = max(0, key_count - count - high)
    return rows.masked_fill(~inside, 0.0)[..., first:].clone(), first + attention.key_start


def _check_continues(before: LayerSums | None, attention: Attention, start: int) -> None:
    if before is None:
        if start != 0:
            raise PatternError(
                f"this pass has {start} columns of cached keys before it that were not observed: attach "
                "before the first pass of the sequence, or measure the finished sequence"
            )
        return
    if start != before.column_count or attention.batch_size != before.waad.shape[0]:
        if attention.batch_size != before.waad.shape[0]:
            why = "examples were repeated or left out"
        elif start > before.column_count:
            why = "passes in between were not observed"
        else:
            why = "it was cropped by more than the last guesses of assisted decoding, or is another cache"
        raise PatternError(
            f"this pass continues a cache of {attention.batch_size} examples and {start} columns, but "
            f"{before.waad.shape[0]} examples and {before.column_count} columns were observed before it: "
            f"{why}. Measure the finished sequence instead"
        )
    fingerprint = attention.key_fingerprint()
    if fingerprint is None or before.fingerprint is None:
        if attention.batch_size > 1:
            raise PatternError(
                "a cache of several examples cannot be followed where only attention maps are known, since "
                "they do not show whether examples were reordered: measure the finished sequence instead"
            )
        return
    # Only columns that both have: a sliding cache has dropped the first ones.
    now = fingerprint[:, : start - attention.key_start]
    then = before.fingerprint[:, attention.key_start : start]
    if then.numel() == 0:
        return
    scale = then.abs().amax()

    def agree(ours: Tensor, theirs: Tensor) -> Tensor:
        return ((ours - theirs).abs() <= 1e-4 * scale + 1e-3 * theirs.abs()).all()

    def judge(agreed: list[float]) -> None:
        if agreed[0]:
            return
        if all(any(bool(agree(ours, theirs)) for theirs in then) for ours in now):
            raise PatternError(
                "the examples in the KV cache were reordered between two passes, as beam search does: what "
                "was observed before belongs to other examples. Measure the finished sequences instead"
            )
        raise PatternError(
            "the keys in the KV cache are not those that were observed: they were changed between two "
            "passes, as in a quantised cache, or belong to another sequence. Measure the finished sequences "
            "instead"
        )

    judge_later([agree(now, then)], judge)

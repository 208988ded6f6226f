"""The sums behind head statistics, while a sequence grows step by step with a KV cache.

Each forward pass adds rows to the attention matrix, and what the metrics need from a row can be accumulated:
its distance for span, its WAAD, and what it gives each token for FAI. A whole sequence in one pass is the
case of one step. A step must continue the last one: the same examples in the same order, with as many
columns before it as were observed. In assisted decoding the last rows of a step may be guesses that are taken
back: what they added is kept apart, row by row, until the next step.

`HeadStatisticsProbe` calls `add_rows` for each layer of each pass. What is left to others: the definitions
(metrics) and the results (head_statistics).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe import metrics, reductions
from attnprobe.attention.operator import Attention
from attnprobe.errors import PatternError
from attnprobe.reductions import Horizon


@dataclass(frozen=True)
class LayerSums:
    """What the rows of one layer's attention add up to so far.

    Attributes:
        distance: the mean distance of each row; None if not wanted.
        waad: the WAAD of each row.
        received: what each column received within FAI's horizon.
        received_far: what each column received within the horizon of receiver kurtosis; None if not wanted.
        fingerprint: a number for each column's key; None where only patterns are known.
        drafts: what the last rows added, if they may be taken back.
    """

    distance: Float[Tensor, "batch head token"] | None
    waad: Float[Tensor, "batch head token"]
    received: Float[Tensor, "batch head token"]
    received_far: Float[Tensor, "batch head token"] | None
    fingerprint: Float[Tensor, "batch token"] | None
    drafts: _Drafts | None = None

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
        )

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
) -> LayerSums:
    """Return the sums with the rows of another pass added; the last `drafted` rows may be taken back.

    A layer may be given only the last tokens of a pass (Gemma 4 in the prefill of `generate`). Sums that
    need a response row which it did not compute are NaN.

    Raises:
        PatternError: a pass that does not continue the one before.
    """
    columns = attention.key_start + attention.key_count
    start = columns - response_mask.shape[1]
    _check_continues(before, attention, start)
    missing = response_mask.shape[1] - attention.query_count
    mask = metrics.check_mask(attention, response_mask[:, missing:])
    lacking = response_mask[:, :missing]
    # One band serves both WAAD and FAI.
    near = reductions.near_band(attention, window, horizon)
    drafted = min(drafted, attention.query_count)
    lasting = mask.clone()
    lasting[:, mask.shape[1] - drafted :] = False
    guesses = None
    if drafted:
        last = torch.arange(attention.query_count - drafted, attention.query_count)
        guesses = attention.rows(last) * mask[:, None, last.to(mask.device), None]
    distance = attention.mean_distance() if span else None
    waad = reductions.windowed_distance_by_row(attention, window, near)
    if missing:
        waad = torch.nn.functional.pad(waad, (missing, 0), value=torch.nan)
        if distance is not None:
            distance = torch.nn.functional.pad(distance, (missing, 0), value=torch.nan)

    def placed(
        received: Tensor, earlier: Tensor | None, within: Horizon, unknown: Tensor | None
    ) -> tuple[Tensor, _Addends | None]:
        """Add what this pass's keys received to what the columns had received before; NaN where unknown."""
        total = received.new_zeros(*received.shape[:2], columns)
        if earlier is not None:
            total[..., : earlier.shape[-1]] = earlier
        total[..., attention.key_start :] += received
        if unknown is not None:
            total = total.masked_fill(unknown.to(total.device)[:, None], torch.nan)
        if guesses is None:
            return total, None
        drafts = _Addends(total, *_within(guesses, attention, within))
        return drafts.total(columns), drafts

    unknown, unknown_far = None, None
    if missing:
        # Response rows that were not computed, by column.
        absent = torch.nn.functional.pad(lacking, (start, columns - start - missing))
        unknown = reductions.rows_in_horizon(absent, *horizon, None) > 0
        # Kurtosis leaves NaN out, but is not known unless all tokens are.
        unknown_far = absent.any(-1, keepdim=True)
    received, drafts = placed(
        reductions.received_by_key(attention, lasting, horizon, near),
        None if before is None else before.received,
        horizon,
        unknown,
    )
    received_far, drafts_far = None, None
    if far_horizon == horizon and not missing:
        received_far, drafts_far = received, drafts
    elif far_horizon is not None:
        received_far, drafts_far = placed(
            reductions.received_by_key(attention, lasting, far_horizon),
            None if before is None else before.received_far,
            far_horizon,
            unknown_far,
        )
    fingerprint = attention.key_fingerprint()
    if before is not None:
        if distance is not None and before.distance is not None:
            distance = torch.cat([before.distance, distance], dim=-1)
        waad = torch.cat([before.waad, waad], dim=-1)
        if fingerprint is not None and before.fingerprint is not None:
            fingerprint = torch.cat([before.fingerprint[:, : attention.key_start], fingerprint], dim=-1)
    of_guesses = None if drafts is None else _Drafts(drafts, drafts_far)
    return LayerSums(distance, waad, received, received_far, fingerprint, of_guesses)


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
    scale = float(then.abs().max()) if then.numel() else 1.0

    def agree(ours: Tensor, theirs: Tensor) -> bool:
        return bool(torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * scale))

    if then.numel() == 0 or agree(now, then):
        return
    if all(any(agree(ours, theirs) for theirs in then) for ours in now):
        raise PatternError(
            "the examples in the KV cache were reordered between two passes, as beam search does: what was "
            "observed before belongs to other examples. Measure the finished sequences instead"
        )
    raise PatternError(
        "the keys in the KV cache are not those that were observed: they were changed between two passes, as "
        "in a quantised cache, or belong to another sequence. Measure the finished sequences instead"
    )

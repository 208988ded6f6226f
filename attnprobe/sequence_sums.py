"""The sums behind head statistics, while a sequence grows step by step with a KV cache.

Each forward pass adds rows to the attention matrix, and what the metrics need from a row can be accumulated:
its distance for span, its WAAD, and what it gives each token for FAI. A whole sequence in one pass is the
case of one step. A step must continue the last one: the same examples in the same order, with as many
columns before it as were observed. `HeadStatisticsProbe` calls `add_rows` for each layer of each pass. What
is left to others: the definitions (metrics) and the results (head_statistics).
"""

from __future__ import annotations

from dataclasses import dataclass

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
        distance: the sum of the mean distances of response rows; None if not wanted.
        waad: the WAAD of each row.
        received: what each column received within FAI's horizon.
        received_far: what each column received within the horizon of receiver kurtosis; None if not wanted.
        fingerprint: a number for each column's key; None where only patterns are known.
    """

    distance: Float[Tensor, "batch head"] | None
    waad: Float[Tensor, "batch head token"]
    received: Float[Tensor, "batch head token"]
    received_far: Float[Tensor, "batch head token"] | None
    fingerprint: Float[Tensor, "batch token"] | None

    @property
    def column_count(self) -> int:
        """How many columns the sequence has so far."""
        return self.waad.shape[-1]


def add_rows(
    before: LayerSums | None,
    attention: Attention,
    response_mask: Bool[Tensor, "batch pass_token"],
    window: int,
    horizon: Horizon,
    far_horizon: Horizon | None,
    *,
    span: bool = True,
) -> LayerSums:
    """Return the sums with the rows of another pass added.

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
    distance = None
    if span:
        distance = (attention.mean_distance() * mask[:, None].to(attention.dtype)).sum(-1)
    waad = reductions.windowed_distance_by_row(attention, window, near)
    if missing:
        waad = torch.nn.functional.pad(waad, (missing, 0), value=torch.nan)
        if distance is not None:
            distance = distance.masked_fill(lacking.any(-1, keepdim=True), torch.nan)

    def placed(received: Tensor, earlier: Tensor | None) -> Tensor:
        """Add what this pass's keys received to what the columns had received before."""
        total = received.new_zeros(*received.shape[:2], columns)
        if earlier is not None:
            total[..., : earlier.shape[-1]] = earlier
        total[..., attention.key_start :] += received
        return total

    received = placed(
        reductions.received_by_key(attention, mask, horizon, near),
        None if before is None else before.received,
    )
    if missing:
        rows = torch.nn.functional.pad(lacking, (start, columns - start - missing))
        unknown = reductions.rows_in_horizon(rows, *horizon, None) > 0
        received = received.masked_fill(unknown.to(received.device)[:, None], torch.nan)
    received_far = None
    if far_horizon == horizon:
        received_far = received
    elif far_horizon is not None:
        received_far = placed(
            reductions.received_by_key(attention, mask, far_horizon),
            None if before is None else before.received_far,
        )
    if received_far is not None and missing:
        # Kurtosis leaves NaN out, but is not known unless all tokens are.
        received_far = received_far.masked_fill(lacking.any(-1)[:, None, None], torch.nan)
    fingerprint = attention.key_fingerprint()
    if before is not None:
        if distance is not None and before.distance is not None:
            distance = before.distance + distance
        waad = torch.cat([before.waad, waad], dim=-1)
        if fingerprint is not None and before.fingerprint is not None:
            fingerprint = torch.cat([before.fingerprint[:, : attention.key_start], fingerprint], dim=-1)
    return LayerSums(distance, waad, received, received_far, fingerprint)


def _check_continues(before: LayerSums | None, attention: Attention, start: int) -> None:
    if before is None:
        if start != 0:
            raise PatternError(
                f"this pass has {start} columns of cached keys before it that were not observed: attach "
                "before the first pass of the sequence, or measure the finished sequence"
            )
        return
    if start != before.column_count or attention.batch_size != before.waad.shape[0]:
        raise PatternError(
            f"this pass continues a cache of {attention.batch_size} examples and {start} columns, but "
            f"{before.waad.shape[0]} examples and {before.column_count} columns were observed before it: a "
            "cache that is cropped or shared cannot be followed. Measure the finished sequence instead"
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
    if then.numel() and not bool(torch.allclose(now, then, rtol=1e-3, atol=1e-4 * scale)):
        raise PatternError(
            "the examples in the KV cache were reordered between two passes, as beam search does: what was "
            "observed before belongs to other examples. Measure the finished sequences instead"
        )

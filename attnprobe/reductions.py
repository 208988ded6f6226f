"""The reductions behind the metrics: what a forward pass adds to span, WAAD, FAI, kurtosis and shares.

`metrics` applies them to a whole sequence, `sequence_sums` to each step of a KV cache, whose results it adds
up. What is left to others: the definitions, with ranges and examples (metrics).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnprobe.attention.operator import Attention
from attnprobe.errors import ParameterError
from attnprobe.validation import ArrayLike, as_tensor, brief

Horizon = tuple[int, int | None]

TRAINING_HORIZON: Horizon = (10, 100)
"""The horizon of FAI in the paper's training runs (v1: `(10, 50)`), the default everywhere."""

RECEIVER_HORIZON: Horizon = (10, None)
"""The horizon of receiver kurtosis: near rows are left out."""

WIDEST_BAND = 128
"""A horizon wider than this is summed by `receive`, whose cost does not grow with it, rather than from a
band, whose memory does."""


LEAST_LEFT = 1e-30
"""A row with less than this on the keys that are not ignored has nothing left: the rest may be rounding."""


@dataclass(frozen=True)
class MarkedKeys:
    """The columns of a sequence whose attention is asked for.

    Attributes:
        shares: for each target, the columns whose share of a row is wanted; None if no share is.
        single: whether a target marks at most one column of each example, for each target.
        ignored: the columns that a second span ignores; None if there is none.
        ignores_column_0: whether column 0 is all that is ignored, in every example.
        at_column_0: whether a target marks column 0 alone, in every example, for each target.
    """

    shares: Bool[Tensor, "batch target column"] | None = None
    single: tuple[bool, ...] = ()
    ignored: Bool[Tensor, "batch column"] | None = None
    ignores_column_0: bool = False
    at_column_0: tuple[bool, ...] = ()


@dataclass(frozen=True)
class RowReads:
    """What each row reads from marked keys.

    Attributes:
        distance: the mean distance; None if not wanted.
        shares: the share of each target; None if not wanted.
        left: without the ignored keys, the row's mass, and the sum of its attention times the distance.
    """

    distance: Float[Tensor, "batch head query"] | None
    shares: Float[Tensor, "batch head query target"] | None
    left: Float[Tensor, "batch head query 2"] | None


def read_rows(attention: Attention, keys: MarkedKeys, *, span: bool) -> RowReads:
    """Return what each row reads from marked keys, with one `attend` for all that is not known already.

    A single key costs no `attend`. Nor does a span that ignores column 0, where a kernel has computed it
    along the way. The mass that is left is summed directly, not as a difference from 1, which would lose its
    precision where it is small.
    """
    columns = slice(attention.key_start, attention.key_start + attention.key_count)
    position = attention.key_positions()
    past_first = attention.past_first()
    is_known = keys.ignores_column_0 and attention.key_start == 0 and past_first is not None
    features: list[Tensor] = []  # each [batch, key]
    if keys.ignored is not None and not is_known:
        kept = (~keys.ignored[:, columns]).to(device=attention.device, dtype=attention.dtype)
        features += [kept, kept * position]
    many = [number for number, single in enumerate(keys.single) if not single]
    shares: list[Tensor] = []
    if keys.shares is not None:
        marked = keys.shares[..., columns].to(attention.device)
        features += [marked[:, number].to(attention.dtype) for number in many]
        for number, single in enumerate(keys.single):
            if attention.key_start == 0 and keys.at_column_0[number : number + 1] == (True,):
                shares.append(attention.column(0))
                continue
            # The index of the marked key, or -1 if it is none of these.
            index = marked[:, number].byte().argmax(-1).masked_fill(~marked[:, number].any(-1), -1)
            shares.append(attention.column(index) if single else index)
    # The distance goes along for nothing if there is an `attend` anyway.
    goes_along = span and bool(features) and past_first is None
    if goes_along:
        features.append(position.expand(attention.batch_size, -1))
    read: list[Tensor] = []
    if features:
        read = list(attention.attend(torch.stack(features, dim=-1), nonnegative=True).unbind(-1))
    own = position[attention.query_offset :]
    distance = None
    if goes_along:
        distance = own * attention.row_mass() - read.pop()
    elif span:
        distance = attention.mean_distance()
    left = None
    if keys.ignored is not None:
        if not is_known:
            left, read = torch.stack(read[:2], dim=-1), read[2:]
        else:
            left = past_first
        assert left is not None
        mass = left[..., 0]
        left = torch.stack([mass, (own * mass - left[..., 1]).clamp(min=0.0)], dim=-1)
    for number, share in zip(many, read, strict=True):
        shares[number] = share
    # Rounding can take a sum of probabilities beyond 1.
    stacked = torch.stack(shares, dim=-1).clamp(max=1.0) if shares else None
    return RowReads(distance, stacked, left)


def mean_over_rows(
    values: Float[Tensor, "batch head token"], rows: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch head"]:
    """Return the mean over the marked rows; NaN if there is none, or if one of them is NaN."""
    total = values.masked_fill(~rows[:, None], 0.0).sum(-1)
    count = rows.sum(-1, keepdim=True).to(total.dtype)
    return total / count.masked_fill(count == 0, torch.nan)


def rows_with_rest(
    left: Float[Tensor, "batch head token 2"], rows: Bool[Tensor, "batch token"]
) -> Bool[Tensor, "batch head token"]:
    """Return which of the marked rows have something left of them, or are not known."""
    return rows[:, None] & ~(left[..., 0] < LEAST_LEFT)


def mean_distance_left(
    left: Float[Tensor, "batch head token 2"], rows: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch head"]:
    """Return the mean distance of what is left of the marked rows, renormalised; see `RowReads.left`."""
    counted = rows_with_rest(left, rows)
    mass, distance = left.unbind(-1)
    total = (distance / mass.masked_fill(~counted, 1.0)).masked_fill(~counted, 0.0).sum(-1)
    count = counted.sum(-1).to(total.dtype)
    return total / count.masked_fill(count == 0, torch.nan)


class NearReductions(NamedTuple):
    """What WAAD and FAI take from near pairs.

    Attributes:
        shortfall: of each row, how far its WAAD falls short of the window, times the row's mass.
        received: what each key receives within the horizon.
    """

    shortfall: Float[Tensor, "batch head query"]
    received: Float[Tensor, "batch head key"]


def near_reductions(
    attention: Attention, window: int, horizon: Horizon, rows: Bool[Tensor, "batch query"]
) -> NearReductions | None:
    """Return what WAAD and FAI share: one look at the near pairs; None where one does not suit both."""
    low, high = _distances_within(attention, horizon)
    window = min(window, attention.key_count)
    if not _goes_by_band(attention, low, high) or max(window, high + 1) > WIDEST_BAND:
        return None
    distance = torch.arange(window, device=attention.device, dtype=attention.dtype)
    return NearReductions(*attention.near_sums(window - distance, rows.to(attention.dtype), low, high))


def windowed_distance_by_row(
    attention: Attention,
    window: int,
    shortfall: Float[Tensor, "batch head query"] | None = None,
) -> Float[Tensor, "batch head query"]:
    """Return the WAAD of each row (Eq. 9 of arXiv 2510.13554v2).

    `shortfall` is that of `near_reductions`, if known. A window that reaches beyond the first key caps
    nothing, and costs no more than one that ends there.
    """
    window = min(window, attention.key_count)
    if shortfall is None and window == attention.key_count:
        # No distance is capped: this is the plain mean distance, which needs no band as wide as the text.
        return attention.mean_distance().clamp(min=0.0)
    # min(t - s, W) is W, less what near keys fall short of it: far keys need not be visited.
    waad = window * attention.row_mass()
    if shortfall is not None:
        waad = waad - shortfall
    else:
        # In pieces, so that memory does not grow with the window.
        for start in range(0, window, WIDEST_BAND):
            stop = min(start + WIDEST_BAND, window)
            distance = torch.arange(start, stop, device=attention.device, dtype=attention.dtype)
            waad = waad - attention.band(stop - start, start) @ (window - distance)
    # Rounding can leave the first token, which sees only itself, slightly below 0.
    return waad.clamp(min=0.0)


def received_by_key(
    attention: Attention,
    rows: Bool[Tensor, "batch query"],
    horizon: Horizon,
    counted: Callable[[], Sequence[bool]] | None = None,
) -> Float[Tensor, "batch head key"]:
    """Return what each key receives from the marked rows within its horizon.

    This is the numerator of Eq. 10 of arXiv 2510.13554v2. `counted` returns which rows are marked in some
    example, if the caller can tell.
    """
    low, high = _distances_within(attention, horizon)
    weights = rows.to(attention.dtype)
    if _goes_by_band(attention, low, high):
        return attention.near_sums(weights.new_empty(0), weights, low, high).by_key
    known = None if counted is None else counted()
    received = attention.receive(
        weights[..., None], start=low, stop=high + 1, counted=known, nonnegative=True
    )
    return received[..., 0]


def _distances_within(attention: Attention, horizon: Horizon) -> tuple[int, int]:
    """Return the nearest and the farthest distance of a horizon at which there are keys.

    A horizon that lies beyond all keys gives `(key_count, key_count)`, where there is nothing.
    """
    low, high = horizon
    farthest = attention.key_count - 1
    low = min(low, farthest + 1)
    return low, max(low, farthest if high is None else min(high, farthest))


def _goes_by_band(attention: Attention, low: int, high: int) -> bool:
    """Whether a horizon is summed from a band.

    A band pays off where there are more queries than distances; a cached step has one query.
    """
    width = high - low + 1
    return width <= min(WIDEST_BAND, attention.query_count)


def influence_of(
    received: Float[Tensor, "batch head token"],
    response_mask: Bool[Tensor, "batch token"],
    horizon: Horizon,
    segment_ids: Int[Tensor, "batch token"] | None = None,
    rows: Bool[Tensor, "batch token"] | None = None,
) -> Float[Tensor, "batch head token"]:
    """Return FAI from what each token received: Eq. 10 divides it by the response rows in its horizon.

    `rows` are those that gave, if not those of the response.
    """
    count = rows_in_horizon(response_mask if rows is None else rows, *horizon, segment_ids)
    defined = response_mask & (count > 0)
    influence = received / count.clamp(min=1)[:, None].to(received.dtype)
    return influence.masked_fill(~defined[:, None], torch.nan)


class Selectivity(NamedTuple):
    """How unevenly what tokens or sentences receive is spread over them; see `kurtosis` and `gini`."""

    kurtosis: Float[Tensor, "*axes"]
    gini: Float[Tensor, "*axes"]

    @staticmethod
    def of(received: Float[Tensor, "*axes received"]) -> Selectivity:
        """Return both measures over the last axis."""
        return Selectivity(_kurtosis(received), _gini(received))


def selectivity_of(
    received: Float[Tensor, "batch head token"],
    response_mask: Bool[Tensor, "batch token"],
    horizon: Horizon = RECEIVER_HORIZON,
    segment_ids: Int[Tensor, "batch token"] | None = None,
    minimum_rows: int = 10,
) -> Selectivity:
    """Return how selective inbound attention is, `[batch, head]`, from what each token received.

    Tokens with fewer than `minimum_rows` response rows in their horizon are left out.
    """
    influence = influence_of(received, response_mask, horizon, segment_ids)
    minimum_rows = min(minimum_rows, response_mask.shape[1] + 1)
    rows = rows_in_horizon(response_mask, *horizon, segment_ids)
    return Selectivity.of(influence.masked_fill((rows < minimum_rows)[:, None], torch.nan))


FEWEST_VALUES = 4
"""With fewer values, their spread is arithmetic rather than attention: two that differ always have a kurtosis
of -2, three of -1.5."""


def kurtosis(values: ArrayLike) -> Float[Tensor, "*axes"]:
    """Return Fisher's biased kurtosis over the last axis, leaving out NaN.

    At least -2; at most about the number of values, so heavy-tailed values have a larger one the more of them
    there are. NaN for fewer than four values, and if all are equal.

    Raises:
        ParameterError: values that are not floating point, or none.

    >>> kurtosis(torch.tensor([0.0, 0.0, 0.0, 1.0, torch.nan]))
    tensor(-0.6667)
    >>> kurtosis(torch.ones(5))
    tensor(nan)
    """
    values = as_tensor(values, "values")
    if not values.is_floating_point() or values.numel() == 0 or values.ndim == 0:
        raise ParameterError(f"values must be floating point [..., token]; got {brief(values)}")
    return _kurtosis(values)


def _kurtosis(values: Float[Tensor, "*axes token"]) -> Float[Tensor, "*axes"]:
    wide = values.double()
    mean = wide.nanmean(-1, keepdim=True)
    deviation = wide - mean
    variance = deviation.square().nanmean(-1)
    # Equal values can leave a variance of rounding errors alone, whose kurtosis would be noise.
    largest = wide.abs().nan_to_num().amax(-1)
    constant = variance <= (largest * torch.finfo(values.dtype).eps).square()
    few = (~wide.isnan()).sum(-1) < FEWEST_VALUES
    result = deviation.pow(4).nanmean(-1) / variance.square() - 3
    return result.masked_fill(constant | few, torch.nan).to(values.dtype)


def gini(values: ArrayLike) -> Float[Tensor, "*axes"]:
    """Return the Gini coefficient over the last axis, leaving out NaN: how unequal shares of a sum are.

    The mean absolute difference of two values, divided by twice their mean. In `[0, 1)`: 0 if all values are
    equal, `1 - 1 / n` if one of n has everything. Unlike kurtosis, it does not grow with the number of values
    if their spread stays the same, and a single large value cannot decide it. NaN for fewer than four values,
    and if all are 0.

    Raises:
        ParameterError: values that are not floating point, none, or negative ones.

    >>> gini(torch.tensor([0.0, 0.0, 0.0, 1.0, torch.nan]))
    tensor(0.7500)
    >>> gini(torch.ones(5))
    tensor(0.)
    """
    values = as_tensor(values, "values")
    if not values.is_floating_point() or values.numel() == 0 or values.ndim == 0:
        raise ParameterError(f"values must be floating point [..., token]; got {brief(values)}")
    if bool((values < 0).any()):
        raise ParameterError(
            f"a Gini coefficient is of shares, which are not negative; got {float(values.nan_to_num().min())}"
        )
    return _gini(values)


def _gini(values: Float[Tensor, "*axes token"]) -> Float[Tensor, "*axes"]:
    # NaN comes last, so that ranks are those among the defined values.
    ordered = values.double().sort(-1).values.nan_to_num()
    count = (~values.isnan()).sum(-1).double()
    rank = torch.arange(1, values.shape[-1] + 1, device=values.device, dtype=torch.float64)
    total = ordered.sum(-1)
    result = 2 * (ordered * rank).sum(-1) / (count * total) - (count + 1) / count
    undefined = (count < FEWEST_VALUES) | (total == 0)
    # Rounding can leave equal values slightly below 0.
    return result.clamp(min=0.0).masked_fill(undefined, torch.nan).to(values.dtype)


def rows_in_horizon(
    mask: Tensor, low: int, high: int | None, segment_ids: Tensor | None
) -> Int[Tensor, "batch token"]:
    """Count the response rows in each token's horizon, within its own sequence."""
    count = mask.shape[1]
    # There are no rows beyond the end of the text.
    low, high = min(low, count), None if high is None else min(high, count)
    before = torch.nn.functional.pad(mask.long().cumsum(-1), (1, 0))
    token = torch.arange(count, device=mask.device).expand(mask.shape)
    end = torch.full_like(token, count - 1)
    if segment_ids is not None:
        ids = segment_ids.to(mask.device)
        borders = torch.ones_like(mask)
        borders[:, :-1] = ids[:, 1:] != ids[:, :-1]
        # The last token of each token's sequence: the nearest border at or after it.
        ends = token.masked_fill(~borders, count)
        end = ends.flip(-1).cummin(-1).values.flip(-1)
    first = (token + low).clamp(max=count)
    last = end if high is None else torch.minimum(token + high, end)
    stop = torch.maximum(last + 1, first).clamp(max=count)
    return before.gather(-1, stop) - before.gather(-1, first)

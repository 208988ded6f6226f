"""Classifying heads: which are local, which global, which receivers.

`classify_heads` ranks heads by what was measured and takes quantiles, as in Sec. 4.1 of arXiv
2510.13554v2; `group_heads` does so with given numbers. Users call the first after `measure`; analyses and
`rl` call both. What is left to others: measuring (measurement), the groups themselves (head_groups) and using
them (scores).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.errors import AttnprobeWarning, ParameterError, ResultError
from attnprobe.head_groups import GROUPS, Group, GroupsLike, HeadGroups, SelectivityName, head_groups
from attnprobe.head_statistics import (
    HeadStatistics,
    StatisticsLike,
    check_same_measurement,
    statistics_parts,
)
from attnprobe.validation import (
    ArrayLike,
    FloatLike,
    IntLike,
    as_tensor,
    brief,
    choice,
    real_number,
    whole_number,
)

__all__ = [
    "GROUPS",
    "Group",
    "GroupsLike",
    "HeadGroups",
    "SelectivityName",
    "SpanKind",
    "classify_heads",
    "group_heads",
    "head_groups",
    "warn_of_sinks",
]

SpanKind = Literal["plain", "ignoring"]
"""The spans by which heads can be ranked: that of Eq. 7, or the one that ignores some keys."""


def classify_heads(
    statistics: StatisticsLike,
    *,
    quantile: FloatLike = 0.3,
    receivers: IntLike = 20,
    selectivity: SelectivityName = "kurtosis",
    span: SpanKind = "plain",
) -> HeadGroups:
    """Group heads by their mean span over responses, and by receiver selectivity where measured.

    Sec. 4.1 of arXiv 2510.13554v2: of all heads of the measured layers, the 30% of lowest span are local
    and the 30% of highest span global.

    Args:
        statistics: those of a batch, or of any number of batches, such as a generator that measures one
            batch at a time: only sums are kept. Pass `statistics.select(slice(i, i + 1))` to classify over
            a single response. Each response counts the same, whatever its length.
        quantile: the share of heads in each of local and global, in (0, 0.5]: `floor(quantile * heads)`
            heads, at least one.
        receivers: how many of the most selective heads are receivers, as in arXiv 2506.19143; a head whose
            selectivity is undefined is never one.
        selectivity: what receivers are ranked by: the mean over responses of "kurtosis", as there, or of
            "gini", the Gini coefficient. Kurtosis grows with a response's length, so that long ones decide
            its mean; the Gini coefficient of the same spread does not.
        span: by which span: "plain" (Eq. 7) or "ignoring", `statistics.span_ignoring`, which leaves out the
            first token unless `measure` was told otherwise.

    Equal values are ranked by layer, then head.

    Heads with nothing to do rest on the first token, which Eq. 7 counts as the longest distance. If more than
    half of the global heads give it at least 30% of their attention, an `AttnprobeWarning` says so.

    Raises:
        ParameterError: a quantile outside (0, 0.5], fewer than one receiver, fewer than two heads, an unknown
            selectivity, or statistics without this span.
        ResultError: no statistics, or statistics of different models, layers, or receiver levels; or, by
            "gini", statistics of an older version, which did not measure it.

    >>> from attnprobe import TokenBatch, measure
    >>> from attnprobe.testing.tiny_models import tiny_model
    >>> batch = TokenBatch.from_ids(torch.arange(1, 17)[None], response_start=4)
    >>> groups = classify_heads(measure(tiny_model("llama"), batch), quantile=0.25)
    >>> len(groups.local), len(groups.global_)
    (3, 3)
    """
    quantile, receivers = check_shares(quantile, receivers)
    choice(selectivity, "selectivity", get_args(SelectivityName))
    choice(span, "span", get_args(SpanKind))
    first: HeadStatistics | None = None
    mean_span, kurtosis, gini, on_first = _RunningMean(), _RunningMean(), _RunningMean(), _RunningMean()
    knows_first = knows_gini = True
    for part in statistics_parts(statistics):
        first = part if first is None else first
        check_same_measurement(first, part, "classify heads over")
        mean_span.add(_ranking_span(first, part, span))
        knows_first = knows_first and "first" in part.share_on and "response" in part.share_from
        if knows_first:
            on_first.add(part.share("first"))
        if part.receiver_kurtosis is not None:
            kurtosis.add(part.receiver_kurtosis)
        if selectivity == "gini" and part.receiver_kurtosis is not None and part.receiver_gini is None:
            raise ResultError("some statistics have no receiver_gini to rank receivers by: measure again")
        knows_gini = knows_gini and part.receiver_gini is not None
        if part.receiver_gini is not None:
            gini.add(part.receiver_gini)
    if first is None:
        raise ResultError("there are no statistics to classify heads by")
    groups = group_heads(
        mean_span.mean(),
        None if first.receiver_kurtosis is None else kurtosis.mean(),
        gini=gini.mean() if knows_gini else None,
        quantile=quantile,
        receivers=receivers,
        selectivity=selectivity,
    )
    if knows_first and span == "plain":
        warn_of_sinks(groups.global_heads, on_first.mean())
    return replace(
        groups,
        layers=first.layers,
        model_name=first.model_name,
        receiver_level=first.receiver_level,
        span_ignores=first.span_ignores if span == "ignoring" else (),
    )


def _ranking_span(
    first: HeadStatistics, part: HeadStatistics, span: SpanKind
) -> Float[Tensor, "batch layer head"]:
    """Return the span by which heads are ranked, the same in all parts."""
    if span == "plain":
        if part.span is None:
            raise ParameterError("ranking heads needs their span: measure(..., span=True)")
        return part.span
    if part.span_ignoring is None:
        raise ParameterError(
            'span="ignoring" needs a span that ignores something: measure(..., span_ignores=("first",))'
        )
    if part.span_ignores != first.span_ignores:
        raise ResultError(
            f"cannot classify heads over statistics whose span_ignores differ: {first.span_ignores!r} and "
            f"{part.span_ignores!r}"
        )
    return part.span_ignoring


RESTING = 0.3
"""A head that gives the first token at least this share of its attention is said to rest on it."""


REMEDY = 'classify_heads(statistics, span="ignoring")'
"""The call that ranks heads by what they read besides the first token."""


def warn_of_sinks(
    global_heads: Bool[Tensor, "layer head"],
    on_first: Float[Tensor, "layer head"],
    remedy: str = REMEDY,
) -> None:
    """Warn if most global heads rest on the first token, so that their span says little about distance.

    `on_first` is the mean share of each head's attention that is on the first token; `remedy` is the call
    that ranks heads otherwise.
    """
    shares = on_first[global_heads]
    resting = int((shares >= RESTING).sum())
    if 2 * resting > len(shares):
        warnings.warn(
            f"{resting} of {len(shares)} global heads rest on the first token: they give it at least "
            f"{RESTING:.0%} of their attention ({float(shares.nanmean()):.0%} on average over the group), "
            "which Eq. 7 counts as the longest distance. To rank heads by what they read besides it: "
            f"{remedy}",
            AttnprobeWarning,
            stacklevel=3,
        )


class _RunningMean:
    """A mean over responses that leaves out NaN and keeps only sums."""

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


def check_shares(quantile: FloatLike, receivers: IntLike) -> tuple[float, int]:
    """Return a quantile and a number of receivers as plain numbers, or raise `ParameterError`."""
    # At most a half, so that local and global heads do not overlap.
    quantile = real_number(quantile, "quantile", above=0, maximum=0.5)
    return quantile, whole_number(receivers, "receivers", minimum=1)


def group_heads(
    span: ArrayLike,
    kurtosis: ArrayLike | None = None,
    *,
    gini: ArrayLike | None = None,
    quantile: FloatLike = 0.3,
    receivers: IntLike = 20,
    selectivity: SelectivityName = "kurtosis",
) -> HeadGroups:
    """Group heads by given spans, kurtoses and Gini coefficients, by the rules of `classify_heads`.

    Raises:
        ParameterError: spans that are not [layer, head], a quantile outside (0, 0.5], fewer than one
            receiver, or fewer than two heads.

    >>> group_heads(torch.tensor([[1.0, 5.0, 3.0, 9.0]]), quantile=0.25).pairs("global")
    [(0, 3)]
    """
    quantile, receivers = check_shares(quantile, receivers)
    span = _per_head(span, "span")
    kurtosis = None if kurtosis is None else _per_head(kurtosis, "kurtosis")
    gini = None if gini is None else _per_head(gini, "gini")
    ranked = gini if selectivity == "gini" else kurtosis
    defined = int((~span.isnan()).sum())
    if defined < 2:
        raise ParameterError(
            f"ranking needs at least two heads with a defined span, got {defined}: measure more layers"
        )
    count = max(1, math.floor(quantile * defined + 1e-9))
    return HeadGroups(
        local_heads=_lowest(span, count),
        # Counted from the other end, so that no head is in both groups where spans are equal.
        global_heads=_lowest(-span.flip(0, 1), count).flip(0, 1),
        receiver_heads=None if ranked is None else _lowest(-ranked, receivers),
        span=span,
        receiver_kurtosis=kurtosis,
        receiver_gini=gini,
        selectivity=selectivity,
        layers=tuple(range(span.shape[0])),
        quantile=quantile,
    )


def _per_head(values: ArrayLike, name: str) -> Float[Tensor, "layer head"]:
    tensor = as_tensor(values, name)
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise ParameterError(f"{name} must be floating point [layer, head]; got {brief(tensor)}")
    return tensor


def _lowest(values: Float[Tensor, "layer head"], count: int) -> Bool[Tensor, "layer head"]:
    """Return a mask of the `count` lowest defined values; the first of equal ones."""
    flat = values.flatten()
    order = flat.nan_to_num(nan=torch.inf).argsort(stable=True)[:count]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[order] = True
    return (mask & ~flat.isnan()).view(values.shape)

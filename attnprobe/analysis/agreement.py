"""Do two groupings of heads agree, and would other prompts have given the same one?

`compare_groups` puts two groupings of the same model side by side: by overlap of their groups and by
rank correlation of what was ranked. `group_stability` draws the responses anew, with replacement, and
groups again. What is left to others: the grouping itself (heads).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.analysis.bootstrap import Estimate, bootstrap_weights, divide, percentile_estimate
from attnprobe.errors import ParameterError, ResultError
from attnprobe.head_statistics import HeadStatistics
from attnprobe.heads import Group, HeadGroups, group_heads


@dataclass(frozen=True)
class GroupAgreement:
    """How far two groupings of the same heads agree.

    Attributes:
        overlap: of each group: the share of the smaller one's heads that are in the other too.
        chance_overlap: what that share would be if one of the two were drawn at random.
        jaccard: of each group: heads in both, divided by heads in either.
        span_correlation: Spearman's rank correlation of span over heads; NaN if all are equal.
        kurtosis_correlation: the same of receiver kurtosis; None where it was not measured.
    """

    overlap: dict[Group, float]
    chance_overlap: dict[Group, float]
    jaccard: dict[Group, float]
    span_correlation: float
    kurtosis_correlation: float | None


def compare_groups(first: HeadGroups, second: HeadGroups) -> GroupAgreement:
    """Compare two groupings of the same model, from other batches, layers aside, or other settings.

    Receivers are compared where both groupings have them.

    Raises:
        ResultError: groupings of other layers or heads.
    """
    if (first.layers, first.span.shape) != (second.layers, second.span.shape):
        raise ResultError(
            f"these groupings are of layers {list(first.layers)} and {list(second.layers)}, "
            f"{first.span.shape[1]} and {second.span.shape[1]} heads: only groupings of the same heads "
            "can be compared"
        )
    both = first.receiver_heads is not None and second.receiver_heads is not None
    groups: list[Group] = ["local", "global", *(["receiver"] if both else [])]  # type: ignore[list-item]
    heads = int((~first.span.isnan()).sum())
    overlap: dict[Group, float] = {}
    chance: dict[Group, float] = {}
    jaccard: dict[Group, float] = {}
    for group in groups:
        ours, theirs = first.mask(group), second.mask(group)
        sizes = sorted((int(ours.sum()), int(theirs.sum())))
        shared = int((ours & theirs).sum())
        overlap[group] = shared / sizes[0] if sizes[0] else float("nan")
        chance[group] = sizes[1] / heads
        union = int((ours | theirs).sum())
        jaccard[group] = shared / union if union else float("nan")
    kurtoses = first.receiver_kurtosis, second.receiver_kurtosis
    return GroupAgreement(
        overlap,
        chance,
        jaccard,
        rank_correlation(first.span, second.span),
        None if kurtoses[0] is None or kurtoses[1] is None else rank_correlation(kurtoses[0], kurtoses[1]),
    )


def rank_correlation(first: Float[Tensor, "*axes"], second: Float[Tensor, "*axes"]) -> float:
    """Return Spearman's rank correlation over the elements defined in both, equal values sharing ranks.

    NaN where fewer than two elements are defined, or all of either are equal.

    >>> rank_correlation(torch.tensor([1.0, 2.0, 30.0]), torch.tensor([0.0, 4.0, 5.0]))
    1.0
    """
    defined = ~first.isnan() & ~second.isnan()
    ranks = [_ranks(values[defined]) for values in (first, second)]
    if len(ranks[0]) < 2:
        return float("nan")
    ours, theirs = (rank - rank.mean() for rank in ranks)
    return float(divide(ours @ theirs, (ours.square().sum() * theirs.square().sum()).sqrt()))


def _ranks(values: Float[Tensor, " element"]) -> Float[Tensor, " element"]:
    """Return the rank of each value; equal values get the mean of their ranks."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    middle: Tensor = last - (count.double() - 1) / 2
    return middle[place]


@dataclass(frozen=True)
class GroupStability:
    """How a grouping would have come out with other responses of the same kind.

    Attributes:
        selected: of each group: the share of resamples in which each head is in it, `[layer, head]`.
        overlap: of each group: the share of its heads that a resample's group has too.
        span_correlation: Spearman's rank correlation of span with that of a resample.
        responses, resamples: how many.
    """

    selected: dict[Group, Float[Tensor, "layer head"]]
    overlap: dict[Group, Estimate]
    span_correlation: Estimate
    responses: int
    resamples: int


def group_stability(
    statistics: HeadStatistics | Iterable[HeadStatistics],
    *,
    quantile: float = 0.3,
    receivers: int = 20,
    resamples: int = 500,
    confidence: float = 0.95,
    seed: int = 0,
) -> GroupStability:
    """Group heads again over responses drawn with replacement, and say how much stays.

    The estimates' values are means over resamples, their limits percentiles. Of several batches only
    span and kurtosis are kept.

    Raises:
        ParameterError: fewer than two responses, statistics without span, or shares, resamples or a
            confidence out of range.
    """
    parts = [statistics] if isinstance(statistics, HeadStatistics) else statistics
    spans: list[Tensor] = []
    kurtoses: list[Tensor] = []
    for part in parts:
        if part.span is None:
            raise ParameterError("stability of head groups needs their span: measure(..., span=True)")
        spans.append(part.span.double().cpu())
        if part.receiver_kurtosis is not None:
            kurtoses.append(part.receiver_kurtosis.double().cpu())
    span = torch.cat(spans) if spans else torch.empty(0, 0, 0)
    if len(span) < 2:
        raise ParameterError(f"stability needs at least two responses, got {len(span)}")
    kurtosis = torch.cat(kurtoses) if len(kurtoses) == len(spans) else None
    weights = bootstrap_weights(len(span), resamples, seed)

    def grouped(drawn: Tensor) -> HeadGroups:
        selectivity = None if kurtosis is None else _weighted_mean(kurtosis, drawn)
        return group_heads(_weighted_mean(span, drawn), selectivity, quantile=quantile, receivers=receivers)

    whole = grouped(torch.ones(len(span), dtype=torch.float64))
    names = [name for name in get_args(Group) if kurtosis is not None or name != "receiver"]
    selected = {name: torch.zeros_like(whole.span) for name in names}
    overlaps: dict[Group, list[float]] = {name: [] for name in names}
    correlations = []
    for drawn in weights:
        again = grouped(drawn)
        agreement = compare_groups(whole, again)
        for name in names:
            selected[name] += again.mask(name).double()
            overlaps[name].append(agreement.overlap[name])
        correlations.append(agreement.span_correlation)

    def spread(values: list[float]) -> Estimate:
        resampled = torch.tensor(values, dtype=torch.float64)
        return percentile_estimate(float(resampled.nanmean()), resampled, confidence)

    return GroupStability(
        selected={name: count / resamples for name, count in selected.items()},
        overlap={name: spread(values) for name, values in overlaps.items()},
        span_correlation=spread(correlations),
        responses=len(span),
        resamples=resamples,
    )


def _weighted_mean(
    values: Float[Tensor, "response layer head"], weights: Float[Tensor, " response"]
) -> Float[Tensor, "layer head"]:
    """Return the mean over responses, leaving out NaN; NaN where nothing is left."""
    spread = weights[:, None, None].masked_fill(values.isnan(), 0.0)
    return divide((values.nan_to_num() * spread).sum(0), spread.sum(0))

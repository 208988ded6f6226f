"""Do two groupings of heads agree, and would other responses have given the same one?

`compare_groups` compares two groupings: how far their groups overlap, and how well the rankings behind them
agree. `group_stability` resamples responses with replacement, and groups heads by each resample. Users call
both. What is left to others: the grouping itself (heads).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.analysis.bootstrap import (
    Estimate,
    bootstrap_weights,
    check_resampling,
    divide,
    percentile_estimate,
)
from attnprobe.analysis.summary import Summary
from attnprobe.analysis.weighted import weighted_rank_correlation
from attnprobe.errors import AttnprobeError, ParameterError, ResultError
from attnprobe.head_groups import GROUPS, Group, HeadGroups
from attnprobe.head_statistics import HeadStatistics, check_same_measurement, statistics_parts
from attnprobe.heads import check_shares, group_heads
from attnprobe.provenance import ranges
from attnprobe.validation import FloatLike, IntLike, instance


@dataclass(frozen=True, eq=False, repr=False)
class GroupAgreement(Summary):
    """How well two groupings of heads agree.

    Attributes:
        overlap: for each group: the share of the smaller grouping's heads that are also in the other.
        chance_overlap: what that share would be if one of the two were drawn at random.
        jaccard: for each group: heads in both, divided by heads in either.
        span_correlation: Spearman's rank correlation of span over heads; NaN if all spans are equal.
        kurtosis_correlation: the same for receiver kurtosis; None if it was not measured.
        model_names: the models that the two groupings belong to.
    """

    overlap: dict[Group, float]
    chance_overlap: dict[Group, float]
    jaccard: dict[Group, float]
    span_correlation: float
    kurtosis_correlation: float | None
    model_names: tuple[str, str] = ("", "")

    def _headline(self) -> str:
        told = [" and ".join(dict.fromkeys(filter(None, self.model_names)))]
        told.append(f"span_correlation={self.span_correlation:.4g}")
        if self.kurtosis_correlation is not None:
            told.append(f"kurtosis_correlation={self.kurtosis_correlation:.4g}")
        return ", ".join(filter(None, told))

    def _table(self) -> dict[str, Any]:
        """Return a line for each group: its overlap, the overlap by chance, and its Jaccard index."""
        columns: dict[str, Any] = {"group": list(self.overlap)}
        for name in ("overlap", "chance_overlap", "jaccard"):
            columns[name] = [getattr(self, name)[group] for group in self.overlap]
        return columns


def compare_groups(first: HeadGroups, second: HeadGroups) -> GroupAgreement:
    """Compare two groupings of the same heads: over different responses, with different settings, or of a
    model before and after further training.

    Receivers are compared if both groupings have them.

    Raises:
        ParameterError: something that is not a grouping.
        ResultError: groupings of different layers or numbers of heads.
    """
    for name, groups in (("first", first), ("second", second)):
        instance(groups, HeadGroups, name, "classify_heads returns them")
    if (first.layers, first.head_count) != (second.layers, second.head_count):
        raise ResultError(
            f"these groupings are of layers {ranges(first.layers)} and {ranges(second.layers)}, with "
            f"{first.head_count} and {second.head_count} heads each: only groupings of the same heads can be "
            "compared"
        )
    receivers = [groups.receiver_heads is not None for groups in (first, second)]
    heads = int((~first.span.isnan()).sum())
    overlap: dict[Group, float] = {}
    chance: dict[Group, float] = {}
    jaccard: dict[Group, float] = {}
    for group in GROUPS:
        if group == "receiver" and not all(receivers):
            continue
        ours, theirs = first.mask(group).cpu(), second.mask(group).cpu()
        sizes = sorted((int(ours.sum()), int(theirs.sum())))
        shared, either = int((ours & theirs).sum()), int((ours | theirs).sum())
        overlap[group] = shared / sizes[0] if sizes[0] else float("nan")
        chance[group] = sizes[1] / heads if heads else float("nan")
        jaccard[group] = shared / either if either else float("nan")
    kurtoses = first.receiver_kurtosis, second.receiver_kurtosis
    return GroupAgreement(
        overlap,
        chance,
        jaccard,
        rank_correlation(first.span, second.span),
        None if kurtoses[0] is None or kurtoses[1] is None else rank_correlation(kurtoses[0], kurtoses[1]),
        (first.model_name, second.model_name),
    )


def rank_correlation(first: Float[Tensor, "*axes"], second: Float[Tensor, "*axes"]) -> float:
    """Return Spearman's rank correlation over the elements defined in both; equal values share a rank.

    NaN if fewer than two elements are defined, or all values of either are equal.

    >>> rank_correlation(torch.tensor([1.0, 2.0, 30.0]), torch.tensor([0.0, 4.0, 5.0]))
    1.0
    """
    first, second = first.cpu(), second.cpu()
    defined = ~first.isnan() & ~second.isnan()
    once = torch.ones(1, int(defined.sum()), dtype=torch.float64)
    if once.shape[1] < 2:
        return float("nan")
    return float(weighted_rank_correlation(first[defined], second[defined], once))


@dataclass(frozen=True, eq=False, repr=False)
class GroupStability(Summary):
    """How a grouping would have come out with other responses of the same kind.

    Attributes:
        shares: the share of resamples in which each head is in a group; `selected` has them by group.
        overlap: for each group: the share of its heads that are also in the group of a resample.
        span_correlation: Spearman's rank correlation of span with that of a resample.
        responses, resamples: the numbers of responses and resamples.
        layers: the layer number behind each index of the layer axis.
        groups: the group behind each index of the group axis.
        model_name: the model that the heads belong to.

    Raises:
        ResultError: shares that do not match the layers or groups.
    """

    shares: Float[Tensor, "group layer head"]
    overlap: dict[Group, Estimate]
    span_correlation: Estimate
    responses: int
    resamples: int
    layers: tuple[int, ...]
    groups: tuple[Group, ...]
    model_name: str = ""

    def _check(self, error: type[AttnprobeError] = ResultError) -> None:
        super()._check(error)
        named = [len(self.groups), len(self.layers)]
        if named != list(self.shares.shape[:2]) or self.overlap.keys() != set(self.groups):
            raise error(
                f"groups {self.groups}, layers {self.layers} and overlaps of {list(self.overlap)} do not "
                f"match shares [group, layer, head] = {list(self.shares.shape)}"
            )

    @property
    def selected(self) -> dict[Group, Float[Tensor, "layer head"]]:
        """The share of resamples in which each head is in a group, by group."""
        return dict(zip(self.groups, self.shares, strict=True))

    def _headline(self) -> str:
        told = [self.model_name, f"layers={ranges(self.layers)}", f"responses={self.responses}"]
        told += [f"resamples={self.resamples}", f"span_correlation={self.span_correlation}"]
        return ", ".join(filter(None, told))

    def _shown(self) -> dict[str, Any]:
        return {"group": list(self.groups), "overlap": [self.overlap[group] for group in self.groups]}

    def _table(self) -> dict[str, Any]:
        """Return a line for each head: layer, head, and the share of resamples that put it in each group."""
        layer, head = torch.ones_like(self.shares[0]).nonzero().unbind(1)
        columns: dict[str, Any] = {"layer": torch.tensor(self.layers)[layer].numpy(), "head": head.numpy()}
        return columns | {group: share[layer, head].numpy() for group, share in self.selected.items()}


def group_stability(
    statistics: HeadStatistics | Iterable[HeadStatistics],
    *,
    quantile: FloatLike = 0.3,
    receivers: IntLike = 20,
    resamples: IntLike = 500,
    confidence: FloatLike = 0.95,
    seed: IntLike = 0,
) -> GroupStability:
    """Group heads again over responses drawn with replacement, and measure how stable the groups are.

    The values of the estimates are means over resamples, their limits percentiles. `statistics` may come in
    several batches, such as from a generator that measures one at a time: only span and kurtosis are kept.

    Raises:
        ParameterError: fewer than two responses, statistics without span, or shares, resamples or a
            confidence out of range.
        ResultError: statistics of different models, layers, or receiver levels.
    """
    # Before the responses are read, which may take long.
    check_shares(quantile, receivers)
    check_resampling(resamples, confidence, seed)
    first, span, kurtosis = _spans_and_kurtoses(statistics)
    return stability_of(
        span,
        kurtosis,
        layers=first.layers,
        model_name=first.model_name,
        quantile=quantile,
        receivers=receivers,
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )


def stability_of(
    span: Float[Tensor, "response layer head"],
    kurtosis: Float[Tensor, "response layer head"] | None = None,
    *,
    layers: tuple[int, ...],
    model_name: str = "",
    quantile: FloatLike = 0.3,
    receivers: IntLike = 20,
    resamples: IntLike = 500,
    confidence: FloatLike = 0.95,
    seed: IntLike = 0,
) -> GroupStability:
    """Return what `group_stability` does, from the spans and kurtoses of responses.

    Of very many responses, pass the means over blocks of them: their spread says as much.

    Raises:
        ParameterError: as `group_stability`.
    """
    quantile, receivers = check_shares(quantile, receivers)
    resamples, confidence, seed = check_resampling(resamples, confidence, seed)
    if len(span) < 2:
        raise ParameterError(f"stability needs at least two responses, got {len(span)}")
    weights = bootstrap_weights(len(span), resamples, seed)

    def grouped(drawn: Tensor) -> HeadGroups:
        selectivity = None if kurtosis is None else _weighted_mean(kurtosis, drawn)
        return group_heads(_weighted_mean(span, drawn), selectivity, quantile=quantile, receivers=receivers)

    whole = grouped(torch.ones(len(span), dtype=torch.float64))
    groups = tuple(group for group in GROUPS if kurtosis is not None or group != "receiver")
    shares = torch.zeros(len(groups), *whole.span.shape, dtype=torch.float64)
    overlaps: dict[Group, list[float]] = {group: [] for group in groups}
    correlations = []
    for drawn in weights:
        again = grouped(drawn)
        agreement = compare_groups(whole, again)
        for i, group in enumerate(groups):
            shares[i] += again.mask(group)
            overlaps[group].append(agreement.overlap[group])
        correlations.append(agreement.span_correlation)

    def spread(values: list[float]) -> Estimate:
        resampled = torch.tensor(values, dtype=torch.float64)
        return percentile_estimate(float(resampled.nanmean()), resampled, confidence)

    return GroupStability(
        shares=shares / resamples,
        overlap={group: spread(values) for group, values in overlaps.items()},
        span_correlation=spread(correlations),
        responses=len(span),
        resamples=resamples,
        layers=layers,
        groups=groups,
        model_name=model_name,
    )


def _spans_and_kurtoses(
    statistics: HeadStatistics | Iterable[HeadStatistics],
) -> tuple[HeadStatistics, Float[Tensor, "response layer head"], Float[Tensor, "response layer head"] | None]:
    """Return the first of the statistics, and span and kurtosis of all of them."""
    first: HeadStatistics | None = None
    spans: list[Tensor] = []
    kurtoses: list[Tensor] = []
    for part in statistics_parts(statistics):
        first = part if first is None else first
        if part.span is None:
            raise ParameterError("the stability of head groups needs span: measure(..., span=True)")
        check_same_measurement(first, part, "group heads over")
        spans.append(part.span.double().cpu())
        if part.receiver_kurtosis is not None:
            kurtoses.append(part.receiver_kurtosis.double().cpu())
    count = sum(map(len, spans))
    if first is None or count < 2:
        raise ParameterError(f"stability needs at least two responses, got {count}")
    return first, torch.cat(spans), torch.cat(kurtoses) if kurtoses else None


def _weighted_mean(
    values: Float[Tensor, "response layer head"], weights: Float[Tensor, " response"]
) -> Float[Tensor, "layer head"]:
    """Return the weighted mean over responses, leaving out NaN; NaN if nothing is left."""
    spread = weights[:, None, None].masked_fill(values.isnan(), 0.0)
    return divide((values.nan_to_num() * spread).sum(0), spread.sum(0))

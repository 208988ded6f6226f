"""Bootstrap intervals: how much an estimate would vary over other problems of the same kind; and p-values.

Units (problems, responses) are drawn with replacement, as many as there are, and the estimate is computed
again. A resample is a weight for each unit, how often it was drawn, since every estimate here is a mean or a
ratio of sums over units. `couplings`, `Perturbations.summary` and `group_stability` call this. Where several
comparisons are made, `holm_adjusted` corrects their p-values. What is left to others: the estimates
themselves.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.errors import ParameterError
from attnprobe.validation import ArrayLike, FloatLike, IntLike, brief, real_number, whole_number


class Estimate(NamedTuple):
    """A number with the limits of its interval; NaN if undefined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def check_resampling(resamples: IntLike, confidence: FloatLike, seed: IntLike) -> tuple[int, float, int]:
    """Return the parameters of a bootstrap as plain numbers, or raise `ParameterError`."""
    return (
        whole_number(resamples, "resamples", minimum=1),
        real_number(confidence, "confidence", above=0, below=1),
        check_seed(seed),
    )


def check_seed(seed: IntLike) -> int:
    """Return the seed of a random generator, or raise `ParameterError`."""
    return whole_number(seed, "seed", maximum=2**63 - 1)


def check_clusters(clusters: Any) -> list[Hashable]:
    """Return the label of each unit, from a list, an array or a tensor of them, or raise `ParameterError`.

    >>> check_clusters(torch.tensor([3, 3, 5]))
    [3, 3, 5]
    """
    given = clusters.tolist() if hasattr(clusters, "tolist") else clusters
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise ParameterError(f"clusters must be a list with a label for each of them; got {brief(clusters)}")
    if not all(isinstance(label, Hashable) and label is not None and label == label for label in given):
        raise ParameterError(f"clusters must be labels such as numbers or names; got {brief(clusters)}")
    return list(given)


def bootstrap_weights(
    units: IntLike,
    resamples: IntLike = 2000,
    seed: IntLike = 0,
    clusters: ArrayLike | None = None,
) -> Float[Tensor, "resample unit"]:
    """Return how often each unit is drawn in each resample.

    Without clusters, each resample sums to `units`. With them (a label for each unit), whole clusters are
    drawn, as many as there are: units of one cluster, such as problems made from one template, are not
    independent, and intervals that ignore it are too narrow. With a single unit or cluster, weights are NaN,
    and so are the limits of intervals.

    Raises:
        ParameterError: no units or no resamples, or another number of labels than of units.

    >>> bootstrap_weights(5, resamples=2).sum(-1)
    tensor([5., 5.], dtype=torch.float64)
    >>> weights = bootstrap_weights(3, clusters=["a", "a", "b"])
    >>> bool((weights[:, 0] == weights[:, 1]).all())
    True
    """
    units = whole_number(units, "the units of a bootstrap", minimum=1)
    resamples = whole_number(resamples, "resamples", minimum=1)
    cluster = torch.arange(units)
    if clusters is not None:
        labels = check_clusters(clusters)
        if len(labels) != units:
            raise ParameterError(f"clusters must have a label for each of {units} units; got {len(labels)}")
        number = {label: index for index, label in enumerate(dict.fromkeys(labels))}
        cluster = torch.tensor([number[label] for label in labels])
    count = int(cluster.max()) + 1
    if count == 1:
        # A single unit says nothing about others: an interval of no width would say that it does.
        return torch.full((resamples, units), torch.nan, dtype=torch.float64)
    generator = torch.Generator().manual_seed(check_seed(seed))
    drawn = torch.randint(count, (resamples, count), generator=generator)
    weights = torch.zeros(resamples, count, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones_like(weights))[:, cluster]


def percentile_estimate(
    value: float, resampled: Float[Tensor, " resample"], confidence: FloatLike = 0.95
) -> Estimate:
    """Return a value with the percentile interval of its resampled values, leaving out undefined ones.

    Raises:
        ParameterError: a confidence outside (0, 1).
    """
    confidence = real_number(confidence, "confidence", above=0, below=1)
    defined = resampled[~resampled.isnan()].double()
    if len(defined) == 0:
        return Estimate(value, float("nan"), float("nan"))
    tail = (1 - confidence) / 2
    limits = defined.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return Estimate(value, float(limits[0]), float(limits[1]))


def ratio_estimate(
    numerator: Float[Tensor, " unit"],
    denominator: Float[Tensor, " unit"],
    *,
    resamples: IntLike = 2000,
    confidence: FloatLike = 0.95,
    seed: IntLike = 0,
    clusters: ArrayLike | None = None,
) -> Estimate:
    """Return the ratio of two sums over units, with its bootstrap interval.

    For a mean, pass ones as the denominator. NaN if the denominator sums to 0. `clusters` are those of
    `bootstrap_weights`.

    Raises:
        ParameterError: no units, no resamples, or a confidence outside (0, 1).

    >>> ratio_estimate(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 1.0])).value
    3.0
    """
    weights = bootstrap_weights(len(numerator), resamples, seed, clusters)
    above, below = numerator.double(), denominator.double()
    return percentile_estimate(
        float(divide(above.sum(), below.sum())),
        divide(weights @ above, weights @ below),
        confidence,
    )


def median_estimate(
    values: Float[Tensor, " unit"],
    *,
    resamples: IntLike = 2000,
    confidence: FloatLike = 0.95,
    seed: IntLike = 0,
    clusters: ArrayLike | None = None,
) -> Estimate:
    """Return the median of the defined values, with its bootstrap interval; NaN if there are none.

    A mean of heavy-tailed values is that of a few of them; the median says what is typical.

    Raises:
        ParameterError: no units, no resamples, or a confidence outside (0, 1).

    >>> median_estimate(torch.tensor([1.0, 2.0, 300.0])).value
    2.0
    """
    wide = values.double()
    weights = bootstrap_weights(len(wide), resamples, seed, clusters).masked_fill(wide.isnan(), 0.0)
    order = wide.nan_to_num(torch.inf).argsort()

    def medians(weight: Float[Tensor, "resample unit"]) -> Float[Tensor, " resample"]:
        # The mean of the two middle values, each value repeated as often as it was drawn.
        reached = weight[:, order].cumsum(-1)
        total = reached[:, -1:]
        low, high = ((reached >= part).double().argmax(-1) for part in (total / 2, total / 2 + 0.5))
        found = (wide[order][low] + wide[order][high]) / 2
        return found.masked_fill(~(total[:, 0] > 0), torch.nan)

    whole = medians((~wide.isnan()).double()[None])
    return percentile_estimate(float(whole), medians(weights), confidence)


def share_reached(drawn: Float[Tensor, " draw"], observed: float) -> float:
    """Return the share of draws at least as large as what was observed, which counts as one of them.

    This is the p-value of a null with these draws. Undefined draws say nothing and do not count; NaN if
    nothing was observed. The tolerance is for rounding: equal sums, added in another order, must count as
    equal.

    >>> share_reached(torch.tensor([0.5, 2.0, torch.nan]), 1.0)
    0.6666666666666666
    """
    if observed != observed:
        return float("nan")
    defined = drawn[~drawn.isnan()].double()
    reached = defined >= observed - 1e-6 * max(1.0, abs(observed))
    return (1 + int(reached.sum())) / (1 + len(defined))


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for the number of comparisons, by Holm's method; NaN stays and does not count.

    If all adjusted values below 0.05 are called significant, the chance of even one false call is at most 5%,
    whatever the dependence between the comparisons.

    Raises:
        ParameterError: a value outside [0, 1].

    >>> holm_adjusted([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    if wrong := [p for p in p_values if p == p and not 0 <= p <= 1]:
        raise ParameterError(f"p-values must be between 0 and 1, or NaN; got {wrong[0]}")
    order = sorted((i for i, p in enumerate(p_values) if p == p), key=lambda i: p_values[i])
    adjusted = [float("nan")] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def divide(above: Tensor, below: Tensor) -> Tensor:
    """Return a quotient that is NaN where the divisor is 0."""
    return above / below.masked_fill(below == 0, torch.nan)

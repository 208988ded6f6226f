"""Bootstrap intervals: how much an estimate would vary over other problems of the same kind.

Units (problems, responses) are drawn with replacement, as many as there are, and the estimate is computed
again. A resample is a weight for each unit, how often it was drawn, since every estimate here is a mean or a
ratio of sums over units. `couplings`, `Perturbations.summary` and `group_stability` call this. What is left
to others: the estimates themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.validation import FloatLike, IntLike, real_number, whole_number


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


def bootstrap_weights(
    units: IntLike, resamples: IntLike = 2000, seed: IntLike = 0
) -> Float[Tensor, "resample unit"]:
    """Return how often each unit is drawn in each resample; each resample sums to `units`.

    Raises:
        ParameterError: no units or no resamples.

    >>> bootstrap_weights(5, resamples=2).sum(-1)
    tensor([5., 5.], dtype=torch.float64)
    """
    units = whole_number(units, "the units of a bootstrap", minimum=1)
    resamples = whole_number(resamples, "resamples", minimum=1)
    generator = torch.Generator().manual_seed(check_seed(seed))
    drawn = torch.randint(units, (resamples, units), generator=generator)
    weights = torch.zeros(resamples, units, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones_like(weights))


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
) -> Estimate:
    """Return the ratio of two sums over units, with its bootstrap interval.

    For a mean, pass ones as the denominator. NaN if the denominator sums to 0.

    Raises:
        ParameterError: no units, no resamples, or a confidence outside (0, 1).

    >>> ratio_estimate(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 1.0])).value
    3.0
    """
    weights = bootstrap_weights(len(numerator), resamples, seed)
    above, below = numerator.double(), denominator.double()
    return percentile_estimate(
        float(divide(above.sum(), below.sum())),
        divide(weights @ above, weights @ below),
        confidence,
    )


def divide(above: Tensor, below: Tensor) -> Tensor:
    """Return a quotient that is NaN where the divisor is 0."""
    return above / below.masked_fill(below == 0, torch.nan)

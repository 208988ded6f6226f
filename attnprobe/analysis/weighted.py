"""Medians and rank correlations of values that count several times, as those of a resample do.

A resample of a bootstrap is a weight for each value: how often it was drawn. Means follow from weighted sums,
but medians and ranks need the functions here, which give what the repeated values would give, for all
resamples at once. The comparisons of positions call them (paired, knockout_trials). What is left to others:
drawing the weights (bootstrap).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.analysis.bootstrap import divide


def weighted_median(
    values: Float[Tensor, " unit"], weights: Float[Tensor, "draw unit"]
) -> Float[Tensor, " draw"]:
    """Return the median of the values with each as often as its whole weight says.

    >>> weighted_median(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]]))
    tensor([2.0000, 2.5000])
    """
    ordered, order = values.sort()
    reached = weights[:, order].cumsum(-1)
    total = reached[:, -1:]
    # The two middle ones, counted from 0; they are one and the same for an odd number.
    middle = torch.cat([((total - 1) / 2).floor(), (total / 2).floor()], dim=-1)
    places = torch.searchsorted(reached, middle, right=True)
    return ordered[places.clamp(max=len(values) - 1)].mean(-1)


def weighted_rank_correlation(
    first: Float[Tensor, " unit"], second: Float[Tensor, " unit"], weights: Float[Tensor, "draw unit"]
) -> Float[Tensor, " draw"]:
    """Return Spearman's rank correlation with each pair as often as its weight says.

    NaN if all values of either are equal, or there is a single pair.

    >>> weights = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 2.0]])
    >>> weighted_rank_correlation(torch.tensor([1.0, 2.0, 30.0]), torch.tensor([0.0, -4.0, 5.0]), weights)
    tensor([0.5000, 1.0000])
    """
    total = weights.sum(-1, keepdim=True)
    ours, theirs = (
        ranks - (weights * ranks).sum(-1, keepdim=True) / total
        for ranks in (_ranks(values, weights) for values in (first, second))
    )
    spread = (weights * ours.square()).sum(-1) * (weights * theirs.square()).sum(-1)
    return divide((weights * ours * theirs).sum(-1), spread.sqrt())


def weighted_partial_correlation(
    first: Float[Tensor, " unit"],
    second: Float[Tensor, " unit"],
    given: Float[Tensor, " unit"],
    weights: Float[Tensor, "draw unit"],
) -> Float[Tensor, " draw"]:
    """Return the partial rank correlation of two values given a third.

    NaN if the ranks of either follow from those of the third, as those of two units always do.

    >>> a, b, c = torch.tensor([[1.0, 2, 3, 4], [2, 1, 4, 3], [1, 3, 4, 2]])
    >>> weighted_partial_correlation(a, b, c, torch.ones(1, 4))
    tensor([0.5238])
    """
    raw, of_first, of_second = (
        weighted_rank_correlation(*pair, weights)
        for pair in ((first, second), (first, given), (second, given))
    )
    spread = (1 - of_first.square()) * (1 - of_second.square())
    # Rounding may leave a little of a spread of 0.
    return divide(raw - of_first * of_second, spread.masked_fill(spread < 1e-12, 0.0).sqrt())


def _ranks(values: Float[Tensor, " unit"], weights: Float[Tensor, "draw unit"]) -> Float[Tensor, "draw unit"]:
    """Return the rank of each value among all drawn; equal values get the mean of their ranks."""
    levels, level = values.unique(return_inverse=True)
    drawn = weights.new_zeros(len(weights), len(levels)).index_add_(1, level, weights)
    # [draw, level]
    middle = drawn.cumsum(-1) - (drawn - 1) / 2
    return middle[:, level]

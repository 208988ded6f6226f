"""Rank correlations of values that count several times, as those of a resample do.

A resample of a bootstrap is a weight for each value: how often it was drawn. The functions here give what the
repeated values would give, for all resamples at once. `Knockouts.summary` calls them, and `compare_groups`,
where every value counts once. What is left to others: drawing the weights, and means and medians (bootstrap).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from attnprobe.analysis.bootstrap import divide


def weighted_rank_correlation(
    first: Float[Tensor, " unit"], second: Float[Tensor, " unit"], weights: Float[Tensor, "draw unit"]
) -> Float[Tensor, " draw"]:
    """Return Spearman's rank correlation with each pair as often as its weight says.

    NaN if all values of either are equal, or there is a single pair.

    >>> import torch
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

    >>> import torch
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

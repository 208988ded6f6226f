"""Comparing kinds of positions response by response: means and medians, with bootstrap intervals.

`Perturbations.summary` and `Knockouts.summary` call this. Positions of one kind are averaged within their
response first, so that every response counts once, and intervals come from drawing responses, or clusters
of them (several answers to one problem), with replacement. Medians stand beside means since what depends on a
token is heavy-tailed: a few responses may decide a mean. What is left to others: which numbers are compared
(trials, knockout_trials), and how resamples are drawn (bootstrap).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
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
from attnprobe.analysis.chosen_positions import Kind
from attnprobe.errors import ParameterError
from attnprobe.validation import ArrayLike, FloatLike, IntLike, brief

UNDEFINED = Estimate(float("nan"), float("nan"), float("nan"))


# By digest too: a file may hold trials of several batches, each of which has an example 0.
Response = tuple[int, str]


def by_response(trials: Iterable[Any], value: Callable[[Any], float]) -> dict[Response, dict[Kind, float]]:
    """Return for each response the mean of a value over its positions of each kind, where defined."""
    found: dict[Response, dict[Kind, list[float]]] = {}
    for trial in trials:
        number = value(trial)
        if number == number:
            of_response = found.setdefault((trial.example, trial.digest), {})
            of_response.setdefault(trial.kind, []).append(number)
    return {
        response: {kind: sum(numbers) / len(numbers) for kind, numbers in kinds.items()}
        for response, kinds in found.items()
    }


@dataclass(frozen=True)
class Resampling:
    """Resamples of some responses, from which intervals of any statistic follow.

    Attributes:
        weights: how often each response was drawn in each resample.
        confidence: of the intervals.
    """

    weights: Float[Tensor, "resample response"]
    confidence: float

    @staticmethod
    def of(
        responses: Sequence[Response],
        clusters: ArrayLike | None,
        resamples: IntLike,
        confidence: FloatLike,
        seed: IntLike,
    ) -> Resampling:
        """Draw responses with replacement or, with clusters, all responses of each cluster drawn.

        Raises:
            ParameterError: no responses, no resamples, a confidence outside (0, 1), or clusters that are not
                one label for each example.
        """
        resamples, confidence, seed = check_resampling(resamples, confidence, seed)
        labels = [i for i, _ in enumerate(responses)] if clusters is None else _labels(responses, clusters)
        numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        of_clusters = bootstrap_weights(len(numbers), resamples, seed)
        return Resampling(of_clusters[:, [numbers[label] for label in labels]], confidence)

    def estimate(
        self, statistic: Callable[[Float[Tensor, "draw response"]], Float[Tensor, " draw"]]
    ) -> Estimate:
        """Return a statistic, a function of how often each response counts, with its interval."""
        once = statistic(torch.ones_like(self.weights[:1]))
        return percentile_estimate(float(once), statistic(self.weights), self.confidence)

    def mean(self, values: Float[Tensor, " response"]) -> Estimate:
        """Return the mean over responses."""
        return self.ratio(values, torch.ones_like(values))

    def ratio(self, above: Float[Tensor, " response"], below: Float[Tensor, " response"]) -> Estimate:
        """Return the ratio of two means over responses."""
        return self.estimate(lambda weights: divide(weights @ above, weights @ below))

    def median(self, values: Float[Tensor, " response"]) -> Estimate:
        """Return the median over responses."""
        return self.estimate(lambda weights: weighted_median(values, weights))


@dataclass(frozen=True)
class Comparison:
    """Two kinds of positions over the responses that have both, with means and medians.

    Attributes:
        first, second: the mean of each.
        difference: the mean of first minus second.
        lower_share: the share of responses in which the first is lower; equal counts as half.
        ratio: the mean of the first over that of the second.
        first_median, second_median, difference_median, ratio_median: the medians, of each response's
            difference and ratio too.
        responses: how many have both kinds.
    """

    first: Estimate = UNDEFINED
    second: Estimate = UNDEFINED
    difference: Estimate = UNDEFINED
    lower_share: Estimate = UNDEFINED
    ratio: Estimate = UNDEFINED
    first_median: Estimate = UNDEFINED
    second_median: Estimate = UNDEFINED
    difference_median: Estimate = UNDEFINED
    ratio_median: Estimate = UNDEFINED
    responses: int = 0


def compare_kinds(
    found: dict[Response, dict[Kind, float]],
    first: Kind,
    second: Kind,
    clusters: ArrayLike | None,
    resamples: IntLike,
    confidence: FloatLike,
    seed: IntLike,
) -> Comparison:
    """Compare two kinds of positions, response by response; all undefined if no response has both.

    Raises:
        ParameterError: as `Resampling.of`.
    """
    both = [response for response, kinds in found.items() if {first, second} <= kinds.keys()]
    if not both:
        return Comparison()
    draws = Resampling.of(both, clusters, resamples, confidence, seed)
    pairs = [[found[response][kind] for kind in (first, second)] for response in both]
    ours, theirs = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
    lower = (ours < theirs).double() + 0.5 * (ours == theirs).double()
    return Comparison(
        first=draws.mean(ours),
        second=draws.mean(theirs),
        difference=draws.mean(ours - theirs),
        lower_share=draws.mean(lower),
        ratio=draws.ratio(ours, theirs),
        first_median=draws.median(ours),
        second_median=draws.median(theirs),
        difference_median=draws.median(ours - theirs),
        # Infinity counts as the largest; two zeros as equal.
        ratio_median=draws.median((ours / theirs).masked_fill(ours == theirs, 1.0)),
        responses=len(both),
    )


def _labels(responses: Sequence[Response], clusters: Any) -> list[Any]:
    """Return the label of each response."""
    given = clusters.tolist() if hasattr(clusters, "tolist") else clusters
    examples = [example for example, _ in responses]
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise ParameterError(f"clusters must be a list with a label for each example; got {brief(clusters)}")
    if len(set(examples)) < len(examples):
        raise ParameterError(
            "clusters name the examples of one batch, but the trials are of several batches: each has an "
            f"example {max(examples, key=examples.count)}"
        )
    if len(given) <= max(examples, default=-1):
        raise ParameterError(
            f"clusters must hold a label for each example, and there is an example {max(examples)}; got "
            f"{len(given)} labels"
        )
    labels = [given[example] for example in examples]
    if not all(isinstance(label, Hashable) for label in labels):
        raise ParameterError(f"clusters must be labels such as numbers or names; got {brief(clusters)}")
    return labels


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

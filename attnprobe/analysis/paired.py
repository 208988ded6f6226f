"""Comparing kinds of positions response by response: means and medians, with bootstrap intervals.

`Perturbations.summary` and `Knockouts.summary` call this. Positions of one kind are averaged within their
response first, so that every response counts once, and intervals come from drawing responses, or clusters
of them (several answers to one problem), with replacement. Medians stand beside means since what depends on a
token is heavy-tailed: a few responses may decide a mean. What is left to others: which numbers are compared
(trials, knockout_trials), and how resamples are drawn (bootstrap).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.analysis.bootstrap import (
    Estimate,
    check_clusters,
    median_estimate,
    ratio_estimate,
)
from attnprobe.analysis.chosen_positions import Kind
from attnprobe.errors import ParameterError
from attnprobe.validation import ArrayLike, FloatLike, IntLike

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
class Comparison:
    """Two kinds of positions over the responses that have both, with means and medians.

    Attributes:
        first, second: the mean of each.
        difference: the mean of first minus second.
        lower_share, higher_share: the share of responses in which the first is lower, and in which it is
            higher; equal counts as half.
        ratio: the mean of the first over that of the second.
        first_median, second_median, difference_median, ratio_median: the medians, of each response's
            difference and ratio too.
        responses: how many have both kinds.
    """

    first: Estimate = UNDEFINED
    second: Estimate = UNDEFINED
    difference: Estimate = UNDEFINED
    lower_share: Estimate = UNDEFINED
    higher_share: Estimate = UNDEFINED
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
        ParameterError: clusters that are not one label for each example.
    """
    both = [response for response, kinds in found.items() if {first, second} <= kinds.keys()]
    if not both:
        return Comparison()
    options: dict[str, Any] = {
        "clusters": cluster_labels(both, clusters),
        "resamples": resamples,
        "confidence": confidence,
        "seed": seed,
    }
    pairs = [[found[response][kind] for kind in (first, second)] for response in both]
    ours, theirs = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
    lower = (ours < theirs).double() + 0.5 * (ours == theirs).double()

    def mean(values: Float[Tensor, " response"]) -> Estimate:
        return ratio_estimate(values, torch.ones_like(values), **options)

    return Comparison(
        first=mean(ours),
        second=mean(theirs),
        difference=mean(ours - theirs),
        lower_share=mean(lower),
        higher_share=mean(1 - lower),
        ratio=ratio_estimate(ours, theirs, **options),
        first_median=median_estimate(ours, **options),
        second_median=median_estimate(theirs, **options),
        difference_median=median_estimate(ours - theirs, **options),
        # Infinity counts as the largest; two zeros as equal.
        ratio_median=median_estimate((ours / theirs).masked_fill(ours == theirs, 1.0), **options),
        responses=len(both),
    )


def cluster_labels(responses: Sequence[Response], clusters: Any) -> list[Any] | None:
    """Return the cluster of each response from the labels of all examples; None without clusters.

    Raises:
        ParameterError: clusters that are not one label for each example.
    """
    if clusters is None:
        return None
    given = check_clusters(clusters)
    examples = [example for example, _ in responses]
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
    return [given[example] for example in examples]

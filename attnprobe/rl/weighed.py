"""WeighedRollout: the weights of a rollout, what they were computed from, and the metrics that trainers log.

`RolloutCredit` makes one for each rollout and keeps the latest; trainers read its metrics, and people its
scores and weights. What is left to others: computing the weights (rollout_credit).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnprobe.head_groups import HeadGroups
from attnprobe.rhythm import find_peaks
from attnprobe.rl.grouping import Groups
from attnprobe.rl.rollout import Rollout
from attnprobe.scores import TokenScores


@dataclass(frozen=True)
class WeighedRollout:
    """The weights of a rollout's tokens, and what they were computed from.

    Attributes:
        rollout: the prompts, and what the policy wrote.
        gamma: the weights as they are applied; 1 where `signs` leaves an advantage out.
        matters: the tokens whose weight can matter: their advantage is not 0, and `signs` includes it.
        measured: which completions were measured.
        scores: the token scores of all completions; NaN for those that were not measured. None if none was.
        groups: the head groups that WAAD and FAI belong to; None if no attention was measured.
        metrics: what trainers log, over all processes, by name:

            - "credit/gamma_mean": mean weight of the tokens whose weight can matter;
            - "credit/amplified_share": share of them with a weight above 1;
            - "credit/applied_mean": mean weight of all tokens that the policy wrote;
            - "credit/advantage_change": by how much the weights change the mean advantage of these;
            - "credit/measured_rows": how many completions were measured, of those that the policy wrote;
            - "credit/seconds": how long credit took, a mean over processes;
            - "credit/preplans_per_100_tokens", "credit/anchors_per_100_tokens": peaks of WAAD and FAI among
              tokens whose weight can matter;
            - "credit/without_fai_share": share of measured tokens that have no FAI;
            - "credit/regrouped": 1 if heads were classified, else 0;
            - "credit/regrouped_heads": how many heads are in another group than before.

            The last five only if attention is measured. NaN where there is nothing to average or to compare.
    """

    rollout: Rollout
    gamma: Float[Tensor, "completion token"]
    matters: Bool[Tensor, "completion token"]
    measured: Bool[Tensor, " completion"]
    scores: TokenScores | None
    groups: Groups | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def credit_metrics(
    weighed: WeighedRollout,
    advantages: Float[Tensor, "completion token"] | None,
    regrouped: int | None,
    seconds: float,
    *,
    attention: bool,
    total: Callable[[Tensor], Tensor],
    processes: int,
) -> dict[str, float]:
    """Return the metrics of a weighed rollout; see the attributes of `WeighedRollout`.

    Args:
        weighed: the rollout, without its metrics.
        advantages: of each token; None if they are not known yet.
        regrouped: in how many heads the grouping changed; -1 for the first one, None if heads were not
            classified.
        seconds: how long this process took.
        attention: whether attention is measured.
        total: sums a tensor over all processes.
        processes: their number.
    """
    gamma = weighed.gamma.double()
    device = gamma.device
    own, matters = (mask.to(device) for mask in (weighed.rollout.response_mask, weighed.matters))
    zero = gamma.new_zeros(())
    change = gamma.new_tensor(math.nan) if advantages is None else zero
    if advantages is not None:
        change = (advantages.to(gamma) * (gamma - 1))[own].sum()
    sums = {
        "tokens": matters.sum(),
        "gamma": gamma[matters].sum(),
        "amplified": (gamma[matters] > 1).sum(),
        "own": own.sum(),
        "applied": gamma[own].sum(),
        "change": change,
        "rows": (weighed.measured.to(device) & own.any(-1)).sum(),
        "seconds": gamma.new_tensor(seconds),
        "scored": zero,
        "without_fai": zero,
        "preplans": zero,
        "anchors": zero,
    }
    scores = weighed.scores
    if attention and scores is not None:
        there = scores.waad.device
        scored = scores.response_mask & weighed.measured.to(there)[:, None]
        sums["scored"] = scored.sum()
        sums["without_fai"] = (scored & scores.fai.isnan()).sum()
        sums["preplans"] = find_peaks(scores.waad)[matters.to(there)].sum()
        sums["anchors"] = find_peaks(scores.fai)[matters.to(there)].sum()
    stacked = torch.stack([value.to(device=device, dtype=torch.float64) for value in sums.values()])
    found = dict(zip(sums, total(stacked).tolist(), strict=True))

    def mean(name: str, count: str = "tokens") -> float:
        # Without tokens there is no mean: NaN, which trainers leave out of their averages.
        return found[name] / found[count] if found[count] else math.nan

    metrics = {
        "credit/gamma_mean": mean("gamma"),
        "credit/amplified_share": mean("amplified"),
        "credit/applied_mean": mean("applied", "own"),
        "credit/advantage_change": mean("change", "own"),
        "credit/measured_rows": found["rows"],
        "credit/seconds": found["seconds"] / processes,
    }
    if attention:
        metrics["credit/preplans_per_100_tokens"] = 100 * mean("preplans")
        metrics["credit/anchors_per_100_tokens"] = 100 * mean("anchors")
        metrics["credit/without_fai_share"] = mean("without_fai", "scored")
        metrics["credit/regrouped"] = float(regrouped is not None)
        is_comparison = regrouped is not None and regrouped >= 0
        metrics["credit/regrouped_heads"] = float(regrouped or 0) if is_comparison else math.nan
    return metrics


def heads_that_changed(before: HeadGroups | None, after: HeadGroups) -> int:
    """Return how many heads are local or global in one grouping and not in the other; -1 without a first one.

    >>> local, other = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    >>> groups = [HeadGroups(each, ~each, None, torch.zeros(1, 2), None, (0,)) for each in (local, other)]
    >>> heads_that_changed(*groups), heads_that_changed(None, groups[0])
    (2, -1)
    """
    if before is None:
        return -1
    changed: Int[Tensor, ""] = (
        (before.local_heads != after.local_heads) | (before.global_heads != after.global_heads)
    ).sum()
    return int(changed)

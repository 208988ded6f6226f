"""RolloutCredit: the weights of a policy's own rollouts, for a training loop that is one's own.

It measures the policy's attention over the rollout, classifies heads when that is due, scores the tokens
and asks the strategy. What is left to others: the pieces (scoring, grouping, credit), what is done with
the weights (advantage, ppo), and TRL's trainers, with their processes and shards (trl).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.adapters.base import Layers
from attnprobe.errors import ParameterError
from attnprobe.heads import HeadGroups, classify_heads
from attnprobe.metrics import Horizon, check_horizon, check_window
from attnprobe.rl.credit import Credit, credit_of, needs_of
from attnprobe.rl.grouping import HeadGrouping, choose_layers
from attnprobe.rl.scoring import Rollout, measure_rollout, score_rollout


class RolloutCredit:
    """Gives the tokens of a policy's rollouts their weights.

    Args:
        policy: the model that wrote the rollouts.
        credit: the strategy, such as `CoupledRhythmCredit()`, or any callable `scores -> gamma`.
        layers: where attention is measured: "middle" (the paper's five of the middle third), "all" or
            layer numbers.
        heads: a grouping of heads that is kept; its layers are the ones measured. None: heads are
            classified by the rollouts themselves.
        reclassify_every: group heads anew after so many steps; None: once, and keep it.
        window: WAAD's window, in tokens.
        horizon: FAI's horizon `(low, high)`, in tokens.
        batch_size: how many rows to measure at a time; default: as many as fit `measure`'s memory budget.

    Attributes:
        grouping: the heads in use, and when they are due again; it belongs into checkpoints.

    Raises:
        ParameterError: parameters that make no sense.
        UnsupportedModelError: a policy whose attention cannot be read.
    """

    def __init__(
        self,
        policy: Any,
        credit: Credit,
        *,
        layers: Layers = "middle",
        heads: HeadGroups | None = None,
        reclassify_every: int | None = 10,
        window: int = 10,
        horizon: Horizon = (10, 50),
        batch_size: int | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ParameterError(f"batch_size must be at least 1, got {batch_size}")
        self._policy, self._credit, self._needs, self._heads = policy, credit, needs_of(credit), heads
        self._measuring: dict[str, Any] = {
            "window": check_window(window),
            "horizon": check_horizon(horizon),
            "batch_size": batch_size,
        }
        self._reads_attention = bool(self._needs & {"waad", "fai"})
        if self._reads_attention:
            self._measuring["layers"] = choose_layers(policy, layers, heads)
        self.grouping = HeadGrouping(reclassify_every)

    def weigh(
        self,
        rollout: Rollout,
        advantages: Float[Tensor, " batch"] | Float[Tensor, "batch completion"],
        step: int,
        *,
        entropy: Float[Tensor, "batch completion"] | None = None,
    ) -> Float[Tensor, "batch completion"]:
        """Return gamma for each token; 1 in completions without a positive advantage, which need none.

        Args:
            rollout: what the policy wrote.
            advantages: they decide which completions are measured, and are not changed.
            step: of the run, by which heads are grouped anew.
            entropy: of the distribution that each token was sampled from, in nats, for strategies that
                need it.

        Raises:
            ResultError: scores or weights that are not finite, or entropy that is needed and not given.
        """
        gains = advantages > 0 if advantages.ndim == 1 else (advantages > 0).any(-1)
        regroups = self._reads_attention and self._heads is None and self.grouping.is_due(step)
        rows = torch.ones_like(gains) if regroups else gains
        gamma = torch.ones(rollout.completion_ids.shape, device=gains.device)
        if not bool(rows.any()):
            return gamma
        part, statistics, groups = rollout.select(rows), None, None
        if self._reads_attention:
            statistics = measure_rollout(self._policy, part, span=regroups, **self._measuring)
            if regroups:
                self.grouping.keep(classify_heads(statistics), step)
            groups = self._heads or self.grouping.groups
        scores = score_rollout(statistics, groups, part, entropy=None if entropy is None else entropy[rows])
        gamma[rows] = credit_of(self._credit, scores).to(gamma)
        return torch.where(gains[:, None], gamma, 1.0)

"""PPOConfig: what can be changed about a PPO run, and what each number means.

What is left to others: the algorithm (ppo).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from attnprobe.errors import ParameterError


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """How to train; every number can be changed.

    Raises:
        ParameterError: a number that makes no sense.
    """

    steps: int = 100
    """Rollouts, each followed by some epochs over its completions."""
    prompts_per_step: int = 32
    """Problems in a rollout, drawn without replacement until all have been seen."""
    group_size: int = 4
    """Completions of each problem; the estimator "group" needs at least 2."""
    minibatch_size: int = 32
    """Completions in one optimizer step; the last of an epoch may have fewer."""
    epochs: int = 2
    """How often a rollout is gone through, each time in another order."""
    max_new_tokens: int = 64
    """The longest completion; one that is cut off there counts as finished."""
    temperature: float = 1.0
    """What logits are divided by, in sampling and in the objective alike."""
    estimator: Literal["gae", "group"] = "gae"
    """Advantages by a value head, or by comparison with the other completions of the same problem."""
    discount: float = 1.0
    """GAE: what a reward loses for each token that it is away (the usual gamma)."""
    gae_lambda: float = 0.95
    """GAE: 1 waits for the rewards themselves, 0 believes the value of the next token."""
    whiten: bool = True
    """GAE: whether advantages get mean 0 and variance 1 over the tokens of the rollout."""
    clip: float = 0.2
    """How far a token's probability ratio may leave 1 before its gradient stops; infinity: never."""
    value_clip: float = 0.2
    """How far a value may leave that of the rollout before its gradient stops; infinity: never."""
    value_coefficient: float = 0.5
    """Weight of the value loss."""
    entropy_coefficient: float = 0.0
    """Weight of the bonus for entropy, in nats, of the policy's distributions."""
    kl_coefficient: float = 0.0
    """What each nat of a token's divergence from the policy as it was first takes off its reward."""
    target_kl: float | None = None
    """Where the policy has moved so far from the rollout's, in nats a token, its epochs end."""
    learning_rate: float = 1e-6
    """Of AdamW without weight decay, constant."""
    max_gradient_norm: float = 1.0
    """Longer gradients are shortened to this; infinity: never."""
    checkpoint_every: int = 50
    """Steps between checkpoints, where the run has a folder; the last step is always one."""
    seed: int = 0
    """Of problems, samples and minibatches: equal seeds give equal runs, bit for bit on equal CPU threads."""

    def __post_init__(self) -> None:
        counts = ("steps", "prompts_per_step", "group_size", "minibatch_size", "epochs", "max_new_tokens")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ParameterError(f"seed is a whole number, got {self.seed!r}")
        for name in (*counts, "checkpoint_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ParameterError(f"{name} is a whole number, at least 1; got {value!r}")
        for name in ("temperature", "clip", "value_clip", "learning_rate", "max_gradient_norm"):
            if not getattr(self, name) > 0:
                raise ParameterError(f"{name} must be above 0, got {getattr(self, name)!r}")
        for name in ("learning_rate", "value_coefficient", "entropy_coefficient", "kl_coefficient"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ParameterError(f"{name} must be finite and not negative, got {getattr(self, name)!r}")
        for name in ("discount", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ParameterError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        if self.estimator not in ("gae", "group"):
            raise ParameterError(f'estimator is "gae" or "group", got {self.estimator!r}')
        if self.estimator == "group" and self.group_size < 2:
            raise ParameterError("a group of one completion has nothing to be compared with: group_size >= 2")
        if self.target_kl is not None and not self.target_kl > 0:
            raise ParameterError(f"target_kl must be above 0, or None; got {self.target_kl!r}")

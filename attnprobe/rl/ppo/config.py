"""PPOConfig: the settings of a PPO run, and what each of them means.

Users build one and pass it to `PPO`. What is left to others: the algorithm (algorithm).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, Literal, get_args

from attnprobe.errors import ParameterError
from attnprobe.validation import BoolField, FloatField, IntField, choice, real_number, truth, whole_number

Estimator = Literal["gae", "group"]

_ABOVE_0, _FINITE, _SHARE = {"above": 0}, {"minimum": 0, "below": inf}, {"minimum": 0, "maximum": 1}
_RANGES: dict[str, dict[str, Any]] = {
    "temperature": _FINITE,
    "gamma": _SHARE,
    "gae_lambda": _SHARE,
    "clip_coef": _ABOVE_0,
    "clip_coef_vf": _ABOVE_0,
    "vf_coef": _FINITE,
    "ent_coef": _FINITE,
    "kl_coef": _FINITE,
    "target_kl": _ABOVE_0,
    "learning_rate": _FINITE,
    "max_grad_norm": _ABOVE_0,
}


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """How to train; names are those of CleanRL and TRL where they have one.

    Raises:
        ParameterError: a value of the wrong type or outside its range.
    """

    steps: IntField = 100
    """Rollouts, each followed by several epochs over its completions."""
    prompts_per_step: IntField = 32
    """Problems in a rollout, drawn without replacement until all have been seen."""
    group_size: IntField = 4
    """Completions of each problem; the estimator "group" needs at least 2."""
    minibatch_size: IntField = 32
    """Completions in one optimizer step; the last of an epoch may have fewer."""
    epochs: IntField = 2
    """Passes over the completions of a rollout, each in a new random order."""
    max_new_tokens: IntField = 64
    """The longest completion; one that is cut off there counts as finished."""
    temperature: FloatField = 1.0
    """What logits are divided by, both in sampling and in the objective; above 0."""
    estimator: Estimator = "gae"
    """Advantages from a value head ("gae"), or from comparing the completions of a problem ("group")."""
    gamma: FloatField = 1.0
    """GAE: the discount of a future reward, per token."""
    gae_lambda: FloatField = 0.95
    """GAE: 1 relies on the rewards alone, 0 on the value of the next token."""
    whiten: BoolField = True
    """GAE: whether to scale advantages to mean 0 and variance 1 over the tokens of the rollout."""
    clip_coef: FloatField = 0.2
    """How far a token's probability ratio may move from 1 before its gradient stops; infinity: never."""
    clip_coef_vf: FloatField = 0.2
    """How far a value may move from that of the rollout before its gradient stops; infinity: never."""
    vf_coef: FloatField = 0.5
    """Weight of the value loss."""
    ent_coef: FloatField = 0.0
    """Weight of the entropy bonus, per nat of entropy of the policy's distributions."""
    kl_coef: FloatField = 0.0
    """Reward subtracted per nat by which a token's log-probability exceeds the initial policy's."""
    target_kl: FloatField | None = None
    """Stop the epochs over a rollout once the policy has moved this far, in nats per token; None: never."""
    learning_rate: FloatField = 1e-6
    """The constant learning rate of AdamW, without weight decay; at 0, a run changes nothing."""
    max_grad_norm: FloatField = 1.0
    """The norm that gradients are clipped to; infinity: no clipping."""
    checkpoint_every: IntField = 50
    """Steps between checkpoints, if the run has a folder; the last step always saves one."""
    seed: IntField = 0
    """For problems, samples and minibatches: runs with equal seeds and CPU threads are equal, bit for bit."""

    def __post_init__(self) -> None:
        counts = ("steps", "prompts_per_step", "group_size", "minibatch_size", "epochs", "max_new_tokens")
        # Plain Python numbers are stored, whatever kind of number was given.
        for name in (*counts, "checkpoint_every"):
            self._keep(name, whole_number(getattr(self, name), name, minimum=1))
        for name, limits in _RANGES.items():
            if name != "target_kl" or self.target_kl is not None:
                self._keep(name, real_number(getattr(self, name), name, **limits))
        if self.temperature == 0:
            raise ParameterError(
                "temperature must be above 0 in training; got 0.0: all completions of a problem would be "
                "equal, and no gradient would flow. Evaluation(temperature=0) is greedy"
            )
        self._keep("seed", whole_number(self.seed, "seed"))
        self._keep("whiten", truth(self.whiten, "whiten"))
        choice(self.estimator, "estimator", get_args(Estimator))
        if self.estimator == "group" and self.group_size < 2:
            raise ParameterError(
                'the estimator "group" compares the completions of a problem: group_size must be at least '
                f"2; got {self.group_size}"
            )

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

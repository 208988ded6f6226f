"""Credit for trainers: a weight for each token's advantage, from token scores.

    handle = attach_credit(trainer, CoupledRhythmCredit())   # a GRPOTrainer that you already have
    trainer.train()
    handle.detach()

or, in your own training loop:

    gamma = CoupledRhythmCredit(amplification=1.5)(scores)   # [batch, token]
    advantages = apply_credit(advantages, gamma, mask)       # signs="both", as in v2 of the paper

Strategies (credit, baselines, continuous) turn token scores into weights, `RolloutCredit` measures a
policy's own rollouts for them, and `rl.trl` and `rl.ppo` use it in trainers. Measuring goes through
`attnprobe.measure`, as everywhere else. Only `rl.trl` depends on TRL, and it is loaded on first use.
"""

from typing import TYPE_CHECKING, Any

from attnprobe.rl.advantage import apply_credit, credit_weights, gate_gradient
from attnprobe.rl.baselines import EntropyCredit, EntropySelection, RandomCredit
from attnprobe.rl.canary import Verdict, honours_weights
from attnprobe.rl.continuous import ContinuousCredit
from attnprobe.rl.credit import (
    CoupledRhythmCredit,
    Credit,
    CreditStrategy,
    GlobalAnchorCredit,
    LocalChunkCredit,
    credit_of,
    needs_of,
)
from attnprobe.rl.ppo import PPO, Evaluation, PPOConfig
from attnprobe.rl.rollout import Rollout
from attnprobe.rl.rollout_credit import RolloutCredit
from attnprobe.rl.schedules import Ramp, decay, warmup
from attnprobe.rl.scoring import measure_rollout, score_rollout
from attnprobe.rl.weighed import WeighedRollout

if TYPE_CHECKING:
    from attnprobe.rl.trl import CreditCallback, CreditHandle, CreditMixin, attach_credit

__all__ = [
    "PPO",
    "ContinuousCredit",
    "CoupledRhythmCredit",
    "Credit",
    "CreditCallback",
    "CreditHandle",
    "CreditMixin",
    "CreditStrategy",
    "EntropyCredit",
    "EntropySelection",
    "Evaluation",
    "GlobalAnchorCredit",
    "LocalChunkCredit",
    "PPOConfig",
    "Ramp",
    "RandomCredit",
    "Rollout",
    "RolloutCredit",
    "Verdict",
    "WeighedRollout",
    "apply_credit",
    "attach_credit",
    "credit_of",
    "credit_weights",
    "decay",
    "gate_gradient",
    "honours_weights",
    "measure_rollout",
    "needs_of",
    "score_rollout",
    "warmup",
]

_LAZY = {
    "CreditCallback": "attnprobe.rl.trl",
    "CreditHandle": "attnprobe.rl.trl",
    "CreditMixin": "attnprobe.rl.trl",
    "attach_credit": "attnprobe.rl.trl",
}


def __getattr__(name: str) -> Any:
    """Load what needs TRL or transformers on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)

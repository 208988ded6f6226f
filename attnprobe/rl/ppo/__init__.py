"""The reference PPO: `algorithm` is to be read from top to bottom; the other modules hold its parts."""

from attnprobe.rl.ppo.algorithm import (
    PPO,
    generalized_advantages,
    group_advantages,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from attnprobe.rl.ppo.config import PPOConfig
from attnprobe.rl.ppo.evaluation import Evaluation
from attnprobe.rl.ppo.sampling import Episodes, roll_out

__all__ = [
    "PPO",
    "Episodes",
    "Evaluation",
    "PPOConfig",
    "generalized_advantages",
    "group_advantages",
    "policy_loss",
    "roll_out",
    "token_rewards",
    "value_loss",
    "whiten",
]

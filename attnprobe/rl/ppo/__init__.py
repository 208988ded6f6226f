"""The reference PPO: `algorithm` is to be read from top to bottom; the other modules hold its parts."""

from attnprobe.rl.ppo.algorithm import (
    PPO,
    Episodes,
    generalized_advantages,
    group_advantages,
    policy_loss,
    roll_out,
    token_rewards,
    value_loss,
    whiten,
)
from attnprobe.rl.ppo.config import PPOConfig

__all__ = [
    "PPO",
    "Episodes",
    "PPOConfig",
    "generalized_advantages",
    "group_advantages",
    "policy_loss",
    "roll_out",
    "token_rewards",
    "value_loss",
    "whiten",
]

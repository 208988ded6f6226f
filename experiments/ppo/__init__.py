"""Does the reference PPO learn? A small task, three seeds, two estimators, compared with TRL's GRPO."""

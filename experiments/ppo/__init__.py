"""Does the reference PPO learn? A small task, three seeds, two estimators, and TRL's GRPO beside it."""

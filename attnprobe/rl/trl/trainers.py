"""What is read from a TRL trainer: its policy, its rollouts, the entropy of its tokens.

All access to TRL's own attributes, and all reasons to refuse a trainer, are in this one place; attach and
trainer_credit call it. What is left to others: what is done with it (attach, trainer_credit), and the
trainer's loss (routes).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.adapters.base import evaluation_mode
from attnprobe.adapters.versions import SUPPORTED, check_versions
from attnprobe.errors import MissingDependencyError, TrainerError
from attnprobe.rl.rollout import Rollout
from attnprobe.rl.scoring import bare_policy

HANDLE = "_attnprobe_credit"
"""The attribute of a trainer that holds its credit handle."""

_PARTS = (
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
    "_metrics",
    "accelerator",
    "callback_handler",
    "compute_loss",
    "is_deepspeed_enabled",
    "is_fsdp_enabled",
)


def policy_of(trainer: Any) -> Any:
    """Return a trainer's policy without the wrappers of accelerate and peft."""
    return bare_policy(trainer.accelerator.unwrap_model(trainer.model))


def check_trainer(trainer: Any) -> None:
    """Check that a trainer is supported, and has no credit yet.

    Raises:
        MissingDependencyError: trl is not installed.
        TrainerError: an object of another class, an unsupported version, or a trainer that has credit.
    """
    if importlib.util.find_spec("trl") is None:
        raise MissingDependencyError("credit for trainers needs trl: pip install 'attnprobe[trl]'")
    check_versions("trl", error=TrainerError)
    import trl
    from trl import GRPOTrainer, RLOOTrainer  # type: ignore[attr-defined]

    if not isinstance(trainer, (GRPOTrainer, RLOOTrainer)):
        kind = trainer if isinstance(trainer, type) else type(trainer)
        raise TrainerError(
            "credit can be attached to an instance of trl.GRPOTrainer or trl.RLOOTrainer, or of a subclass; "
            f"got {'the class' if kind is trainer else 'a'} {kind.__module__}.{kind.__qualname__}"
        )
    missing = [name for name in _PARTS if not hasattr(trainer, name)]
    if missing:
        raise TrainerError(
            f"{type(trainer).__name__} of trl {trl.__version__} has no {', '.join(missing)}: this version "
            f"is not supported; trl{SUPPORTED['trl']} is"
        )
    if vars(trainer).get(HANDLE) is not None:
        raise TrainerError("this trainer already has credit: call detach() on its handle first")


def rollout_of(trainer: Any, output: dict[str, Any], needs: frozenset[str]) -> Rollout:
    """Return what a trainer has generated as a `Rollout`.

    Raises:
        TrainerError: a trainer whose output lacks something, or prompts with pictures if the strategy needs
            token scores.
    """
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    missing = [name for name in (*names, "advantages") if name not in output]
    if missing:
        raise TrainerError(
            f"{type(trainer).__name__} generates no {', '.join(missing)}: its rollouts are not understood"
        )
    pictures = [name for name in output if name.startswith("pixel_") or name == "num_images"]
    if pictures and needs:
        raise TrainerError(
            f"the prompts contain pictures ({', '.join(pictures)}), but attention is measured over text: "
            "use a strategy that needs no token scores, or train on text only"
        )
    prompt_ids, prompt_mask, completion_ids, completion_mask = (output[name] for name in names)
    return Rollout(prompt_ids, prompt_mask, completion_ids, completion_mask, output.get("tool_mask"))


@torch.no_grad()
def token_entropy(trainer: Any, rollout: Rollout, batch_size: int) -> Float[Tensor, "completion token"]:
    """Return the entropy of each token at the sampling temperature, by the trainer's own function."""
    with evaluation_mode(trainer.model.modules()):
        result = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1),
            torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1).long(),
            rollout.completion_ids.shape[1],
            batch_size,
            compute_entropy=True,
        )
    entropy: Tensor = result[1]
    return entropy.float()


def is_sharded(trainer: Any) -> bool:
    """Return whether the policy's parameters are sharded over the processes of a run."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)

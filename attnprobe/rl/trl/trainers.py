"""What a TRL trainer is asked for: its policy, its rollouts, the entropy of its tokens.

What is read of TRL's own, and what is refused, stands here in one place. What is left to others: what
is done with it (trl), and the trainer's loss (routes).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.errors import MissingDependencyError, TrainerError
from attnprobe.rl.scoring import Rollout, bare_policy

HANDLE = "_attnprobe_credit"
"""The attribute by which a trainer knows its credit."""

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
    """Return a trainer's policy without what accelerate and peft have wrapped around it."""
    return bare_policy(trainer.accelerator.unwrap_model(trainer.model))


def check_trainer(trainer: Any) -> None:
    """Check that a trainer is one that is understood, and has no credit yet.

    Raises:
        MissingDependencyError: trl is not installed.
        TrainerError: another class, an unknown version, or a trainer that has credit.
    """
    if importlib.util.find_spec("trl") is None:
        raise MissingDependencyError("credit for trainers needs trl: pip install 'attnprobe[trl]'")
    import trl
    from trl import GRPOTrainer, RLOOTrainer  # type: ignore[attr-defined]

    if not isinstance(trainer, (GRPOTrainer, RLOOTrainer)):
        kind = trainer if isinstance(trainer, type) else type(trainer)
        raise TrainerError(
            "credit can be attached to an instance of trl.GRPOTrainer, of trl.RLOOTrainer, or of a subclass; "
            f"got {'the class' if kind is trainer else 'a'} {kind.__module__}.{kind.__qualname__}"
        )
    missing = [name for name in _PARTS if not hasattr(trainer, name)]
    if missing:
        raise TrainerError(
            f"{type(trainer).__name__} of trl {trl.__version__} has no {', '.join(missing)}: this version "
            "is not understood; trl 1.16 is"
        )
    if vars(trainer).get(HANDLE) is not None:
        raise TrainerError("this trainer has credit already: detach() that first")


def rollout_of(trainer: Any, output: dict[str, Any], needs: frozenset[str]) -> Rollout:
    """Return what a trainer has generated, for a strategy that needs some scores of it.

    Raises:
        TrainerError: a trainer that generates something else, or prompts with pictures.
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
            f"the prompts hold pictures ({', '.join(pictures)}), and attention is measured over text only: "
            "use a strategy that needs no scores, or train on text"
        )
    prompt_ids, prompt_mask, completion_ids, completion_mask = (output[name] for name in names)
    return Rollout(prompt_ids, prompt_mask, completion_ids, completion_mask, output.get("tool_mask"))


@torch.no_grad()
def token_entropy(trainer: Any, rollout: Rollout, batch_size: int) -> Float[Tensor, "batch completion"]:
    """Return the entropy of each token by the trainer's own function: at its sampling temperature."""
    with _evaluating(trainer.model):
        result = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1),
            torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1),
            rollout.completion_ids.shape[1],
            batch_size,
            compute_entropy=True,
        )
    entropy: Tensor = result[1]
    return entropy.float()


def is_sharded(trainer: Any) -> bool:
    """Return whether the processes of a run share the policy's parameters out among them."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True

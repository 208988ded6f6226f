"""What is read from a TRL trainer: its policy, its rollouts, the entropy of its tokens.

All access to TRL's own attributes, and all reasons to refuse a trainer, are in this one place; attach and
trainer_credit call it. What is left to others: what is done with it (attach, trainer_credit), and the
trainer's loss (routes).
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.adapters.base import evaluation_mode
from attnprobe.adapters.versions import SUPPORTED, check_versions
from attnprobe.errors import MissingDependencyError, TrainerError
from attnprobe.rl import processes
from attnprobe.rl.rollout import Rollout
from attnprobe.rl.scoring import bare_policy

HANDLE = "_attnprobe_credit"
"""The attribute of a trainer that holds its credit handle."""

_PARTS = (
    "_buffered_inputs",
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
    "_logs",
    "_metrics",
    "accelerator",
    "callback_handler",
    "compute_loss",
    "log_completions",
    "model_wrapped",
)

_PREFERENCES = "its loss compares whole completions, and has no advantage of a token to weight"
_TEACHER = "it imitates a teacher's tokens, and has no advantages to weight"
_ITS_OWN = "its advantages are made inside its own loop: weight them with attnprobe.rl.RolloutCredit there"
_WHY_NOT = {
    "A2POTrainer": "its loss fits the reward of whole completions, and has no advantage of a token to weight",
    "AsyncGRPOTrainer": "completions come from a server, packed into trees of shared prefixes, which credit "
    "cannot take apart",
    "AsyncDistillationTrainer": _TEACHER,
    "BCOTrainer": _PREFERENCES,
    "CPOTrainer": _PREFERENCES,
    "DPOTrainer": _PREFERENCES,
    "DistillationTrainer": _TEACHER,
    "GKDTrainer": _TEACHER,
    "GOLDTrainer": _TEACHER,
    "IWOPDTrainer": _ITS_OWN,
    "KTOTrainer": _PREFERENCES,
    "ORPOTrainer": _PREFERENCES,
    "OnlineDPOTrainer": _PREFERENCES,
    "PPOTrainer": _ITS_OWN,
    "PRMTrainer": "it trains a reward model",
    "RewardTrainer": "it trains a reward model",
    "SDFTTrainer": _TEACHER,
    "SDPOTrainer": "its log-probabilities are computed inside a distillation loss, where no weight can be "
    "tried out",
    "SFTTrainer": "it imitates given texts, and has no advantages to weight",
    "SSDTrainer": "it imitates its own texts, and has no advantages to weight",
    "TPOTrainer": _PREFERENCES,
}
"""Trainers of trl whose loss or data leave nothing to weight, for the message that refuses them."""


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
        why = next((_WHY_NOT[base.__name__] for base in kind.__mro__ if base.__name__ in _WHY_NOT), None)
        raise TrainerError(
            "credit can be attached to an instance of trl.GRPOTrainer or trl.RLOOTrainer, or of a subclass; "
            f"got {'the class' if kind is trainer else 'a'} {kind.__module__}.{kind.__qualname__}"
            + ("" if why is None else f": {why}")
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


def warn_of_length(policy: Any, rollout: Rollout, longest: int) -> int:
    """Return the length of the longest sequence so far; warn once if it is beyond what the policy knows.

    Rotary positions have no end, so that the policy goes on, and credit with it. Where positions are looked
    up in a table, the trainer itself has failed before.
    """
    known = getattr(policy.config, "max_position_embeddings", None)
    length = int((rollout.prompt_mask.sum(-1) + rollout.completion_mask.sum(-1)).max())
    if isinstance(known, int) and longest <= known < length:
        warnings.warn(
            f"a prompt with its completion has {length} tokens, but the policy was trained for {known} "
            "(max_position_embeddings): attention is measured there all the same, but may mean little",
            stacklevel=2,
        )
    return max(longest, length)


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
    """Return whether the policy's parameters are sharded over processes: by FSDP, or by DeepSpeed ZeRO-3.

    ZeRO-1 and ZeRO-2 shard gradients and the optimizer only: the policy is whole, and may be measured alone.
    """
    return any(processes.is_sharded(module) for module in (trainer.model, trainer.model_wrapped))

"""The pass over its rollout that a trainer makes anyway, to read attention from in place of a pass of ours.

Where a policy may move between writing a rollout and training on it, TRL computes log-probabilities of the
rollout first: always in RLOO; in GRPO with `num_iterations`, with more `steps_per_generation` than are
accumulated, and with vLLM. `OwnPass` reads that pass while the trainer generates, where the weights are those
that a pass of our own would give. What is left to others: reading (watching), and our own passes
(rollout_credit).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnprobe.adapters.positions import Regimes, context_length
from attnprobe.rl.rollout import Rollout
from attnprobe.rl.trl.routes import LOGPS, replaced
from attnprobe.rl.trl.trainer_credit import TrainerCredit
from attnprobe.rl.watching import Watched, draws_at_random

_GENERATE_IDS = "_generate"


class OwnPass:
    """Reads the first pass over a rollout that the policy makes while a trainer generates.

    Args:
        trainer: a trainer that `check_trainer` accepts.
        credit: what its completions are weighed by.
    """

    def __init__(self, trainer: Any, credit: TrainerCredit) -> None:
        self._trainer, self._credit = trainer, credit
        self._watched: Watched | None = None
        self._tools: Any = None

    @contextmanager
    def while_generating(self) -> Iterator[None]:
        """Read the pass that the trainer makes in the context, if it makes one that can be read."""
        trainer, self._watched, self._tools = self._trainer, None, None
        if not self._credit.layers or not trainer.model.training or self._differs_from_ours():
            yield
            return
        original, generate = getattr(trainer, LOGPS), getattr(trainer, _GENERATE_IDS)
        adapters = _active_adapters(trainer.model)

        def noting_tools(*given: Any, **options: Any) -> Any:
            made = generate(*given, **options)
            # Lists of a mask for each completion; other trainers return something else in its place.
            self._tools = made[2] if isinstance(made, tuple) and len(made) > 3 else None
            return made

        def reading(*given: Any, **options: Any) -> Any:
            if self._watched is not None or len(given) < 4 or torch.is_grad_enabled():
                return original(*given, **options)
            model, ids, mask, count = given[:4]
            # Not the reference model, nor the policy without its adapters, which may be run here too.
            ours = model is trainer.model and _active_adapters(model) == adapters
            if not ours or _is_shifted(model, mask) or options.get("pixel_values") is not None:
                return original(*given, **options)
            rollout = self._rollout(ids, mask, count)
            with self._credit.watching(model, rollout, trainer.state.global_step) as watched:
                result = original(*given, **options)
            self._watched = watched
            return result

        with replaced(trainer, LOGPS, reading), replaced(trainer, _GENERATE_IDS, noting_tools):
            yield

    def of(self, rollout: Rollout) -> Watched | None:
        """Return what was read of a rollout; None if nothing was, or if the trainer has changed it since."""
        if self._watched is None:
            return None
        theirs = self._watched.rollout
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "response_mask")
        same = all(
            getattr(rollout, name).shape == getattr(theirs, name).shape
            and torch.equal(getattr(rollout, name), getattr(theirs, name))
            for name in names
        )
        return self._watched if same else None

    def _differs_from_ours(self) -> bool:
        """Whether a pass of the trainer would differ from one of ours, or not be made by every process."""
        # A process that could not read its pass would make one of its own, and wait for the others forever.
        if self._credit.root is not None:
            return True
        regimes = Regimes(self._credit.policy, self._credit.policy.config)
        # A policy that treats long sequences otherwise decides that by the whole batch, padding included.
        if regimes.of_length(1) != regimes.of_length(1 << 40):
            return True
        modules = self._trainer.model_wrapped.modules()
        return any(draws_at_random(module) or _is_compiled(module) for module in modules)

    def _rollout(self, ids: Tensor, mask: Tensor, count: int) -> Rollout:
        """Return the rollout that a pass is over."""
        written = ids[:, -count:]
        tools = None
        if self._tools is not None:
            tools = torch.ones_like(written)
            for row, tool_mask in enumerate(self._tools):
                tools[row, : len(tool_mask)] = torch.tensor(tool_mask).to(tools)
        return Rollout(ids[:, :-count], mask[:, :-count], written, mask[:, -count:], tools)


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled: reading it uncompiled would change the trainer's log-probabilities."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")


def _is_shifted(model: nn.Module, mask: Tensor) -> bool:
    """Whether padding on the left shifts the positions of a policy that has a table of them.

    TRL counts it in its own passes, but not when it generates.
    """
    return not bool(mask[:, 0].all()) and context_length(model, getattr(model, "config", None)) is not None


def _active_adapters(model: nn.Module) -> tuple[Any, ...]:
    """Return which adapters of peft are in use."""
    layers = (each for each in model.modules() if hasattr(each, "disable_adapters"))
    return tuple((bool(each.disable_adapters), str(each.active_adapters)) for each in layers)

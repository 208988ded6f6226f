"""CreditCallback: the grouping of heads as part of a transformers Trainer's own state.

`attach_credit` adds one to the trainer. The trainer writes it into its checkpoints (`trainer_state.json`),
and a resumed run restores it from there. The callback holds no reference to the trainer, so that a trainer
may copy, replace or restore it. What is left to others: the grouping itself (grouping), measuring and
weighing (rollout_credit).
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from attnprobe.rl.grouping import HeadGrouping


class CreditCallback(HeadGrouping, TrainerCallback, ExportableState):
    """Keeps the head groups through a run and its checkpoints.

    Args:
        reclassify_every: how many optimizer steps to wait before classifying heads again; None: they are
            classified only once.

    Raises:
        ParameterError: a `reclassify_every` that is not a whole number of at least 1.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the grouping from the checkpoint that the run resumes from, if any."""
        if state.global_step == 0:
            # A new run: steps are counted from 0 again.
            if self.reclassify_every is not None:
                self.grouped_at = None
            return
        all_stored: Any = state.stateful_callbacks or {}
        stored = all_stored.get(type(self).__name__)
        if stored is not None:
            self.restore(stored["attributes"])

    def state(self) -> dict[str, Any]:
        """Return what the trainer writes into its checkpoints."""
        return {"args": {"reclassify_every": self.reclassify_every}, "attributes": self.attributes()}


def callback_of(trainer: Any) -> CreditCallback | None:
    """Return a trainer's current credit callback; None if it has none."""
    callbacks = trainer.callback_handler.callbacks
    return next((callback for callback in callbacks if isinstance(callback, CreditCallback)), None)

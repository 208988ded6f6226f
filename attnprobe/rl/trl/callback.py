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
from attnprobe.rl.settings import check_same_settings


class CreditCallback(HeadGrouping, TrainerCallback, ExportableState):
    """Keeps the head groups through a run and its checkpoints.

    Args:
        reclassify_every: how many optimizer steps to wait before classifying heads again; None: they are
            classified only once.

    Attributes:
        settings: what the weights of the run depend on, as `RolloutCredit.settings` says it.

    Raises:
        ParameterError: a `reclassify_every` that is not a whole number of at least 1.
    """

    settings: dict[str, str] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the grouping from the checkpoint that the run resumes from, if any.

        Raises:
            ResultError: a checkpoint of a run with other settings of credit; the message says which differ.
        """
        if state.global_step == 0:
            # A new run: steps are counted from 0 again.
            if self.reclassify_every is not None:
                self.grouped_at = None
            return
        all_stored: Any = state.stateful_callbacks
        stored = all_stored.get(type(self).__name__)
        if stored is None:
            # The run that is resumed had no credit. The trainer expects an entry when it writes a checkpoint.
            all_stored[type(self).__name__] = self.state()
            return
        attributes = stored["attributes"]
        if attributes.get("settings") is not None and self.settings is not None:
            check_same_settings(attributes["settings"], self.settings)
        self.restore(attributes)

    def attributes(self) -> dict[str, Any]:
        """Return what a checkpoint has to store: the grouping, and the settings that belong to it."""
        return super().attributes() | {"settings": self.settings}

    def state(self) -> dict[str, Any]:
        """Return what the trainer writes into its checkpoints."""
        return {"args": {"reclassify_every": self.reclassify_every}, "attributes": self.attributes()}


def callback_of(trainer: Any) -> CreditCallback | None:
    """Return a trainer's current credit callback; None if it has none."""
    callbacks = trainer.callback_handler.callbacks
    return next((callback for callback in callbacks if isinstance(callback, CreditCallback)), None)

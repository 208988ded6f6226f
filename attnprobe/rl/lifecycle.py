"""CreditCallback: what of a credited run outlives a step, and goes into its checkpoints.

That is the grouping of heads: when it was made, when it is due again, and itself, as part of the
trainer's own state (`trainer_state.json`), from where a resumed run takes it. The callback knows no
trainer; it is safe to be copied, replaced or restored by one. What is left to others: measuring and
weighing (trl).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from attnprobe.errors import ParameterError, ResultError
from attnprobe.heads import HeadGroups


class CreditCallback(TrainerCallback, ExportableState):
    """Keeps the grouping of heads through a run and its checkpoints.

    Args:
        reclassify_every: group heads anew after so many optimizer steps; None: once, and keep it.

    Attributes:
        saved_groups: the grouping, as what JSON can hold; None before the first.
        grouped_at: the optimizer step of the grouping.

    Raises:
        ParameterError: a number of steps below 1.
    """

    def __init__(self, reclassify_every: int | None = 10) -> None:
        every = reclassify_every
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ParameterError(
                "reclassify_every is a whole number of optimizer steps, at least 1, or None to group heads "
                f"once; got {every!r}"
            )
        self.reclassify_every = every
        self.saved_groups: dict[str, Any] | None = None
        self.grouped_at: int | None = None

    @property
    def groups(self) -> HeadGroups | None:
        """The grouping in use, None before the first."""
        return None if self.saved_groups is None else _from_json(self.saved_groups)

    def keep(self, groups: HeadGroups, step: int) -> None:
        """Use a grouping from now on; `step` is the optimizer step that it was made at."""
        # Without the model's name: a resumed run may have loaded the model from another place.
        self.saved_groups = _to_json(replace(groups, model_name=""))
        self.grouped_at = step

    def is_due(self, step: int) -> bool:
        """Return whether heads are to be grouped now."""
        if self.saved_groups is None or self.grouped_at is None:
            return True
        return self.reclassify_every is not None and step - self.grouped_at >= self.reclassify_every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the grouping of the checkpoint that the run resumes from, if it resumes."""
        if state.global_step == 0:
            # Another run from its start: steps are counted anew.
            if self.reclassify_every is not None:
                self.grouped_at = None
            return
        all_stored: Any = state.stateful_callbacks or {}
        stored = all_stored.get(type(self).__name__)
        if stored is not None:
            self.saved_groups = stored["attributes"]["saved_groups"]
            self.grouped_at = stored["attributes"]["grouped_at"]

    def state(self) -> dict[str, Any]:
        """Return what the trainer writes into its checkpoints."""
        return {
            "args": {"reclassify_every": self.reclassify_every},
            "attributes": {"saved_groups": self.saved_groups, "grouped_at": self.grouped_at},
        }


def _to_json(groups: HeadGroups) -> dict[str, Any]:
    # A span is float32, which a Python float holds exactly; JSON has no NaN that everyone reads.
    span = [[None if value != value else value for value in row] for row in groups.span.tolist()]
    return {
        "local_heads": groups.local_heads.tolist(),
        "global_heads": groups.global_heads.tolist(),
        "span": span,
        "layers": list(groups.layers),
    }


def _from_json(saved: dict[str, Any]) -> HeadGroups:
    try:
        span = [[float("nan") if value is None else value for value in row] for row in saved["span"]]
        return HeadGroups(
            local_heads=torch.tensor(saved["local_heads"], dtype=torch.bool),
            global_heads=torch.tensor(saved["global_heads"], dtype=torch.bool),
            receiver_heads=None,
            span=torch.tensor(span),
            receiver_kurtosis=None,
            layers=tuple(saved["layers"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ResultError(
            f"the checkpoint's grouping of heads is damaged ({type(error).__name__}: {error}): resume from "
            "another checkpoint, or pass heads= to attach_credit"
        ) from error

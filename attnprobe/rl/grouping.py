"""HeadGrouping: which heads are local and global during training, and when to classify them again.

A policy changes during training, so `RolloutCredit` reclassifies its heads from time to time. A grouping
records the step at which it was made, and goes into checkpoints as plain JSON, so that a resumed run
continues with it. `choose_heads` says which layers to measure for given heads or a `layers` argument.
What is left to others: measuring and weighing (rollout_credit), and checkpoints (trl, ppo).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from attnprobe.adapters import Adapter, adapter_for
from attnprobe.adapters.base import Layers, resolve_layers
from attnprobe.errors import ParameterError, ResultError
from attnprobe.head_groups import Group, GroupsLike, HeadGroups, head_groups
from attnprobe.head_selection import HeadSelection, names_layers
from attnprobe.validation import IntLike, brief, instance, whole_number


class HeadGrouping:
    """The head groups in use, and when to classify heads again.

    Args:
        reclassify_every: how many optimizer steps to wait before classifying heads again; None: they are
            classified only once.

    Attributes:
        saved_groups: the groups as plain JSON; None before the first.
        grouped_at: the step at which they were made.

    Raises:
        ParameterError: a `reclassify_every` that is not a whole number of at least 1.

    >>> grouping = HeadGrouping(reclassify_every=10)
    >>> grouping.is_due(0)
    True
    """

    def __init__(self, reclassify_every: IntLike | None = 10) -> None:
        self.reclassify_every = (
            None
            if reclassify_every is None
            else whole_number(reclassify_every, "reclassify_every", minimum=1)
        )
        self.saved_groups: dict[str, Any] | None = None
        self.grouped_at: int | None = None

    @property
    def groups(self) -> HeadGroups | None:
        """The groups in use; None before the first.

        Raises:
            ResultError: groups from a damaged checkpoint.
        """
        return None if self.saved_groups is None else _from_json(self.saved_groups)

    def keep(self, groups: HeadGroups, step: IntLike) -> None:
        """Use these groups from now on; `step` is the optimizer step at which they were made.

        Raises:
            ParameterError: anything but head groups, or a step that is not a whole number.
        """
        instance(groups, HeadGroups, "groups", "classify_heads() returns one")
        # Without the model's name: a resumed run may have loaded the model from elsewhere.
        self.saved_groups = _to_json(replace(groups, model_name=""))
        self.grouped_at = whole_number(step, "step")

    def is_due(self, step: IntLike) -> bool:
        """Return whether to classify heads at this step.

        Raises:
            ParameterError: a step that is not a whole number.
        """
        now = whole_number(step, "step")
        if self.saved_groups is None or self.grouped_at is None:
            return True
        return self.reclassify_every is not None and now - self.grouped_at >= self.reclassify_every

    def attributes(self) -> dict[str, Any]:
        """Return what a checkpoint has to store."""
        return {"saved_groups": self.saved_groups, "grouped_at": self.grouped_at}

    def restore(self, attributes: Mapping[str, Any]) -> None:
        """Restore what a checkpoint has stored.

        Raises:
            ResultError: anything but what `attributes` returns, or groups that are damaged.
        """
        if not isinstance(attributes, Mapping) or not {"saved_groups", "grouped_at"} <= set(attributes):
            raise ResultError(
                "a checkpoint's grouping of heads must have saved_groups and grouped_at, as attributes() "
                f"returns them; got {brief(attributes)}"
            )
        groups, grouped_at = attributes["saved_groups"], attributes["grouped_at"]
        if groups is not None:
            _from_json(groups)
        if grouped_at is not None:
            grouped_at = whole_number(grouped_at, "grouped_at of the checkpoint", error=ResultError)
        self.saved_groups, self.grouped_at = groups, grouped_at


Groups = HeadGroups | dict[Group, HeadSelection]
"""Head groups as they are used: a grouping, or a selection for each group."""


def choose_heads(
    policy: Any, layers: Layers, heads: GroupsLike | None
) -> tuple[tuple[int, ...], Groups | None]:
    """Return the layers of the policy to measure, and the given heads in the form in which they are used.

    The layers are those of the heads, where these name any; "all" and head numbers mean heads of `layers`.

    Raises:
        ParameterError: layers or heads that the policy does not have, or a grouping of another model.
        UnsupportedModelError: a policy whose attention cannot be read.
    """
    adapter = adapter_for(policy)
    if heads is None:
        return resolve_layers(layers, adapter), None
    is_default = isinstance(layers, str) and layers == "middle"
    if isinstance(heads, HeadGroups):
        return _layers_of(heads, layers, adapter, is_default), heads
    given = heads.values() if isinstance(heads, Mapping) else (heads,)
    asked = resolve_layers(layers, adapter)
    within = adapter.layers if is_default and any(map(names_layers, given)) else asked
    groups = head_groups(heads, layers=within, head_count=adapter.head_count, model_name=adapter.model_name)
    return tuple(sorted({layer for selection in groups.values() for layer in selection.layers})), groups


def _layers_of(heads: HeadGroups, layers: Layers, adapter: Adapter, is_default: bool) -> tuple[int, ...]:
    """Return the layers of a grouping, which must be those asked for and of the same model."""
    chosen = resolve_layers(heads.layers, adapter)
    if not is_default and resolve_layers(layers, adapter) != chosen:
        raise ParameterError(
            f"heads were grouped in layers {list(heads.layers)}, but layers={layers!r}: leave layers out"
        )
    if heads.model_name and heads.model_name != adapter.model_name:
        raise ParameterError(
            f"heads were grouped for {heads.model_name}, but the policy is {adapter.model_name}; if that is "
            "the same model under another name, pass dataclasses.replace(heads, model_name='')"
        )
    return chosen


def _to_json(groups: HeadGroups) -> dict[str, Any]:
    # A span is float32, which a Python float holds exactly; NaN is not portable JSON.
    span = [[None if value != value else value for value in layer] for layer in groups.span.tolist()]
    return {
        "local_heads": groups.local_heads.tolist(),
        "global_heads": groups.global_heads.tolist(),
        "span": span,
        "layers": list(groups.layers),
    }


def _from_json(saved: dict[str, Any]) -> HeadGroups:
    try:
        span = [[float("nan") if value is None else value for value in layer] for layer in saved["span"]]
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
            "another checkpoint, or pass heads= when you set up credit"
        ) from error

"""The results of `couplings`: one coupling, and the three of Table 2 of arXiv 2510.13554v2.

What is left to others: measuring them (couplings), and what counts as chance (nulls, random_heads).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypedDict

from jaxtyping import Float
from torch import Tensor

from attnprobe.analysis.bootstrap import Estimate
from attnprobe.analysis.summary import Summary
from attnprobe.errors import AttnprobeError, ResultError
from attnprobe.provenance import Provenance
from attnprobe.storage import load_result, save_result
from attnprobe.validation import instance

NAMES = ("entropy_at_preplans", "receiver_at_global", "anchor_after_preplan")
"""The couplings, in the order of Table 2."""


@dataclass(frozen=True, eq=False, repr=False)
class Coupling(Summary):
    """One coupling: the mean of a value over some peaks, compared with what a null gives.

    Attributes:
        observed: the mean over the peaks of all problems, with its bootstrap interval.
        null: the mean under the null, and the interval that holds `confidence` of its draws. The value is
            exact where peaks are moved, and the mean of the draws for random heads.
        lift: `(observed - null) / null`, with its bootstrap interval over problems.
        p_value: the share of draws at least as large as what was observed, which itself counts as one of
            them, in (0, 1]; NaN if there is no peak.
        position_lift: the lift over peaks that lie anywhere, the same for all nulls: in closed form.
        null_position_lift: that lift for random heads, with the interval of their draws. Other heads have
            other numbers of peaks, so their lifts compare better than their means. None where peaks are
            moved.
        position_lift_p_value: the share of draws with at least the observed `position_lift`; None where peaks
            are moved.
        movable: the share of peaks in strata, such as the tokens of one id, that hold a token that is no
            peak. All others stay as they are under the null, and pull the lift towards 0. None for random
            heads.
        observed_sum, null_sum, position_sum: for each problem: the sum of the value over its peaks, and its
            mean under the null and under `null="position"`.
        peaks: the number of peaks of each problem.
        null_values: the mean over the peaks in each draw.
        null_position_lifts: the position lift of each draw of random heads; None where peaks are moved.

    Raises:
        ResultError: numbers of the wrong type or size.
    """

    observed: Estimate
    null: Estimate
    lift: Estimate
    p_value: float
    position_lift: Estimate
    null_position_lift: Estimate | None
    position_lift_p_value: float | None
    movable: float | None
    observed_sum: Float[Tensor, " problem"]
    null_sum: Float[Tensor, " problem"]
    position_sum: Float[Tensor, " problem"]
    peaks: Float[Tensor, " problem"]
    null_values: Float[Tensor, " draw"]
    null_position_lifts: Float[Tensor, " draw"] | None = None

    def _headline(self) -> str:
        problems = int((self.peaks > 0).sum())
        return (
            f"observed {self.observed}, null {self.null}, lift {self.lift}, p {self.p_value:.3g}, "
            f"{int(self.peaks.sum())} peaks in {problems} problems"
        )

    def _shown(self) -> dict[str, Any]:
        return {}

    def _table(self) -> dict[str, Any]:
        """Return a line for each problem: its number of peaks and its sums."""
        columns: dict[str, Any] = {"problem": list(range(len(self.peaks)))}
        return columns | {name: getattr(self, name).tolist() for name in ("peaks", *_SUMS)}


@dataclass(frozen=True, eq=False, repr=False)
class Couplings(Summary):
    """The three couplings of Table 2 of arXiv 2510.13554v2; None if a score was not measured.

    Attributes:
        entropy_at_preplans: mean entropy, in nats, at WAAD peaks.
        receiver_at_global: share of the receiver heads' FAI peaks that are also peaks of the global heads.
        anchor_after_preplan: share of FAI peaks that coincide with, or follow within `lookback` tokens,
            a WAAD peak.
        parameters: what `couplings` was called with.
        provenance: what the scores were computed from; without heads if they differ between batches.

    Raises:
        ResultError: anything else in place of a coupling.
    """

    entropy_at_preplans: Coupling | None
    receiver_at_global: Coupling | None
    anchor_after_preplan: Coupling
    parameters: dict[str, float | int | str]
    provenance: Provenance = Provenance()  # noqa: RUF009 (frozen)

    def _check(self, error: type[AttnprobeError] = ResultError) -> None:
        for name in NAMES:
            if getattr(self, name) is not None or name == "anchor_after_preplan":
                instance(getattr(self, name), Coupling, name, error=error)

    def _measured(self) -> dict[str, Coupling]:
        """Return the couplings that are not None, by name."""
        found = {name: getattr(self, name) for name in NAMES}
        return {name: coupling for name, coupling in found.items() if coupling is not None}

    def _headline(self) -> str:
        # The provenance includes the alignment.
        told = [f"{name}={value}" for name, value in self.parameters.items() if name != "align"]
        return ", ".join([*told, str(self.provenance)])

    def _shown(self) -> dict[str, Any]:
        of = self._measured().values()
        columns = {
            "coupling": list(self._measured()),
            "observed": [coupling.observed for coupling in of],
            "null": [coupling.null for coupling in of],
            "lift": [coupling.lift for coupling in of],
            "p": [coupling.p_value for coupling in of],
        }
        if all(coupling.null_position_lift is not None for coupling in of):
            columns["position lift"] = [coupling.position_lift for coupling in of]
            columns["of random heads"] = [coupling.null_position_lift for coupling in of]
            columns["p of it"] = [coupling.position_lift_p_value for coupling in of]
        return columns

    def _table(self) -> dict[str, Any]:
        """Return a line for each coupling: its estimates with their limits, p-values and counts."""
        of = self._measured().values()
        columns: dict[str, Any] = {"coupling": list(self._measured())}
        for quantity in ("observed", "null", "lift", "position_lift", "null_position_lift"):
            estimates = [getattr(each, quantity) or _UNKNOWN for each in of]
            columns[quantity] = [estimate.value for estimate in estimates]
            columns[f"{quantity}_low"] = [estimate.low for estimate in estimates]
            columns[f"{quantity}_high"] = [estimate.high for estimate in estimates]
        for name in ("p_value", "position_lift_p_value", "movable"):
            columns[name] = [float("nan") if getattr(c, name) is None else getattr(c, name) for c in of]
        columns["peaks"] = [int(each.peaks.sum()) for each in of]
        columns["problems"] = [int((each.peaks > 0).sum()) for each in of]
        return columns

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save as one safetensors file with JSON metadata, and return its path.

        Raises:
            ResultError: a path that cannot be written.
        """
        tensors: dict[str, Tensor | None] = {}
        numbers = {}
        for name, coupling in self._measured().items():
            tensors |= {f"{name}.{field}": getattr(coupling, field) for field in _TENSORS}
            numbers[name] = {field: getattr(coupling, field) for field in _Numbers.__annotations__}
        settings = {"parameters": self.parameters, "provenance": self.provenance, "couplings": numbers}
        return save_result(path, "Couplings", tensors, settings)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Couplings:
        """Load what `save` wrote.

        Raises:
            ResultError: a file that is missing or damaged, or that holds something else.
        """
        types = {
            "parameters": dict[str, float | int | str],
            "provenance": Provenance,
            "couplings": dict[_Name, _Numbers],
        }
        tensors, settings = load_result(path, "Couplings", (), types)
        loaded: dict[str, Any] = dict.fromkeys(NAMES)
        try:
            for name, numbers in settings.pop("couplings").items():
                parts = {field: tensors.get(f"{name}.{field}") for field in _TENSORS}
                loaded[name] = Coupling(**numbers, **parts)  # type: ignore[arg-type]
            return cls(**loaded, **settings)
        except AttnprobeError as error:
            raise ResultError(f"{path} is damaged: {error}") from error


class _Numbers(TypedDict):
    observed: Estimate
    null: Estimate
    lift: Estimate
    p_value: float
    position_lift: Estimate
    null_position_lift: Estimate | None
    position_lift_p_value: float | None
    movable: float | None


_Name = Literal["entropy_at_preplans", "receiver_at_global", "anchor_after_preplan"]
_SUMS = ("observed_sum", "null_sum", "position_sum")
_TENSORS = tuple(each.name for each in fields(Coupling) if each.name not in _Numbers.__annotations__)
_UNKNOWN = Estimate(float("nan"), float("nan"), float("nan"))

"""What was found about one family of causal language models: the outcome of each check, and its status.

`family_checks` makes a report for each family, and `all_families` the table of all. What is left to others:
the checks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

BITWISE = "bitwise"
"""The note of a check in which no bit of the logits changed."""

_READING = {"measure", "attach none", "attach left", "attach right"}

Kind = Literal["good", "refused", "model", "wrong", "error"]


@dataclass(frozen=True)
class Outcome:
    """How one check ended.

    Attributes:
        kind: "good"; "refused" (attnprobe says why); "model" (the model itself cannot do it, without
            attnprobe too); "wrong" (a number or an output is not what it must be); "error" (an exception
            that is not attnprobe's).
        note: what was found, in a few words.
        difference: the largest difference that was found, if the check compares numbers.
    """

    kind: Kind
    note: str = ""
    difference: float | None = None


@dataclass
class FamilyReport:
    """What was found about one family.

    Attributes:
        name: the family's `model_type`.
        model_class: the class of its model; empty if it cannot be built.
        reads: how its attention is read, "factored" or "dense"; empty if it is refused.
        layers, skipped_layers: the layers with attention, and those without.
        refused_sites: the sites that are refused, with the reasons.
        reason: why the family is refused or cannot be built.
        outcomes: the outcome of each check.
    """

    name: str
    model_class: str = ""
    reads: str = ""
    layers: tuple[int, ...] = ()
    skipped_layers: tuple[int, ...] = ()
    refused_sites: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """The family as a whole: "factored", "dense", "refused", "not built", "WRONG" or "ERROR"."""
        kinds = {outcome.kind for outcome in self.outcomes.values()}
        if "error" in kinds:
            return "ERROR"
        if "wrong" in kinds:
            return "WRONG"
        if any(self.outcomes[title].kind == "good" for title in _READING & set(self.outcomes)):
            return self.reads
        return "refused" if self.model_class else "not built"

    @property
    def is_bitwise(self) -> bool:
        """Whether no logits changed by a single bit in any call that was tried."""
        return not self.changes

    @property
    def changes(self) -> list[str]:
        """How the logits or the text changed while a probe was attached; empty if they did not."""
        tried = [o for title, o in self.outcomes.items() if title.startswith(("logits", "text"))]
        return [outcome.note for outcome in tried if outcome.kind == "wrong"]

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {"status": self.status, **asdict(self)}

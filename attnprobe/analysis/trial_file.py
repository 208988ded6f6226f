"""Trials at chosen positions, as a result and in a file that grows during a run.

`perturb` and `knockout` try something at some positions of each response, and each trial may take long. Their
results, `Perturbations` and `Knockouts`, are `Trials`, and are saved as one JSON object per line, after a
header. `TrialFile` is such a file during a run: it grows with each trial, so that an interrupted run
continues where it stopped. What is left to others: what is tried (perturbation, knockout_trials), and what
the trials say (trials, knockout_trials).
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec

from attnprobe.analysis.chosen_positions import Kind
from attnprobe.analysis.summary import Summary
from attnprobe.errors import AttnprobeError, ResultError
from attnprobe.provenance import Provenance
from attnprobe.storage import as_path, check_writable, library_versions, write_atomically
from attnprobe.validation import instance


@dataclass(frozen=True)
class PlacedTrial:
    """Where something was tried.

    Attributes:
        example: the number of the example in the batch.
        digest: of the example's tokens; it tells one text from another in a file of trials.
        kind: whether the position's FAI is among the highest or the lowest, or the position was drawn.
        position: the column in the batch; None in trials of older files, which did not store it.
        response_position: how many tokens of the response come before it.
        length: of the response, in tokens.
        fai: at the position.
    """

    example: int
    digest: str
    kind: Kind
    position: int | None
    response_position: int
    length: int
    fai: float

    @property
    def key(self) -> tuple[Hashable, ...]:
        """What tells the trials of a file apart: the text, the kind, and the place in the response."""
        return self.digest, self.kind, self.response_position


TrialsT = TypeVar("TrialsT", bound="Trials")


@dataclass(frozen=True, eq=False, repr=False)
class Trials(Summary):
    """The trials of a batch, and what they were made with.

    Attributes:
        trials: in the order of the examples.
        parameters: what the function that made them was called with, and the model.
        provenance: what the scores that chose the positions were computed from.
        is_complete: False for what an interrupted run left in its file, and for files of older versions,
            which do not say.

    Raises:
        ResultError: anything else in place of a trial.
    """

    _TRIAL: ClassVar[type[PlacedTrial]] = PlacedTrial

    trials: tuple[Any, ...]
    parameters: dict[str, Any]
    provenance: Provenance = Provenance()  # noqa: RUF009 (frozen)
    is_complete: bool = True

    def _check(self, error: type[AttnprobeError] = ResultError) -> None:
        instance(self.trials, tuple, "trials", error=error)
        instance(self.parameters, dict, "parameters", error=error)
        for trial in self.trials:
            instance(trial, self._TRIAL, "each of the trials", error=error)

    def _headline(self) -> str:
        told = [f"{len(self.trials)} trials of {len({trial.example for trial in self.trials})} responses"]
        told += [f"{name}={value}" for name, value in self.parameters.items()]
        told += [] if self.is_complete else ["not complete"]
        return ", ".join(told)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save as JSON lines, the form in which unfinished work is stored; return the path.

        Raises:
            ResultError: a path that cannot be written.
        """
        header = {
            "kind": type(self).__name__,
            "versions": library_versions(),
            "parameters": self.parameters,
            "provenance": asdict(self.provenance),
            # None while more may come.
            "trials": len(self.trials) if self.is_complete else None,
        }
        lines = [f"{json.dumps(header)}\n", *map(_line, self.trials)]
        return write_atomically(path, "".join(lines).encode())

    @classmethod
    def load(cls: type[TrialsT], path: str | os.PathLike[str]) -> TrialsT:
        """Load what `save` wrote, or what an interrupted run left.

        Raises:
            ResultError: a file that is missing or damaged, or that holds something else.
        """
        path = as_path(path)
        if not path.is_file():
            raise ResultError(f"there is no result at {path}")
        try:
            return cls._read(path)
        except (ValueError, KeyError, TypeError, AttributeError, OSError, msgspec.MsgspecError) as error:
            if isinstance(error, AttnprobeError):
                raise
            raise ResultError(f"the trials in {path} cannot be read: {error}") from error

    @classmethod
    def _read(cls: type[TrialsT], path: Path) -> TrialsT:
        """Return what a file holds, leaving out a last line that was interrupted."""
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        if not lines:
            raise ValueError("it has no header")
        header = json.loads(lines[0])
        if header.get("kind") != cls.__name__:
            raise ResultError(f"{path} holds {header.get('kind', 'something else')}, not {cls.__name__}")
        trials = tuple(msgspec.convert(cls._renamed(json.loads(line)), cls._TRIAL) for line in lines[1:])
        count = header.get("trials")
        if count is not None and count != len(trials):
            raise ValueError(f"it was written with {count} trials and has {len(trials)}")
        provenance = msgspec.convert(header.get("provenance", {}), Provenance)
        return cls(trials, _portable(header["parameters"]), provenance, count is not None)

    @classmethod
    def _renamed(cls, record: dict[str, Any]) -> dict[str, Any]:
        """Return a stored trial under today's names."""
        return record

    @classmethod
    def _continues(cls, found: dict[str, Any], parameters: dict[str, Any]) -> bool:
        """Whether trials made with `found` are part of those of `parameters`: equal, and no fewer drawn."""
        # Older files have no drawn positions, and do not say so.
        before = {"drawn": 0, "seed": 0, **found}
        if before["drawn"] == 0:
            before["seed"] = parameters["seed"]
        return {**before, "drawn": parameters["drawn"]} == parameters and before["drawn"] <= parameters[
            "drawn"
        ]


@dataclass
class TrialFile:
    """A file of trials that grows during a run; without a path, trials are kept in memory only.

    Attributes:
        kind: the result that the file holds.
        path: of the file, or None.
        parameters: what the trials are made with, as JSON stores it.
        provenance: of the scores that choose the positions.
        done: the trials that it holds, by their keys.
    """

    kind: type[Trials]
    path: Path | None
    parameters: dict[str, Any]
    provenance: Provenance
    done: dict[tuple[Hashable, ...], Any] = field(default_factory=dict)

    @staticmethod
    def open(
        kind: type[Trials],
        path: str | os.PathLike[str] | None,
        parameters: dict[str, Any],
        provenance: Provenance,
    ) -> TrialFile:
        """Return the file with the trials that it already holds, ready for more.

        Raises:
            ResultError: a file of anything else or of trials made with other parameters, or one that cannot
                be written.
        """
        if path is None:
            return TrialFile(kind, None, parameters, provenance)
        path = as_path(path)
        check_writable(path)
        file = TrialFile(kind, path, parameters, provenance)
        if path.exists():
            found = kind.load(path)
            if not kind._continues(found.parameters, parameters):
                raise ResultError(
                    f"{path} holds trials made with {found.parameters}, not with {parameters}: choose "
                    "another path, or remove it"
                )
            file.done = {trial.key: trial for trial in found.trials}
        # Also if the file exists: this drops an interrupted line, and the number of trials in the header.
        file._write(is_complete=False)
        return file

    def add(self, trial: PlacedTrial) -> None:
        """Add a trial: it is written immediately, unless the file already has it."""
        is_new = trial.key not in self.done
        self.done[trial.key] = trial
        if self.path is not None and is_new:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(_line(trial))

    def finish(self) -> None:
        """Record in the file how many trials it holds, so that a later loss is noticed."""
        if self.path is not None:
            self._write(is_complete=True)

    def _write(self, *, is_complete: bool) -> None:
        assert self.path is not None
        self.kind(tuple(self.done.values()), self.parameters, self.provenance, is_complete).save(self.path)


def _line(trial: PlacedTrial) -> str:
    return f"{json.dumps(asdict(trial))}\n"


def _portable(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return parameters with the model's name as it is stored today: older files had its folder's path."""
    name = parameters.get("model")
    if isinstance(name, str) and Path(name).is_absolute():
        return {**parameters, "model": Path(name).name}
    return parameters

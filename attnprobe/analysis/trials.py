"""Trials: the continuations after tokens of a response were replaced, and the file that stores them.

`perturb` makes trials and returns them as `Perturbations`, which users summarise, tabulate, save and load.
The file holds one JSON object per line, after a header, and grows with each trial, so that an interrupted run
continues where it stopped; `TrialFile` is that file during a run. What is left to others: which tokens are
replaced, and running a model (perturbation).
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from attnprobe.analysis.bootstrap import Estimate, check_resampling
from attnprobe.analysis.chosen_positions import Kind
from attnprobe.analysis.paired import UNDEFINED, by_response, compare_kinds
from attnprobe.analysis.summary import Summary
from attnprobe.errors import AttnprobeError, ParameterError, ResultError
from attnprobe.provenance import Provenance
from attnprobe.storage import as_path, check_writable, library_versions, write_atomically
from attnprobe.validation import ArrayLike, FloatLike, IntLike, choice, instance

Reference = Literal["greedy", "response"]

_OTHERS: tuple[Kind, Kind] = ("lowest", "drawn")


@dataclass(frozen=True)
class Continuation:
    """What the model wrote after a forced token.

    Attributes:
        token: the forced token's id.
        probability: the model's probability of it there, at temperature 1.
        text: the greedy continuation, without the forced token.
        overlap: of its content words with those of the response's own text, in `[0, 1]` (v1 of the paper).
        greedy_overlap: with those of the greedy continuation of the response's own token (v2).
    """

    token: int
    probability: float
    text: str
    overlap: float
    greedy_overlap: float


@dataclass(frozen=True)
class Trial:
    """One position of one response, with the tokens that were forced there.

    Attributes:
        example: the number of the example in the batch.
        digest: of the example's tokens; it tells one text from another in a file of trials.
        kind: whether the position's FAI is among the highest or the lowest, or the position was drawn.
        position: the column in the batch; None in trials of older files, which did not store it.
        response_position: how many tokens of the response come before it.
        length: of the response, in tokens.
        fai: at the position.
        token: the id of the response's own token there.
        own: the continuation of that token; its overlap says how far greedy and sampled text differ.
        others: the continuations of the other candidates, the likeliest first.
    """

    example: int
    digest: str
    kind: Kind
    position: int | None
    response_position: int
    length: int
    fai: float
    token: int
    own: Continuation
    others: tuple[Continuation, ...]

    def overlap(self, reference: Reference = "greedy") -> float:
        """Return the mean overlap over the continuations of the other candidates."""
        choice(reference, "reference", get_args(Reference))
        name = "overlap" if reference == "response" else "greedy_overlap"
        found = [getattr(continuation, name) for continuation in self.others]
        return sum(found) / len(found) if found else float("nan")


@dataclass(frozen=True, eq=False, repr=False)
class PerturbationSummary(Summary):
    """Table 1 of arXiv 2510.13554v2: overlaps, with bootstrap intervals over responses.

    Each response counts once: its positions of one kind are averaged first.

    Attributes:
        highest, lowest: the mean overlap after a token of highest or of lowest FAI was replaced.
        difference: highest minus lowest; below 0 if anchors matter more.
        lower_share: the share of responses whose overlap is lower at the highest FAI; ties count half.
        highest_median, lowest_median, difference_median: the medians over the same responses; the last is
            the median of the differences, not the difference of the medians.
        responses: how many have positions of highest and of lowest FAI.
        drawn, drawn_difference, drawn_lower_share, drawn_median, drawn_difference_median: the same with drawn
            positions in place of those of lowest FAI; NaN if none were drawn.
        drawn_responses: how many have positions of highest FAI and drawn ones.
    """

    highest: Estimate
    lowest: Estimate
    difference: Estimate
    lower_share: Estimate
    responses: int
    # Defaults, since summaries of older versions did not store them.
    highest_median: Estimate = UNDEFINED
    lowest_median: Estimate = UNDEFINED
    difference_median: Estimate = UNDEFINED
    drawn: Estimate = UNDEFINED
    drawn_difference: Estimate = UNDEFINED
    drawn_lower_share: Estimate = UNDEFINED
    drawn_median: Estimate = UNDEFINED
    drawn_difference_median: Estimate = UNDEFINED
    drawn_responses: int = 0

    def _headline(self) -> str:
        told = [f"responses={self.responses}"]
        return ", ".join([*told, f"drawn_responses={self.drawn_responses}"] if self.drawn_responses else told)

    def _table(self) -> dict[str, Any]:
        """Return a line for each quantity: value, low and high."""
        names = [
            "highest",
            "lowest",
            "difference",
            "lower_share",
            "highest_median",
            "lowest_median",
            "difference_median",
        ]
        if self.drawn_responses:
            names += [
                "drawn",
                "drawn_difference",
                "drawn_lower_share",
                "drawn_median",
                "drawn_difference_median",
            ]
        estimates = [getattr(self, name) for name in names]
        columns = {part: [getattr(each, part) for each in estimates] for part in Estimate._fields}
        return {"quantity": names, **columns}


@dataclass(frozen=True, eq=False, repr=False)
class Perturbations(Summary):
    """The trials of a batch, and what they were made with.

    Attributes:
        trials: in the order of the examples.
        parameters: what `perturb` was called with, and the model.
        provenance: what the scores that chose the positions were computed from.
        is_complete: False for what an interrupted run left in its file, and for files of older versions,
            which do not say.

    Raises:
        ResultError: anything else in place of a trial.
    """

    trials: tuple[Trial, ...]
    parameters: dict[str, Any]
    provenance: Provenance = Provenance()  # noqa: RUF009 (frozen)
    is_complete: bool = True

    def _check(self, error: type[AttnprobeError] = ResultError) -> None:
        instance(self.trials, tuple, "trials", error=error)
        instance(self.parameters, dict, "parameters", error=error)
        for trial in self.trials:
            instance(trial, Trial, "each of the trials", error=error)

    def summary(
        self,
        reference: Reference = "greedy",
        *,
        clusters: ArrayLike | None = None,
        resamples: IntLike = 2000,
        confidence: FloatLike = 0.95,
        seed: IntLike = 0,
    ) -> PerturbationSummary:
        """Compare the positions of highest FAI with those of lowest FAI and the drawn ones, within responses.

        Args:
            reference: what continuations are compared with: "greedy", the greedy continuation of the
                response's own token, as in v2 of the paper; or "response", the response's own text, as in v1,
                where the difference between greedy and sampled text counts too.
            clusters: a label for each example of the batch, such as its problem; resamples then draw whole
                clusters. Answers to one problem are not independent: without it, intervals are too narrow.
            resamples, confidence, seed: of the bootstrap over responses.

        Raises:
            ParameterError: an unknown reference, no response with positions of highest and of lowest FAI, or
                clusters that are not one label for each example.
        """
        choice(reference, "reference", get_args(Reference))
        options = (clusters, *check_resampling(resamples, confidence, seed))
        found = by_response(self.trials, lambda trial: trial.overlap(reference))
        lowest, drawn = (compare_kinds(found, "highest", other, *options) for other in _OTHERS)
        if not lowest.responses:
            raise ParameterError("no response has trials at both its highest and its lowest FAI")
        return PerturbationSummary(
            highest=lowest.first,
            lowest=lowest.second,
            difference=lowest.difference,
            lower_share=lowest.lower_share,
            responses=lowest.responses,
            highest_median=lowest.first_median,
            lowest_median=lowest.second_median,
            difference_median=lowest.difference_median,
            drawn=drawn.second,
            drawn_difference=drawn.difference,
            drawn_lower_share=drawn.lower_share,
            drawn_median=drawn.second_median,
            drawn_difference_median=drawn.difference_median,
            drawn_responses=drawn.responses,
        )

    def _headline(self) -> str:
        told = [f"{len(self.trials)} trials of {len({trial.example for trial in self.trials})} responses"]
        told += [f"{name}={value}" for name, value in self.parameters.items()]
        told += [] if self.is_complete else ["not complete"]
        return ", ".join(told)

    def _shown(self) -> dict[str, Any]:
        columns: dict[str, Any] = {"FAI": [], "trials": [], "mean overlap": []}
        for kind in get_args(Kind):
            overlaps = [trial.overlap() for trial in self.trials if trial.kind == kind]
            columns["FAI"].append(kind)
            columns["trials"].append(len(overlaps))
            columns["mean overlap"].append(sum(overlaps) / len(overlaps) if overlaps else float("nan"))
        return columns

    def _table(self) -> dict[str, Any]:
        """Return a line for each continuation; that of the response's own token has rank 0."""
        place = ("example", "kind", "position", "response_position", "length", "fai")
        columns: dict[str, list[Any]] = {name: [] for name in (*place, "rank", *_CONTINUATION_COLUMNS)}
        for trial in self.trials:
            for rank, continuation in enumerate((trial.own, *trial.others)):
                for name in place:
                    columns[name].append(getattr(trial, name))
                columns["rank"].append(rank)
                for name, attribute in _CONTINUATION_COLUMNS.items():
                    columns[name].append(getattr(continuation, attribute))
        return columns

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save as JSON lines, the form in which `perturb` stores unfinished work; return the path.

        Raises:
            ResultError: a path that cannot be written.
        """
        count = len(self.trials) if self.is_complete else None
        lines = [_header(self.parameters, self.provenance, count), *map(_line, self.trials)]
        return write_atomically(path, "".join(lines).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Perturbations:
        """Load what `save` wrote, or what an interrupted `perturb` left.

        Raises:
            ResultError: a file that is missing or damaged, or that holds something else.
        """
        path = as_path(path)
        if not path.is_file():
            raise ResultError(f"there is no result at {path}")
        try:
            return _read(path)
        except (ValueError, KeyError, TypeError, AttributeError, OSError, msgspec.MsgspecError) as error:
            if isinstance(error, AttnprobeError):
                raise
            raise ResultError(f"the trials in {path} cannot be read: {error}") from error


_CONTINUATION_COLUMNS = {
    # Not "text", which in other tables is the text of a token.
    "token_id": "token",
    "probability": "probability",
    "continuation": "text",
    "overlap": "overlap",
    "greedy_overlap": "greedy_overlap",
}


# ---- the file ---------------------------------------------------------------------------------------

_KIND = "Perturbations"


@dataclass
class TrialFile:
    """A file of trials that grows during a run; without a path, trials are kept in memory only.

    Attributes:
        path: of the file, or None.
        parameters: what the trials are made with.
        provenance: of the scores that choose the positions.
        done: the trials that it holds, by text, kind and place in the response.
    """

    path: Path | None
    parameters: dict[str, Any]
    provenance: Provenance
    done: dict[tuple[str, Kind, int], Trial] = field(default_factory=dict)

    @staticmethod
    def open(
        path: str | os.PathLike[str] | None, parameters: dict[str, Any], provenance: Provenance
    ) -> TrialFile:
        """Return the file with the trials that it already holds, ready for more.

        Raises:
            ResultError: a file of anything else or of trials made with other parameters, or one that cannot
                be written.
        """
        if path is None:
            return TrialFile(None, parameters, provenance)
        path = as_path(path)
        check_writable(path)
        file = TrialFile(path, parameters, provenance)
        if path.exists():
            found = Perturbations.load(path)
            if not _continues(found.parameters, parameters):
                raise ResultError(
                    f"{path} holds trials made with {found.parameters}, not with {parameters}: choose "
                    "another path, or remove it"
                )
            file.done = {_key(trial): trial for trial in found.trials}
        # Also if the file exists: this drops an interrupted line, and the number of trials in the header.
        file._write(is_complete=False)
        return file

    def add(self, trial: Trial) -> None:
        """Add a trial: it is written immediately, unless the file already has it."""
        is_new = _key(trial) not in self.done
        self.done[_key(trial)] = trial
        if self.path is not None and is_new:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(_line(trial))

    def finish(self) -> None:
        """Record in the file how many trials it holds, so that a later loss is noticed."""
        if self.path is not None:
            self._write(is_complete=True)

    def _write(self, *, is_complete: bool) -> None:
        assert self.path is not None
        trials = tuple(self.done.values())
        Perturbations(trials, self.parameters, self.provenance, is_complete).save(self.path)


def _continues(found: dict[str, Any], parameters: dict[str, Any]) -> bool:
    """Whether trials of earlier parameters are also trials of these: all equal, and no fewer drawn."""
    # Older files hold none, and do not say so.
    before = {"drawn": 0, "seed": 0, **found}
    if before["drawn"] == 0:
        before["seed"] = parameters.get("seed", 0)
    grown = {**before, "drawn": parameters.get("drawn", 0)}
    return grown == parameters and before["drawn"] <= grown["drawn"]


def _key(trial: Trial) -> tuple[str, Kind, int]:
    return trial.digest, trial.kind, trial.response_position


def _header(parameters: dict[str, Any], provenance: Provenance, count: int | None) -> str:
    header = {
        "kind": _KIND,
        "versions": library_versions(),
        "parameters": parameters,
        "provenance": asdict(provenance),
        # None while more may come.
        "trials": count,
    }
    return f"{json.dumps(header)}\n"


def _line(trial: Trial) -> str:
    return f"{json.dumps(asdict(trial))}\n"


def _read(path: Path) -> Perturbations:
    """Return what a file holds, leaving out a last line that was interrupted."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    if not lines:
        raise ValueError("it has no header")
    header = json.loads(lines[0])
    if header.get("kind") != _KIND:
        raise ResultError(f"{path} holds {header.get('kind', 'something else')}, not {_KIND}")
    trials = tuple(msgspec.convert(_renamed(json.loads(line)), Trial) for line in lines[1:])
    count = header.get("trials")
    if count is not None and count != len(trials):
        raise ValueError(f"it was written with {count} trials and has {len(trials)}")
    provenance = msgspec.convert(header.get("provenance", {}), Provenance)
    return Perturbations(trials, _portable(header["parameters"]), provenance, count is not None)


def _renamed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a trial under today's names: older files called continuations rollouts."""
    if "rollouts" in record:
        record["others"] = record.pop("rollouts")
        # They counted positions from the start of the response, and did not store the column.
        record["response_position"], record["position"] = record["position"], None
    return record


def _portable(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return parameters with the model's name as it is stored today: older files had its folder's path."""
    name = parameters.get("model")
    if isinstance(name, str) and Path(name).is_absolute():
        return {**parameters, "model": Path(name).name}
    return parameters

"""Perturbation trials: the continuations after tokens of a response were replaced.

`perturb` makes trials and returns them as `Perturbations`, which users summarise, tabulate, save and load.
What is left to others: which tokens are replaced, and running a model (perturbation), the file (trial_file),
and comparing kinds of positions (paired).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from attnprobe.analysis.bootstrap import Estimate, check_resampling
from attnprobe.analysis.chosen_positions import Kind
from attnprobe.analysis.paired import UNDEFINED, by_response, compare_kinds
from attnprobe.analysis.summary import Summary
from attnprobe.analysis.trial_file import PlacedTrial, Trials
from attnprobe.errors import ParameterError
from attnprobe.validation import ArrayLike, FloatLike, IntLike, choice

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
class Trial(PlacedTrial):
    """One position of one response, with the tokens that were forced there.

    Attributes:
        token: the id of the response's own token there.
        own: the continuation of that token; its overlap says how far greedy and sampled text differ.
        others: the continuations of the other candidates, the likeliest first.
    """

    token: int
    own: Continuation
    others: tuple[Continuation, ...]

    def overlap(self, reference: Reference = "greedy") -> float:
        """Return the mean overlap over the continuations of the other candidates."""
        choice(reference, "reference", get_args(Reference))
        name = "overlap" if reference == "response" else "greedy_overlap"
        found = [getattr(continuation, name) for continuation in self.others]
        return sum(found) / len(found) if found else float("nan")


_ADDED_ESTIMATES = (
    *("highest_median", "lowest_median", "difference_median", "drawn", "drawn_difference"),
    *("drawn_lower_share", "drawn_median", "drawn_difference_median"),
)


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
    highest_median: Estimate = UNDEFINED
    lowest_median: Estimate = UNDEFINED
    difference_median: Estimate = UNDEFINED
    drawn: Estimate = UNDEFINED
    drawn_difference: Estimate = UNDEFINED
    drawn_lower_share: Estimate = UNDEFINED
    drawn_median: Estimate = UNDEFINED
    drawn_difference_median: Estimate = UNDEFINED
    drawn_responses: int = 0

    _ADDED_LATER: ClassVar[dict[str, Any]] = {
        "drawn_responses": 0,
        # As JSON stores an estimate.
        **{name: list(UNDEFINED) for name in _ADDED_ESTIMATES},
    }

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
class Perturbations(Trials):
    """What the model wrote after each replacement; `Trials` says what it holds."""

    _TRIAL: ClassVar[type[PlacedTrial]] = Trial

    trials: tuple[Trial, ...]

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

    @classmethod
    def _renamed(cls, record: dict[str, Any]) -> dict[str, Any]:
        """Return a trial under today's names: older files called continuations rollouts."""
        if "rollouts" in record:
            record["others"] = record.pop("rollouts")
            # They counted positions from the start of the response, and did not store the column.
            record["response_position"], record["position"] = record["position"], None
        return record


_CONTINUATION_COLUMNS = {
    # Not "text", which in other tables is the text of a token.
    "token_id": "token",
    "probability": "probability",
    "continuation": "text",
    "overlap": "overlap",
    "greedy_overlap": "greedy_overlap",
}

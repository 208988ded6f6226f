"""Couplings: do WAAD peaks, FAI peaks and entropy belong together more than chance would have it?

The three measurements of Table 2 of arXiv 2510.13554, each against its own shuffled baseline: the peaks
of a response are put elsewhere in the same response, many times, from a seed. All three are one question:
what is the mean, over some peaks, of a value that every token has? What is left to others: scores
(scores), peaks (rhythm), and intervals (bootstrap).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.analysis.bootstrap import (
    Estimate,
    bootstrap_weights,
    divide,
    percentile_estimate,
    ratio_estimate,
)
from attnprobe.errors import ParameterError, ResultError
from attnprobe.results import Result
from attnprobe.rhythm import find_peaks, top_quantile
from attnprobe.scores import TokenScores
from attnprobe.storage import import_pandas, load_result, save_result

if TYPE_CHECKING:
    import pandas

Alignment = Literal["token", "prediction"]
PeakDefinition = Literal["maxima", "top"]
Baseline = Literal["shuffle", "rotate"]

NAMES = ("entropy_at_preplans", "receiver_at_global", "anchor_after_preplan")
"""The couplings, in the order of Table 2."""


@dataclass(frozen=True, eq=False, repr=False)
class Coupling(Result):
    """One coupling: the mean of a value over some peaks, beside its mean over shuffled peaks.

    Attributes:
        observed: the mean over the peaks of all problems, with its interval.
        random: the mean over shuffled peaks.
        lift: `(observed - random) / random`, with its interval.
        p_value: the share of permutations whose mean is at least the observed one, in (0, 1].
        observed_sum, random_sum, peaks: of each problem: the sum of the value over its peaks, the same
            for shuffled peaks (mean over permutations), and the number of peaks.
    """

    observed: Estimate
    random: float
    lift: Estimate
    p_value: float
    observed_sum: Float[Tensor, " problem"]
    random_sum: Float[Tensor, " problem"]
    peaks: Float[Tensor, " problem"]


@dataclass(frozen=True)
class Couplings:
    """The three couplings of Table 2 of arXiv 2510.13554; None where a score was not measured.

    Attributes:
        entropy_at_preplans: mean entropy, in nats, at WAAD peaks.
        receiver_at_global: share of the receiver heads' FAI peaks that are the global heads' too.
        anchor_after_preplan: share of FAI peaks that coincide with, or follow within `lookback` tokens,
            a WAAD peak.
        parameters: what `couplings` was called with.
    """

    entropy_at_preplans: Coupling | None
    receiver_at_global: Coupling | None
    anchor_after_preplan: Coupling
    parameters: dict[str, float | int | str]

    def to_pandas(self) -> pandas.DataFrame:
        """Return a table with a row for each coupling.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        frame = import_pandas()
        rows = []
        for name in NAMES:
            coupling: Coupling | None = getattr(self, name)
            if coupling is None:
                continue
            row: dict[str, object] = {"coupling": name, "random": coupling.random}
            for quantity in ("observed", "lift"):
                value, low, high = getattr(coupling, quantity)
                row |= {quantity: value, f"{quantity}_low": low, f"{quantity}_high": high}
            row["p_value"] = coupling.p_value
            row["peaks"] = int(coupling.peaks.sum())
            row["problems"] = int((coupling.peaks > 0).sum())
            rows.append(row)
        table: pandas.DataFrame = frame.DataFrame(rows)
        return table

    def save(self, path: str | Path) -> Path:
        """Save as one safetensors file with JSON metadata, and return its path.

        Raises:
            ResultError: a place that cannot be written.
        """
        tensors: dict[str, Tensor | None] = {}
        numbers = {}
        for name in NAMES:
            coupling: Coupling | None = getattr(self, name)
            if coupling is None:
                continue
            tensors |= {f"{name}.{field}": getattr(coupling, field) for field in _TENSORS}
            numbers[name] = {field: getattr(coupling, field) for field in _Numbers.__annotations__}
        metadata = {"parameters": self.parameters, "couplings": numbers}
        return save_result(path, "Couplings", tensors, metadata)

    @staticmethod
    def load(path: str | Path) -> Couplings:
        """Load what `save` wrote.

        Raises:
            ResultError: a file that is missing, damaged, or holds something else.
        """
        types = {"parameters": dict[str, float | int | str], "couplings": dict[_Name, _Numbers]}
        tensors, settings = load_result(path, "Couplings", (), types)
        loaded: dict[str, Coupling | None] = dict.fromkeys(NAMES)
        for name, numbers in settings["couplings"].items():
            missing = [field for field in _TENSORS if f"{name}.{field}" not in tensors]
            if missing:
                raise ResultError(f"{path} is damaged: {name} lacks {', '.join(missing)}")
            sums = {field: tensors[f"{name}.{field}"] for field in _TENSORS}
            loaded[name] = Coupling(**{**numbers, **sums})
        if loaded["anchor_after_preplan"] is None:
            raise ResultError(f"{path} is damaged: it lacks anchor_after_preplan")
        return Couplings(**loaded, parameters=settings["parameters"])  # type: ignore[arg-type]


class _Numbers(TypedDict):
    observed: Estimate
    random: float
    lift: Estimate
    p_value: float


_Name = Literal["entropy_at_preplans", "receiver_at_global", "anchor_after_preplan"]
_TENSORS = ("observed_sum", "random_sum", "peaks")


def couplings(
    scores: TokenScores | Iterable[TokenScores],
    *,
    align: Alignment = "token",
    quantile: float = 0.4,
    lookback: int = 3,
    peaks: PeakDefinition = "maxima",
    baseline: Baseline = "shuffle",
    permutations: int = 1000,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Couplings:
    """Measure the three couplings of Table 2 of arXiv 2510.13554 over the problems of a data set.

    Args:
        scores: of one batch, or of several batches one after the other; each row is a problem. Horizon
            and layers are those that they were measured with.
        align: which token a row of attention describes. "token": row t describes token t, as in the
            paper. "prediction": row t describes token t + 1, which it produced; WAAD moves by one, while
            FAI, which is read from columns, stays.
        quantile: the share of a response's tokens that peaks must be among.
        lookback: within how many tokens an anchor "immediately follows" a preplan (the paper's k).
        peaks: "maxima" are local maxima within the quantile; "top" is all of the quantile.
        baseline: how chance is made. "shuffle" puts a response's peaks at any of its tokens; "rotate"
            shifts them all by one random number of tokens, so that their distances stay.
        permutations: how many times peaks are put elsewhere.
        resamples, confidence: of the bootstrap over problems.
        seed: of permutations and bootstrap.

    Sums over problems are pooled: each peak counts the same, whichever problem it is in.

    Raises:
        ParameterError: an unknown alignment, definition or baseline, a quantile outside (0, 1], a
            lookback or number of permutations below 1, packed rows, or no problem.
    """
    _check(align, peaks, baseline, lookback, permutations)
    # A generator for each coupling: what is drawn for a problem does not depend on batches.
    permuting = {
        name: _Permuting(baseline, permutations, torch.Generator().manual_seed(seed)) for name in NAMES
    }
    found: dict[str, list[_Problem]] = {name: [] for name in NAMES}
    problems = 0
    for part in [scores] if isinstance(scores, TokenScores) else scores:
        problems += part.waad.shape[0]
        for name, (values, at, eligible) in _questions(part, align, quantile, lookback, peaks).items():
            found[name] += [
                permuting[name].ask(values[row], at[row], eligible[row]) for row in range(len(values))
            ]
    if problems == 0:
        raise ParameterError("there are no problems to measure couplings over")
    summary = {
        name: _summarise(asked, resamples, confidence, seed) if len(asked) == problems else None
        for name, asked in found.items()
    }
    anchors = summary.pop("anchor_after_preplan")
    assert anchors is not None
    parameters: dict[str, float | int | str] = {
        "align": align,
        "quantile": quantile,
        "lookback": lookback,
        "peaks": peaks,
        "baseline": baseline,
        "permutations": permutations,
        "resamples": resamples,
        "confidence": confidence,
        "seed": seed,
    }
    return Couplings(**summary, anchor_after_preplan=anchors, parameters=parameters)


def _check(align: str, peaks: str, baseline: str, lookback: int, permutations: int) -> None:
    choices = {
        "align": (align, ("token", "prediction")),
        "peaks": (peaks, ("maxima", "top")),
        "baseline": (baseline, ("shuffle", "rotate")),
    }
    for name, (given, known) in choices.items():
        if given not in known:
            raise ParameterError(f'{name} is "{known[0]}" or "{known[1]}", got {given!r}')
    if isinstance(lookback, bool) or not isinstance(lookback, int) or lookback < 0:
        raise ParameterError(f"lookback is a whole number of tokens, at least 0; got {lookback!r}")
    if permutations < 1:
        raise ParameterError(f"permutations must be at least 1, got {permutations}")


Question = tuple[Float[Tensor, "batch token"], Bool[Tensor, "batch token"], Bool[Tensor, "batch token"]]


def _questions(
    scores: TokenScores, align: str, quantile: float, lookback: int, definition: str
) -> dict[str, Question]:
    """Return for each coupling: the value of each token, the peaks, and where peaks could be."""
    if scores.segment_ids is not None:
        raise ParameterError(
            "these scores are of packed rows, where peaks would be ranked and shuffled among those of "
            "another response: measure rows of one sequence each, such as batch.unpadded_rows()[0]"
        )

    def peaks_of(values: Tensor) -> Tensor:
        if definition == "top":
            return top_quantile(values, quantile)
        return find_peaks(values, quantile=quantile)

    waad = scores.waad if align == "token" else described_by_prediction(scores.waad, scores.response_mask)
    preplan, anchor = peaks_of(waad), peaks_of(scores.fai)
    asked: dict[str, Question] = {}
    if scores.entropy is not None:
        defined = ~waad.isnan() & ~scores.entropy.isnan()
        asked["entropy_at_preplans"] = (scores.entropy, preplan & defined, defined)
    if scores.receiver_fai is not None:
        defined = ~scores.receiver_fai.isnan() & ~scores.fai.isnan()
        receiver = peaks_of(scores.receiver_fai)
        asked["receiver_at_global"] = (anchor.to(waad), receiver & defined, defined)
    near = preplan.clone()
    for distance in range(1, lookback + 1):
        near[:, distance:] |= preplan[:, : preplan.shape[1] - distance]
    asked["anchor_after_preplan"] = (near.to(waad), anchor, ~scores.fai.isnan())
    return asked


def described_by_prediction(
    values: Float[Tensor, "batch token"], response_mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token"]:
    """Return row values moved to the token that each row produced: one column to the right.

    NaN for a response's first token, whose row is of the prompt and was not measured.

    >>> described_by_prediction(torch.tensor([[1.0, 2.0]]), torch.ones(1, 2, dtype=torch.bool))
    tensor([[nan, 1.]])
    """
    moved = torch.full_like(values, torch.nan)
    moved[:, 1:] = values[:, :-1]
    return moved.masked_fill(~response_mask.to(values.device), torch.nan)


@dataclass(frozen=True)
class _Problem:
    """One problem's answer to one question."""

    observed: float
    peaks: int
    permuted: Float[Tensor, " permutation"]


@dataclass(frozen=True)
class _Permuting:
    """Puts peaks elsewhere, again and again."""

    baseline: str
    permutations: int
    generator: torch.Generator

    def ask(
        self, values: Float[Tensor, " token"], at: Bool[Tensor, " token"], eligible: Bool[Tensor, " token"]
    ) -> _Problem:
        """Return the sum of the values at the peaks, and where the peaks are put instead."""
        value, peak = values[eligible].double().cpu(), at[eligible].cpu()
        count, tokens = int(peak.sum()), len(value)
        if count == 0:
            return _Problem(0.0, 0, torch.zeros(self.permutations, dtype=torch.float64))
        if self.baseline == "rotate":
            offset = torch.randint(tokens, (self.permutations, 1), generator=self.generator)
            place = (peak.nonzero()[:, 0] + offset) % tokens
        else:
            order = torch.rand(self.permutations, tokens, generator=self.generator)
            place = order.argsort(-1)[:, :count]
        return _Problem(float(value[peak].sum()), count, value[place].sum(-1))


def _summarise(asked: list[_Problem], resamples: int, confidence: float, seed: int) -> Coupling:
    observed = torch.tensor([problem.observed for problem in asked], dtype=torch.float64)
    peaks = torch.tensor([problem.peaks for problem in asked], dtype=torch.float64)
    permuted = torch.stack([problem.permuted for problem in asked])
    random = permuted.mean(-1)
    weights = bootstrap_weights(len(asked), resamples, seed)
    lifts = divide(weights @ observed, weights @ random) - 1
    lift = float(divide(observed.sum(), random.sum()) - 1)
    # The observed order is one of the possible ones, so that a p-value is never 0. A hair is allowed
    # for rounding: equal sums in another order must count as equal.
    reached = permuted.sum(0) >= observed.sum() - 1e-9
    return Coupling(
        observed=ratio_estimate(observed, peaks, resamples=resamples, confidence=confidence, seed=seed),
        random=float(divide(random.sum(), peaks.sum())),
        lift=percentile_estimate(lift, lifts, confidence),
        p_value=(1 + int(reached.sum())) / (1 + permuted.shape[1]),
        observed_sum=observed,
        random_sum=random,
        peaks=peaks,
    )

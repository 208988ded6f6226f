"""Couplings: do WAAD peaks, FAI peaks and entropy go together more often than by chance?

`couplings`, which users call, makes the three measurements of Table 2 of arXiv 2510.13554v2. Each has its own
baseline, in which the peaks of a response are moved to other tokens of it, many times, from a seed. All three
are the same question: what is the mean, over some peaks, of a value that every token has? What is left to
others: token scores (scores), peaks (rhythm), and intervals (bootstrap).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.analysis.bootstrap import (
    Estimate,
    bootstrap_weights,
    check_resampling,
    divide,
    percentile_estimate,
    ratio_estimate,
)
from attnprobe.analysis.summary import Summary
from attnprobe.errors import AttnprobeError, ParameterError, ResultError
from attnprobe.layout import check_unpacked
from attnprobe.provenance import Align, Provenance
from attnprobe.rhythm import check_lookback, check_quantile, find_peaks, near_preplans, top_quantile
from attnprobe.scores import TokenScores, aligned_waad
from attnprobe.storage import load_result, save_result
from attnprobe.validation import FloatLike, IntLike, choice, instance, whole_number

PeakDefinition = Literal["maxima", "top"]
Baseline = Literal["shuffle", "rotate"]

NAMES = ("entropy_at_preplans", "receiver_at_global", "anchor_after_preplan")
"""The couplings, in the order of Table 2."""


@dataclass(frozen=True, eq=False, repr=False)
class Coupling(Summary):
    """One coupling: the mean of a value over some peaks, compared with its mean over moved peaks.

    Attributes:
        observed: the mean over the peaks of all problems, with its interval.
        random: the mean over moved peaks.
        lift: `(observed - random) / random`, with its interval.
        p_value: the share of permutations whose mean is at least the observed one, in (0, 1].
        observed_sum, random_sum, peaks: for each problem: the sum of the value over its peaks, the same
            for moved peaks (mean over permutations), and the number of peaks.

    Raises:
        ResultError: sums of the wrong type or size.
    """

    observed: Estimate
    random: float
    lift: Estimate
    p_value: float
    observed_sum: Float[Tensor, " problem"]
    random_sum: Float[Tensor, " problem"]
    peaks: Float[Tensor, " problem"]

    def _headline(self) -> str:
        problems = int((self.peaks > 0).sum())
        return (
            f"observed {self.observed}, random {self.random:.4g}, lift {self.lift}, p {self.p_value:.3g}, "
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
        measured = self._measured()
        return {
            "coupling": list(measured),
            "random": [coupling.random for coupling in measured.values()],
            "observed": [coupling.observed for coupling in measured.values()],
            "lift": [coupling.lift for coupling in measured.values()],
            "p": [coupling.p_value for coupling in measured.values()],
        }

    def _table(self) -> dict[str, Any]:
        """Return a line for each coupling: random, observed, lift, their limits, p-value and counts."""
        measured = self._measured()
        of = measured.values()
        columns: dict[str, Any] = {"coupling": list(measured), "random": [each.random for each in of]}
        for quantity in ("observed", "lift"):
            estimates = [getattr(each, quantity) for each in of]
            columns[quantity] = [estimate.value for estimate in estimates]
            columns[f"{quantity}_low"] = [estimate.low for estimate in estimates]
            columns[f"{quantity}_high"] = [estimate.high for estimate in estimates]
        columns["p_value"] = [each.p_value for each in of]
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
            tensors |= {f"{name}.{field}": getattr(coupling, field) for field in ("peaks", *_SUMS)}
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
                sums = {field: tensors.get(f"{name}.{field}") for field in ("peaks", *_SUMS)}
                loaded[name] = Coupling(**numbers, **sums)  # type: ignore[arg-type]
            return cls(**loaded, **settings)
        except AttnprobeError as error:
            raise ResultError(f"{path} is damaged: {error}") from error


class _Numbers(TypedDict):
    observed: Estimate
    random: float
    lift: Estimate
    p_value: float


_Name = Literal["entropy_at_preplans", "receiver_at_global", "anchor_after_preplan"]
_SUMS = ("observed_sum", "random_sum")


def couplings(
    scores: TokenScores | Iterable[TokenScores],
    *,
    align: Align = "token",
    quantile: FloatLike = 0.4,
    lookback: IntLike = 3,
    peaks: PeakDefinition = "maxima",
    baseline: Baseline = "shuffle",
    permutations: IntLike = 1000,
    resamples: IntLike = 2000,
    confidence: FloatLike = 0.95,
    seed: IntLike = 0,
) -> Couplings:
    """Measure the three couplings of Table 2 of arXiv 2510.13554v2 over the problems of a data set.

    Sums over problems are pooled, so that every peak counts equally, whichever problem it belongs to. In a
    response with gaps, no anchor follows a preplan across a gap, but a baseline moves peaks across gaps.

    Args:
        scores: of one batch, or of several batches, one after the other; each example is a problem.
        align: which token a row of the pattern describes. "token": row t describes token t, as in the
            paper. "prediction": row t describes token t + 1, which it produced; WAAD moves by one, while
            FAI, which is read from columns, does not.
        quantile: peaks must be among this share of a response's tokens, those with the largest scores.
        lookback: within how many tokens an anchor "immediately follows" a preplan (the paper's k); 0: it
            must coincide with one.
        peaks: "maxima" takes the local maxima within the quantile; "top" takes the whole quantile.
        baseline: what counts as chance. "shuffle" moves each peak of a response to any of its tokens;
            "rotate" moves all of them by the same random number of tokens, which keeps their distances.
        permutations: how many times the peaks are moved.
        resamples, confidence: of the bootstrap over problems.
        seed: of permutations and bootstrap.

    Raises:
        ParameterError: an unknown alignment, definition or baseline, a quantile outside (0, 1], a negative
            lookback, no permutations or resamples, packed examples, or no problem.
        ResultError: scores of different models, layers, windows, horizons or alignments.
    """
    choice(align, "align", get_args(Align))
    definition = choice(peaks, "peaks", get_args(PeakDefinition))
    choice(baseline, "baseline", get_args(Baseline))
    quantile, lookback = check_quantile(quantile), check_lookback(lookback, minimum=0)
    permutations = whole_number(permutations, "permutations", minimum=1)
    resamples, confidence, seed = check_resampling(resamples, confidence, seed)
    # One generator for each coupling, so that draws do not depend on how problems are batched.
    permuting = {
        name: _Permuting(baseline, permutations, torch.Generator().manual_seed(seed)) for name in NAMES
    }
    found: dict[str, list[_Problem]] = {name: [] for name in NAMES}
    problems, provenance = 0, Provenance()
    for part in _parts(scores):
        provenance = _joined(provenance, part.provenance) if problems else part.provenance
        problems += part.waad.shape[0]
        for name, question in _questions(part, align, quantile, lookback, definition).items():
            found[name] += [permuting[name].ask(*of_problem) for of_problem in zip(*question, strict=True)]
    if problems == 0:
        raise ParameterError("couplings need at least one problem; got none")
    summary: dict[str, Any] = {
        name: _summarise(asked, resamples, confidence, seed) if len(asked) == problems else None
        for name, asked in found.items()
    }
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
    return Couplings(**summary, parameters=parameters, provenance=replace(provenance, align=align))


def _parts(scores: TokenScores | Iterable[TokenScores]) -> Iterator[TokenScores]:
    """Yield scores one batch at a time, so that those of a generator are not all in memory."""
    if not isinstance(scores, Iterable):
        scores = [instance(scores, TokenScores, "scores", "score_tokens returns them")]
    for part in scores:
        yield instance(part, TokenScores, "each of the scores", "score_tokens returns them")


def _joined(first: Provenance, part: Provenance) -> Provenance:
    """Return the provenance that two batches of a data set share, or refuse to pool them.

    Heads may differ: ranking heads for each response separately is one of the choices to compare.
    """
    for name in ("model_name", "layers", "window", "horizon", "align"):
        ours, theirs = getattr(first, name), getattr(part, name)
        if ours != theirs:
            raise ResultError(f"cannot pool scores that differ in {name}: {ours!r} and {theirs!r}")
    return first if first.heads == part.heads else replace(first, heads={})


Question = tuple[Float[Tensor, "batch token"], Bool[Tensor, "batch token"], Bool[Tensor, "batch token"]]


def _questions(
    scores: TokenScores, align: Align, quantile: float, lookback: int, definition: str
) -> dict[str, Question]:
    """Return for each coupling: the value of each token, the peaks, and which tokens could be peaks."""
    check_unpacked(scores.segment_ids, "find peaks")
    scores = scores.to("cpu")
    inside = scores.response_mask

    def of_response(values: Tensor) -> Tensor:
        # Double precision: half precision would make different values equal.
        return values.double().masked_fill(~inside, torch.nan)

    def peaks_of(values: Tensor) -> Tensor:
        if definition == "top":
            return top_quantile(values, quantile)
        return find_peaks(values, quantile=quantile)

    waad, fai = of_response(aligned_waad(scores, align)), of_response(scores.fai)
    preplan, anchor = peaks_of(waad), peaks_of(fai)
    asked: dict[str, Question] = {}
    if scores.entropy is not None:
        entropy = of_response(scores.entropy)
        defined = ~waad.isnan() & ~entropy.isnan()
        asked["entropy_at_preplans"] = (entropy, preplan & defined, defined)
    if scores.receiver_fai is not None:
        receiver_fai = of_response(scores.receiver_fai)
        defined = ~receiver_fai.isnan() & ~fai.isnan()
        asked["receiver_at_global"] = (anchor.double(), peaks_of(receiver_fai) & defined, defined)
    near = near_preplans(preplan, inside, lookback)
    asked["anchor_after_preplan"] = (near.double(), anchor, ~fai.isnan())
    return asked


@dataclass(frozen=True)
class _Problem:
    """One problem's answer to one question: sums over its peaks, as observed and for each permutation."""

    observed: float
    peaks: int
    permuted: Float[Tensor, " permutation"]


@dataclass(frozen=True)
class _Permuting:
    """Moves peaks to other tokens, many times."""

    baseline: str
    permutations: int
    generator: torch.Generator

    def ask(
        self, values: Float[Tensor, " token"], at: Bool[Tensor, " token"], eligible: Bool[Tensor, " token"]
    ) -> _Problem:
        """Return the sums of the values at the peaks, and at the tokens that the peaks are moved to."""
        value, peak = values[eligible], at[eligible]
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
    # The observed order counts as one of the permutations, so that a p-value is never 0. The tolerance is
    # for rounding: equal sums, added in another order, must count as equal.
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

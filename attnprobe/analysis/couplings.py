"""Couplings: do WAAD peaks, FAI peaks and entropy go together more often than by chance?

`couplings`, which users call, makes the three measurements of Table 2 of arXiv 2510.13554v2, under a null of
the user's choice: peaks that lie elsewhere, or other heads. All three are the same question: what is the
mean, over some peaks, of a value that every token has? What is left to others: token scores (scores), peaks
(rhythm), the nulls (nulls, random_heads), intervals (bootstrap), and the results (coupling_results).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.analysis.bootstrap import (
    bootstrap_weights,
    check_clusters,
    check_resampling,
    divide,
    percentile_estimate,
    share_reached,
)
from attnprobe.analysis.coupling_results import NAMES, Coupling, Couplings
from attnprobe.analysis.nulls import MovedPeaks, Null, PeakSums, TokenClasses, strata_of
from attnprobe.analysis.random_heads import RandomHeads
from attnprobe.analysis.token_classes import token_class
from attnprobe.errors import ParameterError, ResultError
from attnprobe.head_groups import GroupsLike, head_groups
from attnprobe.head_statistics import HeadStatistics
from attnprobe.heads import classify_heads
from attnprobe.layer_selection import LayerName
from attnprobe.layout import check_unpacked
from attnprobe.provenance import Align, Provenance
from attnprobe.rhythm import check_lookback, check_quantile, find_peaks, near_preplans, top_quantile
from attnprobe.scores import TokenScores, aligned_waad, score_tokens
from attnprobe.validation import ArrayLike, FloatLike, IntLike, brief, choice, instance, whole_number

PeakDefinition = Literal["maxima", "top"]

if TYPE_CHECKING:
    Measured: TypeAlias = TokenScores | HeadStatistics
    MeasuredLike: TypeAlias = Measured | Iterable[Measured]
else:
    Measured = MeasuredLike = Any


def couplings(
    measured: MeasuredLike,
    heads: GroupsLike | None = None,
    *,
    layers: ArrayLike | IntLike | LayerName | None = None,
    align: Align = "token",
    quantile: FloatLike = 0.4,
    lookback: IntLike = 1,
    peaks: PeakDefinition = "maxima",
    null: Null = "position",
    classes: TokenClasses = token_class,
    draws: IntLike = 1000,
    clusters: ArrayLike | None = None,
    resamples: IntLike = 2000,
    confidence: FloatLike = 0.95,
    seed: IntLike = 0,
) -> Couplings:
    """Measure the three couplings of Table 2 of arXiv 2510.13554v2 over the problems of a data set.

    Sums over problems are pooled, so that every peak counts equally, whichever problem it belongs to. In a
    response with gaps, no anchor follows a preplan across a gap, but a null moves peaks across gaps. No model
    is run.

    Args:
        measured: token scores, or the statistics of every head that `measure` returns; of one batch, or of
            several batches, one after the other. Each example is a problem. Random heads need statistics.
        heads: with statistics: the head groups, as for `score_tokens`. Default: those of `classify_heads`
            over all that is given, which is then kept in memory.
        layers: with statistics: which of the measured layers, such as "top third" (Table 10); default: all.
        align: which token a row of the pattern describes. "token": row t describes token t, as in the
            paper. "prediction": row t describes token t + 1, which it produced; WAAD moves by one, while
            FAI, which is read from columns, does not.
        quantile: peaks must be among this share of a response's tokens, those with the largest scores.
        lookback: within how many tokens an anchor "immediately follows" a preplan (the paper's k); 0: it
            must coincide with one.
        peaks: "maxima" takes the local maxima within the quantile; "top" takes the whole quantile.
        null: what counts as chance.
            "position" moves each peak to any token of its response that could be a peak (the paper's).
            "rotate" moves all peaks of a response by the same number of tokens, which keeps their distances.
            "token" moves peaks among tokens of the same id in the same answer: is it more than which tokens
            these are? "bigram": of the same id and the same id before it.
            "class" moves peaks among tokens of the same class, such as line ends.
            "heads" leaves the peaks alone and puts random heads in place of the groups, in groups of the same
            sizes that overlap as much: is it these heads, or would any do?
        classes: with `null="class"`: the function that gives a token's class, from its text.
        draws: how many times peaks are moved, or heads drawn.
        clusters: a label for each problem, such as the template that it was made from: the bootstrap draws
            whole clusters, since problems of one template are not independent. Default: each problem on its
            own.
        resamples, confidence: of the bootstrap over problems; `confidence` is also that of the null's
            interval.
        seed: of draws and bootstrap.

    Raises:
        ParameterError: an unknown alignment, definition or null, a quantile outside (0, 1], a negative
            lookback, no draws or resamples, packed examples, no problem, another number of clusters than of
            problems, scores where statistics are needed, or unknown ids or texts of tokens.
        ResultError: scores of different models, layers, windows, horizons or alignments.

    >>> from attnprobe import TokenBatch, measure
    >>> from attnprobe.testing.tiny_models import tiny_model
    >>> batch = TokenBatch.from_ids(torch.arange(1, 65)[None].expand(2, -1), response_start=4)
    >>> statistics = measure(tiny_model("llama"), batch, horizon=(2, 20))
    >>> couplings(statistics, null="heads", draws=10).anchor_after_preplan.movable is None
    True
    """
    choice(align, "align", get_args(Align))
    definition = choice(peaks, "peaks", get_args(PeakDefinition))
    choice(null, "null", get_args(Null))
    if not callable(classes):
        raise ParameterError(
            f"classes must be a function from a token's text to its class; got {brief(classes)}"
        )
    if null != "class" and classes is not token_class:
        raise ParameterError(
            f'classes say which tokens exchange peaks under null="class", not under {null!r}'
        )
    quantile, lookback = check_quantile(quantile), check_lookback(lookback, minimum=0)
    draws = whole_number(draws, "draws", minimum=1)
    labels = None if clusters is None else check_clusters(clusters)
    resamples, confidence, seed = check_resampling(resamples, confidence, seed)

    def questions(scores: TokenScores) -> dict[str, _Question]:
        return _questions(scores, align, quantile, lookback, definition)

    # One generator for each coupling, so that draws do not depend on how problems are batched.
    moving = {
        name: MovedPeaks(null == "rotate", draws, torch.Generator().manual_seed(seed)) for name in NAMES
    }
    random_heads: RandomHeads | None = None
    found: dict[str, list[PeakSums]] = {name: [] for name in NAMES}
    problems, provenance = 0, Provenance()
    for scores, statistics, groups in _scored(measured, heads, layers):
        provenance = _joined(provenance, scores.provenance) if problems else scores.provenance
        examples = scores.waad.shape[0]
        problems += examples
        asked = questions(scores)
        if null == "heads":
            if statistics is None:
                raise ParameterError(
                    'null="heads" needs the statistics of every head, which measure returns, not token scores'
                )
            for example in range(examples):
                drawn: list[dict[str, _Question]] = []
                # A completion that a trainer masked has no response, and does not show which heads there are.
                if bool(statistics.response_mask[example].any()):
                    random_heads = random_heads or RandomHeads.draw(statistics, groups, draws, seed)
                    alone = _response_of(statistics, example)
                    drawn = [questions(part) for part in random_heads.scores(alone, 0)]
                for name, question in asked.items():
                    of_draws = [part[name] for part in drawn]
                    found[name].append(_with_heads(question, of_draws, example, draws))
            continue
        strata = strata_of(scores, null, classes)
        for name, question in asked.items():
            found[name] += [
                moving[name].ask(*of_problem) for of_problem in zip(*question, strata, strict=True)
            ]
    if problems == 0:
        raise ParameterError("couplings need at least one problem; got none")
    if labels is not None and len(labels) != problems:
        raise ParameterError(f"clusters must name one for each of the {problems} problems; got {len(labels)}")
    weights = bootstrap_weights(problems, resamples, seed, labels)
    summary: dict[str, Any] = {
        name: _summarise(sums, weights, confidence, by_heads=null == "heads")
        if len(sums) == problems
        else None
        for name, sums in found.items()
    }
    parameters: dict[str, float | int | str] = {
        "align": align,
        "quantile": quantile,
        "lookback": lookback,
        "peaks": peaks,
        "null": null,
        "draws": draws,
        "clusters": problems if labels is None else len(set(labels)),
        "resamples": resamples,
        "confidence": confidence,
        "seed": seed,
    }
    return Couplings(**summary, parameters=parameters, provenance=replace(provenance, align=align))


_Scored: TypeAlias = "tuple[TokenScores, HeadStatistics | None, dict[Any, Any]]"


def _scored(
    measured: MeasuredLike, heads: GroupsLike | None, layers: ArrayLike | IntLike | LayerName | None
) -> Iterator[_Scored]:
    """Yield the scores of one batch at a time, with the statistics and groups that they are computed from."""
    parts = _parts(measured)
    first = next(parts, None)
    if first is None:
        return
    parts = chain([first], parts)
    if isinstance(first, TokenScores):
        given = "heads" if heads is not None else "layers" if layers is not None else None
        if given:
            raise ParameterError(
                f"{given} choose among statistics, but these are token scores: pass what measure returns"
            )
        for part in parts:
            yield instance(part, TokenScores, "each of the scores"), None, {}
        return
    statistics = (
        part if layers is None else part.at_layers(layers)
        for part in (instance(part, HeadStatistics, "each of the statistics") for part in parts)
    )
    if heads is None:
        kept = list(statistics)
        heads, statistics = classify_heads(kept), (part for part in kept)
    # A generator gives its heads only once, but each batch needs them.
    heads = list(heads) if isinstance(heads, Iterator) else heads
    for part in statistics:
        groups = head_groups(
            heads, layers=part.layers, head_count=part.head_count, model_name=part.model_name
        )
        yield score_tokens(part, heads), part, groups


def _parts(measured: MeasuredLike) -> Iterator[Measured]:
    """Yield what was measured one batch at a time, so that those of a generator are not all in memory."""
    kinds = (TokenScores, HeadStatistics)
    expected = "TokenScores or HeadStatistics, which score_tokens and measure return"
    if isinstance(measured, kinds):
        yield measured
        return
    if not isinstance(measured, Iterable) or isinstance(measured, str | bytes | Tensor | dict):
        raise ParameterError(f"couplings are measured over {expected}; got {brief(measured)}")
    for part in measured:
        if not isinstance(part, kinds):
            raise ParameterError(f"couplings are measured over {expected}; got {brief(part)} among them")
        yield part


def _joined(first: Provenance, part: Provenance) -> Provenance:
    """Return the provenance that two batches of a data set share, or refuse to pool them.

    Heads may differ: ranking heads for each response separately is one of the choices to compare.
    """
    for name in ("model_name", "layers", "window", "horizon", "align"):
        ours, theirs = getattr(first, name), getattr(part, name)
        if ours != theirs:
            raise ResultError(f"cannot pool scores that differ in {name}: {ours!r} and {theirs!r}")
    return first if first.heads == part.heads else replace(first, heads={})


class _Question(NamedTuple):
    """The value of each token, the peaks, and the pool: which tokens could be peaks."""

    values: Float[Tensor, "batch token"]
    peak: Bool[Tensor, "batch token"]
    pool: Bool[Tensor, "batch token"]


def _questions(
    scores: TokenScores, align: Align, quantile: float, lookback: int, definition: str
) -> dict[str, _Question]:
    """Return the question that each coupling asks."""
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

    def pool_of(values: Tensor) -> Tensor:
        defined = ~values.isnan()
        if definition == "top":
            return defined
        # A token at the edge of what is defined has one neighbour, and is never a local maximum.
        wide = torch.nn.functional.pad(defined, (1, 1))
        return defined & wide[:, :-2] & wide[:, 2:]

    waad, fai = of_response(aligned_waad(scores, align)), of_response(scores.fai)
    preplan, anchor = peaks_of(waad), peaks_of(fai)
    asked: dict[str, _Question] = {}
    if scores.entropy is not None:
        entropy = of_response(scores.entropy)
        pool = pool_of(waad) & ~entropy.isnan()
        asked["entropy_at_preplans"] = _Question(entropy, preplan & pool, pool)
    if scores.receiver_fai is not None:
        receiver_fai = of_response(scores.receiver_fai)
        pool = pool_of(receiver_fai) & ~fai.isnan()
        asked["receiver_at_global"] = _Question(anchor.double(), peaks_of(receiver_fai) & pool, pool)
    near = near_preplans(preplan, inside, lookback)
    asked["anchor_after_preplan"] = _Question(near.double(), anchor, pool_of(fai))
    return asked


def _sums(question: _Question) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each example: the sum over its peaks, their number, and the sum expected anywhere."""
    values = question.values.masked_fill(~question.pool, 0.0)
    counts = question.peak.sum(-1).double()
    mean = values.sum(-1) / question.pool.sum(-1).clamp(min=1)
    return (values * question.peak).sum(-1), counts, counts * mean


def _response_of(statistics: HeadStatistics, example: int) -> HeadStatistics:
    """Return one response without its prompt and padding, whose columns would be sorted in every draw."""
    columns = statistics.response_mask[example].nonzero()[:, 0].tolist()
    return statistics.select(example).at_columns(slice(columns[0], columns[-1] + 1))


def _with_heads(question: _Question, drawn: list[_Question], example: int, draws: int) -> PeakSums:
    """Return the sums of one problem, as observed and with random heads."""
    observed, peaks, position = (float(part[example]) for part in _sums(question))
    nothing = torch.zeros(draws, dtype=torch.float64)
    sums, counts, positions = nothing, nothing, nothing
    if drawn:
        sums, counts, positions = map(torch.cat, zip(*map(_sums, drawn), strict=True))
    return PeakSums(observed, int(peaks), position, None, sums, counts, positions, 0)


def _summarise(
    found: list[PeakSums], weights: Float[Tensor, "resample problem"], confidence: float, *, by_heads: bool
) -> Coupling:
    def column(name: str) -> Tensor:
        return torch.tensor([float(getattr(each, name)) for each in found], dtype=torch.float64)

    observed, peaks, position = column("observed"), column("peaks"), column("position")
    sums, counts, positions = (
        torch.stack([getattr(each, name) for each in found]) for name in ("sums", "counts", "positions")
    )
    mean = float(divide(observed.sum(), peaks.sum()))
    drawn = divide(sums.sum(0), counts.sum(0))
    null_sum = sums.mean(-1) if by_heads else column("expected")
    if by_heads:
        # Draws differ in their number of peaks: the null is the mean over draws of their means.
        null_mean = float(drawn.nanmean())
        null_means = divide(weights @ sums, weights @ counts).nanmean(-1)
    else:
        null_mean = float(divide(null_sum.sum(), peaks.sum()))
        null_means = divide(weights @ null_sum, weights @ peaks)
    resampled = divide(weights @ observed, weights @ peaks)
    lift = mean / null_mean - 1 if null_mean else float("nan")
    position_lift = float(divide(observed.sum(), position.sum())) - 1
    drawn_lifts = divide(sums.sum(0), positions.sum(0)) - 1
    return Coupling(
        observed=percentile_estimate(mean, resampled, confidence),
        null=percentile_estimate(null_mean, drawn, confidence),
        lift=percentile_estimate(lift, divide(resampled, null_means) - 1, confidence),
        p_value=share_reached(drawn, mean),
        position_lift=percentile_estimate(
            position_lift, divide(weights @ observed, weights @ position) - 1, confidence
        ),
        null_position_lift=(
            percentile_estimate(float(drawn_lifts.nanmean()), drawn_lifts, confidence) if by_heads else None
        ),
        position_lift_p_value=share_reached(drawn_lifts, position_lift) if by_heads else None,
        movable=None if by_heads else float(divide(column("movable").sum(), peaks.sum())),
        observed_sum=observed,
        null_sum=null_sum,
        position_sum=position,
        peaks=peaks,
        null_values=drawn,
        null_position_lifts=drawn_lifts if by_heads else None,
    )

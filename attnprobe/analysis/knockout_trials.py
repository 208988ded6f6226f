"""Knock-out at chosen positions: a cheaper causal counterpart of the perturbation.

At a response's positions of highest and of lowest FAI, and at some drawn at random, `knockout`, which users
call, measures how much later predictions change when no later token reads the token there: with its attention
masked, and with its value removed. `Knockouts` are the numbers, and `KnockoutSummary` says how far the kinds
of positions differ, and whether FAI ranks ordinary tokens as the model's dependence on them does. What is
left to others: the measure (knockout), which positions are tried (chosen_positions), the file (trial_file),
and comparing kinds of positions (paired).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any, ClassVar, get_args

import torch

from attnprobe.adapters import adapter_for
from attnprobe.adapters.base import Mode
from attnprobe.analysis.bootstrap import (
    Estimate,
    bootstrap_weights,
    check_resampling,
    check_seed,
    percentile_estimate,
)
from attnprobe.analysis.chosen_positions import (
    Kind,
    check_same_model,
    check_same_responses,
    choose_in_batch,
    text_digest,
)
from attnprobe.analysis.knockout import ResponseRuns
from attnprobe.analysis.paired import UNDEFINED, by_response, cluster_labels, compare_kinds
from attnprobe.analysis.summary import Summary
from attnprobe.analysis.trial_file import PlacedTrial, TrialFile, Trials
from attnprobe.analysis.weighted import weighted_partial_correlation, weighted_rank_correlation
from attnprobe.batch import BatchLike, TokenBatch
from attnprobe.batch_run import check_fits
from attnprobe.errors import ParameterError
from attnprobe.metric_arguments import HorizonLike, check_horizon
from attnprobe.model_inputs import refuse_inputs
from attnprobe.progress import progress_bar
from attnprobe.scores import TokenScores
from attnprobe.validation import ArrayLike, FloatLike, IntLike, brief, choice, truth, whole_number

MODES: tuple[Mode, ...] = get_args(Mode)


def knockout(
    model: Any,
    batch: BatchLike,
    scores: TokenScores,
    *,
    positions: IntLike = 1,
    drawn: IntLike = 1,
    seed: IntLike = 0,
    horizon: HorizonLike = (10, None),
    modes: Sequence[Mode] = MODES,
    min_remaining: IntLike = 10,
    batch_size: IntLike | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Knockouts:
    """Suppress tokens of highest, of lowest and of drawn FAI, and measure how much predictions change.

    At each position this is `knockout_divergence`, over all layers and heads.

    Args:
        model: a model that an adapter knows.
        batch: prompts and responses, as for `measure`, but not packed.
        scores: of that batch; positions are chosen by `scores.fai`, where it is defined.
        positions: how many positions of highest and how many of lowest FAI to choose per response; of equal
            FAI, the earliest.
        drawn: how many other positions to draw at random per response; fewer if it has no more.
        seed: of the draw, which depends on nothing else but the response's own tokens.
        horizon: over which later predictions the divergence is a mean, as in FAI. The default runs to the
            end of the response, as in the paper's analysis (App. A.1 of arXiv 2510.13554v2).
        modes: how tokens are suppressed: "mask", "value" or both.
        min_remaining: positions with fewer tokens after them, up to the next gap, are not chosen.
        batch_size: how many tokens of a response to run at a time, as for `knockout_divergence`. Results do
            not depend on it.
        path: a JSON-lines file to which each trial is written when it is done. Trials that it already
            holds, of the same model, parameters, text and position, are not run again: an interrupted
            run continues, and a batch may grow, as may the number of drawn positions and the modes.
        progress: whether to show a progress bar.

    Raises:
        ParameterError: counts below 1, a negative `drawn` or seed, an invalid horizon or modes, packed
            examples, or no position to choose.
        BatchError: ids outside the vocabulary, sequences longer than the model's context, or images.
        ResultError: scores of another batch, or a path that holds something else or cannot be written.
        UnsupportedModelError: a model whose attention cannot be suppressed, or without next-token logits.
    """
    counts = {
        "positions": whole_number(positions, "positions", minimum=1),
        "drawn": whole_number(drawn, "drawn"),
        "min_remaining": whole_number(min_remaining, "min_remaining", minimum=1),
    }
    seed = check_seed(seed)
    chosen_modes = _check_modes(modes)
    low_high = check_horizon(horizon)
    batch_size = None if batch_size is None else whole_number(batch_size, "batch_size", minimum=1)
    truth(progress, "progress")
    batch = TokenBatch.of(batch)
    refuse_inputs(batch.model_inputs, "knockout")
    check_same_responses(batch, scores, "knockout")
    adapter = adapter_for(model)
    adapter.check_next_token_logits("knockout")
    check_fits(batch.sequences()[0], adapter)
    check_same_model(scores, adapter.model_name)
    # As lists, which is how JSON gives them back.
    parameters = {
        **counts,
        "seed": seed,
        "horizon": list(low_high),
        "modes": list(chosen_modes),
        "model": adapter.model_name,
    }
    chosen = choose_in_batch(
        batch, scores, counts["positions"], counts["min_remaining"], counts["drawn"], seed
    )
    file = TrialFile.open(Knockouts, path, parameters, scores.provenance)
    trials = []
    with progress_bar("suppressing", len(chosen) * len(chosen_modes), shown=progress) as advance:
        for example in dict.fromkeys(example for example, _, _ in chosen):
            of_example = [
                _place(batch, scores, example, kind, column, mode)
                for number, kind, column in chosen
                if number == example
                for mode in chosen_modes
            ]
            missing = [trial for trial in of_example if trial.key not in file.done]
            runs = ResponseRuns.prepare(adapter, batch, example) if missing else None
            for mode in chosen_modes:
                waiting = {trial.position: trial for trial in missing if trial.mode == mode}
                if runs is None or not waiting:
                    continue
                columns = [column for column in waiting if column is not None]
                for column, divergence in runs.divergences(columns, low_high, {"mode": mode}, batch_size):
                    file.add(replace(waiting[column], divergence=divergence))
            for trial in of_example:
                found = replace(trial, divergence=file.done[trial.key].divergence)
                # Where the text stands in this batch, and its FAI, may be new.
                file.add(found)
                trials.append(found)
                advance()
    file.finish()
    return Knockouts(tuple(trials), parameters, scores.provenance)


def _check_modes(modes: Any) -> tuple[Mode, ...]:
    """Return the modes in their usual order, each once."""
    given = [modes] if isinstance(modes, str) else modes
    if not isinstance(given, Sequence) or not given:
        raise ParameterError(f'modes must be "mask", "value" or both; got {brief(modes)}')
    for mode in given:
        choice(mode, "each of the modes", MODES)
    return tuple(mode for mode in MODES if mode in given)


@dataclass(frozen=True)
class Knockout(PlacedTrial):
    """One token that no later token reads.

    Attributes:
        mode: how it was suppressed: its attention masked, or its value removed.
        divergence: how much later predictions change, in nats; see `knockout_divergence`.
    """

    mode: Mode
    divergence: float

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells the trials of a file apart."""
        return (*super().key, self.mode)


def _place(
    batch: TokenBatch, scores: TokenScores, example: int, kind: Kind, column: int, mode: Mode
) -> Knockout:
    """Return a trial whose divergence is not known yet."""
    inside = batch.response_mask[example]
    return Knockout(
        example=example,
        digest=text_digest(batch, example),
        kind=kind,
        position=column,
        response_position=int(inside[:column].sum()),
        length=int(inside.sum()),
        fai=float(scores.fai[example, column]),
        mode=mode,
        divergence=float("nan"),
    )


@dataclass(frozen=True, eq=False, repr=False)
class KnockoutSummary(Summary):
    """How much predictions depend on tokens of high FAI, with bootstrap intervals over responses.

    Each response counts once: its positions of one kind are averaged first. Divergences are heavy-tailed, so
    a mean may be that of a few responses; read the medians beside it.

    Attributes:
        mode: how tokens were suppressed.
        highest, lowest, drawn: the mean divergence without a token of highest FAI, of lowest FAI, and without
            a drawn one, in nats; the last over the responses with drawn positions.
        highest_median, lowest_median, drawn_median: the medians over the same responses.
        ratio_to_lowest, ratio_to_drawn: the mean for the highest over that for the others.
        median_ratio_to_lowest, median_ratio_to_drawn: the medians of the responses' own ratios.
        above_lowest, above_drawn: the share of responses in which the highest exceeds the others; ties count
            half.
        rank_correlation: Spearman's, of FAI and divergence over drawn tokens: whether FAI says how much
            depends on an ordinary token.
        partial_correlation: the same at equal position: early tokens have both more readers and more to
            change. Both are NaN with fewer than three drawn tokens.
        responses, drawn_responses: how many have positions of highest and of lowest FAI, and of highest FAI
            and drawn ones.
        drawn_tokens: how many were drawn.
    """

    mode: Mode
    highest: Estimate
    lowest: Estimate
    drawn: Estimate
    highest_median: Estimate
    lowest_median: Estimate
    drawn_median: Estimate
    ratio_to_lowest: Estimate
    ratio_to_drawn: Estimate
    median_ratio_to_lowest: Estimate
    median_ratio_to_drawn: Estimate
    above_lowest: Estimate
    above_drawn: Estimate
    rank_correlation: Estimate
    partial_correlation: Estimate
    responses: int
    drawn_responses: int
    drawn_tokens: int

    def _headline(self) -> str:
        return f"mode={self.mode}, responses={self.responses}, drawn_tokens={self.drawn_tokens}"

    def _table(self) -> dict[str, Any]:
        """Return a line for each quantity: value, low and high."""
        found = {name: value for name, value in vars(self).items() if isinstance(value, Estimate)}
        columns = {part: [getattr(each, part) for each in found.values()] for part in Estimate._fields}
        return {"quantity": list(found), **columns}


@dataclass(frozen=True, eq=False, repr=False)
class Knockouts(Trials):
    """How much predictions change without each of some tokens; `Trials` says what it holds."""

    _TRIAL: ClassVar[type[PlacedTrial]] = Knockout

    trials: tuple[Knockout, ...]

    def summary(
        self,
        mode: Mode = "mask",
        *,
        clusters: ArrayLike | None = None,
        resamples: IntLike = 2000,
        confidence: FloatLike = 0.95,
        seed: IntLike = 0,
    ) -> KnockoutSummary:
        """Compare tokens of highest FAI with those of lowest FAI and with drawn ones, within responses.

        Args:
            mode: how tokens were suppressed: "mask" or "value".
            clusters: a label for each example of the batch, such as its problem; resamples then draw whole
                clusters. Answers to one problem are not independent: without it, intervals are too narrow.
            resamples, confidence, seed: of the bootstrap over responses.

        Raises:
            ParameterError: an unknown mode, no response with both kinds of positions in that mode, or
                clusters that are not one label for each example.
        """
        choice(mode, "mode", MODES)
        options = (clusters, *check_resampling(resamples, confidence, seed))
        trials = [trial for trial in self.trials if trial.mode == mode]
        found = by_response(trials, lambda trial: trial.divergence)
        lowest, drawn = (compare_kinds(found, "highest", other, *options) for other in ("lowest", "drawn"))
        if not lowest.responses:
            raise ParameterError(
                f'no response has divergences at both its highest and its lowest FAI with mode="{mode}"; '
                f"there are {len(trials)} trials with it"
            )
        correlations, drawn_tokens = _correlations(trials, *options)
        return KnockoutSummary(
            mode=mode,
            highest=lowest.first,
            lowest=lowest.second,
            drawn=drawn.second,
            highest_median=lowest.first_median,
            lowest_median=lowest.second_median,
            drawn_median=drawn.second_median,
            ratio_to_lowest=lowest.ratio,
            ratio_to_drawn=drawn.ratio,
            median_ratio_to_lowest=lowest.ratio_median,
            median_ratio_to_drawn=drawn.ratio_median,
            above_lowest=lowest.higher_share,
            above_drawn=drawn.higher_share,
            rank_correlation=correlations[0],
            partial_correlation=correlations[1],
            responses=lowest.responses,
            drawn_responses=drawn.responses,
            drawn_tokens=drawn_tokens,
        )

    def _shown(self) -> dict[str, Any]:
        lines = []
        for mode in MODES:
            for kind in get_args(Kind):
                found = [t.divergence for t in self.trials if (t.mode, t.kind) == (mode, kind)]
                if found:
                    lines.append((mode, kind, len(found), fmean(found), median(found)))
        names = ("mode", "FAI", "trials", "mean divergence", "median")
        return {name: [line[i] for line in lines] for i, name in enumerate(names)}

    def _table(self) -> dict[str, Any]:
        """Return a line for each trial."""
        names = ("example", "kind", "position", "response_position", "length", "fai", "mode", "divergence")
        return {name: [getattr(trial, name) for trial in self.trials] for name in names}

    @classmethod
    def _continues(cls, found: dict[str, Any], parameters: dict[str, Any]) -> bool:
        """Whether trials made with `found` are part of those of `parameters`: more modes may come too."""
        fewer = set(found["modes"]) <= set(parameters["modes"])
        return fewer and super()._continues({**found, "modes": parameters["modes"]}, parameters)


def _correlations(
    trials: Sequence[Knockout],
    clusters: ArrayLike | None,
    resamples: int,
    confidence: float,
    seed: int,
) -> tuple[tuple[Estimate, Estimate], int]:
    """Return the rank correlation of FAI and divergence over drawn tokens, that at equal position, and how
    many such tokens there are."""
    drawn = [trial for trial in trials if trial.kind == "drawn" and trial.divergence == trial.divergence]
    if len(drawn) < 3:
        return (UNDEFINED, UNDEFINED), len(drawn)
    of_token = [(trial.example, trial.digest) for trial in drawn]
    responses = list(dict.fromkeys(of_token))
    weights = bootstrap_weights(len(responses), resamples, seed, cluster_labels(responses, clusters))
    # A token is drawn as often as its response.
    number = {response: i for i, response in enumerate(responses)}
    weights = weights[:, [number[response] for response in of_token]]
    once = torch.ones_like(weights[:1])
    fai, divergence, position = torch.tensor(
        [(trial.fai, trial.divergence, trial.response_position) for trial in drawn], dtype=torch.float64
    ).unbind(-1)
    raw, partial = (
        [weighted_rank_correlation(fai, divergence, each) for each in (once, weights)],
        [weighted_partial_correlation(fai, divergence, position, each) for each in (once, weights)],
    )
    of_all, given_position = (
        percentile_estimate(float(value), resampled, confidence) for value, resampled in (raw, partial)
    )
    return (of_all, given_position), len(drawn)

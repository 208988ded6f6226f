"""Every number of the study, from its raw data: couplings under all nulls, heads, interventions.

`estimate` returns them as plain numbers, which `page` stores and writes into docs/results/rhythm.md. No model
is run. Intervals come from drawing problem templates with replacement. What is left to others: the raw data
(raw), and what is said about the numbers (page.md).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import attnprobe
from attnprobe.analysis.agreement import rank_correlation
from attnprobe.analysis.bootstrap import (
    Estimate,
    bootstrap_weights,
    holm_adjusted,
    percentile_estimate,
    share_reached,
)
from attnprobe.analysis.coupling_results import NAMES, Coupling
from attnprobe.heads import group_heads
from attnprobe.rhythm import find_peaks
from experiments.rhythm.choices import RANDOM_HEADS, TESTED, receiver_count
from experiments.rhythm.raw import DRAWS, Raw

MOVED = ("position", "rotate", "class", "token", "bigram")
"""The nulls that move peaks, from the coarsest to the finest; "heads" is the sixth."""

CONFIDENCE = 0.95


def estimate(raw: Raw, *, draws: int = DRAWS) -> dict[str, Any]:
    """Return all numbers, nested by what they are about; estimates are [value, low, high]."""
    couplings = {choice: _coupling_table(raw, choice, draws) for choice in RANDOM_HEADS}
    return _plain(
        {
            "answers": len(raw.answers),
            "tokens": int(raw.answers["tokens"].sum()),
            "templates": len(set(raw.templates)),
            "draws": draws,
            "couplings": couplings,
            "adjusted": _adjusted(couplings),
            "choices": _choices(raw),
            "lags": {group: _lags(raw, group) for group in ("fai", "receiver_fai")},
            "heads": _heads(raw),
            "perturbation": _perturbation(raw),
            "knockout": {mode: _knockout(raw, mode) for mode in ("mask", "value")},
        }
    )


# ---- couplings --------------------------------------------------------------------------------------


def _couplings(raw: Raw, scores: attnprobe.TokenScores, **options: Any) -> attnprobe.Couplings:
    return attnprobe.couplings(scores, clusters=raw.templates, confidence=CONFIDENCE, **options)


def _coupling_table(raw: Raw, choice: str, draws: int) -> dict[str, dict[str, Any]]:
    """Return the couplings under each null, `table[null][coupling]`."""
    scores = raw.scores(choice)
    table: dict[str, dict[str, Any]] = {}
    tested = choice in TESTED
    for null in MOVED if tested else ("position", "token"):
        result = _couplings(raw, scores, null=null, draws=draws if tested else max(1, draws // 4))
        table[null] = {name: _coupling_line(getattr(result, name)) for name in NAMES}
    drawn = raw.random_heads[raw.random_heads["choice"] == choice]
    table["heads"] = {}
    for name in NAMES:
        lines = drawn[drawn["coupling"] == name]
        observed = table["position"][name]
        values = torch.tensor(lines["value"].to_numpy()).double()
        lifts = torch.tensor(lines["position_lift"].to_numpy()).double()
        table["heads"][name] = {
            "observed": observed["observed"],
            "null": percentile_estimate(float(values.mean()), values, CONFIDENCE),
            "position_lift": observed["position_lift"],
            "random_lift": percentile_estimate(float(lifts.mean()), lifts, CONFIDENCE),
            "p_value": share_reached(lifts, observed["position_lift"].value),
        }
    return table


def _coupling_line(coupling: Coupling) -> dict[str, Any]:
    names = ("observed", "null", "lift", "position_lift", "p_value", "movable")
    return {name: getattr(coupling, name) for name in names} | {"peaks": int(coupling.peaks.sum())}


def _adjusted(couplings: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return Holm's p-values over all comparisons of the tested choices."""
    places = [(choice, null, name) for choice in TESTED for null in couplings[choice] for name in NAMES]
    adjusted = holm_adjusted([couplings[c][null][name]["p_value"] for c, null, name in places])
    table: dict[str, Any] = {}
    for (choice, null, name), value in zip(places, adjusted, strict=True):
        table.setdefault(choice, {}).setdefault(null, {})[name] = value
    return table


def _choices(raw: Raw) -> dict[str, dict[str, Any]]:
    """Return the lifts over shuffled positions when one choice changes; these need no draws."""
    main = raw.scores()
    cases: dict[str, tuple[attnprobe.TokenScores, dict[str, Any]]] = {
        "main": (main, {}),
        "k = 0 (coincide)": (main, {"lookback": 0}),
        "k = 2": (main, {"lookback": 2}),
        "k = 3": (main, {"lookback": 3}),
        "align: prediction": (main, {"align": "prediction"}),
        "q = 0.2": (main, {"quantile": 0.2}),
        "q = 0.6": (main, {"quantile": 0.6}),
        "all local maxima (q = 1)": (main, {"quantile": 1.0}),
        "top 40%, maxima or not": (main, {"peaks": "top"}),
        "reversed in time": (_reversed(main), {}),
    }
    for choice in (
        "without the first token",
        "horizon [10, 100]",
        "five middle layers",
        "bottom third",
        "middle third",
        "top third",
        "all heads",
        "heads ranked per answer",
        "receivers by Gini",
        "receivers by sentence",
    ):
        cases[choice] = (raw.scores(choice), {})
    table = {}
    for case, (scores, options) in cases.items():
        result = _couplings(raw, scores, draws=1, **options)
        table[case] = {name: getattr(result, name).lift for name in NAMES}
    return table


def _reversed(scores: attnprobe.TokenScores) -> attnprobe.TokenScores:
    """Return scores with every response reversed in time: what came after now comes before."""
    names = ("waad", "fai", "entropy", "receiver_fai", "response_mask", "input_ids")
    flipped = {name: getattr(scores, name).flip(-1) for name in names}
    return dataclasses.replace(scores, **flipped, texts=None)


def _lags(raw: Raw, group: str) -> dict[str, dict[str, Any]]:
    """Return the share of FAI peaks that have a WAAD peak on them, one token before, and one token after.

    Beside each share: what it would be if the FAI peaks of an answer lay on any of its tokens that could be
    peaks (Table 20 of arXiv 2510.13554v2 counts these three cases).
    """
    scores = raw.scores()
    values = getattr(scores, group)
    preplan, anchor = find_peaks(scores.waad), find_peaks(values)
    defined = torch.nn.functional.pad(~values.isnan(), (1, 1))
    pool = defined[:, 1:-1] & defined[:, :-2] & defined[:, 2:]
    weights = bootstrap_weights(len(preplan), clusters=raw.templates)
    ones = torch.ones_like(weights[:1])
    table = {}
    for name, moved in (
        ("on it", preplan),
        ("one before", torch.nn.functional.pad(preplan[:, :-1], (1, 0))),
        ("one after", torch.nn.functional.pad(preplan[:, 1:], (0, 1))),
    ):
        hits, peaks = (anchor & moved).sum(-1).double(), anchor.sum(-1).double()
        chance = peaks * (moved & pool).sum(-1) / pool.sum(-1).clamp(min=1)
        share, expected = ([(w @ above) / (w @ peaks) for w in (ones, weights)] for above in (hits, chance))
        lift = [ours / theirs - 1 for ours, theirs in zip(share, expected, strict=True)]
        table[name] = {
            "share": percentile_estimate(float(share[0]), share[1], CONFIDENCE),
            "chance": float(expected[0]),
            "lift": percentile_estimate(float(lift[0]), lift[1], CONFIDENCE),
        }
    return table


# ---- heads ------------------------------------------------------------------------------------------


def _heads(raw: Raw) -> dict[str, Any]:
    """Return how far span and kurtosis are explained by the first token and by length."""
    mean = {
        name: raw.head_values(name).nanmean(0)
        for name in ("span", "span_ignoring", "share_on_first", "receiver_kurtosis", "receiver_gini")
    }
    receivers = receiver_count(mean["span"].numel())
    groups = group_heads(mean["span"], mean["receiver_kurtosis"], receivers=receivers)
    without = group_heads(mean["span_ignoring"])
    by_gini = group_heads(mean["span"], mean["receiver_gini"], receivers=receivers)
    share = mean["share_on_first"]
    count, total = int(groups.global_heads.sum()), share.numel()
    most_on_first = torch.zeros(total, dtype=torch.bool)
    most_on_first[share.flatten().argsort(descending=True)[:count]] = True
    anchors, anchors_without = (
        find_peaks(raw.scores(choice).fai) for choice in ("main", "without the first token")
    )
    assert groups.receiver_heads is not None
    assert by_gini.receiver_heads is not None
    lengths = torch.tensor(raw.answers["tokens"].to_numpy()).double()
    sentence = raw.head_values("sentence_kurtosis")
    return {
        "total": total,
        "in_a_group": count,
        "span_and_share": rank_correlation(mean["span"], share),
        "span_ignoring_and_share": rank_correlation(mean["span_ignoring"], share),
        "share_on_first": {
            "global": float(share[groups.global_heads].mean()),
            "local": float(share[groups.local_heads].mean()),
            "receiver": float(share[groups.receiver_heads].mean()),
            "all": float(share.mean()),
        },
        "global_with_most_on_first": int((groups.global_heads.flatten() & most_on_first).sum()),
        "global_without": int((groups.global_heads & without.global_heads).sum()),
        "local_without": int((groups.local_heads & without.local_heads).sum()),
        "by_chance": count * count / total,
        "anchors_kept": float((anchors & anchors_without).sum() / anchors.sum()),
        "receivers_shared_with_gini": int((groups.receiver_heads & by_gini.receiver_heads).sum()),
        "receivers": int(groups.receiver_heads.sum()),
        "receivers_that_are_global": int((groups.receiver_heads & groups.global_heads).sum()),
        "length_and_kurtosis": _with_length(raw.head_values("receiver_kurtosis"), lengths),
        "length_and_gini": _with_length(raw.head_values("receiver_gini"), lengths),
        "answers_with_enough_sentences": int((~sentence.isnan()).flatten(1).any(-1).sum()),
        "stability": _stability(raw),
    }


def _with_length(values: torch.Tensor, lengths: torch.Tensor) -> float:
    """Return the rank correlation of an answer's length with its mean over heads."""
    return rank_correlation(values.flatten(1).nanmean(-1).double(), lengths)


def _stability(raw: Raw) -> dict[str, Estimate]:
    """Return how many heads of each group come back when answers are drawn again."""
    span, kurtosis = raw.head_values("span"), raw.head_values("receiver_kurtosis")
    examples, layers, heads = span.shape
    nothing = torch.zeros(examples, layers, heads, 1)
    statistics = attnprobe.HeadStatistics(
        span=span,
        waad=nothing,
        fai=nothing,
        entropy=None,
        receiver_kurtosis=kurtosis,
        response_mask=torch.ones(examples, 1, dtype=torch.bool),
        layers=tuple(range(layers)),
        receiver_level="token",
    )
    stability = attnprobe.group_stability(statistics, receivers=receiver_count(layers * heads))
    return {str(group): found for group, found in stability.overlap.items()}


# ---- interventions ----------------------------------------------------------------------------------


def _perturbation(raw: Raw) -> dict[str, Any]:
    """Return Table 1 against both references."""
    table: dict[str, Any] = {}
    for reference in ("greedy", "response"):
        summary = raw.perturbations.summary(reference, clusters=raw.templates)
        table[reference] = dataclasses.asdict(summary)
    trials = raw.perturbations.trials
    own = torch.tensor([trial.own.overlap for trial in trials], dtype=torch.float64)
    table["own_token"] = float(own.mean())
    table["trials"] = len(trials)
    table["relative_position"] = {
        kind: float(torch.tensor([t.response_position / t.length for t in trials if t.kind == kind]).mean())
        for kind in ("highest", "lowest", "drawn")
    }
    return table


def _knockout(raw: Raw, mode: str) -> dict[str, Any]:
    """Return the divergences without tokens of high, low and any FAI, and whose FAI goes with them."""
    table = dataclasses.asdict(raw.knockouts.summary(mode, clusters=raw.templates))
    problem = list(raw.answers["problem"])
    divergence = {
        (problem[trial.example], trial.response_position): trial.divergence
        for trial in raw.knockouts.trials
        if trial.kind == "drawn" and trial.mode == mode
    }
    correlations = {}
    for draw, lines in raw.knockout_fai.groupby("draw"):
        places = zip(lines["problem"], lines["response_position"], strict=True)
        found = torch.tensor([divergence[place] for place in places], dtype=torch.float64)
        fai = torch.tensor(lines["fai"].to_numpy(), dtype=torch.float64)
        correlations[draw] = rank_correlation(fai, found)
    table["all_heads"] = correlations.pop(-1)
    drawn = torch.tensor(list(correlations.values()), dtype=torch.float64)
    table["random_heads"] = percentile_estimate(float(drawn.mean()), drawn, CONFIDENCE)
    return table


def _plain(value: Any) -> Any:
    """Return nested results as what JSON holds: estimates become lists, NaN becomes None."""
    if isinstance(value, Estimate):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return None if value != value else value
    return value

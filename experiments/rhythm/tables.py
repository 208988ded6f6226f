"""The third step: Tables 1 and 2 with intervals, and how far they depend on what the paper leaves open.

Every line of a sensitivity table changes one choice of the first line. What is left to others: the
measurements (measure, attnprobe.couplings, attnprobe.perturb) and how tables look (document).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

import attnprobe
from attnprobe import reductions
from attnprobe.adapters.base import resolve_layers
from attnprobe.analysis.agreement import rank_correlation
from attnprobe.analysis.bootstrap import bootstrap_weights, percentile_estimate, ratio_estimate
from attnprobe.analysis.couplings import NAMES
from experiments.rhythm.measure import Measured


def scores_for(
    measured: Measured,
    *,
    setting: str = "end",
    layers: Sequence[int] | None = None,
    per_response: bool = False,
    disjoint: bool = False,
    sentence_receivers: bool = False,
    all_tokens: bool = False,
    receivers: int = 20,
) -> attnprobe.TokenScores:
    """Return the token scores of all answers under some choices.

    `per_response` ranks the heads for each answer separately; `disjoint` removes global heads from the
    receivers, so that the two groups share none; `sentence_receivers` finds receivers by sentence;
    `all_tokens` includes the last tokens in finding them, which only a few rows read.
    """
    statistics = measured.statistics[setting]
    if sentence_receivers:
        near = measured.statistics["near"]
        statistics = dataclasses.replace(
            statistics, receiver_kurtosis=near.receiver_kurtosis, receiver_level=near.receiver_level
        )
    if all_tokens:
        kurtosis = _kurtosis_over_all_tokens(measured)
        statistics = dataclasses.replace(statistics, receiver_kurtosis=kurtosis, receiver_level="token")
    if layers is not None:
        statistics = statistics.at_layers(layers)
    if per_response:
        alone = [statistics.select(example) for example in range(statistics.span.shape[0])]
        parts = [attnprobe.score_tokens(part, attnprobe.classify_heads(part)) for part in alone]
        # Heads differ from answer to answer, so the joined provenance names none.
        of_all = dataclasses.replace(parts[0].provenance, heads={})
        return attnprobe.TokenScores.concatenate(
            dataclasses.replace(part, provenance=of_all) for part in parts
        )
    heads = attnprobe.classify_heads(statistics, receivers=receivers)
    if disjoint:
        assert heads.receiver_heads is not None
        only_receivers = heads.receiver_heads & ~heads.global_heads
        heads = dataclasses.replace(heads, receiver_heads=only_receivers)
    return attnprobe.score_tokens(statistics, heads)


def _kurtosis_over_all_tokens(measured: Measured) -> torch.Tensor:
    """Return receiver kurtosis as it is with `minimum_rows=1`.

    This needs no second pass: that kurtosis is computed from FAI to the end of the response.
    """
    statistics = measured.statistics["end"]
    assert statistics.horizon == reductions.RECEIVER_HORIZON
    return reductions.kurtosis(statistics.fai)


def reversed_in_time(scores: attnprobe.TokenScores) -> attnprobe.TokenScores:
    """Return scores with every response reversed in time: what came after now comes before."""
    names = ("waad", "fai", "entropy", "receiver_fai", "response_mask", "input_ids")
    found = {name: getattr(scores, name) for name in names}
    flipped = {name: value.flip(-1) for name, value in found.items() if value is not None}
    return dataclasses.replace(scores, **flipped, texts=None)


def coupling_tables(measured: Measured, model: Any) -> dict[str, dict[str, Any]]:
    """Return Table 2 under the paper's choices, and with one choice changed at a time."""
    middle = resolve_layers("middle", attnprobe.adapter_for(model))
    # 20 receivers are 7% of SmolLM2's 270 heads, but most of the heads of a tiny model.
    span = measured.statistics["end"].span
    few = max(1, round(0.074 * span.shape[1] * span.shape[2]))
    primary = scores_for(measured)
    near = scores_for(measured, setting="near")
    cases: dict[str, tuple[attnprobe.TokenScores, dict[str, Any]]] = {
        "as in the paper": (primary, {}),
        "align: prediction": (primary, {"align": "prediction"}),
        "horizon: [10, 50]": (near, {}),
        "layers: middle five": (scores_for(measured, layers=middle), {}),
        "q: 0.2": (primary, {"quantile": 0.2}),
        "q: 0.6": (primary, {"quantile": 0.6}),
        "peaks: all local maxima (q = 1)": (primary, {"quantile": 1.0}),
        "peaks: top 40%, maxima or not": (primary, {"peaks": "top"}),
        "k: 0 (coincide)": (primary, {"lookback": 0}),
        "k: 1": (primary, {"lookback": 1}),
        "k: 2": (primary, {"lookback": 2}),
        "heads: ranked per response": (scores_for(measured, per_response=True), {}),
        "receivers: 7% of heads": (scores_for(measured, receivers=few), {}),
        "receivers: by sentence": (scores_for(measured, sentence_receivers=True), {}),
        "receivers: all tokens (minimum_rows=1)": (scores_for(measured, all_tokens=True), {}),
        "receivers: without global heads": (scores_for(measured, disjoint=True), {}),
        "baseline: rotate": (primary, {"baseline": "rotate"}),
        "reversed in time": (reversed_in_time(primary), {}),
        "middle five, [10, 50], k: 1": (
            scores_for(measured, setting="near", layers=middle),
            {"lookback": 1},
        ),
    }
    tables = {}
    for case, (scores, options) in cases.items():
        result = attnprobe.couplings(scores, **options)
        tables[case] = {name: _coupling_line(getattr(result, name)) for name in NAMES}
    return tables


def _coupling_line(coupling: attnprobe.Coupling | None) -> dict[str, Any]:
    """Return a coupling as plain numbers; undefined where no head was left to measure it with."""
    if coupling is None:
        nan = float("nan")
        return {"random": nan, "observed": [nan] * 3, "lift": [nan] * 3, "p_value": nan, "peaks": 0}
    return {
        "random": coupling.random,
        "observed": list(coupling.observed),
        "lift": list(coupling.lift),
        "p_value": coupling.p_value,
        "peaks": int(coupling.peaks.sum()),
    }


def couplings_per_problem(measured: Measured) -> list[dict[str, Any]]:
    """Return the sums behind Table 2 for each problem, under the paper's choices."""
    result = attnprobe.couplings(scores_for(measured))
    lines = []
    for index, problem in enumerate(measured.problems):
        line: dict[str, Any] = {"problem": problem}
        for name in NAMES:
            coupling = getattr(result, name)
            for field in ("observed_sum", "random_sum", "peaks"):
                line[f"{name}.{field}"] = float(getattr(coupling, field)[index])
        lines.append(line)
    return lines


def perturbation_table(perturbations: attnprobe.Perturbations) -> dict[str, Any]:
    """Return Table 1 against both references, and what remains of it at equal positions."""
    table: dict[str, Any] = {}
    for reference in ("response", "greedy"):
        summary = perturbations.summary(reference)
        line = {name: list(getattr(summary, name)) for name in ("highest", "lowest", "difference")}
        line["lower_share"] = list(summary.lower_share)
        line["at_equal_position"] = _at_equal_position(perturbations, reference)
        line["responses"] = summary.responses
        table[reference] = line
    own = torch.tensor([trial.own.overlap for trial in perturbations.trials], dtype=torch.float64)
    table["own_token"] = list(ratio_estimate(own, torch.ones_like(own)))
    for kind in ("highest", "lowest"):
        of_kind = [trial for trial in perturbations.trials if trial.kind == kind]
        places = torch.tensor(
            [trial.response_position / trial.length for trial in of_kind], dtype=torch.float64
        )
        table[f"relative_position_{kind}"] = list(ratio_estimate(places, torch.ones_like(places)))
    return table


def _at_equal_position(perturbations: attnprobe.Perturbations, reference: str) -> list[float]:
    """Return highest minus lowest overlap, as it would be with both positions equally far into the response.

    This is the intercept of a regression of the difference in overlap on the difference in relative position.
    Early tokens have more text after them to change, and tokens of high FAI may come early.
    """
    pairs: dict[int, dict[str, Any]] = {}
    for trial in perturbations.trials:
        pairs.setdefault(trial.example, {})[trial.kind] = trial
    lines = [
        (
            pair["highest"].overlap(reference) - pair["lowest"].overlap(reference),
            (pair["highest"].response_position - pair["lowest"].response_position) / pair["highest"].length,
        )
        for pair in pairs.values()
        if len(pair) == 2
    ]
    overlap, place = torch.tensor(lines, dtype=torch.float64).unbind(-1)

    def intercept(weights: torch.Tensor) -> float:
        total = weights.sum()
        mean_overlap, mean_place = (weights @ overlap) / total, (weights @ place) / total
        centred = place - mean_place
        slope = (weights @ (centred * overlap)) / (weights @ centred.square())
        return float(mean_overlap - slope * mean_place)

    resampled = [intercept(weights) for weights in bootstrap_weights(len(lines))]
    whole = intercept(torch.ones(len(lines), dtype=torch.float64))
    return list(percentile_estimate(whole, torch.tensor(resampled, dtype=torch.float64)))


def suppression_table(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean divergence without the token of highest and of lowest FAI, answer by answer.

    Also, over the drawn tokens: the rank correlation of FAI and divergence, and their partial rank
    correlation given position.
    """
    lines = [{token["kind"]: token["divergence"] for token in record["tokens"]} for record in records]
    highest, lowest = (
        torch.tensor([line[kind] for line in lines], dtype=torch.float64) for kind in ("highest", "lowest")
    )
    ones = torch.ones_like(highest)
    table: dict[str, Any] = {
        "highest": list(ratio_estimate(highest, ones)),
        "lowest": list(ratio_estimate(lowest, ones)),
        "ratio": list(ratio_estimate(highest, lowest)),
        "higher_share": list(ratio_estimate((highest > lowest).double(), ones)),
        "answers": len(lines),
    }
    drawn = [
        (token["fai"], token["divergence"], token["position"])
        for record in records
        for token in record["tokens"]
        if token["kind"] == "drawn"
    ]
    fai, divergence, position = torch.tensor(drawn, dtype=torch.float64).unbind(-1)
    raw, by_fai, by_divergence = (
        rank_correlation(*pair) for pair in ((fai, divergence), (fai, position), (divergence, position))
    )
    table["rank_correlation"] = raw
    spread = (1 - by_fai**2) * (1 - by_divergence**2)
    # If the ranks follow from the positions, as with two tokens they always do, nothing remains.
    partial = (raw - by_fai * by_divergence) / spread**0.5 if spread > 1e-12 else float("nan")
    table["rank_correlation_without_position"] = partial
    table["drawn_tokens"] = len(drawn)
    return table


def following_without_coincidence(measured: Measured, lookback: int = 3) -> dict[str, Any]:
    """Return the share of anchors not coinciding with a preplan that follow one, observed and shuffled."""
    scores = scores_for(measured)
    near, same = (attnprobe.couplings(scores, lookback=k).anchor_after_preplan for k in (lookback, 0))
    parts = {
        "observed": (near.observed_sum - same.observed_sum, same.peaks - same.observed_sum),
        "random": (near.random_sum - same.random_sum, same.peaks - same.random_sum),
    }
    weights = bootstrap_weights(len(same.peaks))
    shares = {name: float(above.sum() / below.sum()) for name, (above, below) in parts.items()}
    drawn = {name: (weights @ above) / (weights @ below) for name, (above, below) in parts.items()}
    lift = shares["observed"] / shares["random"] - 1
    observed = percentile_estimate(shares["observed"], drawn["observed"])
    return {
        "random": shares["random"],
        "observed": list(observed),
        "lift": list(percentile_estimate(lift, drawn["observed"] / drawn["random"] - 1)),
    }


def grouping_table(measured: Measured) -> dict[str, Any]:
    """Return how stable the groups are over problems, and how well the kinds of receivers agree."""
    by_token, by_sentence = (measured.statistics[name] for name in ("end", "near"))
    table: dict[str, Any] = {}
    for name, statistics in (("token", by_token), ("sentence", by_sentence)):
        stability = attnprobe.group_stability(statistics)
        table[f"stability with {name} receivers"] = {
            **{group: list(estimate) for group, estimate in stability.overlap.items()},
            "span rank correlation": list(stability.span_correlation),
        }
    half = by_token.span.shape[0] // 2
    halves = [attnprobe.classify_heads(by_token.select(part)) for part in (slice(half), slice(half, None))]
    agreement = attnprobe.compare_groups(*halves)
    table["first half against second"] = {**agreement.overlap, "span": agreement.span_correlation}
    heads = [attnprobe.classify_heads(statistics) for statistics in (by_token, by_sentence)]
    agreement = attnprobe.compare_groups(*heads)
    table["token against sentence receivers"] = {
        "overlap": agreement.overlap["receiver"],
        "chance": agreement.chance_overlap["receiver"],
        "rank correlation": agreement.kurtosis_correlation,
    }
    over_all = dataclasses.replace(by_token, receiver_kurtosis=_kurtosis_over_all_tokens(measured))
    agreement = attnprobe.compare_groups(heads[0], attnprobe.classify_heads(over_all))
    table["token receivers against those over all tokens"] = {
        "overlap": agreement.overlap["receiver"],
        "rank correlation": agreement.kurtosis_correlation,
    }
    table["receivers of one answer that peak among its last nine tokens"] = {
        "as measured": _peaks_at_the_end(by_token),
        "over all tokens": _peaks_at_the_end(over_all),
    }
    for name, groups in zip(("token", "sentence"), heads, strict=True):
        receivers = groups.mask("receiver")
        share = float((receivers & groups.global_heads).sum() / receivers.sum())
        table[f"share of {name} receivers that are global"] = share
    defined = ~by_sentence.receiver_kurtosis.isnan().all(-1).all(-1)  # type: ignore[union-attr]
    table["answers with enough sentences"] = int(defined.sum())
    return table


def _peaks_at_the_end(statistics: attnprobe.HeadStatistics, last: int = 9) -> float:
    """Return the share of receivers, chosen for each answer alone, with their highest FAI at its end.

    The share is over all receivers of all answers; the end is the last nine tokens that have an FAI, each
    read by fewer than ten rows with a horizon to the end of the response.
    """
    found = []
    for i in range(statistics.fai.shape[0]):
        alone = statistics.select(i)
        fai = alone.fai[0][attnprobe.classify_heads(alone).mask("receiver")]
        end = int((~fai.isnan()).any(0).nonzero()[-1])
        found.append(fai.nan_to_num(-1).argmax(-1) > end - last)
    return float(torch.cat(found).double().mean())

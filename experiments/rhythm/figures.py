"""Figures 2 and 9 of arXiv 2510.13554v2 (v1: 2 and 8) from our own data, and the couplings with intervals.

Static pictures: attention maps of the head groups next to the token scores of one answer; the answer's text
coloured by its scores; and Table 2 as points. The command draws them at the end. What is left to others: the
numbers (tables), and the pictures of scores and maps (attnprobe.figures).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import attnprobe
from attnprobe.models import LoadedModel
from experiments.rhythm.measure import batch_of

TOKENS = 90
"""How many tokens of an answer are shown."""


def figure_2(
    loaded: LoadedModel,
    record: dict[str, Any],
    scores: attnprobe.TokenScores,
    heads: attnprobe.HeadGroups,
    path: Path,
) -> None:
    """Draw the group maps of one answer next to its FAI, WAAD and entropy; `scores` are of it alone."""
    maps = attnprobe.group_maps(loaded.model, batch_of(loaded, [record]), heads)
    within = (0, min(TOKENS, int(scores.response_mask.sum())))
    curves = 2 + (scores.receiver_fai is not None) + (scores.entropy is not None)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.7])
    attnprobe.figures.maps(maps, within=within, axes=left.subplots(2, 1))
    rhythm = attnprobe.find_rhythm(scores)
    attnprobe.figures.rhythm(scores, rhythm, within=within, axes=right.subplots(curves, 1, sharex=True))
    _save(figure, path)


def figure_9(scores: attnprobe.TokenScores, path: Path) -> None:
    """Draw one answer's text twice, each token's background coloured by FAI and by WAAD."""
    within = (0, min(2 * TOKENS, int(scores.response_mask.sum())))
    _save(attnprobe.figures.tokens(scores, score=("fai", "waad"), within=within), path)


def couplings_figure(
    table: dict[str, dict[str, Any]], paper: dict[str, dict[str, float]], path: Path
) -> None:
    """Draw the lifts of Table 2 over shuffled positions with their intervals, one line for each choice."""
    titles = {
        "entropy_at_preplans": "entropy at WAAD peaks",
        "receiver_at_global": "receiver peaks that are global peaks",
        "anchor_after_preplan": "FAI peaks at or after WAAD peaks",
    }
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    cases = list(table)
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for place, case in enumerate(cases):
            value, low, high = (torch.nan if number is None else 100 * number for number in table[case][name])
            axis.errorbar(
                value,
                -place,
                xerr=[[value - low], [high - value]],
                fmt="o",
                markersize=4,
                color="crimson" if place == 0 else "0.3",
            )
        axis.axvline(0, color="0.7", linewidth=1)
        axis.axvline(100 * paper[name]["lift"], color="steelblue", linestyle="--", linewidth=1)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("lift over shuffled peaks, %", fontsize=8)
    axes[0].set_yticks([-place for place in range(len(cases))], cases, fontsize=8)
    _save(figure, path, 110)


def _save(figure: Any, path: Path, dots_per_inch: int = 200) -> None:
    figure.savefig(path, dpi=dots_per_inch, metadata={"Software": None})


def choose_example(scores: attnprobe.TokenScores) -> int:
    """Return the answer to show: the first with at least as many tokens as the figures show."""
    enough = scores.response_mask.sum(-1) >= TOKENS
    return int(torch.argmax(enough.int()))

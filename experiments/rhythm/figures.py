"""Figures 2 and 9 of arXiv 2510.13554v2 (v1: 2 and 8) from our own data, and the couplings with intervals.

Static pictures with matplotlib: attention maps of the head groups next to the token scores of one answer; the
answer's text coloured by its scores; and Table 2 as points. The command draws them at the end. What is left
to others: the numbers (tables).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

import attnprobe
from attnprobe.models import LoadedModel
from attnprobe.report.tokens import clipped_range
from attnprobe.rhythm import find_peaks
from experiments.rhythm.measure import batch_of

matplotlib.use("Agg")
from matplotlib import pyplot

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
    batch = batch_of(loaded, [record])
    maps = attnprobe.group_maps(loaded.model, batch, heads)
    inside = scores.response_mask[0]
    count = min(TOKENS, int(inside.sum()))
    rhythm = attnprobe.find_rhythm(scores)
    figure = pyplot.figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.add_gridspec(4, 2, width_ratios=[1, 1.6])
    for place, (name, values) in enumerate((("global", maps.global_map[0]), ("local", maps.local_map[0]))):
        axis = figure.add_subplot(grid[2 * place : 2 * place + 2, 0])
        axis.imshow(values[:count, :count].sqrt().numpy(), cmap="viridis", interpolation="nearest")
        axis.set_title(f"mean map of the {name} heads (square root)", fontsize=9)
        axis.set_xlabel("key: response token", fontsize=8)
        axis.set_ylabel("query", fontsize=8)
    curves = [
        ("FAI, global heads", scores.fai, rhythm.anchor),
        ("WAAD, local heads", scores.waad, rhythm.preplan),
    ]
    if scores.receiver_fai is not None:
        curves.insert(1, ("FAI, receiver heads", scores.receiver_fai, find_peaks(scores.receiver_fai)))
    if scores.entropy is not None:
        curves.append(("entropy (nats)", scores.entropy, torch.zeros_like(rhythm.anchor)))
    for place, (name, values, peaks) in enumerate(curves):
        axis = figure.add_subplot(grid[place, 1])
        shown = values[0, inside][:count]
        axis.plot(shown.numpy(), linewidth=1, color="0.3")
        at = peaks[0, inside][:count].nonzero()[:, 0]
        axis.plot(at.numpy(), shown[at].numpy(), "o", markersize=4, color="crimson")
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_xlim(0, count)
    axis.set_xlabel("response token", fontsize=8)
    _save(figure, path)


def figure_9(scores: attnprobe.TokenScores, path: Path, width: int = 150) -> None:
    """Draw one answer's text twice, each token's background coloured by FAI and by WAAD."""
    assert scores.texts is not None
    inside = scores.response_mask[0]
    texts = [text for text, shown in zip(scores.texts[0], inside.tolist(), strict=True) if shown]
    figure, axes = pyplot.subplots(2, 1, figsize=(11, 6), layout="constrained")
    for axis, (name, values, colours) in zip(
        axes, (("FAI", scores.fai, "Reds"), ("WAAD", scores.waad, "Blues")), strict=True
    ):
        shown = values[0, inside]
        low, high = clipped_range(shown.tolist())
        strength = ((shown - low) / max(high - low, 1e-9)).clamp(0, 1).nan_to_num()
        _write_text(axis, texts, strength.tolist(), matplotlib.colormaps[colours], width)
        axis.set_title(f"{name}: 5th to 95th percentile of the answer", fontsize=9, loc="left")
        axis.axis("off")
    _save(figure, path)


def _write_text(axis: Any, texts: Sequence[str], strength: Sequence[float], colours: Any, width: int) -> None:
    """Write tokens in a fixed-width font, one cell per character, on their colours."""
    column, line = 0, 0
    for text, value in zip(texts[:260], strength, strict=False):
        shown = "".join(c if c.isprintable() else "·" for c in text.replace("\n", "¶"))
        printable, cells = shown.replace("$", r"\$"), len(shown)
        if column + cells > width:
            column, line = 0, line + 1
        box = {"facecolor": colours(0.7 * value), "edgecolor": "none", "pad": 0.6}
        axis.text(column, -line, printable, family="monospace", fontsize=8, bbox=box, va="top")
        column += cells
        if text.endswith("\n"):
            column, line = 0, line + 1
    axis.set_xlim(0, width)
    axis.set_ylim(-line - 1, 0.5)


def couplings_figure(
    table: dict[str, dict[str, Any]], paper: dict[str, dict[str, float]], path: Path
) -> None:
    """Draw the lifts of Table 2 over shuffled positions with their intervals, one line for each choice."""
    titles = {
        "entropy_at_preplans": "entropy at WAAD peaks",
        "receiver_at_global": "receiver peaks that are global peaks",
        "anchor_after_preplan": "FAI peaks at or after WAAD peaks",
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 5), sharey=True, layout="constrained")
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
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def choose_example(scores: attnprobe.TokenScores) -> int:
    """Return the answer to show: the first with at least as many tokens as the figures show."""
    enough = scores.response_mask.sum(-1) >= TOKENS
    return int(torch.argmax(enough.int()))

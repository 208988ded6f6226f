"""The scores of one response as curves, one above the other, with their peaks (Fig. 2 of arXiv 2510.13554v2).

Users call `rhythm`. What is left to others: the look (paper) and whether results belong together (reading).
"""

from __future__ import annotations

import math
from typing import Any

from attnprobe.colours import SCORE_LOOKS, ScoreLook
from attnprobe.figures.paper import INK, PALE, TEXT_SIZE, AxesLike, FigureLike, given_axes, look, new_figure
from attnprobe.figures.reading import (
    Within,
    few_rows,
    first_column,
    floats,
    read_scores,
    shown_columns,
    undefined_stretches,
    with_gaps,
)
from attnprobe.rhythm import Rhythm, find_peaks
from attnprobe.scores import TokenScores
from attnprobe.validation import IntLike

_PANEL_HEIGHT = 0.72
_PEAKS = {"waad": ("preplan", "v"), "fai": ("anchor", "D"), "receiver_fai": ("peak of receivers", "s")}


def rhythm(
    scores: TokenScores,
    rhythm: Rhythm | None = None,
    *,
    example: IntLike = 0,
    within: Within = None,
    axes: AxesLike | None = None,
) -> FigureLike:
    """Draw WAAD, FAI, and what else was measured, over the tokens of a response.

    Positions are counted from the response's first token. A curve is broken where a response has a gap, and
    hatched where its score is undefined. So it is where an FAI is a mean over few rows, as at the end of a
    response: there the line is dotted, peaks are hollow, and values may leave the axis.

    Args:
        scores: from `score_tokens`.
        rhythm: from `find_rhythm`: preplans and anchors are marked on the curves, and so are the peaks of the
            receivers' FAI, by the same quantile; a band joins a preplan to its anchor. None: curves only.
        example: which example to draw.
        within: which of its response tokens: `(first, stop)`, or `(first, None)` to the end; None: all.
        axes: matplotlib axes to draw into, one for each score, from top to bottom; None: a new figure.

    Raises:
        ParameterError: an example that there is not, a part without tokens, or another number of axes.
        ResultError: a rhythm of other scores, or an empty response.
        MissingDependencyError: matplotlib is not installed.

    >>> import torch, attnprobe
    >>> from attnprobe.testing.tiny_models import tiny_model
    >>> batch = attnprobe.TokenBatch.from_ids(torch.arange(1, 41)[None], response_start=4)
    >>> scores = attnprobe.score_tokens(attnprobe.measure(tiny_model("llama"), batch), "all")
    >>> figure = attnprobe.figures.rhythm(scores, attnprobe.find_rhythm(scores))
    >>> [axes.get_ylabel().replace(chr(10), " ") for axes in figure.axes]
    ['WAAD (tokens)', 'FAI (attention)', 'entropy (nats)']
    """
    example = read_scores(scores, rhythm, example)
    columns = shown_columns(scores.response_mask, example, within)
    origin = first_column(scores.response_mask, example)
    names = [name for name in SCORE_LOOKS if getattr(scores, name) is not None]
    panels = given_axes(axes, len(names), ", ".join(names))
    with look():
        if panels is None:
            figure = new_figure(_PANEL_HEIGHT * len(names) + 0.55)
            panels = list(figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0])
        figure = panels[0].figure
        pairs = [] if rhythm is None else _pairs(rhythm, example, columns, origin)
        for panel, name in zip(panels, names, strict=True):
            _draw_curve(panel, scores, name, example, columns, origin)
            if pairs:
                panel.broken_barh(
                    pairs, (0, 1), transform=panel.get_xaxis_transform(), color=PALE, alpha=0.7, zorder=0
                )
            if rhythm is not None and name in _PEAKS:
                _mark_peaks(panel, scores, rhythm, name, example, columns, origin)
        panels[-1].set_xlabel("response token")
        panels[-1].set_xlim(columns[0] - origin - 1, columns[-1] - origin + 1)
        figure.align_ylabels(panels)
        _add_legend(figure, panels, axes is None)
    found: FigureLike = figure
    return found


def _draw_curve(
    panel: Any, scores: TokenScores, name: str, example: int, columns: list[int], origin: int
) -> None:
    shown = SCORE_LOOKS[name]
    found = floats(getattr(scores, name), example, columns)
    few = few_rows(scores, name, example)
    sound = [math.nan if column in few else value for column, value in zip(columns, found, strict=True)]
    defined = [value for value in sound if not math.isnan(value)]
    if few and defined:
        # Means over few rows are shown, but do not set the scale.
        places, values = with_gaps(columns, found, origin)
        panel.plot(places, values, color=shown.line, label="_few rows", linestyle=":", linewidth=0.7)
        room = 0.1 * (max(defined) - min(defined)) or 0.1 * abs(max(defined)) or 0.1
        panel.set_ylim(min(defined) - room, max(defined) + room)
    else:
        sound = found
    places, values = with_gaps(columns, sound, origin)
    # A lone value between two undefined ones has no line, so it needs a point.
    alone = [
        i
        for i, value in enumerate(values)
        if not math.isnan(value)
        and (i == 0 or math.isnan(values[i - 1]))
        and (i + 1 == len(values) or math.isnan(values[i + 1]))
    ]
    panel.plot(places, values, color=shown.line, label="_curve", marker=".", markersize=1.5, markevery=alone)
    stretches = undefined_stretches(places, values)
    if stretches:
        panel.broken_barh(
            stretches,
            (0, 1),
            transform=panel.get_xaxis_transform(),
            facecolor="none",
            edgecolor=PALE,
            linewidth=0,
            hatch="//////",
            zorder=0,
        )
    if len(alone) == 0 and all(math.isnan(value) for value in values):
        panel.text(0.5, 0.5, "undefined", transform=panel.transAxes, ha="center", va="center")
        panel.set_yticks([])
    panel.set_ylabel(f"{shown.label}\n({_unit(scores, name, shown)})".replace(" of ", "\nof "))
    panel.locator_params(axis="y", nbins=4)
    panel.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    panel.yaxis.get_offset_text().set_fontsize(TEXT_SIZE)


def _unit(scores: TokenScores, name: str, shown: ScoreLook) -> str:
    if scores.provenance.value_weighted and name in ("fai", "receiver_fai"):
        return "residual units"
    return shown.unit


def _mark_peaks(
    panel: Any,
    scores: TokenScores,
    rhythm: Rhythm,
    name: str,
    example: int,
    columns: list[int],
    origin: int,
) -> None:
    label, marker = _PEAKS[name]
    values = getattr(scores, name)
    if name == "receiver_fai":
        inside = scores.response_mask.to(values.device)
        peaks = find_peaks(values.masked_fill(~inside, math.nan), quantile=rhythm.quantile)[example]
    else:
        peaks = getattr(rhythm, label)[example]
    at = [column for column in columns if bool(peaks[column])]
    few = few_rows(scores, name, example)
    colour = SCORE_LOOKS[name].line
    for chosen, face, edge in ((False, colour, "white"), (True, "white", colour)):
        some = [column for column in at if (column in few) == chosen]
        if some:
            panel.plot(
                [column - origin for column in some],
                floats(values, example, some),
                linestyle="none",
                marker=marker,
                markersize=3.2 if marker != "v" else 4,
                color=face,
                markeredgecolor=edge,
                markeredgewidth=0.4,
                label=f"{label}, few rows" if chosen else label,
            )


def _pairs(rhythm: Rhythm, example: int, columns: list[int], origin: int) -> list[tuple[float, float]]:
    """Return the bands from preplans to anchors that are shown, as (begin, width)."""
    shown = set(columns)
    return [
        (preplan - origin - 0.5, anchor - preplan + 1.0)
        for preplan, anchor in rhythm.pairs(example)
        if preplan in shown and anchor in shown
    ]


def _add_legend(figure: Any, panels: list[Any], is_ours: bool) -> None:
    handles, labels = [], []
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.append(handle)
            labels.append(label)
    if not handles:
        return
    if is_ours:
        figure.legend(handles, labels, loc="outside upper right", ncols=3, labelcolor=INK)
    else:
        panels[0].legend(
            handles, labels, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.1
        )

"""The report's figures of scores and heads: curves over the response, and a map of all heads.

`Report` draws both. `curves_figure` draws WAAD, FAI and entropy over the response with their peaks (Fig. 2
of arXiv 2510.13554v2); `heads_figure` draws the mean span of every head. Both return plotly figures. What is
left to others: attention maps (maps), the look that all figures share (plotting), and words (the page).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnprobe.head_groups import HeadGroups
from attnprobe.report.plotting import (
    ENTROPY_COLOUR,
    FAI_COLOUR,
    GRID,
    RECEIVER_COLOUR,
    WAAD_COLOUR,
    empty_figure,
    hover_label,
    import_plotly,
)
from attnprobe.report.response import CoupledPair, ResponseToken

_PANEL_HEIGHT = 170
_PANEL_GAP = 0.06
_PAIR_COLOUR = "rgba(120, 120, 120, 0.20)"


@dataclass(frozen=True)
class Curve:
    """One panel of the curves: the score of each token, and which tokens are its peaks."""

    name: str
    axis_title: str
    values: tuple[float, ...]
    colour: str
    peaks: tuple[bool, ...] = ()
    peak_name: str = ""
    symbol: str = "circle"

    @property
    def is_defined(self) -> bool:
        """Whether any token has a value."""
        return not all(math.isnan(value) for value in self.values)

    def limits(self) -> tuple[float, float]:
        """Return the range of the vertical axis: all defined values, with room for the markers."""
        defined = [value for value in self.values if not math.isnan(value)]
        if not defined:
            return 0.0, 1.0
        low, high = min(defined), max(defined)
        room = 0.12 * (high - low) or 0.5
        return low - room, high + room


def response_curves(tokens: Sequence[ResponseToken], *, has_receiver: bool, has_entropy: bool) -> list[Curve]:
    """Return the curves of what was measured on a response."""
    curves = [
        Curve(
            "WAAD",
            "WAAD",
            tuple(token.waad for token in tokens),
            WAAD_COLOUR,
            tuple(token.preplan for token in tokens),
            "preplan",
            "triangle-down",
        ),
        Curve(
            "FAI",
            "FAI",
            tuple(token.fai for token in tokens),
            FAI_COLOUR,
            tuple(token.anchor for token in tokens),
            "anchor",
            "diamond",
        ),
    ]
    if has_receiver:
        values = tuple(token.receiver_fai for token in tokens)
        curves.append(Curve("FAI of receiver heads", "FAI, receivers", values, RECEIVER_COLOUR))
    if has_entropy:
        values = tuple(token.entropy for token in tokens)
        curves.append(Curve("entropy (nats)", "entropy", values, ENTROPY_COLOUR))
    return curves


def curves_figure(
    tokens: Sequence[ResponseToken], pairs: Sequence[CoupledPair], curves: Sequence[Curve]
) -> Any:
    """Return the curves, one below the other over a shared axis, with peaks and pairs marked."""
    figure = empty_figure(_PANEL_HEIGHT * len(curves) + 110)
    figure.add_trace(_token_line(tokens, curves[0]))
    height = (1 - _PANEL_GAP * (len(curves) - 1)) / len(curves)
    for panel, curve in enumerate(curves):
        number = "" if panel == 0 else str(panel + 1)
        top = 1 - panel * (height + _PANEL_GAP)
        limits = curve.limits()
        for trace in _curve_traces(tokens, pairs, curve, limits, first=panel == 0):
            figure.add_trace(trace.update(yaxis=f"y{number}"))
        axis = {
            "domain": [max(0.0, top - height), top],
            "range": limits,
            "title": {"text": curve.axis_title},
            "gridcolor": GRID,
            "zeroline": False,
            "nticks": 5,
            "showticklabels": curve.is_defined,
            "showgrid": curve.is_defined,
        }
        figure.update_layout({f"yaxis{number}": axis})
        if not curve.is_defined:
            figure.add_annotation(
                text=f"{curve.name}: no token has a defined value",
                x=0.5,
                y=top - height / 2,
                xref="paper",
                yref="paper",
                showarrow=False,
            )
    figure.update_layout(
        xaxis=_token_axis(tokens, len(curves)),
        hovermode="x unified",
        # One hover box for the curves of all panels, not one for the panel under the mouse.
        hoversubplots="axis",
        barmode="overlay",
        legend={"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom"},
    )
    return figure


def _token_axis(tokens: Sequence[ResponseToken], panels: int) -> dict[str, Any]:
    """Return the horizontal axis, which lies below the last panel."""
    return {
        "title": {"text": "token (column in the batch)"},
        "anchor": f"y{panels}" if panels > 1 else "y",
        "gridcolor": GRID,
        "zeroline": False,
        "range": [tokens[0].column - 1, tokens[-1].column + 1],
        "hoverformat": "d",
        "showspikes": True,
        "spikemode": "across",
        "spikethickness": 1,
        "spikedash": "dot",
        "spikecolor": "#888888",
    }


def _token_line(tokens: Sequence[ResponseToken], curve: Curve) -> Any:
    """Return an invisible trace that names the token in the shared hover box."""
    low, _ = curve.limits()
    return import_plotly().Scatter(
        x=[token.column for token in tokens],
        y=[low] * len(tokens),
        mode="markers",
        marker={"opacity": 0},
        text=[hover_label(token) for token in tokens],
        hovertemplate="token %{text}<extra></extra>",
        showlegend=False,
    )


def _curve_traces(
    tokens: Sequence[ResponseToken],
    pairs: Sequence[CoupledPair],
    curve: Curve,
    limits: tuple[float, float],
    *,
    first: bool,
) -> list[Any]:
    """Return a panel's traces: bands from preplan to anchor, the curve, and its peaks."""
    plotly = import_plotly()
    low, high = limits
    traces = []
    if pairs:
        # Bars: one trace stays fast, where a thousand rectangles in the layout would not.
        traces.append(
            plotly.Bar(
                x=[pair.anchor.token.column - pair.distance / 2 for pair in pairs],
                y=[high - low] * len(pairs),
                base=[low] * len(pairs),
                width=[pair.distance + 0.8 for pair in pairs],
                marker={"color": _PAIR_COLOUR, "line": {"width": 0}},
                hoverinfo="skip",
                name="preplan and its anchor",
                legendgroup="pairs",
                showlegend=first,
            )
        )
    columns, values = _with_gaps(tokens, curve.values)
    traces.append(
        plotly.Scatter(
            x=columns,
            y=values,
            mode="lines",
            line={"color": curve.colour, "width": 1.6},
            name=curve.name,
            showlegend=False,
            hovertemplate=f"{curve.name} %{{y:.3~g}}<extra></extra>",
        )
    )
    peaks = [i for i, is_peak in enumerate(curve.peaks) if is_peak]
    if peaks:
        traces.append(
            plotly.Scatter(
                x=[tokens[i].column for i in peaks],
                y=[curve.values[i] for i in peaks],
                mode="markers",
                marker={"color": curve.colour, "size": 8, "symbol": curve.symbol},
                name=f"{curve.peak_name} (peak of {curve.name})",
                hovertemplate=f"{curve.peak_name}<extra></extra>",
            )
        )
    return traces


def _with_gaps(
    tokens: Sequence[ResponseToken], values: Sequence[float]
) -> tuple[list[int], list[float | None]]:
    """Return columns and values, with a break wherever the response has a gap."""
    columns: list[int] = []
    filled: list[float | None] = []
    for token, value in zip(tokens, values, strict=True):
        if columns and token.column != columns[-1] + 1:
            columns.append(columns[-1] + 1)
            filled.append(None)
        columns.append(token.column)
        filled.append(None if math.isnan(value) else value)
    return columns, filled


# ---- heads ------------------------------------------------------------------------------------------


def heads_figure(heads: HeadGroups) -> Any:
    """Return the mean span of every head, layers across and heads down, with the groups marked."""
    plotly = import_plotly()
    span = heads.span.detach().float().cpu().tolist()
    layers, count = len(heads.layers), len(span[0])
    cell = max(11, min(30, 900 // max(layers, count)))
    figure = empty_figure(max(cell * count, 170) + 130)
    defined = [value for layer in span for value in layer if not math.isnan(value)]
    labels = [str(layer) for layer in heads.layers]
    figure.add_trace(
        plotly.Heatmap(
            x=labels,
            y=[str(head) for head in range(count)],
            z=_transposed([[None if math.isnan(value) else value for value in layer] for layer in span]),
            text=_transposed(_head_texts(heads, span)),
            hovertemplate="%{text}<extra></extra>",
            colorscale="Cividis",
            # Linear: a logarithmic scale would spend most of the colours on the few most local heads.
            zmin=0.0,
            zmax=max([*defined, 1.0]),
            xgap=1,
            ygap=1,
            colorbar={
                "title": {"text": "mean span<br>(tokens)"},
                "thickness": 14,
                "outlinewidth": 0,
            },
        )
    )
    for trace in _group_markers(heads, labels, cell):
        figure.add_trace(trace)
    figure.update_layout(
        xaxis=_index_axis("layer", [-0.5, layers - 0.5]),
        yaxis=_index_axis("head", [count - 0.5, -0.5]),
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )
    return figure


def _index_axis(title: str, limits: list[float]) -> dict[str, Any]:
    """Return an axis of layers or heads, which are categories rather than quantities."""
    return {
        "title": {"text": title, "standoff": 12},
        "type": "category",
        "range": limits,
        "showgrid": False,
        "zeroline": False,
        "automargin": True,
    }


def group_names(heads: HeadGroups, layer_index: int, head: int) -> list[str]:
    """Return the groups that a head belongs to."""
    masks = {
        "local": heads.local_heads,
        "global": heads.global_heads,
        "receiver": heads.receiver_heads,
    }
    return [name for name, mask in masks.items() if mask is not None and bool(mask[layer_index, head])]


def _head_texts(heads: HeadGroups, span: list[list[float]]) -> list[list[str]]:
    """Return the hover text of each head."""
    kurtosis = None
    if heads.receiver_kurtosis is not None:
        kurtosis = heads.receiver_kurtosis.detach().float().cpu().tolist()
    texts = []
    for index, of_layer in enumerate(span):
        line = []
        for head, value in enumerate(of_layer):
            text = f"layer {heads.layers[index]}, head {head}<br>mean span {value:.3g} tokens"
            if kurtosis is not None:
                text += f"<br>receiver kurtosis {kurtosis[index][head]:.3g}"
            line.append(f"{text}<br>{', '.join(group_names(heads, index, head)) or 'in no group'}")
        texts.append(line)
    return texts


def _group_markers(heads: HeadGroups, labels: list[str], cell: int) -> list[Any]:
    """Return the marks of the groups, with a shape for each, so that they differ without colour."""
    plotly = import_plotly()
    looks = {
        "local": (heads.local_heads, "triangle-down", "#ffffff", 0.38),
        "global": (heads.global_heads, "triangle-up", "#1a1a1a", 0.38),
        "receiver": (heads.receiver_heads, "circle-open", "#e0218a", 0.78),
    }
    traces = []
    for name, (mask, symbol, colour, share) in looks.items():
        if mask is None or not bool(mask.any()):
            continue
        places = mask.nonzero().tolist()
        traces.append(
            plotly.Scatter(
                x=[labels[index] for index, _ in places],
                y=[str(head) for _, head in places],
                mode="markers",
                marker={
                    "symbol": symbol,
                    "color": colour,
                    "size": max(5, round(cell * share)),
                    "line": {"width": 2 if symbol.endswith("open") else 0.6, "color": _outline(colour)},
                },
                name=f"{name} heads ({len(places)})",
                hoverinfo="skip",
            )
        )
    return traces


def _outline(colour: str) -> str:
    return {"#ffffff": "#555555", "#1a1a1a": "#ffffff"}.get(colour, colour)


def _transposed(lines: list[list[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*lines, strict=True)]

"""The report's pictures of attention: the mean maps of the local and the global heads, side by side.

`Report` calls `maps_figure`. The map of a long response is pooled before it is drawn, since a page cannot
show more cells than a screen has pixels. What is left to others: computing maps (measurement) and the shared
look (plotting).
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.maps import GroupMaps
from attnprobe.report.plotting import empty_figure, import_plotly, log_ticks
from attnprobe.report.response import ResponseToken

MOST_CELLS = 512
# Values this many decades below the largest get the lightest colour: attention spans many decades, and the
# lowest are noise.
_DECADES = 3.0
_LONGEST_LABEL = 40


@dataclass(frozen=True)
class PooledMap:
    """A map ready to be drawn.

    Attributes:
        values: the attention of each cell; NaN where the key comes after the query.
        block: how many tokens one cell covers, in each direction.
    """

    values: Float[Tensor, "cell cell"]
    block: int


def pool_map(attention: Float[Tensor, "token token"], most_cells: int = MOST_CELLS) -> PooledMap:
    """Pool a map to at most `most_cells` cells a side: each cell is the largest value of its block.

    The largest, since a mean would fade the narrow columns of anchors.

    >>> pool_map(torch.eye(4), 2).values
    tensor([[1., nan],
            [0., 1.]])
    """
    values = attention.detach().float().cpu()
    count = values.shape[0]
    block = math.ceil(count / most_cells)
    if block > 1:
        missing = -count % block
        padded = torch.nn.functional.pad(values, (0, missing, 0, missing))
        values = torch.nn.functional.max_pool2d(padded[None], block)[0]
    cells = values.shape[0]
    future = torch.ones(cells, cells, dtype=torch.bool).triu(1)
    return PooledMap(values.masked_fill(future, torch.nan), block)


def maps_figure(maps: GroupMaps, tokens: Sequence[ResponseToken], most_cells: int = MOST_CELLS) -> Any:
    """Return both maps of one example in logarithmic colours, queries down and keys across."""
    named = {
        "local heads": pool_map(maps.local_map[0], most_cells),
        "global heads": pool_map(maps.global_map[0], most_cells),
    }
    block = named["local heads"].block
    columns = maps.columns_of(0)
    by_column = {token.column: token for token in tokens}
    labels = _labels([by_column[column] for column in columns], block)
    # A few ticks: there is no room for every token's column, and hovering shows it.
    shown = list(range(0, len(labels), max(1, len(labels) // 8)))
    axis = {
        "type": "category",
        "tickvals": shown,
        "ticktext": [str(columns[cell * block]) for cell in shown],
        "showgrid": False,
        "zeroline": False,
        "tickangle": 0,
    }
    high = max(float(pooled.values.nan_to_num().max()) for pooled in named.values()) or 1.0
    low = high * 10**-_DECADES
    figure = empty_figure(560)
    for i, (name, pooled) in enumerate(named.items()):
        number, domain = (("", [0.0, 0.46]), ("2", [0.54, 1.0]))[i]
        figure.add_trace(_heatmap(pooled.values, labels, low, f"x{number}", f"y{number}"))
        key = {"title": {"text": "key: column that is read"}, "anchor": f"y{number}", "domain": domain}
        query = {"title": {"text": "" if number else "query: column that reads"}, "anchor": f"x{number}"}
        figure.update_layout(
            {
                f"xaxis{number}": {**axis, **key},
                f"yaxis{number}": {**axis, **query, "autorange": "reversed"},
            }
        )
        _add_heading(figure, name, sum(domain) / 2)
    figure.update_layout(coloraxis=_colour_axis(low, high))
    return figure


def _add_heading(figure: Any, text: str, place: float) -> None:
    figure.add_annotation(
        text=f"<b>{text}</b>",
        x=place,
        y=1.0,
        xref="paper",
        yref="paper",
        yanchor="bottom",
        yshift=6,
        showarrow=False,
    )


def _colour_axis(low: float, high: float) -> dict[str, Any]:
    """Return the logarithmic colours that both maps share."""
    ticks, tick_texts = log_ticks(low, high)
    return {
        "colorscale": _COLOURS,
        "cmin": math.log10(low),
        "cmax": math.log10(high),
        "colorbar": {
            "title": {"text": "attention"},
            "tickvals": ticks,
            "ticktext": tick_texts,
            "thickness": 14,
            "outlinewidth": 0,
        },
    }


# From the tone of an empty page to nearly black, so that what is read stands out. It is the only scale that
# may be dark: there is no text on it.
_COLOURS = [
    [0.0, "#f1f3f5"],
    [0.25, "#c6dbef"],
    [0.5, "#6baed6"],
    [0.75, "#2171b5"],
    [1.0, "#08203f"],
]


def _heatmap(values: Tensor, labels: list[str], low: float, x_axis: str, y_axis: str) -> Any:
    return import_plotly().Heatmap(
        x=labels,
        y=labels,
        z=values.clamp(min=low).log10().numpy(),
        # The colour is the logarithm; hovering shows the attention itself.
        customdata=values.numpy(),
        coloraxis="coloraxis",
        xaxis=x_axis,
        yaxis=y_axis,
        hoverongaps=False,
        hovertemplate="query %{y}<br>reads key %{x}<br>attention %{customdata:.3~g}<extra></extra>",
    )


def _labels(tokens: Sequence[ResponseToken], block: int) -> list[str]:
    """Return a name for each cell of an axis, with its columns: category axes need unique names."""
    labels = []
    for begin in range(0, len(tokens), block):
        part = tokens[begin : begin + block]
        text = "".join(token.label for token in part)
        if len(text) > _LONGEST_LABEL:
            text = text[:_LONGEST_LABEL] + "…"
        columns = f"{part[0].column}" if len(part) == 1 else f"{part[0].column}-{part[-1].column}"
        labels.append(f"{columns} {html.escape(f'“{text}”')}")
    return labels

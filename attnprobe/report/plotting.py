"""What the plotly figures of the report share: the lazy import, the look, and safe JSON.

`figures`, `maps` and `Report` call this. What is left to others: the figures themselves (figures, maps).
"""

from __future__ import annotations

import html
import math
from typing import Any

from attnprobe.errors import MissingDependencyError
from attnprobe.report.response import ResponseToken

INK = "#444444"
GRID = "rgba(128, 128, 128, 0.22)"
WAAD_COLOUR = "#c8590c"
FAI_COLOUR = "#1f6fad"
ENTROPY_COLOUR = "#6b6b6b"
RECEIVER_COLOUR = "#008a6e"


def import_plotly() -> Any:
    """Return plotly's graph objects, or raise `MissingDependencyError` with what to install."""
    try:
        import plotly.graph_objects
    except ImportError as error:
        raise MissingDependencyError("a report needs plotly: pip install 'attnprobe[report]'") from error
    return plotly.graph_objects


def plotly_source() -> str:
    """Return plotly.js, made safe for a script element."""
    import_plotly()
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("</script", "<\\/script")


def empty_figure(height: int) -> Any:
    """Return an empty figure with the report's look, of a height in pixels."""
    plotly = import_plotly()
    return plotly.Figure(
        layout={
            # Plotly's default template is long and colours the background; the page has its own style.
            "template": plotly.layout.Template(),
            "height": height,
            "margin": {"l": 64, "r": 16, "t": 40, "b": 52},
            "paper_bgcolor": "rgba(0, 0, 0, 0)",
            "plot_bgcolor": "rgba(0, 0, 0, 0)",
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
            "modebar": {"bgcolor": "rgba(0, 0, 0, 0)", "color": "#8a9199", "activecolor": "#4a86b8"},
            "hoverlabel": {"bgcolor": "#ffffff", "font": {"color": "#1a1a1a", "size": 13}, "align": "left"},
        }
    )


def figure_json(figure: Any) -> str:
    """Return a figure as JSON that is safe in a script element: without `<`, `>` and `&`."""
    text: str = figure.to_json()
    # All three occur only inside JSON strings, where an escape means the same.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def hover_label(token: ResponseToken) -> str:
    """Return a token's text for plotly, escaped: plotly interprets markup in texts."""
    return html.escape(f"“{token.label}”")


def log_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Return the positions (as log10) and texts of the ticks of a logarithmic colour bar.

    >>> log_ticks(2.0, 60.0)[1]
    ['2', '5', '10', '20', '50']
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    # Over many decades, powers of ten are enough.
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    # Parsed from text: step * 10.0**power is not always the nearest float.
    numbers = [float(f"{step}e{power}") for power in range(first, last + 1) for step in steps]
    shown = [number for number in numbers if low * 0.999 <= number <= high * 1.001]
    return [math.log10(number) for number in shown], [f"{number:g}" for number in shown]

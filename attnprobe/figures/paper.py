"""The look that all figures share: size, fonts and lines for one column of a paper, and how they are saved.

matplotlib is loaded when the first figure is drawn. The other modules of this room call `look` around all
that they draw, and `new_figure`. What is left to others: what is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from attnprobe.errors import MissingDependencyError, ParameterError
from attnprobe.validation import brief

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    FigureLike: TypeAlias = Figure
    AxesLike: TypeAlias = Axes
else:
    # Run-time type checkers would load matplotlib to look at these.
    FigureLike = AxesLike = Any

WIDTH = 3.25
"""The width of a column, in inches."""

TEXT_SIZE = 7.0
"""The size of tick labels, legends and tokens, in points; axis labels have one point more."""

INK = "#222222"
PALE = "#dddddd"

_LOOK = {
    "figure.facecolor": "white",
    "figure.dpi": 150,
    "axes.facecolor": "white",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.grid": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": TEXT_SIZE + 1,
    "axes.titleweight": "normal",
    "axes.labelsize": TEXT_SIZE + 1,
    "font.size": TEXT_SIZE + 1,
    "text.color": INK,
    # TeX would need an installation of it, and would interpret what tokens say.
    "text.usetex": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": TEXT_SIZE,
    "ytick.labelsize": TEXT_SIZE,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.fontsize": TEXT_SIZE,
    "legend.frameon": False,
    "legend.handletextpad": 0.3,
    "legend.columnspacing": 1.0,
    "lines.linewidth": 0.9,
    "hatch.linewidth": 0.4,
    "hatch.color": "#b8b8b8",
    "image.origin": "upper",
    "image.interpolation": "none",
}
_SAVING = {
    # TrueType: with the default, type 3, some journals refuse the file, and its text is hard to edit.
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    # A tight box would change the width of the column.
    "savefig.bbox": None,
    "savefig.facecolor": "auto",
    "savefig.dpi": 300,
    "text.usetex": False,
    "hatch.linewidth": 0.4,
}


def import_matplotlib() -> Any:
    """Return matplotlib, or raise `MissingDependencyError` with what to install."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise MissingDependencyError("figures need matplotlib: pip install 'attnprobe[figures]'") from error
    return matplotlib


@contextmanager
def look() -> Iterator[None]:
    """Draw with the look of a paper's figures; afterwards matplotlib's settings are as they were."""
    with import_matplotlib().rc_context(_LOOK):
        yield


def new_figure(height: float, *, layout: str = "constrained") -> FigureLike:
    """Return an empty figure, one column wide and `height` inches high."""
    figure: FigureLike = figure_class()(figsize=(WIDTH, height), layout=layout)
    return figure


def given_axes(axes: Any, count: int, names: str) -> list[Any] | None:
    """Return the axes to draw into as a list; None if none were given.

    Raises:
        ParameterError: another number of axes than there are panels, or something else.
    """
    if axes is None:
        return None
    found = [axes] if hasattr(axes, "plot") else list(getattr(axes, "flat", axes))
    if len(found) != count or not all(hasattr(each, "plot") for each in found):
        raise ParameterError(f"axes must be {count} of matplotlib's axes ({names}); got {brief(axes)}")
    return found


@cache
def figure_class() -> Any:
    """Return the class of the figures: matplotlib's, which shows itself and keeps text as text when saved."""
    matplotlib = import_matplotlib()

    class PaperFigure(matplotlib.figure.Figure):  # type: ignore[misc, name-defined]
        """A figure for a paper."""

        def savefig(self, *arguments: Any, **options: Any) -> None:
            """Save as matplotlib does, with text that stays text."""
            with matplotlib.rc_context(_SAVING):
                super().savefig(*arguments, **options)

        def _repr_png_(self) -> bytes:
            """Return what a notebook shows, also where pyplot is not loaded."""
            return png(self)

    # As if the class were the module's own, so that figures can be copied and pickled.
    PaperFigure.__module__, PaperFigure.__qualname__ = __name__, "PaperFigure"
    return PaperFigure


def __getattr__(name: str) -> Any:
    """Return the class of the figures where pickle looks for it."""
    if name == "PaperFigure":
        return figure_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def png(figure: FigureLike, dots_per_inch: int = 200) -> bytes:
    """Return a figure as a PNG image."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dots_per_inch)
    return stream.getvalue()

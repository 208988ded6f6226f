"""The response as text, each token's background coloured by a score (Fig. 9 of arXiv 2510.13554v2).

`Report` shows it. `coloured_text` turns a response and a score into styled pieces and a legend. What is left
to others: the markup (the page's template, which also escapes every text) and the curves (figures).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attnprobe.report.response import ResponseToken

_LINE_BREAKS = re.compile(r"([\r\n]+)")
# The outermost values are clipped, or a single extreme token would leave the rest of the text white.
_CLIPPED_SHARE = 0.05

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class ColourScale:
    """A ramp of one hue, from nearly white to a tone on which black text keeps a contrast above 5:1.

    Lightness alone carries the value, so that the scale can be read with any colour vision.
    """

    stops: tuple[Colour, ...]

    def at(self, share: float) -> str:
        """Return the CSS colour at a point of the ramp, 0 to 1."""
        place = min(max(share, 0.0), 1.0) * (len(self.stops) - 1)
        index = min(int(place), len(self.stops) - 2)
        low, high = self.stops[index], self.stops[index + 1]
        mixed = (round(a + (b - a) * (place - index)) for a, b in zip(low, high, strict=True))
        return "#" + "".join(f"{channel:02x}" for channel in mixed)

    @property
    def gradient(self) -> str:
        """The ramp as a CSS background."""
        colours = ", ".join(self.at(i / (len(self.stops) - 1)) for i in range(len(self.stops)))
        return f"linear-gradient(to right, {colours})"


# Orange for WAAD and blue for FAI, here and in the curves: the pair that most colour-blind readers can tell
# apart.
WAAD_SCALE = ColourScale(((255, 248, 240), (254, 217, 168), (253, 174, 97), (241, 122, 34)))
FAI_SCALE = ColourScale(((243, 248, 254), (198, 219, 239), (130, 184, 220), (74, 148, 200)))


@dataclass(frozen=True)
class Piece:
    """A stretch of a token's text: either line breaks only, or none."""

    text: str
    is_break: bool


@dataclass(frozen=True)
class ColouredToken:
    """A token, ready for the page: its text, CSS and hover text."""

    pieces: tuple[Piece, ...]
    colour: str | None
    classes: str
    hover: str
    after_gap: bool


@dataclass(frozen=True)
class Legend:
    """What the ends of the ramp mean."""

    low: str
    high: str
    gradient: str


@dataclass(frozen=True)
class ColouredText:
    """A response coloured by one score; the legend is None if no token has a value."""

    name: str
    description: str
    tokens: tuple[ColouredToken, ...]
    legend: Legend | None


def coloured_text(
    tokens: Sequence[ResponseToken],
    value: Callable[[ResponseToken], float],
    *,
    name: str,
    description: str,
    scale: ColourScale,
    hovers: Sequence[str],
) -> ColouredText:
    """Return a response coloured by one score of its tokens; a token without a value has no colour."""
    values = [value(token) for token in tokens]
    low, high = clipped_range(values)
    coloured = []
    for i, token in enumerate(tokens):
        share = 0.5 if high == low else (values[i] - low) / (high - low)
        coloured.append(
            ColouredToken(
                pieces=_pieces(token.text),
                colour=None if math.isnan(values[i]) else scale.at(share),
                classes=" ".join(["token", *roles(token)]),
                hover=hovers[i],
                after_gap=i > 0 and token.column != tokens[i - 1].column + 1,
            )
        )
    legend = None
    if not math.isnan(low):
        legend = Legend(f"{low:.3g}", f"{high:.3g}", scale.gradient)
    return ColouredText(name, description, tuple(coloured), legend)


def clipped_range(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the ramp: the 5th and 95th percentile of the defined values; NaN if there are none.

    >>> clipped_range([3.0, math.nan, 1.0])
    (1.0, 3.0)
    """
    defined = sorted(value for value in values if not math.isnan(value))
    if not defined:
        return math.nan, math.nan
    cut = int(_CLIPPED_SHARE * len(defined))
    return defined[cut], defined[-1 - cut]


def roles(token: ResponseToken) -> list[str]:
    """Return the names of the roles that a token plays in the rhythm."""
    parts = {
        "preplan": token.preplan,
        "anchor": token.anchor,
        "dominated": token.dominated,
        "intro": token.intro,
    }
    return [name for name, plays in parts.items() if plays]


def hover_text(token: ResponseToken, scores: dict[str, float], anchor_of: int | None) -> str:
    """Return the hover text of a token: its column and text, its scores, and its roles in the rhythm."""
    lines = [f"column {token.column}: “{token.label}”"]
    lines += [f"{name}: {format_score(value)}" for name, value in scores.items()]
    played = roles(token)
    if played:
        lines.append(", ".join(played))
    if anchor_of is not None and anchor_of != token.column:
        lines.append(f"belongs to the preplan in column {anchor_of}")
    return "\n".join(lines)


def format_score(value: float) -> str:
    """Return a score in three digits, or "undefined"."""
    return "undefined" if math.isnan(value) else f"{value:.3g}"


def _pieces(text: str) -> tuple[Piece, ...]:
    """Split a text so that line breaks are separate pieces: the page gives them a visible symbol."""
    found = (part for part in _LINE_BREAKS.split(text) if part)
    return tuple(Piece(part, part[0] in "\r\n") for part in found)

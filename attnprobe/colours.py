"""How each score of a token is named, measured and coloured, in figures, notebooks and terminals.

Orange for WAAD and blue for FAI is the pair that most colour-blind readers can tell apart. The ramps are of
one hue each, from nearly white to a tone on which black text keeps a contrast above 5:1, so that lightness
alone carries the value. Displays, figures and the command line ask here. What is left to others: drawing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Colour = tuple[int, int, int]

# The outermost values are clipped, or a single extreme token would leave the rest of the text white.
_CLIPPED_SHARE = 0.05


@dataclass(frozen=True)
class ScoreLook:
    """How one score looks.

    Attributes:
        label: its name for readers.
        unit: what it is measured in.
        line: the colour of its curve.
        ramp: the colours of its values, from low to high.
    """

    label: str
    unit: str
    line: str
    ramp: tuple[Colour, ...]

    def at(self, share: float) -> Colour:
        """Return the colour at a point of the ramp, 0 to 1.

        >>> SCORE_LOOKS["waad"].at(0.0), SCORE_LOOKS["waad"].at(1.0)
        ((255, 248, 240), (241, 122, 34))
        """
        place = min(max(share, 0.0), 1.0) * (len(self.ramp) - 1)
        index = min(int(place), len(self.ramp) - 2)
        pairs = zip(self.ramp[index], self.ramp[index + 1], strict=True)
        red, green, blue = (round(a + (b - a) * (place - index)) for a, b in pairs)
        return red, green, blue


SCORE_LOOKS = {
    "waad": ScoreLook(
        "WAAD", "tokens", "#c8590c", ((255, 248, 240), (254, 217, 168), (253, 174, 97), (241, 122, 34))
    ),
    "fai": ScoreLook(
        "FAI", "attention", "#1f6fad", ((243, 248, 254), (198, 219, 239), (130, 184, 220), (74, 148, 200))
    ),
    "receiver_fai": ScoreLook(
        "FAI of receivers",
        "attention",
        "#008a6e",
        ((240, 250, 246), (186, 228, 211), (120, 198, 170), (52, 160, 130)),
    ),
    "entropy": ScoreLook(
        "entropy", "nats", "#6b6b6b", ((248, 248, 248), (217, 217, 217), (185, 185, 185), (150, 150, 150))
    ),
}
"""The look of each score that `TokenScores` holds, by its name there."""


def clipped_range(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the ramp: the 5th and 95th percentile of the finite values; NaN if there are none.

    >>> clipped_range([3.0, math.nan, 1.0])
    (1.0, 3.0)
    """
    finite = sorted(value for value in values if math.isfinite(value))
    if not finite:
        return math.nan, math.nan
    cut = int(_CLIPPED_SHARE * len(finite))
    return finite[cut], finite[-1 - cut]


def shares(values: Sequence[float]) -> list[float]:
    """Return where each value lies in the clipped range, 0 to 1; NaN where it is undefined.

    >>> shares([3.0, math.nan, 1.0, 2.0])
    [1.0, nan, 0.0, 0.5]
    """
    low, high = clipped_range(values)
    return [_share(value, low, high) for value in values]


def _share(value: float, low: float, high: float) -> float:
    if math.isnan(value) or math.isnan(low):
        return math.nan
    if high == low:
        # All alike: neither end of the ramp would be right.
        return 0.5
    return min(max((value - low) / (high - low), 0.0), 1.0)

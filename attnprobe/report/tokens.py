"""The range of a score that colours show: extremes are clipped, so that one token does not fade the others.

Static figures call this; the page does the same in assets/scores.js, and a test holds both together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

CLIPPED_SHARE = 0.05
"""The share of values that is clipped at each end."""


def clipped_range(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the ramp: the 5th and 95th percentile of the defined values; NaN if there are none.

    >>> clipped_range([3.0, math.nan, 1.0])
    (1.0, 3.0)
    """
    defined = sorted(value for value in values if not math.isnan(value))
    if not defined:
        return math.nan, math.nan
    cut = int(CLIPPED_SHARE * len(defined))
    return defined[cut], defined[-1 - cut]

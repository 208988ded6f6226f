"""The report's pictures of attention: the mean maps of the local and the global heads, ready to be drawn.

`entry` calls `map_data`, and assets/maps.js draws it. The map of a long response is pooled, since a page
cannot show more cells than a screen has pixels; what a query cannot read, the upper triangle, is not stored.
What is left to others: computing maps (measurement), and who reads whom exactly (reads).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.maps import GroupMaps
from attnprobe.report.packing import deflated, floats, packed

MOST_CELLS = 512
DECADES = 4.0
"""Attention this many decades below the largest is stored as "less": the lowest values are noise."""
_LEVELS = 255


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
    values = floats(attention).nan_to_num(0.0)
    count = values.shape[0]
    block = math.ceil(count / most_cells)
    if block > 1:
        missing = -count % block
        padded = torch.nn.functional.pad(values, (0, missing, 0, missing))
        values = torch.nn.functional.max_pool2d(padded[None], block)[0]
    cells = values.shape[0]
    future = torch.ones(cells, cells, dtype=torch.bool).triu(1)
    return PooledMap(values.masked_fill(future, torch.nan), block)


def map_data(maps: GroupMaps, tokens: Sequence[int], most_cells: int = MOST_CELLS) -> dict[str, Any]:
    """Return both maps in the form in which the page holds them: the lower triangles, row by row.

    A code from 1 to 255 is a logarithm between `high` and `DECADES` below it; 0 is anything less.

    Args:
        maps: those of one example, without padding.
        tokens: which of the response's tokens each row of the maps is.
        most_cells: how many cells a side may have.
    """
    pooled = {name: pool_map(getattr(maps, f"{name}_map")[0], most_cells) for name in ("local", "global")}
    high = max(float(each.values.nan_to_num().max()) for each in pooled.values()) or 1.0
    return {
        "cells": len(pooled["local"].values),
        "block": pooled["local"].block,
        "tokens": packed(tokens, "i4"),
        "high": high,
        "decades": DECADES,
    } | {name: deflated(_codes(each.values, high)) for name, each in pooled.items()}


def _codes(values: Float[Tensor, "cell cell"], high: float) -> bytes:
    row, column = numpy.tril_indices(len(values))
    triangle = values.numpy()[row, column].astype(numpy.float64)
    with numpy.errstate(divide="ignore"):
        share = 1 + numpy.log10(triangle / high) / DECADES
    codes = numpy.rint(numpy.clip(share, 0, 1) * (_LEVELS - 1)) + 1
    return numpy.where(share < 0, 0, codes).astype(numpy.uint8).tobytes()

"""Numbers and texts in the form in which the page holds them: base64, rounded and deflated, and safe JSON.

`entry`, `maps`, `reads` and `heads` pack with these, and assets/data.js unpacks. What is left to others:
which numbers a page needs.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import numpy
import torch
from torch import Tensor

from attnprobe.validation import ArrayLike

# A number of the page's scores is exact; those of all heads would be too many.
_MANY_NUMBERS = 1_500_000


def packed(values: ArrayLike, dtype: str) -> str:
    """Return numbers as base64 of little-endian numbers of a type: "f4" is float32, "i4" int32, "u1" uint8.

    >>> packed(torch.tensor([1, 2]), "u1")
    'AQI='
    """
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else numpy.asarray(values)
    return _base64(numpy.ascontiguousarray(array, dtype=f"<{dtype}").tobytes())


def deflated(content: bytes) -> str:
    """Return bytes as base64 of their zlib stream, which a browser can inflate."""
    return _base64(zlib.compress(content, 6))


def rounded_heads(values: Tensor, *, is_heavy_tailed: bool = False) -> dict[str, Any]:
    """Return the scores of all heads `[head, token]`, rounded for each head between its own extremes.

    To 8 bits, or 4 bits if there are more than 1.5 million. Heavy-tailed scores are rounded on the scale of
    their square roots, where small values keep more of their digits. The highest code is an undefined value.
    """
    wide = values.detach().cpu().float().numpy()
    scaled = numpy.sqrt(numpy.maximum(wide, 0)) if is_heavy_tailed else wide
    missing = numpy.isnan(scaled)
    defined = (~missing).any(1)
    low = numpy.where(defined, numpy.where(missing, numpy.inf, scaled).min(1), 0)
    high = numpy.where(defined, numpy.where(missing, -numpy.inf, scaled).max(1), 0)
    bits = 4 if values.numel() > _MANY_NUMBERS else 8
    undefined = 2**bits - 1
    step = numpy.where(high > low, high - low, 1)[:, None] / (undefined - 1)
    with numpy.errstate(invalid="ignore"):
        codes = numpy.where(missing, undefined, numpy.rint((scaled - low[:, None]) / step)).astype(
            numpy.uint8
        )
    if bits == 4:
        codes = numpy.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return {
        "bits": bits,
        "isRoot": is_heavy_tailed,
        "low": packed(low, "f4"),
        "high": packed(high, "f4"),
        "codes": deflated(codes.tobytes()),
    }


def floats(values: Tensor) -> Tensor:
    """Return numbers as float32 on the processor, whatever they were."""
    return values.detach().cpu().to(torch.float32)


def safe_json(data: Any) -> str:
    """Return JSON that is safe in a script element: without `<`, `>` and `&`."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # All three occur only inside JSON strings, where an escape means the same. So do the line separators,
    # which a reader of the file might take for ends of lines.
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")

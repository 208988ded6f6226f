"""Results of hand-made answers, from which the tests of the report make pages."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

import attnprobe
from attnprobe.maps import GroupMaps

PROMPT = 6
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "\n\n",
    "\"' onmouseover='alert(3)",
    "<b>bold</b> & <!-- ",
    "{{ 7 * 7 }}${x}",
    "%{y} <br>",
    "\u202eright",
    "\x00",
    "\ud800",
    "",
    "é\u2028",
)


def make_results(
    texts: tuple[str, ...] | None = None, *, length: int = 40, layers: int = 2, seed: int = 0, **changes: Any
) -> dict[str, Any]:
    """Return results of two hand-made responses of `length` tokens after a prompt of six."""
    generator = torch.Generator().manual_seed(seed)
    length = len(texts) if texts is not None else length
    shape = (2, PROMPT + length)
    batch = attnprobe.TokenBatch.from_ids(
        torch.randint(5, 90, shape, generator=generator), response_start=PROMPT
    )
    if texts is not None:
        prompt = ("Say", " <i>", "so", "\n", "a", "b")
        batch = dataclasses.replace(batch, texts=(prompt + texts,) * 2)
    waad, entropy, receiver_fai = (
        torch.rand(shape, generator=generator).masked_fill(~batch.response_mask, math.nan) for _ in range(3)
    )
    # Few rows are left for the FAI of the last tokens, and none for that of the last ten.
    receiver_fai[:, -10:] = math.nan
    scores = attnprobe.TokenScores(5 * waad, fai_of_maps(length), entropy, batch.response_mask, receiver_fai)
    per_head = torch.rand(2, layers, 4, shape[1], generator=generator)
    per_head = per_head.masked_fill(~batch.response_mask[:, None, None], math.nan)
    statistics = attnprobe.HeadStatistics(
        span=20 * torch.rand(2, layers, 4, generator=generator),
        waad=9 * per_head,
        fai=per_head.flip(1).pow(3),
        entropy=entropy,
        receiver_kurtosis=torch.rand(2, layers, 4, generator=generator),
        response_mask=batch.response_mask,
        layers=tuple(range(3, 3 + layers)),
        model_name="a/model",
    )
    return {
        "batch": batch,
        "statistics": statistics,
        "heads": attnprobe.classify_heads(statistics, receivers=2),
        "scores": scores,
        "rhythm": attnprobe.find_rhythm(scores),
    } | changes


def make_maps(length: int) -> GroupMaps:
    """Return maps that give the FAI of `make_results`."""
    pattern = torch.rand(1, length, length, generator=torch.Generator().manual_seed(1)).tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    return GroupMaps(0.8 * pattern, 0.5 * pattern, torch.arange(PROMPT, PROMPT + length)[None])


def fai_of_maps(length: int) -> torch.Tensor:
    """Return the FAI of the global map, as Eq. 10 of arXiv 2510.13554v2 has it, for both responses."""
    attention = make_maps(length).global_map[0].double()
    fai = torch.full((2, PROMPT + length), math.nan)
    for s in range(length - 10):
        fai[:, PROMPT + s] = attention[s + 10 : s + 101, s].mean().float()
    return fai

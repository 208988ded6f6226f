"""A small corpus that the tests of the corpus room share: its rows, and what is scored by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from attnprobe import TokenBatch, classify_heads, find_rhythm, measure, score_tokens
from attnprobe.corpus import CorpusSettings

SETTINGS = CorpusSettings(horizon=(2, 20))

BAD_LINES = {
    b"\xff\xfe{}": "not UTF-8",
    b'{"prompt": "a", "response": ""}': "empty",
    b'{"prompt": "a"}': "missing field: response; the row has prompt",
    b'{"prompt": "a", "response": null}': "missing field: response is null",
    b'{"messages": [{"content": "a"}], "response": "b"}': "wrong type: the role of a turn",
    b"[1]": "wrong type",
    b'{"prompt": 3, "response": "a"}': "wrong type",
    b'{"prompt": "\\ud800", "response": "a"}': "not UTF-8",
    b'{"prompt_ids": [1], "response_ids": [1, 2000]}': "wrong type",
    b'{"prompt_ids": [1], "response_ids": [1, -1]}': "wrong type",
    b'{"prompt_ids": [1], "response_ids": [1, 2.5]}': "wrong type",
    b'{"prompt_ids": [], "response_ids": []}': "empty",
    b'{"messages": [{"role": "user", "content": "a"}]}': "missing field",
    b'{"messages": ["a"]}': "wrong type",
    json.dumps({"prompt": "a", "response": "what the model reads " * 200}).encode(): "too long",
    b"[" * 100_000: "not JSON",
    b'{"prompt": "cut': "not JSON",
}
"""Rows that cannot be scored, each with how its reason begins; the last one is cut off."""


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of ids, of mixed lengths."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        sizes = [int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 6), (3, 40))]
        ids = [torch.randint(1, 290, (size,), generator=generator).tolist() for size in sizes]
        found.append(
            {"id": f"r{number}", "prompt_ids": ids[0], "response_ids": ids[1], "ok": number % 3 == 0}
        )
    return found


def write_lines(path: Path, lines: list[Any]) -> Path:
    """Write rows as JSON lines; bytes as they are."""
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(encoded))
    return path


def scored_by_hand(model: Any, given: list[dict[str, Any]], settings: CorpusSettings) -> list[dict[str, Any]]:
    """Return what a corpus must hold: each row measured by itself, by the heads of all rows."""
    batches = [
        TokenBatch.from_ids([row["prompt_ids"] + row["response_ids"]], response_start=len(row["prompt_ids"]))
        for row in given
    ]
    statistics = [
        measure(model, batch, window=settings.window, horizon=settings.horizon, receiver=settings.receivers)
        for batch in batches
    ]
    groups = classify_heads(statistics)
    expected = []
    for row, part in zip(given, statistics, strict=True):
        scores = score_tokens(part, groups, align=settings.align)
        rhythm = find_rhythm(scores, quantile=settings.peak_quantile, lookback=settings.lookback)
        own = slice(len(row["prompt_ids"]), None)
        assert part.span is not None
        expected.append(
            {
                "waad": scores.waad[0, own],
                "fai": scores.fai[0, own],
                "entropy": None if scores.entropy is None else scores.entropy[0, own],
                "receiver_fai": None if scores.receiver_fai is None else scores.receiver_fai[0, own],
                "preplan": rhythm.preplan[0, own],
                "anchor": rhythm.anchor[0, own],
                "span": part.span[0].flatten(),
                "first_token_share": part.share("first")[0].flatten(),
            }
        )
    return expected

"""A cheaper causal measure than the perturbation: how much later predictions change without a token.

At the positions of highest and lowest FAI of an answer, and at one drawn at random from a seed, attention to
the token is suppressed and the divergence of all later predictions is measured. What is left to others: the
measure (attnprobe.knockout_divergence) and its table (tables).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import attnprobe
from attnprobe.analysis.chosen_positions import choose_positions
from attnprobe.models import LoadedModel
from attnprobe.progress import progress_bar
from experiments.rhythm.measure import batch_of
from experiments.rhythm.records import append_record, read_records

DRAWN = 1
MIN_REMAINING = 10


def suppress(
    loaded: LoadedModel,
    records: Sequence[dict[str, Any]],
    scores: attnprobe.TokenScores,
    batch: attnprobe.TokenBatch,
    path: Path,
) -> list[dict[str, Any]]:
    """Measure the answers that have not been measured, and return the records of all."""
    done = {record["problem"]: record for record in read_records(path)}
    with progress_bar("suppressing", len(records), shown=True) as advance:
        for example, record in enumerate(records):
            if record["problem"] not in done:
                entry = _of_answer(loaded, record, scores, batch, example)
                append_record(path, entry)
                done[record["problem"]] = entry
            advance()
    return [done[record["problem"]] for record in records]


def _of_answer(
    loaded: LoadedModel,
    record: dict[str, Any],
    scores: attnprobe.TokenScores,
    batch: attnprobe.TokenBatch,
    example: int,
) -> dict[str, Any]:
    chosen = choose_positions(batch, scores, example, min_remaining=MIN_REMAINING)
    kinds = {column: kind for kind, column in chosen}
    last = int(batch.response_mask[example].nonzero()[-1])
    allowed = [
        int(column)
        for column in (~scores.fai[example].isnan()).nonzero()[:, 0]
        if column not in kinds and last - int(column) >= MIN_REMAINING
    ]
    generator = torch.Generator().manual_seed(record["problem"])
    drawn = torch.randperm(len(allowed), generator=generator)[:DRAWN].tolist()
    columns = [*kinds, *(allowed[i] for i in drawn)]
    alone = batch_of(loaded, [record])
    asked = torch.zeros_like(alone.response_mask)
    asked[0, columns] = True
    divergence = attnprobe.knockout_divergence(loaded.model, alone, asked, horizon=(10, None))
    start = len(record["prompt_ids"])
    return {
        "problem": record["problem"],
        "length": len(record["response_ids"]),
        "tokens": [
            {
                "kind": kinds.get(column, "drawn"),
                "position": column - start,
                "fai": float(scores.fai[example, column]),
                "divergence": float(divergence[0, column]),
            }
            for column in columns
        ],
    }

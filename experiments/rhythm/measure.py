"""The second step: measure every head on every answer, one answer at a time, each stored in a file.

An answer is measured under two settings. The files are large (every head, every token) and stay in the work
folder; what the estimates need is small and goes to the results. What is left to others: answers (generate),
and which scores are made of the statistics (choices).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attnprobe
from attnprobe.models import LoadedModel
from attnprobe.progress import progress_bar

# In shorter answers hardly any token has much text after it.
MIN_TOKENS = 60

SETTINGS: dict[str, dict[str, Any]] = {
    "end": {"horizon": (10, None), "receiver": "token", "span_ignores": ("first",)},
    "near": {"horizon": (10, 100), "receiver": "sentence"},
}
"""The horizon of the paper's analysis, which runs to the end of the response, and that of its training; at the
same time, the two kinds of receiver heads."""


@dataclass(frozen=True)
class Measured:
    """All answers as one batch, and their statistics by setting."""

    batch: attnprobe.TokenBatch
    statistics: dict[str, attnprobe.HeadStatistics]
    problems: list[int]


def long_enough(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the answers that are long enough to be measured."""
    return [record for record in records if len(record["response_ids"]) >= MIN_TOKENS]


def batch_of(loaded: LoadedModel, records: Sequence[dict[str, Any]]) -> attnprobe.TokenBatch:
    """Return answers with their prompts as a batch."""
    import torch

    return attnprobe.TokenBatch.from_ids(
        [record["prompt_ids"] + record["response_ids"] for record in records],
        response_start=torch.tensor([len(record["prompt_ids"]) for record in records]),
        tokenizer=loaded.tokenizer,
    )


def measure(
    loaded: LoadedModel, records: Sequence[dict[str, Any]], work: Path, *, progress: bool = True
) -> Measured:
    """Measure the answers that have not been measured, and return the statistics of all."""
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[attnprobe.HeadStatistics]] = {name: [] for name in SETTINGS}
    with progress_bar("measuring", len(records) * len(SETTINGS), shown=progress) as advance:
        for record in records:
            batch = batch_of(loaded, [record])
            for name, options in SETTINGS.items():
                path = work / f"{record['problem']:04}-{name}.safetensors"
                if not path.exists():
                    attnprobe.measure(loaded.model, batch, **options).save(path)
                found[name].append(attnprobe.HeadStatistics.load(path))
                advance()
    statistics = {name: attnprobe.HeadStatistics.concatenate(parts) for name, parts in found.items()}
    return Measured(batch_of(loaded, records), statistics, [record["problem"] for record in records])

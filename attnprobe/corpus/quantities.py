"""What a corpus is like, in numbers that can be averaged: sums over its rows, in a bounded number of blocks.

Every quantity is a ratio of two sums over rows, such as the sum of WAAD and the number of tokens with one.
Rows are added up in at most 1,000 blocks, whose spread says how much a quantity would vary over other rows:
a corpus of any size takes the same memory, and up to 1,000 rows each block is one row. `summarize` and
`compare` use this. What is left to others: intervals (analysis.bootstrap).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.corpus.reading import CorpusScores
from attnprobe.corpus.schema import padded_column, scores_of
from attnprobe.provenance import Provenance
from attnprobe.rhythm import near_preplans

BLOCKS = 1000

QUANTITIES = {
    "response_tokens": "tokens of a response",
    "waad": "WAAD of a token, in tokens",
    "fai": "FAI of a token",
    "entropy": "entropy of a token, in nats",
    "preplan_share": "share of tokens that are preplans",
    "anchor_share": "share of tokens that are anchors",
    "entropy_at_preplans": "entropy at preplans, in nats",
    "anchor_after_preplan": "share of anchors at a preplan or one token after it",
    "local_span": "span of the local heads, in tokens",
    "global_span": "span of the global heads, in tokens",
    "local_first_share": "share of the local heads' attention on the first token",
    "global_first_share": "share of the global heads' attention on the first token",
}
"""The quantities, and what each is a mean of."""


@dataclass(frozen=True)
class BlockSums:
    """Sums of every quantity over blocks of rows.

    Attributes:
        above, below: the two sums whose ratio a quantity is.
        span_totals, span_counts: the span of every head: its sum over rows, and their number; None if it was
            not kept.
        rows: how many rows there are.
    """

    above: Float[Tensor, "block quantity"]
    below: Float[Tensor, "block quantity"]
    span_totals: Float[Tensor, "block head"] | None
    span_counts: Float[Tensor, "block head"] | None
    rows: int

    def of(self, name: str) -> tuple[Float[Tensor, " block"], Float[Tensor, " block"]]:
        """Return the two sums of a quantity."""
        place = list(QUANTITIES).index(name)
        return self.above[:, place], self.below[:, place]


BlockOf = Callable[[Any, int], Tensor]
"""Says which block each row of a table is in, and -1 for rows to leave out; is told how many came before."""


def in_turn(table: Any, before: int) -> Tensor:
    """Put rows into blocks by turns."""
    return torch.arange(before, before + table.num_rows) % BLOCKS


def block_sums(
    scores: CorpusScores,
    block_of: BlockOf = in_turn,
    seen: Callable[[Any], None] | None = None,
) -> BlockSums:
    """Return the sums over a corpus, a shard at a time; `seen` is shown each shard's table."""
    above = torch.zeros(BLOCKS, len(QUANTITIES), dtype=torch.float64)
    below = torch.zeros_like(above)
    spans: Tensor | None = None
    counts: Tensor | None = None
    provenance = scores.provenance
    rows = used = 0
    for table in scores.tables():
        if table.num_rows == 0:
            continue
        block = block_of(table, rows)
        rows += int((block >= 0).sum())
        inside = block >= 0
        used = max(used, int(block.max()) + 1)
        sums = _row_sums(table, provenance)
        for place, name in enumerate(QUANTITIES):
            if name in sums:
                for total, values in zip((above, below), sums[name], strict=True):
                    total[:, place].index_add_(0, block[inside], values.double()[inside])
        span = padded_column(table, "span")
        if span is not None:
            if spans is None or counts is None:
                spans = torch.zeros(BLOCKS, span.shape[1], dtype=torch.float64)
                counts = torch.zeros_like(spans)
            spans.index_add_(0, block[inside], span.double().nan_to_num()[inside])
            counts.index_add_(0, block[inside], (~span.isnan()).double()[inside])
        if seen is not None:
            seen(table)
    return BlockSums(
        above[:used],
        below[:used],
        None if spans is None else spans[:used],
        None if counts is None else counts[:used],
        rows,
    )


def _row_sums(table: Any, provenance: Provenance) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Return the two sums of each quantity that is known, for each row of a table."""
    tokens = scores_of(table, provenance)
    assert tokens is not None
    inside = tokens.response_mask
    length = inside.sum(1)
    one = torch.ones(len(length))
    preplan, anchor = padded_column(table, "preplan"), padded_column(table, "anchor")
    assert preplan is not None
    assert anchor is not None
    preplan, anchor = preplan.bool(), anchor.bool()
    near = near_preplans(preplan, inside, 1)
    found = {
        "response_tokens": (length, one),
        "waad": _mean(tokens.waad),
        "fai": _mean(tokens.fai),
        "preplan_share": (preplan.sum(1), length),
        "anchor_share": (anchor.sum(1), length),
        "anchor_after_preplan": ((anchor & near).sum(1), anchor.sum(1)),
    }
    if tokens.entropy is not None:
        found["entropy"] = _mean(tokens.entropy)
        found["entropy_at_preplans"] = _mean(tokens.entropy.masked_fill(~preplan, torch.nan))
    for column, name in (("span", "span"), ("first_token_share", "first_share")):
        values = padded_column(table, column)
        if values is None:
            continue
        for group in ("local", "global"):
            chosen = values[:, _places(provenance, group, values.shape[1])]
            found[f"{group}_{name}"] = (
                chosen.double().nanmean(1).nan_to_num(),
                (~chosen.isnan().all(1)).double(),
            )
    return found


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.double().nansum(1), (~values.isnan()).sum(1)


def _places(provenance: Provenance, group: str, width: int) -> list[int]:
    """Return where the heads of a group are among those of all layers."""
    each = width // len(provenance.layers)
    return [provenance.layers.index(layer) * each + head for layer, head, _ in provenance.heads[group]]

"""Scorer: rows in, a table of scores out, a few rows through the model at a time.

`score` runs one over the windows of a corpus, and the stages of other engines over whatever they hand it.
Of each micro-batch only the scores are kept, so memory does not grow with the rows. Rows that the model
cannot read, such as those whose attention is not finite, are found and rejected one by one.
What is left to others: which rows run together (batching), the statistics (measurement), the heads
(grouping) and the table's columns (schema).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnprobe.adapters.base import Adapter
from attnprobe.batch import TokenBatch
from attnprobe.corpus.batching import Budget, micro_batches
from attnprobe.corpus.rows import Row
from attnprobe.corpus.schema import HEAD_COLUMNS, score_table, table_schema
from attnprobe.corpus.settings import CorpusSettings
from attnprobe.errors import PatternError
from attnprobe.head_groups import HeadGroups
from attnprobe.head_statistics import HeadStatistics
from attnprobe.measurement import measure
from attnprobe.rhythm import find_rhythm
from attnprobe.rl.credit import credit_of
from attnprobe.scores import score_tokens

Advance = Callable[[int, int], None]
"""Is told how many rows and tokens have been run."""


def _nothing(rows: int, tokens: int) -> None:
    pass


@dataclass(frozen=True)
class Scored:
    """The table of some rows, and what went through the model for it.

    Attributes:
        table: a line for each row, in their order.
        tokens: how many tokens were run, prompts included.
        padding: how many positions of padding were run with them.
        rejected: how many of the rows were rejected.
    """

    table: Any
    tokens: int
    padding: int
    rejected: int


class Scorer:
    """Scores rows with one model, by one grouping of its heads.

    Args:
        adapter: of the model.
        settings: what is computed.
        budget: how much runs at a time.
    """

    def __init__(self, adapter: Adapter, settings: CorpusSettings, budget: Budget) -> None:
        self._adapter, self._settings, self._budget = adapter, settings, budget

    def score(self, rows: Sequence[Row], groups: HeadGroups, advance: Advance = _nothing) -> Scored:
        """Return the scores of rows, in their order."""
        settings = self._settings
        found: dict[int, dict[str, Any]] = {}
        rejected: dict[int, str] = {}
        tokens = padding = 0
        for places in micro_batches(rows, self._adapter, self._budget, entropy=settings.entropy):
            for part, statistics in self._measured(rows, places, rejected, groups):
                lengths = [rows[place].length for place in part]
                tokens += sum(lengths)
                padding += max(lengths) * len(lengths) - sum(lengths)
                columns = self._columns(statistics, groups)
                for index, place in enumerate(part):
                    found[place] = _cut(columns, index, rows[place])
                advance(len(part), sum(lengths))
        advance(len(rows) - len(found), 0)
        rows = [replace(row, rejected=rejected.get(place, row.rejected)) for place, row in enumerate(rows)]
        schema = table_schema(self.provenance(groups))
        return Scored(score_table(rows, found, schema), tokens, padding, len(rows) - len(found))

    def spans(
        self, rows: Sequence[Row], advance: Advance = _nothing, rejected: dict[int, str] | None = None
    ) -> Iterator[HeadStatistics]:
        """Yield what heads are grouped by, a micro-batch at a time; rows that cannot be read are left out.

        `rejected` is told why, by the row's place.
        """
        skipped: dict[int, str] = {} if rejected is None else rejected
        run = 0
        for places in micro_batches(rows, self._adapter, self._budget, entropy=False):
            for part, statistics in self._measured(rows, places, skipped, None):
                yield statistics
                run += len(part)
                advance(len(part), sum(rows[place].length for place in part))
        advance(len(rows) - run, 0)

    def provenance(self, groups: HeadGroups) -> dict[str, Any]:
        """Return what the scores are computed from, as JSON can hold it."""
        heads = {
            name: groups[name].heads
            for name in ("local", "global", "receiver")
            if getattr(groups, f"{name}_heads") is not None
        }
        return {
            "model_name": self._adapter.model_name,
            "layers": list(groups.layers),
            "head_count": groups.head_count,
            "window": self._settings.window,
            "horizon": list(self._settings.horizon),
            "align": self._settings.align,
            "peak_quantile": self._settings.peak_quantile,
            "lookback": self._settings.lookback,
            "heads": heads,
        }

    def _measured(
        self, rows: Sequence[Row], places: list[int], rejected: dict[int, str], groups: HeadGroups | None
    ) -> Iterator[tuple[list[int], HeadStatistics]]:
        """Yield the statistics of rows that run together; of halves of them, if they cannot.

        Without groups, what heads are grouped by.
        """
        settings = self._settings
        ignoring = groups is None and settings.head_span == "ignoring"
        try:
            statistics = measure(
                self._adapter,
                _batch([rows[place] for place in places]),
                layers=settings.layers if groups is None else groups.layers,
                window=settings.window,
                horizon=settings.horizon,
                receiver=groups is None and settings.receivers,
                entropy=groups is not None and settings.entropy,
                span=groups is None or settings.head_values,
                share_on=("first",) if groups is None or settings.head_values else (),
                span_ignores=("first",) if ignoring else (),
                batch_size=len(places),
            )
        except torch.OutOfMemoryError:
            problem = f"too long: its {rows[places[-1]].length} tokens do not fit into memory"
        except PatternError as error:
            problem = f"the model cannot read it: {error}"
        else:
            yield places, statistics
            return
        if len(places) == 1:
            rejected[places[0]] = problem
            return
        half = len(places) // 2
        for part in (places[:half], places[half:]):
            yield from self._measured(rows, part, rejected, groups)

    def _columns(self, statistics: HeadStatistics, groups: HeadGroups) -> dict[str, Tensor]:
        """Return the columns of rows that were measured: by token, or by head."""
        settings = self._settings
        # Peaks are found on the processor: there is little to compute, in many small steps.
        scores = score_tokens(statistics, groups, align=settings.align).to("cpu")
        rhythm = find_rhythm(scores, quantile=settings.peak_quantile, lookback=settings.lookback)
        columns = {
            "waad": scores.waad,
            "fai": scores.fai,
            "entropy": scores.entropy,
            "receiver_fai": scores.receiver_fai,
            "gamma": None if settings.credit is None else credit_of(settings.credit, scores),
            "preplan": rhythm.preplan,
            "anchor": rhythm.anchor,
        }
        if settings.head_values:
            columns["span"] = None if statistics.span is None else statistics.span.flatten(1)
            columns["first_token_share"] = statistics.share("first").flatten(1)
        return {name: values.cpu() for name, values in columns.items() if values is not None}


def _batch(rows: Sequence[Row]) -> TokenBatch:
    """Return rows as a right-padded batch."""
    width = max(row.length for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : row.length] = torch.tensor(row.prompt + row.response)
    column = torch.arange(width)
    ends = torch.tensor([row.length for row in rows])[:, None]
    starts = torch.tensor([len(row.prompt) for row in rows])[:, None]
    return TokenBatch(ids, column < ends, (column >= starts) & (column < ends))


def _cut(columns: Mapping[str, Tensor], index: int, row: Row) -> dict[str, Any]:
    """Return the values of one row: of its response, or of all heads."""
    own = slice(len(row.prompt), row.length)
    return {
        name: _as_array(values[index] if name in HEAD_COLUMNS else values[index, own])
        for name, values in columns.items()
    }


def _as_array(values: Tensor) -> Any:
    """Return a tensor as an array; half precision as single."""
    return (values.float() if values.is_floating_point() else values).numpy()

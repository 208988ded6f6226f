"""Which heads a corpus is scored by: grouped over all its rows, over a sample of them, or given.

`score` calls `find_groups` before the first row is scored. Grouping over the corpus is a pass of its own,
which keeps only sums and can be interrupted like everything else. What is left to others: ranking heads
(heads), how stable a ranking is (analysis.agreement), and the statistics of rows (scorer).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.adapters.base import Adapter, resolve_layers
from attnprobe.analysis.agreement import stability_of
from attnprobe.corpus.fingerprints import groups_fingerprint
from attnprobe.corpus.folder import ScoreFolder
from attnprobe.corpus.rows import Row
from attnprobe.corpus.scorer import Advance, Scorer
from attnprobe.corpus.settings import CorpusSettings
from attnprobe.corpus.sources import Source
from attnprobe.errors import ParameterError, ResultError
from attnprobe.head_groups import HeadGroups
from attnprobe.head_statistics import HeadStatistics
from attnprobe.heads import group_heads, warn_of_sinks
from attnprobe.results import Result
from attnprobe.storage import PathLike
from attnprobe.validation import IntLike, brief, whole_number

if TYPE_CHECKING:
    CorpusGroups: TypeAlias = HeadGroups | PathLike | IntLike
else:
    CorpusGroups = Any

Rows = Callable[[int], list[Row]]
"""Reads the rows of a window."""


@dataclass(frozen=True)
class Grouping:
    """How heads are grouped, as a run's manifest tells it.

    Attributes:
        given: the groups, if they were found elsewhere.
        sample: over how many rows heads are grouped; None for all.
        seed: of the choice of these rows.
    """

    given: HeadGroups | None = None
    sample: int | None = None
    seed: int = 0

    @staticmethod
    def of(groups: CorpusGroups, seed: int = 0) -> Grouping:
        """Return how to group heads: "corpus", a number of rows, groups, or the file of some.

        Raises:
            ParameterError: anything else.
            ResultError: a file that holds no groups.
        """
        if isinstance(groups, str) and groups == "corpus":
            return Grouping()
        if isinstance(groups, HeadGroups):
            return Grouping(groups)
        if isinstance(groups, str | os.PathLike):
            return Grouping(HeadGroups.load(groups))
        try:
            return Grouping(None, whole_number(groups, "groups", minimum=2), seed)
        except ParameterError:
            raise ParameterError(
                'groups must be "corpus", a number of rows (at least 2), HeadGroups, or the path of saved '
                f"ones; got {brief(groups)}"
            ) from None

    def describe(self) -> dict[str, Any]:
        """Return what the manifest tells of it."""
        if self.given is not None:
            return {"by": "given", "groups": groups_fingerprint(self.given)}
        if self.sample is not None:
            return {"by": "sample", "rows": self.sample, "seed": self.seed}
        return {"by": "corpus"}


def check_given(groups: HeadGroups, settings: CorpusSettings, adapter: Adapter | None = None) -> None:
    """Check that saved groups fit a model, and that no setting asks for what only a new grouping would give.

    Settings that are at their defaults ask for nothing: the groups' own layers, share and span then hold.
    Without an adapter, as long as the model is not loaded, layers are not checked.

    Raises:
        ResultError: groups of other layers, another number of heads, or another model.
        ParameterError: settings that the groups contradict.
    """
    if adapter is not None:
        groups.check_fits(adapter.layers, adapter.head_count, adapter.model_name)
    usual, wrong = CorpusSettings(), []
    if settings.receivers and groups.receiver_heads is None:
        wrong.append("receivers are asked for, but the groups have none")
    if adapter is not None and settings.layers != usual.layers:
        asked = tuple(resolve_layers(settings.layers, adapter))
        if asked != tuple(groups.layers):
            wrong.append(f"layers are {list(asked)}, but those of the groups are {list(groups.layers)}")
    if settings.head_quantile not in (usual.head_quantile, groups.quantile):
        wrong.append(
            f"head_quantile is {settings.head_quantile}, but that of the groups is {groups.quantile}"
        )
    if settings.head_span == "ignoring" and not groups.span_ignores:
        wrong.append('head_span is "ignoring", but the groups were made by plain spans')
    if wrong:
        raise ParameterError(
            f"the saved groups do not go with the settings: {'; '.join(wrong)}. Leave the settings out, or "
            'group heads anew (groups="corpus")'
        )


def find_groups(
    grouping: Grouping,
    folder: ScoreFolder,
    source: Source,
    rows: Rows,
    scorer: Scorer,
    settings: CorpusSettings,
    advance: Advance,
) -> HeadGroups:
    """Return the head groups of a run: those of its folder, or new ones, which are saved there.

    Raises:
        ResultError: saved groups that are damaged, or no row that heads could be grouped by.
    """
    if folder.groups_path.is_file():
        return HeadGroups.load(folder.groups_path)
    if grouping.given is not None:
        groups = grouping.given
    elif grouping.sample is not None:
        groups = _groups_of_sample(grouping, folder, source, rows, scorer, settings, advance)
    else:
        groups = _groups_of_corpus(folder, source, rows, scorer, settings, advance)
    groups.save(folder.groups_path)
    folder.sums_path.unlink(missing_ok=True)
    return groups


@dataclass(frozen=True, eq=False, repr=False)
class SpanSums(Result):
    """Sums over responses by which heads are grouped, and how far the pass has come.

    Attributes:
        totals, counts: of each quantity, the sum over the responses where it is defined, and their number.
        quantities: what they are sums of: "span", "first", and with receivers "kurtosis" and "gini".
        layers, model_name: those that were measured.
        next_window: the first window that is not part of the sums.
    """

    totals: Float[Tensor, "quantity layer head"]
    counts: Float[Tensor, "quantity layer head"]
    quantities: tuple[str, ...]
    layers: tuple[int, ...]
    model_name: str
    next_window: int = 0

    def mean(self, quantity: str) -> Float[Tensor, "layer head"] | None:
        """Return the mean over responses of a quantity; None if it was not measured."""
        if quantity not in self.quantities:
            return None
        place = self.quantities.index(quantity)
        counts = self.counts[place]
        return (self.totals[place] / counts.masked_fill(counts == 0, torch.nan)).float()


def add_spans(
    sums: SpanSums | None, statistics: Iterable[HeadStatistics], settings: CorpusSettings
) -> SpanSums | None:
    """Return sums with some more responses; None if there are none at all."""
    for part in statistics:
        values = {
            "span": part.span_ignoring if settings.head_span == "ignoring" else part.span,
            "first": part.share("first"),
            "kurtosis": part.receiver_kurtosis,
            "gini": part.receiver_gini,
        }
        stacked = torch.stack([each.double().cpu() for each in values.values() if each is not None])
        totals, counts = stacked.nansum(1), (~stacked.isnan()).sum(1).double()
        if sums is None:
            names = tuple(name for name, each in values.items() if each is not None)
            sums = SpanSums(totals, counts, names, part.layers, part.model_name)
        else:
            sums = replace(sums, totals=sums.totals + totals, counts=sums.counts + counts)
    return sums


class _Reasons:
    """The first reasons why rows were not read: all that there is to say if none was."""

    def __init__(self) -> None:
        self.first: list[str] = []

    def of(self, scorer: Scorer, rows: list[Row], advance: Advance) -> Iterator[HeadStatistics]:
        """Yield what heads are grouped by, as `Scorer.spans`, and note what was not read."""
        unread: dict[int, str] = {}
        yield from scorer.spans(rows, advance, unread)
        for place, row in enumerate(rows):
            reason = unread.get(place, row.rejected)
            if reason is not None and len(self.first) < 3:
                self.first.append(f"row {row.number}: {reason}")


def groups_of(sums: SpanSums | None, settings: CorpusSettings, reasons: Iterable[str] = ()) -> HeadGroups:
    """Return the groups that sums over responses give, by the rules of `classify_heads`.

    `reasons` say why rows were not read.

    Raises:
        ResultError: there is no response.
    """
    span = None if sums is None else sums.mean("span")
    if sums is None or span is None:
        raise ResultError(
            f"no row could be read, so there is nothing to group heads by. {'; '.join(reasons)}"
        )
    groups = group_heads(span, sums.mean("kurtosis"), gini=sums.mean("gini"), quantile=settings.head_quantile)
    first = sums.mean("first")
    if first is not None and settings.head_span == "plain":
        remedy = 'CorpusSettings(head_span="ignoring"), or --head-span ignoring'
        warn_of_sinks(groups.global_heads, first, remedy)
    return replace(
        groups,
        layers=sums.layers,
        model_name=sums.model_name,
        receiver_level="token" if settings.receivers else None,
        span_ignores=("first",) if settings.head_span == "ignoring" else (),
    )


def _groups_of_corpus(
    folder: ScoreFolder,
    source: Source,
    rows: Rows,
    scorer: Scorer,
    settings: CorpusSettings,
    advance: Advance,
) -> HeadGroups:
    """Group heads over all rows; after each window, the sums are saved."""
    sums: SpanSums | None = None
    if folder.sums_path.is_file():
        # Damaged ones cost a pass, nothing else.
        try:
            sums = SpanSums.load(folder.sums_path)
        except ResultError:
            folder.sums_path.unlink()
    first = 0 if sums is None else sums.next_window
    advance(sum(source.rows_in(window) for window in range(first)), 0)
    reasons = _Reasons()
    for window in range(first, source.window_count):
        read = rows(window)
        sums = add_spans(sums, reasons.of(scorer, read, advance), settings)
        # Blank lines.
        advance(source.rows_in(window) - len(read), 0)
        if sums is not None:
            sums = replace(sums, next_window=window + 1)
            sums.save(folder.sums_path)
    return groups_of(sums, settings, reasons.first)


def _groups_of_sample(
    grouping: Grouping,
    folder: ScoreFolder,
    source: Source,
    rows: Rows,
    scorer: Scorer,
    settings: CorpusSettings,
    advance: Advance,
) -> HeadGroups:
    """Group heads over rows drawn at random, and save how stable their grouping is."""
    assert grouping.sample is not None
    count = min(grouping.sample, source.row_count)
    drawn = sorted(random.Random(grouping.seed).sample(range(source.row_count), count))
    chosen: dict[int, set[int]] = {}
    for number in drawn:
        chosen.setdefault(number // source.rows_per_window, set()).add(number)
    sums: SpanSums | None = None
    spans, kurtoses = [], []
    reasons = _Reasons()
    for window, numbers in chosen.items():
        read = [row for row in rows(window) if row.number in numbers]
        parts = list(reasons.of(scorer, read, advance))
        # Blank lines.
        advance(len(numbers) - len(read), 0)
        sums = add_spans(sums, parts, settings)
        for part in parts:
            span = part.span_ignoring if settings.head_span == "ignoring" else part.span
            assert span is not None
            spans.append(span.double().cpu())
            if part.receiver_kurtosis is not None:
                kurtoses.append(part.receiver_kurtosis.double().cpu())
    groups = groups_of(sums, settings, reasons.first)
    if sum(map(len, spans)) > 1:
        stability = stability_of(
            torch.cat(spans),
            torch.cat(kurtoses) if kurtoses else None,
            layers=groups.layers,
            model_name=groups.model_name,
            quantile=settings.head_quantile,
        )
        stability.save(folder.stability_path)
    return groups

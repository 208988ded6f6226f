"""`score`: a whole corpus, from a file of rows to a folder of scores, one window of rows at a time.

Windows are of a fixed number of rows in the order of the input. Each becomes one shard of the output, so that
an interrupted run loses one window's work at most, and the same call continues it. Users and the command line
call this. What is left to others: reading (sources, rows), scoring (scorer), the files (folder), grouping
(grouping), and what is made of the scores (reading, summary, comparison).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnprobe.adapters import adapter_for
from attnprobe.adapters.base import resolve_layers
from attnprobe.corpus.bar import corpus_bar
from attnprobe.corpus.batching import Budget
from attnprobe.corpus.fingerprints import groups_fingerprint, model_fingerprint, tokenizer_fingerprint
from attnprobe.corpus.folder import ScoreFolder, open_folder, write_shard
from attnprobe.corpus.grouping import CorpusGroups, Grouping, Rows, check_given, find_groups
from attnprobe.corpus.loading import check_place, model_and_tokenizer, source_of
from attnprobe.corpus.rows import Columns, Row, RowReader, check_fields
from attnprobe.corpus.schema import SCHEMA_VERSION
from attnprobe.corpus.scorer import Scorer
from attnprobe.corpus.settings import CorpusSettings
from attnprobe.corpus.sources import ROWS_PER_SHARD, Source, open_source
from attnprobe.head_groups import HeadGroups
from attnprobe.models import DeviceLike, DtypeLike
from attnprobe.storage import PathLike, import_pyarrow
from attnprobe.validation import IntLike, instance, truth, whole_number


@dataclass(frozen=True)
class CorpusRun:
    """What a folder of scores holds, once all rows have been through the model.

    Attributes:
        folder: where it is.
        rows, rejected: how many rows there are, and how many of them could not be scored.
        tokens, padding: how many tokens were run, prompts included, and how many positions of padding.
        continued: how many of the rows were there from an earlier run.
        groups: the head groups.
    """

    folder: Path
    rows: int
    rejected: int
    tokens: int
    padding: int
    continued: int
    groups: HeadGroups

    @property
    def padding_share(self) -> float:
        """The share of what was run that is padding."""
        return self.padding / max(1, self.padding + self.tokens)

    def __repr__(self) -> str:
        return (
            f"CorpusRun({self.folder}: {self.rows} rows, {self.rejected} rejected, {self.tokens} tokens, "
            f"{self.padding_share:.1%} padding)"
        )


def score(
    source: PathLike,
    output: PathLike,
    *,
    model: Any = None,
    tokenizer: Any = None,
    groups: CorpusGroups = "corpus",
    settings: CorpusSettings | None = None,
    columns: Columns | None = None,
    rows_per_shard: IntLike = ROWS_PER_SHARD,
    token_budget: IntLike | None = None,
    memory_budget: IntLike | None = None,
    seed: IntLike = 0,
    device: DeviceLike | None = None,
    dtype: DtypeLike | None = None,
    groups_only: bool = False,
    progress: bool = False,
) -> CorpusRun:
    """Score every row of a file or folder, and write the scores to a folder; or continue doing so.

    Args:
        source: JSON lines, Parquet, or a folder of either, or one that `datasets` saved.
        output: the folder of scores; new, or begun by the same call.
        model: a model that an adapter knows; or what `load_model` loads: a path or a name, or None for the
            packaged SmolLM2.
        tokenizer: of the model, for rows of text; known if the model is loaded here.
        groups: by which heads to score. "corpus": grouped over all rows, which is a pass of its own; a
            number: grouped over so many rows, drawn at random; or `HeadGroups`, or the file of some.
        settings: what is computed.
        columns: the names of the fields of a row.
        rows_per_shard: how many rows a shard holds: what is lost at most when a run is interrupted, and
            among how many rows those of similar length are found.
        token_budget, memory_budget: how much runs at a time; default: by the device. They change scores by
            rounding only, and may differ between runs that continue each other.
        seed: of the rows that are drawn for grouping.
        device, dtype: where a model that is loaded here runs, and in which numbers, as for `load_model`.
        groups_only: whether to stop when the heads are grouped, `scores/groups.safetensors`; the same call
            without it continues.
        progress: whether to show a progress bar.

    Raises:
        ParameterError: arguments that make no sense, such as settings that saved groups contradict, or a
            named field that no row has.
        ResultError: an input that cannot be read, or no row of it; an output that cannot be written, that
            another run is writing, or that was begun with something else.
        UnsupportedModelError: a model whose attention cannot be read, or entropy without next-token logits.
        ModelLoadError: a model that cannot be loaded.
        MissingDependencyError: pyarrow is not installed.
    """
    truth(groups_only, "groups_only")
    truth(progress, "progress")
    check_place(device, dtype)
    plan = Plan.of(
        source,
        groups=groups,
        settings=settings,
        columns=columns,
        rows_per_shard=rows_per_shard,
        token_budget=token_budget,
        memory_budget=memory_budget,
        seed=seed,
    )
    with open_folder(output) as folder:
        # What can be wrong without the model is found before it is loaded.
        folder.check(plan.manifest)
        if folder.is_empty:
            check_fields(plan.source, plan.columns)
        job = plan.job(model, tokenizer, device=device, dtype=dtype, progress=progress)
        folder.begin(job.manifest)
        found = job.groups(folder, progress=progress)
        fingerprint = groups_fingerprint(found)
        folder.find_finished(fingerprint)
        continued = sum(entry.rows for entry in folder.entries)
        finished = sum(folder.rows_of(entry.shard) for entry in folder.entries)
        todo = [] if groups_only else [n for n in range(job.source.window_count) if not folder.is_finished(n)]
        with corpus_bar("scoring", job.source.row_count, shown=progress, finished=finished) as advance:
            for window, rows in zip(todo, read_ahead(todo, job.rows), strict=True):
                scored = job.scorer.score(rows, found, advance)
                folder.enter(write_shard(folder.path, window, scored, fingerprint))
                # Blank lines.
                advance(folder.rows_of(window) - len(rows), 0)
        return run_of(folder, found, continued)


@dataclass(frozen=True)
class Plan:
    """What is to be scored, checked as far as it can be without the model.

    Attributes:
        source: the rows.
        grouping: how heads are grouped.
        settings: what is computed.
        columns: the names of the fields of a row.
        budgets: how many tokens and bytes run at a time; None by the device.
        manifest: all of this, as a folder of scores remembers it.
    """

    source: Source
    grouping: Grouping
    settings: CorpusSettings
    columns: Columns
    budgets: tuple[int | None, int | None]
    manifest: dict[str, Any]

    @staticmethod
    def of(
        source: PathLike,
        *,
        groups: CorpusGroups = "corpus",
        settings: CorpusSettings | None = None,
        columns: Columns | None = None,
        rows_per_shard: IntLike = ROWS_PER_SHARD,
        token_budget: IntLike | None = None,
        memory_budget: IntLike | None = None,
        seed: IntLike = 0,
    ) -> Plan:
        """Check the arguments of `score`, and open the input; raises what `score` does."""
        import_pyarrow()
        settings = instance(settings or CorpusSettings(), CorpusSettings, "settings")
        columns = instance(columns or Columns(), Columns, "columns")
        grouping = Grouping.of(groups, whole_number(seed, "seed"))
        if grouping.given is not None:
            check_given(grouping.given, settings)
        rows_per_shard = whole_number(rows_per_shard, "rows_per_shard", minimum=1)
        given = {"token_budget": token_budget, "memory_budget": memory_budget}
        tokens, memory = (
            None if value is None else whole_number(value, name, minimum=1) for name, value in given.items()
        )
        opened = open_source(source, rows_per_shard)
        manifest = {
            "schema": SCHEMA_VERSION,
            "input": opened.files,
            "source": str(Path(source).absolute()),
            "row_count": opened.row_count,
            "rows_per_shard": opened.rows_per_window,
            "columns": columns.describe(),
            "settings": settings.describe(),
            "grouping": grouping.describe(),
        }
        return Plan(opened, grouping, settings, columns, (tokens, memory), manifest)

    def job(
        self,
        model: Any = None,
        tokenizer: Any = None,
        *,
        device: DeviceLike | None = None,
        dtype: DtypeLike | None = None,
        progress: bool = False,
    ) -> Job:
        """Load the model, and check that all of it can be done with it; raises what `score` does."""
        came_from = source_of(model)
        model, tokenizer = model_and_tokenizer(
            model, tokenizer, device=device, dtype=dtype, progress=progress
        )
        adapter = adapter_for(model)
        settings = self.settings
        resolve_layers(settings.layers, adapter)
        if settings.entropy:
            adapter.check_next_token_logits("entropy", "pass CorpusSettings(entropy=False), or ")
        if self.grouping.given is not None:
            check_given(self.grouping.given, settings, adapter)
        manifest = {
            **self.manifest,
            "model": model_fingerprint(model, adapter),
            "model_source": came_from,
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
        return Job(
            self.source,
            RowReader.of(
                model, adapter, tokenizer, self.columns, chat=settings.chat, longest=settings.longest
            ),
            Scorer(adapter, settings, Budget.of(adapter, *self.budgets)),
            self.grouping,
            settings,
            manifest,
        )


@dataclass(frozen=True)
class Job:
    """What it takes to score windows of a corpus: input, model, settings; `Plan.job` makes one.

    Attributes:
        source: the rows.
        reader: how they become tokens.
        scorer: how tokens become scores.
        grouping: how heads are grouped.
        settings: what is computed.
        manifest: all of this, as a folder of scores remembers it.
    """

    source: Source
    reader: RowReader
    scorer: Scorer
    grouping: Grouping
    settings: CorpusSettings
    manifest: dict[str, Any]

    def rows(self, window: int) -> list[Row]:
        """Return the rows of a window."""
        return self.reader.read(self.source.window(window))

    def groups(self, folder: ScoreFolder, *, progress: bool = False) -> HeadGroups:
        """Return the head groups of a folder, found now if there are none yet."""
        count = min(self.grouping.sample or self.source.row_count, self.source.row_count)
        is_new = self.grouping.given is None and not folder.groups_path.is_file()
        with corpus_bar("grouping", count, shown=progress and is_new) as advance:
            return find_groups(
                self.grouping, folder, self.source, self.rows, self.scorer, self.settings, advance
            )


def run_of(folder: ScoreFolder, groups: HeadGroups, continued: int) -> CorpusRun:
    """Return what a folder holds."""
    entries = folder.entries
    return CorpusRun(
        folder.path,
        rows=sum(entry.rows for entry in entries),
        rejected=sum(entry.rejected for entry in entries),
        tokens=sum(entry.tokens for entry in entries),
        padding=sum(entry.padding for entry in entries),
        continued=continued,
        groups=groups,
    )


def read_ahead(windows: Iterable[int], rows: Rows) -> Iterator[list[Row]]:
    """Yield the rows of windows, each read and tokenized while the one before is being scored."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="attnprobe-rows") as reading:
        waiting = None
        for window in itertools.chain(windows, [None]):
            following = None if window is None else reading.submit(rows, window)
            if waiting is not None:
                yield waiting.result()
            waiting = following

"""CorpusScores: reading a folder of scores, one shard at a time, into whatever you analyse tables with.

`load_scores`, which users call as `attnprobe.load_scores`, reads nothing but the manifest. What is left to
others: the columns (schema), writing (folder), and what is made of the scores (summary, comparison).
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attnprobe.corpus.folder import read_ledger, read_manifest, shard_path
from attnprobe.corpus.schema import metadata_of, scores_of, table_schema
from attnprobe.errors import MissingDependencyError, ParameterError, ResultError
from attnprobe.head_groups import HeadGroups
from attnprobe.provenance import Provenance
from attnprobe.scores import TokenScores
from attnprobe.storage import PathLike, as_path, import_pandas, import_pyarrow
from attnprobe.validation import brief


@dataclass(frozen=True, repr=False)
class CorpusScores:
    """The scores of a corpus, in a folder; a line for each row of the input.

    Attributes:
        folder: where they are.
        manifest: what they are of: input, model, tokenizer, settings.
        kept: the values of kept fields that rows must have; `where` adds to them.
    """

    folder: Path
    manifest: dict[str, Any]
    kept: tuple[tuple[str, Any], ...] = ()

    def __repr__(self) -> str:
        ledger = read_ledger(self.folder)
        rows, rejected = sum(each.rows for each in ledger), sum(each.rejected for each in ledger)
        chosen = "".join(f", where {name} is {value!r}" for name, value in self.kept)
        return f"CorpusScores({self.folder}: {rows} of {self.row_count} rows, {rejected} rejected{chosen})"

    @property
    def row_count(self) -> int:
        """The number of rows of the input."""
        return int(self.manifest["row_count"])

    @property
    def files(self) -> list[Path]:
        """The Parquet files of the finished shards."""
        return [shard_path(self.folder, entry.shard) for entry in read_ledger(self.folder)]

    @property
    def is_complete(self) -> bool:
        """Whether all rows of the input are there."""
        windows = -(-self.row_count // int(self.manifest["rows_per_shard"]))
        return len(self.files) == windows

    @property
    def groups(self) -> HeadGroups:
        """The head groups that the scores are of.

        Raises:
            ResultError: they are missing or damaged.
        """
        return HeadGroups.load(self.folder / "groups.safetensors")

    @property
    def provenance(self) -> Provenance:
        """What the scores were computed from."""
        from pyarrow import parquet

        files = self.files
        told = metadata_of(parquet.read_schema(files[0])) if files else {}
        if not told:
            return Provenance()
        low, high = told["horizon"]
        heads = {
            name: tuple((int(layer), int(head), float(weight)) for layer, head, weight in group)
            for name, group in told["heads"].items()
        }
        return Provenance(
            told["model_name"], tuple(told["layers"]), told["window"], (low, high), heads, told["align"]
        )

    def where(self, field: str, value: Any) -> CorpusScores:
        """Return the scores of the rows whose kept field has a value: `scores.where("correct", True)`.

        Raises:
            ParameterError: a field that was not kept.
        """
        known = self.manifest["columns"]["keep"]
        if field not in known:
            raise ParameterError(
                f"the field {field!r} was not kept; there are {', '.join(known) or 'none'}: "
                f"score(..., columns=Columns(keep=[{field!r}]))"
            )
        return replace(self, kept=(*self.kept, (field, value)))

    def tables(self, columns: Sequence[str] | None = None, *, rejected: bool = False) -> Iterator[Any]:
        """Yield an Arrow table for each shard.

        Args:
            columns: which columns to read; default: all.
            rejected: whether rows that could not be scored are there too.

        Raises:
            ParameterError: columns that there are not.
            ResultError: a shard that cannot be read.
        """
        from pyarrow import ArrowException, compute, parquet

        wanted = None if columns is None else _known(columns)
        needed = None if wanted is None else list(dict.fromkeys([*wanted, "rejected", "kept"]))
        for file in self.files:
            try:
                # Not as a data set, which would take the folder's name for a column.
                table = parquet.ParquetFile(file).read(columns=needed)
            except (OSError, ArrowException) as error:
                raise ResultError(f"{file} cannot be read: run `attnprobe corpus` again ({error})") from error
            if not rejected:
                table = table.filter(compute.is_null(table["rejected"]))
            if self.kept:
                table = table.filter([self._matches(kept) for kept in table["kept"].to_pylist()])
            yield table if wanted is None else table.select(wanted)

    def _matches(self, kept: str | None) -> bool:
        values = json.loads(kept or "{}")
        return all(name in values and values[name] == value for name, value in self.kept)

    def __len__(self) -> int:
        """The number of rows that were scored."""
        return sum(table.num_rows for table in self.tables(["row"]))

    def batches(self) -> Iterator[TokenScores]:
        """Yield the scores of each shard's responses as `TokenScores`, which `couplings` and others take."""
        provenance = self.provenance
        for table in self.tables():
            scores = scores_of(table, provenance)
            if scores is not None:
                yield scores

    def to_arrow(self, columns: Sequence[str] | None = None, *, rejected: bool = False) -> Any:
        """Return one Arrow table of all rows: name the columns that you need."""
        tables = list(self.tables(columns, rejected=rejected))
        if not tables:
            empty = table_schema().empty_table()
            return empty if columns is None else empty.select(_known(columns))
        return import_pyarrow().concat_tables(tables)

    def to_pandas(self, columns: Sequence[str] | None = None, *, rejected: bool = False) -> Any:
        """Return one pandas table of all rows: name the columns that you need.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        import_pandas()
        return self.to_arrow(columns, rejected=rejected).to_pandas()

    def to_polars(self) -> Any:
        """Return a lazy frame of polars, which reads what a query needs; rejected rows are there too.

        Raises:
            MissingDependencyError: polars is not installed.
            ParameterError: the rows were chosen with `where`; filter the frame instead.
        """
        self._check_unfiltered("to_polars")
        return _imported("polars").scan_parquet([str(file) for file in self.files])

    def to_duckdb(self) -> Any:
        """Return a relation of duckdb, which reads what a query needs; rejected rows are there too.

        Raises:
            MissingDependencyError: duckdb is not installed.
            ParameterError: the rows were chosen with `where`; filter the relation instead.
        """
        self._check_unfiltered("to_duckdb")
        return _imported("duckdb").read_parquet([str(file) for file in self.files])

    def _check_unfiltered(self, name: str) -> None:
        if self.kept:
            raise ParameterError(f"{name} gives all rows: choose rows in its query, not with where()")


def load_scores(folder: PathLike) -> CorpusScores:
    """Return the scores in a folder that `attnprobe.corpus.score` wrote; nothing is read but the manifest.

    A folder that is still being written, or whose run was interrupted, holds what is finished.

    Raises:
        ResultError: it is no such folder.
        MissingDependencyError: pyarrow is not installed.
    """
    import_pyarrow()
    path = as_path(folder, "a folder of scores is named by a path")
    return CorpusScores(path, read_manifest(path))


def reason_for_no_rows(scores: CorpusScores) -> str:
    """Say why there is no scored row: no shard is finished, no row was chosen, or all were rejected."""
    if not scores.files:
        return (
            f"{scores.folder} holds no finished shard yet: wait, or continue with the same `attnprobe corpus`"
        )
    everything = replace(scores, kept=())
    values: dict[str, Counter[str]] = {name: Counter() for name, _ in scores.kept}
    for table in everything.tables(["kept"]):
        for kept in table["kept"].to_pylist():
            row = json.loads(kept or "{}")
            for name, counted in values.items():
                counted[json.dumps(row[name]) if name in row else "missing"] += 1
    if not any(values.values()):
        return f"no row of {scores.folder} could be scored: see rejected.jsonl"
    told = []
    for name, counted in values.items():
        shown = [f"{value} ({count} rows)" for value, count in counted.most_common(5)]
        more = [f"{len(counted) - 5} other values"] if len(counted) > 5 else []
        told.append(f"{name} is {', '.join([*shown, *more])}")
    return f"no scored row of {scores.folder} is one where {condition(scores.kept)}; {'; '.join(told)}"


def condition(kept: Sequence[tuple[str, Any]]) -> str:
    """Return in words which rows `where` chose.

    >>> condition([("correct", False), ("topic", "sums")])
    'correct is false and topic is "sums"'
    """
    return " and ".join(f"{name} is {json.dumps(value, default=str)}" for name, value in kept)


def _known(columns: Sequence[str]) -> list[str]:
    names = table_schema().names
    chosen = [columns] if isinstance(columns, str) else list(columns)
    if unknown := [name for name in chosen if name not in names]:
        raise ParameterError(f"there is no column {brief(unknown[0])}; there are {', '.join(names)}")
    return chosen


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(f"{name} is not installed: pip install {name}") from error

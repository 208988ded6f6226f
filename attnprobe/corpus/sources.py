"""The input of a corpus: files of rows, cut into windows of a fixed number of rows.

A source knows how many rows it has and what its files hold, and reads any window of them without reading
what lies before. JSON lines (`.jsonl`, `.ndjson`), Parquet (`.parquet`), folders of either, and folders that
`datasets` saved with `save_to_disk` are read, in the order of their names. A folder that holds anything which
would not be read is refused: no row is left out in silence. `score` opens one.
What is left to others: what a row must hold (rows), and which windows are read (run).
"""

from __future__ import annotations

import codecs
import itertools
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnprobe.errors import ParameterError, ResultError
from attnprobe.storage import PathLike, as_path, import_pyarrow
from attnprobe.validation import brief, whole_number

ROWS_PER_SHARD = 512
"""The default size of a window, and so of a shard: what at most is lost when a run is killed."""

_CHUNK = 2**20

_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}

_NO_ROWS = (".md", ".txt")
"""What may lie in a folder of rows without being read, as a data set's README does; see `_is_aside`."""


@dataclass(frozen=True)
class RawRow:
    """A row as it stands in its file; `problem` says why it could not be read, and is None if it was.

    Rows that an engine hands over may have no number.
    """

    number: int | None
    values: Any
    problem: str | None = None


class Source(ABC):
    """Rows in files, numbered from 0 in the order of the files.

    Attributes:
        rows_per_window: how many rows a window has; the last one may have fewer.
        row_count: how many rows there are, blank lines of JSON included.
        files: each file's name, size in bytes and CRC-32, by which a changed input is found out.
    """

    rows_per_window: int
    row_count: int
    files: list[dict[str, Any]]

    @property
    def window_count(self) -> int:
        """The number of windows."""
        return -(-self.row_count // self.rows_per_window)

    def rows_in(self, window: int) -> int:
        """Return how many rows a window has."""
        return min(self.rows_per_window, self.row_count - window * self.rows_per_window)

    @abstractmethod
    def window(self, number: int) -> list[RawRow]:
        """Return the rows of a window; blank lines are left out."""


def open_source(path: PathLike, rows_per_window: int = ROWS_PER_SHARD) -> Source:
    """Open a file or folder of rows; its files are read once, for their checksums.

    Raises:
        ParameterError: something that is not a path, or a window without rows.
        ResultError: files that are missing, damaged, of another kind, or without any row.
    """
    place = as_path(path, "the input is named by a path", ParameterError)
    rows_per_window = whole_number(rows_per_window, "rows_per_shard", minimum=1)
    kind, files = _files_of(place)
    try:
        source: Source
        if kind == "jsonl":
            source = _Lines(files, rows_per_window)
        elif kind == "parquet":
            source = _Tables(files, rows_per_window, _parquet_groups, _parquet_batches)
        else:
            source = _Tables(files, rows_per_window, _arrow_groups, _arrow_batches)
    except OSError as error:
        raise ResultError(f"cannot read the input {place}: {error.strerror or error}") from error
    if source.row_count == 0:
        raise ResultError(f"the input {place} has no rows")
    return source


def _files_of(place: Path) -> tuple[str, list[Path]]:
    """Return the kind of an input, and its files."""
    if place.is_file():
        kind = _kind_of(place)
        if kind is None:
            raise ResultError(f"the input must be .jsonl, .parquet or a folder; got {place.name}")
        return kind, [place]
    if not place.is_dir():
        raise ResultError(f"there is no input at {place}")
    if (place / "state.json").is_file():
        try:
            listed = json.loads((place / "state.json").read_bytes())["_data_files"]
            files = [place / part["filename"] for part in listed]
        except (ValueError, KeyError, TypeError) as error:
            raise ResultError(f"{place / 'state.json'} does not list the files of a data set") from error
        return "arrow", files
    if (place / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in place.iterdir() if part.is_dir())
        raise ResultError(f"{place} holds several splits: name the folder of one of {', '.join(splits)}")
    files = sorted(each for each in place.iterdir() if not _is_aside(each))
    # Of each kind, the name of its first file.
    kinds: dict[str, str] = {}
    for file in files:
        if kind := _kind_of(file):
            kinds.setdefault(kind, file.name)
    if not kinds:
        raise ResultError(f"the folder {place} holds no .jsonl or .parquet file, and no saved data set")
    if len(kinds) > 1:
        names = ", ".join(kinds.values())
        raise ResultError(
            f"the folder {place} holds rows of several kinds ({names}): keep them in folders of their own"
        )
    if strange := [file for file in files if _kind_of(file) is None]:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ResultError(
            f"the folder {place} holds {strange[0].name}{more}, which would not be read: rows are read from "
            ".jsonl, .ndjson and .parquet files in the folder itself. Unpack it, or move it elsewhere"
        )
    return next(iter(kinds)), files


def _kind_of(path: Path) -> str | None:
    """Return the kind of rows that a file holds; None for anything else."""
    return _KINDS.get(path.suffix.lower()) if path.is_file() else None


def _is_aside(path: Path) -> bool:
    """Whether something in a folder is clearly no rows: hidden, a writer's mark, a text, or scores."""
    if path.is_dir():
        return path.name.startswith(".") or (path / ".lock").is_file()
    return path.name.startswith((".", "_")) or path.suffix.lower() in _NO_ROWS


def _described(file: Path, size: int, checksum: int) -> dict[str, Any]:
    return {"name": file.name, "bytes": size, "crc32": f"{checksum:08x}"}


def checksum_of(file: Path) -> tuple[int, int]:
    """Return the size of a file and its CRC-32: enough against accidents, at 2 GB/s on one core."""
    size = checksum = 0
    with file.open("rb") as stream:
        while part := stream.read(_CHUNK):
            size += len(part)
            checksum = zlib.crc32(part, checksum)
    return size, checksum


class _Lines(Source):
    """Rows as lines of JSON."""

    def __init__(self, files: Sequence[Path], rows_per_window: int) -> None:
        self.rows_per_window = rows_per_window
        self._paths = list(files)
        self.files = []
        # Where each window starts: its file, and the place in it.
        self._starts: list[tuple[int, int]] = []
        number = 0
        for index, file in enumerate(self._paths):
            offset = checksum = 0
            with file.open("rb") as stream:
                for line in stream:
                    if number % rows_per_window == 0:
                        self._starts.append((index, offset))
                    checksum = zlib.crc32(line, checksum)
                    offset += len(line)
                    number += 1
            self.files.append(_described(file, offset, checksum))
        self.row_count = number

    def window(self, number: int) -> list[RawRow]:
        """Return the rows of a window."""
        first = number * self.rows_per_window
        lines = self._lines_from(*self._starts[number])
        numbered = zip(range(first, first + self.rows_in(number)), lines, strict=False)
        # Editors on Windows put a byte order mark first; in joined files, it may begin any line.
        plain = ((row, line.removeprefix(codecs.BOM_UTF8)) for row, line in numbered)
        return [_row_of_line(row, line) for row, line in plain if line.strip()]

    def _lines_from(self, index: int, offset: int) -> Iterator[bytes]:
        for file in self._paths[index:]:
            with file.open("rb") as stream:
                stream.seek(offset)
                yield from stream
            offset = 0


def _row_of_line(number: int, line: bytes) -> RawRow:
    """Return a line as a row, or why it is none."""
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return RawRow(number, None, f"not UTF-8: {error.reason} at byte {error.start} of the line")
    except ValueError as error:
        return RawRow(number, None, f"not JSON: {error}")
    except RecursionError:
        return RawRow(number, None, "not JSON: it is nested too deeply")
    if not isinstance(values, dict):
        return RawRow(number, None, f"wrong type: a row must be a JSON object; got {brief(values)}")
    return RawRow(number, values)


_Groups = Callable[[Path], list[int]]
"""The sizes of the groups of rows of a file, each of which can be read without those before."""

_Batches = Callable[[Path, int, int], Iterator[Any]]
"""The record batches of a file, from a group on, of roughly so many rows each."""


class _Tables(Source):
    """Rows of Arrow tables, in files of one format."""

    def __init__(
        self, files: Sequence[Path], rows_per_window: int, groups: _Groups, batches: _Batches
    ) -> None:
        pyarrow = import_pyarrow()
        self.rows_per_window = rows_per_window
        self._batches = batches
        self.files = [_described(file, *checksum_of(file)) for file in files]
        # Each group of rows that can be read by itself: its first row, its file, and its number there.
        self._groups: list[tuple[int, Path, int]] = []
        self.row_count = 0
        for file in files:
            try:
                counts = groups(file)
            except pyarrow.ArrowException as error:
                raise ResultError(f"the input {file} is damaged: {error}") from error
            for index, count in enumerate(counts):
                self._groups.append((self.row_count, file, index))
                self.row_count += count
        # Windows are mostly read one after the other: what comes next is kept open.
        self._reading: Iterator[RawRow] = iter(())
        self._next = -1

    def window(self, number: int) -> list[RawRow]:
        """Return the rows of a window."""
        first = number * self.rows_per_window
        if self._next != first:
            self._reading = self._rows_from(first)
        self._next = first + self.rows_in(number)
        return list(itertools.islice(self._reading, self.rows_in(number)))

    def _rows_from(self, first: int) -> Iterator[RawRow]:
        """Yield the rows from a number on."""
        start = max(index for index, (row, _, _) in enumerate(self._groups) if row <= first)
        number, file, group = self._groups[start]
        later = list(dict.fromkeys(path for _, path, _ in self._groups[start:] if path != file))
        for path, from_group in [(file, group), *((path, 0) for path in later)]:
            for batch in self._batches(path, from_group, self.rows_per_window):
                skipped = min(max(first - number, 0), batch.num_rows)
                number += skipped
                for row in range(skipped, batch.num_rows):
                    yield _row_of_batch(number, batch, row)
                    number += 1


def _row_of_batch(number: int | None, batch: Any, row: int) -> RawRow:
    """Return one row of a record batch, or why it is none."""
    try:
        return RawRow(number, batch.slice(row, 1).to_pylist()[0])
    except UnicodeDecodeError as error:
        return RawRow(number, None, f"not UTF-8: {error.reason} at byte {error.start} of a text")


def rows_of_table(table: Any) -> list[RawRow]:
    """Return the rows of an Arrow table; their numbers are those of its column `row`, if it has one."""
    numbers = table["row"].to_pylist() if "row" in table.column_names else [None] * table.num_rows
    return [
        _row_of_batch(number if type(number) is int else None, table, row)
        for row, number in enumerate(numbers)
    ]


def _parquet_groups(file: Path) -> list[int]:
    """Return the number of rows of each row group of a Parquet file."""
    from pyarrow import parquet

    metadata = parquet.read_metadata(file)
    return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]


def _parquet_batches(file: Path, group: int, rows: int) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as opened:
        groups = list(range(group, opened.num_row_groups))
        yield from opened.iter_batches(batch_size=rows, row_groups=groups)


def _arrow_groups(file: Path) -> list[int]:
    """Return the number of rows of each record batch of an Arrow file, as `datasets` writes them."""
    return [batch.num_rows for batch in _arrow_batches(file, 0, 0)]


def _arrow_batches(file: Path, group: int, rows: int) -> Iterator[Any]:
    import pyarrow

    # Mapped into memory: batches that are skipped are never read.
    with pyarrow.memory_map(str(file)) as mapped, pyarrow.ipc.open_stream(mapped) as opened:
        yield from itertools.islice(opened, group, None)

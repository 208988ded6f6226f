"""ScoreFolder: a folder of scores that survives anything, and is only continued with what it was begun with.

    scores/manifest.json         what the scores are of: input, model, tokenizer, settings
    scores/groups.safetensors    the head groups
    scores/shards/00000.parquet  the scores of the first window of rows; and so on
    scores/ledger.jsonl          a line for each finished shard, with its size and checksum
    scores/rejected.jsonl        a line for each row that could not be scored, with its reason

A shard is written under another name and renamed when it is complete, and its name follows from the rows it
holds: however often it is written, each row is there once. A shard counts as finished if the ledger's line
fits the file. `score` writes such a folder, and `load_scores` reads it. What is left to others: what is in a
shard (schema) and the order of the work (run).
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from attnprobe.corpus.schema import SCHEMA_VERSION
from attnprobe.corpus.scorer import Scored
from attnprobe.corpus.sources import checksum_of
from attnprobe.errors import AttnprobeWarning, ResultError
from attnprobe.storage import TEMPORARY, PathLike, as_path, library_versions, write_atomically

_COMPARED = ("schema", "input", "columns", "rows_per_shard", "model", "tokenizer", "settings", "grouping")


@dataclass(frozen=True)
class ShardEntry:
    """A line of the ledger.

    Attributes:
        shard: the number of the window whose rows the shard holds.
        rows, rejected: how many rows it has, and how many of them were rejected.
        tokens, padding: how many tokens were run for it, and how many positions of padding with them.
        bytes, crc32: the size and checksum of the file.
        groups: the fingerprint of the head groups that its scores are of.
    """

    shard: int
    rows: int
    rejected: int
    tokens: int
    padding: int
    bytes: int
    crc32: str
    groups: str


class ScoreFolder:
    """A folder of scores, open for writing by this process alone; `open_folder` makes one.

    Attributes:
        path: the folder.
        manifest: what its scores are of; empty until `begin` is called.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Mapping[str, Any] = {}
        self._entries: dict[int, ShardEntry] = {}

    @property
    def is_empty(self) -> bool:
        """Whether it holds nothing that was computed, so that it may be begun with anything."""
        made = (self.groups_path, self.sums_path)
        return not any(file.is_file() for file in made) and not any(self.path.glob("shards/*.parquet"))

    def check(self, asked: Mapping[str, Any]) -> None:
        """Refuse anything but what the folder was begun with; what `asked` does not hold is not compared.

        Raises:
            ResultError: something differs.
        """
        if not self.is_empty:
            check_same(self.path, read_manifest(self.path), asked)

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Begin the folder with what is to be scored, or continue it, if it was begun with the same.

        Raises:
            ResultError: it was begun with another input, model or settings.
        """
        if self.is_empty:
            content = {**manifest, "versions": library_versions()}
            write_atomically(self.path / "manifest.json", (json.dumps(content, indent=1) + "\n").encode())
        else:
            self.check(manifest)
        for place in (self.path, self.path / "shards"):
            # Of a run that was killed while it wrote.
            for left in place.glob(f"{TEMPORARY}*"):
                left.unlink(missing_ok=True)
        self.manifest = manifest

    @property
    def groups_path(self) -> Path:
        """Where the head groups are."""
        return self.path / "groups.safetensors"

    @property
    def sums_path(self) -> Path:
        """Where the sums of an unfinished pass over the corpus are, by which heads will be grouped."""
        return self.path / "sums.safetensors"

    @property
    def stability_path(self) -> Path:
        """Where the stability of a grouping from a sample is."""
        return self.path / "stability.safetensors"

    @property
    def entries(self) -> list[ShardEntry]:
        """The finished shards, in order."""
        return [self._entries[number] for number in sorted(self._entries)]

    def rows_of(self, shard: int) -> int:
        """Return how many rows of the input a shard is of, blank lines included, which it does not hold."""
        size = int(self.manifest["rows_per_shard"])
        return min(size, int(self.manifest["row_count"]) - shard * size)

    def find_finished(self, groups: str) -> None:
        """Find the shards that are whole and of these groups; all others will be written again.

        The ledger and `rejected.jsonl` are brought to what is found. A warning tells of shards that were
        finished, and are not whole any more.
        """
        damaged = []
        for entry in read_ledger(self.path):
            file = shard_path(self.path, entry.shard)
            if entry.groups != groups:
                continue
            size, checksum = checksum_of(file) if file.is_file() else (0, 0)
            if (size, f"{checksum:08x}") == (entry.bytes, entry.crc32):
                self._entries[entry.shard] = entry
            else:
                damaged.append(str(entry.shard))
        if damaged:
            are = f"shards {', '.join(damaged)} are" if len(damaged) > 1 else f"shard {damaged[0]} is"
            told = f"in {self.path}, {are} damaged or missing, and will be scored again"
            warnings.warn(told, AttnprobeWarning, stacklevel=2)
        lines = [json.dumps(asdict(entry)) + "\n" for entry in self.entries]
        write_atomically(self.path / "ledger.jsonl", "".join(lines).encode())
        rejected = [
            line for entry in self.entries if entry.rejected for line in self._rejected_lines(entry.shard)
        ]
        write_atomically(self.path / "rejected.jsonl", "".join(rejected).encode())

    def is_finished(self, shard: int) -> bool:
        """Whether a shard is whole."""
        return shard in self._entries

    def enter(self, entry: ShardEntry) -> None:
        """Enter a shard that has been written into the ledger, and its rejected rows into their file.

        Raises:
            ResultError: the disk is full, or the folder is gone.
        """
        if entry.rejected:
            self._append("rejected.jsonl", self._rejected_lines(entry.shard))
        self._append("ledger.jsonl", [json.dumps(asdict(entry)) + "\n"])
        self._entries[entry.shard] = entry

    def _append(self, name: str, lines: list[str]) -> None:
        try:
            with (self.path / name).open("ab") as stream:
                stream.write("".join(lines).encode())
        except OSError as error:
            raise ResultError(f"cannot write {self.path / name}: {error.strerror}") from error

    def _rejected_lines(self, shard: int) -> list[str]:
        """Return the lines of `rejected.jsonl` that a shard makes."""
        from pyarrow import compute, parquet

        table = parquet.ParquetFile(shard_path(self.path, shard)).read(columns=["row", "id", "rejected"])
        table = table.filter(compute.is_valid(table["rejected"]))
        return [
            json.dumps({"row": line["row"], "id": line["id"], "reason": line["rejected"]}) + "\n"
            for line in table.to_pylist()
        ]


@contextmanager
def open_folder(path: PathLike) -> Iterator[ScoreFolder]:
    """Open a folder of scores for this process alone, new or to be continued; `begin` is called next.

    Raises:
        ResultError: a folder that cannot be written, that another run is writing, or that holds something
            else.
    """
    folder = as_path(path, "the output is a folder, named by a path")
    is_known = (folder / "manifest.json").is_file() or not folder.is_dir()
    strange = [] if is_known else sorted(each.name for each in folder.iterdir() if not _is_ours(each))
    if strange:
        raise ResultError(f"{folder} is no folder of scores: it holds {strange[0]}. Name a new one")
    try:
        (folder / "shards").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultError(f"cannot make the folder {folder}: {error.strerror}") from error
    with _locked(folder):
        yield ScoreFolder(folder)


def _is_ours(path: Path) -> bool:
    return path.name in ("shards", ".lock") or path.name.startswith(TEMPORARY)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system frees when this process ends, however it ends."""
    # Here, since Windows has no such module, and everything else works without it.
    import fcntl

    try:
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ResultError(f"cannot write to the folder {folder}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(lock, 20).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise ResultError(
            f"another run is writing to {folder} (process {holder}): wait for it, or name another folder"
        ) from error
    try:
        # Only for the message above: on a full disk, the lock holds without it.
        with suppress(OSError):
            os.ftruncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
        yield
    finally:
        os.close(lock)


def check_same(
    folder: Path,
    known: Mapping[str, Any],
    asked: Mapping[str, Any],
    advice: str = "Continue it with the same, or name another folder",
) -> None:
    """Refuse to go on with anything but what a folder was begun with, and say what differs.

    Files of the input may have other names: their content counts, and its order. What `asked` does not hold
    is not compared.

    Raises:
        ResultError: something differs.
    """
    found = []
    # As JSON gives it back, where tuples are lists.
    known, asked = _without_names(known), _without_names(json.loads(json.dumps(asked)))
    for name in filter(asked.__contains__, _COMPARED):
        found += _differences(name, known.get(name), asked.get(name))
    if found:
        raise ResultError(f"{folder} was begun with something else: {'; '.join(found[:5])}. {advice}")


def _without_names(manifest: Mapping[str, Any]) -> dict[str, Any]:
    files = [{key: value for key, value in file.items() if key != "name"} for file in manifest["input"]]
    return {**manifest, "input": files}


def _differences(name: str, ours: Any, theirs: Any) -> list[str]:
    """Return what differs, down to the single setting: that of the folder, then what is asked for."""
    if ours == theirs:
        return []
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = dict.fromkeys([*ours, *theirs])
        return [
            part for key in keys for part in _differences(f"{name}.{key}", ours.get(key), theirs.get(key))
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [part for i, pair in pairs for part in _differences(f"{name}[{i}]", *pair)]
    return [f"{name} was {json.dumps(ours)}, and is now {json.dumps(theirs)}"]


def shard_path(folder: Path, shard: int) -> Path:
    """Return where a shard is."""
    return folder / "shards" / f"{shard:05d}.parquet"


def write_shard(folder: Path, shard: int, scored: Scored, groups: str) -> ShardEntry:
    """Write a shard, completely or not at all, and return what the ledger is to say of it.

    Raises:
        ResultError: it cannot be written, as on a full disk.
    """
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(scored.table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    write_atomically(shard_path(folder, shard), content)
    return ShardEntry(
        shard,
        scored.table.num_rows,
        scored.rejected,
        scored.tokens,
        scored.padding,
        len(content),
        # Of what was to be written: a disk that garbles it is found out, too.
        f"{zlib.crc32(content):08x}",
        groups,
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what the scores of a folder are of.

    Raises:
        ResultError: no folder of scores, or one of another version.
    """
    path = folder / "manifest.json"
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ResultError(f"{folder} is no folder of scores: it has no manifest.json") from error
    except (ValueError, OSError) as error:
        raise ResultError(f"{path} is damaged: {error}") from error
    version = found.get("schema") if isinstance(found, dict) else None
    if version != SCHEMA_VERSION:
        raise ResultError(f"{path} is of version {version} of the schema; this is version {SCHEMA_VERSION}")
    return dict(found)


def read_ledger(folder: Path) -> list[ShardEntry]:
    """Return the ledger's lines, the latest for each shard; lines that were cut off are left out."""
    found: dict[int, ShardEntry] = {}
    names = {each.name for each in fields(ShardEntry)}
    try:
        lines = (folder / "ledger.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and values.keys() == names:
            found[values["shard"]] = ShardEntry(**values)
    return [found[number] for number in sorted(found)]

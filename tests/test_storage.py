"""Keeping results: files that are whole or not there, and statistics that are kept and joined."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import attnprobe
from attnprobe import HeadGroups, HeadStatistics, Provenance, ResultError, Rhythm, TokenScores
from attnprobe.storage import load_result, save_result, write_atomically
from tests.refusals import refused

NAN = math.nan


def check_refused(call: Callable[[], Any], *facts: object) -> None:
    refused(call, *facts, error=ResultError)


def load(path: Path, **types: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a result of the kind that these tests save."""
    return load_result(path, "Kind", [], types)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- writing --------------------------------------------------------------------------------------


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Let the system refuse to write more than so many bytes to a file, as a full disk would."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("as_text", [True, False])
def test_a_file_holds_what_was_written(tmp_path: Path, as_text: bool) -> None:
    path = tmp_path / "result.bin"
    assert write_atomically(str(path) if as_text else path, b"new") == path
    assert contents(tmp_path) == {"result.bin": b"new"}


def test_writing_replaces_an_older_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.bin"
    write_atomically(path, b"a longer, older content")
    write_atomically(path, b"new")
    assert contents(tmp_path) == {"result.bin": b"new"}


def test_a_relative_path_lies_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_atomically("result.bin", b"new")
    assert contents(tmp_path) == {"result.bin": b"new"}


def test_a_result_may_be_read_by_those_who_may_read_other_new_files(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.write_bytes(b"")
    path = write_atomically(tmp_path / "result.bin", b"new")
    assert ordinary.stat().st_mode == path.stat().st_mode


@pytest.mark.parametrize("older", [None, b"old"])
def test_a_write_that_fails_midway_keeps_the_older_file(tmp_path: Path, older: bytes | None) -> None:
    """No half a file, no temporary file, and the older one as it was; the message says why."""
    path = tmp_path / "result.bin"
    if older is not None:
        path.write_bytes(older)
    with no_file_larger_than(1000):
        check_refused(lambda: write_atomically(path, b"x" * 5000), path, os.strerror(errno.EFBIG))
    assert contents(tmp_path) == ({} if older is None else {"result.bin": older})


@pytest.mark.usefixtures("as_users_call")
def test_any_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    """Whatever interrupts the writing: here content that cannot be written, as an interrupt would."""
    path = tmp_path / "result.bin"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_atomically(path, 5)  # type: ignore[arg-type]
    assert contents(tmp_path) == {"result.bin": b"old"}


def test_a_result_that_cannot_be_written_keeps_the_older_one(tmp_path: Path) -> None:
    path = save_result(tmp_path / "result.safetensors", "Kind", {"a": torch.ones(2)}, {})
    with no_file_larger_than(100):
        check_refused(lambda: save_result(path, "Kind", {"a": torch.zeros(5000)}, {}), path)
    assert load(path)[0]["a"].tolist() == [1.0, 1.0]
    assert list(contents(tmp_path)) == ["result.safetensors"]


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "result.bin"
    check_refused(lambda: write_atomically(path, b"new"), path.parent, os.strerror(errno.ENOENT))
    assert contents(tmp_path) == {}


def test_a_file_is_no_folder_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    path = tmp_path / "file" / "result.bin"
    check_refused(lambda: write_atomically(path, b"new"), path.parent, os.strerror(errno.ENOTDIR))
    assert contents(tmp_path) == {"file": b"old"}


def test_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    check_refused(lambda: write_atomically(tmp_path, b"new"), tmp_path, "folder")
    check_refused(lambda: save_result(tmp_path, "Kind", {}, {}), tmp_path, "folder")
    assert contents(tmp_path) == {}


PATHS = [None, 5, 1.5, b"file", "", [], ["file"], {}, True, object(), Path]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("as_users_call")
def test_what_is_no_path_is_refused(path: Any) -> None:
    check_refused(lambda: write_atomically(path, b"new"))
    check_refused(lambda: save_result(path, "Kind", {}, {}))
    check_refused(lambda: load(path))


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    check_refused(lambda: write_atomically(tmp_path / name, b"new"))
    check_refused(lambda: load(tmp_path / name))
    assert contents(tmp_path) == {}


# ---- any result -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1.5, NAN, math.inf]),
        torch.tensor([[1, -2]]),
        torch.tensor([True, False]),
        torch.tensor([0.1], dtype=torch.float64),
        torch.tensor([0.5], dtype=torch.bfloat16),
        torch.zeros(2, 0),
        torch.arange(6).view(2, 3).T,
        torch.arange(6.0)[::2],
        torch.tensor(3.0),
        torch.ones(2).requires_grad_(),
        torch.ones(3).expand(2, 3),
    ],
    ids=[
        "nan",
        "int64",
        "bool",
        "float64",
        "bfloat16",
        "empty",
        "transposed",
        "strided",
        "scalar",
        "with gradient",
        "expanded",
    ],
)
def test_tensors_come_back_exactly(tmp_path: Path, tensor: Tensor) -> None:
    path = save_result(tmp_path / "result.safetensors", "Kind", {"a": tensor, "none": None}, {})
    tensors, _ = load(path)
    assert list(tensors) == ["a"]
    assert (tensor.dtype, tensor.shape) == (tensors["a"].dtype, tensors["a"].shape)
    torch.testing.assert_close(tensors["a"], tensor.detach(), rtol=0, atol=0, equal_nan=True)


def test_tensors_that_share_memory_can_be_saved(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    shared = {"whole": base, "again": base, "part": base[:3], "rest": base[3:]}
    tensors, _ = load(save_result(tmp_path / "shared.safetensors", "Kind", shared, {}))
    assert {name: value.tolist() for name, value in shared.items()} == {
        name: value.tolist() for name, value in tensors.items()
    }


SETTINGS = {
    "layers": ((1, 2), tuple[int, ...]),
    "horizon": ((10, None), tuple[int, int | None]),
    "model_name": ("größer \ud800 \"'\n", str),
    "quantile": (0.1 + 0.2, float | None),
    "texts": ((("a", "😀"), ("", "<script>")), tuple[tuple[str, ...], ...] | None),
    "provenance": (
        Provenance("tiny", (0, 1), 10, (10, None), {"local": ((0, 1, 0.25), (1, 0, 1.0))}, "prediction"),
        Provenance,
    ),
}


def test_settings_come_back_exactly(tmp_path: Path) -> None:
    """With their types: tuples are tuples, and a dataclass is one."""
    values = {name: value for name, (value, _) in SETTINGS.items()}
    types = {name: kind for name, (_, kind) in SETTINGS.items()}
    path = save_result(tmp_path / "result.safetensors", "Kind", {"a": torch.ones(1)}, values)
    assert values == load(path, **types)[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers", "x"),
        ("layers", [1, "2"]),
        ("layers", [1.5]),
        ("layers", None),
        ("layers", {"1": 2}),
        ("horizon", [1]),
        ("horizon", [None, 1]),
        ("horizon", [1, 2, 3]),
        ("model_name", 5),
        ("quantile", "0.3"),
        ("quantile", True),
        ("texts", [["a", 1]]),
        ("texts", "ab"),
        ("provenance", None),
        ("provenance", {"window": "10"}),
        ("provenance", {"heads": {"local": [[0, 1]]}}),
        ("provenance", {"align": "sideways"}),
    ],
)
def test_settings_of_other_types_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    """The file is damaged, and the message names it."""
    path = save_result(tmp_path / "result.safetensors", "Kind", {}, {name: value})
    check_refused(lambda: load(path, **{name: SETTINGS[name][1]}), path, "damaged")


def test_settings_and_tensors_that_are_missing_are_named(tmp_path: Path) -> None:
    path = save_result(tmp_path / "result.safetensors", "Kind", {"a": torch.ones(1)}, {"layers": (1,)})
    needed = lambda: load_result(path, "Kind", ["a", "waad"], {"layers": tuple, "window": int})  # noqa: E731
    check_refused(needed, path, "waad", "window")


def test_others_can_read_the_file_as_safetensors(tmp_path: Path) -> None:
    """The kind, the settings and the versions of the libraries stand in its header, as JSON."""
    path = save_result(tmp_path / "result.safetensors", "Kind", {"a": torch.ones(1)}, {"layers": (1,)})
    with safe_open(path, framework="pt") as stream:
        header = json.loads(stream.metadata()["attnprobe"])
        assert stream.get_tensor("a").tolist() == [1.0]
    versions = {
        "attnprobe": attnprobe.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    tensors = {"a": "float32 [1]"}
    assert header == {"kind": "Kind", "settings": {"layers": [1]}, "tensors": tensors, "versions": versions}


def test_settings_that_no_header_can_hold_are_refused(tmp_path: Path) -> None:
    """Safetensors has a limit; a file beyond it could not be loaded, so none is written."""
    texts = ("x" * 100_000_000,)
    check_refused(lambda: save_result(tmp_path / "big.safetensors", "Kind", {}, {"texts": texts}), "Kind")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("as_text", [True, False])
def test_a_missing_file_is_named(tmp_path: Path, as_text: bool) -> None:
    path = tmp_path / "nothing.safetensors"
    check_refused(lambda: load(str(path) if as_text else path), path)
    check_refused(lambda: load(tmp_path), tmp_path)


def damaged(path: Path, how: str) -> Path:
    """Damage a saved result in one of the ways of the world."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("layer,head\n0,1\n" * 20)
    elif how == "cut off in the header":
        path.write_bytes(content[: 8 + length // 2])
    elif how == "cut off in the tensors":
        path.write_bytes(content[:-1])
    elif how == "metadata cut off":
        save_file({"a": torch.ones(1)}, path, metadata={"attnprobe": '{"kind": "Ki'})
    return path


@pytest.mark.parametrize(
    "how", ["empty", "text", "cut off in the header", "cut off in the tensors", "metadata cut off"]
)
def test_a_damaged_file_is_named(tmp_path: Path, how: str) -> None:
    path = tmp_path / "result.safetensors"
    damaged(save_result(path, "Kind", {"a": torch.ones(4)}, {}), how)
    check_refused(lambda: load(path), path, "safetensors")


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = save_result(tmp_path / "result.safetensors", "Kind", {"a": torch.ones(4)}, {"layers": (1,)})
    content = path.read_bytes()
    for length in [*range(0, 20), *range(20, len(content), 17), len(content) - 1]:
        path.write_bytes(content[:length])
        check_refused(lambda: load(path), path)
    path.write_bytes(content + b"\0")
    check_refused(lambda: load(path), path)


@pytest.mark.parametrize("metadata", ["[]", "null", "3", '"Kind"'])
def test_metadata_that_are_no_object_are_refused(tmp_path: Path, metadata: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(1)}, path, metadata={"attnprobe": metadata})
    check_refused(lambda: load(path), path)


@pytest.mark.parametrize("settings", [None, [], "x", 3])
def test_settings_that_are_no_object_are_refused(tmp_path: Path, settings: Any) -> None:
    path = tmp_path / "other.safetensors"
    save_file({}, path, metadata={"attnprobe": json.dumps({"kind": "Kind", "settings": settings})})
    check_refused(lambda: load(path), path, "damaged", "settings")


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = save_result(tmp_path / "result.safetensors", "Kind", {"a": torch.ones(1)}, {})
    check_refused(lambda: Rhythm.load(path), path, "Kind", "Rhythm")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_of_somebody_else_is_something_else(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(1)}, path, metadata=metadata)
    check_refused(lambda: load(path), path, "Kind")


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("kind", [HeadGroups, HeadStatistics, Rhythm, TokenScores], ids=lambda k: k.__name__)
def test_a_file_that_lacks_parts_of_its_kind_is_refused(tmp_path: Path, kind: Any) -> None:
    """The kind is right, but tensors and metadata are gone: damaged, and named."""
    path = save_result(tmp_path / "result.safetensors", kind.__name__, {"a": torch.ones(1)}, {})
    check_refused(lambda: kind.load(path), path, "damaged")


# ---- HeadStatistics -------------------------------------------------------------------------------

PER_HEAD = ("span", "receiver_kurtosis")
PER_TOKEN = ("waad", "fai", "entropy", "response_mask")


def statistics_of(
    batch: int = 2, layers: tuple[int, ...] = (1, 3), heads: int = 2, tokens: int = 4, **changes: Any
) -> HeadStatistics:
    """Random statistics of some shape; the last head of the last layer does not exist."""
    generator = torch.Generator().manual_seed(1000 * batch + 100 * heads + tokens)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    span = random(batch, len(layers), heads)
    waad, fai = random(*span.shape, tokens), random(*span.shape, tokens)
    for values in (span, waad, fai):
        values[:, -1, -1] = NAN
    response = torch.arange(tokens).expand(batch, -1) >= 1
    fields: dict[str, Any] = {
        "span": span,
        "waad": waad.masked_fill(~response[:, None, None], NAN),
        "fai": fai.masked_fill(~response[:, None, None], NAN),
        "entropy": random(batch, tokens).masked_fill(~response, NAN),
        "receiver_kurtosis": random(batch, len(layers), heads),
        "response_mask": response,
        "layers": layers,
    }
    return HeadStatistics(**(fields | changes))


def assert_same(expected: HeadStatistics, actual: HeadStatistics) -> None:
    for name in (*PER_HEAD, *PER_TOKEN):
        ours, theirs = getattr(expected, name), getattr(actual, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(theirs, ours, rtol=0, atol=0, equal_nan=True)
    for name in ("layers", "skipped_layers", "window", "horizon", "model_name"):
        assert getattr(expected, name) == getattr(actual, name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"horizon": (0, None), "window": 3, "model_name": "tiny/größer", "skipped_layers": (0, 2)},
        {"entropy": None},
        {"receiver_kurtosis": None},
    ],
    ids=["as measured", "other parameters", "no entropy", "no kurtosis"],
)
def test_statistics_come_back_as_they_were_saved(tmp_path: Path, changes: dict[str, Any]) -> None:
    statistics = statistics_of(**changes)
    path = tmp_path / "statistics.safetensors"
    assert statistics.save(path) == path
    assert_same(statistics, HeadStatistics.load(path))


def test_the_table_of_statistics_has_a_row_for_each_response_and_head_that_exists() -> None:
    statistics = statistics_of(batch=2, layers=(1, 3), heads=2)
    table = statistics.to_pandas()
    assert list(table.columns) == ["example", "layer", "head", "span", "receiver_kurtosis"]
    assert table.index.tolist() == list(range(6))
    assert statistics.receiver_kurtosis is not None
    rows = [
        [i, layer, head, float(values[i, index, head])]
        for i in range(2)
        for index, layer in ((0, 1), (1, 3))
        for head in range(2)
        for values in [statistics.span]
        if (layer, head) != (3, 1)
    ]
    assert rows == table[["example", "layer", "head", "span"]].astype(object).to_numpy().tolist()
    assert table["receiver_kurtosis"].tolist() == [
        float(statistics.receiver_kurtosis[i, index, head])
        for i, index, head in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 0)]
    ]


def test_the_table_of_statistics_without_kurtosis_has_no_such_column() -> None:
    table = statistics_of(receiver_kurtosis=None).to_pandas()
    assert list(table.columns) == ["example", "layer", "head", "span"]


@given(
    shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=4),
    measured=st.sampled_from([(), ("entropy",), ("receiver_kurtosis",), ("entropy", "receiver_kurtosis")]),
)
def test_joined_statistics_are_those_of_each_batch(
    shapes: list[tuple[int, int]], measured: tuple[str, ...]
) -> None:
    """One after the other; tokens that a batch does not have are undefined, and no response."""
    absent = {name: None for name in ("entropy", "receiver_kurtosis") if name not in measured}
    parts = [statistics_of(batch=batch, tokens=tokens, **absent) for batch, tokens in shapes]
    joined = HeadStatistics.concatenate(parts)
    assert sum(batch for batch, _ in shapes) == joined.span.shape[0]
    assert (absent.keys() >= {"entropy"}) == (joined.entropy is None)
    assert (absent.keys() >= {"receiver_kurtosis"}) == (joined.receiver_kurtosis is None)
    first = 0
    for part, (batch, tokens) in zip(parts, shapes, strict=True):
        for name in (*PER_HEAD, *PER_TOKEN):
            if name in absent:
                continue
            expected, actual = getattr(part, name), getattr(joined, name)[first : first + batch]
            if name in PER_TOKEN:
                beyond = actual[..., tokens:]
                assert not bool(beyond.any() if name == "response_mask" else (~beyond.isnan()).any())
                actual = actual[..., :tokens]
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        first += batch
    assert max(tokens for _, tokens in shapes) == joined.response_mask.shape[1]
    for name in ("layers", "skipped_layers", "window", "horizon", "model_name"):
        assert getattr(parts[0], name) == getattr(joined, name)


def test_joining_leaves_the_parts_as_they_were() -> None:
    parts = [statistics_of(tokens=3), statistics_of(tokens=5)]
    HeadStatistics.concatenate(parts)
    assert_same(statistics_of(tokens=3), parts[0])
    assert_same(statistics_of(tokens=5), parts[1])


def test_nothing_cannot_be_joined() -> None:
    check_refused(lambda: HeadStatistics.concatenate([]), "HeadStatistics")


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("layers", (1, 3), (1, 2)),
        ("window", 10, 5),
        ("horizon", (10, 50), (10, None)),
        ("model_name", "tiny", "large"),
    ],
)
def test_statistics_of_different_measurements_cannot_be_joined(name: str, ours: Any, theirs: Any) -> None:
    """The message names what differs, and both values."""
    parts = [statistics_of(**{name: ours}), statistics_of(**{name: theirs})]
    check_refused(lambda: HeadStatistics.concatenate(parts), name, repr(ours), repr(theirs))


def test_statistics_of_different_heads_cannot_be_joined() -> None:
    """Two unnamed models of as many layers, but of other heads, are different models."""
    parts = [statistics_of(heads=2), statistics_of(heads=3)]
    check_refused(lambda: HeadStatistics.concatenate(parts), "head", "2", "3")

"""A run over a corpus is interrupted, and continued: no row is lost, and none is there twice."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import attnprobe
from attnprobe import ResultError
from attnprobe.corpus import Columns, CorpusRun, CorpusSettings, score
from attnprobe.corpus.folder import read_ledger
from attnprobe.testing.tiny_models import tiny_model
from tests.corpus_input import SETTINGS, rows, write_lines

pytest.importorskip("pyarrow")

ROWS = 20


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=300)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Five windows of rows, of which one is bad."""
    lines: list[Any] = rows(ROWS)
    lines[9] = b'{"cut'
    return write_lines(tmp_path_factory.mktemp("input") / "in.jsonl", lines)


def run(source: Path, output: Path, model: Any, **options: Any) -> CorpusRun:
    return score(source, output, model=model, settings=SETTINGS, rows_per_shard=4, **options)


@pytest.fixture(scope="module")
def undisturbed(source: Path, model, tmp_path_factory) -> tuple[str, str]:
    """What a run that nothing happens to leaves behind."""
    folder = tmp_path_factory.mktemp("output") / "scores"
    run(source, folder, model)
    return contents(folder)


def contents(folder: Path, count: int = ROWS) -> tuple[str, str]:
    """Return all rows of a folder of scores, and what was rejected."""
    table = attnprobe.load_scores(folder).to_arrow(rejected=True)
    assert table["row"].to_pylist() == list(range(count))
    left = [path for path in folder.rglob("*") if path.name.startswith(".attnprobe-")]
    assert left == []
    return str(table.to_pylist()), (folder / "rejected.jsonl").read_text()


def in_a_fork(work: Callable[[], Any]) -> int:
    """Do something in a process of its own, and return its process id; it ends with 0 if all went well."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_every_step(model, tmp_path: Path, stride: int) -> None:
    """Not at random: before one operation on the folder's files after the other, until none is left."""
    folder, steps = tmp_path / "scores", 0
    source = write_lines(tmp_path / "in.jsonl", [*rows(5), b'{"cut'])
    run(source, tmp_path / "undisturbed", model)
    undisturbed = contents(tmp_path / "undisturbed", 6)

    def killed_at(step: int) -> None:
        seen = 0

        def watch(event: str, arguments: Any) -> None:
            nonlocal seen
            if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(folder) in str(arguments[0]):
                seen += 1
                if seen > step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        run(source, folder, model)

    while True:
        _, status = os.waitpid(in_a_fork(lambda step=steps: killed_at(step)), 0)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        run(source, folder, model)
        assert contents(folder, 6) == undisturbed
        shutil.rmtree(folder)
        steps += stride
    assert steps > 40


def test_killed_twenty_times_in_one_run(source: Path, model, tmp_path: Path, undisturbed: Any) -> None:
    """At random moments, each time as soon as the run has come a little further."""
    folder, chance = tmp_path / "scores", random.Random(0)
    kills = 0
    while kills < 20:
        child = in_a_fork(lambda: run(source, folder, model))
        time.sleep(chance.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += status != 0
        if status == 0:
            assert contents(folder) == undisturbed
            shutil.rmtree(folder)
    run(source, folder, model)
    assert contents(folder) == undisturbed


def test_interrupted_from_the_keyboard(source: Path, model, tmp_path: Path, undisturbed: Any) -> None:
    """Wherever it strikes, the interruption comes through, and what is finished stays."""
    seen = 0

    def strike(module: Any, args: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 8:
            raise KeyboardInterrupt

    hook = model.model.register_forward_pre_hook(strike)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "scores", model)
    hook.remove()
    finished = len(read_ledger(tmp_path / "scores"))
    continued = run(source, tmp_path / "scores", model)
    assert 0 < finished < 5
    assert continued.continued == sum(entry.rows for entry in read_ledger(tmp_path / "scores")[:finished])
    assert contents(tmp_path / "scores") == undisturbed


@pytest.mark.parametrize("most", [0, 400, 3000, 6000])
def test_a_full_disk(source: Path, model, tmp_path: Path, undisturbed: Any, most: int) -> None:
    """No file can grow beyond some bytes: the error says so, and the run is continued with more room."""
    folder = tmp_path / "scores"

    def without_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        with pytest.raises(ResultError, match=os.strerror(errno.EFBIG)):
            run(source, folder, model)

    _, status = os.waitpid(in_a_fork(without_room), 0)
    assert status == 0
    run(source, folder, model)
    assert contents(folder) == undisturbed


@pytest.mark.parametrize(
    ("damage", "is_told"),
    [
        ("garbled", True),
        ("cut off", True),
        ("gone", True),
        ("not in the ledger", False),
        ("ledger cut off", False),
    ],
)
def test_a_damaged_shard_is_found_and_scored_again(
    source: Path, model, tmp_path: Path, undisturbed: Any, damage: str, is_told: bool
) -> None:
    folder = tmp_path / "scores"
    run(source, folder, model)
    shard, ledger = folder / "shards/00002.parquet", folder / "ledger.jsonl"
    content = shard.read_bytes()
    if damage == "garbled":
        shard.write_bytes(content[:500] + b"\0" + content[501:])
    elif damage == "cut off":
        shard.write_bytes(content[:-100])
    elif damage == "gone":
        shard.unlink()
    elif damage == "not in the ledger":
        ledger.write_bytes(
            b"".join(x for x in ledger.read_bytes().splitlines(True) if b'"shard": 2' not in x)
        )
    else:
        ledger.write_bytes(ledger.read_bytes()[:-30])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        again = run(source, folder, model)
    assert [str(each.message) for each in told] == (
        [f"in {folder}, shard 2 is damaged or missing, and will be scored again"] if is_told else []
    )
    assert again.continued == ROWS - 4
    assert contents(folder) == undisturbed
    assert shard.read_bytes() == content


def test_the_first_pass_is_continued_too(source: Path, model, tmp_path: Path, undisturbed: Any) -> None:
    """Sums are saved after each window; damaged ones cost a pass, and lost groups are found again."""
    folder = tmp_path / "scores"
    count = 0

    def strike(module: Any, args: Any) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt

    hook = model.model.register_forward_pre_hook(strike)
    with pytest.raises(KeyboardInterrupt):
        run(source, folder, model)
    hook.remove()
    assert (folder / "sums.safetensors").is_file()
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged/sums.safetensors").write_bytes(b"damaged")
    for place in (folder, tmp_path / "damaged"):
        run(source, place, model)
        assert contents(place) == undisturbed
        assert not (place / "sums.safetensors").exists()
    (folder / "groups.safetensors").unlink()
    assert run(source, folder, model).continued == ROWS
    (folder / "groups.safetensors").write_bytes(b"damaged")
    with pytest.raises(ResultError, match=r"groups\.safetensors"):
        run(source, folder, model)


def test_shards_of_other_groups_are_scored_again(source: Path, model, tmp_path: Path) -> None:
    """Scores by different heads are never mixed."""
    folder = tmp_path / "scores"
    run(source, folder, model)
    other = score(source, tmp_path / "other", model=model, settings=SETTINGS, groups=2).groups
    other.save(folder / "groups.safetensors")
    assert run(source, folder, model).continued == 0


def test_two_runs_into_one_folder_are_refused(source: Path, model, tmp_path: Path, undisturbed: Any) -> None:
    folder = tmp_path / "scores"
    refused = []

    def second(module: Any, args: Any) -> None:
        if not refused:
            with pytest.raises(ResultError, match=f"another run is writing.*process {os.getpid()}") as error:
                # Before its model is loaded.
                run(source, folder, "./no model")
            refused.append(error)

    hook = model.model.register_forward_pre_hook(second)
    run(source, folder, model)
    hook.remove()
    assert refused
    assert contents(folder) == undisturbed


def test_anything_that_changed_is_refused_with_what_differs(source: Path, model, tmp_path: Path) -> None:
    folder = tmp_path / "scores"
    run(source, folder, model)
    changed = tmp_path / "in.jsonl"
    text = source.read_text()
    changed.write_text(text.replace('"r3"', '"r4"'))
    same = tmp_path / "moved" / "renamed.jsonl"
    same.parent.mkdir()
    same.write_text(text)
    assert run(same, folder, model).continued == ROWS
    trained = tiny_model("llama", vocab_size=300)
    trained.lm_head.weight.data.mul_(1.01)
    half = tiny_model("llama", vocab_size=300).bfloat16()
    other = tiny_model("llama", vocab_size=300, rope_theta=5000.0)
    for arguments, told in (
        ({"source": changed}, r"input\[0\]\.crc32"),
        ({"model": trained}, "model.weights"),
        ({"model": half}, 'model.dtype was "float32", and is now "bfloat16"'),
        ({"model": other}, "model.config"),
        ({"settings": CorpusSettings(horizon=(2, 21))}, r"settings.horizon\[1\] was 20, and is now 21"),
        ({"columns": Columns(keep="ok")}, "columns.keep"),
        ({"rows_per_shard": 5}, "rows_per_shard was 4, and is now 5"),
        ({"groups": 10}, "grouping.by"),
    ):
        options = {"source": source, "model": model, "settings": SETTINGS, "rows_per_shard": 4, **arguments}
        with pytest.raises(ResultError, match=f"was begun with something else: .*{told}"):
            score(output=folder, **options)


def test_a_folder_of_something_else_is_refused(source: Path, model, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    with pytest.raises(ResultError, match=r"holds thesis\.tex"):
        run(source, tmp_path / "full", model)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").touch()
    with pytest.raises(ResultError, match="cannot make the folder"):
        run(source, tmp_path / "file", model)
    run(source, tmp_path / "later", model)
    manifest = tmp_path / "later/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema": 99}))
    with pytest.raises(ResultError, match="version 99"):
        run(source, tmp_path / "later", model)

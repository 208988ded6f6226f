"""Scoring on other engines: the same scores as one process, whatever order rows come in and whoever dies."""

from __future__ import annotations

import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attnprobe
from attnprobe import MissingDependencyError, ParameterError, ResultError
from attnprobe.corpus import Columns, CorpusSettings, RowScorer, score, score_with_ray
from attnprobe.corpus.schema import table_schema
from attnprobe.corpus.stages import check_room
from attnprobe.testing.tiny_models import tiny_model, tiny_tokenizer
from tests.corpus_input import SETTINGS, rows, write_lines

pytest.importorskip("pyarrow")

try:
    import ray
except ImportError:
    ray = None

needs_ray = pytest.mark.skipif(ray is None, reason="Ray is not installed: pip install 'attnprobe[ray]'")

ROWS = 80


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, an input, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("engines")
    tiny_model("llama", vocab_size=300).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    lines: list[Any] = rows(ROWS)
    lines[17] = {"id": "r17", "prompt_ids": [1], "response_ids": [], "ok": True}
    write_lines(folder / "in.jsonl", lines)
    run(folder, "one")
    return folder


def run(place: Path, name: str, **options: Any) -> Any:
    return score(
        place / "in.jsonl",
        place / name,
        model=place / "model",
        settings=SETTINGS,
        rows_per_shard=2,
        **options,
    )


def lines_of(folder: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = attnprobe.load_scores(folder).to_arrow(rejected=True).to_pylist()
    return lines


def assert_same_scores(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Check rows in any order: what runs together differs, and so does the last digit."""
    by_id = {line["id"]: line for line in found}
    assert len(by_id) == len(found) == len(expected)
    for line in expected:
        own = by_id[line["id"]]
        for name in ("rejected", "tokens", "preplan", "anchor", "prompt_tokens"):
            ours, theirs = own[name], line[name]
            assert theirs == (ours if ours is None or isinstance(ours, str | int) else list(ours))
        for name in ("waad", "fai", "entropy", "span"):
            if line[name] is not None:
                values = [torch.tensor(list(each[name])) for each in (own, line)]
                torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_stage_takes_rows_as_they_come(place: Path) -> None:
    """As tables and as dictionaries, in any order, with a number or without."""
    import pyarrow

    stage = RowScorer(place / "model", place / "one/groups.safetensors", settings=SETTINGS)
    expected = lines_of(place / "one")
    given = pyarrow.Table.from_pylist([*rows(17), {"id": "r17", "prompt_ids": [1], "response_ids": []}])
    shuffled = given.take(list(reversed(range(18))))
    assert_same_scores(stage(shuffled).to_pylist(), expected[:18])
    columns = pickle.loads(pickle.dumps(stage))(shuffled.to_pydict())
    assert columns["row"] == [None] * 18
    assert columns["rejected"] == ["empty: the response has no token", *[None] * 17]
    found = [dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True)]
    assert_same_scores(found, expected[:18])
    numbered = stage(shuffled.append_column("row", pyarrow.array(range(18))))
    assert numbered["row"].to_pylist() == list(range(18))


def test_a_stage_that_cannot_work_is_refused(place: Path) -> None:
    groups = place / "one/groups.safetensors"
    with pytest.raises(ParameterError, match="needs the head groups"):
        RowScorer(place / "model")
    with pytest.raises(ParameterError, match="batch_format"):
        RowScorer(tiny_model("llama", vocab_size=300), groups)([1, 2])
    with pytest.raises(ResultError, match="do not fit"):
        RowScorer(tiny_model("llama", vocab_size=300, num_hidden_layers=2), groups)({"prompt": []})


@pytest.mark.parametrize("processes", [None, 2])
def test_a_data_set_is_mapped(place: Path, processes: int | None) -> None:
    """In this process, and in two: torch's threads would make those hang."""
    datasets = pytest.importorskip("datasets")
    given = datasets.Dataset.from_list(rows(17))
    stage = RowScorer(place / "model", place / "one/groups.safetensors", settings=SETTINGS)
    found = given.map(
        stage, batched=True, batch_size=5, remove_columns=given.column_names, num_proc=processes,
        new_fingerprint=f"scores-{processes}",
    )  # fmt: skip
    assert_same_scores(found.to_list(), lines_of(place / "one")[:17])


def test_a_data_set_has_the_types_of_the_schema(place: Path) -> None:
    """Also where a column has its first value late, or none."""
    datasets = pytest.importorskip("datasets")
    lines = [*rows(10), {"id": "r10", "prompt_ids": [1], "response_ids": [], "ok": True}]
    given = datasets.Dataset.from_list(lines)
    stage = RowScorer(place / "model", place / "one/groups.safetensors", settings=SETTINGS)
    found = given.map(
        stage, batched=True, batch_size=5, remove_columns=given.column_names, features=stage.features,
        new_fingerprint="typed", writer_batch_size=5,
    )  # fmt: skip
    assert found.features.arrow_schema.types == table_schema().types
    assert found[10]["rejected"] == "empty: the response has no token"
    assert found[0]["gamma"] is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prompt": "a", "response": "b"}, "map(..., batched=True). prompt is 'a'"),
        ({"prompt_ids": [1], "response_ids": [2, 3]}, "differ in length"),
        ({"prompt_ids": [[1]], "response_ids": [[2]], "n": 3}, "n is 3"),
        (
            {"prompt_ids": [[1]], "response_ids": [[2]]},
            "has the field 'corect'; there are prompt_ids, response",
        ),
    ],
)
def test_a_single_row_is_no_batch(place: Path, given: Any, told: str) -> None:
    stage = RowScorer("not loaded", place / "one/groups.safetensors", columns=Columns(keep="corect"))
    with pytest.raises(ParameterError, match=re.escape(told)):
        stage(given)


def test_workers_leave_room_for_ray() -> None:
    """A pool that takes every processor would wait forever."""
    check_room({"CPU": 2.0}, workers=2, cpus=0.5, gpus=0)
    check_room({"CPU": 9.0, "GPU": 8.0}, workers=16, cpus=0.5, gpus=0.5)
    with pytest.raises(ParameterError, match="wait forever"):
        check_room({"CPU": 2.0}, workers=2, cpus=1, gpus=0)
    with pytest.raises(ParameterError, match=r"2 workers of 1 GPUs leave -1 of 1 GPUs"):
        check_room({"CPU": 8.0, "GPU": 1.0}, workers=2, cpus=1, gpus=1)


@pytest.mark.skipif(ray is not None, reason="Ray is installed")
def test_without_ray_the_error_says_what_to_install(place: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"attnprobe\[ray\]"):
        score_with_ray(place / "in.jsonl", tmp_path / "out")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster on this machine."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def workers_of_ours() -> list[int]:
    """Return the processes of Ray's actor pool that descend from this process."""
    parents, names = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            names[int(fields["Pid"])] = (status.parent / "cmdline").read_bytes()
            parents[int(fields["Pid"])] = int(fields["PPid"])
        except OSError:
            continue  # It has ended.

    def is_ours(process: int) -> bool:
        while process in parents:
            process = parents[process]
            if process == os.getpid():
                return True
        return False

    return [pid for pid, name in names.items() if name.startswith(b"ray::MapWorker") and is_ours(pid)]


@needs_ray
@pytest.mark.slow
def test_ray_writes_the_same_folder_though_a_worker_is_killed(place: Path, cluster: None) -> None:
    """Two workers, one killed by the system with work under way: byte for byte the shards of one process."""
    killed: list[int] = []
    shards = place / "two/shards"

    def kill() -> None:
        for _ in range(20_000):
            if shards.is_dir() and len(list(shards.glob("0*.parquet"))) >= 5:
                killed.extend(workers_of_ours()[:1])
                os.kill(killed[0], signal.SIGKILL)
                return
            time.sleep(0.005)

    killing = threading.Thread(target=kill, daemon=True)
    killing.start()
    found = with_ray(place, "two")
    killing.join()
    assert len(killed) == 1
    assert (found.rows, found.rejected, found.continued) == (ROWS, 1, 0)
    for file in (place / "one/shards").iterdir():
        assert (shards / file.name).read_bytes() == file.read_bytes()
    assert (place / "two/rejected.jsonl").read_text() == (place / "one/rejected.jsonl").read_text()
    # Either of the two continues what the other began.
    for name in ("00003", "00030"):
        (shards / f"{name}.parquet").unlink()
    assert with_ray(place, "two").continued == ROWS - 4
    (shards / "00004.parquet").unlink()
    assert run(place, "two").continued == ROWS - 2
    assert str(lines_of(place / "two")) == str(lines_of(place / "one"))


def with_ray(place: Path, name: str, **options: Any) -> Any:
    arguments = {"settings": SETTINGS, "rows_per_shard": 2, "cpus_per_worker": 0.4, **options}
    return score_with_ray(place / "in.jsonl", place / name, model=place / "model", workers=2, **arguments)


@needs_ray
@pytest.mark.slow
def test_errors_of_workers_are_told_as_our_own(place: Path, cluster: None) -> None:
    with pytest.raises(ResultError, match=r"settings\.horizon\[1\]"):
        with_ray(place, "one", settings=CorpusSettings(horizon=(2, 21)))
    with pytest.raises(ResultError, match=r"columns\.id"):
        with_ray(place, "one", columns=Columns(id="ok"))
    with pytest.raises(ParameterError, match="wait forever"):
        with_ray(place, "one", cpus_per_worker=1)


@needs_ray
@pytest.mark.slow
def test_the_stage_runs_in_ray_data(place: Path, cluster: None) -> None:
    import ray.data

    given = rows(17)
    scored = ray.data.from_items(given).repartition(5).map_batches(
        RowScorer,
        fn_constructor_kwargs={
            "model": str(place / "model"),
            "groups": str(place / "one/groups.safetensors"),
            "settings": SETTINGS,
        },
        batch_format="pyarrow", batch_size=10, compute=ray.data.ActorPoolStrategy(size=2), num_cpus=0.4,
    )  # fmt: skip
    assert_same_scores(scored.take_all(), lines_of(place / "one")[:17])

"""Two workers that shard the policy: weights and heads as of one, and updates as by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import engines
import pytest
import runs
import torch

from attnprobe.rl.verl.engine import FIELD, CreditEngine


@pytest.fixture(scope="module")
def ranks(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    script = [str(runs.HERE / "two_ranks.py"), str(inputs / "model"), str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script],
        env=runs.environment(folder, runs.CREDIT, VERL_USE_EXTERNAL_MODULES="cpu_rig"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(inputs: Path) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The weights and heads of a single process that has all rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNPROBE_CREDIT", json.dumps(runs.CREDIT))
        engine = engines.make_engine(CreditEngine, inputs / "model")
    found = engines.log_probs(engine, engines.make_rows())
    return list(found[FIELD].unbind()), engine._credit.state_dict()["grouping"]["saved_groups"]


def test_weights_and_heads_are_those_of_one_process(ranks, alone) -> None:
    weights, groups = alone
    for rank, found in enumerate(ranks):
        assert found["sharded"]
        for name in ("local_heads", "global_heads", "layers"):
            assert found["grouping"]["saved_groups"][name] == groups[name]
        assert all(map(torch.equal, found["gamma"], weights[rank::2]))


def test_a_worker_with_nothing_but_filling_takes_part(ranks) -> None:
    assert any(bool((row > 1).any()) for row in ranks[0]["mixed"])
    assert all(bool((row == 1).all()) for row in ranks[1]["mixed"])


def test_updates_equal_those_by_hand(ranks) -> None:
    assert [found["same"] for found in ranks] == [True, True]


def test_metrics_and_checkpoints_are_of_all(ranks) -> None:
    first, second = ranks
    counted = ("credit/gamma_mean", "credit/measured_rows", "credit/preplans_per_100_tokens")
    assert {name: first["metrics"][name] for name in counted} == {
        name: second["metrics"][name] for name in counted
    }
    assert first["metrics"]["credit/measured_rows"] == [8.0]
    assert first["restored"] == first["grouping"] == second["restored"]


def test_sequences_that_are_shared_between_processes_are_refused(ranks) -> None:
    assert "ulysses_sequence_parallel_size=2 shares each sequence" in ranks[0]["refused"]

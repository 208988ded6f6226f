"""The examples and the benchmark of credit run as their users start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("credit", ["none", "coupled", "entropy"])
def test_countdown_trains_with_and_without_credit(credit, tmp_path) -> None:
    pytest.importorskip("trl")
    sizes = ("--steps", "2", "--batch-size", "4", "--completion-tokens", "24")
    said = run(
        "examples/grpo_countdown.py", "--model", "tiny", "--credit", credit, *sizes, "--output", str(tmp_path)
    )
    assert "reward" in said
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(("credit/seconds" in step) == (credit != "none") for step in steps)


def test_the_benchmark_of_credit_measures_all_kinds_of_steps(tmp_path) -> None:
    pytest.importorskip("trl")
    output = tmp_path / "credit.json"
    sizes = ("--repeats", "2", "--completion-tokens", "16", "--prompt-tokens", "8", "--threads", "1")
    run("benchmarks/credit.py", "--small", "--no-memory", *sizes, "--output", str(output))
    report = json.loads(output.read_text())
    assert set(report["step_seconds"]) == {"plain", "credit", "regroup"}
    assert all(len(seconds) == 2 for seconds in report["step_seconds"].values())
    assert report["credit_seconds"]["plain"] == [0.0, 0.0]
    assert all(seconds > 0 for seconds in report["credit_seconds"]["regroup"])

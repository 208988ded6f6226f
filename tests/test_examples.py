"""The examples and the benchmark of credit run as their users start them."""

from __future__ import annotations

import json
import os
import shutil
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


def test_a_run_of_qwen3_resumes_as_if_nothing_had_happened(tmp_path) -> None:
    """With evaluation, accumulation and checkpoints; its end is bit for bit that of a run without a break."""
    pytest.importorskip("trl")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    sizes = ("--completion-tokens", "16", "--steps", "2", "--save-every", "1", "--signs", "positive")
    run("examples/grpo_qwen3.py", "--tiny", *sizes, "--output", str(whole))
    shutil.copytree(whole / "checkpoint-1", parts / "checkpoint-1")
    said = run("examples/grpo_qwen3.py", "--tiny", *sizes, "--output", str(parts), "--resume")
    assert "in the last" in said
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, parts)]
    assert weights[0] == weights[1]
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (whole, parts)]
    for log in logs:
        assert [(entry["step"], "eval_reward" in entry) for entry in log] == [
            (1, False),
            (2, False),
            (2, True),
        ]
        assert all(entry["credit/gamma_mean"] > 1 for entry in log[:2])
    seen = [
        [{name: value for name, value in entry.items() if _is_repeated(name)} for entry in log]
        for log in logs
    ]
    assert seen[0] == seen[1]


def _is_repeated(name: str) -> bool:
    return not any(word in name for word in ("seconds", "time", "per_second"))


def test_qwen3_does_not_write_over_a_run(tmp_path, monkeypatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(ROOT / "examples")
    from grpo_qwen3 import checkpoint_of

    assert checkpoint_of(tmp_path / "new", resume=False) is None
    with pytest.raises(SystemExit, match=r"has no checkpoint to resume from: leave --resume out"):
        checkpoint_of(tmp_path, resume=True)
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert checkpoint_of(tmp_path, resume=True) == str(tmp_path / "checkpoint-10")
    with pytest.raises(SystemExit, match=r"already holds a run: continue it with --resume"):
        checkpoint_of(tmp_path, resume=False)


def test_arithmetic_is_right_and_its_problems_differ(monkeypatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(ROOT / "examples")
    from shared import arithmetic

    problems, (correct, tagged) = arithmetic(500, seed=0)
    questions = [
        prompt[-1]["content"].removeprefix("How much is ").rstrip("?") for prompt in problems["prompt"]
    ]
    assert len(set(questions)) == 500
    assert [eval(question) for question in questions] == problems["answer"]
    texts = ["So <answer>{}</answer>", "<answer> {:,}\n</answer>", "{}", "<answer>1{}</answer>", "<answer>{}"]
    answer = problems["answer"][0]
    given = [[{"role": "assistant", "content": text.format(answer)}] for text in texts]
    assert correct(given, answer=[answer] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert tagged(given) == [0.2, 0.2, 0.0, 0.2, 0.1]


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

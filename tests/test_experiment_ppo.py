"""The PPO experiment: its task, that both trainers run it, and that a finished run is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.ppo import __main__ as experiment
from experiments.ppo import trl_run
from experiments.ppo.task import CHANCE, END, LENGTH, SORT, build_policy, build_problems, reward


def test_an_answer_is_the_sorted_prompt() -> None:
    for problem in build_problems(seed=0, count=50):
        *digits, last = problem["prompt_ids"]
        assert last == SORT
        assert problem["answer"] == [*sorted(digits), END]
        assert len(digits) == LENGTH
        assert reward([problem], [problem["answer"]]) == [1.0]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [([1, 2, 3, 4, END], 1.0), ([1, 2, 3, 4, 0], 0.8), ([END], 0.0), ([1, END], 0.2), ([0, 1, 2, 3, 4], 0.0)],
)
def test_the_reward_counts_places(completion, expected) -> None:
    assert reward([{"answer": [1, 2, 3, 4, END]}], [completion]) == [expected]


def test_the_policy_has_a_million_parameters_and_begins_at_chance() -> None:
    policy = build_policy(seed=0)
    assert 0.9e6 < sum(parameter.numel() for parameter in policy.parameters()) < 1.2e6
    assert torch.equal(policy.lm_head.weight, build_policy(seed=0).lm_head.weight)
    history = experiment.train(experiment.config_of("group", steps=1, seed=0))
    assert 0.5 * CHANCE < history[0]["reward"] < 1.5 * CHANCE


def test_text_prompts_become_the_same_ids() -> None:
    tokenizer = trl_run.build_tokenizer()
    for problem in build_problems(seed=3, count=5):
        text = " ".join(trl_run.WORDS[token] for token in problem["prompt_ids"])
        assert tokenizer(text)["input_ids"] == problem["prompt_ids"]


@pytest.mark.slow
def test_a_comparison_writes_curves_and_keeps_what_is_done(tmp_path: Path, monkeypatch) -> None:
    experiment.compare(steps=2, seeds=1, output=tmp_path)
    for name in ("group", "trl"):
        record = json.loads((tmp_path / f"compare-{name}-0.json").read_text())
        assert len(record["reward"]) == 2
        # Equal weights and equally distributed problems: both begin at chance.
        assert 0.5 * CHANCE < record["reward"][0] < 1.5 * CHANCE
        assert record["seconds"] > 0
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    monkeypatch.setattr(experiment, "train", None)
    monkeypatch.setattr(trl_run, "train", None)
    experiment.compare(steps=2, seeds=1, output=tmp_path)


def test_the_committed_runs_learnt_the_task() -> None:
    """What the documentation claims is what the files say."""
    for name in experiment.SETTINGS:
        for seed in range(experiment.SEEDS):
            curve = json.loads((experiment.RESULTS / f"{name}-{seed}.json").read_text())["reward"]
            assert curve[0] < 1.5 * CHANCE
            assert sum(curve[-experiment.LAST :]) / experiment.LAST > 0.9

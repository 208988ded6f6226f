"""Evaluation during a PPO run: what it measures, that it disturbs nothing, and what it refuses."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from attnprobe import ParameterError, ResultError
from attnprobe.rl import PPO, CoupledRhythmCredit, PPOConfig
from attnprobe.rl.ppo import Evaluation
from attnprobe.testing.tiny_models import tiny_model

PROBLEMS = [{"prompt_ids": [number, *range(number % 4)], "number": number} for number in range(1, 11)]
OTHERS = [{"prompt_ids": [number, 5, 6][: 1 + number % 3], "number": number} for number in range(20, 27)]
SETTINGS = {
    "steps": 4,
    "prompts_per_step": 4,
    "group_size": 2,
    "minibatch_size": 4,
    "epochs": 1,
    "max_new_tokens": 8,
    "learning_rate": 1e-3,
}
ENDS = {7, 14, 21}


def even_ids(problems, completions) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completions]


def noisy(problems, completions) -> list[float]:
    """A reward that draws from all global generators."""
    noise = random.random() + np.random.rand() + float(torch.rand(()))
    return [value + 0.1 * noise for value in even_ids(problems, completions)]


def ppo_of(evaluation=None, *, reward=even_ids, folder=None, credit=None, **settings) -> PPO:
    options = None if credit is None else {"horizon": (1, 4)}
    config = PPOConfig(**{**SETTINGS, **settings})
    return PPO(
        tiny_model("llama"), PROBLEMS, reward, config, evaluation=evaluation, folder=folder, ends=ENDS,
        credit=credit, credit_options=options,
    )  # fmt: skip


def split(history) -> tuple[list[dict], list[dict]]:
    """Return the metrics of training and those of evaluation, without durations."""
    kept = [{name: value for name, value in entry.items() if "seconds" not in name} for entry in history]
    training = [{name: value for name, value in e.items() if not name.startswith("eval")} for e in kept]
    return training, [{name: value for name, value in e.items() if name.startswith("eval")} for e in kept]


@pytest.mark.parametrize(
    "evaluation",
    [
        Evaluation(OTHERS, every=1, batch_size=3),
        Evaluation(OTHERS, every=2, temperature=1.3, completions=3, max_new_tokens=5, seed=4),
    ],
)
def test_a_run_with_evaluation_is_the_run_without(evaluation, as_users_call) -> None:
    """Bit for bit, even for a reward that draws from the global generators."""
    runs = []
    for given in (None, evaluation):
        ppo = ppo_of(given, reward=noisy, credit=CoupledRhythmCredit(), estimator="group")
        # Run-time type checking draws from Python's generator, too; hence as_users_call.
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        training, found = split(ppo.train())
        runs.append((training, ppo.model.state_dict()))
        due = [given is not None and step % given.every == 0 for step in (1, 2, 3, 4)]
        assert [list(entry) == ["evaluation/reward", "evaluation/length"] for entry in found] == due
    assert runs[0][0] == runs[1][0]
    assert [name for name, value in runs[0][1].items() if not torch.equal(value, runs[1][1][name])] == []


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_greedy_evaluation_is_what_transformers_generates(batch_size) -> None:
    asked, written = [], []

    def keep(problems, completions):
        asked.extend(problem["number"] for problem in problems)
        written.extend(completions)
        return [float(len(ids)) for ids in completions]

    ppo = ppo_of(Evaluation(OTHERS, keep, batch_size=batch_size, max_new_tokens=12))
    metrics = ppo.run_evaluation()
    expected = []
    for problem in OTHERS:
        ids = torch.tensor([problem["prompt_ids"]])
        output = ppo.model.policy.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
            eos_token_id=sorted(ENDS), pad_token_id=0,
        )  # fmt: skip
        expected.append(output[0, ids.shape[1] :].tolist())
    assert asked == [problem["number"] for problem in OTHERS]
    assert written == expected
    assert len(set(map(len, expected))) > 1
    mean = sum(map(len, expected)) / len(expected)
    assert metrics["evaluation/reward"] == metrics["evaluation/length"] == pytest.approx(mean)


def test_evaluations_differ_by_the_policy_alone() -> None:
    """They begin from the same seed each time; another one samples other completions."""
    ppo = ppo_of(Evaluation(OTHERS, temperature=1.0, completions=2))
    metrics = [ppo.run_evaluation() for _ in range(2)]
    ppo = ppo_of(Evaluation(OTHERS, temperature=1.0, completions=2, seed=1))
    found = split([*metrics, ppo.run_evaluation()])[1]
    assert found[0] == found[1] != found[2]


def test_problems_alone_are_evaluated_by_the_training_reward() -> None:
    ppo = ppo_of(OTHERS)
    assert (ppo.evaluation.every, ppo.evaluation.temperature, ppo.evaluation.max_new_tokens) == (10, 0.0, 8)
    assert 0 <= ppo.run_evaluation()["evaluation/reward"] <= 1


def test_a_resumed_run_evaluates_as_if_nothing_had_happened(tmp_path) -> None:
    evaluation = Evaluation(OTHERS, every=2, temperature=1.0)
    whole = ppo_of(evaluation, folder=tmp_path / "whole").train()
    ppo_of(evaluation, folder=tmp_path / "parts", steps=3).train()
    assert split(ppo_of(evaluation, folder=tmp_path / "parts").train(resume=True)) == split(whole)
    assert [bool(entry) for entry in split(whole)[1]] == [False, True, False, True]
    # It is no part of what a run is: one may be added, or changed, on resuming.
    ppo_of(folder=tmp_path / "added", steps=2).train()
    resumed = split(ppo_of(Evaluation(OTHERS, every=4), folder=tmp_path / "added").train(resume=True))
    assert resumed[0] == split(whole)[0]
    assert [bool(entry) for entry in resumed[1]] == [False, False, False, True]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "at least one evaluation problem; got none"),
        (3, "evaluation problems must be a list of mappings with prompt_ids; got 3"),
        ([{"prompt_ids": [1, 99]}], r"prompt_ids of evaluation problem 0 .*0\.\.98; got 99 at place 1"),
        ([{"prompt_ids": [1] * 250}], "250 tokens and 8 new ones exceed the policy's context of 256"),
        ({"max_new_tokens": 256}, "3 tokens and 256 new ones exceed"),
        ({"reward": "exact"}, "reward .*'exact'"),
        ({"every": 0}, "evaluation's every .*at least 1; got 0"),
        ({"completions": 2}, "temperature 0 would sample 2 equal completions"),
        ({"temperature": -0.5}, "evaluation's temperature .*-0.5"),
        ({"batch_size": 1.5}, "evaluation's batch_size .*1.5"),
        ({"seed": None}, "evaluation's seed .*None"),
    ],
)
def test_wrong_evaluations(given, told, as_users_call) -> None:
    with pytest.raises(ParameterError, match=told):
        ppo_of(Evaluation(OTHERS, **given) if isinstance(given, dict) else given)


def test_what_cannot_be_evaluated(as_users_call) -> None:
    with pytest.raises(ParameterError, match="nothing to evaluate on: give PPO an evaluation"):
        ppo_of().run_evaluation()
    ppo = ppo_of(Evaluation(OTHERS, lambda problems, completions: [[1.0]] * len(completions)))
    with pytest.raises(
        ResultError, match=r"rewards of the evaluation must be .*\[7\]; got \[7, 1\]: flatten"
    ):
        ppo.run_evaluation()

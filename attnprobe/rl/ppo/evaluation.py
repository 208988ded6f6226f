"""Evaluation: problems of its own that a policy is tried on while it is trained.

`PPO` takes one and calls `evaluate` after the steps in which it is due. An evaluation leaves no trace in the
training: it has a generator of its own, the global generators are put back, and nothing is learned from it.
What is left to others: sampling (sampling), and what problems and rewards are (problems).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from math import inf
from typing import Any

import numpy as np
import torch

from attnprobe.errors import ParameterError
from attnprobe.rl.ppo.actor_critic import ActorCritic
from attnprobe.rl.ppo.config import PPOConfig
from attnprobe.rl.ppo.problems import Problem, Reward, check_problems, judge, prompts_of
from attnprobe.rl.ppo.sampling import roll_out
from attnprobe.validation import FloatField, IntField, real_number, whole_number


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a policy is evaluated on while it is trained, and how.

    Attributes:
        problems: mappings with `prompt_ids`, and whatever the reward needs to know.
        reward: `(problems, completions) -> rewards`; None: that of the training.
        every: how many steps lie between evaluations: it is due after each step that is a multiple.
        completions: how many to sample for each problem; the metrics are means over all of them.
        temperature: what logits are divided by; 0: the most probable token each time (greedy).
        max_new_tokens: the longest completion; None: that of the training.
        batch_size: how many completions to sample at a time; None: as many as a step of the training.
        seed: for sampling. Each evaluation starts from it again, so that they differ by the policy alone.

    Raises:
        ParameterError: a value of the wrong type or outside its range, or several completions at
            temperature 0, which would be equal.

    >>> Evaluation([{"prompt_ids": [1, 2]}], every=5).temperature
    0.0
    """

    problems: Sequence[Problem] = field(repr=False)
    reward: Reward | None = None
    _: KW_ONLY
    every: IntField = 10
    completions: IntField = 1
    temperature: FloatField = 0.0
    max_new_tokens: IntField | None = None
    batch_size: IntField | None = None
    seed: IntField = 0

    def __post_init__(self) -> None:
        # Plain Python numbers are stored, whatever kind of number was given.
        for name in ("every", "completions", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None or name in ("every", "completions"):
                checked = whole_number(value, f"an evaluation's {name}", minimum=1)
                object.__setattr__(self, name, checked)
        temperature = real_number(self.temperature, "an evaluation's temperature", minimum=0, below=inf)
        object.__setattr__(self, "temperature", temperature)
        object.__setattr__(self, "seed", whole_number(self.seed, "an evaluation's seed"))
        if temperature == 0 and self.completions > 1:
            raise ParameterError(
                f"an evaluation at temperature 0 would sample {self.completions} equal completions of each "
                "problem: set a temperature above 0, or completions=1"
            )


def evaluation_of(evaluation: Any, reward: Reward, config: PPOConfig, policy: Any) -> Evaluation | None:
    """Return an evaluation whose settings all have values; None if there is none.

    Args:
        evaluation: an `Evaluation`, or problems to evaluate on with its defaults, or None.
        reward: the reward of the training.
        config: the settings of the training.
        policy: the model that is evaluated.

    Raises:
        ParameterError: problems that the policy cannot be asked, or a reward that cannot be called.
    """
    if evaluation is None:
        return None
    given = evaluation if isinstance(evaluation, Evaluation) else Evaluation(evaluation)
    new_tokens = given.max_new_tokens or config.max_new_tokens
    filled = replace(
        given,
        reward=reward if given.reward is None else given.reward,
        max_new_tokens=new_tokens,
        batch_size=given.batch_size or config.prompts_per_step * config.group_size,
    )
    check_problems(filled.problems, filled.reward, new_tokens, policy, kind="evaluation problem")
    return filled


def evaluate(
    evaluation: Evaluation, model: ActorCritic, ends: set[int], device: torch.device
) -> dict[str, float]:
    """Return the metrics of a policy on an evaluation's problems, by names that begin with "evaluation/".

    Args:
        evaluation: what `evaluation_of` returned.
        model: the policy.
        ends: ids that end a completion.
        device: where the policy is.

    Raises:
        ResultError: anything but one finite reward for each completion.
    """
    assert evaluation.reward is not None
    assert evaluation.max_new_tokens is not None
    assert evaluation.batch_size is not None
    started, rewards, lengths = time.perf_counter(), list[float](), list[int]()
    generator = torch.Generator(device).manual_seed(evaluation.seed)
    problems = [problem for problem in evaluation.problems for _ in range(evaluation.completions)]
    with _global_generators_put_back(device):
        for begin in range(0, len(problems), evaluation.batch_size):
            part = problems[begin : begin + evaluation.batch_size]
            episodes = roll_out(
                model,
                prompts_of(part),
                max_new_tokens=evaluation.max_new_tokens,
                temperature=evaluation.temperature,
                ends=ends,
                generator=generator,
            )
            found = judge(evaluation.reward, part, episodes.completions(), "the rewards of the evaluation")
            rewards += found.tolist()
            lengths += episodes.response_mask.sum(-1).tolist()
    return {
        "evaluation/reward": sum(rewards) / len(rewards),
        "evaluation/length": sum(lengths) / len(lengths),
        "evaluation/seconds": time.perf_counter() - started,
    }


@contextmanager
def _global_generators_put_back(device: torch.device) -> Iterator[None]:
    """Put the global generators back at the end: a reward that draws from them must not notice."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)

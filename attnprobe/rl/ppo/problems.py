"""Problems: what a policy is asked, in which order, where its completions end, and how they are rewarded.

`PPO` checks its arguments with `check_problems` and `check_ends`, asks `problems_of_step` for the problems
of each step, and calls the user's reward through `judge`; so does an evaluation. What is left to others:
sampling completions (sampling), and learning from the rewards (algorithm).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.errors import ParameterError, ResultError
from attnprobe.models import end_tokens
from attnprobe.validation import as_float_tensor, as_tensor, brief, whole_numbers

Problem = Mapping[str, Any]
"""A problem has `prompt_ids`, and whatever the reward needs to know."""

Reward = Callable[[list[Problem], list[list[int]]], Sequence[float]]
"""`(problems, completions) -> rewards`, all lists of equal length; a completion is a list of ids."""


def check_problems(
    problems: Any, reward: Any, new_tokens: int, policy: Any, *, kind: str = "problem"
) -> None:
    """Check that a policy can be asked these problems and given this reward.

    Args:
        problems: what should be a list of mappings with `prompt_ids`.
        reward: what should be a callable.
        new_tokens: the longest completion, in tokens.
        policy: the model.
        kind: what messages call a problem.

    Raises:
        ParameterError: no problems, a reward that cannot be called, or prompts that are empty, outside the
            policy's vocabulary, or too long for it.
    """
    if not callable(reward):
        raise ParameterError(
            f"reward must be a callable (problems, completions) -> rewards; got {brief(reward)}"
        )
    if isinstance(problems, str | Mapping) or not hasattr(problems, "__getitem__"):
        raise ParameterError(f"{kind}s must be a list of mappings with prompt_ids; got {brief(problems)}")
    vocabulary = policy.get_input_embeddings().weight.shape[0]
    lengths = []
    for i, problem in enumerate(problems):
        if not isinstance(problem, Mapping) or "prompt_ids" not in problem:
            raise ParameterError(f"{kind} {i} must be a mapping with prompt_ids; got {brief(problem)}")
        ids = whole_numbers(problem["prompt_ids"], f"prompt_ids of {kind} {i}")
        if (largest := max(ids)) >= vocabulary:
            raise ParameterError(
                f"prompt_ids of {kind} {i} must be ids of the policy's vocabulary, 0..{vocabulary - 1}; got "
                f"{largest} at place {ids.index(largest)}: use the policy's own tokenizer"
            )
        lengths.append(len(ids))
    if not lengths:
        raise ParameterError(f"PPO needs at least one {kind}; got none")
    context = getattr(policy.config, "max_position_embeddings", None)
    if context is not None and max(lengths) + new_tokens > context:
        raise ParameterError(
            f"prompts of up to {max(lengths)} tokens and {new_tokens} new ones exceed the policy's context "
            f"of {context}"
        )


def check_ends(ends: Any, policy: Any) -> set[int]:
    """Return the ids that end a completion; None: those of the policy's generation config.

    Raises:
        ParameterError: anything but ids of the policy's vocabulary.
    """
    if ends is None:
        return end_tokens(policy)
    if isinstance(ends, list | tuple | set | frozenset) and not ends:
        return set()
    return set(whole_numbers(ends, "ends", maximum=policy.get_input_embeddings().weight.shape[0] - 1))


def problems_of_step(problems: Sequence[Problem], step: int, wanted: int, seed: int) -> list[Problem]:
    """Return the problems of a step: all of them in a random order, then in another one, and so on.

    They depend on nothing but the arguments, so that a resumed run gets the same ones as an uninterrupted
    run.

    >>> problems = [{"prompt_ids": [number]} for number in range(4)]
    >>> asked = [p["prompt_ids"][0] for step in (0, 1) for p in problems_of_step(problems, step, 2, seed=0)]
    >>> sorted(asked)
    [0, 1, 2, 3]
    """
    chosen: list[Problem] = []
    while len(chosen) < wanted:
        passes, place = divmod(step * wanted + len(chosen), len(problems))
        # Not seed + passes: the second pass of a run would be the first of the run with the next seed.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + passes)
        order = torch.randperm(len(problems), generator=generator)[place : place + wanted - len(chosen)]
        chosen += [problems[number] for number in order.tolist()]
    return chosen


def prompts_of(problems: list[Problem]) -> list[list[int]]:
    """Return the prompts of problems as lists of ids, whatever kind of numbers they are.

    >>> prompts_of([{"prompt_ids": torch.tensor([1, 2])}, {"prompt_ids": range(3)}])
    [[1, 2], [0, 1, 2]]
    """
    return [whole_numbers(problem["prompt_ids"], "prompt_ids") for problem in problems]


@torch.no_grad()
def judge(
    reward: Reward, problems: list[Problem], completions: list[list[int]], name: str = "the rewards"
) -> Float[Tensor, " completion"]:
    """Return the rewards of completions, in float32; `name` is what messages call them.

    Raises:
        ParameterError: a reward that cannot be called.
        ResultError: anything but one finite number for each completion.

    >>> judge(lambda problems, completions: [len(ids) for ids in completions], [{}, {}], [[1], [2, 3]])
    tensor([1., 2.])
    """
    if not callable(reward):
        raise ParameterError(
            f"reward must be a callable (problems, completions) -> rewards; got {brief(reward)}"
        )
    count = len(completions)
    given = as_tensor(reward(problems, completions), name, ResultError)
    if given.shape != (count,):
        # A reward model with a single output gives [n, 1].
        hint = ": flatten them, with rewards.reshape(-1)" if given.ndim > 1 and given.numel() == count else ""
        raise ResultError(
            f"{name} must be one number for each completion, [completion] = [{count}]; got "
            f"{list(given.shape)}{hint}"
        )
    # Before they are checked: a number may be finite in float64 only.
    rewards = as_float_tensor(given, name, error=ResultError).detach().float()
    wrong = (~rewards.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise ResultError(
            f"{name} must be finite numbers; {len(wrong)} of {count} are not, the first "
            f"{float(rewards[wrong[0]])} of completion {wrong[0]}"
        )
    return rewards

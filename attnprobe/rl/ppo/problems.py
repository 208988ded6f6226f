"""Problems: what a policy is asked, in which order, and how its completions are judged.

What is left to others: sampling completions, and what is learnt from the scores (ppo).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.errors import ParameterError, ResultError

Problem = Mapping[str, Any]
"""A problem has `prompt_ids`, and whatever the reward has to know."""

Reward = Callable[[list[Problem], list[list[int]]], Sequence[float]]
"""`(problems, completions) -> scores`, of lists of equal length; a completion is a list of ids."""


def check_problems(problems: Sequence[Problem], new_tokens: int, policy: Any) -> None:
    """Raise `ParameterError` where there are none, or prompts are empty or too long for the policy."""
    lengths = [len(problem.get("prompt_ids", ())) for problem in problems]
    if not lengths or min(lengths) == 0:
        raise ParameterError("training needs problems, each with at least one id in its prompt_ids")
    context = getattr(policy.config, "max_position_embeddings", None)
    if context is not None and max(lengths) + new_tokens > context:
        raise ParameterError(
            f"prompts of up to {max(lengths)} tokens and {new_tokens} new ones exceed the policy's context "
            f"of {context}"
        )


def problems_of_step(problems: Sequence[Problem], step: int, wanted: int, seed: int) -> list[Problem]:
    """Return the problems of a step: all of them in a random order, then in another, and so on.

    They depend on nothing but the arguments, so that a resumed run asks what an uninterrupted one would.

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


@torch.no_grad()
def judge(
    reward: Reward, problems: list[Problem], completions: list[list[int]]
) -> Float[Tensor, " completion"]:
    """Return the scores of completions, in float32.

    Raises:
        ResultError: something else than a finite number for each completion.

    >>> judge(lambda problems, completions: [len(ids) for ids in completions], [{}, {}], [[1], [2, 3]])
    tensor([1., 2.])
    """
    given = reward(problems, completions)
    expected = f"the reward must return {len(completions)} finite numbers, one for each completion"
    try:
        scores = torch.as_tensor(given).detach().float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ResultError(f"{expected}; got {type(given).__name__}") from error
    if scores.shape != (len(completions),) or not bool(scores.isfinite().all()):
        raise ResultError(
            f"{expected}; got {list(scores.shape)}, of which {int((~scores.isfinite()).sum())} are not finite"
        )
    return scores

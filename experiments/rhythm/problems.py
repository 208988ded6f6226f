"""The problems: procedural grade-school word problems, and the paper's prompt for them.

Problem `i` depends only on the seed and on `i`, not on how many are requested. `generate` and `train` use
them, and `raw` stores their templates. What is left to others: answering them (generate).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
SEED = 0

# Far more than are ever requested: the generator's own size must not change the problems.
_SIZE = 100_000
_HELD_OUT = 300
_INSTRUCTION = "Give the result as your final answer."


@dataclass(frozen=True)
class Problem:
    """A word problem, split into its context and its question, and the right answer."""

    index: int
    context: str
    question: str
    answer: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation that poses the problem, in the paper's form."""
        asked = f"Context: {self.context}\nQuestion: {self.question}"
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]

    @property
    def plain_prompt(self) -> str:
        """The same as plain text, for a base model without a chat template."""
        return f"{SYSTEM}\n\nContext: {self.context}\nQuestion: {self.question}\nAnswer:"


def make_problems(count: int) -> list[Problem]:
    """Return the first problems of reasoning-gym's `gsm_symbolic`."""
    source = _source(SEED)
    return [_split(index, source[index]) for index in range(count)]


def template_of(index: int) -> int:
    """Return the number of the template that a problem was made from.

    Problems of one template share their text but for names and numbers, so they are not independent:
    intervals come from drawing templates.
    """
    return int(_source(SEED).task_indices[index])


def training_problems(count: int) -> list[tuple[Problem, str]]:
    """Return other problems of the same generator, from another seed, with their worked solutions.

    The generator has few templates, so problems may repeat: those that the experiment asks are left out.
    """
    asked = {problem.plain_prompt for problem in make_problems(_HELD_OUT)}
    source = _source(SEED + 1)
    found: list[tuple[Problem, str]] = []
    index = 0
    while len(found) < count:
        entry = source[index]
        problem = _split(index, entry)
        if problem.plain_prompt not in asked:
            found.append((problem, entry["metadata"]["answer_cot"]))
        index += 1
    return found


@cache
def _source(seed: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset("gsm_symbolic", size=_SIZE, seed=seed)


def _split(index: int, entry: dict[str, Any]) -> Problem:
    """Split a problem before its question, the last sentence before the generator's own instruction."""
    text = " ".join(entry["question"].split())
    asked = text[: text.index(_INSTRUCTION)].rstrip()
    starts = [match.end() for match in re.finditer(r"[.!?]\s+", asked)]
    start = starts[-1] if starts else 0
    return Problem(index, text[:start].strip(), text[start:], str(entry["answer"]))


def boxed_answer(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` of a text; None if there is none."""
    found = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return found[-1].strip() if found else None


def is_right(text: str, answer: str) -> bool:
    """Return whether a response's boxed answer, or else its last number, equals the right answer."""
    given = boxed_answer(text)
    numbers = re.findall(r"-?\d[\d,]*\.?\d*", given if given is not None else text)
    if not numbers:
        return False
    return float(numbers[-1].replace(",", "").rstrip(".")) == float(answer)

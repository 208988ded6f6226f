"""What the GRPO examples share: problems with their rewards, strategies by name, and the log.

Each example is a script beside this file, and imports it from there: copy both. A task is a function of a
size and a seed; it returns problems as chat prompts, and TRL reward functions. What is left to others:
models, settings and training (the scripts).
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from attnprobe.rl import (
    CoupledRhythmCredit,
    EntropyCredit,
    GlobalAnchorCredit,
    LocalChunkCredit,
    RandomCredit,
)

STRATEGIES = {
    "coupled": CoupledRhythmCredit,
    "local": LocalChunkCredit,
    "global": GlobalAnchorCredit,
    "entropy": EntropyCredit,
    "random": RandomCredit,
}
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def prompt_of(question: str, wanted: str) -> list[dict[str, str]]:
    """Return a question as a chat prompt that says where the answer goes."""
    system = f"Think step by step. Then write the {wanted}, and nothing else, between <answer> and </answer>."
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def answer_of(completion: Any) -> str | None:
    """Return what a completion has between its first pair of tags."""
    found = ANSWER.search(completion[0]["content"])
    return found.group(1).strip() if found else None


def tagged(completions: list[Any], **_: Any) -> list[float]:
    """Reward partial success: a tenth for each of the two tags that is there once."""
    texts = [completion[0]["content"] for completion in completions]
    return [0.1 * sum(text.count(tag) == 1 for tag in ("<answer>", "</answer>")) for text in texts]


def arithmetic(size: int, seed: int) -> tuple[Dataset, list[Any]]:
    """Return different sums and products of four numbers; nothing has to be installed for them."""
    generator, answers = random.Random(seed), dict[str, int]()
    while len(answers) < size:
        a, b, c, d = (generator.randint(low, 99) for low in (11, 11, 2, 2))
        answers[f"({a} * {b} - {c * 10}) * {d}"] = (a * b - c * 10) * d
    prompts = [prompt_of(f"How much is {question}?", "number") for question in answers]

    def correct(completions: list[Any], answer: list[int], **_: Any) -> list[float]:
        """Reward the right number with 1."""
        found = [answer_of(completion) for completion in completions]
        pairs = zip(found, answer, strict=True)
        return [float(text is not None and text.replace(",", "") == str(right)) for text, right in pairs]

    return Dataset.from_dict({"prompt": prompts, "answer": list(answers.values())}), [correct, tagged]


def countdown(size: int, seed: int) -> tuple[Dataset, list[Any]]:
    """Return Countdown: combine all of the given numbers with + - * / to reach the target.

    The problems and their verifier are reasoning-gym's, which has to be installed.
    """
    import reasoning_gym

    problems = reasoning_gym.create_dataset("countdown", size=size, seed=seed, min_numbers=3, max_numbers=4)
    prompts = [prompt_of(problem["question"], "expression") for problem in problems]

    def correct(completions: list[Any], problem: list[int], **_: Any) -> list[float]:
        """Reward the right expression with 1, and any other that uses the numbers with a little."""
        pairs = zip(completions, problem, strict=True)
        return [
            float(problems.score_answer(answer=answer_of(completion), entry=problems[index]))
            for completion, index in pairs
        ]

    def mentioned(completions: list[Any], problem: list[int], **_: Any) -> list[float]:
        """Reward partial success: up to a tenth for the numbers."""
        rewards = []
        for completion, index in zip(completions, problem, strict=True):
            given = {str(number) for number in problems[index]["metadata"]["numbers"]}
            found = given & set(re.findall(r"\d+", completion[0]["content"]))
            rewards.append(0.1 * len(found) / len(given))
        return rewards

    return Dataset.from_dict({"prompt": prompts, "problem": list(range(size))}), [correct, tagged, mentioned]


TASKS = {"arithmetic": arithmetic, "countdown": countdown}


class LogFile(TrainerCallback):
    """Writes the metrics of steps and evaluations to a file, a line each, whenever some are logged."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the whole history again: a resumed run brings along that of its first part."""
        if state.is_world_process_zero:
            entries = [entry for entry in state.log_history if "reward" in entry or "eval_reward" in entry]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))

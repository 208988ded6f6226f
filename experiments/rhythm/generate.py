"""The first step: let the model answer the problems, and store each answer as soon as it is finished.

Several problems are answered at a time, padded on the left. Sampling adds Gumbel noise to the scaled logits
and takes the largest, which is the same as sampling from the softmax; the noise for each problem comes from
its own generator. So an answer depends on the problem, the seed and the temperature, but not on which
problems are answered in the same batch. What is left to others: measuring what the model did (measure).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnprobe.models import LoadedModel, end_tokens
from attnprobe.progress import progress_bar
from attnprobe.texts import chat_prompt_ids
from experiments.rhythm.problems import Problem, is_right
from experiments.rhythm.records import append_record, read_records

TEMPERATURE = 0.7
MAX_NEW_TOKENS = 256
SEED = 0


class GumbelNoise:
    """A logits processor that turns the greedy choice into a sample, each sequence by its own generator."""

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scaled logits with new noise."""
        noise = torch.stack(
            [
                torch.rand(scores.shape[1], generator=generator, dtype=torch.float64)
                for generator in self._generators
            ]
        )
        gumbel = -(-noise.clamp(min=1e-300).log()).log()
        return scores.double() / self._temperature + gumbel.to(scores.device)


def prompt_of(loaded: LoadedModel, problem: Problem) -> list[int]:
    """Return a problem's prompt: as a chat if the model has a chat template, else as plain text."""
    if getattr(loaded.tokenizer, "chat_template", None) is not None:
        return chat_prompt_ids(loaded.tokenizer, problem.messages)
    return list(loaded.tokenizer(problem.plain_prompt)["input_ids"])


def generate(
    loaded: LoadedModel,
    problems: Sequence[Problem],
    path: Path,
    *,
    batch_size: int = 14,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Answer the problems that have no answer yet, and return the records of all of them."""
    done = {record["problem"]: record for record in read_records(path)}
    open_problems = [problem for problem in problems if problem.index not in done]
    with progress_bar("generating", len(problems), shown=progress) as advance:
        for _ in range(len(problems) - len(open_problems)):
            advance()
        for begin in range(0, len(open_problems), batch_size):
            part = open_problems[begin : begin + batch_size]
            prompts = [prompt_of(loaded, problem) for problem in part]
            for problem, prompt, answer in zip(part, prompts, sample(loaded, prompts, part), strict=True):
                text = loaded.tokenizer.decode(answer)
                done[problem.index] = {
                    "problem": problem.index,
                    "answer": problem.answer,
                    "right": is_right(text, problem.answer),
                    "finished": len(answer) < MAX_NEW_TOKENS,
                    "prompt_ids": prompt,
                    "response_ids": answer,
                    "text": text,
                }
                append_record(path, done[problem.index])
                advance()
    return [done[problem.index] for problem in problems]


@torch.no_grad()
def sample(loaded: LoadedModel, prompts: Sequence[list[int]], problems: Sequence[Problem]) -> list[list[int]]:
    """Return an answer to each prompt, without the token that ended it."""
    width = max(len(prompt) for prompt in prompts)
    pad = loaded.tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = loaded.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=pad,
        logits_processor=[GumbelNoise([SEED + problem.index for problem in problems], TEMPERATURE)],
    )
    ends = end_tokens(loaded.model)
    answers = []
    for written in output[:, width:].tolist():
        stop = next((i for i, token in enumerate(written) if token in ends), len(written))
        answers.append(written[:stop])
    return answers

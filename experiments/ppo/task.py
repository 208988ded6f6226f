"""Sorting digits: a task that a model of a million parameters learns from rewards alone, in minutes.

The prompt is a few digits in any order, and a token that asks for them sorted. The reward is the share of
positions with the right token, so that a policy that samples at random gets less than a tenth. What is left
to others: training (`__main__`).
"""

from __future__ import annotations

from typing import Any

import torch

DIGITS = 10
SORT, END = DIGITS, DIGITS + 1
VOCABULARY = DIGITS + 2
LENGTH = 4
CHANCE = 1 / VOCABULARY
"""The most that a policy that samples at random gets: it may also end too early."""


def build_policy(seed: int) -> Any:
    """Return a llama of a million parameters with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    return LlamaForCausalLM(config)


def build_problems(seed: int, count: int = 20_000) -> list[dict[str, Any]]:
    """Return problems: the ids of a prompt, and of the sorted digits with the end token."""
    digits = torch.randint(0, DIGITS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"prompt_ids": [*given, SORT], "answer": [*sorted(given), END]} for given in digits.tolist()]


def reward(problems: list[Any], completions: list[list[int]]) -> list[float]:
    """Return the share of positions with the right token.

    >>> reward([{"answer": [1, 2, 3, 4, 11]}], [[1, 2, 4, 4, 11]])
    [0.8]
    """
    scores = []
    for problem, completion in zip(problems, completions, strict=True):
        answer = problem["answer"]
        right = sum(given == wanted for given, wanted in zip(completion, answer, strict=False))
        scores.append(right / len(answer))
    return scores

"""Calls of several blocks, and the fused kernel's answers to them beside the dense ones; on any device."""

from __future__ import annotations

from typing import Any

import torch

from attnprobe import DenseAttention, FactoredAttention
from attnprobe.attention import fused_sums
from attnprobe.attention.masks import CausalMask
from attnprobe.testing.reference import dense_pattern
from attnprobe.testing.strategies import CallInputs

Answers = dict[str, torch.Tensor]


def fused_answers(attention: FactoredAttention, features: torch.Tensor, weights: torch.Tensor) -> Answers:
    scores, sums = attention.scores, attention.log_sum_exp()
    return {
        "log-sum-exp": fused_sums.log_sum_exp(scores),
        "attend": fused_sums.attended(scores, sums, features),
        "receive": fused_sums.received(scores, sums, weights, 0, None),
        "receive within": fused_sums.received(scores, sums, weights, 3, 11),
    }


def dense_answers(inputs: CallInputs, features: torch.Tensor, weights: torch.Tensor) -> Answers:
    options = dict(inputs.options)
    if isinstance(options.get("mask"), CausalMask):
        whole = [slice(0, part.shape[2]) for part in (inputs.query, inputs.key)]
        options["mask"] = options["mask"].block(*whole)
    dense = DenseAttention(dense_pattern(inputs.query, inputs.key, **options))
    return {
        "attend": dense.attend(features.double()),
        "receive": dense.receive(weights.double()),
        "receive within": dense.receive(weights.double(), 3, 11),
    }


def questions(inputs: CallInputs, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features and weights of two columns, half of them zeros; none is negative."""
    generator = torch.Generator().manual_seed(3)
    batch, _, queries, _ = inputs.query.shape
    features = torch.randn(batch, inputs.key.shape[2], 2, generator=generator).clamp(min=0.0).to(dtype)
    weights = torch.randn(batch, queries, 2, generator=generator).clamp(min=0.0).to(dtype)
    return features, weights


def assert_same(actual: Answers, expected: Answers, error: float) -> None:
    for question, answer in expected.items():
        torch.testing.assert_close(
            actual[question].double(), answer, rtol=error, atol=error, msg=lambda m, q=question: q + m
        )


def long_call(kind: str, tokens: int = 300) -> CallInputs:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, tokens, 16, generator=generator)
    key = torch.randn(2, 2, tokens, 16, generator=generator)
    column = torch.arange(tokens)
    padded = torch.ones(2, tokens, dtype=torch.bool)
    padded[0, :140] = False
    documents = (column >= 90).long() + (column >= 200).long()
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "window": {"window": 40},
        "padding": {"key_mask": padded},
        "soft cap and sinks": {"softcap": 5.0, "sinks": torch.linspace(-1.0, 3.0, 6)},
        "documents": {"mask": CausalMask.from_segments(documents.expand(2, -1))},
    }
    return CallInputs(query, key, options[kind])


LONG = ["plain", "window", "padding", "soft cap and sinks", "documents"]

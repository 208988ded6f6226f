"""Greedy continuations of a text from several forced tokens, all from one key/value cache.

The text before the forced tokens is run once; its cache is copied for each of them, and they go on
together as one batch. What is left to others: which tokens are forced where, and what the texts are
compared by (perturb).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from attnprobe.errors import ParameterError, UnsupportedModelError
from attnprobe.models import end_tokens


@dataclass(frozen=True)
class ForcedTokens:
    """Tokens forced after a text, the text's own first, with what the model wrote after each.

    Attributes:
        tokens: the ids; the others follow in order of probability.
        probabilities: what the model gave each of them, at temperature 1.
        continuations: the ids after the forced token, without the token that ended the text.
    """

    tokens: list[int]
    probabilities: list[float]
    continuations: list[list[int]]


def check_generates(model: Any) -> str:
    """Return the name of a transformers model that can generate, or raise `UnsupportedModelError`."""
    if not callable(getattr(model, "generate", None)) or not hasattr(model, "generation_config"):
        raise UnsupportedModelError(
            f"{type(model).__module__}.{type(model).__qualname__} cannot generate: pass a transformers "
            "causal language model (of a wrapper, the model inside)"
        )
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


@torch.no_grad()
def force_tokens(
    model: Any, before: Int[Tensor, " token"], token: int, candidates: int, max_new_tokens: int
) -> ForcedTokens:
    """Force a token and its likeliest alternatives after a text, and let the model go on greedily.

    Args:
        model: a transformers causal language model; it runs in evaluation mode and is left as it was.
        before: the text, without padding.
        token: what stands after it.
        candidates: how many others are forced, the likeliest first.
        max_new_tokens: how long continuations may become.

    Raises:
        ParameterError: an empty text, or counts below 1.
    """
    if len(before) == 0 or candidates < 1 or max_new_tokens < 1:
        raise ParameterError(
            f"forcing needs a text, candidates and new tokens; got {len(before)}, {candidates} and "
            f"{max_new_tokens}"
        )
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        before = before.to(model.device)
        seen = model(before[None], use_cache=True)
        probability = seen.logits[0, -1].float().softmax(-1)
        likeliest = probability.topk(min(candidates + 1, len(probability))).indices.tolist()
        tokens = [token, *[other for other in likeliest if other != token][:candidates]]
        # `generate` runs what the cache does not hold yet: the forced token alone.
        cache = seen.past_key_values
        cache.batch_repeat_interleave(len(tokens))
        forced = torch.tensor(tokens, device=before.device)[:, None]
        ids = torch.cat([before.expand(len(tokens), -1), forced], dim=1)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            generation_config=_greedy(model, max_new_tokens),
        )
    finally:
        for module in was_training:
            module.training = True
    ends = end_tokens(model)
    continuations = []
    for row in output[:, len(before) :].tolist():
        # The forced token may itself be one that ends the text: then nothing follows.
        stop = next((i for i, found in enumerate(row) if found in ends), len(row))
        continuations.append(row[1:stop])
    return ForcedTokens(tokens, [float(probability[other]) for other in tokens], continuations)


def _greedy(model: Any, max_new_tokens: int) -> Any:
    """Return a generation config of its own: the model's may hold sampling options or penalties."""
    from transformers import GenerationConfig

    ends = sorted(end_tokens(model))
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )

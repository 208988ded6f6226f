"""Greedy continuations of a text from several forced tokens, all from one key/value cache.

`perturb` calls `force_tokens` at each position that it tries. The text before the forced tokens is run once,
its cache is copied for each of them, and all are continued together as one batch. What is left to others:
which tokens are forced where, and how texts are compared (perturbation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from attnprobe.adapters.base import display_name, evaluation_mode
from attnprobe.adapters.multimodal import media_tokens
from attnprobe.adapters.wrappers import execution_device
from attnprobe.errors import BatchError, ParameterError, UnsupportedModelError
from attnprobe.models import end_tokens
from attnprobe.validation import ArrayLike, IntLike, as_tensor, brief, whole_number


@dataclass(frozen=True)
class ForcedTokens:
    """Tokens forced after a text, the text's own token first, with the continuation of each.

    Attributes:
        tokens: the ids; the text's own token first, then the others in order of probability.
        probabilities: the model's probability of each, at temperature 1.
        continuations: the ids after each forced token, without the token that ended the text.
    """

    tokens: list[int]
    probabilities: list[float]
    continuations: list[list[int]]


def check_generates(model: Any) -> str:
    """Return the name of a transformers model that can generate, or raise `UnsupportedModelError`."""
    generates = callable(getattr(model, "generate", None)) and hasattr(model, "generation_config")
    if isinstance(model, type) or not generates:
        kind = model if isinstance(model, type) else type(model)
        raise UnsupportedModelError(
            f"{kind.__module__}.{kind.__qualname__} cannot generate: pass a transformers causal language "
            "model (of a wrapper, the model inside)"
        )
    return display_name(model)


def check_vocabulary(model: Any, ids: Int[Tensor, "..."]) -> None:
    """Check that a model has embeddings for all ids.

    Raises:
        BatchError: ids outside the vocabulary, or ids that stand for an image, which is not there.
    """
    media = media_tokens(model.config)
    if not media.keys().isdisjoint(ids.flatten().tolist()):
        raise BatchError(
            f"there are {' or '.join(sorted(set(media.values())))} tokens among the ids, but only text can "
            f"be continued from forced tokens: {display_name(model)} would read them as if they were text"
        )
    size = int(model.get_input_embeddings().weight.shape[0])
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise BatchError(
            f"token ids {int(ids.min())}..{int(ids.max())} are outside the vocabulary of "
            f"{display_name(model)}, which has {size} ids: were they made with another tokenizer?"
        )


@torch.no_grad()
def force_tokens(
    model: Any, before: ArrayLike, token: IntLike, candidates: IntLike, max_new_tokens: IntLike
) -> ForcedTokens:
    """Force a token and its likeliest alternatives after a text, and let the model continue greedily.

    Args:
        model: a transformers causal language model; it runs in evaluation mode and is left as it was.
        before: the ids of the text, without padding.
        token: the text's own next token.
        candidates: how many other tokens are forced, the likeliest first; at most the whole vocabulary.
        max_new_tokens: the longest continuation, in tokens.

    Raises:
        ParameterError: an empty text, or counts below 1.
        BatchError: ids outside the vocabulary.
        UnsupportedModelError: a model that cannot generate.
    """
    check_generates(model)
    token = whole_number(token, "token")
    candidates = whole_number(candidates, "candidates", minimum=1)
    max_new_tokens = whole_number(max_new_tokens, "max_new_tokens", minimum=1)
    text = as_tensor(before, "before")
    if text.ndim != 1 or len(text) == 0 or text.is_floating_point():
        raise ParameterError(f"before must be the ids [token] of a non-empty text; got {brief(text)}")
    check_vocabulary(model, torch.cat([text, text.new_tensor([token])]))
    # Not model.device, which says where offloaded weights wait.
    text = text.to(execution_device(model.get_input_embeddings(), model))
    with evaluation_mode(model.modules()):
        seen = model(text[None], use_cache=True)
        probability = seen.logits[0, -1].float().softmax(-1)
        likeliest = probability.topk(min(candidates + 1, len(probability))).indices.tolist()
        tokens = [token, *[other for other in likeliest if other != token][:candidates]]
        # `generate` runs only what the cache does not hold yet: the forced token.
        cache = seen.past_key_values
        cache.batch_repeat_interleave(len(tokens))
        forced = torch.tensor(tokens, device=text.device)[:, None]
        ids = torch.cat([text.expand(len(tokens), -1), forced], dim=1)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            generation_config=_greedy(model, max_new_tokens),
        )
    ends = end_tokens(model)
    continuations = []
    for written in output[:, len(text) :].tolist():
        # The forced token may itself end the text: then nothing follows.
        stop = next((i for i, found in enumerate(written) if found in ends), len(written))
        continuations.append(written[1:stop])
    return ForcedTokens(tokens, [float(probability[other]) for other in tokens], continuations)


def _greedy(model: Any, max_new_tokens: int) -> Any:
    """Return a new generation config: the model's own may set sampling options or penalties."""
    from transformers import GenerationConfig

    ends = sorted(end_tokens(model))
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )

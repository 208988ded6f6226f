"""Vision-language models of transformers: which tokens stand for images, and passes with their pixels.

The text decoder of such a model is read like any other; only what goes into it differs. The transformers
adapter calls these for its own passes, and a reading to say why a mask is not causal. What is left to others:
what a batch holds besides tokens (model_inputs), and which modules are read (architecture).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from attnprobe.batch import TokenBatch
from attnprobe.errors import AttnprobeError, BatchError


def media_tokens(config: Any) -> dict[int, str]:
    """Return the ids that stand for a part of an image, video or sound, each with which of them.

    >>> from types import SimpleNamespace
    >>> media_tokens(SimpleNamespace(image_token_id=7, video_token_index=8, audio_token_id=None))
    {7: 'image', 8: 'video'}
    """
    found: dict[int, str] = {}
    for medium in ("image", "video", "audio"):
        for name in (f"{medium}_token_id", f"{medium}_token_index"):
            token = getattr(config, name, None)
            if isinstance(token, int) and token >= 0:
                found.setdefault(token, medium)
    return found


def why_not_causal(config: Any, name: str) -> str:
    """Return why a model's attention cannot be read that looks at later tokens."""
    if media_tokens(config):
        return (
            f"{name} lets the tokens of an image, in some families also those of the prompt, see each other, "
            "later ones included: attnprobe reads causal attention only"
        )
    return (
        f"{name} is an encoder: its attention looks at later tokens. attnprobe reads causal language models"
    )


def pass_arguments(batch: TokenBatch, model: nn.Module, name: str) -> dict[str, Any]:
    """Return the arguments of a pass over a batch with further inputs, as its caller would give them.

    Positions are left to the model, unless the caller gave some: some models compute them from the images.

    Raises:
        BatchError: inputs that the model does not take.
    """
    assert batch.model_inputs is not None
    accepted = inspect.signature(type(model).forward).parameters
    # Types of tokens are what tokenizers add by default, whether the model takes them or not.
    inputs = {
        key: value
        for key, value in batch.model_inputs.items()
        if key in accepted or not key.endswith("token_type_ids")
    }
    unknown = sorted(inputs.keys() - accepted.keys())
    if unknown:
        raise BatchError(
            f"{name} takes no {', '.join(unknown)}: were these inputs made by another model's processor?"
        )
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long(), **inputs}


@contextmanager
def telling_mismatches(name: str) -> Iterator[None]:
    """Raise the model's own complaint about its inputs, such as too few pixels, as an error of ours.

    Raises:
        BatchError: inputs that do not belong together.
    """
    try:
        yield
    except AttnprobeError:
        raise
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise BatchError(f"{name} cannot run these inputs: {error}") from error


@contextmanager
def positions_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep what a model remembers of the positions in its last images while the context is open.

    Qwen-VL and its relatives store it in an attribute, from which a generation under way continues.
    """
    before = {module: vars(module)["rope_deltas"] for module in modules if "rope_deltas" in vars(module)}
    try:
        yield
    finally:
        for module, value in before.items():
            module.rope_deltas = value

"""What a model is given besides its tokens: pixels, the grids of images, positions that depend on them.

A processor of a vision-language model returns these along with token ids. `TokenBatch` keeps them as they
are, and an adapter passes them on: which rows of the pixels belong to which example only the model knows, so
such a batch is run as one pass, in the caller's own layout. What is left to others: which tokens stand for an
image (adapters), and what is measured (measurement).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from attnprobe.axes import equal_tensors
from attnprobe.errors import BatchError
from attnprobe.layout import packed_segments
from attnprobe.validation import as_tensor

_MEDIA = ("pixel_", "image_", "video_", "audio_", "input_features", "input_image_", "input_audio_")


def holds_media(names: set[str]) -> bool:
    """Return whether there is an image, a video or sound among inputs of these names.

    >>> holds_media({"input_ids", "pixel_values"}), holds_media({"input_ids", "labels"})
    (True, False)
    """
    return any(name.startswith(_MEDIA) for name in names)


def as_model_inputs(values: Mapping[str, Any], tokens: tuple[int, ...]) -> dict[str, Tensor]:
    """Return further inputs of a model as tensors, for token ids of a shape `[batch, token]`.

    Raises:
        BatchError: something that is not numbers, embeddings in place of the tokens, or shapes that cannot be
            right.
    """
    if "inputs_embeds" in values:
        raise BatchError("a batch holds input_ids, and no inputs_embeds in their place")
    inputs: dict[str, Tensor] = {}
    for name, value in values.items():
        try:
            inputs[name] = as_tensor(value, name, BatchError)
        except BatchError as error:
            raise BatchError(f"{error}. Call the processor with return_tensors='pt'") from None
        if name.startswith("pixel_values") and inputs[name].ndim < 2:
            raise BatchError(
                f"{name} must be an image's values, of at least two axes; got {list(inputs[name].shape)}"
            )
        if name.endswith("token_type_ids") and inputs[name].shape != tokens:
            raise BatchError(
                f"{name} must be [batch, token] = {list(tokens)}; got {list(inputs[name].shape)}"
            )
    return inputs


def with_positions(
    values: Mapping[str, Any], position_ids: Any, real: Bool[Tensor, "batch token"]
) -> Mapping[str, Any]:
    """Return further inputs with the caller's position ids, if there are any, among them.

    Positions within an image have several axes, and the model takes them as they are.

    Raises:
        BatchError: packed examples, which cannot be run in the caller's own layout.
    """
    if position_ids is None:
        return values
    positions = as_tensor(position_ids, "position_ids", BatchError)
    if positions.ndim < 3 and bool((packed_segments(positions, real) > 0).any()):
        raise BatchError(f"packed examples cannot be run with {', '.join(values)}: pass one sequence in each")
    return {**values, "position_ids": positions}


def refuse_inputs(inputs: Mapping[str, Tensor] | None, action: str) -> None:
    """Refuse to take a batch apart that holds more than tokens.

    Raises:
        BatchError: it does.
    """
    if inputs is not None:
        raise BatchError(
            f"cannot {action} a batch with {', '.join(inputs)}: it is not known which of their rows belong "
            "to which example. Make a batch of each part with the model's processor; or, if only tokens are "
            "needed, drop them: dataclasses.replace(batch, model_inputs=None)"
        )


def equal_inputs(ours: Mapping[str, Tensor] | None, theirs: Mapping[str, Tensor] | None) -> bool:
    """Return whether two batches have the same further inputs, on any device."""
    if ours is None or theirs is None:
        return ours is theirs
    return set(ours) == set(theirs) and all(equal_tensors(ours[name], theirs[name]) for name in ours)

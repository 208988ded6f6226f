"""The parts of a `TokenBatch` from what users have: ids and masks in any form, texts, a trainer's rollout.

The methods of `TokenBatch` that build a batch call these: `batch_parts` checks masks against ids and finds
out what is response; `joined_parts` and `rollout_parts` put prompts and responses together first. What is
left to others: the forms of ids (ids), padding and packing (layout), texts (texts), and the batch itself
(batch).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attnprobe.errors import BatchError
from attnprobe.ids import (
    as_ids,
    as_lists,
    ragged_lengths,
    rectangle,
    rectangle_of_mask,
    response_starts,
)
from attnprobe.layout import check_padding, packed_segments
from attnprobe.model_inputs import with_positions
from attnprobe.segments import SegmentsLike
from attnprobe.validation import ArrayLike, as_mask


@dataclass(frozen=True)
class BatchParts:
    """What a batch is made of; see the attributes of `TokenBatch`.

    `lengths` are those of ids that were given as lists of different lengths, and otherwise None.
    """

    input_ids: Int[Tensor, "batch token"]
    attention_mask: Bool[Tensor, "batch token"]
    response_mask: Bool[Tensor, "batch token"]
    segment_ids: Int[Tensor, "batch token"] | None
    model_inputs: Mapping[str, Any] | None
    lengths: list[int] | None

    def widened(self, segments: SegmentsLike) -> SegmentsLike:
        """Return segments with masks as wide as the ids, where they were given as ragged as these."""
        if self.lengths is None or not isinstance(segments, Mapping):
            return segments
        return {name: rectangle_of_mask(value, self.lengths) for name, value in segments.items()}


def batch_parts(
    input_ids: Any,
    attention_mask: Any = None,
    *,
    response_mask: Any = None,
    response_start: Any = None,
    position_ids: Any = None,
    model_inputs: Mapping[str, Any] | None = None,
) -> BatchParts:
    """Return the parts of a batch, from the arguments of `TokenBatch.from_ids`.

    Raises:
        BatchError: shapes that do not match, masks with other values, an attention mask with holes, empty
            examples or responses.

    >>> batch_parts([[5, 6, 7, 8], [5, 6, 7]], response_start=2).response_mask.int().tolist()
    [[0, 0, 1, 1], [0, 0, 1, 0]]
    """
    input_ids = as_lists(input_ids)
    lengths = ragged_lengths(input_ids)
    ids = as_ids(rectangle(input_ids, "input_ids", lengths), "input_ids")
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2:
        raise BatchError(f"input_ids must be [batch, token]; got {list(ids.shape)}")

    def mask_of(value: Any, name: str) -> Tensor:
        whole = rectangle(as_lists(value), name, lengths)
        return as_mask(whole, name, tuple(ids.shape), device=ids.device, error=BatchError)

    real = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    if lengths is not None:
        real = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    if attention_mask is not None:
        real = real & mask_of(attention_mask, "attention_mask")
    packed = None
    if model_inputs is not None:
        model_inputs = with_positions(model_inputs, position_ids, real)
    elif position_ids is not None:
        positions = rectangle(as_lists(position_ids), "position_ids", lengths)
        packed = packed_segments(as_ids(positions, "position_ids"), real)
    check_padding(real)
    if response_mask is not None and response_start is not None:
        raise BatchError("pass response_mask or response_start, not both")
    response = real
    if response_start is not None:
        if packed is not None:
            raise BatchError("packed examples hold several responses: pass response_mask")
        response = real & (
            torch.arange(ids.shape[1], device=ids.device) >= response_starts(response_start, ids)
        )
    elif response_mask is not None:
        response = mask_of(response_mask, "response_mask")
    empty = ~response.any(-1)
    if bool(empty.any()):
        raise BatchError(
            f"example {int(empty.nonzero()[0])} has an empty response: there is no token to describe"
        )
    return BatchParts(ids, real, response, packed, model_inputs, lengths)


def joined_parts(heads: list[list[int]], tails: list[list[int]]) -> dict[str, Any]:
    """Return the arguments of `TokenBatch.from_ids` for tokenized prompts and their responses.

    Raises:
        BatchError: different numbers of prompts and responses, none at all, or an empty response.
    """
    if len(heads) != len(tails):
        raise BatchError(f"{len(heads)} prompts but {len(tails)} responses")
    if not heads:
        raise BatchError("the batch is empty: pass at least one prompt and response")
    for i, tail in enumerate(tails):
        if not tail:
            raise BatchError(f"response {i} is empty: there is no token to describe")
    return {
        "input_ids": [head + tail for head, tail in zip(heads, tails, strict=True)],
        "response_start": [len(head) for head in heads],
    }


def rollout_parts(
    prompt_ids: ArrayLike,
    prompt_mask: ArrayLike,
    completion_ids: ArrayLike,
    completion_mask: ArrayLike,
    response_mask: ArrayLike | None,
) -> dict[str, Any]:
    """Return the arguments of `TokenBatch.from_ids` for those of `TokenBatch.from_rollout`.

    Raises:
        BatchError: shapes or masks that do not match.
    """
    prompt, completion = as_ids(prompt_ids, "prompt_ids"), as_ids(completion_ids, "completion_ids")
    if prompt.ndim != 2 or completion.ndim != 2:
        raise BatchError(
            "prompt_ids and completion_ids must be [batch, token], got "
            f"{list(prompt.shape)} and {list(completion.shape)}"
        )
    if prompt.shape[0] != completion.shape[0]:
        raise BatchError(f"{prompt.shape[0]} prompts but {completion.shape[0]} completions")

    def mask_of(value: Any, name: str, ids: Tensor) -> Tensor:
        return as_mask(value, name, tuple(ids.shape), device=prompt.device, error=BatchError)

    asked = mask_of(prompt_mask, "prompt_mask", prompt)
    written = mask_of(completion_mask, "completion_mask", completion)
    own = written if response_mask is None else mask_of(response_mask, "response_mask", completion)
    return {
        "input_ids": torch.cat([prompt, completion.to(prompt.device)], dim=1),
        "attention_mask": torch.cat([asked, written], dim=1),
        "response_mask": torch.cat([torch.zeros_like(asked), own], dim=1),
    }

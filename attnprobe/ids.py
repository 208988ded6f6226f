"""Token ids as users pass them in: mappings, tensors, arrays, ragged lists, labels, starts of responses.

`TokenBatch.of` and whatever makes the parts of a batch (batch_parts) call these. What is left to others:
masks (batch_parts), padding and packing (layout).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from attnprobe.errors import BatchError
from attnprobe.model_inputs import holds_media
from attnprobe.validation import as_tensor, brief, is_array


def of_mapping(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `TokenBatch.from_ids` in a tokenizer's or a processor's output, or the like.

    Raises:
        BatchError: no ids, several masks of the response, or something that is no part of a batch.
    """
    responses = ("response_mask", "assistant_masks", "labels")
    known = {"input_ids", "attention_mask", "position_ids", "segments", *responses}
    # What tokenizers add by default, and no model needs.
    unused = {"special_tokens_mask", "offset_mapping", "length", "texts"}
    if "input_ids" not in value:
        raise BatchError(f"a batch needs input_ids; got a mapping with {sorted(map(str, value))}")
    present = {str(name): part for name, part in value.items() if part is not None}
    further = {name: part for name, part in present.items() if name not in known | unused}
    inputs = further if holds_media(set(further)) else None
    if inputs is None:
        _check_text_only(further, known)
    given = [name for name in responses if name in present]
    if len(given) > 1:
        raise BatchError(f"{' and '.join(given)} each say what is response: pass only one of them")
    response = present[given[0]] if given else None
    if given == ["labels"]:
        response = labelled(response)
    return {
        "input_ids": value["input_ids"],
        "attention_mask": present.get("attention_mask"),
        "position_ids": present.get("position_ids"),
        "response_mask": response,
        "model_inputs": inputs,
        "segments": present.get("segments"),
    }


def _check_text_only(further: dict[str, Any], known: set[str]) -> None:
    """Check what a batch without images holds besides its own parts: only types, all of them text."""
    strange = sorted(further.keys() - {"token_type_ids", "mm_token_type_ids"})
    if strange:
        raise BatchError(f"a batch holds {', '.join(sorted(known))}, not {', '.join(strange)}")
    types = further.get("mm_token_type_ids")
    if types is not None and bool(as_ids(types, "mm_token_type_ids").any()):
        raise BatchError(
            "mm_token_type_ids mark tokens of an image, but there are no pixel_values: pass all that the "
            "processor returned"
        )


def labelled(labels: Any) -> Any:
    """Return which labels are not -100, in the same form as the labels."""
    labels = as_lists(labels)
    if isinstance(labels, list) and labels and all(isinstance(each, list | tuple) for each in labels):
        return [labelled(each) for each in labels]
    numbers = as_tensor(labels, "labels", BatchError)
    if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
        raise BatchError(f"labels must be whole numbers; got {brief(numbers)}")
    marked = numbers != -100
    return marked.tolist() if isinstance(labels, list | tuple) else marked


def as_lists(value: Any) -> Any:
    """Return a list of tensors, arrays or ranges, one for each example, as a list of lists."""
    if not isinstance(value, list | tuple):
        return value
    examples = []
    for each in value:
        is_numbers = isinstance(each, Tensor) or is_array(each)
        examples.append(each.tolist() if is_numbers else list(each) if isinstance(each, range) else each)
    return examples


def ragged_lengths(ids: Any) -> list[int] | None:
    """Return the lengths of lists of ids that differ in length; None if they do not."""
    if not isinstance(ids, list | tuple) or not ids:
        return None
    if not all(isinstance(example, list | tuple) for example in ids):
        return None
    lengths = [len(example) for example in ids]
    if min(lengths) == 0:
        raise BatchError(f"example {lengths.index(0)} is empty: every example needs at least one token")
    return lengths if len(set(lengths)) > 1 else None


def rectangle(value: Any, name: str, lengths: list[int] | None) -> Any:
    """Return lists of different lengths as a rectangle: ids are padded with their first, masks with 0."""
    if lengths is None or not isinstance(value, list | tuple):
        return value
    if [len(example) if isinstance(example, list | tuple) else None for example in value] != lengths:
        raise BatchError(f"{name} must be lists of {lengths} like the token ids; got {brief(value)}")
    width = max(lengths)
    padding = [example[0] if name == "input_ids" else 0 for example in value]
    return [[*example, *[pad] * (width - len(example))] for example, pad in zip(value, padding, strict=True)]


def rectangle_of_mask(value: Any, lengths: list[int]) -> Any:
    """Return a mask as a rectangle if it is lists as ragged as the ids, and anything else as it is.

    >>> rectangle_of_mask([[1, 1], [1]], [2, 1]), rectangle_of_mask(slice(1), [2, 1])
    ([[1, 1], [1, 0]], slice(None, 1, None))
    """
    rows = as_lists(value)
    if not isinstance(rows, list) or not all(isinstance(row, list | tuple) for row in rows):
        return value
    is_ragged = [len(row) for row in rows] == lengths
    is_ragged = is_ragged and not any(isinstance(part, slice) for row in rows for part in row)
    return rectangle(rows, "a segment", lengths) if is_ragged else value


def as_ids(ids: Any, name: str) -> Int[Tensor, "..."]:
    """Return token ids as int64.

    Raises:
        BatchError: anything but whole numbers from 0, or no numbers at all.
    """
    tensor = as_tensor(ids, name, BatchError)
    if tensor.numel() == 0:
        raise BatchError(f"{name} must be [batch, token]; got {list(tensor.shape)}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise BatchError(f"{name} must be whole numbers; got {brief(tensor)}")
    tensor = tensor.long()
    if tensor.numel() and int(tensor.min()) < 0:
        raise BatchError(f"{name} must not be negative; got {int(tensor.min())}")
    return tensor


def response_starts(response_start: Any, ids: Tensor) -> Int[Tensor, "batch_or_1 1"]:
    """Return the column where each response starts."""
    starts = as_tensor(response_start, "response_start", BatchError).to(ids.device).reshape(-1, 1)
    is_whole = not (starts.is_floating_point() or starts.is_complex() or starts.dtype == torch.bool)
    if not is_whole or bool((starts.long() < 0).any()):
        raise BatchError(
            f"response_start must be a column, a whole number from 0; got {starts.flatten().tolist()}"
        )
    starts = starts.long()
    if starts.shape[0] not in (1, ids.shape[0]):
        raise BatchError(
            f"response_start must be one column, or one for each of {ids.shape[0]} examples; got "
            f"{starts.shape[0]}"
        )
    return starts

"""Segments: named sets of tokens, such as a prompt, a plan, an answer or a tool's output.

A `TokenBatch` holds them as masks; `measure` says how much attention goes from one to another. Three names
are built in: "prompt", "response" and "first". Everything that a user may pass as a segment becomes a mask
here: a mask, columns as slices, or a regular expression for the text. `TokenBatch` calls these functions, and
so does whoever takes names of segments. What is left to others: the batch (batch), and what is measured
between segments (statistics_probe). The numbers of packed sequences are something else: `segment_ids`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attnprobe.errors import AttnprobeError, BatchError, ParameterError
from attnprobe.validation import ArrayLike, as_mask, brief

if TYPE_CHECKING:
    SegmentLike: TypeAlias = ArrayLike | slice | re.Pattern[str] | Sequence[slice] | Sequence[Sequence[slice]]
    SegmentsLike: TypeAlias = Mapping[str, SegmentLike]
    NamesLike: TypeAlias = str | Iterable[str]
else:
    SegmentLike = SegmentsLike = NamesLike = Any

BUILT_IN = ("prompt", "response", "first")
"""The segments that every batch has: real tokens that are not response, the response, and the first real
token of each sequence."""


def segment_names(
    names: NamesLike, argument: str, error: type[AttnprobeError] = ParameterError
) -> tuple[str, ...]:
    """Return names of segments as a tuple; a single name needs no tuple.

    Raises:
        AttnprobeError: of the given class: something that is no name, or a name given twice.

    >>> segment_names("plan", "share_on"), segment_names(["first", "plan"], "share_on")
    (('plan',), ('first', 'plan'))
    """
    if isinstance(names, str):
        names = (names,)
    if isinstance(names, Mapping | bytes) or not isinstance(names, Iterable):
        raise error(f"{argument} must be names of segments, such as ('first', 'prompt'); got {brief(names)}")
    found = tuple(names)
    for name in found:
        if not isinstance(name, str) or not name:
            raise error(
                f"{argument} must be names of segments, such as ('first', 'prompt'); got {brief(name)}"
            )
    if len(set(found)) != len(found):
        raise error(f"{argument} names a segment twice: {', '.join(found)}")
    return found


def check_known(
    names: Iterable[str], own: Collection[str], argument: str, hint: str = "batch.with_segments({})"
) -> None:
    """Check that segments are built in or among a batch's own; `hint` says how one is added.

    Raises:
        ParameterError: one is not; the message says which there are.
    """
    for name in names:
        if name not in BUILT_IN and name not in own:
            there = ", ".join((*BUILT_IN, *own))
            add = hint.format(f"{{{name!r}: mask}}")
            raise ParameterError(
                f"{argument} names the segment {name!r}, which is not there; there are {there}. Add it with "
                f"{add}"
            )


def first_tokens(
    real: Bool[Tensor, "batch token"], segment_ids: Int[Tensor, "batch token"] | None = None
) -> Bool[Tensor, "batch token"]:
    """Return the first real token of each sequence, of which packed examples hold several.

    >>> first_tokens(torch.tensor([[False, True, True]]))
    tensor([[False,  True, False]])
    """
    begins = real.clone()
    begins[:, 1:] &= ~real[:, :-1]
    if segment_ids is not None:
        ids = segment_ids.to(real.device)
        begins[:, 1:] |= real[:, 1:] & (ids[:, 1:] != ids[:, :-1])
        return begins
    # An attention mask may have holes in a user's own call: only the first real token counts.
    return begins & (begins.cumsum(-1) == 1)


def segment_masks(
    segments: SegmentsLike,
    real: Bool[Tensor, "batch token"],
    texts: tuple[tuple[str, ...], ...] | None = None,
) -> dict[str, Bool[Tensor, "batch token"]]:
    """Return the mask of each segment, from any form in which one can be given.

    Args:
        segments: by name: a mask `[batch, token]`; a slice of columns for all examples, or a list with a
            slice (or a list of slices) for each; or a compiled regular expression, all of whose matches in
            the text of an example count, with every token that they touch.
        real: which tokens are no padding: slices and matches are cut to them.
        texts: the text of each token, for regular expressions.

    Raises:
        BatchError: built-in names, masks that mark padding or have another shape, slices that mark nothing,
            or an expression for bytes or without texts.

    >>> real = torch.ones(1, 4, dtype=torch.bool)
    >>> segment_masks({"plan": slice(1, 3)}, real)["plan"].int().tolist()
    [[0, 1, 1, 0]]
    >>> pattern = re.compile("<think>.*?</think>")
    >>> segment_masks({"plan": pattern}, real, (("So", "<think>", "2", "</think>"),))["plan"].int().tolist()
    [[0, 1, 1, 1]]
    """
    if not isinstance(segments, Mapping):
        raise BatchError(f"segments must be a dictionary of masks by name; got {brief(segments)}")
    names = segment_names(list(segments), "segments", BatchError)
    check_own_names(names)
    return {name: _mask_of(name, segments[name], real, texts) for name in names}


def check_own_names(names: Sequence[str]) -> None:
    """Check that no segment of a batch's own has a built-in name.

    Raises:
        BatchError: one has.
    """
    taken = [name for name in names if name in BUILT_IN]
    if taken:
        raise BatchError(
            f"the segment {taken[0]!r} is built in, and cannot be given: choose another name than "
            f"{', '.join(BUILT_IN)}"
        )


def own_segment_names(
    names: NamesLike, masks: Bool[Tensor, "batch segment token"] | None, real: Bool[Tensor, "batch token"]
) -> tuple[str, ...]:
    """Return the names of a batch's own segments, after checking them and the segments; none without any.

    Raises:
        BatchError: built-in names, another number of names than of segments, or segments that mark padding.
    """
    # Names of nothing are dropped: `replace(batch, segments=None)` is a batch without segments.
    if masks is None:
        return ()
    found = segment_names(names, "segment_names", BatchError)
    check_own_names(found)
    if masks.shape[1] != len(found):
        raise BatchError(f"segment_names must name {masks.shape[1]} segments; got {brief(found)}")
    for name, mask in zip(found, masks.unbind(1), strict=True):
        _check_inside(name, mask, real)
    return found


def _mask_of(name: str, value: Any, real: Tensor, texts: tuple[tuple[str, ...], ...] | None) -> Tensor:
    if isinstance(value, re.Pattern):
        if not isinstance(value.pattern, str):
            raise BatchError(f"the segment {name!r} is an expression for bytes: texts need re.compile('...')")
        if texts is None:
            raise BatchError(
                f"the segment {name!r} is a regular expression, for which the batch needs texts: pass "
                "tokenizer="
            )
        return _matches(value, texts, real)
    if isinstance(value, slice) or (isinstance(value, list | tuple) and _holds_slices(value)):
        return _columns(name, value, real)
    mask = as_mask(value, f"the segment {name!r}", tuple(real.shape), device=real.device, error=BatchError)
    _check_inside(name, mask, real)
    return mask


def _check_inside(name: str, mask: Tensor, real: Tensor) -> None:
    outside = mask & ~real
    if bool(outside.any()):
        raise BatchError(
            f"the segment {name!r} marks padding in example {int(outside.nonzero()[0, 0])}: it must lie in "
            "attention_mask"
        )


def _holds_slices(value: Sequence[Any]) -> bool:
    """Whether a list holds slices, or lists of them."""
    parts = [part for each in value for part in (each if isinstance(each, list | tuple) else [each])]
    return any(isinstance(part, slice) for part in parts)


def _columns(name: str, value: Any, real: Tensor) -> Tensor:
    examples = [value] * len(real) if isinstance(value, slice) else list(value)
    if len(examples) != len(real):
        raise BatchError(
            f"the segment {name!r} has slices for {len(examples)} examples; the batch has {len(real)}"
        )
    mask = torch.zeros_like(real)
    for i, example in enumerate(examples):
        for columns in example if isinstance(example, list | tuple) else [example]:
            if not isinstance(columns, slice):
                raise BatchError(
                    f"the segment {name!r} must be slices of columns for each example; got {brief(columns)}"
                )
            try:
                mask[i, columns] = True
            except (TypeError, ValueError) as error:
                raise BatchError(
                    f"the segment {name!r} has {columns}, which is no slice of columns"
                ) from error
    mask &= real
    if not bool(mask.any()):
        raise BatchError(f"the segment {name!r} marks none of the {real.shape[1]} columns: {brief(value)}")
    return mask


def _matches(pattern: re.Pattern[str], texts: tuple[tuple[str, ...], ...], real: Tensor) -> Tensor:
    """Return the tokens whose texts a pattern matches, at least in part."""
    mask = torch.zeros(real.shape, dtype=torch.bool)
    kept = real.tolist()
    for i, example in enumerate(texts):
        # Padding may have a text of its own, which belongs to no example.
        pieces = [text if here else "" for text, here in zip(example, kept[i], strict=True)]
        ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
        starts = ends - torch.tensor([len(piece) for piece in pieces])
        for match in pattern.finditer("".join(pieces)):
            # A token without text is in the match if it lies inside, as the bytes of a character do.
            mask[i] |= (starts < match.end()) & (ends > match.start())
    return mask.to(real.device) & real

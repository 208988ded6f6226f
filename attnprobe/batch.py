"""TokenBatch: token ids, which of them are real, which are response, and how examples are laid out.

Users pass in what they have: texts, chats, a tokenizer's output, ids padded on either side or packed, a
trainer's rollouts. The batch keeps that layout, and results are aligned with it. For the forward pass,
`TokenBatch.sequences` returns the same tokens as right-padded sequences, one per example: a causal model
then needs no mask at all, positions start at 0, and neither padding nor a packed neighbour can leak into a
statistic.

What is left to others: what tokens and masks are made of (batch_parts, ids, texts, segments), where sequences
lie (layout), running a model (adapters) and the meaning of a response mask (metrics).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attnprobe.axes import example_indices
from attnprobe.batch_parts import batch_parts, joined_parts, rollout_parts
from attnprobe.errors import BatchError
from attnprobe.ids import as_ids, of_mapping
from attnprobe.layout import SequenceLayout, check_padding, check_sequences, sequence_layout, token_columns
from attnprobe.model_inputs import as_model_inputs, equal_inputs, refuse_inputs
from attnprobe.results import Result, table_column
from attnprobe.segments import (
    SegmentsLike,
    check_known,
    first_tokens,
    own_segment_names,
    segment_masks,
)
from attnprobe.storage import PathLike
from attnprobe.texts import as_texts, chat_prompts, encoded, token_texts
from attnprobe.validation import ArrayLike

if TYPE_CHECKING:
    BatchLike: TypeAlias = "TokenBatch" | Mapping[str, Any] | ArrayLike
else:
    BatchLike = Any


@dataclass(frozen=True, eq=False, repr=False)
class TokenBatch(Result):
    """Token ids with their masks, in the caller's layout; build it with one of the `from_` methods.

    Attributes:
        input_ids: the tokens, int64; any valid id on padding.
        attention_mask: True where a token is real; one unbroken run per example, padded left or right.
        response_mask: True where a token belongs to a response; metrics describe these tokens. It may have
            gaps, such as a tool's output between two turns.
        segment_ids: in packed examples, which sequence a token belongs to; -1 on padding.
            None if each example is one sequence.
        texts: the text of each token, for display; None if no tokenizer was given.
        model_inputs: what the model is given besides, such as an image's `pixel_values`; None for text. Such
            a batch is run as a whole, in this layout: it cannot be split, joined or saved.
        segments: True where a token belongs to a named segment; None without any. Segments may overlap and
            have gaps. `segment(name)` returns one, and `with_segments` adds some.
        segment_names: the name of each.

    Raises:
        BatchError: ids that are negative or not whole numbers, or masks, segments and texts that do not match
            them.
    """

    input_ids: Int[Tensor, "batch token"]
    attention_mask: Bool[Tensor, "batch token"]
    response_mask: Bool[Tensor, "batch token"]
    segment_ids: Int[Tensor, "batch token"] | None = None
    texts: tuple[tuple[str, ...], ...] | None = None
    model_inputs: Mapping[str, Tensor] | None = field(default=None, metadata={"handled_by_class": True})
    segments: Bool[Tensor, "batch segment token"] | None = None
    segment_names: tuple[str, ...] = ()

    _FILL: ClassVar[dict[str, Any]] = {"input_ids": 0}

    def __post_init__(self) -> None:
        """Check the parts, and convert ids to int64, which every model accepts."""
        self._check(BatchError)
        object.__setattr__(self, "input_ids", as_ids(self.input_ids, "input_ids"))
        if self.segment_ids is not None:
            check_sequences(self.segment_ids, self.attention_mask)
        outside = self.response_mask & ~self.attention_mask
        if bool(outside.any()):
            raise BatchError(
                f"response_mask marks padding in example {int(outside.nonzero()[0, 0])}: it must lie in "
                "attention_mask"
            )
        names = own_segment_names(self.segment_names, self.segments, self.attention_mask)
        object.__setattr__(self, "segment_names", names)
        if self.model_inputs is not None:
            if self.segment_ids is not None:
                raise BatchError(f"packed examples cannot be run with {', '.join(self.model_inputs)}")
            inputs = as_model_inputs(self.model_inputs, tuple(self.input_ids.shape))
            object.__setattr__(self, "model_inputs", inputs)

    @staticmethod
    def of_pass(
        input_ids: Int[Tensor, "batch token"],
        attention_mask: Bool[Tensor, "batch token"],
        response_mask: Bool[Tensor, "batch token"],
        segment_ids: Int[Tensor, "batch token"] | None = None,
        segments: Bool[Tensor, "batch segment token"] | None = None,
        segment_names: tuple[str, ...] = (),
    ) -> TokenBatch:
        """Return the tokens of a forward pass that a model was given, without looking at their values.

        To look, the processor would have to wait for the device. The model itself refuses ids that it does
        not know, and the masks of a pass are made of each other.
        """
        batch = object.__new__(TokenBatch)
        values = {
            "input_ids": input_ids.long(),
            "attention_mask": attention_mask,
            "response_mask": response_mask,
            "segment_ids": segment_ids,
            "texts": None,
            "model_inputs": None,
            "segments": segments,
            "segment_names": segment_names,
        }
        for name, value in values.items():
            object.__setattr__(batch, name, value)
        return batch

    @property
    def batch_size(self) -> int:
        """The number of examples."""
        return self.input_ids.shape[0]

    @property
    def token_count(self) -> int:
        """The number of positions, padding included."""
        return self.input_ids.shape[1]

    def _used(self) -> Tensor:
        return self.attention_mask

    def _table(self) -> dict[str, Any]:
        """Return columns with example, position, token_id, text and response, a line for each real token."""
        place = self.attention_mask.nonzero()
        columns = token_columns(place, self.input_ids, self.texts)
        columns["response"] = table_column(self.response_mask, place)
        return columns

    # ---- segments -----------------------------------------------------------------------------

    def segment(self, name: str) -> Bool[Tensor, "batch token"]:
        """Return the mask of a segment: one of the batch's own, or "prompt", "response" or "first".

        "prompt" is what is real but not response, wherever it stands: a tool's output between two turns too.
        "first" is the first real token of each sequence.

        Raises:
            ParameterError: a segment that the batch does not have.

        >>> TokenBatch.from_ids([[5, 6, 7, 8]], response_start=2).segment("prompt").int().tolist()
        [[1, 1, 0, 0]]
        """
        check_known([name], self.segment_names, "segment")
        if name == "prompt":
            return self.attention_mask & ~self.response_mask
        if name == "response":
            return self.response_mask
        if name == "first":
            return first_tokens(self.attention_mask, self.segment_ids)
        assert self.segments is not None
        return self.segments[:, self.segment_names.index(name)]

    def with_segments(self, segments: SegmentsLike) -> TokenBatch:
        """Return the batch with these segments, in addition to those that it has under other names.

        Args:
            segments: by name: a mask `[batch, token]`; a slice of columns for all examples, or a list with a
                slice (or a list of slices) for each; or a compiled regular expression, which marks the tokens
                that it matches in the texts of each example.

        Raises:
            BatchError: built-in names, masks of another shape or that mark padding, or an expression for a
                batch without texts.

        >>> batch = TokenBatch.from_ids([[5, 6, 7, 8]]).with_segments({"plan": slice(1, 3)})
        >>> batch.segment("plan").int().tolist()
        [[0, 1, 1, 0]]
        """
        own = {name: self.segment(name) for name in self.segment_names}
        own |= segment_masks(segments, self.attention_mask, self.texts)
        if not own:
            return self
        return replace(self, segments=torch.stack(list(own.values()), dim=1), segment_names=tuple(own))

    @classmethod
    def concatenate(cls, parts: Any) -> TokenBatch:
        """Join batches, as `Result.concatenate` does; a segment that a part does not have is empty there.

        Raises:
            ResultError: nothing to join, or parts of which only some have texts, or are packed.
            BatchError: batches with further inputs.
        """
        parts = list(parts) if isinstance(parts, Iterable) else [parts]
        batches = [part for part in parts if isinstance(part, TokenBatch)]
        names = tuple(dict.fromkeys(name for part in batches for name in part.segment_names))
        return super().concatenate(
            [part._with_names(names) if isinstance(part, TokenBatch) else part for part in parts]
        )

    def _with_names(self, names: tuple[str, ...]) -> TokenBatch:
        """Return the batch with segments of these names in this order: empty where it has none."""
        if names == self.segment_names:
            return self
        empty = torch.zeros_like(self.attention_mask)
        masks = [self.segment(name) if name in self.segment_names else empty for name in names]
        return replace(self, segments=torch.stack(masks, dim=1), segment_names=names)

    # ---- what further inputs allow ------------------------------------------------------------

    def select(self, examples: Any, *, trim: bool = False) -> TokenBatch:
        """Return some of the examples, as `Result.select` does; of a batch with further inputs, only all.

        Raises:
            ParameterError: examples that do not exist, or a selection of none.
            BatchError: some examples of a batch with further inputs.
        """
        if example_indices(examples, self.batch_size) != list(range(self.batch_size)):
            refuse_inputs(self.model_inputs, "select examples of")
        return super().select(examples, trim=trim)

    def at_columns(self, columns: Any) -> TokenBatch:
        """Return the batch with some of its columns, as `Result.at_columns` does.

        Raises:
            ParameterError: anything but a slice without step that chooses a column.
            BatchError: a batch with further inputs.
        """
        if columns != slice(0, self.token_count):
            refuse_inputs(self.model_inputs, "choose columns of")
        return super().at_columns(columns)

    @classmethod
    def _check_joins(cls, parts: Sequence[Any]) -> None:
        for part in parts if len(parts) > 1 else ():
            refuse_inputs(part.model_inputs, "join")
        super()._check_joins(parts)

    def to(self, device: Any) -> TokenBatch:
        """Return the batch with all its tensors on a device.

        Raises:
            ParameterError: something that is not a device.
        """
        moved = super().to(device)
        if self.model_inputs is None:
            return moved
        place = moved.input_ids.device
        return replace(moved, model_inputs={name: part.to(place) for name, part in self.model_inputs.items()})

    def save(self, path: PathLike) -> Path:
        """Save as one safetensors file, and return its path.

        Raises:
            ResultError: a path that cannot be written.
            BatchError: a batch with further inputs.
        """
        refuse_inputs(self.model_inputs, "save")
        return super().save(path)

    def __eq__(self, other: object) -> bool:
        """Whether two batches hold the same tokens, masks and further inputs, on any device."""
        return super().__eq__(other) and equal_inputs(self.model_inputs, getattr(other, "model_inputs", None))

    __hash__ = Result.__hash__

    def __repr__(self) -> str:
        inputs = self.model_inputs or {}
        lines = [f"  {n}: {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for n, t in inputs.items()]
        return "\n".join([super().__repr__(), *lines])

    # ---- building -----------------------------------------------------------------------------

    @staticmethod
    def of(value: BatchLike, *, tokenizer: Any = None) -> TokenBatch:
        """Return a batch from anything that describes one; every function that takes a batch calls this.

        A `TokenBatch` is returned as it is. A tokenizer's output, or a dictionary like it, has `input_ids`
        and may have `attention_mask`, `position_ids`, and `response_mask`, `labels` (-100 outside the
        response), or a chat template's `assistant_masks`, and `segments`, masks by name. If a processor has
        added images (`pixel_values`), whatever else it holds is passed on to the model. A tensor, an array or
        lists are ids. Where nothing says what is response, all of it is. A tokenizer, or a processor,
        provides the texts of the tokens.

        Raises:
            BatchError: anything else, such as a text, which needs a tokenizer.

        >>> TokenBatch.of({"input_ids": [[5, 6], [7]]}).attention_mask.tolist()
        [[True, True], [True, False]]
        """
        if isinstance(value, TokenBatch):
            return value if tokenizer is None else replace(value, texts=_texts(tokenizer, value.input_ids))
        if isinstance(value, Mapping):
            return TokenBatch.from_ids(**of_mapping(value), tokenizer=tokenizer)
        if isinstance(value, str) or (
            isinstance(value, list | tuple) and value and isinstance(value[0], str)
        ):
            raise BatchError("a text needs a tokenizer: TokenBatch.from_text(tokenizer, prompts, responses)")
        return TokenBatch.from_ids(value, tokenizer=tokenizer)

    @staticmethod
    def from_ids(
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        *,
        response_mask: ArrayLike | None = None,
        response_start: Any = None,
        position_ids: ArrayLike | None = None,
        tokenizer: Any = None,
        model_inputs: Mapping[str, Any] | None = None,
        segments: SegmentsLike | None = None,
    ) -> TokenBatch:
        """Build a batch from token ids.

        Args:
            input_ids: `[batch, token]` (or `[token]`: a batch of one), of any integer dtype; or lists of
                ids of any lengths, which are padded on the right.
            attention_mask: `[batch, token]`, 1 where a token is real; default: all are.
            response_mask: `[batch, token]`, 1 where a token belongs to the response; it may have gaps.
            response_start: instead of `response_mask`, the column where the response starts, one for
                all examples or `[batch]`; it runs to the last real token. Without either, every real token
                is response.
            position_ids: `[batch, token]`; needed for packed examples, in which several sequences follow one
                another and positions restart with each. Each sequence is then measured on its own.
            tokenizer: provides the texts of the tokens, for display; a processor will do.
            model_inputs: what a processor returned besides, such as `pixel_values`, by name.
            segments: named sets of tokens, in any form that `with_segments` takes.

        Tensors, numpy arrays and lists are accepted; masks hold 0 and 1.

        Raises:
            BatchError: shapes that do not match, masks with other values, an attention mask with holes,
                empty examples or responses.

        >>> batch = TokenBatch.from_ids([[5, 6, 7, 8], [5, 6, 7]], response_start=2)
        >>> batch.response_mask.int().tolist()
        [[0, 0, 1, 1], [0, 0, 1, 0]]
        """
        parts = batch_parts(
            input_ids,
            attention_mask,
            response_mask=response_mask,
            response_start=response_start,
            position_ids=position_ids,
            model_inputs=model_inputs,
        )
        texts = None if tokenizer is None else _texts(tokenizer, parts.input_ids)
        masks = parts.attention_mask, parts.response_mask, parts.segment_ids
        batch = TokenBatch(parts.input_ids, *masks, texts, parts.model_inputs)
        return batch if segments is None else batch.with_segments(parts.widened(segments))

    @staticmethod
    def from_text(
        tokenizer: Any,
        prompts: Sequence[str] | str,
        responses: Sequence[str] | str | None = None,
        *,
        segments: SegmentsLike | None = None,
    ) -> TokenBatch:
        """Build a batch from prompts and responses as text; without responses, each whole text is response.

        Prompt and response are tokenized separately, as when a response is generated, so that no token
        straddles their boundary; only the prompt gets the tokenizer's special tokens. `segments` are named
        sets of tokens, in any form that `with_segments` takes, such as a regular expression for the texts.

        Raises:
            BatchError: something that is not a tokenizer, different numbers of prompts and responses, an
                empty response, or segments that are none.
        """
        prompts = as_texts(prompts, "prompts")
        heads = [encoded(tokenizer, prompt) for prompt in prompts]
        if responses is None:
            return _join(tokenizer, [[] for _ in heads], heads, segments)
        tails = as_texts(responses, "responses")
        return _join(tokenizer, heads, [encoded(tokenizer, tail, special=False) for tail in tails], segments)

    @staticmethod
    def from_chat(
        tokenizer: Any,
        messages: Sequence[dict[str, str]] | Sequence[Sequence[dict[str, str]]],
        responses: Sequence[str] | str,
        *,
        segments: SegmentsLike | None = None,
    ) -> TokenBatch:
        """Build a batch from chats, using the tokenizer's chat template, and responses as text.

        `messages` is one conversation or several; each ends where the assistant is to speak. `segments` are
        as in `from_text`.

        Raises:
            BatchError: a tokenizer without a chat template, messages that the template rejects, different
                numbers of conversations and responses, an empty response, or segments that are none.
        """
        heads = chat_prompts(tokenizer, messages)
        tails = as_texts(responses, "responses")
        return _join(tokenizer, heads, [encoded(tokenizer, tail, special=False) for tail in tails], segments)

    @staticmethod
    def from_rollout(
        prompt_ids: ArrayLike,
        prompt_mask: ArrayLike,
        completion_ids: ArrayLike,
        completion_mask: ArrayLike,
        *,
        response_mask: ArrayLike | None = None,
        tokenizer: Any = None,
        segments: SegmentsLike | None = None,
    ) -> TokenBatch:
        """Build a batch from a trainer's rollout: prompts padded left, completions padded right.

        The columns are those of the prompts followed by those of the completions. `response_mask`, shaped
        like `completion_ids`, marks what the policy wrote itself if a tool wrote the rest; default: all.
        `segments` are named sets of tokens, in columns of the whole, in any form that `with_segments` takes.

        Raises:
            BatchError: shapes or masks that do not match.
        """
        return TokenBatch.from_ids(
            **rollout_parts(prompt_ids, prompt_mask, completion_ids, completion_mask, response_mask),
            tokenizer=tokenizer,
            segments=segments,
        )

    # ---- layout -------------------------------------------------------------------------------

    def sequences(self) -> tuple[TokenBatch, SequenceLayout]:
        """Return the same tokens as right-padded sequences, one per example, and the way back.

        A packed example becomes one example for each of its sequences that has a response.

        Raises:
            BatchError: an attention mask with holes, no response at all, or a batch with further inputs.
        """
        refuse_inputs(self.model_inputs, "rearrange")
        check_padding(self.attention_mask)
        layout = sequence_layout(self.attention_mask, self.response_mask, self.segment_ids)
        real = layout.real_tokens().to(self.input_ids.device)
        sequences = TokenBatch(
            layout.apart(self.input_ids),
            real,
            layout.apart(self.response_mask) & real,
            texts=None if self.texts is None else layout.texts_apart(self.texts),
            segments=None if self.segments is None else layout.apart(self.segments) & real[:, None],
            segment_names=self.segment_names,
        )
        return sequences, layout


def _texts(tokenizer: Any, ids: Int[Tensor, "batch token"]) -> tuple[tuple[str, ...], ...]:
    return tuple(token_texts(tokenizer, example) for example in ids.tolist())


def _join(
    tokenizer: Any, heads: list[list[int]], tails: list[list[int]], segments: SegmentsLike | None
) -> TokenBatch:
    """Join tokenized prompts and responses into a right-padded batch."""
    return TokenBatch.from_ids(**joined_parts(heads, tails), tokenizer=tokenizer, segments=segments)

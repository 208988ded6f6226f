"""How examples are laid out: padding, packing, and the way back from right-padded sequences.

`TokenBatch` checks its masks here. `TokenBatch.sequences` takes its examples apart with a `SequenceLayout`,
with which `measure` returns results in the user's layout. Tables of tokens get the columns by which they are
joined here. What is left to others: the tokens themselves (batch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Real, Shaped
from torch import Tensor

from attnprobe.errors import BatchError, ParameterError
from attnprobe.results import table_column


@dataclass(frozen=True)
class SequenceLayout:
    """Where each right-padded sequence is in the user's layout.

    Sequence `i` holds the tokens `start[i] .. start[i] + length[i] - 1` of example `source[i]`.
    """

    source: Int[Tensor, " sequence"]
    start: Int[Tensor, " sequence"]
    length: Int[Tensor, " sequence"]
    shape: tuple[int, int]

    @staticmethod
    def unchanged(batch_size: int, token_count: int) -> SequenceLayout:
        """Return the layout of examples that are run as they are, padding included."""
        every = torch.arange(batch_size)
        start, length = torch.zeros_like(every), torch.full_like(every, token_count)
        return SequenceLayout(every, start, length, (batch_size, token_count))

    def real_tokens(self) -> Bool[Tensor, "sequence sequence_token"]:
        """Return which tokens of the right-padded sequences are real."""
        return torch.arange(int(self.length.max())) < self.length[:, None]

    def apart(
        self, values: Shaped[Tensor, "batch *axes token"]
    ) -> Shaped[Tensor, "sequence *axes sequence_token"]:
        """Return the values of each sequence's tokens; on padding, those of its first token."""
        real = self.real_tokens()
        column = self.start[:, None] + torch.arange(real.shape[1]) * real
        by_token = values.movedim(-1, 1)  # [batch, token, *axes]
        chosen = by_token[self.source[:, None].to(values.device), column.to(values.device)]
        return chosen.movedim(1, -1).contiguous()

    def texts_apart(self, texts: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        """Return the texts of each sequence's tokens; those of padding are empty."""
        width = int(self.length.max())
        places = zip(self.source.tolist(), self.start.tolist(), self.length.tolist(), strict=True)
        return tuple(
            (*texts[example][start : start + length], *[""] * (width - length))
            for example, start, length in places
        )

    def tokens(
        self, values: Float[Tensor, "sequence *axes sequence_token"]
    ) -> Float[Tensor, "batch *axes token"]:
        """Return per-token values in the user's layout; NaN where no sequence has a token."""
        batch, width = self.shape
        by_token = values.movedim(-1, 1)  # [sequence, sequence_token, *axes]
        column = torch.arange(by_token.shape[1])
        inside = column < self.length[:, None]
        target = (self.source[:, None] * width + self.start[:, None] + column)[inside]
        out = values.new_full((batch * width, *by_token.shape[2:]), torch.nan)
        out[target.to(values.device)] = by_token[inside.to(values.device)]
        return out.view(batch, width, *by_token.shape[2:]).movedim(1, -1)

    def examples(
        self, values: Float[Tensor, "sequence *axes"], weights: Real[Tensor, "sequence *first_axes"]
    ) -> Float[Tensor, "batch *axes"]:
        """Return per-sequence values as the weighted mean over the sequences of each example.

        Weights may also differ along the first axes of the values. Sequences with weight 0 or an undefined
        value do not count; NaN where none counts.
        """
        source = self.source.to(values.device)
        spread = weights.to(values)
        spread = spread.view(*spread.shape, *[1] * (values.ndim - spread.ndim)).expand_as(values)
        spread = spread.masked_fill(values.isnan(), 0.0)
        total = values.new_zeros(self.shape[0], *values.shape[1:])
        weight = torch.zeros_like(total)
        total.index_add_(0, source, (values.nan_to_num() * spread))
        weight.index_add_(0, source, spread)
        return total / weight.masked_fill(weight == 0, torch.nan)

    def by_sequence(
        self, values: Float[Tensor, "sequence *axes"]
    ) -> Float[Tensor, "batch *axes sequence_of_example"]:
        """Return the values of each example's sequences, in order; NaN where an example has fewer."""
        counts = torch.bincount(self.source, minlength=self.shape[0])
        place = torch.arange(len(self.source)) - (counts.cumsum(0) - counts)[self.source]
        shape = (self.shape[0], int(counts.max()), *values.shape[1:])
        out = values.new_full(shape, torch.nan)
        out[self.source.to(values.device), place.to(values.device)] = values
        return out.movedim(1, -1)


def sequence_layout(
    real: Bool[Tensor, "batch token"],
    response: Bool[Tensor, "batch token"],
    segment_ids: Int[Tensor, "batch token"] | None,
) -> SequenceLayout:
    """Return where each sequence lies: one for each example, or for each packed sequence with a response.

    Raises:
        BatchError: packed examples without any response.
    """
    spans: list[tuple[int, int, int]] = []
    for example in range(real.shape[0]):
        if segment_ids is None:
            columns = real[example].nonzero()[:, 0]
            spans.append((example, int(columns[0]), len(columns)))
            continue
        for number in segment_ids[example][real[example]].unique().tolist():
            columns = (segment_ids[example] == number).nonzero()[:, 0]
            if bool(response[example, columns].any()):
                spans.append((example, int(columns[0]), len(columns)))
    if not spans:
        raise BatchError("the packed examples hold no response: there is no token to describe")
    source, start, length = torch.tensor(spans).T
    return SequenceLayout(source, start, length, (real.shape[0], real.shape[1]))


def packed_segments(
    position_ids: Int[Tensor, "..."], real: Bool[Tensor, "batch token"]
) -> Int[Tensor, "batch token"]:
    """Number the sequences of packed examples: a new one starts where positions do not increase by one."""
    positions = position_ids.to(real.device)
    if positions.ndim == 1:
        positions = positions[None]
    if positions.shape[0] == 1:
        positions = positions.expand(real.shape[0], -1)
    if positions.shape != real.shape:
        raise BatchError(
            f"position_ids must be [example, token] = {list(real.shape)}; got {list(positions.shape)}"
        )
    starts = torch.ones_like(real)
    starts[:, 1:] = (positions[:, 1:] != positions[:, :-1] + 1) | ~real[:, :-1]
    starts &= real
    wrong = starts & (positions != 0)
    if bool(wrong.any()):
        example, position = wrong.nonzero()[0].tolist()
        raise BatchError(
            f"each packed sequence must start at position 0; in example {example} one starts at column "
            f"{position} with position {int(positions[example, position])}"
        )
    return (starts.cumsum(-1) - 1).masked_fill(~real, -1)


def check_sequences(segments: Int[Tensor, "batch token"], real: Bool[Tensor, "batch token"]) -> None:
    """Check that sequences are numbered in order, and that padding has the number -1.

    Raises:
        BatchError: they are not, or it has not.
    """
    wrong = (segments < 0) == real
    # Apart from padding, numbers must not decrease.
    latest = segments.masked_fill(~real, -1).cummax(-1).values
    wrong |= real & (segments < latest)
    if bool(wrong.any()):
        example, position = wrong.nonzero()[0].tolist()
        raise BatchError(
            "segment_ids must not decrease from token to token, and must be -1 on padding; at position "
            f"{position} of example {example} they are {int(segments[example, position])}"
        )


def check_padding(real: Bool[Tensor, "batch token"]) -> None:
    """Check that each example is one unbroken run of real tokens."""
    starts = real.clone()
    starts[:, 1:] &= ~real[:, :-1]
    runs = starts.sum(-1)
    if bool((runs == 0).any()):
        raise BatchError(f"attention_mask is empty in example {int((runs == 0).nonzero()[0])}")
    if bool((runs > 1).any()):
        raise BatchError(
            f"attention_mask has a hole in example {int((runs > 1).nonzero()[0])}: padding must be on the "
            "left or on the right. To read tokens without describing them, leave them out of response_mask"
        )


def token_columns(
    place: Int[Tensor, "place 2"],
    input_ids: Int[Tensor, "batch token"] | None,
    texts: tuple[tuple[str, ...], ...] | None,
) -> dict[str, Any]:
    """Return the columns by which tables of tokens are joined: example, position, token_id and text."""
    columns: dict[str, Any] = {
        "example": place[:, 0].cpu().numpy(),
        "position": place[:, 1].cpu().numpy(),
    }
    if input_ids is not None:
        columns["token_id"] = table_column(input_ids, place)
    if texts is not None:
        columns["text"] = [texts[i][j] for i, j in place.tolist()]
    return columns


def check_unpacked(segment_ids: Tensor | None, action: str) -> None:
    """Refuse packed examples, where the tokens of one response would be ranked against those of another.

    Raises:
        ParameterError: examples are packed.
    """
    if segment_ids is not None:
        raise ParameterError(
            f"cannot {action} in packed examples, which hold several sequences each: separate them with "
            "batch.sequences()[0]"
        )

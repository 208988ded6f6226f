"""TokenBatch: token ids, which of them are real, which are response, and how rows are laid out.

Callers hand in what they have: texts, chats, ids padded on either side, packed rows, a trainer's
rollouts. The batch keeps that layout, and results come back aligned with it. For the forward pass
`TokenBatch.unpadded_rows` gives the same tokens as right-padded rows of one sequence each: then a
causal model needs no mask at all, positions start at 0, and neither padding nor a packed neighbour
can leak into a statistic. `RowLayout` remembers the way back.

What is left to others: running a model (adapters) and the meaning of a response mask (metrics).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from attnprobe.errors import BatchError


@dataclass(frozen=True)
class RowLayout:
    """Where each right-padded row stands in the caller's layout.

    Row `i` holds the caller's tokens `start[i] .. start[i] + length[i] - 1` of row `source[i]`.
    """

    source: Int[Tensor, " row"]
    start: Int[Tensor, " row"]
    length: Int[Tensor, " row"]
    shape: tuple[int, int]

    def tokens(self, values: Float[Tensor, "row *axes row_token"]) -> Float[Tensor, "batch *axes token"]:
        """Return per-token values of the rows in the caller's layout, NaN where no row has a token."""
        batch, width = self.shape
        by_token = values.movedim(-1, 1)
        column = torch.arange(by_token.shape[1])
        inside = column < self.length[:, None]
        target = (self.source[:, None] * width + self.start[:, None] + column)[inside]
        out = values.new_full((batch * width, *by_token.shape[2:]), torch.nan)
        out[target.to(values.device)] = by_token[inside.to(values.device)]
        return out.view(batch, width, *by_token.shape[2:]).movedim(1, -1)

    def responses(
        self, values: Float[Tensor, "row *axes"], weights: Real[Tensor, " row"]
    ) -> Float[Tensor, "batch *axes"]:
        """Return per-row values as the weighted mean over the rows that came from one caller's row.

        Rows with weight 0 or an undefined value do not count; NaN where none counts.
        """
        source = self.source.to(values.device)
        spread = weights.to(values).view(-1, *[1] * (values.ndim - 1)).expand_as(values)
        spread = spread.masked_fill(values.isnan(), 0.0)
        total = values.new_zeros(self.shape[0], *values.shape[1:])
        weight = torch.zeros_like(total)
        total.index_add_(0, source, (values.nan_to_num() * spread))
        weight.index_add_(0, source, spread)
        return total / weight.masked_fill(weight == 0, torch.nan)


@dataclass(frozen=True)
class TokenBatch:
    """Token ids with their masks, in the caller's layout; build it with one of the `from_` methods.

    Attributes:
        input_ids: the tokens; padding holds any valid id.
        attention_mask: True where a token is real. One run per row: left or right padding only.
        response_mask: True where a token belongs to a response; metrics describe these tokens.
        segment_ids: in packed rows, which sequence of the row a token belongs to; -1 on padding.
            None where each row is one sequence.
        texts: the text of each token, for pictures; None where no tokenizer was given.
    """

    input_ids: Int[Tensor, "batch token"]
    attention_mask: Bool[Tensor, "batch token"]
    response_mask: Bool[Tensor, "batch token"]
    segment_ids: Int[Tensor, "batch token"] | None = None
    texts: tuple[tuple[str, ...], ...] | None = None

    @property
    def batch_size(self) -> int:
        """The number of the caller's rows."""
        return self.input_ids.shape[0]

    @property
    def token_count(self) -> int:
        """The number of the caller's columns."""
        return self.input_ids.shape[1]

    # ---- building -----------------------------------------------------------------------------

    @staticmethod
    def from_ids(
        input_ids: Tensor | Sequence[Sequence[int]],
        attention_mask: Tensor | None = None,
        *,
        response_mask: Tensor | None = None,
        response_start: int | Tensor | None = None,
        position_ids: Tensor | None = None,
        tokenizer: Any = None,
    ) -> TokenBatch:
        """Build a batch from token ids.

        Args:
            input_ids: `[batch, token]` (or `[token]`: a batch of one), or lists of ids of any lengths,
                which are padded on the right.
            attention_mask: `[batch, token]`, 1 where a token is real; default: all are.
            response_mask: `[batch, token]`, 1 where a token belongs to the response.
            response_start: instead of `response_mask`, the column where the response starts, one for
                all rows or `[batch]`; it runs to the last real token. With neither, every real token
                counts as response.
            position_ids: `[batch, token]`; give it for packed rows, where several sequences stand in
                one row and positions restart at each. Each sequence is then measured on its own.
            tokenizer: gives the tokens their texts, for pictures.

        Raises:
            BatchError: shapes that do not fit, masks with holes, empty rows or responses.

        >>> batch = TokenBatch.from_ids([[5, 6, 7, 8], [5, 6, 7]], response_start=2)
        >>> batch.response_mask.int().tolist()
        [[0, 0, 1, 1], [0, 0, 1, 0]]
        """
        if not isinstance(input_ids, Tensor):
            if attention_mask is not None:
                raise BatchError("lists of ids carry their own lengths: pass a tensor to use attention_mask")
            input_ids, attention_mask = _pad_right([list(row) for row in input_ids])
        if input_ids.ndim == 1:
            input_ids = input_ids[None]
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise BatchError(f"input_ids must be [batch, token], got {list(input_ids.shape)}")
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise BatchError(f"input_ids must be integers, got {input_ids.dtype}")
        if int(input_ids.min()) < 0:
            raise BatchError(f"input_ids must not be negative, got {int(input_ids.min())}")
        shape = input_ids.shape
        real = _as_mask(attention_mask, "attention_mask", shape, input_ids.device)
        segments = None
        if position_ids is not None:
            segments = _segments(position_ids, real)
        _check_runs(real, "attention_mask", None)
        if response_mask is not None and response_start is not None:
            raise BatchError("pass response_mask or response_start, not both")
        if response_start is not None:
            starts = torch.as_tensor(response_start, device=input_ids.device).reshape(-1, 1)
            if starts.is_floating_point() or bool((starts < 0).any()):
                raise BatchError(
                    f"response_start is a column, a whole number from 0; got {starts.flatten().tolist()}"
                )
            if starts.shape[0] not in (1, shape[0]):
                raise BatchError(
                    f"response_start must be one column or one for each of {shape[0]} rows, "
                    f"got {starts.shape[0]}"
                )
            if segments is not None:
                raise BatchError("packed rows hold several responses: pass response_mask")
            response = real & (torch.arange(shape[1], device=input_ids.device) >= starts)
        else:
            response = _as_mask(response_mask, "response_mask", shape, input_ids.device)
            if response_mask is None:
                response = real
        _check_responses(response, real, segments)
        texts = None
        if tokenizer is not None:
            texts = tuple(token_texts(tokenizer, row) for row in input_ids.tolist())
        return TokenBatch(input_ids, real, response, segments, texts)

    @staticmethod
    def from_text(tokenizer: Any, prompts: Sequence[str], responses: Sequence[str]) -> TokenBatch:
        """Build a batch from prompts and responses as text.

        Prompt and response are tokenized apart, the way a response is generated, so that no token
        straddles their border; only the prompt gets the tokenizer's special tokens.

        Raises:
            BatchError: different numbers of prompts and responses, or an empty response.
        """
        prompts, responses = _as_texts(prompts, "prompts"), _as_texts(responses, "responses")
        heads = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
        return _join(tokenizer, heads, responses)

    @staticmethod
    def from_chat(
        tokenizer: Any,
        messages: Sequence[dict[str, str]] | Sequence[Sequence[dict[str, str]]],
        responses: Sequence[str] | str,
    ) -> TokenBatch:
        """Build a batch from chats, by the tokenizer's own chat template, and responses as text.

        `messages` is one conversation or several; each ends where the assistant is to speak.

        Raises:
            BatchError: a tokenizer without a chat template, different numbers of conversations and
                responses, or an empty response.
        """
        if getattr(tokenizer, "chat_template", None) is None:
            raise BatchError("this tokenizer has no chat template: use TokenBatch.from_text")
        conversations: Sequence[Any] = messages
        if len(messages) > 0 and isinstance(messages[0], dict):
            conversations = [messages]
        heads = [chat_prompt_ids(tokenizer, conversation) for conversation in conversations]
        texts = [responses] if isinstance(responses, str) else list(responses)
        return _join(tokenizer, heads, texts)

    @staticmethod
    def from_rollout(
        prompt_ids: Int[Tensor, "batch prompt"],
        prompt_mask: Tensor,
        completion_ids: Int[Tensor, "batch completion"],
        completion_mask: Tensor,
        *,
        tokenizer: Any = None,
    ) -> TokenBatch:
        """Build a batch from a trainer's rollout: prompts padded left, completions padded right.

        The columns are those of the prompts followed by those of the completions.

        Raises:
            BatchError: shapes or masks that do not fit.
        """
        if prompt_ids.ndim != 2 or completion_ids.ndim != 2:
            raise BatchError(
                "prompt_ids and completion_ids must be [batch, token], got "
                f"{list(prompt_ids.shape)} and {list(completion_ids.shape)}"
            )
        if prompt_ids.shape[0] != completion_ids.shape[0]:
            raise BatchError(f"{prompt_ids.shape[0]} prompts but {completion_ids.shape[0]} completions")
        device = prompt_ids.device
        prompt = _as_mask(prompt_mask, "prompt_mask", prompt_ids.shape, device)
        completion = _as_mask(completion_mask, "completion_mask", completion_ids.shape, device)
        return TokenBatch.from_ids(
            torch.cat([prompt_ids, completion_ids], dim=1),
            torch.cat([prompt, completion], dim=1),
            response_mask=torch.cat([torch.zeros_like(prompt), completion], dim=1),
            tokenizer=tokenizer,
        )

    # ---- layout -------------------------------------------------------------------------------

    def unpadded_rows(self) -> tuple[TokenBatch, RowLayout]:
        """Return the same tokens as right-padded rows of one sequence each, and the way back.

        A packed row becomes as many rows as it has sequences with a response in them.
        """
        spans: list[tuple[int, int, int]] = []
        for row in range(self.batch_size):
            if self.segment_ids is None:
                columns = self.attention_mask[row].nonzero()[:, 0]
                spans.append((row, int(columns[0]), len(columns)))
                continue
            for segment in range(int(self.segment_ids[row].max()) + 1):
                columns = (self.segment_ids[row] == segment).nonzero()[:, 0]
                if bool(self.response_mask[row, columns].any()):
                    spans.append((row, int(columns[0]), len(columns)))
        width = max(length for _, _, length in spans)
        ids = self.input_ids.new_zeros(len(spans), width)
        real = torch.zeros(len(spans), width, dtype=torch.bool, device=ids.device)
        response = torch.zeros_like(real)
        for i, (row, start, length) in enumerate(spans):
            # Padding repeats a token of the row, which is in the vocabulary whatever that is.
            ids[i] = self.input_ids[row, start]
            ids[i, :length] = self.input_ids[row, start : start + length]
            real[i, :length] = True
            response[i, :length] = self.response_mask[row, start : start + length]
        source, start, lengths = torch.tensor(spans).T
        layout = RowLayout(source, start, lengths, (self.batch_size, self.token_count))
        texts = None
        if self.texts is not None:
            texts = tuple(
                (*self.texts[row][first : first + length], *[""] * (width - length))
                for row, first, length in spans
            )
        return TokenBatch(ids, real, response, texts=texts), layout

    def select(self, rows: slice) -> TokenBatch:
        """Return some rows, without the columns after their last token."""
        used = self.attention_mask[rows].any(0).nonzero()[:, 0]
        columns = slice(0, int(used.max()) + 1)
        segments = None if self.segment_ids is None else self.segment_ids[rows, columns]
        texts = None
        if self.texts is not None:
            texts = tuple(row[columns] for row in self.texts[rows])
        return TokenBatch(
            self.input_ids[rows, columns],
            self.attention_mask[rows, columns],
            self.response_mask[rows, columns],
            segments,
            texts,
        )

    def to(self, device: torch.device | str) -> TokenBatch:
        """Return the batch with its tensors on a device."""
        segments = None if self.segment_ids is None else self.segment_ids.to(device)
        return TokenBatch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.response_mask.to(device),
            segments,
            self.texts,
        )


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Return the text of each token, so that joined they give the text of the whole.

    Characters whose bytes are spread over several tokens stand with the first of these tokens, and the
    others are empty.
    """

    def decode(some: list[int]) -> str:
        return str(tokenizer.decode(some, clean_up_tokenization_spaces=False)) if some else ""

    texts: list[str] = []
    pending: list[int] = []
    # The tokens before are decoded along: a lone SentencePiece token would lose its leading space.
    context: list[int] = []
    for i, token in enumerate(ids):
        pending.append(token)
        whole = decode(context + pending)
        if whole.endswith("\ufffd") and i + 1 < len(ids):
            # The last character is not complete yet.
            continue
        texts += [whole[len(decode(context)) :], *[""] * (len(pending) - 1)]
        context, pending = pending, []
    return tuple(texts)


def chat_prompt_ids(tokenizer: Any, conversation: Sequence[dict[str, str]]) -> list[int]:
    """Return the ids of a conversation up to where the assistant speaks, by the chat template."""
    text = tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _join(tokenizer: Any, heads: list[list[int]], responses: Sequence[str]) -> TokenBatch:
    """Join tokenized prompts and response texts into a right-padded batch."""
    if len(heads) != len(responses):
        raise BatchError(f"{len(heads)} prompts but {len(responses)} responses")
    if not heads:
        raise BatchError("the batch is empty: pass at least one prompt and response")
    tails = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in responses]
    for i, tail in enumerate(tails):
        if not tail:
            raise BatchError(f"response {i} is empty: there is no token to describe")
    ids, real = _pad_right([head + tail for head, tail in zip(heads, tails, strict=True)])
    starts = torch.tensor([len(head) for head in heads])
    return TokenBatch.from_ids(ids, real, response_start=starts, tokenizer=tokenizer)


def _as_texts(texts: Sequence[str], name: str) -> list[str]:
    if isinstance(texts, str):
        return [texts]
    if not all(isinstance(text, str) for text in texts):
        raise BatchError(f"{name} must be a list of strings")
    return list(texts)


def _pad_right(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    if not rows or any(len(row) == 0 for row in rows):
        raise BatchError("every row needs at least one token")
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [row[0]] * (width - len(row)) for row in rows])
    real = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, real


def _as_mask(
    mask: Tensor | None, name: str, shape: torch.Size, device: torch.device
) -> Bool[Tensor, "batch token"]:
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if mask.ndim == 1 and shape[0] == 1:
        mask = mask[None]
    if mask.shape != shape:
        raise BatchError(f"{name} must be {list(shape)} like the token ids, got {list(mask.shape)}")
    if bool(((mask != 0) & (mask != 1)).any()):
        raise BatchError(f"{name} must hold 0 and 1 (or False and True) only")
    return mask.to(device=device, dtype=torch.bool)


def _segments(position_ids: Tensor, real: Tensor) -> Tensor:
    """Number the sequences of packed rows: a new one starts where positions do not go on by one."""
    if position_ids.ndim == 1:
        position_ids = position_ids[None]
    if position_ids.shape[0] == 1:
        position_ids = position_ids.expand(real.shape[0], -1)
    if position_ids.shape != real.shape:
        raise BatchError(
            f"position_ids must be {list(real.shape)} like the token ids, got {list(position_ids.shape)}"
        )
    starts = torch.ones_like(real)
    starts[:, 1:] = (position_ids[:, 1:] != position_ids[:, :-1] + 1) | ~real[:, :-1]
    starts &= real
    if bool((position_ids[starts] != 0).any()):
        raise BatchError("each packed sequence must start at position 0")
    return (starts.cumsum(-1) - 1).masked_fill(~real, -1)


def _check_runs(mask: Tensor, name: str, segments: Tensor | None) -> None:
    """Check that each row (of each segment) holds one unbroken run of True, or none."""
    rises = mask.clone()
    rises[:, 1:] &= ~mask[:, :-1]
    if segments is not None:
        same = segments[:, 1:] == segments[:, :-1]
        rises[:, 1:] |= mask[:, 1:] & ~same
        for row in range(mask.shape[0]):
            of_run = segments[row][rises[row]]
            if len(of_run) != len(of_run.unique()):
                raise BatchError(f"{name} has a hole in row {row}: one run for each sequence")
        return
    count = rises.sum(-1)
    if bool((count > 1).any()):
        row = int((count > 1).nonzero()[0])
        raise BatchError(
            f"{name} has a hole in row {row}: a row may be padded on the left or right, and a response "
            "is one run of tokens"
        )
    if bool((count == 0).any()):
        raise BatchError(f"{name} is empty in row {int((count == 0).nonzero()[0])}")


def _check_responses(response: Tensor, real: Tensor, segments: Tensor | None) -> None:
    empty = ~response.any(-1)
    if bool(empty.any()):
        raise BatchError(
            f"row {int(empty.nonzero()[0])} has an empty response: there is no token to describe"
        )
    if bool((response & ~real).any()):
        row = int((response & ~real).nonzero()[0, 0])
        raise BatchError(f"response_mask marks padding in row {row}: it must lie in attention_mask")
    _check_runs(response, "response_mask", segments)

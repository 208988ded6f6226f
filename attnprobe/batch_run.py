"""A batch that is ready to run: its sequences, and which of them run together.

`BatchRun` splits a batch into right-padded sequences, or leaves it as it is if it has images, and forms
the parts that go through the model at a time. `measure` and `group_maps` run them, and a corpus is batched
by the same `similar_lengths_together`; `check_fits` is also for analyses with passes of their own. What is
left to others: the passes (measurement), and which lengths disturb each other (adapters).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from attnprobe.adapters import Adapter, adapter_for
from attnprobe.adapters.base import Layers, Value, resolve_layers
from attnprobe.batch import TokenBatch
from attnprobe.errors import BatchError, ParameterError
from attnprobe.layout import SequenceLayout, check_padding
from attnprobe.probe import Probe
from attnprobe.progress import Advance, progress_bar
from attnprobe.validation import IntLike, whole_number

MEMORY_BUDGET = 2 * 2**30
"""The default of `measure`'s memory budget, in bytes."""

MOST_PADDING = 0.03
"""No sequence is added to others if more than this share of them would then be padding, ..."""

LEAST_BUSY = 0.125
"""... unless they hold less than this share of the token budget: small batches cost more than padding."""

TOKEN_BUDGET = 4096
"""The default of `measure`'s token budget: enough to keep a machine busy, and little is lost to padding."""


@dataclass(frozen=True)
class BatchRun:
    """A batch split into sequences and ready to run, a few at a time.

    `together` holds the numbers of the sequences that are run together.
    """

    adapter: Adapter
    layers: tuple[int, ...]
    sequences: TokenBatch
    layout: SequenceLayout
    together: list[list[int]]

    @staticmethod
    def prepare(
        model: Any,
        batch: TokenBatch,
        layers: Layers,
        batch_size: IntLike | None = None,
        memory_budget: int = MEMORY_BUDGET,
        entropy: bool = False,
        token_budget: IntLike | None = None,
    ) -> BatchRun:
        """Return a run of the batch; the arguments are those of `measure`.

        Raises:
            BatchError: tokens that the model cannot run.
            ParameterError: layers that the model does not have, or an invalid batch size or token budget.
        """
        adapter = adapter_for(model)
        chosen = resolve_layers(layers, adapter)
        if batch_size is not None:
            batch_size = whole_number(batch_size, "batch_size", minimum=1)
        if token_budget is not None:
            token_budget = whole_number(token_budget, "token_budget", minimum=1)
        if batch.model_inputs is not None:
            check_fits(batch, adapter)
            check_padding(batch.attention_mask)
            if batch_size is not None and batch_size < batch.batch_size:
                raise ParameterError(
                    f"a batch with {', '.join(batch.model_inputs)} is run as a whole, not {batch_size} of "
                    f"its {batch.batch_size} examples at a time: measure smaller batches instead"
                )
            layout = SequenceLayout.unchanged(batch.batch_size, batch.token_count)
            return BatchRun(adapter, chosen, batch, layout, [list(range(batch.batch_size))])
        sequences, layout = batch.sequences()
        check_fits(sequences, adapter)
        lengths = sequences.attention_mask.sum(-1).tolist()
        # A batch size alone is what the caller wants. Without one, little is to be lost to padding.
        together = similar_lengths_together(
            lengths,
            adapter,
            most=batch_size,
            tokens=token_budget or (None if batch_size else TOKEN_BUDGET),
            memory=None if batch_size else memory_budget,
            answers=sequences.response_mask.sum(-1).tolist() if entropy else None,
        )
        return BatchRun(adapter, chosen, sequences, layout, together)

    @property
    def width(self) -> int:
        """The number of columns of the longest sequence."""
        return self.sequences.token_count

    def parts(self) -> Iterator[tuple[list[int], TokenBatch]]:
        """Return the sequences that are run together: their numbers, and their tokens."""
        trim = self.sequences.model_inputs is None
        for members in self.together:
            yield members, self.sequences.select(members, trim=trim).to(self.adapter.device)

    def order(self) -> list[int]:
        """Return where each sequence is in the order in which they are run."""
        place = {number: i for i, number in enumerate(chain.from_iterable(self.together))}
        return [place[number] for number in range(len(place))]

    @contextmanager
    def progress(self, shown: bool, label: str) -> Iterator[Probe]:
        """Show a progress bar while the context is open, and give the probe that moves it."""
        total = len(self.layers) * len(self.together)
        with progress_bar(label, total, shown=shown) as advance:
            yield _Ticking(advance)


class _Ticking(Probe):
    """Moves a progress bar with every layer."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def observe(self, site: str, layer: int | None, value: Value, batch: TokenBatch) -> None:
        self._advance()


def similar_lengths_together(
    lengths: Sequence[int],
    adapter: Adapter,
    *,
    most: int | None = None,
    tokens: int | None = None,
    memory: int | None = None,
    answers: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return the numbers of the sequences that run together, all of one regime, the shortest first.

    A sequence runs alone if it does not fit with any other.

    Args:
        lengths: of each sequence, in tokens.
        adapter: of the model that runs them.
        most: how many sequences may run together.
        tokens: how many tokens may, padding included; little of it is then lost to padding.
        memory: roughly how many bytes their activations may take, and the logits that are held at once.
        answers: for how many tokens of each sequence logits are computed; None: for none.

    >>> from attnprobe.testing.tiny_models import tiny_model
    >>> similar_lengths_together([3, 9, 3, 9], adapter_for(tiny_model("llama")), tokens=20)
    [[0, 2], [1, 3]]
    """
    by_regime: dict[Hashable, list[int]] = {}
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        by_regime.setdefault(adapter.regime(lengths[number]), []).append(number)
    together: list[list[int]] = []
    for members in by_regime.values():
        part: list[int] = []
        answer = real = 0
        for number in members:
            # The next one is the longest so far: all are padded to it.
            width, count = lengths[number], len(part) + 1
            held = adapter.activation_bytes * width * count
            if answers is not None:
                answer = max(answer, answers[number])
                held += adapter.logits_bytes(count, answer)
            is_full = (most is not None and count > most) or (memory is not None and held > memory)
            if tokens is not None:
                padding = 1 - (real + width) / (count * width)
                is_sparse = padding > MOST_PADDING and real >= LEAST_BUSY * tokens
                is_full = is_full or is_sparse or count * width > tokens
            if part and is_full:
                together.append(part)
                part, real, answer = [], 0, 0 if answers is None else answers[number]
            part.append(number)
            real += width
        together.append(part)
    return together


def check_fits(sequences: TokenBatch, adapter: Adapter) -> None:
    """Check that a model can run these tokens.

    Raises:
        BatchError: ids outside the vocabulary, sequences longer than the model's context, or an image's
            tokens without its pixels.
    """
    _check_media(sequences, adapter)
    # Those of images may lie outside: the model puts something else in their place.
    ids = sequences.input_ids
    media = torch.tensor(list(adapter.media_tokens), dtype=ids.dtype, device=ids.device)
    largest = int(ids.masked_fill(torch.isin(ids, media), 0).max())
    if largest >= adapter.vocabulary_size:
        raise BatchError(
            f"token id {largest} is outside the vocabulary of {adapter.model_name}, which has "
            f"{adapter.vocabulary_size} ids: was the batch made with another tokenizer?"
        )
    limit = adapter.context_length
    if limit is not None and sequences.token_count > limit:
        raise BatchError(
            f"a sequence of {sequences.token_count} tokens is longer than the context of "
            f"{adapter.model_name}, {limit} tokens: shorten the prompt or response"
        )


def _check_media(batch: TokenBatch, adapter: Adapter) -> None:
    """Check that images whose tokens are in the text are there."""
    given = batch.model_inputs or {}
    for token, medium in adapter.media_tokens.items():
        is_there = any(medium in name or (medium == "image" and "pixel" in name) for name in given)
        if medium == "audio":
            is_there = is_there or "input_features" in given
        count = int((batch.input_ids == token).sum())
        if count and not is_there:
            raise BatchError(
                f"the batch has {count} {medium} tokens ({token}), but holds no {medium}: pass all that the "
                f"processor of {adapter.model_name} returned to measure, pixels included. The tokens alone "
                "would be read as if they were text"
            )

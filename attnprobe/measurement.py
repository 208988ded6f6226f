"""Running a model over a batch: `measure` for statistics of every head, `group_maps` for pictures.

Both run the batch as right-padded rows, a few at a time, and bring results back to the caller's
layout. What is left to others: what is computed (head_statistics, metrics) and how a model is read
(adapters).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe import metrics
from attnprobe.adapters import Adapter, adapter_for
from attnprobe.adapters.base import Layers, Value, resolve_layers
from attnprobe.attention.kernels import carries_positions
from attnprobe.attention.operator import Attention
from attnprobe.batch import RowLayout, TokenBatch
from attnprobe.errors import BatchError, ParameterError
from attnprobe.head_statistics import HeadStatistics, HeadStatisticsProbe, ReceiverLevel
from attnprobe.heads import HeadGroups
from attnprobe.metrics import Horizon
from attnprobe.probe import Probe, attach
from attnprobe.progress import Advance, progress_bar
from attnprobe.receivers import SentenceReceiverProbe
from attnprobe.sentences import sentence_ids

MEMORY_BUDGET = 2 * 2**30
"""The default of `measure`'s memory budget, in bytes."""


def measure(
    model: Any,
    batch: TokenBatch,
    *,
    layers: Layers = "all",
    window: int = 10,
    horizon: Horizon = (10, 50),
    span: bool = True,
    receiver: bool | ReceiverLevel = False,
    entropy: bool = True,
    batch_size: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: bool = False,
) -> HeadStatistics:
    """Run a model over a batch once, and return what every head does there.

    Args:
        model: a model that an adapter knows, such as a transformers causal language model.
        batch: the tokens, in any layout; results are aligned with it.
        layers: "all", "middle" (five, evenly spaced in the middle third) or layer numbers.
        window: WAAD's window, in tokens.
        horizon: FAI's horizon `(low, high)`, in tokens; `(low, None)` runs to the end of the response.
        span: whether to compute span; without it heads cannot be grouped, but a saved grouping can be used.
        receiver: whether to compute receiver kurtosis too (one more pass over the attention): of
            tokens ("token" or True), or of sentences ("sentence"), for which the batch needs texts.
        entropy: whether to compute token entropy; without it nothing above the last layer is run.
        batch_size: how many sequences to run at a time; default: as many as fit the memory budget.
            Results do not depend on it.
        memory_budget: about how many bytes of activations and logits a chunk of the batch may take; at
            least one sequence is run at a time. An estimate from the model's widths, not a bound.
        progress: whether to show a progress bar.

    Raises:
        BatchError: ids out of the vocabulary, sequences longer than the model's context, or sentences
            wanted of a batch without texts.
        ParameterError: layers, window, horizon or receiver that make no sense.
        UnsupportedModelError: a model whose attention cannot be read.

    The model runs in evaluation mode, in its own dtype and on its own device, and is left as it was.
    """
    if memory_budget < 1:
        raise ParameterError(f"memory_budget is a number of bytes, at least 1; got {memory_budget}")
    level = _receiver_level(receiver)
    probe = HeadStatisticsProbe(
        window=window, horizon=horizon, span=span, receiver=level == "token", entropy=False
    )
    run = _Run.prepare(model, batch, layers, batch_size, memory_budget, entropy)
    sentences = sentence_ids(run.rows) if level == "sentence" else None
    by_sentence = None if sentences is None else SentenceReceiverProbe(sentences)
    probes: list[Probe] = [probe] if by_sentence is None else [probe, by_sentence]
    entropies: list[Tensor] = []
    with run.progress(progress, "measuring") as ticking:
        for number, part in enumerate(run.parts()):
            if by_sentence is not None and sentences is not None:
                rows = slice(number * run.size, (number + 1) * run.size)
                by_sentence.sentence_ids = sentences[rows, : part.token_count]
            with (
                carries_positions() if span else nullcontext(),
                attach(run.adapter, *probes, ticking, layers=run.layers, response_mask=part.response_mask),
            ):
                if entropy:
                    entropies.append(_run_for_entropy(run.adapter, part, run.width))
                else:
                    run.adapter.forward(part)
    statistics = probe.result()
    layout = run.layout
    kurtosis = statistics.receiver_kurtosis if by_sentence is None else by_sentence.result()
    # Several packed responses of one of the caller's rows: Eq. 7 is a mean over all their tokens.
    weights = statistics.response_mask.sum(-1)
    return replace(
        statistics,
        span=None if statistics.span is None else layout.responses(statistics.span, weights),
        waad=layout.tokens(statistics.waad),
        fai=layout.tokens(statistics.fai),
        entropy=layout.tokens(torch.cat(entropies)) if entropies else None,
        receiver_kurtosis=None if kurtosis is None else layout.responses(kurtosis, weights),
        receiver_level=level,
        response_mask=batch.response_mask.to(run.adapter.device),
        segment_ids=batch.segment_ids,
        skipped_layers=run.adapter.skipped_layers,
        model_name=run.adapter.model_name,
    )


def _receiver_level(receiver: bool | ReceiverLevel) -> ReceiverLevel | None:
    if isinstance(receiver, bool):
        return "token" if receiver else None
    if receiver in get_args(ReceiverLevel):
        return receiver
    raise ParameterError(f'receiver is "token", "sentence" or a truth value, got {receiver!r}')


@dataclass(frozen=True)
class GroupMaps:
    """The mean attention maps of head groups over one response (Eq. 8 of arXiv 2510.13554).

    Attributes:
        local_map, global_map: `[token, token]` over the response's tokens, rows are queries.
        columns: the caller's columns that these tokens stand in.
    """

    local_map: Float[Tensor, "token token"]
    global_map: Float[Tensor, "token token"]
    columns: tuple[int, ...]


def group_maps(
    model: Any, batch: TokenBatch, heads: HeadGroups, *, example: int = 0, progress: bool = False
) -> GroupMaps:
    """Return the group maps of one response, for pictures: the one place that stores a map.

    It runs the model again: groups are known only after `measure`, and keeping the maps of all heads
    until then would cost what attnprobe exists to avoid.

    Raises:
        ParameterError: an example that the batch does not have, or a packed row.
        BatchError: ids out of the vocabulary, or sequences longer than the model's context.
        UnsupportedModelError: a model whose attention cannot be read.
    """
    if not 0 <= example < batch.batch_size:
        raise ParameterError(f"example must be in 0..{batch.batch_size - 1}, got {example}")
    run = _Run.prepare(model, batch.select(slice(example, example + 1)), heads.layers)
    if run.rows.batch_size > 1:
        raise ParameterError(
            f"row {example} packs {run.rows.batch_size} responses: put each in a row of its own for maps"
        )
    part = next(run.parts())
    inside = part.response_mask[0].nonzero()[:, 0]
    probe = _GroupMapProbe(heads, inside)
    with (
        run.progress(progress, "mapping") as ticking,
        attach(run.adapter, probe, ticking, layers=run.layers),
    ):
        run.adapter.forward(part)
    start = int(run.layout.start[0])
    columns = tuple(start + column for column in inside.tolist())
    local_map, global_map = (
        probe.total[name] / int(mask.sum())
        for name, mask in (("local", heads.local_heads), ("global", heads.global_heads))
    )
    return GroupMaps(local_map, global_map, columns)


class _GroupMapProbe(Probe):
    """Adds up the maps of the heads of each group over the response."""

    def __init__(self, heads: HeadGroups, inside: Tensor) -> None:
        self._heads = heads
        self._inside = inside
        self.total: dict[str, Tensor] = {}

    def observe(self, site: str, layer: int | None, value: Value, batch: TokenBatch) -> None:
        assert isinstance(value, Attention)
        assert layer is not None
        index = self._heads.layers.index(layer)
        rows = value.rows(self._inside)[0][..., self._inside]
        groups = {"local": self._heads.local_heads, "global": self._heads.global_heads}
        for name, mask in groups.items():
            chosen = mask[index, : rows.shape[0]].to(rows.device)
            part = rows[chosen].sum(0)
            self.total[name] = part + self.total.get(name, 0.0)


@dataclass(frozen=True)
class _Run:
    """A batch made ready to be run, a few rows at a time."""

    adapter: Adapter
    layers: tuple[int, ...]
    rows: TokenBatch
    layout: RowLayout
    size: int

    @staticmethod
    def prepare(
        model: Any,
        batch: TokenBatch,
        layers: Layers,
        batch_size: int | None = None,
        memory_budget: int = MEMORY_BUDGET,
        entropy: bool = False,
    ) -> _Run:
        adapter = adapter_for(model)
        chosen = resolve_layers(layers, adapter)
        rows, layout = batch.unpadded_rows()
        _check_fits(rows, adapter)
        if batch_size is not None and batch_size < 1:
            raise ParameterError(f"batch_size must be at least 1, got {batch_size}")
        size = batch_size or _rows_within(memory_budget, rows, adapter, entropy)
        return _Run(adapter, chosen, rows, layout, size)

    @property
    def width(self) -> int:
        return self.rows.token_count

    def parts(self) -> Iterator[TokenBatch]:
        for begin in range(0, self.rows.batch_size, self.size):
            yield self.rows.select(slice(begin, begin + self.size)).to(self.adapter.device)

    @contextmanager
    def progress(self, shown: bool, label: str) -> Iterator[Probe]:
        total = len(self.layers) * -(-self.rows.batch_size // self.size)
        with progress_bar(label, total, shown=shown) as advance:
            yield _Ticking(advance)


class _Ticking(Probe):
    """Moves a progress bar with every layer."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def observe(self, site: str, layer: int | None, value: Value, batch: TokenBatch) -> None:
        self._advance()


def _rows_within(budget: int, rows: TokenBatch, adapter: Adapter, entropy: bool) -> int:
    """Return how many rows at a time are estimated to stay within a budget of bytes; at least one."""
    per_row = adapter.activation_bytes * rows.token_count
    if entropy:
        # Logits come in the model's dtype, four bytes at most, for the response's tokens only.
        per_row += 4 * adapter.vocabulary_size * int(rows.response_mask.sum(-1).max())
    return rows.batch_size if per_row == 0 else min(rows.batch_size, max(1, budget // per_row))


def _check_fits(rows: TokenBatch, adapter: Adapter) -> None:
    """Check that a model can take these tokens."""
    largest = int(rows.input_ids.max())
    if largest >= adapter.vocabulary_size:
        raise BatchError(
            f"token id {largest} is outside the vocabulary of {adapter.model_name}, which has "
            f"{adapter.vocabulary_size} ids: was the batch made with another tokenizer?"
        )
    limit = adapter.context_length
    if limit is not None and rows.token_count > limit:
        raise BatchError(
            f"a sequence of {rows.token_count} tokens is longer than the context of "
            f"{adapter.model_name}, {limit} tokens: shorten the prompt or response"
        )


def _run_for_entropy(adapter: Adapter, part: TokenBatch, width: int) -> Float[Tensor, "batch token"]:
    """Run the model and return the entropy of each response token, padded with NaN to the width.

    Only the logits that response tokens were sampled from are computed: those one position earlier.
    """
    entropy = torch.full((part.batch_size, width), torch.nan, device=adapter.device)
    before = part.response_mask[:, 1:].any(0).nonzero()[:, 0]
    if len(before) == 0:
        adapter.forward(part)
        return entropy
    logits = adapter.forward(part, logits_at=before)
    assert logits is not None
    entropy[:, before + 1] = metrics.distribution_entropy(logits)
    inside = torch.nn.functional.pad(part.response_mask, (0, width - part.token_count))
    return entropy.masked_fill(~inside, torch.nan)

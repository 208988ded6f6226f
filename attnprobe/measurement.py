"""Running a model over a batch: `measure` for statistics of every head, `group_maps` for pictures.

Both run the batch as right-padded sequences, a few at a time, and bring the results back to the caller's
layout. Users and the command line call them. What is left to others: what is computed (statistics_probe,
map_probe, metrics) and how a model is read (adapters).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe import metrics
from attnprobe.adapters import Adapter, adapter_for
from attnprobe.adapters.base import Layers
from attnprobe.attention.listening import carries_positions
from attnprobe.batch import BatchLike, TokenBatch
from attnprobe.batch_run import MEMORY_BUDGET, BatchRun
from attnprobe.errors import ParameterError
from attnprobe.head_groups import GroupsLike, head_groups
from attnprobe.head_selection import HeadsLike
from attnprobe.head_statistics import HeadStatistics, ReceiverLevel
from attnprobe.map_probe import GroupMapProbe, ResponsePlace
from attnprobe.maps import GroupMaps
from attnprobe.metric_arguments import HorizonLike
from attnprobe.probe import Probe, attach
from attnprobe.provenance import Provenance
from attnprobe.receivers import SentenceReceiverProbe
from attnprobe.reductions import TRAINING_HORIZON
from attnprobe.segments import NamesLike
from attnprobe.sentences import SentenceReceivers, sentence_ids
from attnprobe.statistics_probe import HeadStatisticsProbe
from attnprobe.validation import ArrayLike, IntLike, brief, truth, whole_number, whole_numbers


def measure(
    model: Any,
    batch: BatchLike,
    *,
    layers: Layers = "all",
    window: IntLike = 10,
    horizon: HorizonLike = TRAINING_HORIZON,
    span: bool = True,
    receiver: bool | ReceiverLevel | SentenceReceivers = False,
    entropy: bool = True,
    share_on: NamesLike | None = None,
    share_from: NamesLike = "response",
    span_ignores: NamesLike | None = None,
    influence_rows: str = "response",
    value_weighted: bool = False,
    batch_size: IntLike | None = None,
    memory_budget: IntLike = MEMORY_BUDGET,
    token_budget: IntLike | None = None,
    progress: bool = False,
) -> HeadStatistics:
    """Run a model over a batch once, and return the statistics of every head.

    Args:
        model: a model that an adapter knows, such as a transformers causal language model.
        batch: the tokens, in any layout: a `TokenBatch`, or anything that `TokenBatch.of` accepts, such as a
            tokenizer's output, or a processor's with images. Results are aligned with it.
        layers: "all", "middle" (five, evenly spaced in the middle third), another name of `named_layers`, or
            layer numbers.
        window: WAAD's window, in tokens.
        horizon: FAI's horizon `(low, high)`, in tokens; `(low, None)` runs to the end of the response.
        span: whether to compute span; without it heads cannot be grouped, but a saved grouping can be used.
        receiver: whether to compute receiver kurtosis and its Gini coefficient too (one more pass over the
            attention): over tokens ("token" or True), or over sentences ("sentence", or
            `SentenceReceivers(...)` with options), for which the batch needs texts.
        entropy: whether to compute token entropy; without it, nothing after the last measured layer is run.
            A model without next-token logits (a base model, a classifier) can only be read without it.
        share_on: names of segments: the share of attention on each of them is kept, for every head. Besides
            "prompt", "response" and "first" (the first token), these are the batch's own. None: "first", if
            span is computed, at next to no cost; others cost a pass over the attention, all together.
        share_from: names of segments whose rows give these shares.
        span_ignores: names of segments that a second span ignores, with what is left of each row
            renormalised (`span_ignoring`). None: "first", if span is computed; (): no second span.
        influence_rows: the segment whose rows count in FAI, in place of those of the response. The tokens
            that are scored stay those of the response.
        value_weighted: whether FAI and token-level receiver kurtosis weigh attention by the norm of the key's
            value after the head's output projection, in the units of the residual stream. Span, WAAD and
            shares stay plain. Costs about one output projection for each layer.
        batch_size: how many sequences to run at a time, at most; default: as many as fit both budgets.
            Sequences of similar length run together, and results do not depend on it. A batch with images is
            always run as a whole.
        memory_budget: roughly how many bytes the sequences run together may take: their activations, and
            their logits, or as many of these as are computed at a time. At least one sequence is run.
            Estimated from the model's widths; not a hard limit.
        token_budget: how many tokens to run at a time, padding included; at least one sequence is run.
            Default: 4096, or no limit if there is a batch size.
        progress: whether to show a progress bar.

    Raises:
        BatchError: ids outside the vocabulary, sequences longer than the model's context, an image's tokens
            without its pixels, or receivers by sentence for a batch without texts.
        ParameterError: invalid layers, window, horizon or receiver, segments that the batch does not have, or
            sentence-level receivers weighted by values.
        UnsupportedModelError: a model whose attention cannot be read; entropy of a model without next-token
            logits; or `value_weighted`, if more is done to the output of the attention before it is
            projected.

    The model runs in evaluation mode, in its own dtype and on its own device, and is left as it was.
    """
    batch = TokenBatch.of(batch)
    memory_budget = whole_number(memory_budget, "memory_budget", minimum=1)
    adapter = adapter_for(model)
    if truth(entropy, "entropy"):
        adapter.check_next_token_logits("entropy", "pass entropy=False, or ")
    truth(progress, "progress")
    options = _sentence_receivers(receiver)
    level: ReceiverLevel | None = "sentence" if options else "token" if receiver else None
    probe = HeadStatisticsProbe(
        window=window,
        horizon=horizon,
        span=span,
        receiver=level == "token",
        entropy=False,
        share_on=share_on,
        share_from=share_from,
        span_ignores=span_ignores,
        influence_rows=influence_rows,
        value_weighted=value_weighted,
    )
    if value_weighted and level == "sentence":
        raise ParameterError('value_weighted cannot go with receiver="sentence": pass receiver="token"')
    probe.asked.check_known(batch.segment_names, "batch.with_segments({})")
    run = BatchRun.prepare(adapter, batch, layers, batch_size, memory_budget, entropy, token_budget)
    probe.right_padded = run.sequences.model_inputs is None
    sentences = None if options is None else sentence_ids(run.sequences, options.splitting)
    by_sentence = None
    if options is not None and sentences is not None:
        by_sentence = SentenceReceiverProbe(
            sentences, min_distance=options.min_distance, minimum_sentences=options.minimum_sentences
        )
    probes: list[Probe] = [probe] if by_sentence is None else [probe, by_sentence]
    entropies: list[Tensor] = []
    with run.progress(progress, "measuring") as ticking:
        for members, part in run.parts():
            if by_sentence is not None and sentences is not None:
                by_sentence.sentence_ids = sentences[members, : part.token_count]
            with (
                carries_positions() if span else nullcontext(),
                attach(
                    run.adapter,
                    *probes,
                    ticking,
                    layers=run.layers,
                    response_mask=part.response_mask,
                    attention_mask=part.attention_mask,
                    segments={name: part.segment(name) for name in part.segment_names},
                ),
            ):
                if entropy:
                    marked = run.sequences.response_mask[members, : part.token_count]
                    entropies.append(_run_for_entropy(run.adapter, part, marked, run.width))
                else:
                    run.adapter.forward(part)
    order = run.order()
    statistics = probe.result().select(order)
    layout = run.layout
    kurtosis, gini = statistics.receiver_kurtosis, statistics.receiver_gini
    if by_sentence is not None:
        kurtosis, gini = (each[order] for each in by_sentence.selectivity())
    # An example may pack several responses: Eq. 7 is then a mean over all their tokens.
    weights = statistics.response_mask.sum(-1)
    rows_left = probe.rows_left()
    shares, ignoring = None, None
    if statistics.shares is not None:
        sources = statistics.shares.unbind(3)
        counts = [run.sequences.segment(name).sum(-1) for name in statistics.share_from]
        shares = torch.stack([layout.examples(*each) for each in zip(sources, counts, strict=True)], dim=3)
    if statistics.span_ignoring is not None and rows_left is not None:
        ignoring = layout.examples(statistics.span_ignoring, rows_left[order])
    is_packed = batch.segment_ids is not None
    by_sequence: dict[str, Any] = {
        f"sequence_{name}": layout.by_sequence(values)
        for name in ("span", "shares", "span_ignoring")
        if is_packed and (values := getattr(statistics, name)) is not None
    }
    return replace(
        statistics,
        **by_sequence,
        span=None if statistics.span is None else layout.examples(statistics.span, weights),
        shares=shares,
        span_ignoring=ignoring,
        waad=layout.tokens(statistics.waad),
        fai=layout.tokens(statistics.fai),
        entropy=layout.tokens(torch.cat(entropies)[order]) if entropies else None,
        receiver_kurtosis=None if kurtosis is None else layout.examples(kurtosis, weights),
        receiver_gini=None if gini is None else layout.examples(gini, weights),
        receiver_level=level,
        sentence_receivers=options,
        response_mask=batch.response_mask.to(run.adapter.device),
        segment_ids=None if batch.segment_ids is None else batch.segment_ids.to(run.adapter.device),
        input_ids=batch.input_ids.to(run.adapter.device),
        texts=batch.texts,
        skipped_layers=run.adapter.skipped_layers,
        model_name=run.adapter.model_name,
    )


def _sentence_receivers(receiver: bool | ReceiverLevel | SentenceReceivers) -> SentenceReceivers | None:
    """Return how receivers are found by sentence; None if they are found by token, or not at all."""
    if isinstance(receiver, SentenceReceivers):
        return receiver
    if not isinstance(receiver, bool) and receiver not in get_args(ReceiverLevel):
        raise ParameterError(
            'receiver must be "token", "sentence", SentenceReceivers(...), True or False; got '
            f"{brief(receiver)}"
        )
    return SentenceReceivers() if receiver == "sentence" else None


def group_maps(
    model: Any,
    batch: BatchLike,
    heads: GroupsLike | None = None,
    *,
    local_heads: HeadsLike | None = None,
    global_heads: HeadsLike | None = None,
    example: IntLike | ArrayLike | None = 0,
    token_budget: IntLike | None = None,
    progress: bool = False,
) -> GroupMaps:
    """Return the group maps of responses, for pictures; nothing else stores a map.

    This runs the model again: groups are known only after `measure`, and keeping the maps of all heads
    until then would take the memory that attnprobe exists to save. It costs about as much as `measure`
    without entropy. The maps of several responses are those that `GroupMaps.concatenate` makes of the maps of
    each.

    Args:
        model: a model that an adapter knows.
        batch: the tokens, as for `measure`.
        heads, local_heads, global_heads: the heads of each map, as for `score_tokens`; maps are means
            weighted by the heads' weights.
        example: the index of the example in the batch, or several, in any order; None: all of them.
        token_budget: how many tokens to run at a time, padding included, as for `measure`. Examples of
            similar length run together; a batch with images is always run as a whole.
        progress: whether to show a progress bar.

    Raises:
        ParameterError: an example that the batch does not have or that is packed, or heads that do not exist.
        ResultError: head groups of another model.
        BatchError: ids outside the vocabulary, or sequences longer than the model's context.
        UnsupportedModelError: a model whose attention cannot be read.
    """
    batch = TokenBatch.of(batch)
    every = range(batch.batch_size) if example is None else example
    examples = whole_numbers(every, "example", maximum=batch.batch_size - 1)
    truth(progress, "progress")
    adapter = adapter_for(model)
    groups = head_groups(
        heads,
        layers=adapter.layers,
        head_count=adapter.head_count,
        model_name=adapter.model_name,
        local=local_heads,
        **{"global": global_heads},
    )
    mapped = {str(group): groups[group] for group in ("local", "global")}
    layers = sorted({layer for selection in mapped.values() for layer in selection.layers})
    # With images, all examples are run together.
    is_whole = batch.model_inputs is not None
    chosen = batch if is_whole else batch.select(examples)
    run = BatchRun.prepare(adapter, chosen, layers, token_budget=token_budget)
    if batch.segment_ids is not None:
        _check_single(run.layout.source.tolist(), examples)
    provenance = Provenance(
        model_name=adapter.model_name,
        layers=tuple(layers),
        heads={name: selection.heads for name, selection in mapped.items()},
    )
    sequences = run.sequences
    found: dict[int, GroupMaps] = {}
    with run.progress(progress, "mapping") as ticking:
        for members, part in run.parts():
            wanted = [number for number in members if not is_whole or number in examples]
            places = [
                ResponsePlace.of(members.index(n), sequences.attention_mask[n], sequences.response_mask[n])
                for n in wanted
            ]
            probe = GroupMapProbe(mapped, places)
            with attach(run.adapter, probe, ticking, layers=run.layers):
                run.adapter.forward(part)
            for number, place, sums in zip(wanted, places, probe.means, strict=True):
                # Layers may lie on different devices.
                device = part.input_ids.device
                columns = torch.tensor(place.tokens, device=device)
                found[number] = GroupMaps(
                    local_map=sums.maps["local"][None].to(device),
                    global_map=sums.maps["global"][None].to(device),
                    columns=(columns + int(run.layout.start[number]))[None],
                    input_ids=part.input_ids[place.row, columns][None],
                    provenance=provenance,
                    # Rounding may take a share beyond 1.
                    **{
                        f"{name}_{kind}_share": share[name][None].clamp(max=1.0).to(device)
                        for kind, share in (("prompt", sums.before), ("first", sums.first))
                        for name in mapped
                    },
                )
    order = examples if is_whole else range(len(examples))
    maps = [found[number] for number in order]
    # Joining copies: maps of a long response take long to copy.
    return maps[0] if len(maps) == 1 else GroupMaps.concatenate(maps)


def _check_single(sources: list[int], examples: list[int]) -> None:
    """Check that each example is one sequence; `sources` says of each sequence in which of them it is."""
    for place, example in enumerate(examples):
        if (count := sources.count(place)) != 1:
            raise ParameterError(
                f"example {example} packs {count} sequences, but maps need one sequence "
                "in each example: use batch.sequences()[0]"
            )


def _run_for_entropy(
    adapter: Adapter, part: TokenBatch, response_mask: Bool[Tensor, "batch part_token"], width: int
) -> Float[Tensor, "batch token"]:
    """Run the model and return the entropy of each response token, padded to the width with NaN.

    Only the logits that response tokens were sampled from are computed: those at the position before. The
    response mask is the part's, where the caller's batch is: on the processor, the device need not be asked.
    """
    entropy = torch.full((part.batch_size, width), torch.nan, device=adapter.device)
    before = response_mask[:, 1:].any(0).nonzero()[:, 0]
    if len(before) == 0:
        adapter.forward(part)
        return entropy
    found = adapter.reduced_logits(part, before, metrics.distribution_entropy)
    entropy[:, before.to(entropy.device) + 1] = found.to(entropy.device)
    # A first token was not sampled: what stands before it is padding, if anything.
    follows = torch.nn.functional.pad(part.attention_mask[:, :-1], (1, 0))
    inside = torch.nn.functional.pad(part.response_mask & follows, (0, width - part.token_count))
    return entropy.masked_fill(~inside, torch.nan)

"""Shares of attention, the span that ignores keys, and FAI from chosen rows, against plain loops."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attnprobe
from attnprobe import (
    AttnprobeWarning,
    DenseAttention,
    FactoredAttention,
    HeadStatistics,
    HeadStatisticsProbe,
    ParameterError,
    ResultError,
    TokenBatch,
    attach,
    classify_heads,
    measure,
    metrics,
)
from attnprobe.attention.listening import carried_features, flash_attention
from attnprobe.testing.reference import dense_pattern
from attnprobe.testing.strategies import CallInputs, call_inputs, patterns
from attnprobe.testing.tiny_models import VOCABULARY, tiny_model
from tests.refusals import refused

Mask = list[list[bool]]

# ---- the slow references --------------------------------------------------------------------------


def slow_share(rows: list[list[float]], keys: list[bool], chosen: list[bool]) -> float:
    """The mean over the chosen rows of one head of what they give the keys."""
    given_ = [
        sum(a for a, k in zip(row, keys, strict=True) if k) for row, c in zip(rows, chosen, strict=True) if c
    ]
    return sum(given_) / len(given_) if given_ else math.nan


def slow_span(rows: list[list[float]], ignored: list[bool], chosen: list[bool]) -> float:
    """The mean distance of the chosen rows without the ignored keys, renormalised."""
    spans = []
    for t, row in enumerate(rows):
        left = [(a, t - s) for s, a in enumerate(row) if not ignored[s]]
        mass = sum(a for a, _ in left)
        if chosen[t] and mass > 0:
            spans.append(sum(a * d for a, d in left) / mass)
    return sum(spans) / len(spans) if spans else math.nan


def by_head(pattern: Tensor, slow: Callable[..., float], *masks: Tensor) -> Tensor:
    """The slow number of every head, from masks `[batch, token]`."""
    return torch.tensor(
        [
            [slow(head.tolist(), *(mask[b].tolist() for mask in masks)) for head in heads]
            for b, heads in enumerate(pattern)
        ],
        dtype=torch.float64,
    )


def masks_for(pattern: Tensor, seed: int, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (pattern.shape[0], pattern.shape[2])
    return [torch.rand(shape, generator=generator) < 0.6 for _ in range(count)]


# ---- the metrics ----------------------------------------------------------------------------------


@given(pattern=patterns(), seed=st.integers(0, 999))
def test_share_and_span_are_what_loops_give(pattern: Tensor, seed: int) -> None:
    keys, rows = masks_for(pattern, seed)
    share = metrics.attention_share(pattern, keys, rows)
    torch.testing.assert_close(
        share, by_head(pattern, slow_share, keys, rows), equal_nan=True, rtol=0, atol=1e-9
    )
    span = metrics.mean_attention_distance_ignoring(pattern, keys, rows)
    torch.testing.assert_close(
        span, by_head(pattern, slow_span, keys, rows), equal_nan=True, rtol=0, atol=1e-9
    )


@given(pattern=patterns(), seed=st.integers(0, 999))
def test_shares_of_disjoint_keys_add_up_to_the_mass(pattern: Tensor, seed: int) -> None:
    """Over all keys it is 1, less the sink's mass; nothing ignored is the plain span of whole rows."""
    keys, rows = masks_for(pattern, seed)
    rows[:, -1] = True
    parts = [metrics.attention_share(pattern, mask, rows) for mask in (keys, ~keys)]
    whole = metrics.attention_share(pattern, torch.ones_like(keys), rows)
    mass = (pattern.sum(-1) * rows[:, None]).sum(-1) / rows.sum(-1)[:, None]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=0, atol=1e-9)
    torch.testing.assert_close(whole, mass, rtol=0, atol=1e-9)
    assert bool((parts[0] >= 0).all() & (parts[0] <= 1).all())
    full = pattern / pattern.sum(-1, keepdim=True)
    none = torch.zeros_like(keys)
    torch.testing.assert_close(
        metrics.mean_attention_distance_ignoring(full, none, rows),
        metrics.mean_attention_distance(full, rows),
        rtol=0,
        atol=1e-9,
    )


@given(inputs=call_inputs(cached=False), seed=st.integers(0, 99))
def test_factored_attention_gives_the_same(inputs: CallInputs, seed: int) -> None:
    """From a single key, which costs a column, and from several; with sinks, windows, caps and padding."""
    pattern = dense_pattern(inputs.query, inputs.key, **inputs.options)
    attention = FactoredAttention(inputs.query, inputs.key, **inputs.options)
    keys, rows = masks_for(pattern, seed)
    first = torch.zeros_like(keys)
    first[:, 0] = True
    for chosen in (keys, first):
        for metric in (metrics.attention_share, metrics.mean_attention_distance_ignoring):
            found, expected = metric(attention, chosen, rows), metric(DenseAttention(pattern), chosen, rows)
            torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=1e-8)


@pytest.mark.parametrize("tokens", [64, 2048])
def test_little_that_is_left_is_read_exactly(tokens: int) -> None:
    """In float32, where the first token holds all but a thousandth, and less: within 1e-3 of float64."""
    generator = torch.Generator().manual_seed(0)
    for strength in (3.0, 14.0, 20.0):
        query = torch.randn(1, 2, tokens, 8, generator=generator)
        key = torch.randn(1, 2, tokens, 8, generator=generator) * 0.3
        query[..., 0] = 4.0
        key[..., 0] = 0.0
        key[:, :, 0, 0] = strength
        rows = torch.ones(1, tokens, dtype=torch.bool)
        first = torch.zeros_like(rows)
        first[:, 0] = True
        pattern = dense_pattern(query, key)
        exact = metrics.mean_attention_distance_ignoring(pattern, first, rows)
        attention = FactoredAttention(query, key)
        found = metrics.mean_attention_distance_ignoring(attention, first, rows)
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)
        # What the kernel reads along the way is as exact.
        value = torch.randn(1, 2, tokens, 8, generator=generator)
        carried = flash_attention(query, key, value, causal=True, positions=True).past_first
        assert carried is not None
        features = carried_features(tokens, torch.float64, query.device)[:, 1:]
        torch.testing.assert_close(carried.double(), pattern @ features, rtol=1e-3, atol=1e-9)


def test_rows_from_the_answer_alone() -> None:
    """FAI from chosen rows, against a loop: the tokens scored stay those of the response."""
    pattern = torch.rand(1, 2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    response, rows = torch.arange(9)[None] >= 2, torch.arange(9)[None] >= 6
    found = metrics.future_attention_influence(pattern, response, (1, 4), rows=rows)
    for h in range(2):
        for s in range(9):
            horizon = [t for t in range(s + 1, min(s + 4, 8) + 1) if rows[0, t]]
            if not horizon or not response[0, s]:
                assert bool(found[0, h, s].isnan())
            else:
                expected = sum(float(pattern[0, h, t, s]) for t in horizon) / len(horizon)
                assert float(found[0, h, s]) == pytest.approx(expected, abs=1e-12)
    plain = metrics.future_attention_influence(pattern, response, (1, 4))
    same = metrics.future_attention_influence(pattern, response, (1, 4), rows=response)
    assert torch.equal(plain.nan_to_num(), same.nan_to_num())


# ---- measure --------------------------------------------------------------------------------------


def eager_maps(family: str, ids: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(tiny_model(family, implementation="eager")(ids, output_attentions=True).attentions)


def ids_of(tokens: int, examples: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (examples, tokens), generator=torch.Generator().manual_seed(3))


ASKED: dict[str, Any] = {
    "share_on": ("first", "plan", "prompt"),
    "share_from": ("response", "answer"),
    "span_ignores": ("first", "plan"),
    "influence_rows": "answer",
    "horizon": (1, 30),
}
PLAN, ANSWER = slice(8, 14), slice(18, 24)


def check_against(maps: list[Tensor], found: HeadStatistics, batch: TokenBatch, example: int = 0) -> None:
    """Compare statistics of one unpadded example with loops over its maps."""
    part = batch.select(example)
    first = part.segment("first")
    for index, pattern in enumerate(maps):
        for source in found.share_from:
            for target in found.share_on:
                expected = by_head(pattern, slow_share, part.segment(target), part.segment(source))
                share = found.share(target, source)[[example], index].double()
                torch.testing.assert_close(share, expected, equal_nan=True, rtol=0, atol=1e-5)
        ignored = first | part.segment("plan")
        expected = by_head(pattern, slow_span, ignored, part.response_mask)
        assert found.span_ignoring is not None
        ignoring = found.span_ignoring[[example], index].double()
        torch.testing.assert_close(ignoring, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
        influence = metrics.future_attention_influence(
            pattern, part.response_mask, (1, 30), rows=part.segment("answer")
        )
        torch.testing.assert_close(found.fai[[example], index], influence, equal_nan=True, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_measured_shares_are_those_of_eager_maps(family: str) -> None:
    """GQA, a sliding window, sinks; in whatever layout the batch is, also packed."""
    ids = ids_of(24)
    batch = TokenBatch.from_ids(ids, response_start=6, segments={"plan": PLAN, "answer": ANSWER})
    maps = eager_maps(family, ids)
    model = tiny_model(family)
    alone = measure(model, batch, entropy=False, **ASKED)
    check_against(maps, alone, batch)
    assert (alone.share_from, alone.share_on) == (ASKED["share_from"], ASKED["share_on"])
    assert alone.span_ignores == ("first", "plan")
    # Padded on the left, packed before and behind another sequence.
    real = torch.ones(1, 30, dtype=torch.bool)
    real[:, :6] = False
    wide = torch.cat([ids[:, :6], ids], dim=1)
    response = torch.zeros_like(real)
    response[:, 12:] = True
    segments = {"plan": slice(14, 20), "answer": slice(24, 30)}
    padded = TokenBatch.from_ids(wide, real, response_mask=response, segments=segments)
    positions = torch.tensor([[*range(6), *range(24)]])
    response[:, :6] = torch.tensor([0, 0, 0, 1, 1, 1]).bool()
    packed = TokenBatch.from_ids(wide, position_ids=positions, response_mask=response, segments=segments)
    own = measure(model, packed, entropy=False, **ASKED).sequences().select(1)
    for other in (measure(model, padded, entropy=False, **ASKED), own):
        for name in ("shares", "span_ignoring", "span"):
            torch.testing.assert_close(
                getattr(other, name), getattr(alone, name), equal_nan=True, rtol=1e-4, atol=1e-5
            )


def test_a_packed_example_is_the_mean_over_its_rows() -> None:
    """In measure, and in a packed pass of the user's own: what its sequences give, weighted by their rows."""
    model, ids = tiny_model("llama", implementation="sdpa"), ids_of(30)
    positions = torch.tensor([[*range(12), *range(18)]])
    response = torch.tensor([[0] * 4 + [1] * 8 + [0] * 3 + [1] * 15]).bool()
    # The first sequence's plan holds all that its first response rows see besides the first token.
    segments = {"plan": [[slice(1, 8), slice(20, 25)]], "answer": slice(26, 30)}
    batch = TokenBatch.from_ids(ids, position_ids=positions, response_mask=response, segments=segments)
    measured = measure(model, batch, entropy=False, **ASKED)
    probe = HeadStatisticsProbe(entropy=False, **ASKED)
    masks = {name: batch.segment(name) for name in ("plan", "answer")}
    with attach(model, probe, response_mask=response, segments=masks), torch.no_grad():
        model(ids, position_ids=positions, use_cache=False)
    attached = probe.result()
    for name in ("shares", "span_ignoring", "sequence_shares", "sequence_span_ignoring", "fai"):
        torch.testing.assert_close(
            getattr(attached, name), getattr(measured, name), equal_nan=True, rtol=1e-4, atol=1e-5
        )
    parts = measured.sequences()
    assert parts.span_ignoring is not None
    assert measured.span_ignoring is not None
    # Every response row but none has something left; 5 and 15 rows: columns 4..7 of the plan see only itself.
    rows = torch.tensor([4.0, 15.0]).view(2, 1, 1)
    mean = (parts.span_ignoring * rows).sum(0) / rows.sum()
    torch.testing.assert_close(measured.span_ignoring[0], mean, rtol=1e-4, atol=1e-5)
    counts = torch.tensor([8.0, 15.0]).view(2, 1, 1)
    share = (parts.share("first") * counts).sum(0) / counts.sum()
    torch.testing.assert_close(measured.share("first")[0], share, rtol=1e-4, atol=1e-5)


def test_generation_ends_with_the_shares_of_a_whole_pass() -> None:
    """A prompt padded on the left, then token by token; segments are given for the prompt."""
    model, ids = tiny_model("llama"), ids_of(10, 2)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    plan = torch.zeros(2, 10, dtype=torch.bool)
    plan[:, 4:6] = True
    asked = ASKED | {"share_from": ("response",), "influence_rows": "response"}
    probe = HeadStatisticsProbe(entropy=False, **asked)
    none = torch.zeros(2, 10, dtype=torch.bool)
    with attach(model, probe, response_mask=none, segments={"plan": plan}), torch.no_grad():
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
        )
    grown = probe.result()
    output = output[:, : grown.response_mask.shape[1]]
    whole = HeadStatisticsProbe(entropy=False, **asked)
    real = torch.nn.functional.pad(mask, (0, output.shape[1] - 10), value=1)
    wide = torch.nn.functional.pad(plan, (0, output.shape[1] - 10))
    arguments = {"attention_mask": real, "position_ids": (real.cumsum(-1) - 1).clamp(min=0)}
    with attach(model, whole, response_mask=grown.response_mask, segments={"plan": wide}), torch.no_grad():
        model(output, **arguments)
    expected = whole.result()
    for name in ("shares", "span_ignoring", "span", "fai"):
        torch.testing.assert_close(
            getattr(grown, name), getattr(expected, name), equal_nan=True, rtol=1e-4, atol=1e-5
        )
    # "first" is the first real token, behind the padding.
    alone = TokenBatch.from_ids(output[1:, 3:], response_start=7, segments={"plan": slice(1, 3)})
    measured = measure(model, alone, entropy=False, **asked)
    torch.testing.assert_close(grown.shares[1], measured.shares[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grown.span_ignoring[1], measured.span_ignoring[0], rtol=1e-4, atol=1e-4)


class Products(TorchDispatchMode):
    """Counts the products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[Any] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func] += func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


def test_the_first_token_costs_no_pass_over_the_attention() -> None:
    """One product of a matrix and a vector for each layer; the second span is carried by the kernel."""
    model = tiny_model("llama", implementation="sdpa")
    batch = TokenBatch.from_ids(ids_of(200), response_start=20)
    counts = []
    for asked in ({"share_on": (), "span_ignores": ()}, {}):
        with Products() as products:
            measure(model, batch, entropy=False, **asked)
        counts.append(sum(products.count.values()))
    assert counts[1] - counts[0] == 3


@pytest.mark.usefixtures("as_users_call")
def test_what_was_not_asked_or_is_not_there_is_refused() -> None:
    model, batch = tiny_model("llama"), TokenBatch.from_ids(ids_of(8), response_start=2)
    statistics = measure(model, batch, entropy=False)
    assert statistics.share_on == statistics.span_ignores == ("first",)
    refused(lambda: statistics.share("plan"), "plan", "first", error=ParameterError)
    refused(lambda: statistics.share("first", "plan"), "plan", error=ParameterError)
    bare = measure(model, batch, entropy=False, span=False)
    assert bare.shares is None
    assert bare.span_ignoring is None
    for name in ("share_on", "share_from", "span_ignores", "influence_rows"):
        refused(lambda n=name: measure(model, batch, **{n: "plan"}), name, "plan", error=ParameterError)
    refused(
        lambda: measure(model, batch, span=False, span_ignores="first"), "span_ignores", error=ParameterError
    )
    for wrong in (5, None, "", ("first", "first"), [1]):
        if wrong is not None:
            refused(lambda w=wrong: measure(model, batch, share_on=w), "share_on", error=ParameterError)
        refused(lambda w=wrong: measure(model, batch, share_from=w), "share_from", error=ParameterError)
    probe = HeadStatisticsProbe(share_on="plan")
    with attach(model, probe), pytest.raises(ParameterError, match="plan"):
        model(batch.input_ids)
    refused(lambda: attach(model, probe, segments={"first": [[1]]}), "first")
    with attach(model, probe, segments={"plan": [[1, 0]]}), pytest.raises(ParameterError, match="plan"):
        model(batch.input_ids)


# ---- classifying ----------------------------------------------------------------------------------


def statistics_of(on_first: list[float], **changes: Any) -> HeadStatistics:
    """Statistics of one layer whose heads have rising spans, falling ones without the first token."""
    count = len(on_first)
    span = torch.arange(float(count)).view(1, 1, count)
    fields: dict[str, Any] = {
        "span": span,
        "waad": torch.zeros(1, 1, count, 2),
        "fai": torch.zeros(1, 1, count, 2),
        "entropy": None,
        "receiver_kurtosis": None,
        "response_mask": torch.ones(1, 2, dtype=torch.bool),
        "layers": (0,),
        "shares": torch.tensor(on_first).view(1, 1, count, 1, 1),
        "share_from": ("response",),
        "share_on": ("first",),
        "span_ignoring": span.flip(-1),
        "span_ignores": ("first",),
    }
    return HeadStatistics(**(fields | changes))


@pytest.mark.parametrize(
    ("on_first", "warned"),
    [([0.9, 0.9, 0.1, 0.29, 0.3, 0.5], True), ([0.9, 0.9, 0.9, 0.9, 0.29, 0.3], False)],
)
def test_global_heads_that_rest_on_the_first_token_are_pointed_out(
    on_first: list[float], warned: bool
) -> None:
    """More than half of them, at a share of 0.3 or more: once, and only if they are ranked by it."""
    statistics = statistics_of(on_first)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain = classify_heads([statistics, statistics], quantile=1 / 3)
        ignoring = classify_heads(statistics, quantile=1 / 3, span="ignoring")
    texts = [str(each.message) for each in caught if issubclass(each.category, AttnprobeWarning)]
    assert len(texts) == warned
    assert not warned or "2 of 2 global heads" in texts[0]
    assert len(caught) == len(texts)
    assert plain.pairs("global") == [(0, 5), (0, 4)]
    assert ignoring.pairs("global") == [(0, 0), (0, 1)]
    assert (plain.span_ignores, ignoring.span_ignores) == ((), ("first",))


def test_heads_are_ranked_by_what_was_measured_only() -> None:
    without = statistics_of([0.5, 0.5], span_ignoring=None)
    with pytest.raises(ParameterError, match="span_ignores"):
        classify_heads(without, span="ignoring")
    other = statistics_of([0.5, 0.5], span_ignores=("prompt",))
    with pytest.raises(ResultError, match="span_ignores"):
        classify_heads([statistics_of([0.5, 0.5]), other], span="ignoring")


def test_scores_say_which_rows_count_in_fai() -> None:
    model = tiny_model("llama")
    batch = TokenBatch.from_ids(ids_of(24), response_start=6, segments={"plan": PLAN, "answer": ANSWER})
    statistics = measure(model, batch, entropy=False, influence_rows="answer", horizon=(1, None))
    scores = attnprobe.score_tokens(statistics, "all")
    assert scores.provenance.influence_rows == "answer"
    plain = attnprobe.score_tokens(replace(statistics, influence_rows="response"), "all")
    with pytest.raises(ResultError, match="influence_rows"):
        attnprobe.TokenScores.concatenate([scores, plain])


def test_padding_is_no_prompt() -> None:
    """Rows of the prompt are the same whatever an example is run with."""
    model = tiny_model("llama")
    texts = [list(range(1, 31)), list(range(1, 21)), list(range(1, 14))]
    together = TokenBatch.from_ids(texts, response_start=8)
    options = {"share_on": ("first", "response"), "share_from": ("prompt", "response"), "horizon": (1, 6)}
    rows = {"influence_rows": "prompt"}
    found = attnprobe.measure(model, together, **options, **rows)
    for example, ids in enumerate(texts):
        alone = attnprobe.measure(
            model, TokenBatch.from_ids([ids], response_start=8), **options, **rows
        ).select(0)
        torch.testing.assert_close(found.shares[example], alone.shares[0])
        torch.testing.assert_close(
            found.fai[example, ..., : len(ids)], alone.fai[0], equal_nan=True, rtol=1e-4, atol=1e-6
        )


def test_a_users_own_pass_may_say_what_is_padding() -> None:
    model = tiny_model("llama")
    batch = TokenBatch.from_ids([list(range(1, 21)), list(range(1, 13))], response_start=6)
    expected = attnprobe.measure(model, batch, share_from="prompt", entropy=False).share("first", "prompt")
    probe = attnprobe.HeadStatisticsProbe(share_from="prompt", entropy=False)
    masks = {"response_mask": batch.response_mask, "attention_mask": batch.attention_mask}
    with attnprobe.attach(model, probe, **masks), torch.no_grad():
        model(batch.input_ids)
    torch.testing.assert_close(probe.result().share("first", "prompt"), expected)

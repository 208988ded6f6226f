"""FlexAttention's answers against the dense float64 pattern; on the CPU in eager mode, and traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention

from attnprobe import DenseAttention, FactoredAttention
from attnprobe.attention import fused_sums
from attnprobe.attention.masks import CausalMask
from attnprobe.testing.reference import dense_pattern
from attnprobe.testing.strategies import CallInputs, call_inputs
from tests.fused_calls import LONG, assert_same, dense_answers, fused_answers, long_call, questions


@pytest.fixture(scope="module")
def untraced() -> Iterator[None]:
    """Let the eager kernel run without being traced, which would take seconds for each new call."""
    before = flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    yield
    flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before


@pytest.mark.usefixtures("untraced")
@settings(max_examples=40)
@given(inputs=call_inputs())
def test_any_call_equals_dense(inputs: CallInputs) -> None:
    """Grouped queries, windows, padding, holes, soft cap, sinks, bias, cache: 1e-9 in float64."""
    attention = FactoredAttention(inputs.query, inputs.key, **inputs.options)
    features, weights = questions(inputs, torch.float64)
    actual = fused_answers(attention, features, weights)
    assert_same(actual, dense_answers(inputs, features, weights), 1e-9)
    if "sinks" not in inputs.options:
        seeing = attention.row_mass() > 0
        plain = actual["log-sum-exp"].masked_fill(~seeing, 0.0)
        torch.testing.assert_close(plain, attention.log_sum_exp(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", LONG)
def test_several_blocks_in_float32(kind: str) -> None:
    """1e-5 from float64, as everywhere."""
    inputs = long_call(kind)
    attention = FactoredAttention(inputs.query, inputs.key, **inputs.options)
    features, weights = questions(inputs, torch.float32)
    actual = fused_answers(attention, features, weights)
    assert_same(actual, dense_answers(inputs, features, weights), 1e-5)


def test_small_shares_and_distances_keep_their_precision() -> None:
    """What a first token that takes nearly everything leaves over, and what a local head's distance is."""
    tokens = 1024
    position = torch.arange(tokens, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, tokens, 16, generator=generator) / 4 for _ in range(2))
    # A head that looks a token or two back, and one whose first token takes nearly everything.
    near = -0.5 * (position[:, None] - position)
    first = 16.0 * (position == 0).float().expand(tokens, -1)
    bias = torch.stack([near, first])[None]
    pattern = dense_pattern(query, key, bias=bias)
    attention = FactoredAttention(query, key, bias=bias)
    features = torch.stack([position, (position > 0).float()], dim=-1)
    read = fused_sums.attended(attention.scores, attention.log_sum_exp(), features[None]).double()
    distance = (pattern[0, 0] * (position[:, None] - position).double()).sum(-1)
    assert float(distance.max()) < 3
    torch.testing.assert_close(position - read[0, 0, :, 0], distance, rtol=0, atol=2e-6 * tokens)
    for column in range(2):
        left = (pattern @ features[:, column].double())[0, 1]
        assert float(left[1:9].max()) < 1e-4
        torch.testing.assert_close(read[0, 1, :, column], left, rtol=1e-5, atol=0)


# ---- which blocks are visited -----------------------------------------------------------------


def rule_of(seen: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda b, h, q, k: seen[b, h, q, k]


@pytest.mark.parametrize("cached", [0, 70])
@pytest.mark.parametrize("kind", ["plain", "window", "padding", "documents", "holes"])
def test_blocks_are_those_of_the_pairs_that_are_seen(kind: str, cached: int) -> None:
    """The same blocks as torch's own, which looks at every pair; the eager kernel looks at none of them."""
    keys = 600
    queries = keys - cached
    column = torch.arange(keys)
    kept = torch.ones(2, keys, dtype=torch.bool)
    kept[0, :200] = False
    if kind == "holes":
        kept[1, 300:310] = False
    if kind == "documents":
        queries, cached = keys, 0
        mask = CausalMask.from_segments((column >= 256).long().expand(2, -1))
    elif kind in ("padding", "holes"):
        mask = CausalMask.from_key_mask(kept, queries)
    else:
        window = 150 if kind == "window" else None
        mask = CausalMask.causal(queries, keys, window, column.device)
    assert (mask.exact is not None) == (kind == "holes")
    seen = mask.block(slice(0, queries), slice(0, keys)).expand(2, 1, -1, -1)
    distance = torch.arange(queries)[:, None] + cached - column
    for limits, counted in ((None, None), ((20, 260), torch.arange(queries).expand(2, -1) > 300)):
        wanted = seen
        if limits is not None:
            wanted = seen & (distance >= limits[0]) & (distance < limits[1])
        some, full = (
            blocks.expand(2, 1, -1, -1)
            for blocks in fused_sums.visited_blocks(mask, queries, keys, limits, counted)
        )
        exact = flex_attention.create_block_mask(rule_of(wanted), 2, 1, queries, keys, device="cpu")
        expected = exact.to_dense()[..., : some.shape[2], : some.shape[3]].bool()
        wholes = torch.zeros_like(expected)
        for place in torch.cartesian_prod(torch.arange(2), torch.arange(some.shape[2])).tolist():
            chosen = exact.full_kv_indices[place[0], 0, place[1]]
            wholes[place[0], 0, place[1], chosen[: exact.full_kv_num_blocks[place[0], 0, place[1]]]] = True
        assert torch.equal(full, wholes if counted is None else wholes & some)
        if counted is not None:
            # Limits are cut off by a bound that may let a corner of the window in.
            expected &= (
                torch.nn.functional.pad(counted, (0, -queries % 128)).view(2, 1, -1, 128).any(-1)[..., None]
            )
            assert not bool((expected & ~some).any())
            assert int(some.sum()) <= int(expected.sum()) + 2
        else:
            assert torch.equal(some, expected)


# ---- compiled -------------------------------------------------------------------------------


def test_it_is_traced_whole_and_once_for_all_lengths() -> None:
    """As `torch.compile` sees it on a GPU, in bfloat16, up to the kernel itself."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_sums.log_sums, backend=counter, dynamic=True, fullgraph=True)
    before, fused_sums._kernel = fused_sums._kernel, lambda scores: compiled
    try:
        for tokens, scaling, limits in ((300, 0.25, (3, 11)), (420, 0.3, (5, 17)), (513, 0.25, (0, None))):
            inputs = long_call("soft cap and sinks", tokens).to(torch.bfloat16)
            options = {**inputs.options, "softcap": 4.0 + scaling, "scaling": scaling}
            attention = FactoredAttention(inputs.query, inputs.key, **options)
            features, weights = questions(inputs, torch.float32)
            scores, sums = attention.scores, attention.log_sum_exp()
            dense = DenseAttention(dense_pattern(inputs.query, inputs.key, **options))
            read = fused_sums.attended(scores, sums, features)
            torch.testing.assert_close(read.double(), dense.attend(features.double()), rtol=1e-5, atol=1e-5)
            received = fused_sums.received(scores, sums, weights, *limits)
            expected = dense.receive(weights.double(), *limits)
            torch.testing.assert_close(received.double(), expected, rtol=1e-5, atol=1e-5)
        assert counter.frame_count == 2
    finally:
        fused_sums._kernel = before

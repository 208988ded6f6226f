"""The operator: dense and factored attention give the same answers to the four questions."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from attnprobe import DenseAttention, FactoredAttention, PatternError
from attnprobe.attention import near_sums, probability_tiles, tiles
from attnprobe.attention.listening import carries_positions, listen
from attnprobe.attention.masks import CausalMask
from attnprobe.attention.operator import Attention, Submatrix, key_positions
from attnprobe.errors import AttnprobeError, ParameterError
from attnprobe.testing.reference import dense_pattern
from attnprobe.testing.strategies import CallInputs, call_inputs, patterns


def factored(inputs: CallInputs) -> FactoredAttention:
    return FactoredAttention(inputs.query, inputs.key, **inputs.options)


def answers(attention: Attention, seed: int, width: int, start: int) -> dict[str, torch.Tensor]:
    """Put every question to an attention, with features and weights that depend on the seed only."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch, queries, keys = attention.batch_size, attention.query_count, attention.key_count
    features, weights = normal(batch, keys, 3), normal(batch, queries, 2)
    wide = normal(batch, keys, 19)
    return {
        "attend": attention.attend(features),
        "attend, more features than the head size": attention.attend(wide),
        "receive": attention.receive(weights),
        "receive from afar": attention.receive(weights, start=start),
        "receive within": attention.receive(weights, start=start, stop=start + width),
        "band": attention.band(width, start),
        "band within the band": attention.band(max(width // 2, 1), start + width // 4),
        "rows": attention.rows(torch.tensor([queries - 1, 0])),
        "row_mass": attention.row_mass(),
        "column": attention.column(torch.randint(-1, keys, (batch,), generator=generator)),
        "mean_distance": attention.mean_distance(),
    }


@given(inputs=call_inputs(), seed=st.integers(0, 99), width=st.integers(1, 30), start=st.integers(0, 30))
def test_factored_equals_dense_in_float64(inputs: CallInputs, seed: int, width: int, start: int) -> None:
    """Every option, any shape: 1e-9 in float64."""
    dense = DenseAttention(dense_pattern(inputs.query, inputs.key, **inputs.options))
    expected, actual = answers(dense, seed, width, start), answers(factored(inputs), seed, width, start)
    for question, answer in expected.items():
        torch.testing.assert_close(
            actual[question], answer, rtol=0, atol=1e-9, msg=lambda m, q=question: q + m
        )


@given(inputs=call_inputs(), seed=st.integers(0, 99), width=st.integers(1, 30), start=st.integers(0, 30))
def test_factored_equals_dense_in_float32(inputs: CallInputs, seed: int, width: int, start: int) -> None:
    """float32 inputs: 1e-5 from the float64 answer to the same inputs."""
    inputs = inputs.to(torch.float32)
    dense = DenseAttention(dense_pattern(inputs.query, inputs.key, **inputs.options))
    expected, actual = answers(dense, seed, width, start), answers(factored(inputs), seed, width, start)
    for question, answer in expected.items():
        assert actual[question].dtype == torch.float32
        # A distance is a difference of positions, whose rounding is relative to their size.
        size = dense.key_count if question == "mean_distance" else 1
        torch.testing.assert_close(actual[question].double(), answer, rtol=1e-5, atol=1e-5 * size)


@given(inputs=call_inputs())
def test_bfloat16_inputs_are_reduced_in_float32(inputs: CallInputs) -> None:
    inputs = inputs.to(torch.bfloat16)
    attention = factored(inputs)
    expected = DenseAttention(dense_pattern(inputs.query, inputs.key, **inputs.options))
    assert attention.band(3).dtype == torch.float32
    torch.testing.assert_close(attention.band(3).double(), expected.band(3), rtol=1e-5, atol=1e-5)


@given(
    inputs=call_inputs(),
    seed=st.integers(0, 99),
    low=st.integers(0, 30),
    length=st.integers(0, 12),
    weighted=st.integers(0, 12),
    size=st.integers(1, 7),
)
def test_near_sums_are_sums_of_the_pattern(
    inputs: CallInputs, seed: int, low: int, length: int, weighted: int, size: int
) -> None:
    """Whatever the size of a block, one at a time; a horizon beyond the first key holds nothing."""
    pattern = dense_pattern(inputs.query, inputs.key, **inputs.options)
    batch, _, queries, keys = pattern.shape
    low = min(low, keys)
    high = max(low, min(low + length, keys - 1))
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(min(weighted, keys), generator=generator, dtype=torch.float64)
    rows = torch.rand(batch, queries, generator=generator, dtype=torch.float64)
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    inside = (distance >= low) & (distance <= high)
    near = (distance >= 0) & (distance < len(weights))
    of_pair = torch.cat([weights, torch.zeros(1)])[distance.masked_fill(~near, -1)]
    expected = ((pattern * of_pair).sum(-1), torch.einsum("bhts,bt->bhs", pattern * inside, rows))
    with (
        patch.object(near_sums, "BAND_QUERIES", size),
        patch.object(near_sums, "piece_bytes", lambda device: 1),
    ):
        found = factored(inputs).near_sums(weights, rows, low, high)
    for attention_sums in (found, DenseAttention(pattern).near_sums(weights, rows, low, high)):
        for ours, theirs in zip(attention_sums, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_what_padding_holds_reaches_no_near_sum(value: float) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 50, 8, generator=generator) for _ in range(2))
    kept = torch.ones(1, 50, dtype=torch.bool)
    kept[:, :7] = False
    clean = FactoredAttention(query, key, key_mask=kept).near_sums(torch.ones(9), kept.float(), 5, 20)
    query[:, :, :7] = key[:, :, :7] = value
    found = FactoredAttention(query, key, key_mask=kept).near_sums(torch.ones(9), kept.float(), 5, 20)
    torch.testing.assert_close(found, clean, rtol=0, atol=1e-6)


def assembled(attention: Attention, part: Submatrix) -> torch.Tensor:
    """The blocks of a part, put together; no pair may be in two of them."""
    shape = (len(part.heads), len(part.queries), len(part.keys))
    answer = torch.zeros(shape, dtype=attention.dtype)
    times = torch.zeros(shape, dtype=torch.long)
    for queries, keys, block in attention.blocks(part):
        answer[:, queries, keys] = block
        times[:, queries, keys] += 1
    assert int(times.max()) <= 1
    return answer


@given(inputs=call_inputs(), data=st.data(), sizes=st.tuples(st.integers(1, 7), st.integers(1, 9)))
def test_blocks_of_a_part_are_that_part_of_the_pattern(
    inputs: CallInputs, data: st.DataObject, sizes: tuple[int, int]
) -> None:
    """Any heads, and any queries and keys, with gaps too, whatever the size of a tile."""
    pattern = dense_pattern(inputs.query, inputs.key, **inputs.options)
    batch, heads, queries, keys = pattern.shape
    offset = keys - queries
    rows = sorted(data.draw(st.sets(st.integers(0, queries - 1), min_size=1)))
    own = [row + offset for row in rows]
    before = sorted(data.draw(st.sets(st.integers(0, own[0] - 1)))) if own[0] else []
    chosen = sorted(data.draw(st.sets(st.integers(0, heads - 1), min_size=1)))
    part = Submatrix(data.draw(st.integers(0, batch - 1)), chosen, rows, [*before, *own])
    expected = pattern[part.example][chosen][:, rows][:, :, part.keys]
    assert torch.equal(assembled(DenseAttention(pattern), part), expected)
    with (
        patch.multiple(probability_tiles, TILE_QUERIES=sizes[0], TILE_KEYS=sizes[1]),
        patch.object(tiles, "TILE_KEYS", sizes[1]),
    ):
        found = assembled(factored(inputs), part)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@given(pattern=patterns())
def test_questions_are_what_they_say(pattern: torch.Tensor) -> None:
    """The dense answers against loops over single entries."""
    attention = DenseAttention(pattern)
    batch, heads, tokens, _ = pattern.shape
    band = attention.band(3, start=1)
    received = attention.receive(torch.ones(batch, tokens, 1, dtype=torch.float64), start=1, stop=4)
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                for j in range(1, 4):
                    expected = pattern[b, h, t, t - j] if t - j >= 0 else 0.0
                    assert band[b, h, t, j - 1] == expected
            for s in range(tokens):
                total = sum(float(pattern[b, h, t, s]) for t in range(s + 1, min(s + 4, tokens)))
                assert float(received[b, h, s, 0]) == pytest.approx(total, abs=1e-12)


@given(inputs=call_inputs(cached=False))
def test_inputs_are_not_modified(inputs: CallInputs) -> None:
    query, key = inputs.query.clone(), inputs.key.clone()
    answers(factored(inputs), seed=0, width=4, start=1)
    assert torch.equal(inputs.query, query)
    assert torch.equal(inputs.key, key)


QUESTIONS: dict[str, Callable[[Attention], torch.Tensor]] = {
    "attend": lambda a: a.attend(torch.ones(a.batch_size, a.key_count, 2)),
    "receive": lambda a: a.receive(torch.ones(a.batch_size, a.query_count, 1), start=3),
    "band": lambda a: a.band(5),
    "wider band": lambda a: a.band(9, start=1),
    "rows": lambda a: a.rows(torch.arange(a.query_count)),
    "mean_distance": lambda a: a.mean_distance(),
    "row_mass": lambda a: a.row_mass(),
    "column": lambda a: a.column(torch.zeros(a.batch_size, dtype=torch.long)),
}


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"softcap": 2.0}, {"sinks": torch.ones(2)}])
def test_no_answer_depends_on_what_was_asked_before(options: dict) -> None:
    """Bit by bit, and in what is run: nothing is remembered from one question to the next."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 2, 40, 8, generator=generator) for _ in range(2))

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    def asked(attention: Attention, question: str) -> tuple[torch.Tensor, list[str]]:
        names.clear()
        with Operations():
            answer = QUESTIONS[question](attention)
        return answer, list(names)

    names: list[str] = []
    fresh = {name: asked(FactoredAttention(query, key, **options), name) for name in QUESTIONS}
    used = FactoredAttention(query, key, **options)
    for name in [*QUESTIONS, *reversed(QUESTIONS)]:
        answer, run = asked(used, name)
        assert torch.equal(answer, fresh[name][0]), name
        assert run == fresh[name][1], name


@pytest.mark.parametrize("kind", ["factored", "dense"])
def test_far_questions_cost_what_there_is(kind: str) -> None:
    """Whole numbers of any size are limits that cut nothing off; a band beyond the keys holds zeros."""
    query, key = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    pattern = dense_pattern(query, key).float()
    attention = FactoredAttention(query, key) if kind == "factored" else DenseAttention(pattern)
    huge = 10**30
    weights = torch.ones(1, 6, 1)
    assert torch.equal(attention.receive(weights, 2, huge), attention.receive(weights, 2))
    for start, stop in ((6, None), (huge, None), (huge, huge + 1)):
        assert not attention.receive(weights, start, stop).any()
    assert torch.equal(attention.band(40)[..., :6], attention.band(6))
    assert not attention.band(40)[..., 6:].any()
    assert not attention.band(3, start=huge).any()


def test_an_understood_mask_stands_for_the_mask() -> None:
    """One `CausalMask` serves all layers; what a call's mask says leaves nothing to window and padding."""
    query, key = torch.randn(2, 2, 7, 4), torch.randn(2, 1, 7, 4)
    seen = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(3)).tril() > 0.2
    bias = torch.randn(1, 2, 7, 7)
    expected = FactoredAttention(query, key, mask=seen, bias=bias).rows(torch.arange(7))
    understood = CausalMask.from_mask(seen)
    for options in ({}, {"window": 1, "key_mask": torch.zeros(2, 7)}):
        attention = FactoredAttention(query, key, mask=understood, bias=bias, **options)
        assert torch.equal(attention.rows(torch.arange(7)), expected)
    with pytest.raises(PatternError, match=r"\[1, 7\].*\[2, 2, 3, 4\]"):
        FactoredAttention(query[:, :, :3], key, mask=understood)


def test_long_rows_go_by_blocks() -> None:
    """Several blocks of queries, and a window that leaves whole blocks of keys unseen."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 700, 8).double(), torch.randn(1, 2, 700, 8).double()
    for options in ({}, {"window": 50}, {"softcap": 3.0}, {"window": 50, "sinks": torch.randn(4).double()}):
        dense = DenseAttention(dense_pattern(query, key, **options))
        attention = FactoredAttention(query, key, **options)
        expected, actual = answers(dense, 0, 41, 10), answers(attention, 0, 41, 10)
        for question, answer in expected.items():
            torch.testing.assert_close(actual[question], answer, rtol=0, atol=1e-9)


def _many_pairs(kind: str, queries: int, keys: int) -> dict:
    """Options of a call whose scores take several tiles."""
    generator = torch.Generator().manual_seed(1)
    padded = torch.ones(2, keys, dtype=torch.bool)
    padded[0, :300] = False
    if kind == "padded window":
        return {"key_mask": padded, "window": 400}
    if kind == "holes":
        return {"key_mask": torch.rand(2, keys, generator=generator) > 0.3}
    if kind == "bias and cap":
        bias = torch.randn(1, 4, queries, keys, generator=generator, dtype=torch.float64)
        return {"bias": bias, "softcap": 3.0, "sinks": torch.zeros(4)}
    return {}


@pytest.mark.parametrize("kind", ["plain", "padded window", "holes", "bias and cap"])
@pytest.mark.parametrize("cached", [0, 200])
def test_many_tiles_equal_one_map(kind: str, cached: int) -> None:
    """More queries and keys than a tile holds, so that every border between tiles is crossed."""
    keys = 1100
    queries = keys - cached
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, queries, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2, keys, 8, generator=generator, dtype=torch.float64)
    options = _many_pairs(kind, queries, keys)
    actual = answers(FactoredAttention(query, key, **options), 0, 60, 10)
    expected = answers(DenseAttention(dense_pattern(query, key, **options)), 0, 60, 10)
    far = FactoredAttention(query, key, **options).receive(torch.ones(2, queries, 1), 600, 900)
    torch.testing.assert_close(
        far, DenseAttention(dense_pattern(query, key, **options)).receive(torch.ones(2, queries, 1), 600, 900)
    )
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_factored_never_stores_a_map() -> None:
    """No tensor as large as one head's map is made at any time, whatever the question."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            outputs = result if isinstance(result, (tuple, list)) else (result,)
            for output in outputs:
                if isinstance(output, torch.Tensor):
                    self.size = max(self.size, output.numel())
            return result

    tokens, heads = 8192, 2
    query, key = torch.randn(1, heads, tokens, 4), torch.randn(1, 1, tokens, 4)
    for options in ({}, {"softcap": 5.0}, {"window": 512}):
        attention = FactoredAttention(query, key, **options)
        with Largest() as largest:
            attention.attend(torch.randn(1, tokens, 1))
            attention.receive(torch.randn(1, tokens, 1), start=10)
            attention.band(51)
            attention.row_mass()
        assert largest.size < heads * tokens * tokens / 8, options


@pytest.mark.parametrize("kind", ["window", "left", "right", "packed", "chunked"])
def test_usual_masks_are_intervals(kind: str) -> None:
    """Masks that frameworks build are recognised, so that a block meets only the keys it can see."""
    tokens = 12
    t, s = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    seen = {
        "window": (s <= t) & (t - s < 4),
        "left": (s <= t) & (s >= 3),
        "right": (s <= t) & (s < 9),
        "packed": (s <= t) & (t // 5 == s // 5),
        "chunked": (s <= t) & (t // 4 == s // 4),
    }[kind]
    mask = CausalMask.from_mask(seen[None, None])
    assert mask.exact is None
    whole = slice(0, tokens)
    assert torch.equal(mask.block(whole, whole)[0, 0], seen)


def test_a_plain_causal_mask_is_recognised() -> None:
    """An explicit causal mask takes the same fast path as none."""
    assert CausalMask.from_mask(torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()).plain
    assert CausalMask.from_mask(torch.ones(1, 1, 2, 5, dtype=torch.bool).tril(3)).plain


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (torch.tensor([[1.0, 0.0], [torch.nan, 1.0]]), r"not finite at .* = \[0, 0, 1, 0\]"),
        (torch.tensor([[0.5, 0.5], [0.5, 0.5]]), r"not causal: .* = \[0, 0, 0, 1\]"),
        (torch.tensor([[1.0, 0.0], [1.5, -0.5]]), "negative entries"),
        (torch.tensor([[1.0, 0.0], [0.9, 0.9]]), "sums to 1.8"),
        (torch.ones(3), r"got \[3\]"),
        (torch.ones(1, 1, 3, 2), "3 queries and 2 keys"),
        (torch.ones(1, 1, 2, 2, dtype=torch.long), "dtype torch.int64"),
    ],
)
def test_invalid_patterns_are_refused(pattern: torch.Tensor, message: str) -> None:
    with pytest.raises(PatternError, match=message):
        DenseAttention(pattern)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(1, 3, 5, 4)}, "must be a multiple of the key heads"),
        ({"key": torch.zeros(1, 2, 5, 3)}, "batch and head sizes must be equal"),
        ({"key": torch.zeros(1, 2, 4, 4)}, "at least as many keys as queries"),
        ({"window": 0}, "at least one key, got 0"),
        ({"sinks": torch.zeros(3)}, r"each of 4 heads, got \[3\]"),
        ({"mask": torch.ones(1, 1, 5, 5, dtype=torch.bool)}, "see later keys"),
        ({"mask": torch.ones(1, 1, 4, 5, dtype=torch.bool)}, r"\[1, 4, 5, 5\], got \[1, 1, 4, 5\]"),
        ({"mask": torch.ones(1, 1, 5, 5, dtype=torch.long)}, "boolean or additive"),
        ({"key_mask": torch.zeros(1, 4, dtype=torch.bool)}, r"got \[1, 4\]"),
        ({"bias": torch.zeros(5, 5)}, r"the bias must be"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    inputs = {"query": torch.zeros(1, 4, 5, 4), "key": torch.zeros(1, 2, 5, 4)} | change
    with pytest.raises(PatternError, match=message):
        FactoredAttention(inputs.pop("query"), inputs.pop("key"), **inputs)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}])
def test_nan_activations_are_refused(options: dict) -> None:
    query = torch.zeros(1, 1, 4, 2)
    query[0, 0, 2] = torch.nan
    with pytest.raises(PatternError, match=r"is not finite at \[batch, head, \w+\] = \[0, 0, 2\]"):
        FactoredAttention(query, torch.zeros(1, 1, 4, 2), **options).band(2)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("question", "message"),
    [
        (lambda a: a.band(0), "width .* at least 1; got 0"),
        (lambda a: a.band(2.5), "width .* got 2.5"),
        (lambda a: a.band(2, start=-1), "start .* at least 0; got -1"),
        (lambda a: a.band(10**9), r"1000000000 distances .* keys \(4\)"),
        (lambda a: a.receive(torch.zeros(1, 4, 1), start=3, stop=3), "start < stop"),
        (lambda a: a.attend(torch.zeros(1, 3, 1)), r"key=4, feature\], got \[1, 3, 1\]"),
        (lambda a: a.receive(torch.zeros(1, 4)), r"query=4, feature\], got \[1, 4\]"),
        (lambda a: a.rows(torch.tensor([4])), r"0..3, got 4..4"),
        (lambda a: a.rows(torch.tensor([], dtype=torch.long)), "non-empty"),
    ],
)
def test_questions_that_make_no_sense_are_refused(question, message: str) -> None:
    inputs = (torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    for attention in (FactoredAttention(*inputs), DenseAttention(dense_pattern(*inputs))):
        with pytest.raises(ParameterError, match=message):
            question(attention)


# ---- the flash kernel ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_sum_exp_equals_the_reference(options: dict, dtype: torch.dtype) -> None:
    """Kernels in the wild have been off by log 2, or gave zeros: it is checked, not trusted."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 300, 16, generator=generator).to(dtype)
    key = torch.randn(2, 2, 300, 16, generator=generator).to(dtype)
    score = query.double() @ key.double().repeat_interleave(2, dim=1).mT / 4
    if "softcap" in options:
        score = 2 * torch.tanh(score / 2)
    expected = score.masked_fill(torch.ones(300, 300).triu(1).bool(), -torch.inf).logsumexp(-1)
    if "sinks" in options:
        expected = torch.logaddexp(expected, options["sinks"].double()[:, None].expand_as(expected))
    actual = FactoredAttention(query, key, **options).log_sum_exp()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sequences_keep_their_accuracy(dtype: torch.dtype) -> None:
    """At 32768 tokens, against float64 on sampled rows: 1e-4 relative."""
    tokens = 32768
    generator = torch.Generator().manual_seed(0)
    query = (torch.randn(1, 1, tokens, 16, generator=generator) * 2).to(dtype)
    key = (torch.randn(1, 1, tokens, 16, generator=generator) * 2).to(dtype)
    rows = torch.tensor([0, 1, 100, 4095, 20000, tokens - 2, tokens - 1])
    score = query[0, 0, rows].double() @ key[0, 0].double().mT / 4
    score = score.masked_fill(torch.arange(tokens) > rows[:, None], -torch.inf)
    pattern = score.softmax(-1)
    attention = FactoredAttention(query, key)
    distance = (rows[:, None] - torch.arange(tokens)).double()
    expected = (pattern * distance).sum(-1)
    actual = attention.mean_distance()[0, 0, rows].double()
    # Positions are centred: the first row's rounding is that of half the length.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-2)
    for j, near in enumerate(attention.band(51)[0, 0, rows].double().unbind(-1)):
        inside = rows >= j
        wanted = pattern.gather(-1, (rows - j).clamp(min=0)[:, None])[:, 0]
        torch.testing.assert_close(near[inside], wanted[inside], rtol=1e-4, atol=1e-12)
    marked = torch.zeros(1, tokens, 1)
    marked[0, rows] = 1.0
    torch.testing.assert_close(
        attention.receive(marked)[0, 0, :, 0].double(), pattern.sum(0), rtol=1e-4, atol=1e-9
    )


def test_listening_changes_no_bit_and_hears_the_log_sum_exp() -> None:
    """Every form of the call that PyTorch answers with the flash kernel, and none that it does not."""
    generator = torch.Generator().manual_seed(0)
    query, value = (torch.randn(2, 4, 40, 16, generator=generator) for _ in range(2))
    key = torch.randn(2, 4, 40, 16, generator=generator)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    call = torch.nn.functional.scaled_dot_product_attention
    heard: list[tuple[dict, tuple]] = [
        ({"is_causal": True}, (query, key, value)),
        ({"attn_mask": mask}, (query, key, value)),
        ({"attn_mask": torch.zeros(1, 1, 40, 40).masked_fill(~mask, -torch.inf)}, (query, key, value)),
        ({"is_causal": True, "enable_gqa": True, "scale": 0.2}, (query, key[:, :2], value[:, :2])),
        ({"is_causal": True}, (query.bfloat16(), key.bfloat16(), value.bfloat16())),
        ({}, (query[:, :, -1:], key, value)),
        ({"is_causal": True}, (query.clone().requires_grad_(), key, value)),
    ]
    for options, inputs in heard:
        expected = call(*inputs, **options)
        with listen() as listening:
            actual = call(*inputs, **options)
        assert torch.equal(actual, expected)
        assert listening.result is not None
        scaling = options.get("scale", 0.25)
        groups = 4 // inputs[1].shape[1]
        score = inputs[0].double() @ inputs[1].double().repeat_interleave(groups, 1).mT * scaling
        if options:
            score = score.masked_fill(~mask, -torch.inf)
        # In bfloat16 the kernel sums rounded exponentials: 6e-5, a hundredth of that dtype's own rounding.
        error = 1e-4 if inputs[0].dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(
            listening.result.log_sum_exp.double(), score.logsumexp(-1), rtol=0, atol=error
        )
    unheard: list[tuple[dict, tuple]] = [
        ({"is_causal": True, "dropout_p": 0.1}, (query, key, value)),
        ({"is_causal": True}, (query, key, value[..., :8])),
    ]
    for options, inputs in unheard:
        torch.manual_seed(0)
        expected = call(*inputs, **options)
        torch.manual_seed(0)
        with listen() as listening:
            actual = call(*inputs, **options)
        assert torch.equal(actual, expected)
        assert listening.result is None


def test_two_calls_cannot_be_heard_as_one() -> None:
    query = torch.randn(1, 1, 4, 8)
    with listen() as listening:
        for _ in range(2):
            torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert listening.result is None


@pytest.mark.parametrize(("own_pass", "carried"), [(True, True), (True, False), (False, True)])
def test_positions_are_read_along_the_way_in_passes_of_our_own(own_pass: bool, carried: bool) -> None:
    """The output keeps its width and values; elsewhere it does not change by a bit."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 50, 8, generator=generator) for _ in range(3))
    with carries_positions() if carried else nullcontext(), listen(own_pass=own_pass) as listening:
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert listening.result is not None
    position = listening.result.mean_position
    if not (own_pass and carried):
        plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        assert position is None
        assert torch.equal(output, plain)
        return
    assert position is not None
    pattern, positions = dense_pattern(query, key), key_positions(50, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(output.double(), pattern @ value.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(position.double(), pattern @ positions, rtol=1e-5, atol=1e-4)


def test_questions_take_lists_and_arrays_and_refuse_the_rest() -> None:
    """As everywhere, what stands for a tensor is one; what does not is an error of ours."""
    query = torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    for attention in (FactoredAttention(query, query), FactoredAttention(query.numpy(), query.numpy())):
        assert torch.equal(attention.rows([1, 3]), attention.rows(torch.tensor([1, 3])))
        features = torch.ones(1, 6, 1)
        assert torch.equal(attention.attend(features.numpy()), attention.attend(features))
        for wrong in ("a", None, [1.5], [99], [-1], []):
            with pytest.raises(AttnprobeError):
                attention.rows(wrong)
            with pytest.raises(AttnprobeError):
                attention.attend(wrong)
    for wrong in ("a", None, torch.ones(2, 2), query.long()):
        with pytest.raises(AttnprobeError):
            FactoredAttention(wrong, query)

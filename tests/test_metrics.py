"""The metrics against a slow float64 reference written from the paper, and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnprobe import FactoredAttention, PatternError, metrics, reductions
from attnprobe.errors import ParameterError
from attnprobe.testing.reference import dense_pattern
from attnprobe.testing.strategies import patterns
from tests.refusals import refused

NAN = math.nan
HORIZONS = st.one_of(
    st.tuples(st.integers(0, 6), st.none()),
    st.tuples(st.integers(0, 6), st.integers(0, 8)).map(lambda h: (h[0], h[0] + h[1])),
    # Wider than any band: the other way to sum.
    st.tuples(st.integers(0, 6), st.just(400)),
)


@st.composite
def masked_patterns(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Patterns with response masks of any form, also empty ones and ones with holes."""
    pattern = draw(patterns())
    batch, _, tokens, _ = pattern.shape
    flat = draw(st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens))
    return pattern, torch.tensor(flat).view(batch, tokens)


def assert_equal(actual: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64), equal_nan=True, rtol=0, atol=1e-9
    )


def slow_span(pattern: torch.Tensor, mask: torch.Tensor) -> list:
    """Eq. 7, entry by entry."""
    result = []
    for b, heads in enumerate(pattern.tolist()):
        response = [t for t, inside in enumerate(mask[b].tolist()) if inside]
        result.append(
            [
                sum(head[t][s] * (t - s) for t in response for s in range(t + 1)) / len(response)
                if response
                else NAN
                for head in heads
            ]
        )
    return result


def slow_waad(pattern: torch.Tensor, window: int) -> list:
    """Eq. 9, entry by entry."""
    return [
        [
            [sum(row[s] * min(t - s, window) for s in range(t + 1)) for t, row in enumerate(head)]
            for head in heads
        ]
        for heads in pattern.tolist()
    ]


def slow_fai(pattern: torch.Tensor, mask: torch.Tensor, horizon: tuple) -> list:
    """Eq. 10, entry by entry; undefined outside the response and where no row is in the horizon."""
    low, high = horizon
    result = []
    for b, heads in enumerate(pattern.tolist()):
        inside = mask[b].tolist()
        tokens = range(len(inside))
        values = []
        for head in heads:
            line = []
            for s in tokens:
                rows = [t for t in tokens if inside[t] and s + low <= t and (high is None or t <= s + high)]
                defined = inside[s] and rows
                line.append(sum(head[t][s] for t in rows) / len(rows) if defined else NAN)
            values.append(line)
        result.append(values)
    return result


def slow_kurtosis(values: list[float]) -> float:
    defined = [v for v in values if not math.isnan(v)]
    if len(set(defined)) < 2:
        return NAN
    mean = math.fsum(defined) / len(defined)
    second = math.fsum((v - mean) ** 2 for v in defined) / len(defined)
    fourth = math.fsum((v - mean) ** 4 for v in defined) / len(defined)
    return fourth / second**2 - 3


@given(case=masked_patterns())
def test_span(case: tuple) -> None:
    assert_equal(metrics.mean_attention_distance(*case), slow_span(*case))


@given(pattern=patterns(), window=st.integers(1, 20))
def test_waad(pattern: torch.Tensor, window: int) -> None:
    actual = metrics.windowed_attention_distance(pattern, window=window)
    assert_equal(actual, slow_waad(pattern, window))
    assert float(actual.min()) >= 0
    assert float(actual.max()) <= window + 1e-9


@given(case=masked_patterns(), horizon=HORIZONS)
def test_fai(case: tuple, horizon: tuple) -> None:
    assert_equal(metrics.future_attention_influence(*case, horizon), slow_fai(*case, horizon))


@given(case=masked_patterns(), low=st.integers(1, 4), minimum_rows=st.integers(1, 4))
def test_receiver_kurtosis(case: tuple, low: int, minimum_rows: int) -> None:
    """Kurtosis of FAI over the tokens that enough rows speak for."""
    actual = metrics.receiver_kurtosis(*case, (low, None), minimum_rows=minimum_rows)
    fai = slow_fai(*case, (low, None))
    for b, inside in enumerate(case[1].tolist()):
        for line in fai[b]:
            for s in range(len(line)):
                if sum(inside[s + low :]) < minimum_rows:
                    line[s] = NAN
    expected = torch.tensor([[slow_kurtosis(line) for line in heads] for heads in fai])
    # Columns that are equal but for rounding have a kurtosis in the reference: leave those out.
    both = ~(actual.isnan() | expected.isnan())
    torch.testing.assert_close(actual[both], expected[both].double(), rtol=1e-5, atol=1e-5)
    assert bool((actual[both] >= -2 - 1e-9).all())
    assert bool(actual[expected.isnan()].isnan().all())


def test_the_end_of_a_response_is_not_selectivity() -> None:
    """The last tokens, read by one or two rows, do not decide which head is a receiver."""
    tokens = 60
    even = torch.full((tokens, tokens), 1.0).tril()
    even = even / even.sum(-1, keepdim=True)
    spiked = even.clone()
    # The last row reads one token, ten before it: FAI of that token is a mean over this row alone.
    spiked[-1] = 0.0
    spiked[-1, tokens - 11] = 1.0
    mask = torch.ones(1, tokens, dtype=torch.bool)
    noisy = float(metrics.receiver_kurtosis(spiked, mask, minimum_rows=1))
    assert noisy > 40
    assert float(metrics.receiver_kurtosis(spiked, mask)) < 1


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    "values", ["x", None, 5, [], [1, 2], torch.ones(3).long(), torch.tensor(1.0)], ids=str
)
def test_kurtosis_is_of_numbers(values: object) -> None:
    refused(lambda: reductions.kurtosis(values), "values", error=ParameterError)


@pytest.mark.parametrize("minimum_rows", [21, 10**9, 2**80])
def test_where_no_token_has_so_many_rows_there_is_no_kurtosis(minimum_rows: int) -> None:
    pattern = torch.rand(1, 2, 20, 20).tril() / 20
    assert bool(metrics.receiver_kurtosis(pattern, minimum_rows=minimum_rows).isnan().all())


@given(values=st.lists(st.floats(-100, 100, width=16), min_size=2, max_size=20))
def test_kurtosis(values: list[float]) -> None:
    expected = slow_kurtosis(values)
    actual = float(reductions.kurtosis(torch.tensor(values, dtype=torch.float64)))
    if not math.isnan(actual):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("values", [[1.0] * 5, [0.1 + 0.2] * 7, [NAN] * 3, [2.0], [NAN, 1.0]])
def test_kurtosis_of_a_constant_is_undefined(values: list[float]) -> None:
    assert math.isnan(float(reductions.kurtosis(torch.tensor(values))))


@given(
    pattern=patterns(),
    other=st.integers(0, 99),
    weight=st.floats(0, 1),
    horizon=HORIZONS,
)
def test_metrics_are_linear_in_attention(
    pattern: torch.Tensor, other: int, weight: float, horizon: tuple
) -> None:
    """The metric of a mixture of maps is the mixture of the metrics."""
    generator = torch.Generator().manual_seed(other)
    scores = torch.randn(pattern.shape, generator=generator, dtype=torch.float64)
    future = torch.ones(pattern.shape[-2:], dtype=torch.bool).triu(1)
    second = scores.masked_fill(future, -torch.inf).softmax(-1)
    mask = torch.ones(pattern.shape[0], pattern.shape[2], dtype=torch.bool)
    for metric in (
        lambda p: metrics.mean_attention_distance(p, mask),
        lambda p: metrics.windowed_attention_distance(p, mask, 4),
        lambda p: metrics.future_attention_influence(p, mask, horizon),
    ):
        mixed = metric(weight * pattern + (1 - weight) * second)
        expected = weight * metric(pattern) + (1 - weight) * metric(second)
        torch.testing.assert_close(mixed, expected, equal_nan=True, rtol=0, atol=1e-9)


@given(case=masked_patterns(), padding=st.integers(1, 5), left=st.booleans(), horizon=HORIZONS)
def test_padding_changes_nothing(case: tuple, padding: int, left: bool, horizon: tuple) -> None:
    """Rows and columns of padding, on either side, move the values and change none."""
    pattern, mask = case
    sides = (padding, 0) if left else (0, padding)
    padded = torch.nn.functional.pad(pattern, sides + sides)
    padded_mask = torch.nn.functional.pad(mask, sides)
    tokens = pattern.shape[-1]
    kept = slice(sides[0], sides[0] + tokens)
    torch.testing.assert_close(
        metrics.mean_attention_distance(padded, padded_mask),
        metrics.mean_attention_distance(pattern, mask),
        equal_nan=True,
    )
    for metric in (
        lambda p, m: metrics.windowed_attention_distance(p, m, 3),
        lambda p, m: metrics.future_attention_influence(p, m, horizon),
    ):
        values = metric(padded, padded_mask)
        torch.testing.assert_close(values[..., kept], metric(pattern, mask), equal_nan=True)
        outside = torch.ones(values.shape[-1], dtype=torch.bool)
        outside[kept] = False
        assert bool(values[..., outside].isnan().all())


@given(case=masked_patterns(), split=st.integers(1, 15), horizon=HORIZONS)
def test_packed_sequences_do_not_meet(case: tuple, split: int, horizon: tuple) -> None:
    """FAI of two sequences in one row is that of each alone."""
    pattern, mask = case
    tokens = pattern.shape[-1]
    split = min(split, tokens)
    pattern = pattern.clone()
    pattern[..., split:, :split] = 0
    segments = (torch.arange(tokens) >= split).long().expand(mask.shape)
    packed = metrics.future_attention_influence(pattern, mask, horizon, segments)
    for part in (slice(0, split), slice(split, tokens)):
        if part.start == part.stop:
            continue
        alone = metrics.future_attention_influence(pattern[..., part, part], mask[:, part], horizon)
        torch.testing.assert_close(packed[..., part], alone, equal_nan=True, rtol=0, atol=1e-9)


@pytest.mark.parametrize("prompt", [0, 3, 11])
def test_the_length_of_the_prompt_does_not_matter_to_a_head_that_cannot_see_it(prompt: int) -> None:
    torch.manual_seed(0)
    response = dense_pattern(torch.randn(1, 2, 12, 4).double(), torch.randn(1, 2, 12, 4).double())
    whole = torch.zeros(1, 2, prompt + 12, prompt + 12).double()
    whole[..., :prompt, :prompt] = torch.eye(prompt)
    whole[..., prompt:, prompt:] = response
    mask = (torch.arange(prompt + 12) >= prompt)[None]
    inside = torch.ones(1, 12, dtype=torch.bool)
    span = metrics.mean_attention_distance(whole, mask)
    torch.testing.assert_close(span, metrics.mean_attention_distance(response, inside))
    fai = metrics.future_attention_influence(whole, mask, (2, 5))[..., prompt:]
    expected = metrics.future_attention_influence(response, inside, (2, 5))
    torch.testing.assert_close(fai, expected, equal_nan=True)


@given(pattern=patterns(), factor=st.integers(2, 4))
def test_a_common_stretch_of_distances_leaves_the_order_of_spans(pattern: torch.Tensor, factor: int) -> None:
    """Every token moved to `factor` times its place: every span is `factor` times as long."""
    batch, heads, tokens, _ = pattern.shape
    stretched = torch.eye(factor * tokens, dtype=torch.float64).expand(batch, heads, -1, -1).clone()
    stretched[..., ::factor, :] = 0
    stretched[..., ::factor, ::factor] = pattern
    mask = (torch.arange(factor * tokens) % factor == 0).expand(batch, -1)
    before = metrics.mean_attention_distance(pattern, torch.ones(batch, tokens, dtype=torch.bool))
    after = metrics.mean_attention_distance(stretched, mask)
    torch.testing.assert_close(after, factor * before, rtol=0, atol=1e-9)


# ---- closed forms ------------------------------------------------------------------------------


def test_a_previous_token_head_has_waad_one() -> None:
    pattern = torch.diag(torch.ones(9), -1)
    pattern[0, 0] = 1
    assert metrics.windowed_attention_distance(pattern)[0, 0].tolist() == [0.0] + [1.0] * 9


def test_a_first_token_head_has_waad_of_the_window() -> None:
    pattern = torch.zeros(20, 20)
    pattern[:, 0] = 1
    expected = [float(min(t, 5)) for t in range(20)]
    assert metrics.windowed_attention_distance(pattern, window=5)[0, 0].tolist() == expected
    assert float(metrics.mean_attention_distance(pattern, torch.ones(1, 20, dtype=torch.bool))) == 9.5


@pytest.mark.parametrize("horizon", [(1, None), (10, 50), (3, 3), (2, 400)])
def test_fai_of_a_uniform_causal_head(horizon: tuple) -> None:
    """`A[t, s] = 1 / (t + 1)`: FAI is the mean of that over the horizon."""
    tokens = 80
    attention = FactoredAttention(
        torch.zeros(1, 1, tokens, 4).double(), torch.zeros(1, 1, tokens, 4).double()
    )
    mask = torch.ones(1, tokens, dtype=torch.bool)
    actual = metrics.future_attention_influence(attention, mask, horizon)[0, 0]
    low, high = horizon
    for s in range(tokens):
        last = tokens - 1 if high is None else min(s + high, tokens - 1)
        rows = [1 / (t + 1) for t in range(s + low, last + 1)]
        expected = sum(rows) / len(rows) if rows else NAN
        assert float(actual[s]) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_a_sink_takes_its_share() -> None:
    """Rows with half their mass in a sink: half the distance, half the influence."""
    torch.manual_seed(0)
    pattern = (
        torch.randn(1, 2, 12, 12)
        .double()
        .masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf)
    )
    pattern = pattern.softmax(-1)
    mask = torch.ones(1, 12, dtype=torch.bool)
    for metric in (
        lambda p: metrics.mean_attention_distance(p, mask),
        lambda p: metrics.windowed_attention_distance(p, mask, 3),
        lambda p: metrics.future_attention_influence(p, mask, (1, 4)),
    ):
        torch.testing.assert_close(metric(pattern / 2), metric(pattern) / 2, equal_nan=True)


@given(logits=st.lists(st.lists(st.floats(-20, 20), min_size=4, max_size=4), min_size=2, max_size=6))
def test_entropy_is_of_the_distribution_that_the_token_was_sampled_from(logits: list) -> None:
    expected = [NAN]
    for row in logits[:-1]:
        total = sum(math.exp(value) for value in row)
        expected.append(-sum(math.exp(v) / total * math.log(math.exp(v) / total) for v in row))
    actual = metrics.token_entropy(torch.tensor([logits]))[0].tolist()
    assert actual == pytest.approx(expected, abs=1e-4, nan_ok=True)


def test_entropy_of_a_certain_token_is_zero() -> None:
    """Logits of minus infinity, as samplers write them, add nothing."""
    logits = torch.tensor([[[0.0, -torch.inf], [0.0, 0.0]]])
    assert metrics.token_entropy(logits)[0, 1] == 0.0


# ---- what is refused ---------------------------------------------------------------------------

PATTERN = torch.eye(4)[None, None]
MASK = torch.ones(1, 4, dtype=torch.bool)


STRANGE = torch.tensor([[1.0, 0.5, 1.0, 1.0]])


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("call", "facts"),
    [
        (lambda: metrics.mean_attention_distance(PATTERN, MASK[:, :3]), ["[1, 4]", "[1, 3]"]),
        (lambda: metrics.mean_attention_distance(PATTERN, STRANGE), ["response_mask", "0.5"]),
        (lambda: metrics.mean_attention_distance(PATTERN, STRANGE * NAN), ["response_mask", "nan"]),
        (lambda: metrics.mean_attention_distance(PATTERN, "mask"), ["response_mask", "'mask'"]),
        (lambda: metrics.windowed_attention_distance(PATTERN, window=0), ["window", "1", "0"]),
        (lambda: metrics.windowed_attention_distance(PATTERN, window=True), ["window", "True"]),
        (lambda: metrics.windowed_attention_distance(PATTERN, window="10"), ["window", "'10'"]),
        (lambda: metrics.windowed_attention_distance(PATTERN, MASK.expand(2, 4)), ["[1, 4]", "[2, 4]"]),
        (lambda: metrics.windowed_attention_distance(PATTERN, 10), ["response_mask"]),
        (lambda: metrics.future_attention_influence(PATTERN, MASK, (5, 4)), ["horizon", "(5, 4)"]),
        (lambda: metrics.future_attention_influence(PATTERN, MASK, (-1, 4)), ["horizon", "(-1, 4)"]),
        (lambda: metrics.future_attention_influence(PATTERN, MASK, (1.5, None)), ["horizon", "(1.5, None)"]),
        (lambda: metrics.future_attention_influence(PATTERN, MASK, 10), ["horizon", "10"]),
        (lambda: metrics.future_attention_influence(PATTERN, MASK, None), ["horizon", "None"]),
        (
            lambda: metrics.future_attention_influence(PATTERN, MASK, (1, 2), MASK[:, :2].long()),
            ["segment_ids", "[1, 4]", "[1, 2]"],
        ),
        (
            lambda: metrics.future_attention_influence(PATTERN, MASK, (1, 2), STRANGE),
            ["segment_ids", "float32"],
        ),
        (lambda: metrics.receiver_kurtosis(PATTERN, MASK, minimum_rows=0), ["minimum_rows", "1", "0"]),
        (lambda: metrics.token_entropy(torch.zeros(2, 3)), ["logits", "[2, 3]"]),
        (lambda: metrics.token_entropy("logits"), ["logits", "'logits'"]),
        (lambda: metrics.token_entropy(torch.zeros(1, 3, 2), MASK), ["[1, 3]", "[1, 4]"]),
    ],
)
def test_parameters_that_make_no_sense_are_refused(call: Callable[[], object], facts: list[str]) -> None:
    refused(call, *facts, error=ParameterError)


@given(case=masked_patterns(), horizon=HORIZONS)
def test_metrics_take_masks_and_patterns_in_any_form(case: tuple, horizon: tuple) -> None:
    """As lists, arrays or tensors, of bools or of 0 and 1; one map without a batch axis too."""
    pattern, mask = case
    for metric in (
        metrics.mean_attention_distance,
        lambda p, m: metrics.windowed_attention_distance(p, m, np.int64(3)),
        lambda p, m: metrics.future_attention_influence(p, m, list(horizon)),
        lambda p, m: metrics.receiver_kurtosis(p, m, horizon, minimum_rows=torch.tensor(2)),
    ):
        expected = metric(pattern, mask)
        for form in (mask.int(), mask.tolist(), mask.numpy(), mask.double().numpy(), mask.int().tolist()):
            torch.testing.assert_close(metric(pattern, form), expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(metric(pattern.numpy(), mask), expected, rtol=0, atol=0, equal_nan=True)
        alone = metric(pattern[:1, :1], mask[:1])
        torch.testing.assert_close(metric(pattern[0, 0], mask[0]), alone, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("low", [0, 3])
@pytest.mark.parametrize("high", [10**6, 2**63 - 1, 2**80])
def test_a_horizon_beyond_the_end_is_one_to_the_end(low: int, high: int) -> None:
    """However far beyond; and a horizon that starts behind the end leaves nothing."""
    pattern = torch.rand(2, 2, 20, 20, dtype=torch.float64).tril() / 20
    mask = torch.rand(2, 20) < 0.7
    for metric in (metrics.future_attention_influence, metrics.receiver_kurtosis):
        expected = metric(pattern, mask, (low, None))
        torch.testing.assert_close(metric(pattern, mask, (low, high)), expected, equal_nan=True)
        assert bool(metric(pattern, mask, (high, high)).isnan().all())


def test_logits_that_are_nan_are_refused() -> None:
    refused(
        lambda: metrics.token_entropy(torch.full((1, 2, 3), torch.nan)), "logits", "NaN", error=PatternError
    )


def test_cached_steps_are_refused() -> None:
    cached = torch.ones(1, 1, 1, 3) / 3
    call = lambda: metrics.mean_attention_distance(cached, MASK[:, :1])  # noqa: E731
    refused(call, "1 queries", "3 keys", error=PatternError)

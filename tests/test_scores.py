"""Token scores: means over head groups, and that they are metrics of the groups' mean maps."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnprobe import (
    HeadGroups,
    HeadStatistics,
    ResultError,
    TokenBatch,
    TokenScores,
    classify_heads,
    metrics,
    score_tokens,
)
from tests.refusals import refused

NAN = math.nan


def close(expected: Tensor | list[list[float]], actual: Tensor, tolerance: float = 1e-6) -> None:
    if not isinstance(expected, Tensor):
        expected = torch.tensor(expected, dtype=torch.float64)
    expected = expected.to(actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def groups_of(
    local: Tensor, remote: Tensor, receiver: Tensor | None, layers: tuple[int, ...], model_name: str = ""
) -> HeadGroups:
    span = torch.zeros(local.shape)
    return HeadGroups(
        local, remote, receiver, span, None if receiver is None else span.clone(), layers, model_name
    )


# ---- means over groups ----------------------------------------------------------------------------


# Batch, layers, heads and tokens; a seed; local, global and receiver heads; whether entropy is measured.
Plan = tuple[tuple[int, int, int, int], int, set[int], set[int], set[int] | None, bool]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Draw the shape of statistics, and any groups over their heads."""
    shape = tuple(draw(st.integers(1, 3)) for _ in range(4))
    heads = st.integers(0, shape[1] * shape[2] - 1)
    local, remote = draw(st.sets(heads, min_size=1)), draw(st.sets(heads, min_size=1))
    receiver = draw(st.none() | st.sets(heads, min_size=1))
    return shape, draw(st.integers(0, 2**31)), local, remote, receiver, draw(st.booleans())


def measured(plan: Plan) -> tuple[HeadStatistics, HeadGroups]:
    """Random statistics, NaN outside the response, and groups over their heads."""
    (batch, layers, heads, tokens), seed, local, remote, receiver, with_entropy = plan
    generator = torch.Generator().manual_seed(seed)
    response = torch.rand(batch, tokens, generator=generator) < 0.7
    shape = (batch, layers, heads, tokens)
    waad, fai = (
        torch.rand(shape, generator=generator).masked_fill(~response[:, None, None], NAN) for _ in range(2)
    )

    def mask(group: set[int]) -> Tensor:
        return torch.tensor([i in group for i in range(layers * heads)]).view(layers, heads)

    statistics = HeadStatistics(
        span=torch.rand(batch, layers, heads, generator=generator),
        waad=waad,
        fai=fai,
        entropy=torch.rand(batch, tokens, generator=generator) if with_entropy else None,
        receiver_kurtosis=None,
        response_mask=response,
        layers=tuple(range(layers)),
    )
    receivers = None if receiver is None else mask(receiver)
    return statistics, groups_of(mask(local), mask(remote), receivers, statistics.layers)


def slow_mean(values: Tensor, group: Tensor) -> list[list[float]]:
    """For each token, the mean over the heads of the group; undefined if there is none."""
    batch, layers, heads, tokens = values.shape
    rows = []
    for i in range(batch):
        row = []
        for t in range(tokens):
            chosen = [
                float(values[i, layer, head, t])
                for layer in range(layers)
                for head in range(heads)
                if bool(group[layer, head])
            ]
            row.append(sum(chosen) / len(chosen) if chosen else NAN)
        rows.append(row)
    return rows


@given(plan=plans())
def test_scores_are_means_over_their_groups(plan: Plan) -> None:
    """WAAD of local heads, FAI of global heads and of receivers; entropy as it was measured."""
    statistics, heads = measured(plan)
    scores = score_tokens(statistics, heads)
    close(slow_mean(statistics.waad, heads.local_heads), scores.waad)
    close(slow_mean(statistics.fai, heads.global_heads), scores.fai)
    if heads.receiver_heads is None:
        assert scores.receiver_fai is None
    else:
        assert scores.receiver_fai is not None
        close(slow_mean(statistics.fai, heads.receiver_heads), scores.receiver_fai)
    assert scores.entropy is statistics.entropy
    assert torch.equal(statistics.response_mask, scores.response_mask)


@given(plan=plans())
def test_tokens_outside_the_response_have_no_score(plan: Plan) -> None:
    statistics, heads = measured(plan)
    scores = score_tokens(statistics, heads)
    assert torch.equal(~statistics.response_mask, scores.waad.isnan())
    assert torch.equal(~statistics.response_mask, scores.fai.isnan())


def test_heads_outside_the_group_do_not_count() -> None:
    """Not even those that are NaN because the layer does not have them."""
    values = torch.tensor([1.0, 3.0, NAN, 50.0]).view(1, 2, 2, 1)
    statistics = HeadStatistics(
        torch.tensor([[[1.0, 2.0], [NAN, 3.0]]]),
        values,
        values.clone(),
        None,
        None,
        torch.ones(1, 1, dtype=torch.bool),
        (0, 1),
    )
    local = torch.tensor([[True, True], [False, False]])
    scores = score_tokens(statistics, groups_of(local, torch.tensor([[0, 0], [0, 1]]).bool(), None, (0, 1)))
    assert (scores.waad.tolist(), scores.fai.tolist()) == ([[2.0]], [[50.0]])


def test_groups_of_another_model_are_refused() -> None:
    """As `HeadGroups.check_fits` says."""
    statistics = HeadStatistics(
        torch.zeros(1, 1, 2),
        torch.zeros(1, 1, 2, 3),
        torch.zeros(1, 1, 2, 3),
        None,
        None,
        torch.ones(1, 3, dtype=torch.bool),
        (4,),
        model_name="tiny",
    )
    mask = torch.tensor([[True, False]])
    refused(
        lambda: score_tokens(statistics, groups_of(mask, ~mask, None, (5,))),
        "unnamed model",
        "layers 5 of 2 heads",
        "tiny",
        "layers 4 of 2 heads",
        error=ResultError,
    )


def test_receivers_that_nobody_is_have_no_scores() -> None:
    """As where every kurtosis is undefined: None, as if they had not been looked for."""
    statistics, heads = measured(((1, 1, 2, 3), 0, {0}, {1}, set(), False))
    assert score_tokens(statistics, heads).receiver_fai is None


# ---- linearity: the metric of the mean map is the mean of the metrics -----------------------------


@st.composite
def layered_patterns(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Draw causal patterns `[batch, layer, head, token, token]` in float64, and a response mask."""
    batch, layers, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(2, 4))
    tokens = draw(st.integers(2, 14))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (batch, layers, heads, tokens, tokens)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64) ** draw(st.sampled_from([1, 8]))
    weights = (weights + 1e-9).tril()
    pattern = weights / weights.sum(-1, keepdim=True)
    if draw(st.booleans()):
        pattern = pattern * torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64)
    starts = torch.tensor([draw(st.integers(0, tokens - 1)) for _ in range(batch)])
    stops = torch.tensor([draw(st.integers(int(start) + 1, tokens)) for start in starts])
    column = torch.arange(tokens)
    return pattern, (column >= starts[:, None]) & (column < stops[:, None])


def slow_span(pattern: list[list[float]], response: list[bool]) -> float:
    """Eq. 7 over response rows."""
    rows = [t for t in range(len(pattern)) if response[t]]
    return sum(pattern[t][s] * (t - s) for t in rows for s in range(t + 1)) / len(rows)


def slow_waad(pattern: list[list[float]], response: list[bool], window: int) -> list[float]:
    """Eq. 9."""
    return [
        sum(pattern[t][s] * min(t - s, window) for s in range(t + 1)) if response[t] else NAN
        for t in range(len(pattern))
    ]


def slow_fai(pattern: list[list[float]], response: list[bool], low: int, high: int | None) -> list[float]:
    """Eq. 10; `high=None` runs to the end of the response."""
    influence = []
    for s in range(len(pattern)):
        last = len(pattern) if high is None else s + high
        rows = [t for t in range(len(pattern)) if response[t] and s + low <= t <= last]
        defined = response[s] and len(rows) > 0
        influence.append(sum(pattern[t][s] for t in rows) / len(rows) if defined else NAN)
    return influence


horizons = st.sampled_from([(1, 4), (2, 6), (0, None), (2, None), (10, 50)])


@given(drawn=layered_patterns(), window=st.integers(1, 12), horizon=horizons)
def test_scores_are_the_metrics_of_the_groups_mean_maps(
    drawn: tuple[Tensor, Tensor], window: int, horizon: tuple[int, int | None]
) -> None:
    """Eq. 8 to 10 as they stand, over the mean map of each group, against one pass kept per head."""
    pattern, response = drawn
    batch, layers = pattern.shape[:2]
    span, waad, fai = (
        torch.stack(values, dim=1)
        for values in zip(
            *[
                (
                    metrics.mean_attention_distance(pattern[:, layer], response),
                    metrics.windowed_attention_distance(pattern[:, layer], response, window),
                    metrics.future_attention_influence(pattern[:, layer], response, horizon),
                )
                for layer in range(layers)
            ],
            strict=True,
        )
    )
    statistics = HeadStatistics(
        span, waad, fai, None, None, response, tuple(range(layers)), window=window, horizon=horizon
    )
    heads = classify_heads(statistics, quantile=0.4)
    scores = score_tokens(statistics, heads)
    for i in range(batch):
        mask = response[i].tolist()
        for layer in range(layers):
            for head in range(pattern.shape[2]):
                expected = slow_span(pattern[i, layer, head].tolist(), mask)
                assert float(span[i, layer, head]) == pytest.approx(expected, abs=1e-9)
        local = pattern[i][heads.local_heads].mean(0).tolist()
        remote = pattern[i][heads.global_heads].mean(0).tolist()
        close([slow_waad(local, mask, window)], scores.waad[i : i + 1], 1e-9)
        close([slow_fai(remote, mask, *horizon)], scores.fai[i : i + 1], 1e-9)


@given(drawn=layered_patterns(), window=st.integers(1, 12), horizon=horizons)
def test_metrics_are_linear_in_attention(
    drawn: tuple[Tensor, Tensor], window: int, horizon: tuple[int, int | None]
) -> None:
    """The metric of the mean of all maps is the mean over all heads of the metric, for each metric."""
    pattern, response = drawn
    every_head = pattern.flatten(1, 2)
    mean_map = every_head.mean(1, keepdim=True)
    for metric in (
        lambda maps: metrics.mean_attention_distance(maps, response),
        lambda maps: metrics.windowed_attention_distance(maps, response, window),
        lambda maps: metrics.future_attention_influence(maps, response, horizon),
    ):
        close(metric(mean_map), metric(every_head).mean(1, keepdim=True), 1e-9)


# ---- built by hand, kept, and as a table ----------------------------------------------------------


def example(**changes: Tensor | None) -> TokenScores:
    """Two responses of two and one tokens."""
    fields: dict[str, Tensor | None] = {
        "waad": torch.tensor([[NAN, 1.0, 2.0], [NAN, 3.0, NAN]]),
        "fai": torch.tensor([[NAN, 0.5, NAN], [NAN, 0.25, NAN]]),
        "entropy": None,
        "response_mask": torch.tensor([[False, True, True], [False, True, False]]),
    }
    return TokenScores(**(fields | changes))  # type: ignore[arg-type]


def test_scores_can_be_built_by_hand() -> None:
    scores = example()
    assert (scores.entropy, scores.receiver_fai) == (None, None)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("name", ["fai", "entropy", "response_mask", "receiver_fai"])
def test_scores_of_different_shapes_are_refused(name: str) -> None:
    wrong = torch.zeros(2, 4, dtype=torch.bool if name == "response_mask" else torch.float32)
    refused(lambda: example(**{name: wrong}), "waad", "[2, 3]", name, "[2, 4]", error=ResultError)


@pytest.mark.usefixtures("as_users_call")
def test_scores_without_a_batch_axis_are_refused() -> None:
    refused(
        lambda: TokenScores(torch.zeros(3), torch.zeros(3), None, torch.ones(3).bool()),
        "waad",
        "[batch, token]",
        "[3]",
        error=ResultError,
    )


@pytest.mark.parametrize("name", ["", "entropy", "receiver_fai"])
def test_scores_come_back_as_they_were_saved(tmp_path: Path, name: str) -> None:
    scores = example(**({name: torch.rand(2, 3)} if name else {}))
    loaded = TokenScores.load(scores.save(tmp_path / "scores.safetensors"))
    for field in ("waad", "fai", "entropy", "response_mask", "receiver_fai"):
        expected, actual = getattr(scores, field), getattr(loaded, field)
        assert (expected is None) == (actual is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_scores_that_share_a_tensor_can_be_saved(tmp_path: Path) -> None:
    """By hand one tensor is easily used twice: receivers that are the global heads, say."""
    fai = torch.tensor([[NAN, 0.5, NAN], [NAN, 0.25, NAN]])
    scores = example(fai=fai, receiver_fai=fai)
    loaded = TokenScores.load(scores.save(tmp_path / "scores.safetensors"))
    assert loaded.receiver_fai is not None
    close(fai, loaded.fai)
    close(fai, loaded.receiver_fai)


def test_other_results_are_no_scores(tmp_path: Path) -> None:
    mask = torch.tensor([[True, False]])
    path = groups_of(mask, ~mask, None, (0,)).save(tmp_path / "heads.safetensors")
    refused(lambda: TokenScores.load(path), path, "HeadGroups", "TokenScores", error=ResultError)


def test_the_table_has_a_row_for_each_response_token() -> None:
    table = example().to_pandas()
    assert list(table.columns) == ["example", "position", "waad", "fai"]
    rows = [[0, 1, 1.0, 0.5], [0, 2, 2.0, NAN], [1, 1, 3.0, 0.25]]
    assert str(rows) == str(table.astype(object).to_numpy().tolist())


def test_the_table_has_a_column_for_what_was_measured() -> None:
    table = example(entropy=torch.full((2, 3), 0.75), receiver_fai=torch.full((2, 3), 0.125)).to_pandas()
    assert list(table.columns) == ["example", "position", "waad", "fai", "receiver_fai", "entropy"]
    assert table["receiver_fai"].tolist() == [0.125] * 3
    assert table["entropy"].tolist() == [0.75] * 3


def test_a_batch_adds_ids_and_texts_to_the_table() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 9]])
    real = torch.tensor([[True, True, True], [True, True, False]])
    texts = (("a", " b", " c"), ("d", " e", " e"))
    scores = example()
    without = scores.to_pandas(TokenBatch(ids, real, scores.response_mask))
    assert list(without.columns) == ["example", "position", "token_id", "waad", "fai"]
    table = scores.to_pandas(TokenBatch(ids, real, scores.response_mask, None, texts))
    assert list(table.columns) == ["example", "position", "token_id", "text", "waad", "fai"]
    assert table["token_id"].tolist() == [6, 7, 9]
    assert table["text"].tolist() == [" b", " c", " e"]


def test_a_batch_of_another_shape_is_refused() -> None:
    other = TokenBatch.from_ids([[1, 2, 3, 4]])
    refused(lambda: example().to_pandas(other), "[1, 4]", "[2, 3]", error=ResultError)


def test_a_batch_of_other_tokens_is_refused() -> None:
    """Scores that know their tokens say where the batch differs; padding may hold anything."""
    ids = torch.tensor([[5, 6, 7], [8, 9, 9]])
    real = torch.tensor([[True, True, True], [True, True, False]])
    scores = dataclasses.replace(example(), input_ids=ids)
    assert len(scores.to_pandas(TokenBatch(ids, real, scores.response_mask))) == 3
    padding, other = ids.clone(), ids.clone()
    padding[1, 2], other[1, 1] = 50, 60
    assert len(scores.to_pandas(TokenBatch(padding, real, scores.response_mask))) == 3
    batch = TokenBatch(other, real, scores.response_mask)
    refused(lambda: scores.to_pandas(batch), "position 1", "example 1", "9", "60", error=ResultError)

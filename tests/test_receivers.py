"""Receiver heads by sentence, against a slow float64 reference and against eager attention maps."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import attnprobe
from attnprobe import (
    BatchError,
    HeadGroups,
    HeadStatistics,
    ParameterError,
    ResultError,
    SentenceReceivers,
    TokenBatch,
    metrics,
    reductions,
)
from attnprobe.receivers import SentenceReceiverProbe
from attnprobe.sentences import sentence_ids
from attnprobe.testing.strategies import patterns
from attnprobe.testing.tiny_models import tiny_model, tiny_tokenizer
from tests.refusals import refused

NAN = math.nan


@st.composite
def with_sentences(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Patterns with sentences: a prompt, runs of tokens of one sentence, padding."""
    pattern = draw(patterns(max_tokens=24))
    batch, _, tokens, _ = pattern.shape
    rows = []
    for _ in range(batch):
        prompt = draw(st.integers(0, tokens - 1))
        end = draw(st.integers(prompt, tokens))
        ids, current = [-1] * prompt, 0
        for _ in range(prompt, end):
            ids.append(current)
            current += draw(st.booleans())
        rows.append(ids + [-1] * (tokens - end))
    return pattern, torch.tensor(rows)


def slow_vertical_scores(head: list[list[float]], ids: list[int], distance: int) -> list[float]:
    """The mean, over sentences far enough after it, of what each sentence is given: entry by entry."""
    sentences = {k: [t for t, i in enumerate(ids) if i == k] for k in range(max(ids) + 1)}
    scores = []
    for i, columns in sentences.items():
        later = []
        for j, rows in sentences.items():
            if j - i >= distance and rows and columns:
                later.append(sum(head[t][s] for t in rows for s in columns) / len(rows) / len(columns))
        scores.append(sum(later) / len(later) if later else NAN)
    return scores


def slow_kurtosis(values: list[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    if len(defined) < 4:
        return NAN
    mean = math.fsum(defined) / len(defined)
    second = math.fsum((v - mean) ** 2 for v in defined) / len(defined)
    if second < 1e-24:
        return NAN
    return math.fsum((v - mean) ** 4 for v in defined) / len(defined) / second**2 - 3


def slow_gini(values: list[float]) -> float:
    """Over all pairs of defined values."""
    defined = [value for value in values if not math.isnan(value)]
    if len(defined) < 4 or math.fsum(defined) == 0:
        return NAN
    differences = math.fsum(abs(a - b) for a in defined for b in defined)
    return differences / (2 * len(defined) * math.fsum(defined))


@given(case=with_sentences(), distance=st.integers(1, 5), least=st.one_of(st.none(), st.integers(1, 12)))
def test_sentence_selectivity_is_as_defined(case: tuple, distance: int, least: int | None) -> None:
    pattern, ids = case
    kurtosis = metrics.sentence_receiver_kurtosis(pattern, ids, distance, least)
    gini = metrics.sentence_receiver_gini(pattern, ids, distance, least)
    influence = metrics.sentence_influence(pattern, ids, distance)
    for b, heads in enumerate(pattern.tolist()):
        count = int(ids[b].max()) + 1
        for h, head in enumerate(heads):
            scores = slow_vertical_scores(head, ids[b].tolist(), distance)
            assert influence[b, h, :count].tolist() == pytest.approx(scores, nan_ok=True, abs=1e-9)
            enough = count >= (distance + 4 if least is None else least)
            expected = slow_kurtosis(scores) if enough else NAN
            # Rounding decides if nearly equal scores differ.
            if not math.isnan(expected):
                assert float(kurtosis[b, h]) == pytest.approx(expected, rel=1e-4, abs=1e-4)
                assert float(kurtosis[b, h]) >= -2 - 1e-9
            elif not enough:
                assert math.isnan(float(kurtosis[b, h]))
            shares = slow_gini(scores) if enough else NAN
            assert float(gini[b, h]) == pytest.approx(shares, nan_ok=True, rel=1e-6, abs=1e-9)


@given(case=with_sentences())
def test_sentence_attention_is_the_mean_over_pairs_of_tokens(case: tuple) -> None:
    pattern, ids = case
    actual = metrics.sentence_attention(pattern, ids)
    assert actual.shape[-1] == max(1, int(ids.max()) + 1)
    for b in range(pattern.shape[0]):
        for i in range(actual.shape[-1]):
            for j in range(actual.shape[-1]):
                block = pattern[b][:, ids[b] == i][:, :, ids[b] == j]
                expected = block.mean((-1, -2)) if block.numel() else torch.full((block.shape[0],), NAN)
                torch.testing.assert_close(
                    actual[b, :, i, j], expected.double(), equal_nan=True, rtol=0, atol=1e-9
                )


@given(case=with_sentences(), padding=st.integers(1, 5), left=st.booleans())
def test_padding_changes_nothing(case: tuple, padding: int, left: bool) -> None:
    pattern, ids = case
    sides = (padding, 0) if left else (0, padding)
    padded = torch.nn.functional.pad(pattern, sides + sides)
    torch.testing.assert_close(
        metrics.sentence_attention(padded, torch.nn.functional.pad(ids, sides, value=-1)),
        metrics.sentence_attention(pattern, ids),
        equal_nan=True,
    )


def test_few_sentences_have_no_kurtosis() -> None:
    """Two scores would have a kurtosis of -2 in every head, and three of -1.5."""
    pattern = torch.rand(1, 2, 10, 10).double().tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    for count, known in ((5, False), (6, False), (7, False), (8, True)):
        ids = torch.arange(10).clamp(max=count - 1)[None]
        for least in (None, 1):
            found = metrics.sentence_selectivity(pattern, ids, minimum_sentences=least)
            assert bool(found.kurtosis.isnan().all()) is not known
            assert bool(found.gini.isnan().all()) is not known
    eight = torch.arange(10).clamp(max=7)[None]
    assert bool(metrics.sentence_receiver_kurtosis(pattern, eight, minimum_sentences=9).isnan().all())
    assert bool(metrics.sentence_receiver_kurtosis(pattern, torch.full((1, 10), -1)).isnan().all())


@pytest.mark.usefixtures("as_users_call")
def test_ids_and_distances_that_do_not_fit_are_refused() -> None:
    pattern = torch.eye(4)
    ids = torch.zeros(1, 4, dtype=torch.long)
    for call, facts in (
        (lambda: metrics.sentence_attention(pattern, ids[:, :3]), ["sentence_ids", "[1, 4]", "[1, 3]"]),
        (lambda: metrics.sentence_attention(pattern, ids.float()), ["sentence_ids", "float32"]),
        (lambda: metrics.sentence_attention(pattern, ids + 4), ["sentence_ids", "4"]),
        (lambda: metrics.sentence_attention(pattern, "a"), ["sentence_ids", "'a'"]),
        (lambda: metrics.sentence_receiver_kurtosis(pattern, ids, 0), ["min_distance", "1", "0"]),
        (lambda: SentenceReceiverProbe(ids, min_distance=0.5), ["min_distance", "0.5"]),
        (lambda: SentenceReceiverProbe(ids, minimum_sentences=0), ["minimum_sentences", "0"]),
        (lambda: metrics.sentence_receiver_gini(pattern, ids, 4, "8"), ["minimum_sentences", "'8'"]),
        (lambda: SentenceReceivers(splitting="lines"), ["splitting", "thought_anchors", "'lines'"]),
        (lambda: SentenceReceivers(minimum_sentences=2.0), ["minimum_sentences", "2.0"]),
        (lambda: SentenceReceiverProbe("abc"), ["sentence_ids", "'abc'"]),
        (lambda: SentenceReceiverProbe(None), ["sentence_ids", "None"]),
    ):
        refused(call, *facts, error=ParameterError)


# ---- selectivity that does not grow with length ------------------------------------------------------

SHARES = st.lists(st.one_of(st.floats(0, 1, width=32), st.just(NAN)), min_size=1, max_size=12)


@given(values=SHARES, scale=st.sampled_from([0.001, 3.0, 1000.0]), times=st.integers(1, 4))
def test_gini_is_the_mean_difference_of_pairs(values: list[float], scale: float, times: int) -> None:
    """It does not depend on the scale, nor on how often the same values are repeated, in any order."""
    wide = torch.tensor(values, dtype=torch.float64)
    found = float(reductions.gini(wide))
    assert found == pytest.approx(slow_gini(values), nan_ok=True, abs=1e-9)
    assert math.isnan(found) or 0 <= found < 1
    assert float(reductions.gini(wide.flip(0) * scale)) == pytest.approx(found, nan_ok=True, abs=1e-9)
    if not math.isnan(found):
        assert float(reductions.gini(wide.repeat(times))) == pytest.approx(found, abs=1e-9)


def test_gini_of_what_is_no_share_is_refused() -> None:
    refused(lambda: reductions.gini(torch.tensor([0.5, -0.1])), "negative", "-0.1", error=ParameterError)
    refused(lambda: reductions.gini(torch.tensor([1, 2])), "floating point", error=ParameterError)


def test_kurtosis_grows_with_length_and_gini_does_not() -> None:
    """Of heads that look for tokens whose weights have one and the same heavy-tailed distribution."""
    weights = torch.distributions.LogNormal(0.0, 1.5)
    torch.manual_seed(0)
    kurtosis, gini = [], []
    for length in (80, 640):
        attractive = weights.sample((1, 40, 1, length)).double()
        pattern = attractive.expand(-1, -1, length, -1).tril()
        pattern = pattern / pattern.sum(-1, keepdim=True)
        kurtosis.append(float(metrics.receiver_kurtosis(pattern).mean()))
        gini.append(float(metrics.receiver_gini(pattern).mean()))
    assert kurtosis[1] > 4 * kurtosis[0]
    assert gini[1] == pytest.approx(gini[0], abs=0.05)


@pytest.mark.usefixtures("as_users_call")
def test_receivers_are_ranked_by_either() -> None:
    model = tiny_model("llama", vocab_size=300)
    statistics = attnprobe.measure(model, batch_of("right"), receiver=True)
    for name in ("kurtosis", "gini"):
        heads = attnprobe.classify_heads(statistics, receivers=3, selectivity=name)
        values = getattr(statistics, f"receiver_{name}").mean(0)
        best = values.flatten().topk(3).indices.tolist()
        assert heads.pairs("receiver") == [divmod(place, values.shape[1]) for place in best]
        assert heads.selectivity == name
        torch.testing.assert_close(heads.receiver_selectivity, values)
        assert {"receiver_kurtosis", "receiver_gini"} <= set(heads.to_pandas().columns)
        assert f"receivers, {name}" in heads._repr_html_()
    refused(
        lambda: attnprobe.classify_heads(statistics, selectivity="entropy"),
        "selectivity",
        "gini",
        error=ParameterError,
    )
    older = dataclasses.replace(statistics, receiver_gini=None)
    refused(lambda: attnprobe.classify_heads(older, selectivity="gini"), "receiver_gini", error=ResultError)


def test_files_of_older_versions_have_no_gini(tmp_path: Path) -> None:
    """They still load: settings that came later are what they were then."""
    model = tiny_model("llama", vocab_size=300)
    statistics = attnprobe.measure(model, batch_of("right"), receiver="token")
    heads = attnprobe.classify_heads(statistics)
    for result, added in (
        (dataclasses.replace(statistics, receiver_gini=None), "sentence_receivers"),
        (dataclasses.replace(heads, receiver_gini=None), "selectivity"),
    ):
        path = result.save(tmp_path / "result.safetensors")
        with safe_open(path, framework="pt") as stream:
            header = json.loads(stream.metadata()["attnprobe"])
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        del header["settings"][added]
        save_file(tensors, path, metadata={"attnprobe": json.dumps(header)})
        assert type(result).load(path) == result


# ---- in a model ----------------------------------------------------------------------------------

TEXTS = [
    "Go 1. Go 2. Go on 3. It is. So be it. No. Yes. Go 8.",
    "A 1. B is 2. C. D is so. E. F it. G. H I. J is. K so. L.",
]


def batch_of(side: str) -> TokenBatch:
    """Two responses of many sentences, padded on one side."""
    tokenizer = tiny_tokenizer()
    batch = TokenBatch.from_text(tokenizer, ["Say: ", "Now go: "], TEXTS)
    if side == "right":
        return batch
    shift = [int((~row).sum()) for row in batch.attention_mask]
    ids, real, response = (
        torch.stack([row.roll(by) for row, by in zip(rows, shift, strict=True)])
        for rows in (batch.input_ids, batch.attention_mask, batch.response_mask)
    )
    return TokenBatch.from_ids(ids, real, response_mask=response, tokenizer=tokenizer)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [None, 1])
def test_measure_finds_receivers_by_sentence(side: str, size: int | None, tmp_path: Path) -> None:
    """Whatever the padding and the batch size, as from the maps of each response alone."""
    model = tiny_model("llama", vocab_size=300)
    batch = batch_of(side)
    statistics = attnprobe.measure(model, batch, receiver="sentence", batch_size=size)
    assert statistics.receiver_level == "sentence"
    eager = tiny_model("llama", vocab_size=300, implementation="eager")
    for row in range(2):
        real = batch.attention_mask[row]
        ids = sentence_ids(batch)[row, real][None]
        maps = eager(batch.input_ids[row, real][None], output_attentions=True).attentions
        expected = [metrics.sentence_receiver_kurtosis(pattern.double(), ids)[0] for pattern in maps]
        torch.testing.assert_close(
            statistics.receiver_kurtosis[row].double(), torch.stack(expected), rtol=1e-3, atol=1e-3
        )
    assert statistics.sentence_receivers == SentenceReceivers()
    heads = attnprobe.classify_heads(statistics, receivers=3)
    assert heads.receiver_level == "sentence"
    assert int(heads.receiver_heads.sum()) == 3
    assert HeadGroups.load(heads.save(tmp_path / "heads.safetensors")).receiver_level == "sentence"
    saved = statistics.save(tmp_path / "statistics.safetensors")
    assert HeadStatistics.load(saved) == statistics


@pytest.mark.parametrize("splitting", ["sentences", "thought_anchors"])
def test_options_reach_the_measure(splitting: str) -> None:
    """And statistics measured otherwise are not joined, or ranked together."""
    model = tiny_model("llama", vocab_size=300)
    batch = batch_of("left")
    options = SentenceReceivers(min_distance=1, minimum_sentences=9, splitting=splitting)
    statistics = attnprobe.measure(model, batch, receiver=options)
    eager = tiny_model("llama", vocab_size=300, implementation="eager")
    ids = sentence_ids(batch, splitting)
    for row in range(2):
        real = batch.attention_mask[row]
        maps = eager(batch.input_ids[row, real][None], output_attentions=True).attentions
        expected = [
            metrics.sentence_selectivity(pattern.double(), ids[row, real][None], 1, 9) for pattern in maps
        ]
        for name in ("kurtosis", "gini"):
            torch.testing.assert_close(
                getattr(statistics, f"receiver_{name}")[row].double(),
                torch.cat([getattr(each, name) for each in expected]),
                rtol=1e-3,
                atol=1e-3,
                equal_nan=True,
            )
    others = attnprobe.measure(model, batch, receiver="sentence")
    for together in (HeadStatistics.concatenate, attnprobe.classify_heads):
        refused(lambda: together([statistics, others]), "sentence_receivers", error=ResultError)  # noqa: B023


def test_the_probe_works_in_ones_own_forward_pass() -> None:
    model = tiny_model("llama", vocab_size=300)
    batch = batch_of("right").select(slice(0, 1))
    probe = SentenceReceiverProbe(sentence_ids(batch))
    refused(probe.result, "forward pass", error=ResultError)
    with attnprobe.attach(model, probe, layers=[0, 2]):
        model(batch.input_ids)
    expected = attnprobe.measure(model, batch, receiver="sentence", layers=[0, 2]).receiver_kurtosis
    torch.testing.assert_close(probe.result(), expected)


def test_sentences_of_another_batch_are_refused() -> None:
    model = tiny_model("llama")
    probe = SentenceReceiverProbe(torch.zeros(1, 4, dtype=torch.long))
    with attnprobe.attach(model, probe):
        refused(lambda: model(torch.ones(1, 5, dtype=torch.long)), "[1, 4]", "[1, 5]", error=ParameterError)


@pytest.mark.usefixtures("as_users_call")
def test_sentences_need_texts_and_levels_have_names() -> None:
    model = tiny_model("llama")
    batch = TokenBatch.from_ids([[1, 2, 3, 4]])
    refused(
        lambda: attnprobe.measure(model, batch, receiver="sentence"), "sentences", "texts", error=BatchError
    )
    refused(
        lambda: attnprobe.measure(model, batch, receiver="word"), "'word'", "sentence", error=ParameterError
    )

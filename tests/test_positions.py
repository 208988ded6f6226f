"""How models place tokens: the context that they can run, and rows that do not disturb each other."""

from __future__ import annotations

import pytest
import torch

import attnprobe
from attnprobe.adapters import adapter_for
from attnprobe.errors import BatchError
from attnprobe.testing.tiny_models import VOCABULARY, tiny_model

NAMES = ("span", "waad", "fai", "entropy")
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 3.0, 2.0, 8.0],
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


def longrope():
    return tiny_model("phi3", original_max_position_embeddings=32, rope_parameters=LONGROPE)


def dynamic():
    return tiny_model("llama", max_position_embeddings=32, rope_parameters=DYNAMIC)


def batch_of(*lengths: int) -> attnprobe.TokenBatch:
    ids = torch.randint(
        1, VOCABULARY, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(2)
    )
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return attnprobe.TokenBatch.from_ids(ids, mask, response_start=8)


def assert_equal(found: attnprobe.HeadStatistics, expected: attnprobe.HeadStatistics) -> None:
    for name in NAMES:
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), equal_nan=True, rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("model_of", [longrope, dynamic], ids=["longrope", "dynamic"])
@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_a_row_does_not_depend_on_its_neighbours(model_of, batch_size: int | None) -> None:
    """Each row of a mixed batch gives what a model that has seen nothing else gives for it alone."""
    lengths = (24, 60, 31, 45, 60, 32, 33)
    batch = batch_of(*lengths)
    together = attnprobe.measure(model_of(), batch, batch_size=batch_size)
    for example, length in enumerate(lengths):
        row = batch.select([example], trim=True)
        alone = attnprobe.measure(model_of(), row)
        found = together.select([example])
        assert found.waad[..., length:].isnan().all()
        for name in NAMES:
            values = getattr(found, name)
            values = values if name == "span" else values[..., :length]
            torch.testing.assert_close(values, getattr(alone, name), equal_nan=True, rtol=0, atol=1e-4)


def test_the_rows_differ_if_they_are_run_together() -> None:
    """What would be wrong otherwise: in the same call, the longest row decides."""
    model, batch = longrope(), batch_of(24, 60)
    probe = attnprobe.HeadStatisticsProbe()
    with torch.no_grad(), attnprobe.attach(model, probe, response_mask=batch.response_mask):
        model(batch.input_ids, attention_mask=batch.attention_mask)
    measured = attnprobe.measure(model, batch)
    assert float((probe.result().span - measured.span)[0].abs().max()) > 0.1
    torch.testing.assert_close(probe.result().span[1], measured.span[1], rtol=0, atol=1e-4)


def test_sentence_receivers_follow_their_rows() -> None:
    lengths = (24, 60, 31, 45)
    ids = batch_of(*lengths)
    texts = tuple(tuple("a. " if i % 5 == 4 else "a" for i in range(60)) for _ in lengths)
    batch = attnprobe.TokenBatch(ids.input_ids, ids.attention_mask, ids.response_mask, texts=texts)
    together = attnprobe.measure(dynamic(), batch, receiver="sentence", horizon=(2, None))
    for example in range(len(lengths)):
        alone = attnprobe.measure(dynamic(), batch.select([example], trim=True), receiver="sentence")
        torch.testing.assert_close(
            together.receiver_kurtosis[example],
            alone.receiver_kurtosis[0],
            equal_nan=True,
            rtol=1e-3,
            atol=1e-3,
        )


@pytest.mark.parametrize("seen_before", [0, 50, 100])
def test_a_dynamic_model_keeps_what_it_has_seen(seen_before: int) -> None:
    """Measuring neither uses the frequencies of earlier passes, nor changes those of later ones."""
    model, batch = dynamic(), batch_of(45)
    if seen_before:
        with torch.no_grad():
            model(torch.ones(1, seen_before, dtype=torch.long))
    rotary = model.model.rotary_emb
    buffer, before = rotary.inv_freq, rotary.inv_freq.clone()
    length = rotary.max_seq_len_cached
    assert_equal(attnprobe.measure(model, batch), attnprobe.measure(dynamic(), batch))
    assert rotary.inv_freq is buffer
    assert torch.equal(rotary.inv_freq, before)
    assert rotary.max_seq_len_cached == length


@pytest.mark.parametrize("failing", [True, False])
def test_frequencies_are_put_back_after_an_error(failing: bool) -> None:
    model = dynamic()

    class Failing(attnprobe.Probe):
        def observe(self, *_) -> None:
            if failing:
                raise KeyError("an error of the probe")

    before = model.model.rotary_emb.inv_freq.clone()
    adapter = adapter_for(model)
    with attnprobe.attach(adapter, Failing()):
        try:
            adapter.forward(batch_of(60))
        except KeyError:
            assert failing
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def test_scaled_positions_reach_as_far_as_the_model_runs() -> None:
    model = tiny_model("llama", max_position_embeddings=32, rope_parameters=YARN)
    batch = batch_of(100)
    found = attnprobe.measure(model, batch)
    eager = tiny_model("llama", max_position_embeddings=32, rope_parameters=YARN, implementation="eager")
    with torch.no_grad():
        maps = eager(batch.input_ids, output_attentions=True).attentions
    for layer, pattern in enumerate(maps):
        span = attnprobe.metrics.mean_attention_distance(pattern, batch.response_mask)
        torch.testing.assert_close(found.span[:, layer], span, rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bloom", "falcon", "jamba", "gpt_oss"])
def test_computed_positions_have_no_limit(family: str) -> None:
    model = tiny_model(family)
    assert adapter_for(model).context_length is None
    attnprobe.measure(model, batch_of(270), entropy=False)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_bigcode", "gpt_neo", "gptj", "mpt"])
def test_tables_of_positions_end(family: str) -> None:
    model = tiny_model(family)
    assert adapter_for(model).context_length == 256
    attnprobe.measure(model, batch_of(256), entropy=False)
    with pytest.raises(BatchError, match="longer than the context"):
        attnprobe.measure(model, batch_of(257))

"""Sequences that grow under a KV cache: the statistics are those of one pass over the whole."""

from __future__ import annotations

import pytest
import torch
import transformers

import attnprobe
from attnprobe.adapters import adapter_for
from attnprobe.errors import ParameterError, PatternError, UnsupportedModelError
from attnprobe.testing.tiny_models import FAMILIES, VOCABULARY, tiny_model

NAMES = ("span", "waad", "fai", "entropy", "receiver_kurtosis")


def prompt(rows: int = 2, count: int = 8, padding: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, :padding] = 0
    return ids, mask


def probe_of(**settings) -> attnprobe.HeadStatisticsProbe:
    return attnprobe.HeadStatisticsProbe(window=4, horizon=(2, 6), receiver=True, **settings)


def assert_equal_to_one_pass(model, grown, ids, mask, start: int) -> None:
    """Compare with `measure` over the tokens that were run: all but the last."""
    ids = ids[:, :-1]
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    response = (mask.bool()) & (torch.arange(ids.shape[1]) >= start)
    batch = attnprobe.TokenBatch.from_ids(ids, mask, response_mask=response)
    whole = attnprobe.measure(model, batch, window=4, horizon=(2, 6), receiver=True)
    assert torch.equal(grown.response_mask, whole.response_mask)
    for name in NAMES:
        found, expected = getattr(grown, name), getattr(whole, name)
        tolerance = 1e-3 if name == "receiver_kurtosis" else 2e-4
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=tolerance, atol=tolerance)


CASES = [(family, "dynamic") for family in FAMILIES if family != "mpt"]
CASES += [(family, "static") for family in ("llama", "mistral", "gemma3_text", "gpt_oss", "gpt2", "bloom")]


@pytest.mark.parametrize(("family", "cache"), CASES)
def test_generate_gives_the_numbers_of_one_pass(family: str, cache: str) -> None:
    """Left-padded prompts, sliding caches that drop keys, and static ones with room for more."""
    model = tiny_model(family)
    ids, mask = prompt(rows=1 if adapter_for(model).reads == "dense" else 2)
    probe = probe_of()
    options = {"cache_implementation": "static"} if cache == "static" else {}
    with attnprobe.attach(model, probe, response_mask=torch.zeros_like(mask)):
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=14,
            min_new_tokens=14,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    assert_equal_to_one_pass(model, probe.result(), out, mask, ids.shape[1])


def test_rows_that_a_layer_does_not_compute_are_unknown() -> None:
    """Gemma 4 runs its last layers for the last token of the prompt only."""
    model = tiny_model("gemma4_text")
    if not hasattr(model.model, "_maybe_slice_kv_shared_inputs"):
        pytest.skip(f"transformers {transformers.__version__} runs Gemma 4 for all tokens")
    ids, _ = prompt(rows=1, count=20)
    probe = probe_of()
    with attnprobe.attach(model, probe):
        out = model.generate(
            ids, max_new_tokens=9, min_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    grown = probe.result()
    batch = attnprobe.TokenBatch.from_ids(out[:, :-1])
    whole = attnprobe.measure(model, batch, window=4, horizon=(2, 6), receiver=True)
    for name in ("span", "waad", "fai", "receiver_kurtosis"):
        found, expected = getattr(grown, name), getattr(whole, name)
        torch.testing.assert_close(found[:, :2], expected[:, :2], equal_nan=True, rtol=1e-3, atol=1e-3)
        known = ~found[:, 2:].isnan()
        torch.testing.assert_close(
            found[:, 2:][known], expected[:, 2:][known], equal_nan=True, rtol=1e-3, atol=1e-3
        )
        if name in ("span", "receiver_kurtosis"):
            assert not known.any()
    # Rows 0..18 are not computed: FAI over 2..6 is known from token 17 on, where all its rows are.
    assert grown.waad[0, 2:, :, :19].isnan().all()
    assert not grown.waad[0, 2:, :, 19:].isnan().any()
    assert grown.fai[0, 2:, :, :17].isnan().all()
    assert not grown.fai[0, 2:, :, 17:26].isnan().any()


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_a_cache_can_be_continued_by_several_tokens(family: str) -> None:
    model = tiny_model(family)
    ids, mask = prompt(count=30)
    ids, mask = ids[1:], mask[1:]
    probe = probe_of()
    past = transformers.DynamicCache(config=model.config)
    with attnprobe.attach(model, probe), torch.no_grad():
        for columns in (slice(0, 11), slice(11, 12), slice(12, 29)):
            model(ids[:, columns], past_key_values=past, use_cache=True)
    assert_equal_to_one_pass(model, probe.result(), ids, mask[:, :29], 0)


def test_waad_grows_row_by_row() -> None:
    """After every step the rows so far have their values, which do not change any more."""
    model = tiny_model("llama")
    ids, _ = prompt(rows=1)
    probe = probe_of(entropy=False)
    past = transformers.DynamicCache(config=model.config)
    rows = []
    with attnprobe.attach(model, probe), torch.no_grad():
        for column in range(ids.shape[1]):
            model(ids[:, column : column + 1], past_key_values=past, use_cache=True)
            rows.append(probe.result().waad)
    assert [row.shape[-1] for row in rows] == list(range(1, 9))
    assert all(torch.equal(row, rows[-1][..., : row.shape[-1]]) for row in rows)


def test_first_tokens_have_no_entropy() -> None:
    """What stands before them, padding or another sequence, did not produce them."""
    model = tiny_model("llama")
    ids, mask = prompt()
    probe = probe_of()
    with torch.no_grad(), attnprobe.attach(model, probe):
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    assert probe.result().entropy.isnan().int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1] + [0] * 7]
    packed = probe_of()
    with torch.no_grad(), attnprobe.attach(model, packed):
        model(ids[:1], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), use_cache=False)
    assert packed.result().entropy.isnan().int().tolist() == [[1, 0, 0, 1, 0, 0, 0, 0]]


def test_generation_without_a_cache_is_one_result_for_each_pass() -> None:
    """MPT runs the whole sequence again for every token: nothing is continued."""
    model = tiny_model("mpt")
    ids, mask = prompt(rows=1)
    probe = probe_of(entropy=False)
    with attnprobe.attach(model, probe):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    assert probe.result().response_mask.sum(-1).tolist() == [8, 9, 10]


def test_several_generations_are_several_results() -> None:
    model = tiny_model("llama")
    probe = probe_of(entropy=False)
    with attnprobe.attach(model, probe):
        for _ in range(2):
            ids, mask = prompt(rows=1)
            model.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, pad_token_id=0)
    result = probe.result()
    assert result.waad.shape[0] == 2
    assert bool(result.response_mask.all())


def test_beam_search_is_refused() -> None:
    """It moves rows of the cache: what was seen before belongs to other rows."""
    model = tiny_model("llama")
    ids, mask = prompt()
    with (
        attnprobe.attach(model, probe_of()),
        pytest.raises(PatternError, match=r"examples in the KV cache were reordered .* beam search"),
    ):
        model.generate(ids, attention_mask=mask, num_beams=4, max_new_tokens=20, pad_token_id=0)


def test_a_cropped_cache_is_refused() -> None:
    model = tiny_model("llama")
    ids, _ = prompt()
    past = transformers.DynamicCache(config=model.config)
    with attnprobe.attach(model, probe_of()), torch.no_grad():
        model(ids, past_key_values=past, use_cache=True)
        past.crop(-4)
        with pytest.raises(
            PatternError, match="continues a cache of 2 examples and 4 columns, but 2 examples"
        ):
            model(ids[:, 4:], past_key_values=past, use_cache=True)


def test_batches_of_dense_families_are_refused() -> None:
    """Maps alone do not tell whether examples were reordered."""
    model = tiny_model("bloom")
    ids, mask = prompt()
    with (
        attnprobe.attach(model, probe_of()),
        pytest.raises(PatternError, match="only attention maps are known"),
    ):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)


def test_a_failed_step_does_not_count() -> None:
    """An error in the middle of a step leaves the sums of the steps before it."""
    model = tiny_model("llama")
    ids, _ = prompt(rows=1)
    probe = probe_of(entropy=False)
    past = transformers.DynamicCache(config=model.config)

    class Failing(attnprobe.Probe):
        def observe(self, site, layer, value, batch) -> None:
            if layer == 1 and value.query_offset:
                raise KeyError("of the probe's own")

    with attnprobe.attach(model, probe, Failing()), torch.no_grad():
        model(ids, past_key_values=past, use_cache=True)
        before = probe.result()
        with pytest.raises(KeyError):
            model(ids[:, :1], past_key_values=past, use_cache=True)
        after = probe.result()
    assert torch.equal(before.waad, after.waad)


def test_a_mask_of_another_width_is_refused() -> None:
    model = tiny_model("llama")
    ids, mask = prompt()
    with (
        attnprobe.attach(model, probe_of(), response_mask=mask[:, :5]),
        pytest.raises(
            ParameterError, match=r"response_mask is \[2, 5\], but the model was given tokens \[2, 8\]"
        ),
    ):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, pad_token_id=0)


def test_packed_rows_cannot_be_continued() -> None:
    model = tiny_model("llama")
    ids, _ = prompt(rows=1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    past = transformers.DynamicCache(config=model.config)
    # With a cache, transformers does not even keep the sequences apart.
    with (
        attnprobe.attach(model, probe_of()),
        torch.no_grad(),
        pytest.raises(UnsupportedModelError, match="see each other"),
    ):
        model(ids, position_ids=positions, past_key_values=past, use_cache=True)

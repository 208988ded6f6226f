"""The ways of generating: each gives the numbers of one pass over what was run, or says why it cannot."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import transformers
from refusals import refused
from test_generation import assert_equal_to_one_pass, probe_of, prompt

import attnprobe
from attnprobe.errors import PatternError, UnsupportedModelError
from attnprobe.sequence_sums import add_rows
from attnprobe.testing.tiny_models import VOCABULARY, tiny_model

LENGTH = 24
REPEATING = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7, 8]])


def generate(
    model: Any, ids: torch.Tensor, probe: Any, *, marks: bool = True, **options: Any
) -> torch.Tensor:
    settings = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 0}
    mask = {"response_mask": torch.zeros_like(ids)} if marks else {}
    with attnprobe.attach(model, probe, **mask):
        return model.generate(ids, **{**settings, **options})


def like(model: Any) -> Any:
    """A model that often agrees with another, and often does not."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * 0.02 * parameter.std().nan_to_num())
    return other


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gpt_oss", "gemma3_text", "bloom"])
@pytest.mark.parametrize("sample", [False, True])
def test_assisted_decoding(family: str, sample: bool) -> None:
    """Guesses that are rejected leave nothing behind, though they are run and were attended to."""
    model = tiny_model(family)
    ids, mask = prompt(rows=1, count=12)
    probe = probe_of()
    torch.manual_seed(0)
    out = generate(model, ids, probe, assistant_model=like(model), do_sample=sample)
    assert_equal_to_one_pass(model, probe.result(), out, mask, 12)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prompt_lookup(family: str) -> None:
    model, probe = tiny_model(family), probe_of()
    out = generate(model, REPEATING, probe, prompt_lookup_num_tokens=4)
    assert_equal_to_one_pass(model, probe.result(), out, torch.ones_like(REPEATING), 12)


def test_guesses_at_the_very_end_are_taken_back() -> None:
    """No pass follows that would show it: the cache itself is asked, also while the block is open."""
    model = tiny_model("llama")
    ids, mask = prompt(rows=1, count=20)
    probe = probe_of()
    past = transformers.DynamicCache(config=model.config)
    with attnprobe.attach(model, probe), torch.no_grad():
        model(ids[:, :10], past_key_values=past)
        model(ids[:, 10:16], past_key_values=past)
        past.crop(-2)
        inside = probe.result()
        past.crop(-1)
    assert_equal_to_one_pass(model, inside, ids[:, :15], mask[:, :14], 0)
    assert_equal_to_one_pass(model, probe.result(), ids[:, :14], mask[:, :13], 0)


def test_many_guesses_are_remembered_in_part() -> None:
    """Rows are kept for a limited number of them; if more are rejected, no number is wrong."""
    model = tiny_model("llama")
    ids, mask = prompt(rows=1, count=90)
    for rejected in (60, 70):
        probe = probe_of()
        past = transformers.DynamicCache(config=model.config)
        with attnprobe.attach(model, probe, response_mask=mask[:, :10]), torch.no_grad():
            model(ids, past_key_values=past, logits_to_keep=81)
        past.crop(-rejected)
        if rejected == 60:
            left = ids[:, : 90 - rejected + 1]
            found = dataclasses.replace(probe.result(), entropy=None)
            batch = attnprobe.TokenBatch.from_ids(left[:, :-1])
            whole = attnprobe.measure(model, batch, window=4, horizon=(2, 6), receiver=True, entropy=False)
            for name in ("span", "waad", "fai", "receiver_kurtosis"):
                torch.testing.assert_close(
                    getattr(found, name), getattr(whole, name), equal_nan=True, rtol=1e-3, atol=1e-4
                )
        else:
            refused(probe.result, "70 tokens", "last 64", error=PatternError)


def test_several_generations_with_guesses() -> None:
    model, probe = tiny_model("llama"), probe_of(entropy=False)
    for _ in range(2):
        out = generate(model, REPEATING, probe, prompt_lookup_num_tokens=4)
    result = probe.result()
    assert result.waad.shape[0] == 2
    assert torch.equal(result.input_ids[1:], out[:, :-1])
    assert result.select(0) == result.select(1)


@pytest.mark.parametrize("horizon", [(2, 6), (2, None), (0, 1), (30, 40)])
@pytest.mark.parametrize("count", [1, 3])
def test_sums_without_the_last_rows_are_those_of_fewer_rows(
    horizon: tuple[int, int | None], count: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    pattern = torch.rand(2, 3, 20, 20, generator=generator, dtype=torch.float64).tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    mask = torch.rand(2, 20, generator=generator) > 0.3
    settings = (4, horizon, (3, None))
    whole = attnprobe.attention.DenseAttention(pattern)
    fewer = attnprobe.attention.DenseAttention(pattern[..., : 20 - count, : 20 - count])
    found = add_rows(None, whole, mask, *settings, drafted=4)
    plain = add_rows(None, whole, mask, *settings)
    cut, expected = found.without_last(count), add_rows(None, fewer, mask[:, : 20 - count], *settings)
    for name in ("distance", "waad", "received", "received_far"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name))
        torch.testing.assert_close(getattr(cut, name), getattr(expected, name))


def test_a_prompt_in_chunks() -> None:
    """The mask of the prompt covers all chunks, padding included."""
    model, probe = tiny_model("llama"), probe_of()
    ids, _ = prompt(rows=1, count=12)
    response = (torch.arange(12) >= 4)[None]
    with attnprobe.attach(model, probe, response_mask=response):
        out = model.generate(
            ids, max_new_tokens=LENGTH, min_new_tokens=LENGTH, pad_token_id=0, prefill_chunk_size=5
        )
    found = probe.result()
    batch = attnprobe.TokenBatch.from_ids(out[:, :-1], response_start=4)
    whole = attnprobe.measure(model, batch, window=4, horizon=(2, 6), receiver=True)
    assert torch.equal(found.response_mask, whole.response_mask)
    for name in ("span", "waad", "fai"):
        torch.testing.assert_close(
            getattr(found, name), getattr(whole, name), equal_nan=True, rtol=1e-4, atol=1e-4
        )


def test_without_a_cache_each_pass_is_one_over_the_text_so_far() -> None:
    """The prompt's mask holds for all of them, and the last is the pass over the finished text."""
    model, probe = tiny_model("llama"), probe_of()
    ids, _ = prompt(rows=1)
    out = generate(model, ids, probe, use_cache=False)
    result = probe.result()
    assert result.response_mask.sum(-1).tolist() == list(range(LENGTH))
    batch = attnprobe.TokenBatch.from_ids(out[:, :-1], response_start=8)
    whole = attnprobe.measure(model, batch, window=4, horizon=(2, 6), receiver=True)
    for name in ("span", "waad", "fai"):
        ours = getattr(result.select(-1), name)
        torch.testing.assert_close(ours, getattr(whole, name), equal_nan=True, rtol=1e-4, atol=1e-4)


def test_several_continuations_of_each_prompt() -> None:
    """Their prompts are repeated, and so is the mask."""
    model, probe = tiny_model("llama"), probe_of()
    ids, mask = prompt(rows=2)
    torch.manual_seed(0)
    with attnprobe.attach(model, probe, response_mask=torch.zeros_like(mask)):
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=LENGTH,
            min_new_tokens=LENGTH,
            do_sample=True,
            num_return_sequences=3,
            pad_token_id=0,
        )
    assert_equal_to_one_pass(model, probe.result(), out, mask.repeat_interleave(3, dim=0), 8)


# ---- what is refused, with its own reason ---------------------------------------------------------


def test_a_mask_is_repeated_for_equal_examples_only() -> None:
    model = tiny_model("llama")
    ids, mask = prompt(rows=4)

    def run() -> None:
        with attnprobe.attach(model, probe_of(), response_mask=mask[:2]), torch.no_grad():
            model(ids)

    refused(run, "[2, 8]", "[4, 8]")


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("sample", [False, True])
def test_beam_search(marks: bool, sample: bool) -> None:
    model = tiny_model("llama")
    ids, _ = prompt(rows=1)
    torch.manual_seed(0)
    refused(
        lambda: generate(model, ids, probe_of(), marks=marks, num_beams=3, do_sample=sample),
        "reordered",
        "beam search",
        error=PatternError,
    )


def test_early_exit() -> None:
    """A model that is its own assistant runs its first layers only."""
    model = tiny_model("llama")
    ids, _ = prompt(rows=1)
    with torch.no_grad():
        expected = model(ids).logits
    refused(
        lambda: generate(model, ids, probe_of(), assistant_early_exit=1),
        "1 of 3 layers",
        "assistant_early_exit",
        error=UnsupportedModelError,
    )
    # generate, which had changed the number of layers, would not have put it back after an error.
    assert model.config.num_hidden_layers == 3
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


def test_continuous_batching() -> None:
    """It runs in a thread of its own, which only logs errors: the block raises what was refused there."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model = tiny_model("llama", pad_token_id=0, bos_token_id=1, eos_token_id=2)
    settings = transformers.GenerationConfig(
        max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=2
    )
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)

    def run() -> None:
        with attnprobe.attach(model, probe_of()):
            model.generate_batch(
                [[5, 6, 7], [8, 9]],
                generation_config=settings,
                continuous_batching_config=small,
                progress_bar=False,
            )

    refused(run, "continuous batching", "generate_batch", error=UnsupportedModelError)


def test_keys_that_change_in_the_cache() -> None:
    """Such as those that a quantised cache rounds: no beam search is to blame."""
    model = tiny_model("llama")
    ids, _ = prompt()
    past = transformers.DynamicCache(config=model.config)

    def run() -> None:
        with attnprobe.attach(model, probe_of()), torch.no_grad():
            model(ids, past_key_values=past)
            for layer in past.layers:
                layer.keys = (layer.keys * 2).round() / 2
            model(ids[:, :1], past_key_values=past)

    refused(run, "changed between two passes", "quantised", error=PatternError)


@pytest.mark.parametrize(
    ("change", "fact"), [("crop", "cropped"), ("skip", "not observed"), ("repeat", "repeated")]
)
def test_a_cache_that_cannot_be_followed(change: str, fact: str) -> None:
    model = tiny_model("llama")
    ids = torch.randint(1, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    past = transformers.DynamicCache(config=model.config)

    def run() -> None:
        with torch.no_grad():
            probe = probe_of()
            with attnprobe.attach(model, probe):
                model(ids[:, :8], past_key_values=past)
            following = ids[:, 8:9]
            if change == "crop":
                past.crop(-4)
            elif change == "skip":
                model(ids[:, 8:10], past_key_values=past)
            else:
                past.batch_repeat_interleave(2)
                following = following.repeat(2, 1)
            with attnprobe.attach(model, probe):
                model(following, past_key_values=past)

    refused(run, fact, "8 columns were observed", error=PatternError)

"""Reading leaves no trace: not in outputs, configs, copies, saved files or errors of other libraries."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
import transformers
from transformers import AttentionInterface

import attnprobe
from attnprobe.testing.tiny_models import VOCABULARY, tiny_model

IDS = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(6))
LOOK_UP = AttentionInterface.get_interface


def probe_of() -> attnprobe.HeadStatisticsProbe:
    return attnprobe.HeadStatisticsProbe(window=4, horizon=(2, 6), entropy=False)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["deepseek_v32", "llama", "gemma4_text"])
def test_logits_text_and_configs_stay(family: str, implementation: str) -> None:
    """Sparse families compare the implementation's name before they apply their top-k mask."""
    model = tiny_model(family, implementation=implementation)
    before = copy.deepcopy(model.config.to_dict())

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(IDS).logits
        return logits, model.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)

    with torch.no_grad():
        plain = run()
        with attnprobe.attach(model, probe_of()):
            watched = run()
            assert model.config.to_dict() == before
            assert type(model.config._attn_implementation) is str
    assert torch.equal(plain[0], watched[0])
    assert torch.equal(plain[1], watched[1])


def test_attention_that_a_module_computes_itself_is_read_from_its_map() -> None:
    """GPT-2 with `reorder_and_upcast_attn` looks up a function, and does not call it."""
    settings = {"implementation": "eager", "reorder_and_upcast_attn": True}
    model, plain = tiny_model("gpt2", **settings), tiny_model("gpt2")
    half = tiny_model("gpt2", **settings).to(torch.bfloat16)
    with torch.no_grad():
        expected = half(IDS).logits
        with attnprobe.attach(half, probe_of()):
            assert torch.equal(half(IDS).logits, expected)
    batch = attnprobe.TokenBatch.from_ids(IDS, response_start=4)
    found, known = attnprobe.measure(model, batch), attnprobe.measure(plain, batch)
    torch.testing.assert_close(found.fai, known.fai, equal_nan=True, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.span, known.span, rtol=0, atol=1e-4)


@pytest.mark.parametrize("suppressed", [False, True])
@pytest.mark.parametrize("family", ["llama", "bloom", "falcon", "gpt2"])
def test_a_copy_made_inside_a_block_is_an_ordinary_model(family: str, suppressed: bool) -> None:
    model = tiny_model(family)
    probe = probe_of()
    with attnprobe.attach(model, probe, attnprobe.HeadStatisticsProbe()):
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
    if suppressed and family in ("llama", "gpt2"):
        with attnprobe.suppress_attention(model, keys=[3]):
            copied = copy.deepcopy(model)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        expected = model(IDS).logits
        for other in (copied, loaded):
            assert torch.equal(other(IDS).logits, expected)
            for module in other.modules():
                kept = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
                assert not [hook for hook in kept if type(hook).__module__.startswith("attnprobe")]
            attnprobe.measure(other, attnprobe.TokenBatch.from_ids(IDS, response_start=4))
    assert not probe._finished
    assert not probe._sequence.layers, "the copies' passes were not observed"


def test_a_model_saved_inside_a_block_is_the_same_file(tmp_path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "before")
    with attnprobe.attach(model, probe_of()):
        model.save_pretrained(tmp_path / "inside")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "inside" / name).read_bytes()


def test_the_look_up_is_put_back() -> None:
    model = tiny_model("llama")
    with attnprobe.attach(model, probe_of()):
        assert AttentionInterface.get_interface is not LOOK_UP
        with attnprobe.suppress_attention(model, keys=[1]):
            pass
        assert AttentionInterface.get_interface is not LOOK_UP
    assert AttentionInterface.get_interface is LOOK_UP
    with pytest.raises(KeyError), attnprobe.attach(model, probe_of()):
        raise KeyError("an error of the user's own")
    assert AttentionInterface.get_interface is LOOK_UP


def test_errors_of_transformers_do_not_speak_of_us() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation_internal = "unknown"
    with torch.no_grad():
        with pytest.raises(KeyError) as plain:
            model(IDS)
        with attnprobe.attach(model, probe_of()), pytest.raises(KeyError) as watched:
            model(IDS)
    assert str(plain.value) == str(watched.value)


def test_models_in_other_threads_run_as_usual() -> None:
    """The look-up is shared; what is watched belongs to the modules of one model."""
    watched, other = tiny_model("llama"), tiny_model("mistral", seed=1)
    with torch.no_grad():
        expected = other(IDS).logits
    found: list[torch.Tensor] = []

    def run() -> None:
        with torch.no_grad():
            for _ in range(20):
                found.append(other(IDS).logits)

    thread = threading.Thread(target=run)
    probe = probe_of()
    with torch.no_grad(), attnprobe.attach(watched, probe):
        thread.start()
        for _ in range(20):
            watched(IDS)
        thread.join()
    assert len(found) == 20
    assert all(torch.equal(logits, expected) for logits in found)
    assert len(probe.result().waad) == 40


def test_a_family_with_a_table_of_its_own_is_seen() -> None:
    """A model may keep its own table of attention functions, as Doge does."""
    own = AttentionInterface()
    calls: list[str] = []

    def counted(module, *args, **options):
        calls.append(type(module).__name__)
        return transformers.AttentionInterface()["sdpa"](module, *args, **options)

    own["sdpa"] = counted
    model = tiny_model("llama")
    modeling = __import__(type(model).__module__, fromlist=["_"])
    shared = modeling.ALL_ATTENTION_FUNCTIONS
    modeling.ALL_ATTENTION_FUNCTIONS = own
    try:
        found = attnprobe.measure(model, attnprobe.TokenBatch.from_ids(IDS, response_start=4))
    finally:
        modeling.ALL_ATTENTION_FUNCTIONS = shared
    assert calls == ["LlamaAttention"] * 3
    assert not found.span.isnan().any()

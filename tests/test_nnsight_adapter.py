"""nnsight wrappers: a trace of nnsight's own reading is the oracle, and traces go on working."""

from __future__ import annotations

import pytest
import torch

import attnprobe
from attnprobe.adapters import adapter_for
from attnprobe.errors import UnsupportedModelError
from attnprobe.testing.backends import in_nnsight, run_in_trace
from attnprobe.testing.conformance import conformance_test
from attnprobe.testing.reference import dense_pattern
from attnprobe.testing.tiny_models import VOCABULARY, tiny_model, tiny_tokenizer

test_conformance = conformance_test(in_nnsight, run=run_in_trace)


def tokens(rows: int = 2, count: int = 16) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(3))


class Patterns(attnprobe.Probe):
    def __init__(self) -> None:
        self.patterns: dict[int, torch.Tensor] = {}

    def observe(self, site, layer, value, batch) -> None:
        self.patterns[layer] = value.rows(torch.arange(value.query_count))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "qwen3"])
def test_patterns_are_those_of_the_call_that_nnsight_sees(family: str) -> None:
    """The inputs of the attention call, as a trace shows them, give the same patterns."""
    wrapper, ids = in_nnsight(tiny_model(family)), tokens()
    expected = {}
    with torch.no_grad():
        with wrapper.trace(ids):
            for layer in range(3):
                source = wrapper.model.layers[layer].self_attn.source
                (_, query, key, _, mask), options = source.attention_interface_1.inputs
                expected[layer] = dense_pattern(
                    query,
                    key,
                    scaling=options["scaling"],
                    mask=mask,
                    softcap=options.get("softcap"),
                    sinks=options.get("s_aux"),
                ).save()
        probe = Patterns()
        with attnprobe.attach(wrapper, probe):
            run_in_trace(wrapper, ids)
    assert sorted(expected) == sorted(probe.patterns) == [0, 1, 2]
    for layer, pattern in probe.patterns.items():
        torch.testing.assert_close(pattern.double(), expected[layer], rtol=0, atol=1e-5)


def test_probes_see_what_the_trace_changed_and_the_trace_what_probes_did() -> None:
    wrapper, ids = in_nnsight(tiny_model("llama")), tokens()

    class Halve(attnprobe.Probe):
        sites = frozenset({"layer_input", "layer_output"})

        def __init__(self) -> None:
            self.seen = {}

        def observe(self, site, layer, value, batch):
            self.seen[site, layer] = value.clone()
            return value * 0.5 if (site, layer) == ("layer_output", 1) else None

    probe = Halve()
    with torch.no_grad(), attnprobe.attach(wrapper, probe), wrapper.trace(ids):
        wrapper.model.layers[0].output[:] = 1.0
        after = wrapper.model.layers[2].input.save()
    assert bool((probe.seen["layer_output", 0] == 1.0).all())
    assert bool((probe.seen["layer_input", 1] == 1.0).all())
    assert torch.equal(after, probe.seen["layer_output", 1] * 0.5)


def test_stored_edits_apply_to_our_own_passes() -> None:
    wrapper, ids = in_nnsight(tiny_model("llama")), tokens()
    batch = attnprobe.TokenBatch.from_ids(ids)
    plain = attnprobe.measure(wrapper, batch)
    with wrapper.edit(inplace=True):
        wrapper.model.layers[0].output[:] = 0
    edited = attnprobe.measure(wrapper, batch)
    assert torch.equal(plain.waad[:, 0], edited.waad[:, 0])
    assert not torch.allclose(plain.waad[:, 1], edited.waad[:, 1], equal_nan=True)
    # All rows are zero after the edit, so attention is uniform, and the span of row t is t / 2.
    expected = torch.full_like(edited.span[:, 1], (ids.shape[1] - 1) / 4)
    torch.testing.assert_close(edited.span[:, 1], expected)


@pytest.mark.parametrize("name", ["TransformersModel", "LanguageModel"])
@pytest.mark.filterwarnings("ignore:LanguageModel is deprecated")
def test_the_other_wrappers_give_the_same_numbers(name: str) -> None:
    """With a tokenizer, padding texts on the left in a trace of the user's."""
    import nnsight

    model, tokenizer = tiny_model("llama", vocab_size=300), tiny_tokenizer()
    wrapper = getattr(nnsight, name)(model, tokenizer=tokenizer)
    batch = attnprobe.TokenBatch.from_ids(tokens(), response_start=4)
    expected = attnprobe.measure(tiny_model("llama", vocab_size=300), batch)
    found = attnprobe.measure(wrapper, batch)
    assert torch.equal(found.waad.nan_to_num(), expected.waad.nan_to_num())
    texts = ["Read what", "Read what the model reads"]
    probe = attnprobe.HeadStatisticsProbe(horizon=(1, 3))
    with torch.no_grad(), attnprobe.attach(wrapper, probe), wrapper.trace(texts):
        pass
    padded = probe.result()
    rows = [tokenizer(text)["input_ids"] for text in texts]
    for row, ids in enumerate(rows):
        alone = attnprobe.measure(
            tiny_model("llama", vocab_size=300), attnprobe.TokenBatch.from_ids([ids]), horizon=(1, 3)
        )
        torch.testing.assert_close(
            padded.waad[row, ..., -len(ids) :], alone.waad[0], rtol=1e-4, atol=1e-4, equal_nan=True
        )
        torch.testing.assert_close(padded.span[row], alone.span[0], rtol=1e-4, atol=1e-4)


def test_several_invokes_in_a_trace_are_one_pass() -> None:
    import nnsight

    wrapper = nnsight.TransformersModel(tiny_model("llama", vocab_size=300), tokenizer=tiny_tokenizer())
    probe = attnprobe.HeadStatisticsProbe(horizon=(1, 3))
    with torch.no_grad(), attnprobe.attach(wrapper, probe), wrapper.trace() as tracer:
        with tracer.invoke("Read what the model"):
            pass
        with tracer.invoke("Read what"):
            pass
    assert probe.result().span.shape[0] == 2


def test_generation_in_a_trace_adds_up() -> None:
    import nnsight

    wrapper = nnsight.TransformersModel(tiny_model("llama", vocab_size=300), tokenizer=tiny_tokenizer())
    probe = attnprobe.HeadStatisticsProbe(window=4, horizon=(2, 6), entropy=False)
    with torch.no_grad(), attnprobe.attach(wrapper, probe):
        ids = wrapper.generate(tokens(1, 6), max_new_tokens=10, min_new_tokens=10, do_sample=False)
    grown = probe.result()
    whole = attnprobe.measure(
        wrapper, attnprobe.TokenBatch.from_ids(ids[:, :-1]), window=4, horizon=(2, 6), entropy=False
    )
    for name in ("span", "waad", "fai"):
        torch.testing.assert_close(
            getattr(grown, name), getattr(whole, name), equal_nan=True, rtol=1e-4, atol=1e-4
        )


def test_a_stopped_trace_is_not_kept() -> None:
    wrapper, ids = in_nnsight(tiny_model("llama")), tokens()
    probe = attnprobe.HeadStatisticsProbe()
    with torch.no_grad(), attnprobe.attach(wrapper, probe):
        with wrapper.trace(ids) as tracer:
            wrapper.model.layers[1].output  # noqa: B018 - reading it in a trace waits for it
            tracer.stop()
        with pytest.raises(attnprobe.ResultError, match=r"no .*forward pass was observed"):
            probe.result()
        run_in_trace(wrapper, ids)
    assert probe.result().span.shape[0] == 2


def test_wrappers_that_hold_no_whole_model_are_refused() -> None:
    wrapper = in_nnsight(tiny_model("llama"))
    with pytest.raises(UnsupportedModelError, match="holds a LlamaDecoderLayer"):
        adapter_for(wrapper.model.layers[0])
    with pytest.raises(UnsupportedModelError, match="holds a Linear"):
        adapter_for(in_nnsight(torch.nn.Linear(2, 2)))


def test_models_that_are_not_loaded_are_refused() -> None:
    with torch.device("meta"):
        model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match="not loaded yet"):
        adapter_for(in_nnsight(model))

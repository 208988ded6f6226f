"""Tensor sites: what they hold, what replacing them does, and what is refused."""

from __future__ import annotations

import pytest
import torch

import attnprobe
from attnprobe.adapters import adapter_for
from attnprobe.errors import IncompleteRunError, InterventionError, ParameterError, UnsupportedModelError
from attnprobe.testing.backends import BACKENDS
from attnprobe.testing.model_state import assert_same_state, model_state
from attnprobe.testing.tiny_models import VOCABULARY, tiny_model

TENSOR_SITES = ("layer_input", "attention_output", "mlp_output", "layer_output")
IDS = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(4))


class Keep(attnprobe.Probe):
    """Keeps what comes to some sites."""

    def __init__(self, *sites: str) -> None:
        self.sites = frozenset(sites)
        self.values = {}

    def observe(self, site, layer, value, batch) -> None:
        self.values[site, layer] = value.detach()


class Change(attnprobe.Probe):
    """Puts a function of a site's value in its place, in one layer."""

    def __init__(self, site: str, layer: int | None, function) -> None:
        self.sites = frozenset({site})
        self.layer = layer
        self.function = function

    def observe(self, site, layer, value, batch):
        return self.function(value) if layer == self.layer else None


MODULES = {
    "llama": ("model.layers.{}", "self_attn", "mlp"),
    "gemma2": ("model.layers.{}", "self_attn", "mlp"),
    "granite": ("model.layers.{}", "self_attn", "mlp"),
    "olmo2": ("model.layers.{}", "self_attn", "mlp"),
    "gpt_oss": ("model.layers.{}", "self_attn", "mlp"),
    "llama4_text": ("model.layers.{}", "self_attn", "feed_forward"),
    "gpt2": ("transformer.h.{}", "attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers.{}", "attention", "mlp"),
    "falcon": ("transformer.h.{}", "self_attention", "mlp"),
}


@pytest.mark.parametrize("family", list(MODULES))
def test_sites_are_what_the_named_modules_return(family: str) -> None:
    """Held against hooks on modules by name, in a model without probes."""
    layer_name, attention, mlp = MODULES[family]
    expected = {}

    def keep(key):
        def hook(module, args, output):
            value = output[0] if isinstance(output, tuple) else output
            # Falcon adds to what its feed-forward module returned, in place.
            expected[key] = value.reshape(*IDS.shape, -1).clone()

        return hook

    plain = tiny_model(family)
    for i in range(3):
        layer = plain.get_submodule(layer_name.format(i))
        layer.register_forward_hook(keep(("layer_output", i)))
        layer.get_submodule(attention).register_forward_hook(keep(("attention_output", i)))
        layer.get_submodule(mlp).register_forward_hook(keep(("mlp_output", i)))
    with torch.no_grad():
        states = plain(IDS, output_hidden_states=True).hidden_states
        expected |= {("layer_input", i): states[i] for i in range(3)}
        probe, model = Keep(*TENSOR_SITES), tiny_model(family)
        with attnprobe.attach(model, probe):
            model(IDS)
    assert probe.values.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(probe.values[key], value, rtol=1e-5, atol=1e-5, msg=str(key))


def test_attention_and_feed_forward_make_up_the_layer() -> None:
    """In a plain layer the two outputs are what it adds to the residual stream."""
    model, probe = tiny_model("llama"), Keep(*TENSOR_SITES)
    with torch.no_grad(), attnprobe.attach(model, probe):
        model(IDS)
    for i in range(3):
        parts = [probe.values[site, i] for site in ("layer_input", "attention_output", "mlp_output")]
        torch.testing.assert_close(sum(parts), probe.values["layer_output", i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("site", [*TENSOR_SITES, "logits"])
def test_replacing_with_zeros_has_the_effect_of_a_hook(backend: str, site: str) -> None:
    """On every backend: the logits are those of a plain model with a hook that does the same."""
    plain = tiny_model("llama")
    layer = plain.model.layers[1]
    if site == "layer_input":
        layer.register_forward_pre_hook(lambda module, args: (torch.zeros_like(args[0]), *args[1:]))
    elif site == "layer_output":
        layer.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    elif site == "attention_output":
        layer.self_attn.register_forward_hook(
            lambda module, args, output: (torch.zeros_like(output[0]), *output[1:])
        )
    elif site == "mlp_output":
        layer.mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    with torch.no_grad():
        expected = plain(IDS).logits
        expected = torch.zeros_like(expected) if site == "logits" else expected
        model = BACKENDS[backend](tiny_model("llama"))
        probe = Change(site, None if site == "logits" else 1, torch.zeros_like)
        after = Keep("logits")
        with attnprobe.attach(model, probe, after):
            returned = model(IDS)
    torch.testing.assert_close(after.values["logits", None], expected, rtol=1e-4, atol=1e-5)
    returned = returned if isinstance(returned, torch.Tensor) else returned.logits
    torch.testing.assert_close(returned, expected, rtol=1e-4, atol=1e-5)


def test_replacements_chain_in_order() -> None:
    """A later probe is shown what an earlier one put there; a nested block comes after the outer one."""
    model = tiny_model("llama")
    double, add = (
        Change("mlp_output", 1, lambda value: value * 2),
        Change("mlp_output", 1, lambda value: value + 1),
    )
    before, between, after = Keep("mlp_output"), Keep("mlp_output"), Keep("mlp_output")
    key = ("mlp_output", 1)
    with torch.no_grad(), attnprobe.attach(model, before, double, between, add, after):
        model(IDS)
    plain = before.values[key]
    assert torch.equal(between.values[key], plain * 2)
    assert torch.equal(after.values[key], plain * 2 + 1)
    nested = Keep("mlp_output")
    with (
        torch.no_grad(),
        attnprobe.attach(model, double),
        attnprobe.attach(model, add),
        attnprobe.attach(model, nested),
    ):
        model(IDS)
    assert torch.equal(nested.values[key], plain * 2 + 1)


def test_gradients_flow_through_a_replacement() -> None:
    model = tiny_model("llama")
    scale = torch.tensor(0.5, requires_grad=True)
    with attnprobe.attach(model, Change("attention_output", 1, lambda value: value * scale)):
        model(IDS, labels=IDS).loss.backward()
    assert scale.grad is not None
    assert float(scale.grad.abs()) > 0


def test_an_intervention_is_seen_by_statistics() -> None:
    """Attention above a replaced site is what the model computed from the replacement."""
    model = tiny_model("llama")
    plain, changed = (attnprobe.HeadStatisticsProbe(entropy=False) for _ in range(2))
    with torch.no_grad():
        with attnprobe.attach(model, plain):
            model(IDS)
        with attnprobe.attach(model, Change("layer_output", 0, torch.zeros_like), changed):
            model(IDS)
    assert torch.equal(plain.result().span[:, 0], changed.result().span[:, 0])
    # Without anything in the residual stream attention is uniform: row t has a mean distance of t / 2.
    uniform = torch.full_like(plain.result().span[:, 1], (IDS.shape[1] - 1) / 4)
    torch.testing.assert_close(changed.result().span[:, 1], uniform)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda value: value[:, :-1],
            r"returned shape \[2, 8, 32\] for mlp_output, which has shape \[2, 9, 32\]",
        ),
        (lambda value: value.double(), r"returned dtype torch\.float64 .* has dtype torch\.float32"),
        (lambda value: value / 0, "returned NaN or infinity for mlp_output"),
        (lambda value: 0.0, "returned a float for mlp_output"),
    ],
)
def test_replacements_that_do_not_fit_are_refused(backend: str, function, message: str) -> None:
    model = BACKENDS[backend](tiny_model("llama"))
    with torch.no_grad():
        model(IDS)
        before = model_state(adapter_for(model).model)
        with (
            pytest.raises(InterventionError, match=f"Change {message}"),
            attnprobe.attach(model, Change("mlp_output", 1, function)),
        ):
            model(IDS)
        assert_same_state(before, model_state(adapter_for(model).model))


def test_a_change_in_place_is_refused() -> None:
    model = tiny_model("llama")
    with (
        torch.no_grad(),
        pytest.raises(InterventionError, match=r"changed layer_output of layer 1 .* in place: return a new"),
        attnprobe.attach(model, Change("layer_output", 1, lambda value: (value.zero_(), None)[1])),
    ):
        model(IDS)


def test_attention_cannot_be_replaced() -> None:
    model = tiny_model("llama")
    with (
        torch.no_grad(),
        pytest.raises(InterventionError, match="read but not replaced: use suppress_attention"),
        attnprobe.attach(model, Change("attention", 1, lambda value: torch.zeros(1))),
    ):
        model(IDS)


def test_logits_cannot_be_replaced_under_the_models_own_loss() -> None:
    model = tiny_model("llama")
    with (
        torch.no_grad(),
        pytest.raises(InterventionError, match="call it without labels"),
        attnprobe.attach(model, Change("logits", None, torch.zeros_like)),
    ):
        model(IDS, labels=IDS)


def test_replacements_under_gradient_checkpointing_are_refused() -> None:
    """The backward pass would compute the layers without them; looking is fine."""
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable()
    probe = Keep(*TENSOR_SITES)
    with attnprobe.attach(model, probe):
        model(IDS, labels=IDS).loss.backward()
    assert len(probe.values) == 12
    with (
        pytest.raises(InterventionError, match="cannot be replaced under gradient checkpointing"),
        attnprobe.attach(model, Change("mlp_output", 1, torch.zeros_like)),
    ):
        model(IDS, labels=IDS)


@pytest.mark.parametrize(
    ("family", "site", "message"),
    [
        ("bloom", "attention_output", "adds the residual stream to its output itself"),
        ("bloom", "mlp_output", "adds the residual stream to its output itself"),
        ("mpt", "mlp_output", "adds the residual stream to its output itself"),
        ("opt", "mlp_output", "no single feed-forward module"),
        ("falcon_h1", "mlp_output", "no single feed-forward module"),
    ],
)
def test_sites_with_another_meaning_are_refused(family: str, site: str, message: str) -> None:
    """Rather than something else under the same name."""
    with (
        pytest.raises(UnsupportedModelError, match=f"there is no site {site} here: .* {message}"),
        attnprobe.attach(tiny_model(family), Keep(site)),
    ):
        pass


def test_a_silent_site_is_an_error() -> None:
    """A feed-forward module that is not run in some layer is named, with its site."""
    model = tiny_model("llama")
    layer = model.model.layers[1]
    layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    with (
        torch.no_grad(),
        pytest.raises(
            IncompleteRunError,
            match=r"layers \[1\] were silent at mlp_output in a forward pass of LlamaForCausalLM through tr",
        ),
        attnprobe.attach(model, Keep("mlp_output", "layer_output")),
    ):
        model(IDS)


def test_a_module_that_runs_twice_is_an_error() -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    layer = model.model.layers[1]
    own = layer.forward

    def twice(*args, **kwargs):
        output = own(*args, **kwargs)
        return output + mlp(output)

    layer.forward = twice
    with (
        torch.no_grad(),
        pytest.raises(IncompleteRunError, match=r"layers \[1\] were seen more than once at mlp_output"),
        attnprobe.attach(model, Keep("mlp_output")),
    ):
        model(IDS)


def test_layers_without_attention_have_no_sites() -> None:
    model = tiny_model("qwen3_next")
    probe = Keep("layer_output")
    with torch.no_grad(), attnprobe.attach(model, probe) as attached:
        model(IDS)
    assert attached.layers == (3,)
    assert attached.skipped_layers == (0, 1, 2)
    assert list(probe.values) == [("layer_output", 3)]
    with (
        pytest.raises(ParameterError, match=r"layers \[0\] have no attention"),
        attnprobe.attach(model, probe, layers=[0]),
    ):
        pass

"""TransformerBridge models: the bridge's own patterns are the oracle, and its hooks go on working."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

import attnprobe
from attnprobe.adapters import adapter_for
from attnprobe.errors import IncompleteRunError, UnsupportedModelError
from attnprobe.testing.backends import in_transformer_lens
from attnprobe.testing.conformance import conformance_test
from attnprobe.testing.model_state import assert_same_state, model_state
from attnprobe.testing.tiny_models import VOCABULARY, tiny_model


def bridged(model: Any) -> Any:
    if model.config.model_type == "jamba" and Version(transformers.__version__) < Version("5.14"):
        raise UnsupportedModelError("a bridge over Jamba of transformers before 5.14 does not run at all")
    narrow = model.dtype == torch.bfloat16
    if model.config.model_type == "olmo2" and narrow and Version(transformers.__version__) >= Version("5.24"):
        raise UnsupportedModelError("a bridge over OLMo 2 of transformers 5.24 does not run in bfloat16")
    return in_transformer_lens(model)


test_conformance = conformance_test(bridged)


def bridge_of(family: str, **changes):
    return in_transformer_lens(tiny_model(family, **changes))


def tokens(rows: int = 2, count: int = 16) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(3))


class Patterns(attnprobe.Probe):
    """Keeps patterns, and whether they came from query and key."""

    def __init__(self) -> None:
        self.patterns: dict[int, torch.Tensor] = {}
        self.kinds: list[str] = []

    def observe(self, site, layer, value, batch) -> None:
        self.patterns[layer] = value.rows(torch.arange(value.query_count))
        self.kinds.append(type(value).__name__)


@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "opt", "olmo2", "mixtral", "bloom"],
)
def test_patterns_are_those_of_the_bridges_own_hook(family: str) -> None:
    """Read from query and key, they are what `hook_pattern` shows when the bridge computes them."""
    bridge, ids = bridge_of(family, implementation="eager"), tokens()
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
        probe = Patterns()
        with attnprobe.attach(bridge, probe):
            bridge(ids)
    assert set(probe.kinds) == {"DenseAttention" if family == "bloom" else "FactoredAttention"}
    for layer, pattern in probe.patterns.items():
        expected = cache[f"blocks.{layer}.attn.hook_pattern"]
        torch.testing.assert_close(pattern, expected.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_run_with_cache_works_inside_attach(family: str) -> None:
    """Hooks that only the bridge's own attention fires still fire; then the pattern is read there."""
    bridge, ids = bridge_of(family), tokens()
    with torch.no_grad():
        expected_logits, expected = bridge.run_with_cache(ids)
        probe = Patterns()
        with attnprobe.attach(bridge, probe):
            logits, cache = bridge.run_with_cache(ids)
    assert torch.equal(logits, expected_logits)
    assert cache.keys() == expected.keys()
    for layer, pattern in probe.patterns.items():
        assert torch.equal(pattern, cache[f"blocks.{layer}.attn.hook_pattern"].float())
    assert set(probe.kinds) == {"DenseAttention"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_run_with_hooks_changes_what_probes_see(family: str) -> None:
    """A hook on the residual stream, or at an attention module's end, works as it does without probes."""
    bridge, ids = bridge_of(family), tokens()
    for name in ("blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.0.attn.hook_z"):
        hooks = [(name, lambda value, hook: value * 0.5)]
        with torch.no_grad():
            expected = bridge.run_with_hooks(ids, fwd_hooks=hooks)
            plain, hooked = Patterns(), Patterns()
            with attnprobe.attach(bridge, plain):
                bridge(ids)
            with attnprobe.attach(bridge, hooked):
                logits = bridge.run_with_hooks(ids, fwd_hooks=hooks)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(hooked.patterns[2], plain.patterns[2], atol=1e-3)
        # GPT-2's own attention module does not call the bridge's output projection, so hook_z needs
        # the bridge's attention there.
        dense = 1 if (family, name) == ("gpt2", "blocks.0.attn.hook_z") else 0
        assert hooked.kinds.count("DenseAttention") == dense


def test_a_hook_that_changes_the_pattern_is_seen() -> None:
    """The probe sees the pattern that the layer used, with the hook's change in it."""
    bridge, ids = bridge_of("llama"), tokens()

    def first_only(pattern, hook):
        changed = torch.zeros_like(pattern)
        changed[..., 0] = 1.0
        return changed

    probe = Patterns()
    with torch.no_grad(), attnprobe.attach(bridge, probe):
        bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_pattern", first_only)])
    assert bool((probe.patterns[1][..., 0] == 1.0).all())
    assert probe.kinds == ["FactoredAttention", "DenseAttention", "FactoredAttention"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_compatibility_mode_is_read_right(family: str) -> None:
    """Folded and centred weights give the same patterns."""
    bridge, ids = bridge_of(family), tokens()
    with torch.no_grad():
        before = Patterns()
        with attnprobe.attach(bridge, before):
            bridge(ids)
        bridge.enable_compatibility_mode()
        after = Patterns()
        with attnprobe.attach(bridge, after):
            bridge(ids)
        _, cache = bridge.run_with_cache(ids)
    for layer, pattern in after.patterns.items():
        torch.testing.assert_close(pattern, before.patterns[layer], rtol=0, atol=1e-4)
        torch.testing.assert_close(
            pattern, cache[f"blocks.{layer}.attn.hook_pattern"].float(), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_nested_blocks_see_the_same(family: str) -> None:
    """Handed over or read at the hook, every open block is shown every layer."""
    bridge, ids = bridge_of(family), tokens()
    for run in (bridge, bridge.run_with_cache):
        outer, inner = Patterns(), Patterns()
        with torch.no_grad(), attnprobe.attach(bridge, outer), attnprobe.attach(bridge, inner, layers=[1, 2]):
            run(ids)
        assert sorted(outer.patterns) == [0, 1, 2]
        assert sorted(inner.patterns) == [1, 2]
        assert all(torch.equal(inner.patterns[i], outer.patterns[i]) for i in (1, 2))
    assert all("forward" not in vars(block.attn) for block in bridge.blocks)


def test_another_stand_in_is_not_passed_over() -> None:
    """Who replaced an attention module's forward finds it called, and its pattern read."""
    bridge, ids = bridge_of("llama"), tokens()
    attention = bridge.blocks[1].attn
    calls = []

    def standing_in(*args, **kwargs):
        calls.append(len(args))
        return type(attention).forward(attention, *args, **kwargs)

    attention.__dict__["forward"] = standing_in
    probe = Patterns()
    with torch.no_grad(), attnprobe.attach(bridge, probe):
        bridge(ids)
    assert len(calls) == 1
    assert probe.kinds == ["FactoredAttention", "DenseAttention", "FactoredAttention"]
    assert attention.__dict__["forward"] is standing_in


def test_weights_edited_in_the_bridge_count() -> None:
    """GPT-2 keeps query, key and value in one matrix, of which the bridge has split copies to edit."""
    bridge, ids = bridge_of("gpt2"), tokens()
    state = torch.random.get_rng_state()
    with torch.no_grad():
        query = bridge.blocks[1].attn.q.original_component
        query.weight = torch.nn.Parameter(query.weight * 0.5)
        _, cache = bridge.run_with_cache(ids)
        probe = Patterns()
        with attnprobe.attach(bridge, probe):
            bridge(ids)
    torch.testing.assert_close(probe.patterns[1], cache["blocks.1.attn.hook_pattern"], rtol=0, atol=1e-6)
    assert probe.kinds == ["FactoredAttention", "DenseAttention", "FactoredAttention"]
    assert torch.equal(state, torch.random.get_rng_state())


def test_eager_bridges_store_no_maps() -> None:
    """A bridge asks for eager attention to have maps; while handed over, sdpa runs, and eager comes back."""
    bridge, ids = bridge_of("llama", implementation="eager"), tokens()
    seen = []

    class Implementation(attnprobe.Probe):
        def observe(self, site, layer, value, batch) -> None:
            seen.append(bridge.original_model.config._attn_implementation)

    with attnprobe.attach(bridge, Implementation()), torch.no_grad():
        bridge(ids)
    assert seen == ["sdpa"] * 3
    assert bridge.original_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_failing_hook_leaves_the_bridge_as_it_was(family: str) -> None:
    bridge, ids = bridge_of(family), tokens()
    with torch.no_grad():
        expected = bridge(ids)

        def fail(value, hook):
            raise RuntimeError("of the hook's own")

        before = model_state(bridge.original_model)
        with (
            pytest.raises(RuntimeError, match="of the hook's own"),
            attnprobe.attach(bridge, Patterns()),
        ):
            bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_resid_pre", fail)])
        assert_same_state(before, model_state(bridge.original_model))
        assert torch.equal(bridge(ids), expected)
    assert bridge.training is False


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_mode_comes_back(family: str) -> None:
    """Our own passes run in evaluation mode, without the dropout of GPT-2."""
    bridge, ids = bridge_of(family), tokens()
    batch = attnprobe.TokenBatch.from_ids(ids)
    expected = attnprobe.measure(bridge, batch)
    bridge.train()
    before = model_state(bridge.original_model)
    measured = attnprobe.measure(bridge, batch)
    assert torch.equal(measured.waad, expected.waad)
    assert_same_state(before, model_state(bridge.original_model))
    assert bridge.training


def test_hooks_on_patterns_after_dropout_are_refused() -> None:
    bridge, ids = bridge_of("gpt2"), tokens()
    bridge.train()
    with (
        pytest.raises(UnsupportedModelError, match=r"hook_pattern comes after dropout: call bridge\.eval"),
        attnprobe.attach(bridge, Patterns()),
    ):
        bridge.run_with_cache(ids)


def test_generation_through_the_bridge_adds_up() -> None:
    """The bridge's own generation loop, with its cache: the numbers of one full forward."""
    bridge, ids = bridge_of("llama"), tokens(1, 6)
    probe = attnprobe.HeadStatisticsProbe(window=4, horizon=(2, 6))
    with attnprobe.attach(bridge, probe), torch.no_grad():
        out = bridge.generate(ids, max_new_tokens=10, do_sample=False, return_type="tokens", verbose=False)
    grown = probe.result()
    whole = attnprobe.measure(bridge, attnprobe.TokenBatch.from_ids(out[:, :-1]), window=4, horizon=(2, 6))
    for name in ("span", "waad", "fai", "entropy"):
        torch.testing.assert_close(
            getattr(grown, name), getattr(whole, name), equal_nan=True, rtol=1e-4, atol=1e-4
        )


def test_a_layer_that_the_bridge_stops_before_is_not_kept() -> None:
    """`stop_at_layer` ends the pass early: nothing of it is kept, and the next one works."""
    bridge, ids = bridge_of("llama"), tokens()
    probe = attnprobe.HeadStatisticsProbe()
    with attnprobe.attach(bridge, probe), torch.no_grad():
        bridge(ids, stop_at_layer=1)
        with pytest.raises(attnprobe.ResultError, match=r"no .*forward pass was observed"):
            probe.result()
        bridge(ids)
    assert probe.result().span.shape[0] == 2


def test_suppression_refuses_hooks_that_need_the_bridges_attention() -> None:
    bridge, ids = bridge_of("llama"), tokens()
    with (
        attnprobe.suppress_attention(bridge, keys=[3]),
        pytest.raises(IncompleteRunError, match=r"attention of layers \[0, 1, 2\] .* not suppressed"),
        torch.no_grad(),
    ):
        bridge.run_with_cache(ids)


def test_hooked_transformer_is_refused_with_the_version_needed() -> None:
    """The class that TransformerLens 4 removed: told by its name, since it cannot be made any more."""
    old = type("HookedTransformer", (), {"__module__": "transformer_lens.HookedTransformer"})
    with pytest.raises(
        UnsupportedModelError, match=r"transformer-lens>=4\.3,<4\.4 and use TransformerBridge\.boot"
    ):
        adapter_for(old())


def test_the_model_inside_a_bridge_is_refused() -> None:
    bridge = bridge_of("llama")
    with pytest.raises(UnsupportedModelError, match=r"inside a TransformerBridge, .* pass the bridge itself"):
        attnprobe.measure(bridge.original_model, attnprobe.TokenBatch.from_ids([[1, 2, 3]]))


def test_a_bridge_over_no_transformers_model_is_refused() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_native(
        {"n_layers": 1, "d_model": 8, "n_ctx": 16, "d_head": 4, "n_heads": 2, "d_vocab": 9, "act_fn": "relu"}
    )
    with pytest.raises(UnsupportedModelError, match="not a transformers model"):
        adapter_for(bridge)

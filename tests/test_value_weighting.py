"""Attention weighted by the norms of values, against plain loops over eager maps."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import attnprobe
from attnprobe import (
    HeadStatisticsProbe,
    ParameterError,
    ResultError,
    TokenBatch,
    UnsupportedModelError,
    metrics,
)
from attnprobe.testing.model_state import assert_same_state, model_state
from attnprobe.testing.strategies import patterns
from attnprobe.testing.tiny_models import VOCABULARY, tiny_model
from tests.refusals import refused

IDS = torch.randint(1, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))
BATCH = TokenBatch.from_ids(IDS, response_start=4)
HORIZON = (1, 8)


@given(pattern=patterns(), seed=st.integers(0, 99), factor=st.sampled_from([0.25, 1.0, 3.0]))
def test_equal_norms_scale_plain_influence(pattern: Tensor, seed: int, factor: float) -> None:
    """All 1: plain FAI. All c: c times that, and the same kurtosis."""
    mask = torch.rand(pattern.shape[::2], generator=torch.Generator().manual_seed(seed)) < 0.7
    norms = torch.full(pattern.shape[:3], factor, dtype=torch.float64)
    plain = metrics.future_attention_influence(pattern, mask, (0, 5))
    weighted = metrics.future_attention_influence(pattern, mask, (0, 5), value_norms=norms)
    torch.testing.assert_close(weighted, plain * factor, equal_nan=True, rtol=1e-12, atol=0)
    settings: dict[str, Any] = {"horizon": (0, None), "minimum_rows": 1}
    kurtosis = metrics.receiver_kurtosis(pattern, mask, **settings)
    again = metrics.receiver_kurtosis(pattern, mask, value_norms=norms, **settings)
    torch.testing.assert_close(again, kurtosis, equal_nan=True, rtol=1e-6, atol=1e-6)


# ---- the slow reference ---------------------------------------------------------------------------


def values_and_matrices(model: Any, family: str, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The values `[batch, token, value_head, d]` and output matrices `[head * d, d_model]` of all layers."""
    decoder = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = decoder.transformer.h if family == "gpt2" else decoder.model.layers
    values: list[Tensor] = []
    handles = []
    for layer in layers:
        attention = layer.attn if family == "gpt2" else layer.self_attn
        source = {"gpt2": "c_attn", "deepseek_v3": "kv_b_proj"}.get(family, "v_proj")

        def keep(module: nn.Module, args: Any, output: Tensor, attention: Any = attention) -> None:
            if family == "gpt2":
                values.append(output.chunk(3, -1)[2].unflatten(-1, (4, -1)))
            elif family == "deepseek_v3":
                values.append(output.view(*ids.shape, 4, -1)[..., -attention.v_head_dim :])
            else:
                values.append(output.unflatten(-1, (-1, attention.head_dim)))

        handles.append(getattr(attention, source).register_forward_hook(keep))
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    matrices = []
    for layer in layers:
        if family == "gpt2":
            matrices.append(layer.attn.c_proj.weight.detach())
            continue
        projection = layer.self_attn.o_proj
        if hasattr(projection, "base_layer"):
            change = projection.get_delta_weight("default").detach()
            matrices.append((projection.base_layer.weight.detach() + change).T)
        else:
            matrices.append(projection.weight.detach().T)
    return values, matrices


def slow_influence(pattern: Tensor, value: Tensor, matrix: Tensor, response: Tensor) -> Tensor:
    """FAI of `A[t, s] * norm(W_O v_s)`, one token after the other."""
    batch, heads, tokens, _ = pattern.shape
    size, group = value.shape[-1], heads // value.shape[2]
    found = torch.full((batch, heads, tokens), torch.nan, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            own = matrix[h * size : (h + 1) * size].double()
            for s in range(tokens):
                last = min(s + HORIZON[1], tokens - 1)
                rows = [t for t in range(s + HORIZON[0], last + 1) if response[b, t]]
                if not response[b, s] or not rows:
                    continue
                norm = float((value[b, s, h // group].double() @ own).norm())
                found[b, h, s] = sum(float(pattern[b, h, t, s]) * norm for t in rows) / len(rows)
    return found


def with_lora(model: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["o_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.1)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3", "gemma2", "llama with LoRA"])
def test_weighted_influence_is_that_of_a_loop_over_eager_maps(name: str) -> None:
    """GQA, Conv1D, multi-head latent attention, a norm behind the projection, and LoRA on the projection."""
    family = name.split()[0]
    model, eager = tiny_model(family), tiny_model(family, implementation="eager")
    if "LoRA" in name:
        model, eager = with_lora(model), with_lora(eager)
    before = model_state(model)
    asked: dict[str, Any] = {"horizon": HORIZON, "receiver": True, "entropy": False}
    found = attnprobe.measure(model, BATCH, value_weighted=True, **asked)
    assert_same_state(before, model_state(model))
    values, matrices = values_and_matrices(model, family, IDS)
    with torch.no_grad():
        maps = eager(input_ids=IDS, output_attentions=True).attentions
    for index, pattern in enumerate(maps):
        expected = slow_influence(pattern, values[index], matrices[index], BATCH.response_mask)
        torch.testing.assert_close(
            found.fai[:, index].double(), expected, equal_nan=True, rtol=1e-3, atol=1e-5
        )
    plain = attnprobe.measure(model, BATCH, **asked)
    for part in ("span", "waad", "shares", "span_ignoring"):
        assert torch.equal(getattr(found, part).nan_to_num(), getattr(plain, part).nan_to_num()), part
    assert not torch.equal(found.receiver_kurtosis, plain.receiver_kurtosis)
    assert found.value_weighted
    # A single layer, after which nothing more is run.
    alone = attnprobe.measure(model, BATCH, layers=[1], horizon=HORIZON, value_weighted=True, entropy=False)
    torch.testing.assert_close(alone.fai[:, 0], found.fai[:, 1], equal_nan=True, rtol=1e-5, atol=1e-6)


def test_generation_ends_with_the_weights_of_a_whole_pass() -> None:
    model = tiny_model("llama")
    probe = HeadStatisticsProbe(horizon=HORIZON, value_weighted=True, receiver=True, entropy=False)
    none = torch.zeros(2, 10, dtype=torch.bool)
    with attnprobe.attach(model, probe, response_mask=none), torch.no_grad():
        output = model.generate(
            IDS[:, :10], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
        )
    grown = probe.result()
    batch = TokenBatch.from_ids(output[:, :-1], response_mask=grown.response_mask)
    whole = attnprobe.measure(
        model, batch, horizon=HORIZON, value_weighted=True, receiver=True, entropy=False
    )
    torch.testing.assert_close(grown.fai, whole.fai, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_hooks_of_the_user_see_the_model_only() -> None:
    """What LoRA's parts are given to find their matrix is shown to nobody, and dropout plays no part."""
    model, shapes = with_lora(tiny_model("llama")), []
    projection = model.get_base_model().model.layers[0].self_attn.o_proj
    for part in (projection, projection.base_layer, projection.lora_A["default"]):
        part.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    model.train()
    found = attnprobe.measure(model, BATCH, horizon=HORIZON, value_weighted=True, entropy=False)
    assert shapes == [(2, 20, 32)] * 3
    assert model.training
    expected = attnprobe.measure(model.eval(), BATCH, horizon=HORIZON, value_weighted=True, entropy=False)
    assert torch.equal(found.fai.nan_to_num(), expected.fai.nan_to_num())


def test_what_is_not_the_projected_value_is_refused() -> None:
    """A gate or a norm before the projection, something behind it, maps only, and receivers by sentence."""
    settings: dict[str, Any] = {"value_weighted": True, "entropy": False}
    refused(
        lambda: attnprobe.measure(tiny_model("qwen3_next"), BATCH, **settings),
        "gate",
        error=UnsupportedModelError,
    )
    refused(
        lambda: attnprobe.measure(tiny_model("bloom"), BATCH, **settings), "map", error=UnsupportedModelError
    )
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    normed = copy.deepcopy(model)
    own = normed.model.layers[1].self_attn
    own.o_proj = nn.Sequential(nn.RMSNorm(32), own.o_proj)
    refused(
        lambda: attnprobe.measure(normed, BATCH, **settings), "layer 1", "linear", error=UnsupportedModelError
    )
    kind = type(attention)

    @functools.wraps(kind.forward)
    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, *rest = kind.forward(self, *args, **kwargs)
        return (output * 2, *rest)

    attention.__class__ = type("DoublingAttention", (kind,), {"forward": doubled})
    attnprobe.measure(model, BATCH, layers=[0], **settings)
    for layers in ([1], "all"):
        refused(
            lambda layers=layers: attnprobe.measure(model, BATCH, layers=layers, **settings),
            "layer 1",
            "DoublingAttention",
            error=UnsupportedModelError,
        )
    texts = tuple(tuple("One. Two." for _ in range(20)) for _ in range(2))
    named = TokenBatch(IDS, BATCH.attention_mask, BATCH.response_mask, texts=texts)
    refused(
        lambda: attnprobe.measure(tiny_model("llama"), named, receiver="sentence", **settings),
        "sentence",
        error=ParameterError,
    )


def test_plain_and_weighted_results_do_not_mix() -> None:
    model = tiny_model("llama")
    plain, weighted = (
        attnprobe.measure(model, BATCH, value_weighted=each, receiver=True, entropy=False)
        for each in (False, True)
    )
    with pytest.raises(ResultError, match="value_weighted"):
        attnprobe.HeadStatistics.concatenate([plain, weighted])
    with pytest.raises(ResultError, match="value_weighted"):
        attnprobe.classify_heads([plain, weighted])
    heads = attnprobe.classify_heads(plain)
    scores = [attnprobe.score_tokens(each, heads) for each in (plain, weighted)]
    assert [each.provenance.value_weighted for each in scores] == [False, True]
    with pytest.raises(ResultError, match="value_weighted"):
        attnprobe.TokenScores.concatenate(scores)
    assert "value_weighted" in repr(weighted)
    assert replace(weighted, value_weighted=False) != weighted


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    "norms", [torch.ones(1, 2), -torch.ones(1, 1, 2), "a", torch.full((1, 1, 2), torch.nan)]
)
def test_what_is_no_norm_is_refused(norms: Any) -> None:
    pattern = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    refused(
        lambda: metrics.future_attention_influence(pattern, value_norms=norms),
        "value_norms",
        error=ParameterError,
    )


def test_norms_can_be_observed_but_not_replaced() -> None:
    class Norms(attnprobe.Probe):
        sites = frozenset({"value_norms"})
        seen: dict[int, Tensor]

        def observe(self, site, layer, value, batch):
            assert value.shape == (2, 4, 20)
            return value if layer == replaced else None

    model, replaced = tiny_model("llama"), None
    with attnprobe.attach(model, Norms()), torch.no_grad():
        model(IDS)
    replaced = 1
    with attnprobe.attach(model, Norms()), pytest.raises(attnprobe.InterventionError, match="value_norms"):
        model(IDS)

"""Suppressed attention: held against a forward pass made by hand, and against renormalised patterns."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial

import numpy
import pytest
import torch
import transformers

import attnprobe
from attnprobe.errors import InterventionError, ParameterError, UnsupportedModelError
from attnprobe.testing.backends import BACKENDS
from attnprobe.testing.model_state import assert_same_state, model_state
from attnprobe.testing.reference import dense_pattern
from attnprobe.testing.tiny_models import FAMILIES, VOCABULARY, tiny_model

TOKENS = 14
IDS = torch.randint(1, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(6))


# ---- a Llama by hand --------------------------------------------------------------------------


def llama_by_hand(model, ids: torch.Tensor, removed: torch.Tensor, mode: str = "mask") -> torch.Tensor:
    """Llama in float64, from its weights alone; `removed` is `[layer, head, query, key]`."""
    config = model.config
    heads, key_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    weights = {name: value.double() for name, value in model.state_dict().items()}

    def norm(hidden, weight):
        return hidden / (hidden.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    count = ids.shape[1]
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2).double() / size)
    angle = torch.arange(count)[:, None] * torch.cat([frequency, frequency])

    def rotate(states):
        half = torch.cat([-states[..., size // 2 :], states[..., : size // 2]], -1)
        return states * angle.cos() + half * angle.sin()

    def split(hidden, weight, number):
        return (hidden @ weight.T).unflatten(-1, (number, size)).transpose(1, 2)

    seen = torch.ones(count, count).tril().bool()
    hidden = weights["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        part = {name.removeprefix(f"model.layers.{i}."): value for name, value in weights.items()}
        inner = norm(hidden, part["input_layernorm.weight"])
        query = rotate(split(inner, part["self_attn.q_proj.weight"], heads))
        key = rotate(split(inner, part["self_attn.k_proj.weight"], key_heads))
        value = split(inner, part["self_attn.v_proj.weight"], key_heads)
        key, value = (each.repeat_interleave(heads // key_heads, 1) for each in (key, value))
        weight = (query @ key.mT / size**0.5).exp() * (seen & ~removed[i] if mode == "mask" else seen)
        total = weight.sum(-1, keepdim=True)
        pattern = torch.where(total > 0, weight / total.clamp(min=1e-300), 0.0) * ~removed[i]
        mixed = (pattern @ value).transpose(1, 2).flatten(2)
        hidden = hidden + mixed @ part["self_attn.o_proj.weight"].T
        inner = norm(hidden, part["post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(inner @ part["mlp.gate_proj.weight"].T)
        hidden = hidden + (gate * (inner @ part["mlp.up_proj.weight"].T)) @ part["mlp.down_proj.weight"].T
    return norm(hidden, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def nothing() -> torch.Tensor:
    return torch.zeros(3, 4, TOKENS, TOKENS, dtype=torch.bool)


def key_three() -> torch.Tensor:
    removed = nothing()
    removed[:, :, 4:, 3] = True
    return removed


def some_pairs() -> torch.Tensor:
    removed = nothing()
    for query, key in [(5, 5), (9, 2), (9, 9), (0, 0)]:
        removed[1, 2, query, key] = True
    return removed


def whole_heads() -> torch.Tensor:
    removed = nothing()
    removed[0, [0, 3]] = True
    removed[2, 1] = True
    return removed


def chosen_queries() -> torch.Tensor:
    removed = nothing()
    removed[:2, :, 8, [1, 7]] = True
    removed[:2, :, 10, [1, 7]] = True
    return removed


CHOICES = [
    ({"keys": [3]}, key_three),
    ({"pairs": [(5, 5), (9, 2), (9, 9), (0, 0)], "layers": [1], "heads": [2]}, some_pairs),
    ({"heads": {0: [0, 3], 2: [1]}}, whole_heads),
    ({"keys": [1, 7], "queries": [8, 10], "layers": [0, 1]}, chosen_queries),
    ({"keys": torch.arange(TOKENS) == 3}, key_three),
]


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("chosen", "removed"), CHOICES)
@pytest.mark.parametrize("mode", ["mask", "value"])
def test_logits_are_those_of_a_forward_by_hand(backend, implementation, chosen, removed, mode) -> None:
    model = BACKENDS[backend](tiny_model("llama", implementation=implementation))
    by_hand = tiny_model("llama")
    with torch.no_grad(), attnprobe.suppress_attention(model, **chosen, mode=mode):
        logits = model(IDS)
    logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    expected = llama_by_hand(by_hand, IDS, removed(), mode)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    plain = llama_by_hand(by_hand, IDS, nothing())
    torch.testing.assert_close(by_hand(IDS).logits.double(), plain, rtol=1e-4, atol=1e-4)
    assert float((plain - expected).abs().max()) > 0.01


# ---- every family -------------------------------------------------------------------------------


def _taken_out(mode, module, query, key, value, mask, *args, scaling=None, **options):
    """Attention whose probabilities are taken out after the softmax; with "mask" others are scaled up."""
    pattern = dense_pattern(
        query,
        key,
        scaling=scaling,
        mask=mask,
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
        bias=options.get("position_bias"),
    )
    # A query that may see nothing reads zeros, in every implementation that real tokens depend on.
    taken = pattern * REMOVED
    left = 1 - taken.sum(-1, keepdim=True) if mode == "mask" else torch.ones(())
    pattern = torch.where(left > 1e-12, (pattern - taken) / left.clamp(min=1e-12), 0.0)
    groups = query.shape[1] // value.shape[1]
    mixed = pattern @ value.double().repeat_interleave(groups, 1)
    return mixed.transpose(1, 2).to(query.dtype).contiguous(), None


REMOVED = torch.zeros(4, TOKENS, TOKENS, dtype=torch.bool)
REMOVED[:, 6:, 5] = True
REMOVED[1, 11, 11] = True


@pytest.mark.parametrize(
    ("mode", "side"), [("mask", "none"), ("mask", "left"), ("mask", "right"), ("value", "left")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loses_what_was_taken_out(
    family: str, mode: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, sinks, soft caps, grouped queries, padding: taking out before the softmax and after agree.

    Values are taken out after it, and nothing is scaled up.
    """
    model = tiny_model(family)
    try:
        with attnprobe.suppress_attention(model, keys=[5]):
            pass
    except UnsupportedModelError as refusal:
        pytest.skip(str(refusal))
    arguments = {"input_ids": IDS}
    real = torch.ones(2, TOKENS, dtype=torch.bool)
    if side != "none":
        real[0, slice(0, 4) if side == "left" else slice(TOKENS - 4, TOKENS)] = False
        arguments |= {"attention_mask": real.long(), "position_ids": (real.cumsum(-1) - 1).clamp(min=0)}
        if family == "opt":
            del arguments["position_ids"]
    with torch.no_grad():
        expected_model = tiny_model(family)
        plain = expected_model(**arguments).logits
        expected_model = tiny_model(family, implementation="eager")
        with monkeypatch.context() as patch:
            # Not under a name of its own: sparse families drop their mask when they do not know the name.
            interface = transformers.AttentionInterface
            patch.setattr(interface, "get_interface", lambda *_: partial(_taken_out, mode))
            expected = expected_model(**arguments).logits
        with (
            attnprobe.suppress_attention(model, keys=[5], mode=mode),
            attnprobe.suppress_attention(model, pairs=[(11, 11)], heads=[1], mode=mode),
        ):
            logits = model(**arguments).logits
    scale = float(expected[real].abs().max())
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-4 * max(1, scale))
    assert float((plain - expected)[real].abs().max()) > 1e-4 * max(1, scale)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("mode", ["mask", "value"])
def test_columns_go_on_through_a_cache(family: str, cache: str | None, mode: str) -> None:
    """Steps with a KV cache give the logits of one pass over the whole, also where windows drop keys."""
    chosen = {"keys": [2, 9], "queries": torch.arange(TOKENS) != 12, "mode": mode}
    model = tiny_model(family)
    with torch.no_grad(), attnprobe.suppress_attention(model, **chosen):
        whole = model(IDS, use_cache=False).logits
        if cache is None:
            past = transformers.DynamicCache(config=model.config)
        else:
            past = transformers.StaticCache(config=model.config, max_cache_len=TOKENS + 3)
        steps = [model(IDS[:, :6], past_key_values=past, use_cache=True).logits]
        for column in range(6, TOKENS):
            steps.append(model(IDS[:, column : column + 1], past_key_values=past, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_probes_see_the_suppressed_attention() -> None:
    """What a probe reads is what the model used, checked against its output: rows sum to 1 again."""
    model = tiny_model("llama")
    patterns = {}

    class Patterns(attnprobe.Probe):
        def observe(self, site, layer, value, batch) -> None:
            patterns[layer] = value.rows(torch.arange(value.query_count))

    with (
        torch.no_grad(),
        attnprobe.suppress_attention(model, keys=[3]),
        attnprobe.suppress_attention(model, layers=[1], heads=[2]),
        attnprobe.attach(model, Patterns()),
    ):
        model(IDS)
    for layer, pattern in patterns.items():
        assert bool((pattern[:, :, 4:, 3] == 0).all())
        mass = torch.ones(2, 4, TOKENS)
        if layer == 1:
            mass[:, 2] = 0.0
        torch.testing.assert_close(pattern.sum(-1), mass, rtol=0, atol=1e-5)


class Outputs(attnprobe.Probe):
    """The pattern and the attention output of each layer."""

    sites = frozenset({"attention", "attention_output"})

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], torch.Tensor] = {}

    def observe(self, site, layer, value, batch) -> None:
        if site == "attention":
            value = value.rows(torch.arange(value.query_count))
        self.seen[site, layer] = value


def outputs_of(model, *blocks) -> tuple[torch.Tensor, dict]:
    probe = Outputs()
    with ExitStack() as stack, torch.no_grad():
        for block in blocks:
            stack.enter_context(block)
        stack.enter_context(attnprobe.attach(model, probe))
        return model(IDS).logits, probe.seen


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_values_go_but_weights_stay(family: str) -> None:
    """Also in what a probe sees; and what no pair touches keeps its bits."""
    model = tiny_model(family)
    plain, before = outputs_of(model)
    changed, after = outputs_of(
        model, attnprobe.suppress_attention(model, keys=[6], layers=[1], heads=[0], mode="value")
    )
    assert torch.equal(before["attention", 1], after["attention", 1])
    outputs = before["attention_output", 1], after["attention_output", 1]
    assert torch.equal(outputs[0][:, :7], outputs[1][:, :7])
    assert bool((outputs[0][:, 7:] != outputs[1][:, 7:]).any(-1).all())
    assert torch.equal(plain[:, :7], changed[:, :7])
    # A key that no query comes after: nothing is removed.
    last, _ = outputs_of(model, attnprobe.suppress_attention(model, keys=[TOKENS - 1], mode="value"))
    assert torch.equal(last, plain)


def test_removals_of_values_add_up_and_a_pair_goes_once() -> None:
    model = tiny_model("llama")

    def without(**chosen) -> object:
        return attnprobe.suppress_attention(model, **chosen, mode="value")

    expected, _ = outputs_of(model, without(keys=[3, 5]))
    nested, _ = outputs_of(model, without(keys=[3, 5]), without(keys=[5]))
    assert torch.equal(nested, expected)
    # A masked pair has no weight whose value could go.
    both, _ = outputs_of(model, attnprobe.suppress_attention(model, keys=[5]), without(keys=[5]))
    masked, _ = outputs_of(model, attnprobe.suppress_attention(model, keys=[5]))
    torch.testing.assert_close(both, masked)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_what_is_left_without_the_other_keys_is_a_tokens_own_value(implementation: str) -> None:
    model = tiny_model("llama", implementation=implementation)
    values = []
    hook = model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda *got: values.append(got[2]))
    _, seen = outputs_of(model, attnprobe.suppress_attention(model, keys=range(TOKENS), mode="value"))
    hook.remove()
    own = seen["attention", 0].diagonal(dim1=2, dim2=3)  # [batch, head, token]
    value = values[0].unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(2, 1)
    kept = (own[..., None] * value).transpose(1, 2).flatten(2)
    expected = model.model.layers[0].self_attn.o_proj(kept)
    torch.testing.assert_close(seen["attention_output", 0], expected, rtol=1e-4, atol=1e-6)
    # And without any, nothing at all.
    _, seen = outputs_of(model, attnprobe.suppress_attention(model, layers=[0], mode="value"))
    assert not bool(seen["attention_output", 0].any())


def test_values_go_under_implementations_that_take_no_mask_of_pairs() -> None:
    """An implementation of one's own, in the style of flash attention."""
    model, reference = tiny_model("llama"), tiny_model("llama")

    def flash(module, query, key, value, mask, scaling=None, **options):
        assert mask is None
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2), None

    transformers.AttentionInterface.register("test_flash", flash)
    transformers.AttentionMaskInterface.register("test_flash", lambda *_, **__: None)
    model.config._attn_implementation = "test_flash"
    with pytest.raises(UnsupportedModelError, match='mode="value"'):
        outputs_of(model, attnprobe.suppress_attention(model, keys=[3]))
    ours, theirs = (
        outputs_of(each, attnprobe.suppress_attention(each, keys=[3], mode="value"))[0]
        for each in (model, reference)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_values_are_not_removed_with_gradients_or_dropout() -> None:
    model = tiny_model("llama", attention_dropout=0.5)
    block = {"keys": [3], "mode": "value"}
    with attnprobe.suppress_attention(model, **block), pytest.raises(InterventionError, match="no_grad"):
        model(IDS)
    model.train()
    with (
        torch.no_grad(),
        attnprobe.suppress_attention(model, **block),
        pytest.raises(InterventionError, match="dropout"),
    ):
        model(IDS)


def test_divergence_of_next_token_distributions() -> None:
    """The causal measure that it is for: how far later predictions move when a token is not read."""
    model = tiny_model("qwen3")
    with torch.no_grad():
        plain = model(IDS).logits.log_softmax(-1)
        with attnprobe.suppress_attention(model, keys=[5]):
            without = model(IDS).logits.log_softmax(-1)
    divergence = (plain.exp() * (plain - without)).sum(-1)
    assert bool((divergence[:, :6].abs() < 1e-6).all())
    assert bool((divergence[:, 6:] > 1e-6).all())


def test_rows_of_a_batch_can_differ() -> None:
    model = tiny_model("llama")
    keys = torch.zeros(2, TOKENS, dtype=torch.bool)
    keys[0, 3] = keys[1, 7] = True
    with torch.no_grad():
        with attnprobe.suppress_attention(model, keys=keys):
            together = model(IDS).logits
        for row, key in ((0, 3), (1, 7)):
            with attnprobe.suppress_attention(model, keys=[key]):
                alone = model(IDS[row : row + 1]).logits[0]
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


def test_gradients_are_finite_where_a_head_sees_nothing() -> None:
    for implementation in ("eager", "sdpa"):
        model = tiny_model("llama", implementation=implementation)
        with attnprobe.suppress_attention(model, heads=[0]):
            model(IDS, labels=IDS).loss.backward()
        assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_the_model_is_left_as_it_was(backend: str) -> None:
    model = BACKENDS[backend](tiny_model("llama"))
    inner = attnprobe.adapter_for(model).model
    with torch.no_grad():
        model(IDS)
        before = model_state(inner)
        with pytest.raises(ZeroDivisionError), attnprobe.suppress_attention(model, keys=[1]):
            model(IDS * (1 // 0))
        with pytest.raises(ParameterError), attnprobe.suppress_attention(model, heads=[9]):
            model(IDS)
    assert_same_state(before, model_state(inner))


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"keys": [3], "mode": "zero"}, r"mode .*mask.*value.* got 'zero'"),
        ({"keys": []}, r"keys .* at least one.* got \[\]"),
        ({"keys": [-1]}, r"keys .* got -1"),
        ({"keys": "a"}, "keys .* got 'a'"),
        ({"keys": [0.5, 1.0]}, r"keys .* got \[0.5, 1.0\]"),
        ({"keys": [float("nan")]}, "keys .* got .nan"),
        ({"keys": torch.ones(5)}, r"keys .* a float32 tensor \[5\]"),
        ({"keys": True}, "keys .* a bool tensor"),
        ({"keys": {3: 4}}, "keys .* got {3: 4}"),
        ({"keys": torch.tensor([[0, 1, 2]])}, r"keys .* int64 tensor \[1, 3\] with 2 in it"),
        ({"keys": [10**12]}, "keys .* got 1000000000000"),
        ({"keys": [3], "queries": "b"}, "queries .* got 'b'"),
        ({"pairs": "ab"}, "pairs .* got 'ab'"),
        ({"pairs": [(2.0, 1.0)]}, r"pairs .* float32 \[1, 2\]"),
        ({"pairs": []}, r"pairs .* \[0\]"),
        ({"heads": "some"}, "heads .* got 'some'"),
        ({"heads": [0.5]}, "heads .* got 0.5"),
        ({"heads": {1: []}}, "heads .* no head"),
        ({"heads": {"a": [0]}}, "layer of heads .* 'a'"),
        ({"heads": {}}, "heads .* no head"),
        ({"queries": [3]}, "give keys too"),
        ({"pairs": [(2, 3)]}, "0 <= key <= query"),
        ({"pairs": [(1, 2, 3)]}, r"\[pair, 2\]; got int64 \[1, 3\]"),
        ({"heads": []}, "heads .* no head"),
        ({"layers": [7]}, r"layers \[7\] cannot be read"),
        ({"heads": {7: [0]}}, r"layers \[7\], .*\[0, 1, 2\]"),
        ({"heads": {1: [0]}, "layers": [2]}, r"layers \[1\], .*\[2\]"),
        ({"heads": {(0, 1): 1.0, (1, 1): 0.5}}, "weights must be equal"),
        ({"keys": torch.zeros(1, 2, 3, dtype=torch.bool)}, r"\[batch or 1, token\]; got .*\[1, 2, 3\]"),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_choices_that_make_no_sense_are_refused(chosen: dict, message: str) -> None:
    """At the call: before the block opens, and whether it ever does."""
    with pytest.raises(ParameterError, match=message):
        attnprobe.suppress_attention(tiny_model("llama"), **chosen)


@pytest.mark.parametrize(
    "keys",
    [
        3,
        [3],
        (3,),
        {3},
        range(3, 4),
        iter([3]),
        numpy.array([3]),
        numpy.int64(3),
        torch.tensor(3),
        torch.tensor([3]),
        numpy.arange(TOKENS) == 3,
        (torch.arange(TOKENS) == 3).long(),
        (torch.arange(TOKENS) == 3)[None].expand(2, -1),
        (torch.arange(TOKENS) == 3)[None].int().expand(2, -1),
        (torch.arange(TOKENS) == 3).tolist(),
        (torch.arange(TOKENS) == 3).int().tolist(),
        [(torch.arange(TOKENS) == 3).int().tolist()] * 2,
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_columns_are_numbers_or_a_mask(keys) -> None:
    """A mask of 0 and 1 is one, and does not stand for columns 0 and 1."""
    model = tiny_model("llama")
    with torch.no_grad():
        with attnprobe.suppress_attention(model, pairs=[(query, 3) for query in range(4, TOKENS)]):
            expected = model(IDS).logits
        with attnprobe.suppress_attention(model, keys=keys):
            assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize(
    ("keys", "columns"),
    [
        ([0, 1], [0, 1]),
        ([1], [1]),
        (torch.tensor([0, 1]), [0, 1]),
        ([False, True], [1]),
        ([0, 1, 0], [1]),
        ([[0, 1]], [1]),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_few_zeros_and_ones_are_numbers(keys, columns: list[int]) -> None:
    """Two whole numbers may be columns; a mask that short is boolean, or has a line for each example."""
    model = tiny_model("llama")
    with torch.no_grad():
        removed = [(query, key) for key in columns for query in range(key + 1, TOKENS)]
        with attnprobe.suppress_attention(model, pairs=removed):
            expected = model(IDS).logits
        with attnprobe.suppress_attention(model, keys=keys):
            assert torch.equal(model(IDS).logits, expected)


def test_a_forgotten_with_is_told() -> None:
    model = tiny_model("llama")
    with pytest.warns(RuntimeWarning, match=r"with suppress_attention\(...\)"):
        attnprobe.suppress_attention(model, keys=[3])


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"heads": [4]}, r"\(0, 4\).* heads 0\.\.3"),
        ({"keys": torch.ones(3, TOKENS, dtype=torch.bool)}, "given for 3 examples, but the model runs 2"),
    ],
)
def test_choices_that_the_call_does_not_have_are_refused(chosen: dict, message: str) -> None:
    model = tiny_model("llama")
    with (
        torch.no_grad(),
        pytest.raises(ParameterError, match=message),
        attnprobe.suppress_attention(model, **chosen),
    ):
        model(IDS)


def test_families_without_an_attention_call_are_refused() -> None:
    with (
        pytest.raises(
            UnsupportedModelError, match="BloomForCausalLM does not look up its attention function"
        ),
        attnprobe.suppress_attention(tiny_model("bloom"), keys=[1]),
    ):
        pass


def test_implementations_without_a_mask_of_pairs_are_refused() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with (
        torch.no_grad(),
        pytest.raises(
            UnsupportedModelError,
            match=r'flash_attention_2 implementation.*set_attn_implementation\("sdpa"\)',
        ),
        attnprobe.suppress_attention(model, keys=[1]),
    ):
        model(IDS)


def test_gradient_checkpointing_is_refused() -> None:
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable()
    with (
        pytest.raises(InterventionError, match="cannot be suppressed under gradient checkpointing"),
        attnprobe.suppress_attention(model, keys=[1]),
    ):
        model(IDS, labels=IDS)
    assert math.isfinite(model(IDS, labels=IDS).loss.item())

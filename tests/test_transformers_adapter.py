"""The transformers adapter: what it reads is what the model computed, and the model stays as it was."""

from __future__ import annotations

import inspect
import sys
import threading

import pytest
import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import attnprobe
from attnprobe import metrics
from attnprobe.adapters import adapter_for
from attnprobe.attention.listening import carries_positions
from attnprobe.errors import AttnprobeError, IncompleteRunError, ParameterError, UnsupportedModelError
from attnprobe.testing.model_state import assert_same_state, model_state
from attnprobe.testing.tiny_models import FAMILIES, VOCABULARY, tiny_model

HYBRID = {"qwen3_next", "jamba", "lfm2", "minimax"}


def runs_sdpa(family: str) -> bool:
    """Whether a family of the installed transformers computes its attention by sdpa too."""
    if family not in transformers.CONFIG_MAPPING:
        return False
    config = transformers.AutoConfig.for_model(family)
    # Older versions of transformers say so of Gemma 2, and then leave its soft cap out.
    caps = getattr(config, "attn_logit_softcapping", None) is not None
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa and not caps


CASES = [
    (family, implementation)
    for family in FAMILIES
    for implementation in ("eager", "sdpa")
    if implementation == "eager" or runs_sdpa(family)
]


class CollectPatterns(attnprobe.Probe):
    """Keeps the whole pattern of each layer."""

    def __init__(self) -> None:
        self.patterns: dict[int, torch.Tensor] = {}

    def observe(self, site, layer, value, batch) -> None:
        self.patterns[layer] = value.rows(torch.arange(value.query_count))


def padded_call(model, side: str, tokens: int = 30, padding: int = 7) -> tuple[dict, torch.Tensor]:
    """Two sequences, the first padded on a side, as a careful user would pass them."""
    ids = torch.randint(1, VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[0, slice(0, padding) if side == "left" else slice(tokens - padding, tokens)] = 0
    call = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        call["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return call, mask.bool()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "implementation"), [case for case in CASES if case[0] not in HYBRID])
def test_patterns_equal_eager_maps(family: str, implementation: str, side: str) -> None:
    """Every family, attached to the user's own padded call: the maps of eager attention, to 1e-5."""
    model = tiny_model(family, implementation=implementation)
    call, real = padded_call(model, side)
    with torch.no_grad():
        eager = tiny_model(family, implementation="eager")(**call, output_attentions=True)
        probe = CollectPatterns()
        with attnprobe.attach(model, probe) as attached:
            model(**call)
    # Which families look their attention function up depends on the version of transformers. Falcon calls
    # PyTorch's attention itself, unless it computes maps.
    looks_up = hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")
    dense = not looks_up and (family, implementation) != ("falcon", "sdpa")
    assert attached.adapter.reads == ("dense" if dense else "factored")
    assert sorted(probe.patterns) == list(range(len(eager.attentions)))
    for layer, expected in enumerate(eager.attentions):
        rows = real[:, None, :, None]
        torch.testing.assert_close(probe.patterns[layer] * rows, (expected * rows).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["mistral", "gpt2", "gpt_oss", "bloom"])
def test_each_row_of_a_padded_batch_equals_the_row_alone(family: str, side: str) -> None:
    """Padding, on whichever side, and the other rows of a batch change nothing."""
    model = tiny_model(family)
    call, real = padded_call(model, side, tokens=60)
    starts = real.int().argmax(-1) + 9
    batch = attnprobe.TokenBatch.from_ids(call["input_ids"], call["attention_mask"], response_start=starts)
    together = attnprobe.measure(model, batch, horizon=(2, 6), receiver=True)
    assert together.receiver_kurtosis is not None
    # Where every layer has a window of 7, nothing is 10 tokens away: kurtosis is undefined.
    windowed = family in ("mistral", "gemma3_text")
    assert bool(together.receiver_kurtosis.isnan().all()) == windowed
    for row in range(2):
        kept = real[row].nonzero()[:, 0]
        alone = attnprobe.measure(
            model,
            attnprobe.TokenBatch.from_ids(call["input_ids"][row, kept], response_start=9),
            horizon=(2, 6),
            receiver=True,
        )
        for name in ("span", "receiver_kurtosis"):
            expected = getattr(alone, name)[0]
            torch.testing.assert_close(
                getattr(together, name)[row], expected, equal_nan=True, rtol=1e-4, atol=1e-4
            )
        for name in ("waad", "fai", "entropy"):
            values = getattr(together, name)[row]
            torch.testing.assert_close(
                values[..., kept], getattr(alone, name)[0], equal_nan=True, rtol=1e-4, atol=1e-4
            )
            padding = (~real[row]).nonzero()[:, 0]
            assert bool(values[..., padding].isnan().all())


@pytest.mark.parametrize(
    ("family", "implementation"), [("llama", "eager"), ("gemma3_text", "eager"), ("gpt2", "eager")]
)
def test_measure_equals_metrics_of_eager_maps(family: str, implementation: str) -> None:
    model = tiny_model(family, implementation=implementation)
    ids = torch.randint(1, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(2))
    batch = attnprobe.TokenBatch.from_ids(ids, response_start=12)
    measured = attnprobe.measure(model, batch, window=5, horizon=(3, 9))
    with torch.no_grad():
        eager = tiny_model(family, implementation="eager")(ids, output_attentions=True)
    mask = batch.response_mask
    for layer, pattern in enumerate(eager.attentions):
        expected = {
            "span": metrics.mean_attention_distance(pattern, mask),
            "waad": metrics.windowed_attention_distance(pattern, mask, 5),
            "fai": metrics.future_attention_influence(pattern, mask, (3, 9)),
        }
        for name, values in expected.items():
            torch.testing.assert_close(
                getattr(measured, name)[:, layer], values, equal_nan=True, rtol=1e-4, atol=1e-4
            )
    entropy = metrics.token_entropy(eager.logits, mask)
    torch.testing.assert_close(measured.entropy, entropy, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "bloom"])
def test_bfloat16_models_are_read_to_bfloat16_precision(family: str) -> None:
    """The same weights in bfloat16: statistics in float32, near those of float32."""
    ids = torch.randint(1, VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(3))
    batch = attnprobe.TokenBatch.from_ids(ids, response_start=5)
    precise = attnprobe.measure(tiny_model(family), batch)
    rounded = attnprobe.measure(tiny_model(family).to(torch.bfloat16), batch)
    assert rounded.waad.dtype == torch.float32
    # Rounding of activations, over three layers, moves sharp attention by a few per cent.
    assert float((precise.span[:, 0] - rounded.span[:, 0]).abs().max()) < 0.2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_rows_equal_the_sequences_alone(implementation: str) -> None:
    """Three sequences in one row: measured one by one, and read block-diagonally when attached."""
    model = tiny_model("llama", implementation=implementation)
    lengths = [12, 20, 9]
    ids = torch.randint(1, VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(4))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    response = positions >= 4
    batch = attnprobe.TokenBatch.from_ids(ids, response_mask=response, position_ids=positions)
    packed = attnprobe.measure(model, batch, horizon=(2, 6))
    probe = attnprobe.HeadStatisticsProbe(horizon=(2, 6))
    with attnprobe.attach(model, probe, response_mask=response), torch.no_grad():
        model(ids, position_ids=positions, use_cache=False)
    attached = probe.result()
    spans, start = [], 0
    for length in lengths:
        columns = slice(start, start + length)
        alone = attnprobe.measure(
            model, attnprobe.TokenBatch.from_ids(ids[:, columns], response_start=4), horizon=(2, 6)
        )
        for name in ("waad", "fai"):
            expected = getattr(alone, name)
            torch.testing.assert_close(
                getattr(packed, name)[..., columns], expected, equal_nan=True, rtol=1e-4, atol=1e-4
            )
            torch.testing.assert_close(
                getattr(attached, name)[..., columns], expected, equal_nan=True, rtol=1e-4, atol=1e-4
            )
        spans.append(alone.span * (length - 4))
        start += length
    expected_span = sum(spans) / (sum(lengths) - 12)
    torch.testing.assert_close(packed.span, expected_span, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(attached.span, expected_span, rtol=1e-4, atol=1e-4)


# ---- the model stays as it was ------------------------------------------------------------------


def fingerprint(model) -> tuple:
    """Everything about a model that reading it could change."""
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), module.training)
        for name, module in model.named_modules()
    ]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    forwards = [vars(module).get("forward") for module in model.modules()]
    return type(model), model.config._attn_implementation, hooks, forwards, weights


def assert_same(before: tuple, after: tuple) -> None:
    assert before[:4] == after[:4]
    assert before[4].keys() == after[4].keys()
    assert all(torch.equal(before[4][name], after[4][name]) for name in before[4])


@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_outputs_do_not_change_by_a_bit(family: str, implementation: str) -> None:
    """Logits of real tokens while attached equal those without, and so do all other outputs."""
    model = tiny_model(family, implementation=implementation)
    call, real = padded_call(model, "left")
    before = fingerprint(model)
    with torch.no_grad():
        plain = model(**call)
        with attnprobe.attach(model, CollectPatterns()):
            attached = model(**call)
    assert type(plain) is type(attached)
    assert list(plain.keys()) == list(attached.keys())
    if family == "falcon" and implementation == "sdpa":
        # Falcon shows its maps under eager attention only: equal to rounding.
        torch.testing.assert_close(plain.logits[real], attached.logits[real], rtol=1e-4, atol=1e-3)
    else:
        assert torch.equal(plain.logits, attached.logits)
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("training", [True, False])
def test_measure_leaves_the_model_as_it_was(family: str, training: bool) -> None:
    model = tiny_model(family).train(training)
    before = fingerprint(model)
    attnprobe.measure(model, attnprobe.TokenBatch.from_ids([[1, 2, 3, 4]]), entropy=False)
    attnprobe.measure(model, attnprobe.TokenBatch.from_ids([[1, 2, 3, 4]]))
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_failing_probe_leaves_the_model_as_it_was(family: str) -> None:
    """Also when a probe raises in the middle of the forward pass; the next pass works."""

    class Failing(attnprobe.Probe):
        def observe(self, site, layer, value, batch) -> None:
            if layer == 1:
                raise RuntimeError("of the probe's own")

    model = tiny_model(family)
    before = fingerprint(model)
    statistics = attnprobe.HeadStatisticsProbe()
    with attnprobe.attach(model, statistics):
        with (
            pytest.raises(RuntimeError, match="of the probe's own"),
            attnprobe.attach(model, Failing()),
        ):
            model(torch.tensor([[1, 2, 3]]))
        model(torch.tensor([[1, 2, 3, 4]]))
    assert statistics.result().waad.shape[-1] == 4
    assert_same(before, fingerprint(model))


def test_probes_nest_and_come_several_at_once() -> None:
    model = tiny_model("llama")
    first, second, inner = CollectPatterns(), CollectPatterns(), CollectPatterns()
    with attnprobe.attach(model, first, second, layers=[0, 2]), torch.no_grad():
        with attnprobe.attach(model, inner, layers=[1]):
            model(torch.tensor([[1, 2, 3]]))
        model(torch.tensor([[1, 2, 3]]))
    assert sorted(first.patterns) == sorted(second.patterns) == [0, 2]
    assert sorted(inner.patterns) == [1]
    assert model.config._attn_implementation == "sdpa"


def test_two_models_run_in_two_threads() -> None:
    """Each thread with its own model gets its own numbers."""
    batch = attnprobe.TokenBatch.from_ids([list(range(1, 30))], response_start=5)
    models = [tiny_model("llama", seed=seed) for seed in (0, 1)]
    expected = [attnprobe.measure(model, batch).span for model in models]
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def work(i: int) -> None:
        for _ in range(5):
            found[i].append(attnprobe.measure(models[i], batch).span)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        assert len(found[i]) == 5
        assert all(torch.equal(span, expected[i]) for span in found[i])


def test_gradient_checkpointing_is_counted_once() -> None:
    """The recomputation in the backward pass is not another forward pass, and gradients do not change."""
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    gradients = []
    for attached in (False, True):
        model = tiny_model("llama").train()
        model.gradient_checkpointing_enable()
        probe = attnprobe.HeadStatisticsProbe(entropy=False)
        if attached:
            with attnprobe.attach(model, probe):
                model(ids, labels=ids).loss.backward()
            assert probe.result().waad.shape[0] == 1
        else:
            model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_our_own_passes_ride_on_the_models_kernel() -> None:
    """There the values carry positions along where `measure` wants them: the same numbers, to rounding."""
    model = tiny_model("llama", implementation="sdpa")
    ids = torch.randint(1, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(8))
    batch = attnprobe.TokenBatch.from_ids(ids)
    known: list[bool] = []

    class Known(attnprobe.Probe):
        def observe(self, site, layer, value, batch) -> None:
            known.append(value._sums.mean_position is not None)

    def pass_of_ours() -> None:
        known.clear()
        with attnprobe.attach(model, Known()) as attached:
            attached.adapter.forward(batch)

    statistics = attnprobe.HeadStatisticsProbe(entropy=False)
    with attnprobe.attach(model, Known(), statistics), torch.no_grad():
        model(ids)
    # A user's output is not to change by a bit: the log-sum-exp comes along, the positions do not.
    assert known == [False] * 3
    pass_of_ours()
    assert known == [False] * 3
    with carries_positions():
        pass_of_ours()
    assert known == [True] * 3
    for span in (True, False):
        known.clear()
        with attnprobe.attach(model, Known()):
            measured = attnprobe.measure(model, batch, entropy=False, span=span)
        assert known == [span] * 3
    measured = attnprobe.measure(model, batch, entropy=False)
    torch.testing.assert_close(measured.span, statistics.result().span, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(measured.waad, statistics.result().waad, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_pass_of_the_users_inside_one_of_ours_does_not_change_by_a_bit() -> None:
    """A hook may run another model that is watched too: the positions are for our own pass only."""
    model, other = (tiny_model("llama", implementation="sdpa") for _ in range(2))
    ids = torch.randint(1, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        expected = other(ids).logits
    found: list[torch.Tensor] = []
    probe = attnprobe.HeadStatisticsProbe()

    def hook(*_: object) -> None:
        with torch.no_grad(), attnprobe.attach(other, probe):
            found.append(other(ids).logits)

    model.model.layers[1].register_forward_hook(hook)
    attnprobe.measure(model, attnprobe.TokenBatch.from_ids(ids))
    assert len(found) == 1
    assert torch.equal(found[0], expected)


class Told(attnprobe.Probe):
    """Writes down what a probe is told of a pass."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def begin(self, batch) -> None:
        self.events.append("begin")

    def observe(self, site, layer, value, batch) -> None:
        self.events.append(f"layer {layer}")

    def end(self, batch) -> None:
        self.events.append("end")

    def abort(self) -> None:
        self.events.append("abort")


def test_a_pass_that_ends_early_is_complete_for_nobody_else() -> None:
    """An inner `measure` is done after its last layer; to an outer probe of the user, the pass broke off."""
    model = tiny_model("llama")
    before = model_state(model)
    batch = attnprobe.TokenBatch.from_ids([[1, 2, 3, 4]])
    expected = attnprobe.measure(model, batch, layers=[0, 1], entropy=False)
    outer, inner = Told(), Told()
    with attnprobe.attach(model, outer):
        found = attnprobe.measure(model, batch, layers=[0, 1], entropy=False)
        assert outer.events == ["begin", "layer 0", "layer 1", "abort"]
        outer.events.clear()
        with attnprobe.attach(model, inner, layers=[0]) as attached:
            attached.adapter.forward(batch)
        assert inner.events == ["begin", "layer 0", "end"]
        assert outer.events == ["begin", "layer 0", "abort"]
        outer.events.clear()
        with torch.no_grad():
            model(batch.input_ids)
        assert outer.events == ["begin", "layer 0", "layer 1", "layer 2", "end"]
    assert torch.equal(found.span, expected.span)
    assert_same_state(before, model_state(model))


def test_an_error_at_the_end_of_a_pass_that_ends_early_comes_through() -> None:
    """And the next pass is run as if nothing had been."""
    model = tiny_model("llama").train()
    before = model_state(model)
    batch = attnprobe.TokenBatch.from_ids([[1, 2, 3, 4]])

    class Failing(Told):
        fails = True

        def end(self, batch) -> None:
            if self.fails:
                raise KeyError("of the probe's own")
            super().end(batch)

    probe = Failing()
    with attnprobe.attach(model, probe, layers=[1]) as attached:
        with pytest.raises(KeyError, match="of the probe's own"):
            attached.adapter.forward(batch)
        probe.fails = False
        probe.events.clear()
        attached.adapter.forward(batch)
        assert probe.events == ["begin", "layer 1", "end"]
        probe.events.clear()
        # A pass of the user's goes to its end, and is told of once.
        assert model(batch.input_ids).logits.shape == (1, 4, VOCABULARY)
        assert probe.events == ["begin", "layer 1", "end"]
    assert_same_state(before, model_state(model))


def test_no_pass_is_complete_before_it_was_checked() -> None:
    """If an attention was read otherwise than the model computed it, probes are told to forget the pass."""
    model = tiny_model("llama")
    told = Told()

    def halved(module, query, key, value, mask, *args, **options):
        return sdpa_attention_forward(module, query * 0.5, key, value, mask, *args, **options)

    transformers.AttentionInterface.register("halved", halved)
    transformers.AttentionMaskInterface.register("halved", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("halved")
    with torch.no_grad(), attnprobe.attach(model, told), pytest.raises(IncompleteRunError, match="layer 0"):
        model(torch.tensor([[1, 2, 3, 4, 5]]))
    assert told.events == ["begin", "layer 0", "layer 1", "layer 2", "abort"]


def test_the_base_model_can_be_called_alone() -> None:
    model = tiny_model("llama")
    probe = CollectPatterns()
    with attnprobe.attach(model, probe), torch.no_grad():
        model.model(torch.tensor([[1, 2, 3]]))
    assert sorted(probe.patterns) == [0, 1, 2]


def test_nothing_above_the_last_layer_is_run_without_entropy() -> None:
    model = tiny_model("llama")
    ran = []
    model.model.layers[2].register_forward_hook(lambda *_: ran.append("layer 2"))
    model.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    batch = attnprobe.TokenBatch.from_ids([[1, 2, 3]])
    attnprobe.measure(model, batch, layers=[0, 1], entropy=False)
    assert ran == []
    attnprobe.measure(model, batch, layers=[0, 1])
    assert ran == ["layer 2", "head"]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_results_do_not_depend_on_the_chunk(size: int) -> None:
    model = tiny_model("qwen3")
    rows = [list(range(1, n)) for n in (20, 12, 31)]
    batch = attnprobe.TokenBatch.from_ids(rows, response_start=5)
    whole = attnprobe.measure(model, batch, receiver=True, horizon=(2, 6))
    parts = attnprobe.measure(model, batch, receiver=True, horizon=(2, 6), batch_size=size)
    for name in ("span", "waad", "fai", "entropy", "receiver_kurtosis"):
        torch.testing.assert_close(
            getattr(parts, name), getattr(whole, name), equal_nan=True, rtol=1e-4, atol=1e-5
        )


def test_group_maps_are_the_mean_maps_of_the_groups() -> None:
    """Eq. 8, and WAAD of the local map is the WAAD of the scores: the metric is linear."""
    model = tiny_model("qwen3", implementation="eager")
    ids = torch.randint(1, VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(5))
    batch = attnprobe.TokenBatch.from_ids(ids, response_start=8)
    heads = attnprobe.classify_heads(attnprobe.measure(model, batch, layers=[0, 2]))
    maps = attnprobe.group_maps(model, batch, heads)
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    stacked = torch.stack([attentions[0][0], attentions[2][0]])
    for name, mask in (("local_map", heads.local_heads), ("global_map", heads.global_heads)):
        expected = stacked[mask].mean(0)[8:, 8:]
        torch.testing.assert_close(getattr(maps, name)[0], expected, rtol=1e-4, atol=1e-5)
    assert maps.columns_of(0) == list(range(8, 30))


# ---- what is refused ---------------------------------------------------------------------------


def small(name: str, **settings):
    config = transformers.AutoConfig.for_model(name, vocab_size=VOCABULARY, **settings)
    return config


def test_an_encoder_is_refused() -> None:
    config = small("bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM is an encoder"):
        attnprobe.measure(transformers.BertForMaskedLM(config), attnprobe.TokenBatch.from_ids([[1, 2]]))


def test_an_encoder_decoder_is_refused() -> None:
    config = small("t5", d_model=16, num_layers=1, num_heads=2, d_ff=16, d_kv=8)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        adapter_for(transformers.T5ForConditionalGeneration(config))


def test_a_model_without_attention_is_refused() -> None:
    config = small("mamba", hidden_size=16, num_hidden_layers=2, state_size=4)
    with pytest.raises(UnsupportedModelError, match="no attention layer"):
        adapter_for(transformers.MambaForCausalLM(config))


def test_other_objects_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no adapter knows torch\.nn.*Linear"):
        attnprobe.measure(torch.nn.Linear(1, 1), attnprobe.TokenBatch.from_ids([[1]]))


def test_layers_without_attention_are_skipped() -> None:
    """A hybrid: its linear-attention layers are listed, and asking for one is an error."""
    config = small(
        "qwen3_next",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    batch = attnprobe.TokenBatch.from_ids([list(range(1, 20))], response_start=5)
    measured = attnprobe.measure(model, batch)
    assert measured.layers == (3,)
    assert measured.skipped_layers == (0, 1, 2)
    with pytest.raises(ParameterError, match=r"layers \[1\] have no attention"):
        attnprobe.measure(model, batch, layers=[1, 3])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([3], r"layers \[3\] cannot be read .* layers 0..2 \(3 in all\)"),
        ([-1, 0], "layers .* got -1"),
        ([], "layers .* got none"),
        ("last", "'all', 'bottom', 'middle', .* got 'last'"),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_layers_out_of_range_are_refused(layers, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        attnprobe.measure(tiny_model("llama"), attnprobe.TokenBatch.from_ids([[1, 2]]), layers=layers)


def test_middle_layers_are_five_of_the_middle_third() -> None:
    model = tiny_model("llama", num_hidden_layers=30)
    with attnprobe.attach(model, CollectPatterns(), layers="middle") as attached:
        assert attached.layers == (10, 12, 15, 18, 20)


def test_a_soft_cap_that_sdpa_leaves_out_is_not_read() -> None:
    """Older versions of transformers run Gemma 2 with sdpa: what is read is what they compute."""
    eager = tiny_model("gemma2", implementation="eager", attn_logit_softcapping=None)
    if not type(eager)._supports_sdpa:
        pytest.skip(f"transformers {transformers.__version__} does not run Gemma 2 with sdpa")
    model, probe = tiny_model("gemma2", implementation="sdpa"), CollectPatterns()
    call, _ = padded_call(model, "right")
    with torch.no_grad(), attnprobe.attach(model, probe):
        model(**call)
        expected = eager(**call, output_attentions=True).attentions
    for layer, pattern in enumerate(expected):
        torch.testing.assert_close(probe.patterns[layer][1], pattern[1], rtol=0, atol=1e-5)


def test_tokens_that_the_model_cannot_take_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(attnprobe.BatchError, match=rf"token id {VOCABULARY} is outside the vocabulary"):
        attnprobe.measure(model, attnprobe.TokenBatch.from_ids([[1, VOCABULARY]]))
    with pytest.raises(attnprobe.BatchError, match=r"257 tokens is longer than the context .*256"):
        attnprobe.measure(tiny_model("gpt2"), attnprobe.TokenBatch.from_ids([[1] * 257]))


def test_a_model_with_nan_is_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0] = torch.nan
    with pytest.raises(attnprobe.PatternError, match="not finite"):
        attnprobe.measure(model, attnprobe.TokenBatch.from_ids([[1, 2, 3]]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "at least 1; got 0"),
        ({"window": 2.5}, "whole number"),
        ({"horizon": (5, 4)}, r"got \(5, 4\)"),
        ({"horizon": (-1, None)}, r"got \(-1, None\)"),
        ({"batch_size": 0}, "batch_size .* 0"),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_parameters_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    with pytest.raises(ParameterError, match=message):
        attnprobe.measure(model, attnprobe.TokenBatch.from_ids([[1, 2]]), **settings)
    assert_same(before, fingerprint(model))


def test_an_attention_that_was_not_understood_is_refused() -> None:
    """A family whose attention does more than its call says cannot pass as a number."""
    model = tiny_model("llama")
    own = transformers.AttentionInterface()["sdpa"]

    def doubled(module, query, key, *args, **options):
        return own(module, query, 2 * key, *args, **options)

    transformers.AttentionInterface.register("doubled", doubled)
    transformers.AttentionMaskInterface.register(
        "doubled", transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    )
    model.set_attn_implementation("doubled")
    with pytest.raises(IncompleteRunError, match=r"layer 0 .* attnprobe does not know: its output differs"):
        attnprobe.measure(model, attnprobe.TokenBatch.from_ids([[1, 2, 3, 4]]))


def test_a_silent_layer_is_an_error() -> None:
    """A layer that is skipped at run time is named; the passes before it are kept."""
    model = tiny_model("llama")
    ids = torch.tensor([[1, 2, 3]])
    probe = attnprobe.HeadStatisticsProbe()
    with attnprobe.attach(model, probe), torch.no_grad():
        model(ids)
        skipped = model.model.layers[1]
        own = skipped.forward
        skipped.forward = lambda hidden_states, *args, **kwargs: hidden_states
        with pytest.raises(IncompleteRunError, match=r"layers \[1\] were silent in a forward pass of"):
            model(ids)
        skipped.forward = own
    assert probe.result().span.shape[0] == 1


def test_one_model_in_two_threads_is_refused() -> None:
    """While probes are attached, a second thread in the same model is an error, not a mixture."""
    model = tiny_model("llama")
    entered, leave = threading.Event(), threading.Event()

    class Waiting(attnprobe.Probe):
        def observe(self, site, layer, value, batch) -> None:
            entered.set()
            leave.wait(10)

    def first() -> None:
        with torch.no_grad():
            model(torch.tensor([[1, 2]]))

    with attnprobe.attach(model, Waiting()):
        thread = threading.Thread(target=first)
        thread.start()
        entered.wait(10)
        with pytest.raises(AttnprobeError, match="two threads"):
            model(torch.tensor([[1, 2]]))
        leave.set()
        thread.join()


def test_attach_needs_probes_and_known_sites() -> None:
    class Elsewhere(attnprobe.Probe):
        sites = frozenset({"residual"})

    model = tiny_model("llama")
    with pytest.raises(ParameterError, match="at least one probe"), attnprobe.attach(model):
        pass
    with (
        pytest.raises(ParameterError, match=r"unknown sites \['residual'\]; the sites are layer_input"),
        attnprobe.attach(model, Elsewhere()),
    ):
        pass


def test_a_response_mask_of_another_shape_is_refused() -> None:
    model = tiny_model("llama")
    mask = torch.ones(1, 4, dtype=torch.bool)
    probe = attnprobe.HeadStatisticsProbe()
    with (
        attnprobe.attach(model, probe, response_mask=mask),
        pytest.raises(ParameterError, match=r"\[1, 4\], but the model was given tokens \[1, 3\]"),
    ):
        model(torch.tensor([[1, 2, 3]]))


def test_cached_steps_of_an_unseen_beginning_are_refused() -> None:
    """Head statistics describe whole sequences; a cached step whose beginning was not seen says so."""
    model = tiny_model("llama")
    with torch.no_grad():
        cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
        probe = attnprobe.HeadStatisticsProbe(entropy=False)
        with (
            attnprobe.attach(model, probe),
            pytest.raises(attnprobe.PatternError, match=r"3 columns of cached keys .* not observed"),
        ):
            model(torch.tensor([[4]]), past_key_values=cache)

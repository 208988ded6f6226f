"""Models as people have them: wrapped, compiled, offloaded, quantised, with another head or with none."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from refusals import refused
from torch import nn
from torch._dynamo import eval_frame
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import attnprobe
from attnprobe import metrics
from attnprobe.adapters import SITES, adapter_for
from attnprobe.adapters.wrappers import look_through, uncompiled
from attnprobe.analysis.forced_tokens import force_tokens
from attnprobe.errors import IncompleteRunError, InterventionError, UnsupportedModelError
from attnprobe.rl import CoupledRhythmCredit
from attnprobe.rl.ppo.actor_critic import ActorCritic
from attnprobe.rl.rollout_credit import RolloutCredit
from attnprobe.testing.model_state import assert_same_state, model_state
from attnprobe.testing.tiny_models import tiny_model

IDS = torch.randint(3, 99, (2, 40), generator=torch.Generator().manual_seed(1))
BATCH = attnprobe.TokenBatch.from_ids(IDS, response_start=10)
HEADS = (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering)


class Counting(attnprobe.Probe):
    """Counts how often it is shown each site."""

    sites = frozenset(SITES)

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def observe(self, site, layer, value, batch) -> None:
        self.seen[site] += 1


class Logits(attnprobe.Probe):
    """Keeps the logits, and may replace them."""

    sites = frozenset({"logits"})

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self.values: list[torch.Tensor] = []
        self._change = change

    def observe(self, site, layer, value, batch) -> torch.Tensor | None:
        self.values.append(value)
        return None if self._change is None else self._change(value)


def assert_measured_like(model: Any, plain: Any) -> None:
    """Check `measure`, and probes around a call, against the eager maps and logits of a plain model."""
    eager = copy.deepcopy(plain)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        expected = eager(IDS, output_attentions=True)
    waad = torch.stack(
        [metrics.windowed_attention_distance(m, BATCH.response_mask, 10) for m in expected.attentions], 1
    )
    entropy = metrics.token_entropy(expected.logits, BATCH.response_mask)
    probe, logits = attnprobe.HeadStatisticsProbe(), Logits()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        with attnprobe.attach(model, probe, logits, response_mask=BATCH.response_mask):
            during = model(input_ids=IDS).logits
    torch.testing.assert_close(during, before, rtol=0, atol=0)
    torch.testing.assert_close(logits.values[0], before, rtol=0, atol=0)
    for found in (attnprobe.measure(model, BATCH), probe.result()):
        torch.testing.assert_close(found.waad, waad, equal_nan=True, rtol=0, atol=2e-4)
        torch.testing.assert_close(found.entropy, entropy, equal_nan=True, rtol=0, atol=2e-4)


# ---- PEFT ---------------------------------------------------------------------------------------


def with_adapters(config: Any, mixed: bool = False, family: str = "llama") -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_model(family), config, mixed=mixed).eval()


def lora(**settings: Any) -> Any:
    given = {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **settings}
    return peft.LoraConfig(init_lora_weights=False, **given)


def merged(model: Any) -> Any:
    return copy.deepcopy(model).merge_and_unload()


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(task_type=None),
        lora(target_modules=["k_proj", "lm_head"], modules_to_save=["embed_tokens"]),
        peft.IA3Config(
            target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False, task_type="CAUSAL_LM"
        ),
    ],
    ids=["causal", "plain", "head and embeddings", "ia3"],
)
def test_a_peft_model_is_read_with_its_adapters(config) -> None:
    model = with_adapters(config)
    before = model_state(model)
    plain = merged(model)
    assert_measured_like(model, plain)
    assert_same_state(before, model_state(model))
    changed = attnprobe.measure(tiny_model("llama"), BATCH).waad - attnprobe.measure(model, BATCH).waad
    assert float(changed.abs().nan_to_num().max()) > 1e-2


def test_the_active_adapter_counts() -> None:
    model = with_adapters(lora())
    model.add_adapter("second", lora(target_modules=["v_proj", "k_proj"]))
    model.set_adapter("second")
    assert_measured_like(model, merged(model))
    with model.disable_adapter():
        assert_measured_like(model, tiny_model("llama"))
    plain = merged(model)
    model.merge_adapter()
    assert_measured_like(model, plain)
    mixed = with_adapters(lora(task_type=None), mixed=True)
    assert_measured_like(mixed, merged(mixed))


def test_generation_of_a_peft_model_is_read() -> None:
    model, probe = with_adapters(lora()), attnprobe.HeadStatisticsProbe()
    prompt = torch.zeros_like(IDS)
    with attnprobe.attach(model, probe, response_mask=prompt):
        text = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    whole = attnprobe.measure(merged(model), attnprobe.TokenBatch.from_ids(text, response_start=40))
    found = probe.result()
    torch.testing.assert_close(found.waad, whole.waad[..., :-1], equal_nan=True, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.entropy, whole.entropy[:, :-1], equal_nan=True, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "virtual tokens"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "virtual tokens"),
        (peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "virtual tokens"),
        (peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2), "learned prompt"),
    ],
)
def test_peft_methods_that_add_tokens_are_refused(config, reason: str) -> None:
    model = with_adapters(config)
    name = config.peft_type.value
    for call in (
        lambda: attnprobe.measure(model, BATCH),
        lambda: attnprobe.attach(model, Counting()),
        lambda: RolloutCredit(model, CoupledRhythmCredit()),
    ):
        refused(call, type(model).__name__, name, reason, error=UnsupportedModelError)


# ---- torch.compile ------------------------------------------------------------------------------


def compiled_whole(model: Any, backend: Any) -> Any:
    return torch.compile(model, backend=backend)


def compiled_in_place(model: Any, backend: Any) -> Any:
    model.compile(backend=backend)
    return model


def compiled_layers(model: Any, backend: Any) -> Any:
    layers = model.model.layers
    layers[0] = torch.compile(layers[0], backend=backend)
    layers[1].compile(backend=backend)
    layers[2].self_attn = torch.compile(layers[2].self_attn, backend=backend)
    layers[2].mlp = torch.compile(layers[2].mlp, backend=backend)
    return model


def compiled_base(model: Any, backend: Any) -> Any:
    model.model = torch.compile(model.model, backend=backend)
    return model


def compiled_forward(model: Any, backend: Any) -> Any:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def compiled_peft(model: Any, backend: Any) -> Any:
    return torch.compile(
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])), backend=backend
    )


@pytest.fixture
def compiler():
    """A backend that counts what it compiles, and how often its code runs."""

    class Compiler:
        compiled = ran = 0

        def __call__(self, graph, inputs):
            self.compiled += 1

            def run(*args):
                self.ran += 1
                return graph.forward(*args)

            return run

    torch._dynamo.reset()
    yield Compiler()
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "wrap",
    [compiled_whole, compiled_in_place, compiled_layers, compiled_base, compiled_forward, compiled_peft],
)
def test_compiled_code_runs_uncompiled_while_it_is_read(wrap, compiler) -> None:
    """Also if it was compiled before; afterwards the same code is used again."""
    model, plain = wrap(tiny_model("llama").eval(), compiler), tiny_model("llama")
    with torch.no_grad():
        model(input_ids=IDS)
        compiled, ran = compiler.compiled, compiler.ran
        assert ran > 0
        probe = Counting()
        with attnprobe.attach(model, probe, layers=[0, 1, 2]):
            model(input_ids=IDS)
        assert probe.seen == {site: 1 if site == "logits" else 3 for site in SITES}
        found = attnprobe.measure(model, BATCH)
        with attnprobe.suppress_attention(model, keys=[3]):
            suppressed = model(input_ids=IDS).logits
        with pytest.raises(KeyError), attnprobe.attach(model, Counting()):
            raise KeyError
        assert compiler.ran == ran
        model(input_ids=IDS)
        assert (compiler.compiled, compiler.ran) == (compiled, 2 * ran)
        with attnprobe.suppress_attention(plain, keys=[3]):
            expected = plain(IDS).logits
    torch.testing.assert_close(suppressed, expected, rtol=0, atol=1e-5)
    expected = attnprobe.measure(plain, BATCH)
    torch.testing.assert_close(found.waad, expected.waad, equal_nan=True, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.entropy, expected.entropy, equal_nan=True, rtol=0, atol=1e-5)


def test_a_compiled_function_that_calls_the_model_is_read(compiler) -> None:
    model, probe = tiny_model("llama"), Counting()
    call = torch.compile(lambda ids: model(ids).logits, backend=compiler)
    with torch.no_grad():
        call(IDS)
        with attnprobe.attach(model, probe):
            call(IDS)
    assert probe.seen["attention"] == 3


def test_layers_of_a_dense_family_may_be_compiled(compiler) -> None:
    model = tiny_model("bloom")
    refused_sites = adapter_for(model).refused_sites
    for i, layer in enumerate(model.transformer.h):
        layer.self_attention = torch.compile(layer.self_attention, backend=compiler)
        model.transformer.h[i] = torch.compile(layer, backend=compiler)
    assert adapter_for(model).refused_sites == refused_sites
    found, expected = (attnprobe.measure(m, BATCH) for m in (model, tiny_model("bloom")))
    torch.testing.assert_close(found.waad, expected.waad, equal_nan=True)


def test_the_stance_is_restored_when_the_last_block_ends() -> None:
    """Blocks may nest, fail, and overlap in threads; the user's own stance comes back."""
    with torch.compiler.set_stance("eager_on_recompile"):
        with uncompiled():
            with pytest.raises(KeyError), uncompiled():
                raise KeyError
            assert eval_frame._stance.stance == "force_eager"
        assert eval_frame._stance.stance == "eager_on_recompile"
        inside, leave = threading.Event(), threading.Event()

        def other() -> None:
            with uncompiled():
                inside.set()
                leave.wait(10)

        thread = threading.Thread(target=other)
        with uncompiled():
            thread.start()
            assert inside.wait(10)
        assert eval_frame._stance.stance == "force_eager"
        leave.set()
        thread.join()
        assert eval_frame._stance.stance == "eager_on_recompile"
    assert eval_frame._stance.stance == "default"


# ---- accelerate and torch.distributed -----------------------------------------------------------


def offloaded_to_cpu(model: Any, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def offloaded_to_disk(model: Any, folder: Path) -> Any:
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def dispatched(model: Any, folder: Path) -> Any:
    places = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk"}
    rest = dict.fromkeys(("model.layers.2", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return accelerate.dispatch_model(model, device_map={**places, **rest}, offload_dir=str(folder))


def offloaded_with_hook(model: Any, folder: Path) -> Any:
    return accelerate.cpu_offload_with_hook(model, "cpu")[0]


@pytest.mark.parametrize("offload", [offloaded_to_cpu, offloaded_to_disk, dispatched, offloaded_with_hook])
def test_offloaded_weights_are_brought_where_they_are_needed(offload, tmp_path: Path) -> None:
    plain = tiny_model("llama")
    model = offload(tiny_model("llama"), tmp_path)
    assert adapter_for(model).device == torch.device("cpu")
    assert_measured_like(model, plain)
    asked = torch.zeros_like(IDS, dtype=torch.bool)
    asked[0, 12] = True
    found, expected = (attnprobe.knockout_divergence(each, BATCH, asked) for each in (model, plain))
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert force_tokens(model, IDS[0], 5, 2, 2) == force_tokens(plain, IDS[0], 5, 2, 2)


def test_distributed_data_parallel_is_read(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(tiny_model("llama"))
        assert_measured_like(model, tiny_model("llama"))
    finally:
        torch.distributed.destroy_process_group()


class ValueHead(nn.Module):
    """A wrapper as TRL had one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pretrained_model = model
        self.v_head = nn.Linear(32, 1)


class Pipeline:
    """An object that is no module, and holds a model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.model_wrapped = torch.compile(model)


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (ValueHead, "wrapper.pretrained_model"),
        (lambda model: ValueHead(torch.compile(model)), "wrapper.pretrained_model"),
        (ActorCritic, "wrapper.policy"),
        (nn.DataParallel, "wrapper.module"),
        (nn.Sequential, "wrapper[0]"),
        (Pipeline, "wrapper.model"),
        (lambda model: torch.compile(ValueHead(model)), "wrapper.pretrained_model"),
    ],
)
def test_other_wrappers_are_refused_and_the_model_inside_is_named(wrap, path: str) -> None:
    wrapper = wrap(tiny_model("llama"))
    message = refused(
        lambda: attnprobe.measure(wrapper, BATCH),
        type(look_through(wrapper)).__name__,
        f"pass {path}, a LlamaForCausalLM",
        error=UnsupportedModelError,
    )
    assert "_orig_mod" not in message


def test_several_models_inside_are_all_named() -> None:
    both = nn.ModuleDict({"policy": tiny_model("llama"), "reference": tiny_model("gpt2")})
    refused(
        lambda: attnprobe.measure(both, BATCH),
        "wrapper.policy (a LlamaForCausalLM)",
        "wrapper.reference (a GPT2LMHeadModel)",
        error=UnsupportedModelError,
    )
    refused(lambda: adapter_for(nn.Linear(1, 1)), "Linear", "register_adapter", error=UnsupportedModelError)


# ---- heads of other kinds -----------------------------------------------------------------------


def with_head(auto: Any, family: str) -> Any:
    """Return a model with another head, or none, whose base has the weights of the language model."""
    plain = tiny_model(family)
    config = copy.deepcopy(plain.config)
    config.num_labels = 3
    model = auto.from_config(config).eval()
    model.base_model.load_state_dict(plain.base_model.state_dict())
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bloom", "qwen3_next"])
@pytest.mark.parametrize("auto", [AutoModel, *HEADS])
def test_a_model_without_next_token_logits_is_read_without_entropy(auto, family: str) -> None:
    model, plain = with_head(auto, family), tiny_model(family)
    assert not adapter_for(model).has_next_token_logits
    assert adapter_for(plain).has_next_token_logits
    found = attnprobe.measure(model, BATCH, entropy=False)
    expected = attnprobe.measure(plain, BATCH, entropy=False)
    torch.testing.assert_close(found.waad, expected.waad, equal_nan=True, rtol=0, atol=1e-5)
    scores = attnprobe.score_tokens(found, attnprobe.classify_heads(found))
    assert scores.entropy is None
    probe = attnprobe.HeadStatisticsProbe()
    with torch.no_grad(), attnprobe.attach(model, probe, response_mask=BATCH.response_mask[:1]):
        model(IDS[:1])
    assert probe.result().entropy is None
    torch.testing.assert_close(probe.result().waad, found.waad[:1], equal_nan=True, rtol=0, atol=1e-4)


def test_what_needs_next_token_logits_says_so() -> None:
    model = with_head(AutoModelForTokenClassification, "llama")
    name = type(model).__name__
    for call in (
        lambda: attnprobe.measure(model, BATCH),
        lambda: attnprobe.attach(model, attnprobe.HeadStatisticsProbe(entropy=True)),
        lambda: attnprobe.attach(model, Logits()),
        lambda: attnprobe.knockout_divergence(model, BATCH, BATCH.response_mask),
        lambda: adapter_for(model).forward(BATCH, logits_at=torch.tensor([1])),
    ):
        refused(call, name, "next-token logits", error=UnsupportedModelError)
    refused(lambda: force_tokens(model, IDS[0], 5, 2, 2), name, error=UnsupportedModelError)


@pytest.mark.parametrize("head", [nn.Linear(32, 1), nn.Identity()])
def test_a_head_that_was_replaced_gives_no_entropy(head) -> None:
    model = tiny_model("llama")
    model.lm_head = head
    refused(lambda: attnprobe.measure(model, BATCH), "entropy=False", error=UnsupportedModelError)
    assert attnprobe.measure(model, BATCH, entropy=False).entropy is None


# ---- the logits site ----------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("return_dict", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "bloom"])
def test_logits_are_shown_in_whatever_form_they_come(family: str, return_dict: bool, labels: bool) -> None:
    model, probe = tiny_model(family), Logits()
    given = {"labels": IDS} if labels else {}
    with torch.no_grad():
        expected = model(IDS, output_hidden_states=True, **given).logits
        with attnprobe.attach(model, probe):
            model(IDS, return_dict=return_dict, output_hidden_states=True, **given)
    torch.testing.assert_close(probe.values, [expected], rtol=0, atol=0)


def test_logits_in_a_tuple_can_be_replaced() -> None:
    model = tiny_model("llama")
    with torch.no_grad(), attnprobe.attach(model, Logits(torch.zeros_like)):
        logits, cache = model(IDS, return_dict=False)
    assert not logits.any()
    assert cache.get_seq_length() == 40
    router = tiny_model("mixtral")
    with torch.no_grad(), attnprobe.attach(router, Logits(torch.zeros_like)):
        output = router(IDS, return_dict=False, output_router_logits=True)
    assert not output[1].any(), "the loss of the router comes first"
    with (
        torch.no_grad(),
        attnprobe.attach(model, Logits(torch.zeros_like)),
        pytest.raises(InterventionError, match="without labels"),
    ):
        model(IDS, return_dict=False, labels=IDS)


def test_silent_logits_are_an_error_for_probes_that_need_them() -> None:
    model = tiny_model("llama")
    for call in (
        lambda: model.model(IDS),
        lambda: model.model(IDS, return_dict=False),
        lambda: model.forward(IDS),
    ):
        for probe in (Logits(), attnprobe.HeadStatisticsProbe(entropy=True)):
            with torch.no_grad(), attnprobe.attach(model, probe):
                refused(call, "LlamaForCausalLM", "logits", error=IncompleteRunError)
        probe = attnprobe.HeadStatisticsProbe()
        with torch.no_grad(), attnprobe.attach(model, probe):
            call()
        assert probe.result().entropy is None


def test_logits_at_chosen_positions_are_not_shown() -> None:
    model, probe = tiny_model("llama"), Logits()
    with torch.no_grad(), attnprobe.attach(model, probe):
        model(IDS, logits_to_keep=torch.tensor([3, 7]))
        model(IDS, logits_to_keep=2)
    assert [list(value.shape) for value in probe.values] == [[2, 2, 99]]


# ---- weights and numbers ------------------------------------------------------------------------


class Quantised(nn.Module):
    """A linear layer as GPTQ and AWQ have it: its weights are buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", linear.weight.detach().clone())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.qweight, self.bias)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2", "gpt_neox", "cohere", "phi3"])
def test_weights_in_buffers_count(family: str) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Quantised(child))
    for layer in model.base_model.layers:
        # As older checkpoints have it; neither a rotary module nor a norm is a feed-forward module.
        layer.rotary_embedding = RotaryTable()
        layer.extra_norm = nn.BatchNorm1d(4, affine=False)
    embedding = model.get_input_embeddings()
    weight = embedding.weight.detach()
    del embedding.weight
    embedding.register_buffer("weight", weight)
    assert adapter_for(model).refused_sites == adapter_for(plain).refused_sites
    assert adapter_for(model).has_next_token_logits
    probe = Counting()
    with torch.no_grad(), attnprobe.attach(model, probe):
        model(IDS)
    assert probe.seen["mlp_output"] == 3
    found, expected = attnprobe.measure(model, BATCH), attnprobe.measure(plain, BATCH)
    torch.testing.assert_close(found.entropy, expected.entropy, equal_nan=True, rtol=0, atol=1e-5)


class RotaryTable(nn.Module):
    """A table of frequencies that is saved with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_other_dtypes_are_read(family: str, dtype: torch.dtype) -> None:
    found = attnprobe.measure(tiny_model(family).to(dtype), BATCH)
    expected = attnprobe.measure(tiny_model(family), BATCH)
    assert found.waad.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    for name in ("span", "waad", "fai"):
        values = getattr(found, name).float()
        torch.testing.assert_close(
            values, getattr(expected, name), equal_nan=True, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2", "bloom"])
def test_autocast_is_the_models_and_not_ours(family: str, dtype: torch.dtype) -> None:
    """Under the user's autocast outputs stay the same, and our own sums are not narrowed."""
    model, probe, patterns = tiny_model(family), attnprobe.HeadStatisticsProbe(), Patterns()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        before = model(IDS).logits
        with attnprobe.attach(model, probe, patterns, response_mask=BATCH.response_mask):
            during = model(IDS).logits
        measured = attnprobe.measure(model, BATCH)
    torch.testing.assert_close(during, before, rtol=0, atol=0)
    assert measured.waad.dtype == torch.float32
    # The statistics are those of the patterns that were read.
    columns = torch.arange(40)
    distance = (columns[:, None] - columns).clamp(0, 10).double()
    for found in (probe.result(), measured):
        for index, pattern in enumerate(patterns.values):
            expected = (pattern.double() * distance).sum(-1)[..., 10:].float()
            # A kernel in half precision normalises its rows to 2e-4 only.
            torch.testing.assert_close(found.waad[:, index, :, 10:], expected, rtol=0, atol=2e-3)
    plain = attnprobe.measure(model, BATCH)
    tolerance = 0.5 if dtype == torch.bfloat16 else 0.06
    torch.testing.assert_close(measured.waad, plain.waad, equal_nan=True, rtol=0, atol=tolerance)


class Patterns(attnprobe.Probe):
    """Keeps the whole pattern of each layer, as it is read inside the pass."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def observe(self, site, layer, value, batch) -> None:
        self.values.append(value.rows(torch.arange(value.query_count)))


def test_looking_through_a_module_that_is_not_wrapped_gives_it_back() -> None:
    model = tiny_model("llama")
    assert look_through(model) is model
    assert look_through(torch.compile(model)) is model

"""The output check finds what a model does to its attention unsaid, and takes rounding for what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import attnprobe
from attnprobe.adapters.attention_call import MaskMemory, read_attention
from attnprobe.adapters.forward_call import Columns
from attnprobe.adapters.output_check import OutputCheck, check_against_output
from attnprobe.errors import IncompleteRunError
from attnprobe.testing.tiny_models import tiny_model
from tests.drawn_calls import KERNELS, draw, tampered

NARROW = [torch.float32, torch.float16, torch.bfloat16]
ORDINARY: dict[str, Any] = {
    "batch": 2, "key_heads": 2, "groups": 3, "size": 32, "tokens": 96, "largest": 8.0, "keys": "plain",
    "values": "plain", "softcap": 5.0, "autocast": False, "scaling": 32**-0.5, "value size": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
def test_rounding_is_no_error(kernel: str) -> None:
    """Drawn calls pass, whatever their dtype, shape, mask and scores. `tests.false_alarms` draws more."""
    for seed in range(60):
        drawn = draw(seed, longest=200, kernel=kernel)
        check_against_output(*drawn.call(), drawn.description)


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", ["none", "left", "window"])
def test_every_falsified_call_is_refused(kernel: str, form: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        drawn = draw(seed, kernel=kernel, form=form, dtype=dtype, **ORDINARY)
        check_against_output(*drawn.call(), drawn.description)
        for name, changes in tampered(drawn):
            if torch.equal(drawn.run(**changes).nan_to_num(), drawn.run().nan_to_num()):
                continue
            with pytest.raises(IncompleteRunError, match="attnprobe does not know"):
                check_against_output(*drawn.call(**changes), f"{name}: {drawn.description}")


@pytest.mark.parametrize("dtype", NARROW)
def test_a_missing_bias_is_refused(dtype: torch.dtype) -> None:
    drawn = draw(0, kernel="plain eager", form="none", dtype=dtype, **ORDINARY)
    _, call = drawn.call()
    position = torch.arange(96)
    bias = (position - position[:, None]).to(dtype) * 0.05
    biased = replace(call, mask=drawn.mask(None, dtype) + bias)
    with pytest.raises(IncompleteRunError, match="attnprobe does not know"):
        check_against_output(read_attention(biased, MaskMemory(), Columns(0, 96, False)), biased, "a call")


@pytest.mark.parametrize("dtype", NARROW[1:])
def test_a_small_soft_cap_error_is_found_in_16_bits(dtype: torch.dtype) -> None:
    """A cap of 50 changes scores of up to 25 by no more than rounding could, but all in one direction."""
    ordinary = {**ORDINARY, "softcap": 50.0, "largest": 25.0, "tokens": 300, "size": 64, "scaling": 0.125}
    drawn = draw(0, kernel="capped eager", form="none", dtype=dtype, **ordinary)
    check_against_output(*drawn.call(), "a call")
    with pytest.raises(IncompleteRunError, match="attnprobe does not know"):
        check_against_output(*drawn.call(softcap=None), "a call")


# ---- whole models -----------------------------------------------------------------------------


def registered(name: str, change: Callable[..., dict[str, Any]], base: str = "sdpa") -> str:
    """Register an attention function that calls sdpa, or a family's eager one, with changed arguments."""

    def own(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if base == "sdpa":
            function = transformers.AttentionInterface()["sdpa"]
        else:
            function = __import__(type(module).__module__, fromlist=["_"]).eager_attention_forward
        given = {"query": query, "key": key, "value": value, "attention_mask": mask, **options}
        return function(module, **{**given, **change(module, given)})

    transformers.AttentionInterface.register(name, own)
    transformers.AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def grouped_otherwise(module: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name].flip(1) for name in ("key", "value")}


def causal_only(module: Any, given: dict[str, Any]) -> dict[str, Any]:
    mask = given["attention_mask"]
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
    if mask.dtype != torch.bool:
        lowest = torch.finfo(mask.dtype).min
        return {"attention_mask": torch.zeros_like(mask).masked_fill(~causal, lowest)}
    return {"attention_mask": causal.expand_as(mask)}


class NoSinks:
    """A module's stand-in without sinks."""

    def __init__(self, module: Any) -> None:
        self.num_key_value_groups, self.training = module.num_key_value_groups, module.training
        self.sinks = torch.full_like(module.sinks, -1e4)


FALSIFIED: dict[str, tuple[str, str, Callable[..., dict[str, Any]]]] = {
    "nothing changed": ("llama", "sdpa", lambda module, given: {}),
    "scale halved": ("llama", "sdpa", lambda module, given: {"scaling": given["scaling"] / 2}),
    "scale doubled": ("llama", "sdpa", lambda module, given: {"scaling": given["scaling"] * 2}),
    "scale missing": ("llama", "eager", lambda module, given: {"scaling": 1.0}),
    "keys in another order": ("llama", "sdpa", lambda module, given: {"key": given["key"].flip(2)}),
    "other groups": ("llama", "sdpa", grouped_otherwise),
    "padding visible": ("llama", "sdpa", causal_only),
    "window missing": ("mistral", "sdpa", causal_only),
    "soft cap missing": ("gemma2", "eager", lambda module, given: {"softcap": None}),
    "another soft cap": ("gemma2", "eager", lambda module, given: {"softcap": given["softcap"] * 3}),
    "sinks missing": ("gpt_oss", "eager", lambda module, given: {"module": NoSinks(module)}),
}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", FALSIFIED)
def test_a_falsified_model_is_refused(name: str, dtype: torch.dtype) -> None:
    family, base, change = FALSIFIED[name]
    model = tiny_model(family, implementation=base)
    with torch.no_grad():
        for part in model.modules():
            if hasattr(part, "sinks"):
                part.sinks.fill_(1.0)
    model = model.to(dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (2, 60), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0

    def read() -> None:
        probe = attnprobe.HeadStatisticsProbe(entropy=False)
        with torch.no_grad(), attnprobe.attach(model, probe):
            model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))

    read()
    if name == "sinks missing":
        change = lambda module, given: {}  # noqa: E731
        function = transformers.models.gpt_oss.modeling_gpt_oss.eager_attention_forward

        def own(module: Any, *args: Any, **options: Any) -> Any:
            return function(NoSinks(module), *args, **options)

        transformers.AttentionInterface.register("falsified", own)
        transformers.AttentionMaskInterface.register("falsified", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    else:
        registered("falsified", change, base)
    model.set_attn_implementation("falsified")
    if name == "nothing changed":
        read()
        return
    with pytest.raises(IncompleteRunError, match="attnprobe does not know"):
        read()


def test_a_refused_pass_leaves_no_number() -> None:
    """The checks are judged when the pass ends: until then nothing is handed out, and then it is dropped."""
    model, seen = tiny_model("llama"), []
    refused = r"layer 1 of .* attnprobe does not know"
    ids = torch.randint(3, 99, (2, 60), generator=torch.Generator().manual_seed(0))
    batch = attnprobe.TokenBatch.from_ids(ids, response_start=10)
    expected = attnprobe.measure(model, batch)

    class Later(attnprobe.Probe):
        sites = frozenset({"layer_output"})

        def observe(self, site, layer, value, batch):
            seen.append(layer)

        def end(self, batch):
            seen.append("end")

        def abort(self):
            seen.append("abort")

    probe = attnprobe.HeadStatisticsProbe(entropy=False)
    only_layer_1 = lambda module, given: {  # noqa: E731
        "scaling": given["scaling"] * (2 if module.layer_idx == 1 else 1)
    }
    model.set_attn_implementation(registered("falsified", only_layer_1))
    with torch.no_grad(), attnprobe.attach(model, probe, Later()):
        with pytest.raises(IncompleteRunError, match=refused):
            model(ids)
        assert seen == [0, 1, 2, "abort"]
        with pytest.raises(attnprobe.ResultError, match="no complete forward pass"):
            probe.result()
        # An error of another kind in a later layer does not hide it.
        nan = lambda module, args: (args[0] * torch.nan, *args[1:])  # noqa: E731
        with (
            model.model.layers[2].register_forward_pre_hook(nan),
            pytest.raises(IncompleteRunError, match=refused),
        ):
            model(ids)
        model.set_attn_implementation("sdpa")
        model(ids)
    model.set_attn_implementation("falsified")
    with pytest.raises(IncompleteRunError, match=refused):
        attnprobe.measure(model, batch, entropy=False)
    found = probe.result()
    assert torch.equal(found.span.isnan(), expected.span.isnan())
    assert len(found.span) == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("layers", [[0], [5], [3, 10, 20]])
def test_a_falsified_real_model_is_refused(smollm2, dtype: torch.dtype, layers: list[int]) -> None:
    loaded = attnprobe.models.load_model()
    model = loaded.model.to(dtype)
    text = "The quick brown fox jumps over the lazy dog. " * 6
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    batch = attnprobe.TokenBatch.from_ids(ids, response_start=10)
    attnprobe.measure(model, batch, layers=layers)
    for name in ("scale halved", "scale doubled", "keys in another order", "other groups"):
        model.set_attn_implementation(registered("falsified", FALSIFIED[name][2]))
        with pytest.raises(IncompleteRunError, match="attnprobe does not know"):
            attnprobe.measure(model, batch, layers=layers)


# ---- what must pass ---------------------------------------------------------------------------


def test_large_scores_are_read() -> None:
    """Key biases as large as Qwen2's make scores of more than a thousand, and these are rounded."""
    model = tiny_model("qwen2", max_position_embeddings=512)
    generator = torch.Generator().manual_seed(7)
    key, query = torch.randn(8, generator=generator) * 400, torch.randn(32, generator=generator)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.add_(key)
            layer.self_attn.q_proj.bias.add_(query)
    ids = torch.randint(3, 99, (2, 200), generator=generator)
    attnprobe.measure(model, attnprobe.TokenBatch.from_ids(ids, response_start=20))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
def test_eager_models_are_read_in_every_dtype(family: str, dtype: torch.dtype) -> None:
    """Eager attention computes its softmax in float32, in a float64 model too."""
    ids = torch.randint(3, 99, (2, 40), generator=torch.Generator().manual_seed(1))
    model = tiny_model(family, implementation="eager").to(dtype)
    attnprobe.measure(model, attnprobe.TokenBatch.from_ids(ids, response_start=10))


def test_autocast_is_rounding() -> None:
    ids = torch.randint(3, 99, (1, 40), generator=torch.Generator().manual_seed(1))
    model = tiny_model("llama")
    probe = attnprobe.HeadStatisticsProbe()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), attnprobe.attach(model, probe):
        model(ids)
    assert probe.result().span.isfinite().all()


def test_an_output_of_nan_is_refused() -> None:
    attention, call = draw(0, kernel="sdpa", form="none", dtype=torch.float32, **ORDINARY).call()
    assert call.output is not None
    call.output[0, -1, 0, 0] = torch.nan
    with pytest.raises(IncompleteRunError, match="differs by nan"):
        check_against_output(attention, call, "a call")


def test_the_error_says_where_how_far_and_how_it_was_called() -> None:
    drawn = draw(0, kernel="math", form="none", dtype=torch.float32, **ORDINARY)
    with pytest.raises(
        IncompleteRunError,
        match=r"layer 3 of m does something .* differs by [\d.e-]+ from .* rounding to float32 explains "
        r"[\d.e-]+ \(at batch \d, head \d, query \d+\)\. Options of the call: \['scaling'\]",
    ):
        check_against_output(*drawn.call(scaling=1.0), "layer 3 of m")


def test_a_wrong_log_sum_exp_of_the_kernel_is_refused() -> None:
    """Some kernels have returned it off by log 2: our numbers would be wrong, though the output is right."""
    _, call = draw(0, kernel="flash", form="none", dtype=torch.float32, **ORDINARY).call()
    assert call.flash is not None
    call = replace(call, flash=replace(call.flash, log_sum_exp=call.flash.log_sum_exp + 0.693))
    with pytest.raises(IncompleteRunError, match=r"log-sum-exps that differ by 0\.693"):
        check_against_output(read_attention(call, MaskMemory(), Columns(0, 96, False)), call, "a call")


def test_single_steps_are_checked_at_first_and_then_now_and_then() -> None:
    """The first step of each generation is checked, and a later change of behaviour is found in time."""
    ordinary = {**ORDINARY, "tokens": 1, "batch": 1}
    drawn = draw(0, kernel="sdpa", form="none", dtype=torch.float32, **ordinary)
    right = drawn.call()
    wrong = drawn.call(value=drawn.value * 2)
    check = OutputCheck()
    with pytest.raises(IncompleteRunError):
        check.check(*wrong, "a step")
    wrong = (wrong[0], replace(wrong[1], module=right[1].module))
    check.check(*right, "a step")
    found = []
    for step in range(100):
        try:
            check.check(*wrong, "a step")
        except IncompleteRunError:
            found.append(step)
    assert len(found) == 3
    several = draw(0, kernel="sdpa", form="none", dtype=torch.float32, **ORDINARY).call()
    check.check(several[0], replace(several[1], module=right[1].module), "a prompt")
    with pytest.raises(IncompleteRunError):
        check.check(*wrong, "the first step after it")

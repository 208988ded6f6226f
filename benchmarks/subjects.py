"""What is measured: a model of SmolLM2-135M's shape, and the ways of reading its attention.

Weights are random: time and memory do not depend on them. `cost` and `backends` run these. What is left to
others: clocks, processes and tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import attnprobe
from attnprobe.metrics import distribution_entropy

# SmolLM2-135M's own shape, with a longer context, so that long sequences can be run.
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
}

Call = Callable[[], object]


def build_model(layers: int, implementation: str) -> Any:
    """Return the model, in float32 and evaluation mode, with the same weights every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, attn_implementation=implementation, **SHAPE)
    return LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class Subject:
    """One way of running or reading the model.

    Attributes:
        meaning: what it does, in a few words.
        prepare: makes the call from the model and the ids.
        implementation: the attention implementation that the model is built with.
        maps: whether it stores T x T maps, and so cannot handle long sequences.
    """

    meaning: str
    prepare: Callable[[Any, torch.Tensor], Call]
    implementation: str = "sdpa"
    maps: bool = False


def _plain(model: Any, ids: torch.Tensor) -> Call:
    @torch.no_grad()
    def call() -> object:
        return model(ids, logits_to_keep=1, use_cache=False).logits

    return call


def _response_start(ids: torch.Tensor) -> int:
    """Return where the response begins: the first quarter is the prompt."""
    return ids.shape[1] // 4


def _with_entropy(model: Any, ids: torch.Tensor) -> Call:
    predicting = ids.shape[1] - _response_start(ids) + 1

    @torch.no_grad()
    def call() -> object:
        logits = model(ids, logits_to_keep=predicting, use_cache=False).logits
        return distribution_entropy(logits[:, :-1])

    return call


def _measured(*, entropy: bool = False, **settings: Any) -> Callable[[Any, torch.Tensor], Call]:
    def prepare(model: Any, ids: torch.Tensor) -> Call:
        batch = attnprobe.TokenBatch.from_ids(ids, response_start=_response_start(ids))
        return lambda: attnprobe.measure(model, batch, entropy=entropy, **settings)

    return prepare


def _attached(model: Any, ids: torch.Tensor) -> Call:
    forward = _plain(model, ids)

    def call() -> object:
        probe = attnprobe.HeadStatisticsProbe(span=False, entropy=False)
        with attnprobe.attach(model, probe):
            forward()
        return probe.result()

    return call


def _eager_maps(model: Any, ids: torch.Tensor) -> Call:
    @torch.no_grad()
    def call() -> object:
        return model(ids, output_attentions=True, logits_to_keep=1, use_cache=False).attentions

    return call


def _bridge_patterns(model: Any, ids: torch.Tensor) -> Call:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)

    @torch.no_grad()
    def call() -> object:
        return bridge.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_pattern"))[1]

    return call


def _nnsight_maps(model: Any, ids: torch.Tensor) -> Call:
    from nnsight import NNsight

    traced = NNsight(model)

    @torch.no_grad()
    def call() -> object:
        maps = []
        with traced.trace(input_ids=ids, logits_to_keep=1, use_cache=False):
            for layer in traced.model.layers:
                maps.append(layer.self_attn.output[1].save())
        return maps

    return call


SUBJECTS = {
    "plain": Subject("the model's own forward pass", _plain),
    "measure": Subject("span, WAAD, FAI[10,100] of all heads", _measured()),
    "without span": Subject("WAAD, FAI[10,100] of all heads", _measured(span=False)),
    "attached": Subject("WAAD, FAI[10,100] in the user's own pass", _attached),
    "five layers": Subject("the training setting: five middle layers", _measured(layers="middle")),
    "receive": Subject(
        "span, WAAD, FAI to the end, receiver kurtosis", _measured(horizon=(10, None), receiver=True)
    ),
    "plain with entropy": Subject(
        "the model's own pass with the response's logits and entropy", _with_entropy
    ),
    "as called": Subject("`measure` with all defaults: entropy too", _measured(entropy=True)),
    "eager maps": Subject("transformers, output_attentions=True", _eager_maps, "eager", maps=True),
    "bridge patterns": Subject("TransformerBridge.run_with_cache", _bridge_patterns, "eager", maps=True),
    "nnsight maps": Subject("an eager nnsight trace", _nnsight_maps, "eager", maps=True),
}

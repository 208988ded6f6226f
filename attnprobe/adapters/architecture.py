"""Where the sites of a transformers model are: its layers, and their attention and feed-forward modules.

A layer is found by its attention module: the module that calls the attention function of transformers or,
in families without one, that is named like attention. Wrappers that a backend has put around a module
(`_original_component`) are looked through: a layer's attention has an inner module, whose forward is the
model's own, and an outer one, which the layer calls. PyTorch's own wrappers (a compiled layer) are looked
through entirely: they call the module inside, so hooks on it fire.

If a family's modules cannot give a site its usual meaning, the site is refused rather than given another
meaning. The transformers adapter calls `architecture_of` when it is made. What is left to others: hooks on
these modules (reading).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from attnprobe.adapters.multimodal import why_not_causal
from attnprobe.adapters.wrappers import look_through
from attnprobe.errors import UnsupportedModelError

KERNEL = "scaled_dot_product_attention"
"""PyTorch's attention."""

WRAPPED = "_original_component"
"""The name under which a TransformerLens module holds the module that it stands for."""


@dataclass(frozen=True)
class Layer:
    """The modules of one decoder layer that has attention.

    Attributes:
        block: the layer itself, as the model calls it.
        attention: the attention module, whose forward is the model's own.
        attention_outer: the attention module as the layer calls it; the same if nothing wraps it.
        feed_forward: the feed-forward module as the layer calls it; None unless there is exactly one.
    """

    block: nn.Module
    attention: nn.Module
    attention_outer: nn.Module
    feed_forward: nn.Module | None


@dataclass(frozen=True)
class Architecture:
    """The layers with attention by number, how they compute it, and the sites that are refused.

    `calls` says what they call: "function" (the attention function of transformers), "kernel" (PyTorch's
    attention, unless they compute it themselves), or "nothing".
    """

    layers: dict[int, Layer]
    calls: str
    refused_sites: dict[str, str]


def architecture_of(model: nn.Module) -> Architecture:
    """Find the layers of a transformers causal language model, with or without a head of any kind.

    Raises:
        UnsupportedModelError: no attention layer, an encoder, or layers with several attention modules.
    """
    family, config = type(model).__name__, model.config
    found = _attention_modules(model, calls_attention_function)
    calls = "function" if found else "nothing"
    if not found:
        found = _attention_modules(model, _looks_like_attention)
    if not found:
        raise UnsupportedModelError(
            f"{family} has no attention layer that can be found: there is nothing to read"
        )
    root = decoder_of(model)
    layers = {number: _layer(root, name, number) for number, name in sorted(found.items())}
    if not any(getattr(layer.attention, "is_causal", True) for layer in layers.values()) or (
        not _is_decoder(model)
    ):
        raise UnsupportedModelError(why_not_causal(config, family))
    if calls == "nothing" and all(_names(layer.attention, KERNEL) for layer in layers.values()):
        calls = "kernel"
    return Architecture(layers, calls, _refused_sites(family, layers))


def calls_attention_function(module: nn.Module) -> bool:
    """Whether the module's forward looks up the attention function of transformers."""
    return _names(module, "ALL_ATTENTION_FUNCTIONS")


def _names(module: nn.Module, name: str) -> bool:
    """Whether the code of a module's forward uses a name."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and name in code.co_names


def _looks_like_attention(module: nn.Module) -> bool:
    """Whether the module is the innermost one that is named like attention."""
    return _named_attention(module) and not any(_named_attention(part) for part in list(module.modules())[1:])


def _named_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    # A wrapper's class is named after what it wraps.
    return "attention" in name and "linear" not in name and WRAPPED not in module._modules


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the part of a model that reads text."""
    known: Any = model
    decoder = known.get_decoder() if hasattr(known, "get_decoder") else None
    # What is called a decoder may also be the head, which has no layers (ModernBERT's).
    has_layers = decoder is not None and any(isinstance(part, nn.ModuleList) for part in decoder.modules())
    root: nn.Module = look_through(decoder if has_layers else known.base_model)
    return root


def _attention_modules(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[int, str]:
    """Return the names of the outermost wanted modules of the text decoder, by their layer's number."""
    root = decoder_of(model)
    named: list[tuple[str, int, int]] = []
    inside: list[str] = []
    for name, module in root.named_modules():
        parts = name.split(".")
        depth = next((place for place, part in enumerate(parts) if part.isdigit()), None)
        nested = any(name.startswith(outer + ".") for outer in inside)
        if depth is None or nested or not wanted(module) or _is_cross_attention(parts[-1], module):
            continue
        inside.append(name)
        named.append((name, depth, int(parts[depth])))
    # Towers for images and sound lie deeper inside, and number their layers too.
    nearest = min((depth for _, depth, _ in named), default=0)
    found: dict[int, str] = {}
    for name, depth, number in named:
        if depth > nearest:
            continue
        if number in found:
            first, second = (type(root.get_submodule(other)).__name__ for other in (found[number], name))
            raise UnsupportedModelError(
                f"layer {number} of {type(model).__name__} has more than one attention module ({first}, "
                f"{second}): it is not known which one to read"
            )
        found[number] = name
    return found


def _is_cross_attention(name: str, module: nn.Module) -> bool:
    """Whether a module attends to something else than the text: an encoder's output, or images."""
    # Decoders that were made for an encoder (Bart's) have both kinds in one class. ProphetNet's `cross_attn`
    # is left out on purpose: it also attends in a second stream, whose attention is in no map.
    named = name == "encoder_attn" or "CrossAttention" in type(module).__name__
    return named or bool(getattr(module, "is_cross_attention", False))


def _layer(root: nn.Module, attention_name: str, number: int) -> Layer:
    """Return the modules of the layer that an attention module belongs to."""
    parts = attention_name.split(".")
    block_name = ".".join(parts[: parts.index(str(number)) + 1])
    block = look_through(root.get_submodule(block_name))
    attention = root.get_submodule(attention_name)
    outer = root.get_submodule(attention_name.removesuffix("." + WRAPPED))
    # The children of the layer itself, even if a wrapper stands in for it.
    inner = block._modules.get(WRAPPED) or block
    children = [look_through(child) for child in inner.children()]
    others = [child for child in children if attention not in child.modules() and _is_working(child)]
    feed_forward = others[0] if len(others) == 1 else None
    return Layer(block, attention, outer, feed_forward)


def _is_working(module: nn.Module) -> bool:
    """Whether a layer's child does more than normalise, rotate, apply dropout or activate."""
    return any(_holds_weights(part) for part in module.modules() if not _is_auxiliary(part))


def _is_auxiliary(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "norm" in name or "rotary" in name


def _holds_weights(module: nn.Module) -> bool:
    """Whether a module has weights of its own: parameters or, if it is quantised, buffers.

    Buffers that are not saved with the model are tables (frequencies, masks) and no weights.
    """
    tables = module._non_persistent_buffers_set
    buffers = (name for name, value in module._buffers.items() if value is not None and name not in tables)
    return any(value is not None for value in module._parameters.values()) or any(True for _ in buffers)


def _refused_sites(family: str, layers: dict[int, Layer]) -> dict[str, str]:
    refused = {}
    for layer in layers.values():
        if layer.feed_forward is None:
            refused["mlp_output"] = (
                f"the layers of {family} have no single feed-forward module whose output it would be"
            )
        elif _takes_residual(layer.feed_forward):
            refused["mlp_output"] = (
                f"the feed-forward module of {family} adds the residual stream to its output itself"
            )
        if _takes_residual(layer.attention):
            refused["attention_output"] = (
                f"the attention module of {family} adds the residual stream to its output itself"
            )
    return refused


def _takes_residual(module: nn.Module) -> bool:
    """Whether a module takes the residual stream, which its output then includes."""
    module = module._modules.get(WRAPPED) or module
    return "residual" in inspect.signature(type(module).forward).parameters


def _is_decoder(model: nn.Module) -> bool:
    """Whether the model is causal; some encoder classes can be configured to be."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config: Any = model.config
    can_be_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    named_causal = any("CausalLM" in base.__name__ for base in type(model).__mro__)
    return not can_be_encoder or named_causal or bool(getattr(config, "is_decoder", False))


def has_next_token_logits(model: nn.Module) -> bool:
    """Whether a transformers model's logits are those of the next token, one for each id.

    Base models have no output embeddings, and neither have classifiers, whose scores are called logits too.
    Some replace the output embeddings of a language model by a narrower head, or by nothing.
    """
    known: Any = model
    head = known.get_output_embeddings()
    if head is None:
        return False
    head = head._modules.get(WRAPPED) or look_through(head)
    rows = getattr(head, "out_features", None)
    if rows is None:
        weight = getattr(head, "weight", None)
        rows = None if weight is None else weight.shape[0]
    if rows is None:
        return any(_holds_weights(part) for part in head.modules())
    return int(rows) >= int(known.config.get_text_config(decoder=True).vocab_size)

"""Tiny random models of every causal language model that the installed transformers knows.

`causal_families` lists them, from the library's own auto-mapping, and `build_family` builds one: a few layers
that include each special kind the family has (sliding windows, sparse top-k, shared keys, recurrences), with
weights that make attention uneven, so that a wrong mask or position shows. The check of all families
(family_checks) and its tests call it. What is left to others: the tables of sizes (family_sizes), the small
fixed set of families for everyday tests (tiny_models), and what is done with a model.
"""

from __future__ import annotations

from typing import Any

import torch

from attnprobe.errors import UnsupportedModelError
from attnprobe.testing.family_sizes import FACTORS, NOT_ALONE, OMIT, OWN_SETTINGS, SIZES


def causal_families() -> list[str]:
    """Return the `model_type` of every family that transformers maps to a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def family_config(name: str, **changes: Any) -> Any:
    """Return the config of a family's tiny model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[name]
    return config_class(**{**_settings(name, config_class), **changes})


def _settings(name: str, config_class: Any) -> dict[str, Any]:
    """Return the recipe's settings for a config class, with those of its parts."""
    fields = _fields(config_class)
    settings = {field: SIZES[field] for field in fields if field in SIZES}
    special = OWN_SETTINGS.get(name, {})
    if "kv_lora_rank" in fields:
        # Latent attention: every head has its own keys, made of two parts.
        settings |= {"num_key_value_heads": 4, "head_dim": OMIT}
    settings |= _layer_kinds(config_class, fields, settings | special)
    for part in getattr(config_class, "sub_configs", None) or {}:
        default: Any = getattr(config_class(), part, None)
        if default is not None:
            kind = default.model_type
            settings[part] = {"model_type": kind, **_settings(kind, type(default))}
    for field, value in special.items():
        if isinstance(value, dict) and isinstance(settings.get(field), dict):
            value = {**settings[field], **value}
        settings[field] = value
    return {field: value for field, value in settings.items() if value is not OMIT}


def _fields(config_class: Any) -> list[str]:
    """Return the names of the settings that a config class and its bases declare."""
    return list(
        dict.fromkeys(
            field for base in config_class.__mro__ for field in vars(base).get("__annotations__", {})
        )
    )


def _layer_kinds(config_class: Any, fields: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Return lists of layer kinds that repeat each kind that the class has by default."""
    depth = settings.get("num_hidden_layers", 4)
    kinds: dict[str, Any] = {}
    for field in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if field in fields and field not in settings:
            default = getattr(config_class(), field, None)
            if default and len(set(default)) > 1:
                unique = list(dict.fromkeys(default))
                kinds[field] = [unique[i % len(unique)] for i in range(depth)]
    return kinds


def build_family(name: str, implementation: str | None = None, *, seed: int = 0, **changes: Any) -> Any:
    """Return a tiny random model of a family, in evaluation mode; the same arguments give the same weights.

    Args:
        name: one of `causal_families()`.
        implementation: the attention implementation; default: the family's own choice.
        seed: the seed of the weights.
        changes: settings of the config, in place of those of the recipe.

    Raises:
        UnsupportedModelError: the family does not run on token ids alone, or needs a missing package.

    >>> build_family("gemma2").config.layer_types
    ['sliding_attention', 'full_attention', 'sliding_attention', 'full_attention']
    """
    from transformers import AutoModelForCausalLM

    if name in NOT_ALONE:
        raise UnsupportedModelError(f"{name} {NOT_ALONE[name]}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = family_config(name, **changes)
        if implementation is None and getattr(config, "attn_logit_softcapping", None) is not None:
            # Older versions of transformers choose sdpa even so, and then leave the soft cap out.
            implementation = "eager"
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation, dtype=torch.float32
        ).eval()
        _sharpen(model, FACTORS.get(name, 12.0))
    model.generation_config.eos_token_id = None
    return model


def _sharpen(model: Any, factor: float) -> None:
    """Make attention uneven: larger matrices, and vectors (norms, biases, sinks) that are not all alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)

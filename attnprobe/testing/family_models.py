"""Tiny random models of every causal language model that the installed transformers knows.

`causal_families` lists them, from the library's own auto-mapping, and `build_family` builds one: a few layers
that include each special kind the family has (sliding windows, sparse top-k, shared keys, recurrences), with
weights that make attention uneven, so that a wrong mask or position shows. The sizes come from one recipe,
which sets the names that the family's config class has, and from a small table for what the recipe cannot
know. The check of all families (family_checks) and its tests call it. What is left to others: the small fixed
set of families for everyday tests (tiny_models), and what is done with a model.
"""

from __future__ import annotations

from typing import Any

import torch

from attnprobe.errors import UnsupportedModelError

VOCABULARY = 99
WINDOW = 7
"""Windows, chunks and the budgets of sparse attention: all shorter than the sequences of the checks."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 256,
    "max_target_positions": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "max_seq_len": 256,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "emb_dim": 32,
    "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "dff": 48,
    "dim_ff": 48,
    "d_inner": 48,
    "feed_forward_size": 48,
    "ffn_hidden_size": 48,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "decoder_layers": 4,
    "encoder_layers": 4,
    "num_decoder_layers": 4,
    "num_encoder_layers": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "kv_channels": 8,
    "d_head": 8,
    "dim_head": 8,
    "attention_head_size": 8,
    "global_head_dim": 8,
    "rotary_dim": 4,
    # Mixtures of experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "zero_expert_num": 1,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "dense_intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "prefix_dense_intermediate_size": 48,
    # Latent attention and indexers.
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": WINDOW,
    "index_head_dim": 16,
    # Fewer heads would give exact ties at the edge of the top-k, which the width of a call decides.
    "index_n_heads": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
    # Vision and audio towers, which are built but not run.
    "image_size": 28,
    "patch_size": 14,
    "base_channels": 32,
    "latent_channels": 4,
    "output_channels": 8,
    "mlp_dim": 48,
    "codebook_size": 32,
    "vision_output_dim": 32,
    "num_blocks": 1,
    "ext_pw_out_channel": 32,
    "depthwise_separable_out_channel": 32,
    "nemo_conv_channels": 32,
    # Windows.
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 8,
    "rel_extent": 16,
    "attention_window_size": WINDOW,
    "window_size": WINDOW,
    "local_attention": 2 * WINDOW,
    "attention_chunk_size": WINDOW,
    "keep_window_size": WINDOW,
    # Recurrences and convolutions.
    "mamba_d_state": 8,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_expand": 1,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "n_mamba_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "mamba_headdim": 8,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 8,
    "n_groups": 1,
    "chunk_size": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "time_step_rank": 4,
    "use_mamba_kernels": False,
    "expand": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "lru_width": 32,
    "use_associative_scan": False,
    # Embeddings for each layer, and keys shared between layers.
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "query_pre_attn_scalar": 8,
    "layerdrop": 0.0,
    # Bert-like models are causal only if they are told to be.
    "is_decoder": True,
    "type_vocab_size": 2,
}
"""The settings of the recipe, each used where a config class has a field of that name."""

_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_OMIT = object()
"""In the table: leave a field of the recipe at the class's own default."""

_FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 4},
    "big_bird": {"block_size": 4, "num_random_blocks": 1},
    "blt": {
        "vocab_size": 260,
        "num_hidden_layers": 2,
        "patch_size": 4,
        "max_patch_length": _OMIT,
        "encoder_hash_byte_group_vocab": 64,
        "local_attention_window_len": WINDOW,
        "encoder_config": {"vocab_size": 260, "num_hidden_layers": 1, "hidden_size_global": 32},
        "decoder_config": {"vocab_size": 260, "num_hidden_layers": 2, "hidden_size_global": 32},
        "patcher_config": {"vocab_size": 260, "num_hidden_layers": 1},
    },
    "cohere_compass_text": {
        "layer_types": _ALTERNATING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in set(_ALTERNATING)
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "num_key_value_heads": 1,
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    },
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense"] * 4},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "fuyu": {"text_config": {"model_type": "persimmon"}},
    "glm_moe_dsa": {"indexer_types": ["full", "shared", "full", "shared"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_hidden_layers": 2, "H_cycles": 1, "L_cycles": 1, "L_bp_cycles": _OMIT},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": _ALTERNATING},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {"layer_types": ["conv", "full_attention", "conv", "sliding_attention"]},
    "longcat_flash": {"num_layers": 2, "head_dim": 4},
    "mellum": {"layer_types": _ALTERNATING},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "moshi": {"audio_vocab_size": 32},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention"],
    },
    "qwen2": {"layer_types": _ALTERNATING},
    "qwen2_moe": {"layer_types": _ALTERNATING},
    "qwen3": {"layer_types": _ALTERNATING},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "reformer": {
        "hidden_size": 32,
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (8, 8),
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "num_hidden_layers": 4,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "smollm3": {"layer_types": _ALTERNATING},
    "xmod": {"default_language": "en_XX"},
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid", "hybrid_sliding"] * 2,
        "router_hidden_size": 16,
    },
}
_FAMILIES["qwen4_exp"] = {"text_config": _FAMILIES["qwen4_exp_text"]}
"""What single families need beyond the recipe, by `model_type`."""

_FACTORS: dict[str, float] = {
    "blt": 3.0,
    "gemma4": 6.0,
    "gemma4_text": 6.0,
    "gemma4_unified": 6.0,
    "gemma4_unified_text": 6.0,
    "hy_v4": 20.0,
    "jetmoe": 30.0,
    "minicpm3": 4.0,
    "recurrent_gemma": 3.0,
    "roformer": 5.0,
    "youtu": 3.0,
    "zamba2": 6.0,
    "zaya": 30.0,
}
"""By how much weights are multiplied, where 12 gives maps that are uniform, one-hot or not finite."""


NOT_ALONE: dict[str, str] = {
    "gemma4_assistant": "drafts tokens from the hidden states and keys of another model",
    "gemma4_unified_assistant": "drafts tokens from the hidden states and keys of another model",
    "musicgen": "takes audio codes of several codebooks",
    "musicgen_melody": "takes audio codes of several codebooks",
}
"""Families that cannot be run on token ids alone, with the reason."""


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
    settings = {field: _SIZES[field] for field in fields if field in _SIZES}
    special = _FAMILIES.get(name, {})
    if "kv_lora_rank" in fields:
        # Latent attention: every head has its own keys, made of two parts.
        settings |= {"num_key_value_heads": 4, "head_dim": _OMIT}
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
    return {field: value for field, value in settings.items() if value is not _OMIT}


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
        _sharpen(model, _FACTORS.get(name, 12.0))
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

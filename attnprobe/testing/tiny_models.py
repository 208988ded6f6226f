"""Tiny random causal language models of many families, built from transformers' config classes.

Each has a few layers of a few heads with random weights: enough to run every code path of a family in
milliseconds, without a download. Tests and the examples in docstrings call `tiny_model`. What is left to
others: real weights, and what is tested.
"""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 99

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
_ROUTED: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_GPT2_LIKE: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": 7},
    "qwen2": {**_LLAMA_LIKE, "num_key_value_heads": 1},
    "qwen3": _LLAMA_LIKE,
    "gemma2": {**_LLAMA_LIKE, "sliding_window": 7, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**_LLAMA_LIKE, "sliding_window": 7, "query_pre_attn_scalar": 8},
    "gemma4_text": {
        **_LLAMA_LIKE,
        "num_hidden_layers": 4,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 8,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
    },
    "gpt_oss": {**_LLAMA_LIKE, **_ROUTED, "sliding_window": 7},
    "phi3": {**_LLAMA_LIKE, "pad_token_id": 0, "original_max_position_embeddings": 256},
    "olmo2": _LLAMA_LIKE,
    "cohere": _LLAMA_LIKE,
    "granite": {**_LLAMA_LIKE, "logits_scaling": 4.0, "attention_multiplier": 0.2},
    "stablelm": {**_LLAMA_LIKE, "partial_rotary_factor": 0.5},
    "starcoder2": {**_LLAMA_LIKE, "sliding_window": None},
    "mixtral": {**_LLAMA_LIKE, **_ROUTED},
    "smollm3": {**_LLAMA_LIKE, "pad_token_id": 0},
    "gpt2": _GPT2_LIKE,
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 32,
    },
    "gpt_bigcode": {**_GPT2_LIKE, "multi_query": True},
    "deepseek_v3": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "deepseek_v32": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "index_topk": 8,
        "index_head_dim": 16,
        "index_n_heads": 16,
    },
    "phi": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
    "cohere2": {**_LLAMA_LIKE, "sliding_window": 7, "layer_types": _ALTERNATING},
    "glm4": {**_LLAMA_LIKE, "pad_token_id": 0},
    "olmoe": {**_LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        **_LLAMA_LIKE,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 7,
        "intermediate_size_mlp": 48,
    },
    "qwen3_next": {
        **_LLAMA_LIKE,
        "num_hidden_layers": 4,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "jamba": {
        **_LLAMA_LIKE,
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "falcon_h1": {
        **_LLAMA_LIKE,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "lfm2": {**_LLAMA_LIKE, "layer_types": ["conv", "full_attention", "conv"]},
    "minimax": {**_LLAMA_LIKE, "num_local_experts": 2, "num_experts_per_tok": 1},
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    "gptj": {**_GPT2_LIKE, "rotary_dim": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 256},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 7,
        "max_position_embeddings": 256,
    },
}
"""The families, by their transformers `model_type`, with the settings that make them tiny."""

REFUSED: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "diffllama": _LLAMA_LIKE,
    "openai-gpt": _GPT2_LIKE,
    "bert": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "is_decoder": False,
    },
}
"""Families that cannot be read; the errors say why."""

TRAITS: dict[str, str] = {
    "llama": "rotary, grouped queries",
    "mistral": "sliding window",
    "qwen2": "query and key bias, one key head",
    "qwen3": "query and key norm",
    "gemma2": "soft cap, alternating windows, post-norms",
    "gemma3_text": "query and key norm, alternating windows, post-norms",
    "gemma4_text": "keys shared by the last layers, alternating windows",
    "gpt_oss": "sinks, alternating windows, mixture of experts",
    "phi3": "joint projections",
    "olmo2": "norms after the modules",
    "cohere": "parallel blocks",
    "granite": "scaled residuals and attention",
    "stablelm": "partial rotary",
    "starcoder2": "biases",
    "mixtral": "mixture of experts",
    "smollm3": "some layers without positions",
    "gpt2": "learned positions",
    "gpt_neox": "parallel blocks, partial rotary",
    "opt": "learned positions, feed-forward without a module",
    "gpt_bigcode": "multi-query",
    "deepseek_v3": "latent attention, mixture of experts",
    "deepseek_v32": "latent attention, sparse keys, mixture of experts",
    "phi": "parallel blocks, partial rotary",
    "cohere2": "parallel blocks, alternating windows",
    "glm4": "partial rotary, post-norms",
    "olmoe": "mixture of experts, query and key norm",
    "llama4_text": "chunked attention, mixture of experts",
    "qwen3_next": "hybrid: linear attention, gated attention",
    "jamba": "hybrid: Mamba",
    "falcon_h1": "attention beside Mamba in each layer",
    "lfm2": "hybrid: short convolutions",
    "minimax": "hybrid: lightning attention",
    "bloom": "ALiBi",
    "falcon": "multi-query, parallel blocks",
    "gptj": "parallel blocks, partial rotary",
    "mpt": "ALiBi",
    "gpt_neo": "learned positions, alternating windows",
}
"""What is particular about a family's attention or layers."""


def tiny_model(family: str, *, implementation: str | None = None, seed: int = 0, **changes: Any) -> Any:
    """Return a tiny random model of a family, in float32 and evaluation mode.

    `implementation` is the attention implementation ("eager", "sdpa"; default: the family's own), and
    `changes` go to the config. Weights are larger than a new model's, so that attention is far from
    uniform.

    >>> type(tiny_model("llama")).__name__
    'LlamaForCausalLM'
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = FAMILIES.get(family) or REFUSED[family]
    config = AutoConfig.for_model(family, **{**settings, "vocab_size": VOCABULARY, **changes})
    if implementation is None and getattr(config, "attn_logit_softcapping", None) is not None:
        # Older versions of transformers choose sdpa even so, and then leave the soft cap out.
        implementation = "eager"
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(12.0)
    finally:
        torch.random.set_rng_state(state)
    return model.eval()


def tiny_tokenizer(text: str = "Read what the model reads.\n") -> Any:
    """Return a byte-level BPE tokenizer with a chat template, trained on a text; about 300 ids.

    Use it with `tiny_model(family, vocab_size=300)`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>", "<turn>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    template = "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>{% endfor %}<turn>assistant\n"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", chat_template=template
    )

"""Tiny random causal language models of many families, built from transformers' config classes.

Each is a few layers of a few heads with random weights: enough to run every code path of a family in
milliseconds, without a download. What is left to others: real weights and what is tested.
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
_GPT2_LIKE: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": 7},
    "qwen2": {**_LLAMA_LIKE, "num_key_value_heads": 1},
    "qwen3": _LLAMA_LIKE,
    "gemma2": {**_LLAMA_LIKE, "sliding_window": 7, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**_LLAMA_LIKE, "sliding_window": 7, "query_pre_attn_scalar": 8},
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
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    "gptj": {**_GPT2_LIKE, "rotary_dim": 4},
}
"""Families, by their transformers `model_type`, and what makes them tiny."""


def tiny_model(family: str, *, implementation: str | None = None, seed: int = 0, **changes: Any) -> Any:
    """Return a tiny random model of a family, in float32 and evaluation mode.

    `implementation` is the attention implementation ("eager", "sdpa"; default: the family's own), and
    `changes` go to the config. Weights are spread out more than a new model's, so that attention is
    far from uniform.

    >>> type(tiny_model("llama")).__name__
    'LlamaForCausalLM'
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**FAMILIES[family], "vocab_size": VOCABULARY, **changes})
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

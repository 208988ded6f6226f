"""Tiny random vision-language models, with what their processors would return for two texts and images.

Tests call these. Each model has two decoder layers and a vision tower of one or two, which turns an image of
16 pixels' width into four tokens. What is left to others: models of text alone (tiny_models).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCABULARY = 99
IMAGE_TOKEN = 90
_IMAGE_TOKENS = 4

_DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SECTIONED = {
    **_DECODER,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
}
_SPECIAL = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "image_size": 16}
_MERGING = {"num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1}
_SIGLIP = {
    **_TOWER,
    "model_type": "siglip_vision_model",
    "num_hidden_layers": 1,
    "patch_size": 8,
    "vision_use_head": False,
}

VISION_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        **_SPECIAL,
        "text_config": _SECTIONED,
        "vision_config": {**_MERGING, "depth": 1, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        **_SPECIAL,
        "text_config": _SECTIONED,
        "vision_config": {
            **_MERGING,
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
    },
    "qwen3_vl": {
        **_SPECIAL,
        "text_config": _SECTIONED,
        "vision_config": {
            **_MERGING,
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
    "llava": {
        "text_config": {**_DECODER, "model_type": "llama"},
        "vision_config": {
            **_TOWER,
            "model_type": "clip_vision_model",
            "num_hidden_layers": 2,
            "patch_size": 8,
            "projection_dim": 16,
        },
        "image_token_index": IMAGE_TOKEN,
        "image_seq_length": _IMAGE_TOKENS,
    },
    "smolvlm": {
        "text_config": {**_DECODER, "model_type": "llama"},
        "vision_config": {**_TOWER, "num_hidden_layers": 1, "patch_size": 4},
        "image_token_id": IMAGE_TOKEN,
        "scale_factor": 2,
        "pad_token_id": 0,
    },
}
"""The families whose tokens see earlier ones only, images included, each with settings of its config."""

MUTUAL_FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {
            **_DECODER,
            "model_type": "gemma3_text",
            "sliding_window": 16,
            "query_pre_attn_scalar": 8,
        },
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": _IMAGE_TOKENS,
        "image_token_index": IMAGE_TOKEN,
        "boi_token_index": 91,
        "eoi_token_index": 92,
    },
    "paligemma": {
        "text_config": {**_DECODER, "model_type": "gemma", "num_image_tokens": _IMAGE_TOKENS},
        "vision_config": {**_SIGLIP, "projection_dim": 32},
        "image_token_index": IMAGE_TOKEN,
        "projection_dim": 32,
    },
}
"""The families in which the tokens of an image see each other, which are refused."""


def tiny_vision_model(family: str, *, implementation: str | None = None) -> Any:
    """Return a tiny random vision-language model of a family, in float32 and evaluation mode.

    Weights are larger than a new model's, so that attention is far from uniform.

    >>> type(tiny_vision_model("llava")).__name__
    'LlavaForConditionalGeneration'
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    settings = VISION_FAMILIES.get(family) or MUTUAL_FAMILIES[family]
    # A copy in depth: configs change the dictionaries that they are given.
    config = AutoConfig.for_model(
        family, **{k: dict(v) if isinstance(v, dict) else v for k, v in settings.items()}
    )
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation=implementation)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(8.0)
    finally:
        torch.random.set_rng_state(state)
    return model.eval()


def image_inputs(family: str, *, padding: int = 0) -> dict[str, Tensor]:
    """Return what a processor returns for two texts of 27 tokens, each with an image near its start.

    The first text lacks its first `padding` tokens, and has as many of padding on the left.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 80, (2, 27), generator=generator)
    ids[:, 5 : 5 + _IMAGE_TOKENS] = IMAGE_TOKEN
    real = torch.ones_like(ids)
    ids[0, :padding], real[0, :padding] = 0, 0
    is_image = (ids == IMAGE_TOKEN).int()
    inputs = {"input_ids": ids, "attention_mask": real}
    if family.startswith("qwen"):
        # Sixteen patches of 3 x 4 x 4 for each image, all in one list.
        pixels = torch.randn(32, 48, generator=generator)
        grids = torch.tensor([[1, 4, 4], [1, 4, 4]])
        return {**inputs, "pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": is_image}
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    if family == "smolvlm":
        shown = torch.ones(2, 1, 16, 16, dtype=torch.bool)
        return {**inputs, "pixel_values": pixels[:, None], "pixel_attention_mask": shown}
    if family == "gemma3":
        return {**inputs, "pixel_values": pixels, "token_type_ids": is_image.long()}
    return {**inputs, "pixel_values": pixels}

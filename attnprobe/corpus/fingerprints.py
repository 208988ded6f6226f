"""What a run was made from, in a form that another run can be compared with: model, tokenizer, groups.

The manifest of a folder of scores holds these, so that it is only continued with the same. What is left to
others: the input's checksums (sources) and what is done about a difference (folder).
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from attnprobe.adapters.base import Adapter
from attnprobe.head_groups import HeadGroups

_SAMPLED = 64
"""How many numbers of each weight count: training moves nearly all, and reading all of a large model takes
longer than continuing a run may take."""


def model_fingerprint(model: Any, adapter: Adapter) -> dict[str, Any]:
    """Return what a model is: its name, class and kind of numbers, and checksums of config and weights.

    Of each weight, 64 evenly spaced numbers count.
    """
    config = getattr(model, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    told: dict[str, Any] = {"name": adapter.model_name, "class": adapter.family, "attention": attention}
    if config is not None and hasattr(config, "to_dict"):
        settings = {
            name: value
            for name, value in config.to_dict().items()
            if not name.startswith("_") and name not in ("transformers_version", "use_cache")
        }
        told["config"] = _digest(json.dumps(settings, sort_keys=True, default=str))
    if isinstance(model, nn.Module):
        told |= {"dtype": _dtype_of(model), "weights": _weights_digest(model)}
    return told


def _dtype_of(model: nn.Module) -> str:
    kinds = {str(weight.dtype).removeprefix("torch.") for weight in model.parameters()}
    return ", ".join(sorted(kinds))


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        place = torch.linspace(0, max(len(flat) - 1, 0), min(_SAMPLED, len(flat)), dtype=torch.float64).long()
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        chosen = flat[place.to(flat.device)].cpu()
        digest.update(
            chosen.double().numpy().tobytes() if chosen.is_floating_point() else str(chosen).encode()
        )
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, Any] | None:
    """Return what a tokenizer is: its class, and a checksum of its rules and chat template; None for none."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    template = str(getattr(tokenizer, "chat_template", None))
    return {"class": type(tokenizer).__name__, "rules": _digest(rules), "template": _digest(template)}


def groups_fingerprint(groups: HeadGroups) -> str:
    """Return a checksum of which heads are in which group, in which layers."""
    masks = [groups.local_heads, groups.global_heads, groups.receiver_heads]
    lists = [None if mask is None else mask.cpu().tolist() for mask in masks]
    return _digest(json.dumps([list(groups.layers), lists]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""Backend adapters: one hook interface over the ways in which a model can be run.

`adapter_for` picks the adapter by the object's class. A backend that is not loaded cannot have made
the object, so no backend is imported to find out.
"""

from __future__ import annotations

import sys
from typing import Any

from attnprobe.adapters.base import SITES, Adapter, Observer
from attnprobe.errors import UnsupportedModelError

__all__ = ["SITES", "Adapter", "Observer", "adapter_for"]


def adapter_for(model: Any) -> Adapter:
    """Return the adapter for a model: a transformers model, or an adapter, which is returned as is.

    Raises:
        UnsupportedModelError: an object that no adapter knows, or a model whose attention cannot be
            read, with the reason.
    """
    if isinstance(model, Adapter):
        return model
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        from attnprobe.adapters.transformers import TransformersAdapter

        return TransformersAdapter(model)
    raise UnsupportedModelError(
        f"no adapter knows {type(model).__module__}.{type(model).__qualname__}: pass a transformers "
        "causal language model"
    )

"""The backends around an existing transformers model, without a tokenizer or a network.

The tests and the table of families use them. What is left to others: which models (tiny_models,
family_models), and what is done with them (conformance, family_checks).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from attnprobe.errors import UnsupportedModelError


def in_transformers(model: Any) -> Any:
    """Return the model itself."""
    return model


def in_transformer_lens(model: Any) -> Any:
    """Return a TransformerBridge around the model, which it changes.

    Raises:
        UnsupportedModelError: TransformerLens does not know this family.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    try:
        return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    except ValueError as error:
        raise UnsupportedModelError(f"TransformerLens has no bridge for it: {error}") from error


def in_nnsight(model: Any) -> Any:
    """Return an NNsight wrapper around the model."""
    # Imported late, since importing nnsight puts an attribute on every object.
    import nnsight

    return nnsight.NNsight(model)


def run_in_trace(wrapper: Any, input_ids: Tensor, **arguments: Any) -> None:
    """Run an nnsight wrapper as its users do, in a trace."""
    with wrapper.trace(input_ids, **arguments):
        pass


BACKENDS: dict[str, Callable[[Any], Any]] = {
    "transformers": in_transformers,
    "transformer_lens": in_transformer_lens,
    "nnsight": in_nnsight,
}
"""The function that puts a transformers model into each backend, by the adapter's name."""

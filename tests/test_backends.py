"""Every backend conforms: the same sites, the same numbers, and the model as it was."""

from __future__ import annotations

from attnprobe.errors import UnsupportedModelError
from attnprobe.testing.conformance import conformance_test


def bridged(model):
    """Put a model into a TransformerBridge, without a tokenizer."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    try:
        return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    except ValueError as error:
        raise UnsupportedModelError(str(error)) from error


def in_nnsight(model):
    """Put a model into an nnsight wrapper."""
    # Late: importing nnsight changes built-in classes, which beartype cannot be imported after.
    import nnsight

    return nnsight.NNsight(model)


def traced(wrapper, input_ids, **arguments) -> None:
    """Run a wrapper as its users do: in a trace."""
    with wrapper.trace(input_ids, **arguments):
        pass


test_transformers = conformance_test(lambda model: model)
test_transformer_lens = conformance_test(bridged)
test_nnsight = conformance_test(in_nnsight, run=traced)

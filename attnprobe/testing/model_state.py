"""Everything about a model that reading it could change, to check that it is as it was before.

The conformance suite and the tests of adapters call `model_state` before and after. What is left to others:
what happens to the model in between.
"""

from __future__ import annotations

from typing import Any

import torch


def model_state(model: Any) -> dict[str, Any]:
    """Return everything about a model that reading it could change."""
    modules = dict(model.named_modules())
    configs = {name: getattr(module, "config", None) for name, module in modules.items()}
    return {
        "class": type(model),
        "classes": {name: type(module) for name, module in modules.items()},
        "implementation": {
            name: getattr(config, "_attn_implementation_internal", None) for name, config in configs.items()
        },
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in modules.items()
        },
        "mode": {name: module.training for name, module in modules.items()},
        "forward": {name: vars(module).get("forward") for name, module in modules.items()},
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Check that two results of `model_state` are equal.

    Raises:
        AssertionError: they are not; the message names what differs.
    """
    for name in before:
        assert before[name].keys() == after[name].keys() if isinstance(before[name], dict) else True, name
        if name == "weights":
            changed = [key for key, value in before[name].items() if not torch.equal(value, after[name][key])]
            assert not changed, changed
        else:
            assert before[name] == after[name], name

"""What libraries put around a transformers model: finding it inside, and running it so that it can be read.

PEFT, `torch.compile` and `DistributedDataParallel` hand people an object that is not the transformers model
itself; accelerate may keep the weights of one elsewhere. What such a wrapper does to the text is known here,
so the model inside is read. Any other object is refused, and the message names the attribute that holds the
model: what an unknown wrapper does to the text before the model sees it, nobody can tell.

`adapter_for`, the adapters and `bare_policy` call this module. What is left to others: wrappers with a
backend of their own (transformer_lens, nnsight), and what is inside the transformers model (architecture).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from attnprobe.adapters.versions import check_versions
from attnprobe.errors import UnsupportedModelError

_HELD_AS = {
    "torch.OptimizedModule": "_orig_mod",
    "torch.DistributedDataParallel": "module",
    "torch.FullyShardedDataParallel": "_fsdp_wrapped_module",
    "torch.CheckpointWrapper": "_checkpoint_wrapped_module",
}
"""The wrappers of PyTorch that call the module inside with the arguments they get, and where they hold it."""

_PEFT_MODELS = ("peft.PeftModel", "peft.PeftMixedModel")


def class_names(thing: Any) -> list[str]:
    """Return `package.ClassName` for the classes of an object, in the order of inheritance.

    The package is the top-level one, so that a class that moves within its package keeps its name.

    >>> class_names(nn.Linear(1, 1))[0]
    'torch.Linear'
    """
    return [f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(thing).__mro__]


def look_through(module: Any) -> Any:
    """Return the module that PyTorch's own wrappers stand for, or the module itself.

    >>> linear = nn.Linear(1, 1)
    >>> look_through(torch.compile(linear)) is linear
    True
    """
    while held := next((_HELD_AS[name] for name in class_names(module) if name in _HELD_AS), None):
        module = module._modules[held]
    return module


def transformers_model(model: Any) -> Any:
    """Return the model inside PEFT's and PyTorch's wrappers, or the model itself.

    Adapters of PEFT live in the layers of the model inside, so reading it reads them too.

    Raises:
        UnsupportedModelError: a PEFT method that does more than to change layers, or a version of PEFT that
            is not read.
    """
    model = look_through(model)
    while any(name in _PEFT_MODELS for name in class_names(model)):
        _check_peft(model)
        # Not get_base_model(): a mixed PEFT model has none.
        model = look_through(model.base_model.model)
    return model


def _check_peft(model: Any) -> None:
    """Check that a PEFT method changes nothing but the layers of the model, and PEFT's version."""
    check_versions("peft")
    for config in model.peft_config.values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "is_prompt_learning", False):
            reason = "it adds virtual tokens, which exist only inside the wrapper, before your own"
        elif getattr(config, "is_adaption_prompt", False):
            reason = "each of its layers also attends to a learned prompt, outside the model's attention call"
        elif kind == "XLORA":
            reason = "it runs the model twice for each forward pass"
        else:
            continue
        raise UnsupportedModelError(
            f"this {type(model).__name__} uses {kind}, which cannot be read: {reason}. Methods that change "
            "weights or layers (LoRA, IA3, ...) are read; the bare model is model.get_base_model()"
        )


def execution_device(*modules: nn.Module) -> torch.device:
    """Return the device on which the first of the modules computes.

    accelerate may keep the weights of a module on the CPU or on disk, with only meta tensors in their place,
    and bring them to the execution device for each call; its hook says which that is. The later modules are
    asked if the first has no such hook.
    """
    for module in modules:
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            device = getattr(part, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return first_weight(*modules).device


def first_weight(*modules: nn.Module) -> Tensor:
    """Return a weight of the first module that has any; quantised modules have them in buffers."""
    return next(weight for module in modules for weight in chain(module.parameters(), module.buffers()))


# ---- compiled code ----------------------------------------------------------------------------

# How many contexts need eager code, and what the first of them has opened. The stance is one for the whole
# process, and contexts in several threads may close in any order: the last one restores it.
_eager_contexts = 0
_stance: AbstractContextManager[Any] | None = None
_lock = threading.Lock()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run everything that was compiled by `torch.compile` as plain Python while the context is open.

    Compiled code does not call hooks that were added after it was compiled, so a compiled model, layer or
    function could not be read. Replacing only the compiled parts of the model was rejected: a compiled
    function that calls the model would not be found, and `generate` compiles when it pleases. Afterwards the
    compiled code is used again, without compiling anew.
    """
    global _eager_contexts, _stance
    with _lock:
        if _eager_contexts == 0:
            # The constructor already sets the stance, and remembers the one before.
            _stance = torch.compiler.set_stance("force_eager")
        _eager_contexts += 1
    try:
        yield
    finally:
        with _lock:
            _eager_contexts -= 1
            if _eager_contexts == 0 and _stance is not None:
                _stance.__exit__(None, None, None)
                _stance = None


@contextmanager
def compiled_again() -> Iterator[None]:
    """Let compiled code run as compiled code, even inside `uncompiled`, while the context is open.

    FlexAttention compiles itself: as plain Python it would store maps, and the last bits of its output would
    change.
    """
    with torch.compiler.set_stance("default"):
        yield


# ---- what to say about everything else --------------------------------------------------------


def models_inside(thing: Any, is_known: Callable[[Any], bool]) -> dict[str, str]:
    """Return the class of each outermost known model inside an object, by the path that leads to it.

    Modules are searched to the bottom, other objects (a pipeline, a trainer) one attribute deep.

    >>> wrapper = nn.ModuleDict({"policy": nn.ModuleList([nn.Linear(1, 1), nn.Identity()])})
    >>> models_inside(wrapper, lambda module: isinstance(module, nn.Linear))
    {'.policy[0]': 'Linear'}
    """
    found: dict[str, str] = {}
    seen: list[Any] = []
    if isinstance(thing, nn.Module):
        inside: list[str] = []
        for name, module in thing.named_modules():
            if (
                name
                and is_known(look_through(module))
                and not any(name.startswith(f"{outer}.") for outer in inside)
            ):
                inside.append(name)
                parts = (f"[{part}]" if part.isdigit() else f".{part}" for part in name.split("."))
                found["".join(parts)] = type(look_through(module)).__name__
    elif not isinstance(thing, type):
        for name, value in getattr(thing, "__dict__", {}).items():
            model = look_through(value)
            # A trainer holds its model under several names, some of them wrapped.
            if is_known(model) and not any(model is other for other in seen):
                seen.append(model)
                found[f".{name}"] = type(model).__name__
    return found


def refusal(thing: Any, is_known: Callable[[Any], bool]) -> str:
    """Return why an object cannot be read, and what to pass in its place."""
    kind = type(thing)
    said = f"no adapter knows {kind.__module__}.{kind.__qualname__}"
    found = models_inside(thing, is_known)
    if len(found) == 1:
        ((path, name),) = found.items()
        return f"{said}, but it holds a model that can be tried: pass wrapper{path}, a {name}"
    if found:
        each = ", ".join(f"wrapper{path} (a {name})" for path, name in found.items())
        return f"{said}, but it holds several models: pass one of {each}"
    return (
        f"{said}: pass a transformers causal language model, a TransformerBridge, an nnsight wrapper, or "
        "register_adapter your own"
    )

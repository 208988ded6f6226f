"""Hooks on a model's modules that end with a context, and that copies of the modules do not keep.

A user may copy or save a model while a probe is attached. torch copies a module's hooks with it, and with
them all that they refer to. The hooks made here become inert in a copy, and leave it when it is first
called. `Reading` puts them on a model's modules. What is left to others: what the hooks do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class _Hook:
    """A hook; its copy does nothing."""

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self._function = function

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        if self._function is not None:
            return self._function(module, *args)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None,)


@contextmanager
def before_forward(module: nn.Module, function: Callable[..., Any], *, first: bool = False) -> Iterator[None]:
    """Call `function(module, args, kwargs)` before each forward call while the context is open."""
    handle = module.register_forward_pre_hook(_Hook(function), with_kwargs=True, prepend=first)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after_forward(
    module: nn.Module, function: Callable[..., Any], *, always: bool = False, first: bool = False
) -> Iterator[None]:
    """Call `function(module, args, output)` after each forward call while the context is open.

    With `always`, it is called even if the forward call fails; then `output` is None. With `first`, it is
    called before the hooks that are there already.
    """
    handle = module.register_forward_hook(_Hook(function), always_call=always, prepend=first)
    try:
        yield
    finally:
        handle.remove()

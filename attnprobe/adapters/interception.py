"""Seeing the attention calls of a model's own forward passes, and removing pairs or values from them.

Most causal language models pass query, key and mask to an attention function that they look up by name.
While a model is observed or suppressed, the look-up gives them a function that makes the model's own call,
so that outputs stay bitwise the same, and then shows it to the readers. The alternative, a name of our own
in the model's config, was rejected: modeling code compares the name, so that sparse families lost their
top-k mask, and the name leaked into copies, saved files and other libraries' errors. Falcon calls PyTorch's
attention itself, and is watched there.

The adapters open these contexts, and `Reading` gives the readers. What is left to others: what a call says
(attention_call), and an output without some values (value_removal).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from attnprobe.adapters.attention_call import AttentionCall
from attnprobe.adapters.hooks import after_forward, before_forward
from attnprobe.adapters.value_removal import ValueRemoval, without_values
from attnprobe.adapters.versions import check_versions
from attnprobe.adapters.wrappers import compiled_again
from attnprobe.attention.listening import listen
from attnprobe.attention.masks import split_mask
from attnprobe.errors import UnsupportedModelError

Reader = Callable[[AttentionCall], None]
"""A function that is shown each attention call after it was made."""

Suppressor = Callable[[AttentionCall], Tensor]
"""A function that returns which pairs to remove: `[batch or 1, head or 1, query, key]`, True to remove."""

# What reads and suppresses the calls of each attention module, across nested contexts and threads.
_readers: weakref.WeakKeyDictionary[nn.Module, list[Reader]] = weakref.WeakKeyDictionary()
_suppressors: weakref.WeakKeyDictionary[nn.Module, list[Suppressor]] = weakref.WeakKeyDictionary()
_removals: weakref.WeakKeyDictionary[nn.Module, list[ValueRemoval]] = weakref.WeakKeyDictionary()


@contextmanager
def reads_calls(module: nn.Module, reader: Reader) -> Iterator[None]:
    """Show the module's calls to a reader while the context is open."""
    _readers.setdefault(module, []).append(reader)
    try:
        yield
    finally:
        _readers[module].remove(reader)


_own_modules: ContextVar[frozenset[nn.Module]] = ContextVar("attnprobe_own_modules", default=frozenset())


@contextmanager
def own_pass(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Mark the calls of these attention modules as part of one of attnprobe's own forward passes.

    In such a pass the last bits of an output may change for the sake of speed. The modules are listed because
    the user's hooks may run another model during the pass, whose outputs must not change at all.
    """
    token = _own_modules.set(frozenset(modules))
    try:
        yield
    finally:
        _own_modules.reset(token)


@contextmanager
def suppresses_calls(module: nn.Module, suppressor: Suppressor) -> Iterator[None]:
    """Let a suppressor remove pairs from the module's calls while the context is open."""
    _suppressors.setdefault(module, []).append(suppressor)
    try:
        yield
    finally:
        _suppressors[module].remove(suppressor)


@contextmanager
def removes_values(module: nn.Module, removal: ValueRemoval) -> Iterator[None]:
    """Let the module's calls lose values while the context is open; readers see them with all values."""
    _removals.setdefault(module, []).append(removal)
    try:
        yield
    finally:
        _removals[module].remove(removal)


# ---- intercepting the call --------------------------------------------------------------------

# How many contexts need the look-up to be intercepted, in any thread.
_watching = 0
_lock = threading.Lock()
# Some versions of transformers have no such method, and a sentence says more than an AttributeError.
check_versions("transformers")
_look_up = AttentionInterface.get_interface


@contextmanager
def calls_watched() -> Iterator[None]:
    """Show attention calls to the readers and suppressors of their modules while the context is open.

    The look-up is intercepted for all models at once: a module that has neither makes its call as if nothing
    had happened. It is intercepted in the class, since some families look up in a table of their own.
    """
    global _watching
    with _lock:
        _watching += 1
        AttentionInterface.get_interface = _watched_look_up  # type: ignore[assignment]
    try:
        yield
    finally:
        with _lock:
            _watching -= 1
            if _watching == 0:
                AttentionInterface.get_interface = _look_up  # type: ignore[method-assign]


def _watched_look_up(
    functions: AttentionInterface, implementation: str, default: Callable[..., Any]
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Look up an attention function, and return one that makes its call and shows it."""
    own = _look_up(functions, implementation, default)
    if implementation == "flex_attention":
        own = compiled_again()(own)
    return partial(_watched_call, own, implementation or "eager")


def _watched_call(
    own: Callable[..., Any],
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Make an attention call by the model's own function, then show it to the module's readers."""
    readers = tuple(_readers.get(module, ()))
    suppressors = tuple(_suppressors.get(module, ()))
    removals = tuple(_removals.get(module, ()))
    output: tuple[Tensor, Tensor | None]
    if not readers and not suppressors and not removals:
        output = own(module, query, key, value, attention_mask, *args, **options)
        return output
    call = AttentionCall(implementation, module, query, key, value, attention_mask, options)
    blind = None
    if suppressors:
        call, attention_mask, blind = _suppressed(call, suppressors)
    flash = None
    if (readers or removals) and implementation == "sdpa":
        with listen(own_pass=module in _own_modules.get()) as listening:
            output = own(module, query, key, value, attention_mask, *args, **options)
        flash = listening.result
    else:
        output = own(module, query, key, value, attention_mask, *args, **options)
    if blind is not None:
        output = (output[0].masked_fill(blind.transpose(1, 2)[..., None], 0.0), *output[1:])
    call = replace(call, output=output[0], flash=flash)
    for reader in readers:
        reader(call)
    return (without_values(call, removals), *output[1:]) if removals else output


class _KernelCalls(TorchFunctionMode):
    """Shows the calls of PyTorch's attention to the readers of the module that makes them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.scaled_dot_product_attention:
            call = _kernel_call(self._module, output, *args, **(kwargs or {}))
            for reader in tuple(_readers.get(self._module, ())):
                reader(call)
        return output


def _kernel_call(
    module: nn.Module,
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """Return a call of PyTorch's attention in the form of one of transformers' attention functions."""
    # A single query sees all keys.
    causal = is_causal or query.shape[2] == 1
    options = {"scaling": scale, "dropout": dropout_p, "is_causal": causal}
    return AttentionCall("sdpa", module, query, key, value, attn_mask, options, output.transpose(1, 2))


@contextmanager
def kernel_calls_watched(module: nn.Module) -> Iterator[None]:
    """Show the calls of PyTorch's attention in a module's forward to its readers while the context is open.

    This is for families that make them without an attention function (Falcon).
    """
    stack = ExitStack()

    def enter(*_: Any) -> None:
        stack.enter_context(_KernelCalls(module))

    def leave(*_: Any) -> None:
        stack.close()

    with before_forward(module, enter), after_forward(module, leave, always=True):
        yield


# For each config whose implementation is changed: what it was, and how many contexts need the change.
# Contexts in several threads may close in any order, so only the last one restores the old value.
_changed: dict[int, tuple[Any, str | None, int]] = {}


@contextmanager
def implementation_changed(model: nn.Module, change: Callable[[str], str]) -> Iterator[None]:
    """Change the attention implementation in every config of the model while the context is open.

    This is for models that can be read only under another implementation. It is set on the configs
    themselves: `set_attn_implementation` would also check and adjust it, and cannot restore models whose
    parts have different implementations.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            configs[id(config)] = config
    entered: list[int] = []
    try:
        with _lock:
            for key, config in configs.items():
                _, before, count = _changed.get(key, (config, config._attn_implementation_internal, 0))
                if count == 0:
                    config._attn_implementation_internal = change(before or "eager")
                _changed[key] = (config, before, count + 1)
                entered.append(key)
        yield
    finally:
        with _lock:
            for key in entered:
                config, before, count = _changed.pop(key)
                if count > 1:
                    _changed[key] = (config, before, count - 1)
                else:
                    config._attn_implementation_internal = before


# ---- removing pairs ---------------------------------------------------------------------------


def _suppressed(
    call: AttentionCall, suppressors: tuple[Suppressor, ...]
) -> tuple[AttentionCall, Tensor, Bool[Tensor, "#batch #head query"] | None]:
    """Return the call with pairs removed, the mask for the implementation, and the blind queries.

    A blind query has lost every key that it saw. Implementations disagree on its row (NaN, or uniform), so
    they are given its old keys, and its output is set to zero afterwards.
    """
    if call.implementation not in ("eager", "sdpa"):
        raise UnsupportedModelError(
            f"attention cannot be suppressed under the {call.implementation} implementation, which takes no "
            'mask of pairs: call model.set_attn_implementation("sdpa") or "eager" first, or use mode="value"'
        )
    query_count, key_count = call.query.shape[2], call.key.shape[2]
    mask = call.mask
    if mask is None:
        # What sdpa does without a mask: a single query sees all keys, and the first of several sees the
        # first key only, even if a cache of fixed size has room for more.
        last = torch.arange(query_count, device=call.query.device)[:, None]
        last = last if query_count > 1 else last + key_count - 1
        seen = (torch.arange(key_count, device=call.query.device) <= last)[None, None]
    elif isinstance(mask, Tensor) and mask.ndim == 4:
        mask = mask[..., :key_count]
        seen, _ = split_mask(mask)
    else:
        raise UnsupportedModelError(f"cannot suppress attention under a mask of type {type(mask).__name__}")
    removed = torch.zeros_like(seen)
    for suppressor in suppressors:
        removed = removed | suppressor(call)
    kept = seen & ~removed
    blind = seen.any(-1) & ~kept.any(-1)
    allowed = kept | (seen & blind[..., None])
    lowest = torch.finfo(call.query.dtype).min
    if mask is None or mask.dtype == torch.bool:
        shown: Tensor = kept
        # Eager attention adds its mask to the scores: True would add 1 rather than mean "may see".
        added = torch.zeros(allowed.shape, dtype=call.query.dtype, device=allowed.device)
        given = allowed if call.implementation == "sdpa" else added.masked_fill(~allowed, lowest)
    else:
        full = mask.expand(torch.broadcast_shapes(mask.shape, kept.shape))
        lowest = torch.finfo(mask.dtype).min
        shown, given = full.masked_fill(~kept, lowest), full.masked_fill(~allowed, lowest)
    return replace(call, mask=shown), given, (blind if bool(blind.any()) else None)

"""Backend adapters: one interface to models in each of the libraries that run them.

`adapter_for` picks the adapter by the names of the object's classes, in the order of inheritance: no backend
is imported to find out, and a class that moves within its package is still found. Every function that takes
a model calls it. Other adapters can be added by `register_adapter`, or by an entry point in the group
`attnprobe.adapters`, whose name is that of the class and whose object is the adapter. What is left to others:
what an adapter offers (base), what wrappers hold (wrappers), and the backends (a module for each).
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from attnprobe.adapters.base import LAYER_SITES, SITES, Adapter, Observer
from attnprobe.adapters.wrappers import class_names, look_through, refusal
from attnprobe.errors import AttnprobeError, ParameterError, UnsupportedModelError

__all__ = ["LAYER_SITES", "SITES", "Adapter", "Observer", "adapter_for", "register_adapter"]

ENTRY_POINT_GROUP = "attnprobe.adapters"

AdapterFactory = Callable[[Any], Adapter]

_adapters: dict[str, str | AdapterFactory] = {
    "transformers.PreTrainedModel": "attnprobe.adapters.transformers:TransformersAdapter",
    "peft.PeftModel": "attnprobe.adapters.transformers:TransformersAdapter",
    "peft.PeftMixedModel": "attnprobe.adapters.transformers:TransformersAdapter",
    "transformer_lens.TransformerBridge": "attnprobe.adapters.transformer_lens:TransformerLensAdapter",
    "transformer_lens.HookedTransformer": "attnprobe.adapters.transformer_lens:refuse_hooked_transformer",
    "nnsight.Envoy": "attnprobe.adapters.nnsight:NNsightAdapter",
}


def register_adapter(model_class: str, adapter: str | AdapterFactory) -> None:
    """Register an adapter for the models of a class, and of its subclasses.

    Args:
        model_class: `"package.ClassName"`: the top-level package that defines the class, and the
            class's name. The package is not imported.
        adapter: what makes an `Adapter` from such a model: a subclass of `Adapter`, a function, or
            `"module:name"` to import either when it is first needed.

    The last registration for a class counts. A package can do the same without being imported, by an
    entry point: `[project.entry-points."attnprobe.adapters"]`, `"package.ClassName" = "module:name"`.

    Raises:
        ParameterError: names that are not of this form.

    >>> register_adapter("my_backend.Wrapper", "my_package.adapters:MyAdapter")
    """
    package, _, name = model_class.partition(".")
    if not package.isidentifier() or not name.isidentifier():
        raise ParameterError(
            f'model_class must be "package.ClassName", with the top-level package only; got {model_class!r}'
        )
    if isinstance(adapter, str):
        module, _, attribute = adapter.partition(":")
        if not module or not attribute.isidentifier():
            raise ParameterError(f'an adapter given by name must be "module:name"; got {adapter!r}')
    elif not callable(adapter):
        raise ParameterError(f"an adapter must be a class, a function or a name; got {adapter!r}")
    _adapters[model_class] = adapter


def adapter_for(model: Any) -> Adapter:
    """Return the adapter for a model; an adapter is returned as it is.

    Known without registration: transformers models, the PEFT models around them, `TransformerBridge` of
    TransformerLens, and the wrappers of nnsight; each also within `torch.compile` and
    `DistributedDataParallel`.

    Raises:
        UnsupportedModelError: an object that no adapter knows, or a model whose attention cannot be
            read; the message says why, and where in the object a model is that can be read.
        AttnprobeError: a registered adapter that cannot be imported, or that is not an `Adapter`.
    """
    if isinstance(model, Adapter):
        return model
    known = {**_entry_points(), **_adapters}
    # A wrapper that somebody registered is theirs to read.
    read = model if any(name in known for name in class_names(model)) else look_through(model)
    name = next((name for name in class_names(read) if name in known), None)
    if name is None:
        raise UnsupportedModelError(
            refusal(read, lambda part: any(name in known for name in class_names(part)))
        )
    found = known[name]
    adapter = (_imported(found) if isinstance(found, str) else found)(read)
    if not isinstance(adapter, Adapter):
        raise AttnprobeError(
            f"what is registered for {name.partition('.')[2]} gave a {type(adapter).__name__}, not an Adapter"
        )
    return adapter


@lru_cache(maxsize=1)
def _entry_points() -> dict[str, str | AdapterFactory]:
    """Return the adapters that installed packages offer, by name: nothing is imported."""
    return {point.name: point.value for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}


def _imported(name: str) -> AdapterFactory:
    module, _, attribute = name.partition(":")
    try:
        factory: AdapterFactory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise AttnprobeError(f"the registered adapter {name} cannot be imported: {error}") from error
    return factory

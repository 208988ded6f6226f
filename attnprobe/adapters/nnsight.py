"""The adapter for nnsight: models inside `NNsight`, `TransformersModel` or `LanguageModel`.

nnsight runs the wrapped transformers model in the user's own thread, and serves its interventions from
inside the modules' forward calls. So the sites are read where the transformers adapter reads them, in the
user's traces as in our own passes: a probe sees a module's output as the trace's interventions left it, and
the next module gets what the probe puts in its place. Reading the inputs of the attention call through
`attn.source` was rejected: it works only inside a trace that attnprobe itself writes, and it permanently
rewrites the modules' forwards.

Our own forward passes go through the wrapper's untraced call, so that edits stored by `wrapper.edit()`
apply. `adapter_for` makes the adapter. What is left to others: everything inside the forward pass
(transformers, reading).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnprobe.adapters.forward_output import logits_of
from attnprobe.adapters.transformers import TransformersAdapter
from attnprobe.adapters.versions import check_versions
from attnprobe.errors import UnsupportedModelError


class NNsightAdapter(TransformersAdapter):
    """An nnsight wrapper around a transformers model.

    Raises:
        UnsupportedModelError: a wrapper around anything else, around a model that is not loaded yet,
            or around a model that cannot be read; or a version of nnsight that is not
            read.
    """

    backend = "nnsight"

    def __init__(self, wrapper: Any) -> None:
        check_versions("nnsight")
        self._wrapper = wrapper
        model = wrapper._module
        if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
            raise UnsupportedModelError(
                f"this wrapper holds a {type(model).__name__}, not a transformers model: pass the wrapper of "
                "the whole model"
            )
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UnsupportedModelError(
                "the wrapped model is not loaded yet: create the wrapper with dispatch=True, or call "
                "wrapper.dispatch() first"
            )
        super().__init__(model)

    def _logits(self, arguments: dict[str, Any]) -> Tensor | None:
        return logits_of(self._wrapper.trace(**arguments, trace=False))

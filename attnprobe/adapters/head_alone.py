"""Running a model's language-model head again over what its layers gave, a few positions at a time.

Logits are as wide as the vocabulary: those of a long response take more memory than all else in a pass. So
`TransformersAdapter.reduced_logits` lets a pass compute the first of them, keeps what the base model gave,
and runs the model's own forward for the others with a stand-in for the base model. The alternative, to call
the head's matrix, was rejected: many families scale or cap logits behind it, each in its own way. What is
left to others: the pass itself (transformers), and what is made of the logits (measurement).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from attnprobe.adapters.forward_output import logits_of
from attnprobe.adapters.hooks import after_forward

LOGITS_AT_ONCE = 2**23
"""How many logits are computed at a time."""


class _StandIn(nn.Module):
    """Gives what the base model gave, and is the base model in everything else."""

    def __init__(self, base: nn.Module, output: Any) -> None:
        super().__init__()
        # Not among its modules.
        self.__dict__["base"], self.__dict__["output"] = base, output
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["base"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.__dict__["output"]


class HeadAlone:
    """The head of a model, which can run without the layers once `kept` has seen them run.

    Args:
        model: a transformers model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._name: str = getattr(model, "base_model_prefix", "")
        self._output: Any = None

    @property
    def is_known(self) -> bool:
        """Whether the base model and the head are plain modules of the model, with all of their weights."""
        base, head = self._model._modules.get(self._name), self._model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        forward = inspect.unwrap(type(self._model).forward).__code__.co_names
        return (
            base is not None
            and base is self._model.base_model
            # Some (OPT) call a part of the base model.
            and self._name in forward
            and "decoder" not in forward
            and type(head) is nn.Linear
            # Not sharded, quantised or kept elsewhere.
            and isinstance(weight, Tensor)
            and type(weight) in (Tensor, nn.Parameter)
            and weight.shape == (head.out_features, head.in_features)
        )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what the base model gives while the context is open."""

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._output = output

        with after_forward(self._model._modules[self._name], keep):
            yield

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Let the kept output stand in for the base model while the context is open."""
        modules = self._model._modules
        base = modules[self._name]
        self._stand_in = modules[self._name] = _StandIn(base, self._output)
        try:
            yield
        finally:
            modules[self._name] = base
            self._output = None

    def logits(self, arguments: dict[str, Any]) -> Tensor:
        """Return the logits that the model's own forward makes of what was kept.

        It is called without the hooks around it: for everyone who watches the model, there is no other pass.
        """
        logits = logits_of(self._model.forward(**arguments))
        assert logits is not None
        return logits

    @property
    def was_used(self) -> bool:
        """Whether the model's forward has called the stand-in, and not parts of the base model."""
        return self._stand_in.calls > 0

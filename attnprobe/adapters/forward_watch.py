"""Noticing when a forward pass of a model begins, ends or fails, whoever runs it.

`ForwardWatch` hooks the model itself, so it makes no difference whether a pass was started by the user's
call, by `generate`, through a wrapper of another library, or by an adapter. `Reading` and `Suppressing` are
made of it. What is left to others: what is done during a pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from attnprobe.adapters.forward_call import Columns, arguments_of, tokens_of
from attnprobe.adapters.hooks import after_forward, before_forward
from attnprobe.adapters.wrappers import look_through
from attnprobe.batch import TokenBatch
from attnprobe.errors import AttnprobeError, UnsupportedModelError


class ForwardWatch:
    """Notices when a forward pass of a model begins, ends or fails: subclasses override those three methods.

    Attributes:
        columns: where the tokens of the pass under way are in their sequences.
        refusal: why the last pass that could not be read was refused; None if none was.
        is_whole: whether the pass was started at the model itself, not at the base model inside it.
    """

    def __init__(self, model: Any, name: str) -> None:
        self._model = model
        self._name = name
        self._depth = 0
        self._thread: int | None = None
        self.refusal: UnsupportedModelError | None = None
        self.columns = Columns(0, 0, has_cache=False)
        self.is_whole = True

    def began(self, batch: TokenBatch, given: dict[str, Any]) -> dict[str, Any]:
        """Prepare for a pass with these arguments, and return arguments to add."""
        return {}

    def ended(self, output: Any) -> Any:
        """Finish a pass, and return what is to replace its output, or None.

        `output` is None if the pass was deliberately ended early.
        """

    def failed(self) -> None:
        """Forget a pass that has failed."""

    @property
    def is_running(self) -> bool:
        """Whether a forward pass is under way: gradient checkpointing recomputes layers outside of one."""
        return self._depth > 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watch the model while the context is open."""
        with ExitStack() as stack:
            # The base model is watched too: a user may call it without the language-model head.
            base = look_through(self._model.base_model)
            for module in {id(m): m for m in (self._model, base)}.values():
                stack.enter_context(before_forward(module, self._before, first=True))
                stack.enter_context(after_forward(module, self._after, always=True))
            yield

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        thread = threading.get_ident()
        if self._thread is not None and self._thread != thread:
            raise AttnprobeError(
                f"{self._name} runs in two threads while probes are attached: their layers would be "
                "mixed. Use a model for each thread, or take turns, each with a block of its own"
            )
        if self._depth and module is self._model:
            # The last pass was interrupted (Ctrl-C), which runs no hooks: it will not end any more.
            self._depth = 0
            self.failed()
        self._depth += 1
        if self._depth > 1:
            return None
        self._thread, self.is_whole = thread, module is self._model
        try:
            given = arguments_of(module, args, kwargs)
            config: Any = self._model.config.get_text_config(decoder=True)
            batch, self.columns = tokens_of(given, config._attn_implementation or "eager")
            added = self.began(batch, given)
        except BaseException as error:
            self._depth = 0
            if isinstance(error, UnsupportedModelError):
                self.refusal = error
            raise
        return (args, {**kwargs, **added}) if added else None

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._depth == 0:
            return None
        self._depth -= 1
        if self._depth:
            return None
        if output is not None:
            return self.ended(output)
        # Without an output, an exception is under way.
        self.failed()
        return None

    def cut_off(self) -> None:
        """Treat the pass under way as ended, since nothing more of it is needed.

        This is done before the exception that ends the pass, not in the hook after it: torch drops errors
        that are raised in a hook while another exception is under way.
        """
        self._depth = 0
        self.ended(None)


def computes_layers_again(model: nn.Module) -> bool:
    """Whether the backward pass will recompute layers: gradient checkpointing."""
    return model.training and any(getattr(part, "gradient_checkpointing", False) for part in model.modules())

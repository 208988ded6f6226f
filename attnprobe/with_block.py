"""A context that must be opened by `with`: `attach` and `suppress_attention` return one.

These functions check their arguments when they are called, and do nothing to the model before the block
opens. A forgotten `with` would otherwise give neither an error nor a number, so it is reported. What is left
to others: what happens in the block.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Generic, TypeVar

from attnprobe.errors import AttnprobeError

Yielded = TypeVar("Yielded")


class _NotOpenError(AttnprobeError, AttributeError):
    """A block was asked, before it was opened, for something that only an open one has."""


class WithBlock(AbstractContextManager[Yielded], Generic[Yielded]):
    """A context that raises an error or warns if it is used without `with`.

    Args:
        name: the function that returned it, for messages.
        context: what `with` opens; it can be opened once.

    >>> from contextlib import nullcontext
    >>> WithBlock("attach", nullcontext()).layers
    Traceback (most recent call last):
    attnprobe.with_block._NotOpenError: attach(...) does nothing by itself, and has no layers: open it by \
`with attach(...) as opened:`
    """

    def __init__(self, name: str, context: AbstractContextManager[Yielded]) -> None:
        self._name = name
        self._context = context
        self._was_opened = False

    def __enter__(self) -> Yielded:
        """Open the block."""
        if self._was_opened:
            raise AttnprobeError(
                f"this {self._name}(...) was opened before: call {self._name} again for another block"
            )
        self._was_opened = True
        return self._context.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        """Close the block."""
        return self._context.__exit__(kind, error, traceback)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        function = self._name
        raise _NotOpenError(
            f"{function}(...) does nothing by itself, and has no {name}: open it by "
            f"`with {function}(...) as opened:`"
        )

    def __del__(self) -> None:
        # Not through __getattr__: __init__ may have failed.
        if not self.__dict__.get("_was_opened", True):
            function = self._name
            warnings.warn(
                f"{function}(...) was called and never opened, so it did nothing: use it as "
                f"`with {function}(...):`, and run the model inside the block",
                RuntimeWarning,
                stacklevel=2,
            )

"""CUDA tensors without a GPU: torch's fake tensors, which know shapes, dtypes and devices but no numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class _WithoutDevice(TorchFunctionMode):
    """Does what Python cannot do with CUDA tensors where torch was built without CUDA.

    Indexing, negation and copies go by operators. A question about values (is any of them not finite?) is
    answered with no, and numbers that are fetched are 0; a GPU would be waited for, so both are counted.
    """

    def __init__(self, operators: Operators) -> None:
        super().__init__()
        self.operators = operators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            return _indexed(*args)
        if func is torch.Tensor.__setitem__:
            torch.ops.aten.copy_(_indexed(*args[:2]), args[2])
            return None
        if func is torch.Tensor.__invert__:
            return torch.bitwise_not(*args)
        if func is torch.Tensor.contiguous:
            return torch.clone(*args, memory_format=torch.contiguous_format)
        if func in (torch.Tensor.__bool__, torch.Tensor.item, torch.Tensor.tolist):
            self.operators.waits += 1
        if func is torch.Tensor.__bool__:
            return False
        if func is torch.Tensor.item:
            return 0.0 if args[0].is_floating_point() else 0
        return func(*args, **(kwargs or {}))


def _indexed(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    entries = list(index) if isinstance(index, tuple) else [index]
    given = sum(entry is not None and entry is not Ellipsis for entry in entries)
    missing = tensor.ndim - given
    place = entries.index(Ellipsis) if any(e is Ellipsis for e in entries) else len(entries)
    entries[place : place + 1] = [slice(None)] * missing
    axis = 0
    for entry in entries:
        if entry is None:
            tensor = tensor.unsqueeze(axis)
        elif isinstance(entry, slice):
            step = 1 if entry.step is None else entry.step
            tensor = torch.ops.aten.slice(tensor, axis, entry.start, entry.stop, step)
        elif isinstance(entry, int):
            tensor = tensor.select(axis, entry)
            axis -= 1
        else:
            tensor = tensor.index_select(axis, entry)
        axis += 1
    return tensor


class Operators(TorchDispatchMode):
    """Remembers the operators that run, with the dtypes of what they return, and counts waits for values."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.run: list[tuple[str, torch.dtype | None]] = []
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.higher_order.flex_attention:
            # Its inputs have been checked. Its own fake would copy between CUDA tensors.
            query, value = args[0], args[2]
            sums = query.new_empty(query.shape[:3], dtype=torch.float32)
            answer: Any = (query.new_empty(*query.shape[:3], value.shape[-1]), sums, sums)
        else:
            answer = func(*args, **(kwargs or {}))
        first = answer[0] if isinstance(answer, tuple | list) else answer
        self.run.append((str(func), first.dtype if isinstance(first, torch.Tensor) else None))
        return answer

    def dtypes(self, name: str) -> set[torch.dtype | None]:
        """Return the dtypes of what the operators of a name returned."""
        return {dtype for func, dtype in self.run if func.startswith(f"aten.{name}")}


@contextmanager
def fake_gpu() -> Iterator[Operators]:
    """Let CUDA tensors be made, and remember what is run on them."""
    with FakeTensorMode(), Operators() as operators, _WithoutDevice(operators):
        yield operators

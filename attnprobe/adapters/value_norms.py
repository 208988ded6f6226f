"""The norm of what each head would write for each token: its value, after the head's output projection.

A head adds `sum over s of A[t, s] * W_O v_s` to the residual stream. The norm of `W_O v_s` depends on the key
only, so one number for each head and token turns attention into value-weighted attention. `ProjectionWatch`
sees an attention call, then the module that is given precisely this call's output, and then that the
attention module returns precisely what this module gave: only then, and if it is linear, is `W_O v` what the
head writes. Where a family puts a gate or a norm in between, the model is refused.

A `Reading` makes a watch for each layer. What is left to others: the call (interception), and what the norms
are for (reductions).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnprobe.adapters.architecture import WRAPPED
from attnprobe.adapters.attention_call import AttentionCall
from attnprobe.adapters.base import evaluation_mode
from attnprobe.adapters.forward_call import Columns
from attnprobe.adapters.hooks import after_forward, before_forward
from attnprobe.adapters.wrappers import class_names
from attnprobe.attention.checks import judge_later
from attnprobe.attention.operator import reduction_dtype
from attnprobe.errors import UnsupportedModelError

Show = Callable[[Tensor], None]
"""A function that is shown the norms `[batch, head, token]` of a layer."""


class ProjectionWatch:
    """Finds the output projection of a layer in every pass, by its input, and computes the norms.

    Args:
        attention: the layer's attention module.
        where: the layer and the model, for messages.
        show: is shown the norms of the tokens of the pass.
        gathering: opens a context in which checks wait until the pass ends.
    """

    def __init__(
        self,
        attention: nn.Module,
        where: str,
        show: Show,
        gathering: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._attention = attention
        self._where = where
        self._show = show
        self._gathering = gathering
        self._version = 0
        self._call: AttentionCall | None = None
        self._columns = Columns(0, 0, has_cache=False)
        self._projection: nn.Module | None = None
        self._norms: Tensor | None = None
        self._output: Tensor | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watch the attention module, and the modules inside it, while the context is open."""
        with ExitStack() as stack:
            for module in list(self._attention.modules())[1:]:
                if not isinstance(module, nn.Dropout | nn.Identity):
                    stack.enter_context(before_forward(module, self._before, first=True))
                    stack.enter_context(after_forward(module, self._after, first=True))
            stack.enter_context(after_forward(self._attention, self._ended, first=True))
            yield

    def called(self, call: AttentionCall, columns: Columns) -> None:
        """Learn what the layer's attention call was: its projection should come next."""
        self.reset()
        self._call, self._columns = call, columns
        assert call.output is not None
        self._version = _version(call.output)

    def reset(self) -> None:
        """Forget a call, as when a pass has failed."""
        self._call = self._projection = self._norms = self._output = None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._call
        if call is None or self._projection is not None:
            # What is inside the projection (LoRA's) is given the same.
            return
        assert call.output is not None
        parts = (*args, *kwargs.values())
        given = next((part for part in parts if isinstance(part, Tensor)), None)
        flat = call.output.detach().flatten(2)
        if given is None or given.numel() != flat.numel() or given.shape[-1] != flat.shape[-1]:
            return
        given = given.detach().reshape(flat.shape)
        # A gate may be multiplied into it where it is.
        if _version(call.output) != self._version or not _are_equal(given, flat):
            return
        if len(parts) > 1:
            raise self._refusal(f"{_named(module)} is given options besides the output of the attention")
        self._projection = module
        with torch.no_grad(), torch.autocast(given.device.type, enabled=False), self._gathering():
            self._norms = self._norms_of(module, call, given)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is self._projection and self._output is None and isinstance(output, Tensor):
            self._output = output.detach()

    def _ended(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._call is None:
            return
        projection, norms, projected = self._projection, self._norms, self._output
        self.reset()
        returned = output[0] if isinstance(output, tuple) else output
        if projection is None or norms is None:
            raise self._refusal(
                f"{_named(self._attention)} gives no module the output of its attention as it is: there may "
                "be a gate or a norm before the projection"
            )
        drops = any(part.training and part.p > 0 for part in module.modules() if isinstance(part, nn.Dropout))
        fits = projected is not None and projected.numel() == returned.numel()
        if not drops and not (fits and _are_equal(projected.reshape(returned.shape), returned.detach())):  # type: ignore[union-attr]
            raise self._refusal(
                f"{_named(self._attention)} does not return what its projection, {_named(projection)}, gives"
            )
        self._show(norms)

    def _refusal(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"the values of {self._where} have no norm after the output projection: {why}. Measure without "
            "value_weighted"
        )

    def _norms_of(
        self, module: nn.Module, call: AttentionCall, given: Tensor
    ) -> Float[Tensor, "batch head token"]:
        columns, heads = self._columns, call.query.shape[1]
        value = call.value.detach()[:, :, : columns.end][:, :, -columns.count :]
        size = value.shape[3]
        if value.shape[2] < columns.count or heads % value.shape[1]:
            raise self._refusal(
                f"its values are {list(call.value.shape)} for {heads} heads and {columns.count} tokens"
            )
        refused = self._refusal(
            f"{_named(module)}, which is given the output of its attention, is not linear"
        )
        matrix = _matrix_of(module, given, refused)
        if matrix.shape[0] != heads * size:
            raise self._refusal(
                f"{_named(module)} takes {matrix.shape[0]} numbers, but the values of {heads} heads have "
                f"{size} each"
            )
        dtype = reduction_dtype(value.dtype)
        value, by_head = value.to(dtype), matrix.to(dtype).view(heads, size, -1)
        group = heads // value.shape[1]
        # Head by head, since what all heads would write takes `head` times the memory of the residual stream.
        norms = [
            torch.linalg.vector_norm(value[:, head // group] @ by_head[head], dim=-1) for head in range(heads)
        ]
        return torch.stack(norms, dim=1)


def _named(module: nn.Module) -> str:
    name = type(module).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; 0 where nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


def _are_equal(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; the device is asked only if it must be."""
    # Those of other kinds, such as sharded ones, may have no memory of their own.
    is_plain = type(ours) is type(theirs) is Tensor
    if is_plain and (ours.data_ptr(), ours.stride(), ours.dtype) == (
        theirs.data_ptr(),
        theirs.stride(),
        theirs.dtype,
    ):
        return True
    return torch.equal(ours, theirs.to(ours.dtype))


def _matrix_of(
    module: nn.Module, given: Tensor, refused: UnsupportedModelError
) -> Float[Tensor, "input output"]:
    """Return the matrix of a linear module, without its bias; the check that it is linear may wait.

    Raises:
        UnsupportedModelError: `refused`, when the check is judged, if the module is not linear.
    """
    while WRAPPED in module._modules:
        inner = module._modules[WRAPPED]
        assert inner is not None
        module = inner
    weight = getattr(module, "weight", None)
    is_plain = isinstance(weight, Tensor) and not weight.is_meta and weight.is_floating_point()
    if is_plain and type(module) is nn.Linear and "forward" not in vars(module):
        assert isinstance(weight, Tensor)
        return weight.detach().T
    if is_plain and "transformers.Conv1D" in class_names(module) and "forward" not in vars(module):
        assert isinstance(weight, Tensor)
        return weight.detach()
    # Adapters of PEFT and quantised weights say by what they do to the columns of the identity what they are.
    width = given.shape[-1]
    with _undisturbed(module):
        zero = module.forward(torch.zeros_like(given[:1, :1])).float()
        identity = torch.eye(width, dtype=given.dtype, device=given.device)[None]
        matrix: Tensor = module.forward(identity).float()[0] - zero[0]
        some = given[:1, -4:]
        expected, found = module.forward(some).float(), some.float() @ matrix + zero
    # An input scale for quantised activations makes small errors; a norm makes large ones.
    tolerance = 0.05 if given.dtype.itemsize == 2 else 0.01

    def judge(numbers: list[float]) -> None:
        error, scale = numbers
        # NaN is an error too.
        if not error <= tolerance * (scale + 1e-30):
            raise refused

    judge_later([(expected - found).abs().amax(), expected.abs().amax()], judge)
    return matrix


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Keep hooks of the user on the parts of a module, and dropout, out of a call that is not the model's."""
    parts = list(module.modules())
    before = [(part, part._forward_hooks, part._forward_pre_hooks) for part in parts]
    with evaluation_mode(parts):
        try:
            for part in parts:
                part._forward_hooks, part._forward_pre_hooks = OrderedDict(), OrderedDict()
            yield
        finally:
            for part, hooks, pre_hooks in before:
                part._forward_hooks, part._forward_pre_hooks = hooks, pre_hooks

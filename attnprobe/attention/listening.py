"""Listening to the kernel of a model's own attention, which computes more than it gives away.

A fused kernel knows the log-sum-exp of every row, but PyTorch's `scaled_dot_product_attention` discards it.
Adapters open `listen` inside a model's own attention function. PyTorch then chooses and calls its kernel as
ever, with gradients or without, and the log-sum-exp is picked up where the kernel returns it, below autograd
and autocast: the output is bitwise the same, and there is no second pass. The alternative, choosing the
kernel and preparing its arguments ourselves, was rejected: each kernel has its own preparations (padded
heads, aligned masks), which differ between versions of PyTorch.

On the CPU the keys' positions can be attended to along the way, as a few more columns of the value, for a few
percent of the time: then each query's mean position, and so its mean distance, is known too, with the first
token and without it. The output may change in its last bits, so this is done only in attnprobe's own forward
passes, while `carries_positions` is open: `measure` opens it if span is wanted.

What is left to others: which kernels can be heard (kernels), deciding when to listen (adapters), and what the
log-sum-exp is for (row_sums).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from attnprobe.attention.kernels import HEARD, Kernel, Question, Setting, chosen
from attnprobe.attention.operator import key_positions, past_first_features

_carries_positions: ContextVar[bool] = ContextVar("attnprobe_carries_positions", default=False)


@contextmanager
def carries_positions() -> Iterator[None]:
    """Let the kernel attend to the keys' positions too, in our own passes, while the context is open.

    This is a context and not an argument because a probe, an observer and a backend lie between `measure`,
    which knows that distances will be needed, and the kernel, and none of them needs to know.
    """
    token = _carries_positions.set(True)
    try:
        yield
    finally:
        _carries_positions.reset(token)


@dataclass(frozen=True)
class FlashResult:
    """What a kernel returns.

    Attributes:
        output: the attention's output.
        log_sum_exp: of each row's scores, without sinks; meaningless where nothing is seen.
        mean_position: what each query reads from `key_positions`; None if the keys did not carry them.
        past_first: what each query reads from `past_first_features`; None likewise.
    """

    output: Float[Tensor, "batch head query d"]
    log_sum_exp: Float[Tensor, "batch head query"]
    mean_position: Float[Tensor, "batch head query"] | None
    past_first: Float[Tensor, "batch head query 2"] | None = None


def carried_features(count: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "key 3"]:
    """Return what keys carry: their position and, of all but the first, 1 and the position again."""
    position = key_positions(count, dtype, device)[:, None]
    return torch.cat([position, past_first_features(count, dtype, device)], dim=-1)


def flash_attention(
    query: Float[Tensor, "batch head query d"],
    key: Float[Tensor, "batch key_head key d"],
    value: Float[Tensor, "batch key_head key d"],
    *,
    causal: bool,
    mask: Tensor | None = None,
    scaling: float | None = None,
    positions: bool = False,
) -> FlashResult:
    """Run the CPU flash kernel, which itself maps query heads to key heads.

    With `positions`, the keys' positions are attended to as further columns of the value (see
    `carried_features`). The kernel needs query, key and value of the same width, so query and key get as many
    columns of zeros; and all get some more, since a width that is no multiple of 4 slows it down.

    >>> q = torch.zeros(1, 1, 2, 8)
    >>> flash_attention(q, q, q, causal=True).log_sum_exp
    tensor([[[0.0000, 0.6931]]])
    """
    width = query.shape[-1]
    # The kernel would take its default from the widened query.
    scale = width**-0.5 if scaling is None else scaling
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    if positions:
        columns = carried_features(key.shape[2], value.dtype, value.device)
        columns = torch.nn.functional.pad(columns, (0, -(width + columns.shape[1]) % 4))
        query = torch.nn.functional.pad(query, (0, columns.shape[1]))
        key = torch.nn.functional.pad(key, (0, columns.shape[1]))
        # [batch, key_head, key, d + 3 or more]
        value = torch.cat([value, columns.expand(*value.shape[:2], -1, -1)], dim=-1)
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
    if not positions:
        return FlashResult(output, log_sum_exp, None)
    return FlashResult(
        output[..., :width], log_sum_exp, output[..., width], output[..., width + 1 : width + 3]
    )


class listen(TorchFunctionMode):  # noqa: N801
    """A context in which a call of `scaled_dot_product_attention` also tells what its kernel computed.

    The call is PyTorch's own, and its output bitwise the same. Only in attnprobe's own forward passes, while
    `carries_positions` is open, is it answered by `flash_attention` with positions instead, if PyTorch would
    choose this very kernel and no gradient is needed. `result` is what the kernel returned; None if it is not
    one that can be heard.

    Args:
        own_pass: whether the call is part of one of attnprobe's own forward passes, in which the last bits of
            an output may change.
    """

    def __init__(self, *, own_pass: bool = False) -> None:
        super().__init__()
        self._own_pass = own_pass
        self.result: FlashResult | None = None
        self._calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call every function as it is, and hear the kernel of `scaled_dot_product_attention`."""
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self._calls += 1
        if self._calls > 1:
            # One log-sum-exp does not describe an attention function that makes two calls.
            self.result = None
            return func(*args, **kwargs)
        if self._own_pass and _carries_positions.get():
            self.result = _with_positions(*args, **kwargs)
            if self.result is not None:
                return self.result.output
        with HeardKernel(own_pass=self._own_pass) as kernel:
            output = func(*args, **kwargs)
        if kernel.log_sum_exp is not None:
            self.result = FlashResult(output, kernel.log_sum_exp, None)
        return output


class HeardKernel(TorchDispatchMode):
    """A context that picks up the log-sum-exp which a fused kernel returns; None if there was no such kernel.

    The kernels are those of the table. A kernel that computes it only when asked is asked where the table
    allows it.
    """

    def __init__(self, *, own_pass: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own_pass = own_pass
        self.log_sum_exp: Float[Tensor, "batch head query"] | None = None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call every operator as it is, and keep what a fused kernel returns."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.scaled_dot_product_attention.default:
            # In inference mode the call arrives whole: its parts are wanted.
            with self:
                return func.decompose(*args, **kwargs)
        row = HEARD.get(func)
        if row is None:
            return func(*args, **kwargs)
        if row.asks == "always" or (row.asks == "in own passes" and self._own_pass):
            # query, key, value, bias, and whether to compute the log-sum-exp
            args = (*args[:4], True, *args[5:])
        outputs = func(*args, **kwargs)
        batch, heads, count, _ = args[0].shape
        # Empty if nobody asked for it. Some kernels add an axis of one, or rows up to a multiple of 32.
        returned = outputs[1].flatten(2)
        if returned.shape[:2] == (batch, heads) and returned.shape[2] >= count:
            self.log_sum_exp = returned.narrow(2, 0, count)
        return outputs


def _with_positions(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> FlashResult | None:
    """Answer a call of `scaled_dot_product_attention`; None if PyTorch would not choose this kernel."""
    device = query.device.type
    if chosen(Question.POSITIONS, Setting(device, value.dtype)) is not Kernel.WIDER:
        return None
    if dropout_p > 0 or query.shape[-1] != value.shape[-1]:
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        return None
    if torch.is_autocast_enabled(device) and query.dtype != torch.get_autocast_dtype(device):
        # It would narrow the tensors on their way to the kernel, but not on ours.
        return None
    choice = torch._fused_sdp_choice(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if choice != SDPBackend.FLASH_ATTENTION.value:
        return None
    return flash_attention(query, key, value, causal=is_causal, mask=attn_mask, scaling=scale, positions=True)

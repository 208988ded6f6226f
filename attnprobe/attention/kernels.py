"""The flash kernel of scaled dot product attention, with what it computes along the way.

A flash kernel knows the log-sum-exp of every row, and PyTorch's `scaled_dot_product_attention` throws it
away. Calling the kernel itself returns it at no cost, with an output that is bitwise the same. `listen` does
so inside a model's own attention function: whatever that function does around the call stays as it is.

The keys' positions can be attended to along the way, as one more column of the value, for a few percent of
the time: then each query's mean position, and so its mean distance, is known too. The output may change in
its last bits, so this is done only in forward passes of attnprobe's own, while `carries_positions` is open:
`measure` opens it when it is asked for span.

The alternative, a second pass for the statistics, doubles the cost of attention. What is left to others:
deciding when to listen (adapters), and what the log-sum-exp is for (row_sums).
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

from attnprobe.attention.operator import key_positions

_carries_positions: ContextVar[bool] = ContextVar("attnprobe_carries_positions", default=False)


@contextmanager
def carries_positions() -> Iterator[None]:
    """Let the kernel read the keys' positions along the way, in passes of our own, while the context is open.

    A context and not an argument: between `measure`, which knows that distances will be asked for, and the
    kernel lie a probe, an observer and a backend that need not know.
    """
    token = _carries_positions.set(True)
    try:
        yield
    finally:
        _carries_positions.reset(token)


@dataclass(frozen=True)
class FlashResult:
    """What the kernel returns.

    Attributes:
        output: the attention's output.
        log_sum_exp: of each row's scores, without sinks; its value has no meaning where nothing is seen.
        mean_position: what each query reads of `key_positions`; None where they were not carried along.
    """

    output: Float[Tensor, "batch head query d"]
    log_sum_exp: Float[Tensor, "batch head query"]
    mean_position: Float[Tensor, "batch head query"] | None


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
    """Run the CPU flash kernel, which maps query heads onto key heads by itself.

    With `positions`, the keys' positions are attended to as one more column of the value. The kernel wants
    query, key and value of one width, so query and key get a column of zeros.

    >>> q = torch.zeros(1, 1, 2, 8)
    >>> flash_attention(q, q, q, causal=True).log_sum_exp
    tensor([[[0.0000, 0.6931]]])
    """
    width = query.shape[-1]
    # The kernel's own default would be that of the widened query.
    scale = width**-0.5 if scaling is None else scaling
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    if positions:
        column = key_positions(key.shape[2], value.dtype, value.device)[:, None]
        query = torch.nn.functional.pad(query, (0, 1))
        key = torch.nn.functional.pad(key, (0, 1))
        # [batch, key_head, key, d + 1]
        value = torch.cat([value, column.expand(*value.shape[:2], -1, -1)], dim=-1)
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
    if not positions:
        return FlashResult(output, log_sum_exp, None)
    return FlashResult(output[..., :width], log_sum_exp, output[..., width])


class listen(TorchFunctionMode):  # noqa: N801
    """A context in which the one call of `scaled_dot_product_attention` is answered by `flash_attention`.

    Only where PyTorch would choose this very kernel, and no gradient is asked for: there the output is
    bitwise the same. `result` is what the kernel returned, None where it was not used.

    Args:
        own_pass: whether the call is part of a forward pass of attnprobe's own. Only there positions are
            carried along, while `carries_positions` is open.
    """

    def __init__(self, *, own_pass: bool = False) -> None:
        super().__init__()
        self._positions = own_pass and _carries_positions.get()
        self.result: FlashResult | None = None
        self._calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Pass every function on but the one that is listened to."""
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self._calls += 1
        if self._calls > 1:
            # An attention function that calls twice does something that one log-sum-exp cannot say.
            self.result = None
            return func(*args, **kwargs)
        self.result = _by_flash(self._positions, *args, **kwargs)
        return func(*args, **kwargs) if self.result is None else self.result.output


def _by_flash(
    positions: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> FlashResult | None:
    """Answer a call of `scaled_dot_product_attention`; None where PyTorch would not choose this kernel."""
    if query.device.type != "cpu" or dropout_p > 0 or query.shape[-1] != value.shape[-1]:
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        return None
    chosen = torch._fused_sdp_choice(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if chosen != SDPBackend.FLASH_ATTENTION.value:
        return None
    # In a narrower dtype the column of positions would be rounded as the values are.
    positions = positions and value.dtype in (torch.float32, torch.float64)
    return flash_attention(
        query, key, value, causal=is_causal, mask=attn_mask, scaling=scale, positions=positions
    )

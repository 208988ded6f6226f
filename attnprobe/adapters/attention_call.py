"""What an attention call of transformers says: its inputs, and the attention that they give.

A call comes with query, key, value, a mask or none, and options. `read_attention` makes a
`FactoredAttention` of it; `MaskMemory` remembers what a mask says, since layers share it. A `Reading` calls
them. What is left to others: seeing the calls (interception), and whether what was read gives the model's
own output (output_check).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

from attnprobe.adapters.forward_call import TAKES_PAIRS, Columns
from attnprobe.attention.block_scores import causal_mask
from attnprobe.attention.factored import FactoredAttention
from attnprobe.attention.listening import FlashResult
from attnprobe.attention.masks import CausalMask, split_mask
from attnprobe.errors import UnsupportedModelError


@dataclass(frozen=True)
class AttentionCall:
    """The inputs of an attention call, as the model's own function gets them, and its output."""

    implementation: str
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]
    output: Tensor | None = None
    flash: FlashResult | None = None


_KINDS = 3
"""How many masks of a pass are remembered: some models alternate between layers with and without a window."""


class MaskMemory:
    """Remembers what the last masks say, since all layers of a kind share one mask in a forward pass.

    What has been read from a mask decides what is computed next, so reading it makes the processor wait for
    the device: once for each kind of layer, not in each layer.
    """

    def __init__(self) -> None:
        self._known: list[tuple[Any, Hashable, tuple[CausalMask, Tensor | None]]] = []

    def read(self, mask: Tensor | BlockMask, key_count: int) -> tuple[CausalMask, Tensor | None]:
        """Return which keys a mask lets each query see, and what it adds to the scores."""

        def split() -> tuple[CausalMask, Tensor | None]:
            pairs = mask[..., :key_count] if isinstance(mask, Tensor) else _pairs_of(mask, key_count)
            seen, bias = split_mask(pairs)
            return CausalMask.from_mask(seen), bias

        return self._remembered(mask, key_count, split)

    def of_padding(
        self, mask: Tensor | None, query: Tensor, key: Tensor, end: int, window: int | None
    ) -> CausalMask:
        """Return the causal mask of a call whose own mask says only which columns up to `end` are padding."""
        key_count = key.shape[2]

        def combined() -> tuple[CausalMask, None]:
            kept = None if mask is None else mask[:, :end][:, -key_count:].bool()
            return causal_mask(query, key, window, kept), None

        shapes = (len(key), query.shape[2], key_count, end, window, query.device)
        return self._remembered(mask, shapes, combined)[0]

    def of_segments(self, segment_ids: Tensor, query: Tensor, window: int | None) -> CausalMask:
        """Return the causal mask of packed rows."""

        def separated() -> tuple[CausalMask, None]:
            return CausalMask.from_segments(segment_ids.to(query.device), window), None

        return self._remembered(segment_ids, (window, query.device), separated)[0]

    def _remembered(
        self, source: Any, settings: Hashable, read: Callable[[], tuple[CausalMask, Tensor | None]]
    ) -> tuple[CausalMask, Tensor | None]:
        for known_source, known_settings, known in self._known:
            if known_source is source and known_settings == settings:
                return known
        found = read()
        self._known = [*self._known[1 - _KINDS :], (source, settings, found)]
        return found


def _pairs_of(mask: BlockMask, key_count: int) -> Bool[Tensor, "batch head query key"]:
    """Return the pairs that FlexAttention's mask lets through, asked of the rule that it was made from."""
    batch, heads, query_count, _ = mask.shape
    device = mask.kv_num_blocks.device
    return create_mask(mask.mask_mod, batch, heads, query_count, key_count, device=str(device))


def read_attention(call: AttentionCall, masks: MaskMemory, columns: Columns) -> FactoredAttention:
    """Return the attention of a call.

    Raises:
        UnsupportedModelError: a call that looks at later tokens or at unknown keys, or has a mask of an
            unknown form.
    """
    options, mask, query = call.options, call.mask, call.query
    kind = type(call.module).__name__
    end = columns.end
    # A cache of fixed size has room for keys still to come, and a sliding one has dropped the first.
    key = call.key[:, :, :end] if columns.has_cache else call.key
    key_count, query_count = key.shape[2], query.shape[2]
    if key_count > end or query_count > columns.count or (not columns.has_cache and key_count != end):
        raise UnsupportedModelError(
            f"{kind} attends with {query_count} queries to {key_count} keys in a pass of {columns.count} "
            f"tokens after {columns.cached} cached columns: it is not known which tokens they stand for"
        )
    causal = options.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if causal is None else causal
    if not causal and query_count > 1 and mask is None:
        raise UnsupportedModelError(f"{kind} looks at later tokens: attnprobe reads causal models only")
    window = options.get("sliding_window")
    bias = options.get("position_bias")
    # PyTorch's attention has no soft cap: older versions of transformers let Gemma 2 use it all the same.
    softcap = options.get("softcap") if call.implementation != "sdpa" else None
    if isinstance(mask, BlockMask) or (isinstance(mask, Tensor) and mask.ndim == 4):
        seen, mask_bias = masks.read(mask, key_count)
        if mask_bias is not None:
            bias = mask_bias if bias is None else bias + mask_bias
    elif isinstance(mask, Tensor) and mask.ndim == 2:
        seen = masks.of_padding(mask, query, key, end, window)
    elif mask is not None:
        raise UnsupportedModelError(
            f"cannot read a mask of type {type(mask).__name__}: use the sdpa or eager implementation"
        )
    elif columns.segment_ids is not None and call.implementation not in TAKES_PAIRS:
        # Kernels in the style of flash attention separate packed rows by their positions alone.
        if columns.cached or query_count != columns.count:
            raise UnsupportedModelError(
                f"{kind} continues a cache with packed rows: run each sequence as an example of its own"
            )
        seen = masks.of_segments(columns.segment_ids, query, window)
    else:
        seen = masks.of_padding(None, query, key, end, window)
    log_sum_exp = mean_position = past_first = None
    if call.flash is not None:
        # The heads of a single query may have been laid out as queries: their order is the same.
        log_sum_exp = call.flash.log_sum_exp.reshape(query.shape[:3])
        if call.flash.mean_position is not None and key_count == call.key.shape[2]:
            mean_position = call.flash.mean_position.reshape(query.shape[:3])
            if call.flash.past_first is not None:
                past_first = call.flash.past_first.reshape(*query.shape[:3], 2)
    return FactoredAttention(
        query,
        key,
        scaling=options.get("scaling"),
        mask=seen,
        softcap=softcap,
        sinks=options.get("s_aux"),
        bias=bias,
        log_sum_exp=log_sum_exp,
        mean_position=mean_position,
        past_first=past_first,
        key_start=end - key_count,
    )


def as_multiplied(call: AttentionCall) -> AttentionCall:
    """Return a call with the tensors that the model's products see: autocast narrows them on the way."""
    device = call.query.device.type
    if not torch.is_autocast_enabled(device):
        return call
    # float64 is left as it is.
    narrow = torch.get_autocast_dtype(device)
    query, key, value = (
        part.to(narrow) if part.dtype == torch.float32 else part
        for part in (call.query, call.key, call.value)
    )
    return replace(call, query=query, key=key, value=value)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products keep their dtype: the user's autocast is the model's."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)

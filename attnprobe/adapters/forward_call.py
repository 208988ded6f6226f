"""What the arguments of a forward call say: its tokens, and where they are in their sequences.

A forward pass may be started by anyone, with any arguments: ids or embeddings, a mask or none, a cache
that holds earlier columns, rows that are packed from several sequences. `Reading` asks at the start of
each pass, and `read_attention` numbers queries and keys by the answer. What is left to others: what
happens in the pass (reading), and the attention calls in it (attention_call).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from attnprobe.adapters.base import GrowingCache
from attnprobe.batch import TokenBatch
from attnprobe.errors import AttnprobeError, UnsupportedModelError

CACHE_NAMES = ("past_key_values", "cache")
"""What the argument with the key/value cache is called: before transformers 5.24, and since."""

TAKES_PAIRS = ("eager", "sdpa", "flex_attention")
"""The attention implementations whose mask says for each pair whether it is seen; None means causal.

Others, in the style of flash attention, get no mask, and separate packed rows by their positions alone.
"""


@dataclass(frozen=True)
class Columns:
    """Where the tokens of a forward pass are in their sequences.

    Attributes:
        cached: how many columns of cached keys come before the tokens of the pass.
        count: how many tokens the pass has in each example.
        has_cache: whether the pass has a cache.
        segment_ids: `[batch, token]`, which sequence each token of packed rows belongs to; None if no row is
            packed.
    """

    cached: int
    count: int
    has_cache: bool
    segment_ids: Int[Tensor, "batch token"] | None = None

    @property
    def end(self) -> int:
        """How many columns there are when the pass ends."""
        return self.cached + self.count

    def of_queries(self, query_count: int) -> range:
        """Return the columns of a layer's queries: the last ones, if it was given fewer than all tokens."""
        return range(self.end - query_count, self.end)

    def of_keys(self, key_count: int) -> range:
        """Return the columns of a layer's keys.

        A sliding cache has dropped the first keys; one of fixed size has room for keys still to come.
        """
        first = max(0, self.end - key_count) if self.has_cache else 0
        return range(first, first + key_count)


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward call by name."""
    # From the class: a wrapper may have put another callable into the instance.
    bound = _signature(type(module).forward).bind_partial(*args, **kwargs).arguments
    return {**bound, **bound.get("kwargs", {})}


@lru_cache(maxsize=64)
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def tokens_of(given: dict[str, Any], implementation: str) -> tuple[TokenBatch, Columns]:
    """Return the tokens of a forward call, and where they are in their sequences.

    Args:
        given: the call's arguments by name.
        implementation: the model's attention implementation.

    Raises:
        AttnprobeError: a call without tokens.
        UnsupportedModelError: a cache of an unknown kind.
    """
    ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    if ids is None:
        if embeddings is None:
            raise AttnprobeError("the model was called with neither input_ids nor inputs_embeds")
        ids = embeddings.new_zeros(embeddings.shape[:2], dtype=torch.long)
    cache = _cache_in(given)
    if cache is not None and not hasattr(cache, "get_seq_length"):
        if "Paged" in type(cache).__name__:
            raise UnsupportedModelError(
                "the keys of this call are kept in pages (continuous batching, as in generate_batch), which "
                "cannot be followed: use generate, or measure the finished sequences"
            )
        raise UnsupportedModelError(
            f"cannot tell how long a cache of type {type(cache).__name__} is: use a transformers Cache"
        )
    cached = 0 if cache is None else int(cache.get_seq_length())
    mask = given.get("attention_mask")
    real = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        # A mask may be as long as a cache that has room for columns still to come.
        real = mask[:, : cached + ids.shape[1]][:, -ids.shape[1] :].to(ids.device) != 0
    segments = _segments(given, ids, real, implementation)
    columns = Columns(cached, ids.shape[1], cache is not None, segments)
    return TokenBatch.of_pass(ids, real, real, segments), columns


def _cache_in(given: dict[str, Any]) -> Any:
    """Return the cache that a forward call was given, under either of its names; None without one."""
    # transformers 5.24 renamed it, and takes the old name too.
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def cache_of(given: dict[str, Any], columns: Columns) -> GrowingCache | None:
    """Return the cache that a forward call's keys are put into; None without one.

    Assisted decoding asks for the logits of its guesses, and of the token before them.
    """
    cache = _cache_in(given)
    if cache is None:
        return None
    kept = given.get("logits_to_keep")
    if not isinstance(kept, int) or kept == 0:
        # All logits: any token after the first may be a guess, but a whole prompt is none.
        kept = columns.count if columns.cached else 1
    return GrowingCache(min(kept, columns.count) - 1, lambda: int(cache.get_seq_length()))


_unpacked: ContextVar[Tensor | None] = ContextVar("attnprobe_unpacked_positions", default=None)


@contextmanager
def unpacked(position_ids: Tensor) -> Iterator[None]:
    """Say of the positions of our own pass that none restarts, so that the device need not be asked."""
    token = _unpacked.set(position_ids)
    try:
        yield
    finally:
        _unpacked.reset(token)


def _segments(
    given: dict[str, Any], ids: Tensor, real: Tensor, implementation: str
) -> Int[Tensor, "batch token"] | None:
    """Return which sequence each token of packed rows belongs to; None if no row is packed."""
    by_kernel = implementation not in TAKES_PAIRS
    bounds = given.get("cu_seq_lens_q")
    if by_kernel and isinstance(bounds, Tensor):
        column = torch.arange(ids.shape[1], device=ids.device)
        return torch.bucketize(column, bounds[1:].to(column), right=True).expand(ids.shape)
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    if positions is not None and positions is _unpacked.get():
        return None
    # Mask functions look at positions only if no mask was given; kernels, if it leaves out no token.
    unmasked = mask is None or (by_kernel and isinstance(mask, Tensor) and bool(real.all()))
    if not unmasked or not isinstance(positions, Tensor) or positions.ndim != 2:
        return None
    restarts = positions[:, 1:] - positions[:, :-1] != 1
    if not bool(restarts.any()):
        return None
    starts = torch.nn.functional.pad(restarts.long(), (1, 0))
    return starts.cumsum(-1).to(ids.device).expand(ids.shape)

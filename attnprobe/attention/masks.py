"""Which keys each query may see: nearly always one interval, else any mask.

Causal, left-padded, windowed, chunked and packed masks all let a query see one run of keys. `CausalMask`
finds it, so that a block of queries meets only the keys it can see; a mask of any other form is kept
as it is. Adapters make one from a model's own mask, once for all layers that share it; `FactoredAttention`
makes one from its arguments. What is left to others: the scores of the pairs that are seen (block_scores).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attnprobe.attention.operator import Submatrix, take
from attnprobe.attention.tiles import Reach
from attnprobe.errors import PatternError

# Later than any key. A power of 2, since padding converts it to a double, which holds it exactly.
_BEYOND = 2**62

_FEW = 32
"""For how many queries at a time a mask knows which keys they see: tiles are some times as large."""


class LaterKeysError(PatternError):
    """A mask that lets a query see later keys."""

    def __init__(self) -> None:
        super().__init__("the mask lets a query see later keys: attnprobe reads causal attention only")


@dataclass(frozen=True)
class CausalMask:
    """Which keys each query may see: an interval per query, or any mask.

    `first` and `last` are inclusive and `[batch or 1, query]`; `last < first` where nothing is seen.
    `exact` is `[batch or 1, head or 1, query, key]` and is set only if no interval says the same.
    `plain` says that every query sees all keys up to its own. `limits` says, for each few queries, which keys
    they see, in numbers that the processor has: which blocks to visit can be planned without a word from the
    device.
    """

    first: Int[Tensor, "#batch query"]
    last: Int[Tensor, "#batch query"]
    exact: Bool[Tensor, "#batch #head query key"] | None
    plain: bool
    limits: Sequence[Reach]

    @staticmethod
    def causal(query_count: int, key_count: int, window: int | None, device: torch.device) -> CausalMask:
        """Return the causal mask in which a query sees at most `window` keys."""
        last = torch.arange(query_count, device=device)[None] + (key_count - query_count)
        plain = window is None or window >= key_count
        first = torch.zeros_like(last) if plain or window is None else (last - window + 1).clamp(min=0)
        offset, width = key_count - query_count, key_count if window is None else window
        limits = [
            Reach(
                block,
                max(0, block.start + offset - width + 1),
                block.stop + offset,
                max(0, block.stop + offset - width),
                _BEYOND,
            )
            for block in _few_queries(query_count)
        ]
        return CausalMask(first, last, None, plain, limits)

    @staticmethod
    def from_mask(mask: Bool[Tensor, "#batch #head query key"]) -> CausalMask:
        """Return the `CausalMask` of a boolean mask (True: may see).

        Raises:
            LaterKeysError: a mask that lets a query see later keys.
        """
        query_count, key_count = mask.shape[-2:]
        causal = CausalMask.causal(query_count, key_count, None, mask.device)
        if mask.shape[1] > 1 and bool((mask == mask[:, :1]).all()):
            mask = mask[:, :1]
        if mask.shape[1] == 1:
            flat = mask[:, 0]
            count = flat.sum(-1)
            # argmax finds the first True. Converting to bytes takes a byte per pair once per forward pass,
            # no more than the mask itself.
            first = flat.byte().argmax(-1)
            last = first + count - 1
            spread = key_count - 1 - flat.flip(-1).byte().argmax(-1)
            flags = [
                ((spread == last) | (count == 0)).all(),
                (last > causal.last).any(),
                (first == 0).all(),
                (last == causal.last).all(),
            ]
            # One transfer for all that the processor has to know.
            limits = _limits(first, last, causal.last)
            numbers = torch.cat([torch.stack(flags), limits.flatten()]).tolist()
            contiguous, later, from_start, to_own = numbers[:4]
            if contiguous:
                if later:
                    raise LaterKeysError
                plain = bool(from_start and to_own)
                return CausalMask(first, last, None, plain, _reaches(numbers[4:], query_count))
        if bool(mask.triu(key_count - query_count + 1).any()):
            raise LaterKeysError
        return _exactly(mask, causal)

    @staticmethod
    def from_key_mask(
        kept: Bool[Tensor, "batch key"], query_count: int, window: int | None = None
    ) -> CausalMask:
        """Return the causal mask without the keys that are not kept (False: padding)."""
        key_count = kept.shape[1]
        causal = CausalMask.causal(query_count, key_count, window, kept.device)
        start = kept.byte().argmax(-1, keepdim=True)
        stop = key_count - 1 - kept.flip(-1).byte().argmax(-1, keepdim=True)
        stop = stop.masked_fill(~kept.any(-1, keepdim=True), -1)
        if bool((kept.sum(-1, keepdim=True) == (stop - start + 1)).all()):
            first, last = torch.maximum(causal.first, start), torch.minimum(causal.last, stop)
            return _between(first, last, causal)
        every = causal.block(slice(0, query_count), slice(0, key_count))
        return _exactly(every & kept[:, None, None], causal)

    @staticmethod
    def from_segments(segment_ids: Int[Tensor, "batch token"], window: int | None = None) -> CausalMask:
        """Return the causal mask in which a token sees only its own segment; segments are contiguous."""
        count = segment_ids.shape[1]
        causal = CausalMask.causal(count, count, window, segment_ids.device)
        start = _segment_starts(segment_ids)
        return _between(torch.maximum(causal.first, start), causal.last, causal)

    def crosses(self, segment_ids: Int[Tensor, "batch token"]) -> Bool[Tensor, ""]:
        """Whether a query may see a key of another segment; queries are the last tokens, keys all of them."""
        queries = self.first.shape[1]
        if self.exact is not None:
            ids = segment_ids.to(self.exact.device)
            other = ids[:, -queries:, None] != ids[:, None, :]
            return (self.exact & other[:, None]).any()
        start = _segment_starts(segment_ids).to(self.first.device)[:, -queries:]
        return ((self.first < start) & (self.last >= self.first)).any()

    def part(self, part: Submatrix) -> CausalMask:
        """Return the mask of some heads, queries and keys of one example."""
        causal = CausalMask.causal(len(part.queries), len(part.keys), None, self.first.device)
        if self.plain:
            return causal
        if self.exact is not None:
            exact = self.exact[part.example if len(self.exact) > 1 else 0]
            exact = take(exact, 0, part.heads) if len(exact) > 1 else exact
            return _exactly(take(take(exact, 1, part.queries), 2, part.keys)[None], causal)
        example = part.example if len(self.first) > 1 else 0
        keys = torch.tensor(part.keys, device=self.first.device)
        first = torch.searchsorted(keys, take(self.first[example], 0, part.queries))
        last = torch.searchsorted(keys, take(self.last[example], 0, part.queries), right=True) - 1
        limits = []
        for block in _few_queries(len(part.queries)):
            few = part.queries[block]
            met = _met(self.limits, few[0], few[-1] + 1)
            limits.append(Reach(block, *(bisect_left(part.keys, key) for key in met)))
        return CausalMask(first[None], last[None], None, plain=False, limits=limits)

    def block(self, queries: slice | Tensor, keys: slice) -> Bool[Tensor, "#batch #head query key"]:
        """Return the mask of one block."""
        if self.exact is not None:
            return self.exact[:, :, queries, keys]
        key = torch.arange(keys.start, keys.stop, device=self.first.device)
        first, last = self.first[:, queries], self.last[:, queries]
        return ((key >= first[..., None]) & (key <= last[..., None]))[:, None]

    def diagonals(
        self, queries: slice, keys: Int[Tensor, "query distance"]
    ) -> Bool[Tensor, "#batch #head query distance"]:
        """Return the mask of chosen keys of each query; an index below 0 is not a key."""
        if self.exact is not None:
            part = self.exact[:, :, queries]
            index = keys.clamp(min=0).expand(*part.shape[:2], -1, -1)
            return part.gather(-1, index) & (keys >= 0)
        first, last = self.first[:, queries], self.last[:, queries]
        return ((keys >= first[..., None]) & (keys <= last[..., None]))[:, None]

    def column(self, keys: Int[Tensor, " batch"] | int) -> Bool[Tensor, "#batch #head query"]:
        """Return which queries see one key of each example, or the same of all; below 0 there is no key."""
        if isinstance(keys, int):
            if keys >= 0 and self.exact is not None:
                return self.exact[..., keys]
            return ((self.first <= keys) & (self.last >= keys) & (keys >= 0))[:, None]
        at = keys[:, None, None]
        if self.exact is not None:
            exact = self.exact.expand(len(keys), -1, -1, -1)
            index = at[..., None].clamp(min=0).expand(-1, exact.shape[1], exact.shape[2], 1)
            return exact.gather(-1, index)[..., 0] & (at >= 0)
        return (at >= self.first[:, None]) & (at <= self.last[:, None]) & (at >= 0)

    def sees_none(self) -> Bool[Tensor, "#batch #head query"]:
        """Return which queries may see no key at all: usually padding."""
        if self.exact is not None:
            return ~self.exact.any(-1)
        return (self.last < self.first)[:, None]

    def reaches(self, size: int) -> list[Reach]:
        """Return which keys the queries see, in blocks of `size`; near a block's ends, perhaps a few more."""
        count = self.first.shape[1]
        answer = []
        for begin in range(0, count, size):
            end = min(begin + size, count)
            answer.append(Reach(slice(begin, end), *_met(self.limits, begin, end)))
        return answer


def _few_queries(count: int) -> list[slice]:
    return [slice(begin, min(begin + _FEW, count)) for begin in range(0, count, _FEW)]


def _met(limits: Sequence[Reach], begin: int, end: int) -> tuple[int, int, int, int]:
    """Return the keys of a `Reach` of the queries from `begin` up to `end`."""
    met = limits[begin // _FEW : -(-end // _FEW)]
    return (
        min(part.first for part in met),
        max(part.stop for part in met),
        max(part.common_first for part in met),
        min(part.common_stop for part in met),
    )


def _limits(
    first: Int[Tensor, "#batch query"], last: Int[Tensor, "#batch query"], own: Int[Tensor, "1 query"]
) -> Int[Tensor, "block 4"]:
    """Return the numbers of a `Reach` for each few queries; `own` is the key index of each query."""
    count = first.shape[1]
    seeing = last >= first
    # The keys that any query sees; queries that see none are left out.
    begin = first.masked_fill(~seeing, _BEYOND).amin(0)
    stop = (last + 1).masked_fill(~seeing, 0).amax(0)
    # The keys that all queries see, later ones aside: a query that sees up to its own key needs no mask.
    common_stop = (last + 1).masked_fill(last == own, _BEYOND).masked_fill(~seeing, 0).amin(0)
    common_first = first.amax(0)
    blocks = -(-count // _FEW)

    def by_block(values: Tensor, fill: int) -> Tensor:
        padded = torch.nn.functional.pad(values, (0, blocks * _FEW - count), value=fill)
        return padded.view(blocks, _FEW)

    return torch.stack(
        [
            by_block(begin, _BEYOND).amin(-1),
            by_block(stop, 0).amax(-1),
            by_block(common_first, 0).amax(-1),
            by_block(common_stop, _BEYOND).amin(-1),
        ],
        dim=-1,
    )


def _reaches(numbers: list[int], query_count: int) -> list[Reach]:
    """Return the reach of each few queries from its numbers."""
    return [
        Reach(block, *numbers[4 * place : 4 * place + 4])
        for place, block in enumerate(_few_queries(query_count))
    ]


def _between(
    first: Int[Tensor, "#batch query"], last: Int[Tensor, "#batch query"], causal: CausalMask
) -> CausalMask:
    """Return a mask of intervals that is not plain."""
    numbers = _limits(first, last, causal.last).flatten().tolist()
    return CausalMask(first, last, None, plain=False, limits=_reaches(numbers, first.shape[1]))


def _exactly(mask: Bool[Tensor, "#batch #head query key"], causal: CausalMask) -> CausalMask:
    """Return a mask of no simple form, which hides some of the keys that a causal mask shows."""
    limits = [replace(reach, common_stop=0) for reach in causal.limits]
    return CausalMask(causal.first, causal.last, mask, plain=False, limits=limits)


def _segment_starts(segment_ids: Int[Tensor, "batch token"]) -> Int[Tensor, "batch token"]:
    """Return the column at which each token's segment begins."""
    begins = torch.nn.functional.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    column = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    return column.where(begins, column.new_zeros(())).cummax(-1).values


def split_mask(mask: Tensor) -> tuple[Bool[Tensor, "..."], Tensor | None]:
    """Split a boolean or additive mask into what may be seen and a bias; None if the bias is 0 throughout.

    Frameworks write "may not see" as minus infinity or as the lowest number of the mask's dtype, and
    masks that are combined may reach half of it: anything at or below a quarter of it counts as unseen.

    Raises:
        PatternError: a mask of whole numbers.
    """
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        raise PatternError(f"a mask must be boolean or additive (floating point), got {mask.dtype}")
    seen = mask > torch.finfo(mask.dtype).min / 4
    bias = mask.masked_fill(~seen, 0.0)
    return seen, (bias if bool((bias != 0).any()) else None)

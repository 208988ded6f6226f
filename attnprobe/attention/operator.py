"""Attention as a linear operator on token features: the protocol, and its dense implementation.

A layer's attention, for one batch, is a matrix `A` for each head: row `t` says how query `t` spreads its
attention over the keys `s <= t`. Everything that attnprobe computes comes from four questions about that
matrix: `attend` (`A @ F`), `receive` (`A.T @ G`), `band` (the diagonals near the main one) and `rows`
(chosen rows, for pictures). `column` is `attend` for a single key, and nearly free; `blocks` gives
rows of some heads piece by piece, for sums over heads; and `near_sums` sums over a band that is never stored.
Metrics are written once, in terms of these questions.

`DenseAttention` answers them from an existing pattern; it is short and obvious, and the oracle for
`attnprobe.attention.factored.FactoredAttention`, which answers them from query and key without ever storing a
map. What is left to others: where the pattern or the inputs come from (adapters), and what the answers mean
(metrics).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.attention.checks import judge_later
from attnprobe.attention.tiles import TILE_QUERIES
from attnprobe.errors import ParameterError, PatternError
from attnprobe.validation import ArrayLike, as_tensor, brief, whole_number

NARROW_BAND = 1024
"""A band of up to this width may reach beyond the first key; a wider one only to the first key."""


@dataclass(frozen=True)
class Submatrix:
    """A part of an attention: some heads, queries and keys of one example, as `Attention.blocks` is asked.

    These are numbers that the processor has, so that no layer waits for a device to plan its work.

    Attributes:
        example: the example.
        heads: the heads.
        queries: indices of queries, ascending.
        keys: indices of keys, ascending. The last of them are the queries' own.
    """

    example: int
    heads: Sequence[int]
    queries: Sequence[int]
    keys: Sequence[int]


def take(values: Tensor, axis: int, numbers: Sequence[int]) -> Tensor:
    """Return some entries along an axis: without a copy, if they are neighbours in ascending order.

    >>> take(torch.arange(4), 0, [1, 2]), take(torch.arange(4), 0, [0, 2])
    (tensor([1, 2]), tensor([0, 2]))
    """
    if isinstance(numbers, range) or list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return values.narrow(axis, numbers[0], len(numbers))
    return values.index_select(axis, torch.tensor(numbers, device=values.device))


class NearSums(NamedTuple):
    """What is summed over near pairs; see `Attention.near_sums`."""

    by_query: Float[Tensor, "batch head query"]
    by_key: Float[Tensor, "batch head key"]


class Attention(ABC):
    """One layer's attention over one batch: a linear operator from key features to query features.

    The contract, the same for every implementation:

    - Answers are in float32, whatever the model's dtype, or in float64 if the inputs are.
    - Query `t` is the token at key index `t + query_offset`, and sees no later key. `query_offset` is 0
      in a whole forward pass, and the length of the cache when keys are cached.
    - A key that a query may not see (padding, window, another packed sequence) has probability 0. A
      query that may see nothing (padding) has a row of zeros. Rows sum to at most 1: to less than 1 if
      the model's softmax has a sink that is not a key.
    - Inputs are never modified, and nothing here carries gradients.
    - Key index `s` is column `s + key_start` of the sequence; `key_start` is not 0 if a sliding cache has
      dropped the first keys.
    """

    key_start: int = 0
    batch_size: int
    head_count: int
    query_count: int
    key_count: int
    dtype: torch.dtype
    device: torch.device

    @property
    def query_offset(self) -> int:
        """How many keys come before the first query."""
        return self.key_count - self.query_count

    def key_fingerprint(self) -> Float[Tensor, "batch key"] | None:
        """Return a number for each key, the same in every later pass over the same cache.

        It shows whether a cache was reordered in between (beam search). None if only the pattern is known.
        """
        return None

    @abstractmethod
    def attend(
        self, features: ArrayLike, *, nonnegative: bool = False
    ) -> Float[Tensor, "batch head query feature"]:
        """Return `A @ features`: what each query reads when the keys carry `features`.

        `nonnegative` says that no feature is negative, if the caller knows (`key_positions` may be among
        them): otherwise the device may be asked, since a GPU's kernel that sums logarithms takes no others.
        """

    @abstractmethod
    def receive(
        self,
        weights: ArrayLike,
        start: int = 0,
        stop: int | None = None,
        *,
        counted: Sequence[bool] | None = None,
        nonnegative: bool = False,
    ) -> Float[Tensor, "batch head key feature"]:
        """Return `A.T @ weights`: what each key receives from the queries, weighted.

        Only pairs at a distance `start <= t - s < stop` count (`stop=None`: no limit). The limits are part
        of the question, since subtracting the near pairs from a sum over all of them would lose precision.
        `counted` says which queries may have a weight, if the caller knows: otherwise the device is asked.
        So it may be if the caller does not say that the weights are `nonnegative`.
        """

    @abstractmethod
    def band(self, width: int, start: int = 0) -> Float[Tensor, "batch head query distance"]:
        """Return `A[t, t - j]` for `start <= j < start + width`; 0 where `t - j` is no key.

        All entries at distances of `key_count` or more are zeros: a band wider than both `key_count` and
        `NARROW_BAND` raises `ParameterError` rather than fill the memory with them.
        """

    def near_sums(
        self,
        weights: Float[Tensor, " distance"],
        rows: Float[Tensor, "batch query"],
        low: int,
        high: int,
    ) -> NearSums:
        """Return two sums over near pairs: of each query over distances, and of each key over queries.

        The first is `sum over j of A[t, t - j] weights[j]`, the second `sum over t of rows[t] A[t, s]` at
        distances `low <= t - s <= high`. Both come from one band; where it need not be sorted by distance,
        it is never stored.
        """
        start = 0 if len(weights) else min(low, self.key_count)
        band = self.band(max(len(weights), high + 1) - start, start)
        by_query = band[..., : len(weights)] @ weights
        width = high - low + 1
        # Key s receives band[t, low + j] from the query at s + low + j. These entries form a diagonal of the
        # band, which a stride of width + 1 follows. Zeros stand in for the queries before and after.
        first = low - self.query_offset
        padding = max(0, -first)
        padded = band.new_zeros(*band.shape[:2], padding + self.query_count + low + width - 1, width)
        inside = slice(padding, padding + self.query_count)
        torch.mul(band[..., low - start : high + 1 - start], rows[:, None, :, None], out=padded[:, :, inside])
        shape = (*band.shape[:2], self.key_count, width)
        strides = (*padded.stride()[:3], width + 1)
        by_key = padded.as_strided(shape, strides, (first + padding) * width).sum(-1)
        return NearSums(by_query, by_key)

    @abstractmethod
    def rows(self, queries: ArrayLike) -> Float[Tensor, "batch head row key"]:
        """Return chosen rows of `A`, dense: for pictures and checks, since each holds every key."""

    @abstractmethod
    def blocks(
        self, part: Submatrix
    ) -> Iterator[tuple[slice, slice, Float[Tensor, "head block_query block_key"]]]:
        """Yield a part of `A` in blocks: which of the part's queries and keys, and the entries.

        No pair is in two blocks, and one that is in none has probability 0. The blocks are not to be changed.
        """

    def column(self, keys: ArrayLike | int) -> Float[Tensor, "batch head query"]:
        """Return `A[t, keys[b]]`: what each query gives to one key of each example; 0 for a key of -1.

        A whole number is the key of all examples. `FactoredAttention` answers with the product of a matrix
        and a vector, and visits no other key.
        """
        keys = self._check_keys(keys)
        at = keys if isinstance(keys, int) else keys[:, None]
        marked = (torch.arange(self.key_count, device=self.device) == at).expand(self.batch_size, -1)
        return self.attend(marked[..., None].to(self.dtype), nonnegative=True)[..., 0]

    @abstractmethod
    def row_mass(self) -> Float[Tensor, "batch head query"]:
        """Return the sum of each row: 1, less with an attention sink, 0 where nothing is seen."""

    def key_positions(self) -> Float[Tensor, " key"]:
        """Return the position of each key, centred, since rounding errors grow with the size of a feature.

        An implementation may count from another point: only differences between positions have a meaning.
        """
        return key_positions(self.key_count, self.dtype, self.device)

    def mean_position(self) -> Float[Tensor, "batch head query"]:
        """Return what each query reads when the keys carry `key_positions`."""
        features = self.key_positions()[None, :, None].expand(self.batch_size, -1, -1)
        return self.attend(features, nonnegative=True)[..., 0]

    def past_first(self) -> Float[Tensor, "batch head query 2"] | None:
        """Return what each query reads from keys that carry `past_first_features`, if it is known already."""
        return None

    def mean_distance(self) -> Float[Tensor, "batch head query"]:
        """Return the mean backward distance of each query, `sum over s of A[t, s] * (t - s)`.

        A sink's share of a row counts as distance 0.
        """
        position = self.key_positions()[self.query_offset :]
        return position * self.row_mass() - self.mean_position()

    def _check_features(self, features: ArrayLike, axis: str, count: int) -> Tensor:
        features = as_tensor(features, "features")
        if features.ndim != 3 or features.shape[:2] != (self.batch_size, count):
            raise ParameterError(
                f"expected [batch={self.batch_size}, {axis}={count}, feature], got {list(features.shape)}"
            )
        return features.to(device=self.device, dtype=self.dtype)

    def _check_band(self, width: int, start: int) -> tuple[int, int]:
        """Return a band's width and its start, which is at most `key_count`: there are no keys beyond."""
        width, start = whole_number(width, "width", minimum=1), whole_number(start, "start")
        if width > max(self.key_count, NARROW_BAND):
            raise ParameterError(
                f"a band of {width} distances is wider than the number of keys ({self.key_count}): ask for "
                f"{self.key_count} at most, since no key lies farther back"
            )
        return width, min(start, self.key_count)

    def _check_distances(self, start: int, stop: int | None) -> tuple[int, int | None]:
        """Return the limits of a range of distances, cut to those at which there are keys."""
        start = whole_number(start, "start")
        if stop is None:
            return min(start, self.key_count), None
        stop = whole_number(stop, "stop")
        if stop <= start:
            raise ParameterError(f"distances need 0 <= start < stop; got start={start}, stop={stop}")
        return min(start, self.key_count), None if stop >= self.key_count else stop

    def _check_keys(self, keys: ArrayLike | int) -> Tensor | int:
        if isinstance(keys, int):
            self._check_key_range(keys, keys)
            return keys
        keys = as_tensor(keys, "keys")
        whole = not (keys.is_floating_point() or keys.is_complex() or keys.dtype == torch.bool)
        if not whole or tuple(keys.shape) != (self.batch_size,):
            raise ParameterError(
                f"column takes the index of a key for each of {self.batch_size} examples, got {brief(keys)}"
            )
        judge_later([keys.amin(), keys.amax()], lambda found: self._check_key_range(*map(int, found)))
        # Until then, an index beyond the last key must not fail otherwise.
        return keys.to(self.device).long().clamp(-1, self.key_count - 1)

    def _check_key_range(self, lowest: int, highest: int) -> None:
        if lowest < -1 or highest >= self.key_count:
            raise ParameterError(
                f"key indices must lie in 0..{self.key_count - 1}, or be -1 for none; got {lowest}..{highest}"
            )

    def _check_rows(self, queries: ArrayLike) -> Tensor:
        queries = as_tensor(queries, "queries")
        whole = not queries.is_floating_point() and queries.dtype != torch.bool
        if not whole or queries.ndim != 1 or queries.numel() == 0:
            raise ParameterError(f"rows takes a non-empty 1-D tensor of query indices, got {brief(queries)}")
        if int(queries.min()) < 0 or int(queries.max()) >= self.query_count:
            raise ParameterError(
                f"query indices must lie in 0..{self.query_count - 1}, "
                f"got {int(queries.min())}..{int(queries.max())}"
            )
        return queries.to(self.device)


def key_positions(count: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, " key"]:
    """Return positions `0 .. count - 1`, centred on 0.

    >>> key_positions(3, torch.float32, torch.device("cpu"))
    tensor([-1.,  0.,  1.])
    """
    return torch.arange(count, device=device, dtype=dtype) - (count - 1) / 2


def past_first_features(count: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "key 2"]:
    """Return 1 and the centred position for every key but the first, and zeros for that.

    Of these a head's distance without the first token is made. The difference of two sums over all keys would
    lose its precision where the first token holds nearly all of a row.

    >>> past_first_features(3, torch.float32, torch.device("cpu"))
    tensor([[0., 0.],
            [1., 0.],
            [1., 1.]])
    """
    position = key_positions(count, dtype, device)
    features = torch.stack([torch.ones_like(position), position], dim=-1)
    features[0] = 0.0
    return features


def reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which statistics of `dtype` inputs are kept: float32, or float64 for float64.

    >>> reduction_dtype(torch.bfloat16)
    torch.float32
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


class DenseAttention(Attention):
    """Attention given as a pattern `[batch, head, query, key]`, or `[query, key]` for a single head.

    The pattern is checked: NaN, a negative or non-causal entry, or a row that sums to more than 1
    raises `PatternError`. Probabilities that a model computed in bfloat16 may exceed a row mass of 1
    by rounding; the tolerance follows the pattern's dtype.

    >>> pattern = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    >>> DenseAttention(pattern).band(width=2)[0, 0]
    tensor([[1.0000, 0.0000],
            [0.7500, 0.2500]])
    """

    def __init__(self, pattern: ArrayLike, *, key_start: int = 0) -> None:
        self.key_start = key_start
        pattern = as_tensor(pattern, "a pattern", PatternError)
        if pattern.ndim == 2:
            pattern = pattern[None, None]
        if pattern.ndim != 4:
            raise PatternError(
                f"a pattern must be [batch, head, query, key] (or [query, key]), got {list(pattern.shape)}"
            )
        if not pattern.is_floating_point():
            raise PatternError(f"a pattern must hold floating-point probabilities, got dtype {pattern.dtype}")
        self.batch_size, self.head_count, self.query_count, self.key_count = pattern.shape
        if pattern.numel() == 0 or self.key_count < self.query_count:
            raise PatternError(
                f"a causal pattern must have at least as many keys as queries and at least one query, "
                f"got {self.query_count} queries and {self.key_count} keys"
            )
        self.dtype = reduction_dtype(pattern.dtype)
        self.device = pattern.device
        self.pattern = pattern.detach().to(self.dtype)
        self._check_pattern(tolerance=16 * torch.finfo(pattern.dtype).eps)

    def _check_pattern(self, tolerance: float) -> None:
        """Check that the pattern holds probabilities of a causal model.

        The worst row of each kind is kept for the error, not the whole pattern, which is large.
        """
        axes = self.pattern.shape[:3]
        rows = self.pattern.flatten(0, 2)
        future = self.pattern.triu(self.query_offset + 1).flatten(0, 2)
        # Each finds NaN too. [batch * head * query]
        mass, lowest, later = rows.sum(-1), rows.amin(-1), future.amax(-1)
        worst, earliest = mass.argmax()[None], later.argmax()[None]
        kept = rows.index_select(0, worst), future.index_select(0, earliest)
        smallest = mass.argmin()[None], rows.index_select(0, mass.argmin()[None])

        def place(row: Tensor, wrong: Tensor) -> list[int]:
            """Return where the first wrong entry of a row is."""
            index = [int(part) for part in torch.unravel_index(row[0], axes)]
            return [*index, int(wrong[0].byte().argmax())]

        def judge(numbers: list[float]) -> None:
            largest, least, negative, seen_later = numbers
            if not (math.isfinite(largest) and math.isfinite(least)):
                row, entries = (worst, kept[0]) if not math.isfinite(largest) else smallest
                raise PatternError(
                    "the pattern is not finite at [batch, head, query, key] = "
                    f"{place(row, ~torch.isfinite(entries))}; a row that may see no key (padding) must be "
                    "zeros, not NaN"
                )
            if negative < -tolerance:
                raise PatternError(
                    f"the pattern has negative entries (down to {negative:.3g}): pass probabilities, not "
                    "scores"
                )
            if seen_later > tolerance:
                raise PatternError(
                    f"the pattern is not causal: [batch, head, query, key] = "
                    f"{place(earliest, kept[1] > tolerance)} looks at a later token; attnprobe reads causal "
                    "language models only"
                )
            if largest > 1 + max(tolerance, 1e-5):
                raise PatternError(f"a row of the pattern sums to {largest:.6g}, more than 1")

        judge_later([mass.amax(), mass.amin(), lowest.amin(), later.amax()], judge)

    def attend(
        self, features: ArrayLike, *, nonnegative: bool = False
    ) -> Float[Tensor, "batch head query feature"]:
        """Return `A @ features`."""
        features = self._check_features(features, "key", self.key_count)
        return self.pattern @ features[:, None]

    def receive(
        self,
        weights: ArrayLike,
        start: int = 0,
        stop: int | None = None,
        *,
        counted: Sequence[bool] | None = None,
        nonnegative: bool = False,
    ) -> Float[Tensor, "batch head key feature"]:
        """Return `A.T @ weights` over the pairs at `start <= t - s < stop`."""
        start, stop = self._check_distances(start, stop)
        weights = self._check_features(weights, "query", self.query_count)
        pattern = self.pattern.tril(self.query_offset - start)
        if stop is not None:
            pattern = pattern.triu(self.query_offset - stop + 1)
        return pattern.mT @ weights[:, None]

    def band(self, width: int, start: int = 0) -> Float[Tensor, "batch head query distance"]:
        """Return `A[t, t - j]` for `start <= j < start + width`."""
        width, start = self._check_band(width, start)
        query = torch.arange(self.query_count, device=self.device) + self.query_offset
        distance = torch.arange(start, start + width, device=self.device)
        key = query[:, None] - distance[None, :]
        index = key.clamp(min=0).expand(self.batch_size, self.head_count, -1, -1)
        return self.pattern.gather(-1, index).masked_fill(key < 0, 0.0)

    def rows(self, queries: ArrayLike) -> Float[Tensor, "batch head row key"]:
        """Return chosen rows of the pattern."""
        return self.pattern[:, :, self._check_rows(queries)]

    def blocks(
        self, part: Submatrix
    ) -> Iterator[tuple[slice, slice, Float[Tensor, "head block_query block_key"]]]:
        """Yield a part of the pattern, some queries at a time."""
        pattern = take(self.pattern[part.example], 0, part.heads)
        for begin in range(0, len(part.queries), TILE_QUERIES):
            queries = slice(begin, min(begin + TILE_QUERIES, len(part.queries)))
            block = take(take(pattern, 1, part.queries[queries]), 2, part.keys)
            yield queries, slice(0, len(part.keys)), block

    def row_mass(self) -> Float[Tensor, "batch head query"]:
        """Return the sum of each row."""
        return self.pattern.sum(-1)

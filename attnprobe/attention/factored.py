"""Attention given by the inputs of the model's attention call: exact statistics, never a T x T map.

Adapters make a `FactoredAttention` from the query (after rotary), the key (not expanded over query groups),
and what the model does to the scores: scaling, soft cap, bias, mask, window, sinks. It answers the four
questions of `attnprobe.attention.Attention` in memory linear in T:

- `attend` and `receive` go through tiles of `exp(score - log_sum_exp)` that fit a processor's cache or,
  where the table of kernels says so, through a fused kernel.
- `band` multiplies blocks of queries with the few keys near them, all blocks in one product.
- `rows` computes the chosen rows, and `blocks` the tiles of some heads, queries and keys.

The sums of the rows are computed when it is made, and nothing is stored later: neither the answer nor the
cost of a question depends on earlier questions. What is left to others: the scores of a block
(block_scores), the sums (row_sums), the tiles (probability_tiles), the fused kernel (fused_sums), when it is
used (kernels), and reading the inputs of a call (adapters).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.attention import fused_sums
from attnprobe.attention.block_scores import BAND_QUERIES, BlockScores
from attnprobe.attention.kernels import Kernel, Question, piece_bytes, product
from attnprobe.attention.masks import CausalMask
from attnprobe.attention.near_sums import near_sums
from attnprobe.attention.operator import Attention, NearSums, Submatrix, take
from attnprobe.attention.probability_tiles import probability_tiles
from attnprobe.attention.row_sums import sum_rows
from attnprobe.attention.tiles import query_slices
from attnprobe.errors import PatternError
from attnprobe.validation import ArrayLike, as_tensor, brief


class FactoredAttention(Attention):
    """Attention given as `softmax(cap(scaling * q @ k.T) + bias)` over the visible keys.

    Args:
        query: `[batch, head, query, d]`, after rotary and normalisation.
        key: `[batch, key_head, key, d]`; `head` is a multiple of `key_head` (GQA, MQA).
        scaling: the factor of the products; default `d ** -0.5`.
        mask: `[batch or 1, head or 1, query, key]`, boolean (True: may see) or additive, or the `CausalMask`
            made from one, which all layers can share. The mask is complete: `window` and `key_mask` are not
            applied on top of it. None: causal.
        key_mask: `[batch, key]`, False where a key is padding.
        window: the largest number of keys that a query sees, its own included (sliding window).
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        sinks: `[head]` logits in the softmax's denominator that belong to no key (gpt-oss).
        bias: `[batch or 1, head or 1, query, key]`, added to the scores (ALiBi, relative position).
        log_sum_exp: `[batch, head, query]`, of each row's scores without sinks, if a kernel has computed it
            already.
        mean_position: `[batch, head, query]`, what each query reads when the keys carry `key_positions`,
            without sinks, if a kernel has computed it already.
        past_first: `[batch, head, query, 2]`, the same for `past_first_features`.
        key_start: the column of the sequence that the first key stands for.

    Raises:
        PatternError: shapes that do not fit, a mask that is not causal, or non-finite inputs.

    >>> query, key = torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 3, 4)
    >>> FactoredAttention(query, key).rows(torch.tensor([2]))[0, 0]
    tensor([[0.3333, 0.3333, 0.3333]])
    """

    def __init__(
        self,
        query: ArrayLike,
        key: ArrayLike,
        *,
        scaling: float | None = None,
        mask: Tensor | CausalMask | None = None,
        key_mask: Tensor | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        bias: Tensor | None = None,
        log_sum_exp: Float[Tensor, "batch head query"] | None = None,
        mean_position: Float[Tensor, "batch head query"] | None = None,
        past_first: Float[Tensor, "batch head query 2"] | None = None,
        key_start: int = 0,
    ) -> None:
        query = as_tensor(query, "query", PatternError)
        key = as_tensor(key, "key", PatternError)
        if query.ndim != 4 or key.ndim != 4 or not (query.is_floating_point() and key.is_floating_point()):
            raise PatternError(
                f"query and key must be floating point [batch, head, token, d]; got {brief(query)} and "
                f"{brief(key)}"
            )
        self.scores = BlockScores.of_call(
            query,
            key,
            scaling=scaling,
            mask=mask,
            key_mask=key_mask,
            window=window,
            softcap=softcap,
            bias=bias,
        )
        self._sums = sum_rows(self.scores, sinks, log_sum_exp, mean_position, past_first)
        self.key_start = key_start
        self.batch_size, self.head_count, self.query_count = query.shape[:3]
        self.key_count = key.shape[2]
        self.dtype, self.device = self.scores.dtype, query.device

    def key_fingerprint(self) -> Float[Tensor, "batch key"]:
        """Return the sum of each key's entries: the same in every pass while the cache is not reordered."""
        return self.scores.key.to(self.dtype).sum((1, 3))

    # ---- what is known from the start ---------------------------------------------------------

    def row_mass(self) -> Float[Tensor, "batch head query"]:
        """Return the sum of each row."""
        return self._sums.mass

    def log_sum_exp(self) -> Float[Tensor, "batch head query"]:
        """Return the log of each row's softmax denominator, sinks included; 0 where nothing is seen."""
        return self._sums.log_sum_exp

    def key_positions(self) -> Float[Tensor, " key"]:
        """Return the position of each key: centred or, for a fused kernel, from 0 on.

        That kernel sums what is not negative, and relatively to its size.
        """
        position = super().key_positions()
        return position - position[0] if self.scores.kernel(Question.ATTEND) is Kernel.FUSED else position

    def mean_position(self) -> Float[Tensor, "batch head query"]:
        """Return what each query reads when the keys carry `key_positions`: known if a kernel computed it."""
        known = self._sums.mean_position
        return super().mean_position() if known is None else known

    def past_first(self) -> Float[Tensor, "batch head query 2"] | None:
        """Return what each query reads from `past_first_features`, if a kernel computed it."""
        return self._sums.past_first

    # ---- the four questions -------------------------------------------------------------------

    def attend(
        self, features: ArrayLike, *, nonnegative: bool = False
    ) -> Float[Tensor, "batch head query feature"]:
        """Return `A @ features`."""
        features = self._check_features(features, "key", self.key_count)
        fused = self.scores.kernel(Question.ATTEND, features.shape[-1]) is Kernel.FUSED
        if fused and (nonnegative or not bool((features < 0).any())):
            return fused_sums.attended(self.scores, self._sums.log_sum_exp, features)
        shape = (self.batch_size, self.head_count, self.query_count, features.shape[-1])
        answer = torch.zeros(shape, dtype=self.dtype, device=self.device)
        for tile, probability in probability_tiles(self.scores, self._sums.log_sum_exp):
            answer[:, :, tile.queries] += product(probability, features[:, None, tile.keys], self.dtype)
        return answer

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
        fused = self.scores.kernel(Question.RECEIVE, weights.shape[-1]) is Kernel.FUSED
        if fused and (nonnegative or not bool((weights < 0).any())):
            return fused_sums.received(self.scores, self._sums.log_sum_exp, weights, start, stop)
        # Features before keys, so that a tile's part is added to contiguous memory.
        shape = (self.batch_size, self.head_count, weights.shape[-1], self.key_count)
        answer = torch.zeros(shape, dtype=self.dtype, device=self.device)
        # Queries of the prompt usually have no weight.
        counted = (weights != 0).any(-1).any(0).tolist() if counted is None else counted
        for tile, probability in probability_tiles(self.scores, self._sums.log_sum_exp, start, stop, counted):
            # [batch, 1, feature, query] @ [batch, head, query, key]
            answer[..., tile.keys] += product(weights[:, None, tile.queries].mT, probability, self.dtype)
        return answer.mT.contiguous()

    def band(self, width: int, start: int = 0) -> Float[Tensor, "batch head query distance"]:
        """Return `A[t, t - j]` for `start <= j < start + width`."""
        width, start = self._check_band(width, start)
        shape = (self.batch_size, self.head_count, self.query_count, width)
        wanted = width
        # At distances of `key_count` or more there is no key.
        width = min(width, self.key_count - start)
        if width < 1:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        bytes_per_query = self.batch_size * self.head_count * (width + BAND_QUERIES) * self.dtype.itemsize
        most_bytes = piece_bytes(self.device.type)
        pieces = query_slices(self.query_count, bytes_per_query, most_bytes, BAND_QUERIES)
        if len(pieces) == 1 and width == wanted:
            score = self.scores.band(pieces[0], width, start)
            return score.sub_(self._sums.log_sum_exp[..., None]).exp_()
        answer = torch.zeros(shape, dtype=self.dtype, device=self.device)
        for queries in pieces:
            score = self.scores.band(queries, width, start)
            answer[:, :, queries, :width] = score.sub_(self._sums.log_sum_exp[:, :, queries, None]).exp_()
        return answer

    def near_sums(
        self,
        weights: Float[Tensor, " distance"],
        rows: Float[Tensor, "batch query"],
        low: int,
        high: int,
    ) -> NearSums:
        """Return sums over near pairs, by query and by key."""
        if not self.scores.are_products:
            return super().near_sums(weights, rows, low, high)
        return near_sums(self.scores, self._sums.log_sum_exp, weights, rows, low, high)

    def rows(self, queries: ArrayLike) -> Float[Tensor, "batch head row key"]:
        """Return chosen rows of `A`, dense."""
        queries = self._check_rows(queries)
        score = self.scores.block(queries, slice(0, self.key_count))
        return score.sub_(self._sums.log_sum_exp[:, :, queries, None]).exp_()

    def blocks(
        self, part: Submatrix
    ) -> Iterator[tuple[slice, slice, Float[Tensor, "head block_query block_key"]]]:
        """Yield tiles that hold all pairs of the part that are seen."""
        scores = self.scores.part(part)
        log_sum_exp = take(take(self._sums.log_sum_exp[part.example], 0, part.heads), 1, part.queries)
        for tile, probability in probability_tiles(scores, log_sum_exp[None]):
            yield tile.queries, tile.keys, probability[0]

    def column(self, keys: ArrayLike | int) -> Float[Tensor, "batch head query"]:
        """Return `A[t, keys[b]]`."""
        score = self.scores.column(self._check_keys(keys))
        return score.sub_(self._sums.log_sum_exp).exp_()

"""Attention given by the inputs of the model's attention call: exact statistics, never a T x T map.

`FactoredAttention` holds the query (after rotary), the key (not expanded over query groups), and
what the model does to the scores: scaling, soft cap, bias, mask, window, sinks. It answers the four
questions of `attnprobe.attention.Attention` in memory linear in T:

- Each row's log-sum-exp is known already, where the model's own kernel returned it; else it comes from
  one flash call, and from blocks of scores where no kernel computes this attention.
- `band` multiplies blocks of queries with the few keys near them, all blocks in one product.
- `receive` and `attend` walk over blocks that fit a processor's cache: `exp(q @ k.T - log_sum_exp)`.

What is left to others: which keys a query may see (visibility), the kernel (flash), reading these
inputs off a model (adapters).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnprobe.attention.kernels import flash_attention
from attnprobe.attention.masks import CausalMask, split_mask
from attnprobe.attention.operator import Attention, reduction_dtype
from attnprobe.errors import PatternError

# What one block of scores over all keys may hold: far below one layer's activations.
_BLOCK_BYTES = 32 * 2**20
# Queries and keys of a block whose scores stay in a processor's cache (measured: 2.4 times the flash
# kernel's time over whole rows, 0.6 times over such blocks).
_TILE_QUERIES, _TILE_KEYS = 128, 512
# Queries that share one product of a band. Each is multiplied with all keys near any of them, so few
# are better; fewer than this, and the products are too small.
_BAND_QUERIES = 32
# What the products of a band may hold at a time; several copies of them are made.
_BAND_BYTES = 4 * 2**20
_LOG2_E = math.log2(math.e)


class FactoredAttention(Attention):
    """Attention given as `softmax(cap(scaling * q @ k.T) + bias)` over the visible keys.

    Args:
        query: `[batch, head, query, d]`, after rotary and normalisation.
        key: `[batch, key_head, key, d]`; `head` is a multiple of `key_head` (GQA, MQA).
        scaling: what scores are multiplied with; default `d ** -0.5`.
        mask: `[batch or 1, head or 1, query, key]`, boolean (True: may see) or additive; it says all
            there is to say, so `window` and `key_mask` are not applied on top. None: causal.
        key_mask: `[batch, key]`, False where a key is padding.
        window: how many keys a query sees at most, its own included (sliding window).
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        sinks: `[head]` logits in the softmax's denominator that belong to no key (gpt-oss).
        bias: `[batch or 1, head or 1, query, key]`, added to the scores (ALiBi, relative position).
        visibility: what `mask` would say, where it is known already (the same mask serves all layers).
        log_sum_exp: `[batch, head, query]`, of each row's scores without sinks, where a kernel has
            computed it already.
        mean_position: `[batch, head, query]`, what each query reads when keys carry `key_positions`,
            where a kernel has computed it already.
        key_start: the column of the sequence that the first key stands for.

    Raises:
        PatternError: shapes that do not fit, a mask that is not causal, or non-finite inputs.

    >>> query, key = torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 3, 4)
    >>> FactoredAttention(query, key).rows(torch.tensor([2]))[0, 0]
    tensor([[0.3333, 0.3333, 0.3333]])
    """

    def __init__(
        self,
        query: Float[Tensor, "batch head query d"],
        key: Float[Tensor, "batch key_head key d"],
        *,
        scaling: float | None = None,
        mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        bias: Tensor | None = None,
        visibility: CausalMask | None = None,
        log_sum_exp: Float[Tensor, "batch head query"] | None = None,
        mean_position: Float[Tensor, "batch head query"] | None = None,
        key_start: int = 0,
    ) -> None:
        self.key_start = key_start
        self.batch_size, self.head_count, self.query_count, head_size = query.shape
        self.key_count, self.key_head_count = key.shape[2], key.shape[1]
        if key.shape[0] != self.batch_size or key.shape[3] != head_size:
            raise PatternError(
                f"query {list(query.shape)} and key {list(key.shape)} do not fit: batch and head size "
                "must be equal"
            )
        if self.head_count % self.key_head_count or self.key_count < self.query_count:
            raise PatternError(
                f"query {list(query.shape)} and key {list(key.shape)} do not fit: the query heads must "
                "be a multiple of the key heads, and there must be at least as many keys as queries"
            )
        self.dtype, self.device = reduction_dtype(query.dtype), query.device
        self._query, self._key = query.detach(), key.detach()
        self._scaling = head_size**-0.5 if scaling is None else float(scaling)
        self._softcap = None if softcap is None else float(softcap)
        if sinks is not None and sinks.shape != (self.head_count,):
            raise PatternError(
                f"expected one sink for each of {self.head_count} heads, got {list(sinks.shape)}"
            )
        self._sinks = None if sinks is None else sinks.detach().to(self.dtype)
        self._bias = None if bias is None else bias.detach()
        if self._bias is not None:
            self._check_pairs(self._bias, "bias")
        if mask is not None:
            self._check_pairs(mask, "mask")
            seen, mask_bias = split_mask(mask.detach())
            visibility = CausalMask.from_mask(seen)
            if mask_bias is not None:
                self._bias = mask_bias if self._bias is None else self._bias + mask_bias
        self._visibility = visibility or self._causal_visibility(window, key_mask)
        self._log_sum_exp: Tensor | None = None
        self._mass: Tensor | None = None
        self._band: tuple[int, Tensor] | None = None
        self._mean_position = None if mean_position is None else mean_position.detach().to(self.dtype)
        if log_sum_exp is not None:
            self._check_inputs_finite()
            self._keep_log_sum_exp(log_sum_exp.detach().to(self.dtype))

    def _check_pairs(self, tensor: Tensor, name: str) -> None:
        """Check that a tensor over query-key pairs can be broadcast against the scores."""
        full = (self.batch_size, self.head_count, self.query_count, self.key_count)
        fits = tensor.ndim == 4 and tensor.shape[2:] == full[2:]
        if not fits or any(tensor.shape[i] not in (1, full[i]) for i in (0, 1)):
            raise PatternError(
                f"the {name} must be [batch or 1, head or 1, query, key] for {list(full)}, "
                f"got {list(tensor.shape)}"
            )

    def _causal_visibility(self, window: int | None, key_mask: Tensor | None) -> CausalMask:
        if window is not None and window < 1:
            raise PatternError(f"a sliding window holds at least one key, got {window}")
        if key_mask is None or bool(key_mask.all()):
            return CausalMask.causal(self.query_count, self.key_count, window, self.device)
        if key_mask.shape != (self.batch_size, self.key_count):
            raise PatternError(
                f"expected key_mask [batch={self.batch_size}, key={self.key_count}], "
                f"got {list(key_mask.shape)}"
            )
        kept = key_mask.to(device=self.device, dtype=torch.bool)
        return CausalMask.from_key_mask(kept, self.query_count, window)

    def key_fingerprint(self) -> Float[Tensor, "batch key"]:
        """Return the sum of each key's numbers: the same again while its cache row stays in place."""
        return self._key.to(self.dtype).sum((1, 3))

    # ---- the four questions -------------------------------------------------------------------

    def attend(
        self, features: Float[Tensor, "batch key feature"]
    ) -> Float[Tensor, "batch head query feature"]:
        """Return `A @ features`."""
        features = self._check_features(features, "key", self.key_count)
        if self._has_flash_kernel and self._log_sum_exp is None:
            return self._attend_by_kernel(features)
        shape = (self.batch_size, self.head_count, self.query_count, features.shape[-1])
        answer = torch.zeros(shape, dtype=self.dtype, device=self.device)
        for queries, keys, probability in self._tiles():
            answer[:, :, queries] += probability @ features[:, None, keys]
        return answer

    def receive(
        self,
        weights: Float[Tensor, "batch query feature"],
        start: int = 0,
        stop: int | None = None,
    ) -> Float[Tensor, "batch head key feature"]:
        """Return `A.T @ weights` over the pairs at `start <= t - s < stop`."""
        self._check_distances(start, stop)
        weights = self._check_features(weights, "query", self.query_count)
        shape = (self.batch_size, self.head_count, weights.shape[-1], self.key_count)
        answer = torch.zeros(shape, dtype=self.dtype, device=self.device)
        # Rows of a prompt, as a rule, give nothing.
        counted = (weights != 0).any(-1).any(0)
        for queries, keys, probability in self._tiles(start, stop, counted):
            answer[..., keys] += weights[:, None, queries].mT @ probability
        return answer.mT.contiguous()

    def band(self, width: int, start: int = 0) -> Float[Tensor, "batch head query distance"]:
        """Return `A[t, t - j]` for `start <= j < start + width`.

        The widest band so far is kept: narrower ones within it are read off it.
        """
        self._check_band(width, start)
        if self._band is not None:
            kept_start, kept = self._band
            if kept_start <= start and start + width <= kept_start + kept.shape[-1]:
                return kept[..., start - kept_start : start - kept_start + width]
        shape = (self.batch_size, self.head_count, self.query_count, width)
        answer = torch.empty(shape, dtype=self.dtype, device=self.device)
        columns = width + _BAND_QUERIES
        for queries in self._query_slices(columns, multiple=_BAND_QUERIES, most_bytes=_BAND_BYTES):
            answer[:, :, queries] = self._band_of(queries, width, start)
        if self._band is None or width > self._band[1].shape[-1]:
            self._band = start, answer
        return answer

    def rows(self, queries: Int[Tensor, " row"]) -> Float[Tensor, "batch head row key"]:
        """Return chosen rows of `A`, dense."""
        queries = self._check_rows(queries)
        log_sum_exp = self.log_sum_exp()[:, :, queries, None]
        return (self._scores(queries, slice(0, self.key_count)) - log_sum_exp).exp()

    def row_mass(self) -> Float[Tensor, "batch head query"]:
        """Return the sum of each row."""
        self.log_sum_exp()
        assert self._mass is not None
        return self._mass

    def log_sum_exp(self) -> Float[Tensor, "batch head query"]:
        """Return each row's log of the softmax's denominator, sinks included; 0 where nothing is seen.

        Zero and not minus infinity, so that `exp(score - log_sum_exp)` of an unseen key is 0.
        """
        if self._log_sum_exp is None:
            if self._has_flash_kernel:
                # One pass gives both, and most who need the sums need the positions.
                self._mean_position = self._attend_by_kernel(self.key_positions()[None, :, None])[..., 0]
            else:
                shape = (self.batch_size, self.head_count, self.query_count)
                raw = torch.full(shape, -torch.inf, dtype=self.dtype, device=self.device)
                for queries in self._query_slices(self.key_count):
                    first, stop = self._visibility.key_range(queries)
                    if stop > first:
                        raw[:, :, queries] = self._scores(queries, slice(first, stop)).logsumexp(-1)
                self._keep_log_sum_exp(raw)
        assert self._log_sum_exp is not None
        return self._log_sum_exp

    def mean_position(self) -> Float[Tensor, "batch head query"]:
        """Return what each query reads when keys carry `key_positions`."""
        self.log_sum_exp()
        if self._mean_position is None:
            self._mean_position = super().mean_position()
        return self._mean_position

    # ---- how ----------------------------------------------------------------------------------

    @property
    def _has_flash_kernel(self) -> bool:
        """Whether the CPU flash kernel computes exactly this attention."""
        return (
            self.device.type == "cpu"
            and self._visibility.plain
            and self._softcap is None
            and self._bias is None
            and self.query_count == self.key_count
        )

    def _attend_by_kernel(self, features: Tensor) -> Tensor:
        """Attend with the CPU flash kernel, which also returns the log-sum-exp of each row.

        The kernel wants values as wide as the key: narrower features are padded with zeros, wider
        ones go in slices.
        """
        query, key = self._query.to(self.dtype), self._key.to(self.dtype)
        # The kernel's maximum passes over NaN: a NaN score would come out as a finite number.
        self._check_inputs_finite()
        size, count = query.shape[-1], features.shape[-1]
        pieces = []
        for begin in range(0, count, size):
            value = features[..., begin : begin + size]
            value = torch.nn.functional.pad(value, (0, size - value.shape[-1]))
            value = value[:, None].expand(key.shape)
            result = flash_attention(query, key, value, causal=True, scaling=self._scaling)
            pieces.append(result.output[..., : min(size, count - begin)])
            if self._log_sum_exp is None:
                self._keep_log_sum_exp(result.log_sum_exp)
        attended = torch.cat(pieces, dim=-1)
        return attended if self._sinks is None else attended * self.row_mass()[..., None]

    def _check_inputs_finite(self) -> None:
        for name, tensor in (("query", self._query), ("key", self._key)):
            self._check_finite(tensor.sum(-1), f"the {name}", "token")

    def _keep_log_sum_exp(self, raw: Tensor) -> None:
        """Keep the row sums: add the sinks to the denominator, and replace those of empty rows."""
        # A kernel's number for a row that sees nothing has no meaning.
        empty = self._visibility.sees_none() | (raw == -torch.inf)
        self._check_finite(raw.masked_fill(empty, 0.0), "the attention score", "query")
        total = raw
        if self._sinks is not None:
            total = torch.logaddexp(raw, self._sinks[:, None])
            if self._mean_position is not None:
                self._mean_position = self._mean_position * (raw - total).exp()
        self._mass = torch.where(empty, 0.0, (raw - total).exp())
        self._log_sum_exp = total.masked_fill(empty, 0.0)
        if self._mean_position is not None:
            self._mean_position = self._mean_position.masked_fill(empty, 0.0)

    def _check_finite(self, values: Tensor, name: str, axis: str) -> None:
        wrong = ~torch.isfinite(values)
        if bool(wrong.any()):
            where = wrong.nonzero()[0].tolist()
            raise PatternError(
                f"{name} is not finite at [batch, head, {axis}] = {where}: the model's activations hold "
                "NaN or infinity there"
            )

    def _scores(self, queries: slice | Tensor, keys: slice) -> Float[Tensor, "batch head query key"]:
        """Return the scores of one block, minus infinity where a key may not be seen."""
        query, key = self._grouped(queries), self._key[:, :, keys].to(self.dtype)
        product = query @ key.mT
        score = rearrange(product, "b k (g t) s -> b (k g) t s", g=self.head_count // self.key_head_count)
        score = self._capped(score.mul_(self._scaling))
        if self._bias is not None:
            score = score + self._bias[:, :, queries, keys].to(self.dtype)
        return score.masked_fill_(~self._visibility.block(queries, keys), -torch.inf)

    def _grouped(self, queries: slice | Tensor) -> Float[Tensor, "batch key_head group_query d"]:
        """Return queries that share a key head as rows of one product, so that keys are never expanded."""
        query = self._query[:, :, queries].to(self.dtype)
        return rearrange(query, "b (k g) t d -> b k (g t) d", k=self.key_head_count)

    def _capped(self, score: Tensor) -> Tensor:
        if self._softcap is None:
            return score
        return score.div_(self._softcap).tanh_().mul_(self._softcap)

    def _query_slices(
        self, columns: int, *, multiple: int = 1, most_bytes: int = _BLOCK_BYTES
    ) -> Iterator[slice]:
        """Yield slices of queries so that a block with so many columns stays within bounds."""
        element = torch.finfo(self.dtype).bits // 8
        per_query = self.batch_size * self.head_count * columns * element
        size = max(1, most_bytes // (per_query * multiple)) * multiple
        for begin in range(0, self.query_count, size):
            yield slice(begin, min(begin + size, self.query_count))

    def _tiles(
        self, start: int = 0, stop: int | None = None, counted: Bool[Tensor, " query"] | None = None
    ) -> Iterator[tuple[slice, slice, Float[Tensor, "batch head query key"]]]:
        """Yield blocks `(queries, keys, A[queries, keys])` that hold all pairs at those distances.

        Blocks of queries of which none is counted are left out.
        """
        offset, visibility = self.query_offset, self._visibility
        reaches = []
        for begin in range(0, self.query_count, _TILE_QUERIES):
            queries = slice(begin, min(begin + _TILE_QUERIES, self.query_count))
            if counted is not None and not bool(counted[queries].any()):
                continue
            first, last = visibility.key_range(queries)
            last = min(last, queries.stop + offset - start)
            if stop is not None:
                first = max(first, queries.start + offset - stop + 1)
            if first < last:
                reaches.append((queries, first, last, visibility.common_range(queries)))
        direct = self._softcap is None and self._bias is None
        # Keys outside, queries inside: what a block of keys needs is then done once for all queries.
        for begin in range(0, self.key_count, _TILE_KEYS):
            end = min(begin + _TILE_KEYS, self.key_count)
            met = [reach for reach in reaches if reach[1] < end and reach[2] > begin]
            near = self._key_of_each_head(slice(begin, end)) if direct and met else None
            for queries, first, last, (common_first, common_last) in met:
                keys = slice(max(first, begin), min(last, end))
                if near is None:
                    log_sum_exp = self.log_sum_exp()[:, :, queries, None]
                    tile = (self._scores(queries, keys) - log_sum_exp).exp_()
                else:
                    tile = self._tile(queries, near[:, keys.start - begin : keys.stop - begin])
                    # Where all keys up to a query's own are seen, the cut by distance below is all there is.
                    if not visibility.plain and not common_first <= keys.start < keys.stop <= common_last:
                        tile = tile.masked_fill_(~visibility.block(queries, keys), 0.0)
                # How far the block's first key lies behind its first query.
                distance = queries.start + offset - keys.start
                if distance - (keys.stop - keys.start) + 1 < start:
                    tile = tile.tril_(distance - start)
                if stop is not None and distance + (queries.stop - queries.start) > stop:
                    tile = tile.triu_(distance - stop + 1)
                yield queries, keys, tile

    def _key_of_each_head(self, keys: slice) -> Float[Tensor, "batch_head key d"]:
        """Return keys once for each head, scaled so that scores are powers of 2.

        Copies, so that all heads are one product: it is a seventh faster than one for each key head.
        """
        key = self._key[:, :, keys].to(self.dtype) * (self._scaling * _LOG2_E)
        return key.repeat_interleave(self.head_count // self.key_head_count, dim=1).flatten(0, 1)

    def _tile(
        self, queries: slice, key: Float[Tensor, "batch_head key d"]
    ) -> Float[Tensor, "batch head query key"]:
        """Return a block of `A`, as if its queries saw all its keys."""
        query = self._query[:, :, queries].to(self.dtype).flatten(0, 1)
        log_sum_exp = self.log_sum_exp()[:, :, queries, None].flatten(0, 1) * _LOG2_E
        # exp goes through a library that is slow on some processors: exp2 takes a third of its time there.
        power = torch.bmm(query, key.mT).sub_(log_sum_exp).exp2_()
        return power.view(self.batch_size, self.head_count, *power.shape[1:])

    def _band_of(self, queries: slice, width: int, start: int) -> Float[Tensor, "batch head query distance"]:
        """Return the band of some queries, all in one product.

        Blocks of queries meet the keys near any of them; the band is read off each block along its
        diagonals, which a stride of one more than a row does.
        """
        count, rows = queries.stop - queries.start, _BAND_QUERIES
        blocks = -(-count // rows)
        groups = self.head_count // self.key_head_count
        query = torch.nn.functional.pad(
            self._query[:, :, queries].to(self.dtype), (0, 0, 0, blocks * rows - count)
        )
        query = rearrange(query, "b (k g) (n r) d -> b k n (g r) d", g=groups, r=rows)
        # Row r of the first block meets its farthest key in column r.
        first = queries.start + self.query_offset - (start + width - 1)
        stop = first + blocks * rows + width - 1
        inside = slice(min(max(first, 0), self.key_count), min(max(stop, 0), self.key_count))
        key = torch.nn.functional.pad(
            self._key[:, :, inside].to(self.dtype), (0, 0, inside.start - first, stop - inside.stop)
        )
        columns = rows + width - 1
        near = key.unfold(2, columns, rows)
        score = (query @ near).view(self.batch_size, self.key_head_count, blocks, groups, rows, columns)
        strides = (*score.stride()[:4], columns + 1, 1)
        diagonal = score.as_strided((*score.shape[:5], width), strides)
        # Farthest key first on the diagonal, nearest first in a band.
        band = rearrange(diagonal.flip(-1), "b k n g r j -> b (k g) (n r) j")[:, :, :count]
        band = self._capped(band.mul_(self._scaling))
        query_key = torch.arange(queries.start, queries.stop, device=self.device) + self.query_offset
        keys = query_key[:, None] - torch.arange(start, start + width, device=self.device)
        if self._bias is not None:
            part = self._bias[:, :, queries]
            index = keys.clamp(min=0).expand(*part.shape[:2], -1, -1)
            band = band + part.gather(-1, index).to(self.dtype)
        band = band.sub_(self.log_sum_exp()[:, :, queries, None]).exp_()
        return band.masked_fill_(~self._visibility.diagonals(queries, keys), 0.0)

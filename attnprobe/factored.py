"""Attention given by the inputs of the model's attention call: exact statistics, never a T x T map.

`FactoredAttention` holds the query (after rotary), the key (not expanded over query groups), and
what the model does to the scores: scaling, soft cap, bias, mask, window, sinks. It answers the four
questions of `attnprobe.attention.Attention` in memory linear in T:

- Each row's log-sum-exp is computed once. Where the call is plain causal attention on a CPU it comes
  out of the flash kernel together with `attend`; elsewhere from blocks of query rows.
- `band` multiplies each block of queries with the few keys near it.
- `receive` walks over blocks of query rows, since no kernel adds up columns.

Which keys a query may see is nearly always one interval: causal, left-padded, windowed, chunked and
packed masks all are. `Visibility` finds it, so that a block of queries meets only the keys that it
can see; a mask of any other form is kept as it is. What is left to others: reading these inputs off
a model (adapters).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnprobe.attention import Attention, reduction_dtype
from attnprobe.errors import PatternError

# What one block of scores may hold. Large enough that a block's product is not bound by Python,
# small enough to stay far below one layer's activations.
_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Visibility:
    """Which keys each query may see: an interval per query, less masked keys, or any mask.

    `first` and `last` are inclusive and `[batch or 1, query]`; `last < first` where nothing is seen.
    `exact` is `[batch or 1, head or 1, query, key]` and is set only when no interval says the same.
    `plain` says that every query sees all keys up to its own.
    """

    first: Int[Tensor, "#batch query"]
    last: Int[Tensor, "#batch query"]
    exact: Bool[Tensor, "#batch #head query key"] | None
    plain: bool

    @staticmethod
    def causal(query_count: int, key_count: int, window: int | None, device: torch.device) -> Visibility:
        """Return the visibility of causal attention, where a query sees `window` keys at most."""
        last = torch.arange(query_count, device=device)[None] + (key_count - query_count)
        first = torch.zeros_like(last) if window is None else (last - window + 1).clamp(min=0)
        plain = window is None or window >= key_count
        return Visibility(first, last, None, plain)

    @staticmethod
    def from_mask(mask: Bool[Tensor, "#batch #head query key"]) -> Visibility:
        """Return the visibility that a boolean mask (True: may see) describes."""
        query_count, key_count = mask.shape[-2:]
        causal = Visibility.causal(query_count, key_count, None, mask.device)
        if mask.shape[1] > 1 and bool((mask == mask[:, :1]).all()):
            mask = mask[:, :1]
        if mask.shape[1] == 1:
            flat = mask[:, 0]
            count = flat.sum(-1)
            # argmax of a boolean finds the first True; converting costs a byte per pair, once a
            # forward pass, which the mask itself has cost already.
            first = flat.byte().argmax(-1)
            last = first + count - 1
            spread = key_count - 1 - flat.flip(-1).byte().argmax(-1)
            contiguous = bool(((spread == last) | (count == 0)).all())
            if contiguous:
                if bool((last > causal.last).any()):
                    raise PatternError(
                        "the mask lets a query see later keys: attnprobe reads causal attention only"
                    )
                plain = bool((first == 0).all()) and bool((last == causal.last).all())
                return Visibility(first, last, None, plain)
        if bool(mask.triu(key_count - query_count + 1).any()):
            raise PatternError("the mask lets a query see later keys: attnprobe reads causal attention only")
        return Visibility(causal.first, causal.last, mask, plain=False)

    def block(self, queries: slice | Tensor, keys: slice) -> Bool[Tensor, "#batch #head query key"]:
        """Return the mask of one block."""
        if self.exact is not None:
            return self.exact[:, :, queries, keys]
        key = torch.arange(keys.start, keys.stop, device=self.first.device)
        first, last = self.first[:, queries], self.last[:, queries]
        return ((key >= first[..., None]) & (key <= last[..., None]))[:, None]

    def key_range(self, queries: slice) -> tuple[int, int]:
        """Return the half-open range of keys that some query of a block may see."""
        first, last = self.first[:, queries], self.last[:, queries]
        seeing = last >= first
        if not bool(seeing.any()):
            return 0, 0
        return int(first[seeing].min()), int(last[seeing].max()) + 1


def split_mask(mask: Tensor) -> tuple[Bool[Tensor, "..."], Tensor | None]:
    """Split a boolean or additive mask into what may be seen and a bias, None where it is 0.

    Frameworks write "may not see" as minus infinity or as the lowest number of the mask's dtype, and
    sums of two masks reach half of it: everything at or below a quarter of it counts as unseen.
    """
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        raise PatternError(f"a mask is boolean or additive (floating point), got {mask.dtype}")
    seen = mask > torch.finfo(mask.dtype).min / 4
    bias = mask.masked_fill(~seen, 0.0)
    return seen, (bias if bool((bias != 0).any()) else None)


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
        visibility: Visibility | None = None,
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
            visibility = Visibility.from_mask(seen)
            if mask_bias is not None:
                self._bias = mask_bias if self._bias is None else self._bias + mask_bias
        self._visibility = visibility or self._causal_visibility(window, key_mask)
        self._log_sum_exp: Tensor | None = None
        self._mass: Tensor | None = None

    def _check_pairs(self, tensor: Tensor, name: str) -> None:
        """Check that a tensor over query-key pairs can be broadcast against the scores."""
        full = (self.batch_size, self.head_count, self.query_count, self.key_count)
        fits = tensor.ndim == 4 and tensor.shape[2:] == full[2:]
        if not fits or any(tensor.shape[i] not in (1, full[i]) for i in (0, 1)):
            raise PatternError(
                f"the {name} must be [batch or 1, head or 1, query, key] for {list(full)}, "
                f"got {list(tensor.shape)}"
            )

    def _causal_visibility(self, window: int | None, key_mask: Tensor | None) -> Visibility:
        if window is not None and window < 1:
            raise PatternError(f"a sliding window holds at least one key, got {window}")
        plain = Visibility.causal(self.query_count, self.key_count, window, self.device)
        if key_mask is None or bool(key_mask.all()):
            return plain
        if key_mask.shape != (self.batch_size, self.key_count):
            raise PatternError(
                f"expected key_mask [batch={self.batch_size}, key={self.key_count}], "
                f"got {list(key_mask.shape)}"
            )
        kept = key_mask.to(device=self.device, dtype=torch.bool)
        start = kept.byte().argmax(-1, keepdim=True)
        stop = self.key_count - 1 - kept.flip(-1).byte().argmax(-1, keepdim=True)
        stop = stop.masked_fill(~kept.any(-1, keepdim=True), -1)
        if bool((kept.sum(-1, keepdim=True) == (stop - start + 1)).all()):
            first, last = torch.maximum(plain.first, start), torch.minimum(plain.last, stop)
            return Visibility(first, last, None, plain=False)
        every = plain.block(slice(0, self.query_count), slice(0, self.key_count))
        return Visibility(plain.first, plain.last, every & kept[:, None, None], plain=False)

    def key_fingerprint(self) -> Float[Tensor, "batch key"]:
        """Return the sum of each key's numbers: the same again while its cache row stays in place."""
        return self._key.to(self.dtype).sum((1, 3))

    # ---- the four questions -------------------------------------------------------------------

    def attend(
        self, features: Float[Tensor, "batch key feature"]
    ) -> Float[Tensor, "batch head query feature"]:
        """Return `A @ features`."""
        features = self._check_features(features, "key", self.key_count)
        if self._has_flash_kernel:
            return self._attend_by_kernel(features)
        shape = (self.batch_size, self.head_count, self.query_count, features.shape[-1])
        answer = torch.zeros(shape, dtype=self.dtype, device=self.device)
        for queries, keys, probability in self._blocks():
            answer[:, :, queries] = probability @ features[:, None, keys]
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
        shape = (self.batch_size, self.head_count, self.key_count, weights.shape[-1])
        answer = torch.zeros(shape, dtype=self.dtype, device=self.device)
        for queries, keys, probability in self._blocks(start, stop):
            answer[:, :, keys] += probability.mT @ weights[:, None, queries]
        return answer

    def band(self, width: int, start: int = 0) -> Float[Tensor, "batch head query distance"]:
        """Return `A[t, t - j]` for `start <= j < start + width`."""
        self._check_band(width, start)
        log_sum_exp = self.log_sum_exp()
        shape = (self.batch_size, self.head_count, self.query_count, width)
        answer = torch.zeros(shape, dtype=self.dtype, device=self.device)
        farthest = start + width - 1
        for queries in self._query_slices(columns=width + 128, most=128):
            count = queries.stop - queries.start
            first_key = queries.start + self.query_offset - farthest
            stop_key = queries.stop + self.query_offset - start
            if stop_key <= 0:
                continue
            keys = slice(max(first_key, 0), stop_key)
            score = self._scores(queries, keys)
            score = torch.nn.functional.pad(score, (keys.start - first_key, 0), value=-torch.inf).contiguous()
            # Row r of the block meets its own key at column r + farthest: the band is the block read
            # along its diagonals, which a stride of one more than a row does without a copy.
            strides = (*score.stride()[:2], score.stride(2) + 1, 1)
            diagonal = score.as_strided((*score.shape[:2], count, width), strides)
            near = (diagonal - log_sum_exp[:, :, queries, None]).exp()
            answer[:, :, queries] = near.flip(-1)
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
                self._attend_by_kernel(self._query.new_zeros(1, 1, 1, dtype=self.dtype))
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
        ones go in slices. It maps query heads onto key heads by itself.
        """
        query, key = self._query.to(self.dtype), self._key.to(self.dtype)
        if self._log_sum_exp is None:
            # The kernel's maximum passes over NaN: a NaN score would come out as a finite number.
            for name, tensor in (("query", query), ("key", key)):
                self._check_finite(tensor.sum(-1), f"the {name}", "token")
        size, count = query.shape[-1], features.shape[-1]
        pieces = []
        for begin in range(0, count, size):
            value = features[..., begin : begin + size]
            value = torch.nn.functional.pad(value, (0, size - value.shape[-1]))
            value = value[:, None].expand(key.shape)
            answer, raw = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, True, scale=self._scaling
            )
            pieces.append(answer[..., : min(size, count - begin)])
            if self._log_sum_exp is None:
                self._keep_log_sum_exp(raw)
        attended = torch.cat(pieces, dim=-1)
        return attended if self._sinks is None else attended * self.row_mass()[..., None]

    def _keep_log_sum_exp(self, raw: Tensor) -> None:
        """Keep the row sums: add the sinks to the denominator, and replace those of empty rows."""
        empty = raw == -torch.inf
        self._check_finite(raw.masked_fill(empty, 0.0), "the attention score", "query")
        total = raw
        if self._sinks is not None:
            total = torch.logaddexp(raw, self._sinks[:, None])
        self._mass = torch.where(empty, 0.0, (raw - total).exp())
        self._log_sum_exp = total.masked_fill(empty, 0.0)

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
        query = self._query[:, :, queries].to(self.dtype)
        key = self._key[:, :, keys].to(self.dtype)
        # Queries that share a key head become rows of one product, so that keys are never expanded.
        grouped = rearrange(query, "b (k g) t d -> b k (g t) d", k=self.key_head_count)
        score = rearrange(grouped @ key.mT, "b k (g t) s -> b (k g) t s", t=query.shape[2])
        score = score.mul_(self._scaling)
        if self._softcap is not None:
            score = score.div_(self._softcap).tanh_().mul_(self._softcap)
        if self._bias is not None:
            score = score + self._bias[:, :, queries, keys].to(self.dtype)
        return score.masked_fill_(~self._visibility.block(queries, keys), -torch.inf)

    def _query_slices(self, columns: int, most: int = 256) -> Iterator[slice]:
        """Yield slices of queries so that a block with so many columns stays within bounds."""
        element = torch.finfo(self.dtype).bits // 8
        per_query = self.batch_size * self.head_count * columns * element
        size = max(1, min(most, _BLOCK_BYTES // per_query))
        for begin in range(0, self.query_count, size):
            yield slice(begin, min(begin + size, self.query_count))

    def _blocks(
        self, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[slice, slice, Float[Tensor, "batch head query key"]]]:
        """Yield blocks `(queries, keys, A[queries, keys])` that hold all pairs at those distances."""
        log_sum_exp = self.log_sum_exp()
        offset = self.query_offset
        for queries in self._query_slices(self.key_count):
            first, last = self._visibility.key_range(queries)
            last = min(last, queries.stop + offset - start)
            if stop is not None:
                first = max(first, queries.start + offset - stop + 1)
            if last <= first:
                continue
            keys = slice(first, last)
            probability = (self._scores(queries, keys) - log_sum_exp[:, :, queries, None]).exp()
            if start > 0:
                probability = probability.tril_(queries.start + offset - first - start)
            if stop is not None:
                probability = probability.triu_(queries.start + offset - first - stop + 1)
            yield queries, keys, probability

"""The scores of an attention call, block by block: query, key, scaling, soft cap, bias and mask.

`BlockScores.of_call` takes the inputs of the model's attention call and checks that they fit together. The
result gives the scores of any block of queries and keys, of a band of diagonals or, where scores are plain
products, in a form whose exponentials are cheap. `row_sums` and `FactoredAttention` ask for them. What is
left to others: what a row's scores sum to (row_sums), and which blocks answer a question (tiles, factored).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnprobe.attention.kernels import Kernel, Question, Setting, chosen, compiles, product, row_products
from attnprobe.attention.masks import CausalMask, split_mask
from attnprobe.attention.operator import Submatrix, reduction_dtype, take
from attnprobe.errors import PatternError

BAND_QUERIES = 32
"""How many queries share one product of a band. Each is multiplied with all keys near any of them, so fewer
is better, until the products become too small."""

LOG2_E = math.log2(math.e)


@dataclass(frozen=True, eq=False)
class BlockScores:
    """The scores `cap(scaling * q @ k.T) + bias` of the visible pairs of an attention call.

    Scores are computed in float32, or in float64 if the inputs are.

    Attributes:
        query, key: those of the call; `head` is a multiple of `key_head`.
        scaling: the factor of the products.
        softcap: the cap; None if there is none.
        bias: what is added to the scores; None if nothing is.
        mask: which keys a query may see.
    """

    query: Float[Tensor, "batch head query d"]
    key: Float[Tensor, "batch key_head key d"]
    scaling: float
    softcap: float | None
    bias: Float[Tensor, "#batch #head query key"] | None
    mask: CausalMask

    @staticmethod
    def of_call(
        query: Float[Tensor, "batch head query d"],
        key: Float[Tensor, "batch key_head key d"],
        *,
        scaling: float | None,
        mask: Tensor | CausalMask | None,
        key_mask: Tensor | None,
        window: int | None,
        softcap: float | None,
        bias: Tensor | None,
    ) -> BlockScores:
        """Return the scores of an attention call; the arguments are those of `FactoredAttention`.

        Raises:
            PatternError: shapes that do not fit, or a mask that is not causal.
        """
        _check_fit(query, key)
        # [batch, head, query, key]
        pairs = (*query.shape[:3], key.shape[2])
        bias = None if bias is None else bias.detach()
        if bias is not None:
            _check_pairs(bias, pairs, "bias")
        if isinstance(mask, Tensor):
            _check_pairs(mask, pairs, "mask")
            seen, mask_bias = split_mask(mask.detach())
            mask = CausalMask.from_mask(seen)
            if mask_bias is not None:
                bias = mask_bias if bias is None else bias + mask_bias
        elif mask is None:
            mask = causal_mask(query, key, window, key_mask)
        elif mask.first.shape[1] != pairs[2] or mask.first.shape[0] not in (1, pairs[0]):
            raise PatternError(
                f"the mask is [batch, query] = {list(mask.first.shape)}, but the query is {list(query.shape)}"
            )
        scaling = query.shape[3] ** -0.5 if scaling is None else float(scaling)
        softcap = None if softcap is None else float(softcap)
        return BlockScores(query.detach(), key.detach(), scaling, softcap, bias, mask)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the scores."""
        return reduction_dtype(self.query.dtype)

    @property
    def group_size(self) -> int:
        """How many query heads share a key head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def are_products(self) -> bool:
        """Whether scores are nothing but scaled products of query and key, the mask aside."""
        return self.softcap is None and self.bias is None

    def part(self, part: Submatrix) -> BlockScores:
        """Return the scores of some heads, queries and keys of one example, each head with its own keys."""
        bias = self.bias
        if bias is not None:
            bias = bias[part.example if bias.shape[0] > 1 else 0]
            bias = take(bias, 0, part.heads) if len(bias) > 1 else bias
            bias = take(take(bias, 1, part.queries), 2, part.keys)[None]
        query = take(self.query[part.example], 0, part.heads)
        key = take(self.key[part.example], 0, [head // self.group_size for head in part.heads])
        return replace(
            self,
            query=take(query, 1, part.queries)[None],
            key=take(key, 1, part.keys)[None],
            bias=bias,
            mask=self.mask.part(part),
        )

    def kernel(self, question: Question, columns: int = 1) -> Kernel:
        """Return the kernel that answers a question about these scores."""
        device = self.query.device.type
        plain = self.mask.plain and self.are_products and self.query.shape[2] == self.key.shape[2]
        setting = Setting(device, self.query.dtype, self.query.shape[2], plain, columns, compiles(device))
        return chosen(question, setting)

    def block(self, queries: slice | Tensor, keys: slice) -> Float[Tensor, "batch head query key"]:
        """Return the scores of one block, minus infinity where a key may not be seen."""
        query, key = self.query[:, :, queries], self.key[:, :, keys]
        # Queries that share a key head go into one product, so that keys are never expanded.
        query = rearrange(query, "b (k g) t d -> b k (g t) d", g=self.group_size)
        products = product(query, key.mT, self.dtype)  # [batch, key_head, group * query, key]
        score = rearrange(products, "b k (g t) s -> b (k g) t s", g=self.group_size)
        score = self._capped(score.mul_(self.scaling))
        if self.bias is not None:
            score = score + self.bias[:, :, queries, keys].to(self.dtype)
        return score.masked_fill_(~self.mask.block(queries, keys), -torch.inf)

    def band(self, queries: slice, width: int, start: int) -> Float[Tensor, "batch head query distance"]:
        """Return the scores of the keys `start, ..., start + width - 1` before each query.

        This is one product: blocks of queries meet the keys near any of them, the nearest first, and the band
        is read from each block along its diagonals, by a stride that is one smaller than the block is wide.
        """
        count, size = queries.stop - queries.start, BAND_QUERIES
        blocks = -(-count // size)
        query = self.query[:, :, queries]
        query = torch.nn.functional.pad(query, (0, 0, 0, blocks * size - count))
        query = rearrange(query, "b (k g) (n r) d -> b k n (g r) d", g=self.group_size, r=size)
        # The first query of the first block meets its farthest key in the last column.
        key_count, offset = self.key.shape[2], self.key.shape[2] - self.query.shape[2]
        first = queries.start + offset - (start + width - 1)
        stop = first + blocks * size + width - 1
        inside = slice(min(max(first, 0), key_count), min(max(stop, 0), key_count))
        key = self.key[:, :, inside]
        key = torch.nn.functional.pad(key, (0, 0, inside.start - first, stop - inside.stop))
        columns = size + width - 1
        # Reversed here, where it must be copied anyway: a band is larger. [batch, key_head, block, d, column]
        near = key.unfold(2, columns, size).flip(-1)
        # [batch, key_head, block, group, query, column]
        score = product(query, near, self.dtype).unflatten(3, (self.group_size, size))
        strides = (*score.stride()[:4], columns - 1, 1)
        # Query r of a block meets its nearest key in column size - 1 - r.
        diagonal = score.as_strided((*score.shape[:5], width), strides, score.storage_offset() + size - 1)
        band = rearrange(diagonal, "b k n g r j -> b (k g) (n r) j")[:, :, :count]
        band = self._capped(band.mul_(self.scaling))
        if self.mask.plain and self.bias is None:
            # Only the first queries have fewer keys before them than the band is wide.
            count = min(count, max(0, start + width - 1 - offset - queries.start))
            if count == 0:
                return band
            queries = slice(queries.start, queries.start + count)
        own = torch.arange(queries.start, queries.stop, device=self.key.device) + offset
        keys = own[:, None] - torch.arange(start, start + width, device=self.key.device)  # [query, distance]
        if self.bias is not None:
            part = self.bias[:, :, queries]
            index = keys.clamp(min=0).expand(*part.shape[:2], -1, -1)
            band = band + part.gather(-1, index).to(self.dtype)
        band[:, :, :count].masked_fill_(~self.mask.diagonals(queries, keys), -torch.inf)
        return band

    def column(self, keys: Int[Tensor, " batch"] | int) -> Float[Tensor, "batch head query"]:
        """Return the scores of one key of each example, minus infinity where it may not be seen.

        A whole number is the key of all examples.
        """
        if isinstance(keys, int):
            key = self.key[:, :, max(keys, 0)]  # [batch, key_head, d]
        else:
            index = keys.clamp(min=0)[:, None, None, None]
            key = self.key.gather(2, index.expand(-1, self.key.shape[1], 1, self.key.shape[3]))[:, :, 0]
        key = key.to(self.dtype) * self.scaling
        if self.group_size > 1:
            key = key.repeat_interleave(self.group_size, dim=1)
        score = self._capped(row_products(self.query.to(self.dtype), key))
        if isinstance(keys, int):
            if self.bias is not None:
                score = score + self.bias[..., max(keys, 0)].to(self.dtype)
            elif self.mask.plain and keys == 0:
                return score  # Every query sees it.
        elif self.bias is not None:
            bias = self.bias.expand(len(keys), -1, -1, -1)
            of_key = bias.gather(-1, index.expand(-1, bias.shape[1], bias.shape[2], 1))[..., 0]
            score = score + of_key.to(self.dtype)
        return score.masked_fill_(~self.mask.column(keys), -torch.inf)

    def scaled_keys(self, keys: slice) -> Float[Tensor, "batch_head key d"]:
        """Return the keys for each head, scaled so that `exp2` of products is `exp` of scores.

        They are copied so that all heads form one product, which is a seventh faster than one for each key
        head. And `exp` is slow on some processors, where `exp2` takes a third of its time.
        """
        key = self.key[:, :, keys].to(self.dtype) * (self.scaling * LOG2_E)
        return key.repeat_interleave(self.group_size, dim=1).flatten(0, 1)

    def products(
        self, queries: slice, scaled_keys: Float[Tensor, "batch_head key d"]
    ) -> Float[Tensor, "batch head query key"]:
        """Return a block's scores for `exp2`, from `scaled_keys`, as if its queries saw all its keys."""
        query = self.query[:, :, queries]
        products = product(query.flatten(0, 1), scaled_keys.mT, self.dtype)  # [batch * head, query, key]
        return products.view(*query.shape[:3], -1)

    def _capped(self, score: Tensor) -> Tensor:
        if self.softcap is None:
            return score
        return score.div_(self.softcap).tanh_().mul_(self.softcap)


def _check_fit(query: Tensor, key: Tensor) -> None:
    """Check that query and key fit together."""
    both = f"query {list(query.shape)} and key {list(key.shape)} do not fit"
    if key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise PatternError(f"{both}: their batch and head sizes must be equal")
    if query.shape[1] % key.shape[1] or key.shape[2] < query.shape[2]:
        raise PatternError(
            f"{both}: the query heads must be a multiple of the key heads, and there must be at least as "
            "many keys as queries"
        )


def _check_pairs(tensor: Tensor, pairs: tuple[int, ...], name: str) -> None:
    """Check that a tensor over query-key pairs can be broadcast to the scores."""
    fits = tensor.ndim == 4 and tensor.shape[2:] == pairs[2:]
    if not fits or any(tensor.shape[i] not in (1, pairs[i]) for i in (0, 1)):
        raise PatternError(
            f"the {name} must be [batch or 1, head or 1, query, key] for {list(pairs)}, "
            f"got {list(tensor.shape)}"
        )


def causal_mask(query: Tensor, key: Tensor, window: int | None, key_mask: Tensor | None) -> CausalMask:
    """Return the causal mask of a call, with a window and padding.

    Raises:
        PatternError: an empty window, or a key mask of another shape.
    """
    query_count, key_count = query.shape[2], key.shape[2]
    if window is not None and window < 1:
        raise PatternError(f"a sliding window must hold at least one key, got {window}")
    if key_mask is not None and key_mask.shape != (key.shape[0], key_count):
        raise PatternError(
            f"expected key_mask [batch={key.shape[0]}, key={key_count}], got {list(key_mask.shape)}"
        )
    if key_mask is None or bool(key_mask.all()):
        return CausalMask.causal(query_count, key_count, window, query.device)
    kept: Bool[Tensor, "batch key"] = key_mask.to(device=query.device, dtype=torch.bool)
    return CausalMask.from_key_mask(kept, query_count, window)

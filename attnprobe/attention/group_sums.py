"""GroupSums: weighted sums of attention over groups of heads, among chosen tokens of one example.

`group_maps` adds the layers of a pass to one of these for each response. Heads of several groups share their
products, and a head is computed once even if it belongs to all of them. What is left to others: the blocks
of an attention (operator, factored), and what the groups and tokens mean (map_probe).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.attention.operator import Attention, Submatrix
from attnprobe.errors import PatternError


class GroupSums:
    """What the heads of each group give to each other's tokens, and to those before, summed over layers.

    Args:
        example: the example.
        before: indices of the keys before the first of the tokens, ascending.
        tokens: indices of the tokens, ascending.
        groups: the names of the groups.

    Attributes:
        maps: by group, what each token gives to each other, `[token, token]`; none before the first layer
            with heads of the group.
        before: by group, what each token gives to all keys before them, `[token]`.
        first: by group, what it gives to the first key of all, `[token]`.

    >>> from attnprobe.attention.operator import DenseAttention
    >>> pattern = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
    >>> sums = GroupSums(0, before=[0], tokens=[1, 2])
    >>> sums.add(DenseAttention(pattern), {"all": {0: 1.0}})
    >>> sums.maps["all"], sums.before["all"]
    (tensor([[0.5000, 0.0000],
            [0.2500, 0.5000]]), tensor([0.5000, 0.2500]))
    """

    def __init__(self, example: int, before: Sequence[int], tokens: Sequence[int]) -> None:
        self._example = example
        self._before_count = len(before)
        self._tokens = tokens
        self._keys = [*before, *tokens]
        self.maps: dict[str, Float[Tensor, "token token"]] = {}
        self.before: dict[str, Float[Tensor, " token"]] = {}
        self.first: dict[str, Float[Tensor, " token"]] = {}

    def add(self, attention: Attention, groups: Mapping[str, Mapping[int, float]]) -> None:
        """Add a layer: the weight of each of its heads, by group; a group without heads is left out.

        Raises:
            PatternError: fewer queries than keys: rows may not be those of the tokens.
        """
        count = len(self._tokens)
        if attention.query_count != attention.key_count:
            raise PatternError(
                f"the maps of a response need all rows of a pass, but this layer has {attention.query_count} "
                f"queries and {attention.key_count} keys"
            )
        for name in groups.keys() - self.maps.keys():
            self.maps[name] = torch.zeros(count, count, dtype=attention.dtype, device=attention.device)
            self.before[name], self.first[name] = self.maps[name].new_zeros(2, count).unbind()
        heads = sorted({head for weights in groups.values() for head in weights})
        weight = torch.tensor(
            [[weights.get(head, 0.0) for head in heads] for weights in groups.values()],
            dtype=attention.dtype,
            device=attention.device,
        )
        part = Submatrix(self._example, heads, self._tokens, self._keys)
        for queries, keys, block in attention.blocks(part):
            # [group, head] @ [head, query * key]
            sums = (weight @ block.flatten(1)).unflatten(1, block.shape[1:])
            for name, of_group in zip(groups, sums, strict=True):
                self._add_block(name, queries, keys, of_group)

    def _add_block(
        self, name: str, queries: slice, keys: slice, sums: Float[Tensor, "block_query block_key"]
    ) -> None:
        # Layers may lie on different devices.
        sums = sums.to(self.maps[name].device)
        if keys.start == 0:
            self.first[name][queries] += sums[:, 0]
        boundary = min(max(self._before_count - keys.start, 0), sums.shape[1])
        if boundary > 0:
            self.before[name][queries] += sums[:, :boundary].sum(-1)
        if boundary < sums.shape[1]:
            begin, end = keys.start + boundary - self._before_count, keys.stop - self._before_count
            self.maps[name][queries, begin:end] += sums[:, boundary:]

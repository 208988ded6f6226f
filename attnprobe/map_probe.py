"""GroupMapProbe: the mean maps of head groups over responses, in the forward passes that it is shown.

`group_maps` attaches one. What is left to others: running the model (measurement), the sums over heads
(attention.group_sums), and the result (maps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from attnprobe.adapters.base import Value
from attnprobe.attention.group_sums import GroupSums
from attnprobe.attention.operator import Attention
from attnprobe.batch import TokenBatch
from attnprobe.errors import ParameterError
from attnprobe.head_selection import HeadSelection
from attnprobe.probe import Probe


@dataclass(frozen=True)
class ResponsePlace:
    """Where a response is in the passes of a probe.

    Attributes:
        row: the row of the pass.
        before: the columns of its sequence before the first response token.
        tokens: the columns of the response tokens.
    """

    row: int
    before: range
    tokens: list[int]

    @staticmethod
    def of(row: int, real: Bool[Tensor, " token"], response: Bool[Tensor, " token"]) -> ResponsePlace:
        """Return the place of a response; masks that lie where the caller's batch is."""
        tokens = response.nonzero()[:, 0].tolist()
        return ResponsePlace(row, range(int(real.byte().argmax()), tokens[0]), tokens)


class GroupMapProbe(Probe):
    """Adds up the attention of each group's heads among the tokens of responses, layer by layer.

    Args:
        groups: the heads of each group.
        places: where the responses are.
    """

    def __init__(self, groups: Mapping[str, HeadSelection], places: Sequence[ResponsePlace]) -> None:
        self._by_layer: dict[int, dict[str, dict[int, float]]] = {}
        for name, selection in groups.items():
            total = sum(weight for _, _, weight in selection.heads)
            for layer, head, weight in selection.heads:
                of_layer = self._by_layer.setdefault(layer, {})
                of_layer.setdefault(name, {})[head] = weight / total
        self.means = [GroupSums(place.row, place.before, place.tokens) for place in places]

    def observe(self, site: str, layer: int | None, value: Value, batch: TokenBatch) -> None:
        """Add a layer's heads to the means of each response."""
        assert isinstance(value, Attention)
        assert layer is not None
        groups = self._by_layer[layer]
        heads = sorted({head for weights in groups.values() for head in weights})
        if heads[-1] >= value.head_count:
            raise ParameterError(f"layer {layer} has heads 0..{value.head_count - 1}, got {heads}")
        for sums in self.means:
            sums.add(value, groups)

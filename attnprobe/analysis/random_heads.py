"""Random heads in place of the groups: would any other heads couple as well?

The strongest control of a claim about local, global or receiver heads: heads exchange their places at random,
so that every group keeps its size, its weights and what it shares with the others, and the token scores are
computed again from the statistics of each head. No forward pass is needed. `couplings(null="heads")` calls
this. What is left to others: the groups (heads), and what is counted (couplings).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.errors import ResultError
from attnprobe.head_groups import Group
from attnprobe.head_selection import HeadSelection
from attnprobe.head_statistics import HeadStatistics
from attnprobe.scores import TokenScores

# How many numbers the scores of the draws of one response may have at a time.
_MOST_NUMBERS = 2**22


@dataclass(frozen=True)
class RandomHeads:
    """Groups of random heads: one set of groups for each draw, the same for all responses.

    Attributes:
        exists: which heads the layers have; only these are drawn from.
        shares: of each group and draw: the share of each existing head in the group's mean.
    """

    exists: Bool[Tensor, "layer head"]
    shares: dict[Group, Float[Tensor, "draw existing"]]

    @staticmethod
    def draw(
        statistics: HeadStatistics, groups: Mapping[Group, HeadSelection], draws: int, seed: int
    ) -> RandomHeads:
        """Return so many draws for the heads of some statistics."""
        exists = existing_heads(statistics)
        generator = torch.Generator().manual_seed(seed)
        places = torch.rand(draws, int(exists.sum()), generator=generator, dtype=torch.float64).argsort(-1)
        shares: dict[Group, Tensor] = {}
        for group, selection in groups.items():
            weights = selection.weights(statistics.layers, statistics.head_count)[exists].double()
            shares[group] = (weights / weights.sum())[places]
        return RandomHeads(exists, shares)

    def scores(self, statistics: HeadStatistics, example: int) -> Iterator[TokenScores]:
        """Yield the scores of one response under the draws; each draw is an example of its own.

        Raises:
            ResultError: statistics of layers that lack other heads.
        """
        if not torch.equal(existing_heads(statistics), self.exists):
            raise ResultError(
                "cannot draw heads over statistics whose layers differ in the heads that they have"
            )
        draws = len(self.shares["local"])
        width = statistics.waad.shape[-1]
        size = max(1, _MOST_NUMBERS // width)
        for begin in range(0, draws, size):
            part = slice(begin, min(begin + size, draws))
            count = part.stop - part.start

            def spread(values: Tensor, count: int = count) -> Tensor:
                return values[example].cpu().expand(count, -1)

            receivers = self.shares.get("receiver")
            yield TokenScores(
                waad=self._means(statistics.waad[example], self.shares["local"][part]),
                fai=self._means(statistics.fai[example], self.shares["global"][part]),
                entropy=None if statistics.entropy is None else spread(statistics.entropy),
                response_mask=spread(statistics.response_mask),
                receiver_fai=(
                    None if receivers is None else self._means(statistics.fai[example], receivers[part])
                ),
            )

    def _means(
        self, values: Float[Tensor, "layer head token"], shares: Float[Tensor, "draw existing"]
    ) -> Float[Tensor, "draw token"]:
        """Return the mean over the heads of each draw; NaN where a head of it is undefined."""
        of_heads = values.cpu()[self.exists].double()
        undefined = (shares > 0).double() @ of_heads.isnan().double() > 0
        return (shares @ of_heads.nan_to_num()).masked_fill(undefined, torch.nan)


def existing_heads(statistics: HeadStatistics) -> Bool[Tensor, "layer head"]:
    """Return which heads the layers have: one that a layer does not have is NaN everywhere."""
    return ~statistics.waad.isnan().all(-1).all(0).cpu()

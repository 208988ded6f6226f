"""What counts as chance for a coupling: where the peaks of a response might have been instead.

A coupling is the mean of a value over peaks. Under a null, the peaks of a response are moved to other tokens
of it, many times. `strata_of` says which tokens may exchange their peaks: all of a response, those with the
same token id, or those of one class. `MovedPeaks` moves them and knows what to expect, in closed form.
`couplings` calls both. What is left to others: which tokens are peaks (rhythm), nulls that leave the peaks
and change the heads (random_heads), and what is made of it (couplings).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnprobe.errors import ParameterError
from attnprobe.scores import TokenScores
from attnprobe.validation import brief

Null = Literal["position", "rotate", "token", "bigram", "class", "heads"]

TokenClasses = Callable[[str], Hashable]


def strata_of(scores: TokenScores, null: Null, classes: TokenClasses) -> Int[Tensor, "batch token"]:
    """Return the stratum of each token: a peak is only moved to tokens of its own stratum.

    Raises:
        ParameterError: scores that do not know their token ids or texts, where these are needed, or classes
            that are not hashable.
    """
    strata = torch.zeros(scores.waad.shape, dtype=torch.long)
    if null in ("token", "bigram"):
        if scores.input_ids is None:
            raise ParameterError(f"null={null!r} needs the token ids: scores made by hand need input_ids")
        strata = scores.input_ids.cpu().long()
        if null == "bigram":
            before = torch.nn.functional.pad(strata[:, :-1], (1, 0), value=-1)
            strata = (before + 1) * (int(strata.max()) + 1) + strata
    elif null == "class":
        if scores.texts is None:
            raise ParameterError(
                'null="class" needs the texts of the tokens: build the batch with tokenizer=...'
            )
        number: dict[Any, int] = {}
        for example, inside in enumerate(scores.response_mask.cpu()):
            for column in inside.nonzero()[:, 0].tolist():
                found = classes(scores.texts[example][column])
                if not isinstance(found, Hashable):
                    raise ParameterError(
                        f"classes must return something hashable, such as a name; got {brief(found)}"
                    )
                strata[example, column] = number.setdefault(found, len(number))
    return strata


@dataclass(frozen=True)
class PeakSums:
    """The sums of a value over the peaks of one response: as observed, and under a null.

    Attributes:
        observed: the sum over the peaks.
        peaks: how many there are.
        position: what the sum would be if each peak could lie on any token that can be a peak: the
            expectation of `null="position"`.
        expected: the expectation of the null; None where it is known only from its draws.
        sums, counts: of each draw: the sum, and the number of peaks.
        positions: of each draw: what `position` is for the peaks of that draw.
        movable: how many of the peaks are in strata that hold a token that is no peak; the others stay.
    """

    observed: float
    peaks: int
    position: float
    expected: float | None
    sums: Float[Tensor, " draw"]
    counts: Float[Tensor, " draw"]
    positions: Float[Tensor, " draw"]
    movable: int


@dataclass(frozen=True)
class MovedPeaks:
    """Moves the peaks of one response after the other, many times.

    Attributes:
        rotate: whether all peaks of a response are moved by the same number of tokens, which keeps their
            distances; else each is moved on its own, within its stratum.
        draws: how many times.
        generator: where random numbers come from.
    """

    rotate: bool
    draws: int
    generator: torch.Generator

    def ask(
        self,
        values: Float[Tensor, " token"],
        peak: Bool[Tensor, " token"],
        pool: Bool[Tensor, " token"],
        strata: Int[Tensor, " token"],
    ) -> PeakSums:
        """Return the sums of the values at the peaks, and where they are moved to.

        Peaks are moved only within the pool, the tokens that could have been peaks. A token that never can,
        such as the first, would make the null too low where its value is low.
        """
        value, at = values[pool], peak[pool]
        stratum, size = strata[pool].unique(return_inverse=True, return_counts=True)[1:]
        count = int(at.sum())
        if count == 0:
            nothing = torch.zeros(self.draws, dtype=torch.float64)
            return PeakSums(0.0, 0, 0.0, 0.0, nothing, nothing, nothing, 0)
        of_stratum = torch.zeros(len(size), dtype=torch.long).index_add_(0, stratum, at.long())
        total = torch.zeros(len(size), dtype=torch.float64).index_add_(0, stratum, value)
        position = count * float(value.mean())
        if self.rotate:
            offset = torch.randint(len(value), (self.draws, 1), generator=self.generator)
            place = (at.nonzero()[:, 0] + offset) % len(value)
            expected, movable = position, count if count < len(value) else 0
        else:
            # In each draw, tokens are sorted by stratum, and at random within it: the first ones of each
            # stratum, as many as it has peaks, are where its peaks go.
            key = torch.rand(self.draws, len(value), generator=self.generator, dtype=torch.float64)
            order = (key + stratum).argsort(-1)
            sorted_stratum = stratum.sort().values
            rank = torch.arange(len(value)) - (size.cumsum(0) - size)[sorted_stratum]
            place = order[:, rank < of_stratum[sorted_stratum]]
            expected = float((of_stratum * total / size).sum())
            movable = int(of_stratum[of_stratum < size].sum())
        ones = torch.ones(self.draws, dtype=torch.float64)
        return PeakSums(
            observed=float(value[at].sum()),
            peaks=count,
            position=position,
            expected=expected,
            sums=value[place].sum(-1),
            counts=count * ones,
            positions=position * ones,
            movable=movable,
        )

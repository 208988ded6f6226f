"""ContinuousCredit: a weight that rises with a token's score, where other strategies choose some tokens.

Like the strategies of `credit`, it is passed to `attach_credit` or `RolloutCredit`. Which tokens a strategy
chooses depends on a threshold; here each token's weight says where it lies among the tokens of its response.
What is left to others: what strategies have in common (credit), and the scores (scoring).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.errors import ParameterError, ResultError
from attnprobe.rhythm import waad_change
from attnprobe.rl.credit import Align, CreditStrategy, aligned_waad, known_entropy, warn_of_short_responses
from attnprobe.scores import TokenScores
from attnprobe.validation import brief, choice

Score = Literal["waad", "waad_change", "fai", "entropy"]


@dataclass(frozen=True, kw_only=True)
class ContinuousCredit(CreditStrategy):
    """Weights between 1, for a response's lowest score, and `amplification`, for its highest.

    By default a weight is linear in the score's rank within the response; equal scores share their mean
    rank. A `scale` of your own makes it linear in a function of the score instead. Tokens with no score
    weigh 1, and so do all tokens of a response whose scores are all equal. With an amplification below 1,
    weights fall from 1 down to it.

    Attributes:
        score: "fai", "waad", "waad_change" (`|WAAD[t] - WAAD[t + 1]|`) or "entropy".
        scale: None for ranks; or a monotone function of the score, rising or falling, such as `torch.sqrt`,
            or `lambda score: -score`, which gives the lowest score the largest weight. It gets the scores
            of all tokens that have one, `[score]` in float64, and returns a value for each of them.
        align: which token row t of the pattern describes, where the score is of WAAD: "token" means token t,
            as in the paper; "prediction" means token t + 1, which that row produced.

    Raises:
        ParameterError: an unknown score or alignment, a scale that cannot be called, or what `CreditStrategy`
            refuses.

    >>> fai = torch.tensor([[0.1, 0.4, 0.2, 0.2, torch.nan]])
    >>> scores = TokenScores(fai, fai, None, torch.ones(1, 5, dtype=torch.bool))
    >>> ContinuousCredit(amplification=2.0)(scores)
    tensor([[1.0000, 2.0000, 1.5000, 1.5000, 1.0000]])
    >>> ContinuousCredit(amplification=2.0, scale=lambda score: score)(scores)  # linear in the score itself
    tensor([[1.0000, 2.0000, 1.3333, 1.3333, 1.0000]])
    """

    score: Score = "fai"
    scale: Callable[[Tensor], Tensor] | None = None
    align: Align = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self.score, "score", get_args(Score))
        choice(self.align, "align", get_args(Align))
        if self.scale is not None and not callable(self.scale):
            raise ParameterError(
                f"scale must be a function of the scores, or None for ranks; got {brief(self.scale)}"
            )
        # Only the score that is asked for is measured.
        self._set("needs", frozenset({self.score.removesuffix("_change")}))

    def share(self, scores: TokenScores) -> Float[Tensor, "completion token"]:
        """Return where each token lies between its response's lowest score, 0, and its highest, 1.

        Raises:
            ResultError: scores without entropy where it is asked for, or a scale that is not a finite and
                monotone function of the score.
        """
        values = self._values(scores).double().masked_fill(~scores.response_mask, torch.nan)
        scaled = _ranks(values) if self.scale is None else self._scaled(values)
        missing = scaled.isnan()
        low = scaled.masked_fill(missing, torch.inf).amin(-1, keepdim=True)
        high = scaled.masked_fill(missing, -torch.inf).amax(-1, keepdim=True)
        # Nothing distinguishes equal scores, nor a single one.
        return ((scaled - low) / (high - low)).masked_fill(missing | (high <= low), 0.0)

    def _values(self, scores: TokenScores) -> Float[Tensor, "completion token"]:
        if self.score == "entropy":
            return known_entropy(scores)
        if self.score == "fai":
            warn_of_short_responses(scores)
            return scores.fai
        waad = aligned_waad(scores, self.align)
        return waad if self.score == "waad" else waad_change(waad)

    def _scaled(self, values: Float[Tensor, "completion token"]) -> Float[Tensor, "completion token"]:
        assert self.scale is not None
        order = values[~values.isnan()].sort()
        if not len(order.values):
            return values
        found = self.scale(order.values)
        if not isinstance(found, Tensor) or found.shape != order.values.shape:
            raise ResultError(
                f"scale must return a tensor with a value for each of the {len(order.values)} scores; got "
                f"{brief(found)}"
            )
        found = found.detach().to(values)
        if not bool(found.isfinite().all()):
            worst = int((~found.isfinite()).nonzero()[0])
            raise ResultError(f"scale gave {float(found[worst])} for a score of {float(order.values[worst])}")
        steps, rounding = found.diff(), 1e-6 * (found.amax() - found.amin())
        if bool((steps > rounding).any()) and bool((steps < -rounding).any()):
            raise ResultError(
                "scale is not monotone: it rises between some scores and falls between others, so that a "
                "weight would say nothing about the order of scores"
            )
        scaled = torch.full_like(values, torch.nan)
        scaled[~values.isnan()] = torch.empty_like(found).scatter_(0, order.indices, found)
        return scaled


def _ranks(values: Float[Tensor, "completion token"]) -> Float[Tensor, "completion token"]:
    """Return the rank of each defined value in its row, from 0; equal values share their mean rank."""
    sorted_values = values.nan_to_num(nan=torch.inf).sort(-1).values.contiguous()
    below, up_to = (
        torch.searchsorted(sorted_values, values.contiguous(), right=right) for right in (False, True)
    )
    return ((below + up_to - 1) / 2).to(values).masked_fill(values.isnan(), torch.nan)

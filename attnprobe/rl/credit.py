"""Credit strategies: from token scores to one weight a token, `gamma`.

Sec. 5.2 of arXiv 2510.13554 multiplies the advantage of some tokens: those that open a chunk
(`LocalChunkCredit`), those that later text keeps reading (`GlobalAnchorCredit`), or both, coupled
(`CoupledRhythmCredit`). `EntropyCredit` and `RandomCredit` are the baselines of its tables. A strategy
is any callable `scores -> gamma`; these are small frozen dataclasses, whose parameters default to the
paper's, and to the open choices that the documentation lists where the paper is silent.

What is left to others: how scores are measured (scoring), and what is done with the weights (advantage).
"""

from __future__ import annotations

import hashlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.errors import ParameterError, ResultError
from attnprobe.rhythm import dominated_anchors, top_quantile, waad_change
from attnprobe.scores import TokenScores

logger = logging.getLogger(__name__)

Credit = Callable[[TokenScores], Tensor]
"""Any callable that gives each token a weight: `scores -> gamma [batch, token]`."""

Select = Literal["top", "bottom"]
Align = Literal["token", "prediction"]

SCORES = frozenset({"waad", "fai", "entropy"})
"""The scores that a strategy can need."""


@dataclass(frozen=True, kw_only=True)
class CreditStrategy(ABC):
    """A strategy that raises chosen tokens to an amplification; subclass it and override `share`.

    Attributes:
        amplification: the weight of a chosen token, the paper's g; 1 changes nothing.
        normalize: whether to divide the weights of each response by their mean, so that they have mean
            1 over its tokens and the size of an update is kept.
        needs: the scores that the strategy reads; what nobody needs is not measured.

    Raises:
        ParameterError: an amplification that is negative or not finite.

    >>> class EveryOther(CreditStrategy):
    ...     needs = frozenset()
    ...     def share(self, scores):
    ...         return torch.arange(scores.waad.shape[1]).expand_as(scores.waad) % 2
    >>> waad = torch.zeros(1, 4)
    >>> scores = TokenScores(waad, waad, None, torch.tensor([[True, True, True, False]]))
    >>> EveryOther(amplification=3.0)(scores)
    tensor([[1., 3., 1., 1.]])
    """

    amplification: float = 1.5
    normalize: bool = False
    needs: ClassVar[frozenset[str]] = SCORES

    def __post_init__(self) -> None:
        if not (math.isfinite(self.amplification) and self.amplification >= 0):
            raise ParameterError(
                f"amplification is a weight, finite and not negative; got {self.amplification}"
            )

    @abstractmethod
    def share(self, scores: TokenScores) -> Tensor:
        """Return how much of the bonus `amplification - 1` each token gets, `[batch, token]`."""

    def __call__(self, scores: TokenScores) -> Float[Tensor, "batch token"]:
        """Return the weight of each token: 1 where none was chosen, and outside the response.

        Raises:
            ParameterError: scores of packed rows.
            ResultError: scores that lack what the strategy needs.
        """
        if scores.segment_ids is not None:
            raise ParameterError(
                "these scores are of packed rows, where the tokens of one response would be ranked among "
                "those of another: measure rows of one sequence each, such as batch.unpadded_rows()[0]"
            )
        dtype = torch.promote_types(scores.waad.dtype, torch.float32)
        gamma = 1 + (self.amplification - 1) * self.share(scores).to(dtype)
        gamma = gamma.masked_fill(~scores.response_mask, 1.0)
        return _with_mean_one(gamma, scores.response_mask) if self.normalize else gamma


@dataclass(frozen=True, kw_only=True)
class _Selective(CreditStrategy):
    """A strategy that chooses a share of each response's tokens.

    Attributes:
        quantile: the share of the tokens that have the score, the paper's q: `ceil(q * n)` of n.
        select: "top" chooses the largest scores, "bottom" the smallest, the paper's ablation; of equal
            scores the earliest tokens are chosen.
    """

    quantile: float = 0.4
    select: Select = "top"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.quantile <= 1:
            raise ParameterError(f"quantile must be in (0, 1], got {self.quantile}")
        if self.select not in ("top", "bottom"):
            raise ParameterError(f'select is "top" or "bottom", got {self.select!r}')

    def _chosen(self, values: Tensor, scores: TokenScores) -> Bool[Tensor, "batch token"]:
        inside = values.masked_fill(~scores.response_mask, torch.nan)
        return top_quantile(inside if self.select == "top" else -inside, self.quantile)


@dataclass(frozen=True, kw_only=True)
class LocalChunkCredit(_Selective):
    """Credit where local attention changes: `|WAAD[t] - WAAD[t + 1]|` (Eq. 13-14 of arXiv 2510.13554).

    Attributes:
        align: which token row t of the attention describes: "token", token t, as in the paper, or
            "prediction", token t + 1, which that row produced.

    >>> waad = torch.tensor([[1.0, 4.0, 3.5, 3.0, 3.0]])
    >>> scores = TokenScores(waad, waad, None, torch.ones(1, 5, dtype=torch.bool))
    >>> LocalChunkCredit()(scores)
    tensor([[1.5000, 1.5000, 1.0000, 1.0000, 1.0000]])
    """

    align: Align = "token"
    needs: ClassVar[frozenset[str]] = frozenset({"waad"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_align(self.align)

    def share(self, scores: TokenScores) -> Tensor:
        """Return 1 for the tokens of the largest change of WAAD."""
        return self._chosen(waad_change(_aligned_waad(scores, self.align)), scores)


@dataclass(frozen=True, kw_only=True)
class GlobalAnchorCredit(_Selective):
    """Credit to what later tokens read: the largest FAI (Eq. 15-16 of arXiv 2510.13554).

    A response too short for any token to have a FAI keeps the weight 1.

    >>> fai = torch.tensor([[0.1, 0.4, 0.2, torch.nan]])
    >>> scores = TokenScores(fai, fai, None, torch.ones(1, 4, dtype=torch.bool))
    >>> GlobalAnchorCredit(amplification=2.0)(scores)
    tensor([[1., 2., 2., 1.]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"fai"})

    def share(self, scores: TokenScores) -> Tensor:
        """Return 1 for the tokens of the largest FAI."""
        _warn_of_short_responses(scores)
        return self._chosen(scores.fai, scores)


@dataclass(frozen=True, kw_only=True)
class CoupledRhythmCredit(_Selective):
    """Credit to anchors, part of which goes to what introduced them (Eq. 17-18 of arXiv 2510.13554).

    An anchor, a token of the largest FAI, is dominated if its WAAD is low and WAAD changed much
    within the `lookback` tokens before it. It passes the part `alpha` of its bonus on to the token of
    the largest change, the introductory one. A token that introduces several anchors gets that part
    once; if it is an anchor too, both count.

    Attributes:
        alpha: the part that a dominated anchor passes on, in `[0, 1]`.
        lookback: how many tokens before an anchor are searched, the paper's k.
        waad_threshold: dominated anchors have at most this WAAD; None: the response's median.
        delta_threshold: and after at least this change of WAAD; None: the response's median change.
        align: which token row t of the attention describes: "token", token t, as in the paper, or
            "prediction", token t + 1, which that row produced. It concerns WAAD, which belongs to
            rows; FAI belongs to columns.

    Raises:
        ParameterError: an alpha outside [0, 1], or one by which a token could get a negative weight.

    >>> waad = torch.tensor([[1.0, 5.0, 1.0, 1.0, 1.0, 3.0]])
    >>> fai = torch.tensor([[0.1, 0.2, 0.9, 0.1, 0.1, 0.8]])
    >>> scores = TokenScores(waad, fai, None, torch.ones(1, 6, dtype=torch.bool))
    >>> CoupledRhythmCredit(quantile=0.3)(scores)  # token 2 shares with token 1; token 5 does not
    tensor([[1.0000, 1.2500, 1.2500, 1.0000, 1.0000, 1.5000]])
    """

    alpha: float = 0.5
    lookback: int = 3
    waad_threshold: float | None = None
    delta_threshold: float | None = None
    align: Align = "token"
    needs: ClassVar[frozenset[str]] = frozenset({"waad", "fai"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_align(self.align)
        if not 0 <= self.alpha <= 1:
            raise ParameterError(f"alpha is the part that is passed on, in [0, 1]; got {self.alpha}")
        if isinstance(self.lookback, bool) or not isinstance(self.lookback, int) or self.lookback < 1:
            raise ParameterError(f"lookback is a whole number of tokens, at least 1; got {self.lookback!r}")
        # An anchor that introduces another one gets the bonus 1 + alpha times.
        if 1 + (self.amplification - 1) * (1 + self.alpha) < 0:
            raise ParameterError(
                f"with amplification {self.amplification} and alpha {self.alpha} a token could get a "
                f"negative weight: use an amplification of at least {self.alpha / (1 + self.alpha):.3g}"
            )

    def share(self, scores: TokenScores) -> Tensor:
        """Return the sum of a token's parts as an anchor and as an introductory token."""
        _warn_of_short_responses(scores)
        waad = _aligned_waad(scores, self.align)
        anchor = self._chosen(scores.fai, scores)
        dominated, intro = dominated_anchors(
            anchor,
            waad,
            lookback=self.lookback,
            waad_threshold=self.waad_threshold,
            delta_threshold=self.delta_threshold,
        )
        return anchor.to(waad) - self.alpha * dominated.to(waad) + self.alpha * intro.to(waad)


@dataclass(frozen=True, kw_only=True)
class EntropyCredit(_Selective):
    """Credit to the tokens that were sampled at the highest entropy, a baseline of arXiv 2510.13554.

    >>> entropy = torch.tensor([[0.1, 2.0, 0.5, 0.2]])
    >>> scores = TokenScores(entropy, entropy, entropy, torch.ones(1, 4, dtype=torch.bool))
    >>> EntropyCredit(quantile=0.25)(scores)
    tensor([[1.0000, 1.5000, 1.0000, 1.0000]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def share(self, scores: TokenScores) -> Tensor:
        """Return 1 for the tokens of the highest entropy."""
        if scores.entropy is None:
            raise ResultError("these scores have no entropy: measure(..., entropy=True)")
        return self._chosen(scores.entropy, scores)


@dataclass(frozen=True, kw_only=True)
class RandomCredit(CreditStrategy):
    """Credit to random tokens of each response, a baseline of arXiv 2510.13554.

    The draw depends on the seed and on the response itself, by which of its tokens have the larger
    WAAD. So a strategy has no state to save: a response gets the same weights whichever responses stand
    beside it, on whichever process, and after a resumed run too.

    Attributes:
        quantile: the share of the response's tokens: `ceil(q * n)` of n.
        seed: another seed gives another draw.
    """

    quantile: float = 0.4
    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset({"waad"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.quantile <= 1:
            raise ParameterError(f"quantile must be in (0, 1], got {self.quantile}")

    def share(self, scores: TokenScores) -> Tensor:
        """Return 1 for the tokens that were drawn."""
        mask = scores.response_mask.cpu()
        # Not the values of WAAD: their last bits depend on how rows were batched together.
        upper = top_quantile(scores.waad.masked_fill(~scores.response_mask, torch.nan), 0.5).cpu()
        drawn = torch.full(mask.shape, torch.nan)
        for row in range(mask.shape[0]):
            content = bytes(upper[row][mask[row]].to(torch.uint8).tolist())
            digest = hashlib.blake2b(content, digest_size=7, key=str(self.seed).encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
            drawn[row, mask[row]] = torch.rand(int(mask[row].sum()), generator=generator)
        return top_quantile(drawn, self.quantile).to(scores.waad.device)


def needs_of(credit: Credit) -> frozenset[str]:
    """Return the scores that a strategy needs: its attribute `needs`, or all where it has none.

    Raises:
        ParameterError: something that cannot be called, or unknown scores.

    >>> sorted(needs_of(GlobalAnchorCredit()))
    ['fai']
    """
    if not callable(credit) or isinstance(credit, type):
        raise ParameterError(
            "a credit strategy is a callable `scores -> gamma`, such as CoupledRhythmCredit(); got "
            f"{credit!r}"
        )
    needs = frozenset(getattr(credit, "needs", SCORES))
    if unknown := needs - SCORES:
        raise ParameterError(f"a strategy can need {sorted(SCORES)}, not {sorted(unknown)}")
    return needs


def credit_of(credit: Credit, scores: TokenScores) -> Float[Tensor, "batch token"]:
    """Return a strategy's weights after checking them; 1 outside the response.

    Raises:
        ResultError: weights of the wrong type or shape, or weights in the response that are negative
            or not finite.
    """
    gamma = credit(scores)
    name = getattr(credit, "__name__", type(credit).__name__)
    shape = list(scores.response_mask.shape)
    if not isinstance(gamma, Tensor) or not gamma.is_floating_point():
        kind = f"a tensor of {gamma.dtype}" if isinstance(gamma, Tensor) else type(gamma).__name__
        raise ResultError(f"{name} must return a tensor of floats {shape}, got {kind}")
    if list(gamma.shape) != shape:
        raise ResultError(f"{name} must return weights {shape} like the scores, got {list(gamma.shape)}")
    gamma = gamma.detach().masked_fill(~scores.response_mask, 1.0)
    if not bool(gamma.isfinite().all()):
        row, token = (~gamma.isfinite()).nonzero()[0].tolist()
        raise ResultError(f"{name} gave token {token} of row {row} the weight {float(gamma[row, token])}")
    if bool((gamma < 0).any()):
        row, token = (gamma < 0).nonzero()[0].tolist()
        raise ResultError(
            f"{name} gave token {token} of row {row} the weight {float(gamma[row, token])}: weights must "
            "not be negative, or an advantage would change its sign"
        )
    return gamma


def _with_mean_one(
    gamma: Float[Tensor, "batch token"], mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token"]:
    """Divide the weights of each response by their mean over its own tokens, padding left out."""
    inside = gamma.double().masked_fill(~mask, 0.0)
    mean = inside.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    # An empty response has no mean, and weights that are all 0 stay so.
    mean = torch.where(mean > 0, mean, 1.0)
    return (gamma.double() / mean).to(gamma.dtype).masked_fill(~mask, 1.0)


def _aligned_waad(scores: TokenScores, align: Align) -> Float[Tensor, "batch token"]:
    # Half precision has no median, and would tie changes that differ.
    dtype = torch.promote_types(scores.waad.dtype, torch.float32)
    waad = scores.waad.to(dtype).masked_fill(~scores.response_mask, torch.nan)
    if align == "token":
        return waad
    # Row t - 1 produced token t; the row that produced the first token belongs to the prompt.
    shifted = torch.full_like(waad, torch.nan)
    shifted[:, 1:] = waad[:, :-1]
    return shifted.masked_fill(~scores.response_mask, torch.nan)


def _check_align(align: Align) -> None:
    if align not in ("token", "prediction"):
        raise ParameterError(f'align is "token" or "prediction", got {align!r}')


def _warn_of_short_responses(scores: TokenScores) -> None:
    inside = scores.response_mask
    without = inside.any(-1) & ~(inside & ~scores.fai.isnan()).any(-1)
    if bool(without.any()):
        _warn_once(
            "some responses are too short for any of their tokens to have a FAI (shorter than the "
            "horizon's start, or empty): they keep the weight 1. Later ones are not reported"
        )


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)

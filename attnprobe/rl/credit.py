"""Credit strategies: from token scores to one weight per token, `gamma`.

A strategy is any callable `scores -> gamma`; `RolloutCredit` calls it once per rollout. Ours are small frozen
dataclasses. Sec. 5.2 of arXiv 2510.13554v2 multiplies the advantage of some tokens: those that open a chunk
(`LocalChunkCredit`), those that later text keeps reading (`GlobalAnchorCredit`), or both, coupled
(`CoupledRhythmCredit`). Parameters default to the paper's values or, where the paper is silent, to the
choices listed in the documentation. What is left to others: strategies to compare these with (baselines),
weights that rise with a score (continuous), how scores are measured (scoring), and what is done with the
weights (advantage).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.errors import ParameterError, ResultError
from attnprobe.rhythm import dominated_anchors, top_quantile, waad_change
from attnprobe.rl.advantage import check_not_negative
from attnprobe.scores import TokenScores
from attnprobe.validation import (
    BoolField,
    FloatField,
    IntField,
    as_tensor,
    brief,
    choice,
    finite,
    instance,
    real_number,
    truth,
    whole_number,
)

logger = logging.getLogger(__name__)

Credit = Callable[[TokenScores], Tensor]
"""Any callable that maps token scores to weights: `scores -> gamma [completion, token]`."""

Select = Literal["top", "bottom"]
Align = Literal["token", "prediction"]

SCORES = frozenset({"waad", "fai", "entropy"})
"""The token scores that a strategy can need."""

_AXES = "completion, token"


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """What strategies have in common: checks of the scores, weights of 1 on padding, and a mean of 1.

    `CreditStrategy` is the one to subclass; only a strategy whose weights are no bonus overrides `weights`.
    """

    normalize: BoolField = False
    needs: ClassVar[frozenset[str]] = SCORES

    def __post_init__(self) -> None:
        self._set("normalize", truth(self.normalize, "normalize"))

    def _set(self, name: str, value: Any) -> None:
        """Store a parameter in its checked form, such as a numpy number as a float."""
        object.__setattr__(self, name, value)

    @abstractmethod
    def weights(self, scores: TokenScores) -> Float[Tensor, "completion token"]:
        """Return the weight of each token, before normalisation; outside the response it may be anything."""

    def __call__(self, scores: TokenScores) -> Float[Tensor, "completion token"]:
        """Return the weight of each token; 1 outside the response.

        Raises:
            ParameterError: anything but `TokenScores`, or scores of packed examples.
            ResultError: scores that lack what the strategy needs, or a share of another shape.
        """
        instance(scores, TokenScores, "scores", "score_tokens() and score_rollout() return it")
        if scores.segment_ids is not None:
            raise ParameterError(
                "these scores are of packed examples, where the tokens of one response would be ranked "
                "against those of another: measure one sequence per example, such as batch.sequences()[0]"
            )
        gamma = self.weights(scores).masked_fill(~scores.response_mask, 1.0)
        return _with_mean_one(gamma, scores.response_mask) if self.normalize else gamma


@dataclass(frozen=True, kw_only=True)
class CreditStrategy(Strategy):
    """A strategy that gives chosen tokens a larger weight; subclass it and override `share`.

    Attributes:
        amplification: the weight of a chosen token, the paper's g; 1 changes nothing.
        normalize: whether to divide the weights of each response by their mean, so that they average 1 over
            its tokens and updates keep their size.
        needs: the token scores that the strategy reads; scores that are not needed are not measured.

    Raises:
        ParameterError: an amplification that is negative or not finite, or a `normalize` that is not a bool.

    >>> class EveryOther(CreditStrategy):
    ...     needs = frozenset()
    ...     def share(self, scores):
    ...         return torch.arange(scores.waad.shape[1]).expand_as(scores.waad) % 2
    >>> waad = torch.zeros(1, 4)
    >>> scores = TokenScores(waad, waad, None, torch.tensor([[True, True, True, False]]))
    >>> EveryOther(amplification=3.0)(scores)
    tensor([[1., 3., 1., 1.]])
    """

    amplification: FloatField = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("amplification", real_number(self.amplification, "amplification", minimum=0, below=inf))

    @abstractmethod
    def share(self, scores: TokenScores) -> Tensor:
        """Return each token's share of the bonus `amplification - 1`, `[completion, token]`."""

    def weights(self, scores: TokenScores) -> Float[Tensor, "completion token"]:
        """Return 1 plus each token's share of the bonus.

        Raises:
            ResultError: a share of another shape.
        """
        dtype = torch.promote_types(scores.waad.dtype, torch.float32)
        share = as_tensor(self.share(scores), f"{_name_of(self)}.share", ResultError)
        if share.shape != scores.waad.shape:
            raise ResultError(
                f"{_name_of(self)}.share must return [{_AXES}] = {list(scores.waad.shape)} like the scores; "
                f"got {list(share.shape)}"
            )
        return 1 + (self.amplification - 1) * share.to(scores.waad.device, dtype)


@dataclass(frozen=True, kw_only=True)
class Selective(CreditStrategy):
    """A strategy that chooses a share of each response's tokens.

    Attributes:
        quantile: the share that is chosen of the n tokens with a score, the paper's q: `ceil(q * n)` tokens.
        select: "top" chooses the largest scores, "bottom" the smallest (the paper's ablation); among equal
            scores, the earliest tokens are chosen.
    """

    quantile: FloatField = 0.4
    select: Select = "top"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("quantile", real_number(self.quantile, "quantile", above=0, maximum=1))
        choice(self.select, "select", get_args(Select))

    def _chosen(self, values: Tensor, scores: TokenScores) -> Bool[Tensor, "completion token"]:
        inside = values.masked_fill(~scores.response_mask, torch.nan)
        return top_quantile(inside if self.select == "top" else -inside, self.quantile)


@dataclass(frozen=True, kw_only=True)
class LocalChunkCredit(Selective):
    """Credit where local attention changes: `|WAAD[t] - WAAD[t + 1]|` (Eq. 14-15 of arXiv 2510.13554v2).

    Attributes:
        align: which token row t of the pattern describes: "token" means token t, as in the paper;
            "prediction" means token t + 1, which that row produced.

    >>> waad = torch.tensor([[1.0, 4.0, 3.5, 3.0, 3.0]])
    >>> scores = TokenScores(waad, waad, None, torch.ones(1, 5, dtype=torch.bool))
    >>> LocalChunkCredit()(scores)
    tensor([[1.5000, 1.5000, 1.0000, 1.0000, 1.0000]])
    """

    align: Align = "token"
    needs: ClassVar[frozenset[str]] = frozenset({"waad"})

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self.align, "align", get_args(Align))

    def share(self, scores: TokenScores) -> Tensor:
        """Return 1 for the tokens with the largest change of WAAD."""
        return self._chosen(waad_change(aligned_waad(scores, self.align)), scores)


@dataclass(frozen=True, kw_only=True)
class GlobalAnchorCredit(Selective):
    """Credit to what later tokens read: the largest FAI (Eq. 16-17 of arXiv 2510.13554v2).

    A response that is too short for any of its tokens to have an FAI keeps weight 1.

    >>> fai = torch.tensor([[0.1, 0.4, 0.2, torch.nan]])
    >>> scores = TokenScores(fai, fai, None, torch.ones(1, 4, dtype=torch.bool))
    >>> GlobalAnchorCredit(amplification=2.0)(scores)
    tensor([[1., 2., 2., 1.]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"fai"})

    def share(self, scores: TokenScores) -> Tensor:
        """Return 1 for the tokens with the largest FAI."""
        warn_of_short_responses(scores)
        return self._chosen(scores.fai, scores)


@dataclass(frozen=True, kw_only=True)
class CoupledRhythmCredit(Selective):
    """Credit to anchors, shared with the tokens that introduce them (Eq. 18-19 of arXiv 2510.13554v2).

    An anchor, here a token with one of the largest FAIs, is dominated if its WAAD is low and WAAD changed a
    lot within the `lookback` tokens before it. It passes the fraction `alpha` of its bonus on to the token
    with the largest change, its intro. A token that is the intro of several anchors gets that fraction
    once; if it is itself an anchor, it gets both.

    Attributes:
        alpha: the fraction of its bonus that a dominated anchor passes on, in `[0, 1]`.
        lookback: how many tokens before an anchor are searched, the paper's k.
        waad_threshold: the largest WAAD of a dominated anchor; None: the response's median.
        delta_threshold: the smallest change of WAAD before one; None: the response's median change.
        align: which token row t of the pattern describes: "token" means token t, as in the paper;
            "prediction" means token t + 1, which that row produced. Only WAAD depends on it: WAAD is read
            from rows, FAI from columns.

    Raises:
        ParameterError: an alpha outside [0, 1], or one that could give a token a negative weight.

    >>> waad = torch.tensor([[1.0, 5.0, 1.0, 1.0, 1.0, 3.0]])
    >>> fai = torch.tensor([[0.1, 0.2, 0.9, 0.1, 0.1, 0.8]])
    >>> scores = TokenScores(waad, fai, None, torch.ones(1, 6, dtype=torch.bool))
    >>> CoupledRhythmCredit(quantile=0.3)(scores)  # token 2 shares with token 1; token 5 does not
    tensor([[1.0000, 1.2500, 1.2500, 1.0000, 1.0000, 1.5000]])
    """

    alpha: FloatField = 0.5
    lookback: IntField = 3
    waad_threshold: FloatField | None = None
    delta_threshold: FloatField | None = None
    align: Align = "token"
    needs: ClassVar[frozenset[str]] = frozenset({"waad", "fai"})

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self.align, "align", get_args(Align))
        self._set("alpha", real_number(self.alpha, "alpha", minimum=0, maximum=1))
        self._set("lookback", whole_number(self.lookback, "lookback", minimum=1))
        for name in ("waad_threshold", "delta_threshold"):
            if getattr(self, name) is not None:
                self._set(name, real_number(getattr(self, name), name))
        # An anchor that is also an intro gets the bonus 1 + alpha times.
        if 1 + (self.amplification - 1) * (1 + self.alpha) < 0:
            raise ParameterError(
                f"with amplification {self.amplification} and alpha {self.alpha} a token could get a "
                f"negative weight: use an amplification of at least {self.alpha / (1 + self.alpha):.3g}"
            )

    def share(self, scores: TokenScores) -> Tensor:
        """Return the sum of a token's shares as an anchor and as an intro."""
        warn_of_short_responses(scores)
        waad = aligned_waad(scores, self.align)
        anchor = self._chosen(scores.fai, scores)
        dominated, intro = dominated_anchors(
            anchor,
            waad,
            lookback=self.lookback,
            waad_threshold=self.waad_threshold,
            delta_threshold=self.delta_threshold,
        )
        return anchor.to(waad) - self.alpha * dominated.to(waad) + self.alpha * intro.to(waad)


def needs_of(credit: Credit) -> frozenset[str]:
    """Return the token scores that a strategy needs: its attribute `needs`, or all if it has none.

    Raises:
        ParameterError: something that cannot be called, or unknown scores.

    >>> sorted(needs_of(GlobalAnchorCredit()))
    ['fai']
    """
    if not callable(credit) or isinstance(credit, type):
        raise ParameterError(
            "a credit strategy is a callable `scores -> gamma`, such as CoupledRhythmCredit(); got "
            f"{brief(credit)}"
        )
    needs = getattr(credit, "needs", SCORES)
    if isinstance(needs, str) or not isinstance(needs, Iterable):
        raise ParameterError(f"needs of {_name_of(credit)} must be a set of scores; got {brief(needs)}")
    needs = frozenset(needs)
    if unknown := needs - SCORES:
        raise ParameterError(f"{_name_of(credit)} can need {sorted(SCORES)}, not {sorted(map(str, unknown))}")
    return needs


def credit_of(credit: Credit, scores: TokenScores) -> Float[Tensor, "completion token"]:
    """Return a strategy's weights after checking them; 1 outside the response.

    Raises:
        ParameterError: something that is not a strategy, or anything but `TokenScores`.
        ResultError: weights of the wrong type or shape, or weights in the response that are negative
            or not finite.
    """
    needs_of(credit)
    instance(scores, TokenScores, "scores", "score_tokens() and score_rollout() return it")
    gamma = credit(scores)
    name = f"the weight that {_name_of(credit)} gave"
    shape = list(scores.response_mask.shape)
    if not isinstance(gamma, Tensor) or not gamma.is_floating_point() or list(gamma.shape) != shape:
        found = brief(gamma) if isinstance(gamma, Tensor) else f"a {type(gamma).__name__}"
        raise ResultError(
            f"{_name_of(credit)} must return a tensor of floats, [{_AXES}] = {shape} like the scores; got "
            f"{found}"
        )
    mask = scores.response_mask.to(gamma.device)
    gamma = finite(gamma.detach().masked_fill(~mask, 1.0), name, _AXES, ResultError)
    check_not_negative(gamma, name, ResultError)
    return gamma


def known_entropy(scores: TokenScores) -> Float[Tensor, "completion token"]:
    """Return the entropy of the response's tokens; NaN elsewhere.

    Raises:
        ResultError: scores without entropy.
    """
    if scores.entropy is None:
        raise ResultError(
            "these scores have no entropy: measure(..., entropy=True), or weigh(..., entropy=...)"
        )
    return scores.entropy.masked_fill(~scores.response_mask, torch.nan)


def _name_of(credit: Credit) -> str:
    return getattr(credit, "__name__", type(credit).__name__)


def _with_mean_one(
    gamma: Float[Tensor, "completion token"], mask: Bool[Tensor, "completion token"]
) -> Float[Tensor, "completion token"]:
    """Divide the weights of each response by their mean over its own tokens, leaving out padding."""
    inside = gamma.double().masked_fill(~mask, 0.0)
    mean = inside.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    # An empty response has no mean, and weights that are all 0 stay 0.
    mean = torch.where(mean > 0, mean, 1.0)
    return (gamma.double() / mean).to(gamma.dtype).masked_fill(~mask, 1.0)


def aligned_waad(scores: TokenScores, align: Align) -> Float[Tensor, "completion token"]:
    """Return the WAAD of the response's tokens, from the row that describes each; NaN elsewhere."""
    # Half precision has no median, and would make different changes equal.
    dtype = torch.promote_types(scores.waad.dtype, torch.float32)
    waad = scores.waad.to(dtype).masked_fill(~scores.response_mask, torch.nan)
    if align == "token":
        return waad
    # Row t - 1 produced token t; the row that produced the first token belongs to the prompt.
    shifted = torch.full_like(waad, torch.nan)
    shifted[:, 1:] = waad[:, :-1]
    return shifted.masked_fill(~scores.response_mask, torch.nan)


def warn_of_short_responses(scores: TokenScores) -> None:
    """Log, once in a process, that some responses have no FAI at all."""
    inside = scores.response_mask
    without = inside.any(-1) & ~(inside & ~scores.fai.isnan()).any(-1)
    if bool(without.any()):
        _warn_once(
            "some responses are too short for any of their tokens to have an FAI (shorter than the start of "
            "the horizon, or empty): their weights stay 1. This warning is shown only once"
        )


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)

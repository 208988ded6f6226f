"""Baselines: the strategies that arXiv 2510.13554v2 compares its own with.

`EntropyCredit` amplifies the tokens that were sampled at high entropy, `EntropySelection` drops all others,
and `RandomCredit` amplifies tokens drawn at random. Like the strategies of `credit`, they are passed to
`attach_credit` or `RolloutCredit`. The paper's further controls are parameters: `select="bottom"` of a
strategy, and `heads="all"` where attention is measured. What is left to others: the paper's strategies and
what all have in common (credit).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.rhythm import top_quantile
from attnprobe.rl.credit import CreditStrategy, Selective, Strategy, known_entropy
from attnprobe.scores import TokenScores
from attnprobe.validation import FloatField, IntField, real_number, whole_number


@dataclass(frozen=True, kw_only=True)
class EntropyCredit(Selective):
    """Credit to the tokens that were sampled at the highest entropy, a baseline of arXiv 2510.13554v2.

    >>> entropy = torch.tensor([[0.1, 2.0, 0.5, 0.2]])
    >>> scores = TokenScores(entropy, entropy, entropy, torch.ones(1, 4, dtype=torch.bool))
    >>> EntropyCredit(quantile=0.25)(scores)
    tensor([[1.0000, 1.5000, 1.0000, 1.0000]])
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def share(self, scores: TokenScores) -> Tensor:
        """Return 1 for the tokens with the highest entropy."""
        return self._chosen(known_entropy(scores), scores)


@dataclass(frozen=True, kw_only=True)
class EntropySelection(Strategy):
    """Only the tokens that were sampled at the highest entropy keep a gradient (arXiv 2506.01939).

    They weigh 1, the other tokens of the response 0; with `signs="both"` that drops tokens of positive and
    negative advantages, as in that work. This is a baseline of arXiv 2510.13554v2. The number of tokens that
    a trainer divides its loss by stays the same, as with TRL's `top_entropy_quantile`, which ranks the tokens
    of a whole batch rather than those of each completion. A token whose entropy is not defined keeps its
    gradient, since nothing says that it was certain.

    Attributes:
        quantile: the share of a response's n tokens that is kept: `ceil(quantile * n)` tokens; among equal
            entropies, the earliest.
        normalize: whether to divide the weights of each response by their mean, so that they average 1 over
            its tokens: those that are kept then weigh about `1 / quantile`.

    Raises:
        ParameterError: a quantile outside (0, 1], or a `normalize` that is not a bool.

    >>> entropy = torch.tensor([[0.1, 2.0, 0.5, 0.2, 0.0]])
    >>> scores = TokenScores(entropy, entropy, entropy, torch.tensor([[True] * 4 + [False]]))
    >>> EntropySelection(quantile=0.5)(scores)
    tensor([[0., 1., 1., 0., 1.]])
    """

    quantile: FloatField = 0.2
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("quantile", real_number(self.quantile, "quantile", above=0, maximum=1))

    def weights(self, scores: TokenScores) -> Float[Tensor, "completion token"]:
        """Return 1 for the tokens with the highest entropy, and 0 for the others.

        Raises:
            ResultError: scores without entropy.
        """
        entropy = known_entropy(scores)
        kept = top_quantile(entropy, self.quantile) | entropy.isnan()
        return kept.to(torch.promote_types(entropy.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True)
class RandomCredit(CreditStrategy):
    """Credit to random tokens of each response, a baseline of arXiv 2510.13554v2.

    The draw depends on the seed and on the response itself: on which half of its tokens has the larger WAAD.
    So the strategy has no state to save: a response gets the same weights on any process and in a resumed
    run, whatever other responses are in the batch.

    Attributes:
        quantile: the share of a response's n tokens that is chosen: `ceil(q * n)` tokens.
        seed: a different seed gives a different draw.
    """

    quantile: FloatField = 0.4
    seed: IntField = 0
    needs: ClassVar[frozenset[str]] = frozenset({"waad"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("quantile", real_number(self.quantile, "quantile", above=0, maximum=1))
        self._set("seed", whole_number(self.seed, "seed"))

    def share(self, scores: TokenScores) -> Tensor:
        """Return 1 for the tokens that were drawn."""
        mask = scores.response_mask.cpu()
        # Not the values of WAAD: their last bits depend on which completions were batched together.
        upper = top_quantile(scores.waad.masked_fill(~scores.response_mask, torch.nan), 0.5).cpu()
        drawn = torch.full(mask.shape, torch.nan)
        for completion, own in enumerate(mask):
            content = bytes(upper[completion][own].to(torch.uint8).tolist())
            digest = hashlib.blake2b(content, digest_size=7, key=str(self.seed).encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
            drawn[completion, own] = torch.rand(int(own.sum()), generator=generator)
        return top_quantile(drawn, self.quantile).to(scores.waad.device)

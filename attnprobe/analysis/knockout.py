"""How much later predictions depend on reading a token: attention knock-out.

FAI says how much attention later tokens pay to a token; `knockout_divergence`, which users call, says how
much their predictions change without it. Attention to the token is suppressed, and the next-token
distributions at later positions are compared with the model's own by Kullback-Leibler divergence. This takes
one forward pass per token, where a perturbation needs many continuations. What is left to others: suppressing
(suppression), and which tokens to ask about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnprobe.adapters import Adapter, adapter_for
from attnprobe.adapters.base import Layers
from attnprobe.batch import BatchLike, TokenBatch
from attnprobe.batch_run import check_fits
from attnprobe.head_selection import HeadsLike
from attnprobe.layout import check_unpacked
from attnprobe.metrics import HorizonLike, check_horizon
from attnprobe.progress import progress_bar
from attnprobe.reductions import TRAINING_HORIZON
from attnprobe.suppression import heads_by_layer, suppress_attention
from attnprobe.validation import ArrayLike, IntLike, as_mask, truth, whole_number


def knockout_divergence(
    model: Any,
    batch: BatchLike,
    tokens: ArrayLike,
    *,
    horizon: HorizonLike = TRAINING_HORIZON,
    layers: Layers = "all",
    heads: HeadsLike | None = None,
    batch_size: IntLike = 8,
    progress: bool = False,
) -> Float[Tensor, "batch token"]:
    """Return how much later predictions change when no later token can read a token.

    For token s, this is `mean over t of KL(p_t || p'_t)` in nats, where `p_t` is the distribution of token
    t + 1 that query t predicts, `p'_t` the same with attention to token s suppressed, and t runs over the
    response tokens with `s + low <= t <= s + high`, as in FAI (Eq. 10 of arXiv 2510.13554v2). At least 0;
    NaN for tokens that were not asked about, outside the response, and if no query lies in the horizon.

    Attention to token s is suppressed for all later queries, in the given layers and heads, at any
    distance: queries nearer than `low` pass on what they have read, so they must not read it either.

    Args:
        model: a model that an adapter knows.
        batch: prompts and responses, as for `measure`; results are aligned with it.
        tokens: a mask `[batch, token]` of the tokens to ask about; each costs a forward pass.
        horizon: `(low, high)` in tokens; `(low, None)` runs to the end of the response.
        layers: a name such as "all" or "middle", or numbers: where attention is suppressed.
        heads: in which heads of these layers, in any form that `HeadSelection.of` accepts, such as
            `groups["global"]`; weights do not matter. Default: all.
        batch_size: how many tokens to run at a time. Results do not depend on it.
        progress: whether to show a progress bar.

    Raises:
        BatchError: ids outside the vocabulary, or sequences longer than the model's context.
        ParameterError: a mask of another shape, an invalid horizon, layers or heads, packed examples, or a
            batch size below 1.
        UnsupportedModelError: a model whose attention cannot be suppressed, or without next-token logits.
    """
    batch = TokenBatch.of(batch)
    check_unpacked(batch.segment_ids, "suppress attention to tokens")
    low, high = check_horizon(horizon)
    mask = as_mask(tokens, "tokens", tuple(batch.input_ids.shape), device=batch.input_ids.device)
    batch_size = whole_number(batch_size, "batch_size", minimum=1)
    truth(progress, "progress")
    adapter = adapter_for(model)
    adapter.check_next_token_logits("knockout_divergence")
    check_fits(batch.sequences()[0], adapter)
    by_layer = heads_by_layer(heads, layers, adapter)
    every = None in by_layer.values()
    places: dict[str, Any] = {"layers": list(by_layer)} if every else {"heads": by_layer}
    asked = mask & batch.response_mask
    result = torch.full(tuple(asked.shape), torch.nan)
    with progress_bar("suppressing", int(asked.sum()), shown=progress) as advance:
        for example in range(batch.batch_size):
            columns = asked[example].nonzero()[:, 0].tolist()
            if not columns:
                continue
            alone = batch.select(example).sequences()[0].to(adapter.device)
            shift = int(batch.attention_mask[example].nonzero()[0])
            runs = _Runs.prepare(adapter, alone)
            for begin in range(0, len(columns), batch_size):
                part = columns[begin : begin + batch_size]
                keys = torch.tensor([column - shift for column in part])
                divergence = runs.without(keys, places)
                for column, key, of_queries in zip(part, keys.tolist(), divergence, strict=True):
                    inside = runs.queries >= key + min(low, alone.token_count)
                    if high is not None:
                        inside &= runs.queries <= key + min(high, alone.token_count)
                    # The mean over no queries is NaN.
                    result[example, column] = of_queries[inside].mean()
                    advance()
    return result


@dataclass(frozen=True)
class _Runs:
    """One response, and the model's own log-probabilities of each next token."""

    adapter: Adapter
    text: TokenBatch
    queries: Int[Tensor, " query"]
    own: Float[Tensor, "query vocabulary"]

    @staticmethod
    def prepare(adapter: Adapter, text: TokenBatch) -> _Runs:
        queries = text.response_mask[0].nonzero()[:, 0].cpu()
        logits = adapter.forward(text, logits_at=queries)
        assert logits is not None
        return _Runs(adapter, text, queries, logits[0].float().log_softmax(-1))

    def without(self, keys: Int[Tensor, " key"], places: dict[str, Any]) -> Float[Tensor, "key query"]:
        """Return the divergence at each query when no later token can read each of some keys."""
        count = len(keys)
        copies = TokenBatch(
            self.text.input_ids.expand(count, -1),
            self.text.attention_mask.expand(count, -1),
            self.text.response_mask.expand(count, -1),
        )
        mask = torch.zeros(count, self.text.token_count, dtype=torch.bool)
        mask[torch.arange(count), keys] = True
        with suppress_attention(self.adapter, **places, keys=mask):
            logits = self.adapter.forward(copies, logits_at=self.queries)
        assert logits is not None
        divergence = torch.empty(count, len(self.queries))
        # One key at a time: a distribution over the vocabulary for every query is large.
        for i, of_key in enumerate(logits):
            other = of_key.float().log_softmax(-1)
            divergence[i] = (self.own.exp() * (self.own - other)).sum(-1).clamp(min=0.0).cpu()
        return divergence

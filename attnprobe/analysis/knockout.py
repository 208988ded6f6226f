"""How much later predictions depend on reading a token: attention knock-out.

FAI says how much attention later tokens give a token; this says what they lose without it. Attention to
the token is suppressed, and the next-token distributions of the later rows are compared with the model's
own, by Kullback-Leibler divergence. One forward pass for a token, where a perturbation needs rollouts.
What is left to others: suppressing (suppression), and which tokens are asked about.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnprobe.adapters import Adapter, adapter_for
from attnprobe.adapters.base import Layers
from attnprobe.batch import TokenBatch
from attnprobe.errors import ParameterError
from attnprobe.metrics import Horizon, check_horizon
from attnprobe.progress import progress_bar
from attnprobe.suppression import suppress_attention


def knockout_divergence(
    model: Any,
    batch: TokenBatch,
    tokens: Bool[Tensor, "batch token"],
    *,
    horizon: Horizon = (10, 50),
    layers: Layers = "all",
    heads: Iterable[int] | Mapping[int, Iterable[int]] | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> Float[Tensor, "batch token"]:
    """Return how much the later predictions change when no later token can read a token.

    `mean over t of KL(p_t || p'_t)` in nats, where `p_t` is the distribution that row t predicts token
    t + 1 with, `p'_t` the same with attention to token s suppressed, and t runs over the response rows
    with `s + low <= t <= s + high`, as in FAI (Eq. 10 of arXiv 2510.13554). At least 0; NaN for tokens
    that were not asked about, outside the response, and where no row lies in the horizon.

    Suppressed is what every later token reads from token s in the layers and heads given, at whatever
    distance: rows nearer than `low` carry on what they have read, so all of them must be kept from it.

    Args:
        model: a model that an adapter knows.
        batch: prompts and responses, in any layout; results are aligned with it.
        tokens: which tokens to ask about: a forward pass for each, so choose.
        horizon: `(low, high)` in tokens; `(low, None)` runs to the end of the response.
        layers, heads: where attention is suppressed, as for `suppress_attention`; default: everywhere.
        batch_size: how many tokens are asked about at a time. Results do not depend on it.
        progress: whether to show a progress bar.

    Raises:
        ParameterError: a mask of another shape, a horizon, layers or heads that make no sense, packed
            rows, or a batch size below 1.
        UnsupportedModelError: a model whose attention cannot be suppressed.
    """
    low, high = check_horizon(horizon)
    if tokens.shape != batch.input_ids.shape:
        raise ParameterError(f"tokens must be {list(batch.input_ids.shape)}, got {list(tokens.shape)}")
    if batch.segment_ids is not None:
        raise ParameterError("rows are packed: put each response in a row of its own")
    if batch_size < 1:
        raise ParameterError(f"batch_size must be at least 1, got {batch_size}")
    adapter = adapter_for(model)
    asked = tokens.to(batch.response_mask.device).bool() & batch.response_mask
    result = torch.full(tokens.shape, torch.nan)
    with progress_bar("suppressing", int(asked.sum()), shown=progress) as advance:
        for row in range(batch.batch_size):
            columns = asked[row].nonzero()[:, 0].tolist()
            if not columns:
                continue
            alone = batch.select(slice(row, row + 1)).unpadded_rows()[0]
            shift = int(batch.attention_mask[row].nonzero()[0])
            runs = _Runs.prepare(adapter, alone)
            for begin in range(0, len(columns), batch_size):
                part = columns[begin : begin + batch_size]
                keys = torch.tensor([column - shift for column in part])
                divergence = runs.without(keys, layers, heads)
                for column, key, of_rows in zip(part, keys.tolist(), divergence, strict=True):
                    inside = runs.rows >= key + low
                    if high is not None:
                        inside &= runs.rows <= key + high
                    # The mean over no row is NaN.
                    result[row, column] = of_rows[inside].mean()
                    advance()
    return result


@dataclass(frozen=True)
class _Runs:
    """One response, and the log-probabilities that its rows predict with."""

    adapter: Adapter
    text: TokenBatch
    rows: Int[Tensor, " row"]
    own: Float[Tensor, "row vocabulary"]

    @staticmethod
    def prepare(adapter: Adapter, text: TokenBatch) -> _Runs:
        rows = text.response_mask[0].nonzero()[:, 0].cpu()
        logits = adapter.forward(text, logits_at=rows)
        assert logits is not None
        return _Runs(adapter, text, rows, logits[0].float().log_softmax(-1))

    def without(
        self,
        keys: Int[Tensor, " key"],
        layers: Layers,
        heads: Iterable[int] | Mapping[int, Iterable[int]] | None,
    ) -> Float[Tensor, "key row"]:
        """Return the divergence of each row when each of some keys is read by no later token."""
        count = len(keys)
        copies = TokenBatch(
            self.text.input_ids.expand(count, -1),
            self.text.attention_mask.expand(count, -1),
            self.text.response_mask.expand(count, -1),
        )
        mask = torch.zeros(count, self.text.token_count, dtype=torch.bool)
        mask[torch.arange(count), keys] = True
        with suppress_attention(self.adapter, layers=layers, heads=heads, keys=mask):
            logits = self.adapter.forward(copies, logits_at=self.rows)
        assert logits is not None
        divergence = torch.empty(count, len(self.rows))
        # One at a time: a vocabulary for every row is large.
        for i, of_key in enumerate(logits):
            other = of_key.float().log_softmax(-1)
            divergence[i] = (self.own.exp() * (self.own - other)).sum(-1).clamp(min=0.0).cpu()
        return divergence

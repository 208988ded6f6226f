"""How much later predictions depend on reading a token: attention knock-out.

FAI says how much attention later tokens give a token; `knockout_divergence` says what they lose without it.
Attention to the token is suppressed, and the next-token distributions of the later rows are compared with the
model's own, by Kullback-Leibler divergence: one forward pass for a token, where a perturbation needs many
continuations. What is left to others: suppressing (suppression), and which tokens are asked about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnprobe.adapters import Adapter, adapter_for
from attnprobe.adapters.base import Layers, resolve_layers
from attnprobe.batch import BatchLike, TokenBatch, check_unpacked
from attnprobe.head_selection import HeadSelection, HeadsLike
from attnprobe.measurement import check_fits
from attnprobe.metrics import check_horizon
from attnprobe.progress import progress_bar
from attnprobe.reductions import Horizon
from attnprobe.suppression import suppress_attention
from attnprobe.validation import ArrayLike, IntLike, as_mask, truth, whole_number


def knockout_divergence(
    model: Any,
    batch: BatchLike,
    tokens: ArrayLike,
    *,
    horizon: Horizon = (10, 50),
    layers: Layers = "all",
    heads: HeadsLike | None = None,
    batch_size: IntLike = 8,
    progress: bool = False,
) -> Float[Tensor, "batch token"]:
    """Return how much the later predictions change when no later token can read a token.

    `mean over t of KL(p_t || p'_t)` in nats, where `p_t` is the distribution that row t predicts token
    t + 1 with, `p'_t` the same with attention to token s suppressed, and t runs over the response rows
    with `s + low <= t <= s + high`, as in FAI (Eq. 10 of arXiv 2510.13554v2). At least 0; NaN for tokens
    that were not asked about, outside the response, and where no row lies in the horizon.

    What every later token reads from token s is suppressed in the layers and heads given, at whatever
    distance: rows nearer than `low` pass on what they have read, so they must not read it either.

    Args:
        model: a model that an adapter knows.
        batch: prompts and responses, as for `measure`; results are aligned with it.
        tokens: a mask `[batch, token]` of the tokens to ask about: a forward pass for each, so choose.
        horizon: `(low, high)` in tokens; `(low, None)` runs to the end of the response.
        layers: "all", "middle" or numbers: where attention is suppressed.
        heads: in which heads of these layers, in any form that `HeadSelection.of` knows, such as
            `groups["global"]`; weights do not matter. Default: all.
        batch_size: how many tokens are asked about at a time. Results do not depend on it.
        progress: whether to show a progress bar.

    Raises:
        BatchError: ids out of the vocabulary, or sequences longer than the model's context.
        ParameterError: a mask of another shape, a horizon, layers or heads that make no sense, packed
            examples, or a batch size below 1.
        UnsupportedModelError: a model whose attention cannot be suppressed.
    """
    batch = TokenBatch.of(batch)
    check_unpacked(batch.segment_ids, "suppress attention to tokens")
    low, high = check_horizon(horizon)
    mask = as_mask(tokens, "tokens", tuple(batch.input_ids.shape), device=batch.input_ids.device)
    batch_size = whole_number(batch_size, "batch_size", minimum=1)
    truth(progress, "progress")
    adapter = adapter_for(model)
    check_fits(batch.sequences()[0], adapter)
    places = _places(adapter, layers, heads)
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
                for column, key, of_rows in zip(part, keys.tolist(), divergence, strict=True):
                    inside = runs.rows >= key + low
                    if high is not None:
                        inside &= runs.rows <= key + high
                    # The mean over no row is NaN.
                    result[example, column] = of_rows[inside].mean()
                    advance()
    return result


def _places(adapter: Adapter, layers: Layers, heads: HeadsLike | None) -> dict[str, Any]:
    """Return where attention is suppressed, as `suppress_attention` wants it: layers, or heads by layer."""
    chosen = resolve_layers(layers, adapter)
    if heads is None:
        return {"layers": chosen}
    selection = HeadSelection.of(heads, chosen, adapter.head_count, model_name=adapter.model_name)
    return {"heads": selection.by_layer()}


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

    def without(self, keys: Int[Tensor, " key"], places: dict[str, Any]) -> Float[Tensor, "key row"]:
        """Return the divergence of each row when each of some keys is read by no later token."""
        count = len(keys)
        copies = TokenBatch(
            self.text.input_ids.expand(count, -1),
            self.text.attention_mask.expand(count, -1),
            self.text.response_mask.expand(count, -1),
        )
        mask = torch.zeros(count, self.text.token_count, dtype=torch.bool)
        mask[torch.arange(count), keys] = True
        with suppress_attention(self.adapter, **places, keys=mask):
            logits = self.adapter.forward(copies, logits_at=self.rows)
        assert logits is not None
        divergence = torch.empty(count, len(self.rows))
        # One key at a time: a distribution over the vocabulary for every row is large.
        for i, of_key in enumerate(logits):
            other = of_key.float().log_softmax(-1)
            divergence[i] = (self.own.exp() * (self.own - other)).sum(-1).clamp(min=0.0).cpu()
        return divergence

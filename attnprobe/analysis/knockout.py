"""How much later predictions depend on reading a token: attention knock-out.

FAI says how much attention later tokens pay to a token; `knockout_divergence`, which users call, says how
much their predictions change without it. What later tokens read from it is suppressed, and the next-token
distributions at later positions are compared with the model's own by Kullback-Leibler divergence. This takes
one forward pass per token, where a perturbation needs many continuations. What is left to others: suppressing
(suppression), and which tokens to ask about (`knockout` in knockout_trials, or the user).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnprobe.adapters import Adapter, adapter_for
from attnprobe.adapters.base import Layers, Mode
from attnprobe.batch import BatchLike, TokenBatch
from attnprobe.batch_run import MEMORY_BUDGET, TOKEN_BUDGET, check_fits
from attnprobe.head_selection import HeadsLike
from attnprobe.layout import check_unpacked
from attnprobe.metric_arguments import HorizonLike, check_horizon
from attnprobe.progress import progress_bar
from attnprobe.reductions import TRAINING_HORIZON
from attnprobe.suppression import heads_by_layer, suppress_attention
from attnprobe.validation import ArrayLike, IntLike, as_mask, choice, truth, whole_number


def knockout_divergence(
    model: Any,
    batch: BatchLike,
    tokens: ArrayLike,
    *,
    horizon: HorizonLike = TRAINING_HORIZON,
    layers: Layers = "all",
    heads: HeadsLike | None = None,
    mode: Mode = "mask",
    batch_size: IntLike | None = None,
    progress: bool = False,
) -> Float[Tensor, "batch token"]:
    """Return how much later predictions change when no later token reads a token.

    For token s, this is `mean over t of KL(p_t || p'_t)` in nats, where `p_t` is the distribution of token
    t + 1 that query t predicts, `p'_t` the same with token s suppressed, and t runs over the
    response tokens with `s + low <= t <= s + high`, as in FAI (Eq. 10 of arXiv 2510.13554v2). At least 0;
    NaN for tokens that were not asked about, outside the response, and if no query lies in the horizon.

    Token s is suppressed for all later queries, in the given layers and heads, at any distance: queries
    nearer than `low` pass on what they have read, so they must not read it either. With `mode="mask"`, it is
    masked, and the other keys take its share of the attention, so a divergence also counts what is read in
    its place. With `mode="value"`, all weights stay as they are, and only its value is missing.

    Args:
        model: a model that an adapter knows.
        batch: prompts and responses, as for `measure`; results are aligned with it.
        tokens: a mask `[batch, token]` of the tokens to ask about; each costs a forward pass.
        horizon: `(low, high)` in tokens; `(low, None)` runs to the end of the response.
        layers: a name such as "all" or "middle", or numbers: where attention is suppressed.
        heads: in which heads of these layers, in any form that `HeadSelection.of` accepts, such as
            `groups["global"]`; weights do not matter. Default: all.
        mode: "mask" or "value", as for `suppress_attention`.
        batch_size: how many tokens to run at a time, each with a copy of the text; default: as many as fit
            into 4,096 tokens and 2 GiB of logits. Results do not depend on it.
        progress: whether to show a progress bar.

    Raises:
        BatchError: ids outside the vocabulary, or sequences longer than the model's context.
        ParameterError: a mask of another shape, an invalid horizon, layers, heads or mode, packed
            examples, or a batch size below 1.
        UnsupportedModelError: a model whose attention cannot be suppressed, or without next-token logits.
    """
    batch = TokenBatch.of(batch)
    check_unpacked(batch.segment_ids, "suppress attention to tokens")
    low, high = check_horizon(horizon)
    mask = as_mask(tokens, "tokens", tuple(batch.input_ids.shape), device=batch.input_ids.device)
    choice(mode, "mode", get_args(Mode))
    batch_size = None if batch_size is None else whole_number(batch_size, "batch_size", minimum=1)
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
            if columns:
                runs = ResponseRuns.prepare(adapter, batch, example)
                for column, divergence in runs.divergences(
                    columns, (low, high), {**places, "mode": mode}, batch_size
                ):
                    result[example, column] = divergence
                    advance()
    return result


@dataclass(frozen=True)
class ResponseRuns:
    """One response, and the model's own log-probabilities of each next token.

    Attributes:
        adapter: of the model.
        text: the response with its prompt, without padding.
        shift: how many columns of padding come before it in the batch.
        queries: the columns of `text` whose predictions are compared.
        own: the model's log-probabilities at these.
    """

    adapter: Adapter
    text: TokenBatch
    shift: int
    queries: Int[Tensor, " query"]
    own: Float[Tensor, "query vocabulary"]

    @staticmethod
    def prepare(adapter: Adapter, batch: TokenBatch, example: int) -> ResponseRuns:
        """Run the model over one example."""
        text = batch.select(example).sequences()[0].to(adapter.device)
        shift = int(batch.attention_mask[example].nonzero()[0])
        queries = text.response_mask[0].nonzero()[:, 0].cpu()
        logits = adapter.forward(text, logits_at=queries)
        assert logits is not None
        return ResponseRuns(adapter, text, shift, queries, logits[0].float().log_softmax(-1))

    def divergences(
        self,
        columns: Sequence[int],
        horizon: tuple[int, int | None],
        chosen: dict[str, Any],
        batch_size: int | None,
    ) -> Iterator[tuple[int, float]]:
        """Yield each column of the batch with the mean divergence over its horizon without that token.

        `chosen` says where and how it is suppressed, as for `suppress_attention`.
        """
        low, high = horizon
        count = self.text.token_count
        batch_size = self._fitting() if batch_size is None else batch_size
        for begin in range(0, len(columns), batch_size):
            part = columns[begin : begin + batch_size]
            keys = torch.tensor([column - self.shift for column in part])
            for column, key, of_queries in zip(part, keys.tolist(), self._without(keys, chosen), strict=True):
                inside = self.queries >= key + min(low, count)
                if high is not None:
                    inside &= self.queries <= key + min(high, count)
                # The mean over no queries is NaN.
                yield column, float(of_queries[inside].mean())

    def _fitting(self) -> int:
        """Return how many copies of the text run together: as many as the budgets of `measure` allow."""
        logits = 4 * self.adapter.vocabulary_size * len(self.queries)
        return max(1, min(TOKEN_BUDGET // self.text.token_count, MEMORY_BUDGET // logits))

    def _without(self, keys: Int[Tensor, " key"], chosen: dict[str, Any]) -> Float[Tensor, "key query"]:
        """Return the divergence at each query when no later token reads each of some keys."""
        count = len(keys)
        copies = TokenBatch(
            self.text.input_ids.expand(count, -1),
            self.text.attention_mask.expand(count, -1),
            self.text.response_mask.expand(count, -1),
        )
        mask = torch.zeros(count, self.text.token_count, dtype=torch.bool)
        mask[torch.arange(count), keys] = True
        with suppress_attention(self.adapter, **chosen, keys=mask):
            logits = self.adapter.forward(copies, logits_at=self.queries)
        assert logits is not None
        divergence = torch.empty(count, len(self.queries))
        # One key at a time: a distribution over the vocabulary for every query is large.
        for i, of_key in enumerate(logits):
            other = of_key.float().log_softmax(-1)
            divergence[i] = (self.own.exp() * (self.own - other)).sum(-1).clamp(min=0.0).cpu()
        return divergence

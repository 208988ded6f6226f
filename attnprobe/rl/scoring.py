"""Scores of a policy's own rollouts, aligned with its completions, for strategies to weigh.

A rollout is what a trainer has after generating: prompts padded left, completions padded right. Its
attention is measured by the policy itself, in evaluation mode, without gradients, a few rows at a
time, and no further than the last layer of interest. What is left to others: what is measured
(measurement), the weights (credit), and when a trainer asks for them (trl, ppo).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnprobe.adapters import adapter_for
from attnprobe.adapters.base import Layers
from attnprobe.batch import TokenBatch
from attnprobe.errors import BatchError, ResultError
from attnprobe.head_statistics import HeadStatistics, HeadStatisticsProbe
from attnprobe.heads import HeadGroups, classify_heads
from attnprobe.measurement import measure
from attnprobe.metrics import Horizon
from attnprobe.probe import attach
from attnprobe.rl.advantage import response_mask_of
from attnprobe.scores import TokenScores, score_tokens


@dataclass(frozen=True)
class Rollout:
    """What a trainer has after generating.

    Attributes:
        prompt_ids, prompt_mask: padded left.
        completion_ids, completion_mask: padded right; a row may be masked entirely, as trainers do
            with truncated completions.
        tool_mask: 0 where a tool wrote, 1 where the policy did; None where there are no tools.
    """

    prompt_ids: Int[Tensor, "batch prompt"]
    prompt_mask: Tensor
    completion_ids: Int[Tensor, "batch completion"]
    completion_mask: Tensor
    tool_mask: Tensor | None = None

    @property
    def response_mask(self) -> Bool[Tensor, "batch completion"]:
        """The tokens that the policy wrote itself and is trained on."""
        return response_mask_of(self.completion_mask, self.tool_mask)

    def select(self, rows: Bool[Tensor, " batch"]) -> Rollout:
        """Return some of the rows, at the same width."""
        tools = self.tool_mask
        return Rollout(
            self.prompt_ids[rows],
            self.prompt_mask[rows],
            self.completion_ids[rows],
            self.completion_mask[rows],
            None if tools is None else tools[rows],
        )

    def batch(self) -> TokenBatch:
        """Return prompts and completions as a batch whose response is the whole completion.

        Tool output counts as response here, since later tokens read through it. A row that is masked
        entirely is given one token, so that every process of a sharded run makes the same number of
        forward passes.

        Raises:
            BatchError: shapes or masks that do not fit.
        """
        mask = self.completion_mask.bool().clone()
        if mask.shape[-1] == 0:
            raise BatchError("the completions have no tokens: there is nothing to score")
        mask[:, 0] |= ~mask.any(-1)
        return TokenBatch.from_rollout(self.prompt_ids, self.prompt_mask, self.completion_ids, mask)


def measure_rollout(
    model: Any,
    rollout: Rollout,
    *,
    layers: Layers = "middle",
    window: int = 10,
    horizon: Horizon = (10, 50),
    span: bool = True,
    batch_size: int | None = None,
    root: Any = None,
) -> HeadStatistics:
    """Return what every head does in the completions of a rollout; columns are those of the completions.

    Args:
        model: the policy, or what an adapter knows of it.
        rollout: prompts and completions.
        layers, window, horizon: as for `measure`.
        span: whether to compute span, by which heads are classified; a grouping that exists does without.
        batch_size: how many rows to run at a time; default: as many as fit `measure`'s memory budget, or
            all where a root is called.
        root: the module to call instead of the model itself, where the model's parameters are
            sharded (FSDP, DeepSpeed): those are gathered by hooks around whole forward passes of the
            root, so it is run to its end, and never stopped above the last layer of interest.

    Raises:
        BatchError: masks that do not fit, or sequences longer than the model's context.
        ParameterError: layers, window or horizon that make no sense.
        UnsupportedModelError: a model whose attention cannot be read.
        PatternError: attention that is not finite, as when the policy's weights are not.
    """
    batch = rollout.batch()
    if root is None:
        statistics = measure(
            model,
            batch,
            layers=layers,
            window=window,
            horizon=horizon,
            span=span,
            entropy=False,
            batch_size=batch_size,
        )
    else:
        probe = HeadStatisticsProbe(window=window, horizon=horizon, span=span, entropy=False)
        statistics = _measure_whole_passes(model, batch, root, layers, probe, batch_size)
    start = rollout.prompt_ids.shape[1]
    masked = ~rollout.completion_mask.to(statistics.waad.device).bool()
    empty = masked.all(-1)
    spans = statistics.span
    return replace(
        statistics,
        span=None if spans is None else spans.masked_fill(empty[:, None, None], torch.nan),
        waad=statistics.waad[..., start:].masked_fill(masked[:, None, None], torch.nan),
        fai=statistics.fai[..., start:].masked_fill(masked[:, None, None], torch.nan),
        response_mask=~masked,
    )


def score_rollout(
    statistics: HeadStatistics | None,
    heads: HeadGroups | None,
    rollout: Rollout,
    *,
    entropy: Float[Tensor, "batch completion"] | None = None,
) -> TokenScores:
    """Return the scores of the tokens that the policy wrote, NaN elsewhere.

    Args:
        statistics: of the rollout; None where no attention was measured: WAAD and FAI are NaN then.
        heads: the groups; None to classify the heads by these statistics.
        rollout: prompts and completions.
        entropy: of the distribution that each token was sampled from, in nats.

    Raises:
        ResultError: groups of other layers, heads or models, or scores that are not finite.
    """
    mask = rollout.response_mask
    if entropy is not None:
        _check_finite("entropy", entropy, mask)
        entropy = entropy.detach().masked_fill(~mask.to(entropy.device), torch.nan)
    if statistics is None:
        unknown = torch.full(mask.shape, torch.nan, device=mask.device)
        return TokenScores(unknown, unknown, entropy, mask)
    scores = score_tokens(statistics, heads or classify_heads(statistics))
    mask = mask.to(scores.waad.device)
    _check_finite("WAAD", scores.waad, mask)
    return TokenScores(
        waad=scores.waad.masked_fill(~mask, torch.nan),
        fai=scores.fai.masked_fill(~mask, torch.nan),
        entropy=None if entropy is None else entropy.to(mask.device),
        response_mask=mask,
    )


def bare_policy(policy: Any) -> Any:
    """Return a policy without what `torch.compile` and PEFT have wrapped around it."""
    policy = getattr(policy, "_orig_mod", policy)
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(policy, peft.PeftModel):
        # Its adapters live in the layers of the base model.
        return policy.get_base_model()
    return policy


@torch.no_grad()
def _measure_whole_passes(
    model: Any,
    batch: TokenBatch,
    root: Any,
    layers: Layers,
    probe: HeadStatisticsProbe,
    batch_size: int | None,
) -> HeadStatistics:
    """Measure by calls of the root module, which are run to their end."""
    adapter = adapter_for(model)
    rows, layout = batch.unpadded_rows()
    size = batch_size or rows.batch_size
    was_training = [module for module in root.modules() if module.training]
    root.eval()
    try:
        for begin in range(0, rows.batch_size, size):
            part = rows.select(slice(begin, begin + size)).to(adapter.device)
            positions = torch.arange(part.token_count, device=part.input_ids.device)[None]
            with attach(adapter, probe, layers=layers, response_mask=part.response_mask):
                root(input_ids=part.input_ids, position_ids=positions, use_cache=False, logits_to_keep=1)
    finally:
        for module in was_training:
            module.training = True
    statistics = probe.result()
    weights = statistics.response_mask.sum(-1)
    return replace(
        statistics,
        span=None if statistics.span is None else layout.responses(statistics.span, weights),
        waad=layout.tokens(statistics.waad),
        fai=layout.tokens(statistics.fai),
        response_mask=batch.response_mask.to(adapter.device),
        skipped_layers=adapter.skipped_layers,
        model_name=adapter.model_name,
    )


def _check_finite(name: str, values: Tensor, mask: Tensor) -> None:
    wrong = ~values.isfinite() & mask.to(values.device)
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        raise ResultError(
            f"{name} is {float(values[row, token])} at token {token} of row {row} of the rollout: are the "
            "policy's weights finite? They were not changed by this batch"
        )

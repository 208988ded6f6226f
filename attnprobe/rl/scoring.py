"""Token scores of a policy's own rollouts, aligned with its completions, for strategies to turn into weights.

`Rollout` is what a trainer has after generating: prompts padded left, completions padded right.
`measure_rollout` measures the policy's attention over it (in evaluation mode, without gradients, a few
completions at a time), and `score_rollout` turns that into token scores. `RolloutCredit` calls both; your
own training loop may call them directly. What is left to others: what is measured (measurement), the weights
(credit), and when a trainer asks for them (rollout_credit).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnprobe.adapters.base import Layers
from attnprobe.batch import TokenBatch
from attnprobe.errors import BatchError, ResultError
from attnprobe.head_groups import GroupsLike
from attnprobe.head_statistics import HeadStatistics
from attnprobe.heads import classify_heads
from attnprobe.measurement import measure
from attnprobe.metric_arguments import HorizonLike
from attnprobe.reductions import TRAINING_HORIZON
from attnprobe.scores import TokenScores, score_tokens
from attnprobe.validation import ArrayLike, as_float_tensor, as_mask, as_tensor, finite, instance, truth

_AXES = "completion, token"


@dataclass(frozen=True, init=False)
class Rollout:
    """Prompts with the completions that a policy sampled for them; lists and arrays become tensors.

    Attributes:
        prompt_ids, prompt_mask: padded left.
        completion_ids, completion_mask: padded right; a completion may be fully masked, as trainers mask
            truncated ones.
        tool_mask: False where a tool wrote, True where the policy did; None if there are no tools.

    Raises:
        BatchError: ids that are negative or not whole numbers, shapes that do not match, or masks that hold
            anything but 0 and 1.

    >>> rollout = Rollout([[5, 6]], [[1, 1]], [[7, 8, 9]], [[1, 1, 1]], tool_mask=[[1, 0, 1]])
    >>> rollout.response_mask
    tensor([[ True, False,  True]])
    """

    prompt_ids: Int[Tensor, "completion prompt"]
    prompt_mask: Bool[Tensor, "completion prompt"]
    completion_ids: Int[Tensor, "completion token"]
    completion_mask: Bool[Tensor, "completion token"]
    tool_mask: Bool[Tensor, "completion token"] | None = None

    def __init__(
        self,
        prompt_ids: ArrayLike,
        prompt_mask: ArrayLike,
        completion_ids: ArrayLike,
        completion_mask: ArrayLike,
        tool_mask: ArrayLike | None = None,
    ) -> None:
        prompts = _token_ids(prompt_ids, "prompt_ids")
        completions = _token_ids(completion_ids, "completion_ids")
        if prompts.shape[0] != completions.shape[0]:
            raise BatchError(
                f"there must be a prompt for each completion; got {prompts.shape[0]} prompts and "
                f"{completions.shape[0]} completions"
            )
        if completions.numel() == 0:
            raise BatchError(f"the completions {list(completions.shape)} have no tokens to be scored")
        # A frozen dataclass with its own __init__, since it takes lists and arrays but stores tensors.
        for name, value in (
            ("prompt_ids", prompts),
            ("prompt_mask", _mask_of(prompts, prompt_mask, "prompt_mask")),
            ("completion_ids", completions),
            ("completion_mask", _mask_of(completions, completion_mask, "completion_mask")),
            ("tool_mask", None if tool_mask is None else _mask_of(completions, tool_mask, "tool_mask")),
        ):
            object.__setattr__(self, name, value)

    @property
    def response_mask(self) -> Bool[Tensor, "completion token"]:
        """Which tokens the policy wrote itself and is trained on: neither padding nor tool output."""
        return self.completion_mask if self.tool_mask is None else self.completion_mask & self.tool_mask

    def select(self, completions: ArrayLike) -> Rollout:
        """Return some of the completions, chosen by a mask `[completion]`; their width stays the same.

        Raises:
            BatchError: a mask of another length, or one that holds anything but 0 and 1.
        """
        chosen = as_mask(
            completions,
            "completions",
            tuple(self.completion_ids.shape[:1]),
            axes="completion",
            device=self.completion_ids.device,
            error=BatchError,
        )
        return Rollout(
            self.prompt_ids[chosen],
            self.prompt_mask[chosen],
            self.completion_ids[chosen],
            self.completion_mask[chosen],
            None if self.tool_mask is None else self.tool_mask[chosen],
        )

    def batch(self) -> TokenBatch:
        """Return prompts and completions as a batch whose response is what the policy wrote itself.

        The policy reads what a tool wrote, but that does not count in FAI and span. A fully masked
        completion is given one token, so that every process of a sharded run makes the same number of
        forward passes.

        Raises:
            BatchError: prompts that are not padded on the left, or completions not padded on the right.
        """
        real, own = self.completion_mask.clone(), self.response_mask.clone()
        for mask in (real, own):
            mask[:, 0] |= ~mask.any(-1)
        return TokenBatch.from_ids(
            torch.cat([self.prompt_ids, self.completion_ids], dim=1),
            torch.cat([self.prompt_mask, real], dim=1),
            response_mask=torch.cat([torch.zeros_like(self.prompt_mask), own], dim=1),
        )


def _token_ids(value: Any, name: str) -> Int[Tensor, "completion token"]:
    ids = as_tensor(value, name, BatchError)
    if ids.ndim != 2:
        raise BatchError(f"{name} must be [{_AXES}]; got {list(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise BatchError(f"{name} must be whole numbers; got {str(ids.dtype).removeprefix('torch.')}")
    if ids.numel() and int(ids.min()) < 0:
        raise BatchError(f"{name} must not be negative, not even on padding; got {int(ids.min())}")
    return ids


def _mask_of(ids: Tensor, mask: Any, name: str) -> Bool[Tensor, "completion token"]:
    return as_mask(mask, name, tuple(ids.shape), axes=_AXES, device=ids.device, error=BatchError)


def measure_rollout(
    model: Any,
    rollout: Rollout,
    *,
    layers: Layers = "middle",
    window: int = 10,
    horizon: HorizonLike = TRAINING_HORIZON,
    span: bool = True,
    batch_size: int | None = None,
) -> HeadStatistics:
    """Return the statistics of every head over a rollout; positions are those of the completions.

    Args:
        model: the policy, or an adapter for it.
        rollout: prompts and completions.
        layers, window, horizon: as for `measure`.
        span: whether to compute span, by which heads are classified; not needed if they already are.
        batch_size: how many completions to run at a time; default: as many as fit `measure`'s memory
            budget. Set it if all processes must make the same number of forward passes.

    Raises:
        BatchError: ids outside the vocabulary, masks that do not match, or sequences longer than the model's
            context.
        ParameterError: an invalid `layers`, `window`, `horizon`, `span` or `batch_size`.
        UnsupportedModelError: a model whose attention cannot be read.
        PatternError: attention that is not finite, as when the policy's weights are not.
    """
    instance(rollout, Rollout, "rollout")
    statistics = measure(
        model,
        rollout.batch(),
        layers=layers,
        window=window,
        horizon=horizon,
        span=truth(span, "span"),
        entropy=False,
        share_on=(),
        span_ignores=(),
        batch_size=batch_size,
    )
    start = rollout.prompt_ids.shape[1]
    own = rollout.response_mask.to(statistics.waad.device)
    empty, spans = ~own.any(-1), statistics.span
    return replace(
        statistics,
        span=None if spans is None else spans.masked_fill(empty[:, None, None], torch.nan),
        waad=statistics.waad[..., start:].masked_fill(~own[:, None, None], torch.nan),
        fai=statistics.fai[..., start:].masked_fill(~own[:, None, None], torch.nan),
        response_mask=own,
        input_ids=rollout.completion_ids.to(own.device),
    )


def score_rollout(
    statistics: HeadStatistics | None,
    heads: GroupsLike | None,
    rollout: Rollout,
    *,
    entropy: ArrayLike | None = None,
) -> TokenScores:
    """Return the scores of the tokens that the policy wrote, `[completion, token]`; NaN elsewhere.

    Args:
        statistics: of the rollout; None if no attention was measured: WAAD and FAI are then NaN.
        heads: the head groups, in any form that `score_tokens` takes; None: heads are classified by these
            statistics.
        rollout: prompts and completions.
        entropy: `[completion, token]`, of the distribution that each token was sampled from, in nats.

    Raises:
        ParameterError: arguments of the wrong type.
        ResultError: statistics or entropy that do not have the shape of the completions, groups of other
            layers, heads or models, or scores that are not finite.
    """
    instance(rollout, Rollout, "rollout")
    mask = rollout.response_mask
    if entropy is not None:
        entropy = as_float_tensor(entropy, "entropy", tuple(mask.shape), axes=_AXES, error=ResultError)
        entropy = _own(entropy.detach(), mask, "the entropy")
    if statistics is None:
        unknown = torch.full(mask.shape, torch.nan, device=mask.device)
        return TokenScores(unknown, unknown, entropy, mask)
    instance(statistics, HeadStatistics, "statistics", "measure_rollout() returns one")
    if statistics.response_mask.shape != mask.shape:
        raise ResultError(
            f"the statistics must be of the rollout's completions [{_AXES}] = {list(mask.shape)}; they are "
            f"of {list(statistics.response_mask.shape)}"
        )
    scores = score_tokens(statistics, classify_heads(statistics) if heads is None else heads)
    mask = mask.to(scores.waad.device)
    receivers = scores.receiver_fai
    return replace(
        scores,
        waad=_own(scores.waad, mask, "WAAD"),
        fai=scores.fai.masked_fill(~mask, torch.nan),
        receiver_fai=None if receivers is None else receivers.masked_fill(~mask, torch.nan),
        entropy=None if entropy is None else entropy.to(mask.device),
        response_mask=mask,
    )


def _own(values: Float[Tensor, "completion token"], mask: Tensor, name: str) -> Tensor:
    """Return the values of the policy's own tokens, all of which must be finite; NaN elsewhere."""
    mask = mask.to(values.device)
    try:
        finite(values.masked_fill(~mask, 0.0), f"{name} of the rollout", _AXES, ResultError)
    except ResultError as error:
        raise ResultError(
            f"{error}: are the policy's weights finite? This rollout did not change them"
        ) from None
    return values.masked_fill(~mask, torch.nan)


def bare_policy(policy: Any) -> Any:
    """Return a policy without the wrappers of `torch.compile` and PEFT."""
    policy = getattr(policy, "_orig_mod", policy)
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(policy, peft.PeftModel):
        # Its adapters live in the layers of the base model.
        return policy.get_base_model()
    return policy

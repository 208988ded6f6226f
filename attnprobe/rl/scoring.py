"""Token scores of a policy's own rollouts, aligned with its completions, for strategies to turn into weights.

`measure_rollout` measures the policy's attention over a `Rollout` (in evaluation mode, without gradients, a
few completions at a time), and `score_rollout` turns that into token scores. `RolloutCredit` calls both; your
own training loop may call them directly. What is left to others: layouts (rollout), what is measured
(measurement), the weights (credit), and when a trainer asks for them (rollout_credit).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.adapters.base import Layers
from attnprobe.errors import ParameterError, ResultError
from attnprobe.head_groups import GroupsLike
from attnprobe.head_statistics import HeadStatistics
from attnprobe.heads import classify_heads
from attnprobe.measurement import measure
from attnprobe.metric_arguments import HorizonLike
from attnprobe.reductions import TRAINING_HORIZON, Horizon
from attnprobe.rl.grouping import Groups
from attnprobe.rl.rollout import Rollout
from attnprobe.scores import TokenScores, score_tokens
from attnprobe.validation import ArrayLike, IntLike, as_float_tensor, finite, instance, truth

_AXES = "completion, token"


def measure_rollout(
    model: Any,
    rollout: Rollout,
    *,
    layers: Layers = "middle",
    window: int = 10,
    horizon: HorizonLike = TRAINING_HORIZON,
    span: bool = True,
    batch_size: IntLike | None = None,
    token_budget: IntLike | None = None,
) -> HeadStatistics:
    """Return the statistics of every head over a rollout; positions are those of the completions.

    Args:
        model: the policy, or an adapter for it.
        rollout: prompts and completions.
        layers, window, horizon: as for `measure`.
        span: whether to compute span, by which heads are classified; not needed if they already are.
        batch_size, token_budget: how many completions and tokens to run at a time, as for `measure`.

    Raises:
        BatchError: ids outside the vocabulary, masks that do not match, or sequences longer than the model's
            context.
        ParameterError: an invalid `layers`, `window`, `horizon`, `span`, `batch_size` or
            `token_budget`.
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
        token_budget=token_budget,
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


def scores_of_part(
    part: HeadStatistics | TokenScores | None,
    heads: Groups | None,
    rollout: Rollout,
    *,
    entropy: Float[Tensor, "completion token"] | None,
) -> TokenScores:
    """Return the scores of a part of a rollout; of its statistics, unless it is given as scores already."""
    if isinstance(part, TokenScores):
        return part if entropy is None else replace(part, entropy=entropy)
    return score_rollout(None if heads is None else part, heads, rollout, entropy=entropy)


def check_given(
    given: Any,
    rollout: Rollout,
    *,
    layers: tuple[int, ...],
    window: int,
    horizon: Horizon,
    regroups: bool,
) -> None:
    """Check that statistics, or scores, are of a rollout, and measured in these layers and by these settings.

    Raises:
        ParameterError: they are not; or heads are to be classified, and there is no span to do it by.
    """
    shape = list(rollout.completion_ids.shape)
    if isinstance(given, TokenScores):
        found = list(given.response_mask.shape)
        if found != shape:
            raise ParameterError(f"the scores must be [{_AXES}] = {shape}; they are {found}")
        if regroups:
            raise ParameterError("heads are to be classified at this step: pass statistics with span")
        return
    kinds = "measure_rollout() and score_rollout() return statistics and scores"
    instance(given, HeadStatistics, "what was measured", kinds)
    for name, ours in (("layers", layers), ("window", window), ("horizon", horizon)):
        theirs = getattr(given, name)
        if theirs != ours:
            raise ParameterError(f"the statistics have {name} {theirs}, but credit uses {ours}")
    if given.waad.shape[0] != shape[0]:
        raise ParameterError(
            f"the statistics are of {given.waad.shape[0]} completions, but the rollout has {shape[0]}"
        )
    if regroups and given.span is None:
        raise ParameterError("heads are to be classified at this step, but the statistics have no span")


def scores_of_all(
    parts: Sequence[tuple[Bool[Tensor, " completion"], TokenScores]], rollout: Rollout
) -> TokenScores | None:
    """Return the scores of all completions, from those of parts of them; NaN for what no part holds.

    Args:
        parts: which completions a part holds, and their scores; None is returned if there are no parts.
        rollout: prompts and completions, on whose device the scores will be.
    """
    if not parts:
        return None
    device, (_, first) = rollout.completion_ids.device, parts[0]
    joined: dict[str, Any] = {}
    for each, values in first._tensors():
        empty: Any = torch.nan if values.is_floating_point() else 0
        joined[each.name] = values.new_full(
            (len(rollout.completion_ids), *values.shape[1:]), empty, device=device
        )
    for chosen, scores in parts:
        for each, values in scores._tensors():
            joined[each.name][chosen.to(device)] = values.to(device)
    return replace(first, **joined)


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

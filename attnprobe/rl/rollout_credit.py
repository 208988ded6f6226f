"""RolloutCredit: the one mechanism that measures a rollout, groups heads, and asks a strategy for weights.

Every trainer uses it: your own training loop and the reference PPO (ppo) use the class as it is, and
`attach_credit` (trl) overrides the few methods in which a TRL trainer differs. For each rollout it decides
which completions matter, measures the policy's attention over them, classifies heads when that is due,
scores the tokens, and calls the strategy. What is left to others: the pieces (scoring, grouping, credit),
and what is done with the weights (advantage).
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.adapters.base import Layers
from attnprobe.errors import ParameterError
from attnprobe.head_groups import GroupsLike
from attnprobe.head_statistics import HeadStatistics
from attnprobe.heads import group_heads
from attnprobe.metric_arguments import HorizonLike, check_horizon, check_window
from attnprobe.reductions import TRAINING_HORIZON
from attnprobe.rl.advantage import Signs, check_signs, credit_weights, is_weighted, spread_advantages
from attnprobe.rl.credit import Credit, credit_of, needs_of
from attnprobe.rl.grouping import Groups, HeadGrouping, choose_heads
from attnprobe.rl.scoring import Rollout, bare_policy, measure_rollout, score_rollout
from attnprobe.scores import TokenScores
from attnprobe.validation import ArrayLike, IntLike, as_float_tensor, brief, instance, whole_number


@dataclass(frozen=True)
class WeighedRollout:
    """The weights of a rollout's tokens, and what they were computed from.

    Attributes:
        gamma: the weights as they are applied; 1 where `signs` leaves an advantage out.
        matters: the tokens whose weight can matter: their advantage is not 0, and `signs` includes it.
        measured: which completions were measured.
        scores: the token scores of the measured completions; None if there are none.
    """

    gamma: Float[Tensor, "completion token"]
    matters: Bool[Tensor, "completion token"]
    measured: Bool[Tensor, " completion"]
    scores: TokenScores | None


class RolloutCredit:
    """Computes the weights of the tokens of a policy's rollouts.

    A trainer that differs from a plain loop overrides `model`, `grouping`, `token_entropy`,
    `sum_over_processes`, `precision` or `measures_all`; each says what it is for.

    Args:
        policy: the model that wrote the rollouts; it may be wrapped by PEFT and `torch.compile`.
        credit: the strategy, such as `CoupledRhythmCredit()`, or any callable `scores -> gamma`.
        layers: where to measure attention: "middle" (the paper's five layers of the middle third), "all" or
            layer numbers.
        heads: fixed head groups, in any form that `score_tokens` takes, with weights if you like; their
            layers are measured ("all": all heads of `layers`). None: heads are classified on the rollouts
            themselves.
        reclassify_every: how many steps to wait before classifying heads again; None: they are classified
            only once.
        window: WAAD's window, in tokens.
        horizon: FAI's horizon `(low, high)`, in tokens.
        batch_size: how many completions to measure at a time; default: as many as fit `measure`'s memory
            budget.
        signs: which advantages are weighted: "both" (v2 of the paper), "positive" (v1) or "negative".

    Attributes:
        credit: the strategy.
        signs: which advantages are weighted.
        heads: the head groups that were given, if any.
        layers: the layers that are measured; empty if the strategy needs no attention.

    Raises:
        ParameterError: an invalid parameter.
        UnsupportedModelError: a policy whose attention cannot be read.
    """

    def __init__(
        self,
        policy: Any,
        credit: Credit,
        *,
        layers: Layers = "middle",
        heads: GroupsLike | None = None,
        reclassify_every: IntLike | None = 10,
        window: int = 10,
        horizon: HorizonLike = TRAINING_HORIZON,
        batch_size: IntLike | None = None,
        signs: Signs = "both",
    ) -> None:
        self.credit, self.signs = credit, check_signs(signs)
        self.needs = needs_of(credit)
        self.window, self.horizon = check_window(window), check_horizon(horizon)
        self.batch_size = None if batch_size is None else whole_number(batch_size, "batch_size", minimum=1)
        self._policy = bare_policy(policy)
        self._grouping = HeadGrouping(reclassify_every)
        reads_attention = bool(self.needs & {"waad", "fai"})
        self.heads: Groups | None = None
        self.layers: tuple[int, ...] = ()
        if reads_attention:
            # Not the bare policy: an adapter refuses wrappers that do more than to change layers.
            self.layers, self.heads = choose_heads(policy, layers, heads)

    # ---- what a trainer may override ----------------------------------------------------------

    def model(self) -> Any:
        """Return what is measured: the policy, or an `Adapter` that runs it differently."""
        return self._policy

    @property
    def grouping(self) -> HeadGrouping:
        """The head groups and when to classify heads again; it belongs in checkpoints."""
        return self._grouping

    @property
    def measures_all(self) -> bool:
        """Whether to measure all completions, so that all processes make the same number of passes."""
        return False

    def token_entropy(self, rollout: Rollout) -> Float[Tensor, "completion token"] | None:
        """Return the entropy of each token, if the strategy needs it and `weigh` is not given it."""
        return None

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context in which the policy is measured: that of a trainer's mixed precision, if any."""
        return nullcontext()

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor, of the same shape everywhere, over all processes that train the policy.

        By default these are the processes of `torch.distributed`, if it is initialised: heads are then
        classified on the rollouts of all of them.
        """
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    # ---- one rollout --------------------------------------------------------------------------

    @property
    def groups(self) -> Groups | None:
        """The head groups in use: those given, or the latest of the run; None before the first."""
        return self.heads if self.heads is not None else self.grouping.groups

    def weigh(
        self, rollout: Rollout, advantages: ArrayLike, step: IntLike, *, entropy: ArrayLike | None = None
    ) -> Float[Tensor, "completion token"]:
        """Return gamma as it is applied, `[completion, token]`; 1 where `signs` leaves an advantage out.

        Completions in which no weight can matter are not measured, and keep gamma 1: those whose advantages
        are all 0 or left out.

        Args:
            rollout: the prompts, and what the policy wrote.
            advantages: `[completion]` or `[completion, token]`; they decide which completions are
                measured and which tokens are weighted, and are not changed.
            step: the step of the run, which decides when heads are classified again.
            entropy: `[completion, token]`, of the distribution that each token was sampled from, in nats,
                for strategies that need it.

        Raises:
            BatchError: a rollout that the policy cannot read.
            ParameterError: advantages or entropy of another shape, or a step that is not a whole number.
            ResultError: scores or weights that are not finite, or entropy that is needed but not given.
        """
        return self.weigh_with_scores(rollout, advantages, step, entropy=entropy).gamma

    def weigh_with_scores(
        self, rollout: Rollout, advantages: ArrayLike, step: IntLike, *, entropy: ArrayLike | None = None
    ) -> WeighedRollout:
        """Return gamma as `weigh` does, with the scores that it was computed from."""
        instance(rollout, Rollout, "rollout")
        now = whole_number(step, "step")
        spread = spread_advantages(advantages, rollout.response_mask)
        matters = is_weighted(spread, self.signs) & (spread != 0)
        needed = matters.any(-1)
        regroups = bool(self.layers) and self.heads is None and self.grouping.is_due(now)
        measured = torch.ones_like(needed) if regroups or self.measures_all else needed
        gamma = torch.ones(spread.shape, device=needed.device)
        if not bool(measured.any()):
            return WeighedRollout(gamma, matters, measured, None)
        part, statistics = rollout.select(measured), None
        if self.layers:
            with self.precision():
                statistics = measure_rollout(
                    self.model(),
                    part,
                    layers=self.layers,
                    window=self.window,
                    horizon=self.horizon,
                    span=regroups,
                    batch_size=self.batch_size,
                )
            if regroups:
                self._classify(statistics, now)
        groups = self.groups if self.layers else None
        if entropy is not None:
            whole = as_float_tensor(entropy, "entropy", tuple(spread.shape), axes="completion, token")
            entropy = whole[measured.to(whole.device)]
        elif "entropy" in self.needs:
            entropy = self.token_entropy(part)
        scores = score_rollout(None if groups is None else statistics, groups, part, entropy=entropy)
        gamma[measured] = credit_of(self.credit, scores).to(gamma)
        gamma = torch.where(needed[:, None], gamma, 1.0)
        applied = credit_weights(spread, gamma, rollout.response_mask, signs=self.signs)
        return WeighedRollout(applied, matters, measured, scores)

    def _classify(self, statistics: HeadStatistics, step: int) -> None:
        """Group heads by their mean span over the completions of all processes, and keep the groups."""
        assert statistics.span is not None
        span = statistics.span.double()
        # Sums and counts rather than means: processes may have different numbers of completions.
        total, count = self.sum_over_processes(torch.stack([span.nansum(0), (~span.isnan()).double().sum(0)]))
        # Fully masked completions say nothing; the grouping stays due.
        if bool((count > 0).any()):
            groups = group_heads((total / count).to(statistics.span.dtype))
            self.grouping.keep(replace(groups, layers=statistics.layers), step)

    def settings(self) -> dict[str, str]:
        """Return what the weights depend on, as text: strategy, parameters, signs, and what is measured.

        A checkpoint stores it, so that a run cannot be resumed with different settings.

        >>> from attnprobe.rl import RandomCredit
        >>> from attnprobe.testing.tiny_models import tiny_model
        >>> settings = RolloutCredit(tiny_model("llama"), RandomCredit(seed=3), layers=[1]).settings()
        >>> settings["credit"], settings["credit.seed"], settings["layers"]
        ('RandomCredit', '3', '(1,)')
        """
        kind = self.credit if inspect.isroutine(self.credit) else type(self.credit)
        found = {"credit": kind.__qualname__, "signs": repr(self.signs)}
        if dataclasses.is_dataclass(self.credit):
            parameters = dataclasses.fields(self.credit)
            found |= {f"credit.{each.name}": _told(getattr(self.credit, each.name)) for each in parameters}
        if self.layers:
            found |= {name: repr(getattr(self, name)) for name in ("layers", "window", "horizon")}
            found["reclassify_every"] = repr(self.grouping.reclassify_every)
            found["heads"] = "classified by the run" if self.heads is None else _digest(self.heads)
        return found


def _told(value: Any) -> str:
    # The repr of a function is its address, which differs in the process that resumes.
    return str(value.__qualname__) if inspect.isroutine(value) else repr(value)


def _digest(heads: Groups) -> str:
    told = json.dumps([sorted(heads[group].heads) for group in ("local", "global")])
    return f"given, {hashlib.blake2b(told.encode(), digest_size=6).hexdigest()}"


def check_options(options: Any, taker: Callable[..., Any], name: str) -> dict[str, Any]:
    """Return options as a dict, after checking that a function takes them as keyword arguments.

    None stands for no options.

    Raises:
        ParameterError: anything but a mapping, or names that the function does not take.

    >>> check_options({"window": 5}, RolloutCredit, "credit_options")
    {'window': 5}
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise ParameterError(f"{name} must be a mapping from names to values; got {brief(options)}")
    parameters = inspect.signature(taker).parameters.values()
    known = [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    if unknown := [option for option in options if option not in known]:
        raise ParameterError(f"{name} can have {', '.join(known)}; got {', '.join(map(repr, unknown))}")
    return dict(options)

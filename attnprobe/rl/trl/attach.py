"""Credit for a TRL trainer that already runs: `attach_credit` gives it, `detach` takes it away again.

After each generation the policy's own attention is measured over the completions and a strategy turns
the scores into weights, which travel with the batch; when its loss is computed, they enter by the route
that the canary found to work. Nothing of TRL is patched but two methods of the one trainer object, so
overrides of subclasses stay in force. Evaluation is left as it was.

What is left to others: what is read of a trainer (trainers), scores (scoring), weights (credit), the
ways into a loss (routes), and what goes into checkpoints (lifecycle).
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe import metrics
from attnprobe.adapters.base import Layers
from attnprobe.errors import ParameterError, TrainerError
from attnprobe.head_statistics import HeadStatistics
from attnprobe.heads import HeadGroups, classify_heads
from attnprobe.metrics import Horizon
from attnprobe.rhythm import find_peaks
from attnprobe.rl.advantage import credit_weights
from attnprobe.rl.credit import Credit, credit_of, needs_of
from attnprobe.rl.grouping import choose_layers
from attnprobe.rl.scoring import Rollout, measure_rollout, score_rollout
from attnprobe.rl.trl.callback import CreditCallback
from attnprobe.rl.trl.routes import ROUTES, Through, choose_route
from attnprobe.rl.trl.trainers import (
    HANDLE,
    check_trainer,
    is_sharded,
    policy_of,
    rollout_of,
    token_entropy,
)
from attnprobe.scores import TokenScores

_GENERATE = "_generate_and_score_completions"
_LOSS = "compute_loss"
_WEIGHTS = "credit_weights"


def attach_credit(
    trainer: Any,
    credit: Credit,
    *,
    layers: Layers = "middle",
    heads: HeadGroups | None = None,
    reclassify_every: int | None = 10,
    window: int = 10,
    horizon: Horizon = (10, 50),
    batch_size: int | None = None,
    through: Through = "auto",
) -> CreditHandle:
    """Weight the tokens of a trainer's objective by a strategy, from now on until `detach`.

    Args:
        trainer: a `trl.GRPOTrainer`, a `trl.RLOOTrainer`, or of a subclass; before or between calls
            of `train`.
        credit: the strategy, such as `CoupledRhythmCredit()`, or any callable `scores -> gamma`.
        layers: where attention is measured: "middle" (the paper's five of the middle third), "all" or
            layer numbers.
        heads: a grouping of heads that is kept; its layers are the ones measured. None: heads are
            classified by the run's own rollouts, over all processes.
        reclassify_every: group heads anew after so many optimizer steps; None: once, and keep it. All
            responses are measured then; otherwise those with a positive advantage, which alone is
            weighted.
        window: WAAD's window, in tokens.
        horizon: FAI's horizon `(low, high)`, in tokens.
        batch_size: how many rows to measure at a time; default: the trainer's own per device.
        through: how weights enter the loss: "advantages", one for each token, or "gradient", for losses
            with one advantage a sequence; "auto" takes the first that the trainer honours.

    Raises:
        MissingDependencyError: trl is not installed.
        TrainerError: a trainer that is not understood, has credit already, or whose loss does not
            honour a weight for each token, with the reason.
        ParameterError: parameters that make no sense.
        UnsupportedModelError: a policy whose attention cannot be read.
    """
    check_trainer(trainer)
    metrics.check_window(window)
    metrics.check_horizon(horizon)
    needs = needs_of(credit)
    if batch_size is not None and batch_size < 1:
        raise ParameterError(f"batch_size must be at least 1, got {batch_size}")
    callback = CreditCallback(reclassify_every)
    chosen: tuple[int, ...] = ()
    if needs & {"waad", "fai"}:
        chosen = choose_layers(policy_of(trainer), layers, heads)
    handle = CreditHandle(
        trainer,
        credit,
        needs,
        choose_route(trainer, through),
        heads=heads,
        layers=chosen,
        window=window,
        horizon=horizon,
        batch_size=batch_size,
    )
    handle._install(callback)
    return handle


class CreditHandle:
    """What `attach_credit` returns: says how credit is given, and takes it away.

    Attributes:
        credit: the strategy.
        layers: the layers that are measured; empty where the strategy needs no attention.
        route: "advantages" or "gradient": how weights enter the loss.
    """

    def __init__(
        self,
        trainer: Any,
        credit: Credit,
        needs: frozenset[str],
        route: str,
        *,
        heads: HeadGroups | None,
        layers: tuple[int, ...],
        window: int,
        horizon: Horizon,
        batch_size: int | None,
    ) -> None:
        self.credit = credit
        self.layers = layers
        self.route = route
        self._trainer = trainer
        self._needs = needs
        self._heads = heads
        self._measuring: dict[str, Any] = {"layers": layers, "window": window, "horizon": horizon}
        self._batch_size = batch_size
        self._before: dict[str, Any] = {}
        self._wrappers: dict[str, Any] = {}

    @property
    def groups(self) -> HeadGroups | None:
        """The grouping of heads in use; None before the first rollout."""
        callback = self._callback()
        return self._heads or (None if callback is None else callback.groups)

    def detach(self) -> None:
        """Take credit away: the trainer is what it was before; a second call does nothing.

        Raises:
            TrainerError: something else has wrapped the trainer's methods since, and must go first.
        """
        trainer = self._trainer
        if vars(trainer).get(HANDLE) is not self:
            return
        for name, wrapper in self._wrappers.items():
            if vars(trainer).get(name) is not wrapper:
                raise TrainerError(
                    f"{type(trainer).__name__}.{name} was replaced after credit was attached: undo that "
                    "first, then detach"
                )
        for name in self._wrappers:
            delattr(trainer, name)
            if name in self._before:
                setattr(trainer, name, self._before[name])
        while (callback := self._callback()) is not None:
            trainer.remove_callback(callback)
        delattr(trainer, HANDLE)

    def _install(self, callback: CreditCallback) -> None:
        trainer = self._trainer
        generate, compute_loss = getattr(trainer, _GENERATE), getattr(trainer, _LOSS)
        route = ROUTES[self.route]

        def generate_and_weigh(inputs: Any) -> Any:
            output = generate(inputs)
            # An evaluation's loss stays comparable with that of other runs.
            if trainer.model.training:
                output[_WEIGHTS] = self._weigh(output)
            return output

        def compute_weighted_loss(model: Any, inputs: Any, **kwargs: Any) -> Any:
            weights = inputs.get(_WEIGHTS)
            # A batch that was generated before credit was attached has none.
            if weights is None:
                return compute_loss(model, inputs, **kwargs)
            rest = {key: value for key, value in inputs.items() if key != _WEIGHTS}
            return route(trainer, compute_loss, weights, model, rest, **kwargs)

        self._wrappers = {_GENERATE: generate_and_weigh, _LOSS: compute_weighted_loss}
        self._before = {name: vars(trainer)[name] for name in self._wrappers if name in vars(trainer)}
        for name, wrapper in self._wrappers.items():
            setattr(trainer, name, wrapper)
        trainer.add_callback(callback)
        setattr(trainer, HANDLE, self)

    def _callback(self) -> CreditCallback | None:
        # Looked up each time: a trainer may replace its callbacks by restored ones.
        callbacks = self._trainer.callback_handler.callbacks
        return next((callback for callback in callbacks if isinstance(callback, CreditCallback)), None)

    # ---- one rollout --------------------------------------------------------------------------

    def _weigh(self, output: dict[str, Any]) -> Float[Tensor, "batch token"]:
        """Return the factor of each token's advantage, for what the trainer has just generated.

        Weights matter where the advantage is positive: only these responses are measured, unless heads
        are to be grouped, by all responses, or parameters are sharded: then every process has to make
        the same number of forward passes.
        """
        started = time.perf_counter()
        trainer = self._trainer
        rollout = rollout_of(trainer, output, self._needs)
        advantages = output["advantages"].detach()
        weights = torch.ones(rollout.completion_ids.shape, device=rollout.completion_ids.device)
        gains = advantages > 0 if advantages.ndim == 1 else (advantages > 0).any(-1)
        regroups = self._heads is None and bool(self.layers) and self._is_due()
        rows = torch.ones_like(gains) if regroups or is_sharded(trainer) else gains
        tally = _Tally()
        if bool(rows.any()):
            scores = self._score(rollout.select(rows), regroups)
            gamma = credit_of(self.credit, scores)
            weighed = credit_weights(advantages[rows], gamma, scores.response_mask).to(weights)
            weights[gains] = weighed[gains[rows]]
            tally = _Tally.of(scores, gamma, weighed, gains[rows], bool(self.layers))
        self._log(tally, time.perf_counter() - started)
        return weights

    def _score(self, rollout: Rollout, regroups: bool) -> TokenScores:
        trainer = self._trainer
        size = self._batch_size or trainer.args.per_device_train_batch_size
        statistics = groups = entropy = None
        if self.layers:
            root = trainer.model if is_sharded(trainer) else None
            statistics = measure_rollout(
                policy_of(trainer), rollout, **self._measuring, span=regroups, batch_size=size, root=root
            )
            groups = self._group(statistics) if regroups else self.groups
        if "entropy" in self._needs:
            entropy = token_entropy(trainer, rollout, size)
        return score_rollout(None if groups is None else statistics, groups, rollout, entropy=entropy)

    def _is_due(self) -> bool:
        callback = self._callback()
        if callback is None:
            raise TrainerError("the callback of attach_credit was removed: call detach() to end credit")
        return callback.is_due(self._trainer.state.global_step)

    def _group(self, statistics: HeadStatistics) -> HeadGroups | None:
        """Return a new grouping, by the responses of all processes."""
        callback = self._callback()
        assert callback is not None
        assert statistics.span is not None
        span = self._trainer.accelerator.gather(statistics.span.contiguous())
        # Of completions that are all masked nothing is known; the grouping stays due.
        if bool((~span.isnan()).any()):
            callback.keep(classify_heads(replace(statistics, span=span)), self._trainer.state.global_step)
        return callback.groups

    def _log(self, tally: _Tally, seconds: float) -> None:
        """Put what was done into the trainer's own log, over all processes."""
        accelerator = self._trainer.accelerator
        counts = [*dataclasses.astuple(tally), seconds]
        total = accelerator.reduce(torch.tensor(counts, device=accelerator.device), reduction="sum").tolist()
        tally, seconds = _Tally(*total[:-1]), total[-1] / accelerator.num_processes
        log = self._trainer._metrics["train"]
        # Of no token there is no mean: the trainer leaves NaN out of its averages.
        share = 1 / tally.tokens if tally.tokens else math.nan
        log["credit/gamma_mean"].append(tally.gamma * share)
        log["credit/amplified_share"].append(tally.amplified * share)
        log["credit/seconds"].append(seconds)
        if self.layers:
            log["credit/preplans_per_100_tokens"].append(100 * tally.preplans * share)
            log["credit/anchors_per_100_tokens"].append(100 * tally.anchors * share)


@dataclasses.dataclass(frozen=True)
class _Tally:
    """Sums over the tokens of the responses with a positive advantage, of one process or of all."""

    tokens: float = 0.0
    gamma: float = 0.0
    amplified: float = 0.0
    preplans: float = 0.0
    anchors: float = 0.0

    @staticmethod
    def of(scores: TokenScores, gamma: Tensor, weights: Tensor, gains: Tensor, attention: bool) -> _Tally:
        inside = scores.response_mask & gains.to(scores.response_mask.device)[:, None]
        peaks = [find_peaks(values)[inside].sum() if attention else 0 for values in (scores.waad, scores.fai)]
        sums = [inside.sum(), gamma[inside].sum(), (weights.to(inside.device)[inside] > 1).sum(), *peaks]
        return _Tally(*(float(value) for value in sums))


class CreditMixin:
    """For those who subclass: `class MyTrainer(CreditMixin, GRPOTrainer)` takes `credit=` itself.

    Args:
        credit: the strategy; None trains as the trainer does without.
        credit_options: further arguments of `attach_credit`, by name.

    Attributes:
        credit_handle: what `attach_credit` returned; None without credit.
    """

    credit_handle: CreditHandle | None = None

    def __init__(
        self,
        *args: Any,
        credit: Credit | None = None,
        credit_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if credit is not None:
            self.credit_handle = attach_credit(self, credit, **(credit_options or {}))

"""Credit for a TRL trainer that already runs: `attach_credit` gives it, `detach` takes it away again.

After each generation the policy's own attention is measured over the completions and a strategy turns
the scores into weights, which travel with the batch; when its loss is computed, they enter by the route
that the canary found to work. Nothing of TRL is patched but three attributes of the one trainer object,
so overrides of subclasses stay in force. Evaluation is left as it was.

What is left to others: scores (scoring), weights (credit), the ways into a loss (routes), and what
goes into checkpoints (lifecycle).
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe import metrics
from attnprobe.adapters import adapter_for
from attnprobe.errors import MissingDependencyError, ParameterError, TrainerError
from attnprobe.head_statistics import HeadStatistics
from attnprobe.heads import HeadGroups, classify_heads
from attnprobe.metrics import Horizon
from attnprobe.probe import Layers, resolve_layers
from attnprobe.rhythm import find_peaks
from attnprobe.rl.advantage import credit_weights
from attnprobe.rl.credit import Credit, credit_of, needs_of
from attnprobe.rl.lifecycle import CreditCallback
from attnprobe.rl.routes import ROUTES, Through, choose_route
from attnprobe.rl.scoring import Rollout, measure_rollout, score_rollout
from attnprobe.scores import TokenScores

_HANDLE = "_attnprobe_credit"
_GENERATE = "_generate_and_score_completions"
_LOSS = "compute_loss"
_WEIGHTS = "credit_weights"
_PARTS = (_GENERATE, _LOSS, "_get_per_token_logps_and_entropies", "_metrics", "callback_handler")


def attach_credit(
    trainer: Any,
    credit: Credit,
    *,
    layers: Layers = "middle",
    heads: HeadGroups | None = None,
    reclassify_every: int | None = 1,
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
        reclassify_every: group heads anew after so many optimizer steps; None: once, and keep it.
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
    _check_trainer(trainer)
    metrics.check_window(window)
    metrics.check_horizon(horizon)
    needs = needs_of(credit)
    if batch_size is not None and batch_size < 1:
        raise ParameterError(f"batch_size must be at least 1, got {batch_size}")
    callback = CreditCallback(reclassify_every)
    chosen: tuple[int, ...] = ()
    if needs & {"waad", "fai"}:
        chosen = _choose_layers(trainer, layers, heads)
    if heads is not None:
        callback.keep(heads, None)
        callback.fixed = True
    route = choose_route(trainer, through)
    handle = CreditHandle(
        trainer, credit, needs, route, layers=chosen, window=window, horizon=horizon, batch_size=batch_size
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
        self._measuring: dict[str, Any] = {"layers": layers, "window": window, "horizon": horizon}
        self._batch_size = batch_size
        self._before: dict[str, Any] = {}
        self._wrappers: dict[str, Any] = {}

    @property
    def groups(self) -> HeadGroups | None:
        """The grouping of heads in use; None before the first rollout."""
        callback = self._callback()
        return None if callback is None else callback.groups

    def detach(self) -> None:
        """Take credit away: the trainer is what it was before; a second call does nothing.

        Raises:
            TrainerError: something else has wrapped the trainer's methods since, and must go first.
        """
        trainer = self._trainer
        if vars(trainer).get(_HANDLE) is not self:
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
        delattr(trainer, _HANDLE)

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
        setattr(trainer, _HANDLE, self)

    def _callback(self) -> CreditCallback | None:
        # Looked up each time: a trainer may replace its callbacks by restored ones.
        callbacks = self._trainer.callback_handler.callbacks
        return next((callback for callback in callbacks if isinstance(callback, CreditCallback)), None)

    # ---- one rollout --------------------------------------------------------------------------

    def _weigh(self, output: dict[str, Any]) -> Float[Tensor, "batch token"]:
        """Return the factor of each token's advantage, for what the trainer has just generated."""
        started = time.perf_counter()
        rollout = _rollout_of(self._trainer, output)
        statistics = None
        if self.layers:
            statistics = self._measure(rollout)
        entropy = self._entropy(rollout) if "entropy" in self._needs else None
        groups = None if statistics is None else self._group(statistics)
        scores = score_rollout(None if groups is None else statistics, groups, rollout, entropy=entropy)
        gamma = credit_of(self.credit, scores)
        weights = credit_weights(output["advantages"].to(gamma.device), gamma, scores.response_mask)
        self._log(scores, gamma, weights, output["advantages"], time.perf_counter() - started)
        return weights

    def _measure(self, rollout: Rollout) -> HeadStatistics:
        trainer = self._trainer
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        return measure_rollout(
            policy_of(trainer),
            rollout,
            **self._measuring,
            batch_size=self._batch_size or trainer.args.per_device_train_batch_size,
            root=trainer.model if sharded else None,
        )

    def _group(self, statistics: HeadStatistics) -> HeadGroups | None:
        """Return the grouping to use, made anew over the rollouts of all processes where it is due."""
        callback = self._callback()
        if callback is None:
            raise TrainerError("the callback of attach_credit was removed: call detach() to end credit")
        step = int(self._trainer.state.global_step)
        if callback.is_due(step):
            span = self._trainer.accelerator.gather(statistics.span.contiguous())
            # Of completions that are all masked nothing is known; the grouping stays due.
            if bool((~span.isnan()).any()):
                callback.keep(classify_heads(replace(statistics, span=span)), step)
        return callback.groups

    @torch.no_grad()
    def _entropy(self, rollout: Rollout) -> Float[Tensor, "batch completion"]:
        """Return the entropy of each token, by the trainer's own function: at its temperature."""
        trainer = self._trainer
        with _evaluating(trainer.model):
            result = trainer._get_per_token_logps_and_entropies(
                trainer.model,
                torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1),
                torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1),
                rollout.completion_ids.shape[1],
                self._batch_size or trainer.args.per_device_train_batch_size,
                compute_entropy=True,
            )
        entropy: Tensor = result[1]
        return entropy.float()

    def _log(
        self, scores: TokenScores, gamma: Tensor, weights: Tensor, advantages: Tensor, seconds: float
    ) -> None:
        """Put what was done into the trainer's own log, over all processes."""
        mask = scores.response_mask
        spread = advantages if advantages.ndim == 2 else advantages[:, None]
        changed = (weights != 1) & (spread.to(mask.device) != 0) & mask
        sums = [mask.sum(), gamma[mask].sum(), ((gamma > 1) & mask).sum(), changed.sum()]
        for values in (scores.waad, scores.fai) if self.layers else ():
            sums.append(find_peaks(values).sum())
        spent = torch.tensor(seconds, device=mask.device)
        accelerator = self._trainer.accelerator
        totals = torch.stack([*(value.float() for value in sums), spent])
        totals = accelerator.reduce(totals.to(accelerator.device), reduction="sum")
        tokens, total, amplified, applied, *peaks, all_seconds = totals.tolist()
        tokens = max(tokens, 1.0)
        logged = {
            "credit/gamma_mean": total / tokens,
            "credit/amplified_share": amplified / tokens,
            "credit/applied_share": applied / tokens,
            "credit/seconds": all_seconds / accelerator.num_processes,
        }
        for name, count in zip(("preplans", "anchors"), peaks, strict=False):
            logged[f"credit/{name}_per_100_tokens"] = 100 * count / tokens
        for name, value in logged.items():
            self._trainer._metrics["train"][name].append(value)


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


def policy_of(trainer: Any) -> Any:
    """Return a trainer's policy without what accelerate and peft have wrapped around it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel):
        # Its adapters live in the layers of the base model.
        return model.get_base_model()
    return model


def _check_trainer(trainer: Any) -> None:
    if importlib.util.find_spec("trl") is None:
        raise MissingDependencyError("credit for trainers needs trl: pip install 'attnprobe[trl]'")
    import trl
    from trl import GRPOTrainer, RLOOTrainer  # type: ignore[attr-defined]

    if not isinstance(trainer, (GRPOTrainer, RLOOTrainer)):
        kind = trainer if isinstance(trainer, type) else type(trainer)
        raise TrainerError(
            "credit can be attached to an instance of trl.GRPOTrainer, of trl.RLOOTrainer, or of a subclass; "
            f"got {'the class' if kind is trainer else 'a'} {kind.__module__}.{kind.__qualname__}"
        )
    missing = [name for name in _PARTS if not hasattr(trainer, name)]
    if missing:
        raise TrainerError(
            f"{type(trainer).__name__} of trl {trl.__version__} has no {', '.join(missing)}: this version "
            "is not understood; trl 1.16 is"
        )
    if vars(trainer).get(_HANDLE) is not None:
        raise TrainerError("this trainer has credit already: detach() that first")


def _choose_layers(trainer: Any, layers: Layers, heads: HeadGroups | None) -> tuple[int, ...]:
    adapter = adapter_for(policy_of(trainer))
    if heads is None:
        return resolve_layers(layers, adapter)
    chosen = resolve_layers(heads.layers, adapter)
    if layers != "middle" and resolve_layers(layers, adapter) != chosen:
        raise ParameterError(
            f"heads were grouped in layers {list(heads.layers)}, but layers={layers!r}: leave layers out"
        )
    if heads.model_name and heads.model_name != adapter.model_name:
        raise ParameterError(
            f"heads were grouped for {heads.model_name}, but the policy is {adapter.model_name}; if that is "
            "the same model by another name, pass dataclasses.replace(heads, model_name='')"
        )
    return chosen


def _rollout_of(trainer: Any, output: dict[str, Any]) -> Rollout:
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    missing = [name for name in (*names, "advantages") if name not in output]
    if missing:
        raise TrainerError(
            f"{type(trainer).__name__} generates no {', '.join(missing)}: its rollouts are not understood"
        )
    pictures = [name for name in output if name.startswith("pixel_") or name == "num_images"]
    if pictures:
        raise TrainerError(
            f"the prompts hold pictures ({', '.join(pictures)}), and attention is measured over text only: "
            "use a strategy that needs no scores, or train on text"
        )
    prompt_ids, prompt_mask, completion_ids, completion_mask = (output[name] for name in names)
    return Rollout(prompt_ids, prompt_mask, completion_ids, completion_mask, output.get("tool_mask"))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True

"""Credit for a TRL trainer that you already have: `attach_credit` adds it, `detach` removes it.

This is what users call; `CreditMixin` is the same for subclasses. After each generation the weights of the
completions are computed (`TrainerCredit`) and travel with the batch; when its loss is computed, they enter by
the route that the canary found to work. All that is patched in TRL is two methods of the one trainer object,
so overrides in subclasses still apply. Evaluation is unchanged.

What is left to others: measuring and weighing (trainer_credit), what is read from a trainer (trainers), the
ways into a loss (routes), and what goes into checkpoints (callback).
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from attnprobe.adapters.base import Layers
from attnprobe.errors import TrainerError
from attnprobe.head_groups import GroupsLike
from attnprobe.metric_arguments import HorizonLike
from attnprobe.reductions import TRAINING_HORIZON
from attnprobe.rl.advantage import Signs
from attnprobe.rl.credit import Credit
from attnprobe.rl.grouping import Groups
from attnprobe.rl.settings import check_options
from attnprobe.rl.trl.callback import CreditCallback, callback_of
from attnprobe.rl.trl.routes import ROUTES, Through, choose_route
from attnprobe.rl.trl.trainer_credit import TrainerCredit
from attnprobe.rl.trl.trainers import HANDLE, check_trainer, rollout_of
from attnprobe.validation import IntLike

_GENERATE = "_generate_and_score_completions"
_LOSS = "compute_loss"
_WEIGHTS = "credit_weights"


def attach_credit(
    trainer: Any,
    credit: Credit,
    *,
    layers: Layers = "middle",
    heads: GroupsLike | None = None,
    reclassify_every: IntLike | None = 10,
    window: int = 10,
    horizon: HorizonLike = TRAINING_HORIZON,
    batch_size: IntLike | None = None,
    signs: Signs = "both",
    through: Through = "auto",
) -> CreditHandle:
    """Weight the tokens of a trainer's objective by a strategy, from now on until `detach`.

    Args:
        trainer: a `trl.GRPOTrainer` or a `trl.RLOOTrainer`, or an instance of a subclass; before or
            between calls of `train`.
        credit: the strategy, such as `CoupledRhythmCredit()`, or any callable `scores -> gamma`.
        layers: where to measure attention: "middle" (the paper's five layers of the middle third), "all" or
            layer numbers.
        heads: fixed head groups, in any form that `score_tokens` takes, with weights if you like; their
            layers are measured ("all": all heads of `layers`). None: heads are classified on the run's own
            rollouts, over all processes.
        reclassify_every: how many optimizer steps to wait before classifying heads again; None: they are
            classified only once. In such a step all completions are measured; otherwise only those whose
            weights can matter: their advantage is not 0, and `signs` includes it.
        window: WAAD's window, in tokens.
        horizon: FAI's horizon `(low, high)`, in tokens.
        batch_size: how many completions to measure at a time; default: the trainer's own batch size per
            device.
        signs: which advantages are weighted: "both" (v2 of the paper), "positive" (v1) or "negative".
        through: how weights enter the loss: "advantages", one for each token, or "gradient", for losses
            with one advantage per completion; "auto" takes the first that the trainer honours.

    Raises:
        MissingDependencyError: trl is not installed.
        TrainerError: a trainer that is not supported, already has credit, or whose loss does not honour a
            weight for each token; the message gives the reason.
        ParameterError: an invalid parameter.
        UnsupportedModelError: a policy whose attention cannot be read.
    """
    check_trainer(trainer)
    callback = CreditCallback(reclassify_every)
    trainer_credit = TrainerCredit(
        trainer,
        credit,
        layers=layers,
        heads=heads,
        window=window,
        horizon=horizon,
        batch_size=batch_size,
        signs=signs,
    )
    handle = CreditHandle(trainer, trainer_credit, choose_route(trainer, through, trainer_credit.signs))
    handle._install(callback)
    return handle


class CreditHandle:
    """What `attach_credit` returns: it says how credit is given, and can remove it.

    Attributes:
        credit: the strategy.
        layers: the layers that are measured; empty if the strategy needs no attention.
        signs: "both", "positive" or "negative": which advantages are weighted.
        route: "advantages" or "gradient": how weights enter the loss.
    """

    def __init__(self, trainer: Any, credit: TrainerCredit, route: str) -> None:
        self.credit = credit.credit
        self.layers = credit.layers
        self.signs = credit.signs
        self.route = route
        self._trainer = trainer
        self._rollout_credit = credit
        self._before: dict[str, Any] = {}
        self._wrappers: dict[str, Any] = {}

    @property
    def groups(self) -> Groups | None:
        """The head groups in use; None before the first rollout."""
        callback = callback_of(self._trainer)
        return self._rollout_credit.heads or (None if callback is None else callback.groups)

    def detach(self) -> None:
        """Remove credit, so that the trainer is as it was before; a second call does nothing.

        Raises:
            TrainerError: something else has wrapped the trainer's methods since, and must be undone first.
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
        while (callback := callback_of(trainer)) is not None:
            trainer.remove_callback(callback)
        delattr(trainer, HANDLE)

    def _install(self, callback: CreditCallback) -> None:
        trainer = self._trainer
        generate, compute_loss = getattr(trainer, _GENERATE), getattr(trainer, _LOSS)
        route = ROUTES[self.route]

        def generate_and_weigh(inputs: Any) -> Any:
            output = generate(inputs)
            # Not in evaluation, whose loss stays comparable with that of other runs.
            if trainer.model.training:
                output[_WEIGHTS] = self._weigh(output)
            return output

        def compute_weighted_loss(model: Any, inputs: Any, **kwargs: Any) -> Any:
            weights = inputs.get(_WEIGHTS)
            # A batch that was generated before credit was attached has no weights.
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

    # ---- one rollout --------------------------------------------------------------------------

    def _weigh(self, output: dict[str, Any]) -> Float[Tensor, "completion token"]:
        """Return the factor of each token's advantage, for what the trainer has just generated."""
        trainer, credit = self._trainer, self._rollout_credit
        rollout = rollout_of(trainer, output, credit.needs)
        weighed = credit.weigh_with_scores(rollout, output["advantages"], trainer.state.global_step)
        for name, value in weighed.metrics.items():
            trainer._metrics["train"][name].append(value)
        return weighed.gamma


class CreditMixin:
    """For subclasses of a trainer: `class MyTrainer(CreditMixin, GRPOTrainer)` accepts `credit=`.

    Args:
        credit: the strategy; None: training without credit.
        credit_options: further arguments of `attach_credit`, by name.

    Attributes:
        credit_handle: what `attach_credit` returned; None without credit.

    Raises:
        ParameterError: options that `attach_credit` does not take.
    """

    credit_handle: CreditHandle | None = None

    def __init__(
        self,
        *args: Any,
        credit: Credit | None = None,
        credit_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        options = check_options(credit_options, attach_credit, "credit_options")
        super().__init__(*args, **kwargs)
        if credit is not None:
            self.credit_handle = attach_credit(self, credit, **options)

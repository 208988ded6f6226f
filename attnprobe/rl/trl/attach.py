"""Credit for a TRL trainer that you already have: `attach_credit` adds it, `detach` removes it.

This is what users call; `CreditMixin` is the same for subclasses. After each generation the weights of the
completions are computed (`TrainerCredit`), if possible from a pass that the trainer makes anyway (`OwnPass`),
and travel with the batch; when its loss is computed, they enter by the route that the canary found to work.
All that stays patched in TRL is two methods of the one trainer object, so overrides in subclasses still
apply. Evaluation is unchanged.

What is left to others: measuring and weighing (trainer_credit), what is read from a trainer (trainers), the
ways into a loss (routes) and which of them works (canary), what goes into checkpoints (callback), and what
people see (shown).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from attnprobe.adapters.base import Layers
from attnprobe.errors import TrainerError
from attnprobe.head_groups import GroupsLike
from attnprobe.metric_arguments import HorizonLike
from attnprobe.reductions import TRAINING_HORIZON
from attnprobe.report import Report
from attnprobe.rl.advantage import Signs
from attnprobe.rl.credit import Credit
from attnprobe.rl.grouping import Groups
from attnprobe.rl.settings import check_options
from attnprobe.rl.trl.callback import CreditCallback, callback_of
from attnprobe.rl.trl.canary import choose_route
from attnprobe.rl.trl.own_pass import OwnPass
from attnprobe.rl.trl.routes import ROUTES, Through
from attnprobe.rl.trl.shown import add_to_table, remove_from_table, report_of
from attnprobe.rl.trl.trainer_credit import TrainerCredit
from attnprobe.rl.trl.trainers import HANDLE, check_trainer, rollout_of, warn_of_length
from attnprobe.rl.weighed import WeighedRollout
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
    token_budget: IntLike | None = None,
    signs: Signs = "both",
    schedule: Callable[[int], float] | None = None,
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
        token_budget: how many tokens, with padding, to measure at a time; default: as `measure` decides.
        signs: which advantages are weighted: "both" (v2 of the paper), "positive" (v1) or "negative".
        schedule: a callable `step -> factor`, such as `warmup(100)`: gamma becomes
            `1 + factor * (gamma - 1)`.
        through: how weights enter the loss: "advantages", one for each token, or "gradient", for losses
            with one advantage per completion; "auto" takes the first that the trainer honours. A loss that
            needs fields which the trainer itself adds to its batches is tried out on the first of them.

    Raises:
        MissingDependencyError: trl is not installed.
        TrainerError: a trainer that is not supported, already has credit, or whose loss does not honour a
            weight for each token; the message gives the reason. If the loss can be tried out only on a real
            batch, it is raised there, before any parameter changes.
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
        token_budget=token_budget,
        signs=signs,
        schedule=schedule,
    )
    callback.settings = trainer_credit.settings_with(callback)
    handle = CreditHandle(trainer, trainer_credit, through)
    handle._install(callback)
    return handle


class CreditHandle:
    """What `attach_credit` returns: it says how credit is given, and can remove it.

    Attributes:
        credit: the strategy.
        layers: the layers that are measured; empty if the strategy needs no attention.
        signs: "both", "positive" or "negative": which advantages are weighted.
        route: "advantages" or "gradient": how weights enter the loss; None until the first batch, if the
            loss can be tried out only there.
    """

    def __init__(self, trainer: Any, credit: TrainerCredit, through: Through) -> None:
        self.credit = credit.credit
        self.layers = credit.layers
        self.signs = credit.signs
        self.route = choose_route(trainer, through, credit.signs)
        self._through = through
        self._trainer = trainer
        self._rollout_credit = credit
        self._before: dict[str, Any] = {}
        self._wrappers: dict[str, Any] = {}
        self._weighed_at: tuple[int, Tensor | None] = (0, None)
        self._longest = 0

    @property
    def groups(self) -> Groups | None:
        """The head groups in use, or those used last; None before the first rollout."""
        callback, last = callback_of(self._trainer), self.last
        if self._rollout_credit.heads is not None:
            return self._rollout_credit.heads
        if callback is None:
            return None if last is None else last.groups
        return callback.groups

    @property
    def last(self) -> WeighedRollout | None:
        """The latest rollout with its ids, scores, head groups, weights and metrics; None before one."""
        return self._rollout_credit.last

    def report(self, completion: IntLike = 0) -> Report:
        """Return the report of a completion of the latest rollout of this process.

        It shows the scores and the rhythm of the completion, in the head groups of the run; the weights that
        were applied stand below its heading. Attention is measured anew: if the policy has been trained since
        it wrote the completion, scores are those of the policy as it is now, which the report says.

        Args:
            completion: which one, counted from 0 in the order of the trainer's batch. If the policy is
                sharded over several processes, all of them call this.

        Raises:
            ParameterError: a completion that the rollout does not have.
            TrainerError: no rollout yet, a strategy that needs no attention, heads that were given as a
                selection, or a completion without a token that counts.
        """
        step, advantages = self._weighed_at
        return report_of(self._trainer, self._rollout_credit, completion, step, advantages)

    def detach(self) -> None:
        """Remove credit, so that the trainer is as it was before; a second call does nothing.

        It may be called at any time, also by a callback or a reward function. From then on the loss is the
        trainer's own, also for what is left of a batch that was generated with credit.

        Raises:
            TrainerError: something else has wrapped the trainer's methods since, and must be undone first.
        """
        trainer = self._trainer
        if not self._attached:
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
        # Not `remove_callback`: the trainer may be going through this list, and would leave out the next one.
        handler = trainer.callback_handler
        handler.callbacks = [each for each in handler.callbacks if not isinstance(each, CreditCallback)]
        for batch in trainer._buffered_inputs or ():
            batch.pop(_WEIGHTS, None)
        remove_from_table(trainer)
        delattr(trainer, HANDLE)

    @property
    def _attached(self) -> bool:
        return vars(self._trainer).get(HANDLE) is self

    def _install(self, callback: CreditCallback) -> None:
        trainer = self._trainer
        generate, compute_loss = getattr(trainer, _GENERATE), getattr(trainer, _LOSS)

        def generate_and_weigh(inputs: Any) -> Any:
            own_pass = OwnPass(trainer, self._rollout_credit)
            with own_pass.while_generating():
                output = generate(inputs)
            # A reward function may just have detached credit.
            if not self._attached:
                return output
            # Not in evaluation, whose loss stays comparable with that of other runs.
            weighs = trainer.model.training
            if weighs:
                output[_WEIGHTS] = self._weigh(output, own_pass)
            if trainer.log_completions:
                add_to_table(trainer, self.last if weighs else None, len(output["completion_ids"]))
            return output

        def compute_weighted_loss(model: Any, inputs: Any, **kwargs: Any) -> Any:
            weights = inputs.get(_WEIGHTS)
            # A batch that was generated before credit was attached has no weights.
            if weights is None:
                return compute_loss(model, inputs, **kwargs)
            rest = {key: value for key, value in inputs.items() if key != _WEIGHTS}
            if self.route is None:
                self.route = choose_route(trainer, self._through, self.signs, (model, rest))
            if self.route is None:
                return compute_loss(model, rest, **kwargs)
            return ROUTES[self.route](trainer, compute_loss, weights, model, rest, **kwargs)

        self._wrappers = {_GENERATE: generate_and_weigh, _LOSS: compute_weighted_loss}
        self._before = {name: vars(trainer)[name] for name in self._wrappers if name in vars(trainer)}
        for name, wrapper in self._wrappers.items():
            setattr(trainer, name, wrapper)
        trainer.add_callback(callback)
        setattr(trainer, HANDLE, self)

    # ---- one rollout --------------------------------------------------------------------------

    def _weigh(self, output: dict[str, Any], own_pass: OwnPass) -> Float[Tensor, "completion token"]:
        """Return the factor of each token's advantage, for what the trainer has just generated."""
        trainer, credit = self._trainer, self._rollout_credit
        rollout, advantages = rollout_of(trainer, output, credit.needs), output["advantages"]
        self._weighed_at = (trainer.state.global_step, advantages)
        self._longest = warn_of_length(credit.policy, rollout, self._longest)
        watched = own_pass.of(rollout)
        if watched is None:
            weighed = credit.weigh_with_scores(rollout, advantages, trainer.state.global_step)
        else:
            weighed = watched.weigh_with_scores(advantages)
        for name, value in weighed.metrics.items():
            trainer._metrics["train"][name].append(value)
        return weighed.gamma


class CreditMixin:
    """For subclasses of a trainer: `class MyTrainer(CreditMixin, GRPOTrainer)` accepts `credit=`.

    Args:
        credit: the strategy; None: training without credit.
        credit_options: further arguments of `attach_credit`, by name; without credit they are only checked.

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

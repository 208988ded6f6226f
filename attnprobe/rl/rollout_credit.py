"""RolloutCredit: the one mechanism that measures a rollout, groups heads, and asks a strategy for weights.

Every trainer uses it: your own training loop and the reference PPO (ppo) use the class as it is, and
`attach_credit` (trl) and the engine for verl override the few methods in which these trainers differ. For
each rollout it decides which completions matter, measures the policy's attention over them, or reads it from
a pass of the trainer's own, classifies heads when that is due, scores the tokens, and calls the strategy.
What is left to others: the pieces (scoring, watching, grouping, credit, schedules), several processes
(processes), what is kept of a rollout (weighed), and what is done with the weights (advantage).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.adapters.base import Layers
from attnprobe.adapters.wrappers import uncompiled
from attnprobe.errors import AttnprobeWarning, ParameterError, ResultError, TrainerError
from attnprobe.head_groups import GroupsLike
from attnprobe.head_statistics import HeadStatistics
from attnprobe.heads import group_heads
from attnprobe.metric_arguments import HorizonLike, check_horizon, check_window
from attnprobe.probe import attach
from attnprobe.reductions import TRAINING_HORIZON
from attnprobe.rl.advantage import Signs, check_signs, credit_weights, is_weighted, spread_advantages
from attnprobe.rl.credit import Credit, credit_of, needs_of
from attnprobe.rl.grouping import Groups, HeadGrouping, choose_heads
from attnprobe.rl.passes import measured_in_passes
from attnprobe.rl.processes import Processes, is_sharded
from attnprobe.rl.rollout import Rollout
from attnprobe.rl.schedules import check_schedule, factor_at
from attnprobe.rl.scoring import bare_policy, check_given, scores_of_all, scores_of_part
from attnprobe.rl.settings import check_same_settings, digest, settings_of, told
from attnprobe.rl.watching import RolloutProbe, Watched, draws_at_random
from attnprobe.rl.weighed import WeighedRollout, credit_metrics, heads_that_changed
from attnprobe.scores import TokenScores
from attnprobe.validation import ArrayLike, IntLike, as_float_tensor, brief, instance, whole_number
from attnprobe.with_block import WithBlock

Parts = Iterable[tuple[Tensor, HeadStatistics | TokenScores | None]]
"""Which completions a pass held, and their statistics or scores, if attention is measured."""


class RolloutCredit:
    """Computes the weights of the tokens of a policy's rollouts.

    A trainer that differs from a plain loop overrides `policy`, `root`, `group`, `grouping`, `token_entropy`
    or `precision`; each says what it is for.

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
        batch_size, token_budget: how many completions, and how many tokens with their padding, to measure at
            a time; default: as `measure` decides.
        signs: which advantages are weighted: "both" (v2 of the paper), "positive" (v1) or "negative".
        schedule: a callable `step -> factor`, such as `warmup(100)`: gamma becomes
            `1 + factor * (gamma - 1)`.
        root: the module that the trainer calls, if the policy's parameters are sharded (FSDP, DeepSpeed): it
            is run in whole passes, and every process makes the same number of them. With FSDP2, where the
            policy was sharded in place, it is the policy itself.
        group: the process group of `torch.distributed` that trains the policy, if there are several
            processes: heads are classified on the rollouts of all of them. `weigh` is then called by all.

    Attributes:
        credit: the strategy.
        signs: which advantages are weighted.
        heads: the head groups that were given, if any.
        layers: the layers that are measured; empty if the strategy needs no attention.
        last: the latest rollout with its weights, scores and metrics; None before the first.

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
        token_budget: IntLike | None = None,
        signs: Signs = "both",
        schedule: Callable[[int], float] | None = None,
        root: Any = None,
        group: Any = None,
    ) -> None:
        self.credit, self.signs = credit, check_signs(signs)
        self.needs = needs_of(credit)
        self.window, self.horizon = check_window(window), check_horizon(horizon)
        self.batch_size = None if batch_size is None else whole_number(batch_size, "batch_size", minimum=1)
        self.token_budget = (
            None if token_budget is None else whole_number(token_budget, "token_budget", minimum=1)
        )
        self.schedule = check_schedule(schedule)
        if root is not None and not isinstance(root, torch.nn.Module):
            raise ParameterError(f"root must be the module that the trainer calls; got {brief(root)}")
        self._policy, self._root, self._group = bare_policy(policy), root, group
        self._grouping = HeadGrouping(reclassify_every)
        reads_attention = bool(self.needs & {"waad", "fai"})
        self.heads: Groups | None = None
        self.layers: tuple[int, ...] = ()
        self.last: WeighedRollout | None = None
        if reads_attention:
            # Not the bare policy: an adapter refuses wrappers that do more than to change layers.
            self.layers, self.heads = choose_heads(policy, layers, heads)

    # ---- what a trainer may override ----------------------------------------------------------

    @property
    def policy(self) -> Any:
        """The policy that is measured, without wrappers."""
        return self._policy

    @property
    def root(self) -> Any:
        """The module to call in place of the policy, whose parameters are sharded; None if they are not."""
        return self._root

    @property
    def group(self) -> Any:
        """The process group whose processes train the policy; None for a single process."""
        return self._group

    @property
    def grouping(self) -> HeadGrouping:
        """The head groups and when to classify heads again; it belongs in checkpoints."""
        return self._grouping

    def token_entropy(self, rollout: Rollout) -> Float[Tensor, "completion token"] | None:
        """Return the entropy of each token, if the strategy needs it and `weigh` is not given it."""
        return None

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context in which the policy is measured: that of a trainer's mixed precision, if any."""
        return nullcontext()

    # ---- one rollout --------------------------------------------------------------------------

    @property
    def groups(self) -> Groups | None:
        """The head groups in use: those given, or the latest of the run; None before the first."""
        return self.heads if self.heads is not None else self.grouping.groups

    def regroups_at(self, step: IntLike) -> bool:
        """Return whether heads will be classified at a step.

        Raises:
            ParameterError: a step that is not a whole number.
        """
        now = whole_number(step, "step")
        return bool(self.layers) and self.heads is None and self.grouping.is_due(now)

    def weigh(
        self,
        rollout: Rollout,
        advantages: ArrayLike | None,
        step: IntLike,
        *,
        entropy: ArrayLike | None = None,
        statistics: HeadStatistics | None = None,
        scores: TokenScores | None = None,
    ) -> Float[Tensor, "completion token"]:
        """Return gamma as it is applied, `[completion, token]`; 1 where `signs` leaves an advantage out.

        Completions in which no weight can matter are not measured, and keep gamma 1: those whose advantages
        are all 0 or left out. If there are several processes, all of them call this for each rollout.

        Args:
            rollout: the prompts, and what the policy wrote.
            advantages: `[completion]` or `[completion, token]`; they decide which completions are
                measured and which tokens are weighted, and are not changed. None: they are not known yet;
                all completions are measured, and `signs` is left to `apply_credit`.
            step: the step of the run, which decides when heads are classified again.
            entropy: `[completion, token]`, of the distribution that each token was sampled from, in nats,
                for strategies that need it.
            statistics: those of the whole rollout, if they have been measured; span is needed at steps at
                which `regroups_at` is true.
            scores: those of the whole rollout under `groups`, if they are known; not at such steps.

        Raises:
            BatchError: a rollout that the policy cannot read.
            ParameterError: advantages or entropy of another shape, a step that is not a whole number, or
                statistics that were measured otherwise.
            ResultError: scores or weights that are not finite, or entropy that is needed but not given.
            TrainerError: several processes without `group`, or sharded parameters without `root`.
        """
        return self.weigh_with_scores(
            rollout, advantages, step, entropy=entropy, statistics=statistics, scores=scores
        ).gamma

    def weigh_with_scores(
        self,
        rollout: Rollout,
        advantages: ArrayLike | None,
        step: IntLike,
        *,
        entropy: ArrayLike | None = None,
        statistics: HeadStatistics | None = None,
        scores: TokenScores | None = None,
    ) -> WeighedRollout:
        """Return gamma as `weigh` does, with the scores that it was computed from, and metrics."""
        started = time.perf_counter()
        instance(rollout, Rollout, "rollout")
        now, processes = whole_number(step, "step"), Processes(self.group)
        own, factor = rollout.response_mask, factor_at(self.schedule, now)
        spread = None if advantages is None else spread_advantages(advantages, own)
        matters = own if spread is None else is_weighted(spread, self.signs) & (spread != 0)
        # A factor of 0 leaves all weights 1.
        matters = matters & (factor != 0)
        needed = matters.any(-1)
        regroups = self.regroups_at(now)
        # A trainer's own pass for entropy cannot be evened out between processes: all make it over all rows.
        in_step = self.root is not None and "entropy" in self.needs and entropy is None
        if statistics is not None and scores is not None:
            raise ParameterError("pass the statistics of the rollout or its scores, not both")
        given: Any = scores if statistics is None else statistics
        measured = needed | (regroups or given is not None or in_step)
        parts: Parts = [(measured, None)] if bool(measured.any()) else []
        if self.layers and given is not None:
            check_given(
                given,
                rollout,
                layers=self.layers,
                window=self.window,
                horizon=self.horizon,
                regroups=regroups,
            )
            parts = [(measured, given)]
        elif self.layers:
            parts = self._measured(rollout, measured, processes, span=regroups)
        changed = None
        if regroups:
            # Heads are known only when all completions have been seen: they are kept, where there is room.
            parts = [(chosen, None if each is None else each.to("cpu")) for chosen, each in parts]
            changed = self._classify(parts, now, processes)
        groups = self.groups if self.layers else None
        found = self._scores(parts, groups, rollout, measured, entropy)
        gamma = torch.ones(own.shape, device=needed.device)
        if found is not None:
            # All at once: a strategy may compare completions with each other.
            weights = credit_of(self.credit, found.select(measured.tolist())).to(gamma)
            gamma[measured] = 1 + factor * (weights - 1) if factor != 1 else weights
            gamma = torch.where(needed[:, None], gamma, 1.0)
        shown = torch.ones_like(gamma) if spread is None else spread
        signs: Signs = "both" if spread is None else self.signs
        applied = credit_weights(shown, gamma, own, signs=signs)
        weighed = WeighedRollout(rollout, applied, matters, measured, found, groups)
        metrics = credit_metrics(
            weighed,
            spread,
            changed,
            time.perf_counter() - started,
            attention=bool(self.layers),
            total=processes.sum,
            processes=processes.count,
        )
        self.last = replace(weighed, metrics=metrics)
        return self.last

    def watching(self, model: Any, rollout: Rollout, step: IntLike) -> WithBlock[Watched]:
        """Read the forward passes that the trainer runs over a rollout inside the block, instead of our own.

        Most trainers compute log-probabilities of each rollout anyway. Micro-batches may be of any size and
        order, padded or packed: completions are recognised by the ids of their prompts and their own. So the
        pass must hold whole sequences, and padding must be masked. A packed pass needs `use_cache=False`, no
        mask, and positions that start anew. The policy should be in evaluation mode or without dropout, and
        see the positions that it wrote with. Code that `torch.compile` has made is run uncompiled inside the
        block.

        Args:
            model: the model that the passes are run with, wrapped or not.
            rollout: the prompts, and what the policy wrote.
            step: the step of the run, which decides whether heads are classified.

        Raises:
            ParameterError: no rollout, or a step that is not a whole number.
            UnsupportedModelError: a model whose attention cannot be read.
            ResultError: in a pass, a completion that was already read.

        >>> from attnprobe.rl import CoupledRhythmCredit
        >>> from attnprobe.testing.tiny_models import tiny_model
        >>> model = tiny_model("llama")
        >>> credit = RolloutCredit(model, CoupledRhythmCredit(), horizon=(1, 4))
        >>> ids, mask = torch.arange(1, 21).view(2, 10), torch.ones(2, 10, dtype=torch.bool)
        >>> rollout = Rollout(ids[:, :3], mask[:, :3], ids[:, 3:], mask[:, 3:])
        >>> with credit.watching(model, rollout, step=0) as watched, torch.no_grad():
        ...     logits = model(input_ids=ids, attention_mask=mask).logits
        >>> gamma = watched.weigh([1.0, -1.0])
        >>> gamma.shape, bool((gamma > 1).any())
        (torch.Size([2, 7]), True)
        """
        instance(rollout, Rollout, "rollout")
        now = whole_number(step, "step")
        return WithBlock("watching", self._watching(model, rollout, now))

    @contextmanager
    def _watching(self, model: Any, rollout: Rollout, step: int) -> Iterator[Watched]:
        if not self.layers:
            yield Watched(rollout, step, self.weigh_with_scores)
            return
        regroups = self.regroups_at(step)
        probe = RolloutProbe(
            rollout,
            window=self.window,
            horizon=self.horizon,
            span=regroups,
            groups=None if regroups else self.groups,
        )
        with uncompiled(), attach(model, probe, layers=self.layers) as attached:
            if any(map(draws_at_random, getattr(model, "modules", tuple)())):
                warnings.warn(
                    "the policy is in training mode and leaves something out at random (dropout): weights "
                    "are of what this pass draws, and differ from pass to pass. Run it in evaluation mode, "
                    "or set dropout to 0",
                    AttnprobeWarning,
                    stacklevel=4,
                )
            yield Watched(rollout, step, self.weigh_with_scores, probe, attached)

    # ---- the parts ----------------------------------------------------------------------------

    def _measured(self, rollout: Rollout, measured: Tensor, processes: Processes, *, span: bool) -> Parts:
        """Measure some of the completions pass by pass, as many passes as in every process if sharded."""
        policy, root = self.policy, self.root
        if root is None and isinstance(policy, torch.nn.Module) and is_sharded(policy):
            raise TrainerError(
                "the policy's parameters are sharded, and whole only in passes of the module that the "
                "trainer calls: pass it as root= (with FSDP2, the policy itself)"
            )
        if root is not None:
            # Here, since it loads transformers, which reading a policy of another kind does not need.
            from attnprobe.rl.whole_pass import WholePassAdapter

            policy = WholePassAdapter(policy, root)
        return measured_in_passes(
            policy,
            rollout,
            measured,
            processes=processes,
            in_step=root is not None,
            precision=self.precision,
            layers=self.layers,
            batch_size=self.batch_size,
            token_budget=self.token_budget,
            window=self.window,
            horizon=self.horizon,
            span=span,
        )

    def _scores(
        self,
        parts: Parts,
        groups: Groups | None,
        rollout: Rollout,
        measured: Tensor,
        entropy: ArrayLike | None,
    ) -> TokenScores | None:
        """Return the scores of all completions, part by part; None if there are no parts."""
        whole, shape = None, tuple(rollout.completion_ids.shape)
        if entropy is not None:
            whole = as_float_tensor(entropy, "entropy", shape, axes="completion, token")
        elif "entropy" in self.needs and bool(measured.any()):
            known = self.token_entropy(rollout.select(measured))
            if known is not None:
                whole = known.new_full(shape, torch.nan)
                whole[measured.to(known.device)] = known
        scored = [
            (
                chosen,
                scores_of_part(
                    each,
                    groups,
                    rollout.select(chosen),
                    entropy=None if whole is None else whole[chosen.to(whole.device)],
                ),
            )
            for chosen, each in parts
        ]
        return scores_of_all(scored, rollout)

    def _classify(self, parts: Parts, step: int, processes: Processes) -> int | None:
        """Group heads by their mean span over the completions of all processes, and keep the groups.

        Returns in how many heads the grouping changed, as `heads_that_changed` does; None if there was
        nothing to group heads by.
        """
        measured = [part for _, part in parts if isinstance(part, HeadStatistics)]
        spans = [part.span for part in measured if part.span is not None]
        span = torch.cat(spans).double()
        # Sums and counts rather than means: processes may have different numbers of completions.
        total, count = processes.sum(torch.stack([span.nansum(0), (~span.isnan()).double().sum(0)]))
        # Fully masked completions say nothing; the grouping stays due.
        if not bool((count > 0).any()):
            return None
        before = self.grouping.groups
        groups = replace(group_heads((total / count).to(spans[0].dtype)), layers=measured[0].layers)
        self.grouping.keep(groups, step)
        return heads_that_changed(before, groups)

    # ---- checkpoints --------------------------------------------------------------------------

    def settings(self) -> dict[str, str]:
        """Return what the weights depend on, as text: strategy, parameters, signs, and what is measured.

        A checkpoint stores it, so that a run cannot be resumed with different settings.

        >>> from attnprobe.rl import RandomCredit
        >>> from attnprobe.testing.tiny_models import tiny_model
        >>> settings = RolloutCredit(tiny_model("llama"), RandomCredit(seed=3), layers=[1]).settings()
        >>> settings["credit"], settings["credit.seed"], settings["layers"]
        ('RandomCredit', '3', '(1,)')
        """
        return self.settings_with(self.grouping)

    def settings_with(self, grouping: HeadGrouping) -> dict[str, str]:
        """Return the settings as they are with a grouping that a trainer will keep."""
        found = settings_of(self.credit) | {"signs": repr(self.signs)}
        if self.layers:
            found |= {name: repr(getattr(self, name)) for name in ("layers", "window", "horizon")}
            found["reclassify_every"] = repr(grouping.reclassify_every)
            found["heads"] = "classified by the run" if self.heads is None else digest(self.heads)
        if self.schedule is not None:
            found["schedule"] = told(self.schedule)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has to store, as plain JSON: the grouping of heads, and the settings."""
        return {"grouping": self.grouping.attributes(), "settings": self.settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned, in a run with the same settings.

        Raises:
            ResultError: anything else, or a state of other settings; the message says which differ.

        >>> from attnprobe.rl import RandomCredit
        >>> from attnprobe.testing.tiny_models import tiny_model
        >>> credit = RolloutCredit(tiny_model("llama"), RandomCredit())
        >>> credit.load_state_dict(credit.state_dict())
        """
        if not isinstance(state, Mapping) or not {"grouping", "settings"} <= set(state):
            raise ResultError(
                f"the state of credit must have grouping and settings, as state_dict() returns them; got "
                f"{brief(state)}"
            )
        check_same_settings(state["settings"], self.settings())
        self.grouping.restore(state["grouping"])

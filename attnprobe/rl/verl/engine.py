"""CreditEngine: verl's FSDP engine, whose update multiplies each advantage by the weight of its token.

verl makes one in each actor's worker if `VERL_ENGINE_VENDOR=attnprobe`. The weights are computed while the
actor computes log-probabilities of a rollout, as verl has it do anyway, and are handed back with them: verl's
V1 trainer keeps what a worker returns as a field of each row, and gives the update all fields. There the
engine multiplies. The reference policy is not read, whether it is an engine of its own or the actor without
its adapter. `RefusedEngine` takes the place of the engines that cannot be read. What is left to others:
reading verl's pass and weighing (`RolloutCredit.watching`), verl's rows (rows), options (options).
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from torch import distributed
from verl.utils.model import extract_multi_modal_inputs
from verl.workers.engine.base import BaseEngine, EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from attnprobe.adapters.versions import installed_version
from attnprobe.errors import ResultError, TrainerError
from attnprobe.rl.advantage import apply_credit, credit_weights, is_weighted
from attnprobe.rl.processes import Processes
from attnprobe.rl.rollout_credit import RolloutCredit
from attnprobe.rl.verl.loss_trial import check_loss
from attnprobe.rl.verl.options import CREDIT_VARIABLE, VENDOR, read_options
from attnprobe.rl.verl.rows import jagged, of_responses, padded, rollout_of
from attnprobe.rl.weighed import WeighedRollout, credit_metrics

logger = logging.getLogger(__name__)

FIELD = "attnprobe_gamma"
"""The field of a row in which its weights travel from the log-probability pass to the update."""

CHECKPOINT = "attnprobe.json"
"""The file beside an actor's checkpoint that holds the grouping of heads."""

VERL = ">=0.9.1,<0.10"
"""The versions of verl that the tests were run with."""

DEVICES = ["cuda", "npu", "cpu"]

UNREAD = ["megatron", "veomni", "torchtitan", "automodel", "fsdp_turbo"]
"""verl's other training backends."""


class CreditEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """An actor whose updates are weighted by credit.

    Raises:
        ParameterError: options that make no sense.
        TrainerError: a run in which credit would not reach the update, as soon as that can be seen.
        UnsupportedModelError: a policy whose attention cannot be read.
    """

    def initialize(self) -> None:
        """Build model and optimizer as verl does, and set up credit for it."""
        super().initialize()
        self._credit: RolloutCredit | None = None
        self._adapter_is_off = self._loss_was_tried = False
        if self.engine_config.forward_only:
            return
        if self.ulysses_sequence_parallel_size > 1:
            raise TrainerError(
                f"ulysses_sequence_parallel_size={self.ulysses_sequence_parallel_size} shares each sequence "
                "between processes, none of which sees all of its attention: set it to 1 for credit"
            )
        options = read_options(os.environ.get(CREDIT_VARIABLE, ""))
        group = self.get_data_parallel_group()
        self._processes = Processes(group)
        self._credit = RolloutCredit(
            self.module, options.credit, root=self.module, group=group, **options.arguments
        )
        self._rollouts = 0
        if self.rank == 0:
            told = ", ".join(f"{name}={value}" for name, value in self._credit.settings().items())
            print(f"attnprobe: credit is on: {told}", flush=True)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Turn the adapter off, and credit with it: what remains is the reference policy."""
        before, self._adapter_is_off = self._adapter_is_off, True
        try:
            with super().disable_adapter():
                yield
        finally:
            self._adapter_is_off = before

    # ---- log-probabilities of a rollout -------------------------------------------------------

    def infer_batch(self, data: Any, loss_function: Callable[..., Any] | None = None) -> Any:
        """Compute log-probabilities as verl does, and the weights of the responses' tokens from that pass.

        Raises:
            TrainerError: rows of the V0 trainer, or with pictures.
            ResultError: scores or weights that are not finite.
        """
        credit = self._credit
        if credit is None or self._adapter_is_off or loss_function is not None:
            return super().infer_batch(data, loss_function=loss_function)
        if extract_multi_modal_inputs(data.get("multi_modal_inputs", [])):
            raise TrainerError("credit reads text only, and these rows have pictures, video or sound")
        rollout = rollout_of(data)
        with credit.watching(self.module, rollout, step=self._rollouts) as watched:
            output = super().infer_batch(data, loss_function=loss_function)
        entropy = None
        if "entropy" in credit.needs and "entropy" in output["model_output"]:
            entropy = of_responses(output["model_output"]["entropy"], rollout)
        gamma = watched.weigh(entropy=entropy)
        output["model_output"][FIELD] = jagged(rollout.per_completion(gamma))
        self._rollouts += 1
        return output

    # ---- the update ---------------------------------------------------------------------------

    def train_batch(self, data: Any, loss_function: Callable[..., Any]) -> Any:
        """Make an update as verl does, with weighted advantages.

        Raises:
            TrainerError: rows without weights or advantages, or a loss that credit does not reach.
        """
        credit = self._credit
        assert credit is not None, "verl trains no engine that is forward_only"
        if not self._loss_was_tried:
            check_loss(loss_function)
            self._loss_was_tried = True
        if "advantages" not in data:
            raise TrainerError("these rows have no advantages for credit to weight: train with main_ppo")
        if FIELD not in data:
            raise TrainerError(
                "these rows have no weights, since the actor did not compute their log-probabilities before "
                "this update, or what it returned was dropped: credit needs the V1 trainer "
                "(trainer.use_v1=True) without algorithm.rollout_correction.bypass_mode"
            )
        rollout = rollout_of(data)
        own = rollout.response_mask
        advantages, gamma = padded(data["advantages"], 0.0), padded(data[FIELD], 1.0)
        weighted = apply_credit(advantages, gamma, own, signs=credit.signs)
        # A copy, since verl may train on the same rows again in its next epoch.
        data = data.copy()
        data["advantages"] = jagged(rollout.per_completion(weighted))
        output = super().train_batch(data, loss_function)
        output["metrics"] |= self._metrics(rollout, advantages, gamma, own)
        return output

    def _metrics(self, rollout: Any, advantages: Any, gamma: Any, own: Any) -> dict[str, list[float]]:
        """Return credit's metrics of an update, over all processes, each as a list, as verl's own are.

        Metrics of the log-probability pass are thrown away by verl, so those of the rollout come here too.
        """
        assert self._credit is not None
        last = self._credit.last
        signs = self._credit.signs
        matters = own & is_weighted(advantages, signs) & (advantages != 0)
        weights = credit_weights(advantages, gamma, own, signs=signs)
        weighed = WeighedRollout(rollout, weights, matters, own.any(-1), None)
        found = credit_metrics(
            weighed,
            advantages,
            None,
            0.0,
            attention=False,
            total=self._processes.sum,
            processes=self._processes.count,
        )
        del found["credit/seconds"], found["credit/measured_rows"]
        metrics = (last.metrics if last is not None else {}) | found
        # verl averages over mini-batches, and one without an advantage would make NaN of all.
        return {name: [value] for name, value in metrics.items() if value == value}

    # ---- checkpoints --------------------------------------------------------------------------

    def save_checkpoint(self, local_path: str, *arguments: Any, **options: Any) -> None:
        """Save a checkpoint as verl does, and the grouping of heads with it."""
        super().save_checkpoint(local_path, *arguments, **options)
        if self._credit is not None and self.rank == 0:
            state = self._credit.state_dict() | {"rollouts": self._rollouts}
            Path(local_path, CHECKPOINT).write_text(json.dumps(state), encoding="utf-8")

    def load_checkpoint(self, local_path: str, *arguments: Any, **options: Any) -> None:
        """Restore a checkpoint as verl does, and the grouping of heads with it.

        Raises:
            ResultError: a checkpoint that was written with other settings of credit, or that is damaged.
        """
        # Before verl reads it, since it may delete the folder. One process reads it for all, since a folder
        # that is not shared has it only where the first process runs.
        read: list[Any] = [None]
        if self._credit is not None and self.rank == 0:
            file = Path(local_path, CHECKPOINT)
            read = [file.read_text(encoding="utf-8") if file.exists() else None]
        super().load_checkpoint(local_path, *arguments, **options)
        if self._credit is None:
            return
        distributed.broadcast_object_list(read, src=0)
        if read[0] is None:
            logger.warning(
                "attnprobe: the checkpoint %s was written without credit, so heads are classified anew",
                local_path,
            )
            return
        try:
            state = json.loads(read[0])
            rollouts = int(state.pop("rollouts"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResultError(f"{CHECKPOINT} in {local_path} is damaged: {error!r}") from error
        self._credit.load_state_dict(state)
        self._rollouts = rollouts


class RefusedEngine(BaseEngine):  # type: ignore[misc]
    """Stands for verl's other training backends, which would train without credit and say nothing.

    Raises:
        TrainerError: always.
    """

    def __init__(self, *_: Any, engine_config: Any = None, **__: Any) -> None:
        raise TrainerError(
            f"credit works with verl's training backends fsdp and fsdp2, not with "
            f"{getattr(engine_config, 'strategy', 'this one')}: set actor_rollout_ref.actor.strategy=fsdp2, "
            "or unset VERL_ENGINE_VENDOR"
        )


def register() -> None:
    """Tell verl about the engines; once in each process.

    A version of verl other than those tested gives a `UserWarning`.
    """
    installed = installed_version("verl")
    if installed is not None and not SpecifierSet(VERL).contains(installed, prereleases=True):
        warnings.warn(
            f"verl {installed} is installed, but attnprobe was tested with verl{VERL}: see that the log has "
            "actor/credit/gamma_mean",
            stacklevel=2,
        )
    for backends, engine in ((["fsdp", "fsdp2"], CreditEngine), (UNREAD, RefusedEngine)):
        EngineRegistry.register(model_type="language_model", backend=backends, device=DEVICES, vendor=VENDOR)(
            engine
        )

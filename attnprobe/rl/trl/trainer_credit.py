"""TrainerCredit: `RolloutCredit` for a TRL trainer, with the few things that a trainer does differently.

`attach_credit` makes one for each trainer, and `CreditHandle` holds it. The trainer's callback keeps the
grouping of heads, its accelerator sums over processes and sets the precision, its own function computes
entropy, and if its parameters are sharded, the whole model is run (`WholePassAdapter`). What is left to
others: measuring and weighing (rollout_credit), and reading a trainer (trainers).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnprobe.adapters.forward_output import logits_of
from attnprobe.adapters.transformers import TransformersAdapter
from attnprobe.batch import TokenBatch
from attnprobe.errors import TrainerError
from attnprobe.rl.credit import Credit
from attnprobe.rl.rollout_credit import RolloutCredit
from attnprobe.rl.scoring import Rollout
from attnprobe.rl.trl.callback import CreditCallback, callback_of
from attnprobe.rl.trl.trainers import is_sharded, policy_of, token_entropy


class TrainerCredit(RolloutCredit):
    """Computes the weights of the tokens of a trainer's rollouts.

    Args:
        trainer: a trainer that `check_trainer` accepts.
        credit: the strategy.
        options: further arguments of `RolloutCredit`.

    Raises:
        ParameterError: an invalid parameter.
        UnsupportedModelError: a policy whose attention cannot be read.
    """

    def __init__(self, trainer: Any, credit: Credit, **options: Any) -> None:
        super().__init__(trainer.accelerator.unwrap_model(trainer.model), credit, **options)
        self._trainer = trainer
        # Never by the memory budget: processes whose completions differ in length would then make different
        # numbers of forward passes and, with sharded parameters, wait for each other forever.
        self._size: int = self.batch_size or trainer.args.per_device_train_batch_size
        self.batch_size = self._size

    def model(self) -> Any:
        """Return the trainer's policy, which accelerate may have wrapped since credit was attached."""
        policy = policy_of(self._trainer)
        return WholePassAdapter(policy, self._trainer.model) if is_sharded(self._trainer) else policy

    @property
    def grouping(self) -> CreditCallback:
        """The trainer's callback, looked up each time: a trainer may replace its callbacks on resuming.

        Raises:
            TrainerError: the callback was removed.
        """
        callback = callback_of(self._trainer)
        if callback is None:
            raise TrainerError("the callback of attach_credit was removed: call detach() to end credit")
        return callback

    @property
    def measures_all(self) -> bool:
        """Whether parameters are sharded: all processes must then make the same number of passes."""
        return is_sharded(self._trainer)

    def token_entropy(self, rollout: Rollout) -> Float[Tensor, "completion token"]:
        """Return the entropy of each token at the sampling temperature, by the trainer's own function."""
        return token_entropy(self._trainer, rollout, self._size)

    def precision(self) -> AbstractContextManager[Any]:
        """Return the trainer's mixed precision.

        accelerate wraps the forward pass of what the trainer calls in it; a policy inside PEFT's wrapper
        would without it be measured in the precision of its parameters.
        """
        precision: AbstractContextManager[Any] = self._trainer.accelerator.autocast()
        return precision

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the trainer's processes."""
        total: Tensor = self._trainer.accelerator.reduce(values, reduction="sum")
        return total


class WholePassAdapter(TransformersAdapter):
    """Reads a policy in complete forward passes of the module that holds it.

    Sharded parameters (FSDP, DeepSpeed) are gathered by hooks around whole forward passes of the root
    module. So the root module is called, not the policy inside it, and a pass never stops after the last
    layer of interest.

    Args:
        policy: a transformers causal language model.
        root: the module around it that the trainer calls; it may be the policy itself.

    Raises:
        UnsupportedModelError: a policy whose attention cannot be read.
    """

    def __init__(self, policy: Any, root: nn.Module) -> None:
        super().__init__(policy)
        self._root = root

    def forward(
        self, batch: TokenBatch, *, logits_at: Int[Tensor, " position"] | None = None
    ) -> Float[Tensor, "batch position vocabulary"] | None:
        """Run the root module over right-padded sequences to its end, whether or not logits are needed."""
        # A pass that must return logits, here of one position, does not stop early.
        at = torch.zeros(1, dtype=torch.long) if logits_at is None else logits_at
        logits = super().forward(batch, logits_at=at)
        return None if logits_at is None else logits

    def _all_modules(self) -> Iterator[nn.Module]:
        return self._root.modules()

    def _logits(self, arguments: dict[str, Any]) -> Tensor | None:
        return logits_of(self._root(**arguments))

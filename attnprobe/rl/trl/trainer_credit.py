"""TrainerCredit: `RolloutCredit` for a TRL trainer, with the few things that a trainer does differently.

`attach_credit` makes one for each trainer, and `CreditHandle` holds it. The trainer's callback keeps the
grouping of heads, its accelerator sets the precision, its own function computes entropy, and all its
processes take part. What is left to others: measuring and weighing (rollout_credit), and reading a trainer
(trainers).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.errors import TrainerError
from attnprobe.rl.credit import Credit
from attnprobe.rl.rollout import Rollout
from attnprobe.rl.rollout_credit import RolloutCredit
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
        self._size: int = self.batch_size or trainer.args.per_device_train_batch_size
        self.batch_size = self._size

    @property
    def policy(self) -> Any:
        """The trainer's policy, which accelerate may have wrapped since credit was attached."""
        return policy_of(self._trainer)

    @property
    def root(self) -> Any:
        """The module that the trainer calls, if the policy's parameters are sharded."""
        return self._trainer.model if is_sharded(self._trainer) else None

    @property
    def group(self) -> Any:
        """All processes of the run, if there are several."""
        return torch.distributed.group.WORLD if self._trainer.accelerator.num_processes > 1 else None

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

"""Several processes that train one policy: sums over them, equal numbers of passes, and what is refused.

`RolloutCredit` groups heads and counts over all processes of a `torch.distributed` group. Which processes
train a policy nobody but the trainer knows (a group may hold rollout workers or a reward model too), so the
group is given, never guessed: processes that each grouped heads by themselves would silently train with
different weights. What is left to others: what is summed (rollout_credit), and whole passes of a sharded
module (whole_pass).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from attnprobe.errors import ParameterError, TrainerError


class Processes:
    """The processes that train a policy together; one by itself without a group.

    Args:
        group: a process group of `torch.distributed`, such as `torch.distributed.group.WORLD`; None: this
            process trains alone.

    Raises:
        ParameterError: anything but a process group, or a group without this process.
        TrainerError: no group, where `torch.distributed` runs several processes.

    >>> Processes(None).count
    1
    """

    def __init__(self, group: Any) -> None:
        running = distributed.get_world_size() if distributed.is_available() and is_running() else 1
        if group is None:
            if running > 1:
                raise TrainerError(
                    f"torch.distributed runs {running} processes, and credit must group heads over those "
                    "that train the policy: pass group=torch.distributed.group.WORLD, or the trainer's own"
                )
        elif group is distributed.GroupMember.NON_GROUP_MEMBER:
            raise ParameterError(
                "this process is not in the group that was given: all that train the policy are"
            )
        elif not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
            raise ParameterError(
                "group must be a process group of torch.distributed, such as torch.distributed.group.WORLD; "
                f"got {type(group).__name__}"
            )
        self._group = group
        self.count: int = 1 if group is None else distributed.get_world_size(group)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor, of the same shape everywhere, over all processes."""
        return self._reduced(values, "SUM")

    def largest(self, number: int, device: torch.device) -> int:
        """Return the largest of the processes' numbers."""
        return int(self._reduced(torch.tensor(number, device=device), "MAX"))

    def _reduced(self, values: Tensor, how: str) -> Tensor:
        if self.count == 1:
            return values
        # NCCL knows tensors on GPUs only, and parameters may be kept on the CPU.
        on_gpu = distributed.get_backend(self._group) == "nccl"
        there = values.cuda() if on_gpu else values.cpu()
        total = there.clone()
        distributed.all_reduce(total, op=getattr(distributed.ReduceOp, how), group=self._group)
        return total.to(values.device)


def is_running() -> bool:
    """Whether `torch.distributed` is initialised."""
    return distributed.is_available() and distributed.is_initialized()


def is_sharded(module: nn.Module) -> bool:
    """Return whether parameters of a module are sharded, by FSDP or DeepSpeed ZeRO-3.

    They are then whole only in a forward pass of the module that was sharded.

    >>> is_sharded(nn.Linear(2, 2))
    False
    """
    names = {type(each).__name__ for each in module.modules()}
    if "FullyShardedDataParallel" in names:
        return True
    return any(hasattr(each, "full_tensor") or hasattr(each, "ds_id") for each in module.parameters())

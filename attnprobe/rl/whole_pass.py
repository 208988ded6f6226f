"""WholePassAdapter: reading a policy in complete forward passes of the module that holds it.

`RolloutCredit` reads a sharded policy through one. What is left to others: reading (adapters), and that all
processes make the same number of passes (passes).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnprobe.adapters.forward_output import logits_of
from attnprobe.adapters.transformers import TransformersAdapter
from attnprobe.batch import TokenBatch


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

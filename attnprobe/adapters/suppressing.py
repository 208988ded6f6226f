"""Suppressing attention in the forward passes of a transformers model, whoever runs them.

The adapters make a `Suppressing` for each `suppressed` context. It tells the interception which pairs of a
layer's calls to remove, and checks that no layer was missed. What is left to others: which pairs are
suppressed (`Suppression`), and removing them from a call (interception, value_removal).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from attnprobe.adapters.attention_call import AttentionCall, MaskMemory, read_attention
from attnprobe.adapters.base import Suppression
from attnprobe.adapters.forward_watch import ForwardWatch, computes_layers_again
from attnprobe.adapters.interception import removes_values, suppresses_calls
from attnprobe.adapters.output_check import OutputCheck
from attnprobe.adapters.value_removal import ValueRemoval
from attnprobe.attention.factored import FactoredAttention
from attnprobe.batch import TokenBatch
from attnprobe.errors import AttnprobeError, IncompleteRunError, InterventionError


class Suppressing(ForwardWatch):
    """Removes pairs from the attention calls of a model's layers, and checks that no layer was missed."""

    def __init__(self, model: Any, name: str, suppression: Suppression, layers: Sequence[int]) -> None:
        super().__init__(model, name)
        self._suppression = suppression
        self._layers = layers
        self._applied: set[int] = set()
        self._masks = MaskMemory()
        self._output_check = OutputCheck()

    def of_layer(self, layer: int, module: nn.Module) -> AbstractContextManager[None]:
        """Return the context in which the calls of a layer's attention module are suppressed."""
        pairs = partial(self._removed_pairs, layer)
        if self._suppression.mode == "mask":
            return suppresses_calls(module, pairs)
        return removes_values(module, ValueRemoval(pairs, partial(self._attention_of, layer)))

    def began(self, batch: TokenBatch, given: dict[str, Any]) -> dict[str, Any]:
        """Refuse gradient checkpointing, which would silently recompute layers without suppression."""
        if computes_layers_again(self._model):
            raise InterventionError(
                f"the attention of {self._name} cannot be suppressed under gradient checkpointing: call "
                "model.gradient_checkpointing_disable() first"
            )
        self._applied = set()
        self._masks = MaskMemory()
        return {}

    def ended(self, output: Any) -> Any:
        """Check that every layer's attention was suppressed."""
        missed = sorted(set(self._layers) - self._applied)
        if missed:
            raise IncompleteRunError(
                f"the attention of layers {missed} of {self._name} was not suppressed: the model did not "
                "make their attention call in this pass"
            )

    def _removed_pairs(self, layer: int, call: AttentionCall) -> Bool[Tensor, "#batch #head query key"]:
        """Return which keys a layer's queries must not see."""
        if not self.is_running:
            raise AttnprobeError(f"a layer of {self._name} was called outside a forward pass of the model")
        self._applied.add(layer)
        device = call.query.device
        queries = self.columns.of_queries(call.query.shape[2])
        keys = self.columns.of_keys(call.key.shape[2])
        return self._suppression.removed(
            layer,
            call.query.shape[0],
            call.query.shape[1],
            torch.arange(queries.start, queries.stop, device=device),
            torch.arange(keys.start, keys.stop, device=device),
        )

    def _attention_of(self, layer: int, call: AttentionCall) -> FactoredAttention:
        """Return the attention of a layer's call, which gives the call's own output."""
        attention = read_attention(call, self._masks, self.columns)
        self._output_check.check(attention, call, f"layer {layer} of {self._name}")
        return attention

"""The cases of the conformance suite: a wrapped model, its weights unwrapped, and a padded call of both.

`conformance` prepares one for each family, side of padding and dtype, and collects what both models show.
What is left to others: the checks (conformance).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnprobe.adapters import adapter_for
from attnprobe.adapters.base import Value
from attnprobe.attention.operator import Attention
from attnprobe.batch import TokenBatch
from attnprobe.probe import Probe
from attnprobe.testing.tiny_models import VOCABULARY, tiny_model

SIDES = ("left", "right")
DTYPES = (torch.float32, torch.bfloat16)

Wrap = Callable[[Any], Any]
Run = Callable[..., Any]

_TOKENS, _PADDING = 20, 5

RESPONSE = 7
"""How many tokens of a sequence come before its response."""


@dataclass(frozen=True)
class Case:
    """A wrapped model, the same weights unwrapped, and a padded call of two examples.

    `eager` has those weights too, and gives maps; `whole` says whether all checks are made.
    """

    wrapped: Any
    reference: Any
    eager: Any
    run: Run
    arguments: dict[str, Tensor]
    real: Tensor
    precise: bool
    whole: bool

    @property
    def plain_of_wrapped(self) -> Any:
        """The transformers model inside the wrapped one, or the wrapped one itself."""
        return getattr(adapter_for(self.wrapped), "model", self.wrapped)

    def call_wrapped(self, examples: slice = slice(None), columns: Tensor | None = None) -> None:
        """Run the wrapped model, on some examples and columns, as a user of its backend does."""
        with torch.no_grad():
            arguments = {name: value[examples] for name, value in self.arguments.items()}
            if columns is not None:
                arguments = {name: value[:, columns] for name, value in arguments.items()}
            self.run(self.wrapped, arguments.pop("input_ids"), **arguments)

    def call_reference(self) -> None:
        """Run the same weights in transformers."""
        with torch.no_grad():
            self.reference(**self.arguments)


def prepared_case(wrap: Wrap, family: str, side: str, dtype: torch.dtype, run: Run) -> Case:
    """Return a case of two sequences, the first padded on a side, as a careful user would pass them."""
    reference, eager = _references(family, dtype)
    wrapped = wrap(tiny_model(family).to(dtype))
    adapter_for(wrapped)
    ids = torch.randint(1, VOCABULARY, (2, _TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, _TOKENS, dtype=torch.long)
    mask[0, slice(0, _PADDING) if side == "left" else slice(_TOKENS - _PADDING, _TOKENS)] = 0
    call = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(type(reference).forward).parameters:
        call["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    precise = dtype == torch.float32
    return Case(wrapped, reference, eager, run, call, mask.bool(), precise, precise and side == SIDES[0])


@lru_cache(maxsize=4)
def _references(family: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return a family's model as it is by default, and with eager attention."""
    return tiny_model(family).to(dtype), tiny_model(family, implementation="eager").to(dtype)


def eager_maps(model: Any, **arguments: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the maps that the layers with attention return under eager attention, and the logits."""
    with torch.no_grad():
        output = model(**arguments, output_attentions=True)
    # Some hybrids return something for their other layers too; others return nothing.
    layers = adapter_for(model).layers
    if len(output.attentions) > len(layers):
        return [output.attentions[layer] for layer in layers], output.logits
    return list(output.attentions), output.logits


class Collect(Probe):
    """Keeps the values at some sites, with whole patterns, and may replace them."""

    def __init__(self, *sites: str, change: Callable[[Tensor], Tensor] | None = None) -> None:
        self.sites = frozenset(sites)
        self.values: dict[tuple[str, int | None], Tensor] = {}
        self._change = change

    def observe(self, site: str, layer: int | None, value: Value, batch: TokenBatch) -> Tensor | None:
        """Keep a value; of attention the pattern, whose columns must be what `column` returns."""
        if isinstance(value, Attention):
            rows = value.rows(torch.arange(value.query_count))
            example = torch.arange(value.batch_size)
            key = (example + value.key_count // 2) % value.key_count
            torch.testing.assert_close(value.column(key), rows[example, :, :, key], rtol=0, atol=1e-5)
            self.values[site, layer] = rows
            return None
        self.values[site, layer] = value.detach().clone()
        return None if self._change is None or site == "logits" else self._change(value)

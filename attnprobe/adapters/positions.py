"""How a model places its tokens: how many it can take, and when a sequence's numbers depend on its
neighbours.

Most models rotate query and key by frequencies that are known beforehand, for any number of tokens. Others
look positions up in a table, which ends. And a few look at the whole batch: LongRoPE and dynamic NTK
choose their frequencies by the longest row, Doge's sparse attention chooses its keys among all columns,
padding included, and which of several equal keys an indexer chooses depends on the number of columns. The
transformers adapter asks; `measure` runs together only sequences that do not disturb each other. What is
left to others: the forward passes (transformers).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from attnprobe.adapters.architecture import WRAPPED

_FREQUENCIES = "inv_freq"
_ORIGINAL = "original_inv_freq"
_BUDGETS = ("keep_window_size", "index_topk")
"""Settings that say how many keys a query of sparse attention chooses, where that depends on the batch."""


def context_length(decoder: nn.Module, config: Any) -> int | None:
    """Return the largest number of tokens that a decoder can take; None if it can take any number.

    A limit is one of a table of positions, which may be learned or computed when the model is made. Rotary
    positions have none: `max_position_embeddings` says what a model was trained for.
    """
    limits = [_table_size(module) for module in _without_towers(decoder)]
    # MPT makes its linear biases for that many keys.
    limits.append(getattr(config, "max_seq_len", None))
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def _without_towers(decoder: nn.Module) -> Iterator[nn.Module]:
    """Return a decoder's modules, without those of other models inside it, such as one for images."""
    kind = type(getattr(decoder, "config", None))
    towers = {
        id(part)
        for module in decoder.modules()
        if isinstance(module, PreTrainedModel) and type(module.config) is not kind
        for part in module.modules()
    }
    return (module for module in decoder.modules() if id(module) not in towers)


def _table_size(module: nn.Module) -> int | None:
    """Return how many positions a module's own table of positions holds, if it has one."""
    # A backend's wrapper stands where the table was.
    children = ((name, child) for name, child in module._modules.items() if child is not None)
    tables = {name: child._modules.get(WRAPPED) or child for name, child in children}
    sizes = [
        table.num_embeddings - int(getattr(table, "offset", 0))
        for name, table in tables.items()
        if isinstance(table, nn.Embedding) and ("pos" in name or name == "wpe")
    ]
    # Tables that are computed when the model is made (GPT-J, CodeGen; CTRL).
    for name in ("embed_positions", "pos_encoding"):
        table = module._buffers.get(name, vars(module).get(name))
        if isinstance(table, Tensor) and table.ndim >= 2:
            sizes.append(table.shape[-2])
    return min(sizes, default=None)


class Regimes:
    """Which lengths of a sequence a model treats alike, whatever else is in the batch."""

    def __init__(self, decoder: nn.Module, config: Any) -> None:
        self._by_range: set[int] = set()
        self._by_length: set[int] = set()
        for rope in _rope_parameters(config):
            if rope.get("rope_type") == "longrope":
                self._by_range.add(int(rope["original_max_position_embeddings"]))
            elif "dynamic" in str(rope.get("rope_type")):
                self._by_length.add(int(config.max_position_embeddings))
        for name in _BUDGETS:
            kept = getattr(config, name, None)
            if isinstance(kept, int):
                self._by_length.add(kept)
        self._rotary = [
            module
            for module in decoder.modules()
            if (self._by_range or self._by_length)
            and any(name.endswith(_ORIGINAL) for name in module._buffers)
        ]

    def of_length(self, length: int) -> Hashable:
        """Return the regime of a sequence: those of the same regime may run together, right-padded."""
        ranges = tuple(length > limit for limit in sorted(self._by_range))
        beyond = self._by_length and length > min(self._by_length)
        return (*ranges, length if beyond else 0)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Let the passes in this context use the frequencies of their own tokens.

        A dynamic model keeps those of the longest sequence that it has seen. They are put back at the end.
        """
        states = [(module, _state(module)) for module in self._rotary]
        try:
            for module, _ in states:
                _reset(module)
            yield
        finally:
            for module, (buffers, attributes) in states:
                for name, (buffer, values) in buffers.items():
                    module._buffers[name] = buffer.copy_(values)
                vars(module).update(attributes)


def _rope_parameters(config: Any) -> Iterable[dict[str, Any]]:
    """Return the rotary parameters of a config: one set, or one for each type of layer."""
    given = getattr(config, "rope_parameters", None)
    if not isinstance(given, dict):
        return []
    return [given] if "rope_type" in given else [rope for rope in given.values() if isinstance(rope, dict)]


def _state(module: nn.Module) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Any]]:
    """Return what a forward pass may change in a rotary module: buffers with their values, and attributes."""
    buffers = {
        name: (buffer, buffer.clone()) for name, buffer in module._buffers.items() if buffer is not None
    }
    kept = ("max_seq_len_cached", "attention_scaling")
    return buffers, {name: value for name, value in vars(module).items() if name.endswith(kept)}


def _reset(module: nn.Module) -> None:
    """Give a rotary module the frequencies that it was made with."""
    for name, original in list(module._buffers.items()):
        if name.endswith(_ORIGINAL) and original is not None:
            prefix = name.removesuffix(_ORIGINAL)
            module._buffers[prefix + _FREQUENCIES] = original.clone()
    known = vars(module)
    for name in [name for name in known if name.endswith("max_seq_len_cached")]:
        known[name] = known.get("original_max_seq_len", known[name])

"""Suppressing attention: what a model computes when chosen queries do not see chosen keys.

`suppress_attention` takes pairs of positions, or whole heads, out of the softmax of the layers of a
model, in whatever forward passes run while it is open. The other keys of a row share the attention
that is taken away, as in the attention knock-out of arXiv 2304.14767. Together with the model's own
logits it says what later tokens lose by not reading an earlier one. What is left to others: how a
backend masks a pair (adapters), and what is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attnprobe.adapters import adapter_for
from attnprobe.adapters.base import Layers, Suppression, resolve_layers
from attnprobe.errors import ParameterError


@contextmanager
def suppress_attention(
    model: Any,
    *,
    layers: Layers = "all",
    heads: Iterable[int] | Mapping[int, Iterable[int]] | None = None,
    pairs: Iterable[tuple[int, int]] | Tensor | None = None,
    queries: Iterable[int] | Tensor | None = None,
    keys: Iterable[int] | Tensor | None = None,
) -> Iterator[None]:
    """Suppress attention in every forward pass of a model for as long as the block lasts.

    What is suppressed gets probability 0 before the softmax is taken, so that the other keys (and a
    sink, where the model has one) share its part. A query of a head that is left with no key reads
    zeros.

    Args:
        model: a model that an adapter knows.
        layers: "all", "middle" or layer numbers.
        heads: in which heads: numbers, or numbers by layer, which then are the layers; default: all.
        pairs: `(query, key)` columns, the same in every row; a token's own column may be named too.
        keys: columns that no later token is to see: numbers, the same in every row, or a boolean mask
            `[batch or 1, token]`. A token still sees itself.
        queries: with `keys`: which later tokens do not see them, in the same form; default: all.
            With neither `pairs` nor `keys` the heads are suppressed whole.

    Columns count from the first token of the sequence, in the layout that the model is given (padding
    included), and go on through a KV cache. Several blocks add up.

    Raises:
        ParameterError: layers, heads or columns that make no sense.
        UnsupportedModelError: a model whose attention cannot be suppressed, or an attention
            implementation that takes no mask of pairs (flash attention).
        IncompleteRunError: on a forward pass in which a layer did not make its attention call.

    >>> import torch
    >>> from attnprobe.testing.tiny_models import tiny_model
    >>> model, ids = tiny_model("llama"), torch.arange(1, 9)[None]
    >>> with torch.no_grad():
    ...     before = model(ids).logits
    ...     with suppress_attention(model, keys=[3]):
    ...         after = model(ids).logits
    >>> (before != after).any(-1)[0].tolist()
    [False, False, False, False, True, True, True, True]
    """
    adapter = adapter_for(model)
    by_layer: dict[int, tuple[int, ...] | None]
    if isinstance(heads, Mapping):
        if layers != "all":
            raise ParameterError("heads by layer say which layers there are: leave out layers")
        by_layer = {layer: _numbers(of, "heads") for layer, of in heads.items()}
        resolve_layers(list(by_layer), adapter)
    else:
        chosen = resolve_layers(layers, adapter)
        by_layer = dict.fromkeys(chosen, None if heads is None else _numbers(heads, "heads"))
    if queries is not None and keys is None:
        raise ParameterError("queries say who is not to see keys: give keys too, or pairs")
    suppression = Suppression(
        by_layer,
        None if pairs is None else _pairs(pairs),
        None if queries is None else _columns(queries, "queries"),
        None if keys is None else _columns(keys, "keys"),
        everything=pairs is None and keys is None,
    )
    with adapter.suppressed(suppression, tuple(sorted(by_layer))):
        yield


def _numbers(values: Iterable[int], name: str) -> tuple[int, ...]:
    numbers = tuple(int(value) for value in values)
    if not numbers or min(numbers) < 0:
        raise ParameterError(f"{name} are numbers from 0, at least one; got {list(numbers)}")
    return numbers


def _columns(values: Iterable[int] | Tensor, name: str) -> Bool[Tensor, "#batch column"]:
    """Return columns as a mask."""
    if isinstance(values, Tensor) and values.dtype == torch.bool:
        mask = values[None] if values.ndim == 1 else values
        if mask.ndim != 2 or mask.numel() == 0:
            raise ParameterError(f"{name} as a mask are [batch or 1, token], got {list(values.shape)}")
        return mask
    if isinstance(values, Tensor):
        values = values.flatten().tolist()
    numbers: Sequence[int] = _numbers(values, name)
    mask = torch.zeros(1, max(numbers) + 1, dtype=torch.bool)
    mask[0, list(numbers)] = True
    return mask


def _pairs(values: Iterable[tuple[int, int]] | Tensor) -> Int[Tensor, "pair 2"]:
    pairs = values if isinstance(values, Tensor) else torch.tensor([tuple(pair) for pair in values])
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.is_floating_point() or len(pairs) == 0:
        raise ParameterError(f"pairs are (query, key) columns, [pair, 2]; got {list(pairs.shape)}")
    if bool((pairs < 0).any()) or bool((pairs[:, 0] < pairs[:, 1]).any()):
        raise ParameterError(
            "pairs are (query, key) columns with 0 <= key <= query, as no query sees later keys"
        )
    return pairs

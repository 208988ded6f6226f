"""Suppressing attention: what a model computes when chosen queries do not see chosen keys.

`suppress_attention` takes pairs of positions, or whole heads, out of the softmax of the layers of a
model, in whatever forward passes run while it is open. The other keys of a row share the attention
that is taken away, as in the attention knock-out of arXiv 2304.14767. Together with the model's own
logits it says what later tokens lose by not reading an earlier one. What is left to others: how a
backend masks a pair (adapters), and what is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attnprobe.adapters import Adapter, adapter_for
from attnprobe.adapters.base import Layers, Suppression, resolve_layers
from attnprobe.errors import ParameterError
from attnprobe.head_selection import HeadSelection, HeadsLike
from attnprobe.validation import ArrayLike, IntLike, as_tensor, brief, whole_numbers
from attnprobe.with_block import WithBlock

# No text is as long: a column number beyond it is a mistake, which is not to fill the memory.
_LAST_COLUMN = 2**24

Columns = IntLike | ArrayLike | Iterable[int]


def suppress_attention(
    model: Any,
    *,
    layers: Layers = "all",
    heads: HeadsLike | None = None,
    pairs: Iterable[tuple[int, int]] | ArrayLike | None = None,
    queries: Columns | None = None,
    keys: Columns | None = None,
) -> WithBlock[None]:
    """Suppress attention in every forward pass of a model for as long as a `with` block lasts.

    What is suppressed gets probability 0 before the softmax is taken, so that the other keys (and a
    sink, where the model has one) share its part. A query of a head that is left with no key reads
    zeros.

    Args:
        model: a model that an adapter knows.
        layers: "all", "middle" or layer numbers.
        heads: in which heads, in any form that `HeadSelection.of` knows: a group of `HeadGroups`, pairs, a
            mask, a dictionary by layer, or numbers, which mean these heads in every layer; default: all.
        pairs: `(query, key)` columns, the same in every row; a token's own column may be named too.
        keys: columns that no later token is to see: numbers, the same in every row, or a mask `[token]` or
            `[batch or 1, token]`. A token still sees itself. A mask holds truth values, or nothing but 0
            and 1 and more than two of them, since numbers of columns do not repeat: `[0, 1]` are two columns,
            `[0, 1, 0]` is a mask that marks one.
        queries: with `keys`: which later tokens do not see them, in the same form; default: all.
            With neither `pairs` nor `keys` the heads are suppressed whole.

    Columns count from the first token of the sequence, in the layout that the model is given (padding
    included), and go on through a KV cache. Several blocks add up. Arguments are checked at the call.

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
    by_layer = heads_by_layer(heads, layers, adapter)
    if queries is not None and keys is None:
        raise ParameterError("queries say who is not to see keys: give keys too, or pairs")
    suppression = Suppression(
        by_layer,
        None if pairs is None else _pairs(pairs),
        None if queries is None else _columns(queries, "queries"),
        None if keys is None else _columns(keys, "keys"),
        everything=pairs is None and keys is None,
    )
    return WithBlock("suppress_attention", adapter.suppressed(suppression, tuple(sorted(by_layer))))


def heads_by_layer(
    heads: HeadsLike | None, layers: Layers, adapter: Adapter
) -> dict[int, tuple[int, ...] | None]:
    """Return the layers in which attention is suppressed, with the heads of each; None for all heads.

    Raises:
        ParameterError: heads or layers that the model does not have, or heads of different weights.
    """
    chosen = resolve_layers(layers, adapter)
    if heads is None or (isinstance(heads, str) and heads == "all"):
        return dict.fromkeys(chosen, None)
    selection = HeadSelection.of(heads, chosen, adapter.head_count, model_name=adapter.model_name)
    if selection.is_weighted:
        raise ParameterError(
            f"a head is suppressed or it is not, so weights must be equal; got {brief(selection)}"
        )
    return dict(selection.by_layer())


def _columns(values: Columns, name: str) -> Bool[Tensor, "#batch column"]:
    """Return columns, given as numbers or as a mask, as a mask."""
    if isinstance(values, Iterable) and not isinstance(values, Tensor | str | bytes | Mapping):
        # What holds no numbers is left for the check below to name.
        values = values if hasattr(values, "__array__") else list(values)
    given = as_tensor(values, name)
    if given.numel() == 0 or given.ndim > 2:
        raise ParameterError(
            f"{name} are numbers of columns, at least one, or a mask [batch or 1, token]; got {brief(values)}"
        )
    if given.is_floating_point() or given.is_complex():
        raise ParameterError(
            f"{name} are whole numbers of columns, or a mask of truth values or 0 and 1; got {brief(values)}"
        )
    only_bits = given.dtype == torch.bool or bool(((given == 0) | (given == 1)).all())
    if given.ndim and (given.dtype == torch.bool or (only_bits and (given.ndim == 2 or given.numel() > 2))):
        return given.bool().reshape(-1, given.shape[-1])
    if given.ndim == 2:
        raise ParameterError(
            f"{name} as a mask [batch or 1, token] hold truth values, or 0 and 1; got {brief(values)} with "
            f"{int(given.max())} in it. Numbers of columns are one list for all rows"
        )
    numbers = whole_numbers(given, name, maximum=_LAST_COLUMN)
    mask = torch.zeros(1, max(numbers) + 1, dtype=torch.bool)
    mask[0, numbers] = True
    return mask


def _pairs(values: Iterable[tuple[int, int]] | ArrayLike) -> Int[Tensor, "pair 2"]:
    """Return pairs of a query's and a key's column as a tensor."""
    listed = isinstance(values, Iterable) and not isinstance(values, Tensor | str | bytes | Mapping)
    given: Any = list(values) if listed and not hasattr(values, "__array__") else values
    pairs = as_tensor(given, "pairs")
    whole = not (pairs.is_floating_point() or pairs.is_complex() or pairs.dtype == torch.bool)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not whole or len(pairs) == 0:
        kind = str(pairs.dtype).removeprefix("torch.")
        raise ParameterError(
            f"pairs are (query, key) columns in whole numbers, [pair, 2]; got {kind} {list(pairs.shape)}"
        )
    if bool((pairs < 0).any()) or bool((pairs[:, 0] < pairs[:, 1]).any()):
        wrong = pairs[(pairs[:, 1] < 0) | (pairs[:, 0] < pairs[:, 1])][0].tolist()
        raise ParameterError(
            "pairs are (query, key) columns with 0 <= key <= query, as no query sees later keys; got "
            f"{tuple(wrong)}"
        )
    return pairs

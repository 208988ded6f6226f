"""Suppressing attention: what a model computes when chosen queries do not read chosen keys.

`suppress_attention` removes pairs of positions, or whole heads, from a model's layers, in every forward pass
that runs while the block is open: either from the softmax, where the remaining keys of a row share the
attention that was removed, as in the attention knockout of arXiv 2304.14767; or the values only, so that all
weights stay as they are. Compared with the model's own logits, the
result shows what later tokens lose by not reading an earlier one. Users call it, and so does the knockout
analysis. What is left to others: how a backend does it (adapters), and what is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attnprobe.adapters import Adapter, adapter_for
from attnprobe.adapters.base import Layers, Mode, Suppression, resolve_layers
from attnprobe.errors import ParameterError
from attnprobe.head_selection import HeadSelection, HeadsLike
from attnprobe.validation import ArrayLike, IntLike, as_tensor, brief, choice, whole_numbers
from attnprobe.with_block import WithBlock

# No text is this long: a larger column number is a mistake, and must not fill the memory.
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
    mode: Mode = "mask",
) -> WithBlock[None]:
    """Suppress attention in every forward pass of a model while a `with` block is open.

    With `mode="mask"`, suppressed pairs are masked before the softmax, so their probability is 0 and the
    other keys (and the sink, where the model has one) share it. A query that is left with no key in a head
    reads zeros. With `mode="value"`, all probabilities stay as they are, but a query t no longer gets the
    value of a suppressed key s: its output loses `A[t, s] v[s]`. Masking asks what later tokens do when they
    must read something else instead, removing values what they lose.

    Args:
        model: a model that an adapter knows.
        layers: a name such as "all" or "middle", or layer numbers.
        heads: in which heads, in any form that `HeadSelection.of` accepts: a group of `HeadGroups`, pairs, a
            mask, a dictionary by layer, or numbers, which mean these heads in every layer; default: all.
        pairs: `(query, key)` columns, the same in every example; a query may be paired with its own column.
        keys: columns that later tokens cannot see: numbers, the same in every example, or a mask `[token]` or
            `[batch or 1, token]`. A token still sees itself. A mask is boolean, or consists of 0 and 1 only
            and has more than two entries, since column numbers do not repeat: `[0, 1]` is two columns,
            `[0, 1, 0]` a mask that marks one.
        queries: with `keys`: which later tokens cannot see them, in the same form; default: all.
            With neither `pairs` nor `keys`, the heads are suppressed entirely.
        mode: "mask" or "value". The latter works under every attention implementation that can be read, but
            not with gradients or dropout.

    Columns are counted from the first token of the sequence, in the layout that the model is given (padding
    included), and continue through a KV cache. Nested blocks add up. Arguments are checked when the function
    is called.

    Raises:
        ParameterError: invalid layers, heads or columns, or nothing chosen.
        UnsupportedModelError: a model whose attention cannot be suppressed or, with "mask", an attention
            implementation that accepts no mask of pairs (flash attention).
        InterventionError: in a forward pass, gradient checkpointing or, with "value", gradients or dropout.
        IncompleteRunError: in a forward pass, a layer did not make its attention call.

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
    choice(mode, "mode", get_args(Mode))
    adapter = adapter_for(model)
    by_layer = heads_by_layer(heads, layers, adapter)
    if queries is not None and keys is None:
        raise ParameterError("queries are the tokens that cannot see keys: give keys too, or pairs")
    if pairs is None and keys is None and heads is None and isinstance(layers, str) and layers == "all":
        raise ParameterError(
            'nothing was chosen: give pairs, keys, heads or layers, or heads="all" to suppress all attention'
        )
    suppression = Suppression(
        by_layer,
        None if pairs is None else _pairs(pairs),
        None if queries is None else _columns(queries, "queries"),
        None if keys is None else _columns(keys, "keys"),
        everything=pairs is None and keys is None,
        mode=mode,
    )
    return WithBlock("suppress_attention", adapter.suppressed(suppression, tuple(sorted(by_layer))))


def heads_by_layer(
    heads: HeadsLike | None, layers: Layers, adapter: Adapter
) -> dict[int, tuple[int, ...] | None]:
    """Return the layers in which attention is suppressed, with the heads of each; None for all heads.

    Raises:
        ParameterError: heads or layers that the model does not have, or heads with different weights.
    """
    chosen = resolve_layers(layers, adapter)
    if heads is None or (isinstance(heads, str) and heads == "all"):
        return dict.fromkeys(chosen, None)
    selection = HeadSelection.of(heads, chosen, adapter.head_count, model_name=adapter.model_name)
    if selection.is_weighted:
        raise ParameterError(
            f"a head is either suppressed or not, so weights must be equal; got {brief(selection)}"
        )
    return dict(selection.by_layer())


def _columns(values: Columns, name: str) -> Bool[Tensor, "#batch column"]:
    """Return columns, given as numbers or as a mask, as a mask."""
    if isinstance(values, Iterable) and not isinstance(values, Tensor | str | bytes | Mapping):
        # Anything without numbers is left for the checks below to report.
        values = values if hasattr(values, "__array__") else list(values)
    given = as_tensor(values, name)
    if given.numel() == 0 or given.ndim > 2:
        raise ParameterError(
            f"{name} must be column numbers, at least one, or a mask [batch or 1, token]; got {brief(values)}"
        )
    if given.is_floating_point() or given.is_complex():
        raise ParameterError(
            f"{name} must be whole column numbers, or a mask of booleans or of 0 and 1; got {brief(values)}"
        )
    only_bits = given.dtype == torch.bool or bool(((given == 0) | (given == 1)).all())
    if given.ndim and (given.dtype == torch.bool or (only_bits and (given.ndim == 2 or given.numel() > 2))):
        return given.bool().reshape(-1, given.shape[-1])
    if given.ndim == 2:
        raise ParameterError(
            f"{name} as a mask [batch or 1, token] must hold booleans, or 0 and 1; got {brief(values)} with "
            f"{int(given.max())} in it. Column numbers are one list for all examples"
        )
    numbers = whole_numbers(given, name, maximum=_LAST_COLUMN)
    if len(set(numbers)) < len(numbers):
        # Such as a mask that holds something else than 0 and 1.
        raise ParameterError(f"{name} names columns more than once; got {brief(values)}")
    mask = torch.zeros(1, max(numbers) + 1, dtype=torch.bool)
    mask[0, numbers] = True
    return mask


def _pairs(values: Iterable[tuple[int, int]] | ArrayLike) -> Int[Tensor, "pair 2"]:
    """Return pairs of query and key columns as a tensor."""
    listed = isinstance(values, Iterable) and not isinstance(values, Tensor | str | bytes | Mapping)
    given: Any = list(values) if listed and not hasattr(values, "__array__") else values
    pairs = as_tensor(given, "pairs")
    whole = not (pairs.is_floating_point() or pairs.is_complex() or pairs.dtype == torch.bool)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not whole or len(pairs) == 0:
        kind = str(pairs.dtype).removeprefix("torch.")
        raise ParameterError(
            f"pairs must be whole (query, key) columns, [pair, 2]; got {kind} {list(pairs.shape)}"
        )
    if bool((pairs < 0).any()) or bool((pairs[:, 0] < pairs[:, 1]).any()):
        wrong = pairs[(pairs[:, 1] < 0) | (pairs[:, 0] < pairs[:, 1])][0].tolist()
        raise ParameterError(
            "pairs must be (query, key) columns with 0 <= key <= query, since no query sees later keys; got "
            f"{tuple(wrong)}"
        )
    return pairs

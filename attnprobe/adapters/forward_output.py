"""What a forward call of a transformers model returned: where its logits are, and which parts are maps.

An output is a mapping or, with `return_dict=False`, a tuple. `Reading` shows and replaces logits, and the
adapters return them to whoever runs a batch. What is left to others: the call's arguments (forward_call).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def logits_of(output: Any) -> Tensor | None:
    """Return the logits in what a model returned, in any form; None if there are none."""
    if isinstance(output, Mapping):
        return output.get("logits")
    if isinstance(output, tuple):
        place = _place_of_logits(output)
        return None if place is None else output[place]
    return None


def with_logits(output: Any, logits: Tensor) -> Any:
    """Return what a model returned, with other logits in the place of its own."""
    if isinstance(output, Mapping):
        return type(output)(**{**output, "logits": logits})
    place = _place_of_logits(output)
    assert place is not None
    return (*output[:place], logits, *output[place + 1 :])


def _place_of_logits(output: tuple[Any, ...]) -> int | None:
    """Return where a tuple has the logits: losses, which have no axis for tokens, may come before them."""
    places = (i for i, entry in enumerate(output) if isinstance(entry, Tensor) and entry.ndim == 3)
    return next(places, None)


def without_maps(output: Any) -> Any:
    """Return a model's output without its attentions, whose maps were removed on the way."""
    if isinstance(output, tuple):
        return tuple(e for e in output if not (isinstance(e, tuple) and set(e) == {None}))
    return type(output)(**{name: value for name, value in output.items() if name != "attentions"})


def is_map(entry: Any) -> bool:
    """Whether a part of what an attention module returned is its map."""
    return isinstance(entry, Tensor) and entry.ndim == 4 and entry.is_floating_point()

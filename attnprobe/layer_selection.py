"""Names for layers: "all", the thirds of a model, and the five of a third that the paper measures.

Every function that takes `layers` accepts these names beside numbers. Adapters resolve them for a model, and
`HeadStatistics.at_layers` for the layers that were measured. What is left to others: which layers of a model
can be read (adapters).
"""

from __future__ import annotations

from typing import Literal, get_args

from attnprobe.errors import ParameterError

LayerName = Literal["all", "bottom", "middle", "top", "bottom third", "middle third", "top third"]

LAYER_NAMES: tuple[LayerName, ...] = get_args(LayerName)

_THIRDS = ("bottom", "middle", "top")


def named_layers(name: str, available: tuple[int, ...]) -> tuple[int, ...]:
    """Return the layers that a name stands for, of the layers that have attention.

    A third's name alone means five layers, evenly spaced from its first layer to the first of the next third
    (to the last layer, in the top third): "middle" are the five of arXiv 2510.13554v2, from floor(L/3) to
    floor(2L/3), and "bottom" and "top" are their counterparts in Table 9. "bottom third" and so on mean all
    layers of a third, as in Table 10; the three thirds are disjoint.

    Raises:
        ParameterError: another name, or a third of a model with fewer than three layers with attention.

    >>> layers = tuple(range(30))
    >>> named_layers("middle", layers), named_layers("top third", layers)
    ((10, 12, 15, 18, 20), (20, 21, 22, 23, 24, 25, 26, 27, 28, 29))
    """
    if name not in LAYER_NAMES:
        raise ParameterError(
            f"layers must be numbers or one of {', '.join(map(repr, LAYER_NAMES))}; got {name!r}"
        )
    if name == "all":
        return available
    count = len(available)
    third = _THIRDS.index(name.removesuffix(" third"))
    first, stop = third * count // 3, (third + 1) * count // 3
    if name.endswith(" third"):
        if count < 3:
            raise ParameterError(f"{name!r} needs at least three layers with attention; there are {count}")
        return available[first:stop]
    last = min(stop, count - 1)
    return tuple(sorted({available[first + round(step * (last - first) / 4)] for step in range(5)}))


def parse_layers(text: str) -> LayerName | list[int]:
    """Return layers from a name such as "all" or "middle", or numbers and ranges separated by commas.

    >>> parse_layers("0,4,8-10")
    [0, 4, 8, 9, 10]

    Raises:
        ParameterError: anything else.
    """
    if text in LAYER_NAMES:
        return text
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            names = ", ".join(f'"{name}"' for name in LAYER_NAMES)
            raise ParameterError(f"layers must be {names} or numbers such as 0,4,8-11; got {text!r}")
        numbers += range(int(first), int(last or first) + 1)
    return numbers

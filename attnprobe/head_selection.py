"""HeadSelection: which heads, and with what weight; every function that takes heads accepts one.

A selection may be given as a group of `HeadGroups` (`heads["local"]`), a mask or weights `[layer, head]`,
pairs `(layer, head)`, a dictionary by layer, numbers that mean the same heads in every layer, or "all".
Functions that take heads call `HeadSelection.of`, which accepts all these forms. What is left to others:
which heads belong to a group (heads).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.errors import ParameterError
from attnprobe.validation import (
    as_mask,
    as_tensor,
    brief,
    is_array,
    real_number,
    whole_number,
    whole_numbers,
)

if TYPE_CHECKING:
    HeadsLike: TypeAlias = (
        "HeadSelection | str | Tensor | Iterable[int] | Iterable[tuple[int, int]] | Mapping[Any, Any]"
    )
else:
    HeadsLike = Any

_INF = float("inf")
_FORMS = (
    'a group such as heads["local"], a mask or weights [layer, head], pairs (layer, head), a dictionary '
    '{layer: heads} or {(layer, head): weight}, head numbers, or "all"'
)


@dataclass(frozen=True, eq=False)
class HeadSelection:
    """Some heads of a model, each with a weight.

    A selection behaves like a collection of pairs: `(4, 2) in selection`, `len(selection)`, iteration.

    Attributes:
        heads: `(layer number, head, weight)` for each head; weights are positive.
        model_name: the model that the heads belong to; "" if that is not known.

    >>> selection = HeadSelection(((4, 2, 1.0), (5, 0, 1.0)))
    >>> (4, 2) in selection, selection.layers, list(selection)
    (True, (4, 5), [(4, 2), (5, 0)])
    """

    heads: tuple[tuple[int, int, float], ...]
    model_name: str = ""

    def __post_init__(self) -> None:
        """Check each head, so that a selection made by hand is as reliable as any other."""
        if not isinstance(self.heads, list | tuple) or any(
            not isinstance(part, list | tuple) or len(part) != 3 for part in self.heads
        ):
            raise ParameterError(
                f"heads must be (layer, head, weight) for each head; got {brief(self.heads)}"
            )
        triples = [
            (
                *_pair(part[:2], "heads"),
                real_number(part[2], f"the weight of {part[:2]}", above=0, below=_INF),
            )
            for part in self.heads
        ]
        object.__setattr__(self, "heads", tuple(_distinct(triples, "heads")))

    @staticmethod
    def of(
        value: HeadsLike,
        layers: Sequence[int],
        head_count: int | None,
        *,
        name: str = "heads",
        model_name: str = "",
    ) -> HeadSelection:
        """Return a selection from any of its forms.

        Args:
            value: the heads.
            layers: the layers to choose from: those that a mask, "all" and head numbers refer to.
            head_count: how many heads each of them has; None if that is not known.
            name: the argument's name, for messages.
            model_name: the model whose heads are wanted; a selection of another model's heads is refused.

        Raises:
            ParameterError: a value in none of these forms, heads or layers that do not exist, or no heads.

        >>> HeadSelection.of({3: [0, 1]}, layers=(2, 3), head_count=4).heads
        ((3, 0, 1.0), (3, 1, 1.0))
        >>> HeadSelection.of(torch.tensor([[0.0, 0.5], [2.0, 0.0]]), layers=(2, 3), head_count=2).heads
        ((2, 1, 0.5), (3, 0, 2.0))
        """
        if isinstance(value, HeadSelection):
            selection = value
        else:
            selection = HeadSelection(tuple(_triples(value, tuple(layers), head_count, name)), model_name)
        selection._check(tuple(layers), head_count, name, model_name)
        return selection

    def _check(self, layers: tuple[int, ...], head_count: int | None, name: str, model_name: str) -> None:
        if self.model_name and model_name and self.model_name != model_name:
            raise ParameterError(f"{name} are heads of {self.model_name}, not of {model_name}")
        if not self.heads:
            raise ParameterError(f"{name} chooses no head")
        strange = sorted({layer for layer in self.layers if layer not in layers})
        if strange:
            raise ParameterError(f"{name} names layers {strange}, but the layers are {list(layers)}")
        beyond = [(i, head) for i, head in self if head_count is not None and not 0 <= head < head_count]
        if beyond:
            raise ParameterError(
                f"{name} names (layer, head) {beyond[:5]}, but layers have heads 0..{(head_count or 0) - 1}"
            )

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same heads with the same weights, in any order."""
        return isinstance(other, HeadSelection) and set(self.heads) == set(other.heads)

    def __hash__(self) -> int:
        return hash(frozenset(self.heads))

    def __contains__(self, pair: object) -> bool:
        return isinstance(pair, list | tuple) and any(tuple(pair) == each for each in self)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((layer, head) for layer, head, _ in self.heads)

    def __len__(self) -> int:
        return len(self.heads)

    def __repr__(self) -> str:
        shown = ", ".join(f"({i}, {head})" + ("" if w == 1 else f": {w:g}") for i, head, w in self.heads[:6])
        return f"HeadSelection of {len(self)} heads: {shown}{', ...' if len(self) > 6 else ''}"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have chosen heads, ascending."""
        return tuple(sorted({layer for layer, _, _ in self.heads}))

    @property
    def is_weighted(self) -> bool:
        """Whether heads differ in weight."""
        return len({weight for _, _, weight in self.heads}) > 1

    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """Return the heads of each layer."""
        found: dict[int, list[int]] = {layer: [] for layer in self.layers}
        for layer, head in self:
            found[layer].append(head)
        return {layer: tuple(sorted(heads)) for layer, heads in found.items()}

    def weights(self, layers: Sequence[int], head_count: int) -> Float[Tensor, "layer head"]:
        """Return the weight of each head of some layers; 0 for those that are not chosen.

        Raises:
            ParameterError: a head in none of these layers, or beyond the last head.
        """
        self._check(tuple(layers), head_count, "the selection", "")
        matrix = torch.zeros(len(layers), head_count)
        place = {layer: index for index, layer in enumerate(layers)}
        for layer, head, weight in self.heads:
            matrix[place[layer], head] = weight
        return matrix

    def mask(self, layers: Sequence[int], head_count: int) -> Bool[Tensor, "layer head"]:
        """Return which heads of some layers are chosen."""
        return self.weights(layers, head_count) > 0


def names_layers(value: Any) -> bool:
    """Whether a value of heads says which layers they are in, as pairs, masks and dictionaries do.

    >>> names_layers([(4, 2)]), names_layers("all"), names_layers([0, 1])
    (True, False, False)
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        return False
    return isinstance(value, Mapping | HeadSelection | Tensor) or any(
        isinstance(part, Iterable) for part in value
    )


def _triples(
    value: Any, layers: tuple[int, ...], head_count: int | None, name: str
) -> list[tuple[int, int, float]]:
    """Return (layer, head, weight) for each head that a value chooses."""
    if isinstance(value, str):
        if value != "all":
            raise ParameterError(f"{name} must be {_FORMS}; got {value!r}")
        if head_count is None:
            raise ParameterError(f'{name}="all" needs a known number of heads')
        return [(layer, head, 1.0) for layer in layers for head in range(head_count)]
    if isinstance(value, Mapping):
        return _triples_of_mapping(value, head_count, name)
    if isinstance(value, set | frozenset):
        try:
            value = sorted(value)
        except TypeError:  # A mixture of types, which is refused below.
            value = list(value)
    if isinstance(value, Tensor) or is_array(value) or _is_nested(value, layers, head_count):
        tensor = as_tensor(value, name)
        if tensor.ndim == 2 and not _holds_pairs(tensor, layers, head_count):
            return _triples_of_matrix(tensor, layers, head_count, name)
        value = tensor.tolist()
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        parts = list(value)
        if parts and all(isinstance(part, list | tuple) for part in parts):
            return _distinct([(*_pair(part, name), 1.0) for part in parts], name)
        numbers = whole_numbers(parts, name) if parts else []
        return _distinct([(layer, head, 1.0) for layer in layers for head in numbers], name)
    try:
        number = whole_number(value, name)
    except ParameterError as error:
        raise ParameterError(f"{name} must be {_FORMS}; got {brief(value)}") from error
    return [(layer, number, 1.0) for layer in layers]


def _is_nested(value: Any, layers: tuple[int, ...], head_count: int | None) -> bool:
    """Whether nested lists are a mask or weights: one list for each layer, and not pairs."""
    if not isinstance(value, list | tuple) or not value or len(value) != len(layers):
        return False
    if not all(isinstance(part, list | tuple) for part in value):
        return False
    return all(len(part) == (head_count or len(value[0])) for part in value) and (
        len(value[0]) != 2 or any(isinstance(cell, bool | float) for part in value for cell in part)
    )


def _holds_pairs(tensor: Tensor, layers: tuple[int, ...], head_count: int | None) -> bool:
    """Whether a matrix holds pairs `[n, 2]` rather than a mask or weights; an ambiguous one is refused."""
    if tensor.shape[1] != 2 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        return False
    fits = tensor.shape[0] == len(layers) and head_count in (2, None)
    if fits and bool(((tensor == 0) | (tensor == 1)).all()):
        raise ParameterError(
            f"heads {tensor.tolist()} may be pairs (layer, head) or a mask over two heads: write a mask "
            "with True and False"
        )
    return True


def _triples_of_matrix(
    tensor: Tensor, layers: tuple[int, ...], head_count: int | None, name: str
) -> list[tuple[int, int, float]]:
    expected = [len(layers), "head" if head_count is None else head_count]
    if tensor.shape[0] != len(layers) or (head_count is not None and tensor.shape[1] != head_count):
        raise ParameterError(
            f"{name} as a mask or weights must be [layer, head] = {expected} for layers {list(layers)}; got "
            f"{list(tensor.shape)}"
        )
    weights = tensor if tensor.is_floating_point() else as_mask(tensor, name)
    if not bool(torch.isfinite(weights.float()).all()) or bool((weights.float() < 0).any()):
        raise ParameterError(f"weights of {name} must be finite and not negative")
    chosen = [(layers[i], head, float(weights[i, head])) for i, head in weights.nonzero().tolist()]
    return _distinct(chosen, name)


def _triples_of_mapping(
    value: Mapping[Any, Any], head_count: int | None, name: str
) -> list[tuple[int, int, float]]:
    found: list[tuple[int, int, float]] = []
    for key, of in value.items():
        if isinstance(key, tuple):
            found.append(
                (*_pair(key, name), real_number(of, f"the weight of {key} in {name}", minimum=0, below=_INF))
            )
            continue
        layer = whole_number(key, f"a layer of {name}")
        if isinstance(of, Mapping):
            found += [
                (
                    layer,
                    whole_number(head, f"a head of layer {layer} in {name}"),
                    real_number(weight, f"the weight of ({layer}, {head}) in {name}", minimum=0, below=_INF),
                )
                for head, weight in of.items()
            ]
        else:
            part = _triples(of, (layer,), head_count, f"{name} of layer {layer}")
            if strange := sorted({triple[0] for triple in part} - {layer}):
                raise ParameterError(
                    f"{name} of layer {layer} are heads of layer {strange[0]}; got {brief(of)}"
                )
            found += part
    return _distinct([triple for triple in found if triple[2] > 0], name)


def _pair(part: Any, name: str) -> tuple[int, int]:
    if len(part) != 2:
        raise ParameterError(f"{name} as pairs must be (layer, head); got {brief(part)}")
    return whole_number(part[0], f"a layer of {name}"), whole_number(part[1], f"a head of {name}")


def _distinct(triples: list[tuple[int, int, float]], name: str) -> list[tuple[int, int, float]]:
    pairs = [triple[:2] for triple in triples]
    repeated = (
        sorted({pair for pair in pairs if pairs.count(pair) > 1}) if len(set(pairs)) < len(pairs) else []
    )
    if repeated:
        raise ParameterError(f"{name} names (layer, head) {repeated[:5]} more than once")
    # What float32 cannot hold would become NaN in a mean.
    extreme = [weight for _, _, weight in triples if not 1e-30 <= weight <= 1e30]
    if extreme:
        raise ParameterError(f"weights of {name} must be between 1e-30 and 1e30; got {extreme[0]:g}")
    return triples

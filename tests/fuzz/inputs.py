"""What people type: for each kind of argument, values that are wrong, and others that mean a valid one.

A wrong value must be refused with an `AttnprobeError`. An equal one must give the very result of the valid
value that it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Kind:
    """A kind of argument: makers of wrong values and of equal ones, from the valid value."""

    wrong: tuple[tuple[str, Callable[[Any], Any]], ...]
    equal: tuple[tuple[str, Callable[[Any], Any]], ...] = field(default=())


def constants(*values: Any) -> tuple[tuple[str, Callable[[Any], Any]], ...]:
    """Return makers of values that do not depend on the valid one."""
    return tuple((_named(value), lambda valid, value=value: value) for value in values)


def _named(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor {value.dtype} {list(value.shape)}"
    return f"{type(value).__name__} {str(value)[:40]!r}"


NAN, INF = math.nan, math.inf


class Stranger:
    """An object that nobody knows."""


STRANGERS = constants(Stranger(), Stranger, object())
WORDS = constants("", "a", "nonsense")
NOT_ONE_NUMBER = (
    *WORDS,
    *STRANGERS,
    *constants([], [1, 2], {}, NAN, INF, -INF, 1j, b"1", torch.ones(2), np.ones(2), True, torch.tensor(True)),
)
NUMPY_NUMBERS = (
    ("numpy int64", np.int64),
    ("numpy int32", np.int32),
    ("numpy uint8", np.uint8),
    ("tensor", torch.tensor),
)

KINDS: dict[str, Kind] = {
    "count": Kind(
        (*NOT_ONE_NUMBER, *constants(0, -1, -(10**9), 2.5, 1.0, None)),
        NUMPY_NUMBERS,
    ),
    "optional count": Kind((*NOT_ONE_NUMBER, *constants(0, -1, 2.5, 1.0)), NUMPY_NUMBERS),
    "index": Kind((*NOT_ONE_NUMBER, *constants(10**6, -(10**6), 2.5, None)), NUMPY_NUMBERS),
    "indices": Kind(
        (
            *WORDS,
            *STRANGERS,
            *constants([], {}, NAN, INF, 1j, b"1", torch.ones(2), np.ones(2), True, torch.tensor(True)),
            *constants(10**6, -(10**6), -1, 2.5, [10**6], [0.5], [[0]], ["a"], [True, False, True]),
        ),
        (*NUMPY_NUMBERS, ("list", lambda v: [v]), ("numpy", lambda v: np.array([v])), ("set", lambda v: {v})),
    ),
    "distance": Kind((*NOT_ONE_NUMBER, *constants(-1, 0.5, None)), NUMPY_NUMBERS),
    "share": Kind(
        (*NOT_ONE_NUMBER, *constants(0, -0.1, 1.5, 100, None, torch.tensor([0.3]))),
        (("numpy float", np.float64), ("tensor", lambda v: torch.tensor(v, dtype=torch.float64))),
    ),
    "nonnegative": Kind((*NOT_ONE_NUMBER, *constants(-0.5, None)), (("numpy float", np.float64),)),
    "switch": Kind(
        (*WORDS, *STRANGERS, *constants(None, 0, 1, 2.0, [], torch.tensor(True), "yes")),
        (("numpy bool", np.bool_),),
    ),
    "word": Kind((*WORDS, *STRANGERS, *constants(None, 0, True, 1.0, [], ["token"], torch.ones(1)))),
    "names": Kind(
        (
            *WORDS,
            *STRANGERS,
            *constants(0, 1.5, True, [1], ["nonsense"], [None], {"first": 1}, torch.ones(2), b"first", [[]]),
        ),
        (("list", list), ("tuple", tuple)),
    ),
    "clusters": Kind(
        (
            *WORDS,
            *STRANGERS,
            *constants(0, 1.5, True, [], [1], ["a"] * 50, [[1], [2]], {}, "ab", torch.ones(3, 2)),
        ),
        (("tuple", tuple), ("tensor", torch.tensor), ("numpy", np.array)),
    ),
    "horizon": Kind(
        (
            *WORDS,
            *STRANGERS,
            *constants(
                None, 10, (10,), (10, 5), (-1, 5), (1, 2, 3), (None, 5), (1.5, 3), ("a", "b"), (NAN, 3)
            ),
            *constants([[1, 2]], {}, (True, 5), torch.ones(2), (1, INF)),
        ),
        (
            ("list", list),
            ("numpy", np.array),
            ("tensor", torch.tensor),
            ("numpy ints", lambda v: tuple(np.int64(x) for x in v)),
        ),
    ),
    "layers": Kind(
        (
            *WORDS,
            *STRANGERS,
            *constants(None, [], 99, -1, [99], [-1], 1.0, [1.5], ["a"], [[0]], (), {}, True, [True, False]),
            *constants(
                torch.tensor([0.5]), torch.tensor([[0, 1]]), np.array([7]), torch.tensor([]), range(0), NAN
            ),
        ),
        (
            ("tuple", tuple),
            ("set", set),
            ("tensor", torch.tensor),
            ("numpy", np.array),
            ("numpy ints", lambda v: [np.int64(x) for x in v]),
            ("range", lambda v: range(v[0], v[-1] + 1)),
            ("repeated", lambda v: [*v, *v]),
        ),
    ),
    "heads": Kind(
        (
            *WORDS,
            *STRANGERS,
            *constants(
                [], {}, (), [(0, 99)], [(99, 0)], [(-1, 0)], [(0, -1)], [(0,)], [(0, 1, 2)], {99: [0]}
            ),
            *constants({0: [99]}, {0: []}, {"a": [0]}, {0: "x"}, 1.5, [1.5], True, [(0.5, 1)], [("a", 0)]),
            *constants(torch.zeros(3, 4, dtype=torch.bool), torch.ones(2, 4), torch.full((3, 4), NAN)),
            *constants(
                torch.full((3, 4), -1.0), torch.ones(3, 5, dtype=torch.bool), np.ones((3, 4, 1)), 99, -1
            ),
            *constants([(0, 1), (0, 1)], {(0, 1): NAN}, {(0, 1): -1.0}, {(0, 1): INF}, {(0, 1): 0.0}),
        ),
        (
            ("set", set),
            ("tuple", tuple),
            ("tensor of pairs", torch.tensor),
            ("numpy pairs", np.array),
            ("by pair", lambda v: dict.fromkeys(v, 1.0)),
            ("by layer", lambda v: {layer: [h for i, h in v if i == layer] for layer, _ in v}),
            ("numpy ints", lambda v: [(np.int64(i), np.int32(h)) for i, h in v]),
            ("mask", lambda v: _matrix(v, torch.bool)),
            ("mask of ints", lambda v: _matrix(v, torch.long)),
            ("mask of floats", lambda v: _matrix(v, torch.float32)),
            ("numpy mask", lambda v: _matrix(v, torch.bool).numpy()),
            ("nested lists", lambda v: _matrix(v, torch.bool).tolist()),
        ),
    ),
    "mask": Kind(
        (
            *WORDS,
            *STRANGERS,
            *constants(0, 1.5, [], {}, [["a"]]),
            ("half", lambda v: v.float() * 0.5),
            ("two", lambda v: v.long() * 2),
            ("minus one", lambda v: -v.long()),
            ("nan", lambda v: v.float() * NAN),
            (
                "one nan",
                lambda v: torch.cat(
                    [v[:, :-1].float(), torch.full_like(v[:, :1], NAN, dtype=torch.float)], 1
                ),
            ),
            ("narrow", lambda v: v[:, :-1]),
            ("wide", lambda v: torch.nn.functional.pad(v, (0, 1))),
            ("more rows", lambda v: torch.cat([v, v])),
            ("three axes", lambda v: v[..., None]),
            ("large", lambda v: v.long() * 255),
        ),
        (
            ("ints", lambda v: v.long()),
            ("uint8", lambda v: v.to(torch.uint8)),
            ("floats", lambda v: v.float()),
            ("half precision", lambda v: v.half()),
            ("numpy", lambda v: v.numpy()),
            ("numpy ints", lambda v: v.long().numpy()),
            ("lists", lambda v: v.tolist()),
            ("lists of ints", lambda v: v.long().tolist()),
        ),
    ),
    "ids": Kind(
        (
            *WORDS,
            *STRANGERS,
            *constants(
                None, 3, [], [[]], {}, 2.5, ["a"], [["a"]], [[None]], torch.ones(0, 3, dtype=torch.long)
            ),
            ("floats", lambda v: v.float()),
            ("bools", lambda v: v > 5),
            ("negative", lambda v: -v),
            ("three axes", lambda v: v[..., None]),
            ("complex", lambda v: v.to(torch.complex64)),
            ("numpy floats", lambda v: v.numpy() + 0.5),
        ),
        (
            ("int32", lambda v: v.int()),
            ("int16", lambda v: v.short()),
            ("numpy", lambda v: v.numpy()),
            ("numpy int32", lambda v: v.numpy().astype(np.int32)),
            ("lists", lambda v: v.tolist()),
        ),
    ),
    "batch": Kind(
        (
            *WORDS,
            *STRANGERS,
            *constants(None, 3, [], [[]], {}, {"ids": [1]}, 2.5, ["text"], [["a"]], torch.ones(2, 3), NAN),
            ("too large", lambda v: v.input_ids * 10**6),
            ("negative", lambda v: -v.input_ids),
            ("pixels", lambda v: {"input_ids": v.input_ids, "pixel_values": torch.ones(1)}),
        ),
        (
            (
                "dict",
                lambda v: {
                    "input_ids": v.input_ids,
                    "attention_mask": v.attention_mask,
                    "response_mask": v.response_mask,
                },
            ),
            (
                "dict of lists",
                lambda v: {
                    "input_ids": v.input_ids.tolist(),
                    "attention_mask": v.attention_mask.long().tolist(),
                    "response_mask": v.response_mask.long().tolist(),
                },
            ),
            (
                "numpy",
                lambda v: {
                    "input_ids": v.input_ids.numpy(),
                    "attention_mask": v.attention_mask.numpy(),
                    "response_mask": v.response_mask.numpy(),
                },
            ),
            (
                "labels",
                lambda v: {
                    "input_ids": v.input_ids,
                    "attention_mask": v.attention_mask,
                    "labels": torch.where(v.response_mask, v.input_ids, -100),
                },
            ),
        ),
    ),
    "examples": Kind(
        (
            *WORDS,
            *STRANGERS,
            *constants(
                None, [], 99, -99, [99], 1.0, [0.5], ["a"], True, {}, [[0]], slice(9, 12), slice("a", None)
            ),
            *constants(
                torch.tensor([0.5]), torch.ones(9, dtype=torch.bool), torch.zeros(3, dtype=torch.bool), NAN
            ),
        ),
        (
            ("tuple", tuple),
            ("tensor", torch.tensor),
            ("numpy", np.array),
            ("negative", lambda v: [i - 3 for i in v]),
            ("mask", lambda v: [i in v for i in range(3)]),
            ("tensor mask", lambda v: torch.tensor([i in v for i in range(3)])),
            ("numpy mask", lambda v: np.array([i in v for i in range(3)])),
            ("mask of ints", lambda v: [int(i in v) for i in range(3)]),
        ),
    ),
    "result": Kind(
        (
            *WORDS,
            *STRANGERS,
            *constants(None, 0, [], {}, 1.5, torch.ones(2, 3), NAN),
            ("its dict", lambda v: vars(v)),
            ("its class", type),
        ),
    ),
    "model": Kind((*WORDS, *STRANGERS, *constants(None, 0, [], {}, torch.nn.Linear(2, 2), torch.ones(2)))),
    "tokenizer": Kind((*WORDS, *STRANGERS, *constants(None, 0, [], {}, torch.ones(2), len))),
    "texts": Kind(
        (*STRANGERS, *constants(None, 0, [], {}, [1], [None], 1.5, torch.ones(2), [["a"]], [[]])),
        (("tuple", tuple),),
    ),
    "path": Kind((*constants(None, 0, "", 1.5, [], {}, "/nowhere/at/all/x.safetensors", Path("/")),)),
    "device": Kind((*constants(None, "", "nowhere", 1.5, [], {}, "cuda:99", Stranger()),)),
    "pattern": Kind(
        (
            *WORDS,
            *STRANGERS,
            *constants(None, 0, 1.5, [], {}, [["a"]], torch.ones(3), torch.ones(0, 0)),
            ("ints", lambda v: v.long()),
            ("nan", lambda v: v * NAN),
            ("negative", lambda v: -v),
            ("more than one", lambda v: v * 2),
            ("not causal", lambda v: v.mT),
            ("more queries", lambda v: v[..., :-1]),
            ("five axes", lambda v: v[None]),
            ("scores", lambda v: torch.randn_like(v)),
        ),
        (("numpy", lambda v: v.numpy()), ("lists", lambda v: v.tolist())),
    ),
    "advantages": Kind(
        (
            *WORDS,
            *STRANGERS,
            *constants(None, [], {}, [["a"]], torch.ones(9), torch.ones(2, 9), torch.ones(2, 3, 4)),
            ("nan", lambda v: v * NAN),
            ("infinite", lambda v: v * INF),
            ("complex", lambda v: v.to(torch.complex64)),
            ("bools", lambda v: v > 0),
        ),
        (("numpy", lambda v: v.numpy()), ("lists", lambda v: v.tolist()), ("ints", lambda v: v.long())),
    ),
    "weights": Kind(
        (
            *WORDS,
            *STRANGERS,
            *constants(None, [], {}, torch.ones(9), torch.ones(2, 9), 1.0),
            ("nan", lambda v: v * NAN),
            ("infinite", lambda v: v * INF),
            ("negative", lambda v: -v),
            ("bools", lambda v: v > 0),
        ),
        (("numpy", lambda v: v.numpy()), ("lists", lambda v: v.tolist())),
    ),
    "values": Kind(
        (
            *WORDS,
            *STRANGERS,
            *constants(None, [], {}, torch.ones(3), torch.ones(1, 2, 3), 1.0),
            ("ints", lambda v: v.nan_to_num().long()),
            ("bools", lambda v: v > 0),
        ),
        (("numpy", lambda v: v.numpy()),),
    ),
    "probe": Kind(
        (*WORDS, *STRANGERS, *constants(None, 0, [], {}, 1.5), ("its class", type), ("a list", lambda v: [v]))
    ),
    "credit": Kind((*WORDS, *constants(None, 0, [], {}, 1.5), ("its class", type))),
    "schedule": Kind((*WORDS, *constants(0, [], {}, 1.5), ("its class", type))),
    "columns": Kind(
        (
            *WORDS,
            *STRANGERS,
            *constants([], {}, 1.5, [-1], ["a"], [1.5], torch.tensor([0.5, 1.0]), NAN, [None]),
        ),
        (
            ("tuple", tuple),
            ("set", set),
            ("numpy", np.array),
            ("tensor", torch.tensor),
            ("mask", lambda v: torch.tensor([i in v for i in range(24)])),
            ("mask of ints", lambda v: torch.tensor([int(i in v) for i in range(24)])),
            ("list of bools", lambda v: [i in v for i in range(24)]),
            ("numpy mask", lambda v: np.array([i in v for i in range(24)])),
        ),
    ),
    "pairs": Kind(
        (
            *WORDS,
            *STRANGERS,
            *constants(
                [], {}, 1.5, [(1, 3)], [(-1, -2)], [(1,)], [1, 2], [(1.5, 0)], [("a", "b")], torch.ones(2, 3)
            ),
        ),
        (
            ("tensor", torch.tensor),
            ("numpy", np.array),
            ("set", set),
            ("lists", lambda v: [list(p) for p in v]),
        ),
    ),
}


def _matrix(pairs: list[tuple[int, int]], dtype: torch.dtype) -> torch.Tensor:
    """Return pairs as a mask of three layers of four heads."""
    mask = torch.zeros(3, 4, dtype=dtype)
    for layer, head in pairs:
        mask[layer, head] = 1
    return mask

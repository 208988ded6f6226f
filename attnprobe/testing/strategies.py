"""Hypothesis strategies for attention: inputs of attention calls with any options, and patterns.

Tests of the operator and of metrics draw from them. What is left to others: the pattern that the inputs
stand for (reference).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

# Not hypothesis' own DrawFn, which is a protocol that cannot be checked at run time.
Draw = Callable[..., Any]


@dataclass(frozen=True)
class CallInputs:
    """The inputs of an attention call: query, key, and options as keyword arguments."""

    query: Tensor
    key: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> CallInputs:
        """Return the inputs in a dtype."""
        options = {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self.options.items()
        }
        return CallInputs(self.query.to(dtype), self.key.to(dtype), options)


def _padded(draw: Draw, batch: int, keys: int) -> Tensor:
    """Draw a key mask that is padded on the left, on the right, or has holes."""
    kind = draw(st.sampled_from(["left", "right", "holes"]))
    if kind == "holes":
        flat = draw(st.lists(st.booleans(), min_size=batch * keys, max_size=batch * keys))
        return torch.tensor(flat).view(batch, keys)
    lengths = torch.tensor(draw(st.lists(st.integers(1, keys), min_size=batch, max_size=batch)))
    column = torch.arange(keys)
    if kind == "right":
        return torch.lt(column, lengths[:, None])
    return torch.ge(column, keys - lengths[:, None])


@st.composite
def call_inputs(draw: Draw, *, max_tokens: int = 24, cached: bool = True) -> CallInputs:
    """Draw the float64 inputs of an attention call: GQA, padding, window, soft cap, sinks, bias, cache.

    With `cached`, some calls have more keys than queries, as with a KV cache.
    """
    batch = draw(st.integers(1, 3))
    key_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    size = draw(st.sampled_from([2, 5, 8]))
    keys = draw(st.integers(1, max_tokens))
    queries = draw(st.integers(1, keys)) if cached and draw(st.booleans()) else keys
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = key_heads * groups
    scale = draw(st.sampled_from([0.5, 1.0, 4.0]))
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["scaling"] = draw(st.sampled_from([0.1, 0.5, 1.0]))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([1.0, 5.0, 30.0]))
    if draw(st.booleans()):
        options["sinks"] = normal(heads) * 2
    if draw(st.booleans()):
        options["bias"] = normal(draw(st.sampled_from([1, batch])), heads, queries, keys)
    form = draw(st.sampled_from(["causal", "structured", "boolean", "additive"]))
    if form == "structured":
        options["window"] = draw(st.integers(1, keys + 2))
        options["key_mask"] = _padded(draw, batch, keys)
    elif form in ("boolean", "additive"):
        position = torch.arange(queries)[:, None] + keys - queries
        seen = torch.arange(keys)[None, :] <= position
        seen = seen & _padded(draw, batch, keys)[:, None, None, :]
        if form == "additive":
            lowest = torch.finfo(torch.float32).min
            options["mask"] = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, lowest)
            # An additive mask keeps its own dtype, which determines its lowest number.
            options["mask"] = options["mask"].float()
        else:
            options["mask"] = seen
    return CallInputs(
        normal(batch, heads, queries, size) * scale, normal(batch, key_heads, keys, size) * scale, options
    )


@st.composite
def patterns(draw: Draw, *, max_tokens: int = 16, sinks: bool = True) -> Tensor:
    """Draw causal patterns `[batch, head, token, token]` in float64; row masses below 1 with `sinks`."""
    batch, heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, max_tokens))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sharpness = draw(st.sampled_from([0.3, 1.0, 5.0]))
    scores = torch.randn(batch, heads, tokens, tokens, generator=generator, dtype=torch.float64) * sharpness
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    pattern = torch.softmax(scores.masked_fill(future, -torch.inf), -1)
    if sinks and draw(st.booleans()):
        mass = torch.rand(batch, heads, tokens, 1, generator=generator, dtype=torch.float64)
        pattern = torch.mul(pattern, mass)
    return pattern

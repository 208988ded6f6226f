"""Attention calls with drawn inputs, answered by kernels of torch and transformers; ways to falsify them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as capped_eager
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as sink_eager
from transformers.models.llama.modeling_llama import eager_attention_forward as plain_eager

from attnprobe.adapters.attention_call import AttentionCall, MaskMemory, read_attention
from attnprobe.adapters.forward_call import Columns
from attnprobe.attention.factored import FactoredAttention
from attnprobe.attention.listening import listen

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KERNELS = ("plain eager", "capped eager", "sink eager", "math", "sdpa", "flash")
VALUES = ("plain", "shifted", "quiet first key")
KEYS = ("plain", "shared bias", "repeated", "nearly equal", "loud channel", "loud first key")


class _Module(nn.Module):
    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


@dataclass(frozen=True)
class Drawn:
    """The inputs of a call, and the kernel that answers it."""

    kernel: str
    groups: int
    query: Tensor
    key: Tensor
    value: Tensor
    seen: Tensor | None
    options: dict[str, Any]
    autocast: bool
    description: str

    def run(self, **changes: Any) -> Tensor:
        """Return the kernel's output, with some inputs changed."""
        return self._run(**changes)[0]

    def _run(self, **changes: Any) -> tuple[Tensor, Any]:
        inputs = {"query": self.query, "key": self.key, "value": self.value, "seen": self.seen}
        options = {**self.options, **{n: c for n, c in changes.items() if n not in inputs and n != "groups"}}
        inputs |= {n: c for n, c in changes.items() if n in inputs}
        module = _Module(changes.get("groups", self.groups))
        seen = inputs.pop("seen")
        mask = self.mask(seen, inputs["query"].dtype)
        sinks = options.pop("s_aux", None)
        flash = None
        with torch.no_grad(), ExitStack() as stack:
            if self.autocast:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            own: Callable[..., Any] = sdpa_attention_forward
            if "eager" in self.kernel:
                own = {"plain": plain_eager, "capped": capped_eager, "sink": sink_eager}[
                    self.kernel.split()[0]
                ]
                module.sinks = (
                    sinks if sinks is not None else torch.full((self.query.shape[1],), -1e4).to(self.query)
                )
            elif self.kernel == "math":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self.kernel == "flash":
                listening = stack.enter_context(listen())
            output = own(module, *inputs.values(), mask, **options)[0]
            if self.kernel == "flash":
                flash = listening.result
        return output, flash

    def mask(self, seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return the mask in the form that the kernel takes."""
        if seen is None and "eager" in self.kernel:
            count = self.query.shape[2]
            seen = torch.ones(count, count, dtype=torch.bool).tril()[None, None]
        if seen is None or "eager" not in self.kernel:
            return seen
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    def call(self, **changes: Any) -> tuple[FactoredAttention, AttentionCall]:
        """Return what is read from these inputs, and the call with the output that changed inputs give."""
        output, flash = self._run(**changes)
        call = AttentionCall(
            "eager" if "eager" in self.kernel else "sdpa",
            _Module(self.groups), self.query, self.key, self.value, self.mask(self.seen, self.query.dtype),
            self.options, output, flash,
        )  # fmt: skip
        columns = Columns(0, self.query.shape[2], False)
        return read_attention(call, MaskMemory(), columns), call


def draw(seed: int, longest: int = 512, **fixed: Any) -> Drawn:
    """Draw inputs: any shape, dtype, kernel, mask and size of the scores."""
    generator = torch.Generator().manual_seed(seed)

    def choose(name: str, *among: Any) -> Any:
        index = int(torch.randint(len(among), (), generator=generator))
        return fixed.get(name, among[index])

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch, key_heads, groups = (
        choose("batch", 1, 1, 2, 3),
        choose("key_heads", 1, 2, 3),
        choose("groups", 1, 1, 3),
    )
    size = choose("size", 8, 16, 64, 64, 80, 128, 256)
    tokens = fixed.get("tokens", int(math.exp(uniform(0.0, math.log(longest)))))
    dtype, kernel = choose("dtype", *DTYPES), choose("kernel", *KERNELS)
    largest = fixed.get("largest", math.exp(uniform(math.log(0.1), math.log(3000.0))))
    keys, values = choose("keys", "plain", *KEYS), choose("values", "plain", *VALUES)
    key, value = normal(batch, key_heads, tokens, size), normal(batch, key_heads, tokens, size)
    query = normal(batch, key_heads * groups, tokens, size)
    if keys == "shared bias":
        key += normal(1, key_heads, 1, size) * 10
        query += normal(1, key_heads * groups, 1, size)
    elif keys == "repeated":
        kinds = torch.randint(2, (tokens,), generator=generator)
        key, value = key[:, :, :2][:, :, kinds % key.shape[2]], value[:, :, :2][:, :, kinds % key.shape[2]]
        query = query[:, :, :2][:, :, kinds % query.shape[2]]
    elif keys == "nearly equal":
        key = key[:, :, :1] + 1e-3 * key
    elif keys == "loud channel":
        key[..., 0] += 30
        query[..., 0] += 30
    elif keys == "loud first key":
        key[:, :, :1] = 3 * query.unflatten(1, (key_heads, groups)).mean((2, 3))[:, :, None]
        query += query.mean(2, keepdim=True) * 5
    if values == "shifted":
        value += normal(1, key_heads, 1, size) * 5
    elif values == "quiet first key":
        value[:, :, 0] *= 0.01
    value *= choose("value size", 1.0, 1.0, 1e-3, 30.0)
    scaling = choose("scaling", size**-0.5, size**-0.5, 1.0, 0.1)
    if dtype == torch.float16:
        # The products before scaling must not overflow.
        largest = min(largest, 3e4 * scaling)
    every = (query @ key.repeat_interleave(groups, 1).mT) * scaling
    factor = math.sqrt(largest / float(every.abs().max()))
    options: dict[str, Any] = {"scaling": scaling}
    if kernel == "capped eager":
        options["softcap"] = choose("softcap", 1.0, 5.0, 30.0, 50.0)
    if kernel == "sink eager":
        options["s_aux"] = normal(key_heads * groups).to(dtype) * 2
    seen = None
    form = choose("form", "none", "left", "window", "left window", "right")
    if form != "none":
        position = torch.arange(tokens)
        seen = (position[None] <= position[:, None]).expand(batch, 1, -1, -1)
        if "window" in form:
            window = int(math.exp(uniform(0.0, math.log(tokens))))
            seen = seen & (position[None] > position[:, None] - window)
            options["sliding_window"] = window
        lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
        if "left" in form:
            seen = seen & (position >= tokens - lengths[:, None])[:, None, None]
        if form == "right":
            seen = seen & (position < lengths[:, None])[:, None, None]
    autocast = bool(choose("autocast", False, False, False, True)) and dtype == torch.float32
    description = (
        f"seed {seed}: {kernel}, {str(dtype)[6:]}, query {list(query.shape)}, {key_heads} key heads, "
        f"keys {keys}, values {values}, |score| to {largest:.3g}, scaling {scaling:.3g}, mask {form}, "
        f"autocast {autocast}"
    )
    return Drawn(
        kernel, groups, (query * factor).to(dtype), (key * factor).to(dtype), value.to(dtype), seen, options,
        autocast, description,
    )  # fmt: skip


def tampered(drawn: Drawn) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ways to falsify a call: a name, and the inputs that the kernel gets instead."""
    scaling, window = drawn.options["scaling"], drawn.options.get("sliding_window")
    yield "scale halved", {"scaling": scaling / 2}
    yield "scale doubled", {"scaling": scaling * 2}
    yield "scale missing", {"scaling": 1.0 if scaling != 1.0 else drawn.query.shape[-1] ** -0.5}
    yield "keys in another order", {"key": drawn.key.flip(2)}
    if drawn.groups > 1 and drawn.key.shape[1] > 1:
        yield "other groups", {"key": drawn.key.flip(1), "value": drawn.value.flip(1)}
    if "softcap" in drawn.options:
        yield "soft cap missing", {"softcap": None}
        yield "another soft cap", {"softcap": drawn.options["softcap"] * 2}
    if "s_aux" in drawn.options:
        yield "sinks missing", {"s_aux": None}
    if drawn.seen is None:
        return
    position = torch.arange(drawn.query.shape[2])
    distance = position[:, None] - position
    real = drawn.seen.any(2, keepdim=True)
    if window is not None:
        yield "window missing", {"seen": (distance >= 0) & real}
        yield "window 3 longer", {"seen": (distance >= 0) & (distance < window + 3) & real}
        yield "window 3 shorter", {"seen": drawn.seen & (distance < max(1, window - 3))}
    if not bool(real.all()):
        yield (
            "padding visible",
            {"seen": (distance >= 0) & (distance < (window or len(position))) & ~real | drawn.seen},
        )

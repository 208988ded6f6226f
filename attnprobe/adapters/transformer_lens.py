"""The adapter for TransformerLens: models inside a `TransformerBridge`.

A bridge computes attention itself, with a map for every head, whatever the model's implementation. While
probes observe attention, each attention module of the bridge hands its call over to the transformers module
inside it, so that query and key are seen and no map is stored; that module is then run with `sdpa`, since a
bridge asks for eager attention only to have maps. The bridge's hooks at the ends of the module (`hook_in`,
`hook_out`) and in its projections fire as usual.

If the hand-over would change what the user sees, the bridge's own attention runs, and its `hook_pattern` is
read: that is, if a hook sits where only the bridge's attention fires it (`hook_pattern`, `hook_attn_scores`,
`hook_rot_q` ..., as in `run_with_cache`), or if its query, key and value weights are no longer those of the
module inside.

`adapter_for` makes the adapter. What is left to others: everything inside the forward pass (transformers,
reading).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from attnprobe.adapters.attention_call import AttentionCall
from attnprobe.adapters.base import Adapter
from attnprobe.adapters.interception import calls_watched, implementation_changed, reads_calls
from attnprobe.adapters.reading import Reading
from attnprobe.adapters.transformers import TransformersAdapter
from attnprobe.adapters.versions import SUPPORTED, check_versions
from attnprobe.errors import UnsupportedModelError


class TransformerLensAdapter(TransformersAdapter):
    """A `TransformerBridge` over a transformers model.

    Raises:
        UnsupportedModelError: a bridge over anything else, a model that cannot be read, or a version of
            TransformerLens that is not read.
    """

    backend = "transformer_lens"

    def __init__(self, bridge: Any) -> None:
        check_versions("transformer-lens")
        self._bridge = bridge
        model = getattr(bridge, "original_model", None)
        if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
            raise UnsupportedModelError(
                f"this bridge runs a {type(model).__name__}, not a transformers model: its attention cannot "
                "be read"
            )
        super().__init__(model)

    def _all_modules(self) -> Iterator[nn.Module]:
        return chain(self._bridge.modules(), self.model.modules())

    @property
    def _calls_kernel(self) -> bool:
        """A bridge computes attention itself where there is no attention function to hand over to."""
        return False

    @property
    def _maps_by_hook(self) -> bool:
        return False

    def _logits(self, arguments: dict[str, Any]) -> Tensor | None:
        ids = arguments.pop("input_ids")
        logits: Tensor = self._bridge(ids, return_type="logits", **arguments)
        return logits

    @contextmanager
    def _ready(self, reading: Reading | None, layers: Sequence[int]) -> Iterator[None]:
        """Let the bridge's attention modules hand their calls over to the modules inside them."""
        with ExitStack() as stack:
            if self.reads == "factored":
                stack.enter_context(implementation_changed(self.model, self._implementation))
                stack.enter_context(calls_watched())
            # Every layer, so that what a layer computes does not depend on which are observed.
            for number, layer in self._architecture.layers.items():
                outer, inner = layer.attention_outer, layer.attention
                if outer is inner:
                    continue
                read = reading if number in layers else None
                handover = _Handover(number, outer, inner, read, delegates=self.reads == "factored")
                stack.enter_context(handover.installed())
            yield

    def _implementation(self, implementation: str) -> str:
        config = self.model.config.get_text_config(decoder=True)
        # PyTorch's attention has no soft cap; older versions of transformers let Gemma 2 use it all the same.
        caps = getattr(config, "attn_logit_softcapping", None) is not None
        if implementation == "eager" and getattr(self.model, "_supports_sdpa", False) and not caps:
            return "sdpa"
        return implementation


class _Handover:
    """What an attention module of a bridge does while attention is observed or suppressed."""

    def __init__(
        self, number: int, outer: nn.Module, inner: nn.Module, reading: Reading | None, *, delegates: bool
    ) -> None:
        self._number = number
        self._outer: Any = outer
        self._inner = inner
        self._reading = reading
        inside = set(inner.modules())
        ends = {self._outer.hook_in, self._outer.hook_out}
        # The hooks that fire only in the bridge's own attention.
        self._own_hooks: list[Any] = [
            module
            for module in self._outer.modules()
            if hasattr(module, "has_hooks") and module not in inside and module not in ends
        ]
        self._delegates = delegates and _has_weights_of(outer, inner)
        self._before: Any = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Stand in for the module's forward while the context is open."""
        # Into the instance's dictionary: the module's own __setattr__ ignores the assignment.
        attributes = self._outer.__dict__
        before = self._before = attributes.get("forward")
        if before is not None and not isinstance(getattr(before, "__self__", None), _Handover):
            # Something else already stands in for the module, and must not be bypassed.
            self._delegates = False
        attributes["forward"] = self._forward
        try:
            yield
        finally:
            if before is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = before

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._delegates and not any(hook.has_hooks() for hook in self._own_hooks):
            return self._delegated(*args, **kwargs)
        return self._read_pattern(*args, **kwargs)

    def _delegated(self, *args: Any, **kwargs: Any) -> Any:
        """Run the transformers module inside, between the hooks at the ends of the bridge's module."""
        outer = self._outer
        if args:
            args = (outer.hook_in(args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = outer.hook_in(kwargs["hidden_states"])
        output = self._inner(*args, **kwargs)
        if isinstance(output, tuple):
            return (outer.hook_out(output[0]), *output[1:])
        return outer.hook_out(output)

    def _read_pattern(self, *args: Any, **kwargs: Any) -> Any:
        """Run the bridge's own attention, and read the pattern at its hook.

        Some bridges nevertheless call the transformers module, and show its map at the hook: then the
        attention has already been read from the call.
        """
        calls: list[AttentionCall] = []
        handles = []
        reading = self._reading
        if reading is not None:
            if self._outer.training and _drops_attention(self._inner):
                raise UnsupportedModelError(
                    "hook_pattern comes after dropout: call bridge.eval() first, or remove the hooks inside "
                    "the attention modules"
                )

            if not hasattr(self._outer, "hook_pattern"):
                raise UnsupportedModelError(
                    f"layer {self._number} of this bridge has no hook_pattern: its "
                    f"{type(self._inner).__name__} computes no map that TransformerLens shows"
                )

            # Registered last, so that the pattern is seen as the user's hooks left it.
            def read(module: nn.Module, args: tuple[Any, ...], pattern: Tensor) -> None:
                if not calls:
                    reading.read_pattern(self._number, pattern)

            handles.append(self._outer.hook_pattern.register_forward_hook(read))
        forward = self._forward_before
        try:
            with reads_calls(self._inner, calls.append):
                return forward(self._outer, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _forward_before(self, outer: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, or what stands in for it: an outer block, which reads it too."""
        if self._before is None:
            return type(outer).forward(outer, *args, **kwargs)
        return self._before(*args, **kwargs)


def _has_weights_of(outer: Any, inner: nn.Module) -> bool:
    """Whether the query, key and value weights of a bridge's module are those of the module inside.

    If a model has them in one matrix, the bridge keeps split copies, which a user may have edited.
    """
    split = getattr(outer, "split_qkv_matrix", None)
    if split is None:
        return True
    # Splitting makes new linear layers, whose initial values are drawn from the user's generator.
    with torch.random.fork_rng(devices=[]):
        parts = split(inner)
    for name, part in zip("qkv", parts, strict=True):
        own = getattr(outer, name).original_component
        for weight in ("weight", "bias"):
            mine, theirs = getattr(own, weight, None), getattr(part, weight, None)
            if mine is None or theirs is None:
                if mine is not theirs:
                    return False
            elif not torch.equal(mine, theirs):
                return False
    return True


def _drops_attention(inner: nn.Module) -> bool:
    """Whether a transformers attention module applies dropout to probabilities in training."""
    if any(isinstance(part, nn.Dropout) and part.p > 0 for part in inner.children()):
        return True
    rates = (getattr(inner, name, 0.0) for name in ("attention_dropout", "dropout"))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def refuse_hooked_transformer(model: Any) -> Adapter:
    """Say what to use in place of a `HookedTransformer`, which TransformerLens 4 removed.

    Raises:
        UnsupportedModelError: always.
    """
    raise UnsupportedModelError(
        f"{type(model).__name__} is from TransformerLens before 4.0, which attnprobe does not read: install "
        f"transformer-lens{SUPPORTED['transformer-lens']} and use TransformerBridge.boot_transformers(name)"
    )

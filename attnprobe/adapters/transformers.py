"""The adapter for Hugging Face transformers models, and what the other backends share with it.

TransformerLens and nnsight also run a transformers model, module by module, so their adapters are this one
with another entry: they find the model, prepare it, and start its forward passes. The same code reads what
happens inside, which is why the backends agree.

Families that do not look up an attention function (Bloom, Falcon, MPT) are read densely, from the
maps that their eager attention returns. `adapter_for` makes the adapter. What is left to others: reading
(reading, attention_call), finding modules (architecture), and the check that every layer was seen
(`attnprobe.probe`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnprobe.adapters.architecture import architecture_of, decoder_of, has_next_token_logits
from attnprobe.adapters.base import Adapter, Observer, Suppression, display_name, evaluation_mode
from attnprobe.adapters.forward_call import unpacked
from attnprobe.adapters.forward_output import logits_of
from attnprobe.adapters.head_alone import LOGITS_AT_ONCE, HeadAlone
from attnprobe.adapters.interception import (
    calls_watched,
    implementation_changed,
    kernel_calls_watched,
    own_pass,
)
from attnprobe.adapters.multimodal import (
    media_tokens,
    pass_arguments,
    positions_kept,
    telling_mismatches,
)
from attnprobe.adapters.positions import Regimes, context_length
from attnprobe.adapters.reading import Reading
from attnprobe.adapters.suppressing import Suppressing
from attnprobe.adapters.versions import check_versions
from attnprobe.adapters.wrappers import (
    execution_device,
    first_weight,
    look_through,
    transformers_model,
    uncompiled,
)
from attnprobe.batch import TokenBatch
from attnprobe.errors import UnsupportedModelError


class TransformersAdapter(Adapter):
    """A transformers causal language model, in evaluation or training, on any device.

    It may have any head or none, and PEFT's adapters; a PEFT model is run through its wrapper.

    Raises:
        UnsupportedModelError: an encoder, an encoder-decoder, a model without attention, or a PEFT method
            that does more than to change layers; or a version of torch or transformers that is not read.
    """

    backend = "transformers"

    def __init__(self, model: Any) -> None:
        check_versions("torch", "transformers")
        # What our own passes call: some PEFT methods prepare their layers in the wrapper's forward.
        self._entry = look_through(model)
        model = transformers_model(model)
        if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
            raise UnsupportedModelError(
                f"this {type(self._entry).__name__} holds a {type(model).__name__}, not a transformers model"
            )
        config = model.config
        text_config = config.get_text_config(decoder=True)
        self.model = model
        self.family = type(model).__name__
        self.model_name = display_name(model)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{self.family} is an encoder-decoder model: attnprobe reads decoder-only causal models"
            )
        self._architecture = architecture_of(model)
        self.reads = "factored" if self._architecture.calls == "function" or self._calls_kernel else "dense"
        self.refused_sites = self._architecture.refused_sites
        self.has_next_token_logits = has_next_token_logits(model)
        if not self.has_next_token_logits:
            reason = f"{self.family} computes no next-token logits"
            self.refused_sites = {**self.refused_sites, "logits": reason}
        self.layers = tuple(self._architecture.layers)
        depth = int(getattr(text_config, "num_hidden_layers", 0) or len(self.layers))
        self.skipped_layers = tuple(i for i in range(depth) if i not in self._architecture.layers)
        self.head_count = _head_count(text_config)
        embedding = model.get_input_embeddings()
        self.vocabulary_size = int(getattr(embedding, "num_embeddings", text_config.vocab_size))
        self.media_tokens = media_tokens(config)
        decoder = decoder_of(model)
        self.context_length = context_length(decoder, text_config)
        self._regimes = Regimes(decoder, text_config)
        self.device = execution_device(embedding, model)
        self.activation_bytes = _activation_width(text_config) * first_weight(embedding, model).element_size()
        self._innermost: Reading | None = None

    # ---- what other backends override ---------------------------------------------------------

    def _all_modules(self) -> Iterator[nn.Module]:
        """Return every module that is put into evaluation mode for our own passes."""
        return self._entry.modules()  # type: ignore[no-any-return]

    @contextmanager
    def _ready(self, reading: Reading | None, layers: Sequence[int]) -> Iterator[None]:
        """Make the model's attention visible: to a reading or, if there is none, to a suppression."""
        if any(layer.attention_outer is not layer.attention for layer in self._architecture.layers.values()):
            raise UnsupportedModelError(
                f"this {self.family} is inside a TransformerBridge, which computes its attention: pass the "
                "bridge itself"
            )
        if self._calls_kernel:
            with ExitStack() as stack:
                for layer in layers:
                    stack.enter_context(kernel_calls_watched(self._architecture.layers[layer].attention))
                yield
        elif self.reads == "factored":
            with calls_watched():
                yield
        else:
            with implementation_changed(self.model, lambda _: "eager"):
                yield

    @property
    def _calls_kernel(self) -> bool:
        """Whether the layers call PyTorch's attention themselves."""
        implementation = self.model.config.get_text_config(decoder=True)._attn_implementation
        return self._architecture.calls == "kernel" and implementation == "sdpa"

    @property
    def _maps_by_hook(self) -> bool:
        """Whether maps are taken from what the attention modules return."""
        return self.reads == "dense"

    def _logits(self, arguments: dict[str, Any]) -> Tensor | None:
        """Run the model through the backend's own entry point, and return its logits if it has any."""
        return logits_of(self._entry(**arguments))

    # ---- what is the same everywhere ----------------------------------------------------------

    @contextmanager
    def observed(self, observer: Observer, sites: Sequence[str], layers: Sequence[int]) -> Iterator[None]:
        """Show the observer every forward pass while the context is open."""
        reading = Reading(self.model, self._architecture, self.full_name, observer, sites)
        before = self._innermost
        with ExitStack() as stack:
            stack.enter_context(uncompiled())
            if "attention" in sites or "value_norms" in sites:
                stack.enter_context(self._ready(reading, layers))
            stack.enter_context(reading.attached(layers, self._maps_by_hook))
            self._innermost = reading
            try:
                yield
            finally:
                self._innermost = before

    def regime(self, length: int) -> Hashable:
        """Return which sequences a sequence may run with."""
        return self._regimes.of_length(length)

    @torch.no_grad()
    def forward(
        self, batch: TokenBatch, *, logits_at: Int[Tensor, " position"] | None = None
    ) -> Float[Tensor, "batch position vocabulary"] | None:
        """Run the model over right-padded sequences, or as they are with what goes along with them."""
        if logits_at is not None:
            self.check_next_token_logits("logits_at")
        batch = batch.to(self.device)
        arguments = self._arguments(batch, logits_at)
        positions = None if batch.model_inputs is not None else arguments.get("position_ids")
        with ExitStack() as stack:
            if positions is not None:
                stack.enter_context(unpacked(positions))
            stack.enter_context(uncompiled())
            stack.enter_context(evaluation_mode(self._all_modules()))
            stack.enter_context(self._regimes.undisturbed())
            if batch.model_inputs is not None:
                stack.enter_context(positions_kept(self._all_modules()))
                stack.enter_context(telling_mismatches(self.full_name))
            stack.enter_context(own_pass(layer.attention for layer in self._architecture.layers.values()))
            if logits_at is None:
                if self._innermost is not None:
                    stack.enter_context(self._innermost.ending_early())
                self._logits(arguments)
                return None
            logits = self._logits(arguments)
            assert logits is not None
            return logits if self._keeps_logits else logits[:, logits_at.to(logits.device)]

    def _arguments(self, batch: TokenBatch, logits_at: Int[Tensor, " position"] | None) -> dict[str, Any]:
        """Return the arguments of one of our own passes."""
        ids = batch.input_ids
        # Right-padded sequences need no mask in a causal model: no real token can see the padding after it.
        # Positions are passed nevertheless, since some families would otherwise guess them.
        arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if batch.model_inputs is not None:
            arguments |= pass_arguments(batch, self.model, self.full_name)
        elif "position_ids" in self._accepted:
            # For each row, since some families index them by row (Qwen4-Exp).
            arguments["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if self._keeps_logits:
            # A tensor even for the last position: given a number, some families (Gemma 4) leave the other
            # tokens out of their last layers.
            at = torch.tensor([ids.shape[1] - 1]) if logits_at is None else logits_at
            arguments["logits_to_keep"] = at.to(self.device)
        return arguments

    @property
    def _accepted(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(type(self.model).forward).parameters

    @property
    def _keeps_logits(self) -> bool:
        """Whether the model can be asked for the logits of some positions only."""
        return "logits_to_keep" in self._accepted

    @torch.no_grad()
    def reduced_logits(
        self, batch: TokenBatch, logits_at: Int[Tensor, " position"], reduce: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "batch position"]:
        """Run the model, and return what `reduce` makes of the logits, of a few positions at a time."""
        size = self._positions_at_once(batch.batch_size)
        head = HeadAlone(self.model)
        alone = self._runs_head_alone and batch.model_inputs is None and head.is_known
        if len(logits_at) <= size or not alone:
            return super().reduced_logits(batch, logits_at, reduce)
        batch = batch.to(self.device)
        with head.kept():
            logits = self.forward(batch, logits_at=logits_at[:size])
        assert logits is not None
        found = [reduce(logits)]
        with uncompiled(), evaluation_mode(self._all_modules()), head.standing_in():
            begin = size
            while begin < len(logits_at):
                if len(found) > 1 and not head.was_used:
                    # Its layers run again each time: all the others at once.
                    size = len(logits_at)
                del logits
                logits = head.logits(self._arguments(batch, logits_at[begin : begin + size]))
                found.append(reduce(logits))
                begin += size
        return torch.cat(found, dim=1)

    def logits_bytes(self, examples: int, positions: int) -> int:
        """Return roughly how many bytes of logits are held at once: all, or those of a few positions.

        What the layers gave is kept for the others: less than the layers held before.
        """
        if self._runs_head_alone and HeadAlone(self.model).is_known:
            positions = min(positions, self._positions_at_once(examples))
        return super().logits_bytes(examples, positions)

    def _positions_at_once(self, examples: int) -> int:
        """Return for how many positions logits are computed at a time, where the head runs alone."""
        return max(1, LOGITS_AT_ONCE // (examples * self.vocabulary_size))

    @property
    def _runs_head_alone(self) -> bool:
        """Whether a pass over text is one plain call of the model or of PEFT's wrapper around it."""
        kind = type(self)
        own = (kind.forward, kind._logits) == (TransformersAdapter.forward, TransformersAdapter._logits)
        return own and self._keeps_logits

    @contextmanager
    def suppressed(self, suppression: Suppression, layers: Sequence[int]) -> Iterator[None]:
        """Suppress attention in every forward pass while the context is open."""
        if self._architecture.calls != "function":
            raise UnsupportedModelError(
                f"{self.family} does not look up its attention function: its attention can be read, but "
                "not suppressed"
            )
        suppressing = Suppressing(self.model, self.full_name, suppression, layers)
        with ExitStack() as stack:
            stack.enter_context(uncompiled())
            stack.enter_context(self._ready(None, layers))
            for layer in layers:
                stack.enter_context(suppressing.of_layer(layer, self._architecture.layers[layer].attention))
            stack.enter_context(suppressing.installed())
            yield


def _head_count(config: Any) -> int | None:
    """Return how many heads a layer has; None if layers differ."""
    try:
        heads = getattr(config, "num_attention_heads", None)
    except RuntimeError:
        # Configs with settings for each layer (Dots3-Note) refuse to give one for all.
        return None
    return heads if isinstance(heads, int) else None


def _activation_width(config: Any) -> int:
    """Return roughly how many numbers a layer holds at once for each token.

    These are the residual stream, its norm, query, key, value and output (about eight times the model's
    width), and the feed-forward layer's three intermediates. An estimate, not a limit.
    """
    width = int(config.hidden_size)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    # Some families give a width for each layer.
    return 8 * width + 3 * (max(inner) if isinstance(inner, list) else int(inner))

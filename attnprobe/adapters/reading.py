"""Reading the sites of a transformers model in its forward passes, whoever runs them.

`Reading` shows an observer the values at the sites, and replaces them with what the observer returns. It uses
hooks on the model's own modules. The adapters make one for each `observed` context. What is left to others:
when a pass begins and ends (forward_watch), what it returns (forward_output), where the modules are
(architecture), seeing attention calls (interception), what they say (attention_call), and what observers do
with it (`attnprobe.probe`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnprobe.adapters.architecture import Architecture
from attnprobe.adapters.attention_call import (
    AttentionCall,
    MaskMemory,
    as_multiplied,
    read_attention,
    without_autocast,
)
from attnprobe.adapters.base import Observer
from attnprobe.adapters.forward_call import cache_of
from attnprobe.adapters.forward_output import is_map, logits_of, with_logits, without_maps
from attnprobe.adapters.forward_watch import ForwardWatch, computes_layers_again
from attnprobe.adapters.hooks import after_forward, before_forward
from attnprobe.adapters.interception import reads_calls
from attnprobe.adapters.multimodal import media_tokens, why_not_causal
from attnprobe.adapters.output_check import OutputCheck
from attnprobe.adapters.value_norms import ProjectionWatch
from attnprobe.attention.checks import GatheredChecks, judge_later
from attnprobe.attention.factored import FactoredAttention
from attnprobe.attention.masks import CausalMask, LaterKeysError
from attnprobe.attention.operator import Attention, DenseAttention
from attnprobe.batch import TokenBatch
from attnprobe.errors import AttnprobeError, InterventionError, UnsupportedModelError

_OF_CALLS = frozenset({"attention", "value_norms"})
"""The sites that are read from attention calls."""


class _PassEnded(Exception):
    """Ends one of our own forward passes once a reading has seen all it needs."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading


class Reading(ForwardWatch):
    """What one `observed` context does inside the model's forward passes."""

    def __init__(
        self, model: Any, architecture: Architecture, name: str, observer: Observer, sites: Sequence[str]
    ) -> None:
        super().__init__(model, name)
        self._architecture = architecture
        self._observer = observer
        self._sites = frozenset(sites)
        self._layer_of = {id(layer.attention): number for number, layer in architecture.layers.items()}
        self._batch: TokenBatch | None = None
        self._logits_are_last = True
        self._computes_loss = False
        self._maps_by_hook = False
        self._asked_for_maps = False
        self._masks = MaskMemory()
        self._layers_read: set[int] = set()
        self._output_check = OutputCheck()
        self._checks = GatheredChecks()
        self._separated: list[CausalMask] = []
        self._last_layer: int | None = None
        self._projections: dict[int, ProjectionWatch] = {}
        self._ends_early = False
        self._depth_of_model = getattr(self._text_config, "num_hidden_layers", None)

    @contextmanager
    def attached(self, layers: Sequence[int], maps_by_hook: bool) -> Iterator[None]:
        """Watch the sites of these layers; `maps_by_hook` takes maps from what attention returns."""
        self._maps_by_hook = maps_by_hook and bool(self._sites & _OF_CALLS)
        self._last_layer = max(layers)
        with ExitStack() as stack:
            for number in layers:
                layer = self._architecture.layers[number]
                if "value_norms" in self._sites:
                    watch = ProjectionWatch(
                        layer.attention,
                        self._where(number),
                        partial(self._show_norms, number),
                        self._gathering,
                    )
                    self._projections[number] = watch
                    stack.enter_context(watch.installed())
                if self._sites & _OF_CALLS:
                    stack.enter_context(reads_calls(layer.attention, self._read_call))
                    # A bridge's own attention shows its pattern at a hook.
                    if layer.attention is layer.attention_outer:
                        stack.enter_context(after_forward(layer.attention, self._read_map))
                for site, module in (
                    ("attention_output", layer.attention_outer),
                    ("mlp_output", layer.feed_forward),
                    ("layer_output", layer.block),
                ):
                    if site in self._sites:
                        assert module is not None
                        stack.enter_context(after_forward(module, self._output_hook(site, number)))
                if "layer_input" in self._sites:
                    stack.enter_context(before_forward(layer.block, self._input_hook(number)))
            stack.enter_context(self.installed())
            yield
        if self.refusal is not None and self._thread != threading.get_ident():
            # Whoever runs the model in a thread of its own (generate_batch) may only have logged it.
            raise self.refusal

    @contextmanager
    def ending_early(self) -> Iterator[None]:
        """End a pass inside this context after the last layer's attention, if nothing else is observed.

        It ends by an exception, and the observer is told that it is complete. Any other observer of the model
        (an outer `attach` of the user's) sees a pass that failed, which for it is true.
        """
        self._ends_early = self._sites <= _OF_CALLS
        try:
            yield
        except _PassEnded as end:
            if end.reading is not self:
                raise
        finally:
            self._ends_early = False

    # ---- the forward pass as a whole ----------------------------------------------------------

    def began(self, batch: TokenBatch, given: dict[str, Any]) -> dict[str, Any]:
        """Tell the observer, and ask for maps if there is no other way to read attention."""
        self._check_depth()
        self._logits_are_last = not isinstance(given.get("logits_to_keep"), Tensor)
        self._computes_loss = given.get("labels") is not None
        self._batch = batch
        self._layers_read = set()
        self._checks.clear()
        for watch in self._projections.values():
            watch.reset()
        self._observer.begin(batch, self.columns.cached, cache_of(given, self.columns))
        if "logits" in self._sites and not self._logits_are_last:
            self._observer.skip("logits")
        if self._maps_by_hook:
            self._asked_for_maps = not given.get("output_attentions")
            return {"output_attentions": True}
        return {}

    def _check_depth(self) -> None:
        """Refuse a pass through some of the layers: guesses of `generate` with `assistant_early_exit`."""
        config = self._text_config
        if getattr(config, "num_hidden_layers", None) == self._depth_of_model:
            return
        exited = config.num_hidden_layers
        # generate puts the number back itself, but not if a pass raises.
        config.num_hidden_layers = self._depth_of_model
        raise UnsupportedModelError(
            f"a pass of {self._name} was to end after {exited} of {self._depth_of_model} layers, as guesses "
            "with assistant_early_exit do: use an assistant_model or prompt_lookup_num_tokens, or measure "
            "the finished sequence"
        )

    @property
    def _text_config(self) -> Any:
        return self._model.config.get_text_config(decoder=True)

    def ended(self, output: Any) -> Any:
        """Show the logits, tell the observer, and remove maps that the user did not ask for."""
        self._masks, self._separated = MaskMemory(), []
        self._settle()
        changed = None
        # A base model's output has none, though in a tuple it looks alike.
        if "logits" in self._sites and self._logits_are_last and self.is_whole:
            logits = logits_of(output)
            replaced = None if logits is None else self._observe_tensor("logits", None, logits)
            if replaced is not None:
                changed = self._with_logits(output, replaced)
        self._observer.end()
        if self._asked_for_maps and output is not None:
            changed = without_maps(output if changed is None else changed)
        return changed

    def _with_logits(self, output: Any, logits: Tensor) -> Any:
        """Return the model's output with other logits."""
        if self._computes_loss:
            raise InterventionError(
                "the logits cannot be replaced if the model computes the loss itself, since it uses the old "
                "ones: call it without labels"
            )
        return with_logits(output, logits)

    def _settle(self) -> None:
        """Judge what was checked in the layers, before anyone learns that the pass is complete."""
        try:
            self._checks.settle()
        except BaseException:
            self._observer.abort()
            raise

    def failed(self) -> None:
        """Tell the observer that the pass has failed."""
        self._masks, self._separated = MaskMemory(), []
        self._checks.clear()
        self._observer.abort()

    # ---- one layer ----------------------------------------------------------------------------

    def _read_call(self, call: AttentionCall) -> None:
        """Read the inputs of an attention call, check them against its output, and show what was read."""
        # Outside a forward pass, the call is a recomputation by gradient checkpointing, and was seen before.
        if not self.is_running:
            return
        layer = self._layer_of[id(call.module)]
        call = as_multiplied(call)
        with torch.no_grad(), without_autocast(call.query.device), self._gathering():
            attention = self._attention_of(call)
            dropped = call.module.training and float(call.options.get("dropout") or 0.0) > 0
            if not dropped:
                self._output_check.check(attention, call, self._where(layer))
            if layer in self._projections:
                self._projections[layer].called(call, self.columns)
            self._show(layer, attention)
        if "value_norms" not in self._sites:
            self._end_after(layer)

    @contextmanager
    def _gathering(self) -> Iterator[None]:
        """Let the checks of a layer wait until the pass ends. An error of ours comes after theirs."""
        with self._checks.open():
            try:
                yield
            except AttnprobeError:
                self._checks.settle()
                raise

    def _where(self, layer: int) -> str:
        return f"layer {layer} of {self._name}"

    def _attention_of(self, call: AttentionCall) -> FactoredAttention:
        """Return the attention of a call, or say what makes it look at later tokens."""
        assert self._batch is not None
        try:
            return read_attention(call, self._masks, self.columns)
        except LaterKeysError as error:
            config = self._model.config
            if not media_tokens(config).keys().isdisjoint(self._batch.input_ids.flatten().tolist()):
                raise UnsupportedModelError(why_not_causal(config, self._name)) from error
            raise
        except UnsupportedModelError as error:
            self.refusal = error
            raise

    def read_pattern(self, layer: int, pattern: Tensor) -> None:
        """Show a map that the backend computed for a layer."""
        if not self.is_running:
            return
        if "value_norms" in self._sites:
            raise UnsupportedModelError(
                f"{self._where(layer)} shows only its attention map, and not the values: measure without "
                "value_weighted"
            )
        assert self._batch is not None
        examples, tokens = self._batch.input_ids.shape
        rows, keys = pattern.shape[2:]
        if pattern.shape[0] != examples or rows > tokens or rows > keys:
            raise UnsupportedModelError(
                f"layer {layer} of {self._name} computes maps {list(pattern.shape)} for {examples} x "
                f"{tokens} tokens, where [batch, head, query, key] was expected: it is not known which "
                "tokens they are about"
            )
        real = self._batch.attention_mask[:, None, :, None].to(pattern.device)
        # Eager masks spread the rows of padding queries, which may see nothing, over all keys.
        with torch.no_grad(), without_autocast(pattern.device), self._gathering():
            real = real[:, :, -pattern.shape[2] :]
            pattern = pattern.detach()[..., : self.columns.end].masked_fill(~real, 0.0)
            start = self.columns.end - pattern.shape[3]
            self._show(layer, DenseAttention(pattern, key_start=start))
        self._end_after(layer)

    def _read_map(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Read the map that an eager attention module returns, and remove it from the output.

        Modules that look up an attention function may still compute attention themselves (GPT-2 with
        `reorder_and_upcast_attn`): then the map is all there is to read.
        """
        layer = self._layer_of[id(module)]
        if not self.is_running or (layer in self._layers_read and not self._maps_by_hook):
            return None
        entries = output if isinstance(output, tuple) else (output,)
        place = next((i for i, entry in enumerate(entries) if is_map(entry)), None)
        if place is None and not self._maps_by_hook:
            # The layer stays silent, which the end of the pass reports.
            return None
        if place is None:
            raise UnsupportedModelError(
                f"layer {layer} of {self._name} ({type(module).__name__}) neither calls an attention "
                "function nor returns its attention map: there is nothing to read"
            )
        if module.training and any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.children()):
            raise UnsupportedModelError(
                f"{type(module).__name__} returns its maps after dropout: call model.eval() first"
            )
        self.read_pattern(layer, entries[place])
        return (*entries[:place], None, *entries[place + 1 :]) if self._asked_for_maps else None

    def _show(self, layer: int, attention: Attention) -> None:
        """Show a layer's attention to the observer."""
        self._layers_read.add(layer)
        if self.columns.segment_ids is not None and not self.columns.cached:
            self._check_separated(layer, attention, self.columns.segment_ids)
        if "attention" in self._sites:
            self._observer.observe("attention", layer, attention)

    def _show_norms(self, layer: int, norms: Tensor) -> None:
        """Show the norms of a layer's values, and end the pass if nothing more is needed."""
        if not self.is_running:
            return
        if self._observer.observe("value_norms", layer, norms) is not None:
            raise InterventionError("value_norms can be read but not replaced")
        self._end_after(layer)

    def _end_after(self, layer: int) -> None:
        if self._ends_early and layer == self._last_layer:
            self.cut_off()
            raise _PassEnded(self)

    def _check_separated(self, layer: int, attention: Attention, segment_ids: Tensor) -> None:
        """Check that a layer keeps the sequences of packed rows apart, as their positions say."""
        if isinstance(attention, FactoredAttention):
            mask = attention.scores.mask
            if any(mask is checked for checked in self._separated):
                return
            self._separated.append(mask)
            crosses = mask.crosses(segment_ids)
        else:
            ids = segment_ids.to(attention.device)
            other = ids[:, -attention.query_count :, None] != ids[:, None, :]
            pattern = attention.rows(torch.arange(attention.query_count, device=attention.device))
            crosses = (pattern * other[:, None]).any()

        def judge(numbers: list[float]) -> None:
            if not numbers[0]:
                return
            raise UnsupportedModelError(
                f"the positions of this call restart, as those of packed sequences do, but layer {layer} of "
                f"{self._name} lets the sequences see each other. transformers separates them if there is "
                "neither a cache nor an attention_mask, and not in every family: pass use_cache=False and no "
                "mask, or give measure a batch with these position_ids, which it runs one by one"
            )

        judge_later([crosses], judge)

    # ---- tensor sites -------------------------------------------------------------------------

    def _output_hook(self, site: str, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            output_shape = value.shape
            if len(output_shape) == 2 and self.is_running:
                # Mixtures of experts treat tokens one by one, and some return them without a batch axis.
                assert self._batch is not None
                value = value.unflatten(0, self._batch.input_ids.shape)
            replaced = self._observe_tensor(site, layer, value)
            if replaced is None:
                return None
            replaced = replaced.reshape(output_shape)
            return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

        return hook

    def _input_hook(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            value = args[0] if args else kwargs.get("hidden_states")
            replaced = self._observe_tensor("layer_input", layer, value)
            if replaced is None:
                return None
            return ((replaced, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": replaced})

        return hook

    def _observe_tensor(self, site: str, layer: int | None, value: Any) -> Tensor | None:
        """Show a tensor to the observer, and return its replacement, or None."""
        if not self.is_running and site != "logits":
            return None
        assert self._batch is not None
        where = f"{site} of {self._name}" if layer is None else f"{site} of layer {layer} of {self._name}"
        tokens = self._batch.input_ids.shape
        fits = isinstance(value, Tensor) and value.ndim == 3 and value.shape[0] == tokens[0]
        if not fits or (site != "logits" and value.shape[1] != tokens[1]):
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UnsupportedModelError(f"{where} should be [batch, token, d_model], but is {found}")
        # Some families later add to this very tensor in place (Falcon), which would change what a probe
        # keeps. Logits are not copied: they are large, and the model does nothing more with them.
        shown = value if site == "logits" else value.clone()
        version = None if shown.is_inference() else shown._version
        if site == "logits":
            replaced = self._observer.observe(site, layer, shown)
        else:
            with self._checks.open():
                replaced = self._observer.observe(site, layer, shown)
        if version is not None and shown._version != version:
            raise InterventionError(f"a probe changed {where} in place: return a new tensor to replace it")
        if replaced is not None and computes_layers_again(self._model):
            raise InterventionError(
                f"{where} cannot be replaced under gradient checkpointing: the backward pass recomputes the "
                "layers without probes. Call model.gradient_checkpointing_disable() first"
            )
        return replaced

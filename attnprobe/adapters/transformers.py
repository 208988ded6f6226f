"""The adapter for plain Hugging Face transformers models.

Most causal language models hand query, key and mask to an attention function that is looked up by
name. While probes are attached, that name leads to ours, which calls the model's own implementation,
so that outputs stay bitwise what they were, and shows the inputs as a `FactoredAttention`. The mask
function of the same name is registered too: without it a model silently runs unmasked.

Families that do not look up an attention function (Bloom, Falcon, GPT-J) are read densely, from the
maps that their eager attention returns. Each layer that is read is checked against the model's own
output on sampled rows: an option of some family that this adapter does not know cannot pass as a
number.

What is left to others: the statistics, and the check that every layer was seen (`attnprobe.probe`).
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from attnprobe.adapters.base import Adapter, Observer
from attnprobe.attention import DenseAttention
from attnprobe.batch import TokenBatch
from attnprobe.errors import AttnprobeError, IncompleteRunError, UnsupportedModelError
from attnprobe.factored import FactoredAttention, Visibility, split_mask

_PREFIX = "attnprobe_"


class TransformersAdapter(Adapter):
    """A transformers causal language model, in evaluation or training, on any device.

    Raises:
        UnsupportedModelError: an encoder, an encoder-decoder, or a model without attention.
    """

    backend = "transformers"

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        text_config = config.get_text_config(decoder=True)
        self.model = model
        name = getattr(config, "_name_or_path", "") or type(model).__name__
        # A folder's path says where the model lies on this machine, not which model it is.
        self.model_name = Path(name).name if Path(name).is_absolute() else name
        family = type(model).__name__
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{family} is an encoder-decoder model: attnprobe reads decoder-only causal models"
            )
        modules = _modules_by_layer(model, _calls_attention_function)
        self.reads = "factored" if modules else "dense"
        if not modules:
            modules = _modules_by_layer(model, _looks_like_attention)
        if not modules:
            raise UnsupportedModelError(
                f"{family} has no attention layer that can be found: there is nothing to read"
            )
        if not any(getattr(module, "is_causal", True) for module in modules.values()) or (
            not _is_decoder(model)
        ):
            raise UnsupportedModelError(
                f"{family} is an encoder: its attention looks at later tokens. attnprobe reads causal "
                "language models"
            )
        self._modules = modules
        self._layer_of = {id(module): layer for layer, module in modules.items()}
        self.layers = tuple(sorted(modules))
        depth = int(getattr(text_config, "num_hidden_layers", 0) or len(modules))
        self.skipped_layers = tuple(i for i in range(depth) if i not in modules)
        embedding = model.get_input_embeddings()
        self.vocabulary_size = int(getattr(embedding, "num_embeddings", text_config.vocab_size))
        self.context_length = getattr(text_config, "max_position_embeddings", None)
        self.device = next(embedding.parameters()).device
        self._stop_after: int | None = None

    @contextmanager
    def observed(self, observer: Observer, sites: Sequence[str], layers: Sequence[int]) -> Iterator[None]:
        """Tell the observer of every forward pass while the context is open."""
        reading = _Reading(self, observer, frozenset(sites), frozenset(layers))
        with ExitStack() as stack:
            if "attention" in sites:
                if self.reads == "factored":
                    stack.enter_context(_implementation_changed(self.model, _register))
                    for layer in layers:
                        stack.enter_context(_reads_module(self._modules[layer], reading))
                else:
                    # Falcon returns maps under sdpa too, but computes them with the wrong mask.
                    stack.enter_context(_implementation_changed(self.model, lambda _: "eager"))
                    for layer in layers:
                        handle = self._modules[layer].register_forward_hook(reading.read_map)
                        stack.callback(handle.remove)
            # The base model is watched too: a user may call it without the language-model head.
            for module in {id(m): m for m in (self.model, self.model.base_model)}.values():
                before = module.register_forward_pre_hook(
                    reading.before_forward, with_kwargs=True, prepend=True
                )
                stack.callback(before.remove)
                after = module.register_forward_hook(reading.after_forward, always_call=True)
                stack.callback(after.remove)
            self._last_observed = max(layers)
            yield

    @torch.no_grad()
    def forward(
        self, rows: TokenBatch, *, logits_at: Int[Tensor, " row"] | None = None
    ) -> Float[Tensor, "batch row vocabulary"] | None:
        """Run the model over right-padded rows, in evaluation mode and without gradients."""
        accepted = inspect.signature(self.model.forward).parameters
        ids = rows.input_ids.to(self.device)
        # Right-padded rows of a causal model need no mask: no real token can see the padding behind
        # it. Positions are passed all the same: some families would else guess them.
        arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if "position_ids" in accepted:
            arguments["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]
        keeps = "logits_to_keep" in accepted
        if logits_at is not None and keeps:
            arguments["logits_to_keep"] = logits_at.to(self.device)
        was_training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            if logits_at is None:
                self._stop_after = self._last_observed
                with suppress(_LastLayerSeen):
                    self.model(**arguments)
                return None
            logits: Tensor = self.model(**arguments).logits
            return logits if keeps else logits[:, logits_at.to(logits.device)]
        finally:
            self._stop_after = None
            for module in was_training:
                module.training = True


class _LastLayerSeen(Exception):
    """Ends a forward pass of ours once the last layer of interest has been seen."""

    def __init__(self, reading: _Reading) -> None:
        self.reading = reading


class _Reading:
    """What one `observed` context does inside the model's forward passes."""

    def __init__(
        self,
        adapter: TransformersAdapter,
        observer: Observer,
        sites: frozenset[str],
        layers: frozenset[int],
    ) -> None:
        self._adapter = adapter
        self._observer = observer
        self._sites = sites
        self._layers = layers
        self._depth = 0
        self._thread: int | None = None
        self._real = torch.empty(0, dtype=torch.bool)
        self._asked_for_maps = False
        self._mask: tuple[Tensor, Visibility, Tensor | None] | None = None

    # ---- the forward pass as a whole ----------------------------------------------------------

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._depth and self._thread != threading.get_ident():
            raise AttnprobeError(
                f"{self._adapter.model_name} runs in two threads while probes are attached: their "
                "layers would be mixed. Use one model for each thread, or take turns"
            )
        if self._depth and module is self._adapter.model:
            # The last pass was interrupted (Ctrl-C), which runs no hooks: it will not come back.
            self._depth = 0
            self._observer.abort()
        self._depth += 1
        if self._depth > 1:
            return None
        self._thread = threading.get_ident()
        try:
            batch = _batch_of_call(module, args, kwargs)
            self._real = batch.attention_mask
            self._observer.begin(batch)
        except BaseException:
            self._depth = 0
            raise
        if self._adapter.reads == "dense" and "attention" in self._sites:
            self._asked_for_maps = not kwargs.get("output_attentions")
            return args, {**kwargs, "output_attentions": True}
        return None

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._depth == 0:
            return None
        self._depth -= 1
        if self._depth:
            return None
        self._mask = None
        if output is None and not self._stopped():
            self._observer.abort()
            return None
        logits = getattr(output, "logits", None)
        if "logits" in self._sites and logits is not None:
            self._observer.observe("logits", None, logits.detach())
        self._observer.end()
        # Where the user did not ask for maps, the output is as if we had not either.
        return _without_maps(output) if self._asked_for_maps else None

    def _stopped(self) -> bool:
        error = sys.exc_info()[1]
        return isinstance(error, _LastLayerSeen) and error.reading is self

    # ---- one layer ----------------------------------------------------------------------------

    def read_call(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        options: dict[str, Any],
        output: Tensor,
    ) -> None:
        """Read the inputs of an attention call, and check them against its output."""
        # Outside a forward pass the call is a recomputation of gradient checkpointing, seen already.
        if self._depth == 0:
            return
        layer = self._adapter._layer_of[id(module)]
        with torch.no_grad():
            attention = self._factored(module, query, key, mask, options)
            dropped = module.training and float(options.get("dropout") or 0.0) > 0
            if not dropped:
                self._check_against_output(attention, value, output, layer, options)
            self._observer.observe("attention", layer, attention)
        if self._adapter._stop_after == layer:
            raise _LastLayerSeen(self)

    def _factored(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]
    ) -> FactoredAttention:
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if not causal and query.shape[2] > 1 and mask is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} looks at later tokens: attnprobe reads causal models only"
            )
        window = options.get("sliding_window")
        bias = options.get("position_bias")
        visibility = key_mask = None
        if isinstance(mask, Tensor) and mask.ndim == 4:
            # One mask serves all layers of its kind: what it says is worked out once.
            if self._mask is None or self._mask[0] is not mask:
                seen, mask_bias = split_mask(mask[..., : key.shape[2]])
                self._mask = (mask, Visibility.from_mask(seen), mask_bias)
            _, visibility, mask_bias = self._mask
            if mask_bias is not None:
                bias = mask_bias if bias is None else bias + mask_bias
        elif isinstance(mask, Tensor) and mask.ndim == 2:
            key_mask = mask[:, -key.shape[2] :].bool()
        elif mask is not None:
            raise UnsupportedModelError(
                f"cannot read a mask of type {type(mask).__name__}: use the sdpa or eager implementation"
            )
        return FactoredAttention(
            query,
            key,
            scaling=options.get("scaling"),
            key_mask=key_mask,
            window=window if visibility is None else None,
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
            bias=bias,
            visibility=visibility,
        )

    def _check_against_output(
        self,
        attention: FactoredAttention,
        value: Tensor,
        output: Tensor,
        layer: int,
        options: dict[str, Any],
    ) -> None:
        """Check that sampled rows of what was read give the model's own attention output."""
        count = attention.query_count
        sampled = torch.tensor(sorted({count // 2, count - 1}), device=attention.device)
        rows = attention.rows(sampled)
        groups = attention.head_count // value.shape[1]
        values = value.detach().to(rows.dtype).repeat_interleave(groups, dim=1)
        expected = rows @ values
        actual = output.detach()[:, sampled].transpose(1, 2).to(rows.dtype)
        if actual.shape != expected.shape:
            difference = float("inf")
        else:
            # A padding query sees nothing; what the model gives for it has no meaning.
            seeing = rows.sum(-1, keepdim=True) > 0
            difference = float(((actual - expected) * seeing).abs().max())
        scale = float(values.abs().max())
        tolerance = 64 * torch.finfo(output.dtype).eps * max(scale, 1e-3)
        if not difference <= tolerance:
            raise IncompleteRunError(
                f"layer {layer} of {self._adapter.model_name} does something to its attention that "
                f"was not understood: its output differs by {difference:.3g} from what its query, key "
                f"and mask give (options of the call: {sorted(options)}). Nothing of this pass is kept"
            )

    def read_map(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Read the map that an eager attention module returns, and take it off its output."""
        if self._depth == 0:
            return None
        layer = self._adapter._layer_of[id(module)]
        entries = output if isinstance(output, tuple) else (output,)
        place = next((i for i, entry in enumerate(entries) if _is_map(entry)), None)
        if place is None:
            raise UnsupportedModelError(
                f"layer {layer} of {self._adapter.model_name} ({type(module).__name__}) neither calls "
                "an attention function nor returns its attention map: there is nothing to read"
            )
        if module.training and any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.children()):
            raise UnsupportedModelError(
                f"{type(module).__name__} returns its maps after dropout: call model.eval() first"
            )
        # The rows of padding queries, which may see nothing, are spread over all keys by eager masks.
        pattern = entries[place].detach().masked_fill(~self._real[:, None, :, None], 0.0)
        self._observer.observe("attention", layer, DenseAttention(pattern))
        if self._adapter._stop_after == layer:
            raise _LastLayerSeen(self)
        if not self._asked_for_maps:
            return None
        return (*entries[:place], None, *entries[place + 1 :])


# ---- finding the layers -----------------------------------------------------------------------


def _modules_by_layer(model: PreTrainedModel, wanted: Callable[[nn.Module], bool]) -> dict[int, nn.Module]:
    """Return the outermost wanted modules of the text decoder, by the number of their layer."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    found: dict[int, nn.Module] = {}
    inside: list[str] = []
    for name, module in (decoder or model.base_model).named_modules():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        nested = any(name.startswith(outer + ".") for outer in inside)
        if not numbers or nested or not wanted(module):
            continue
        if getattr(module, "is_cross_attention", False):
            continue
        inside.append(name)
        if numbers[0] in found:
            raise UnsupportedModelError(
                f"layer {numbers[0]} of {type(model).__name__} has more than one attention module "
                f"({type(found[numbers[0]]).__name__}, {type(module).__name__}): which to read is "
                "not known"
            )
        found[numbers[0]] = module
    return found


def _calls_attention_function(module: nn.Module) -> bool:
    """Whether the module's forward looks up the attention function of transformers."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _looks_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "attention" in name and "linear" not in name


def _is_decoder(model: PreTrainedModel) -> bool:
    """Whether the model is a causal one; some encoder classes can be configured to be."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    can_be_encoder = model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    named_causal = any("CausalLM" in base.__name__ for base in type(model).__mro__)
    return not can_be_encoder or named_causal or bool(getattr(model.config, "is_decoder", False))


def _without_maps(output: Any) -> Any:
    """Return a model's output without its attentions, whose maps were taken off on the way."""
    if isinstance(output, tuple):
        return tuple(e for e in output if not (isinstance(e, tuple) and set(e) == {None}))
    return type(output)(**{name: value for name, value in output.items() if name != "attentions"})


def _is_map(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.ndim == 4 and entry.is_floating_point()


# ---- the attention function -------------------------------------------------------------------

# Which readings watch an attention module, across nested `observed` contexts and threads.
_readings: weakref.WeakKeyDictionary[nn.Module, list[_Reading]] = weakref.WeakKeyDictionary()


@contextmanager
def _reads_module(module: nn.Module, reading: _Reading) -> Iterator[None]:
    _readings.setdefault(module, []).append(reading)
    try:
        yield
    finally:
        _readings[module].remove(reading)


@contextmanager
def _implementation_changed(model: PreTrainedModel, change: Callable[[str], str]) -> Iterator[None]:
    """Change the attention implementation in every config of the model, and back again.

    The implementation is set on the configs themselves: `set_attn_implementation` would also check
    and adjust it, and cannot restore models whose parts have different ones.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            configs[id(config)] = config
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        for config, implementation in before:
            config._attn_implementation_internal = change(implementation or "eager")
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def _register(implementation: str) -> str:
    """Register our function over an implementation, with that implementation's masks."""
    if implementation.startswith(_PREFIX):
        return implementation
    name = _PREFIX + implementation
    AttentionInterface.register(name, _attention_function)
    if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Call the model's own implementation, then show the call to who watches the module."""
    config: Any = module.config
    implementation = config._attn_implementation.removeprefix(_PREFIX)
    # The names that the module's own forward would have looked up.
    names = inspect.unwrap(type(module).forward).__globals__
    own: Callable[..., Any] = names["ALL_ATTENTION_FUNCTIONS"].get_interface(
        implementation, names.get("eager_attention_forward")
    )
    output: tuple[Tensor, Tensor | None] = own(module, query, key, value, attention_mask, *args, **options)
    for reading in tuple(_readings.get(module, ())):
        reading.read_call(module, query, key, value, attention_mask, options, output[0])
    return output


def _batch_of_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenBatch:
    """Return the tokens that a forward call of the user's is about."""
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    given = {**bound, **bound.get("kwargs", {})}
    ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    if ids is None:
        if embeddings is None:
            raise AttnprobeError("the model was called with neither input_ids nor inputs_embeds")
        ids = embeddings.new_zeros(embeddings.shape[:2], dtype=torch.long)
    mask = given.get("attention_mask")
    real = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        real = mask[:, -ids.shape[1] :].to(ids.device) != 0
    segments = None
    positions = given.get("position_ids")
    if mask is None and isinstance(positions, Tensor) and positions.ndim == 2:
        steps = positions[:, 1:] - positions[:, :-1]
        if bool((steps != 1).any()):
            starts = torch.nn.functional.pad((steps != 1).long(), (1, 0))
            segments = starts.cumsum(-1).expand(ids.shape)
    return TokenBatch(ids, real, real, segments)

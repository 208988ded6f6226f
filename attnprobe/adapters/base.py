"""What a backend adapter offers: the sites of a model's forward pass, under one set of names.

An adapter knows one backend and no metric. It finds the layers that have attention, shows an `Observer` the
values at the sites in every forward pass of the model, whoever runs it, and runs forward passes of its own
over right-padded sequences. It leaves the model exactly as it found it. `attach`, `measure` and
`suppress_attention` use it. What is left to others: what is done with the values (probes), and the check
that every layer was seen (`attnprobe.probe`).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attnprobe.attention.operator import Attention
from attnprobe.batch import TokenBatch
from attnprobe.errors import ParameterError, UnsupportedModelError
from attnprobe.layer_selection import LayerName, named_layers
from attnprobe.validation import ArrayLike, IntLike, whole_numbers

LAYER_SITES = ("layer_input", "attention", "value_norms", "attention_output", "mlp_output", "layer_output")
"""The sites that layers have; all but `attention` and `value_norms` are tensors `[batch, token, d_model]`."""

SITES = (*LAYER_SITES, "logits")
"""The sites that probes can observe:

- `layer_input`, `layer_output`: the residual stream as it enters and leaves a decoder layer.
- `attention`: an `Attention`.
- `value_norms`: `[batch, head, token]`, the norm of each token's value after each head's output projection,
  in the units of the residual stream. It can be read but not replaced, and is refused in a family that does
  more to the output of its attention before it is projected.
- `attention_output`, `mlp_output`: what the layer's attention module and feed-forward module return:
  after their output projection, and before the layer normalises, scales or adds it.
- `logits`: `[batch, token, vocabulary]`, of the last tokens only if the model computes no others;
  not shown if the caller picks positions by a tensor, since it is then not known which they are. A model
  that computes no next-token logits (a base model, a classifier) has no such site.
"""

Value = Attention | Tensor

Layers = LayerName | IntLike | ArrayLike | AbstractSet[int]
"""A choice of layers; `resolve_layers` understands it."""


@dataclass(frozen=True)
class GrowingCache:
    """The KV cache of a pass, to which later passes may add, and from which columns may be taken again.

    Attributes:
        drafted: how many tokens at the end of the pass may be guesses, as in assisted decoding, which are
            taken from the cache again if the model would not have written them.
        length: returns how many columns the cache holds now.
    """

    drafted: int
    length: Callable[[], int]


@runtime_checkable
class Observer(Protocol):
    """What an adapter shows the forward passes of a model."""

    def begin(self, batch: TokenBatch, cached: int, cache: GrowingCache | None = None) -> None:
        """Prepare for a forward pass over these tokens, which follow `cached` columns of cached keys.

        `cache` is where the keys of this pass will be, if they are kept.
        """

    def skip(self, site: str) -> None:
        """Expect nothing at a site in the pass that has just begun: it cannot be shown."""

    def observe(self, site: str, layer: int | None, value: Value) -> Tensor | None:
        """Look at the value at a site, and return a tensor to put in its place, or None.

        `layer` is None if the site belongs to no layer. An attention is shown after it was checked against
        the model's own output.
        """

    def end(self) -> None:
        """Use what was seen: the forward pass is complete."""

    def abort(self) -> None:
        """Forget what was seen: the forward pass has failed."""


class Adapter(ABC):
    """One model, seen through one backend.

    Attributes:
        backend: the backend's name.
        family: the model's class, for messages.
        model_name: what the model calls itself, for messages and metadata.
        layers: the layers with attention that can be read, in order.
        skipped_layers: the layers without it (Mamba, linear attention).
        refused_sites: the sites whose usual meaning this model cannot give, each with the reason.
        reads: "factored" (from query and key, without storing a map) or "dense" (the model's own maps).
        head_count: how many heads a layer has; None if that is not known, or if layers differ.
        vocabulary_size: token ids below it are valid.
        context_length: the largest number of tokens that the model takes; None if there is no limit.
        has_next_token_logits: whether the model's logits are those of the next token; a base model has none,
            and a classifier's are something else.
        media_tokens: the ids that stand for a part of an image, video or sound, each with which of them.
        device: the device on which the model's embeddings are computed.
        activation_bytes: roughly how many bytes a layer holds at once for each token; 0 if not known.
    """

    backend: str
    family: str
    model_name: str
    layers: tuple[int, ...]
    skipped_layers: tuple[int, ...]
    refused_sites: Mapping[str, str]
    reads: str
    head_count: int | None = None
    vocabulary_size: int
    context_length: int | None
    has_next_token_logits: bool = True
    media_tokens: Mapping[int, str] = MappingProxyType({})
    device: torch.device
    activation_bytes: int = 0

    @property
    def full_name(self) -> str:
        """The model's name, with its family unless that is the name."""
        return self.family if self.model_name == self.family else f"{self.model_name} ({self.family})"

    @abstractmethod
    def observed(
        self, observer: Observer, sites: Sequence[str], layers: Sequence[int]
    ) -> AbstractContextManager[None]:
        """Show the observer every forward pass of the model while the context is open."""

    def regime(self, length: int) -> Hashable:
        """Return what a sequence's length means to the model: only sequences of one regime run together.

        Some models look at the whole batch, so that a sequence's numbers would depend on its neighbours.
        """
        return None

    @abstractmethod
    def forward(
        self, batch: TokenBatch, *, logits_at: Int[Tensor, " position"] | None = None
    ) -> Float[Tensor, "batch position vocabulary"] | None:
        """Run the model over right-padded sequences, in evaluation mode and without gradients.

        A batch with further inputs is run as it is, with whatever padding it has. Returns the logits at
        `logits_at`; None without it, and then nothing is computed after the last observed layer.

        Raises:
            UnsupportedModelError: `logits_at` for a model without next-token logits.
        """

    def reduced_logits(
        self, batch: TokenBatch, logits_at: Int[Tensor, " position"], reduce: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "batch position"]:
        """Run the model as `forward` does, and return what `reduce` makes of the logits at `logits_at`.

        An adapter may compute and reduce the logits of a few positions at a time, since those of all of them
        may not fit in memory.

        Args:
            batch: the sequences.
            logits_at: the positions.
            reduce: takes logits `[batch, position, vocabulary]` of some of the positions, and returns a
                number for each.

        Raises:
            UnsupportedModelError: a model without next-token logits.
        """
        logits = self.forward(batch, logits_at=logits_at)
        assert logits is not None
        return reduce(logits)

    def logits_bytes(self, examples: int, positions: int) -> int:
        """Return roughly how many bytes the logits take that `reduced_logits` holds at once.

        Args:
            examples: the number of sequences.
            positions: the number of positions of each whose logits are wanted.
        """
        # In the model's dtype: at most four bytes each.
        return 4 * self.vocabulary_size * examples * positions

    def check_next_token_logits(self, purpose: str, otherwise: str = "") -> None:
        """Check that the model predicts the next token, which something needs.

        `otherwise` says in the error what else the caller can do.

        Raises:
            UnsupportedModelError: it does not.
        """
        if not self.has_next_token_logits:
            raise UnsupportedModelError(
                f"{purpose} needs next-token logits, which {self.full_name} does not compute: {otherwise}"
                "load the model with AutoModelForCausalLM"
            )

    def suppressed(self, suppression: Suppression, layers: Sequence[int]) -> AbstractContextManager[None]:
        """Suppress attention in every forward pass of the model while the context is open.

        Raises:
            UnsupportedModelError: this backend cannot suppress attention.
        """
        raise UnsupportedModelError(f"the {self.backend} adapter cannot suppress attention")


def resolve_layers(layers: Layers, adapter: Adapter) -> tuple[int, ...]:
    """Return layer numbers for a name of `named_layers`, a number, or several numbers in any form, ascending.

    Numbers may be an int, range, list, set, array or tensor.

    Raises:
        ParameterError: layers that the model does not have, no layers, or something else.
    """
    available = adapter.layers
    if isinstance(layers, str):
        return named_layers(layers, available)
    chosen = sorted(set(whole_numbers(layers, 'layers (unless a name such as "all" or "middle")')))
    wrong = [layer for layer in chosen if layer not in available]
    if wrong:
        without = [layer for layer in wrong if layer in adapter.skipped_layers]
        note = f"; layers {without} have no attention" if without else ""
        raise ParameterError(
            f"layers {wrong} cannot be read in {adapter.model_name}, which has attention in "
            f"layers {available[0]}..{available[-1]} ({len(available)} in all){note}"
        )
    return tuple(chosen)


@contextmanager
def evaluation_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules into evaluation mode while the context is open, and back into the mode of each.

    Pass all of a model's modules, as `model.modules()` gives them. The flags are set directly, without
    `model.eval()`, since the `train` of some wrappers does more than that (it merges weights), and since a
    part's mode may differ from the model's own (a frozen dropout), which `model.train()` would lose.

    >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with evaluation_mode(model.modules()):
    ...     [module.training for module in model.modules()]
    [False, False, False]
    >>> [module.training for module in model.modules()]
    [True, True, False]
    """
    was_training = [module for module in modules if module.training]
    try:
        for module in was_training:
            module.training = False
        yield
    finally:
        for module in was_training:
            module.training = True


def display_name(model: Any) -> str:
    """Return a model's name for messages and results: what its config was loaded from, or its class.

    For a folder this is the last part of the path, since the rest only says where the folder is.

    >>> display_name(nn.Linear(1, 1))
    'Linear'
    """
    family = type(model).__name__
    name = str(getattr(getattr(model, "config", None), "_name_or_path", None) or family)
    path = Path(name)
    if path.is_absolute() or path.is_dir() or name.startswith((".", "~")):
        # abspath, not resolve: the user named the link, which may say more than its target.
        return Path(os.path.abspath(path)).name or family
    return name


Mode = Literal["mask", "value"]
"""How attention is suppressed: "mask" removes pairs from the softmax, "value" what is read over them."""


@dataclass(frozen=True)
class Suppression:
    """Which pairs of a query and a key are suppressed, in which heads of which layers.

    Attributes:
        heads: the heads of each layer; None for all of a layer's.
        pairs: `[pair, 2]`, columns of a query and a key, in every example.
        queries, keys: `[batch or 1, column]`, True for the chosen columns; later columns than these are not
            chosen. None: all queries; no keys.
        everything: whether the heads see nothing at all.
        mode: whether pairs are removed from the softmax, or the values that are read over them.
    """

    heads: Mapping[int, tuple[int, ...] | None]
    pairs: Int[Tensor, "pair 2"] | None
    queries: Bool[Tensor, "#batch asking"] | None
    keys: Bool[Tensor, "#batch column"] | None
    everything: bool
    mode: Mode = "mask"

    def removed(
        self,
        layer: int,
        batch_size: int,
        head_count: int,
        queries: Int[Tensor, " query"],
        keys: Int[Tensor, " key"],
    ) -> Bool[Tensor, "#batch #head query key"]:
        """Return True where a query of a layer's attention call must not see a key.

        Args:
            layer: the layer's number.
            batch_size, head_count: those of the call.
            queries, keys: the columns of the sequence that the call's queries and keys stand for.

        Raises:
            ParameterError: heads or examples that the call does not have.
        """
        device = queries.device
        removed = torch.zeros(1, len(queries), len(keys), dtype=torch.bool, device=device)
        if self.everything:
            removed = ~removed
        if self.pairs is not None:
            pairs = self.pairs.to(device)
            at_query = (pairs[:, 0, None] == queries).float()
            at_key = (pairs[:, 1, None] == keys).float()
            removed = removed | (at_query.T @ at_key > 0)
        if self.keys is not None:
            chosen = _at(self.keys, keys)[:, None, :]
            asking = torch.ones(1, len(queries), dtype=torch.bool, device=device)
            if self.queries is not None:
                asking = _at(self.queries, queries)
            # A token still attends to itself: the question is what others read from it.
            removed = removed | (chosen & asking[..., None] & (queries[:, None] > keys))
        if removed.shape[0] not in (1, batch_size):
            raise ParameterError(
                f"queries and keys are given for {removed.shape[0]} examples, but the model runs {batch_size}"
            )
        heads = self.heads[layer]
        if heads is None:
            return removed[:, None]
        if max(heads) >= head_count:
            raise ParameterError(f"layer {layer} has heads 0..{head_count - 1}, got {list(heads)}")
        chosen_heads = torch.zeros(head_count, dtype=torch.bool, device=device)
        chosen_heads[list(heads)] = True
        return removed[:, None] & chosen_heads[:, None, None]


def _at(mask: Tensor, columns: Tensor) -> Bool[Tensor, "#batch column"]:
    """Return a mask at some columns; it is False beyond its end."""
    inside = columns < mask.shape[1]
    return mask.to(columns.device)[:, columns.clamp(max=mask.shape[1] - 1)] & inside

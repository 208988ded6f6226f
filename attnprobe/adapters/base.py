"""What a backend adapter offers: the sites of a model's forward pass, under one set of names.

An adapter knows one backend and no metric. It finds the layers that have attention, tells an
`Observer` what happens at the sites in any forward pass of the model, whoever calls it, and runs
forward passes of its own over right-padded rows. It leaves the model exactly as it was found. What is
left to others: what is done with the values (probes), and counting that all of them came
(`attnprobe.probe`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnprobe.attention import Attention
from attnprobe.batch import TokenBatch
from attnprobe.errors import UnsupportedModelError

if TYPE_CHECKING:
    from attnprobe.suppression import Suppression

LAYER_SITES = ("layer_input", "attention", "attention_output", "mlp_output", "layer_output")
"""The sites that every layer has; all but `attention` are tensors `[batch, token, d_model]`."""

SITES = (*LAYER_SITES, "logits")
"""The sites that probes can observe:

- `layer_input`, `layer_output`: the residual stream as it goes into a decoder layer and comes out.
- `attention`: an `Attention`.
- `attention_output`, `mlp_output`: what the layer's attention module and feed-forward module return:
  after their output projection; before a norm, a scale or the sum that the layer applies to them.
- `logits`: `[batch, token, vocabulary]`, of the last tokens only where the model computes no others;
  not shown where the caller picks positions by a tensor, since which they are is then not known.
"""

Value = Attention | Tensor


@runtime_checkable
class Observer(Protocol):
    """Who is told what happens in the forward passes of a model.

    Attributes:
        reads_distance: whether `mean_distance` will be asked for.
    """

    reads_distance: bool

    def begin(self, batch: TokenBatch, cached: int) -> None:
        """Take note that a forward pass over these tokens starts, `cached` columns of keys before them."""

    def observe(self, site: str, layer: int | None, value: Value) -> Tensor | None:
        """Look at the value at a site, and return a tensor to put in its place, or None.

        `layer` is None where the site belongs to no layer.
        """

    def end(self) -> None:
        """Take note that the forward pass has come to its end."""

    def abort(self) -> None:
        """Take note that the forward pass has failed: what was seen of it is to be forgotten."""


class Adapter(ABC):
    """One model, seen through one backend.

    Attributes:
        backend: the backend's name.
        family: the model's class, for messages.
        model_name: what the model calls itself, for messages and metadata.
        layers: the layers with attention that can be read, in order.
        skipped_layers: the layers without (Mamba, linear attention).
        refused_sites: the sites that this model cannot give with the meaning that they have
            everywhere, and why.
        reads: "factored" (query and key: no map is stored) or "dense" (the model's own maps).
        vocabulary_size: ids below it are valid.
        context_length: how many tokens the model takes, None where there is no limit.
        device: where the model's embeddings are.
        activation_bytes: about how much one layer holds at once for each token; 0 where not known.
    """

    backend: str
    family: str
    model_name: str
    layers: tuple[int, ...]
    skipped_layers: tuple[int, ...]
    refused_sites: Mapping[str, str]
    reads: str
    vocabulary_size: int
    context_length: int | None
    device: torch.device
    activation_bytes: int = 0

    @property
    def full_name(self) -> str:
        """The model's name, with its family where that says more."""
        return self.family if self.model_name == self.family else f"{self.model_name} ({self.family})"

    @abstractmethod
    def observed(
        self, observer: Observer, sites: Sequence[str], layers: Sequence[int]
    ) -> AbstractContextManager[None]:
        """Tell the observer of every forward pass of the model while the context is open."""

    @abstractmethod
    def forward(
        self, rows: TokenBatch, *, logits_at: Int[Tensor, " row"] | None = None
    ) -> Float[Tensor, "batch row vocabulary"] | None:
        """Run the model over right-padded rows, in evaluation mode and without gradients.

        Returns the logits at some positions; None where none are asked for, and then nothing is
        computed above the last layer that is observed.
        """

    def suppressed(self, suppression: Suppression, layers: Sequence[int]) -> AbstractContextManager[None]:
        """Take attention out of every forward pass of the model while the context is open.

        Raises:
            UnsupportedModelError: the backend cannot.
        """
        raise UnsupportedModelError(f"the {self.backend} adapter cannot suppress attention")

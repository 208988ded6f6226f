"""Receiver heads by sentence: the variant of Thought Anchors (arXiv 2506.19143).

`HeadStatisticsProbe` computes the token-level variant; this probe computes the sentence-level one, for which
it must know the sentences of each response. `measure(..., receiver="sentence")` attaches it. What is left to
others: splitting sentences (sentences), the definition (metrics), and ranking heads (heads).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe import metrics
from attnprobe.adapters.base import Value
from attnprobe.attention.operator import Attention
from attnprobe.batch import TokenBatch
from attnprobe.errors import ParameterError, ResultError
from attnprobe.probe import Probe
from attnprobe.validation import ArrayLike, IntLike, as_tensor, whole_number


class SentenceReceiverProbe(Probe):
    """A probe that computes sentence-level receiver kurtosis in the forward passes that it is shown.

    Args:
        sentence_ids: `[batch, token]`, the sentence of each token in the next pass, numbered from 0 in each
            response, -1 outside. Set the attribute again for another batch.
        min_distance: pairs of sentences closer than this are left out.

    Raises:
        ParameterError: ids that are not numbers, or a distance below 1.
    """

    def __init__(self, sentence_ids: ArrayLike, *, min_distance: IntLike = 4) -> None:
        self.sentence_ids = as_tensor(sentence_ids, "sentence_ids")
        self.min_distance = whole_number(min_distance, "min_distance", minimum=1)
        self._layers: dict[int, Tensor] = {}
        self._finished: list[Tensor] = []

    def begin(self, batch: TokenBatch) -> None:
        """Check that `sentence_ids` has the shape of this batch."""
        self.abort()
        self.sentence_ids = as_tensor(self.sentence_ids, "sentence_ids")
        if self.sentence_ids.shape != batch.input_ids.shape:
            raise ParameterError(
                f"sentence_ids are {list(self.sentence_ids.shape)}, but the model was given tokens "
                f"{list(batch.input_ids.shape)}"
            )

    def observe(self, site: str, layer: int | None, value: Value, batch: TokenBatch) -> None:
        """Reduce one layer's attention."""
        assert isinstance(value, Attention)
        assert layer is not None
        self._layers[layer] = metrics.sentence_receiver_kurtosis(value, self.sentence_ids, self.min_distance)

    def end(self, batch: TokenBatch) -> None:
        """Keep the result of a complete pass."""
        # Layers may lie on different devices.
        layers = [self._layers[layer].to(batch.input_ids.device) for layer in sorted(self._layers)]
        heads = max(layer.shape[1] for layer in layers)
        # Layers may differ in their number of heads: NaN marks the heads that a layer does not have.
        padded = [
            torch.nn.functional.pad(layer, (0, heads - layer.shape[1]), value=torch.nan) for layer in layers
        ]
        self._finished.append(torch.stack(padded, dim=1))
        self.abort()

    def abort(self) -> None:
        """Forget the pass that is under way."""
        self._layers = {}

    def result(self) -> Float[Tensor, "batch layer head"]:
        """Return the kurtosis of each response and head, from all complete passes.

        Raises:
            ResultError: no complete pass was observed.
        """
        if not self._finished:
            raise ResultError("there is no receiver kurtosis yet: no complete forward pass was observed")
        return torch.cat(self._finished)

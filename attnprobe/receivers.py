"""Receiver heads by sentence: the variant of Thought Anchors (arXiv 2506.19143).

`HeadStatisticsProbe` computes the token-level variant; this probe computes the sentence-level one, for which
it must know the sentences of each response. `measure(..., receiver=SentenceReceivers(...))` attaches it. What
is left to others: splitting sentences (sentences), the definition (metrics), and ranking heads (heads).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe import metrics
from attnprobe.adapters.base import Value
from attnprobe.attention.operator import Attention
from attnprobe.batch import TokenBatch
from attnprobe.errors import ParameterError, ResultError
from attnprobe.probe import Probe
from attnprobe.reductions import Selectivity
from attnprobe.sentences import SentenceReceivers
from attnprobe.validation import ArrayLike, IntLike, as_tensor


class SentenceReceiverProbe(Probe):
    """A probe that computes sentence-level receiver kurtosis, and its Gini coefficient, in forward passes.

    Args:
        sentence_ids: `[batch, token]`, the sentence of each token in the next pass, numbered from 0 in each
            response, -1 outside. Set the attribute again for another batch.
        min_distance: pairs of sentences closer than this are left out.
        minimum_sentences: responses with fewer have no result; default: `min_distance + 4`.

    Raises:
        ParameterError: ids that are not numbers, or a distance or number below 1.
    """

    def __init__(
        self,
        sentence_ids: ArrayLike,
        *,
        min_distance: IntLike = 4,
        minimum_sentences: IntLike | None = None,
    ) -> None:
        self.sentence_ids = as_tensor(sentence_ids, "sentence_ids")
        # Which checks them; the splitting is the caller's.
        options: dict[str, Any] = {"min_distance": min_distance, "minimum_sentences": minimum_sentences}
        self._options = SentenceReceivers(**options)
        self._layers: dict[int, Selectivity] = {}
        self._finished: list[Selectivity] = []

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
        self._layers[layer] = metrics.sentence_selectivity(
            value, self.sentence_ids, self._options.min_distance, self._options.minimum_sentences
        )

    def end(self, batch: TokenBatch) -> None:
        """Keep the result of a complete pass."""
        layers = [self._layers[layer] for layer in sorted(self._layers)]
        heads = max(layer.kurtosis.shape[1] for layer in layers)

        def stacked(values: list[Tensor]) -> Tensor:
            # Layers may lie on different devices, and differ in their number of heads: NaN marks the heads
            # that a layer does not have.
            padded = [
                torch.nn.functional.pad(each, (0, heads - each.shape[1]), value=torch.nan) for each in values
            ]
            return torch.stack([each.to(batch.input_ids.device) for each in padded], dim=1)

        self._finished.append(
            Selectivity(
                stacked([layer.kurtosis for layer in layers]), stacked([layer.gini for layer in layers])
            )
        )
        self.abort()

    def abort(self) -> None:
        """Forget the pass that is under way."""
        self._layers = {}

    def result(self) -> Float[Tensor, "batch layer head"]:
        """Return the kurtosis of each response and head, from all complete passes.

        Raises:
            ResultError: no complete pass was observed.
        """
        return self.selectivity().kurtosis

    def selectivity(self) -> Selectivity:
        """Return kurtosis and Gini coefficient, each `[batch, layer, head]`, from all complete passes.

        Raises:
            ResultError: no complete pass was observed.
        """
        if not self._finished:
            raise ResultError("there is no receiver kurtosis yet: no complete forward pass was observed")
        return Selectivity(
            torch.cat([each.kurtosis for each in self._finished]),
            torch.cat([each.gini for each in self._finished]),
        )

"""A batch of sequences that grows pass by pass, as a KV cache lets it: sums, masks, ids and entropy so far.

`HeadStatisticsProbe` keeps one, extends it with every complete pass, and takes back from it what is no longer
in the cache. What is left to others: what a pass adds to a layer's sums (sequence_sums), which tokens lie in
which segments (segment_marks), and the statistics that are made of them (statistics_probe).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnprobe.adapters.base import GrowingCache
from attnprobe.batch import TokenBatch
from attnprobe.errors import PatternError, ResultError
from attnprobe.segment_marks import SegmentMarks
from attnprobe.sequence_sums import LayerSums


@dataclass(frozen=True)
class GrowingSequence:
    """The passes of one batch of sequences so far."""

    layers: dict[int, LayerSums] = dataclasses.field(default_factory=dict)
    response_mask: Bool[Tensor, "batch token"] | None = None
    segment_ids: Int[Tensor, "batch token"] | None = None
    input_ids: Int[Tensor, "batch token"] | None = None
    entropy: Float[Tensor, "batch token"] | None = None
    last_entropy: Float[Tensor, "batch last"] | None = None
    """That of the distributions at the last tokens, of which the last is the next token's."""
    marks: SegmentMarks | None = None
    cache: GrowingCache | None = None
    """Where the last tokens may be taken back; None if they may not."""

    def settled(self) -> GrowingSequence:
        """Return the sequence without those of its last tokens that are no longer in the cache."""
        if self.cache is None or self.response_mask is None:
            return self
        count = self.response_mask.shape[1] - self.cache.length()
        # Anything else is a cache that was emptied to be used again, or that others have added to.
        if not 0 < count <= self.cache.drafted:
            return self
        remembered = min(sums.remembered for sums in self.layers.values())
        if count > remembered:
            raise PatternError(
                f"{count} tokens were taken from the KV cache again, but what they added is remembered for "
                f"the last {remembered} only: let assisted decoding make fewer guesses at a time, or measure "
                "the finished sequence"
            )
        ids, segments, entropy, last = self.input_ids, self.segment_ids, self.entropy, self.last_entropy
        return GrowingSequence(
            {layer: sums.without_last(count) for layer, sums in self.layers.items()},
            self.response_mask[:, :-count],
            None if segments is None else segments[:, :-count],
            None if ids is None else ids[:, :-count],
            None if entropy is None else entropy[:, :-count],
            None if last is None or last.shape[1] <= count else last[:, :-count],
            None if self.marks is None else self.marks.without_last(count),
            dataclasses.replace(self.cache, drafted=self.cache.drafted - count),
        )

    def extended(
        self,
        layers: dict[int, LayerSums],
        batch: TokenBatch,
        distribution_entropy: Tensor | None,
        cache: GrowingCache | None,
        marks: SegmentMarks | None,
    ) -> GrowingSequence:
        """Return the sequence with one more complete pass.

        `distribution_entropy` is `[batch, token]`, for at least the last token of the pass.
        """
        cache = None if cache is None or cache.drafted == 0 else cache
        mask, segments, ids = batch.response_mask, batch.segment_ids, batch.input_ids
        if self.response_mask is not None:
            if segments is not None or self.segment_ids is not None:
                raise ResultError(
                    "packed examples cannot be continued: run each sequence as an example of its own"
                )
            mask = torch.cat([self.response_mask, mask], dim=-1)
        if self.input_ids is not None:
            ids = torch.cat([self.input_ids, ids], dim=-1)
        entropy, last = None, None
        if distribution_entropy is not None:
            examples, count = batch.input_ids.shape
            # The distribution at position t is the one that token t + 1 was sampled from.
            entropy = distribution_entropy.new_full((examples, count), torch.nan)
            if self.last_entropy is not None:
                entropy[:, 0] = self.last_entropy[:, -1]
            known = min(distribution_entropy.shape[1], count)
            entropy[:, count - known + 1 :] = distribution_entropy[:, -known:-1]
            last = distribution_entropy[:, -1 - (0 if cache is None else cache.drafted) :]
            entropy = entropy.masked_fill(~self._has_token_before(batch), torch.nan)
            if self.entropy is not None:
                entropy = torch.cat([self.entropy, entropy], dim=-1)
            entropy = entropy.masked_fill(~mask, torch.nan)
        return GrowingSequence(layers, mask, segments, ids, entropy, last, marks, cache)

    def _has_token_before(self, batch: TokenBatch) -> Bool[Tensor, "batch token"]:
        """Return which tokens follow another of their sequence; a first token was not sampled."""
        real, segments = batch.attention_mask, batch.segment_ids
        follows = real[:, :-1]
        if segments is not None:
            follows = follows & (segments[:, 1:] == segments[:, :-1])
        return torch.nn.functional.pad(follows, (1, 0), value=self.last_entropy is not None)

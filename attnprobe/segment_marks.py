"""Which segments statistics are asked about, and which columns of growing sequences these are.

`AskedSegments` holds the names that a user gave. In each forward pass, `HeadStatisticsProbe` turns them into
`SegmentMarks`, masks over all columns of the sequence so far, which grow with a KV cache. What is left to
others: what a segment can be (segments), the sums over marked keys (reductions) and over passes
(sequence_sums).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from attnprobe.batch import TokenBatch
from attnprobe.errors import ParameterError
from attnprobe.reductions import MarkedKeys
from attnprobe.segments import NamesLike, check_known, first_tokens, segment_names


@dataclass(frozen=True)
class AskedSegments:
    """The segments that shares, the second span and FAI are asked about; see `HeadStatisticsProbe`."""

    share_on: tuple[str, ...]
    share_from: tuple[str, ...]
    span_ignores: tuple[str, ...]
    influence_rows: str

    @staticmethod
    def of(
        share_on: NamesLike | None,
        share_from: NamesLike,
        span_ignores: NamesLike | None,
        influence_rows: str,
        *,
        span: bool,
    ) -> AskedSegments:
        """Return what was asked for, with the defaults filled in.

        Raises:
            ParameterError: names that are none, or a second span without the first.
        """
        usual = ("first",) if span else ()
        on = usual if share_on is None else segment_names(share_on, "share_on")
        ignored = usual if span_ignores is None else segment_names(span_ignores, "span_ignores")
        if ignored and not span:
            raise ParameterError("span_ignores needs span=True: it is a second span")
        sources = segment_names(share_from, "share_from")
        if not sources and on:
            raise ParameterError("share_from must name a segment whose rows give the shares")
        (rows,) = segment_names((influence_rows,), "influence_rows")
        return AskedSegments(on, sources if on else (), ignored, rows)

    @property
    def _by_argument(self) -> dict[str, tuple[str, ...]]:
        return {
            "share_on": self.share_on,
            "share_from": self.share_from,
            "span_ignores": self.span_ignores,
            "influence_rows": (self.influence_rows,),
        }

    def check_known(self, own: tuple[str, ...], hint: str) -> None:
        """Check that all segments are built in or among a batch's own.

        Raises:
            ParameterError: one is not.
        """
        for argument, names in self._by_argument.items():
            check_known(names, own, argument, hint)

    def marks(
        self, batch: TokenBatch, before: SegmentMarks | None, *, right_padded: bool = False
    ) -> SegmentMarks:
        """Return the marks of a pass, behind those of the passes that it continues.

        `right_padded` says that every example is one sequence that begins in column 0, if the caller knows.
        """
        if before is not None and len(before.real) != batch.batch_size:
            before = None  # Examples were repeated or left out, which `add_rows` will refuse.
        names = tuple(dict.fromkeys(name for part in self._by_argument.values() for name in part))
        first = first_tokens(batch.attention_mask, batch.segment_ids)
        if before is not None:
            first = first & ~before.real.any(-1, keepdim=True)
        masks = torch.stack([first if name == "first" else batch.segment(name) for name in names], dim=1)
        real = batch.attention_mask
        if before is not None:
            masks, real = torch.cat([before.masks, masks], dim=-1), torch.cat([before.real, real], dim=-1)
        return SegmentMarks(self, names, masks, real, right_padded and before is None)


@dataclass(frozen=True)
class SegmentMarks:
    """The columns of each segment that is asked about, in sequences that may grow.

    Attributes:
        asked: the segments.
        names: their names, each once.
        masks: their columns.
        real: the columns that are no padding.
        right_padded: whether it is known that every example is one sequence that begins in column 0.
    """

    asked: AskedSegments
    names: tuple[str, ...]
    masks: Bool[Tensor, "batch name column"]
    real: Bool[Tensor, "batch column"]
    right_padded: bool = False

    def rows(self, name: str) -> Bool[Tensor, "batch column"]:
        """Return the columns of a segment."""
        return self.masks[:, self.names.index(name)]

    def influence_rows(self, count: int) -> Bool[Tensor, "batch pass_token"] | None:
        """Return which of the last rows count in FAI; None for those of the response."""
        name = self.asked.influence_rows
        return None if name == "response" else self.rows(name)[:, -count:]

    @cached_property
    def keys(self) -> MarkedKeys:
        """The keys that rows are asked about, the same for all layers of a pass."""
        on, ignores = self.asked.share_on, self.asked.span_ignores
        shares = torch.stack([self.rows(name) for name in on], dim=1) if on else None
        ignored = torch.stack([self.rows(name) for name in ignores]).any(0) if ignores else None
        if self.right_padded and {*on, *ignores} <= {"first"}:
            return MarkedKeys(shares, (True,) * len(on), ignored, bool(ignores), (True,) * len(on))
        if shares is None and ignored is None:
            return MarkedKeys()
        # One transfer for all that the processor has to know, before the first layer's work is done.
        flags = []
        for marked in (shares, None if ignored is None else ignored[:, None]):
            if marked is not None:
                count = marked.sum(-1)
                flags += [(count <= 1).all(0), (marked[..., 0] & (count == 1)).all(0)]
        known = torch.cat(flags).tolist()
        single, at_0 = tuple(known[: len(on)]), tuple(known[len(on) : 2 * len(on)])
        return MarkedKeys(shares, single, ignored, ignored is not None and known[-1], at_0)

    def without_last(self, count: int) -> SegmentMarks:
        """Return the marks without the last columns."""
        return replace(self, masks=self.masks[..., :-count], real=self.real[:, :-count], right_padded=False)

    def to(self, device: Any) -> SegmentMarks:
        """Return the marks on a device."""
        return replace(self, masks=self.masks.to(device), real=self.real.to(device))

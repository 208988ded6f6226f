"""The preplan-and-anchor rhythm: peaks of token scores, and how they belong together.

A peak of WAAD is a preplan token, the onset of a chunk; a peak of FAI is an anchor token, which later
text keeps reading (Sec. 4.2 of arXiv 2510.13554v2). What the paper leaves open is a documented parameter
here. Users, `rl` and the report call `find_rhythm` or the functions below it. What is left to others: scores
(scores), pictures (report), and weights for training (rl).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnprobe.batch import TokenBatch
from attnprobe.displays import rhythm_display
from attnprobe.errors import ParameterError
from attnprobe.layout import check_unpacked
from attnprobe.provenance import Provenance
from attnprobe.results import Result, html_table, table_column
from attnprobe.scores import TokenScores, known_tokens
from attnprobe.validation import (
    ArrayLike,
    FloatLike,
    IntLike,
    as_mask,
    as_tensor,
    brief,
    instance,
    real_number,
    whole_number,
)


@dataclass(frozen=True, eq=False, repr=False)
class Rhythm(Result):
    """The rhythm of each response, as masks over its tokens.

    Attributes:
        preplan: peaks of WAAD.
        anchor: peaks of FAI.
        anchor_preplan: for each anchor, the column of the preplan that it follows or coincides with;
            -1 if there is none within `lookback` tokens, and on all other tokens.
        dominated: anchors inside a chunk that a preplan opened just before (Sec. 5.2).
        intro: the tokens that opened the chunks of the dominated anchors.
        delta: the change of WAAD to the next token, `|WAAD[t] - WAAD[t + 1]|`; NaN where undefined.
        quantile, lookback: the parameters.
        response_mask: the tokens in which peaks were sought; None where they are not known.
        input_ids, texts: the tokens, as in the batch; None where they are not known.
        provenance: the model, layers, window, horizon and heads that the scores were computed from.

    Raises:
        ResultError: tensors of other dtypes or shapes than these.
    """

    preplan: Bool[Tensor, "batch token"]
    anchor: Bool[Tensor, "batch token"]
    anchor_preplan: Int[Tensor, "batch token"]
    dominated: Bool[Tensor, "batch token"]
    intro: Bool[Tensor, "batch token"]
    delta: Float[Tensor, "batch token"]
    quantile: float = 0.4
    lookback: int = 3
    response_mask: Bool[Tensor, "batch token"] | None = None
    input_ids: Int[Tensor, "batch token"] | None = None
    texts: tuple[tuple[str, ...], ...] | None = None
    provenance: Provenance = Provenance()  # noqa: RUF009 (frozen)

    _FILL: ClassVar[dict[str, Any]] = {"input_ids": 0}

    def pairs(self, example: IntLike = 0) -> list[tuple[int, int]]:
        """Return the columns of the preplans and anchors of one response that belong together, in order.

        Raises:
            ParameterError: an example that does not exist.
        """
        count = self.anchor.shape[0]
        example = whole_number(example, "example", minimum=-count, maximum=count - 1)
        anchors = (self.anchor_preplan[example] >= 0).nonzero()[:, 0].tolist()
        return [(int(self.anchor_preplan[example, anchor]), anchor) for anchor in anchors]

    def _used(self) -> Tensor:
        return torch.ones_like(self.anchor) if self.response_mask is None else self.response_mask

    def at_columns(self, columns: Any) -> Rhythm:
        """Return the rhythm of some columns only; `anchor_preplan` is -1 if the preplan lies outside."""
        part = super().at_columns(columns)
        first = columns.indices(self.anchor.shape[1])[0]
        inside = (part.anchor_preplan >= first) & (part.anchor_preplan < first + part.anchor.shape[1])
        return replace(part, anchor_preplan=torch.where(inside, part.anchor_preplan - first, -1))

    def _table(self, batch: TokenBatch | None = None) -> dict[str, Any]:
        """Return a line for each token that a mask marks; a batch adds ids and texts.

        Raises:
            ResultError: a batch of another shape, or of other tokens.
        """
        names = ("preplan", "anchor", "dominated", "intro")
        place = torch.stack([getattr(self, name) for name in names]).any(0).nonzero()
        columns = known_tokens(place, self, batch, "the parts of the rhythm")
        for name in (*names, "anchor_preplan"):
            columns[name] = table_column(getattr(self, name), place)
        return columns

    def _repr_html_(self) -> str:
        """Return what a notebook shows: how many preplans and anchors there are, and where they stand."""
        head = ("example", "preplans", "anchors", "dominated", "pairs")
        rows = [
            (
                i,
                *(int(getattr(self, n)[i].sum()) for n in ("preplan", "anchor", "dominated")),
                len(self.pairs(i)),
            )
            for i in range(min(len(self.anchor), _MOST_SHOWN))
        ]
        return rhythm_display(self, html_table(f"Rhythm({self._headline()})", head, rows))


_MOST_SHOWN = 20


def find_rhythm(scores: TokenScores, *, quantile: FloatLike = 0.4, lookback: IntLike = 3) -> Rhythm:
    """Find preplans, anchors, and which anchor follows which preplan.

    In a response with gaps (two turns with a tool's output in between) a chunk ends at the gap: no peak lies
    next to it, and no anchor follows a preplan across it.

    Args:
        scores: WAAD and FAI of each token.
        quantile: peaks must be among this share of the defined scores.
        lookback: within how many tokens an anchor "immediately follows" a preplan (the paper's k).

    Raises:
        ParameterError: a quantile outside (0, 1], a lookback below 1, packed examples, or something that is
            not `TokenScores`.

    >>> waad = torch.tensor([[1.0, 4.0, 1.0, 1.0, 1.0]])
    >>> fai = torch.tensor([[0.1, 0.1, 0.6, 0.1, 0.1]])
    >>> scores = TokenScores(waad, fai, None, torch.ones(1, 5, dtype=torch.bool))
    >>> find_rhythm(scores).pairs()
    [(1, 2)]
    """
    instance(scores, TokenScores, "scores", "score_tokens returns them")
    check_unpacked(scores.segment_ids, "find peaks")
    quantile, lookback = check_quantile(quantile), check_lookback(lookback)
    mask = scores.response_mask.to(scores.waad.device)
    waad, fai = scores.waad.masked_fill(~mask, torch.nan), scores.fai.masked_fill(~mask, torch.nan)
    preplan, anchor = find_peaks(waad, quantile=quantile), find_peaks(fai, quantile=quantile)
    dominated, intro = dominated_anchors(anchor, waad, lookback=lookback)
    return Rhythm(
        preplan=preplan,
        anchor=anchor,
        anchor_preplan=_latest_within(preplan, anchor, mask, lookback),
        dominated=dominated,
        intro=intro,
        delta=waad_change(waad),
        quantile=quantile,
        lookback=lookback,
        response_mask=scores.response_mask,
        input_ids=scores.input_ids,
        texts=scores.texts,
        provenance=scores.provenance,
    )


def top_quantile(values: ArrayLike, quantile: FloatLike = 0.4) -> Bool[Tensor, "batch token"]:
    """Mark the `ceil(quantile * n)` largest of each example's n defined values; ties: the earliest.

    Raises:
        ParameterError: a quantile outside (0, 1].

    >>> top_quantile(torch.tensor([[1.0, 3.0, 3.0, torch.nan, 2.0]]), 0.5).int()
    tensor([[0, 1, 1, 0, 0]], dtype=torch.int32)
    """
    quantile = check_quantile(quantile)
    values = check_values(values)
    defined = ~values.isnan()
    order = values.nan_to_num(nan=-torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(values.shape[-1], device=values.device).expand_as(order))
    return defined & (rank < _quantile_counts(values, quantile)[:, None])


def find_peaks(values: ArrayLike, *, quantile: FloatLike = 0.4) -> Bool[Tensor, "batch token"]:
    """Mark the peaks of each example: strict local maxima among the top quantile of defined values.

    A plateau that is higher than both its neighbours is one peak, at its first position. The first and
    the last defined value have only one neighbour and are never a peak, so monotone and constant values
    have none.

    Raises:
        ParameterError: a quantile outside (0, 1].

    >>> find_peaks(torch.tensor([[0.0, 2.0, 2.0, 1.0, 3.0]]), quantile=1.0).int()
    tensor([[0, 1, 0, 0, 0]], dtype=torch.int32)
    """
    quantile = check_quantile(quantile)
    values = check_values(values)
    batch, count = values.shape
    peaks = torch.zeros(batch, count, dtype=torch.bool, device=values.device)
    if count < 3:
        return peaks
    # The value after the plateau that a token lies on: that after the next change; NaN if there is none.
    place = torch.arange(count - 1, device=values.device)
    changes = torch.where(values[:, 1:] != values[:, :-1], place, count - 1)
    following = changes.flip(-1).cummin(-1).values.flip(-1) + 1
    after = torch.nn.functional.pad(values, (0, 1), value=torch.nan).gather(-1, following)
    after = torch.nn.functional.pad(after, (0, 1), value=torch.nan)
    rises = values[:, 1:] > values[:, :-1]
    falls = values > after
    peaks[:, 1:] = rises & falls[:, 1:]
    ordered = values.nan_to_num(nan=-torch.inf).sort(dim=-1, descending=True).values
    last = (_quantile_counts(values, quantile) - 1).clamp(min=0)
    threshold = ordered.gather(-1, last[:, None])
    return peaks & (values >= threshold)


def waad_change(waad: ArrayLike) -> Float[Tensor, "batch token"]:
    """Return `|WAAD[t] - WAAD[t + 1]|` (Eq. 14 of arXiv 2510.13554v2); NaN for the last token.

    >>> waad_change(torch.tensor([[1.0, 3.0, 2.5]]))
    tensor([[2.0000, 0.5000,    nan]])
    """
    waad = check_values(waad)
    delta = torch.full_like(waad, torch.nan)
    delta[:, :-1] = (waad[:, :-1] - waad[:, 1:]).abs()
    return delta


def dominated_anchors(
    anchor: ArrayLike,
    waad: ArrayLike,
    *,
    lookback: IntLike = 3,
    waad_threshold: FloatLike | None = None,
    delta_threshold: FloatLike | None = None,
) -> tuple[Bool[Tensor, "batch token"], Bool[Tensor, "batch token"]]:
    """Mark the anchors that a chunk's opening dominates, and the tokens that opened the chunks.

    Sec. 5.2 of arXiv 2510.13554v2: an anchor t is dominated if `WAAD[t] <= waad_threshold` and the
    largest change of WAAD in `t - lookback .. t - 1` is at least `delta_threshold`; the token where WAAD
    changes most opened its chunk (ties: the latest). Thresholds default to the response's own medians of
    WAAD and of its change, over the tokens where each is defined. An anchor with no response token before
    it is not dominated, and tokens before a gap (an undefined WAAD) are not considered.

    Returns the masks `(dominated, intro)`.

    Raises:
        ParameterError: a lookback below 1, or shapes that differ.

    >>> anchor = torch.tensor([[False, False, True, False]])
    >>> dominated, intro = dominated_anchors(anchor, torch.tensor([[1.0, 5.0, 1.0, 1.0]]))
    >>> dominated.nonzero().tolist(), intro.nonzero().tolist()
    ([[0, 2]], [[0, 1]])
    """
    waad = check_values(waad)
    anchor = as_mask(anchor, "anchor", tuple(waad.shape), device=waad.device)
    lookback = min(check_lookback(lookback), max(1, waad.shape[1]))
    delta = waad_change(waad)
    low = _threshold(waad, waad_threshold)
    high = _threshold(delta, delta_threshold)
    # before[..., i] is the change at t - 1 - i, so that the first maximum is the latest position.
    padded = torch.nn.functional.pad(delta, (lookback, 0), value=torch.nan)
    before = padded.unfold(-1, lookback, 1)[:, : waad.shape[1]].flip(-1)
    # An undefined change marks a gap, which ends a chunk: what lies before it belongs to another chunk.
    before = before.masked_fill(before.isnan().cumsum(-1) > 0, torch.nan)
    largest, place = before.nan_to_num(nan=-torch.inf).max(-1)
    dominated = anchor & (waad <= low) & (largest >= high) & (largest > -torch.inf)
    intro = torch.zeros_like(anchor)
    example, token = dominated.nonzero(as_tuple=True)
    intro[example, token - 1 - place[example, token]] = True
    return dominated, intro


def _threshold(values: Float[Tensor, "batch token"], given: FloatLike | None) -> Tensor:
    if given is not None:
        return values.new_full((values.shape[0], 1), real_number(given, "a threshold"))
    # Half precision has no median.
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return wide.nanquantile(0.5, dim=-1, keepdim=True)


def near_preplans(
    preplan: Bool[Tensor, "batch token"], response_mask: Bool[Tensor, "batch token"], lookback: int
) -> Bool[Tensor, "batch token"]:
    """Mark the tokens that coincide with a preplan or follow one within `lookback` tokens and no gap."""
    return _latest_preplan(preplan, response_mask, lookback) >= 0


def _latest_within(
    preplan: Bool[Tensor, "batch token"],
    anchor: Bool[Tensor, "batch token"],
    response_mask: Bool[Tensor, "batch token"],
    lookback: int,
) -> Int[Tensor, "batch token"]:
    """Return for each anchor the column of the latest preplan in `t - lookback .. t`, else -1."""
    return _latest_preplan(preplan, response_mask, lookback).masked_fill(~anchor, -1)


def _latest_preplan(
    preplan: Bool[Tensor, "batch token"], response_mask: Bool[Tensor, "batch token"], lookback: int
) -> Int[Tensor, "batch token"]:
    """Return for each token the column of the latest preplan in `t - lookback .. t`; -1 across a gap."""
    lookback = min(lookback, preplan.shape[1])
    column = torch.arange(preplan.shape[1], device=preplan.device).expand_as(preplan)
    latest = column.masked_fill(~preplan, -1).cummax(-1).values
    gap = column.masked_fill(response_mask.to(preplan.device), -1).cummax(-1).values
    near = (latest > gap) & (column - latest <= lookback)
    return latest.masked_fill(~near, -1)


def _quantile_counts(values: Float[Tensor, "batch token"], quantile: float) -> Int[Tensor, " batch"]:
    """Return `ceil(quantile * n)` for each example, where n is the number of its defined values."""
    # 0.1 * 30 is slightly more than 3 in binary: it must not become 4.
    counts = [max(math.ceil(quantile * n - 1e-9), min(n, 1)) for n in (~values.isnan()).sum(-1).tolist()]
    return torch.tensor(counts, device=values.device)


def check_quantile(quantile: FloatLike) -> float:
    """Return a share of tokens, in (0, 1], or raise `ParameterError`."""
    return real_number(quantile, "quantile", above=0, maximum=1)


def check_lookback(lookback: IntLike, minimum: int = 1) -> int:
    """Return a number of tokens to look back, or raise `ParameterError`."""
    return whole_number(lookback, "lookback", minimum=minimum)


def check_values(values: ArrayLike) -> Float[Tensor, "batch token"]:
    """Return token values `[batch, token]`, or raise `ParameterError`."""
    values = as_tensor(values, "values")
    if values.ndim != 2 or not values.is_floating_point():
        raise ParameterError(f"values must be floating point [batch, token]; got {brief(values)}")
    return values

"""The preplan-and-anchor rhythm: peaks of token scores, and how they belong together.

A peak of WAAD is a preplan token, the onset of a chunk; a peak of FAI is an anchor token, which later
text keeps reading (Sec. 4.2 of arXiv 2510.13554). What the paper leaves open is a documented parameter
here. What is left to others: scores (scores), pictures (report), and weights for training (rl).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnprobe.errors import ParameterError
from attnprobe.scores import TokenScores
from attnprobe.storage import import_pandas, load_result, save_result

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Rhythm:
    """The rhythm of each response, as masks over its tokens.

    Attributes:
        preplan: peaks of WAAD.
        anchor: peaks of FAI.
        anchor_preplan: for each anchor, the column of the preplan that it follows or coincides with;
            -1 where there is none within `lookback` tokens, and on tokens that are no anchor.
        dominated: anchors inside a chunk that a preplan opened just before (Sec. 5.2).
        intro: the tokens that opened the chunks of the dominated anchors.
        delta: the change of WAAD to the next token, `|WAAD[t] - WAAD[t + 1]|`; NaN where undefined.
        quantile, lookback: the parameters.
    """

    preplan: Bool[Tensor, "batch token"]
    anchor: Bool[Tensor, "batch token"]
    anchor_preplan: Int[Tensor, "batch token"]
    dominated: Bool[Tensor, "batch token"]
    intro: Bool[Tensor, "batch token"]
    delta: Float[Tensor, "batch token"]
    quantile: float = 0.4
    lookback: int = 3

    def save(self, path: str | Path) -> Path:
        """Save as one safetensors file with JSON metadata, and return its path.

        Raises:
            ResultError: a place that cannot be written.
        """
        tensors = {name: getattr(self, name) for name in _TENSORS}
        metadata = {"quantile": self.quantile, "lookback": self.lookback}
        return save_result(path, "Rhythm", tensors, metadata)

    @staticmethod
    def load(path: str | Path) -> Rhythm:
        """Load what `save` wrote.

        Raises:
            ResultError: a file that is missing, damaged, or holds something else.
        """
        tensors, metadata = load_result(path, "Rhythm", (*_TENSORS, "quantile", "lookback"))
        return Rhythm(
            **{name: tensors[name] for name in _TENSORS},
            quantile=metadata["quantile"],
            lookback=metadata["lookback"],
        )

    def pairs(self, example: int = 0) -> list[tuple[int, int]]:
        """Return the (preplan, anchor) columns of one response that belong together, in order."""
        anchors = (self.anchor_preplan[example] >= 0).nonzero()[:, 0].tolist()
        return [(int(self.anchor_preplan[example, anchor]), anchor) for anchor in anchors]

    def to_pandas(self) -> pandas.DataFrame:
        """Return a table with a row for each token that has a part in the rhythm.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        frame = import_pandas()
        masks = {name: getattr(self, name) for name in ("preplan", "anchor", "dominated", "intro")}
        place = torch.stack(list(masks.values())).any(0).nonzero()
        row, token = place[:, 0], place[:, 1]
        columns: dict[str, object] = {"response": row.cpu().numpy(), "token": token.cpu().numpy()}
        columns |= {name: mask[row, token].cpu().numpy() for name, mask in masks.items()}
        columns["anchor_preplan"] = self.anchor_preplan[row, token].cpu().numpy()
        table: pandas.DataFrame = frame.DataFrame(columns)
        return table


_TENSORS = ("preplan", "anchor", "anchor_preplan", "dominated", "intro", "delta")


def find_rhythm(scores: TokenScores, *, quantile: float = 0.4, lookback: int = 3) -> Rhythm:
    """Find preplans, anchors, and which belongs to which.

    Args:
        scores: WAAD and FAI of each token.
        quantile: peaks must be among this share of the defined scores.
        lookback: within how many tokens an anchor "immediately follows" a preplan (the paper's k).

    Raises:
        ParameterError: a quantile outside (0, 1], a lookback below 1, or packed rows.
    """
    if scores.segment_ids is not None:
        raise ParameterError(
            "these scores are of packed rows, where the tokens of one response would be ranked among "
            "those of another: measure rows of one sequence each, such as batch.unpadded_rows()[0]"
        )
    preplan = find_peaks(scores.waad, quantile=quantile)
    anchor = find_peaks(scores.fai, quantile=quantile)
    dominated, intro = dominated_anchors(anchor, scores.waad, lookback=lookback)
    return Rhythm(
        preplan=preplan,
        anchor=anchor,
        anchor_preplan=_latest_within(preplan, anchor, lookback),
        dominated=dominated,
        intro=intro,
        delta=waad_change(scores.waad),
        quantile=quantile,
        lookback=lookback,
    )


def top_quantile(values: Float[Tensor, "batch token"], quantile: float = 0.4) -> Bool[Tensor, "batch token"]:
    """Mark the `ceil(quantile * n)` largest of the n defined values of each row; ties: the earliest.

    Raises:
        ParameterError: a quantile outside (0, 1].

    >>> top_quantile(torch.tensor([[1.0, 3.0, 3.0, torch.nan, 2.0]]), 0.5).int()
    tensor([[0, 1, 1, 0, 0]], dtype=torch.int32)
    """
    _check_quantile(quantile)
    defined = ~values.isnan()
    order = values.nan_to_num(nan=-torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(values.shape[-1], device=values.device).expand_as(order))
    return defined & (rank < _quantile_counts(values, quantile)[:, None])


def find_peaks(values: Float[Tensor, "batch token"], *, quantile: float = 0.4) -> Bool[Tensor, "batch token"]:
    """Mark the peaks of each row: strict local maxima among the top quantile of defined values.

    A plateau that is higher than both its neighbours is one peak, at its first position. The first and
    the last defined value have one neighbour only and are never a peak, so monotone and constant rows
    have none.

    Raises:
        ParameterError: a quantile outside (0, 1].

    >>> find_peaks(torch.tensor([[0.0, 2.0, 2.0, 1.0, 3.0]]), quantile=1.0).int()
    tensor([[0, 1, 0, 0, 0]], dtype=torch.int32)
    """
    _check_quantile(quantile)
    batch, count = values.shape
    peaks = torch.zeros(batch, count, dtype=torch.bool, device=values.device)
    if count < 3:
        return peaks
    # The value that comes after the plateau that a token stands in, going from the right.
    after = torch.full_like(values, torch.nan)
    for t in range(count - 2, -1, -1):
        following = values[:, t + 1]
        after[:, t] = torch.where(following == values[:, t], after[:, t + 1], following)
    rises = values[:, 1:] > values[:, :-1]
    falls = values > after
    peaks[:, 1:] = rises & falls[:, 1:]
    ordered = values.nan_to_num(nan=-torch.inf).sort(dim=-1, descending=True).values
    last = (_quantile_counts(values, quantile) - 1).clamp(min=0)
    threshold = ordered.gather(-1, last[:, None])
    return peaks & (values >= threshold)


def waad_change(waad: Float[Tensor, "batch token"]) -> Float[Tensor, "batch token"]:
    """Return `|WAAD[t] - WAAD[t + 1]|` (Eq. 13 of arXiv 2510.13554); NaN for the last token.

    >>> waad_change(torch.tensor([[1.0, 3.0, 2.5]]))
    tensor([[2.0000, 0.5000,    nan]])
    """
    delta = torch.full_like(waad, torch.nan)
    delta[:, :-1] = (waad[:, :-1] - waad[:, 1:]).abs()
    return delta


def dominated_anchors(
    anchor: Bool[Tensor, "batch token"],
    waad: Float[Tensor, "batch token"],
    *,
    lookback: int = 3,
    waad_threshold: float | None = None,
    delta_threshold: float | None = None,
) -> tuple[Bool[Tensor, "batch token"], Bool[Tensor, "batch token"]]:
    """Mark the anchors that a chunk's opening dominates, and the tokens that opened the chunks.

    Sec. 5.2 of arXiv 2510.13554: an anchor t is dominated if `WAAD[t] <= waad_threshold` and the
    largest change of WAAD in `t - lookback .. t - 1` is at least `delta_threshold`; its opening is
    where that change is (ties: the latest). Thresholds default to the response's own medians of WAAD
    and of its change, over the tokens where each is defined. An anchor with no response token before
    it is not dominated.

    Raises:
        ParameterError: a lookback below 1, or shapes that differ.
    """
    if isinstance(lookback, bool) or not isinstance(lookback, int) or lookback < 1:
        raise ParameterError(f"lookback is a whole number of tokens, at least 1; got {lookback!r}")
    if anchor.shape != waad.shape:
        raise ParameterError(f"anchor is {list(anchor.shape)}, waad {list(waad.shape)}")
    delta = waad_change(waad)
    low = _threshold(waad, waad_threshold)
    high = _threshold(delta, delta_threshold)
    # before[..., i]: the change at t - 1 - i, so that the first maximum is the latest position.
    padded = torch.nn.functional.pad(delta, (lookback, 0), value=torch.nan)
    before = padded.unfold(-1, lookback, 1)[:, : waad.shape[1]].flip(-1)
    largest, place = before.nan_to_num(nan=-torch.inf).max(-1)
    dominated = anchor & (waad <= low) & (largest >= high) & (largest > -torch.inf)
    intro = torch.zeros_like(anchor)
    row, token = dominated.nonzero(as_tuple=True)
    intro[row, token - 1 - place[row, token]] = True
    return dominated, intro


def _threshold(values: Float[Tensor, "batch token"], given: float | None) -> Tensor:
    if given is not None:
        return values.new_full((values.shape[0], 1), given)
    # Half precision has no median.
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return wide.nanquantile(0.5, dim=-1, keepdim=True)


def _latest_within(
    preplan: Bool[Tensor, "batch token"], anchor: Bool[Tensor, "batch token"], lookback: int
) -> Int[Tensor, "batch token"]:
    """Return for each anchor the column of the latest preplan in `t - lookback .. t`, else -1."""
    column = torch.arange(preplan.shape[1], device=preplan.device).expand_as(anchor)
    latest = column.masked_fill(~preplan, -1).cummax(-1).values
    near = anchor & (latest >= 0) & (column - latest <= lookback)
    return latest.masked_fill(~near, -1)


def _quantile_counts(values: Float[Tensor, "batch token"], quantile: float) -> Int[Tensor, " batch"]:
    """Return `ceil(quantile * n)` of the n defined values of each row."""
    # 0.1 * 30 is a hair above 3 in binary: it must not become 4.
    counts = [max(math.ceil(quantile * n - 1e-9), min(n, 1)) for n in (~values.isnan()).sum(-1).tolist()]
    return torch.tensor(counts, device=values.device)


def _check_quantile(quantile: float) -> None:
    if not 0 < quantile <= 1:
        raise ParameterError(f"quantile must be in (0, 1], got {quantile}")

"""Whether the numbers of results follow from one another, whatever their names and ids say.

Two answers to the same words after different prompts, two checkpoints of one name, and results that were made
by hand look alike to a comparison of ids. But scores are means of statistics, changes are those of scores,
and FAI is a mean of the map's entries (Eq. 10 of arXiv 2510.13554v2): `checks` calls these, and each
recomputes what should agree. What is left to others: names, ids, columns and settings (checks).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.errors import AttnprobeError, ResultError
from attnprobe.head_statistics import HeadStatistics
from attnprobe.maps import GroupMaps
from attnprobe.reductions import Horizon
from attnprobe.rhythm import Rhythm, waad_change
from attnprobe.scores import TokenScores, score_tokens

_RELATIVE = 0.05
_OF_LARGEST = 0.02
"""Rounding in half precision, and in other kernels, stays far below; other answers lie far above."""
_MOST_OUTSIDE = 0.1
"""The share of tokens that may still disagree: a lower precision can change single entries by more."""


def check_score_numbers(statistics: HeadStatistics, scores: TokenScores, example: int) -> None:
    """Check that scores are means of the statistics over the heads that they name.

    Raises:
        ResultError: they are not, or their entropies differ.
    """
    pairs = [("entropy", statistics.entropy, scores.entropy)]
    groups = scores.provenance.heads
    # Scores that were made by hand name no heads, and may be anything.
    if {"local", "global"} <= groups.keys():
        heads = {group: {(layer, head): w for layer, head, w in of} for group, of in groups.items() if of}
        try:
            again = score_tokens(statistics.select(example), heads, align=scores.provenance.align)
        except AttnprobeError as error:
            raise ResultError(f"the scores name heads that the statistics do not have: {error}") from error
        pairs += [
            ("WAAD", _spread(again.waad, scores.waad, example), scores.waad),
            ("FAI", _spread(again.fai, scores.fai, example), scores.fai),
        ]
    inside = scores.response_mask[example].cpu()
    for name, ours, theirs in pairs:
        if ours is not None and theirs is not None:
            _check_agree(
                ours[example].cpu()[inside],
                theirs[example].cpu()[inside],
                f"the scores are of other statistics: of example {example}, their {name} differs",
            )


def check_rhythm_numbers(scores: TokenScores, rhythm: Rhythm, example: int) -> None:
    """Check that a rhythm holds the changes of the scores' WAAD.

    Raises:
        ResultError: it does not.
    """
    inside = scores.response_mask[example]
    waad = scores.waad[example].masked_fill(~inside.to(scores.waad.device), torch.nan)
    _check_agree(
        waad_change(waad[None])[0].cpu()[inside.cpu()],
        rhythm.delta[example].cpu()[inside.cpu()],
        f"the rhythm is of other scores: of example {example}, its changes of WAAD differ",
    )


def check_map_numbers(maps: GroupMaps, statistics: HeadStatistics, scores: TokenScores, example: int) -> None:
    """Check that the map of the global heads gives the FAI of the scores, where it holds all its rows.

    Args:
        maps: those of the example alone.
        statistics: what the scores were computed from.
        scores: the scores of the batch.
        example: which example of the scores it is.

    Raises:
        ResultError: it does not: the maps are of another prompt, example, or checkpoint.
    """
    inside = scores.response_mask[example].cpu().nonzero()[:, 0].tolist()
    columns = maps.columns_of(0)
    if columns != inside or statistics.value_weighted or statistics.influence_rows != "response":
        return
    # Columns as they are in the batch, since a horizon counts what lies in a gap too.
    first, width = columns[0], columns[-1] - columns[0] + 1
    place = torch.tensor(columns) - first
    attention = torch.zeros(width, width)
    count = len(columns)
    own = maps.global_map[0, :count, :count].detach().float().cpu().nan_to_num(0.0)
    attention[place[:, None], place[None]] = own.tril()
    rows = torch.zeros(width, dtype=torch.bool)
    rows[place] = True
    found = influence_of_map(attention, rows, statistics.horizon)[place]
    _check_agree(
        found,
        scores.fai[example].detach().cpu()[torch.tensor(columns)],
        f"the maps are of another answer, prompt or model than example {example}: the FAI that follows from "
        "them differs",
    )


def influence_of_map(
    attention: Float[Tensor, "token token"], rows: Bool[Tensor, " token"], horizon: Horizon
) -> Float[Tensor, " token"]:
    """Return the FAI of one map, by sums along its columns."""
    low, high = horizon
    count = len(attention)
    sums = torch.zeros(count + 1, count, dtype=torch.float64)
    sums[1:] = attention.double().cumsum(0)
    rows_before = torch.zeros(count + 1, dtype=torch.long)
    rows_before[1:] = rows.long().cumsum(0)
    column = torch.arange(count)
    begin = (column + low).clamp(max=count)
    end = column.new_full((count,), count) if high is None else (column + high + 1).clamp(max=count)
    given = sums[end, column] - sums[begin, column]
    row_count = (rows_before[end] - rows_before[begin]).double()
    return given / row_count.masked_fill(row_count <= 0, torch.nan)


def _spread(values: Tensor, like: Tensor, example: int) -> Tensor:
    """Return values of one example at their place in a batch."""
    spread = torch.full_like(like, torch.nan, dtype=values.dtype)
    spread[example] = values[0].to(spread.device)
    return spread


def _check_agree(ours: Float[Tensor, " token"], theirs: Float[Tensor, " token"], what: str) -> None:
    """Check that two computations of the same numbers agree, up to rounding."""
    ours, theirs = ours.double(), theirs.double()
    known = ~ours.isnan() & ~theirs.isnan()
    if not bool(known.any()):
        return
    scale = float(ours[known].abs().max())
    outside = (ours - theirs).abs() > _RELATIVE * ours.abs() + _OF_LARGEST * scale + 1e-12
    outside &= known
    if float(outside.sum()) > _MOST_OUTSIDE * float(known.sum()):
        token = int((ours - theirs).abs().masked_fill(~known, -1).argmax())
        raise ResultError(
            f"{what} in {int(outside.sum())} of {int(known.sum())} tokens, most in token {token} of the "
            f"response: {float(ours[token]):.3g} and {float(theirs[token]):.3g}"
        )

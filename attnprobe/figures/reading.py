"""What a figure reads from results: whether they belong together, and which response tokens it shows.

The figures of scores and maps call this before they draw. What is left to others: whether each result is
valid in itself (the results' own modules), and the same question for a whole page (report.checks).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from attnprobe.batch import TokenBatch
from attnprobe.errors import ParameterError, ResultError
from attnprobe.reductions import rows_in_horizon
from attnprobe.report.agreement import check_rhythm_numbers
from attnprobe.report.checks import check_provenance, check_response
from attnprobe.report.response import enough_rows
from attnprobe.rhythm import Rhythm
from attnprobe.scores import TokenScores, check_same_tokens
from attnprobe.validation import IntLike, brief, instance, whole_number

if TYPE_CHECKING:
    Within: TypeAlias = tuple[IntLike, IntLike | None] | None
else:
    Within = Any


def read_scores(scores: Any, rhythm: Any, example: IntLike) -> int:
    """Check scores and a rhythm for a figure of one example, and return its number.

    Raises:
        ParameterError: other things than results, or an example that there is not.
        ResultError: a rhythm of other scores, or an example with an empty response.
    """
    instance(scores, TokenScores, "scores", "score_tokens returns them")
    example = whole_number(example, "example", maximum=scores.waad.shape[0] - 1)
    if rhythm is not None:
        instance(rhythm, Rhythm, "rhythm", "find_rhythm returns it")
        _check_rhythm(scores, rhythm, example)
    if not bool(scores.response_mask[example].any()):
        raise ResultError(f"example {example} has an empty response: there is no token to show")
    return example


def _check_rhythm(scores: TokenScores, rhythm: Rhythm, example: int) -> None:
    """Check that a rhythm is that of the scores, as far as both are known."""
    ours, theirs = list(scores.waad.shape), list(rhythm.preplan.shape)
    if ours != theirs:
        raise ResultError(f"the scores are [example, token] = {ours}, the rhythm {theirs}")
    if rhythm.response_mask is not None:
        inside = scores.response_mask.cpu()
        ids = (
            torch.zeros_like(inside, dtype=torch.long) if scores.input_ids is None else scores.input_ids.cpu()
        )
        batch = TokenBatch(ids, torch.ones_like(inside), inside)
        if scores.input_ids is not None:
            check_same_tokens(batch, rhythm, "the rhythm")
        check_response(batch, rhythm.response_mask, "the rhythm", example)
    check_provenance(scores.provenance, rhythm.provenance, "rhythm", "the scores")
    # Two checkpoints of one name look alike to all of these.
    check_rhythm_numbers(scores, rhythm, example)


def few_rows(scores: TokenScores, name: str, example: int) -> set[int]:
    """Return the columns where a score is a mean over too few rows (`enough_rows`) to say much of the token.

    None are known for other scores than FAI, and where rows of other segments count.
    """
    horizon, rows = scores.provenance.horizon, scores.response_mask[example, None].cpu()
    if (
        name not in ("fai", "receiver_fai")
        or horizon is None
        or scores.provenance.influence_rows != "response"
    ):
        return set()
    few = rows_in_horizon(rows, *horizon, None)[0] < enough_rows(horizon)
    return set((few & rows[0]).nonzero()[:, 0].tolist())


def shown_columns(mask: Tensor, example: int, within: Within) -> list[int]:
    """Return the columns of the response tokens to show: all, or `within=(first, stop)` of the response.

    Raises:
        ParameterError: anything but two numbers, or a part that holds no token.
    """
    columns: list[int] = mask[example].nonzero()[:, 0].tolist()
    return columns[shown_part(len(columns), within)]


def first_column(mask: Tensor, example: int) -> int:
    """Return the column of a response's first token, from which figures count."""
    return int(mask[example].nonzero()[0, 0])


def shown_part(count: int, within: Within) -> slice:
    """Return which of `count` response tokens to show."""
    if within is None:
        return slice(0, count)
    if not isinstance(within, tuple | list) or len(within) != 2:
        raise ParameterError(
            "within must be (first, stop), counted from the beginning of the response, or (first, None); got "
            f"{brief(within)}"
        )
    first = whole_number(within[0], "the first of within")
    stop = count if within[1] is None else whole_number(within[1], "the stop of within")
    if first >= min(stop, count):
        raise ParameterError(f"within={(first, within[1])} holds none of the {count} response tokens")
    return slice(first, min(stop, count))


def floats(values: Tensor, example: int, columns: list[int]) -> list[float]:
    """Return the values of some tokens as Python numbers."""
    found: list[float] = values[example].detach()[columns].double().cpu().tolist()
    return found


def with_gaps(columns: list[int], values: list[float], origin: int) -> tuple[list[int], list[float]]:
    """Return positions, counted from a column, and values, with NaN where a response has a gap.

    >>> with_gaps([5, 6, 9], [1.0, 2.0, 3.0], origin=5)
    ([0, 1, 2, 4], [1.0, 2.0, nan, 3.0])
    """
    places: list[int] = []
    filled: list[float] = []
    for column, value in zip(columns, values, strict=True):
        place = column - origin
        if places and place != places[-1] + 1:
            places.append(places[-1] + 1)
            filled.append(math.nan)
        places.append(place)
        filled.append(value)
    return places, filled


def undefined_stretches(places: list[int], values: list[float]) -> list[tuple[float, float]]:
    """Return the stretches, as (begin, width), in which a curve has no value.

    >>> undefined_stretches([0, 1, 2, 3], [1.0, math.nan, math.nan, 2.0])
    [(0.5, 2.0)]
    """
    stretches: list[tuple[float, float]] = []
    for i, value in enumerate(values):
        if not math.isnan(value):
            continue
        begin = places[i] - 0.5
        width = (places[i + 1] if i + 1 < len(places) else places[i] + 1) - 0.5 - begin
        if stretches and sum(stretches[-1]) == begin:
            begin, before = stretches.pop()
            width += before
        stretches.append((begin, width))
    return stretches

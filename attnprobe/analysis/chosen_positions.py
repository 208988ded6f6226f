"""Which tokens of a response are tried: those of highest and of lowest FAI, and some drawn at random.

`perturb` and `knockout` call `choose_positions` for each response. FAI is heavy-tailed, and its lowest values
are mostly of tokens that nothing depends on, so the two ends alone say little about an ordinary token: drawn
positions do. What is left to others: FAI (scores), and what is done at a position (perturbation, knockout).
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attnprobe.batch import TokenBatch
from attnprobe.errors import ParameterError, ResultError
from attnprobe.layout import check_unpacked
from attnprobe.scores import TokenScores, check_same_tokens
from attnprobe.validation import instance

Kind = Literal["highest", "lowest", "drawn"]


def choose_positions(
    batch: TokenBatch,
    scores: TokenScores,
    example: int,
    positions: int = 1,
    min_remaining: int = 10,
    *,
    drawn: int = 0,
    seed: int = 0,
) -> list[tuple[Kind, int]]:
    """Return the columns of highest and of lowest FAI of one response, and drawn ones; none if too few.

    Allowed are tokens with a defined FAI and at least `min_remaining` tokens after them, up to the next gap.
    Of equal FAI, the earliest is chosen. `drawn` others are drawn from the rest without replacement, or as
    many as there are. A draw depends on the seed and on the response's own tokens only, so it is the same in
    any batch, and a larger draw contains a smaller one.
    """
    inside = batch.response_mask[example].cpu()
    fai = scores.fai[example].cpu()
    remaining = run_ends(inside) - 1 - torch.arange(len(inside))
    columns = (inside & ~fai.isnan() & (remaining >= min_remaining)).nonzero()[:, 0]
    if len(columns) < 2 * positions:
        return []
    ascending = columns[fai[columns].argsort(stable=True)]
    descending = columns[(-fai[columns]).argsort(stable=True)]
    chosen: list[tuple[Kind, int]] = [("highest", int(column)) for column in descending[:positions]]
    chosen += [("lowest", int(column)) for column in ascending[:positions]]
    taken = {column for _, column in chosen}
    others = [column for column in columns.tolist() if column not in taken]
    # Not hash(), which differs from one process to the next.
    digest = hashlib.sha256(f"{seed} {text_digest(batch, example)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    order = torch.randperm(len(others), generator=generator).tolist()
    return chosen + [("drawn", others[i]) for i in order[:drawn]]


def choose_in_batch(
    batch: TokenBatch, scores: TokenScores, positions: int, min_remaining: int, drawn: int, seed: int
) -> list[tuple[int, Kind, int]]:
    """Return (example, kind, column) for the chosen positions of all responses that are long enough.

    Raises:
        ParameterError: if no response is.
    """
    chosen = [
        (example, kind, column)
        for example in range(batch.batch_size)
        for kind, column in choose_positions(
            batch, scores, example, positions, min_remaining, drawn=drawn, seed=seed
        )
    ]
    if not chosen:
        raise ParameterError(
            f"no response has {2 * positions} positions with a defined FAI and at least {min_remaining} "
            "tokens after them: the responses are too short"
        )
    return chosen


def run_ends(inside: Bool[Tensor, " token"]) -> Int[Tensor, " token"]:
    """Return for each token the next column that lies outside the response: a gap, or the end.

    >>> run_ends(torch.tensor([True, True, False, True])).tolist()
    [2, 2, 2, 4]
    """
    column = torch.arange(len(inside)).masked_fill(inside, len(inside))
    return column.flip(0).cummin(0).values.flip(0)


def check_same_responses(batch: TokenBatch, scores: TokenScores, what: str) -> None:
    """Check that scores are of the responses of a batch that is not packed; `what` is what needs them.

    Raises:
        ParameterError: packed examples, or something that is not scores.
        ResultError: scores of another batch.
    """
    check_unpacked(batch.segment_ids, what)
    instance(scores, TokenScores, "scores", "score_tokens returns them")
    check_same_tokens(batch, scores, "the scores")
    ours, theirs = batch.response_mask.cpu(), scores.response_mask.cpu()
    differs = (ours != theirs).any(-1).nonzero()[:, 0].tolist()
    if differs:
        example = differs[0]
        raise ResultError(
            f"the scores are of other responses than the batch: example {example} has "
            f"{int(theirs[example].sum())} scored tokens, but its response has {int(ours[example].sum())}"
        )


def check_same_model(scores: TokenScores, model_name: str) -> None:
    """Check that scores were computed from a model of that name, if they say from which.

    Raises:
        ResultError: if they were not.
    """
    scored = scores.provenance.model_name
    if scored and scored != model_name:
        raise ResultError(f"the scores are of {scored}, but the model is {model_name}")


def text_digest(batch: TokenBatch, example: int) -> str:
    """Return a digest that identifies a text and which of its tokens are response."""
    real = batch.attention_mask[example]
    ids = batch.input_ids[example][real].tolist()
    response = batch.response_mask[example][real].nonzero()[:, 0].tolist()
    count = len(response)
    # If the response is the end of the text, its length says it all, and is what older files store.
    is_end = response == list(range(len(ids) - count, len(ids)))
    return hashlib.sha256(json.dumps([ids, count if is_end else response]).encode()).hexdigest()[:16]

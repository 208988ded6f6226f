"""What happens when a token is replaced: the perturbation of Table 1 of arXiv 2510.13554v2.

At a response's positions of highest and of lowest FAI, `perturb`, which users call, forces each of the
likeliest other tokens and lets the model continue greedily. If a token is an anchor, replacing it should
change more of what follows. What is left to others: FAI (scores), running the model (forced_tokens), how much
two texts have in common (content_words), and the results with their file (trials).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attnprobe.analysis.content_words import content_overlap
from attnprobe.analysis.forced_tokens import check_generates, check_vocabulary, force_tokens
from attnprobe.analysis.trials import Continuation, Kind, Perturbations, Trial, TrialFile
from attnprobe.batch import BatchLike, TokenBatch
from attnprobe.errors import ParameterError, ResultError
from attnprobe.layout import check_unpacked
from attnprobe.model_inputs import refuse_inputs
from attnprobe.progress import progress_bar
from attnprobe.scores import TokenScores, check_same_tokens
from attnprobe.validation import IntLike, brief, instance, truth, whole_number


def perturb(
    model: Any,
    tokenizer: Any,
    batch: BatchLike,
    scores: TokenScores,
    *,
    candidates: IntLike = 10,
    positions: IntLike = 1,
    max_new_tokens: IntLike = 100,
    min_remaining: IntLike = 10,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Perturbations:
    """Replace tokens of highest and of lowest FAI, and compare what the model then writes.

    This is Table 1 of arXiv 2510.13554v2. All continuations at a position are written together, from one
    key/value cache of the text before it. In a response with gaps (two turns, with a tool's output in
    between), everything stays within one part: a continuation is as long as the text up to the gap.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer; overlaps are of words.
        batch: prompts and responses, as for `measure`, but not packed.
        scores: of that batch; positions are chosen by `scores.fai`, where it is defined.
        candidates: how many other tokens are forced at a position, the likeliest first.
        positions: how many positions of each kind to choose per response; of equal FAI, the earliest.
        max_new_tokens: continuations are as long as the rest of the response, but no longer than this.
        min_remaining: positions with fewer tokens after them, up to the next gap, are not chosen.
        path: a JSON-lines file to which each trial is written when it is done. Trials that it already
            holds, of the same model, parameters, text and position, are not run again: an interrupted
            run continues, and a batch may grow.
        progress: whether to show a progress bar.

    Greedy continuations need no seed: the same call gives the same result.

    Raises:
        ParameterError: counts below 1, packed examples, no position to choose, or something other than a
            tokenizer.
        BatchError: ids outside the model's vocabulary, or images.
        ResultError: scores of another batch, or a path that holds something else or cannot be written.
        UnsupportedModelError: a model that cannot generate.
    """
    counts = {
        name: whole_number(value, name, minimum=1)
        for name, value in {
            "candidates": candidates,
            "positions": positions,
            "max_new_tokens": max_new_tokens,
            "min_remaining": min_remaining,
        }.items()
    }
    truth(progress, "progress")
    if isinstance(tokenizer, type | bytes) or not callable(getattr(tokenizer, "decode", None)):
        raise ParameterError(f"tokenizer must be the model's tokenizer; got {brief(tokenizer)}")
    batch = TokenBatch.of(batch)
    refuse_inputs(batch.model_inputs, "perturb")
    parameters: dict[str, Any] = {**counts, "model": check_generates(model)}
    check_vocabulary(model, batch.input_ids)
    _check_same_responses(batch, scores)
    scored = scores.provenance.model_name
    if scored and scored != parameters["model"]:
        raise ResultError(f"the scores are of {scored}, but the model is {parameters['model']}")
    chosen = [
        (example, kind, column)
        for example in range(batch.batch_size)
        for kind, column in choose_positions(
            batch, scores, example, counts["positions"], counts["min_remaining"]
        )
    ]
    if not chosen:
        raise ParameterError(
            f"no response has {2 * counts['positions']} positions with a defined FAI and at least "
            f"{counts['min_remaining']} tokens after them: the responses are too short"
        )
    file = TrialFile.open(path, parameters, scores.provenance)
    trials = []
    with progress_bar("perturbing", len(chosen), shown=progress) as advance:
        for example, kind, column in chosen:
            place = int(batch.response_mask[example, :column].sum())
            fai = float(scores.fai[example, column])
            trial = file.done.get((_digest(batch, example), kind, place))
            if trial is None:
                trial = _try(model, tokenizer, batch, (example, kind, column), fai, parameters)
            trials.append(replace(trial, example=example, position=column, fai=fai))
            file.add(trials[-1])
            advance()
    file.finish()
    return Perturbations(tuple(trials), parameters, scores.provenance)


def choose_positions(
    batch: TokenBatch, scores: TokenScores, example: int, positions: int = 1, min_remaining: int = 10
) -> list[tuple[Kind, int]]:
    """Return the columns of highest and of lowest FAI of one response; none if there are too few."""
    inside = batch.response_mask[example].cpu()
    fai = scores.fai[example].cpu()
    remaining = _run_ends(inside) - 1 - torch.arange(len(inside))
    columns = (inside & ~fai.isnan() & (remaining >= min_remaining)).nonzero()[:, 0]
    if len(columns) < 2 * positions:
        return []
    ascending = columns[fai[columns].argsort(stable=True)]
    descending = columns[(-fai[columns]).argsort(stable=True)]
    highest: list[tuple[Kind, int]] = [("highest", int(c)) for c in descending[:positions]]
    lowest: list[tuple[Kind, int]] = [("lowest", int(c)) for c in ascending[:positions]]
    return highest + lowest


def _run_ends(inside: Bool[Tensor, " token"]) -> Int[Tensor, " token"]:
    """Return for each token the next column that lies outside the response: a gap, or the end.

    >>> _run_ends(torch.tensor([True, True, False, True])).tolist()
    [2, 2, 2, 4]
    """
    column = torch.arange(len(inside)).masked_fill(inside, len(inside))
    return column.flip(0).cummin(0).values.flip(0)


def _try(
    model: Any,
    tokenizer: Any,
    batch: TokenBatch,
    where: tuple[int, Kind, int],
    fai: float,
    parameters: dict[str, Any],
) -> Trial:
    """Force the candidates at one position, and compare what the model writes after each."""
    example, kind, column = where
    ids, inside = batch.input_ids[example], batch.response_mask[example].cpu()
    first = int(batch.attention_mask[example].nonzero()[0])
    rest = int(_run_ends(inside)[column]) - column - 1
    length = min(parameters["max_new_tokens"], rest)
    forced = force_tokens(model, ids[first:column], int(ids[column]), parameters["candidates"], length)
    response_text = _decode(tokenizer, ids[column + 1 : column + 1 + length].tolist())
    texts = [_decode(tokenizer, continuation) for continuation in forced.continuations]
    continuations = [
        Continuation(
            token=token,
            probability=probability,
            text=text,
            overlap=content_overlap(text, response_text),
            greedy_overlap=content_overlap(text, texts[0]),
        )
        for token, probability, text in zip(forced.tokens, forced.probabilities, texts, strict=True)
    ]
    return Trial(
        example=example,
        digest=_digest(batch, example),
        kind=kind,
        position=column,
        response_position=int(inside[:column].sum()),
        length=int(inside.sum()),
        fai=fai,
        token=int(ids[column]),
        own=continuations[0],
        others=tuple(continuations[1:]),
    )


def _check_same_responses(batch: TokenBatch, scores: TokenScores) -> None:
    """Check that scores are of the responses of a batch that is not packed."""
    check_unpacked(batch.segment_ids, "perturb")
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


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _digest(batch: TokenBatch, example: int) -> str:
    """Return a digest that identifies a text and which of its tokens are response."""
    real = batch.attention_mask[example]
    ids = batch.input_ids[example][real].tolist()
    response = batch.response_mask[example][real].nonzero()[:, 0].tolist()
    count = len(response)
    # If the response is the end of the text, its length says it all, and is what older files store.
    is_end = response == list(range(len(ids) - count, len(ids)))
    return hashlib.sha256(json.dumps([ids, count if is_end else response]).encode()).hexdigest()[:16]

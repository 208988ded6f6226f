"""What happens when a token is replaced: the perturbation of Table 1 of arXiv 2510.13554v2.

At a response's positions of highest and of lowest FAI, and at some drawn at random, `perturb`, which users
call, forces each of the likeliest other tokens and lets the model continue greedily. If a token is an anchor,
replacing it should change more of what follows. What is left to others: FAI (scores), which positions are
tried (chosen_positions), running the model (forced_tokens), how much two texts have in common
(content_words), and the results with their file (trials).
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from attnprobe.analysis.bootstrap import check_seed
from attnprobe.analysis.chosen_positions import (
    Kind,
    check_same_model,
    check_same_responses,
    choose_in_batch,
    run_ends,
    text_digest,
)
from attnprobe.analysis.content_words import content_overlap
from attnprobe.analysis.forced_tokens import check_generates, check_vocabulary, force_tokens
from attnprobe.analysis.trials import Continuation, Perturbations, Trial, TrialFile
from attnprobe.batch import BatchLike, TokenBatch
from attnprobe.errors import ParameterError
from attnprobe.model_inputs import refuse_inputs
from attnprobe.progress import progress_bar
from attnprobe.scores import TokenScores
from attnprobe.validation import IntLike, brief, truth, whole_number


def perturb(
    model: Any,
    tokenizer: Any,
    batch: BatchLike,
    scores: TokenScores,
    *,
    candidates: IntLike = 10,
    positions: IntLike = 1,
    drawn: IntLike = 0,
    seed: IntLike = 0,
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
        positions: how many positions of highest and how many of lowest FAI to choose per response; of equal
            FAI, the earliest.
        drawn: how many other positions to draw at random per response; fewer if it has no more. They show
            what replacing an ordinary token does.
        seed: of the draw, which depends on nothing else but the response's own tokens.
        max_new_tokens: continuations are as long as the rest of the response, but no longer than this.
        min_remaining: positions with fewer tokens after them, up to the next gap, are not chosen.
        path: a JSON-lines file to which each trial is written when it is done. Trials that it already
            holds, of the same model, parameters, text and position, are not run again: an interrupted
            run continues, and a batch may grow, as may the number of drawn positions.
        progress: whether to show a progress bar.

    Continuations are greedy, so the same call gives the same result.

    Raises:
        ParameterError: counts below 1, a negative `drawn` or seed, packed examples, no position to choose,
            or something other than a tokenizer.
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
    counts["drawn"] = whole_number(drawn, "drawn")
    seed = check_seed(seed)
    truth(progress, "progress")
    if isinstance(tokenizer, type | bytes) or not callable(getattr(tokenizer, "decode", None)):
        raise ParameterError(f"tokenizer must be the model's tokenizer; got {brief(tokenizer)}")
    batch = TokenBatch.of(batch)
    refuse_inputs(batch.model_inputs, "perturb")
    parameters: dict[str, Any] = {**counts, "seed": seed, "model": check_generates(model)}
    check_vocabulary(model, batch.input_ids)
    check_same_responses(batch, scores, "perturb")
    check_same_model(scores, parameters["model"])
    chosen = choose_in_batch(
        batch, scores, counts["positions"], counts["min_remaining"], counts["drawn"], seed
    )
    file = TrialFile.open(path, parameters, scores.provenance)
    trials = []
    with progress_bar("perturbing", len(chosen), shown=progress) as advance:
        for example, kind, column in chosen:
            place = int(batch.response_mask[example, :column].sum())
            fai = float(scores.fai[example, column])
            trial = file.done.get((text_digest(batch, example), kind, place))
            if trial is None:
                trial = _try(model, tokenizer, batch, (example, kind, column), fai, parameters)
            trials.append(replace(trial, example=example, position=column, fai=fai))
            file.add(trials[-1])
            advance()
    file.finish()
    return Perturbations(tuple(trials), parameters, scores.provenance)


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
    rest = int(run_ends(inside)[column]) - column - 1
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
        digest=text_digest(batch, example),
        kind=kind,
        position=column,
        response_position=int(inside[:column].sum()),
        length=int(inside.sum()),
        fai=fai,
        token=int(ids[column]),
        own=continuations[0],
        others=tuple(continuations[1:]),
    )


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))

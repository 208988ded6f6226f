"""The metrics of sentences: how much attention a sentence gets from later ones, and from which heads.

Those of Thought Anchors (arXiv 2506.19143), as pure functions of one layer's attention and of the numbers of
its tokens' sentences. Users find them in `attnprobe.metrics`; `SentenceReceiverProbe` calls them in every
layer. What is left to others: where sentences end, and the result (sentences), going over layers (receivers).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.errors import ParameterError
from attnprobe.metric_arguments import AttentionLike, as_attention, token_numbers
from attnprobe.reductions import FEWEST_VALUES, Selectivity
from attnprobe.validation import ArrayLike, IntLike, whole_number


def sentence_receiver_kurtosis(
    attention: AttentionLike,
    sentence_ids: ArrayLike,
    min_distance: IntLike = 4,
    minimum_sentences: IntLike | None = None,
) -> Float[Tensor, "batch head"]:
    """Return how selective each head's inbound attention is, from sentence to sentence.

    The variant of Thought Anchors (arXiv 2506.19143): Fisher's kurtosis (biased), at least -2, of the
    sentences' vertical scores, which `sentence_influence` returns. NaN where it is undefined: for responses
    with fewer than `minimum_sentences` sentences, fewer than four scores, or equal ones.

    Args:
        attention: of one layer, or a pattern.
        sentence_ids: `[batch, token]`, the sentences of a response numbered from 0; -1 outside them.
        min_distance: pairs of sentences closer than this are left out.
        minimum_sentences: default `min_distance + 4`, which gives four scores. With two, kurtosis is -2 for
            every head, and with three -1.5: arithmetic, not attention.

    Raises:
        PatternError: an invalid pattern.
        ParameterError: ids that do not fit, or a distance or number below 1.

    >>> pattern = torch.zeros(6, 6)
    >>> pattern[:, 0] = 1.0
    >>> sentence_receiver_kurtosis(pattern, torch.arange(6)[None], min_distance=1)
    tensor([[0.2500]])
    """
    return sentence_selectivity(attention, sentence_ids, min_distance, minimum_sentences).kurtosis


def sentence_receiver_gini(
    attention: AttentionLike,
    sentence_ids: ArrayLike,
    min_distance: IntLike = 4,
    minimum_sentences: IntLike | None = None,
) -> Float[Tensor, "batch head"]:
    """Return the Gini coefficient of the scores whose kurtosis `sentence_receiver_kurtosis` returns.

    In `[0, 1)`; it does not grow with the number of sentences. NaN where kurtosis is, except that it is 0 for
    equal scores and undefined if all are 0.

    Raises:
        PatternError: an invalid pattern.
        ParameterError: ids that do not fit, or a distance or number below 1.

    >>> pattern = torch.zeros(6, 6)
    >>> pattern[:, 0] = 1.0
    >>> sentence_receiver_gini(pattern, torch.arange(6)[None], min_distance=1)
    tensor([[0.8000]])
    """
    return sentence_selectivity(attention, sentence_ids, min_distance, minimum_sentences).gini


def sentence_selectivity(
    attention: AttentionLike,
    sentence_ids: ArrayLike,
    min_distance: IntLike = 4,
    minimum_sentences: IntLike | None = None,
) -> Selectivity:
    """Return both of the above from one pass over the attention.

    Raises:
        PatternError: an invalid pattern.
        ParameterError: ids that do not fit, or a distance or number below 1.
    """
    min_distance = whole_number(min_distance, "min_distance", minimum=1)
    least = min_distance + FEWEST_VALUES if minimum_sentences is None else minimum_sentences
    least = whole_number(least, "minimum_sentences", minimum=1)
    pooled = sentence_attention(attention, sentence_ids)
    # A sentence that exists gives some mean attention to itself; of others nothing is defined.
    count = (~pooled.diagonal(dim1=-2, dim2=-1).isnan()).sum(-1, keepdim=True)
    return Selectivity.of(_vertical_scores(pooled, min_distance).masked_fill(count < least, torch.nan))


def sentence_influence(
    attention: AttentionLike, sentence_ids: ArrayLike, min_distance: IntLike = 4
) -> Float[Tensor, "batch head sentence"]:
    """Return the vertical score of each sentence: the mean attention from the sentences well after it.

    The mean of column i of `sentence_attention` over the sentences from `i + min_distance` on (Thought
    Anchors, arXiv 2506.19143), in `[0, 1]`; NaN for the last `min_distance` sentences, and those that a
    response does not have.

    Raises:
        PatternError: an invalid pattern.
        ParameterError: ids that do not fit, or a distance below 1.

    >>> pattern = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.25, 0.25]])
    >>> sentence_influence(pattern, torch.tensor([[0, 1, 2]]), min_distance=1)
    tensor([[[0.5000, 0.2500,    nan]]])
    """
    min_distance = whole_number(min_distance, "min_distance", minimum=1)
    return _vertical_scores(sentence_attention(attention, sentence_ids), min_distance)


def _vertical_scores(
    pooled: Float[Tensor, "batch head sentence sentence"], min_distance: int
) -> Float[Tensor, "batch head sentence"]:
    count = pooled.shape[-1]
    near = torch.ones(count, count, dtype=torch.bool, device=pooled.device).triu(1 - min(min_distance, count))
    return pooled.masked_fill(near, torch.nan).nanmean(-2)


def sentence_attention(
    attention: AttentionLike, sentence_ids: ArrayLike
) -> Float[Tensor, "batch head sentence sentence"]:
    """Return the mean attention between sentences: `[..., i, j]` is what sentence i gives to sentence j.

    The mean of `A[t, s]` over the tokens t of sentence i and s of sentence j, in `[0, 1]`; NaN for
    sentences that a response does not have. No map of tokens is stored.

    Raises:
        PatternError: an invalid pattern.
        ParameterError: ids that do not fit.

    >>> pattern = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.25, 0.25]])
    >>> sentence_attention(pattern, torch.tensor([[0, 0, 1]]))[0, 0]
    tensor([[0.5000, 0.0000],
            [0.3750, 0.2500]])
    """
    attention = as_attention(attention)
    ids = token_numbers(attention, sentence_ids, "sentence_ids")
    if int(ids.max()) >= attention.query_count:
        raise ParameterError(
            f"sentence_ids count the sentences from 0, so there are at most {attention.query_count}; got "
            f"{int(ids.max())}"
        )
    sentence = torch.arange(max(1, int(ids.max()) + 1), device=attention.device)
    member = (ids[..., None] == sentence).to(attention.dtype)
    length = member.sum(1)
    mean = member / length.masked_fill(length == 0, torch.nan)[:, None]
    # Undefined sentences must not reach the operator: NaN times 0 would make every token NaN.
    read = attention.attend(mean.nan_to_num(), nonnegative=True)
    pooled = torch.einsum("btr,bhts->bhrs", mean.nan_to_num(), read)
    missing = (length == 0)[:, None]
    return pooled.masked_fill(missing[..., None, :] | missing[..., :, None], torch.nan)

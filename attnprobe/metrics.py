"""The metrics as pure functions of one layer's attention: an `Attention`, or a pattern tensor.

All but kurtosis and Gini coefficients are linear in the attention, so the metric of a mean of heads is the
mean of the heads' metrics: values are kept per head, and groups are chosen afterwards. Definitions are those
of arXiv 2510.13554v2. Undefined values are NaN: those outside the response, and those whose horizon holds no
row. Every function takes the attention, then the response mask `[batch, token]`; without one, all tokens are
response. The probes call them, and users with a pattern of their own.

What is left to others: running the model (adapters), going over layers (head_statistics), choosing
head groups (heads), and averaging over them (scores).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnprobe.attention.operator import Attention, DenseAttention
from attnprobe.errors import ParameterError, PatternError
from attnprobe.reductions import (
    FEWEST_VALUES,
    RECEIVER_HORIZON,
    TRAINING_HORIZON,
    Horizon,
    MarkedKeys,
    Selectivity,
    influence_of,
    mean_distance_left,
    mean_over_rows,
    read_rows,
    received_by_key,
    selectivity_of,
    windowed_distance_by_row,
)
from attnprobe.validation import (
    ArrayLike,
    IntLike,
    as_float_tensor,
    as_mask,
    as_tensor,
    brief,
    finite,
    whole_number,
)

if TYPE_CHECKING:
    AttentionLike: TypeAlias = Attention | ArrayLike
    HorizonLike: TypeAlias = Horizon | Sequence[IntLike | None] | ArrayLike
else:
    AttentionLike = HorizonLike = Any


def mean_attention_distance(
    attention: AttentionLike, response_mask: ArrayLike | None = None
) -> Float[Tensor, "batch head"]:
    """Return the span of each head: its mean backward distance over response rows, in tokens.

    Eq. 7 of arXiv 2510.13554v2: `1/|R| * sum over t in R, s <= t of A[t, s] * (t - s)`; in
    `[0, T - 1]`. The rows of prompt and padding tokens never count; a sink's share of a row counts
    as distance 0.

    Raises:
        PatternError: an invalid pattern.
        ParameterError: a mask of another shape, or with other values.

    >>> pattern = torch.tensor([[1.0, 0.0], [0.75, 0.25]])
    >>> mean_attention_distance(pattern, torch.tensor([[False, True]]))
    tensor([[0.7500]])
    """
    attention = as_attention(attention)
    mask = check_mask(attention, response_mask)
    distance = attention.mean_distance()
    inside = mask[:, None].to(attention.dtype)
    count = inside.sum(-1)
    return (distance * inside).sum(-1) / count.masked_fill(count == 0, torch.nan)


def mean_attention_distance_ignoring(
    attention: AttentionLike, ignored: ArrayLike, response_mask: ArrayLike | None = None
) -> Float[Tensor, "batch head"]:
    """Return the span of each head without some keys: what is left of each row is renormalised.

    The mean over response rows `t` of `sum over s of A[t, s] * (t - s) / sum over s of A[t, s]`, where both
    sums leave out the ignored keys; in tokens, in `[0, T - 1]`. Many heads rest on the first token when they
    have nothing to do, and Eq. 7 of arXiv 2510.13554v2 counts this as the longest distance: `ignored` is then
    that token. Rows with nothing left are left out of the mean; NaN if no row has anything left.

    Both sums are taken directly, not as differences from the whole row, so that they are as exact where the
    ignored keys hold nearly all of a row; a row with less than 1e-30 left counts as one with nothing.

    Args:
        attention: an `Attention`, or a pattern.
        ignored: `[batch, token]`, True for the keys to ignore.
        response_mask: `[batch, token]`, the rows; default: all.

    Raises:
        PatternError: an invalid pattern.
        ParameterError: masks of another shape, or with other values.

    >>> pattern = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.125, 0.375]])
    >>> mean_attention_distance_ignoring(pattern, [[1, 0, 0]])
    tensor([[0.1250]])
    """
    attention = as_attention(attention)
    mask = check_mask(attention, response_mask)
    keys = MarkedKeys(ignored=check_mask(attention, ignored, "ignored"))
    left = read_rows(attention, keys, span=False).left
    assert left is not None
    return mean_distance_left(left, mask)


def attention_share(
    attention: AttentionLike, keys: ArrayLike, response_mask: ArrayLike | None = None
) -> Float[Tensor, "batch head"]:
    """Return each head's share of attention on chosen keys: what response rows give them, on average.

    In `[0, 1]`; over all keys it is 1, less what goes to a sink of the softmax. NaN without a response row.

    Args:
        attention: an `Attention`, or a pattern.
        keys: `[batch, token]`, True for the keys.
        response_mask: `[batch, token]`, the rows; default: all.

    Raises:
        PatternError: an invalid pattern.
        ParameterError: masks of another shape, or with other values.

    >>> pattern = torch.tensor([[1.0, 0.0], [0.75, 0.25]])
    >>> attention_share(pattern, keys=[[1, 0]], response_mask=[[0, 1]])
    tensor([[0.7500]])
    """
    attention = as_attention(attention)
    mask = check_mask(attention, response_mask)
    marked = check_mask(attention, keys, "keys")[:, None]
    single = bool((marked.sum(-1) <= 1).all())
    shares = read_rows(attention, MarkedKeys(marked, (single,)), span=False).shares
    assert shares is not None
    return mean_over_rows(shares[..., 0], mask)


def windowed_attention_distance(
    attention: AttentionLike,
    response_mask: ArrayLike | None = None,
    window: IntLike = 10,
) -> Float[Tensor, "batch head token"]:
    """Return the WAAD of each token: its mean backward distance, with distances capped at the window.

    Eq. 9 of arXiv 2510.13554v2: `sum over s <= t of A[t, s] * min(t - s, W)`; in tokens, in
    `[0, W]`. NaN outside the response, if a mask is given.

    Raises:
        PatternError: an invalid pattern.
        ParameterError: a window below 1, or a mask that does not fit.

    >>> windowed_attention_distance(torch.tensor([[1.0, 0.0], [0.75, 0.25]]), window=10)
    tensor([[[0.0000, 0.7500]]])
    """
    window = check_window(window)
    attention = as_attention(attention)
    waad = windowed_distance_by_row(attention, window)
    return waad.masked_fill(~check_mask(attention, response_mask)[:, None], torch.nan)


def future_attention_influence(
    attention: AttentionLike,
    response_mask: ArrayLike | None = None,
    horizon: HorizonLike = TRAINING_HORIZON,
    segment_ids: ArrayLike | None = None,
    rows: ArrayLike | None = None,
    value_norms: ArrayLike | None = None,
) -> Float[Tensor, "batch head token"]:
    """Return the FAI of each response token: the mean attention that later response tokens give it.

    Eq. 10 of arXiv 2510.13554v2: the mean of `A[t, s]` over the response rows `t` with
    `s + low <= t <= s + high`; `high=None` runs to the end of the response (App. A.1). In `[0, 1]`.
    NaN outside the response, and for tokens so late that no row lies within their horizon.
    For packed examples give `segment_ids`, so that the rows of another sequence do not count. With `rows`
    `[batch, token]`, the rows that it marks count in place of those of the response, such as those of an
    answer after the reasoning; the tokens that are scored stay those of the response. With `value_norms`
    `[batch, head, token]`, attention is weighted by the norm of the key's value after the head's output
    projection, as the site "value_norms" shows it: `A[t, s] * norm(W_O v[s])`, in units of the residual
    stream.

    Raises:
        PatternError: an invalid pattern.
        ParameterError: a horizon that is negative or empty, a mask that does not fit, or norms that are
            negative.

    >>> pattern = torch.tensor([[1.0, 0.0], [0.75, 0.25]])
    >>> future_attention_influence(pattern, torch.ones(1, 2, dtype=torch.bool), horizon=(1, None))
    tensor([[[0.7500,    nan]]])
    """
    low, high = check_horizon(horizon)
    attention = as_attention(attention)
    mask = check_mask(attention, response_mask)
    segments = check_segments(attention, segment_ids)
    giving = mask if rows is None else check_mask(attention, rows, "rows")
    received = received_by_key(attention, giving, (low, high)) * _check_norms(attention, value_norms)
    return influence_of(received, mask, (low, high), segments, giving)


def receiver_kurtosis(
    attention: AttentionLike,
    response_mask: ArrayLike | None = None,
    horizon: HorizonLike = RECEIVER_HORIZON,
    segment_ids: ArrayLike | None = None,
    minimum_rows: IntLike = 10,
    value_norms: ArrayLike | None = None,
) -> Float[Tensor, "batch head"]:
    """Return how selective each head's inbound attention is: the kurtosis of FAI over tokens.

    The token-level "column-wise kurtosis" of arXiv 2510.13554v2 (after arXiv 2506.19143): Fisher's
    kurtosis (0 for a normal distribution; biased) of what each response token receives from the later
    rows in its horizon; at least -2. NaN where it is undefined: fewer than four tokens with a value,
    or all values equal. It grows with the length of a response; `receiver_gini` does not.

    Two things would look like selectivity, and are left out. Near rows, by the default horizon: a head
    that looks at its neighbour gives every token the same sum, divided by fewer and fewer later rows. And
    the last tokens, whose horizon holds fewer than `minimum_rows` rows: a mean over one or two rows is so
    much noisier than the others that the end of the response alone can decide the result (of the 20 most
    selective heads of SmolLM2-135M on one answer, 17 peaked on the last token).

    `value_norms` are as in `future_attention_influence`.

    Raises:
        PatternError: an invalid pattern.
        ParameterError: an invalid horizon or number of rows, or a mask that does not fit.

    >>> pattern = torch.zeros(8, 8)
    >>> pattern[:, 0] = 1.0
    >>> receiver_kurtosis(pattern, horizon=(1, None), minimum_rows=1)
    tensor([[2.1667]])
    """
    return _token_selectivity(
        attention, response_mask, horizon, segment_ids, minimum_rows, value_norms
    ).kurtosis


def receiver_gini(
    attention: AttentionLike,
    response_mask: ArrayLike | None = None,
    horizon: HorizonLike = RECEIVER_HORIZON,
    segment_ids: ArrayLike | None = None,
    minimum_rows: IntLike = 10,
    value_norms: ArrayLike | None = None,
) -> Float[Tensor, "batch head"]:
    """Return how selective each head's inbound attention is: the Gini coefficient of FAI over tokens.

    Of the same values as `receiver_kurtosis`; in `[0, 1)`. NaN where it is undefined: fewer than four tokens
    with a value, or all values 0. A sample's kurtosis is bounded by the number of tokens, and heavy-tailed
    values come near that bound, so a mean of kurtosis over responses is that of the long ones; the Gini
    coefficient of the same spread is the same at any length. `value_norms` are as in
    `future_attention_influence`.

    Raises:
        PatternError: an invalid pattern.
        ParameterError: an invalid horizon or number of rows, or a mask that does not fit.

    >>> pattern = torch.zeros(8, 8)
    >>> pattern[:, 0] = 1.0
    >>> receiver_gini(pattern, horizon=(1, None), minimum_rows=1)
    tensor([[0.8571]])
    """
    return _token_selectivity(attention, response_mask, horizon, segment_ids, minimum_rows, value_norms).gini


def _token_selectivity(
    attention: AttentionLike,
    response_mask: ArrayLike | None,
    horizon: HorizonLike,
    segment_ids: ArrayLike | None,
    minimum_rows: IntLike,
    value_norms: ArrayLike | None,
) -> Selectivity:
    minimum_rows = whole_number(minimum_rows, "minimum_rows", minimum=1)
    horizon = check_horizon(horizon)
    attention = as_attention(attention)
    mask = check_mask(attention, response_mask)
    segments = check_segments(attention, segment_ids)
    received = received_by_key(attention, mask, horizon) * _check_norms(attention, value_norms)
    return selectivity_of(received, mask, horizon, segments, minimum_rows)


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
    ids = _token_numbers(attention, sentence_ids, "sentence_ids")
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
    read = attention.attend(mean.nan_to_num())
    pooled = torch.einsum("btr,bhts->bhrs", mean.nan_to_num(), read)
    missing = (length == 0)[:, None]
    return pooled.masked_fill(missing[..., None, :] | missing[..., :, None], torch.nan)


def token_entropy(
    logits: ArrayLike,
    response_mask: ArrayLike | None = None,
) -> Float[Tensor, "batch token"]:
    """Return the entropy, in nats, of the distribution that each token was sampled from.

    `H[t] = -sum over v of p(v) log p(v)` (Sec. 4.1 of arXiv 2510.13554v2), where p is the softmax of the
    logits at position `t - 1`; in `[0, log vocabulary]`. NaN for the first token, and outside the response,
    if a mask is given.

    Raises:
        ParameterError: logits that are not floating point `[batch, token, vocabulary]`, or a mask that does
            not fit.
        PatternError: logits that are NaN.

    >>> token_entropy(torch.zeros(1, 2, 4))
    tensor([[   nan, 1.3863]])
    """
    logits = as_tensor(logits, "logits")
    if logits.ndim != 3 or not logits.is_floating_point() or logits.numel() == 0:
        raise ParameterError(f"logits must be floating point [batch, token, vocabulary]; got {brief(logits)}")
    entropy = torch.full(logits.shape[:2], torch.nan, device=logits.device)
    entropy[:, 1:] = distribution_entropy(logits[:, :-1])
    if response_mask is None:
        return entropy
    mask = as_mask(response_mask, "response_mask", tuple(logits.shape[:2]), device=logits.device)
    return entropy.masked_fill(~mask, torch.nan)


def distribution_entropy(logits: ArrayLike) -> Float[Tensor, "*axes"]:
    """Return the entropy, in nats, of the softmax of logits, in float32 and a few tokens at a time.

    Raises:
        PatternError: logits that are NaN.
    """
    logits = as_tensor(logits, "logits")
    if logits.ndim < 1 or not logits.is_floating_point() or logits.numel() == 0:
        raise ParameterError(f"logits must be floating point [..., vocabulary]; got {brief(logits)}")
    flat = logits.detach().reshape(-1, logits.shape[-1])
    entropy = torch.empty(flat.shape[0], device=logits.device)
    size = max(1, 2**22 // flat.shape[-1])
    for begin in range(0, flat.shape[0], size):
        # entr is -p log p, and 0 where a logit of minus infinity gives probability 0.
        term = torch.special.entr(flat[begin : begin + size].float().softmax(-1))
        entropy[begin : begin + size] = term.sum(-1)
    if bool(entropy.isnan().any()):
        raise PatternError("the model's logits contain NaN: entropy is undefined")
    return entropy.clamp_(min=0.0).view(logits.shape[:-1])


def as_attention(attention: AttentionLike) -> Attention:
    """Return an `Attention`: the one given, or one made from a pattern `[batch, head, query, key]`.

    Metrics describe whole sequences, so a cached pass, with more keys than queries, is refused.

    Raises:
        PatternError: an invalid pattern, or one with more keys than queries.
    """
    if not isinstance(attention, Attention):
        attention = DenseAttention(attention)
    if attention.query_offset != 0:
        raise PatternError(
            f"metrics need a whole forward pass: got {attention.query_count} queries for "
            f"{attention.key_count} keys. Measure the finished sequence instead of cached steps"
        )
    return attention


def check_mask(
    attention: Attention, mask: ArrayLike | None, name: str = "response_mask"
) -> Bool[Tensor, "batch token"]:
    """Return a mask of tokens on the attention's device, all True for None, or raise `ParameterError`."""
    expected = (attention.batch_size, attention.query_count)
    if mask is None:
        return torch.ones(expected, dtype=torch.bool, device=attention.device)
    return as_mask(mask, name, expected, device=attention.device)


def _check_norms(attention: Attention, norms: ArrayLike | None) -> Tensor | float:
    """Return the norms of values on the attention's device, 1 for None, or raise `ParameterError`."""
    if norms is None:
        return 1.0
    shape = (attention.batch_size, attention.head_count, attention.key_count)
    values = as_float_tensor(norms, "value_norms", shape, axes="example, head, token")
    values = finite(
        values.to(device=attention.device, dtype=attention.dtype), "value_norms", "example, head, token"
    )
    if bool((values < 0).any()):
        raise ParameterError(f"value_norms are norms, at least 0; got {float(values.min()):.3g}")
    return values


def check_segments(attention: Attention, segment_ids: ArrayLike | None) -> Int[Tensor, "batch token"] | None:
    """Return the sequence number of each token on the attention's device, or raise `ParameterError`."""
    return None if segment_ids is None else _token_numbers(attention, segment_ids, "segment_ids")


def _token_numbers(attention: Attention, value: ArrayLike, name: str) -> Int[Tensor, "batch token"]:
    numbers = as_tensor(value, name)
    expected = (attention.batch_size, attention.query_count)
    whole = not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
    if tuple(numbers.shape) != expected or not whole:
        raise ParameterError(f"{name} must be whole numbers {list(expected)}; got {brief(numbers)}")
    return numbers.to(attention.device).long()


def check_window(window: IntLike) -> int:
    """Return a WAAD window, or raise `ParameterError`."""
    return whole_number(window, "window", minimum=1)


def check_horizon(horizon: Any) -> Horizon:
    """Return a horizon `(low, high)` with `0 <= low <= high`, or `high` None, or raise `ParameterError`.

    >>> check_horizon([10, None])
    (10, None)
    """
    is_array = isinstance(horizon, Tensor) or type(horizon).__module__ == "numpy"
    parts: Any = horizon.tolist() if is_array else horizon
    if isinstance(parts, list | tuple) and len(parts) == 2:
        low, high = parts
        try:
            low = whole_number(low, "low")
            return low, None if high is None else whole_number(high, "high", minimum=low)
        except ParameterError:
            pass
    raise ParameterError(
        "a horizon must be (low, high) in whole tokens with 0 <= low <= high, or high=None for the end "
        f"of the response; got {brief(horizon)}"
    )

"""The metrics as pure functions of one layer's attention: an `Attention`, or a pattern tensor.

All but kurtosis and Gini coefficients are linear in the attention, so the metric of a mean of heads is the
mean of the heads' metrics: values are kept per head, and groups are chosen afterwards. Definitions are those
of arXiv 2510.13554v2. Undefined values are NaN: those outside the response, and those whose horizon holds no
row. Every function takes the attention, then the response mask `[batch, token]`; without one, all tokens are
response. The probes call them, and users with a pattern of their own, who find the metrics of sentences here
too (sentence_metrics).

What is left to others: what the arguments may be (metric_arguments), the sums behind the metrics
(reductions), running the model (adapters), going over layers (statistics_probe), choosing head groups
(heads), and averaging over them (scores).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.attention.kernels import piece_bytes
from attnprobe.errors import ParameterError, PatternError
from attnprobe.metric_arguments import (
    AttentionLike,
    HorizonLike,
    as_attention,
    check_horizon,
    check_mask,
    check_norms,
    check_segments,
    check_window,
)
from attnprobe.reductions import (
    RECEIVER_HORIZON,
    TRAINING_HORIZON,
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
from attnprobe.sentence_metrics import (
    sentence_attention,
    sentence_influence,
    sentence_receiver_gini,
    sentence_receiver_kurtosis,
    sentence_selectivity,
)
from attnprobe.validation import ArrayLike, IntLike, as_mask, as_tensor, brief, whole_number

__all__ = [
    "AttentionLike",
    "HorizonLike",
    "attention_share",
    "distribution_entropy",
    "future_attention_influence",
    "mean_attention_distance",
    "mean_attention_distance_ignoring",
    "receiver_gini",
    "receiver_kurtosis",
    "sentence_attention",
    "sentence_influence",
    "sentence_receiver_gini",
    "sentence_receiver_kurtosis",
    "sentence_selectivity",
    "token_entropy",
    "windowed_attention_distance",
]


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
    return mean_over_rows(attention.mean_distance(), mask)


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
    received = received_by_key(attention, giving, (low, high)) * check_norms(attention, value_norms)
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
    received = received_by_key(attention, mask, horizon) * check_norms(attention, value_norms)
    return selectivity_of(received, mask, horizon, segments, minimum_rows)


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
    # Two numbers of four bytes for each logit stay in a processor's cache.
    size = max(1, piece_bytes(logits.device.type) // (8 * flat.shape[-1]))
    for begin in range(0, flat.shape[0], size):
        log_probability = flat[begin : begin + size].float().log_softmax(-1)
        probability = log_probability.exp()
        # A logit of minus infinity has probability 0, and adds nothing. `torch.special.entr` sees to that
        # too, but takes logarithms one by one: twice as long in all.
        log_probability.clamp_(min=torch.finfo(torch.float32).min)
        entropy[begin : begin + size] = -probability.mul_(log_probability).sum(-1)
    if bool(entropy.isnan().any()):
        raise PatternError("the model's logits contain NaN: entropy is undefined")
    return entropy.clamp_(min=0.0).view(logits.shape[:-1])

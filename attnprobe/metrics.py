"""The metrics as pure functions of one layer's attention: an `Attention`, or a pattern tensor.

Each is linear in the attention (kurtosis aside), so the metric of a mean of heads is the mean of the
heads' metrics: values are kept per head, and groups are chosen afterwards. Definitions are those of
arXiv 2510.13554v2. Undefined is NaN: outside the response, and where a horizon holds no row. Every function
takes the attention, then the response mask `[batch, token]`; without one, all tokens are response.

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
from attnprobe.validation import ArrayLike, IntLike, as_mask, as_tensor, brief, whole_number

Horizon = tuple[int, int | None]

if TYPE_CHECKING:
    AttentionLike: TypeAlias = Attention | ArrayLike
    HorizonLike: TypeAlias = Horizon | Sequence[IntLike | None] | ArrayLike
else:
    AttentionLike = HorizonLike = Any

RECEIVER_HORIZON: Horizon = (10, None)
"""The horizon of receiver kurtosis: near rows are left out."""

WIDEST_BAND = 128
"""A horizon wider than this is summed by `receive`, whose cost does not grow with it, instead of from a
band, whose memory does."""


def mean_attention_distance(
    attention: AttentionLike, response_mask: ArrayLike | None = None
) -> Float[Tensor, "batch head"]:
    """Return the span of each head: its mean backward distance over response rows, in tokens.

    Eq. 7 of arXiv 2510.13554v2: `1/|R| * sum over t in R, s <= t of A[t, s] * (t - s)`; in
    `[0, T - 1]`. Prompt rows and padding never count. A sink's share of a row counts as distance 0.

    Raises:
        PatternError: an invalid pattern.
        ParameterError: a mask that does not fit.

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


def windowed_attention_distance(
    attention: AttentionLike,
    response_mask: ArrayLike | None = None,
    window: IntLike = 10,
) -> Float[Tensor, "batch head token"]:
    """Return WAAD of each token: its mean backward distance, each distance cut off at the window.

    Eq. 9 of arXiv 2510.13554v2: `sum over s <= t of A[t, s] * min(t - s, W)`; in `[0, W]`. NaN outside
    the response, if one is given.

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
    horizon: HorizonLike = (10, 50),
    segment_ids: ArrayLike | None = None,
) -> Float[Tensor, "batch head token"]:
    """Return FAI of each response token: the mean attention that later response tokens give it.

    Eq. 10 of arXiv 2510.13554v2: the mean of `A[t, s]` over the response rows `t` with
    `s + low <= t <= s + high`; `high=None` runs to the end of the response (App. A.1). In `[0, 1]`.
    NaN outside the response, and for tokens so late that no row lies within the horizon.
    In packed rows give `segment_ids`, so that rows of another sequence do not count.

    Raises:
        PatternError: an invalid pattern.
        ParameterError: a horizon that is negative or empty, or a mask that does not fit.

    >>> pattern = torch.tensor([[1.0, 0.0], [0.75, 0.25]])
    >>> future_attention_influence(pattern, torch.ones(1, 2, dtype=torch.bool), horizon=(1, None))
    tensor([[[0.7500,    nan]]])
    """
    low, high = check_horizon(horizon)
    attention = as_attention(attention)
    mask = check_mask(attention, response_mask)
    segments = check_segments(attention, segment_ids)
    received = received_by_key(attention, mask, (low, high))
    return influence_of(received, mask, (low, high), segments)


def receiver_kurtosis(
    attention: AttentionLike,
    response_mask: ArrayLike | None = None,
    horizon: HorizonLike = RECEIVER_HORIZON,
    segment_ids: ArrayLike | None = None,
    minimum_rows: IntLike = 10,
) -> Float[Tensor, "batch head"]:
    """Return how selective each head's inbound attention is: the kurtosis of FAI over tokens.

    The token-level "column-wise kurtosis" of arXiv 2510.13554v2 (after arXiv 2506.19143): Fisher's
    kurtosis (0 for a normal distribution; biased) of what each response token receives from the later
    rows of the horizon, at least -2. NaN where it is undefined: fewer than two tokens with a value,
    or all values equal.

    Two parts of a response would pass for selectivity, and are left out. Near rows, by the default
    horizon: a head that looks at its neighbour gives every token the same sum, divided by fewer and
    fewer later rows. And the last tokens, whose horizon holds fewer than `minimum_rows` rows: a mean
    over one or two rows is so much noisier than the others that the end of the response alone can
    decide (of the 20 most selective heads of SmolLM2-135M on one answer, 17 peaked on the last token).

    Raises:
        PatternError: an invalid pattern.
        ParameterError: a horizon, mask or number of rows that does not fit.
    """
    minimum_rows = whole_number(minimum_rows, "minimum_rows", minimum=1)
    horizon = check_horizon(horizon)
    attention = as_attention(attention)
    mask = check_mask(attention, response_mask)
    segments = check_segments(attention, segment_ids)
    received = received_by_key(attention, mask, horizon)
    return selectivity_of(received, mask, horizon, segments, minimum_rows)


def sentence_receiver_kurtosis(
    attention: AttentionLike,
    sentence_ids: ArrayLike,
    min_distance: IntLike = 4,
) -> Float[Tensor, "batch head"]:
    """Return how selective each head's inbound attention is, sentence by sentence.

    The variant of Thought Anchors (arXiv 2506.19143): attention is pooled to a mean for each pair of
    sentences; a sentence's vertical score is the mean of what the sentences at least `min_distance`
    after it give it; the result is Fisher's kurtosis (biased) of these scores, at least -2. NaN where it
    is undefined: fewer than two sentences with a score (so fewer than `min_distance + 2` in all), or all
    scores equal.

    `sentence_ids` counts the sentences of a response from 0, with -1 outside it.

    Raises:
        PatternError: an invalid pattern.
        ParameterError: ids or a distance that do not fit.
    """
    min_distance = whole_number(min_distance, "min_distance", minimum=1)
    pooled = sentence_attention(attention, sentence_ids)
    count = pooled.shape[-1]
    near = torch.ones(count, count, dtype=torch.bool, device=pooled.device).triu(1 - min(min_distance, count))
    return kurtosis(pooled.masked_fill(near, torch.nan).nanmean(-2))


def sentence_attention(
    attention: AttentionLike, sentence_ids: ArrayLike
) -> Float[Tensor, "batch head sentence sentence"]:
    """Return the mean attention between sentences: rows are the later ones, columns what they read.

    The mean of `A[t, s]` over the tokens t of one sentence and s of another, in `[0, 1]`; NaN for
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
    # Undefined sentences must not reach the operator: NaN times 0 would spread over every token.
    read = attention.attend(mean.nan_to_num())
    pooled = torch.einsum("btr,bhts->bhrs", mean.nan_to_num(), read)
    missing = (length == 0)[:, None]
    return pooled.masked_fill(missing[..., None, :] | missing[..., :, None], torch.nan)


# ---- the parts that can be added up over the steps of a KV cache ------------------------------


def near_band(
    attention: Attention, window: int, horizon: Horizon
) -> Float[Tensor, "batch head query distance"] | None:
    """Return the one band that serves both WAAD and FAI; None where no band serves both well."""
    low, high = _distances_within(attention, horizon)
    width = max(min(window, attention.key_count), high + 1)
    return attention.band(width) if _goes_by_band(attention, low, high) and width <= WIDEST_BAND else None


def windowed_distance_by_row(
    attention: Attention,
    window: int,
    near: Float[Tensor, "batch head query distance"] | None = None,
) -> Float[Tensor, "batch head query"]:
    """Return WAAD (Eq. 9) of each row, for any queries; `near` is the band from distance 0, if at hand.

    A window beyond the first key cuts nothing off: it costs no more than the keys that there are.
    """
    window = min(window, attention.key_count)
    if window == attention.key_count and near is None:
        # No distance is cut off: the plain mean distance, which needs no band as wide as the text.
        return attention.mean_distance().clamp(min=0.0)
    # min(t - s, W) is W less what the near keys fall short of it: far keys need no look.
    waad = window * attention.row_mass()
    # A piece at a time, so that memory does not grow with the window.
    for start in range(0, window, WIDEST_BAND):
        stop = min(start + WIDEST_BAND, window)
        piece = attention.band(stop - start, start) if near is None else near[..., start:stop]
        distance = torch.arange(start, stop, device=attention.device, dtype=attention.dtype)
        waad = waad - piece @ (window - distance)
    # Rounding can leave a first token, which sees itself alone, a hair below 0.
    return waad.clamp(min=0.0)


def received_by_key(
    attention: Attention,
    rows: Bool[Tensor, "batch query"],
    horizon: Horizon,
    near: Float[Tensor, "batch head query distance"] | None = None,
) -> Float[Tensor, "batch head key"]:
    """Return what each key is given by the marked rows within the horizon: the numerator of Eq. 10.

    `near` is the band from distance 0, if at hand.
    """
    low, high = _distances_within(attention, horizon)
    weights = rows.to(attention.dtype)
    if not _goes_by_band(attention, low, high):
        return attention.receive(weights[..., None], start=low, stop=high + 1)[..., 0]
    width = high - low + 1
    band = attention.band(width, low) if near is None else near[..., low : high + 1]
    band = band * weights[:, None, :, None]
    # Key s is given band[t, j] by the query that stands at s + low + j: a diagonal of the band, which a
    # stride of one more than a row walks. Rows of zeros stand in for queries before and after.
    first = low - attention.query_offset
    padding = max(0, -first)
    padded = torch.nn.functional.pad(band, (0, 0, padding, low + width - 1)).contiguous()
    shape = (*band.shape[:2], attention.key_count, width)
    strides = (*padded.stride()[:3], width + 1)
    return padded.as_strided(shape, strides, (first + padding) * width).sum(-1)


def _distances_within(attention: Attention, horizon: Horizon) -> tuple[int, int]:
    """Return the nearest and the farthest distance of a horizon at which there are keys.

    A horizon that lies beyond all keys gives `(key_count, key_count)`, where nothing is.
    """
    low, high = horizon
    farthest = attention.key_count - 1
    low = min(low, farthest + 1)
    return low, max(low, farthest if high is None else min(high, farthest))


def _goes_by_band(attention: Attention, low: int, high: int) -> bool:
    """Whether a horizon is summed from a band.

    A band pays where there are more rows than distances; a cached step has one row.
    """
    width = high - low + 1
    return width <= min(WIDEST_BAND, attention.query_count)


def influence_of(
    received: Float[Tensor, "batch head token"],
    response_mask: Bool[Tensor, "batch token"],
    horizon: Horizon,
    segment_ids: Int[Tensor, "batch token"] | None = None,
) -> Float[Tensor, "batch head token"]:
    """Return FAI from what each token was given: Eq. 10 divides by the response rows in its horizon."""
    count = _rows_in_horizon(response_mask, *horizon, segment_ids)
    defined = response_mask & (count > 0)
    influence = received / count.clamp(min=1)[:, None].to(received.dtype)
    return influence.masked_fill(~defined[:, None], torch.nan)


def selectivity_of(
    received: Float[Tensor, "batch head token"],
    response_mask: Bool[Tensor, "batch token"],
    horizon: Horizon = RECEIVER_HORIZON,
    segment_ids: Int[Tensor, "batch token"] | None = None,
    minimum_rows: int = 10,
) -> Float[Tensor, "batch head"]:
    """Return receiver kurtosis from what each token was given, over the tokens that enough rows speak for."""
    influence = influence_of(received, response_mask, horizon, segment_ids)
    minimum_rows = min(minimum_rows, response_mask.shape[1] + 1)
    rows = _rows_in_horizon(response_mask, *horizon, segment_ids)
    return kurtosis(influence.masked_fill((rows < minimum_rows)[:, None], torch.nan))


def kurtosis(values: ArrayLike) -> Float[Tensor, "*axes"]:
    """Return Fisher's biased kurtosis over the last axis, leaving out NaN; NaN where undefined.

    Raises:
        ParameterError: values that are not floating point, or none.

    >>> kurtosis(torch.tensor([0.0, 0.0, 0.0, 1.0, torch.nan]))
    tensor(-0.6667)
    >>> kurtosis(torch.ones(5))
    tensor(nan)
    """
    values = as_tensor(values, "values")
    if not values.is_floating_point() or values.numel() == 0 or values.ndim == 0:
        raise ParameterError(f"values must be floating point [..., token]; got {brief(values)}")
    wide = values.double()
    mean = wide.nanmean(-1, keepdim=True)
    deviation = wide - mean
    variance = deviation.square().nanmean(-1)
    # Equal values can leave a variance of rounding errors, whose kurtosis would be noise.
    largest = wide.abs().nan_to_num().amax(-1)
    constant = variance <= (largest * torch.finfo(values.dtype).eps).square()
    result = deviation.pow(4).nanmean(-1) / variance.square() - 3
    return result.masked_fill(constant, torch.nan).to(values.dtype)


def token_entropy(
    logits: ArrayLike,
    response_mask: ArrayLike | None = None,
) -> Float[Tensor, "batch token"]:
    """Return the entropy, in nats, of the distribution that each token was sampled from.

    `H[t] = -sum over v of p(v) log p(v)` (Sec. 4.1 of arXiv 2510.13554v2), of the logits at position
    `t - 1`; in `[0, log vocabulary]`. NaN for the first token, and outside the response, if given.

    Raises:
        ParameterError: shapes that do not fit.
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


def distribution_entropy(logits: Float[Tensor, "*axes vocabulary"]) -> Float[Tensor, "*axes"]:
    """Return the entropy, in nats, of each row of logits, in float32 and a few rows at a time.

    Raises:
        PatternError: logits that are NaN.
    """
    flat = logits.detach().flatten(0, -2)
    entropy = torch.empty(flat.shape[0], device=logits.device)
    size = max(1, 2**22 // flat.shape[-1])
    for begin in range(0, flat.shape[0], size):
        # entr is -p log p, and 0 for the probability 0 of a logit of minus infinity.
        term = torch.special.entr(flat[begin : begin + size].float().softmax(-1))
        entropy[begin : begin + size] = term.sum(-1)
    if bool(entropy.isnan().any()):
        raise PatternError("the model's logits hold NaN: entropy is undefined")
    return entropy.clamp_(min=0.0).view(logits.shape[:-1])


def as_attention(attention: AttentionLike) -> Attention:
    """Return an `Attention`: the one given, or a pattern `[batch, head, query, key]` made one.

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


def check_mask(attention: Attention, mask: ArrayLike | None) -> Bool[Tensor, "batch token"]:
    """Return a response mask on the attention's device, or raise `ParameterError`; None: all tokens."""
    expected = (attention.batch_size, attention.query_count)
    if mask is None:
        return torch.ones(expected, dtype=torch.bool, device=attention.device)
    return as_mask(mask, "response_mask", expected, device=attention.device)


def check_segments(attention: Attention, segment_ids: ArrayLike | None) -> Int[Tensor, "batch token"] | None:
    """Return the sequence of each token on the attention's device, or raise `ParameterError`."""
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
    """Return a horizon `(low, high)` with `0 <= low <= high`, high None for the end, or raise.

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
        "a horizon is (low, high) in whole tokens with 0 <= low <= high, or high=None for the end "
        f"of the response; got {brief(horizon)}"
    )


def _rows_in_horizon(
    mask: Tensor, low: int, high: int | None, segment_ids: Tensor | None
) -> Int[Tensor, "batch token"]:
    """Count the response rows in each token's horizon, within its own sequence."""
    count = mask.shape[1]
    # Beyond the text there are no rows, however far beyond.
    low, high = min(low, count), None if high is None else min(high, count)
    before = torch.nn.functional.pad(mask.long().cumsum(-1), (1, 0))
    token = torch.arange(count, device=mask.device).expand(mask.shape)
    end = torch.full_like(token, count - 1)
    if segment_ids is not None:
        ids = segment_ids.to(mask.device)
        borders = torch.ones_like(mask)
        borders[:, :-1] = ids[:, 1:] != ids[:, :-1]
        # The last token of each sequence: the nearest border at or after the token.
        ends = token.masked_fill(~borders, count)
        end = ends.flip(-1).cummin(-1).values.flip(-1)
    first = (token + low).clamp(max=count)
    last = end if high is None else torch.minimum(token + high, end)
    stop = torch.maximum(last + 1, first).clamp(max=count)
    return before.gather(-1, stop) - before.gather(-1, first)

"""The check of what was read from an attention call against the model's own attention output.

A family, or a user's own attention function, may do something that its call does not say: another scale, a
soft cap, a sink, a window. `OutputCheck` therefore computes a few rows of the output from what was read, and
compares them with the model's. A reading makes one and shows it every call.

Rounding makes them differ too, by an amount that depends on the dtype, the scores and the values. So each
entry of the output has a bound of its own: how far can rounding change the scores, then the probabilities,
then the output? A fixed tolerance cannot do this: large enough for bfloat16 and large scores, it lets
anything pass. In 16 bits, where this bound leaves room for small errors, a second test asks whether the
differences have a direction: rounding makes an output neither hotter (as if all scores were larger) nor
heavier.

What is left to others: reading the call (attention_call), and what happens after an error (reading).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.adapters.attention_call import AttentionCall
from attnprobe.attention.block_scores import BlockScores
from attnprobe.attention.factored import FactoredAttention
from attnprobe.errors import IncompleteRunError

_ROWS = {False: 4, True: 8}
"""How many queries of a call are checked, evenly spaced; more in 16 bits, where each says less."""

_STEP = 32
"""While single tokens are generated, the first call of a layer is checked, and then one in this many."""

_UNDECIDED = 100.0
"""If rounding can make a row's denominator this much larger, any key may win, and the row says nothing."""

_SUSPICIOUS = 0.8
"""How large the direction of the differences must be to be looked into; ordinary inputs give 0.5 or less."""

_SINGLE = torch.finfo(torch.float32).eps / 2


class OutputCheck:
    """Compares calls with what was read from them: every call of several queries, some of single ones."""

    def __init__(self) -> None:
        # For each attention module, how many single queries came since its last call of several.
        self._single: dict[int, int] = {}
        self._count = 0

    def check(self, attention: FactoredAttention, call: AttentionCall, where: str) -> None:
        """Check a call; `where` names its layer and model.

        In a step of generation, a check would cost a good part of the attention itself, so most steps are
        left out. What a layer does to its attention does not change from step to step, windows aside, which
        is why the check is repeated at all.

        Raises:
            IncompleteRunError: the output is not what was read from the call.
        """
        if attention.query_count > 1:
            self._single.pop(id(call.module), None)
        else:
            count = self._single.get(id(call.module), 0)
            self._single[id(call.module)] = count + 1
            if count % _STEP:
                return
        check_against_output(attention, call, where, self._count)
        self._count += 1


def check_against_output(
    attention: FactoredAttention, call: AttentionCall, where: str, number: int = 0
) -> None:
    """Check that some rows of the attention give the model's own attention output.

    They are evenly spaced, and others for each `number`: the layers of a pass cover more rows together.
    Where scores are so large that rounding decides which key wins (in bfloat16 from about a hundred on), any
    mixture of the values is possible, and a row says nothing: it passes. So does padding, which sees nothing.

    Raises:
        IncompleteRunError: they do not.
    """
    assert call.output is not None
    with torch.no_grad(), torch.autocast(call.query.device.type, enabled=False):
        rounding = _Rounding.of_call(call)
        rows = _Rows.of_call(attention, call, number)
        actual = call.output.detach()[:, rows.queries].transpose(1, 2).to(rows.output.dtype)
        if actual.shape != rows.output.shape:
            raise _unknown(
                where,
                call,
                f"is {list(call.output.shape)}, which does not fit values of {list(call.value.shape)}",
            )
        change, growth = _probability_change(rows, rounding)
        bound = _mixed(change, rows.value.abs()) + rounding.unit * rows.output.abs() + rounding.smallest
        # Where nothing is seen, implementations disagree: NaN, zeros, or a mean of all values.
        mute = ~rows.seeing | (growth > _UNDECIDED)
        difference = (actual - rows.output).masked_fill_(mute, 0.0)
        sums = (attention.log_sum_exp()[:, :, rows.queries, None] - rows.log_sum_exp).masked_fill_(mute, 0.0)
        sums_bound = growth.log() + rounding.exponential + 4 * _SINGLE * (1.0 + rows.log_sum_exp.abs())
        excess, sums_excess = torch.stack(
            [(difference.abs() / bound).amax(), (sums.abs() / sums_bound).amax()]
        ).tolist()
        if not excess <= 1.0:
            raise _unknown(where, call, _largest(difference, bound, rows, rounding))
        if not sums_excess <= 1.0:
            raise _unknown(
                where,
                call,
                f"comes with log-sum-exps that differ by {float(sums.abs().max()):.3g} from those of its "
                f"query, key and mask ({sums_excess:.3g} times what rounding explains)",
            )
        if rounding.dtype.itemsize == 2:
            _check_direction(rows, rounding, change, difference, call, where)


# ---- what was read ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Rows:
    """Some rows of an attention, and the output that they give.

    They are normalized here, and not with `FactoredAttention.log_sum_exp`, so that a kernel's number is
    checked.
    """

    queries: slice | Tensor
    scores: BlockScores
    query: Float[Tensor, "batch head row d"]
    key: Float[Tensor, "batch key_head key d"]
    value: Float[Tensor, "batch value_head key value_d"]
    sinks: Float[Tensor, "head 1 1"] | None
    score: Float[Tensor, "batch head row key"]
    log_sum_exp: Float[Tensor, "batch head row 1"]
    probability: Float[Tensor, "batch head row key"]
    output: Float[Tensor, "batch head row value_d"]
    seeing: Bool[Tensor, "batch head row 1"]

    @staticmethod
    def of_call(attention: FactoredAttention, call: AttentionCall, number: int) -> _Rows:
        scores = attention.scores
        queries = _chosen_queries(attention, _ROWS[call.query.dtype.itemsize == 2], number)
        score = scores.block(queries, slice(0, attention.key_count))
        top = score.amax(-1, keepdim=True)
        seeing = top > -torch.inf
        sinks = call.options.get("s_aux")
        if sinks is not None:
            sinks = sinks.detach().to(score.dtype)[:, None, None]
            top = torch.maximum(top, sinks)
        top = top.masked_fill_(~seeing, 0.0)
        probability = (score - top).exp_()
        total = probability.sum(-1, keepdim=True)
        if sinks is not None:
            total += (sinks - top).exp_()
        total.masked_fill_(~seeing, 1.0)
        probability /= total
        log_sum_exp = total.log_().add_(top)
        value = call.value[:, :, : attention.key_count].detach().to(score.dtype)
        return _Rows(
            queries,
            scores,
            scores.query[:, :, queries].to(score.dtype),
            scores.key.to(score.dtype),
            value,
            sinks,
            score,
            log_sum_exp,
            probability,
            _mixed(probability, value),
            seeing,
        )

    @property
    def bias(self) -> Float[Tensor, "#batch #head row key"] | None:
        """What is added to the scores."""
        bias = self.scores.bias
        return None if bias is None else bias[:, :, self.queries, : self.score.shape[-1]].to(self.score.dtype)


def _chosen_queries(attention: FactoredAttention, count: int, number: int) -> slice | Tensor:
    """Return which rows are checked: evenly spaced ones and, behind padding, the first.

    Under a short window, no other row tells whether padding is seen.
    """
    last = attention.query_count - 1
    step = max(1, last // (count - 1))
    # A slice, since picking rows by their numbers takes several times as long.
    # The first call's include the last row; the golden ratio spreads those of the next ones evenly between.
    spaced = slice((last - int(number * 0.618 * step)) % step, None, step)
    mask = attention.scores.mask
    if mask.plain or last == 0:
        return spaced
    begins = (~mask.sees_none()).any(1).byte().argmax(-1)
    return torch.cat([begins.amax()[None], torch.arange(last + 1, device=attention.device)[spaced]])


def _mixed(weights: Tensor, value: Tensor) -> Tensor:
    """Return the sums of values; heads that share values go into one product, so that none are copied."""
    grouped = weights.unflatten(1, (value.shape[1], -1)).flatten(2, 3)
    mixed: Tensor = (grouped @ value).view(*weights.shape[:3], -1)
    return mixed


# ---- what rounding can do ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Rounding:
    """How a call rounds.

    Attributes:
        dtype: the coarsest dtype of its tensors, autocast included.
        unit: the largest relative error of a rounded number (`u` in textbooks), at least float32's: eager
            attention computes its softmax in float32 even in a float64 model.
        score: the same for a score. A flash kernel that we have listened to keeps scores in float32.
        factor: the same for the entries of query and key that are multiplied.
        exponential: the relative error of a kernel's `exp`, which is an approximation.
        smallest: the distance between the numbers nearest to 0.
    """

    dtype: torch.dtype
    unit: float
    score: float
    factor: float
    exponential: float
    smallest: float

    @staticmethod
    def of_call(call: AttentionCall) -> _Rounding:
        assert call.output is not None
        device = call.query.device.type
        dtypes = [tensor.dtype for tensor in (call.query, call.key, call.value, call.output)]
        if torch.is_autocast_enabled(device):
            dtypes.append(torch.get_autocast_dtype(device))
        dtype = max(dtypes, key=lambda each: torch.finfo(each).eps)
        product = _product_roundoff(device)
        unit = max(torch.finfo(dtype).eps / 2, product)
        rounds_factors = torch.finfo(dtype).eps > torch.finfo(call.query.dtype).eps or (
            torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        )
        return _Rounding(
            dtype,
            unit,
            score=unit if call.flash is None else product,
            factor=unit if rounds_factors else product,
            # Measured: 5e-5 for flash attention on the CPU in 16 bits, 1e-6 in float32.
            exponential=2.0**-13 if dtype.itemsize == 2 else 40 * _SINGLE,
            smallest=torch.finfo(dtype).tiny * torch.finfo(dtype).eps,
        )


def _product_roundoff(device: str) -> float:
    """Return the unit roundoff of factors in float32 matrix products: TF32 and bfloat16 may be allowed."""
    backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    # Since torch 2.9 each backend has its own setting, and the old one cannot be read once a new one is set.
    matmul = getattr(backend, "matmul", None)
    precision = getattr(matmul, "fp32_precision", None) or torch.get_float32_matmul_precision()
    if precision == "none":
        precision = getattr(torch.backends, "fp32_precision", "ieee")
    return {"tf32": 2.0**-11, "high": 2.0**-11, "bf16": 2.0**-8, "medium": 2.0**-8}.get(precision, _SINGLE)


def _score_change(rows: _Rows, rounding: _Rounding) -> Float[Tensor, "batch head row key"]:
    """Return how far rounding can change each score, infinite where it is minus infinity.

    A product and its scaling are rounded, a soft cap three times more, and the difference to the row's
    maximum once. Products are sums, in float32, of rounded products: their errors follow the size of the
    terms, `sqrt(sum((q * k)**2))`, which is at most the product of the 4-norms. The factor 4 makes several
    standard deviations of it. A kernel rounds in this way, and so do we.
    """
    single = 2 * math.sqrt(rows.query.shape[-1]) * _SINGLE
    size = rows.score.abs()
    if rows.bias is not None:
        # A score and its bias may nearly cancel, but not their rounding errors.
        size += 2 * rows.bias.abs()
    # For the largest key of each head: a number for each key would cost as much as the rest.
    key_norm = _fourth_norm(rows.key).amax(-1, keepdim=True)  # [batch, key_head, 1]
    query_norm = _fourth_norm(rows.query).unflatten(1, (key_norm.shape[1], -1))  # [..., group, row]
    terms = (query_norm * key_norm[..., None]).flatten(1, 2)[..., None] * abs(rows.scores.scaling)
    same_for_row = terms * (4 * rounding.factor + single) + rows.log_sum_exp.abs() * rounding.score
    roundings = 3 if rows.scores.softcap is None else 6
    return size.mul_(roundings * rounding.score + single).add_(same_for_row)


def _fourth_norm(vectors: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(vectors.square(), dim=-1).sqrt_()
    return norm


def _probability_change(
    rows: _Rows, rounding: _Rounding
) -> tuple[Float[Tensor, "batch head row key"], Float[Tensor, "batch head row 1"]]:
    """Return how far rounding can change each probability, and how far each denominator can grow.

    If scores change by up to `d`, `p` becomes at most `p * exp(d) / sum(p * exp(-d))`, and the denominator is
    at least `1 / sum(p * exp(d))` (Cauchy and Schwarz); it falls by no more than it can rise.
    """
    probability = rows.probability
    # 1 / (1 - d) rather than exp(d): it is larger, and takes a sixth of the time. From 1 on, a change that
    # large leaves the row undecided.
    raised = probability / _score_change(rows, rounding).neg_().add_(1.0).clamp_(min=1e-4)
    growth = raised.sum(-1, keepdim=True)
    if rows.sinks is not None:
        distance = rows.sinks - rows.log_sum_exp
        change = (rows.sinks.abs() + distance.abs()) * (2 * rounding.unit)
        growth += distance.exp() / (1.0 - change).clamp_(min=1e-4)
    change = raised.mul_(growth).sub_(probability).clamp_(0.0, 1.0)
    # Its own rounding, that of the product with the values, and the smallest numbers (float16).
    change.add_(probability, alpha=2 * rounding.unit + rounding.exponential).add_(rounding.smallest)
    return change, growth


# ---- whether the differences have a direction -------------------------------------------------


def _check_direction(
    rows: _Rows,
    rounding: _Rounding,
    change: Float[Tensor, "batch head row key"],
    difference: Float[Tensor, "batch head row value_d"],
    call: AttentionCall,
    where: str,
) -> None:
    """Check that the differences do not make the output hotter or heavier.

    Rounding errors of different keys usually cancel in these sums, but not always: keys with equal scores are
    rounded alike. So if a sum is large, the rows are computed once more with rounding, as attention is
    usually computed; the sum is an error only if rounding does not give such a sum.

    Raises:
        IncompleteRunError: they do.
    """
    # Rows whose probabilities may change altogether say nothing about a direction.
    spread = _mixed(change.square(), rows.value.square())
    spread += change.square().sum(-1, keepdim=True) * rows.output.square()
    spread += (rounding.unit * rows.output).square() + rounding.smallest
    weight = (rows.seeing & (change.sum(-1, keepdim=True) < 4.0)) / spread
    mean = (rows.probability * rows.score.masked_fill(rows.score == -torch.inf, 0.0)).sum(-1, keepdim=True)
    centred = rows.probability * (rows.score - mean).masked_fill_(rows.score == -torch.inf, 0.0)
    hotter = _mixed(centred, rows.value) - rows.output * centred.sum(-1, keepdim=True)
    # How many times what rounding gives is too much: alike roundings of nearly equal scores make an output
    # heavier more easily than hotter, and kernels differ in them.
    for direction, meaning, allowed in (
        (hotter, "as if its scores were", 3.0),
        (rows.output, "as if its values were", 5.0),
    ):
        weighted = direction * weight
        length = (weighted * direction).sum((0, 2, 3)).sqrt().clamp(min=1e-30)  # [head]

        def along(differences: Tensor) -> Tensor:
            return (differences * weighted).sum((0, 2, 3)) / length  # noqa: B023

        found = along(difference)
        if float(found.abs().max()) <= _SUSPICIOUS:
            continue
        rounded = [
            along((output - rows.output).masked_fill_(~rows.seeing, 0.0)).nan_to_num()
            for output in _rounded(rows, rounding)
        ]
        usual = max(float(each.abs().max()) for each in rounded)
        nearest = min(float((found - each).abs().max()) for each in rounded)
        if nearest > _SUSPICIOUS and float(found.abs().max()) > allowed * usual:
            head = int(found.abs().argmax())
            factor = 1 + float(found[head] / length[head])
            raise _unknown(
                where,
                call,
                f"is not what its query, key and mask give: in head {head} it is {meaning} {factor:.4g} "
                f"times as large, {float(found.abs().max()) / max(usual, 1e-3):.3g} times what rounding to "
                f"{_name(rounding.dtype)} explains",
            )


def _rounded(rows: _Rows, rounding: _Rounding) -> Iterator[Float[Tensor, "batch head row value_d"]]:
    """Compute the rows' outputs with the rounding of three kinds of kernel."""
    dtype, scores = rounding.dtype, rows.scores
    value = rows.value.to(dtype)
    score = _mixed(rows.query.to(dtype), rows.key.to(dtype).mT) * scores.scaling
    if scores.softcap is not None:
        score = torch.tanh(score / scores.softcap) * scores.softcap
    if rows.bias is not None:
        score = score + rows.bias.to(dtype)
    score = score.masked_fill(rows.score == -torch.inf, -torch.inf)
    if rows.sinks is not None:
        score = torch.cat([score, rows.sinks.to(dtype).expand(*score.shape[:3], 1)], dim=-1)
        # gpt-oss subtracts the maximum before the softmax, and rounds once more.
        score = score - score.amax(-1, keepdim=True)
    probability = score.float().softmax(-1)[..., : rows.score.shape[-1]].to(dtype)
    yield _mixed(probability, value).to(rows.output.dtype)
    # A flash kernel rounds what is not yet normalized, with scores in float32.
    top = rows.score.amax(-1, keepdim=True).masked_fill(~rows.seeing, 0.0)
    unnormalized = (rows.score - top).exp().to(dtype)
    scale = (top - rows.log_sum_exp).exp()
    yield (_mixed(unnormalized, value).to(rows.output.dtype) * scale).to(dtype).to(rows.output.dtype)
    # A kernel that computes in float32 rounds the output only.
    yield rows.output.to(dtype).to(rows.output.dtype)


# ---- what an error says -----------------------------------------------------------------------


def _largest(difference: Tensor, bound: Tensor, rows: _Rows, rounding: _Rounding) -> str:
    """Describe the entry that is farthest beyond its bound."""
    ratio = (difference.abs() / bound).nan_to_num(torch.inf)
    place = torch.unravel_index(ratio.argmax(), ratio.shape)
    batch, head, row, _ = (int(index) for index in place)
    numbers = torch.arange(rows.scores.query.shape[2], device=difference.device)[rows.queries].tolist()
    return (
        f"differs by {float(difference[place].abs()):.3g} from what its query, key and mask give, where "
        f"rounding to {_name(rounding.dtype)} explains {float(bound[place]):.3g} (at batch {batch}, "
        f"head {head}, query {numbers[row]})"
    )


def _unknown(where: str, call: AttentionCall, what: str) -> IncompleteRunError:
    return IncompleteRunError(
        f"{where} does something to its attention that attnprobe does not know: its output {what}. Options "
        f"of the call: {sorted(call.options)}. This pass was discarded"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""What rounding can do to the rows of an attention call, from its scores to its output.

How far it can change each probability, as a bound, and what outputs usual kernels make of the same rows. The
check of an attention call compares these with what it finds (output_check). What is left to others: the rows
(checked_rows), and what counts as too much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.adapters.attention_call import AttentionCall
from attnprobe.adapters.checked_rows import Rows, mixed

SINGLE = torch.finfo(torch.float32).eps / 2
"""The unit roundoff of float32."""


@dataclass(frozen=True)
class Rounding:
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
    def of_call(call: AttentionCall) -> Rounding:
        """Return how a call rounds, under the settings that hold now."""
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
        return Rounding(
            dtype,
            unit,
            score=unit if call.flash is None else product,
            factor=unit if rounds_factors else product,
            # Measured: 5e-5 for flash attention on the CPU in 16 bits, 1e-6 in float32.
            exponential=2.0**-13 if dtype.itemsize == 2 else 40 * SINGLE,
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
    return {"tf32": 2.0**-11, "high": 2.0**-11, "bf16": 2.0**-8, "medium": 2.0**-8}.get(precision, SINGLE)


def _score_change(rows: Rows, rounding: Rounding) -> Float[Tensor, "batch head row key"]:
    """Return how far rounding can change each score, infinite where it is minus infinity.

    A product and its scaling are rounded, a soft cap three times more, and the difference to the row's
    maximum once. Products are sums, in float32, of rounded products: their errors follow the size of the
    terms, `sqrt(sum((q * k)**2))`, which is at most the product of the 4-norms. The factor 4 makes several
    standard deviations of it. A kernel rounds in this way, and so do we.
    """
    single = 2 * math.sqrt(rows.query.shape[-1]) * SINGLE
    size = rows.score.abs()
    if rows.bias is not None:
        # A score and its bias may nearly cancel, but not their rounding errors.
        size += 2 * rows.bias.abs()
    # For the largest key of each head: a number for each key would cost as much as the rest.
    key_norm = _fourth_norm(rows.key).amax(-1, keepdim=True)  # [batch, key_head, 1]
    query_norm = _fourth_norm(rows.query).unflatten(1, (key_norm.shape[1], -1))  # [..., group, row]
    terms = (query_norm * key_norm[..., None]).flatten(1, 2)[..., None] * abs(rows.scaling)
    same_for_row = terms * (4 * rounding.factor + single) + rows.log_sum_exp.abs() * rounding.score
    roundings = 3 if rows.softcap is None else 6
    return size.mul_(roundings * rounding.score + single).add_(same_for_row)


def _fourth_norm(vectors: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(vectors.square(), dim=-1).sqrt_()
    return norm


def probability_change(
    rows: Rows, rounding: Rounding
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


def rounded_outputs(rows: Rows, rounding: Rounding) -> Iterator[Float[Tensor, "batch head row value_d"]]:
    """Compute the rows' outputs with the rounding of three kinds of kernel."""
    dtype = rounding.dtype
    value = rows.value.to(dtype)
    score = mixed(rows.query.to(dtype), rows.key.to(dtype).mT) * rows.scaling
    if rows.softcap is not None:
        score = torch.tanh(score / rows.softcap) * rows.softcap
    if rows.bias is not None:
        score = score + rows.bias.to(dtype)
    score = score.masked_fill(rows.score == -torch.inf, -torch.inf)
    if rows.sinks is not None:
        score = torch.cat([score, rows.sinks.to(dtype).expand(*score.shape[:3], 1)], dim=-1)
        # gpt-oss subtracts the maximum before the softmax, and rounds once more.
        score = score - score.amax(-1, keepdim=True)
    probability = score.float().softmax(-1)[..., : rows.score.shape[-1]].to(dtype)
    yield mixed(probability, value).to(rows.output.dtype)
    # A flash kernel rounds what is not yet normalized, with scores in float32.
    top = rows.score.amax(-1, keepdim=True)
    if rows.unseeing is not None:
        top = top.masked_fill(rows.unseeing, 0.0)
    unnormalized = (rows.score - top).exp().to(dtype)
    scale = (top - rows.log_sum_exp).exp()
    yield (mixed(unnormalized, value).to(rows.output.dtype) * scale).to(dtype).to(rows.output.dtype)
    # A kernel that computes in float32 rounds the output only.
    yield rows.output.to(dtype).to(rows.output.dtype)

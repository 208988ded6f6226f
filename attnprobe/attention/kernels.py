"""Which kernel answers what, on which device: one table, and the products that depend on the device.

`row_sums`, `factored`, `block_scores` and `listening` ask `chosen` and do what it says. No other module of
`attnprobe.attention` names a device, so that a new one is a few rows here. Each row also says what the kernel
costs beyond the model's own pass and how it is tested: `markdown` shows the table, and docs/gpu.md holds it.

What is left to others: running the kernels (listening, fused_sums, row_sums, factored).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

aten = torch.ops.aten


class Question(Enum):
    """What a kernel is wanted for."""

    POSITIONS = "positions along the way"
    LOG_SUM_EXP = "log-sum-exp"
    ATTEND = "attend"
    RECEIVE = "receive"
    PRODUCT = "band, rows, column, blocks and tiles"


class Kernel(Enum):
    """What answers a question."""

    HEARD = "the model's own kernel, heard"
    WIDER = "the model's call of flash attention, three columns wider"
    FLASH = "flash attention over positions"
    FUSED = "FlexAttention, compiled"
    BLOCKS = "blocks of scores"
    TILES = "tiles"
    NONE = "none: left to attend"
    HALF = "16-bit products, summed and kept in float32"
    EXACT = "float32 products, TF32 switched off"
    PLAIN = "products in float32 (float64 for float64)"


@dataclass(frozen=True)
class Setting:
    """What the choice of a kernel depends on.

    Attributes:
        device: the type of the tensors' device.
        dtype: their dtype.
        query_count: how many queries there are.
        plain: whether every query sees all keys up to its own, there are as many queries as keys, and scores
            are nothing but scaled products.
        columns: how many features are attended to, or weights received.
        compiles: whether FlexAttention can be compiled for the device.
    """

    device: str
    dtype: torch.dtype
    query_count: int = 0
    plain: bool = False
    columns: int = 1
    compiles: bool = False


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        question: what is asked.
        device: the type of device; `ANY` for every one that no row above names.
        implementation: the model's attention implementation for which the row holds.
        kernel: what answers.
        operations: what it costs beyond the model's own pass, for `T` tokens and `H` heads of width `d`.
        tested: how it is tested.
        fits: whether the kernel can be used.
        operator: for a kernel that is heard, the operator by which PyTorch calls it.
        asks: for such an operator, whether it must be asked for the log-sum-exp.
    """

    question: Question
    device: str
    implementation: str
    kernel: Kernel
    operations: str
    tested: str
    fits: Callable[[Setting], bool] = lambda setting: True
    operator: Any = None
    asks: str = "never"


ANY = "any"

FUSED_COLUMNS = 4
"""FlexAttention answers for each column anew. Tiles multiply query and key once for all columns."""

_FUSED_QUERIES = 128
"""Fewer queries than a block of FlexAttention go by tiles: a step of generation compiles nothing."""

_HALF = (torch.float16, torch.bfloat16)
_NO_GPU_YET = "tests/gpu; no run on a GPU yet"
_FAKE = f"operator and shapes with fake CUDA tensors; numbers: {_NO_GPU_YET}"
_EAGER = f"numbers in eager mode on the CPU, tracing with aot_eager; compiled code: {_NO_GPU_YET}"


def _fuses(setting: Setting) -> bool:
    narrow = setting.dtype in (*_HALF, torch.float32)
    wide_enough = setting.query_count >= _FUSED_QUERIES
    return setting.compiles and narrow and wide_enough and setting.columns <= FUSED_COLUMNS


TABLE = (
    # In a narrower dtype the positions would be rounded too much.
    Row(
        Question.POSITIONS, "cpu", "sdpa, in own passes", Kernel.WIDER, "2 T² · 3 H", "exactly",
        lambda setting: setting.dtype in (torch.float32, torch.float64),
    ),
    Row(Question.POSITIONS, ANY, "any", Kernel.NONE, "those of attend", "exactly"),
    Row(
        Question.LOG_SUM_EXP, "cpu", "sdpa: flash", Kernel.HEARD, "0", "exactly",
        operator=aten._scaled_dot_product_flash_attention_for_cpu.default,
    ),
    Row(
        Question.LOG_SUM_EXP, "cuda", "sdpa: flash", Kernel.HEARD, "0", _FAKE,
        operator=aten._scaled_dot_product_flash_attention.default,
    ),
    # The kernel is the same; only one more store depends on the question.
    Row(
        Question.LOG_SUM_EXP, "cuda", "sdpa: memory-efficient", Kernel.HEARD, "0", _FAKE,
        operator=aten._scaled_dot_product_efficient_attention.default, asks="always",
    ),
    # cuDNN plans another graph if it is asked. Without proof that its output keeps every bit, it is asked
    # only where the last bits may change; under gradients PyTorch asks itself.
    Row(
        Question.LOG_SUM_EXP, "cuda", "sdpa: cuDNN, under gradients or in own passes", Kernel.HEARD, "0",
        _FAKE, operator=aten._scaled_dot_product_cudnn_attention.default, asks="in own passes",
    ),
    Row(
        Question.LOG_SUM_EXP, "cpu", "any other, plainly causal", Kernel.FLASH, "2 T² d H", "exactly",
        lambda setting: setting.plain,
    ),
    Row(Question.LOG_SUM_EXP, "cuda", "any other", Kernel.FUSED, "T² (d + 16) H", _EAGER, _fuses),
    Row(Question.LOG_SUM_EXP, ANY, "any other", Kernel.BLOCKS, "2 T² d H", "exactly"),
    Row(
        Question.ATTEND, "cuda", f"any, up to {FUSED_COLUMNS} columns", Kernel.FUSED,
        "T² (d + 16) H for each column", _EAGER, _fuses,
    ),
    Row(Question.ATTEND, ANY, "any", Kernel.TILES, "T² d H, and T² H for each column", "exactly"),
    Row(
        Question.RECEIVE, "cuda", f"any, up to {FUSED_COLUMNS} columns", Kernel.FUSED,
        "T² (d + 16) H for each column", _EAGER, _fuses,
    ),
    Row(Question.RECEIVE, ANY, "any", Kernel.TILES, "T² d H, and T² H for each column", "exactly"),
    Row(
        Question.PRODUCT, "cuda", "any, in 16 bits", Kernel.HALF, "those of the question", _FAKE,
        lambda setting: setting.dtype in _HALF,
    ),
    Row(Question.PRODUCT, "cuda", "any", Kernel.EXACT, "those of the question", _FAKE),
    Row(Question.PRODUCT, ANY, "any", Kernel.PLAIN, "those of the question", "exactly"),
)  # fmt: skip

HEARD: dict[Any, Row] = {row.operator: row for row in TABLE if row.operator is not None}
"""The rows of the kernels that can be heard, by the operator with which PyTorch calls them."""


def chosen(question: Question, setting: Setting) -> Kernel:
    """Return the kernel that answers a question: that of the first row that fits.

    A kernel that is heard is never among them: it answers before anything is asked.

    >>> chosen(Question.ATTEND, Setting("cpu", torch.float32, 2048)).value
    'tiles'
    >>> chosen(Question.ATTEND, Setting("cuda", torch.bfloat16, 2048, compiles=True)).value
    'FlexAttention, compiled'
    """
    for row in TABLE:
        known = row.question is question and row.device in (setting.device, ANY) and row.operator is None
        if known and row.fits(setting):
            return row.kernel
    raise AssertionError(f"the table has no row for {question} on any device")


@cache
def compiles(device: str) -> bool:
    """Return whether FlexAttention can be compiled for a type of device: not without Triton."""
    return device == "cuda" and importlib.util.find_spec("triton") is not None


def piece_bytes(device: str) -> int:
    """Return how many bytes the products of a band may take at a time; several copies of them are made.

    On a CPU they should stay in its cache. On a GPU each piece waits for a few dozen kernels to be started.
    """
    return 128 * 2**20 if device == "cuda" else 4 * 2**20


def markdown() -> str:
    """Return the table in markdown."""
    lines = [
        "| question | device | implementation | kernel | extra operations | tested |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in TABLE:
        asked = (row.question.value, row.device, row.implementation)
        lines.append(f"| {' | '.join([*asked, row.kernel.value, row.operations, row.tested])} |")
    return "\n".join(lines)


# ---- products ---------------------------------------------------------------------------------


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `left @ right` in a dtype, exact up to the rounding of that dtype's sums.

    `dtype` is float32 or float64. On GPUs, 16-bit factors are multiplied as they are, and their products
    summed in float32: nothing is rounded that a conversion to float32 would keep. float32 factors are never
    rounded to TF32, whatever the user allows for the model.

    >>> product(torch.ones(1, 2, 3).bfloat16(), torch.ones(1, 3, 2).bfloat16(), torch.float32)[0, 0]
    tensor([3., 3.])
    """
    factors = left.dtype if left.dtype == right.dtype else dtype
    kernel = chosen(Question.PRODUCT, Setting(left.device.type, factors))
    if kernel is Kernel.HALF:
        flat = torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out_dtype=dtype)
        products: Tensor = flat.unflatten(0, left.shape[:-2])
        return products
    if kernel is Kernel.EXACT:
        with _without_tf32():
            return left.to(dtype) @ right.to(dtype)
    return left.to(dtype) @ right.to(dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """Add `factor * left @ right` to a total in place, as exact as `product`.

    >>> total = torch.ones(1, 1, 2, 2)
    >>> add_product(total, torch.ones(1, 1, 2, 3), torch.ones(1, 1, 3, 2), 2.0)
    >>> total[0, 0]
    tensor([[7., 7.],
            [7., 7.]])
    """
    dtype = total.dtype
    kernel = chosen(Question.PRODUCT, Setting(left.device.type, left.dtype))
    if kernel is Kernel.HALF:
        total += product(left, right, dtype).mul_(factor)
        return
    flat = total.flatten(0, -3), left.to(dtype).flatten(0, -3), right.to(dtype).flatten(0, -3)
    with _without_tf32() if kernel is Kernel.EXACT else nullcontext():
        flat[0].baddbmm_(*flat[1:], alpha=factor)


def row_products(
    rows: Float[Tensor, "batch head row d"], vector: Float[Tensor, "batch head d"]
) -> Float[Tensor, "batch head row"]:
    """Return each row's product with one vector, in the dtype of both and as exact as `product`.

    >>> row_products(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 3))
    tensor([[[3., 3.]]])
    """
    kernel = chosen(Question.PRODUCT, Setting(rows.device.type, rows.dtype))
    # A product of a matrix and a vector would copy the rows of each head together: five times as slow.
    with _without_tf32() if kernel is Kernel.EXACT else nullcontext():
        return torch.einsum("bhtd,bhd->bht", rows, vector)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Keep float32 factors as they are in the products of a GPU.

    The setting belongs to the process, and no product takes one of its own. It is changed for as long as it
    takes to start a kernel, in one place, and put back as it was: this setting of a single backend, and not
    `torch.set_float32_matmul_precision`, which also changes those of others.
    """
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    if before == "ieee":
        yield
        return
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before

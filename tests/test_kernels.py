"""Which kernel answers what: the table, what is heard of a model's own kernel, and products on a GPU.

There may be no GPU here: fake CUDA tensors show that each branch is reached, and calls its operator with
arguments that it accepts. What they cannot show, numbers, is in tests/gpu.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import attnprobe.attention
from attnprobe import FactoredAttention
from attnprobe.attention import kernels
from attnprobe.attention.kernels import HEARD, TABLE, Kernel, Question, Setting, chosen, product
from attnprobe.attention.listening import HeardKernel, listen
from attnprobe.reductions import received_by_key
from tests.fake_gpu import fake_gpu

aten = torch.ops.aten
HALF, SINGLE = torch.bfloat16, torch.float32


# ---- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "changes", "kernel"),
    [
        (Question.POSITIONS, {"device": "cpu"}, Kernel.WIDER),
        (Question.POSITIONS, {"device": "cpu", "dtype": HALF}, Kernel.NONE),
        (Question.POSITIONS, {}, Kernel.NONE),
        (Question.LOG_SUM_EXP, {"device": "cpu", "plain": True}, Kernel.FLASH),
        (Question.LOG_SUM_EXP, {"device": "cpu"}, Kernel.BLOCKS),
        (Question.LOG_SUM_EXP, {"plain": True}, Kernel.FUSED),
        (Question.LOG_SUM_EXP, {"compiles": False, "plain": True}, Kernel.BLOCKS),
        (Question.LOG_SUM_EXP, {"device": "mps", "plain": True}, Kernel.BLOCKS),
        (Question.ATTEND, {"device": "cpu"}, Kernel.TILES),
        (Question.ATTEND, {}, Kernel.FUSED),
        (Question.ATTEND, {"dtype": HALF, "columns": 3}, Kernel.FUSED),
        (Question.ATTEND, {"columns": 40}, Kernel.TILES),
        (Question.ATTEND, {"dtype": torch.float64}, Kernel.TILES),
        (Question.ATTEND, {"query_count": 1}, Kernel.TILES),
        (Question.RECEIVE, {}, Kernel.FUSED),
        (Question.RECEIVE, {"device": "cpu"}, Kernel.TILES),
        (Question.PRODUCT, {"dtype": HALF}, Kernel.HALF),
        (Question.PRODUCT, {}, Kernel.EXACT),
        (Question.PRODUCT, {"device": "cpu", "dtype": HALF}, Kernel.PLAIN),
        (Question.PRODUCT, {"device": "xpu"}, Kernel.PLAIN),
    ],
)
def test_the_first_row_that_fits_answers(question: Question, changes: dict[str, Any], kernel: Kernel) -> None:
    setting = {"device": "cuda", "dtype": SINGLE, "query_count": 500, "compiles": True}
    assert chosen(question, Setting(**(setting | changes))) is kernel


def test_the_table_is_where_devices_are_named() -> None:
    """And the only place in the operator core that does."""
    folder = Path(attnprobe.attention.__file__).parent
    named = [
        path.name
        for path in sorted(folder.glob("*.py"))
        if re.search(r"[\"'](cpu|cuda|mps|xpu)[\"']", path.read_text())
    ]
    # Doctests of `operator` make tensors on the CPU.
    assert named == ["kernels.py", "operator.py"]
    assert 'torch.device("cpu")' in (folder / "operator.py").read_text()
    for question in Question:
        rows = [row for row in TABLE if row.question is question]
        assert rows[-1].device == kernels.ANY
        assert rows[-1].fits(Setting("unheard of", torch.float64))


def test_the_page_holds_the_table() -> None:
    page = Path(__file__).parents[1] / "docs" / "gpu.md"
    assert kernels.markdown() in page.read_text()


# ---- what is heard ------------------------------------------------------------------------------

FLASH = aten._scaled_dot_product_flash_attention.default
EFFICIENT = aten._scaled_dot_product_efficient_attention.default
CUDNN = aten._scaled_dot_product_cudnn_attention.default


@pytest.mark.parametrize("own_pass", [False, True])
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("operator", [FLASH, EFFICIENT, CUDNN])
def test_every_kernel_of_a_gpu_is_heard(operator: Any, asked: bool, own_pass: bool) -> None:
    """`[batch, head, query]` in float32, whether or not PyTorch itself wanted it; cuDNN only where it may."""
    assert HEARD[operator].device == "cuda"
    with fake_gpu() as operators:
        query = torch.empty(2, 4, 45, 64, device="cuda", dtype=HALF)
        more = () if operator is FLASH else (None, asked)
        with HeardKernel(own_pass=own_pass) as kernel:
            output, *_ = operator(query, query, query, *more, 0.0, True, scale=0.3)
    assert output.shape == query.shape
    assert sum(name == str(operator) for name, _ in operators.run) == 1
    if operator is CUDNN and not asked and not own_pass:
        # Fake cuDNN returns it unasked; a GPU returns an empty one, or none.
        return
    assert kernel.log_sum_exp is not None
    assert kernel.log_sum_exp.shape == (2, 4, 45)
    assert kernel.log_sum_exp.dtype == SINGLE


@pytest.mark.parametrize("mode", ["inference", "no_grad", "gradients", "autocast"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_call_is_the_models_own_whatever_surrounds_it(mode: str, masked: bool) -> None:
    """Output and gradients keep every bit; under autocast, what is heard is of the narrowed tensors."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, heads, 40, 16, generator=generator) for heads in (4, 2, 2)]
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    options: dict[str, Any] = {"attn_mask": mask} if masked else {"is_causal": True}
    contexts = {
        "inference": torch.inference_mode,
        "no_grad": torch.no_grad,
        "gradients": nullcontext,
        "autocast": lambda: torch.autocast("cpu", HALF),
    }

    def run(listening: Any) -> tuple[torch.Tensor, Any]:
        inputs = [leaf.clone().requires_grad_(mode in ("gradients", "autocast")) for leaf in leaves]
        with contexts[mode](), listening as heard:
            output = torch.nn.functional.scaled_dot_product_attention(*inputs, **options, enable_gqa=True)
        if output.requires_grad:
            output.float().square().sum().backward()
        return torch.cat(
            [output.flatten(), *(leaf.grad.flatten() for leaf in inputs if leaf.grad is not None)]
        ), heard

    expected, _ = run(nullcontext())
    actual, heard = run(listen())
    assert torch.equal(actual, expected)
    query, key = (leaf.to(HALF).double() if mode == "autocast" else leaf.double() for leaf in leaves[:2])
    score = (query @ key.repeat_interleave(2, 1).mT / 4).masked_fill(~mask, -torch.inf)
    error = 1e-4 if mode == "autocast" else 1e-5
    assert heard.result is not None
    torch.testing.assert_close(heard.result.log_sum_exp.double(), score.logsumexp(-1), rtol=0, atol=error)


# ---- questions on a GPU -------------------------------------------------------------------------


@pytest.fixture
def fused_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the table use FlexAttention, run as an operator: to compile it takes a GPU."""
    monkeypatch.setattr("attnprobe.attention.block_scores.compiles", lambda device: device == "cuda")
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    assert not kernels.compiles("cuda") or torch.cuda.is_available()


@pytest.mark.usefixtures("fused_on_gpu")
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize("options", [{}, {"window": 40}, {"softcap": 5.0, "sinks": True}])
def test_every_question_can_be_asked_on_a_gpu(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """All shapes and dtypes fit; 16-bit factors are multiplied as they are, and kept in float32."""
    with fake_gpu() as operators:
        query = torch.empty(2, 6, 300, 64, device="cuda", dtype=dtype)
        key = torch.empty(2, 2, 300, 64, device="cuda", dtype=dtype)
        options = dict(options)
        if options.pop("sinks", False):
            options["sinks"] = torch.empty(6, device="cuda", dtype=dtype)
        attention = FactoredAttention(query, key, **options)
        rows = torch.zeros(2, dtype=torch.long, device="cuda")
        assert "flex_attention" in {name for name, _ in operators.run}
        operators.run.clear()
        answers = {
            (2, 6, 300, 3): attention.attend(torch.empty(2, 300, 3, device="cuda")),
            (2, 6, 300, 2): attention.receive(torch.empty(2, 300, 2, device="cuda"), start=10),
        }
        assert [name for name, _ in operators.run].count("flex_attention") == 2
        operators.run.clear()
        answers[2, 6, 300, 11] = attention.band(11)
        weights, given = torch.empty(10, device="cuda"), torch.empty(2, 300, device="cuda")
        near = attention.near_sums(weights, given, 10, 100)
        assert near.by_query.shape == near.by_key.shape == (2, 6, 300)
        assert near.by_key.device.type == "cuda"
        answers[2, 6, 2, 300] = attention.scores.block(slice(0, 2), slice(0, 300))
        answers[2, 6, 300] = attention.scores.column(rows)
    for shape, answer in answers.items():
        assert answer.shape == shape
        assert answer.dtype == SINGLE
        assert answer.device.type == "cuda"
    assert operators.dtypes("bmm") == {SINGLE}
    assert operators.dtypes("baddbmm_") <= {SINGLE}
    halves = {name for name, _ in operators.run if name == "aten.bmm.dtype"}
    assert bool(halves) == (dtype == HALF)


@pytest.mark.usefixtures("fused_on_gpu")
def test_metrics_do_not_wait_for_a_gpu() -> None:
    """Whether a feature is negative is asked only where the caller does not know."""
    with fake_gpu() as operators:
        query, key = (torch.empty(2, heads, 300, 64, device="cuda", dtype=HALF) for heads in (6, 2))
        attention = FactoredAttention(query, key)
        before = operators.waits
        attention.attend(torch.empty(2, 300, 1, device="cuda"))
        assert operators.waits == before + 1
        attention.mean_distance()
        rows = torch.empty(2, 300, device="cuda", dtype=torch.bool)
        received_by_key(attention, rows, (10, None), counted=lambda: [True] * 300)
        assert operators.waits == before + 1


@pytest.mark.parametrize("precision", ["none", "ieee", "tf32"])
def test_tf32_enters_no_product(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the user allows for the model, and it is as before afterwards."""
    settings = torch.backends.cuda.matmul
    before, seen = settings.fp32_precision, []
    try:
        settings.fp32_precision = precision
        with fake_gpu():
            factor = torch.empty(2, 3, 4, device="cuda")

            class Watch(torch.utils._python_dispatch.TorchDispatchMode):
                def __torch_dispatch__(
                    self, func: Any, types: Any, args: Any = (), kwargs: Any = None
                ) -> Any:
                    if func is aten.bmm.default:
                        seen.append(settings.fp32_precision)
                    return func(*args, **(kwargs or {}))

            with Watch():
                product(factor, factor.mT, SINGLE)
        assert seen == ["ieee"]
        assert settings.fp32_precision == precision
    finally:
        settings.fp32_precision = before

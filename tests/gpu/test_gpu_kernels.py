"""What only a GPU can show: bits, numbers and memory of its kernels. Run by `make test-gpu`."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnprobe
from attnprobe import DenseAttention, FactoredAttention
from attnprobe.attention.kernels import Kernel, Question
from attnprobe.attention.listening import listen
from attnprobe.attention.masks import CausalMask
from attnprobe.testing.reference import dense_pattern
from attnprobe.testing.strategies import CallInputs
from attnprobe.testing.tiny_models import VOCABULARY, tiny_model
from tests.fused_calls import LONG, assert_same, dense_answers, fused_answers, long_call, questions

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA"),
]

HALF, SINGLE = torch.bfloat16, torch.float32


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = HALF) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def on_device(inputs: CallInputs) -> CallInputs:
    options = dict(inputs.options)
    for name, value in options.items():
        if isinstance(value, torch.Tensor):
            options[name] = value.to(DEVICE)
        elif isinstance(value, CausalMask):
            options[name] = CausalMask(value.first.to(DEVICE), value.last.to(DEVICE), None, value.plain)
    return CallInputs(inputs.query.to(DEVICE), inputs.key.to(DEVICE), options)


# ---- the model's own kernels --------------------------------------------------------------------

BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def run_call(
    backend: SDPBackend, inputs: list[torch.Tensor], options: dict[str, Any], listening: Any
) -> tuple[list[torch.Tensor], Any]:
    """Return output and gradients of a call, and what was heard."""
    leaves = [leaf.clone().requires_grad_(torch.is_grad_enabled()) for leaf in inputs]
    with sdpa_kernel(backend), listening as heard:
        output = torch.nn.functional.scaled_dot_product_attention(*leaves, **options)
    if output.requires_grad:
        output.float().square().sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)], heard


@pytest.mark.parametrize("own_pass", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_listening_keeps_every_bit(
    backend: SDPBackend, width: int, masked: bool, gradients: bool, own_pass: bool
) -> None:
    """Output and gradients; the log-sum-exp is that of float64.

    In own passes cuDNN may change the last bits of an output. Whether it does is worth knowing: if this test
    passes for it, the table can ask it everywhere.
    """
    tokens = 300
    inputs = drawn(*[(2, 4, tokens, width)] * 3)
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=DEVICE).tril()
    options: dict[str, Any] = {"attn_mask": mask[None, None]} if masked else {"is_causal": True}
    with nullcontext() if gradients else torch.no_grad():
        try:
            # Backward passes that add up in any order differ from run to run.
            torch.use_deterministic_algorithms(True, warn_only=True)
            expected, _ = run_call(backend, inputs, options, nullcontext())
            again, _ = run_call(backend, inputs, options, nullcontext())
            actual, heard = run_call(backend, inputs, options, listen(own_pass=own_pass))
        except RuntimeError as error:
            pytest.skip(f"PyTorch does not use this kernel here: {error}")
        finally:
            torch.use_deterministic_algorithms(False)
    for plain, repeated, listened in zip(expected, again, actual, strict=True):
        assert not torch.equal(plain, repeated) or torch.equal(plain, listened)
    if backend is SDPBackend.CUDNN_ATTENTION and not (gradients or own_pass):
        assert heard.result is None
        return
    query, key = (part.double() for part in inputs[:2])
    score = (query @ key.mT * width**-0.5).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(heard.result.log_sum_exp.double(), score.logsumexp(-1), rtol=0, atol=1e-5)


def test_grouped_queries_and_autocast_are_heard() -> None:
    """float32 parameters under autocast, as trainers run them."""
    query, key, value = drawn((1, 8, 256, 64), (1, 2, 256, 64), (1, 2, 256, 64), dtype=SINGLE)
    with torch.autocast(DEVICE, HALF), listen() as heard:
        torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert heard.result is not None
    narrow = FactoredAttention(query.to(HALF).double(), key.to(HALF).double())
    torch.testing.assert_close(heard.result.log_sum_exp.double(), narrow.log_sum_exp(), rtol=0, atol=1e-5)


# ---- the fused kernel ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("kind", LONG)
def test_fused_answers_equal_dense(kind: str, dtype: torch.dtype) -> None:
    """The same tests as on the CPU, of the compiled kernel."""
    inputs = long_call(kind).to(dtype)
    there = on_device(inputs)
    attention = FactoredAttention(there.query, there.key, **there.options)
    assert attention.scores.kernel(Question.ATTEND) is Kernel.FUSED
    features, weights = questions(inputs, SINGLE)
    actual = fused_answers(attention, features.to(DEVICE), weights.to(DEVICE))
    assert_same(
        {name: answer.cpu() for name, answer in actual.items()},
        dense_answers(inputs, features, weights),
        2e-5,
    )


@pytest.mark.parametrize("width", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_every_width_of_heads(width: int, dtype: torch.dtype) -> None:
    query, key = drawn((1, 4, 400, width), (1, 2, 400, width), dtype=dtype)
    attention = FactoredAttention(query, key)
    dense = DenseAttention(dense_pattern(query.cpu(), key.cpu()))
    found = attention.mean_distance().cpu().double()
    torch.testing.assert_close(found, dense.mean_distance(), rtol=2e-5, atol=2e-3)
    ones = torch.ones(1, 400, 1)
    received = attention.receive(ones, start=10).cpu().double()
    torch.testing.assert_close(received, dense.receive(ones.double(), start=10), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_tf32_changes_nothing(dtype: torch.dtype) -> None:
    """With TF32 allowed for the model, all answers are as exact as without."""
    query, key = drawn((1, 4, 600, 64), (1, 2, 600, 64), dtype=dtype)
    # Large scores, where TF32 would show.
    query = query * 4
    dense = DenseAttention(dense_pattern(query.cpu(), key.cpu()))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        attention = FactoredAttention(query, key)
        many = torch.randn(1, 600, 9)
        found = {
            "band": attention.band(20),
            "rows": attention.rows([599, 5]),
            "tiles": attention.attend(many),
            "fused": attention.attend(many[..., :2]),
        }
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    expected = {
        "band": dense.band(20),
        "rows": dense.rows([599, 5]),
        "tiles": dense.attend(many.double()),
        "fused": dense.attend(many[..., :2].double()),
    }
    assert_same({name: answer.cpu() for name, answer in found.items()}, expected, 5e-5)


def test_no_question_needs_a_map() -> None:
    """At 16,384 tokens: a map of one head in float32 would be a gigabyte."""
    tokens = 16384
    query, key = drawn((1, 8, tokens, 128), (1, 2, tokens, 128))
    weights = torch.ones(1, tokens, 1, device=DEVICE)
    for window in (None, 512):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention = FactoredAttention(query, key, window=window)
        attention.attend(torch.randn(1, tokens, 3, device=DEVICE))
        attention.receive(weights, start=10)
        attention.band(101)
        assert torch.cuda.max_memory_allocated() - before < tokens * tokens * 4 / 2


def test_all_lengths_share_what_is_compiled() -> None:
    from torch._dynamo.utils import counters

    for number, tokens in enumerate((260, 300, 512, 777, 1024)):
        query, key = drawn((1, 4, tokens, 64), (1, 2, tokens, 64))
        FactoredAttention(query, key).receive(torch.ones(1, tokens, 1, device=DEVICE))
        if number == 2:
            graphs = Counter(counters["stats"])["unique_graphs"]
    assert Counter(counters["stats"])["unique_graphs"] == graphs


# ---- whole models -------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2"])
def test_a_model_gives_what_it_gives_on_the_cpu(family: str, implementation: str) -> None:
    if family == "gemma2":
        implementation = "eager"
    ids = torch.randint(1, VOCABULARY, (2, 300), generator=torch.Generator().manual_seed(0))
    batch = attnprobe.TokenBatch.from_ids(ids, response_start=40)
    settings: dict[str, Any] = {"horizon": (10, None), "receiver": True, "entropy": False}
    model = tiny_model(family, implementation=implementation, max_position_embeddings=512)
    expected = attnprobe.measure(model, batch, **settings)
    model.to(DEVICE)
    found = attnprobe.measure(model, batch, **settings)
    for name in ("span", "waad", "fai"):
        torch.testing.assert_close(
            getattr(found, name).cpu(), getattr(expected, name), equal_nan=True, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_model_that_is_read_keeps_every_bit(gradients: bool, dtype: torch.dtype) -> None:
    model = tiny_model("llama", implementation="sdpa", max_position_embeddings=512).to(DEVICE, dtype)
    ids = torch.randint(1, VOCABULARY, (2, 300), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with nullcontext() if gradients else torch.no_grad():
        expected = model(ids, use_cache=False).logits
        probe = attnprobe.HeadStatisticsProbe(entropy=False)
        with attnprobe.attach(model, probe):
            actual = model(ids, use_cache=False).logits
    assert torch.equal(actual, expected)
    assert bool(probe.result().span.isfinite().all())

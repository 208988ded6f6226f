"""What statistics cost, counted and not clocked: attention-sized products, and bytes allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import attnprobe
from attnprobe import DenseAttention, FactoredAttention, reductions
from attnprobe.adapters import output_check
from attnprobe.adapters import transformers as transformers_adapter
from attnprobe.rl.whole_pass import WholePassAdapter
from attnprobe.testing.tiny_models import VOCABULARY, tiny_model

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
# Attention is most of the work in so narrow a model, as it is in a wide one at many tokens.
LAYERS, HEADS, WIDTH = 3, 4, 8


class Operations(TorchDispatchMode):
    """Counts kernels, and remembers the largest tensor that any of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[Any] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **(kwargs or {}))
        self.count[func] += 1
        for tensor in answer if isinstance(answer, tuple | list) else (answer,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return answer


WAITS = {
    "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "bincount",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave.Tensor",
}  # fmt: skip


class Waits(Operations):
    """Counts what makes the processor wait for an accelerator: a number that it asks for, or a shape."""

    waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        chosen = name.partition(".")[0] in ("index", "index_put", "index_put_")
        masks = [index for index in args[1] if index is not None] if chosen else []
        if name in WAITS or any(index.dtype == torch.bool for index in masks):
            self.waits += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


class Lists(TorchFunctionMode):
    """Counts transfers that, on the CPU, run no kernel."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
            self.waits.waits += 1
        return func(*args, **(kwargs or {}))


def waits_in(call: Callable[[], object]) -> int:
    call()
    with Waits() as waits, Lists(waits):
        call()
    return waits.waits


def batch_of(tokens: int, batch: int = 1) -> attnprobe.TokenBatch:
    ids = torch.randint(1, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return attnprobe.TokenBatch.from_ids(ids, response_start=tokens // 4)


def long_model(**changes) -> Any:
    return tiny_model("llama", implementation="sdpa", max_position_embeddings=4096, **changes)


def plain(model, tokens: int) -> Callable[[], object]:
    ids = batch_of(tokens).input_ids

    def call() -> object:
        with torch.no_grad():
            return model(ids, use_cache=False, logits_to_keep=1)

    return call


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that was allocated at once during a call, above what was before."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert changes, "the profiler saw no allocation"
    now = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_the_kernel_runs_once_a_layer() -> None:
    """Span, WAAD and FAI ride on the model's own attention: no second pass over the keys."""
    model = long_model()
    with Operations() as operations:
        attnprobe.measure(model, batch_of(512), entropy=False)
    assert operations.count[FLASH] == LAYERS


def test_an_attached_pass_runs_the_kernel_once_a_layer() -> None:
    model, ids = long_model(), batch_of(512).input_ids
    probe = attnprobe.HeadStatisticsProbe(entropy=False, span=False)
    with attnprobe.attach(model, probe), torch.no_grad(), Operations() as operations:
        model(ids)
    assert operations.count[FLASH] == LAYERS


@pytest.mark.parametrize("window", [None, 16])
def test_products_grow_by_a_band_only(window: int | None) -> None:
    """Above the plain forward pass: products of each query with the keys near it, and nothing T x T."""
    tokens = 1024
    changes = {} if window is None else {"sliding_window": window}
    model = tiny_model(
        "llama" if window is None else "mistral",
        implementation="sdpa",
        max_position_embeddings=4096,
        **changes,
    )
    extra = flops(lambda: attnprobe.measure(model, batch_of(tokens), entropy=False, span=False)) - flops(
        plain(model, tokens)
    )
    # A band of 51 distances in blocks of 32 queries, of multiplications and additions; two sampled rows of
    # the check against the model's output; WAAD's weighted sum.
    band = LAYERS * HEADS * 2 * tokens * (32 + 50) * WIDTH
    checks = LAYERS * HEADS * 2 * tokens * (2 * 2 * WIDTH + 10)
    assert extra <= band + checks
    attention = LAYERS * HEADS * 2 * tokens * tokens * WIDTH
    assert extra < attention / 4


def test_receiver_statistics_cost_one_product_more() -> None:
    """FAI to the end and receiver kurtosis share one pass over the tiles at or below the diagonal."""
    tokens, model = 2048, long_model()
    near = flops(lambda: attnprobe.measure(model, batch_of(tokens), entropy=False))
    far = flops(
        lambda: attnprobe.measure(model, batch_of(tokens), entropy=False, horizon=(10, None), receiver=True)
    )
    # The product of queries and keys over half the square, and the weighted sums of its columns.
    product = LAYERS * HEADS * tokens * tokens * WIDTH
    columns = LAYERS * HEADS * tokens * tokens
    assert far - near <= (product + columns) * 1.15


# ---- waiting for the device ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "implementation", "settings"),
    [
        ("llama", "sdpa", {}),
        ("llama", "eager", {"horizon": (10, None), "receiver": True}),
        ("gemma2", "eager", {"share_on": ("prompt", "first"), "influence_rows": "prompt"}),
        ("mistral", "sdpa", {"span_ignores": ("prompt",), "entropy": True}),
        ("gpt_oss", "eager", {}),
        ("bloom", "eager", {}),
        ("llama", "eager", {"value_weighted": True}),
        ("llama with LoRA", "sdpa", {"value_weighted": True}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_layer_waits_for_the_device(
    family: str,
    implementation: str,
    settings: dict[str, Any],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the processor asks a device for does not grow with the layers: twice as many, no wait more."""
    # In 16 bits, rows that look suspicious are computed again when the pass ends: a transfer for each layer.
    monkeypatch.setattr(output_check, "_SUSPICIOUS", float("inf"))
    found = []
    for layers in (4, 8):
        model = tiny_model(family.split()[0], implementation=implementation, num_hidden_layers=layers)
        if "LoRA" in family:
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"])).eval()
        model = model.to(dtype)
        plain_waits = waits_in(plain(model, 48))
        options = {"entropy": False, **settings}
        found.append(
            waits_in(lambda m=model, o=options: attnprobe.measure(m, batch_of(48, 2), **o)) - plain_waits
        )
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("llama", "sdpa"), ("gemma2", "eager"), ("mistral", "sdpa"), ("gpt_oss", "eager"), ("bloom", "eager")],
)
def test_no_layer_of_group_maps_waits_for_the_device(family: str, implementation: str) -> None:
    """Which tiles there are is known from the batch and the mask, before the first layer."""
    found = []
    batch = batch_of(48, 2)
    for layers in (4, 8):
        model = tiny_model(family, implementation=implementation, num_hidden_layers=layers)
        before = waits_in(plain(model, 48))
        found.append(
            waits_in(lambda m=model: attnprobe.group_maps(m, batch, [0, 2], global_heads=[1, 2])) - before
        )
    assert found[0] == found[1]


def test_group_maps_multiply_only_what_they_show() -> None:
    """The heads of both groups, each once, over the rows of the response: less than half of all pairs."""
    tokens, model = 2048, long_model()
    batch = batch_of(tokens)
    heads = {"local": [(0, 0), (1, 2)], "global": [(0, 0), (2, 1), (2, 2)]}
    extra = flops(lambda: attnprobe.group_maps(model, batch, heads)) - flops(plain(model, tokens))
    response, before = tokens - tokens // 4, tokens // 4
    pairs = response * (response / 2 + before)
    # Tiles reach beyond the diagonal. Beside the products there are the sums of both groups.
    assert extra <= 1.15 * 4 * pairs * 2 * (WIDTH + 2)


@pytest.mark.parametrize(("right_padded", "most"), [(True, 1), (False, 2)])
def test_a_pass_waits_once(right_padded: bool, most: int) -> None:
    """At its end, for all checks; a pass of the user's also at its start, for what is in column 0."""
    model, ids, probe = long_model(), batch_of(48).input_ids, attnprobe.HeadStatisticsProbe(entropy=False)
    probe.right_padded = right_padded

    def call() -> object:
        return model(ids, use_cache=False, logits_to_keep=1)

    with torch.no_grad():
        before = waits_in(call)
        with attnprobe.attach(model, probe):
            assert waits_in(call) - before == most


def test_waiting_is_seen() -> None:
    """A count that sees nothing allows everything."""
    numbers = torch.arange(3)
    for ask in (
        lambda: int(numbers[0]), lambda: bool((numbers > 1).any()), lambda: numbers.tolist(),
        lambda: numbers[numbers > 1], lambda: numbers.nonzero(), lambda: torch.equal(numbers, numbers + 1),
    ):  # fmt: skip
        assert waits_in(ask) == 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_logits_of_a_long_response_are_never_there_at_once(family: str) -> None:
    """Entropy takes a few positions at a time, through the model's own head: gemma2 caps its logits."""
    vocabulary, tokens = 16000, 400
    model = tiny_model(family, vocab_size=vocabulary, max_position_embeddings=512, num_hidden_layers=2)
    batch, parts = batch_of(tokens), repr(model)
    with Operations() as operations:
        whole = attnprobe.measure(model, batch)
    assert operations.largest >= 300 * vocabulary * 4
    with patch.object(transformers_adapter, "LOGITS_AT_ONCE", 80 * vocabulary), Operations() as operations:
        chunked = attnprobe.measure(model, batch)
    assert operations.largest <= 80 * vocabulary * 4
    for name in ("span", "waad", "fai", "entropy"):
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name), equal_nan=True)
    assert repr(model) == parts
    assert torch.equal(attnprobe.measure(model, batch).entropy.nan_to_num(), whole.entropy.nan_to_num())


# ---- windows and horizons beyond the text -------------------------------------------------------


def attention_of(queries: int, keys: int) -> FactoredAttention:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, HEADS, queries, WIDTH, generator=generator)
    return FactoredAttention(query, torch.randn(2, HEADS, keys, WIDTH, generator=generator))


@pytest.mark.parametrize(("queries", "keys"), [(200, 200), (200, 260), (1, 90), (7, 7)])
def test_a_window_beyond_the_text_is_cut_to_it(queries: int, keys: int) -> None:
    """Bit by bit what a window of the text gives, at the same cost: all distances, none cut off."""
    attention = attention_of(queries, keys)
    expected, cost = reductions.windowed_distance_by_row(attention, keys), []
    assert torch.equal(expected, attention.mean_distance().clamp(min=0.0))
    for window in (keys, keys + 1, 5000, 10**9, 10**30):
        with Operations() as operations:
            assert torch.equal(reductions.windowed_distance_by_row(attention, window), expected)
        cost.append((operations.count, operations.largest))
    assert all(found == cost[0] for found in cost)
    below = reductions.windowed_distance_by_row(attention, keys - 1) if keys > 1 else expected
    assert float((expected - below).max()) <= 1 + 1e-3


@pytest.mark.parametrize(("queries", "keys"), [(60, 60), (200, 260), (1, 90)])
@pytest.mark.parametrize("low", [0, 10])
def test_a_horizon_beyond_the_text_is_cut_to_it(queries: int, keys: int, low: int) -> None:
    attention = attention_of(queries, keys)
    rows = torch.ones(2, queries, dtype=torch.bool)
    expected, cost = reductions.received_by_key(attention, rows, (low, keys)), []
    for high in (keys - 1, keys, 10**9, 10**30, None):
        with Operations() as operations:
            assert torch.equal(reductions.received_by_key(attention, rows, (low, high)), expected)
        cost.append((operations.count, operations.largest))
    assert all(found == cost[0] for found in cost)
    for far in (keys, 10**30):
        for horizon in ((far, None), (far, far), (far, 10**31)):
            received = reductions.received_by_key(attention, rows, horizon)
            assert received.shape == (2, HEADS, keys)
            assert not received.any()


@pytest.mark.parametrize("window", [129, 300, 511])
def test_a_wide_window_needs_no_wide_band(window: int) -> None:
    """The band goes by pieces: memory does not grow with the window, and the numbers are those of one map."""
    tokens = 512
    attention = attention_of(tokens, tokens)
    pattern = DenseAttention(attention.rows(torch.arange(tokens)))
    with Operations() as operations:
        found = reductions.windowed_distance_by_row(attention, window)
    distance = (torch.arange(tokens)[:, None] - torch.arange(tokens)).clamp(max=window)
    expected = (pattern.pattern * distance).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert operations.largest < 2 * HEADS * tokens * 4 * (reductions.WIDEST_BAND + 64) * 2


def test_limits_of_any_size_can_be_measured() -> None:
    """From the front door, over steps of a cache too, and with no row in a horizon beyond the text."""
    model, batch = long_model(), batch_of(40)
    wide = attnprobe.measure(model, batch, window=10**30, horizon=(2, 10**30))
    fitting = attnprobe.measure(model, batch, window=40, horizon=(2, None))
    for name in ("span", "waad", "fai"):
        assert torch.equal(getattr(wide, name).nan_to_num(), getattr(fitting, name).nan_to_num()), name
    far = attnprobe.measure(model, batch, horizon=(10**30, None))
    assert bool(far.fai.isnan().all())
    results = []
    for window, high in ((10**30, 10**30), (40, None)):
        probe = attnprobe.HeadStatisticsProbe(window=window, horizon=(2, high), entropy=False)
        with attnprobe.attach(model, probe), torch.no_grad():
            model.generate(batch.input_ids[:, :20], max_new_tokens=12, do_sample=False, pad_token_id=0)
        results.append(probe.result())
    for name in ("span", "waad", "fai"):
        found, expected = (getattr(result, name).nan_to_num() for result in results)
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("settings", [{}, {"horizon": (10, None), "receiver": True}], ids=["near", "far"])
def test_memory_is_linear_in_the_number_of_tokens(settings: dict) -> None:
    """Twice the tokens, about twice the bytes: a map of all heads would be four times."""
    model = long_model()
    small, large = (
        peak_bytes(lambda n=tokens: attnprobe.measure(model, batch_of(n), entropy=False, **settings))
        for tokens in (1024, 2048)
    )
    assert large < 2.5 * small
    assert large < LAYERS * HEADS * 2048 * 2048 * 4 / 4


def test_no_tensor_is_as_large_as_a_map() -> None:
    model, tokens = long_model(), 2048
    with Operations() as operations:
        attnprobe.measure(model, batch_of(tokens), horizon=(10, None), receiver=True)
    assert operations.largest < tokens * tokens * 4


def test_a_batch_goes_in_chunks_that_fit_the_budget() -> None:
    """Results are the same whatever the chunk, and one row is run where not even one fits."""
    model, batch = long_model(), batch_of(64, batch=6)
    whole = attnprobe.measure(model, batch)
    sizes = []

    class Sizes(attnprobe.Probe):
        def observe(self, site, layer, value, batch):
            if layer == 0:
                sizes.append(value.batch_size)

    adapter = attnprobe.adapter_for(model)
    per_row = 64 * adapter.activation_bytes + 48 * VOCABULARY * 4
    for budget, expected in ((2 * per_row, [2, 2, 2]), (4 * per_row, [4, 2]), (1, [1] * 6)):
        sizes.clear()
        with attnprobe.attach(model, Sizes()):
            chunked = attnprobe.measure(model, batch, memory_budget=budget)
        assert sizes == expected
        for name in ("span", "waad", "fai", "entropy"):
            torch.testing.assert_close(
                getattr(chunked, name), getattr(whole, name), equal_nan=True, rtol=1e-4, atol=1e-5
            )


def test_logits_that_are_computed_in_chunks_split_no_batch() -> None:
    """The estimate counts a chunk of them; all of them where the adapter cannot run the head alone."""
    vocabulary, batch = 4000, batch_of(64, batch=6)
    model = tiny_model("llama", vocab_size=vocabulary)
    sizes = []

    class Sizes(attnprobe.Probe):
        def observe(self, site, layer, value, batch):
            if layer == 0:
                sizes.append(value.batch_size)

    plain = attnprobe.adapter_for(model)
    whole = WholePassAdapter(model, model)
    logits, chunk = 6 * 48 * vocabulary * 4, 100 * vocabulary * 4
    budget = 6 * 64 * plain.activation_bytes + chunk
    with patch.object(transformers_adapter, "LOGITS_AT_ONCE", 100 * vocabulary):
        assert plain.logits_bytes(6, 48) <= chunk
        assert whole.logits_bytes(6, 48) == logits
        for adapter, expected in ((plain, [6]), (whole, [2, 2, 2])):
            sizes.clear()
            with attnprobe.attach(adapter, Sizes()), Operations() as operations:
                attnprobe.measure(adapter, batch, memory_budget=budget)
            assert sizes == expected
            assert operations.largest <= budget


@pytest.mark.usefixtures("as_users_call")
def test_a_budget_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(attnprobe.ParameterError, match="at least 1; got 0"):
        attnprobe.measure(long_model(), batch_of(8), memory_budget=0)

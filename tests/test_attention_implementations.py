"""Attention implementations: sdpa, eager, FlexAttention, and kernels that get no mask of pairs."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import attnprobe
from attnprobe.errors import IncompleteRunError, PatternError, UnsupportedModelError
from attnprobe.testing.tiny_models import VOCABULARY, tiny_model

NAMES = ("span", "waad", "fai")
LENGTHS = (17, 9, 23)
FAMILIES = ["llama", "qwen2", "mistral", "gpt2", "gemma3_text"]


def ids_of(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(4))


def probe_of(**settings) -> attnprobe.HeadStatisticsProbe:
    return attnprobe.HeadStatisticsProbe(window=4, horizon=(2, 6), entropy=False, **settings)


def measured(model, batch) -> attnprobe.HeadStatistics:
    return attnprobe.measure(model, batch, window=4, horizon=(2, 6), entropy=False)


# ---- kernels in the style of flash attention ----------------------------------------------------


def seen_by_kernel(query, key, mask, sliding_window, options) -> torch.Tensor:
    """What a flash kernel lets through: causal, within its window, real keys, own sequence."""
    queries, keys = query.shape[2], key.shape[2]
    own = torch.arange(queries)[:, None] + keys - queries
    seen = torch.arange(keys) <= own
    if sliding_window is not None:
        seen = seen & (torch.arange(keys) > own - sliding_window)
    seen = seen.expand(query.shape[0], 1, queries, keys)
    positions, bounds = options.get("position_ids"), options.get("cu_seq_lens_q")
    if mask is not None:
        return seen & mask.bool()[:, None, None, -keys:]
    if bounds is not None:
        number = torch.bucketize(torch.arange(queries), bounds[1:].long(), right=True)
        return seen & (number[:, None] == number)
    if positions is not None and query.shape[0] == 1 and queries > 1:
        number = (positions[0].diff(prepend=positions[0, :1] - 1) != 1).cumsum(0)
        return seen & (number[:, None] == number)
    return seen


def kernel(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **options):
    assert attention_mask is None or attention_mask.ndim == 2
    seen = seen_by_kernel(query, key, attention_mask, sliding_window, options)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    score = (query @ key.mT * scaling).masked_fill(~seen, -torch.inf)
    pattern = score.softmax(-1).nan_to_num()
    return (pattern @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("padded_kernel", kernel)
AttentionMaskInterface.register("padded_kernel", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
AttentionInterface.register("maskless_kernel", kernel)


def packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One row of several sequences: ids, positions, and where each sequence begins and ends."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    return ids_of(1, sum(LENGTHS)), positions, bounds


def of_sequences(model, ids: torch.Tensor, skipped: int = 3) -> list[attnprobe.HeadStatistics]:
    """Return the statistics of each sequence of the row on its own."""
    parts = ids[0].split(LENGTHS)
    return [
        measured(model, attnprobe.TokenBatch.from_ids(part[None], response_start=skipped)) for part in parts
    ]


def response_of(skipped: int = 3) -> torch.Tensor:
    return torch.cat([torch.arange(length) >= skipped for length in LENGTHS])[None]


def assert_sequences(found: attnprobe.HeadStatistics, alone: list[attnprobe.HeadStatistics]) -> None:
    sequences = found.sequences()
    assert sequences.segment_ids is None
    assert len(sequences.waad) == len(alone)
    first = 0
    for i, (expected, length) in enumerate(zip(alone, LENGTHS, strict=True)):
        inside = slice(first, first + length)
        for name in ("waad", "fai"):
            values = getattr(expected, name)[0]
            for given in (getattr(found, name)[0, ..., inside], getattr(sequences, name)[i, ..., :length]):
                torch.testing.assert_close(given, values, equal_nan=True, rtol=0, atol=2e-5)
        for span in (found.sequence_span[0, ..., i], sequences.span[i]):
            torch.testing.assert_close(span, expected.span[0], rtol=0, atol=1e-4)
        first += length


@pytest.mark.parametrize("given", ["positions", "positions and ones", "bounds"])
@pytest.mark.parametrize("implementation", ["padded_kernel", "maskless_kernel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_of_a_kernel(family: str, implementation: str, given: str) -> None:
    """Rows whose sequences are told apart by positions or bounds alone, each as if it were alone."""
    model = tiny_model(family)
    ids, positions, bounds = packed()
    alone = of_sequences(model, ids)
    model.set_attn_implementation(implementation)
    options = {"position_ids": positions}
    if given == "positions and ones":
        options["attention_mask"] = torch.ones_like(ids)
    if given == "bounds":
        options |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 23, "max_length_k": 23}
    probe = probe_of()
    with torch.no_grad():
        plain = model(ids, use_cache=False, **options).logits
        with attnprobe.attach(model, probe, response_mask=response_of()):
            logits = model(ids, use_cache=False, **options).logits
    assert torch.equal(plain, logits)
    assert_sequences(probe.result(), alone)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("llama", "sdpa"), ("mistral", "sdpa"), ("mistral", "eager"), ("mistral", "flex_attention")],
)
def test_packed_rows_with_a_mask_of_pairs(family: str, implementation: str) -> None:
    model = tiny_model(family)
    ids, positions, _ = packed()
    alone = of_sequences(model, ids)
    model.set_attn_implementation(implementation)
    probe = probe_of()
    with torch.no_grad(), attnprobe.attach(model, probe, response_mask=response_of()):
        model(ids, position_ids=positions, use_cache=False)
    assert_sequences(probe.result(), alone)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("falcon", {"use_cache": False}),
        ("opt", {"use_cache": False}),
    ],
)
def test_packed_rows_that_a_model_does_not_separate_are_refused(family: str, options: dict) -> None:
    """With a cache, or in families that ignore positions, attention crosses from one sequence to the next."""
    model = tiny_model(family)
    ids, positions, _ = packed()
    options = {**options, "position_ids": positions}
    if family == "falcon" and Version(transformers.__version__) >= Version("5.24"):
        # Since then, its mask is made with the positions.
        alone, probe = of_sequences(model, ids), probe_of()
        with torch.no_grad(), attnprobe.attach(model, probe, response_mask=response_of()):
            model(ids, **options)
        assert_sequences(probe.result(), alone)
        return
    with (
        torch.no_grad(),
        attnprobe.attach(model, probe_of()),
        pytest.raises(UnsupportedModelError, match="see each other"),
    ):
        model(ids, **options)


def test_measured_packed_rows_have_the_span_of_each_sequence() -> None:
    model = tiny_model("llama")
    ids, _, _ = packed()
    segments = torch.repeat_interleave(torch.tensor([2, 5, 7]), torch.tensor(LENGTHS))[None]
    two = torch.cat([ids, ids.flip(-1)])
    real = torch.ones_like(two, dtype=torch.bool)
    response = torch.cat([response_of(), response_of()])
    response[1, : LENGTHS[0]] = False  # The first sequence of the second row has no response.
    found = measured(model, attnprobe.TokenBatch(two, real, response, segments.expand(2, -1)))
    sequences = found.sequences()
    assert len(sequences.waad) == 5
    assert found.sequence_span.shape[-1] == 3
    assert found.sequence_span[1, ..., 2].isnan().all()
    for i, alone in enumerate(of_sequences(model, ids)):
        torch.testing.assert_close(sequences.span[i], alone.span[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(
            sequences.fai[i, ..., : LENGTHS[i]], alone.fai[0], equal_nan=True, rtol=0, atol=2e-5
        )
    again = attnprobe.HeadStatistics.concatenate([found, found.select([0])])
    assert torch.equal(again.sequence_span[2], found.sequence_span[0])
    assert measured(model, attnprobe.TokenBatch.from_ids(ids)).sequence_span is None


PADDED = [(family, "padded_kernel", side) for family in FAMILIES for side in ("left", "right", "none")]
# Each of these compiles for several seconds.
PADDED += [("llama", "flex_attention", "none"), ("mistral", "flex_attention", "left")]
PADDED += [("llama4_text", "flex_attention", "right")]


@pytest.mark.parametrize(("family", "implementation", "side"), PADDED)
def test_padded_rows(family: str, implementation: str, side: str) -> None:
    """Windows, chunks and padding: each row gives what it gives alone."""
    ids, real = ids_of(2, 30), torch.ones(2, 30, dtype=torch.bool)
    if side != "none":
        real[0, slice(0, 8) if side == "left" else slice(22, 30)] = False
    expected = measured(tiny_model(family), attnprobe.TokenBatch.from_ids(ids, real))
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    probe = probe_of()
    options = {} if side == "none" else {"attention_mask": real.long(), "position_ids": positions}
    with torch.no_grad():
        plain = model(ids, use_cache=False, **options).logits
        with attnprobe.attach(model, probe):
            logits = model(ids, use_cache=False, **options).logits
    assert torch.equal(plain[real], logits[real])
    for found in (probe.result(), measured(model, attnprobe.TokenBatch.from_ids(ids, real))):
        for name in NAMES:
            torch.testing.assert_close(
                getattr(found, name), getattr(expected, name), equal_nan=True, rtol=0, atol=2e-4
            )


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_generation(family: str) -> None:
    model, prompt = tiny_model(family), ids_of(1, 12)
    model.set_attn_implementation("padded_kernel")
    probe = probe_of()
    with attnprobe.attach(model, probe):
        out = model.generate(prompt, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = measured(tiny_model(family), attnprobe.TokenBatch.from_ids(out[:, :-1]))
    for name in NAMES:
        torch.testing.assert_close(
            getattr(probe.result(), name), getattr(expected, name), equal_nan=True, rtol=0, atol=2e-4
        )


def test_a_kernel_that_packs_while_the_call_says_otherwise_is_found_out() -> None:
    """The sequences in the call's arguments are checked against the output, like everything else."""
    model = tiny_model("llama")
    ids, positions, _ = packed()

    def plain_kernel(module, query, key, value, attention_mask, position_ids=None, **options):
        return kernel(module, query, key, value, attention_mask, **options)

    AttentionInterface.register("plain_kernel", plain_kernel)
    model.set_attn_implementation("plain_kernel")
    with (
        torch.no_grad(),
        attnprobe.attach(model, probe_of()),
        pytest.raises(IncompleteRunError, match="does something to its attention"),
    ):
        model(ids, position_ids=positions, use_cache=False)


def test_suppression_needs_a_mask_of_pairs() -> None:
    model = tiny_model("llama")
    for implementation in ("padded_kernel", "flex_attention"):
        model.set_attn_implementation(implementation)
        with (
            torch.no_grad(),
            attnprobe.suppress_attention(model, keys=[3]),
            pytest.raises(UnsupportedModelError, match=implementation),
        ):
            model(ids_of(1, 12), use_cache=False)


def test_masks_of_flex_attention_that_look_ahead_are_refused() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    model = tiny_model("llama", implementation="flex_attention")
    mask = create_block_mask(lambda b, h, q, k: k <= q + 1, 1, None, 20, 20, device="cpu")
    with (
        torch.no_grad(),
        attnprobe.attach(model, probe_of()),
        pytest.raises((PatternError, UnsupportedModelError), match="later"),
    ):
        model(ids_of(1, 20), attention_mask=mask, use_cache=False)

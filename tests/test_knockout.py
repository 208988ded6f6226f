"""Divergence under attention knock-out, against a model run with a mask of its own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import attnprobe
from attnprobe import AttnprobeError, ParameterError, TokenBatch, knockout_divergence
from attnprobe.testing.tiny_models import tiny_model


def batch_of(side: str) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 99, (count,), generator=generator).tolist() for count in (14, 9)]
    right = TokenBatch.from_ids(rows, response_start=3)
    if side == "right":
        return right
    shifts = [int((~row).sum()) for row in right.attention_mask]
    moved = [
        torch.stack([row.roll(by) for row, by in zip(part, shifts, strict=True)])
        for part in (right.input_ids, right.attention_mask, right.response_mask)
    ]
    return TokenBatch.from_ids(moved[0], moved[1], response_mask=moved[2])


def slow_divergence(model, ids: torch.Tensor, key: int, rows: list[int]) -> float:
    """One sequence, one key, with an additive mask in which later rows do not see it."""
    count = len(ids)
    seen = torch.ones(count, count, dtype=torch.bool).tril()
    seen[key + 1 :, key] = False
    mask = torch.zeros(1, 1, count, count).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        own = model(ids[None]).logits[0].double().log_softmax(-1)
        other = model(ids[None], attention_mask=mask).logits[0].double().log_softmax(-1)
    terms = [float((own[t].exp() * (own[t] - other[t])).sum()) for t in rows]
    return sum(terms) / len(terms) if terms else math.nan


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("horizon", [(1, None), (2, 4)])
def test_divergence_is_that_of_a_run_without_the_key(side: str, horizon: tuple) -> None:
    model = tiny_model("llama")
    eager = tiny_model("llama", implementation="eager")
    batch = batch_of(side)
    asked = batch.response_mask.clone()
    actual = knockout_divergence(model, batch, asked, horizon=horizon, batch_size=3)
    low, high = horizon
    for row in range(2):
        start = int(batch.attention_mask[row].nonzero()[0])
        ids = batch.input_ids[row][batch.attention_mask[row]]
        for key in range(3, len(ids)):
            rows = [t for t in range(3, len(ids)) if t >= key + low and (high is None or t <= key + high)]
            expected = slow_divergence(eager, ids, key, rows)
            assert float(actual[row, start + key]) == pytest.approx(expected, rel=1e-3, abs=1e-5, nan_ok=True)
    assert bool(actual[~batch.response_mask].isnan().all())


def test_only_what_was_asked_about_is_measured() -> None:
    model, batch = tiny_model("llama"), batch_of("right")
    asked = torch.zeros_like(batch.response_mask)
    asked[0, [1, 5, 7]] = True
    some = knockout_divergence(model, batch, asked, horizon=(1, None))
    assert (~some.isnan()).nonzero().tolist() == [[0, 5], [0, 7]]
    every = knockout_divergence(model, batch, batch.response_mask, horizon=(1, None), batch_size=1)
    torch.testing.assert_close(some[0, [5, 7]], every[0, [5, 7]], rtol=1e-4, atol=1e-6)
    assert bool((every[~every.isnan()] >= 0).all())


def test_fewer_heads_are_less_of_a_loss_than_none() -> None:
    """Suppressing in no layer that reads the token changes nothing; the model is left as it was."""
    model, batch = tiny_model("llama"), batch_of("right")
    before = model(batch.input_ids).logits
    asked = batch.response_mask
    last = knockout_divergence(model, batch, asked, horizon=(1, None), layers=[2], heads=[0])
    every = knockout_divergence(model, batch, asked, horizon=(1, None))
    assert float(last.nansum()) < float(every.nansum())
    assert torch.equal(model(batch.input_ids).logits, before)


def test_heads_come_in_every_form_and_batches_too() -> None:
    model, batch = tiny_model("llama"), batch_of("right")
    horizon = (1, None)
    groups = attnprobe.classify_heads(attnprobe.measure(model, batch))
    pairs = groups.pairs("global")
    expected = knockout_divergence(model, batch, batch.response_mask, horizon=horizon, heads=pairs)
    by_layer = {i: [head for layer, head in pairs if layer == i] for i, _ in pairs}
    for heads in (groups["global"], groups.global_heads, by_layer, set(pairs), dict.fromkeys(pairs, 2.0)):
        again = knockout_divergence(model, batch, batch.response_mask, horizon=horizon, heads=heads)
        torch.testing.assert_close(again, expected, equal_nan=True)
    everywhere, by_default = (
        knockout_divergence(model, batch, batch.response_mask, horizon=horizon, **options)
        for options in ({"heads": "all"}, {})
    )
    torch.testing.assert_close(everywhere, by_default, rtol=1e-4, atol=1e-6, equal_nan=True)
    names = ("input_ids", "attention_mask", "response_mask")
    lists = {name: getattr(batch, name).long().tolist() for name in names}
    again = knockout_divergence(
        model, lists, lists["response_mask"], horizon=horizon, heads=pairs, batch_size=np.int64(4)
    )
    torch.testing.assert_close(again, expected, equal_nan=True)


def test_rows_in_a_gap_do_not_count() -> None:
    """What stands between two parts of a response is read, but what it predicts is not asked about."""
    model, whole = tiny_model("llama"), batch_of("right").select(0)
    mask = whole.response_mask.clone()
    mask[0, 7:9] = False
    gapped = TokenBatch.from_ids(whole.input_ids, whole.attention_mask, response_mask=mask)
    actual = knockout_divergence(model, gapped, mask, horizon=(1, None))
    eager = tiny_model("llama", implementation="eager")
    for key in (3, 6, 9):
        rows = [row for row in range(3, 14) if row > key and mask[0, row]]
        expected = slow_divergence(eager, whole.input_ids[0], key, rows)
        assert float(actual[0, key]) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert bool(actual[0, 7:9].isnan().all())


WRONG: dict[str, list[Any]] = {
    "tokens": [None, "all", 3, torch.ones(2, 3), torch.full((2, 14), 0.5), torch.full((2, 14), math.nan)],
    "batch_size": [0, 2.5, "8", None, True],
    "horizon": [(5, 2), 10, "near", None],
    "heads": [[7], "some", [(0, 9)], {9: [0]}, 1.5, []],
    "batch": ["text", None, 3, torch.full((2, 14), 10**6)],
    "progress": ["yes", 1],
}


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("name", list(WRONG))
def test_parameters_that_make_no_sense_are_refused(name: str) -> None:
    batch = batch_of("right")
    arguments = {"model": tiny_model("llama"), "batch": batch, "tokens": batch.response_mask}
    for wrong in WRONG[name]:
        with pytest.raises(AttnprobeError, match=r"\w{3}"):
            knockout_divergence(**{**arguments, name: wrong})


def test_messages_have_the_facts() -> None:
    model, batch = tiny_model("llama"), batch_of("right")
    with pytest.raises(ParameterError, match=r"tokens.*\[2, 14\].*\[2, 3\]"):
        knockout_divergence(model, batch, batch.response_mask[:, :3])
    with pytest.raises(ParameterError, match=r"heads.*\(0, 7\).*0\.\.3"):
        knockout_divergence(model, batch, batch.response_mask, heads=[7])
    other = tiny_model("mistral")
    groups = attnprobe.classify_heads(attnprobe.measure(other, batch))
    with pytest.raises(ParameterError, match=r"Mistral.*Llama"):
        knockout_divergence(model, batch, batch.response_mask, heads=groups["local"])
    packed = TokenBatch.from_ids(
        torch.ones(1, 4, dtype=torch.long), position_ids=torch.tensor([[0, 1, 0, 1]])
    )
    with pytest.raises(ParameterError, match="packed"):
        knockout_divergence(model, packed, packed.response_mask)


def test_a_horizon_beyond_the_text_is_the_text() -> None:
    model = tiny_model("llama")
    batch = attnprobe.TokenBatch.from_ids([list(range(1, 13))], response_start=4)
    asked = torch.zeros(1, 12, dtype=torch.bool)
    asked[0, 6] = True
    whole = attnprobe.knockout_divergence(model, batch, asked, horizon=(1, None))
    for far in (12, 10**9, 10**30):
        found = attnprobe.knockout_divergence(model, batch, asked, horizon=(1, far))
        assert torch.equal(found.nan_to_num(-1), whole.nan_to_num(-1))
    none = attnprobe.knockout_divergence(model, batch, asked, horizon=(10**30, None))
    assert bool(none.isnan().all())

"""Scores of rollouts: the completions' own, whatever stands around them."""

from __future__ import annotations

import pytest
import torch

import attnprobe
from attnprobe import BatchError, PatternError, ResultError
from attnprobe.rl import Rollout, measure_rollout, score_rollout
from attnprobe.testing.tiny_models import FAMILIES, tiny_model

HORIZON = (1, 4)


def rollout_of(lengths=((3, 9), (5, 6), (2, 9)), *, width=9, seed=0) -> Rollout:
    """Return prompts padded left and completions padded right, of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(prompt for prompt, _ in lengths)
    shape = (len(lengths), longest), (len(lengths), width)
    prompt_ids, completion_ids = (torch.randint(0, 99, size, generator=generator) for size in shape)
    prompt_mask, completion_mask = (torch.zeros(size, dtype=torch.long) for size in shape)
    for row, (prompt, completion) in enumerate(lengths):
        prompt_mask[row, longest - prompt :] = 1
        completion_mask[row, :completion] = 1
    return Rollout(prompt_ids, prompt_mask, completion_ids, completion_mask)


def test_scores_are_those_of_measuring_by_hand() -> None:
    model, rollout = tiny_model("llama"), rollout_of()
    statistics = measure_rollout(model, rollout, layers=[0, 2], horizon=HORIZON)
    scores = score_rollout(statistics, None, rollout)
    batch = attnprobe.TokenBatch.from_rollout(
        rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, rollout.completion_mask
    )
    by_hand = attnprobe.measure(model, batch, layers=[0, 2], horizon=HORIZON)
    expected = attnprobe.score_tokens(by_hand, attnprobe.classify_heads(by_hand))
    assert torch.equal(scores.waad.nan_to_num(-1), expected.waad[:, 5:].nan_to_num(-1))
    assert torch.equal(scores.fai.nan_to_num(-1), expected.fai[:, 5:].nan_to_num(-1))
    assert torch.equal(scores.response_mask, rollout.completion_mask.bool())
    assert scores.waad.shape == rollout.completion_ids.shape
    assert scores.entropy is None


@pytest.mark.parametrize("size", [1, 2, None])
def test_scores_do_not_depend_on_the_batch_size(size) -> None:
    model, rollout = tiny_model("qwen3"), rollout_of()
    whole = measure_rollout(model, rollout, horizon=HORIZON)
    parts = measure_rollout(model, rollout, horizon=HORIZON, batch_size=size)
    assert torch.allclose(whole.waad, parts.waad, atol=1e-5, equal_nan=True)
    assert torch.allclose(whole.span, parts.span, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss", "mistral"])
def test_whole_passes_of_the_root_give_the_same(family) -> None:
    """Where parameters are sharded the root module is called and run to its end."""
    assert family in FAMILIES
    model, rollout = tiny_model(family), rollout_of()
    stopped = measure_rollout(model, rollout, layers=[0, 1], horizon=HORIZON, batch_size=2)
    whole = measure_rollout(model, rollout, layers=[0, 1], horizon=HORIZON, batch_size=2, root=model)
    for name in ("span", "waad", "fai"):
        assert torch.allclose(getattr(stopped, name), getattr(whole, name), atol=1e-5, equal_nan=True)
    assert stopped.model_name == whole.model_name


@pytest.mark.parametrize("root", [False, True])
def test_without_span_the_scores_are_the_same(root) -> None:
    model, rollout = tiny_model("llama"), rollout_of()
    whole = measure_rollout(model, rollout, horizon=HORIZON)
    heads = attnprobe.classify_heads(whole)
    without = measure_rollout(model, rollout, horizon=HORIZON, span=False, root=model if root else None)
    assert without.span is None
    scores = [score_rollout(statistics, heads, rollout) for statistics in (whole, without)]
    assert torch.allclose(scores[0].waad, scores[1].waad, atol=1e-6, equal_nan=True)
    assert torch.allclose(scores[0].fai, scores[1].fai, atol=1e-6, equal_nan=True)


def test_a_row_that_is_masked_entirely_is_undefined_and_changes_no_other() -> None:
    model, rollout = tiny_model("llama"), rollout_of(((3, 9), (5, 0), (2, 9)))
    statistics = measure_rollout(model, rollout, horizon=HORIZON)
    alone = measure_rollout(model, rollout.select(torch.tensor([True, False, True])), horizon=HORIZON)
    assert bool(statistics.span[1].isnan().all())
    assert bool(statistics.waad[1].isnan().all())
    assert torch.allclose(statistics.span[[0, 2]], alone.span, atol=1e-5)
    scores = score_rollout(statistics, None, rollout)
    assert torch.equal(
        attnprobe.classify_heads(statistics).local_heads, attnprobe.classify_heads(alone).local_heads
    )
    assert not bool(scores.response_mask[1].any())


def test_completions_of_one_token() -> None:
    rollout = rollout_of(((3, 1), (5, 1)), width=1)
    statistics = measure_rollout(tiny_model("llama"), rollout, horizon=HORIZON)
    scores = score_rollout(statistics, None, rollout)
    assert bool(scores.waad.isfinite().all())
    assert bool(scores.fai.isnan().all())


def test_tool_output_is_read_through_but_not_scored() -> None:
    model, plain = tiny_model("llama"), rollout_of()
    tools = torch.ones_like(plain.completion_mask)
    tools[0, 3:5] = 0
    rollout = Rollout(plain.prompt_ids, plain.prompt_mask, plain.completion_ids, plain.completion_mask, tools)
    statistics = measure_rollout(model, rollout, horizon=HORIZON)
    scores, without = score_rollout(statistics, None, rollout), score_rollout(statistics, None, plain)
    assert scores.response_mask[0].tolist() == [True] * 3 + [False] * 2 + [True] * 4
    assert bool(scores.waad[0, 3:5].isnan().all())
    assert torch.equal(scores.waad[0, 5:], without.waad[0, 5:])


def test_the_model_is_left_as_it_was() -> None:
    model, rollout = tiny_model("llama").train(), rollout_of()
    before = torch.random.get_rng_state()
    for root in (None, model):
        measure_rollout(model, rollout, horizon=HORIZON, root=root)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("root", [False, True])
def test_weights_that_are_no_numbers_are_found_out(root) -> None:
    model, rollout = tiny_model("llama"), rollout_of()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(PatternError, match="the query is not finite"):
        measure_rollout(model, rollout, layers=[1], horizon=HORIZON, root=model if root else None)


def test_scores_that_are_no_numbers_are_found_out(as_users_call) -> None:
    rollout = rollout_of()
    entropy = torch.zeros(rollout.completion_ids.shape)
    entropy[1, 7] = torch.nan
    assert score_rollout(None, None, rollout, entropy=entropy).entropy is not None, "padding may be anything"
    entropy[1, 2] = torch.nan
    with pytest.raises(ResultError, match="entropy is nan at token 2 of row 1 of the rollout"):
        score_rollout(None, None, rollout, entropy=entropy)
    statistics = measure_rollout(tiny_model("llama"), rollout, horizon=HORIZON)
    statistics.waad[2, :, :, 4] = torch.inf
    with pytest.raises(ResultError, match="WAAD is inf at token 4 of row 2"):
        score_rollout(statistics, None, rollout)


def test_masks_with_holes_and_empty_completions_are_refused(as_users_call) -> None:
    rollout = rollout_of()
    rollout.completion_mask[0, 4] = 0
    with pytest.raises(BatchError, match="hole in row 0"):
        measure_rollout(tiny_model("llama"), rollout)
    with pytest.raises(BatchError, match="no tokens"):
        measure_rollout(tiny_model("llama"), rollout_of(((3, 0), (5, 0)), width=0))

"""Weights from the pass that a trainer runs anyway are those of a pass of our own."""

from __future__ import annotations

import pytest
import torch

from attnprobe import AttnprobeWarning, ResultError
from attnprobe.rl import CoupledRhythmCredit, EntropyCredit, Rollout, RolloutCredit, credit_weights
from attnprobe.testing.model_state import assert_same_state, model_state
from attnprobe.testing.tiny_models import tiny_model

HORIZON = (1, 4)
LENGTHS = ((3, 12), (5, 7), (2, 12), (4, 9), (3, 12))


def rollout_with_tools(seed: int = 0) -> Rollout:
    """Return completions of different lengths, one of them twice, and one in which a tool wrote."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(1, 99, (n,), generator=generator) for n, _ in LENGTHS]
    completions = [torch.randint(1, 99, (n,), generator=generator) for _, n in LENGTHS]
    tools = [torch.ones(n, dtype=torch.long) for _, n in LENGTHS]
    prompts[4], completions[4] = prompts[0], completions[0]
    tools[2][3:6] = 0
    tools[4][5:7] = 0
    return Rollout.from_lists(prompts, completions, tools)


def sequences(rollout: Rollout) -> list[torch.Tensor]:
    asked = [ids[mask] for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    written = rollout.per_completion(rollout.completion_ids)
    return [torch.cat(pair) for pair in zip(asked, written, strict=True)]


def left_padded(model, rows) -> None:
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows])
    model(input_ids=ids, attention_mask=mask.long(), position_ids=(mask.cumsum(-1) - 1).clamp(min=0))


def packed(model, rows) -> None:
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    model(input_ids=torch.cat(rows)[None], attention_mask=None, position_ids=positions, use_cache=False)


PASSES = {
    "padded": left_padded,
    "packed": packed,
    "micro-batches in another order": lambda model, rows: [
        left_padded(model, rows[3:]),
        left_padded(model, rows[:3][::-1]),
    ],
    "packed micro-batches with rows of filling": lambda model, rows: [
        packed(model, [rows[1], torch.tensor([7, 7]), rows[0], rows[4]]),
        packed(model, [torch.tensor([7, 7])]),
        packed(model, [rows[2], rows[3]]),
    ],
}


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_watched_weights_are_those_of_a_pass_of_our_own(family, kind) -> None:
    model, rollout = tiny_model(family), rollout_with_tools()
    advantages = [1.0, -1.0, 0.5, 0.0, 2.0]
    own = RolloutCredit(model, CoupledRhythmCredit(), horizon=HORIZON, reclassify_every=2)
    watching = RolloutCredit(model, CoupledRhythmCredit(), horizon=HORIZON, reclassify_every=2)
    before = model_state(model)
    for step in range(2):  # With span, and without.
        with watching.watching(model, rollout, step) as watched, torch.no_grad():
            PASSES[kind](model, sequences(rollout))
        expected = own.weigh_with_scores(rollout, advantages, step)
        found = watched.weigh_with_scores(advantages)
        torch.testing.assert_close(found.gamma, expected.gamma)
        for name in ("waad", "fai"):
            mine, theirs = getattr(found.scores, name), getattr(expected.scores, name)
            there = expected.measured
            torch.testing.assert_close(mine[there], theirs[there], equal_nan=True, atol=1e-4, rtol=1e-4)
    assert watching.grouping.saved_groups["local_heads"] == own.grouping.saved_groups["local_heads"]
    assert_same_state(before, model_state(model))


def test_weights_are_wanted_before_advantages_are_known() -> None:
    model, rollout = tiny_model("llama"), rollout_with_tools()
    credit = RolloutCredit(model, CoupledRhythmCredit(), horizon=HORIZON, signs="positive")
    with credit.watching(model, rollout, 0) as watched, torch.no_grad():
        left_padded(model, sequences(rollout))
    gamma = watched.weigh()
    assert credit.last.metrics["credit/measured_rows"] == 5
    assert credit.last.metrics["credit/advantage_change"] != credit.last.metrics["credit/advantage_change"]
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0, 2.0])
    later = credit_weights(advantages, gamma, rollout.response_mask, signs="positive")
    torch.testing.assert_close(later, credit.weigh(rollout, advantages, 1))
    torch.testing.assert_close(gamma, credit.weigh(rollout, None, 1))


def test_a_pass_that_does_not_fit_the_rollout_is_found_out() -> None:
    model, rollout = tiny_model("llama"), rollout_with_tools()
    credit = RolloutCredit(model, CoupledRhythmCredit(), horizon=HORIZON)
    with credit.watching(model, rollout, 0) as watched, torch.no_grad():
        left_padded(model, sequences(rollout)[:3])
    with pytest.raises(ResultError, match=r"2 of 5 completions were in no pass.*number 3"):
        watched.weigh()
    with credit.watching(model, rollout, 0), torch.no_grad():
        left_padded(model, sequences(rollout))
        with pytest.raises(ResultError, match="more often than the rollout, which has it 1 times"):
            left_padded(model, sequences(rollout)[1:2])
    with credit.watching(model, rollout, 0) as watched, torch.no_grad():
        packed(model, sequences(rollout))
    assert bool((watched.weigh() != 1).any()), "nothing is left of the pass that failed"


def test_rows_of_filling_do_not_vote() -> None:
    """A process that was given nothing else has no statistics, and the others do not wait for it."""
    model, rollout = tiny_model("llama"), rollout_with_tools()
    filling = [1, 0, 0, 0, 1]
    own = [
        mask * (not fill)
        for mask, fill in zip(rollout.per_completion(rollout.response_mask), filling, strict=True)
    ]
    asked = [ids[mask] for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    written = rollout.per_completion(rollout.completion_ids)
    groups = []
    for rows in (Rollout.from_lists(asked, written, own), rollout.select([0, 1, 1, 1, 0])):
        credit = RolloutCredit(model, CoupledRhythmCredit(), horizon=HORIZON)
        with credit.watching(model, rows, 0) as watched, torch.no_grad():
            left_padded(model, sequences(rollout))
        watched.weigh()
        assert credit.last.metrics["credit/measured_rows"] == 3
        groups.append(credit.grouping.saved_groups)
    assert groups[0] == groups[1]
    nothing = Rollout.from_lists(asked, written, [torch.zeros_like(each) for each in own])
    credit = RolloutCredit(model, CoupledRhythmCredit(), horizon=HORIZON)
    with credit.watching(model, nothing, 0) as watched, torch.no_grad():
        left_padded(model, sequences(rollout))
    assert bool((watched.weigh() == 1).all())
    assert credit.grouping.is_due(0)


def test_a_strategy_without_attention_watches_nothing() -> None:
    model, rollout = tiny_model("llama"), rollout_with_tools()
    credit = RolloutCredit(model, EntropyCredit(), horizon=HORIZON)
    with credit.watching(model, rollout, 0) as watched:
        pass
    entropy = torch.rand(rollout.completion_ids.shape)
    gamma = watched.weigh([1.0] * 5, entropy=entropy)
    torch.testing.assert_close(gamma, credit.weigh(rollout, [1.0] * 5, 0, entropy=entropy))


def test_what_is_drawn_at_random_is_told() -> None:
    model, rollout = tiny_model("gpt2", attn_pdrop=0.1).train(), rollout_with_tools()
    credit = RolloutCredit(model, CoupledRhythmCredit(), horizon=HORIZON)
    with (
        pytest.warns(AttnprobeWarning, match="at random"),
        credit.watching(model, rollout, 0),
        torch.no_grad(),
    ):
        left_padded(model, sequences(rollout))


def test_gradients_and_training_mode_are_the_trainers_own() -> None:
    """A trainer may weigh and train in the same pass: the pass is neither changed nor cut from its graph."""
    model, rollout = tiny_model("llama").train(), rollout_with_tools()
    ids = torch.stack([sequences(rollout)[0], sequences(rollout)[2].new_full((15,), 5)])
    plain = model(input_ids=ids).logits
    credit = RolloutCredit(model, CoupledRhythmCredit(), horizon=HORIZON)
    alone = rollout.select([1, 0, 0, 0, 0])
    with credit.watching(model, alone, 0) as watched:
        logits = model(input_ids=ids).logits
    assert torch.equal(plain, logits)
    assert logits.requires_grad
    assert model.training
    assert bool((watched.weigh([1.0]) > 1).any())

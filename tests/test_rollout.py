"""Rollouts from every layout that trainers keep them in, and the way back."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnprobe import BatchError, ParameterError
from attnprobe.rl import CoupledRhythmCredit, Rollout, RolloutCredit
from attnprobe.testing.tiny_models import tiny_model

HORIZON = (1, 4)


@st.composite
def turns(draw):
    """Return prompts, completions, and which tokens of these the policy wrote itself."""
    count = draw(st.integers(1, 4))
    ids = st.integers(1, 90)
    prompts = [draw(st.lists(ids, min_size=1, max_size=5)) for _ in range(count)]
    completions = [draw(st.lists(ids, min_size=1, max_size=7)) for _ in range(count)]
    # A completion begins with a token of the policy's own.
    own = [[1, *(draw(st.integers(0, 1)) for _ in each[1:])] for each in completions]
    return prompts, completions, own


def rows_of(rollout: Rollout) -> list[tuple[list[int], list[int], list[bool]]]:
    return [
        (ids[asked].tolist(), written[real].tolist(), own[real].tolist())
        for ids, asked, written, real, own in zip(
            rollout.prompt_ids,
            rollout.prompt_mask,
            rollout.completion_ids,
            rollout.completion_mask,
            rollout.response_mask,
            strict=True,
        )
    ]


def joined(rows) -> list[int]:
    return list(chain.from_iterable(rows))


def padded(rows: list[list[int]], left: bool) -> torch.Tensor:
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    return torch.tensor([f + row if left else row + f for f, row in zip(fill, rows, strict=True)])


@settings(deadline=None, max_examples=40)
@given(turns(), st.booleans())
def test_every_layout_holds_the_same_rollout(parts, left) -> None:
    prompts, completions, own = parts
    expected = [
        (prompt, completion, [bool(mark) for mark in marks])
        for prompt, completion, marks in zip(prompts, completions, own, strict=True)
    ]
    whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    marks = [[0] * len(prompt) + mark for prompt, mark in zip(prompts, own, strict=True)]
    lists = Rollout.from_lists(prompts, completions, own)
    rows = Rollout.from_sequences(
        padded(whole, left),
        padded([[1] * len(row) for row in whole], left),
        response_mask=padded(marks, left),
    )
    packed = Rollout.from_packed(
        [joined(whole)], [joined(range(len(row)) for row in whole)], response_mask=[joined(marks)]
    )
    for rollout in (lists, rows, packed):
        assert rows_of(rollout) == expected
    ids = padded(whole, left)
    assert torch.equal(rows.scatter(rows.completion_ids, fill=0), rows.scatter(rows.gather(ids), fill=0))
    assert torch.equal(rows.gather(ids), rows.completion_ids)
    flat = torch.tensor([joined(whole)])
    assert torch.equal(packed.gather(flat), packed.completion_ids)
    # Only the completions' tokens are put back.
    ones = rows.scatter(torch.full(rows.completion_ids.shape, 2.0))
    assert int((ones == 2).sum()) == sum(map(len, completions))
    assert [each.tolist() for each in lists.per_completion(lists.completion_ids)] == completions
    chosen = rows.select([0] * (len(whole) - 1) + [1])
    assert torch.equal(chosen.scatter(chosen.completion_ids, fill=0)[:-1], torch.zeros_like(ids[:-1]))


def test_weights_go_back_into_the_layout_they_came_from() -> None:
    """Advantages for each token of packed rows, and weights to multiply them by."""
    ids = torch.randint(1, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]
    response = (positions >= 5).int()
    packed = Rollout.from_packed(ids, positions, response_mask=response)
    rows = Rollout.from_sequences(
        torch.stack([ids[0, :25], torch.nn.functional.pad(ids[0, 25:], (0, 10))]),
        torch.arange(25) < torch.tensor([25, 15])[:, None],
        response_mask=(torch.arange(25) >= 5) & (torch.arange(25) < torch.tensor([25, 15])[:, None]),
    )
    gammas = []
    for rollout in (packed, rows):
        credit = RolloutCredit(tiny_model("llama"), CoupledRhythmCredit(), horizon=HORIZON)
        gammas.append(credit.weigh(rollout, [1.0, -1.0], step=0))
    torch.testing.assert_close(*gammas)
    back = packed.scatter(gammas[0])
    assert back.shape == ids.shape
    assert bool((back[response == 0] == 1).all())
    torch.testing.assert_close(back[0, 5:25], gammas[0][0])
    torch.testing.assert_close(back[0, 30:], gammas[0][1, :10])


def test_padding_after_packed_sequences_is_none_of_them() -> None:
    packed = {"position_ids": [[0, 1, 2, 0, 0]], "response_mask": [[0, 1, 1, 0, 0]]}
    rollout = Rollout.from_packed([[1, 2, 3, 0, 0]], attention_mask=[[1, 1, 1, 0, 0]], **packed)
    assert rows_of(rollout) == [([1], [2, 3], [True, True])]
    assert rollout.scatter(torch.full((1, 2), 2.0)).tolist() == [[1, 2, 2, 1, 1]]


def test_a_row_without_a_response_is_a_masked_completion() -> None:
    rollout = Rollout.from_sequences([[5, 6, 7], [5, 6, 7]], response_mask=[[0, 0, 1], [0, 0, 0]])
    assert rollout.response_mask.tolist() == [[True], [False]]
    assert rollout.prompt_mask.sum(-1).tolist() == [2, 2]
    credit = RolloutCredit(tiny_model("llama"), CoupledRhythmCredit(), horizon=HORIZON)
    assert credit.weigh(rollout, [1.0, 1.0], step=0)[1].tolist() == [1.0]


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Rollout.from_lists([[1]], [[2], [3]]), "1 prompts and 2 completions"),
        (lambda: Rollout.from_lists([], []), "no completions"),
        (lambda: Rollout.from_lists("ab", [[1]]), "prompts must be a list"),
        (lambda: Rollout.from_lists([[1]], [[[2]]]), r"completions\[0\].*\[1, 1\]"),
        (lambda: Rollout.from_lists([[1]], [[2, 3]], [[1]]), r"tool_masks.*\[2\].*\[1\]"),
        (lambda: Rollout.from_lists([[1]], [[]]), "no tokens"),
        (lambda: Rollout.from_lists([[1]], [[1.5]]), "whole numbers"),
        (
            lambda: Rollout.from_sequences([[1, 2]], [[1, 0]], response_mask=[[0, 1]]),
            r"padding at .*\[0, 1\]",
        ),
        (lambda: Rollout.from_sequences([[1, 2, 3]], [[1, 0, 1]], response_mask=[[0, 0, 1]]), "hole"),
        (lambda: Rollout.from_sequences([[1, 2]], response_mask=[[0]]), r"\[1, 2\]; got \[1, 1\]"),
        (lambda: Rollout.from_packed([[1, 2]], [[3, 4]], response_mask=[[0, 1]]), "position 0"),
    ],
)
def test_layouts_that_make_no_sense(make, told) -> None:
    with pytest.raises(BatchError, match=told):
        make()


@pytest.mark.usefixtures("as_users_call")
def test_values_of_another_shape_are_not_put_anywhere() -> None:
    rollout = Rollout.from_sequences([[5, 6, 7]], response_mask=[[0, 1, 1]])
    for call in (rollout.scatter, rollout.gather, rollout.per_completion):
        with pytest.raises(ParameterError, match=r"\[2, 2\]"):
            call(torch.zeros(2, 2))
        with pytest.raises(ParameterError, match="a list"):
            call([[1.0, 2.0]])

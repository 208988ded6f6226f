"""Scores of rollouts: the completions' own, whatever stands around them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import attnprobe
from attnprobe import BatchError, ParameterError, PatternError, ResultError, UnsupportedModelError
from attnprobe.rl import (
    ContinuousCredit,
    CoupledRhythmCredit,
    Rollout,
    RolloutCredit,
    measure_rollout,
    score_rollout,
)
from attnprobe.rl.whole_pass import WholePassAdapter
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
    ended: list[object] = []
    model.register_forward_hook(lambda module, given, output: ended.append(output))
    stopped = measure_rollout(model, rollout, layers=[0, 1], horizon=HORIZON, batch_size=2)
    assert ended == [], "a pass of ours ends after the last layer of interest"
    adapter = WholePassAdapter(model, model)
    whole = measure_rollout(adapter, rollout, layers=[0, 1], horizon=HORIZON, batch_size=2)
    for name in ("span", "waad", "fai"):
        assert torch.allclose(getattr(stopped, name), getattr(whole, name), atol=1e-5, equal_nan=True)
    assert len(ended) == 2, "3 completions, 2 at a time"
    assert stopped.model_name == whole.model_name


@pytest.mark.parametrize("root", [False, True])
def test_without_span_the_scores_are_the_same(root) -> None:
    model, rollout = tiny_model("llama"), rollout_of()
    whole = measure_rollout(model, rollout, horizon=HORIZON)
    heads = attnprobe.classify_heads(whole)
    reader = WholePassAdapter(model, model) if root else model
    without = measure_rollout(reader, rollout, horizon=HORIZON, span=False)
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


def rollout_with_tools() -> tuple[Rollout, torch.Tensor]:
    """Return a rollout in whose first completion a tool wrote tokens 3 and 4, and the mask of tools."""
    plain = rollout_of()
    tools = torch.ones_like(plain.completion_mask)
    tools[0, 3:5] = 0
    masks = plain.prompt_mask, plain.completion_mask
    return Rollout(plain.prompt_ids, masks[0], plain.completion_ids, masks[1], tools), tools


def test_tool_output_is_read_but_not_scored() -> None:
    model, (rollout, _) = tiny_model("llama"), rollout_with_tools()
    statistics = measure_rollout(model, rollout, horizon=HORIZON)
    scores = score_rollout(statistics, attnprobe.classify_heads(statistics), rollout)
    assert scores.response_mask[0].tolist() == [True] * 3 + [False] * 2 + [True] * 4
    for values in (scores.waad, scores.fai):
        assert bool(values[0, 3:5].isnan().all())
    plain = measure_rollout(model, rollout_of(), horizon=HORIZON)
    own = rollout.response_mask[0]
    # WAAD belongs to rows: what a tool wrote is read as it was.
    assert torch.equal(statistics.waad[0, ..., own], plain.waad[0, ..., own])


def test_only_the_policys_own_rows_vote_in_fai_and_span() -> None:
    """Span and FAI from the maps themselves, over the rows of the policy's own tokens."""
    model, (rollout, tools) = tiny_model("llama", implementation="eager"), rollout_with_tools()
    statistics = measure_rollout(model, rollout, layers="all", horizon=(1, 4))
    real = torch.cat([rollout.prompt_mask, rollout.completion_mask], 1)[0]
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)[:1, real]
    with torch.no_grad():
        maps = torch.stack(model(ids, output_attentions=True).attentions, 1)[0].double()
    start = int(rollout.prompt_mask[0].sum())
    place = torch.arange(maps.shape[-1])
    own = torch.cat([torch.zeros(start, dtype=torch.bool), tools[0]])
    distance = (place[:, None] - place).clamp(min=0)
    span = (maps * distance).sum(-1)[..., own].mean(-1)
    torch.testing.assert_close(statistics.span[0].double(), span, atol=1e-4, rtol=1e-4)
    votes = (distance >= 1) & (distance <= 4) & own[:, None]
    fai = (maps * votes).sum(-2) / votes.sum(0)
    for token in (0, 1, 2, 5, 6, 7):
        found = statistics.fai[0, ..., token].double()
        torch.testing.assert_close(found, fai[..., start + token], atol=1e-5, rtol=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    model, rollout = tiny_model("llama").train(), rollout_of()
    before = torch.random.get_rng_state()
    for reader in (model, WholePassAdapter(model, model)):
        measure_rollout(reader, rollout, horizon=HORIZON)
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
        measure_rollout(
            WholePassAdapter(model, model) if root else model, rollout, layers=[1], horizon=HORIZON
        )


def test_scores_that_are_no_numbers_are_found_out(as_users_call) -> None:
    rollout = rollout_of()
    entropy = torch.zeros(rollout.completion_ids.shape)
    entropy[1, 7] = torch.nan
    assert score_rollout(None, None, rollout, entropy=entropy).entropy is not None, "padding may be anything"
    entropy[1, 2] = torch.nan
    with pytest.raises(ResultError, match=r"entropy of the rollout is nan at .* = \[1, 2\]"):
        score_rollout(None, None, rollout, entropy=entropy)
    statistics = measure_rollout(tiny_model("llama"), rollout, horizon=HORIZON)
    statistics.waad[2, :, :, 4] = torch.inf
    with pytest.raises(ResultError, match=r"WAAD of the rollout is inf at .* = \[2, 4\]"):
        score_rollout(statistics, None, rollout)


IDS, ONES = [[5, 6], [7, 8]], [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ((IDS, ONES, [[1.5, 2.0]] * 2, ONES), ["completion_ids", "float32"]),
        (([5, 6], ONES, IDS, ONES), ["prompt_ids", "[2]"]),
        ((IDS, ONES, "text", ONES), ["completion_ids", "'text'"]),
        (([[5, 6], [7, -1]], ONES, IDS, ONES), ["prompt_ids", "negative", "-1"]),
        ((IDS, ONES, None, ONES), ["completion_ids", "None"]),
        ((IDS, ONES, [[1, 2], [3]], ONES), ["completion_ids"]),
        ((IDS, ONES, IDS, None), ["completion_mask", "None"]),
        ((IDS, ONES, IDS, [[1, 1]]), ["completion_mask", "[2, 2]", "[1, 2]"]),
        ((IDS, [[1, 0.5], [1, 1]], IDS, ONES), ["prompt_mask", "0.5"]),
        ((IDS, ONES, IDS, ONES, [[1, 2], [1, 1]]), ["tool_mask", "2"]),
        ((IDS[:1], ONES[:1], IDS, ONES), ["1 prompts", "2 completions"]),
        ((IDS, ONES, torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0)), ["[2, 0]", "no tokens"]),
    ],
)
def test_rollouts_that_make_no_sense(parts, told, as_users_call) -> None:
    with pytest.raises(BatchError) as error:
        Rollout(*parts)
    assert [fact for fact in told if fact not in str(error.value)] == []


def test_a_rollout_takes_lists_and_arrays() -> None:
    lists = Rollout(IDS, ONES, IDS, [[1, 1], [1, 0]], [[1, 0], [1, 1]])
    arrays = Rollout(*(np.array(part) for part in (IDS, ONES, IDS, [[1, 1], [1, 0]], [[1, 0], [1, 1]])))
    for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask"):
        assert torch.equal(getattr(lists, name), getattr(arrays, name))
    assert lists.response_mask.tolist() == [[True, False], [True, False]]
    assert lists.select([0, 1]).completion_ids.tolist() == [[7, 8]]
    for mask in ([1], [0.5, 1], "first"):
        with pytest.raises(BatchError, match="completions"):
            lists.select(mask)


def test_wrong_arguments_of_scoring(as_users_call) -> None:
    model, rollout = tiny_model("llama"), rollout_of()
    statistics = measure_rollout(model, rollout, horizon=HORIZON)
    outside = Rollout([[500]], [[1]], [[1, 2]], [[1, 1]])
    for call, error, told in (
        (lambda: measure_rollout(model, "text"), ParameterError, "rollout must be a Rollout.*'text'"),
        (lambda: measure_rollout(model, rollout, span="no"), ParameterError, "span.*'no'"),
        (lambda: measure_rollout(model, outside), BatchError, "500.*vocabulary"),
        (lambda: measure_rollout("model", rollout), UnsupportedModelError, "str"),
        (
            lambda: score_rollout(statistics, None, None),
            ParameterError,
            "rollout must be a Rollout.*None",
        ),
        (
            lambda: score_rollout("mine", None, rollout),
            ParameterError,
            "statistics must be a Head.*'mine'",
        ),
        (lambda: score_rollout(statistics, "mine", rollout), ParameterError, "heads.*'mine'"),
        (lambda: score_rollout(statistics, None, outside), ResultError, r"\[1, 2\].*\[3, 9\]"),
        (lambda: score_rollout(None, None, rollout, entropy=[1.0]), ResultError, r"entropy.*\[3, 9\].*\[1\]"),
        (lambda: score_rollout(None, None, rollout, entropy="low"), ResultError, "entropy.*'low'"),
    ):
        with pytest.raises(error, match=told):
            call()


def test_masks_with_holes_are_refused(as_users_call) -> None:
    rollout = rollout_of()
    rollout.completion_mask[0, 4] = 0
    with pytest.raises(BatchError, match="hole in example 0"):
        measure_rollout(tiny_model("llama"), rollout)


@pytest.mark.parametrize(
    ("layers", "heads", "measured"),
    [
        ("middle", "all", (1, 2)),
        ([0, 2], "all", (0, 2)),
        ("middle", [(0, 1), (2, 3)], (0, 2)),
        ("middle", {"local": {(0, 1): 0.25, (2, 3): 0.75}, "global": {1: [0, 2]}}, (0, 1, 2)),
    ],
)
def test_a_loop_takes_your_own_heads_with_weights(layers, heads, measured) -> None:
    """Heads in every form of a selection; the weights are those of scores made by hand."""
    model, rollout = tiny_model("llama"), rollout_of()
    credit = RolloutCredit(model, CoupledRhythmCredit(), layers=layers, heads=heads, horizon=HORIZON)
    assert credit.layers == measured
    gamma = credit.weigh(rollout, torch.ones(len(rollout.completion_ids)), 0)
    statistics = measure_rollout(model, rollout, layers=list(measured), horizon=HORIZON)
    expected = CoupledRhythmCredit()(score_rollout(statistics, heads, rollout))
    torch.testing.assert_close(gamma, expected)
    assert "given" in credit.settings()["heads"]


def test_weights_over_all_heads_are_those_of_the_plain_mean() -> None:
    model, rollout = tiny_model("llama"), rollout_of()
    statistics = measure_rollout(model, rollout, layers="all", horizon=HORIZON)
    waad, fai = (values.mean((1, 2)) for values in (statistics.waad, statistics.fai))
    for strategy in (CoupledRhythmCredit(), ContinuousCredit()):
        credit = RolloutCredit(model, strategy, layers="all", heads="all", horizon=HORIZON)
        gamma = credit.weigh(rollout, torch.tensor([1.0, -1.0, 2.0]), 0)
        by_hand = attnprobe.TokenScores(waad, fai, None, rollout.response_mask)
        torch.testing.assert_close(gamma, strategy(by_hand))
        assert bool((gamma != 1).any(-1).all())


def test_the_settings_of_a_strategy_name_its_functions() -> None:
    """Not by their address, by which no other process could resume a run."""
    for scale, told in ((torch.sqrt, "sqrt"), (lambda score: -score, "<lambda>"), (None, "None")):
        settings = RolloutCredit(tiny_model("llama"), ContinuousCredit(scale=scale)).settings()
        assert settings["credit.scale"].endswith(told)
        assert settings["signs"] == "'both'"

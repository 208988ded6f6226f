"""The parts of PPO against slow, obvious references and hand calculations."""

from __future__ import annotations

import copy
import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnprobe import ParameterError, UnsupportedModelError
from attnprobe.rl import PPO, PPOConfig
from attnprobe.rl.ppo.actor_critic import ActorCritic
from attnprobe.rl.ppo.algorithm import (
    generalized_advantages,
    group_advantages,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from attnprobe.rl.ppo.sampling import Episodes, roll_out
from attnprobe.testing.tiny_models import tiny_model


@st.composite
def masked_rows(draw, *, group_size: int = 1):
    """Draw rewards and values in float64, with completions of any lengths, padded right."""
    batch = draw(st.integers(1, 4)) * group_size
    width = draw(st.integers(1, 9))
    lengths = torch.tensor(draw(st.lists(st.integers(1, width), min_size=batch, max_size=batch)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rewards, values = (torch.randn(batch, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return rewards, values, torch.arange(width) < lengths[:, None]


# ---- advantages -------------------------------------------------------------------------------


def slow_advantages(rewards, values, mask, gamma, gae_lambda) -> list[list[float]]:
    """GAE by its definition: the sum of all later errors, each weighted by (gamma * lambda) ** away."""
    result = []
    for row in range(rewards.shape[0]):
        end = int(mask[row].sum())
        value = [*values[row, :end].tolist(), 0.0]
        error = [float(rewards[row, t]) + gamma * value[t + 1] - value[t] for t in range(end)]
        sums = [
            math.fsum((gamma * gae_lambda) ** (u - t) * error[u] for u in range(t, end)) for t in range(end)
        ]
        result.append(sums + [0.0] * (rewards.shape[1] - end))
    return result


@given(masked_rows(), st.floats(0, 1), st.floats(0, 1))
def test_generalized_advantages_are_their_definition(rows, gamma, gae_lambda) -> None:
    expected = torch.tensor(slow_advantages(*rows, gamma, gae_lambda), dtype=torch.float64)
    torch.testing.assert_close(generalized_advantages(*rows, gamma, gae_lambda), expected)


@given(masked_rows())
def test_lambda_of_1_waits_for_the_rewards(rows) -> None:
    """Without gamma: all that is still to come, less what was expected."""
    rewards, values, mask = rows
    to_come = (rewards * mask).flip(-1).cumsum(-1).flip(-1)
    expected = (to_come - values) * mask
    torch.testing.assert_close(generalized_advantages(*rows, 1.0, 1.0), expected)


@given(masked_rows(), st.floats(0, 1))
def test_lambda_of_0_believes_the_next_value(rows, gamma) -> None:
    rewards, values, mask = rows
    after = torch.nn.functional.pad(values * mask, (0, 1))[:, 1:]
    expected = (rewards + gamma * after - values) * mask
    torch.testing.assert_close(generalized_advantages(*rows, gamma, 0.0), expected)


@given(masked_rows())
def test_what_comes_after_the_end_does_not_matter(rows) -> None:
    rewards, values, mask = rows
    other = generalized_advantages(
        rewards.masked_fill(~mask, 7.0), values.masked_fill(~mask, 9.0), mask, 0.9, 0.8
    )
    assert torch.equal(generalized_advantages(rewards, values, mask, 0.9, 0.8), other)


@given(masked_rows())
def test_a_perfect_value_leaves_no_advantage(rows) -> None:
    rewards, _, mask = rows
    to_come = (rewards * mask).flip(-1).cumsum(-1).flip(-1)
    advantages = generalized_advantages(rewards, to_come, mask, 1.0, 0.7)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), atol=1e-12, rtol=0)


@given(masked_rows(group_size=3))
def test_group_advantages_are_standard_scores(rows) -> None:
    rewards, _, mask = rows
    totals = (rewards * mask).sum(-1)
    advantages = group_advantages(rewards * mask, mask, 3)
    for begin in range(0, len(totals), 3):
        group = totals[begin : begin + 3].tolist()
        mean = sum(group) / 3
        spread = math.sqrt(sum((total - mean) ** 2 for total in group) / 2)
        for row, total in zip(range(begin, begin + 3), group, strict=True):
            expected = mask[row].double() * (total - mean) / (spread + 1e-4)
            torch.testing.assert_close(advantages[row], expected, atol=1e-9, rtol=1e-9)


def test_generalized_advantages_cross_a_gap() -> None:
    """What a tool wrote is no step of the policy: the tokens around it follow one another."""
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]]).bool()
    rewards = torch.tensor([[0.0, 0, 0, 0, 0, 1]])
    assert generalized_advantages(rewards, torch.zeros(1, 6), mask, 1.0, 1.0).tolist() == [[1, 1, 0, 0, 1, 1]]


@given(masked_rows(), st.integers(0, 2**31))
def test_a_gap_makes_no_difference(rows, seed) -> None:
    """The advantages with tool output in between are those without it."""
    generator = torch.Generator().manual_seed(seed)
    batch, width = rows[2].shape
    own = torch.rand(width + 5, generator=generator).argsort()[:width].sort().values
    spread = [torch.full((batch, width + 5), 7, dtype=part.dtype) for part in rows]
    spread[2] = torch.zeros(batch, width + 5, dtype=torch.bool)
    for wide, part in zip(spread, rows, strict=True):
        wide[:, own] = part
    found = generalized_advantages(*spread, 0.9, 0.8)
    assert torch.equal(found[:, own], generalized_advantages(*rows, 0.9, 0.8))
    assert not bool(found[~spread[2]].any())


def test_equal_completions_have_no_advantage() -> None:
    mask = torch.ones(4, 3, dtype=torch.bool)
    assert torch.equal(group_advantages(torch.full((4, 3), 0.3), mask, 4), torch.zeros(4, 3))


@given(masked_rows())
def test_whitened_values_have_mean_0_and_variance_1(rows) -> None:
    values, _, mask = rows
    white = whiten(values, mask)
    assert torch.equal(white[~mask], torch.zeros_like(white[~mask]))
    inside = white[mask]
    assert float(inside.mean()) == pytest.approx(0, abs=1e-9)
    if float(values[mask].var(correction=0)) > 1e-3:
        assert float(inside.square().mean()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("value", "count"), [(0.3, 7), (0.1, 1000), (0.7, 333), (2.0, 4)])
def test_equal_values_are_whitened_to_0(value, count) -> None:
    """Not to noise of variance 1, by the rounding of their mean."""
    mask = torch.ones(1, count, dtype=torch.bool)
    assert float(whiten(torch.full((1, count), value), mask).abs().max()) < 1e-2


@given(masked_rows(), st.floats(0, 2))
def test_the_reward_is_paid_once_and_divergence_at_each_token(rows, coefficient) -> None:
    kl, paid, mask = rows
    rewards = token_rewards(paid[:, 0], kl, mask, coefficient)
    for row, end in enumerate(mask.sum(-1).tolist()):
        expected = [-coefficient * value for value in kl[row, :end].tolist()]
        expected[-1] += float(paid[row, 0])
        assert rewards[row, :end].tolist() == pytest.approx(expected)
        assert torch.equal(rewards[row, end:], torch.zeros_like(rewards[row, end:]))


# ---- losses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.5, 2.0, 2.4, 0.0),  # better by enough: clipped at 1.2, and no more to gain
        (0.5, 2.0, 1.0, 1.0),  # worse: not clipped, so that it can come back
        (1.5, -2.0, -3.0, -3.0),
        (0.5, -2.0, -1.6, 0.0),
        (1.1, -2.0, -2.2, -2.2),
    ],
)
def test_the_clipped_objective_by_hand(ratio, advantage, gain, slope) -> None:
    """`slope` is the gradient of the objective by the log-probability."""
    logratio = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[advantage]], dtype=torch.float64)
    loss = policy_loss(logratio, advantages, torch.ones(1, 1, dtype=torch.bool), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-gain)
    assert float(logratio.grad) == pytest.approx(-slope)


def test_the_objective_is_a_mean_over_tokens() -> None:
    """Not over completions: each token of a long completion counts as much as one of a short one."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages = torch.tensor([[1.0, 1.0, 1.0], [5.0, 9.0, 9.0]])
    assert float(policy_loss(torch.zeros(2, 3), advantages, mask, 0.2)) == -2.0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.1, 0.5 * 0.9**2),  # moved by less than the clip
        (0.5, 0.5 * 0.8**2),  # moved further towards the return: the clipped one is worse
        (-0.5, 0.5 * 1.5**2),  # moved away: its own error is worse
    ],
)
def test_the_value_loss_by_hand(value, expected) -> None:
    one = torch.ones(1, 1)
    loss = value_loss(value * one, 0 * one, one, one.bool(), 0.2)
    assert float(loss) == pytest.approx(expected)


# ---- rollout ----------------------------------------------------------------------------------

PROMPTS = [[5, 6, 7, 8, 9], [3], [11, 12, 13], [4, 4]]


def rolled(ppo: PPO, prompts, **changes) -> Episodes:
    """Sample as a step of training does."""
    settings = {"max_new_tokens": ppo.config.max_new_tokens, "temperature": ppo.config.temperature}
    given = {**settings, "ends": ppo.ends, "generator": ppo.generator, **changes}
    return roll_out(ppo.model, prompts, **given)


def sampled(family: str, temperature: float, ends: set[int], *, wrap=lambda model: model):
    settings = PPOConfig(max_new_tokens=12, temperature=temperature, minibatch_size=2)
    policy = wrap(tiny_model(family))
    ppo = PPO(policy, [{"prompt_ids": [1]}], lambda problems, completions: [0.0], settings, ends=ends)
    ppo.model.eval()
    torch.nn.init.normal_(ppo.model.value_head.weight, generator=torch.Generator().manual_seed(1))
    return ppo, rolled(ppo, PROMPTS)


def with_adapters(model):
    """Return a model with LoRA's adapters around it, which change it."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return wrapped


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss", "gpt2", "opt", "bloom", "mistral"])
def test_a_rollout_knows_what_a_full_pass_knows(family, temperature) -> None:
    """Log-probabilities, values and entropy: with left padding, ends in mid-batch, and a temperature."""
    ends = set(range(0, 99, 9))
    ppo, episodes = sampled(family, temperature, ends)
    lengths = episodes.completion_mask.sum(-1)
    assert len(set(lengths.tolist())) > 1
    with torch.no_grad():
        for row, prompt in enumerate(PROMPTS):
            # Alone, without padding, cache or mask: nothing that could be wrong in the same way.
            end = int(lengths[row])
            ids = torch.tensor([[*prompt, *episodes.completion_ids[row, :end].tolist()]])
            output = ppo.model.policy(ids, output_hidden_states=True)
            logits = output.logits[0, len(prompt) - 1 : -1]
            expected = (logits / temperature).log_softmax(-1)
            chosen = expected.gather(-1, ids[0, len(prompt) :, None])[:, 0]
            torch.testing.assert_close(episodes.logprobs[row, :end], chosen, atol=1e-5, rtol=1e-5)
            entropy = torch.distributions.Categorical(logits=logits / temperature).entropy()
            torch.testing.assert_close(episodes.entropy[row, :end], entropy, atol=1e-5, rtol=1e-5)
            if family == "llama":
                value = ppo.model.value_head(output.hidden_states[-1][0, len(prompt) - 1 : -1])[:, 0]
                torch.testing.assert_close(episodes.values[row, :end], value, atol=1e-5, rtol=1e-5)
        _, together, values = ppo.evaluate(ppo.model, episodes)
    mask = episodes.response_mask
    torch.testing.assert_close(together[mask], episodes.logprobs[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values[mask], episodes.values[mask], atol=1e-4, rtol=1e-5)


def test_a_policy_with_adapters_knows_it_too() -> None:
    """PEFT hides the arguments of the model inside: they have to arrive all the same."""
    ppo, episodes = sampled("llama", 1.0, set(range(0, 99, 9)), wrap=with_adapters)
    mask = episodes.response_mask
    with torch.no_grad():
        _, together, _ = ppo.evaluate(ppo.model, episodes)
        ids = torch.tensor([[*PROMPTS[1], *episodes.completion_ids[1][mask[1]].tolist()]])
        alone = ppo.model.policy(input_ids=ids).logits[0, :-1].log_softmax(-1)
        alone = alone.gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(together[mask], episodes.logprobs[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(episodes.logprobs[1][mask[1]], alone, atol=1e-5, rtol=1e-5)


def test_a_completion_stops_at_its_end_token_which_belongs_to_it() -> None:
    ends = set(range(0, 99, 9))
    _, episodes = sampled("llama", 1.0, ends)
    for ids, mask in zip(episodes.completion_ids, episodes.response_mask, strict=True):
        count = int(mask.sum())
        assert mask[:count].all()
        assert not any(token in ends for token in ids[: count - 1].tolist())
        assert int(ids[count - 1]) in ends or count == 12
    outside = ~episodes.response_mask
    for values in (episodes.logprobs, episodes.values, episodes.entropy):
        assert torch.equal(values[outside], torch.zeros_like(values[outside]))


def test_sampling_follows_the_policys_distribution() -> None:
    """4,000 first tokens of one prompt against the probabilities, by a chi-square of 98 degrees."""
    ppo, _ = sampled("llama", 2.0, set())
    generator = torch.Generator().manual_seed(0)
    episodes = rolled(ppo, [[5, 6, 7]] * 4000, max_new_tokens=1, ends=set(), generator=generator)
    with torch.no_grad():
        expected = (ppo.model.policy(torch.tensor([[5, 6, 7]])).logits[0, -1] / 2).softmax(-1) * 4000
    found = torch.bincount(episodes.completion_ids[:, 0], minlength=99)
    likely = expected >= 5
    square = ((found - expected)[likely].square() / expected[likely]).sum()
    degrees = int(likely.sum())
    assert float(square) < degrees + 5 * math.sqrt(2 * degrees)


# ---- gradients --------------------------------------------------------------------------------


def gradients(ppo: PPO) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in ppo.model.named_parameters() if p.grad is not None}


def test_one_epoch_without_clipping_is_reinforce_with_a_baseline() -> None:
    """The gradient of `-mean((return - baseline) * log p)`, written down without any of PPO's code."""
    ppo, episodes = sampled("llama", 1.0, set(range(0, 99, 9)))
    mask = episodes.response_mask
    rewards = token_rewards(torch.tensor([1.0, -0.5, 2.0, 0.3]), torch.zeros(mask.shape), mask, 0.0)
    advantages = generalized_advantages(rewards, episodes.values, mask, 1.0, 1.0)
    _, logprobs, _ = ppo.evaluate(ppo.model, episodes)
    logratio = (logprobs - episodes.logprobs).masked_fill(~mask, 0.0)
    policy_loss(logratio, advantages, mask, math.inf).backward()
    found = gradients(ppo)
    ppo.model.zero_grad()

    losses = []
    scores = [1.0, -0.5, 2.0, 0.3]
    for row, prompt in enumerate(PROMPTS):
        end = int(mask[row].sum())
        ids = torch.tensor([[*prompt, *episodes.completion_ids[row, :end].tolist()]])
        log_probability = ppo.model.policy(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = log_probability[range(end), ids[0, len(prompt) :]]
        losses.append(-(chosen * (scores[row] - episodes.values[row, :end])))
    torch.cat(losses).mean().backward()
    expected = gradients(ppo)
    assert set(found) == set(expected) != set()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert float((found[name] - gradient).abs().max()) <= 1e-4 * scale, name


def test_masked_tokens_have_no_gradient() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    logratio, values = (torch.zeros(2, 3, requires_grad=True) for _ in range(2))
    policy_loss(logratio, torch.full((2, 3), 3.0), mask, 0.2).backward()
    value_loss(values, torch.zeros(2, 3), torch.ones(2, 3), mask, 0.2).backward()
    assert torch.equal(logratio.grad != 0, mask)
    assert torch.equal(values.grad != 0, mask)


def test_what_is_masked_does_not_change_an_update() -> None:
    """Other ids behind the end of completions and in the padding of prompts: bitwise the same gradient."""
    found = []
    for filler in (0, 42):
        ppo, episodes = sampled("llama", 1.0, set(range(0, 99, 9)))
        outside = ~episodes.response_mask
        assert bool(outside.any())
        episodes.completion_ids[outside] = filler
        episodes.prompt_ids[episodes.prompt_mask == 0] = filler
        _, logprobs, values = ppo.evaluate(ppo.model, episodes)
        logratio = (logprobs - episodes.logprobs).masked_fill(outside, 0.0)
        advantages = torch.linspace(-1, 1, outside.numel()).view(outside.shape)
        loss = policy_loss(logratio, advantages, ~outside, 0.2)
        (loss + value_loss(values, episodes.values, advantages, ~outside, 0.2)).backward()
        found.append(gradients(ppo))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=0, rtol=0)


# ---- a whole step -----------------------------------------------------------------------------


def slow_loss(policy, head, episodes, scores, rows, settings) -> torch.Tensor:
    """The loss of a minibatch, written down token by token, without padding and without PPO's code."""
    mask = episodes.response_mask
    advantages, returns = [], []
    for row in range(len(scores)):
        end = int(mask[row].sum())
        value = [*episodes.values[row, :end].tolist(), 0.0]
        reward = [0.0] * (end - 1) + [scores[row]]
        error = [reward[t] + settings.gamma * value[t + 1] - value[t] for t in range(end)]
        decay = settings.gamma * settings.gae_lambda
        advantages.append([sum(decay ** (u - t) * error[u] for u in range(t, end)) for t in range(end)])
        returns.append([advantage + value[t] for t, advantage in enumerate(advantages[-1])])
    flat = torch.tensor([advantage for row in advantages for advantage in row])
    mean, spread = flat.mean(), flat.std(correction=0)
    gains, errors, entropies = [], [], []
    for row in rows:
        end = int(mask[row].sum())
        prompt = episodes.prompt_ids[row][episodes.prompt_mask[row].bool()].tolist()
        ids = torch.tensor([[*prompt, *episodes.completion_ids[row, :end].tolist()]])
        output = policy(ids, output_hidden_states=True)
        where = slice(len(prompt) - 1, -1)
        log_probability = (output.logits[0, where] / settings.temperature).log_softmax(-1)
        values = output.hidden_states[-1][0, where] @ head.weight[0] + head.bias[0]
        entropies.append(-(log_probability.exp() * log_probability).sum(-1))
        for t in range(end):
            ratio = (log_probability[t, ids[0, len(prompt) + t]] - episodes.logprobs[row, t]).exp()
            advantage = (advantages[row][t] - mean) / spread
            clipped = ratio.clamp(1 - settings.clip_coef, 1 + settings.clip_coef)
            gains.append(torch.minimum(ratio * advantage, clipped * advantage))
            old = episodes.values[row, t]
            near = old + (values[t] - old).clamp(-settings.clip_coef_vf, settings.clip_coef_vf)
            wanted = returns[row][t]
            errors.append(torch.maximum((values[t] - wanted) ** 2, (near - wanted) ** 2))
    return (
        -torch.stack(gains).mean()
        + settings.vf_coef * 0.5 * torch.stack(errors).mean()
        - settings.ent_coef * torch.cat(entropies).mean()
    )


def test_a_step_is_what_it_says(monkeypatch) -> None:
    """Two epochs of two minibatches, so that ratios and values get clipped; gradients by the slow loss."""
    settings = PPOConfig(
        prompts_per_step=4, group_size=1, minibatch_size=2, epochs=2, max_new_tokens=9, temperature=1.3,
        gamma=0.9, gae_lambda=0.5, clip_coef=0.1, clip_coef_vf=0.03, vf_coef=0.3,
        ent_coef=0.02, learning_rate=1e-2, max_grad_norm=math.inf,
    )  # fmt: skip
    scores = [1.0, -0.5, 2.0, 0.3]
    problems = [{"prompt_ids": prompt} for prompt in PROMPTS]
    ends = set(range(0, 99, 9))
    ppo = PPO(tiny_model("llama"), problems, lambda *_: scores, settings, ends=ends)
    torch.nn.init.normal_(ppo.model.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    rollouts, minibatches, seen = [], [], []
    update, parts, step = ppo._update, ppo._minibatches, ppo.optimizer.step

    def keep_and_update(episodes, *rest):
        rollouts.append(episodes)
        return update(episodes, *rest)

    def remember(count):
        for rows in parts(count):
            minibatches.append(rows.tolist())
            yield rows

    def compare_and_step():
        found = gradients(ppo)
        twin = copy.deepcopy(ppo.model)
        twin.zero_grad()
        slow_loss(twin.policy, twin.value_head, rollouts[0], scores, minibatches[-1], settings).backward()
        for name, parameter in twin.named_parameters():
            scale = float(parameter.grad.abs().max())
            assert scale > 0, name
            assert float((found[name] - parameter.grad).abs().max()) <= 2e-4 * scale, name
        seen.append(len(found))
        return step()

    monkeypatch.setattr(ppo, "_update", keep_and_update)
    monkeypatch.setattr(ppo, "_minibatches", remember)
    monkeypatch.setattr(ppo.optimizer, "step", compare_and_step)
    entry = ppo.train_step()
    assert len(seen) == 4
    assert sorted(minibatches[0] + minibatches[1]) == sorted(minibatches[2] + minibatches[3]) == [0, 1, 2, 3]
    # The clips were at work, or their absence would not have been seen.
    assert entry["clipfrac"] > 0.1
    with torch.no_grad():
        moved = ppo.evaluate(ppo.model, rollouts[0])[2] - rollouts[0].values
    assert float(moved[rollouts[0].response_mask].abs().max()) > settings.clip_coef_vf


def test_what_is_ruled_out_leaves_the_entropy_finite() -> None:
    """A vocabulary with ids that no text has, whose logits are minus infinity."""
    policy = tiny_model("llama")
    rule_out = torch.zeros(99).index_fill_(0, torch.arange(90, 99), -torch.inf)
    policy.lm_head.register_forward_hook(lambda module, given, logits: logits + rule_out)
    settings = PPOConfig(prompts_per_step=4, group_size=1, minibatch_size=4, max_new_tokens=6,
                         ent_coef=0.1)  # fmt: skip
    ppo = PPO(policy, [{"prompt_ids": [1]}], lambda problems, _: [0.5] * len(problems), settings, ends=set())
    assert math.isfinite(ppo.train_step()["grad_norm"])


# ---- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"steps": 0}, ["steps", "at least 1", "0"]),
        ({"minibatch_size": 1.5}, ["minibatch_size", "whole number", "1.5"]),
        ({"epochs": True}, ["epochs", "True"]),
        ({"max_new_tokens": "many"}, ["max_new_tokens", "'many'"]),
        ({"temperature": 0.0}, ["temperature", "above 0", "0.0", "Evaluation(temperature=0) is greedy"]),
        ({"temperature": -1.0}, ["temperature", "-1.0"]),
        ({"clip_coef": math.nan}, ["clip_coef", "nan"]),
        ({"clip_coef_vf": None}, ["clip_coef_vf", "None"]),
        ({"kl_coef": -1.0}, ["kl_coef", "[0, ", "-1.0"]),
        ({"ent_coef": torch.ones(2)}, ["ent_coef", "[2]"]),
        ({"gamma": 1.1}, ["gamma", "[0, 1]", "1.1"]),
        ({"estimator": "rloo"}, ["estimator", '"gae" or "group"', "'rloo'"]),
        ({"estimator": "group", "group_size": 1}, ["group_size", "at least 2", "1"]),
        ({"target_kl": 0.0}, ["target_kl", "0.0"]),
        ({"learning_rate": math.inf}, ["learning_rate", "inf"]),
        ({"learning_rate": -1e-6}, ["learning_rate", "[0, inf)", "-1e-06"]),
        ({"seed": 1.5}, ["seed", "1.5"]),
        ({"seed": -1}, ["seed", "at least 0", "-1"]),
        ({"whiten": "yes"}, ["whiten", "'yes'"]),
    ],
)
def test_wrong_settings(settings, told, as_users_call) -> None:
    with pytest.raises(ParameterError) as error:
        PPOConfig(**settings)
    assert [fact for fact in told if fact not in str(error.value)] == []


def test_numbers_of_any_library_are_settings() -> None:
    found = PPOConfig(steps=np.int64(3), learning_rate=torch.tensor(0.5), clip_coef=np.float32(0.25), gamma=1)
    assert found == PPOConfig(steps=3, learning_rate=0.5, clip_coef=0.25, gamma=1.0)
    assert repr(found) == repr(PPOConfig(steps=3, learning_rate=0.5, clip_coef=0.25, gamma=1.0))
    assert PPOConfig(max_grad_norm=math.inf, clip_coef=math.inf).clip_coef == math.inf


def test_an_actor_critic_leaves_the_policy_as_it_was() -> None:
    policy, state = tiny_model("llama"), torch.random.get_rng_state()
    ids, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.long)
    before = policy(ids).logits
    logits, values, _ = ActorCritic(policy)(ids, mask, 3)
    assert torch.equal(logits, before)
    assert torch.equal(values, torch.zeros(1, 3))
    assert not policy.get_output_embeddings()._forward_pre_hooks
    assert torch.equal(torch.random.get_rng_state(), state)


def test_policies_that_cannot_be_trained_are_refused(as_users_call) -> None:
    mamba = tiny_model("mamba")
    # Since transformers 5.24, its states are passed as all caches are.
    if "cache" not in inspect.signature(mamba.forward).parameters:
        with pytest.raises(UnsupportedModelError, match="MambaForCausalLM takes no past_key_values: PPO"):
            ActorCritic(mamba)
    with pytest.raises(ParameterError, match=r"parameters are torch.bfloat16, .* call policy.float\(\)"):
        ActorCritic(tiny_model("llama").bfloat16())
    for policy in ("llama", None, torch.nn.Linear(2, 2), tiny_model("llama").model):
        with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
            ActorCritic(policy)
    with pytest.raises(ParameterError, match="nothing to train"):
        ActorCritic(tiny_model("llama").requires_grad_(False))
    forgetful = tiny_model("llama")
    forgetful.register_forward_hook(lambda module, given, output: output.__setitem__("past_key_values", None))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM returned no key/value cache"):
        ActorCritic(forgetful)(torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.long), 1, use_cache=True)

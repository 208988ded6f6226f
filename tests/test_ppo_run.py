"""Whole PPO runs on tiny models: they repeat, resume, survive Ctrl-C, and take credit."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from attnprobe import ParameterError, ResultError, UnsupportedModelError
from attnprobe.rl import (
    PPO,
    CoupledRhythmCredit,
    EntropyCredit,
    GlobalAnchorCredit,
    PPOConfig,
    RandomCredit,
    RolloutCredit,
)
from attnprobe.rl.ppo.algorithm import roll_out
from attnprobe.rl.ppo.run_folder import finish_step_on_interrupt
from attnprobe.testing.tiny_models import tiny_model

PROBLEMS = [{"prompt_ids": [number, *range(number % 4)], "number": number} for number in range(1, 11)]
SETTINGS = {
    "steps": 3,
    "prompts_per_step": 4,
    "group_size": 2,
    "minibatch_size": 4,
    "max_new_tokens": 8,
    "learning_rate": 1e-3,
}
ENDS = {7, 14, 21}


def even_ids(problems, completions) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completions]


def ppo_of(*, reward=even_ids, folder=None, credit=None, credit_options=None, **settings) -> PPO:
    if credit is not None:
        credit_options = {"horizon": (1, 4), **(credit_options or {})}
    return PPO(
        tiny_model("llama"),
        PROBLEMS,
        reward,
        PPOConfig(**{**SETTINGS, **settings}),
        ends=ENDS,
        folder=folder,
        credit=credit,
        credit_options=credit_options,
    )


def parameters(ppo: PPO) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in ppo.model.state_dict().items()}


def assert_same(left: dict, right: dict) -> None:
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def without_clock(history) -> list[dict]:
    return [{name: value for name, value in entry.items() if "seconds" not in name} for entry in history]


@pytest.mark.parametrize("estimator", ["gae", "group"])
def test_equal_seeds_give_equal_runs(estimator) -> None:
    runs = []
    for seed in (3, 3, 4):
        # Nothing depends on the global generator.
        torch.manual_seed(len(runs))
        ppo = ppo_of(estimator=estimator, seed=seed)
        runs.append((without_clock(ppo.train()), parameters(ppo)))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert_same(runs[0][1], runs[1][1])


def test_a_step_changes_the_policy_and_logs_what_it_did() -> None:
    ppo = ppo_of(kl_coefficient=0.1, entropy_coefficient=0.01)
    before = parameters(ppo)
    (first, *_, last) = ppo.train()
    assert [name for name, value in parameters(ppo).items() if torch.equal(value, before[name])] == []
    assert list(first) == [
        "step", "reward", "length", "entropy", "explained_variance", "kl_to_reference", "approximate_kl",
        "clipped_share", "policy_loss", "gradient_norm", "value_loss", "seconds", "rollout_seconds",
    ]  # fmt: skip
    assert 0 <= first["reward"] <= 1
    assert 1 <= first["length"] <= 8
    assert 0 <= first["entropy"] <= math.log(99)
    # At first the policy is its reference, but for what the cache rounds.
    assert abs(first["kl_to_reference"]) < 1e-5
    assert last["kl_to_reference"] > 1e-4


def test_dropout_does_not_make_the_policy_differ_from_itself() -> None:
    """Even where something puts the policy into training mode again."""
    policy = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    settings = PPOConfig(**{**SETTINGS, "epochs": 1, "minibatch_size": 8})
    ppo = PPO(policy, PROBLEMS, even_ids, settings, ends=ENDS)
    for _ in range(2):
        policy.train()
        assert ppo.train_step()["approximate_kl"] < 1e-6


def test_divergence_is_taken_off_the_reward(monkeypatch) -> None:
    """Each token pays for what its log-probability has gained on that of the first policy."""
    ppo = ppo_of(kl_coefficient=0.5, whiten=False, gae_lambda=1.0, steps=1)
    first = copy.deepcopy(ppo.model)
    with torch.no_grad():
        for parameter in ppo.model.policy.model.layers[1].mlp.parameters():
            parameter.mul_(3.0)
    given = []
    monkeypatch.setattr(ppo, "_update", lambda *arguments: given.append(arguments) or {})
    entry = ppo.train_step()
    ((episodes, advantages, returns),) = given
    with torch.no_grad():
        before = ppo.evaluate(first, episodes)[1]
    mask = episodes.response_mask
    cost = 0.5 * (episodes.log_probs - before).masked_fill(~mask, 0.0)
    scores = torch.tensor(even_ids(PROBLEMS, episodes.completions()))
    expected = (scores[:, None] - cost.flip(-1).cumsum(-1).flip(-1)) * mask
    # The value head is still at 0.
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns, expected, atol=1e-5, rtol=1e-5)
    assert entry["kl_to_reference"] == pytest.approx(float(cost[mask].mean() / 0.5), abs=1e-5)
    assert entry["kl_to_reference"] > 0.01


def test_epochs_end_before_the_policy_has_moved_too_far() -> None:
    free = ppo_of(epochs=6, learning_rate=1e-2)
    held = ppo_of(epochs=6, learning_rate=1e-2, target_kl=1e-3)
    updates = []
    for ppo in (free, held):
        steps = ppo.optimizer.step
        count = [0]

        def counted(steps=steps, count=count):
            count[0] += 1
            return steps()

        ppo.optimizer.step = counted
        ppo.train_step()
        updates.append(count[0])
    assert updates[0] == 12
    assert 1 <= updates[1] < 12

    # A policy that is far away at once is not updated: what no update has seen is null.
    ppo = ppo_of(target_kl=0.01)
    evaluate = ppo.evaluate
    ppo.evaluate = lambda *arguments: (lambda all_, chosen, values: (all_, chosen - 0.5, values))(
        *evaluate(*arguments)
    )
    before = parameters(ppo)
    entry = ppo.train_step()
    assert_same(parameters(ppo), before)
    assert entry["approximate_kl"] > 0.1
    assert entry["policy_loss"] is entry["gradient_norm"] is entry["value_loss"] is None


def test_problems_come_in_turn() -> None:
    """All of them before any comes again, whatever the size of a step."""
    seen: list[int] = []

    def remember(problems, completions):
        seen.extend(problem["number"] for problem in problems[::2])
        return even_ids(problems, completions)

    ppo_of(reward=remember, steps=5).train()
    assert len(seen) == 20
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(1, 11))
    assert seen[:10] != seen[10:]
    # Another seed has an order of its own from the first step on.
    first = list(seen)
    seen.clear()
    ppo_of(reward=remember, steps=5, seed=1).train()
    assert sorted(seen[:10]) == list(range(1, 11))
    assert seen[:10] not in (first[:10], first[10:])


def test_a_run_goes_on_where_it_is() -> None:
    """Step by step, all at once, or both: the history is whole."""
    ppo = ppo_of()
    first = ppo.train_step()
    assert [entry["step"] for entry in ppo.train()] == [1, 2, 3]
    assert ppo.history[0] is first
    assert ppo.train() is ppo.history


# ---- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("credit", [None, CoupledRhythmCredit(), EntropyCredit()])
@pytest.mark.parametrize("estimator", ["gae", "group"])
def test_a_resumed_run_goes_on_identically(tmp_path, estimator, credit) -> None:
    settings = {"estimator": estimator, "kl_coefficient": 0.05, "credit": credit}
    settings["credit_options"] = {"reclassify_every": 3}
    whole = ppo_of(steps=5, folder=tmp_path / "whole", **settings)
    history = whole.train()
    ppo_of(steps=2, folder=tmp_path / "parts", **settings).train()
    resumed = ppo_of(steps=5, folder=tmp_path / "parts", **settings)
    assert without_clock(resumed.train(resume=True)) == without_clock(history)
    assert_same(parameters(resumed), parameters(whole))
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert without_clock(map(json.loads, lines)) == without_clock(history)


def test_steps_after_the_last_checkpoint_are_run_again(tmp_path) -> None:
    """As after a machine that went away: lines beyond the checkpoint, the last of them torn."""
    whole = ppo_of(steps=4, folder=tmp_path / "whole").train()
    ppo = ppo_of(steps=4, folder=tmp_path / "run", checkpoint_every=2, reward=_failing_at(4))
    with pytest.raises(RuntimeError, match="no judge"):
        ppo.train()
    log = tmp_path / "run" / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]
    log.write_text(log.read_text() + '{"step": 4, "rew')
    history = ppo_of(steps=4, folder=tmp_path / "run").train(resume=True)
    assert without_clock(history) == without_clock(whole)
    assert len(log.read_text().splitlines()) == 4
    # What was logged is never lost.
    dropped = (tmp_path / "run" / "metrics.dropped.jsonl").read_text().splitlines()
    assert json.loads(dropped[0])["step"] == 3
    assert dropped[1] == '{"step": 4, "rew'


def _failing_at(step: int):
    calls = []

    def reward(problems, completions):
        calls.append(1)
        if len(calls) == step:
            raise RuntimeError("no judge")
        return even_ids(problems, completions)

    return reward


def test_a_run_is_not_written_over(tmp_path, as_users_call) -> None:
    ppo_of(folder=tmp_path, steps=1).train()
    log = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ResultError, match=r"holds a run already: resume it \(resume=True\)"):
        ppo_of(folder=tmp_path, steps=1).train()
    assert (tmp_path / "metrics.jsonl").read_text() == log
    with pytest.raises(ResultError, match="without a folder cannot be resumed"):
        ppo_of().train(resume=True)


def test_resuming_an_empty_folder_starts_anew(tmp_path) -> None:
    assert [entry["step"] for entry in ppo_of(folder=tmp_path / "new").train(resume=True)] == [1, 2, 3]


def test_a_damaged_checkpoint_is_refused(tmp_path, as_users_call) -> None:
    ppo_of(folder=tmp_path, steps=1).train()
    (tmp_path / "checkpoint.pt").write_bytes(b"half a checkpoint")
    with pytest.raises(ResultError, match=r"checkpoint\.pt cannot be read .* remove it to start"):
        ppo_of(folder=tmp_path).train(resume=True)


def test_a_run_is_not_resumed_with_other_settings(tmp_path, as_users_call) -> None:
    ppo_of(folder=tmp_path, steps=1).train()
    with pytest.raises(ResultError, match=r"has estimator='gae', learning_rate=0.001: give it"):
        ppo_of(folder=tmp_path, learning_rate=1e-2, estimator="group").train(resume=True)
    assert len(ppo_of(folder=tmp_path, steps=2, checkpoint_every=7).train(resume=True)) == 2
    assert len(ppo_of(folder=tmp_path, steps=1).train(resume=True)) == 2


def test_numbers_that_are_not_finite_become_null(tmp_path) -> None:
    """Of equal returns no share of the variance is explained."""
    entry = ppo_of(folder=tmp_path, steps=1, gae_lambda=1.0, reward=lambda p, c: [0.0] * 8).train()[0]
    assert entry["explained_variance"] is None
    assert '"explained_variance": null' in (tmp_path / "metrics.jsonl").read_text()


SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)  # as in the tests: sums of another order have other last bits
sys.path.insert(0, {tests!r})
from test_ppo_run import even_ids, ppo_of

calls = []

def reward(problems, completions):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return even_ids(problems, completions)

ppo_of(steps=4, folder={folder!r}, reward=reward).train(progress=True)
"""


@pytest.mark.slow
def test_ctrl_c_ends_after_the_step_and_loses_nothing(tmp_path) -> None:
    """A real process and a real signal, in the middle of the second step."""
    folder = tmp_path / "run"
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment
    )
    assert "KeyboardInterrupt" in done.stderr
    assert "finishing this step; once more to stop at once" in done.stderr
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    history = ppo_of(steps=4, folder=folder).train(resume=True)
    assert without_clock(history) == without_clock(ppo_of(steps=4).train())


def test_a_second_ctrl_c_is_not_put_off() -> None:
    before = signal.getsignal(signal.SIGINT)
    with finish_step_on_interrupt() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_in_another_thread_leaves_signals_alone() -> None:
    history: list[dict] = []
    thread = threading.Thread(target=lambda: history.extend(ppo_of(steps=1).train()))
    thread.start()
    thread.join()
    assert [entry["step"] for entry in history] == [1]


def test_tensorboard_gets_the_numbers_where_it_is_installed(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = ppo_of(folder=tmp_path).train()
    events = EventAccumulator(str(tmp_path)).Reload()
    found = [(event.step, event.value) for event in events.Scalars("reward")]
    assert found == [(entry["step"], pytest.approx(entry["reward"])) for entry in history]


# ---- credit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["gae", "group"])
@pytest.mark.parametrize("strategy", [CoupledRhythmCredit, GlobalAnchorCredit, EntropyCredit, RandomCredit])
def test_an_amplification_of_1_changes_no_bit(estimator, strategy) -> None:
    plain, credited = (
        ppo_of(estimator=estimator, credit=credit) for credit in (None, strategy(amplification=1.0))
    )
    histories = [without_clock(ppo.train()) for ppo in (plain, credited)]
    assert {entry.pop("credit/gamma_mean") for entry in histories[1]} == {1.0}
    assert histories[0] == histories[1]
    assert_same(parameters(plain), parameters(credited))


def test_credit_multiplies_the_advantages_that_are_not_negative() -> None:
    """Found where it acts: in what the update is given."""
    given = {}
    for name, credit in (("plain", None), ("credited", lambda scores: 3.0 * scores.response_mask + 1.0)):
        ppo = ppo_of(credit=credit)
        update = ppo._update
        ppo._update = lambda episodes, advantages, returns, name=name, update=update: (
            given.setdefault(name, advantages),
            update(episodes, advantages, returns),
        )[1]
        ppo.train_step()
    plain, credited = given["plain"], given["credited"]
    assert bool((plain > 0).any())
    assert bool((plain < 0).any())
    assert torch.equal(credited, torch.where(plain > 0, 4 * plain, plain))


def test_heads_are_grouped_anew_when_that_is_due() -> None:
    ppo = ppo_of(steps=5, credit=GlobalAnchorCredit(), credit_options={"reclassify_every": 2})
    grouped_at = []
    for _ in range(5):
        ppo.train_step()
        grouped_at.append(ppo.credit.grouping.grouped_at)
    assert grouped_at == [0, 0, 2, 2, 4]


def test_completions_without_a_positive_advantage_are_not_measured() -> None:
    measured = []

    def strategy(scores):
        measured.append(scores.waad.shape[0])
        return torch.full(scores.waad.shape, 2.0)

    ppo = ppo_of()
    episodes = roll_out(ppo.model, [[1, 2]] * 4, ppo.config, set(), ppo.generator)
    credit = RolloutCredit(ppo.model.policy, strategy, horizon=(1, 4), reclassify_every=None)
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0])
    for _ in range(2):
        gamma = credit.weigh(episodes, advantages, 0, entropy=episodes.entropy)
        assert torch.equal(gamma[:, 0], torch.tensor([2.0, 1.0, 1.0, 2.0]))
    assert torch.equal(credit.weigh(episodes, -advantages.abs(), 0), torch.ones_like(gamma))
    # All of them are needed to group heads, once; then those that can gain; then none.
    assert measured == [4, 2]


def test_settings_of_credit_are_checked(as_users_call) -> None:
    with pytest.raises(ParameterError, match="batch_size must be at least 1, got 0"):
        RolloutCredit(tiny_model("llama"), GlobalAnchorCredit(), batch_size=0)
    with pytest.raises(ParameterError, match="a credit strategy is a callable"):
        ppo_of(credit=3)
    with pytest.raises(UnsupportedModelError):
        RolloutCredit(torch.nn.Linear(2, 2), GlobalAnchorCredit())


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda problems, completions: [1.0], r"must return 8 finite numbers, .* got \[1\]"),
        (lambda problems, completions: None, "must return 8 finite numbers, .* got NoneType"),
        (lambda problems, completions: ["good"] * 8, "must return 8 finite numbers, .* got list"),
        (lambda problems, completions: [math.nan] * 8, r"got \[8\], of which 8 are not finite"),
    ],
)
def test_rewards_that_make_no_sense(scores, message, as_users_call) -> None:
    ppo = ppo_of(reward=scores)
    before = parameters(ppo)
    with pytest.raises(ResultError, match=message):
        ppo.train()
    assert_same(parameters(ppo), before)


def test_a_reward_may_be_a_model() -> None:
    """Its graph is not the policy's, and it gets no gradient."""
    judge = torch.nn.Linear(1, 1)

    def reward(problems, completions):
        return judge(torch.tensor(even_ids(problems, completions))[:, None])[:, 0]

    assert len(ppo_of(reward=reward).train()) == 3
    assert judge.weight.grad is None


def test_problems_that_make_no_sense(as_users_call) -> None:
    for problems in ([], [{"prompt_ids": []}], [{"prompt": "text"}]):
        with pytest.raises(ParameterError, match="at least one id in its prompt_ids"):
            PPO(tiny_model("llama"), problems, even_ids)
    with pytest.raises(ParameterError, match="200 tokens and 64 new ones exceed the policy's context of 256"):
        PPO(tiny_model("llama"), [{"prompt_ids": [1] * 200}], even_ids)


def test_a_gradient_that_is_not_finite_is_not_applied() -> None:
    ppo = ppo_of(estimator="gae", whiten=False, reward=lambda problems, completions: [1e38] * 8)
    before = parameters(ppo)
    with pytest.raises(ResultError, match=r"step 1 has a gradient of (inf|nan), which was not applied"):
        ppo.train()
    assert_same(parameters(ppo), before)


# ---- a real model -----------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_takes_a_credited_step(smollm2) -> None:
    """Prompts of different lengths, real text: what was sampled is what a full pass gives, and it learns."""
    policy = copy.deepcopy(smollm2.model)
    prompts = ["Name a colour.", "Count from one to ten, please, in words."]
    problems = [{"prompt_ids": smollm2.tokenizer(prompt)["input_ids"]} for prompt in prompts]
    settings = PPOConfig(
        steps=1, prompts_per_step=2, group_size=2, minibatch_size=2, epochs=1, max_new_tokens=24,
        learning_rate=1e-5, temperature=0.8, estimator="group",
    )  # fmt: skip

    def shorter(problems, completions):
        return [-float(len(smollm2.tokenizer.decode(ids))) for ids in completions]

    ppo = PPO(
        policy,
        problems,
        shorter,
        settings,
        credit=CoupledRhythmCredit(),
        credit_options={"horizon": (4, 12)},
    )
    episodes = roll_out(ppo.model, [p["prompt_ids"] for p in problems], settings, ppo.ends, ppo.generator)
    with torch.no_grad():
        again = ppo.evaluate(ppo.model, episodes)[1]
    mask = episodes.response_mask
    torch.testing.assert_close(again[mask], episodes.log_probs[mask], atol=1e-4, rtol=1e-4)
    before = policy.model.layers[3].mlp.up_proj.weight.clone()
    (entry,) = ppo.train()
    assert 1 < entry["credit/gamma_mean"] < 1.5
    assert entry["gradient_norm"] > 0
    assert not torch.equal(policy.model.layers[3].mlp.up_proj.weight, before)

"""Whole PPO runs on tiny models: they repeat, resume, survive Ctrl-C, and take credit."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from attnprobe import (
    ParameterError,
    ResultError,
    TokenBatch,
    UnsupportedModelError,
    classify_heads,
    measure,
)
from attnprobe.rl import (
    PPO,
    CoupledRhythmCredit,
    EntropyCredit,
    GlobalAnchorCredit,
    PPOConfig,
    RandomCredit,
    Rollout,
    RolloutCredit,
    apply_credit,
    decay,
    warmup,
)
from attnprobe.rl.grouping import HeadGrouping
from attnprobe.rl.ppo import algorithm
from attnprobe.rl.ppo.problems import judge
from attnprobe.rl.ppo.run_folder import finish_step_on_interrupt
from attnprobe.rl.ppo.sampling import roll_out
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


def ppo_of(
    *, model="llama", reward=even_ids, folder=None, ends=ENDS, credit=None, credit_options=None, **settings
) -> PPO:
    if credit is not None:
        credit_options = {"horizon": (1, 4), **(credit_options or {})}
    return PPO(
        tiny_model(model) if isinstance(model, str) else tiny_model("llama", **model),
        PROBLEMS,
        reward,
        PPOConfig(**{**SETTINGS, **settings}),
        ends=ends,
        folder=folder,
        credit=credit,
        credit_options=credit_options,
    )


def with_adapters(model, **settings):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], **settings))


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
    ppo = ppo_of(kl_coef=0.1, ent_coef=0.01)
    before = parameters(ppo)
    (first, *_, last) = ppo.train()
    assert [name for name, value in parameters(ppo).items() if torch.equal(value, before[name])] == []
    assert list(first) == [
        "step", "reward", "length", "entropy", "explained_variance", "kl_to_reference", "approx_kl",
        "clipfrac", "policy_loss", "grad_norm", "value_loss", "seconds", "rollout_seconds",
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
        assert ppo.train_step()["approx_kl"] < 1e-6


def test_divergence_is_taken_off_the_reward(monkeypatch) -> None:
    """Each token pays for what its log-probability has gained on that of the first policy."""
    ppo = ppo_of(kl_coef=0.5, whiten=False, gae_lambda=1.0, steps=1)
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
    cost = 0.5 * (episodes.logprobs - before).masked_fill(~mask, 0.0)
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
    assert entry["approx_kl"] > 0.1
    assert entry["policy_loss"] is entry["grad_norm"] is entry["value_loss"] is None


def test_a_learning_rate_of_0_measures_and_changes_nothing() -> None:
    ppo = ppo_of(learning_rate=0.0)
    before = parameters(ppo)
    history = ppo.train()
    assert_same(parameters(ppo), before)
    assert [entry["approx_kl"] < 1e-6 and entry["grad_norm"] > 0 for entry in history] == [True] * 3


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
    settings = {"estimator": estimator, "kl_coef": 0.05, "credit": credit}
    settings["credit_options"] = {"reclassify_every": 3, "schedule": warmup(4)}
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
    with pytest.raises(ResultError, match=r"already holds a run: resume it \(resume=True\)"):
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
    with pytest.raises(
        ResultError, match=r"estimator='gae' \(not 'group'\), learning_rate=0.001 \(not 0.01\)"
    ):
        ppo_of(folder=tmp_path, learning_rate=1e-2, estimator="group").train(resume=True)
    assert len(ppo_of(folder=tmp_path, steps=2, checkpoint_every=7).train(resume=True)) == 2
    assert len(ppo_of(folder=tmp_path, steps=1).train(resume=True)) == 2


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            {"credit": RandomCredit(amplification=5.0)},
            r"has credit=CoupledRhythmCredit \(not RandomCredit\): use",
        ),
        ({"credit": None}, "credit=CoupledRhythmCredit .not None"),
        ({"credit": lambda scores: scores.waad}, "credit=CoupledRhythmCredit .not .*<lambda>"),
        ({"credit": CoupledRhythmCredit(alpha=0.25)}, r"has credit\.alpha=0\.5 .not 0\.25"),
        ({"credit_options": {"horizon": (2, 4)}}, r"has horizon=\(1, 4\) .not \(2, 4\)"),
        ({"credit_options": {"layers": [1]}}, r"has layers=\(1, 2\) .not \(1,\)"),
        ({"credit_options": {"window": 5}}, "has window=10 .not 5"),
        ({"credit_options": {"schedule": decay(9)}}, r"has schedule=none .not Ramp\(begin=0, end=9"),
        ({"credit_options": {"signs": "positive"}}, "has signs='both' .not 'positive'"),
        ({"credit_options": {"reclassify_every": None}}, "has reclassify_every=10 .not None"),
        ({"ends": {7}}, r"has ends=\[7, 14, 21\] .not \[7\]"),
        ({"model": "qwen3"}, "model=LlamaForCausalLM .*not Qwen3ForCausalLM"),
        ({"model": {"intermediate_size": 80}}, r"has config\.intermediate_size=48 .not 80"),
    ],
)
def test_a_run_is_not_resumed_as_another(other, told, tmp_path, as_users_call) -> None:
    """With another strategy, other parameters, measured otherwise, with other ends or another model."""
    ppo_of(folder=tmp_path, steps=1, credit=CoupledRhythmCredit()).train()
    ppo = ppo_of(folder=tmp_path, steps=2, **{"credit": CoupledRhythmCredit(), **other})
    before = parameters(ppo)
    with pytest.raises(ResultError, match=told):
        ppo.train(resume=True)
    assert_same(parameters(ppo), before)


def test_the_message_says_in_what_a_model_differs(tmp_path, as_users_call) -> None:
    """What is trained, in what precision, and by which adapters: the shapes alone would let these pass."""
    ppo_of(folder=tmp_path, steps=1).train()
    frozen, halved = tiny_model("llama"), tiny_model("llama")
    frozen.model.embed_tokens.requires_grad_(False)
    halved.model.embed_tokens.requires_grad_(False).bfloat16()
    deeper = tiny_model("llama", num_hidden_layers=4, layer_types=None)
    name = r"policy\.model\.embed_tokens\.weight=float32 \[99, 32\], trained"
    for model, told in (
        (frozen, rf"has {name} \(not float32 \[99, 32\], not trained\): use"),
        (halved, rf"has {name} \(not bfloat16 \[99, 32\], not trained\): use"),
        (
            deeper,
            r"config.num_hidden_layers=3 \(not 4\), .*layers\.3.*=none \(not .*, 6 more parameters that",
        ),
    ):
        ppo = PPO(model, PROBLEMS, even_ids, PPOConfig(**SETTINGS), ends=ENDS, folder=tmp_path)
        with pytest.raises(ResultError, match=told):
            ppo.train(resume=True)

    adapted = tmp_path / "adapted"
    for alpha, told in ((8, None), (16, r"has adapter default\.lora_alpha=8 \(not 16\): use")):
        model = with_adapters(tiny_model("llama"), lora_alpha=alpha)
        ppo = PPO(model, PROBLEMS, even_ids, PPOConfig(**SETTINGS), ends=ENDS, folder=adapted)
        if told is None:
            ppo.train()
        else:
            with pytest.raises(ResultError, match=told):
                ppo.train(resume=True)


@pytest.mark.parametrize(
    ("problems", "told"),
    [
        (PROBLEMS[:-1], r"number of problems=10 \(not 9\), problems' number=contents \w+ \(not"),
        (PROBLEMS[::-1], r"has problems' number=contents .*, problems' prompt_ids=contents"),
        ([{**problem, "number": 0} for problem in PROBLEMS], r"has problems' number=contents \w+ \(not \w+"),
        ([{**problem, "hint": "even"} for problem in PROBLEMS], r"has problems' hint=none \(not contents"),
    ],
)
def test_a_run_is_not_resumed_with_other_problems(problems, told, tmp_path, as_users_call) -> None:
    """Fewer, in another order, with another entry, or with one more: the message says which."""
    ppo_of(folder=tmp_path, steps=1).train()
    ppo = PPO(tiny_model("llama"), problems, even_ids, PPOConfig(**SETTINGS), ends=ENDS, folder=tmp_path)
    with pytest.raises(ResultError, match=told):
        ppo.train(resume=True)


def test_equal_problems_are_the_same_problems() -> None:
    """In whatever form they come, in whatever process, and whatever a reward notes in them meanwhile."""

    def problems(kind, order):
        entries = {"prompt_ids": kind([1, 2]), "check": even_ids, "options": {"a": {1, 2}, "b": [None]}}
        return [{name: entries[name] for name in order}, {"prompt_ids": kind([3]), "judge": object()}]

    found = []
    for kind, order in ((list, [0, 1, 2]), (np.array, [2, 1, 0]), (torch.tensor, [1, 0, 2])):
        names = ["prompt_ids", "check", "options"]
        given = problems(kind, [names[place] for place in order])
        ppo = PPO(tiny_model("llama"), given, even_ids, PPOConfig(**SETTINGS), ends=ENDS)
        given[0]["check"] = None
        found.append(ppo.identity["problems"])
    assert found[0] == found[1] == found[2]


def test_heads_that_were_given_have_to_be_given_again(tmp_path, as_users_call) -> None:
    batch = TokenBatch.from_ids(torch.randint(0, 99, (2, 20)), response_start=4)
    heads = classify_heads(measure(tiny_model("llama"), batch, layers=[0, 2]))
    options = {"credit": CoupledRhythmCredit(), "credit_options": {"heads": heads}}
    ppo_of(folder=tmp_path, steps=1, **options).train()
    assert len(ppo_of(folder=tmp_path, steps=2, **options).train(resume=True)) == 2
    swapped = dataclasses.replace(heads, local_heads=heads.global_heads, global_heads=heads.local_heads)
    options["credit_options"] = {"heads": swapped}
    with pytest.raises(ResultError, match="has heads=given"):
        ppo_of(folder=tmp_path, steps=2, **options).train(resume=True)


def test_a_checkpoint_of_another_version(tmp_path, as_users_call) -> None:
    ppo_of(folder=tmp_path, steps=1).train()
    state = torch.load(tmp_path / "checkpoint.pt")
    del state["identity"]
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(ResultError, match="no identity"):
        ppo_of(folder=tmp_path).train(resume=True)
    state["identity"] = {"settings": {}}
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(ResultError, match="no problems, architecture, parameters: another version"):
        ppo_of(folder=tmp_path).train(resume=True)


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
    assert "finishing this step" in done.stderr
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
@pytest.mark.parametrize(
    ("strategy", "signs"),
    [
        (CoupledRhythmCredit, "both"),
        (GlobalAnchorCredit, "positive"),
        (EntropyCredit, "negative"),
        (RandomCredit, "both"),
    ],
)
def test_an_amplification_of_1_changes_no_bit(estimator, strategy, signs) -> None:
    plain, credited = (
        ppo_of(estimator=estimator, credit=credit, credit_options={"signs": signs})
        for credit in (None, strategy(amplification=1.0))
    )
    histories = [without_clock(ppo.train()) for ppo in (plain, credited)]
    assert {entry["credit/gamma_mean"] for entry in histories[1]} == {1.0}
    without_credit = [
        {name: value for name, value in entry.items() if not name.startswith("credit/")}
        for entry in histories[1]
    ]
    assert histories[0] == without_credit
    assert_same(parameters(plain), parameters(credited))


@pytest.mark.parametrize(
    ("signs", "weighted"),
    [
        (None, lambda advantages: advantages != 0),
        ("both", lambda advantages: advantages != 0),
        ("positive", lambda advantages: advantages > 0),
        ("negative", lambda advantages: advantages < 0),
    ],
)
def test_credit_multiplies_the_advantages_of_these_signs(signs, weighted) -> None:
    """Found where it acts: in what the update is given."""
    options = None if signs is None else {"signs": signs}
    given = {}
    for name, credit in (("plain", None), ("credited", lambda scores: 3.0 * scores.response_mask + 1.0)):
        ppo = ppo_of(credit=credit, credit_options=options)
        update = ppo._update
        ppo._update = lambda episodes, advantages, returns, name=name, update=update: (
            given.setdefault(name, advantages),
            update(episodes, advantages, returns),
        )[1]
        ppo.train_step()
    plain, credited = given["plain"], given["credited"]
    assert bool((plain > 0).any())
    assert bool((plain < 0).any())
    assert torch.equal(credited, torch.where(weighted(plain), 4 * plain, plain))


def test_heads_are_classified_again_when_that_is_due() -> None:
    ppo = ppo_of(steps=5, credit=GlobalAnchorCredit(), credit_options={"reclassify_every": 2})
    grouped_at = []
    for _ in range(5):
        ppo.train_step()
        grouped_at.append(ppo.credit.grouping.grouped_at)
    assert grouped_at == [0, 0, 2, 2, 4]


@pytest.mark.parametrize(
    ("signs", "counts"), [("both", [4, 3, 2, 3]), ("positive", [4, 2, 1, 2]), ("negative", [4, 1, 1, 1])]
)
def test_completions_whose_weights_cannot_matter_are_not_measured(signs, counts) -> None:
    measured = []

    def strategy(scores):
        measured.append(scores.waad.shape[0])
        return torch.full(scores.waad.shape, 2.0)

    ppo = ppo_of()
    episodes = roll_out(
        ppo.model, [[1, 2]] * 4, max_new_tokens=8, temperature=1.0, ends=set(), generator=ppo.generator
    )
    credit = RolloutCredit(ppo.model.policy, strategy, horizon=(1, 4), reclassify_every=None, signs=signs)
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0])
    weighted = {"both": advantages != 0, "positive": advantages > 0, "negative": advantages < 0}[signs]
    for _ in range(2):
        gamma = credit.weigh(episodes, advantages, 0, entropy=episodes.entropy)
        assert torch.equal(gamma[:, 0] == 2, weighted)
    # An advantage for each token: a completion is measured for a single token, and only that is weighted.
    mixed = torch.zeros_like(gamma)
    mixed[0, 2], mixed[1, 1], mixed[1, 3] = -1.0, 1.0, 0.5
    gamma = credit.weigh(episodes, mixed, 0)
    expected = {"both": mixed != 0, "positive": mixed > 0, "negative": mixed < 0}[signs]
    assert torch.equal((gamma == 2) & (mixed != 0), expected)
    assert torch.equal(
        apply_credit(mixed, gamma, episodes.response_mask), torch.where(expected, 2 * mixed, mixed)
    )
    assert torch.equal(credit.weigh(episodes, 0 * advantages, 0), torch.ones_like(gamma))
    one_sided = advantages.abs() if signs == "negative" else -advantages.abs()
    if signs == "both":
        credit.weigh(episodes, one_sided, 0)
    else:
        assert torch.equal(credit.weigh(episodes, one_sided, 0), torch.ones_like(gamma))
        credit.weigh(episodes, advantages, 0)
    # All of them are needed to group heads, once; then those whose weights can matter; then none.
    assert measured == counts


def test_settings_of_credit_are_checked(as_users_call) -> None:
    for options, told in (
        ({"batch_size": 0}, "batch_size .*at least 1; got 0"),
        ({"heads": "mine"}, "heads .*'mine'"),
        ({"reclassify_every": 0}, "reclassify_every .*got 0"),
        ({"window": 0}, "window .*0"),
        ({"signs": "nonnegative"}, 'signs must be "both", "positive" or "negative"; got'),
    ):
        with pytest.raises(ParameterError, match=told):
            RolloutCredit(tiny_model("llama"), GlobalAnchorCredit(), **options)
    with pytest.raises(ParameterError, match="a credit strategy is a callable"):
        ppo_of(credit=3)
    for options in ({"windows": 3}, [3], "window"):
        with pytest.raises(ParameterError, match="credit_options"):
            PPO(tiny_model("llama"), PROBLEMS, even_ids, credit=GlobalAnchorCredit(), credit_options=options)
    with pytest.raises(UnsupportedModelError):
        RolloutCredit(torch.nn.Linear(2, 2), GlobalAnchorCredit())


def test_a_rollout_is_weighed_as_it_is_given(as_users_call) -> None:
    """Lists and arrays are as good as tensors, and PEFT may be around the policy; nonsense is refused."""
    ids, ones = torch.randint(0, 99, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    rollout = Rollout(ids[:, :4], ones[:, :4], ids[:, 4:], ones[:, 4:])
    credit = RolloutCredit(tiny_model("llama"), GlobalAnchorCredit(), horizon=(1, 4))
    gamma = credit.weigh(rollout, torch.tensor([1.0, -1.0]), 0)
    for advantages in ([1, -1], np.array([1.0, -1.0]), [[1.0] * 8, [-1.0] * 8]):
        assert torch.equal(credit.weigh(rollout, advantages, np.int64(0)), gamma)
    wrapped = RolloutCredit(with_adapters(tiny_model("llama")), GlobalAnchorCredit(), horizon=(1, 4))
    assert wrapped.weigh(rollout, [1, -1], 0).shape == gamma.shape
    for arguments, told in (
        (("text", [1, 1], 0), "rollout must be a Rollout.*'text'"),
        ((rollout, [1], 0), r"advantages .*\[2\] or .*\[2, 8\]; got \[1\]"),
        ((rollout, [math.nan, 1], 0), "advantages is nan"),
        ((rollout, "high", 0), "advantages .*'high'"),
        ((rollout, [1, 1], 0.5), "step .*0.5"),
        ((rollout, [1, 1], None), "step .*None"),
    ):
        with pytest.raises(ParameterError, match=told):
            credit.weigh(*arguments)
    with pytest.raises(ParameterError, match=r"entropy .*\[2, 8\]; got \[2\]"):
        credit.weigh(rollout, [1, 1], 0, entropy=[0.0, 0.0])
    with pytest.raises(ResultError, match="no entropy"):
        RolloutCredit(tiny_model("llama"), EntropyCredit()).weigh(rollout, [1, 1], 0)


def test_a_grouping_is_restored_from_what_it_kept_and_nothing_else(as_users_call) -> None:
    grouping = HeadGrouping(2)
    for wrong in ({}, {"saved_groups": None}, [1], None):
        with pytest.raises(ResultError, match="saved_groups and grouped_at"):
            grouping.restore(wrong)
    with pytest.raises(ParameterError, match=r"groups must be a HeadGroups.*'mine'"):
        grouping.keep("mine", 0)
    for step in (0.5, "now", -1):
        with pytest.raises(ParameterError, match="step"):
            grouping.is_due(step)
    with pytest.raises(ResultError, match="damaged"):
        grouping.restore({"saved_groups": {"local_heads": 3}, "grouped_at": 0})
    assert grouping.groups is None


@pytest.mark.parametrize("signs", ["both", "negative"])
def test_what_is_logged_of_credit_is_what_was_applied(signs, monkeypatch, tmp_path) -> None:
    """Seen from outside: in the advantages before and after. The rollout's other metrics are there too."""
    applied = []

    def keep(advantages, gamma, mask):
        weighted = apply_credit(advantages, gamma, mask)
        counts = mask & ((advantages < 0) if signs == "negative" else (advantages != 0))
        weights = (weighted[counts] / advantages[counts]).double()
        applied.append(
            {
                "credit/gamma_mean": float(weights.mean()),
                "credit/amplified_share": float((weights > 1.001).double().mean()),
                "credit/applied_mean": 1 + float((weights - 1).sum() / mask.sum()),
                "credit/advantage_change": float((weighted - advantages)[mask].double().mean()),
            }
        )
        return weighted

    monkeypatch.setattr(algorithm, "apply_credit", keep)
    options = {"signs": signs, "reclassify_every": 2}
    ppo = ppo_of(credit=CoupledRhythmCredit(amplification=3.0), credit_options=options, folder=tmp_path)
    history = ppo.train()
    for entry, seen in zip(history, applied, strict=True):
        assert {name: entry[name] for name in seen} == pytest.approx(seen, abs=1e-5)
    assert max(seen["credit/gamma_mean"] for seen in applied) > 1.05
    assert [entry["credit/regrouped"] for entry in history] == [1.0, 0.0, 1.0]
    assert [entry["credit/regrouped_heads"] is None for entry in history] == [True, True, False]
    logged = {name: value for name, value in history[-1].items() if name.startswith("credit/")}
    assert logged == ppo.credit.last.metrics
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]) == history[-1]


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (lambda problems, completions: [1.0], r"\[8\]; got \[1\]"),
        (lambda problems, completions: [[1.0]] * 8, r"\[8\]; got \[8, 1\]"),
        (lambda problems, completions: 1.0, r"\[8\]; got \[\]"),
        (lambda problems, completions: None, "got None"),
        (lambda problems, completions: ["good"] * 8, "'good'"),
        (lambda problems, completions: {"reward": 1.0}, "reward"),
        (lambda problems, completions: torch.ones(8, dtype=torch.complex64), "complex64"),
        (lambda problems, completions: [math.nan] * 8, "8 of 8 are not, the first nan of completion 0"),
        (lambda problems, completions: torch.ones(8, 1), r"\[8\]; got \[8, 1\]: flatten them"),
        (lambda problems, completions: torch.ones(8, 2), r"\[8\]; got \[8, 2\]$"),
        (lambda problems, completions: [[1.0], [1.0, 2.0]], r"got \[\[1.0\], \[1.0, 2.0\]\]"),
        (lambda problems, completions: [1.0] * 7 + [1e39], "1 of 8 are not, the first inf of completion 7"),
    ],
)
def test_rewards_that_make_no_sense(reward, told, as_users_call) -> None:
    ppo = ppo_of(reward=reward)
    before = parameters(ppo)
    with pytest.raises(ResultError, match=f"the rewards.*{told}"):
        ppo.train()
    assert_same(parameters(ppo), before)


@pytest.mark.parametrize(
    "kind", [list, np.array, torch.tensor, lambda found: [torch.tensor(r) for r in found]]
)
def test_rewards_may_be_of_any_kind(kind) -> None:
    found = judge(lambda problems, completions: kind([1, 2]), [{}, {}], [[1], [2]])
    assert found.tolist() == [1.0, 2.0]
    assert found.dtype == torch.float32


def test_a_reward_may_be_a_model() -> None:
    """Its graph is not the policy's, and it gets no gradient."""
    judge = torch.nn.Linear(1, 1)

    def reward(problems, completions):
        return judge(torch.tensor(even_ids(problems, completions))[:, None])[:, 0]

    assert len(ppo_of(reward=reward).train()) == 3
    assert judge.weight.grad is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"problems": []}, "at least one problem; got none"),
        ({"problems": None}, "problems .*None"),
        ({"problems": "text"}, "problems .*'text'"),
        ({"problems": {"prompt_ids": [1]}}, "problems .*list of mappings"),
        ({"problems": [{"prompt": "text"}]}, "problem 0 .*prompt_ids"),
        ({"problems": [{"prompt_ids": [1]}, [1, 2]]}, r"problem 1 .*\[1, 2\]"),
        ({"problems": [{"prompt_ids": []}]}, "prompt_ids of problem 0 .*got none"),
        ({"problems": [{"prompt_ids": "text"}]}, "prompt_ids of problem 0 .*'text'"),
        ({"problems": [{"prompt_ids": [1.5]}]}, "prompt_ids of problem 0 .*1.5"),
        (
            {"problems": [{"prompt_ids": [1]}, {"prompt_ids": [3, 500]}]},
            r"problem 1 .*vocabulary, 0\.\.98; got 500 at place 1",
        ),
        ({"problems": [{"prompt_ids": [-1]}]}, "prompt_ids of problem 0 .*got -1"),
        ({"problems": [{"prompt_ids": torch.ones(1, 3).long()}]}, r"problem 0 .*tensor \[1, 3\]"),
        ({"problems": [{"prompt_ids": [1] * 200}]}, "200 tokens and 64 new ones exceed .* of 256"),
        ({"reward": None}, "reward .*None"),
        ({"config": {"steps": 3}}, "config must be a PPOConfig.*dict"),
        ({"ends": [7, 99]}, "ends .*0..98; got 99"),
        ({"ends": "</s>"}, "ends .*</s>"),
        ({"folder": 3}, "folder .*3"),
    ],
)
def test_wrong_arguments(arguments, told, as_users_call) -> None:
    given = {"policy": tiny_model("llama"), "problems": PROBLEMS, "reward": even_ids, **arguments}
    with pytest.raises(ParameterError, match=told):
        PPO(**given)


def test_prompts_and_ends_of_any_kind_are_the_same_run(tmp_path) -> None:
    histories = []
    for kind in (list, np.array, torch.tensor):
        problems = [{**problem, "prompt_ids": kind(problem["prompt_ids"])} for problem in PROBLEMS]
        ends = kind(sorted(ENDS))
        ppo = PPO(tiny_model("llama"), problems, even_ids, PPOConfig(**SETTINGS), ends=ends)
        histories.append(without_clock(ppo.train()))
    assert histories[0] == histories[1] == histories[2] == without_clock(ppo_of().train())


def test_what_train_refuses(tmp_path, as_users_call) -> None:
    for options in ({"resume": "yes"}, {"progress": 1}):
        with pytest.raises(ParameterError, match=r"must be True or False"):
            ppo_of(folder=tmp_path / "run").train(**options)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match=r"cannot create .*file"):
        ppo_of(folder=tmp_path / "file").train()


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
    prompts = [problem["prompt_ids"] for problem in problems]
    episodes = roll_out(
        ppo.model, prompts, max_new_tokens=24, temperature=0.8, ends=ppo.ends, generator=ppo.generator
    )
    with torch.no_grad():
        again = ppo.evaluate(ppo.model, episodes)[1]
    mask = episodes.response_mask
    torch.testing.assert_close(again[mask], episodes.logprobs[mask], atol=1e-4, rtol=1e-4)
    before = policy.model.layers[3].mlp.up_proj.weight.clone()
    (entry,) = ppo.train()
    assert 1 < entry["credit/gamma_mean"] < 1.5
    assert entry["grad_norm"] > 0
    assert not torch.equal(policy.model.layers[3].mlp.up_proj.weight, before)

"""Whole runs of verl's trainer: Ray, TransferQueue, rollouts, rewards, advantages, updates, checkpoints.

Each takes about a minute on two cores, most of it for the start of Ray's processes, so each tests several
settings of verl at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import engines
import pytest
import runs
import torch
from transformers import AutoModelForCausalLM

from attnprobe.rl import CoupledRhythmCredit, RolloutCredit
from attnprobe.rl.verl.engine import CHECKPOINT, FIELD
from attnprobe.rl.verl.rows import jagged, padded, rollout_of

METRICS = {
    "actor/credit/gamma_mean",
    "actor/credit/amplified_share",
    "actor/credit/applied_mean",
    "actor/credit/advantage_change",
    "actor/credit/measured_rows",
    "actor/credit/seconds",
    "actor/credit/preplans_per_100_tokens",
    "actor/credit/anchors_per_100_tokens",
    "actor/credit/without_fai_share",
    "actor/credit/regrouped",
}

KL = {
    "algorithm.use_kl_in_reward": True,
    "actor_rollout_ref.ref.log_prob_use_dynamic_bsz": True,
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu": 128,
}


def check_credit(run: runs.Run, steps: int) -> None:
    """Check that a run went well, and that its log says so."""
    assert run.code == 0, run.text[-3000:]
    assert "attnprobe: credit is on: credit=CoupledRhythmCredit" in run.text
    assert list(run.steps) == list(range(1, steps + 1))
    for step in run.steps:
        found = run.credit(step)
        assert set(found) - {"actor/credit/regrouped_heads"} == METRICS
        assert 1.0 < found["actor/credit/gamma_mean"] < 1.4
        assert found["actor/credit/regrouped"] == float(step % 2 == 1)


# ---- one worker, mixed precision, packed rows; what was recorded, done again ---------------------


@pytest.fixture(scope="module")
def recorded(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    folder = tmp_path_factory.mktemp("recorded")
    return runs.run(
        inputs,
        folder,
        runs.CREDIT,
        {"trainer.save_freq": 1},
        ATTNPROBE_RIG_RECORD=str(folder),
    )


def read(run: runs.Run, name: str) -> Any:
    return torch.load(run.folder / f"{name}-rank0.pt", weights_only=False)


def test_a_run_with_one_worker(recorded: runs.Run) -> None:
    check_credit(recorded, 2)


def test_the_weights_of_a_run_are_those_of_a_pass_of_our_own(recorded: runs.Run, inputs: Path) -> None:
    """The run computes in bfloat16, so that a rank may be another one here and there."""
    rollout = read(recorded, "rollout")
    rows = rollout["rows"]
    policy = AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.bfloat16).eval()
    ours = RolloutCredit(policy, CoupledRhythmCredit(), horizon=(1, 4), window=5)
    expected = ours.weigh(rollout_of(rows), None, 0)
    gamma = padded(rollout["found"][FIELD], 1.0)
    own = rollout_of(rows).response_mask
    assert float((gamma == expected)[own].double().mean()) > 0.8
    torch.testing.assert_close(rollout["groups"].span, ours.groups.span, rtol=0.02, atol=0.02)


def test_the_updates_of_a_run_are_those_by_hand(recorded: runs.Run) -> None:
    """Bit for bit: two mini-batches of the first step, with the run's own configuration."""
    engine = engines.start_engine(engines.PlainEngine, **read(recorded, "configs"))
    for number in range(2):
        update = read(recorded, f"update{number}")
        rows = update["rows"]
        rows["advantages"] = jagged(
            [a * gamma for a, gamma in zip(rows["advantages"].unbind(), rows[FIELD].unbind(), strict=True)]
        )
        engines.update(engine, rows, update["loss"])
        actual = engines.parameters(engine)
        assert all(torch.equal(value, update["after"][name]) for name, value in actual.items())


def test_a_resumed_run_goes_on_with_its_heads(recorded: runs.Run, inputs: Path, tmp_path: Path) -> None:
    """Resumed after the first step, heads are not classified in the second, and weights are the same."""
    checkpoints = recorded.folder / "checkpoints"
    resumed = runs.run(
        inputs,
        tmp_path,
        runs.CREDIT,
        {
            "trainer.save_freq": 1,
            "trainer.resume_mode": "resume_path",
            "trainer.resume_from_path": checkpoints / "global_step_1",
        },
    )
    assert resumed.code == 0, resumed.text[-3000:]
    assert list(resumed.steps) == [2]
    assert resumed.credit(2)["actor/credit/regrouped"] == 0.0
    # verl hands out rows in the order of random names, so that mini-batches, and means over them, differ.
    for name in ("applied_mean", "measured_rows", "preplans_per_100_tokens", "anchors_per_100_tokens"):
        expected = recorded.credit(2)[f"actor/credit/{name}"]
        assert resumed.credit(2)[f"actor/credit/{name}"] == pytest.approx(expected, rel=0.05)
    states = [
        json.loads((folder / "global_step_2" / "actor" / CHECKPOINT).read_text())
        for folder in (checkpoints, tmp_path / "checkpoints")
    ]
    assert states[0] == states[1]
    assert (states[0]["rollouts"], states[0]["grouping"]["grouped_at"]) == (2, 0)


# ---- other settings -----------------------------------------------------------------------------


def test_a_run_with_two_workers_and_an_adapter(inputs: Path, tmp_path: Path) -> None:
    """Padded rows, micro-batches of fixed size, rows that fill a batch, LoRA, and its base as reference."""
    run = runs.run(
        inputs,
        tmp_path,
        runs.CREDIT,
        {
            "trainer.n_gpus_per_node": 2,
            "data.train_batch_size": 3,
            "actor_rollout_ref.model.use_remove_padding": False,
            "actor_rollout_ref.actor.use_dynamic_bsz": False,
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 1,
            "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz": False,
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 1,
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 1,
            "actor_rollout_ref.model.lora_rank": 4,
            "actor_rollout_ref.model.lora.merge": True,
            "algorithm.use_kl_in_reward": True,
        },
    )
    check_credit(run, 2)
    assert [run.credit(step)["actor/credit/measured_rows"] for step in run.steps] == [6.0, 6.0]


def test_an_asynchronous_run_with_a_reference(inputs: Path, tmp_path: Path) -> None:
    """Turned on by the YAML file alone, with the reference policy as an engine of its own."""
    environment = "+ray_kwargs.ray_init.runtime_env.env_vars"
    run = runs.run(
        inputs,
        tmp_path,
        None,
        {
            "trainer.v1.trainer_mode": "colocate_async",
            "actor_rollout_ref.model.external_lib": "attnprobe.rl.verl",
            f"{environment}.VERL_ENGINE_VENDOR": "attnprobe",
            f"{environment}.ATTNPROBE_CREDIT": f"'{json.dumps(runs.CREDIT)}'",
            **KL,
        },
    )
    check_credit(run, 2)

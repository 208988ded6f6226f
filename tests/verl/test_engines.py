"""The engine in one process: its weights, its updates, its checkpoints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engines
import pytest
import torch
from transformers import AutoModelForCausalLM
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.workers.config import PolicyLossConfig
from verl.workers.engine.base import EngineRegistry

from attnprobe.errors import ParameterError, ResultError, TrainerError
from attnprobe.rl import EntropyCredit, RolloutCredit
from attnprobe.rl.verl.engine import CHECKPOINT, FIELD, CreditEngine, RefusedEngine
from attnprobe.rl.verl.loss_trial import check_loss
from attnprobe.rl.verl.rows import jagged, of_responses, padded, rollout_of

ADVANTAGES = torch.tensor([1.0, -0.7, 0.4, -1.2, 0.0, 0.8, -0.3, 0.6])


@pytest.fixture(scope="module")
def model(inputs: Path) -> Path:
    return inputs / "model"


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch):
    """Return a function that sets options of credit, beside those that fit short responses."""

    def set_options(**more: Any) -> None:
        short = {} if "Entropy" in more.get("strategy", "") else {"horizon": [1, 4], "window": 5}
        monkeypatch.setenv("ATTNPROBE_CREDIT", json.dumps(short | {"reclassify_every": 2} | more))

    set_options()
    return set_options


def own_policy(model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def weighed(rows: Any, policy: Any, credit: Any) -> tuple[torch.Tensor, RolloutCredit]:
    """What `RolloutCredit` itself says of the same rows, in passes of its own."""
    ours = RolloutCredit(policy, credit, horizon=(1, 4), window=5)
    return ours.weigh(rollout_of(rows), None, 0), ours


# ---- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_weights_are_those_of_a_pass_of_our_own(model: Path, options, packed: bool, dynamic: bool) -> None:
    """Whatever verl packs or pads, and with the rows that it adds to fill a batch."""
    engine = engines.make_engine(CreditEngine, model, packed=packed)
    rows = engines.make_rows(packed=packed, dynamic=dynamic, padding=2)
    found = engines.log_probs(engine, rows)
    expected, ours = weighed(rows, own_policy(model), engine._credit.credit)
    gamma = padded(found[FIELD], 1.0)
    torch.testing.assert_close(gamma, expected, rtol=0, atol=0)
    assert bool((gamma > 1).any())
    assert found[FIELD].offsets().tolist() == rows["responses"].offsets().tolist()
    assert engine._credit.groups.local == ours.groups.local
    assert engine._credit.groups.global_ == ours.groups.global_


@pytest.fixture
def fsdp1(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """FSDP1, verl's default, without what verl asks of it that only an accelerator can do."""

    class CpuFSDP(engines.verl_engines.FSDP):
        def __init__(self, module: Any, **options: Any) -> None:
            on_cpu = {"sync_module_states": False, "device_id": torch.device("cpu")}
            super().__init__(module, **(options | on_cpu))

    monkeypatch.setattr(engines.verl_engines, "FSDP", CpuFSDP)
    return {"strategy": "fsdp"}


def test_fsdp1_is_read_too(model: Path, options, fsdp1: dict[str, Any]) -> None:
    """In one process, where it shards nothing; its wrappers are those of several."""
    engine = engines.make_engine(CreditEngine, model, **fsdp1)
    assert type(engine.module.model.layers[0]).__name__ == "FullyShardedDataParallel"
    rows = engines.make_rows()
    found = engines.log_probs(engine, rows)
    expected, _ = weighed(rows, own_policy(model), engine._credit.credit)
    assert torch.equal(padded(found[FIELD], 1.0), expected)
    rows = engines.with_fields(rows, found, ADVANTAGES)
    by_hand = rows.copy()
    by_hand["advantages"] = jagged(
        [a * gamma for a, gamma in zip(rows["advantages"].unbind(), rows[FIELD].unbind(), strict=True)]
    )
    actual = two_updates(engine, rows, engines.make_loss())
    expected = two_updates(
        engines.make_engine(engines.PlainEngine, model, **fsdp1), by_hand, engines.make_loss()
    )
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_rows_that_fill_a_batch_have_no_vote(model: Path, options) -> None:
    groups = []
    for padding in (0, 4):
        engine = engines.make_engine(CreditEngine, model)
        found = engines.log_probs(engine, engines.make_rows(padding=padding))
        groups.append(engine._credit.state_dict()["grouping"]["saved_groups"])
        assert all(bool((row == 1).all()) for row in found[FIELD].unbind()[len(engines.SHAPES) :])
    assert groups[0]["local_heads"] == groups[1]["local_heads"]
    torch.testing.assert_close(torch.tensor(groups[0]["span"]), torch.tensor(groups[1]["span"]))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [False, True])
def test_watching_changes_no_log_probability(model: Path, options, lora: bool, dtype: str) -> None:
    rows = engines.make_rows()
    found = [
        engines.log_probs(engines.make_engine(kind, model, lora=lora, dtype=dtype), rows)
        for kind in (CreditEngine, engines.PlainEngine)
    ]
    assert set(found[0]) - set(found[1]) == {FIELD}
    for name in found[1]:
        assert torch.equal(found[0][name].values(), found[1][name].values())


def test_packed_rows_with_padding_at_the_end(model: Path, options) -> None:
    """verl's pad_to_length: a segment that belongs to no row."""
    plain, longer = (
        engines.log_probs(engines.make_engine(CreditEngine, model, **settings), engines.make_rows())
        for settings in ({}, {"pad_to_length": True, "pad_to_length_bucket": 64})
    )
    assert torch.equal(plain[FIELD].values(), longer[FIELD].values())


def test_entropy_is_that_of_verls_pass(model: Path, options) -> None:
    options(strategy="EntropyCredit", quantile=0.2)
    rows = engines.make_rows()
    found = engines.log_probs(engines.make_engine(CreditEngine, model), rows)
    rollout = rollout_of(rows)
    entropy = of_responses(found["entropy"], rollout)
    ours = RolloutCredit(own_policy(model), EntropyCredit(quantile=0.2))
    assert torch.equal(padded(found[FIELD], 1.0), ours.weigh(rollout, None, 0, entropy=entropy))


# ---- updates ------------------------------------------------------------------------------------


def two_updates(engine: Any, rows: Any, loss: Any) -> dict[str, torch.Tensor]:
    for _ in range(2):
        engines.update(engine, rows, loss)
    return engines.parameters(engine)


@pytest.mark.parametrize(
    ("settings", "signs"),
    [
        ({}, "both"),
        ({"packed": False}, "positive"),
        ({"lora": True, "dtype": "bf16"}, "both"),
        ({"dtype": "bf16"}, "negative"),
    ],
)
def test_updates_equal_those_with_advantages_multiplied_by_hand(
    model: Path, options, settings: dict[str, Any], signs: str
) -> None:
    """Bit for bit, and twice, since verl may train on the same rows in several epochs."""
    options(signs=signs)
    engine = engines.make_engine(CreditEngine, model, **settings)
    rows = engines.make_rows(packed=settings.get("packed", True))
    rows = engines.with_fields(rows, engines.log_probs(engine, rows), ADVANTAGES)
    applies = {"both": lambda a: a == a, "positive": lambda a: a >= 0, "negative": lambda a: a < 0}[signs]
    by_hand = rows.copy()
    by_hand["advantages"] = jagged(
        [
            torch.where(applies(advantage), advantage * gamma, advantage)
            for advantage, gamma in zip(rows["advantages"].unbind(), rows[FIELD].unbind(), strict=True)
        ]
    )
    assert not torch.equal(by_hand["advantages"].values(), rows["advantages"].values())
    loss = engines.make_loss()
    actual = two_updates(engine, rows, loss)
    expected = two_updates(engines.make_engine(engines.PlainEngine, model, **settings), by_hand, loss)
    without = two_updates(engines.make_engine(engines.PlainEngine, model, **settings), rows, loss)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert any(not torch.equal(actual[name], without[name]) for name in without)


def test_an_amplification_of_one_changes_nothing(model: Path, options) -> None:
    options(amplification=1)
    results = []
    for kind in (CreditEngine, engines.PlainEngine):
        engine = engines.make_engine(kind, model)
        rows = engines.make_rows()
        rows = engines.with_fields(rows, engines.log_probs(engine, rows), ADVANTAGES)
        results.append(two_updates(engine, rows, engines.make_loss()))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[1])


def test_metrics_are_of_the_weights_that_were_applied(model: Path, options) -> None:
    options(signs="positive")
    engine = engines.make_engine(CreditEngine, model)
    rows = engines.make_rows()
    found = engines.log_probs(engine, rows)
    metrics = engines.update(engine, engines.with_fields(rows, found, ADVANTAGES), engines.make_loss())
    own = rollout_of(rows).response_mask
    gamma = padded(found[FIELD], 1.0)
    applied = torch.where(ADVANTAGES[:, None] >= 0, gamma, 1.0)
    matters = own & (ADVANTAGES[:, None] > 0)
    assert metrics["credit/gamma_mean"] == [pytest.approx(float(gamma[matters].mean()))]
    assert metrics["credit/amplified_share"] == [pytest.approx(float((gamma[matters] > 1).double().mean()))]
    assert metrics["credit/applied_mean"] == [pytest.approx(float(applied[own].mean()))]
    change = (ADVANTAGES[:, None] * (applied - 1))[own].mean()
    assert metrics["credit/advantage_change"] == [pytest.approx(float(change))]
    assert metrics["credit/regrouped"] == [1.0]
    assert metrics["credit/measured_rows"] == [len(engines.SHAPES)]


# ---- the reference policy -----------------------------------------------------------------------


def test_a_reference_engine_is_not_read(model: Path, options) -> None:
    engine = engines.make_engine(CreditEngine, model, forward_only=True)
    assert FIELD not in engines.log_probs(engine, engines.make_rows())


def test_the_actor_without_its_adapter_is_not_read(model: Path, options) -> None:
    engine = engines.make_engine(CreditEngine, model, lora=True)
    with engine.disable_adapter():
        assert FIELD not in engines.log_probs(engine, engines.make_rows())
    assert engine._rollouts == 0
    assert FIELD in engines.log_probs(engine, engines.make_rows())


# ---- checkpoints --------------------------------------------------------------------------------


def test_checkpoints_hold_the_grouping(model: Path, options, tmp_path: Path) -> None:
    engine = engines.make_engine(CreditEngine, model)
    rows = engines.make_rows()
    engines.log_probs(engine, rows)
    engine.save_checkpoint(str(tmp_path), global_step=1)
    other = engines.make_engine(CreditEngine, model)
    other.load_checkpoint(str(tmp_path))
    assert other._credit.state_dict() == engine._credit.state_dict()
    # Heads are classified again when that is due, and not because the run was resumed.
    regrouped = []
    for _ in range(2):
        engines.log_probs(other, rows)
        regrouped.append(other._credit.last.metrics["credit/regrouped"])
    assert regrouped == [0.0, 1.0]


def test_a_checkpoint_of_other_settings_is_refused(model: Path, options, tmp_path: Path) -> None:
    engine = engines.make_engine(CreditEngine, model)
    engines.log_probs(engine, engines.make_rows())
    engine.save_checkpoint(str(tmp_path), global_step=1)
    options(quantile=0.3)
    with pytest.raises(ResultError, match=r"other settings of credit: credit.quantile 0.4 \(now 0.3\)"):
        engines.make_engine(CreditEngine, model).load_checkpoint(str(tmp_path))
    options()
    (tmp_path / CHECKPOINT).write_text("{")
    with pytest.raises(ResultError, match=r"attnprobe.json in .* is damaged"):
        engines.make_engine(CreditEngine, model).load_checkpoint(str(tmp_path))


def test_a_checkpoint_without_credit_is_said(
    model: Path, options, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engines.make_engine(engines.PlainEngine, model).save_checkpoint(str(tmp_path), global_step=1)
    engine = engines.make_engine(CreditEngine, model)
    engine.load_checkpoint(str(tmp_path))
    assert "was written without credit, so heads are classified anew" in caplog.text


# ---- what is refused ----------------------------------------------------------------------------


def test_rows_without_weights_are_refused(model: Path, options) -> None:
    """As those of a run in bypass mode, or of the V0 trainer."""
    engine = engines.make_engine(CreditEngine, model)
    rows = engines.make_rows()
    found = engines.log_probs(engines.make_engine(engines.PlainEngine, model), rows)
    before = engines.parameters(engine)
    with pytest.raises(TrainerError, match=r"no weights, .* \(trainer.use_v1=True\) without .*bypass_mode"):
        engines.update(engine, engines.with_fields(rows, found, ADVANTAGES), engines.make_loss())
    assert all(torch.equal(value, before[name]) for name, value in engines.parameters(engine).items())
    without = engines.with_fields(rows, found, ADVANTAGES)
    del without["advantages"]
    with pytest.raises(TrainerError, match="no advantages for credit to weight"):
        engines.update(engine, without, engines.make_loss())


def test_rows_of_the_v0_trainer_are_refused() -> None:
    rows = {name: torch.ones(2, 3, dtype=torch.long) for name in ("prompts", "responses", "response_mask")}
    with pytest.raises(TrainerError, match=r"set trainer\.use_v1=True"):
        rollout_of(rows)


def test_rows_with_pictures_are_refused(model: Path, options) -> None:
    from verl.utils import tensordict_utils

    rows = engines.make_rows()
    tensordict_utils.assign_non_tensor_stack(
        rows, "multi_modal_inputs", [{"pixel_values": torch.zeros(1, 3)} for _ in engines.SHAPES]
    )
    with pytest.raises(TrainerError, match="credit reads text only"):
        engines.log_probs(engines.make_engine(CreditEngine, model), rows)


LOSSES = sorted(POLICY_LOSS_REGISTRY)


@pytest.mark.parametrize("mode", LOSSES)
def test_losses_that_would_erase_credit_are_refused(mode: str) -> None:
    beta = {"dro_beta": 1.0} if mode == "dro" else {}
    loss = engines.make_loss(policy_loss=PolicyLossConfig(loss_mode=mode, **beta), use_kl_loss=True)
    if mode in ("geo_mean", "kl_cov"):
        with pytest.raises(TrainerError, match=f"ppo_loss with loss_mode={mode}: .* not multiplied by"):
            check_loss(loss)
    else:
        check_loss(loss)


def test_the_loss_is_tried_out_before_the_first_update(model: Path, options) -> None:
    engine = engines.make_engine(CreditEngine, model)
    rows = engines.make_rows()
    rows = engines.with_fields(rows, engines.log_probs(engine, rows), ADVANTAGES)
    before = engines.parameters(engine)
    with pytest.raises(TrainerError, match="loss_mode=geo_mean"):
        engines.update(engine, rows, engines.make_loss(policy_loss=PolicyLossConfig(loss_mode="geo_mean")))
    with pytest.raises(TrainerError, match="nothing says that credit would reach the loss <lambda>"):
        engines.update(engine, rows, lambda **_: 1 / 0)
    assert all(torch.equal(value, before[name]) for name, value in engines.parameters(engine).items())


def test_other_training_backends_are_refused() -> None:
    found = {name: EngineRegistry.get_engine_cls("language_model", name) for name in ("fsdp", "fsdp2")}
    assert found == {"fsdp": CreditEngine, "fsdp2": CreditEngine}
    for name in ("megatron", "veomni", "torchtitan", "automodel", "fsdp_turbo"):
        assert EngineRegistry.get_engine_cls("language_model", name) is RefusedEngine
        with pytest.raises(TrainerError, match=f"fsdp and fsdp2, not with {name}"):
            EngineRegistry.new("language_model", name, engine_config=SimpleNamespace(strategy=name))


def test_a_mistaken_option_is_refused(model: Path, options) -> None:
    options(layers=[99])
    with pytest.raises(ParameterError, match="99"):
        engines.make_engine(CreditEngine, model)

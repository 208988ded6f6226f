"""Attaching credit to a trainer and taking it away: the life of a run, its checkpoints and its log."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

pytest.importorskip("trl")
from transformers import TrainerCallback
from trl import GRPOTrainer, RLOOTrainer
from trl.experimental.gmpo import GMPOTrainer

import attnprobe
from attnprobe import ParameterError, PatternError, ResultError, TrainerError, UnsupportedModelError
from attnprobe.rl import (
    CoupledRhythmCredit,
    CreditCallback,
    CreditMixin,
    LocalChunkCredit,
    RandomCredit,
    Rollout,
    attach_credit,
    measure_rollout,
)
from attnprobe.testing.tiny_models import tiny_model
from attnprobe.testing.tiny_trainers import tiny_trainer

HORIZON = (1, 4)
CREDIT = CoupledRhythmCredit(amplification=3.0)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def parameters(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def same(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def state_of(trainer):
    """Return what attaching may change of a trainer, and must put back."""
    own = {name: value for name, value in vars(trainer).items() if callable(value) or "credit" in name}
    return own, list(trainer.callback_handler.callbacks), trainer.model.training


# ---- attaching and detaching --------------------------------------------------------------------


def test_attaching_and_detaching_leaves_a_trainer_as_it_was(tmp_path) -> None:
    stock = tiny_trainer(GRPOTrainer, tmp_path)
    stock.train()
    trainer = tiny_trainer(GRPOTrainer, tmp_path)
    before = state_of(trainer)
    handle = attach_credit(trainer, CREDIT, horizon=HORIZON)
    assert state_of(trainer) != before
    handle.detach()
    assert state_of(trainer) == before
    assert trainer._metrics == {"train": {}, "eval": {}}, "what the canary logged is forgotten"
    handle.detach()
    trainer.train()
    assert same(parameters(stock), parameters(trainer))


def test_detaching_between_runs_gives_back_the_stock_run(tmp_path) -> None:
    """Both go on from the weights that a credited run left, one detached, one that never had credit."""
    # An optimizer without memory: that of the first run would not be the same.
    config = {"optim": "sgd", "learning_rate": 0.01}
    credited = tiny_trainer(GRPOTrainer, tmp_path, **config)
    handle = attach_credit(credited, CREDIT, horizon=HORIZON)
    credited.train()
    handle.detach()
    stock = tiny_trainer(GRPOTrainer, tmp_path, **config)
    stock.train()
    assert not same(parameters(stock), parameters(credited))
    stock.model.load_state_dict(credited.model.state_dict())
    for trainer in (credited, stock):
        torch.manual_seed(3)
        trainer.train()
    assert same(parameters(stock), parameters(credited))


def test_attaching_between_runs_is_attaching_before(tmp_path) -> None:
    runs = []
    for attach_first in (True, False):
        trainer = tiny_trainer(GRPOTrainer, tmp_path)
        if attach_first:
            attach_credit(trainer, LocalChunkCredit(amplification=1.0), horizon=HORIZON).detach()
        trainer.train()
        attach_credit(trainer, CREDIT, horizon=HORIZON)
        torch.manual_seed(3)
        trainer.train()
        runs.append(parameters(trainer))
    assert same(*runs)


def test_what_was_generated_with_credit_is_stock_after_detaching(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path)
    handle = attach_credit(trainer, CREDIT, horizon=HORIZON)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert inputs["advantages"].ndim == 1, "the batch keeps the advantages that the trainer gave it"
    credited = trainer.compute_loss(trainer.model, inputs)
    handle.detach()
    plain = {name: value for name, value in inputs.items() if name != "credit_weights"}
    assert torch.equal(
        trainer.compute_loss(trainer.model, inputs), trainer.compute_loss(trainer.model, plain)
    )
    assert not torch.equal(trainer.compute_loss(trainer.model, plain), credited)


def test_evaluation_is_stock(tmp_path) -> None:
    runs = []
    for credit in (None, CREDIT):
        trainer = tiny_trainer(GRPOTrainer, tmp_path, per_device_eval_batch_size=4)
        if credit is not None:
            attach_credit(trainer, credit, horizon=HORIZON)
        torch.manual_seed(0)
        runs.append(trainer.evaluate(trainer.train_dataset.select(range(2))))
    clocks = ("time", "per_second")
    left, right = ({k: v for k, v in run.items() if not any(clock in k for clock in clocks)} for run in runs)
    assert left == right
    assert "eval_loss" in left


def test_overrides_of_a_subclass_stay_in_force(tmp_path) -> None:
    class Counting(GRPOTrainer):
        generated = losses = 0

        def _generate_and_score_completions(self, inputs):
            self.generated += 1
            output = super()._generate_and_score_completions(inputs)
            output["advantages"] = output["advantages"][:, None].expand(output["completion_ids"].shape)
            return output

        def _compute_loss(self, model, inputs):
            self.losses += 1
            return super()._compute_loss(model, inputs)

    stock = tiny_trainer(GRPOTrainer, tmp_path)
    attach_credit(stock, CREDIT, horizon=HORIZON)
    stock.train()
    trainer = tiny_trainer(Counting, tmp_path)
    attach_credit(trainer, CREDIT, horizon=HORIZON)
    tried = trainer.losses
    trainer.train()
    assert trainer.generated == 2
    assert trainer.losses == tried + 2
    assert same(parameters(stock), parameters(trainer))


def test_the_mixin_is_attaching(tmp_path) -> None:
    class Credited(CreditMixin, GRPOTrainer):
        pass

    attached = tiny_trainer(GRPOTrainer, tmp_path)
    attach_credit(attached, CREDIT, horizon=HORIZON)
    attached.train()
    mixed = tiny_trainer(
        Credited, tmp_path, options={"credit": CREDIT, "credit_options": {"horizon": HORIZON}}
    )
    mixed.train()
    assert same(parameters(attached), parameters(mixed))
    mixed.credit_handle.detach()
    assert tiny_trainer(Credited, tmp_path).credit_handle is None


def test_options_that_the_mixin_does_not_know(tmp_path, as_users_call) -> None:
    class Credited(CreditMixin, GRPOTrainer):
        pass

    for options, told in (({"windows": 3}, "window.*got 'windows'"), ([3], r"\[3\]"), ({1: 2}, "got 1")):
        with pytest.raises(ParameterError, match=f"credit_options.*{told}"):
            tiny_trainer(Credited, tmp_path, options={"credit": CREDIT, "credit_options": options})


def test_a_wrapper_put_over_credit_must_go_first(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path)
    handle = attach_credit(trainer, CREDIT)
    inner = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(TrainerError, match="compute_loss was replaced after credit was attached"):
        handle.detach()
    trainer.compute_loss = inner
    handle.detach()
    assert "compute_loss" not in vars(trainer)


def test_a_wrapper_under_credit_is_put_back(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path)
    inner, calls = trainer.compute_loss, []
    trainer.compute_loss = mine = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    handle = attach_credit(trainer, CREDIT, horizon=HORIZON)
    calls.clear()
    trainer.train()
    handle.detach()
    assert len(calls) == 2
    assert trainer.compute_loss is mine


# ---- the life of a run --------------------------------------------------------------------------


class Grouped(TrainerCallback):
    """Notes after each step when heads were last grouped."""

    def __init__(self, trainer) -> None:
        self.trainer, self.steps = trainer, []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        found = [c for c in self.trainer.callback_handler.callbacks if isinstance(c, CreditCallback)]
        self.steps += [callback.grouped_at for callback in found]


@pytest.mark.parametrize(
    ("every", "config", "expected"),
    [
        (1, {}, [0, 1, 2, 3, 4]),
        (2, {}, [0, 0, 2, 2, 4]),
        (3, {}, [0, 0, 0, 3, 3]),
        (None, {}, [0, 0, 0, 0, 0]),
        # Heads can be grouped when there are new rollouts only.
        (1, {"num_iterations": 2}, [0, 0, 2, 2, 4]),
    ],
)
def test_heads_are_grouped_every_so_many_steps(every, config, expected, tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path, max_steps=5, **config)
    attach_credit(trainer, CREDIT, horizon=HORIZON, reclassify_every=every)
    grouped = Grouped(trainer)
    trainer.add_callback(grouped)
    trainer.train()
    assert grouped.steps == expected


def test_the_grouping_is_that_of_the_rollouts(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path, max_steps=1)
    handle = attach_credit(trainer, CREDIT, layers="all", horizon=HORIZON)
    kept, weigh = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: kept.append(weigh(inputs)) or kept[-1]
    trainer.train()
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    batch = attnprobe.TokenBatch.from_rollout(*(kept[0][name] for name in names))
    model = tiny_model("llama", vocab_size=300)
    heads = attnprobe.classify_heads(attnprobe.measure(model, batch, horizon=HORIZON))
    assert handle.layers == handle.groups.layers == (0, 1, 2)
    assert torch.equal(handle.groups.local_heads, heads.local_heads)
    assert torch.equal(handle.groups.global_heads, heads.global_heads)
    assert torch.allclose(handle.groups.span, heads.span, atol=1e-5)


def test_a_grouping_that_is_given_is_kept(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path, max_steps=3)
    batch = attnprobe.TokenBatch.from_ids(torch.randint(0, 300, (2, 20)), response_start=4)
    heads = attnprobe.classify_heads(attnprobe.measure(trainer.model, batch, layers=[0, 2]))
    handle = attach_credit(trainer, CREDIT, heads=heads, horizon=HORIZON, reclassify_every=1)
    trainer.train()
    assert handle.layers == (0, 2)
    assert handle.groups is heads


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLOOTrainer])
def test_a_resumed_run_goes_on_identically(trainer_class, restore, tmp_path) -> None:
    """The grouping of step 0 is used until step 3, across the checkpoint of step 2."""
    config = {
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 2,
        "restore_callback_states_from_checkpoint": restore,
    }
    whole = tiny_trainer(trainer_class, tmp_path, **config)
    attach_credit(whole, CREDIT, horizon=HORIZON, reclassify_every=3)
    whole.train()
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["CreditCallback"]["attributes"]["grouped_at"] == 0

    resumed = tiny_trainer(trainer_class, tmp_path / "other", **config)
    handle = attach_credit(resumed, CREDIT, horizon=HORIZON, reclassify_every=3)
    grouped = Grouped(resumed)
    resumed.add_callback(grouped)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert grouped.steps == [0, 3, 3]
    assert same(parameters(whole), parameters(resumed))
    handle.detach()
    assert not any(isinstance(c, CreditCallback) for c in resumed.callback_handler.callbacks)


def test_a_run_that_had_no_credit_is_resumed_with_it(tmp_path) -> None:
    """Its checkpoints know nothing of credit; those that follow do."""
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    tiny_trainer(GRPOTrainer, tmp_path, **config).train()
    resumed = tiny_trainer(GRPOTrainer, tmp_path, **{**config, "max_steps": 4})
    attach_credit(resumed, CoupledRhythmCredit(), horizon=(1, 4))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["CreditCallback"]["attributes"]["saved_groups"] is not None


def test_a_run_is_not_resumed_with_other_credit(tmp_path) -> None:
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    first = tiny_trainer(GRPOTrainer, tmp_path, **config)
    attach_credit(first, CoupledRhythmCredit(), horizon=(1, 4))
    first.train()
    for strategy, options, differs in (
        (CoupledRhythmCredit(amplification=3.0), {}, "credit.amplification 1.5 .now 3.0."),
        (CoupledRhythmCredit(), {"layers": "all"}, "layers"),
        (CoupledRhythmCredit(), {"signs": "positive"}, "signs"),
    ):
        resumed = tiny_trainer(GRPOTrainer, tmp_path, **{**config, "max_steps": 4})
        attach_credit(resumed, strategy, **{"horizon": (1, 4), **options})
        with pytest.raises(ResultError, match=differs):
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_damaged_grouping_in_a_checkpoint(tmp_path) -> None:
    config = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    trainer = tiny_trainer(GRPOTrainer, tmp_path, **config)
    attach_credit(trainer, CREDIT, horizon=HORIZON)
    trainer.train()
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    saved = json.loads(path.read_text())
    del saved["stateful_callbacks"]["CreditCallback"]["attributes"]["saved_groups"]["span"]
    path.write_text(json.dumps(saved))
    resumed = tiny_trainer(GRPOTrainer, tmp_path / "other", **config)
    attach_credit(resumed, CREDIT, horizon=HORIZON)
    with pytest.raises(ResultError, match=r"grouping of heads is damaged \(KeyError: 'span'\)"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_callback_keeps_a_grouping_through_json() -> None:
    groups = attnprobe.HeadGroups(
        torch.tensor([[True, False, False]]),
        torch.tensor([[False, True, False]]),
        None,
        torch.tensor([[0.1, 7.3, torch.nan]]),
        None,
        (4,),
        "a model",
    )
    callback = CreditCallback(5)
    callback.keep(groups, 3)
    restored = CreditCallback.from_state(json.loads(json.dumps(callback.state(), allow_nan=False)))
    assert (restored.reclassify_every, restored.grouped_at) == (5, 3)
    assert torch.equal(restored.groups.span.nan_to_num(-1), groups.span.nan_to_num(-1))
    assert torch.equal(restored.groups.local_heads, groups.local_heads)
    assert torch.equal(restored.groups.global_heads, groups.global_heads)
    assert (restored.groups.layers, restored.groups.model_name) == ((4,), "")


def test_what_is_logged(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path, max_steps=1)
    attach_credit(trainer, LocalChunkCredit(amplification=3.0), horizon=HORIZON)
    kept, weigh = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: kept.append(weigh(inputs)) or kept[-1]
    trainer.train()
    (output,), log = kept, trainer.state.log_history[0]
    inside = output["completion_mask"].bool() & (output["advantages"] != 0)[:, None]
    weights = output["credit_weights"][inside]
    assert log["credit/gamma_mean"] == pytest.approx(float(weights.mean()))
    assert log["credit/amplified_share"] == pytest.approx(float((weights > 1).float().mean()))
    assert 0 < log["credit/preplans_per_100_tokens"] < 50
    assert 0 < log["credit/anchors_per_100_tokens"] < 50
    assert log["credit/seconds"] > 0


@pytest.mark.parametrize("signs", ["both", "positive", "negative"])
def test_only_responses_whose_weights_can_matter_are_measured(signs, tmp_path) -> None:
    """One completion is the worst of its group, one the best, and two of a group are equal."""
    seen = []

    def credit(scores):
        seen.append(scores.waad.shape[0])
        return torch.full_like(scores.waad, 2.0)

    credit.needs = {"waad"}

    def reward(completions, **_):
        return [0.0, 1.0, 0.5, 0.5]

    trainer = tiny_trainer(GRPOTrainer, tmp_path, max_steps=3, reward=reward)
    attach_credit(trainer, credit, horizon=HORIZON, reclassify_every=2, signs=signs)
    weigh = trainer._generate_and_score_completions
    expected = {"both": [True, True], "positive": [False, True], "negative": [True, False]}[signs]

    def recording(inputs):
        output = weigh(inputs)
        assert torch.equal(output["advantages"].sign(), torch.tensor([-1.0, 1.0, 0.0, 0.0]))
        assert (output["credit_weights"] == 2).any(1).tolist() == [*expected, False, False]
        return output

    trainer._generate_and_score_completions = recording
    trainer.train()
    assert seen == [4, sum(expected), 4]
    logged = {log["credit/gamma_mean"] for log in trainer.state.log_history if "credit/gamma_mean" in log}
    assert logged == {2.0}, "of the weights that were applied"


def test_a_schedule_scales_the_weights_by_the_step(tmp_path) -> None:
    found = []
    for schedule in (None, lambda step: [0.0, 0.5][step]):
        trainer = tiny_trainer(GRPOTrainer, tmp_path, learning_rate=0.0)
        attach_credit(trainer, CREDIT, horizon=HORIZON, schedule=schedule, token_budget=40)
        kept, weigh = [], trainer._generate_and_score_completions
        trainer._generate_and_score_completions = lambda inputs, w=weigh, k=kept: k.append(w(inputs)) or k[-1]
        trainer.train()
        found.append([output["credit_weights"] for output in kept])
    (first, second), (none, half) = found
    assert bool((first != 1).any())
    assert bool((none == 1).all())
    torch.testing.assert_close(half, 1 + 0.5 * (second - 1))


def test_weights_over_all_heads_are_those_of_the_mean_over_heads(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path, max_steps=1, learning_rate=0.0)
    kept, generate = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: kept.append(generate(inputs)) or kept[-1]
    handle = attach_credit(trainer, CREDIT, layers="all", heads="all", horizon=HORIZON)
    trainer.train()
    (output,) = kept
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    rollout = Rollout(*(output[name] for name in names))
    statistics = measure_rollout(trainer.model, rollout, layers=handle.layers, horizon=HORIZON)
    waad, fai = (values.mean((1, 2)) for values in (statistics.waad, statistics.fai))
    gamma = CREDIT(attnprobe.TokenScores(waad, fai, None, rollout.response_mask))
    weights = torch.where(output["advantages"][:, None] != 0, gamma, 1.0)
    assert bool((weights != 1).any())
    torch.testing.assert_close(output["credit_weights"], weights)


def test_the_policy_is_measured_in_the_precision_of_training(tmp_path) -> None:
    """accelerate wraps PEFT's wrapper in it, not the policy inside."""
    from peft import LoraConfig

    seen = set()
    model = tiny_model("llama", vocab_size=300)
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, given, output: seen.add((module.training, output.dtype))
    )
    adapters = LoraConfig(target_modules=["q_proj"])
    trainer = tiny_trainer(GRPOTrainer, tmp_path, model=model, peft_config=adapters, bf16=True, max_steps=1)
    attach_credit(trainer, CREDIT, horizon=HORIZON)
    generate = trainer._generate_single_turn
    trainer._generate_single_turn = lambda *given: (generate(*given), seen.clear())[0]
    trainer.train()
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}


# ---- bad input ----------------------------------------------------------------------------------


def refuses(trainer, error, message, *, credit=CREDIT, **options) -> None:
    before = state_of(trainer)
    with pytest.raises(error, match=message):
        attach_credit(trainer, credit, **options)
    assert state_of(trainer) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": [7]}, ParameterError, r"layers \[7\] cannot be read"),
        ({"layers": []}, ParameterError, "layers .* got none"),
        ({"window": 0}, ParameterError, "window .*got 0"),
        ({"horizon": (5, 2)}, ParameterError, "horizon"),
        (
            {"reclassify_every": 0},
            ParameterError,
            "reclassify_every .*at least 1; got 0",
        ),
        ({"batch_size": 0}, ParameterError, "batch_size .*at least 1; got 0"),
        (
            {"through": "loss"},
            ParameterError,
            'through must be "auto", .*got .loss',
        ),
        ({"credit": "coupled"}, ParameterError, "a credit strategy is a callable"),
        ({"credit": CoupledRhythmCredit}, ParameterError, "such as CoupledRhythmCredit"),
        ({"heads": "mine"}, ParameterError, "heads.*'mine'"),
        ({"reclassify_every": "often"}, ParameterError, "reclassify_every.*'often'"),
        ({"batch_size": 2.0}, ParameterError, "batch_size.*2.0"),
        ({"through": 3}, ParameterError, "through.*3"),
        ({"signs": "all"}, ParameterError, 'signs must be "both", .*got .all'),
    ],
)
def test_options_that_make_no_sense(options, error, message, tmp_path, as_users_call) -> None:
    refuses(tiny_trainer(GRPOTrainer, tmp_path), error, message, **options)


def test_a_second_credit(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path)
    attach_credit(trainer, CREDIT)
    refuses(trainer, TrainerError, "already has credit")


def test_what_is_no_trainer(as_users_call) -> None:
    with pytest.raises(TrainerError, match=r"got the class trl\.trainer\.grpo_trainer\.GRPOTrainer"):
        attach_credit(GRPOTrainer, CREDIT)
    with pytest.raises(TrainerError, match=r"got a builtins\.dict"):
        attach_credit({}, CREDIT)


def test_a_version_of_trl_that_is_not_understood(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path)
    del trainer._metrics
    with pytest.raises(TrainerError, match=r"of trl \S+ has no _metrics"):
        attach_credit(trainer, CREDIT)


def test_sequence_level_importance_with_advantages(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path, importance_sampling_level="sequence", loss_type="grpo")
    refuses(
        trainer,
        TrainerError,
        "importance_sampling_level='sequence' erases it.*set importance_sampling_level='token', or through",
        through="advantages",
    )
    assert attach_credit(trainer, CREDIT).route == "gradient"


@pytest.mark.parametrize(
    ("trainer_class", "config"),
    [(GMPOTrainer, {}), (GRPOTrainer, {"importance_sampling_level": "sequence", "loss_type": "grpo"})],
)
def test_the_gate_beside_a_kl_term(trainer_class, config, tmp_path) -> None:
    trainer = tiny_trainer(trainer_class, tmp_path, beta=0.1, **config)
    refuses(trainer, TrainerError, r"its KL term \(beta=0.1\) would be weighted too: set beta=0, or use")


def test_token_level_losses_with_a_kl_term_refuse_the_gate_only(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path, beta=0.1)
    refuses(trainer, TrainerError, "set beta=0", through="gradient")
    assert attach_credit(trainer, CREDIT).route == "advantages"


@pytest.mark.parametrize("quantile", [0.01, 0.2, 0.5])
@pytest.mark.parametrize("through", ["advantages", "gradient"])
def test_trainers_that_train_on_few_tokens_only(quantile, through, tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path, top_entropy_quantile=quantile)
    assert attach_credit(trainer, CREDIT, through=through).route == through


def test_a_trainer_that_drops_completions(tmp_path) -> None:
    class OnlyGains(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"].clamp(0)})

    assert attach_credit(tiny_trainer(OnlyGains, tmp_path), CREDIT).route == "advantages"


def test_one_advantage_a_sequence(tmp_path) -> None:
    trainer = tiny_trainer(RLOOTrainer, tmp_path)
    refuses(
        trainer,
        TrainerError,
        "its loss takes one advantage per sequence .*size of tensor.*use through='gradient'",
        through="advantages",
    )


def test_losses_that_cannot_carry_credit(tmp_path) -> None:
    class Fused(GRPOTrainer):
        """As a fused Liger loss: its log-probabilities are never seen."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return sum(p.sum() for p in model.parameters()) * inputs["advantages"].sum()

    class Deaf(GRPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logps, *_ = self._get_per_token_logps_and_entropies(model, None, None, None)
            return -logps.sum()

    class Squaring(GRPOTrainer):
        """Linear in nothing: a weight does not multiply a token's gradient."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logps, *_ = self._get_per_token_logps_and_entropies(model, None, None, None)
            advantages = inputs["advantages"]
            spread = advantages if advantages.ndim == 2 else advantages[:, None]
            return -(spread * spread * logps).sum()

    class DeafToLosses(GRPOTrainer):
        """Limits negative advantages, so that their weights are lost."""

        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"].clamp(-0.3)})

    for signs in ("both", "negative"):
        refuses(
            tiny_trainer(DeafToLosses, tmp_path),
            TrainerError,
            "gradient of a token is not multiplied",
            through="advantages",
            signs=signs,
        )
    handle = attach_credit(tiny_trainer(DeafToLosses, tmp_path), CREDIT, signs="positive")
    assert (handle.route, handle.signs) == ("advantages", "positive")
    refuses(tiny_trainer(Fused, tmp_path), TrainerError, "if it uses a fused Liger loss, switch that off")
    refuses(tiny_trainer(Deaf, tmp_path), TrainerError, "does not depend on the advantages")
    refuses(
        tiny_trainer(Squaring, tmp_path),
        TrainerError,
        "gradient of a token is not multiplied",
        through="advantages",
    )


def test_models_without_attention_that_can_be_read(tmp_path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mamba", vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=8)
    trainer = tiny_trainer(GRPOTrainer, tmp_path, model=AutoModelForCausalLM.from_config(config))
    refuses(trainer, UnsupportedModelError, "no attention layer that can be found")


def test_a_grouping_that_does_not_fit(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path)
    batch = attnprobe.TokenBatch.from_ids(torch.randint(0, 300, (2, 20)), response_start=4)
    heads = attnprobe.classify_heads(attnprobe.measure(trainer.model, batch, layers=[0, 2]))
    refuses(trainer, ParameterError, "leave layers out", heads=heads, layers="all")
    renamed = dataclasses.replace(heads, model_name="another")
    refuses(trainer, ParameterError, "grouped for another, but the policy is", heads=renamed)
    deeper = dataclasses.replace(heads, layers=(0, 9))
    refuses(trainer, ParameterError, r"layers \[9\] cannot be read", heads=deeper)


def first_step_fails(trainer, error, message) -> None:
    before = parameters(trainer)
    with pytest.raises(error, match=message):
        trainer.train()
    assert same(before, parameters(trainer)), "no parameter was changed"


@pytest.mark.parametrize(
    ("gamma", "message"),
    [
        (lambda scores: scores.waad[:, 1:] * 0 + 1, r"\[4, 12\] like the scores; got .*\[4, 11\]"),
        (lambda scores: torch.full_like(scores.waad, -1.0), "must not be negative"),
        (lambda scores: torch.full_like(scores.waad, torch.nan), "is nan at"),
        (lambda scores: None, "must return a tensor of floats.* got a NoneType"),
    ],
)
def test_a_strategy_that_returns_nonsense(gamma, message, tmp_path, as_users_call) -> None:
    gamma.needs = {"waad"}
    trainer = tiny_trainer(GRPOTrainer, tmp_path)
    attach_credit(trainer, gamma)
    first_step_fails(trainer, ResultError, message)


def test_a_policy_that_is_no_number(tmp_path) -> None:
    def ones(completions, **_):
        return [float(i % 2) for i in range(len(completions))]

    trainer = tiny_trainer(GRPOTrainer, tmp_path, reward=ones)
    attach_credit(trainer, CREDIT)
    generate = trainer._generate_single_turn

    def break_afterwards(*args):
        result = generate(*args)
        with torch.no_grad():
            trainer.model.model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
        return result

    trainer._generate_single_turn = break_afterwards
    with pytest.raises(PatternError, match="the query is not finite"):
        trainer.train()


def test_prompts_with_pictures(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path)
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: {**generate(inputs), "num_images": [1] * 4}
    attach_credit(trainer, RandomCredit())
    first_step_fails(trainer, TrainerError, "pictures .*num_images")


def test_rollouts_that_are_not_understood(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path)
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: {
        name: value for name, value in generate(inputs).items() if name != "prompt_mask"
    }
    attach_credit(trainer, CREDIT)
    first_step_fails(trainer, TrainerError, "generates no prompt_mask: its rollouts are not understood")


def test_a_callback_that_was_taken_away(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path)
    handle = attach_credit(trainer, CREDIT)
    trainer.remove_callback(CreditCallback)
    assert handle.groups is None
    first_step_fails(trainer, TrainerError, r"callback of attach_credit was removed: call detach\(\)")
    handle.detach()

"""Credit in TRL's trainers is exact: bitwise stock where it should be, the closed form where it changes.

The matrix of trainers, losses and options runs on a tiny model. Gradients are compared with what the
objective says, `sum_t gamma[t] dL/dlogp[t] dlogp[t]/dtheta`, with dL/dlogp by hand where the policy has
not moved since it generated, and from the stock loss otherwise.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

pytest.importorskip("trl")
from trl import GRPOTrainer, RLOOTrainer
from trl.experimental.gmpo import GMPOTrainer

from attnprobe.rl import (
    CoupledRhythmCredit,
    EntropyCredit,
    EntropySelection,
    LocalChunkCredit,
    RandomCredit,
    attach_credit,
)
from attnprobe.testing.tiny_models import tiny_model
from attnprobe.testing.tiny_trainers import even_ids, tiny_trainer

HORIZON = (1, 4)
LORA = "lora"

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def rollouts_with_tools(prompts, trainer):
    """Return completions in whose middle another than the policy has written."""
    generator = torch.Generator().manual_seed(len(prompts[0]))
    ids = [torch.randint(1, 300, (9 + i % 3,), generator=generator).tolist() for i in range(len(prompts))]
    return {
        "prompt_ids": [[5, 6, 7]] * len(prompts),
        "completion_ids": ids,
        "logprobs": [[-math.log(300)] * len(row) for row in ids],
        "env_mask": [[1] * 3 + [0] * 2 + [1] * (len(row) - 5) for row in ids],
    }


def short(completion_ids, **_):
    """Reward short completions."""
    return [-len(ids) / 10 for ids in completion_ids]


LOSSES = [
    (GRPOTrainer, {"loss_type": loss})
    for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")
]
SEQUENCES = [
    (RLOOTrainer, {}),
    (RLOOTrainer, {"beta": 0.1}),
    (GMPOTrainer, {}),
    (GRPOTrainer, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
]
# Of these, the first two multiply each log-probability by its own advantage, whatever the ratio is of.
OF_WHOLE_SEQUENCES = [
    (GRPOTrainer, {"loss_type": loss, "importance_sampling_level": "sequence"})
    for loss in ("cispo", "vespo", "bnpo", "dr_grpo", "dapo", "sapo", "luspo")
]
OPTIONS = [
    (GRPOTrainer, {"num_iterations": 2}),
    (GRPOTrainer, {"steps_per_generation": 4, "gradient_accumulation_steps": 2}),
    (GRPOTrainer, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}),
    (GRPOTrainer, {"gradient_checkpointing": True}),
    (GRPOTrainer, {"beta": 0.1}),
    (GRPOTrainer, {"delta": 4.0, "loss_type": "grpo"}),
    (GRPOTrainer, {"top_entropy_quantile": 0.5}),
    (GRPOTrainer, {"entropy_coef": 0.01}),
    (GRPOTrainer, {"mask_truncated_completions": True}),
    (GRPOTrainer, {"max_completion_length": 1}),
    (GRPOTrainer, {"temperature": 0.7}),
    (GRPOTrainer, {"bf16": True}),
    (GRPOTrainer, {"tools": True}),
    (GRPOTrainer, {LORA: True}),
    (RLOOTrainer, {"num_iterations": 2, LORA: True}),
    (RLOOTrainer, {"gradient_checkpointing": True, "bf16": True}),
]
# Further options that touch the objective; only their gradients are checked. VLLM has the trainer compute the
# loss as with vLLM, whose log-probabilities are made up.
VLLM, MOE, TWO_REWARDS = "vllm", "moe", "two_rewards"
STILL = {"entropy_coef": 0.01, "entropy_coef_min": 0.01, "entropy_coef_max": 0.01, "entropy_coef_delta": 0.01}
MORE_OPTIONS = [
    (GRPOTrainer, {"off_policy_mask_threshold": 1e-4, "steps_per_generation": 2}),
    (GRPOTrainer, {"off_policy_mask_threshold": 1e-4, "tools": True}),
    (GRPOTrainer, {"use_adaptive_entropy": True, "entropy_target": 9.0, **STILL}),
    (GRPOTrainer, {"top_entropy_quantile": 0.3, "entropy_coef": 0.01, "tools": True}),
    (GRPOTrainer, {"beta": 0.1, "use_bias_correction_kl": True}),
    (GRPOTrainer, {"beta": 0.1, "top_entropy_quantile": 0.3, "delta": 1.001, "loss_type": "bnpo"}),
    (GRPOTrainer, {"epsilon": 0.001, "epsilon_high": 0.002, "num_iterations": 2}),
    (GRPOTrainer, {"epsilon_high": 1.0005, "loss_type": "cispo"}),
    (GRPOTrainer, {"sapo_temperature_neg": 2.0, "sapo_temperature_pos": 0.5, "loss_type": "sapo"}),
    (GRPOTrainer, {"vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0, "loss_type": "vespo"}),
    (GRPOTrainer, {"vespo_k_neg": 1.0, "vespo_lambda_neg": 3.0, "loss_type": "vespo", "num_iterations": 2}),
    (GRPOTrainer, {"scale_rewards": "none"}),
    (GRPOTrainer, {"scale_rewards": "batch", "generation_batch_size": 8}),
    (GRPOTrainer, {TWO_REWARDS: True, "reward_weights": [1.0, -0.3]}),
    (GRPOTrainer, {TWO_REWARDS: True, "multi_objective_aggregation": "normalize_then_sum"}),
    (GRPOTrainer, {"pad_to_multiple_of": 8, "num_generations": 4}),
    (GRPOTrainer, {"disable_dropout": True, "top_p": 0.9, "top_k": 50, "min_p": 0.001}),
    (GRPOTrainer, {"repetition_penalty": 1.2, "generation_kwargs": {"min_new_tokens": 5}}),
    (GRPOTrainer, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    (GRPOTrainer, {MOE: True, "router_aux_loss_coef": 0.1}),
    *(
        (GRPOTrainer, {VLLM: True, "vllm_importance_sampling_mode": mode, "loss_type": loss})
        for mode, loss in [
            ("sequence_mask", "dapo"),
            ("token_truncate", "grpo"),
            ("sequence_truncate", "vespo"),
            ("token_mask", "vespo"),
        ]
    ),
    (GRPOTrainer, {VLLM: True, "vllm_importance_sampling_clip_max": 1.05, "loss_type": "luspo"}),
    (GRPOTrainer, {VLLM: True, "vllm_importance_sampling_clip_min": 1e-9, "off_policy_mask_threshold": 0.1}),
    (GRPOTrainer, {VLLM: True, "vllm_importance_sampling_correction": False}),
    (RLOOTrainer, {"normalize_advantages": True, "reward_clip_range": (0.4, 0.6)}),
    (RLOOTrainer, {TWO_REWARDS: True, "reward_weights": [1.0, -0.3], "epsilon": 0.001, "epsilon_high": 0.5}),
    (RLOOTrainer, {"mask_truncated_completions": True, "max_completion_length": 10}),
    (RLOOTrainer, {"pad_to_multiple_of": 8, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.001}),
    (RLOOTrainer, {"steps_per_generation": 2, "disable_dropout": True, "repetition_penalty": 1.2}),
    (
        RLOOTrainer,
        {"generation_batch_size": 8, "num_generations": 4, "generation_kwargs": {"min_new_tokens": 5}},
    ),
    (RLOOTrainer, {MOE: True, "router_aux_loss_coef": 0.1}),
]
SEQUENCE_LEVEL = [*SEQUENCES, *OF_WHOLE_SEQUENCES]

# Options without a case, and what they decide in place of the gradient of a token.
NOT_OF_THE_OBJECTIVE = {
    "how a model is loaded": ("model_init_kwargs", "trust_remote_code"),
    "how data are read": ("remove_unused_columns", "shuffle_dataset", "chat_template_kwargs"),
    "only the size of a step": ("learning_rate",),
    "only evaluation": ("num_generations_eval",),
    "how text is generated": (
        "cache_implementation",
        "ds3_gather_for_generation",
        "max_tool_calling_iterations",
        "use_transformers_continuous_batching",
        "transformers_continuous_batching_config",
        "use_transformers_paged",
    ),
    "with which server": (
        "use_vllm",
        "vllm_mode",
        "vllm_model_impl",
        "vllm_enable_sleep_mode",
        "vllm_structured_outputs_regex",
        "vllm_server_base_url",
        "vllm_server_host",
        "vllm_server_port",
        "vllm_server_timeout",
        "vllm_group_port",
        "vllm_gpu_memory_utilization",
        "vllm_max_model_length",
        "vllm_tensor_parallel_size",
    ),
    "only the reference model": ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    "only the log": (
        "log_completions",
        "log_multimodal",
        "num_completions_to_print",
        "log_unique_prompts",
        "log_completions_hub_repo",
    ),
    "an older name of another option": ("vllm_importance_sampling_cap",),
    # Of older versions.
    "the precision of a layer": ("cast_lm_head_to_fp32",),
    "how vLLM is used": ("vllm_guided_decoding_regex",),
}


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLOOTrainer])
def test_every_option_of_a_trainer_has_a_case_or_touches_no_gradient(trainer_class) -> None:
    """A new version of trl brings new options: each needs a case above, or a place in the list."""
    import trl
    from transformers import TrainingArguments

    config = getattr(trl, trainer_class.__name__.replace("Trainer", "Config"))
    own = {field.name for field in dataclasses.fields(config)}
    own -= {field.name for field in dataclasses.fields(TrainingArguments)}
    cases = [*LOSSES, *SEQUENCE_LEVEL, *OPTIONS, *MORE_OPTIONS]
    tried = {name for base, options in cases if base is trainer_class for name in options}
    listed = {name for names in NOT_OF_THE_OBJECTIVE.values() for name in names}
    assert own - tried - listed == set()
    assert tried & listed == set()


def name_of(case) -> str:
    trainer, config = case
    return "-".join([trainer.__name__.removesuffix("Trainer"), *(f"{k}={v}" for k, v in config.items())])


def make(case, folder, **more):
    trainer_class, config = case
    config = {**config, **more}
    vllm = config.pop(VLLM, False)
    options = {"rollout_func": rollouts_with_tools} if config.pop("tools", False) or vllm else {}
    peft_config = None
    if config.pop(LORA, False):
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    if config.pop(TWO_REWARDS, False):
        config["reward"] = [even_ids, short]
    if config.pop(MOE, False):
        config["model"] = tiny_model("mixtral", vocab_size=300)
    trainer = tiny_trainer(trainer_class, folder, options=options, peft_config=peft_config, **config)
    if vllm:
        trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
    if "mask_truncated_completions" in config:
        generate, end = trainer._generate_single_turn, trainer.processing_class.eos_token_id

        def some_end(*given):
            made = generate(*given)
            rows, *others = made if trainer_class is GRPOTrainer else (made,)
            rows = [[*row[:-1], end] if i % 3 else row for i, row in enumerate(rows)]
            return (rows, *others) if others else rows

        trainer._generate_single_turn = some_end
    if "entropy_target" in config:
        # The bonus is off until the first step has measured an entropy.
        trainer._last_world_entropy = 0.0
    return trainer


def parameters(trainer):
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


def same(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    ("case", "signs"),
    [
        *((case, "both") for case in LOSSES + SEQUENCES + OPTIONS),
        (LOSSES[0], "positive"),
        (LOSSES[1], "negative"),
        (SEQUENCES[0], "positive"),
        (SEQUENCES[2], "negative"),
    ],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_amplification_one_is_bitwise_stock(case, signs, tmp_path) -> None:
    stock = make(case, tmp_path, max_steps=3)
    stock.train()
    trainer = make(case, tmp_path, max_steps=3)
    attach_credit(trainer, CoupledRhythmCredit(amplification=1.0), horizon=HORIZON, signs=signs)
    trainer.train()
    assert same(parameters(stock), parameters(trainer))
    if case[1].get("max_completion_length") != 1:
        assert not same(parameters(trainer), parameters(make(case, tmp_path))), "the steps were real ones"


# ---- gradients ----------------------------------------------------------------------------------


def random_gamma(scores):
    generator = torch.Generator().manual_seed(7)
    return 0.25 + 2 * torch.rand(scores.waad.shape, generator=generator)


random_gamma.needs = {"waad"}


def one_batch(case, folder, credit=random_gamma, signs="both"):
    """Return a credited trainer in mid-training with one micro-batch that it has generated."""
    trainer = make(case, folder)
    handle = attach_credit(trainer, credit, horizon=HORIZON, signs=signs)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    weighted = [part for part in trainer._buffered_inputs if bool((part["credit_weights"] != 1).any())]
    return trainer, handle, weighted[0]


def gradients_of(trainer, inputs):
    """Return the gradient of the trainer's loss, and the log-probabilities with theirs."""
    kept = []
    original = trainer._get_per_token_logps_and_entropies

    def keeping(*args, **kwargs):
        result = original(*args, **kwargs)
        if torch.is_grad_enabled():
            kept.append(result[0])
        return result

    trainer._get_per_token_logps_and_entropies = keeping
    try:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, inputs)
    finally:
        del trainer._get_per_token_logps_and_entropies
    (logps,) = kept
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [*weights, logps], retain_graph=True, allow_unused=True)
    return gradients[:-1], logps, gradients[-1]


def deviation(actual, expected) -> float:
    """Return the largest difference, relative to the largest entry of the gradient."""
    pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if a is not None]
    scale = max(float(e.abs().max()) for _, e in pairs)
    return max(float((a - e).abs().max()) for a, e in pairs) / scale


def closed_form(case, trainer, inputs):
    """Return dL/dlogp of the stock loss by hand, where the policy has not moved since it generated."""
    config, advantages = case[1], inputs["advantages"][:, None]
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    lengths, rows = mask.sum(1, keepdim=True), mask.shape[0]
    loss = config.get("loss_type", "dapo")
    if case[0] is RLOOTrainer:
        return -advantages / rows * mask
    if case[0] is GMPOTrainer or loss in ("grpo", "sapo"):
        return -advantages * mask / lengths / rows
    if loss == "bnpo":
        return -advantages * mask / mask.sum()
    if loss == "dr_grpo":
        return -advantages * mask / rows / trainer.max_completion_length
    if loss == "luspo":
        return -advantages * mask / rows
    ratio = min(1.0, trainer.epsilon_high) if loss == "cispo" else 1.0
    return -advantages * mask / inputs["num_items_in_batch"] * ratio


@pytest.mark.parametrize(
    ("case", "signs"),
    [
        *((case, "both") for case in [*LOSSES, *SEQUENCE_LEVEL, (GRPOTrainer, {"tools": True})]),
        (LOSSES[1], "positive"),
        (LOSSES[0], "negative"),
        (SEQUENCES[0], "positive"),
        (SEQUENCES[0], "negative"),
        (SEQUENCES[2], "negative"),
    ],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_random_weights_change_the_gradient_as_the_closed_form_says(
    case, signs, tmp_path, record_property
) -> None:
    trainer, handle, inputs = one_batch(case, tmp_path, signs=signs)
    credited, logps, _ = gradients_of(trainer, inputs)
    gamma = inputs["credit_weights"]
    own = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
    advantages = inputs["advantages"][:, None]
    assert bool((advantages > 0).any())
    assert bool((advantages < 0).any())
    weighted = {"both": advantages != 0, "positive": advantages > 0, "negative": advantages < 0}[signs]
    assert torch.equal(gamma != 1, own & weighted)
    expected_logps = gamma * closed_form(case, trainer, inputs)
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(logps, weights, expected_logps, allow_unused=True)
    found = deviation(credited, expected)
    record_property("deviation", found)
    print(f"\ndeviation {name_of(case)} {handle.route} {found:.2e}")
    assert found < 1e-5
    through_advantages = [*LOSSES, *OF_WHOLE_SEQUENCES[:2], (GRPOTrainer, {"tools": True})]
    assert handle.route == ("advantages" if case in through_advantages else "gradient")


@pytest.mark.parametrize("case", [LOSSES[0], SEQUENCES[0]], ids=name_of)
def test_entropy_selection_leaves_a_gradient_in_few_tokens(case, tmp_path) -> None:
    trainer, _, inputs = one_batch(case, tmp_path, EntropySelection(quantile=0.3))
    credited, logps, _ = gradients_of(trainer, inputs)
    kept, own = inputs["credit_weights"].bool(), inputs["completion_mask"].bool()
    counts = torch.where(inputs["advantages"] != 0, (0.3 * own.sum(1)).ceil(), own.sum(1))
    assert torch.equal((kept & own).sum(1).float(), counts)
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    by_hand = kept * closed_form(case, trainer, inputs)
    assert deviation(credited, torch.autograd.grad(logps, weights, by_hand, allow_unused=True)) < 1e-5


@pytest.mark.parametrize("case", LOSSES + SEQUENCE_LEVEL + OPTIONS[:-1] + MORE_OPTIONS, ids=name_of)
def test_weights_multiply_the_stock_gradient_of_each_token(case, tmp_path, record_property) -> None:
    """Also after the policy has moved, with ratios that are clipped, and beside a KL term."""
    if case[1].get("max_completion_length") == 1:
        case = (case[0], {**case[1], "max_completion_length": 2})
    trainer, handle, inputs = one_batch(case, tmp_path)
    generator = torch.Generator().manual_seed(3)
    # The ratio of whole sequences leaves its bounds much earlier than that of a token.
    move = 1e-4 if case in SEQUENCE_LEVEL or case[0] is RLOOTrainer else 2e-3
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(move * torch.randn(parameter.shape, generator=generator))
    credited, _, _ = gradients_of(trainer, inputs)
    gamma = inputs["credit_weights"]
    handle.detach()
    stock, logps, at_logps = gradients_of(trainer, inputs)
    _, _, at_zero = gradients_of(trainer, {**inputs, "advantages": 0 * inputs["advantages"]})
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    # The loss is stock + (gamma - 1) times the part of each token that its advantage is responsible for.
    extra = torch.autograd.grad(logps, weights, (gamma - 1) * (at_logps - at_zero), allow_unused=True)
    expected = [None if s is None else s + e for s, e in zip(stock, extra, strict=True)]
    found = deviation(credited, expected)
    record_property("deviation", found)
    print(f"\ndeviation {name_of(case)} {handle.route} {found:.2e}")
    half = case[1].get("bf16", False)
    assert found < (2e-2 if half else 1e-5)
    assert deviation(credited, stock) > (1e-2 if not half else 2e-2)


# ---- what is weighted ---------------------------------------------------------------------------


@pytest.mark.parametrize("signs", ["both", "positive", "negative"])
def test_weights_are_one_on_other_signs_padding_and_tool_output(signs, tmp_path) -> None:
    trainer = make((GRPOTrainer, {"tools": True}), tmp_path)
    attach_credit(trainer, lambda scores: torch.full(scores.waad.shape, 2.0), signs=signs)
    trainer.model.train()
    inputs = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
    own = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    advantages = inputs["advantages"][:, None]
    assert bool((advantages > 0).any())
    assert bool((advantages < 0).any())
    weighted = {"both": advantages != 0, "positive": advantages > 0, "negative": advantages < 0}[signs]
    assert torch.equal(inputs["credit_weights"] == 2.0, own & weighted)
    assert torch.equal(inputs["credit_weights"] == 1.0, ~(own & weighted))


def test_equal_rewards_leave_nothing_to_credit(tmp_path) -> None:
    def always_one(completions, **_):
        return [1.0] * len(completions)

    runs = []
    for credit in (None, LocalChunkCredit(amplification=9.0)):
        trainer = tiny_trainer(GRPOTrainer, tmp_path, reward=always_one, entropy_coef=0.1)
        if credit is not None:
            attach_credit(trainer, credit)
        trainer.train()
        runs.append(parameters(trainer))
    assert same(*runs)


def test_completions_that_are_all_truncated_and_masked(tmp_path) -> None:
    runs = []
    for credit in (None, CoupledRhythmCredit(amplification=9.0)):
        trainer = tiny_trainer(
            GRPOTrainer,
            tmp_path,
            mask_truncated_completions=True,
            generation_kwargs={"min_new_tokens": 12},
            entropy_coef=0.1,
        )
        handle = attach_credit(trainer, credit, horizon=HORIZON) if credit is not None else None
        trainer.train()
        runs.append(parameters(trainer))
    assert same(*runs)
    assert handle.groups is None, "of masked completions nothing is known"


def test_a_policy_in_bfloat16(tmp_path) -> None:
    runs = []
    for amplification in (None, 1.0, 3.0):
        model = tiny_model("llama", vocab_size=300).to(torch.bfloat16)
        trainer = tiny_trainer(GRPOTrainer, tmp_path, model=model, learning_rate=0.1)
        if amplification is not None:
            attach_credit(trainer, CoupledRhythmCredit(amplification=amplification), horizon=HORIZON)
        trainer.train()
        runs.append(parameters(trainer))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "gpt_oss", "bloom"])
def test_policies_of_other_families(family, tmp_path) -> None:
    model = tiny_model(
        family, vocab_size=300, **({"router_aux_loss_coef": 0.0} if family == "gpt_oss" else {})
    )
    trainer = tiny_trainer(GRPOTrainer, tmp_path, model=model)
    handle = attach_credit(trainer, CoupledRhythmCredit(), horizon=HORIZON)
    trainer.train()
    assert handle.groups is not None
    shares = [log.get("credit/amplified_share") for log in trainer.state.log_history]
    assert any(share is not None and share > 0 for share in shares)


def test_entropy_is_that_of_the_sampling_temperature(tmp_path) -> None:
    seen = []

    def credit(scores):
        seen.append(scores)
        return torch.ones_like(scores.waad)

    credit.needs = EntropyCredit.needs
    trainer = tiny_trainer(GRPOTrainer, tmp_path, temperature=0.5, max_steps=1)
    attach_credit(trainer, credit)
    kept = []
    weigh = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: kept.append(weigh(inputs)) or kept[-1]
    model = tiny_model("llama", vocab_size=300)
    trainer.train()
    (output,), (scores,) = kept, seen
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    real = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=real).logits / 0.5
    width = output["completion_ids"].shape[1]
    distribution = torch.distributions.Categorical(logits=logits[:, -width - 1 : -1].double())
    rows = output["advantages"] != 0
    expected = distribution.entropy()[rows][output["completion_mask"][rows].bool()]
    assert torch.allclose(scores.entropy[scores.response_mask].double(), expected, atol=1e-4)
    assert bool(scores.waad.isnan().all()), "no attention was measured: nobody needs it"


def test_random_credit_runs(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path)
    attach_credit(trainer, RandomCredit())
    trainer.train()
    logged = trainer.state.log_history[0]["credit/gamma_mean"]
    assert logged == pytest.approx(1.2, abs=0.05)

"""Weights from the pass that a trainer makes anyway are those of a pass of our own, which is not made."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")
from trl import GRPOTrainer, RLOOTrainer

from attnprobe.adapters.transformers import TransformersAdapter
from attnprobe.rl import CoupledRhythmCredit, attach_credit
from attnprobe.rl.trl.own_pass import OwnPass
from attnprobe.testing.tiny_models import tiny_model
from attnprobe.testing.tiny_trainers import tiny_trainer

HORIZON = (1, 4)
CREDIT = CoupledRhythmCredit(amplification=3.0)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def rollouts_with_tools(prompts, trainer):
    """Return completions in whose middle another than the policy has written, of one of them twice."""
    generator = torch.Generator().manual_seed(len(prompts[0]))
    ids = [torch.randint(1, 300, (9 + i % 3,), generator=generator).tolist() for i in range(len(prompts))]
    ids[-1] = ids[0]
    return {
        "prompt_ids": [[5, 6, 7]] * len(prompts),
        "completion_ids": ids,
        "logprobs": [[-5.0] * len(row) for row in ids],
        "env_mask": [[1] * (3 + i) + [0] * 2 + [1] * (len(row) - 5 - i) for i, row in enumerate(ids)],
    }


def gammas(folder, monkeypatch, trainer_class, config, *, reads):
    """Return the weights of a run, and how many passes credit made."""
    config, options, passes, found = dict(config), {}, [], []
    family, tools, lora = (config.pop(name, None) for name in ("family", "tools", "lora"))
    model = tiny_model(family or "llama", vocab_size=300, **config.pop("model", {}))
    if tools:
        options["rollout_func"] = rollouts_with_tools
    if lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft_config = options.pop("peft_config", None)
    trainer = tiny_trainer(
        trainer_class, folder, model=model, options=options, peft_config=peft_config, **config
    )
    attach_credit(trainer, CREDIT, horizon=HORIZON, reclassify_every=2)
    weigh = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: found.append(weigh(inputs)) or found[-1]
    forward = TransformersAdapter.forward

    def counting(self, *given, **options):
        passes.append(1)
        return forward(self, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersAdapter, "forward", counting)
        if not reads:
            patch.setattr(OwnPass, "_differs_from_ours", lambda self: True)
        trainer.train()
    return [output["credit_weights"] for output in found], len(passes)


STEPS = {"max_steps": 3}
READ = [
    (RLOOTrainer, {}),
    (RLOOTrainer, {"beta": 0.1, "lora": True}),
    (RLOOTrainer, {"family": "gemma2", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    (RLOOTrainer, {"family": "lfm2"}),
    (GRPOTrainer, {"num_iterations": 2, "tools": True}),
    (GRPOTrainer, {"steps_per_generation": 2, "pad_to_multiple_of": 8, "beta": 0.1}),
    (RLOOTrainer, {"gradient_checkpointing": True, "bf16": True}),
]
NOT_READ = [
    # There is none.
    (GRPOTrainer, {}),
    # It is the reference's: that of the policy without its adapters, or of a model of its own.
    (GRPOTrainer, {"beta": 0.1, "lora": True}),
    (GRPOTrainer, {"beta": 0.1}),
    # Padding shifts positions; tokens are dropped at random; positions depend on the batch.
    (RLOOTrainer, {"family": "gpt2", "disable_dropout": True}),
    (RLOOTrainer, {"model": {"attention_dropout": 0.1}}),
    (RLOOTrainer, {"model": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}}),
]


def name_of(value) -> str:
    return value.__name__ if isinstance(value, type) else "-".join(f"{k}={v}" for k, v in value.items())


@pytest.mark.parametrize(("trainer_class", "config"), READ, ids=name_of)
def test_weights_from_the_trainers_own_pass(trainer_class, config, tmp_path, monkeypatch) -> None:
    ours, passes = gammas(tmp_path, monkeypatch, trainer_class, config | STEPS, reads=False)
    assert passes > 0
    theirs, passes = gammas(tmp_path, monkeypatch, trainer_class, config | STEPS, reads=True)
    assert passes == 0
    assert len(ours) == len(theirs) > 1
    for own, read in zip(ours, theirs, strict=True):
        assert torch.equal(own, read)
    assert any(bool((own != 1).any()) for own in ours)


@pytest.mark.parametrize(("trainer_class", "config"), NOT_READ, ids=name_of)
def test_passes_that_would_not_give_the_same(trainer_class, config, tmp_path, monkeypatch) -> None:
    _, passes = gammas(tmp_path, monkeypatch, trainer_class, config | {"max_steps": 1}, reads=True)
    assert passes > 0


def test_passes_of_compiled_and_sharded_policies_are_left_alone(tmp_path) -> None:
    """Read uncompiled, the trainer's log-probabilities would change; sharded, processes would fall apart."""
    trainer = tiny_trainer(RLOOTrainer, tmp_path)
    handle = attach_credit(trainer, CREDIT, horizon=HORIZON)
    own_pass = OwnPass(trainer, handle._rollout_credit)
    assert not own_pass._differs_from_ours()
    trainer.model.model.layers[0].compile()
    assert own_pass._differs_from_ours()
    trainer.model.model.layers[0]._compiled_call_impl = None
    assert not own_pass._differs_from_ours()
    next(trainer.model.parameters()).ds_id = 0  # As ZeRO-3 marks what it has sharded.
    assert own_pass._differs_from_ours()

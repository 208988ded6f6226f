"""Policies that are compiled, sharded, adapted or longer than they were trained for, in a trainer."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("trl")
from trl import GRPOTrainer

from attnprobe import UnsupportedModelError
from attnprobe.rl import CoupledRhythmCredit, attach_credit
from attnprobe.testing.tiny_models import tiny_model
from attnprobe.testing.tiny_trainers import tiny_trainer

HORIZON = (1, 4)
CREDIT = CoupledRhythmCredit(amplification=3.0)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*(use_cache|pin_memory|tokenizer).*:UserWarning"),
]


def trained(folder, model, **config):
    """Return the weights of one step of a credited run."""
    trainer = tiny_trainer(GRPOTrainer, folder, model=model, max_steps=1, **config)
    handle = attach_credit(trainer, CREDIT, horizon=HORIZON, layers="all")
    trainer.train()
    return handle.last.gamma


def test_the_policy_is_measured_uncompiled_and_trained_compiled(tmp_path) -> None:
    torch.compiler.reset()
    expected = trained(tmp_path, tiny_model("llama", vocab_size=300, num_hidden_layers=1))
    model, ran = tiny_model("llama", vocab_size=300, num_hidden_layers=1), []

    def backend(graph, inputs):
        def run(*given):
            ran.append(torch.is_grad_enabled())
            return graph(*given)

        return run

    # In one piece, into which no hook or patch of ours could reach.
    model.model.layers[0].self_attn.compile(backend=backend, fullgraph=True)
    found = trained(tmp_path, model)
    assert bool((found != 1).any())
    assert torch.equal(found, expected)
    assert True in ran


@pytest.mark.slow
def test_a_trainer_that_compiles_its_policy(tmp_path) -> None:
    torch.compiler.reset()
    expected = trained(tmp_path, tiny_model("llama", vocab_size=300, num_hidden_layers=1))
    model = tiny_model("llama", vocab_size=300, num_hidden_layers=1)
    config = {"torch_compile": True, "torch_compile_backend": "eager"}
    assert torch.equal(trained(tmp_path, model, **config), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_only_sharded_policies_are_run_to_the_end(tmp_path) -> None:
    """ZeRO-1 and ZeRO-2 leave the policy whole, whose pass then stops after the last measured layer."""
    last_layer = []
    for sharded in (False, True):
        trainer = tiny_trainer(GRPOTrainer, tmp_path, max_steps=1)
        handle = attach_credit(trainer, CREDIT, horizon=HORIZON, layers=[0])
        trainer.is_deepspeed_enabled = True
        generate, credit = trainer._generate_single_turn, handle._rollout_credit
        calls = []
        trainer.model.model.layers[-1].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer._generate_single_turn = lambda *given, g=generate, c=calls: (g(*given), c.clear())[0]
        if sharded:
            for parameter in trainer.model.parameters():
                parameter.ds_id = 0  # As ZeRO-3 marks what it has sharded.
        assert (credit.root is None) == (not sharded)
        trainer.model.train()
        trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
        last_layer.append(len(calls))
    assert last_layer == [0, 1]


@pytest.mark.parametrize("method", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens_are_refused(method, tmp_path) -> None:
    import peft

    config = getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = tiny_trainer(GRPOTrainer, tmp_path, peft_config=config)
    with pytest.raises(UnsupportedModelError, match="it adds virtual tokens"):
        attach_credit(trainer, CREDIT)


def test_completions_longer_than_the_policy_was_trained_for(tmp_path) -> None:
    model = tiny_model("llama", vocab_size=300, max_position_embeddings=10)
    trainer = tiny_trainer(GRPOTrainer, tmp_path, model=model)
    attach_credit(trainer, CREDIT, horizon=HORIZON)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(each.message) for each in caught if "max_position_embeddings" in str(each.message)]
    assert len(told) == 1
    assert "tokens, but the policy was trained for 10" in told[0]
    assert any(log.get("credit/amplified_share", 0) for log in trainer.state.log_history)

"""Losses that need more than a made-up batch has: their canary is the first batch that they are given."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")
from trl import GRPOTrainer, RLOOTrainer

from attnprobe import TrainerError
from attnprobe.rl import CoupledRhythmCredit, attach_credit
from attnprobe.testing.tiny_trainers import tiny_trainer

HORIZON = (1, 4)
CREDIT = CoupledRhythmCredit(amplification=3.0)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*(use_cache|pin_memory|tokenizer).*:UserWarning"),
]


def parameters(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def same(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def asking(base, per_completion=None):
    """Return a subclass whose loss needs a field of its own: how much each completion counts."""

    class Asking(base):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            count = len(output["advantages"])
            values = torch.ones(count) if per_completion is None else per_completion(count)
            return {**output, "counts": values}

        def _compute_loss(self, model, inputs):
            advantages, counts = inputs["advantages"], inputs["counts"]
            counts = counts if advantages.ndim == 1 else counts[:, None]
            return super()._compute_loss(model, {**inputs, "advantages": advantages * counts})

    return Asking


@pytest.mark.parametrize(
    ("base", "config", "route"),
    [
        (GRPOTrainer, {}, "advantages"),
        (GRPOTrainer, {"num_iterations": 2, "steps_per_generation": 2}, "advantages"),
        (GRPOTrainer, {"importance_sampling_level": "sequence", "loss_type": "grpo"}, "gradient"),
        (RLOOTrainer, {}, "gradient"),
    ],
)
def test_a_loss_with_a_field_of_its_own_is_tried_out_on_its_first_batch(
    base, config, route, tmp_path
) -> None:
    """With fields that change nothing, the run is that of the trainer without them, bit for bit."""
    runs = []
    for trainer_class in (base, asking(base)):
        trainer = tiny_trainer(trainer_class, tmp_path, max_steps=3, **config)
        handle = attach_credit(trainer, CREDIT, horizon=HORIZON)
        assert handle.route == (route if trainer_class is base else None)
        trainer.train()
        assert handle.route == route
        logs = [
            {k: v for k, v in log.items() if "time" not in k and "_per_" not in k and "seconds" not in k}
            for log in trainer.state.log_history[:-1]
        ]
        runs.append((parameters(trainer), logs))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1], "what the canary logged is forgotten"


def test_a_loss_that_does_not_honour_weights_is_refused_before_a_parameter_changes(tmp_path) -> None:
    class Limiting(asking(GRPOTrainer)):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"].clamp(-0.3)})

    trainer = tiny_trainer(Limiting, tmp_path)
    handle = attach_credit(trainer, CREDIT, horizon=HORIZON, through="advantages")
    before = parameters(trainer)
    with pytest.raises(
        TrainerError, match=r"Limiting does not honour .*not multiplied by the token's weight"
    ):
        trainer.train()
    assert same(before, parameters(trainer))
    handle.detach()
    trainer.train()
    assert not same(before, parameters(trainer))


def test_a_kl_term_beside_the_gate_is_refused_there_too(tmp_path) -> None:
    """Although the policy still equals its reference, so that the KL term has no gradient yet."""
    config = {"importance_sampling_level": "sequence", "loss_type": "grpo", "beta": 0.1}
    trainer = tiny_trainer(asking(GRPOTrainer), tmp_path, **config)
    attach_credit(trainer, CREDIT, horizon=HORIZON)
    before = parameters(trainer)
    with pytest.raises(TrainerError, match=r"its KL term \(beta=0.1\) would be weighted too"):
        trainer.train()
    assert same(before, parameters(trainer))


def test_a_loss_that_fails_fails_as_without_credit(tmp_path) -> None:
    class Broken(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return inputs["values"].sum()

    trainer = tiny_trainer(Broken, tmp_path)
    attach_credit(trainer, CREDIT, horizon=HORIZON)
    with pytest.raises(KeyError, match="values"):
        trainer.train()


def test_batches_that_do_not_tell_are_waited_for(tmp_path) -> None:
    """The first batch counts nothing: it is trained on as it is, which is said, and the next one tells."""
    batches = []

    def none_at_first(count):
        batches.append(count)
        return torch.full((count,), float(len(batches) > 1))

    trainer = tiny_trainer(asking(GRPOTrainer, none_at_first), tmp_path, max_steps=2)
    handle = attach_credit(trainer, CREDIT, horizon=HORIZON)
    with pytest.warns(UserWarning, match="does not depend on the advantages of this batch"):
        trainer.train()
    assert handle.route == "advantages"

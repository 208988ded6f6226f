"""Credit can be removed at any time, from wherever the trainer calls: callbacks, rewards, the loss."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")
from transformers import TrainerCallback
from trl import GRPOTrainer, RLOOTrainer

from attnprobe.rl import CoupledRhythmCredit, CreditCallback, attach_credit
from attnprobe.testing.tiny_trainers import even_ids, tiny_trainer

HORIZON = (1, 4)
CREDIT = CoupledRhythmCredit(amplification=3.0)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

EVENTS = ("on_train_begin", "on_step_begin", "on_step_end", "on_log")


class Noting(TrainerCallback):
    """Counts its events."""

    def __init__(self) -> None:
        self.seen = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            self.seen.append(name)
        return super().__getattribute__(name)


class Detaching(TrainerCallback):
    """Removes credit at the first event of a name."""

    def __init__(self, event) -> None:
        setattr(self, event, self._detach)
        self.handle = None

    def _detach(self, *_, **__) -> None:
        self.handle.detach()


def parameters(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def same(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def is_stock(trainer) -> bool:
    own = [name for name in vars(trainer) if name in ("_generate_and_score_completions", "compute_loss")]
    kept = [each for each in trainer.callback_handler.callbacks if isinstance(each, CreditCallback)]
    batches = trainer._buffered_inputs or []
    return not own and not kept and not any("credit_weights" in batch for batch in batches)


@pytest.mark.parametrize("event", EVENTS)
def test_detaching_in_a_callback_leaves_out_no_other_callback(event, tmp_path) -> None:
    """The credit callback stands before the others in the list, and the others follow it closely."""
    seen = []
    for credited in (False, True):
        trainer = tiny_trainer(GRPOTrainer, tmp_path)
        before, after = Noting(), Noting()
        trainer.add_callback(before)
        if credited:
            handle = attach_credit(trainer, CREDIT, horizon=HORIZON)
            detaching = Detaching(event)
            detaching.handle = handle
            trainer.add_callback(detaching)
        trainer.add_callback(after)
        trainer.train()
        seen += [before.seen, after.seen]
        assert is_stock(trainer)
    assert event in seen[0]
    assert seen[0] == seen[1] == seen[2] == seen[3]


@pytest.mark.parametrize("config", [{}, {"num_iterations": 2}])
@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLOOTrainer])
def test_after_the_step_in_which_credit_was_removed_the_run_is_stock(trainer_class, config, tmp_path) -> None:
    """Also the rest of a batch that was generated with credit and is used once more."""
    credited = tiny_trainer(trainer_class, tmp_path, max_steps=3, optim="sgd", learning_rate=0.01, **config)
    detaching = Detaching("on_step_end")
    detaching.handle = attach_credit(credited, CREDIT, horizon=HORIZON)
    credited.add_callback(detaching)
    credited.train()

    other = tiny_trainer(trainer_class, tmp_path, max_steps=3, optim="sgd", learning_rate=0.01, **config)
    handle = attach_credit(other, CREDIT, horizon=HORIZON)
    weighted = other.compute_loss
    stock = handle._before.get("compute_loss") or type(other).compute_loss.__get__(other)
    other.compute_loss = lambda model, inputs, **given: (
        stock(model, {k: v for k, v in inputs.items() if k != "credit_weights"}, **given)
        if other.state.global_step
        else weighted(model, inputs, **given)
    )
    other.train()
    assert same(parameters(credited), parameters(other))


def test_detaching_in_a_reward_function(tmp_path) -> None:
    """The batch that is being rewarded is then trained on without credit."""
    stock = tiny_trainer(GRPOTrainer, tmp_path)
    stock.train()
    kept = []

    def reward(completion_ids, **given):
        kept[0].detach()
        return even_ids(completion_ids)

    trainer = tiny_trainer(GRPOTrainer, tmp_path, reward=reward)
    kept.append(attach_credit(trainer, CREDIT, horizon=HORIZON))
    trainer.train()
    assert is_stock(trainer)
    assert same(parameters(stock), parameters(trainer))
    assert not any("credit/gamma_mean" in log for log in trainer.state.log_history)


def test_attaching_again_in_the_middle_of_a_batch(tmp_path) -> None:
    """The weights of the first credit do not come back; the next batch has those of the second."""

    class Changing(TrainerCallback):
        handle = None

        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 1:
                self.handle.detach()
                assert is_stock(trainer)
                self.handle = attach_credit(trainer, lambda scores: torch.ones_like(scores.waad))

    trainer = tiny_trainer(GRPOTrainer, tmp_path, max_steps=4, num_iterations=2)
    changing = Changing()
    trainer.add_callback(changing)
    changing.handle = attach_credit(trainer, CREDIT, horizon=HORIZON)
    trainer.train()
    means = [log.get("credit/gamma_mean") for log in trainer.state.log_history[:4]]
    assert means[0] > 1
    assert means[1] is None
    assert means[2] == 1

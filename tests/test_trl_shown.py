"""What people see of credit: the last rollout, the trainer's table of completions, and a report."""

from __future__ import annotations

import re

import pandas
import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOTrainer, RLOOTrainer

from attnprobe import ParameterError, TrainerError
from attnprobe.rl import CoupledRhythmCredit, attach_credit
from attnprobe.testing.tiny_trainers import tiny_trainer

HORIZON = (1, 4)
CREDIT = CoupledRhythmCredit(amplification=3.0)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def tables(folder) -> list[pandas.DataFrame]:
    return [pandas.read_parquet(path) for path in sorted((folder / "completions").glob("*.parquet"))]


def test_the_last_rollout_is_what_the_loss_is_weighted_by(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path)
    handle = attach_credit(trainer, CREDIT, horizon=HORIZON)
    assert handle.last is None
    kept, weigh = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: kept.append(weigh(inputs)) or kept[-1]
    trainer.train()
    last, output = handle.last, kept[-1]
    assert torch.equal(last.gamma, output["credit_weights"])
    assert torch.equal(last.rollout.completion_ids, output["completion_ids"])
    expected = torch.where(last.matters, CREDIT(last.scores), 1.0)
    assert torch.equal(last.gamma, expected), "scores, weights and groups belong together"
    assert torch.equal(last.groups.local_heads, handle.groups.local_heads)


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLOOTrainer])
def test_the_table_of_completions_has_their_weights(trainer_class, tmp_path) -> None:
    trainer = tiny_trainer(
        trainer_class, tmp_path, log_completions=True, num_completions_to_print=0, max_steps=1
    )
    handle = attach_credit(trainer, CREDIT, horizon=HORIZON)
    trainer.train()
    if trainer_class is GRPOTrainer:
        (table,) = tables(tmp_path)
    else:  # It writes no file, and sends the same table to wandb.
        table = pandas.DataFrame({"completion": trainer._logs["completion"], **trainer._logs["extra"]})
    last = handle.last
    counts = last.rollout.response_mask.sum(-1)
    means = (last.gamma * last.rollout.response_mask).sum(-1) / counts
    assert table["credit/mean_weight"].tolist() == pytest.approx(means.tolist())
    texts = trainer.processing_class.batch_decode(last.rollout.completion_ids, skip_special_tokens=True)
    assert table["completion"].tolist() == texts, "rows belong to their completions"
    for row, told in enumerate(table["credit/amplified"]):
        # Each piece holds neighbours of the same weight, so that the pieces' tokens are the amplified ones.
        pieces = re.findall(r"(['\"])(.*?)\1 ([\d.]+)(?:, |$)", told)
        weights = last.gamma[row]
        changes = torch.cat([weights[:1] != 0, weights[1:] != weights[:-1]])
        assert [float(weight) for *_, weight in pieces] == pytest.approx(
            weights[changes & (weights > 1)].tolist(), abs=1e-3
        )
    assert bool((last.gamma > 1).any())


def test_a_table_with_completions_that_have_no_credit(tmp_path) -> None:
    """Those of an evaluation, of before credit was attached, and of after it was removed."""

    class Attaching(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 1:
                self.handle = attach_credit(trainer, CREDIT, horizon=HORIZON)
            if state.global_step == 4:
                self.handle.detach()

    prompts = Dataset.from_dict({"prompt": ["Read.", "The"]})
    trainer = tiny_trainer(
        GRPOTrainer,
        tmp_path,
        max_steps=5,
        log_completions=True,
        num_completions_to_print=0,
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
        options={"eval_dataset": prompts},
        # A table of the completions of two steps.
        steps_per_generation=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
    )
    trainer.add_callback(Attaching())
    trainer.train()
    # What was generated in step 0 has none; in step 2, four have; and in step 4, none again.
    counts = [table.get("credit/mean_weight", pandas.Series()).notna().sum() for table in tables(tmp_path)]
    assert counts == [0, 0, 4, 0, 0]


def test_the_table_is_as_it_was_after_detaching(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path, log_completions=True, num_completions_to_print=0)
    handle = attach_credit(trainer, CREDIT, horizon=HORIZON)
    trainer.train()
    assert len(trainer._logs["extra"]["credit/amplified"]) == 4
    trainer.evaluate(trainer.train_dataset.select(range(2)))
    assert list(trainer._logs["extra"]["credit/amplified"]) == [None] * 4
    handle.detach()
    assert dict(trainer._logs["extra"]) == {}


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_report_of_a_completion(rate, tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path, learning_rate=rate)
    handle = attach_credit(trainer, CREDIT, horizon=HORIZON)
    with pytest.raises(TrainerError, match="nothing has been generated with credit yet"):
        handle.report()
    trainer.train()
    last = handle.last
    row = int((last.gamma > 1).any(-1).nonzero()[0, 0])
    report = handle.report(row)
    own = report.batch.response_mask[0]
    written = last.rollout.response_mask[row]
    assert torch.equal(report.batch.input_ids[0, own], last.rollout.completion_ids[row][written])
    (gamma,) = report.weights.values()
    assert torch.equal(gamma[0, own], last.gamma[row][written].float())
    now, then = report.scores.fai[0, own], last.scores.fai[row][written]
    same = torch.allclose(now, then, atol=1e-5, equal_nan=True)
    assert same == (rate == 0.0), "a policy that has been trained since is measured as it is"
    assert f"Completion {row} of 4, generated at step 1." in report.notes
    assert "Its advantage is" in report.notes
    assert "is that of the policy at step 2" in report.notes
    assert re.search(r"above 1: ['\"].* [\d.]+\.", report.notes)
    if rate == 0.0:
        assert "credit" in report.html().lower()
    with pytest.raises(ParameterError, match=r"completion.*4"):
        handle.report(4)


def test_reports_that_cannot_be_made(tmp_path) -> None:
    trainer = tiny_trainer(GRPOTrainer, tmp_path, max_steps=1)

    def no_needs(scores):
        return torch.ones(scores.response_mask.shape)

    no_needs.needs = set()
    handle = attach_credit(trainer, no_needs)
    trainer.train()
    with pytest.raises(TrainerError, match="the strategy needs no attention"):
        handle.report()
    handle.detach()
    handle = attach_credit(trainer, CREDIT, heads="all", horizon=HORIZON)
    trainer.train()
    with pytest.raises(TrainerError, match="no HeadGroups"):
        handle.report()

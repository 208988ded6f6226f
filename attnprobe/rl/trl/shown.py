"""What people see of credit: columns of the trainer's table of completions, and a report of one completion.

`CreditHandle` fills the table after each generation if the trainer logs completions, and makes reports on
request. What is left to others: the weights (trainer_credit), their metrics (weighed), and the page (report).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnprobe.batch import TokenBatch
from attnprobe.errors import TrainerError
from attnprobe.head_groups import HeadGroups
from attnprobe.measurement import measure
from attnprobe.report import Report
from attnprobe.rhythm import find_rhythm
from attnprobe.rl.rollout import Rollout
from attnprobe.rl.trl.trainer_credit import TrainerCredit
from attnprobe.rl.weighed import WeighedRollout
from attnprobe.rl.whole_pass import WholePassAdapter
from attnprobe.scores import score_tokens
from attnprobe.validation import IntLike, whole_number

COLUMNS = ("credit/mean_weight", "credit/amplified")
"""The columns of the table: the mean weight of a completion's tokens, and those with a weight above 1."""


def add_to_table(trainer: Any, weighed: WeighedRollout | None, count: int) -> None:
    """Add what was weighed to the table of completions that a trainer logs with `log_completions=True`.

    All processes call it for each generation, also in evaluation, where nothing is weighed: the columns of a
    table have the same length.

    Args:
        trainer: the trainer, which has added the completions themselves to its table.
        weighed: the weighed completions of this process; None for completions without credit.
        count: their number in this process.
    """
    from accelerate.utils import gather_object  # type: ignore[import-untyped]

    means: list[float | None] = [None] * count
    amplified: list[str | None] = [None] * count
    if weighed is not None:
        means = mean_weights(weighed)
        amplified = [amplified_text(trainer, weighed, number) for number in range(count)]
    rows = len(trainer._logs["prompt"])
    for name, values in zip(COLUMNS, (means, amplified), strict=True):
        column = trainer._logs["extra"][name]
        column.extend(gather_object(values))
        # The trainer's own columns may hold completions from before credit was attached.
        kept = list(column)[-rows:] if rows else []
        column.clear()
        column.extend([None] * (rows - len(kept)) + kept)


def remove_from_table(trainer: Any) -> None:
    """Remove the columns that `add_to_table` has added."""
    for name in COLUMNS:
        trainer._logs["extra"].pop(name, None)


def mean_weights(weighed: WeighedRollout) -> list[float | None]:
    """Return the mean weight of the tokens that the policy wrote, of each completion; None without any."""
    own = weighed.rollout.response_mask.to(weighed.gamma.device)
    counts = own.sum(-1)
    means = (weighed.gamma * own).sum(-1) / counts
    return [
        float(mean) if int(count) else None for mean, count in zip(means.cpu(), counts.cpu(), strict=True)
    ]


def amplified_text(trainer: Any, weighed: WeighedRollout, completion: int) -> str:
    """Return the tokens of a completion that weigh more than 1, with their weights: `' So' 1.5, ' 42' 1.25`.

    Neighbours of the same weight are shown together.
    """
    tokenizer = tokenizer_of(trainer)
    weights = weighed.gamma[completion].cpu()
    ids = weighed.rollout.completion_ids[completion].cpu()
    pieces: list[str] = []
    run: list[int] = []
    for token, weight in enumerate(weights.tolist()):
        if weight <= 1:
            continue
        run.append(int(ids[token]))
        goes_on = token + 1 < len(weights) and float(weights[token + 1]) == weight
        if not goes_on:
            pieces.append(f"{tokenizer.decode(run)!r} {weight:.4g}")
            run = []
    return ", ".join(pieces)


def tokenizer_of(trainer: Any) -> Any:
    """Return a trainer's tokenizer, which may be part of a processor."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def report_of(
    trainer: Any, credit: TrainerCredit, completion: IntLike, step: int, advantages: Tensor | None
) -> Report:
    """Return the report of a completion of the last rollout; see `CreditHandle.report`."""
    weighed = credit.last
    if weighed is None:
        raise TrainerError("nothing has been generated with credit yet: there is no completion to report on")
    rollout = weighed.rollout
    count = len(rollout.completion_ids)
    number = whole_number(completion, "completion", minimum=0, maximum=count - 1)
    if not credit.layers:
        raise TrainerError("the strategy needs no attention, so there is nothing to report on")
    groups = credit.groups if weighed.groups is None else weighed.groups
    if not isinstance(groups, HeadGroups):
        raise TrainerError(
            "a report shows head groups from classify_heads or the run itself, but credit was given heads "
            "that are no HeadGroups"
        )
    one = rollout.select(torch.arange(count) == number)
    if not bool(one.response_mask.any()):
        raise TrainerError(f"completion {number} has no token that the policy wrote and that counts")
    batch = _with_texts(one, tokenizer_of(trainer))
    policy = credit.policy if credit.root is None else WholePassAdapter(credit.policy, credit.root)
    with credit.precision():
        statistics = measure(
            policy,
            batch,
            layers=credit.layers,
            window=credit.window,
            horizon=credit.horizon,
            entropy=False,
            share_on=(),
            span_ignores=(),
        )
    scores = score_tokens(statistics, groups)
    told = [f"Completion {number} of {count}, generated at step {step}."]
    if advantages is not None:
        # A trainer may have one advantage for each token.
        told.append(f"Its advantage is {float(advantages[number].reshape(-1)[0]):.4g}.")
    mean = mean_weights(weighed)[number]
    told.append(
        f"Weights of {credit.credit!r}, with signs={credit.signs!r}: mean {mean:.4g}; above 1: "
        f"{amplified_text(trainer, weighed, number) or 'none'}."
    )
    if trainer.state.global_step != step:
        told.append(
            f"The attention shown is that of the policy at step {trainer.state.global_step}; the weights "
            f"are those of step {step}."
        )
    # Of what the policy wrote; nothing else is weighted.
    gamma = torch.ones(batch.input_ids.shape)
    gamma[batch.response_mask.cpu()] = weighed.gamma[number][rollout.response_mask[number]].float().cpu()
    return Report(
        batch,
        statistics,
        groups,
        scores,
        find_rhythm(scores),
        title=f"Credit at step {step}, completion {number}",
        notes="\n".join(told),
        weights={type(credit.credit).__name__: gamma},
        tokenizer=tokenizer_of(trainer),
    )


def _with_texts(rollout: Rollout, tokenizer: Any) -> TokenBatch:
    batch = rollout.batch()
    return TokenBatch.from_ids(
        batch.input_ids, batch.attention_mask, response_mask=batch.response_mask, tokenizer=tokenizer
    )

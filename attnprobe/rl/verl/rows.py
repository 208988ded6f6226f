"""verl's rows: jagged tensors with an entry for each response, as rollouts, and back.

A batch of verl's V1 trainer is a mapping from names to nested tensors, in which each row has its own length:
`prompts`, `responses` and `response_mask` say what was asked and written. Rows that verl adds to fill a batch
have a response without any token to train on. What is left to others: what is done with them (engine).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from attnprobe.errors import TrainerError
from attnprobe.rl.rollout import Rollout


def rollout_of(batch: Any) -> Rollout:
    """Return a batch's prompts and responses; what tools wrote is masked, as in verl.

    Raises:
        TrainerError: rows that are padded, as those of verl's V0 trainer are.

    >>> batch = {"prompts": jagged([torch.tensor([5, 6])]), "responses": jagged([torch.tensor([7, 8])])}
    >>> rollout_of(batch | {"response_mask": jagged([torch.tensor([1, 0])])}).response_mask
    tensor([[ True, False]])
    """
    names = ("prompts", "responses", "response_mask")
    if not all(isinstance(batch[name], Tensor) and batch[name].is_nested for name in names):
        raise TrainerError(
            "the rows of this batch are padded, as in verl's V0 trainer, which hands nothing on to the "
            "update: credit needs the V1 trainer; set trainer.use_v1=True"
        )
    prompts, responses, own = (list(batch[name].unbind()) for name in names)
    return Rollout.from_lists(prompts, responses, own)


def jagged(rows: Sequence[Shaped[Tensor, " _"]]) -> Tensor:
    """Return rows of different lengths as one nested tensor, as verl's fields are."""
    nested: Tensor = torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)
    return nested


def padded(field: Any, fill: float) -> Shaped[Tensor, "completion token"]:
    """Return a field whose rows belong to the responses' tokens, padded right.

    >>> padded(jagged([torch.tensor([1.0, 2.0]), torch.tensor([3.0])]), 0.0)
    tensor([[1., 2.],
            [3., 0.]])
    """
    return torch.nn.utils.rnn.pad_sequence(list(field.unbind()), batch_first=True, padding_value=fill)


def of_responses(output: Any, rollout: Rollout) -> Float[Tensor, "completion token"]:
    """Return what a model's output says of the responses' tokens; 0 on padding.

    Outputs have a value for each token of prompt and response, and are shifted by one: the value at a token
    is about the next one.

    >>> rollout = Rollout.from_lists([[5, 6]], [[7, 8]])
    >>> of_responses(jagged([torch.tensor([0.1, 0.2, 0.3, 0.4])]), rollout)
    tensor([[0.2000, 0.3000]])
    """
    lengths = rollout.completion_mask.sum(-1).tolist()
    rows = [
        row[len(row) - length - 1 : len(row) - 1]
        for row, length in zip(output.unbind(), lengths, strict=True)
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

"""A trial of a run's loss before its first update: is the gradient of each token multiplied by its weight?

Some objectives give all tokens of a response one advantage, the mean of theirs (verl's `geo_mean`), and would
erase credit without a word. So the engine tries out the loss function that verl hands to it, as
`honours_weights` does with any loss. A list of names was rejected: losses of one's own are on none. What is
left to others: the trial itself (canary), and weighting advantages (engine).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnprobe.errors import ParameterError, TrainerError
from attnprobe.rl.canary import Loss, honours_weights
from attnprobe.rl.verl.rows import jagged


def check_loss(loss_function: Callable[..., Any]) -> None:
    """Check that a loss multiplies the gradient of each token by the token's weight.

    Args:
        loss_function: as verl calls it: `loss_function(model_output=, data=, dp_group=)`.

    Raises:
        TrainerError: it does not, or it cannot be tried out.
    """
    try:
        # Some of verl's losses draw at random, which must not change what the run draws.
        with torch.random.fork_rng(devices=[]):
            verdict = honours_weights(_as_loss(loss_function))
    except ParameterError as error:
        raise TrainerError(
            f"nothing says that credit would reach {_name(loss_function)}: {error}; use a loss of verl's own "
            "actor"
        ) from error
    if not verdict:
        raise TrainerError(
            f"credit would not reach {_name(loss_function)}: {verdict.advantages}; set "
            "actor_rollout_ref.actor.policy_loss.loss_mode to another one, such as vanilla"
        )


def _as_loss(loss_function: Callable[..., Any]) -> Loss:
    """Return verl's loss of jagged rows as a loss of padded ones, each with a prompt of one token."""
    from verl.utils import tensordict_utils

    def loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(-1).long().tolist()

        def cut(values: Tensor) -> Tensor:
            return jagged([row[:length] for row, length in zip(values, lengths, strict=True)])

        whole = cut(torch.ones_like(mask, dtype=torch.long))
        data = tensordict_utils.get_tensordict(
            {
                "prompts": jagged([torch.ones(1, dtype=torch.long) for _ in lengths]),
                "responses": whole,
                "response_mask": whole,
                "old_log_probs": cut(old_log_probs),
                "ref_log_prob": cut(old_log_probs),
                "advantages": cut(advantages),
            },
            non_tensor_dict={
                "dp_size": 1,
                "batch_num_tokens": sum(lengths),
                "global_batch_size": len(lengths),
            },
        )
        # Outputs are shifted by one: the value at a token is about the next one, and the last is about none.
        rows = [
            torch.cat([row[:length], row.new_zeros(1)])
            for row, length in zip(log_probs, lengths, strict=True)
        ]
        offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
        output = {"log_probs": torch.nested.nested_tensor_from_jagged(torch.cat(rows), offsets)}
        found, _ = loss_function(model_output=output, data=data, dp_group=None)
        return found  # type: ignore[no-any-return]

    return loss


def _name(loss_function: Any) -> str:
    """Return what to call a loss, with its mode if it has verl's configuration."""
    called = getattr(loss_function, "func", loss_function)
    name = getattr(called, "__name__", type(called).__name__)
    config = getattr(loss_function, "keywords", {}).get("config")
    policy_loss = getattr(config, "policy_loss", None)
    mode = None if policy_loss is None else policy_loss.get("loss_mode")
    return f"the loss {name}" + (f" with loss_mode={mode}" if mode else "")

"""The two routes by which weights enter a trainer's loss, and the canary that checks that one works.

`through_advantages` gives the loss one advantage per token; `through_gradient` leaves the loss unchanged and
weights the gradient of its log-probabilities. `attach_credit` calls `choose_route` once. Which route a
trainer honours is tried out, not looked up by class or version: the canary runs the trainer's own loss on a
small made-up batch whose log-probabilities are a leaf tensor, so that no model runs, and compares the
gradients with those of the objective. What is left to others: computing the weights (trainer_credit), and
installing the route (attach).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from attnprobe.errors import TrainerError
from attnprobe.rl.advantage import Signs, credit_weights, gate_gradient
from attnprobe.validation import choice

Through = Literal["auto", "advantages", "gradient"]
Route = Callable[..., Tensor]

_LOGPS = "_get_per_token_logps_and_entropies"
_TOLERANCE = 1e-4


def through_advantages(
    trainer: Any,
    compute_loss: Callable[..., Tensor],
    weights: Tensor,
    model: Any,
    inputs: Any,
    **options: Any,
) -> Tensor:
    """Return the trainer's loss with one weighted advantage per token."""
    advantages = inputs["advantages"]
    spread = advantages if advantages.ndim == 2 else advantages[:, None]
    weighted = (spread * weights).to(advantages.dtype)
    return compute_loss(model, {**inputs, "advantages": weighted}, **options)


def through_gradient(
    trainer: Any,
    compute_loss: Callable[..., Tensor],
    weights: Tensor,
    model: Any,
    inputs: Any,
    **options: Any,
) -> Tensor:
    """Return the trainer's own loss, with weighted gradients of the log-probabilities."""
    original = getattr(trainer, _LOGPS)

    def gated(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        logps, *others = original(*args, **kwargs)
        return (gate_gradient(logps, weights), *others)

    with replaced(trainer, _LOGPS, gated):
        return compute_loss(model, inputs, **options)


ROUTES: dict[str, Route] = {"advantages": through_advantages, "gradient": through_gradient}


def choose_route(trainer: Any, through: Through, signs: Signs) -> str:
    """Return the name of the route that this trainer's loss honours; "advantages" if it honours both.

    Only weights of advantages that `signs` includes are tried out.

    Raises:
        ParameterError: an unknown route.
        TrainerError: a loss that honours none of the requested routes; the message gives the reasons.
    """
    choice(through, "through", get_args(Through))
    reasons = []
    for name in ROUTES if through == "auto" else (through,):
        reason = _reason_against(trainer, name, signs)
        if reason is None:
            return name
        reasons.append(f"through {name}: {reason}")
    raise TrainerError(
        f"{type(trainer).__name__} does not honour a weight for each token. {'. '.join(reasons)}"
    )


@contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of one object, and afterwards restore the object's own, if it had one."""
    own = vars(target)
    missing = object()
    before = own.get(name, missing)
    setattr(target, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(target, name)
        else:
            setattr(target, name, before)


# ---- the canary -------------------------------------------------------------------------------


def _reason_against(trainer: Any, name: str, signs: Signs) -> str | None:
    """Return why the trainer's loss does not honour a route; None if it does."""
    canary = _Canary(trainer, signs)
    with canary.undisturbed():
        plain_value, plain = canary.run(None, canary.advantages)
        _, without = canary.run(None, torch.zeros_like(canary.advantages))
        # Not a gradient in every token, nor in every completion: a trainer may train on some of them only.
        if not bool((plain != without).any()):
            raise TrainerError(
                f"{type(trainer).__name__} has a loss that does not depend on the advantages of its "
                "log-probabilities: there is nothing to weight"
            )
        route = ROUTES[name]
        try:
            value, ones = canary.run(route, canary.advantages, torch.ones_like(canary.weights))
            weighted_value, weighted = canary.run(route, canary.advantages, canary.weights)
            _, weighted_without = canary.run(route, torch.zeros_like(canary.advantages), canary.weights)
        except TrainerError as error:
            if name == "advantages":
                return f"its loss takes one advantage per sequence ({_brief(error)}); use through='gradient'"
            raise
    if _differ(ones, plain) or _differ(value, plain_value):
        return "weights of 1 change its loss"
    if name == "gradient" and _differ(weighted_value, plain_value):
        return "weighting the gradient changes the loss itself"
    if _differ(weighted_without, without):
        beta = getattr(trainer, "beta", 0.0)
        return (
            f"its KL term (beta={beta}) would be weighted too: set beta=0, or use a loss that takes "
            "advantages for each token"
        )
    if _differ(weighted, without + canary.weights * (plain - without)):
        if getattr(trainer, "importance_sampling_level", "token") == "sequence":
            return (
                "importance_sampling_level='sequence' erases it, since each token gets the mean of its "
                "completion: set importance_sampling_level='token', or through='gradient'"
            )
        return "the gradient of a token is not multiplied by the token's weight"
    return None


class _Canary:
    """A made-up batch of 3 completions of 5 tokens, with padding and tool output, for a trainer's loss."""

    def __init__(self, trainer: Any, signs: Signs) -> None:
        self._trainer = trainer
        device = trainer.accelerator.device
        generator = torch.Generator().manual_seed(0)
        # More tokens than completions: with equal numbers, [batch] times [batch, token] would not fail.
        batch, prompt, token = 3, 2, 5
        mask = torch.ones(batch, token, dtype=torch.long)
        mask[2, 4] = 0
        tools = torch.ones_like(mask)
        tools[0, 2] = 0
        self._logps = (-0.5 - torch.rand(batch, token, generator=generator)).to(device)
        # The same in each completion, and the highest where all have a token of their own: a trainer that
        # trains only on the highest entropies, however few, then trains on a token of each completion.
        self._entropies = torch.linspace(1.0, 0.1, token, device=device).repeat(batch, 1)
        self.advantages = torch.tensor([1.0, -0.7, 0.4], device=device)
        gamma = (0.5 + torch.rand(batch, token, generator=generator)).to(device)
        gamma[:, 1] = 0.0  # as strategies that drop tokens give it
        self.weights = credit_weights(self.advantages, gamma, (mask * tools).to(device), signs=signs)
        self._inputs = {
            "prompt_ids": torch.ones(batch, prompt, dtype=torch.long, device=device),
            "prompt_mask": torch.ones(batch, prompt, dtype=torch.long, device=device),
            "completion_ids": torch.ones(batch, token, dtype=torch.long, device=device),
            "completion_mask": mask.to(device),
            "tool_mask": tools.to(device),
            "num_items_in_batch": (mask * tools).sum().to(device),
            "old_per_token_logps": self._logps,
            "sampling_per_token_logps": self._logps,
            "ref_per_token_logps": self._logps - 0.3,
            "old_logps": (self._logps * mask.to(device)).sum(1),
            "importance_sampling_ratio": torch.ones(batch, 1, device=device),
        }

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Run losses in evaluation mode, in which they change no state, and discard what they logged."""
        trainer = self._trainer
        logged = {mode: {k: list(v) for k, v in values.items()} for mode, values in trainer._metrics.items()}
        # The loss reads its mode from the root module's flag alone.
        training, trainer.model.training = trainer.model.training, False
        try:
            yield
        finally:
            trainer.model.training = training
            for mode, values in trainer._metrics.items():
                values.clear()
                values.update(logged[mode])

    def run(
        self, route: Route | None, advantages: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and its gradient with respect to the log-probabilities."""
        trainer = self._trainer
        leaf = self._logps.clone().requires_grad_()

        def made_up(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
            return leaf.clone(), self._entropies, torch.zeros((), device=leaf.device)

        inputs = {**self._inputs, "advantages": advantages}
        with replaced(trainer, _LOGPS, made_up):
            try:
                if route is None:
                    loss = trainer.compute_loss(trainer.model, inputs)
                else:
                    loss = route(trainer, trainer.compute_loss, weights, trainer.model, inputs)
            except Exception as error:
                raise TrainerError(
                    f"the loss of {type(trainer).__name__} could not be tried out: "
                    f"{type(error).__name__}: {_brief(error)}"
                ) from error
        gradient = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        if gradient is None:
            raise TrainerError(
                f"the loss of {type(trainer).__name__} does not take its log-probabilities from {_LOGPS}, "
                "where credit enters: if it uses a fused Liger loss, switch that off"
            )
        return loss.detach(), gradient


def _differ(actual: Tensor, expected: Tensor) -> bool:
    scale = max(float(expected.abs().max()), 1e-6)
    return not bool((actual - expected).abs().max() <= _TOLERANCE * scale)


def _brief(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

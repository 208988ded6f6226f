"""The canary: a small batch on which a trainer's loss is tried out, to find a route that it honours.

`choose_route` runs the trainer's own loss several times on a batch whose log-probabilities are a leaf tensor,
and compares their gradients with those of the objective. So which route works is never looked up by class or
version. `attach_credit` calls it with a made-up batch, so that no model runs. A loss that needs fields which
the trainer itself adds to its batches is tried out on the first real one, when its turn comes and before any
parameter changes. What is left to others: the routes themselves (routes), and installing one (attach).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor

from attnprobe.adapters.base import evaluation_mode
from attnprobe.errors import TrainerError
from attnprobe.rl.advantage import Signs, credit_weights
from attnprobe.rl.canary import differ
from attnprobe.rl.trl.routes import LOGPS, ROUTES, Route, Through, replaced
from attnprobe.validation import choice


def choose_route(
    trainer: Any, through: Through, signs: Signs, batch: tuple[Any, dict[str, Any]] | None = None
) -> str | None:
    """Return the name of the route that this trainer's loss honours; "advantages" if it honours both.

    Only weights of advantages that `signs` includes are tried out. Over several processes, what one of them
    finds is a finding of all, since their batches differ.

    Args:
        trainer: a trainer that `check_trainer` accepts.
        through: the routes to try.
        signs: which advantages are weighted.
        batch: the model and the inputs that the trainer passes to its loss; None: a made-up batch.

    Returns:
        The name, or None if the batch does not tell: the loss needs more than a made-up batch has, or the
        loss of a real batch depends on no advantage.

    Raises:
        ParameterError: an unknown route.
        TrainerError: a loss that honours none of the requested routes; the message gives the reasons.
    """
    choice(through, "through", get_args(Through))
    canary = _Canary(trainer, signs) if batch is None else _RealCanary(trainer, signs, *batch)
    with canary.undisturbed():
        try:
            stock = canary.run(None, canary.advantages)
            _, without = canary.run(None, torch.zeros_like(canary.advantages))
        except _NotUnderstoodError:
            return None
        # Not a gradient in every token, nor in every completion: a trainer may train on some of them only.
        if not any(canary.of_all_processes(bool((stock[1] != without).any()))):
            canary.is_not_heard()
            return None
        reasons = []
        for name in ROUTES if through == "auto" else (through,):
            found = canary.of_all_processes(_reason_against(canary, name, stock, without))
            reason = next((each for each in found if each is not None), None)
            if reason is None:
                return name
            reasons.append(f"through {name}: {reason}")
    raise TrainerError(
        f"{type(trainer).__name__} does not honour a weight for each token. {'. '.join(reasons)}"
    )


def _reason_against(canary: _Canary, name: str, stock: tuple[Tensor, Tensor], without: Tensor) -> str | None:
    """Return why the trainer's loss does not honour a route; None if it does.

    `stock` is the loss and its gradient without credit, `without` the gradient without advantages.
    """
    trainer, route = canary.trainer, ROUTES[name]
    value, plain = stock
    try:
        value_of_ones, ones = canary.run(route, canary.advantages, torch.ones_like(canary.weights))
        weighted_value, weighted = canary.run(route, canary.advantages, canary.weights)
        _, weighted_without = canary.run(route, torch.zeros_like(canary.advantages), canary.weights)
    except TrainerError as error:
        if name == "advantages":
            return f"its loss takes one advantage per sequence ({_brief(error)}); use through='gradient'"
        raise
    if differ(ones, plain) or differ(value_of_ones, value):
        return "weights of 1 change its loss"
    if name == "gradient" and differ(weighted_value, value):
        return "weighting the gradient changes the loss itself"
    if differ(weighted_without, without):
        beta = getattr(trainer, "beta", 0.0)
        return (
            f"its KL term (beta={beta}) would be weighted too: set beta=0, or use a loss that takes "
            "advantages for each token"
        )
    if differ(weighted, without + canary.weights * (plain - without)):
        if getattr(trainer, "importance_sampling_level", "token") == "sequence":
            return (
                "importance_sampling_level='sequence' erases it, since each token gets the mean of its "
                "completion: set importance_sampling_level='token', or through='gradient'"
            )
        return "the gradient of a token is not multiplied by the token's weight"
    return None


class _NotUnderstoodError(Exception):
    """The trainer's own loss failed on a made-up batch."""


class _Canary:
    """A made-up batch of 3 completions of 5 tokens, with padding and tool output, for a trainer's loss."""

    _scored: tuple[Any, ...] | None = None

    def __init__(self, trainer: Any, signs: Signs) -> None:
        device = trainer.accelerator.device
        generator = torch.Generator().manual_seed(0)
        # More tokens than completions: with equal numbers, [batch] times [batch, token] would not fail.
        batch, prompt, token = 3, 2, 5
        mask = torch.ones(batch, token, dtype=torch.long)
        mask[2, 4] = 0
        tools = torch.ones_like(mask)
        tools[0, 2] = 0
        mask, tools = mask.to(device), tools.to(device)
        logps = (-0.5 - torch.rand(batch, token, generator=generator)).to(device)
        inputs = {
            "prompt_ids": torch.ones(batch, prompt, dtype=torch.long, device=device),
            "prompt_mask": torch.ones(batch, prompt, dtype=torch.long, device=device),
            "completion_ids": torch.ones(batch, token, dtype=torch.long, device=device),
            "completion_mask": mask,
            "tool_mask": tools,
            "num_items_in_batch": (mask * tools).sum(),
            "old_per_token_logps": logps,
            "sampling_per_token_logps": logps,
            "ref_per_token_logps": logps - 0.3,
            "old_logps": (logps * mask).sum(1),
            "importance_sampling_ratio": torch.ones(batch, 1, device=device),
        }
        self._try_out(trainer, signs, trainer.model, inputs)
        # The same in each completion, and the highest where all have a token of their own: a trainer that
        # trains only on the highest entropies, however few, then trains on a token of each completion.
        entropies = torch.linspace(1.0, 0.1, token, device=device).repeat(batch, 1)
        self._scored = (logps, entropies, torch.zeros((), device=device))

    def _try_out(self, trainer: Any, signs: Signs, model: Any, inputs: dict[str, Any]) -> None:
        """Set what both kinds of batches have: their advantages and weights are made up."""
        self.trainer, self._model, self._inputs = trainer, model, inputs
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        generator = torch.Generator().manual_seed(1)
        cycle = torch.tensor([1.0, -0.7, 0.4], device=mask.device)
        self.advantages = cycle.repeat(-(-len(mask) // 3))[: len(mask)]
        gamma = (0.5 + torch.rand(mask.shape, generator=generator)).to(mask.device)
        gamma[:, 1::4] = 0.0  # as strategies that drop tokens give it
        self.weights = credit_weights(self.advantages, gamma, mask, signs=signs)

    def of_all_processes(self, value: Any) -> list[Any]:
        """Return a finding of each process; a made-up batch is the same in all of them."""
        return [value]

    def is_not_heard(self) -> None:
        """Refuse a loss that depends on no advantage."""
        raise TrainerError(
            f"{type(self.trainer).__name__} has a loss that does not depend on the advantages of its "
            "log-probabilities: there is nothing to weight"
        )

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Run losses in evaluation mode, in which they change no state, and discard what they logged."""
        trainer = self.trainer
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
        trainer = self.trainer
        original = getattr(trainer, LOGPS)
        leaves: list[Tensor] = []

        def with_leaf(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
            logps, *others = self._score(original, *args, **kwargs)
            if not leaves:
                leaves.append(logps.clone().requires_grad_())
            return (leaves[0].clone(), *others)

        inputs = {**self._inputs, "advantages": advantages}
        with torch.enable_grad(), replaced(trainer, LOGPS, with_leaf):
            try:
                if route is None:
                    loss = trainer.compute_loss(self._model, inputs)
                else:
                    loss = route(trainer, trainer.compute_loss, weights, self._model, inputs)
            except Exception as error:
                self._failed(route, error)
        gradient = None
        if loss.requires_grad and leaves:
            (gradient,) = torch.autograd.grad(loss, leaves, allow_unused=True)
        if gradient is None:
            raise TrainerError(
                f"the loss of {type(trainer).__name__} does not take its log-probabilities from {LOGPS}, "
                "where credit enters: if it uses a fused Liger loss, switch that off"
            )
        return loss.detach(), gradient

    def _score(self, original: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return log-probabilities and entropies, in place of the trainer's own method."""
        assert self._scored is not None
        return self._scored

    def _failed(self, route: Route | None, error: Exception) -> NoReturn:
        """Raise what the failure of a loss means."""
        if route is None:
            raise _NotUnderstoodError from error
        raise TrainerError(
            f"the loss of {type(self.trainer).__name__} could not be tried out: "
            f"{type(error).__name__}: {_brief(error)}"
        ) from error


class _RealCanary(_Canary):
    """The first batch that a trainer computes its loss on, with the log-probabilities of its model.

    Its advantages are made up too: real ones may all be 0. And so is the distance to the reference model: as
    long as that equals the policy, a KL term has no gradient that could tell whether it is weighted too.
    """

    def __init__(self, trainer: Any, signs: Signs, model: Any, inputs: dict[str, Any]) -> None:
        reference = "ref_per_token_logps"
        moved = {reference: inputs[reference] - 0.3} if reference in inputs else {}
        self._try_out(trainer, signs, model, {**inputs, **moved})
        if inputs["advantages"].ndim == 2:
            self.advantages = self.advantages[:, None].expand(self.weights.shape)

    def of_all_processes(self, value: Any) -> list[Any]:
        """Return a finding of each process."""
        from accelerate.utils import gather_object  # type: ignore[import-untyped]

        found: list[Any] = gather_object([value])
        return found

    def is_not_heard(self) -> None:
        """Wait for another batch, since the trainer may train on a part of them only; but say so."""
        if bool((self._inputs["completion_mask"] * self._inputs.get("tool_mask", 1)).any()):
            warnings.warn(
                f"the loss of {type(self.trainer).__name__} does not depend on the advantages of this batch: "
                "it is trained on without credit, and the next one is tried out",
                stacklevel=2,
            )

    def _score(self, original: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return what the trainer's own method returns; the model runs once."""
        if self._scored is None:
            with torch.no_grad(), evaluation_mode(self.trainer.model.modules()):
                logps, *others = original(*args, **kwargs)
            # Not in half precision, in which gradients would differ by more than the tolerance.
            self._scored = (logps.float(), *others)
        return self._scored

    def _failed(self, route: Route | None, error: Exception) -> NoReturn:
        """Raise the error of a loss that fails without credit as it is, and say what another means."""
        if route is None:
            raise error
        super()._failed(route, error)


def _brief(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

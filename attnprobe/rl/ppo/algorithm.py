"""PPO for language models, to be read in one sitting from top to bottom.

    problems = [{"prompt_ids": [5, 3, 8], "answer": 16}, ...]
    ppo = PPO(policy, problems, reward, PPOConfig(steps=200), credit=CoupledRhythmCredit())
    history = ppo.train()

Each step samples completions from the policy, rewards them, computes an advantage for each token, and takes
a few clipped gradient steps: the objective of Eq. 5 of arXiv 2510.13554v2, with the group-normalised
advantages of its Eq. 6 as the alternative to a value head. Credit enters in one line: look for
`apply_credit`. It is a reference: one device, one precision, no accelerate, no generation server. What is
left to others: the settings (config), the value head (actor_critic), sampling (sampling), problems and
rewards (problems), the weights of tokens (rollout_credit), evaluation (evaluation), files (run_folder), and
what a checkpoint holds (checkpoint).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.errors import ParameterError, ResultError
from attnprobe.progress import progress_bar
from attnprobe.rl.advantage import apply_credit
from attnprobe.rl.credit import Credit
from attnprobe.rl.ppo.actor_critic import ActorCritic
from attnprobe.rl.ppo.checkpoint import restore, state_of
from attnprobe.rl.ppo.config import PPOConfig
from attnprobe.rl.ppo.evaluation import Evaluation, evaluate, evaluation_of
from attnprobe.rl.ppo.identity import identity_of
from attnprobe.rl.ppo.problems import (
    Problem,
    Reward,
    check_ends,
    check_problems,
    judge,
    problems_of_step,
    prompts_of,
)
from attnprobe.rl.ppo.run_folder import RunFolder, check_folder, finish_step_on_interrupt
from attnprobe.rl.ppo.sampling import Episodes, log_probabilities, roll_out
from attnprobe.rl.rollout_credit import RolloutCredit
from attnprobe.rl.settings import check_options
from attnprobe.validation import ArrayLike, instance, truth

# ---- advantages -------------------------------------------------------------------------------


def token_rewards(
    rewards: Float[Tensor, " completion"],
    kl: Float[Tensor, "completion token"],
    mask: Bool[Tensor, "completion token"],
    kl_coef: float,
) -> Float[Tensor, "completion token"]:
    """Return the reward of each token: minus its KL penalty; the last one also gets the completion's reward.

    >>> mask = torch.tensor([[True, True, False]])
    >>> token_rewards(torch.ones(1), torch.tensor([[0.5, 1.0, 9.0]]), mask, 0.1)
    tensor([[-0.0500,  0.9000,  0.0000]])
    """
    last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
    return (rewards[:, None] * last - kl_coef * kl).masked_fill(~mask, 0.0)


def generalized_advantages(
    rewards: Float[Tensor, "completion token"],
    values: Float[Tensor, "completion token"],
    mask: Bool[Tensor, "completion token"],
    gamma: float,
    gae_lambda: float,
) -> Float[Tensor, "completion token"]:
    """Return GAE (arXiv 1506.02438) over the tokens of the mask, skipping its gaps (a tool's output).

    The value after the end of a completion is 0.

    >>> rewards, values = torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[0.25, 9.0, 0.5]])
    >>> generalized_advantages(rewards, values, torch.tensor([[True, False, True]]), 1.0, 0.5)
    tensor([[0.5000, 0.0000, 0.5000]])
    """
    advantages = torch.zeros_like(rewards)
    lastgaelam = nextvalues = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        inside = mask[:, t]
        delta = rewards[:, t] + gamma * nextvalues - values[:, t]
        lastgaelam = torch.where(inside, delta + gamma * gae_lambda * lastgaelam, lastgaelam)
        nextvalues = torch.where(inside, values[:, t], nextvalues)
        advantages[:, t] = lastgaelam.masked_fill(~inside, 0.0)
    return advantages


def group_advantages(
    rewards: Float[Tensor, "completion token"], mask: Bool[Tensor, "completion token"], group_size: int
) -> Float[Tensor, "completion token"]:
    """Return how many standard deviations each completion lies above its completion group's mean (Eq. 6).

    The completions of a group are adjacent. All tokens of a completion get the same advantage; it is 0 if
    all completions of the group have the same reward.

    >>> mask = torch.ones(2, 2, dtype=torch.bool)
    >>> group_advantages(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), mask, 2)
    tensor([[ 0.7070,  0.7070],
            [-0.7070, -0.7070]])
    """
    grouped = rewards.sum(-1).unflatten(0, (-1, group_size))
    better = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.std(-1, keepdim=True) + 1e-4)
    shared: Tensor = mask * better.flatten()[:, None]
    return shared


def whiten(
    values: Float[Tensor, "completion token"], mask: Bool[Tensor, "completion token"]
) -> Float[Tensor, "completion token"]:
    """Return the values with mean 0 and variance 1 over the tokens of the mask; 0 elsewhere.

    >>> whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([[-1.,  1.,  0.]])
    """
    inside = values[mask]
    # Without the 1e-8, the rounding error of equal values would be scaled up to variance 1.
    std = (inside.var(correction=0) + 1e-8).sqrt()
    return ((values - inside.mean()) / std).masked_fill(~mask, 0.0)


# ---- losses -----------------------------------------------------------------------------------


def policy_loss(
    logratio: Float[Tensor, "completion token"],
    advantages: Float[Tensor, "completion token"],
    mask: Bool[Tensor, "completion token"],
    clip_coef: float,
) -> Float[Tensor, ""]:
    """Return the negative of the clipped objective (Eq. 5; with weighted advantages, Eq. 12), a token mean.

    >>> one = torch.ones(1, 1)
    >>> policy_loss(torch.tensor([[1.5]]).log(), 2 * one, one.bool(), clip_coef=0.2)
    tensor(-2.4000)
    """
    ratio = logratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return torch.maximum(-advantages * ratio, -advantages * clipped)[mask].mean()


def value_loss(
    values: Float[Tensor, "completion token"],
    old_values: Float[Tensor, "completion token"],
    returns: Float[Tensor, "completion token"],
    mask: Bool[Tensor, "completion token"],
    clip_coef: float,
) -> Float[Tensor, ""]:
    """Return half the squared error of the value or the clipped value, whichever is larger; a token mean.

    >>> one = torch.ones(1, 1)
    >>> value_loss(0.5 * one, 0 * one, one, one.bool(), clip_coef=0.2)
    tensor(0.3200)
    """
    clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())[mask].mean()


# ---- training ---------------------------------------------------------------------------------


class PPO:
    """Trains a policy by PPO.

    Args:
        policy: a transformers causal language model (see `ActorCritic`). It is trained in place, and in
            evaluation mode: with dropout, its log-probabilities would differ from those it sampled with.
        problems: mappings with `prompt_ids`, and whatever the reward needs to know.
        reward: `(problems, completions) -> rewards`, all lists of equal length; a completion is a list of
            ids, the end token included.
        config: how to train.
        credit: a strategy of `attnprobe.rl`, or any callable `scores -> gamma`; None: no credit.
        credit_options: further arguments of `RolloutCredit`, by name, such as `signs` and `horizon`; without
            credit they are only checked.
        ends: ids that end a completion; None: those of the policy's generation config.
        evaluation: problems to evaluate the policy on while it is trained, greedily after every tenth step;
            an `Evaluation` says otherwise. It changes nothing in the training.
        folder: where to write metrics and checkpoints; None: nothing is written.

    Attributes:
        model: the policy with its value head.
        step: how many steps have been taken.
        history: the metrics of each step; None in place of numbers that are not finite.

    Raises:
        ParameterError: no problems, prompts that the policy cannot read, invalid settings, or a policy with
            nothing to train.
        UnsupportedModelError: a policy that has no cache to sample with or, with credit, one whose attention
            cannot be read.

    >>> from attnprobe.testing.tiny_models import tiny_model
    >>> def shorter(problems, completions):
    ...     return [-float(len(ids)) for ids in completions]
    >>> settings = PPOConfig(steps=2, prompts_per_step=2, minibatch_size=4, max_new_tokens=4)
    >>> ppo = PPO(tiny_model("llama"), [{"prompt_ids": [1, 2, 3]}], shorter, settings, ends={7})
    >>> [entry["step"] for entry in ppo.train()]
    [1, 2]
    """

    def __init__(
        self,
        policy: Any,
        problems: Sequence[Problem],
        reward: Reward,
        config: PPOConfig | None = None,
        *,
        credit: Credit | None = None,
        credit_options: dict[str, Any] | None = None,
        ends: ArrayLike | set[int] | None = None,
        evaluation: Evaluation | Sequence[Problem] | None = None,
        folder: str | Path | None = None,
    ) -> None:
        self.config = config = PPOConfig() if config is None else instance(config, PPOConfig, "config")
        self.model = ActorCritic(policy)
        check_problems(problems, reward, config.max_new_tokens, policy)
        self.problems, self.reward, self.folder = problems, reward, check_folder(folder)
        self.step, self.history = 0, list[dict[str, Any]]()
        self.ends = check_ends(ends, policy)
        self.evaluation = evaluation_of(evaluation, reward, config, policy)
        self.reference = copy.deepcopy(self.model).eval() if config.kl_coef else None
        options = check_options(credit_options, RolloutCredit, "credit_options")
        self.credit = None if credit is None else RolloutCredit(policy, credit, **options)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.learning_rate, weight_decay=0.0)
        self.generator = torch.Generator(policy.device).manual_seed(config.seed)
        # Now, not when a checkpoint is written: a reward may keep notes in the problems.
        self.identity = identity_of(self)

    def train(self, *, resume: bool = False, progress: bool = False) -> list[dict[str, Any]]:
        """Run the remaining steps, and return the metrics of all steps.

        Ctrl-C ends the run after the current step, with a checkpoint to resume from.

        Raises:
            ParameterError: arguments that are not bools.
            ResultError: rewards or gradients that are not finite, a folder that cannot be used, or a
                checkpoint of a run with different settings, credit, end tokens, problems or model.
            KeyboardInterrupt: after Ctrl-C.
        """
        run, last = RunFolder(self.folder, resume=truth(resume, "resume")), self.config.steps
        if run.state is not None:
            restore(self, run.state)
            self.history = run.history
        bar = progress_bar("training", max(0, last - self.step), shown=truth(progress, "progress"))
        with finish_step_on_interrupt() as interrupted, bar as advance, run:
            while self.step < last:
                run.log(self.train_step())
                stopped = interrupted()
                if stopped or self.step == last or self.step % self.config.checkpoint_every == 0:
                    run.save(state_of(self))
                if stopped:
                    raise KeyboardInterrupt
                advance()
        return self.history

    def train_step(self) -> dict[str, Any]:
        """Sample, reward, compute advantages, update, and evaluate if that is due; return the metrics."""
        config, started = self.config, time.perf_counter()
        self.model.eval()
        asked = problems_of_step(self.problems, self.step, config.prompts_per_step, config.seed)
        problems = [problem for problem in asked for _ in range(config.group_size)]
        episodes = roll_out(
            self.model,
            prompts_of(problems),
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            ends=self.ends,
            generator=self.generator,
        )
        sampled, mask, values = time.perf_counter(), episodes.response_mask, episodes.values
        rewards = judge(self.reward, problems, episodes.completions()).to(mask.device)
        kl = self._kl_to_reference(episodes)
        metrics = {"reward": rewards, "length": mask.sum(-1), "entropy": episodes.entropy[mask]}
        rewards = token_rewards(rewards, kl, mask, config.kl_coef)
        if config.estimator == "group":
            advantages = returns = group_advantages(rewards, mask, config.group_size)
        else:
            advantages = generalized_advantages(rewards, values, mask, config.gamma, config.gae_lambda)
            returns = advantages + values
            metrics["explained_variance"] = 1 - advantages[mask].var() / returns[mask].var()
            advantages = whiten(advantages, mask) if config.whiten else advantages
        if self.reference is not None:
            metrics["kl_to_reference"] = kl[mask]
        if self.credit is not None:
            weighed = self.credit.weigh_with_scores(episodes, advantages, self.step, entropy=episodes.entropy)
            advantages = apply_credit(advantages, weighed.gamma, mask)  # Eq. 13: all that credit does
            metrics |= {
                name: torch.tensor(value, dtype=torch.float64) for name, value in weighed.metrics.items()
            }
        metrics |= self._update(episodes, advantages, returns)
        self.step += 1
        means = {name: float(each.double().mean()) for name, each in metrics.items()}
        entry: dict[str, Any] = {"step": self.step}
        entry |= {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
        entry |= {"seconds": time.perf_counter() - started, "rollout_seconds": sampled - started}
        if self.evaluation is not None and self.step % self.evaluation.every == 0:
            entry |= self.run_evaluation()
        self.history.append(entry)
        return entry

    def run_evaluation(self) -> dict[str, float]:
        """Return the metrics of the policy as it is on the problems of `evaluation`.

        Raises:
            ParameterError: there is no evaluation.
            ResultError: rewards that are not finite.
        """
        if self.evaluation is None:
            raise ParameterError("there is nothing to evaluate on: give PPO an evaluation")
        self.model.eval()
        return evaluate(self.evaluation, self.model, self.ends, self.generator.device)

    def evaluate(
        self, model: ActorCritic, episodes: Episodes, rows: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of the vocabulary and of the sampled tokens, and values, in one pass."""
        ids = torch.cat([episodes.prompt_ids, episodes.completion_ids], dim=1)[rows]
        mask = torch.cat([episodes.prompt_mask, episodes.completion_mask], dim=1)[rows]
        count = episodes.completion_ids.shape[1]
        logits, values, _ = model(ids, mask.long(), count + 1)
        log_softmax = log_probabilities(logits[:, :-1], self.config.temperature)
        logprobs = log_softmax.gather(-1, ids[:, -count:, None])[..., 0]
        return log_softmax, logprobs, values[:, :-1]

    def _update(self, episodes: Episodes, advantages: Tensor, returns: Tensor) -> dict[str, Tensor]:
        """Take gradient steps on a rollout; return the metrics of each."""
        config = self.config
        names = ["approx_kl", "clipfrac", "policy_loss", "grad_norm"]
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        if config.estimator == "gae":
            seen["value_loss"] = []
        for mb in self._minibatches(len(advantages)):
            log_softmax, newlogprobs, newvalues = self.evaluate(self.model, episodes, mb)
            mask = episodes.response_mask[mb]
            # Nothing was sampled after the end of a completion, so there is nothing to compare.
            logratio = (newlogprobs - episodes.logprobs[mb]).masked_fill(~mask, 0.0)
            moved = logratio.detach()[mask]
            seen["approx_kl"].append((moved.exp() - 1 - moved).mean())
            seen["clipfrac"].append(((moved.exp() - 1).abs() > config.clip_coef).float().mean())
            if config.target_kl is not None and seen["approx_kl"][-1] > config.target_kl:
                break
            loss = policy_loss(logratio, advantages[mb], mask, config.clip_coef)
            seen["policy_loss"].append(loss.detach())
            if config.estimator == "gae":
                v_loss = value_loss(newvalues, episodes.values[mb], returns[mb], mask, config.clip_coef_vf)
                seen["value_loss"].append(v_loss.detach())
                loss = loss + config.vf_coef * v_loss
            if config.ent_coef:
                # For a token of probability 0, minus infinity times 0 must be 0, not NaN.
                finite = log_softmax.clamp(min=torch.finfo(log_softmax.dtype).min)
                entropy = -(log_softmax.exp() * finite).sum(-1)
                loss = loss - config.ent_coef * entropy[mask].mean()
            self.optimizer.zero_grad()
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(self.trained, config.max_grad_norm)
            if not bool(grad_norm.isfinite()):
                raise ResultError(
                    f"step {self.step + 1} has a gradient of {float(grad_norm)}, which was not applied"
                )
            self.optimizer.step()
            seen["grad_norm"].append(grad_norm)
        # If the policy had moved too far before the first update, the other metrics have no values.
        nothing = torch.tensor([math.nan])
        return {name: torch.stack(each) if each else nothing for name, each in seen.items()}

    def _minibatches(self, count: int) -> Iterator[Tensor]:
        for _ in range(self.config.epochs):
            order = torch.randperm(count, generator=self.generator, device=self.generator.device)
            yield from order.split(self.config.minibatch_size)

    @torch.no_grad()
    def _kl_to_reference(self, episodes: Episodes) -> Float[Tensor, "completion token"]:
        """Return how far each token's log-probability exceeds the initial policy's; 0 without a reference."""
        if self.reference is None:
            return torch.zeros_like(episodes.logprobs)
        parts = torch.arange(len(episodes.logprobs)).split(self.config.minibatch_size)
        ref_logprobs = torch.cat([self.evaluate(self.reference, episodes, mb)[1] for mb in parts])
        return (episodes.logprobs - ref_logprobs).masked_fill(~episodes.response_mask, 0.0)

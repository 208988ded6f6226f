"""PPO for language models, to be read in one sitting from top to bottom.

    problems = [{"prompt_ids": [5, 3, 8], "answer": 16}, ...]
    ppo = PPO(policy, problems, reward, PPOConfig(steps=200), credit=CoupledRhythmCredit())
    history = ppo.train()

Each step samples completions from the policy, judges them, makes an advantage for each token, and takes
a few clipped gradient steps: the objective of Eq. 5 of arXiv 2510.13554, with the group-normalised
advantages of Eq. 6 as the alternative to a value head. Credit enters in one line: look for
`apply_credit`. It is a reference: one device, one precision, no accelerate, no generation server. What is
left to others: what can be changed (ppo_config), the value head (actor_critic), what is asked and judged
(problems), the weights of tokens (rollout_credit), and files (run_folder).
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.errors import ResultError
from attnprobe.models import end_tokens
from attnprobe.progress import progress_bar
from attnprobe.rl.advantage import apply_credit
from attnprobe.rl.credit import Credit
from attnprobe.rl.ppo.actor_critic import ActorCritic
from attnprobe.rl.ppo.config import PPOConfig
from attnprobe.rl.ppo.problems import Problem, Reward, check_problems, judge, problems_of_step
from attnprobe.rl.ppo.run_folder import RunFolder, finish_step_on_interrupt
from attnprobe.rl.rollout_credit import RolloutCredit
from attnprobe.rl.scoring import Rollout, bare_policy

# ---- rollout ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Episodes(Rollout):
    """A rollout with what the policy thought when it sampled; 0 behind the end of a completion.

    Attributes:
        log_probs: of each sampled token.
        values: of the text before each token.
        entropy: in nats, of the distribution that each token was sampled from.
    """

    log_probs: Float[Tensor, "batch completion"]
    values: Float[Tensor, "batch completion"]
    entropy: Float[Tensor, "batch completion"]

    def completions(self) -> list[list[int]]:
        """Return the ids of each completion, its end token included."""
        rows = zip(self.completion_ids, self.response_mask, strict=True)
        return [ids[mask].tolist() for ids, mask in rows]


@torch.no_grad()
def roll_out(
    model: ActorCritic,
    prompts: list[list[int]],
    config: PPOConfig,
    ends: set[int],
    generator: torch.Generator,
) -> Episodes:
    """Sample a completion of each prompt, all at once and with a key/value cache."""
    device = generator.device
    width = max(len(prompt) for prompt in prompts)
    prompt_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    prompt_mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
    stop = torch.tensor(sorted(ends), device=device)
    alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
    ids, mask, cache = prompt_ids, prompt_mask, None
    steps: list[tuple[Tensor, ...]] = []
    while len(steps) < config.max_new_tokens and bool(alive.any()):
        logits, values, cache = model(ids, mask, 1, cache, use_cache=True)
        log_probability = (logits[:, 0] / config.temperature).log_softmax(-1)
        probability = log_probability.exp()
        ids = torch.multinomial(probability, 1, generator=generator).masked_fill(~alive[:, None], 0)
        chosen = log_probability.gather(-1, ids)[:, 0]
        known = torch.stack([chosen, values[:, 0], torch.special.entr(probability).sum(-1)])
        steps.append((ids[:, 0], alive.long(), *known.masked_fill(~alive, 0.0)))
        mask = torch.cat([mask, alive[:, None].long()], dim=1)
        alive = alive & ~torch.isin(ids[:, 0], stop)
    ids, mask, chosen, values, entropy = (torch.stack(column, 1) for column in zip(*steps, strict=True))
    return Episodes(prompt_ids, prompt_mask, ids, mask, log_probs=chosen, values=values, entropy=entropy)


# ---- advantages -------------------------------------------------------------------------------


def token_rewards(
    scores: Float[Tensor, " batch"],
    divergence: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
    kl_coefficient: float,
) -> Float[Tensor, "batch completion"]:
    """Return the reward of each token: what its divergence costs, and the score at the last token.

    >>> mask = torch.tensor([[True, True, False]])
    >>> token_rewards(torch.ones(1), torch.tensor([[0.5, 1.0, 9.0]]), mask, 0.1)
    tensor([[-0.0500,  0.9000,  0.0000]])
    """
    last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
    return (scores[:, None] * last - kl_coefficient * divergence).masked_fill(~mask, 0.0)


def generalized_advantages(
    rewards: Float[Tensor, "batch completion"],
    values: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
    discount: float,
    gae_lambda: float,
) -> Float[Tensor, "batch completion"]:
    """Return GAE (arXiv 1506.02438); behind the end of a completion nothing is worth anything.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.25, 0.5]])
    >>> generalized_advantages(rewards, values, torch.ones(1, 2, dtype=torch.bool), 1.0, 0.5)
    tensor([[0.5000, 0.5000]])
    """
    values = values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    advantage = value_after = torch.zeros_like(rewards[:, 0])
    for token in reversed(range(rewards.shape[1])):
        error = rewards[:, token] + discount * value_after - values[:, token]
        advantage = (error + discount * gae_lambda * advantage).masked_fill(~mask[:, token], 0.0)
        advantages[:, token], value_after = advantage, values[:, token]
    return advantages


def group_advantages(
    rewards: Float[Tensor, "batch completion"], mask: Bool[Tensor, "batch completion"], group_size: int
) -> Float[Tensor, "batch completion"]:
    """Return by how many standard deviations a completion is better than its group's mean (Eq. 6).

    Rows of a group stand together. All tokens of a completion get the same; those of equal ones, 0.

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
    values: Float[Tensor, "batch completion"], mask: Bool[Tensor, "batch completion"]
) -> Float[Tensor, "batch completion"]:
    """Return the values with mean 0 and variance 1 over the tokens of the mask; 0 elsewhere.

    >>> whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([[-1.,  1.,  0.]])
    """
    inside = values[mask]
    # Added, lest equal values, whose mean is rounded, be blown up to noise of variance 1.
    spread = (inside.var(correction=0) + 1e-8).sqrt()
    return ((values - inside.mean()) / spread).masked_fill(~mask, 0.0)


# ---- losses -----------------------------------------------------------------------------------


def policy_loss(
    log_ratio: Float[Tensor, "batch completion"],
    advantages: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
    clip: float,
) -> Float[Tensor, ""]:
    """Return the clipped objective (Eq. 5; with weighted advantages Eq. 12), a mean over tokens.

    >>> one = torch.ones(1, 1)
    >>> policy_loss(torch.tensor([[1.5]]).log(), 2 * one, one.bool(), clip=0.2)
    tensor(-2.4000)
    """
    ratio = log_ratio.exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -gain[mask].mean()


def value_loss(
    values: Float[Tensor, "batch completion"],
    old_values: Float[Tensor, "batch completion"],
    returns: Float[Tensor, "batch completion"],
    mask: Bool[Tensor, "batch completion"],
    clip: float,
) -> Float[Tensor, ""]:
    """Return half the squared error of value or clipped value, whichever is worse; a mean over tokens.

    >>> one = torch.ones(1, 1)
    >>> value_loss(0.5 * one, 0 * one, one, one.bool(), clip=0.2)
    tensor(0.3200)
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())[mask].mean()


# ---- training ---------------------------------------------------------------------------------


class PPO:
    """Trains a policy by PPO.

    Args:
        policy: a transformers causal language model (see `ActorCritic`); it is trained in place, and in
            evaluation mode: dropout would make the policy differ from itself.
        problems: each a mapping with `prompt_ids`, and whatever the reward has to know.
        reward: `(problems, completions) -> scores`, of lists of equal length; a completion is a list of
            ids, the end token included.
        config: how to train.
        credit: a strategy of `attnprobe.rl`, or any callable `scores -> gamma`; None: without.
        credit_options: further arguments of `RolloutCredit`, by name.
        ends: ids that end a completion; None: those of the policy's generation config.
        folder: for metrics and checkpoints; None: nothing is written.

    Attributes:
        model: the policy with its value head.
        step: how many steps are done.
        history: the metrics of each of them; None stands for what is not finite.

    Raises:
        ParameterError: no problems, settings that make no sense, or a policy with nothing to train.
        UnsupportedModelError: a policy that has no cache to sample with, or, with credit, whose attention
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
        ends: set[int] | None = None,
        folder: str | Path | None = None,
    ) -> None:
        self.config = config = config or PPOConfig()
        self.problems, self.reward, self.folder = problems, reward, folder
        self.step, self.history = 0, list[dict[str, Any]]()
        check_problems(problems, config.max_new_tokens, policy)
        self.ends = end_tokens(policy) if ends is None else ends
        self.model = ActorCritic(policy)
        self.reference = copy.deepcopy(self.model).eval() if config.kl_coefficient else None
        options = credit_options or {}
        self.credit = None if credit is None else RolloutCredit(bare_policy(policy), credit, **options)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.learning_rate, weight_decay=0.0)
        self.generator = torch.Generator(policy.device).manual_seed(config.seed)

    def train(self, *, resume: bool = False, progress: bool = False) -> list[dict[str, Any]]:
        """Run the steps that are left, and return the metrics of all.

        Ctrl-C ends the run after the step that is going on, with a checkpoint to resume from.

        Raises:
            ResultError: rewards or gradients that make no sense, or a folder that cannot be used.
            KeyboardInterrupt: after Ctrl-C.
        """
        run, last = RunFolder(self.folder, resume=resume), self.config.steps
        if run.state is not None:
            self.load_state(run.state)
            self.history = run.history
        bar = progress_bar("training", max(0, last - self.step), shown=progress)
        with finish_step_on_interrupt() as interrupted, bar as advance, run:
            while self.step < last:
                run.log(self.train_step())
                stopped = interrupted()
                if stopped or self.step == last or self.step % self.config.checkpoint_every == 0:
                    run.save(self.state())
                if stopped:
                    raise KeyboardInterrupt
                advance()
        return self.history

    def train_step(self) -> dict[str, Any]:
        """Sample, judge, make advantages, update; return the metrics."""
        config, started = self.config, time.perf_counter()
        self.model.eval()
        asked = problems_of_step(self.problems, self.step, config.prompts_per_step, config.seed)
        problems = [problem for problem in asked for _ in range(config.group_size)]
        prompts = [list(problem["prompt_ids"]) for problem in problems]
        episodes = roll_out(self.model, prompts, config, self.ends, self.generator)
        sampled, mask = time.perf_counter(), episodes.response_mask
        scores = judge(self.reward, problems, episodes.completions()).to(mask.device)
        divergence = self._divergence(episodes)
        rewards = token_rewards(scores, divergence, mask, config.kl_coefficient)
        metrics = {"reward": scores, "length": mask.sum(-1), "entropy": episodes.entropy[mask]}
        if config.estimator == "group":
            advantages = returns = group_advantages(rewards, mask, config.group_size)
        else:
            advantages = generalized_advantages(
                rewards, episodes.values, mask, config.discount, config.gae_lambda
            )
            returns = advantages + episodes.values
            metrics["explained_variance"] = 1 - advantages[mask].var() / returns[mask].var()
            advantages = whiten(advantages, mask) if config.whiten else advantages
        if self.reference is not None:
            metrics["kl_to_reference"] = divergence[mask]
        if self.credit is not None:
            gamma = self.credit.weigh(episodes, advantages, self.step, entropy=episodes.entropy)
            metrics["credit/gamma_mean"] = gamma[mask & (advantages > 0).any(-1, keepdim=True)]
            advantages = apply_credit(advantages, gamma, mask)  # Eq. 12: all that credit does
        metrics |= self._update(episodes, advantages, returns)
        self.step += 1
        means = {name: float(values.double().mean()) for name, values in metrics.items()}
        entry: dict[str, Any] = {"step": self.step}
        entry |= {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
        entry |= {"seconds": time.perf_counter() - started, "rollout_seconds": sampled - started}
        self.history.append(entry)
        return entry

    def evaluate(
        self, model: ActorCritic, episodes: Episodes, rows: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probabilities of the vocabulary and of what was sampled, and values, in one pass."""
        ids = torch.cat([episodes.prompt_ids, episodes.completion_ids], dim=1)[rows]
        mask = torch.cat([episodes.prompt_mask, episodes.completion_mask], dim=1)[rows]
        count = episodes.completion_ids.shape[1]
        logits, values, _ = model(ids, mask, count + 1)
        log_probability = (logits[:, :-1] / self.config.temperature).log_softmax(-1)
        chosen = log_probability.gather(-1, ids[:, -count:, None])[..., 0]
        return log_probability, chosen, values[:, :-1]

    def _update(self, episodes: Episodes, advantages: Tensor, returns: Tensor) -> dict[str, Tensor]:
        """Take gradient steps on a rollout; return what each of them saw."""
        config = self.config
        names = ["approximate_kl", "clipped_share", "policy_loss", "gradient_norm"]
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        if config.estimator == "gae":
            seen["value_loss"] = []
        for rows in self._minibatches(len(advantages)):
            log_probability, log_probs, values = self.evaluate(self.model, episodes, rows)
            mask = episodes.response_mask[rows]
            # Behind the end nothing was sampled, so there is nothing to compare.
            log_ratio = (log_probs - episodes.log_probs[rows]).masked_fill(~mask, 0.0)
            moved = log_ratio.detach()[mask]
            seen["approximate_kl"].append((moved.exp() - 1 - moved).mean())
            seen["clipped_share"].append(((moved.exp() - 1).abs() > config.clip).float().mean())
            if config.target_kl is not None and seen["approximate_kl"][-1] > config.target_kl:
                break
            loss = policy_loss(log_ratio, advantages[rows], mask, config.clip)
            seen["policy_loss"].append(loss.detach())
            if config.estimator == "gae":
                old_values = episodes.values[rows]
                error = value_loss(values, old_values, returns[rows], mask, config.value_clip)
                seen["value_loss"].append(error.detach())
                loss = loss + config.value_coefficient * error
            if config.entropy_coefficient:
                # Of a token that is ruled out, minus infinity times 0 is 0 here, and not NaN.
                finite = log_probability.clamp(min=torch.finfo(log_probability.dtype).min)
                entropy = -(log_probability.exp() * finite).sum(-1)
                loss = loss - config.entropy_coefficient * entropy[mask].mean()
            self.optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.trained, config.max_gradient_norm)
            if not bool(norm.isfinite()):
                raise ResultError(
                    f"step {self.step + 1} has a gradient of {float(norm)}, which was not applied"
                )
            self.optimizer.step()
            seen["gradient_norm"].append(norm)
        # Where the policy had moved too far at once, some have been seen by no update.
        nothing = torch.tensor([math.nan])
        return {name: torch.stack(values) if values else nothing for name, values in seen.items()}

    def _minibatches(self, count: int) -> Iterator[Tensor]:
        for _ in range(self.config.epochs):
            order = torch.randperm(count, generator=self.generator, device=self.generator.device)
            yield from order.split(self.config.minibatch_size)

    @torch.no_grad()
    def _divergence(self, episodes: Episodes) -> Float[Tensor, "batch completion"]:
        """Return what each token's log-probability has gained on that of the first policy; else 0."""
        if self.reference is None:
            return torch.zeros_like(episodes.log_probs)
        parts = torch.arange(len(episodes.log_probs)).split(self.config.minibatch_size)
        before = torch.cat([self.evaluate(self.reference, episodes, rows)[1] for rows in parts])
        return (episodes.log_probs - before).masked_fill(~episodes.response_mask, 0.0)

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on."""
        return {
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "model": self.model.state_dict(),
            "reference": None if self.reference is None else self.reference.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "grouping": None if self.credit is None else self.credit.grouping.attributes(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned.

        Raises:
            ResultError: a state of other settings, for it would not be the same run.
        """
        free = {"steps": self.config.steps, "checkpoint_every": self.config.checkpoint_every}
        other = {**state["config"], **free}.items() - dataclasses.asdict(self.config).items()
        if other:
            told = ", ".join(f"{name}={value!r}" for name, value in sorted(other))
            raise ResultError(f"the run to go on with has {told}: give it the same settings")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        if self.reference is not None and state["reference"] is not None:
            self.reference.load_state_dict(state["reference"])
        if self.credit is not None and state["grouping"] is not None:
            self.credit.grouping.restore(state["grouping"])

"""Sampling: completions from the policy, with what is known about each token when it is sampled.

`PPO` calls `roll_out` for each step of training, and an evaluation calls it for its own problems. What is
left to others: which problems are asked (problems, evaluation), and learning from the completions
(algorithm).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.rl.ppo.actor_critic import ActorCritic
from attnprobe.rl.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class Episodes(Rollout):
    """A rollout with what was recorded while sampling; 0 after the end of a completion.

    Attributes:
        logprobs: the log-probability of each sampled token.
        values: the value of the text before each token.
        entropy: in nats, of the distribution that each token was sampled from.
    """

    logprobs: Float[Tensor, "completion token"]
    values: Float[Tensor, "completion token"]
    entropy: Float[Tensor, "completion token"]

    def completions(self) -> list[list[int]]:
        """Return the ids of each completion, its end token included."""
        pairs = zip(self.completion_ids, self.response_mask, strict=True)
        return [ids[mask].tolist() for ids, mask in pairs]


@torch.no_grad()
def roll_out(
    model: ActorCritic,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    ends: set[int],
    generator: torch.Generator,
) -> Episodes:
    """Sample a completion for each prompt, all at once and with a key/value cache."""
    device = generator.device
    width = max(len(prompt) for prompt in prompts)
    prompt_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    prompt_mask = torch.arange(width, device=device) >= width - lengths[:, None]
    stop = torch.tensor(sorted(ends), device=device)
    alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
    ids, mask, cache = prompt_ids, prompt_mask, None
    sampled: list[tuple[Tensor, ...]] = []
    while len(sampled) < max_new_tokens and bool(alive.any()):
        logits, values, cache = model(ids, mask.long(), 1, cache, use_cache=True)
        log_softmax = log_probabilities(logits[:, 0], temperature)
        probs = log_softmax.exp()
        ids = torch.multinomial(probs, 1, generator=generator).masked_fill(~alive[:, None], 0)
        logprobs = log_softmax.gather(-1, ids)[:, 0]
        known = torch.stack([logprobs, values[:, 0], torch.special.entr(probs).sum(-1)])
        sampled.append((ids[:, 0], alive, *known.masked_fill(~alive, 0.0)))
        mask = torch.cat([mask, alive[:, None]], dim=1)
        alive = alive & ~torch.isin(ids[:, 0], stop)
    ids, mask, logprobs, values, entropy = (torch.stack(column, 1) for column in zip(*sampled, strict=True))
    return Episodes(prompt_ids, prompt_mask, ids, mask, logprobs=logprobs, values=values, entropy=entropy)


def log_probabilities(
    logits: Float[Tensor, "*any vocabulary"], temperature: float
) -> Float[Tensor, "*any vocabulary"]:
    """Return the log-probabilities of the next token; at temperature 0, all on the largest logit.

    >>> log_probabilities(torch.tensor([1.0, 3.0, 2.0]), 0.0)
    tensor([-inf, 0., -inf])
    """
    if temperature == 0:
        # The limit as the temperature falls to 0, but for ties: the first of the largest logits gets all.
        none = torch.full_like(logits, -torch.inf)
        return none.scatter(-1, logits.argmax(-1, keepdim=True), 0.0)
    return (logits / temperature).log_softmax(-1)

"""ActorCritic: a policy with a value for each token, and what PPO requires of a language model.

`PPO` wraps the policy in one, to sample from it and to train it. What is left to others: sampling,
advantages and losses (algorithm).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from attnprobe.errors import ParameterError, UnsupportedModelError
from attnprobe.rl.scoring import bare_policy
from attnprobe.validation import brief


class ActorCritic(torch.nn.Module):
    """A causal language model with a value head: a linear map of the output layer's input, initially 0.

    The value at a position is that of the text before the token that is predicted there.

    Args:
        policy: a transformers causal language model; it may be wrapped by PEFT and `torch.compile`.

    Raises:
        UnsupportedModelError: anything but a transformers model, or one that takes no attention mask or no
            key/value cache, or that has no output layer.
        ParameterError: a policy with nothing to train, or in half precision.

    >>> from attnprobe.testing.tiny_models import tiny_model
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> logits, values, _ = ActorCritic(tiny_model("llama"))(ids, torch.ones_like(ids), 2)
    >>> list(logits.shape), values.tolist()
    ([1, 2, 99], [[0.0, 0.0]])
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        is_transformers = isinstance(policy, torch.nn.Module) and hasattr(policy, "get_output_embeddings")
        if not is_transformers:
            raise UnsupportedModelError(
                "PPO trains a transformers causal language model, such as AutoModelForCausalLM loads; got "
                f"{brief(policy)}"
            )
        self.policy = policy
        self._accepted = frozenset(inspect.signature(bare_policy(policy).forward).parameters)
        # Its name until transformers 5.23, and since 5.24.
        names = [name for name in ("past_key_values", "cache") if name in self._accepted]
        self._cache_name = names[0] if names else "past_key_values"
        missing = [name for name in ("attention_mask", self._cache_name) if name not in self._accepted]
        if missing:
            raise UnsupportedModelError(
                f"{type(bare_policy(policy)).__name__} takes no {' and no '.join(missing)}: PPO samples from "
                "padded prompts with a key/value cache"
            )
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        if not trained:
            raise ParameterError(
                "the policy has no parameter that requires a gradient: there is nothing to train"
            )
        half = {parameter.dtype for parameter in trained if parameter.dtype.itemsize < 4}
        if half:
            raise ParameterError(
                f"the policy's parameters are {', '.join(map(str, half))}, which would round small updates "
                "away: call policy.float(), or train adapters in float32"
            )
        head = self.policy.get_output_embeddings()
        if head is None:
            raise UnsupportedModelError(
                f"{type(bare_policy(policy)).__name__} has no output layer to sample tokens from: load it "
                "with AutoModelForCausalLM"
            )
        weight = head.weight
        # Not initialised at random, which would draw from the global generator.
        self.value_head = torch.nn.utils.skip_init(torch.nn.Linear, weight.shape[1], 1, device=weight.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)

    def forward(
        self, ids: Tensor, mask: Tensor, keep: int, cache: Any = None, use_cache: bool = False
    ) -> tuple[Tensor, Tensor, Any]:
        """Return logits and values of the last `keep` positions, and the cache, which the mask covers too."""
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
            self._cache_name: cache,
            "use_cache": use_cache,
            "logits_to_keep": keep,
        }
        read: list[Tensor] = []
        head = self.policy.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda module, given: read.append(given[0]))
        try:
            output = self.policy(**{name: inputs[name] for name in inputs if name in self._accepted})
        finally:
            hook.remove()
        cache = output.get(self._cache_name)
        if use_cache and cache is None:
            raise UnsupportedModelError(
                f"{type(bare_policy(self.policy)).__name__} returned no key/value cache"
            )
        values = self.value_head(read[0][:, -keep:].float())[..., 0]
        return output.logits[:, -keep:].float(), values, cache

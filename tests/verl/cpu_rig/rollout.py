"""A rollout server of verl on the CPU: `generate` of transformers, with the policy's weights sent to it.

Use it with `actor_rollout_ref.rollout.name=attnprobe_cpu`. Sampling is seeded by the prompt, the step, and
how often the step has asked for it, so that a resumed run sees the rollouts that it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ray
import torch
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

NAME = "attnprobe_cpu"


@ray.remote(num_cpus=0)
class Server:
    """Holds a copy of the policy, and samples from it."""

    def __init__(self, path: str, limit: int, replica: int) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.limit, self.replica, self.steps = limit, replica, 0
        self.asked: dict[tuple[int, ...], int] = {}

    async def set_weights(self, weights: dict[str, torch.Tensor], steps: int) -> None:
        own = self.model.state_dict()
        taken = {name: value for name, value in weights.items() if name in own}
        assert taken, f"none of the weights is the model's: {sorted(weights)[:3]}"
        self.model.load_state_dict(taken, strict=False)
        self.steps, self.asked = steps, {}

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        prompt = tuple(prompt_ids)
        self.asked[prompt] = self.asked.get(prompt, 0) + 1
        ids = torch.tensor([prompt])
        count = min(sampling_params.get("max_tokens") or self.limit, self.limit)
        # Python's hash of numbers is the same in every process.
        torch.manual_seed(hash((prompt, self.asked[prompt], self.replica, self.steps)) % 2**31)
        with torch.no_grad():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                max_new_tokens=count,
                min_new_tokens=4,
                output_scores=True,
                return_dict_in_generate=True,
                pad_token_id=0,
                eos_token_id=0,
            )
        new = out.sequences[0, len(prompt) :].tolist()
        log_probs = [
            float(scores[0].log_softmax(-1)[token]) for scores, token in zip(out.scores, new, strict=True)
        ]
        return TokenOutput(
            token_ids=new,
            log_probs=log_probs,
            stop_reason="completed",
            extra_fields={"global_steps": self.steps},
        )

    async def nothing(self, *_: Any, **__: Any) -> None: ...

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = nothing
    resume_generation = abort_all_requests = start_profile = stop_profile = nothing


class Replica(RolloutReplica):
    """Starts one server for each replica."""

    async def launch_servers(self) -> None:
        server = Server.options(name=f"{NAME}_{self.replica_rank}").remote(
            self.model_config.path, self.config.response_length, self.replica_rank
        )
        self._server_handle, self.servers = server, [server]
        self._server_address = f"cpu://{self.replica_rank}"


class Adapter(BaseRollout):
    """Sends the policy's weights from a worker to its server."""

    async def resume(self, tags: list[str]) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None, **_: Any
    ) -> None:
        state = {name: value.detach().float().cpu().clone() for name, value in weights}
        rank = torch.distributed.get_rank()
        await ray.get_actor(f"{NAME}_{rank}").set_weights.remote(state, global_steps or 0)


def register() -> None:
    """Tell verl about the server and its replicas."""
    _ROLLOUT_REGISTRY[(NAME, "async")] = f"{__name__}.Adapter"
    RolloutReplicaRegistry.register(NAME, lambda: Replica)

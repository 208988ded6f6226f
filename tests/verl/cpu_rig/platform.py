"""verl's platform for CPUs: what it asks of an accelerator, answered by doing nothing.

Importing it registers the platform, which is used if `VERL_PLATFORM=cpu`. Ray is told that there are GPUs
(`ray_init.num_gpus`), since verl places its workers by them. Only FSDP2 runs on CPUs.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import verl.utils.distributed
from torch import distributed
from verl.plugin.platform import PlatformBase, PlatformRegistry


class CpuDevice:
    """What verl asks of `torch.cuda`."""

    is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: "cpu")
    device_count = staticmethod(lambda: 1)
    get_device_name = staticmethod(lambda *_: "cpu")
    set_device = synchronize = empty_cache = staticmethod(lambda *_: None)
    max_memory_allocated = max_memory_reserved = staticmethod(lambda *_: 0)
    memory_allocated = memory_reserved = staticmethod(lambda *_: 0)
    mem_get_info = staticmethod(lambda *_: (0, 0))
    get_rng_state = staticmethod(torch.get_rng_state)
    set_rng_state = staticmethod(torch.set_rng_state)
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """The CPU as an accelerator."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = CpuDevice

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return os.environ.get("VERL_PLATFORM") == "cpu"

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str) -> AbstractContextManager[None]:
        return nullcontext()

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def ray_resource_options(self, num_gpus: float) -> dict[str, float]:
        return {"num_gpus": num_gpus}

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None: ...


def start_process_group(timeout_second: int | None = None, backend: str | None = None) -> None:
    """Start gloo; verl would ask for the backend "cpu:gloo,cpu:gloo", which torch refuses."""
    if not distributed.is_initialized():
        distributed.init_process_group(
            "gloo",
            rank=int(os.environ.get("RANK", 0)),
            world_size=int(os.environ.get("WORLD_SIZE", 1)),
            timeout=timedelta(seconds=timeout_second) if timeout_second else None,
            init_method=os.environ.get("DIST_INIT_METHOD"),
        )


verl.utils.distributed.initialize_global_process_group_ray = start_process_group


def register_engines() -> None:
    """Register verl's own engines for CPUs; attnprobe registers its own itself."""
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp import transformer_impl as engines

    for kind, engine in (
        ("language_model", engines.FSDPEngineWithLMHead),
        ("value_model", engines.FSDPEngineWithValueHead),
    ):
        EngineRegistry.register(model_type=kind, backend=["fsdp", "fsdp2"], device="cpu")(engine)
    # A reference engine keeps its parameters in pinned memory, which only an accelerator has.
    engines.CPUOffloadPolicy = lambda pin_memory: None

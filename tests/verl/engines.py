"""verl's engines in this process, without Ray: rows as its V1 trainer has them, one pass, one update.

Tests that compare numbers use them, in one process or in several of gloo. What is left to others: whole runs
(runs), and how verl runs on a CPU (cpu_rig).
"""

from __future__ import annotations

import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import runs

# Before verl is imported, which loads the rig and attnprobe's plug-in.
os.environ |= {
    "VERL_PLATFORM": "cpu",
    "VERL_USE_EXTERNAL_MODULES": "cpu_rig",
    "VERL_ENGINE_VENDOR": "attnprobe",
    "HF_HUB_OFFLINE": "1",
}
os.environ.setdefault("ATTNPROBE_CREDIT", json.dumps(runs.CREDIT))

import torch
import verl.workers.engine.fsdp.transformer_impl as verl_engines
from cpu_rig.platform import start_process_group
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.utils.losses import ppo_loss

from attnprobe.rl.verl.engine import CreditEngine
from attnprobe.rl.verl.rows import jagged

PlainEngine = verl_engines.FSDPEngineWithLMHead

SHAPES = [(5, 24), (9, 17), (3, 20), (7, 24), (12, 11), (4, 24), (6, 9), (10, 22)]
"""Lengths of prompt and response."""


def start_engine(kind: type[Any], **configs: Any) -> Any:
    """Return an initialised engine of a kind; one group of processes serves them all."""
    if "MASTER_ADDR" not in os.environ:
        os.environ.setdefault("DIST_INIT_METHOD", f"file://{tempfile.mkdtemp()}/store")
    start_process_group()
    torch.manual_seed(1)
    engine = kind(**configs)
    engine.initialize()
    return engine


def make_engine(
    kind: type[Any],
    model: Path,
    *,
    packed: bool = True,
    lora: bool = False,
    dtype: str = "fp32",
    **settings: Any,
) -> Any:
    """Return an initialised engine of a kind, for a model in a folder."""
    return start_engine(
        kind,
        model_config=HFModelConfig(
            path=str(model),
            use_remove_padding=packed,
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": "sdpa"},
            lora_rank=4 if lora else 0,
        ),
        engine_config=FSDPEngineConfig(
            strategy=settings.pop("strategy", "fsdp2"),
            use_torch_compile=False,
            mixed_precision={"param_dtype": dtype, "reduce_dtype": "fp32"},
            **settings,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, lr_warmup_steps=0, total_training_steps=10),
        checkpoint_config=CheckpointConfig(
            save_contents=["model", "optimizer", "extra"], load_contents=["model", "optimizer", "extra"]
        ),
    )


def make_rows(
    shapes: list[tuple[int, int]] = SHAPES, *, packed: bool = True, dynamic: bool = True, padding: int = 0
) -> Any:
    """Return rows of random ids, some of them written by a tool; `padding` of them are verl's own filling."""
    draw = torch.Generator().manual_seed(7)
    prompts = [torch.randint(1, 257, (asked,), generator=draw) for asked, _ in shapes]
    responses = [torch.randint(1, 257, (written,), generator=draw) for _, written in shapes]
    own = [torch.ones_like(row) for row in responses]
    own[0][5:8] = 0
    prompts += padding * [torch.zeros(127, dtype=torch.long)]
    responses += padding * [torch.zeros(1, dtype=torch.long)]
    own += padding * [torch.zeros(1, dtype=torch.long)]
    whole = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    masks = [torch.cat([torch.zeros_like(row), mask]) for row, mask in zip(prompts, own, strict=True)]
    return tensordict_utils.get_tensordict(
        {
            "prompts": jagged(prompts),
            "responses": jagged(responses),
            "response_mask": jagged(own),
            "loss_mask": jagged(masks),
            "input_ids": jagged(whole),
            "position_ids": jagged([torch.arange(len(row)) for row in whole]),
        },
        non_tensor_dict={
            "use_remove_padding": packed,
            "use_dynamic_bsz": dynamic,
            "max_token_len_per_gpu": 160,
            "micro_batch_size_per_gpu": 2,
            "use_fused_kernels": False,
            "temperature": 1.0,
            "calculate_entropy": True,
            "global_batch_size": len(prompts),
        },
    )


def log_probs(engine: Any, rows: Any) -> dict[str, Any]:
    """Return what the engine's log-probability pass says of rows, as a run makes it of the old policy."""
    with engine.eval_mode():
        found: dict[str, Any] = engine.infer_batch(rows, loss_function=None)["model_output"]
    return found


def with_fields(rows: Any, found: dict[str, Any], advantages: torch.Tensor) -> Any:
    """Return rows as the update gets them: with old log-probabilities, advantages, and all of `found`."""
    rows = rows.copy()
    lengths = rows["responses"].offsets().diff().tolist()
    for name, value in found.items():
        rows[name] = value
    rows["old_log_probs"] = jagged(
        [row[-length - 1 : -1] for row, length in zip(found["log_probs"].unbind(), lengths, strict=True)]
    )
    rows["advantages"] = jagged(
        [advantage * mask for advantage, mask in zip(advantages, rows["response_mask"].unbind(), strict=True)]
    )
    return rows


def make_loss(**settings: Any) -> Any:
    """Return verl's loss as an actor's worker passes it on."""
    config = ActorConfig(strategy="fsdp2", rollout_n=1, use_dynamic_bsz=True, **settings)
    return partial(ppo_loss, config=config)


def update(engine: Any, rows: Any, loss: Any) -> dict[str, Any]:
    """Make one update, and return its metrics."""
    with engine.train_mode():
        metrics: dict[str, Any] = engine.train_batch(rows, loss_function=loss)["metrics"]
    return metrics


def parameters(engine: Any) -> dict[str, torch.Tensor]:
    """Return a copy of all parameters, whole."""
    found = {}
    for name, value in engine.module.state_dict().items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        found[name] = whole.detach().clone()
    return found


__all__ = ["CreditEngine", "PlainEngine"]

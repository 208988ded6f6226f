"""A credited run of a tiny trainer, as one process of several: started by torchrun from test_trl_scale.

It writes what each process generated and how it was weighed, with the weights of the policy at that
moment, for the test to compare with one process that holds all rows.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from trl import GRPOTrainer

from attnprobe.rl import CoupledRhythmCredit, attach_credit
from attnprobe.testing.tiny_trainers import tiny_trainer

HORIZON = (1, 4)


def shard(trainer) -> None:
    """Have accelerate shard the model by FSDP2, which it does for processes with GPUs only."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    config = {"max_steps": 3, "max_completion_length": 8}
    trainer = tiny_trainer(GRPOTrainer, folder, **config)
    if kind == "fsdp2":
        shard(trainer)
    attach_credit(trainer, CoupledRhythmCredit(), horizon=HORIZON, reclassify_every=1, batch_size=2)
    weighed, records = trainer._generate_and_score_completions, []

    def recording(inputs):
        output = weighed(inputs)
        state = {
            name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
            for name, value in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()
        }
        records.append({"output": output, "policy": state})
        return output

    trainer._generate_and_score_completions = recording
    trainer.train()
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    weights = list(trainer.model.parameters())
    sharded = sum(hasattr(value, "full_tensor") for value in weights)
    torch.save(
        {
            "records": records,
            "world": world,
            "sharded": sharded,
            "parameters": len(weights),
            "log": trainer.state.log_history,
        },
        folder / f"rank{rank}.pt",
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

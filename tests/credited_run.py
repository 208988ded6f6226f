"""A credited run, as one process of several: started by torchrun from test_trl_scale.

"ddp" and "fsdp2" train a tiny trainer and write what each process generated and how it was weighed, with the
weights of the policy at that moment, for the test to compare with one process that holds all completions.
"loop" and "sharded" weigh made-up rollouts by a `RolloutCredit`, without a trainer; "sharded" first shards
the policy by FSDP2.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"

import torch
from trl import GRPOTrainer

from attnprobe import TrainerError
from attnprobe.rl import CoupledRhythmCredit, Rollout, RolloutCredit, attach_credit
from attnprobe.testing.tiny_models import tiny_model
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


def loop(folder: Path, sharded: bool) -> None:
    """Weigh three rollouts of 4 completions in one process, of 3 in the other, which gains nothing."""
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ids = torch.randint(1, 90, (4 - rank, 40), generator=torch.Generator().manual_seed(rank))
    ones = torch.ones_like(ids)
    parts = (ids[:, :4], ones[:, :4], ids[:, 4:], ones[:, 4:])
    advantages = [0.0] * 3 if rank else [1.0, -1.0, 1.0, 1.0]
    policy, strategy = tiny_model("llama"), CoupledRhythmCredit()
    options = {"horizon": HORIZON, "layers": "all", "reclassify_every": 2, "batch_size": 1}
    everyone = torch.distributed.group.WORLD
    root = None
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for layer in policy.model.layers:
            fully_shard(layer)
        root = fully_shard(policy)
    refused = {}
    for name, given in (("group", {"root": root}), ("root", {"group": everyone})):
        try:
            RolloutCredit(policy, strategy, **options, **given).weigh(Rollout(*parts), advantages, 0)
        except TrainerError as error:
            refused[name] = str(error)
    credit = RolloutCredit(policy, strategy, **options, root=root, group=everyone)
    grouped_at, gammas, metrics = [], [], []
    for step in range(3):
        gammas.append(credit.weigh(Rollout(*parts), advantages, step))
        grouped_at.append(credit.grouping.grouped_at)
        metrics.append(credit.last.metrics)
    found = {
        "world": world,
        "rollout": parts,
        "grouped_at": grouped_at,
        "gammas": gammas,
        "metrics": metrics,
        "refused": refused,
        "groups": credit.grouping.saved_groups,
    }
    torch.save(found, folder / f"rank{rank}.pt")


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if kind in ("loop", "sharded"):
        loop(folder, sharded=kind == "sharded")
        return
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

"""Whole runs of verl's `main_ppo` on the CPU: a tiny model, prompts, a reward, and the command line.

`run` starts one and returns what it printed and logged. What is left to others: how verl runs on a CPU
(cpu_rig), and what is tested.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"

CREDIT = {"horizon": [1, 4], "window": 5, "reclassify_every": 2}
"""Options of credit that fit responses of 24 tokens."""

OVERRIDES: dict[str, Any] = {
    "algorithm.adv_estimator": "grpo",
    "data.train_batch_size": 4,
    "data.max_prompt_length": 32,
    "data.max_response_length": 24,
    "data.dataloader_num_workers": 0,
    "data.shuffle": False,
    "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
    "actor_rollout_ref.model.use_remove_padding": True,
    "actor_rollout_ref.model.enable_gradient_checkpointing": False,
    "actor_rollout_ref.model.custom_chat_template": f"'{TEMPLATE}'",
    "actor_rollout_ref.actor.strategy": "fsdp2",
    "actor_rollout_ref.actor.use_dynamic_bsz": True,
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 128,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 2,
    "actor_rollout_ref.actor.use_torch_compile": False,
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
    "actor_rollout_ref.actor.optim.lr": 1e-3,
    "actor_rollout_ref.actor.checkpoint.save_contents": "[model,optimizer,extra]",
    "actor_rollout_ref.rollout.name": "attnprobe_cpu",
    "actor_rollout_ref.rollout.n": 2,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz": True,
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": 128,
    "actor_rollout_ref.rollout.agent.num_workers": 1,
    "actor_rollout_ref.rollout.load_format": "auto",
    "reward.num_workers": 1,
    "trainer.device": "cpu",
    "trainer.n_gpus_per_node": 1,
    "trainer.nnodes": 1,
    "trainer.val_before_train": False,
    "trainer.test_freq": -1,
    "trainer.save_freq": -1,
    "trainer.total_training_steps": 2,
    "trainer.total_epochs": 3,
    "trainer.logger": "[console,file]",
    "ray_kwargs.ray_init.num_cpus": 24,
    "+ray_kwargs.ray_init.num_gpus": 2,
    "+ray_kwargs.ray_init.include_dashboard": False,
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
}
"""The command line of every run, in which a test changes what it is about."""


@dataclass(frozen=True)
class Run:
    """What a run printed, and the metrics of each step.

    Attributes:
        code: the process's exit code.
        text: what it printed.
        steps: the metrics of each step, by the step's number.
        folder: where it wrote.
    """

    code: int
    text: str
    steps: dict[int, dict[str, float]]
    folder: Path

    def credit(self, step: int) -> dict[str, float]:
        """Return the credit metrics of a step."""
        return {name: value for name, value in self.steps[step].items() if "/credit/" in name}


def make_inputs(folder: Path) -> None:
    """Write a tiny random Qwen2 with its tokenizer, eight prompts and a reward into a folder."""
    import pandas
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    # One token for each byte: verl asks Qwen's tokenizers for a newline that is one token.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate(["<eos>", *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", chat_template=TEMPLATE
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.3,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    rows = [
        {
            "data_source": "words",
            "prompt": [{"role": "user", "content": "count to " + "9876543210"[row:]}],
            "ability": "words",
            "reward_model": {"style": "rule", "ground_truth": str(row)},
            "extra_info": {"index": row},
        }
        for row in range(8)
    ]
    pandas.DataFrame(rows).to_parquet(folder / "prompts.parquet")
    (folder / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return float(sum(map(ord, solution_str)) % 7)\n"
    )


def environment(folder: Path, credit: dict[str, Any] | None, **more: str | None) -> dict[str, str]:
    """Return the environment of a run; None takes a variable away."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VERL_", "ATTNPROBE_"))}
    wanted: dict[str, str | None] = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "VERL_PLATFORM": "cpu",
        "VERL_FILE_LOGGER_PATH": str(folder / "log.jsonl"),
        "VERL_USE_EXTERNAL_MODULES": "cpu_rig",
    }
    if credit is not None:
        wanted |= {
            "VERL_USE_EXTERNAL_MODULES": "cpu_rig,attnprobe.rl.verl",
            "VERL_ENGINE_VENDOR": "attnprobe",
            "ATTNPROBE_CREDIT": json.dumps(credit),
        }
    return kept | {name: value for name, value in (wanted | more).items() if value is not None}


def run(
    inputs: Path,
    folder: Path,
    credit: dict[str, Any] | None,
    overrides: dict[str, Any] | None = None,
    seconds: int = 300,
    **variables: str | None,
) -> Run:
    """Run `main_ppo` to its end.

    Args:
        inputs: what `make_inputs` wrote.
        folder: where the run writes.
        credit: options of credit; None: verl without credit.
        overrides: what differs from `OVERRIDES`.
        seconds: after how many to give up.
        variables: what differs in the environment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        **OVERRIDES,
        "data.train_files": inputs / "prompts.parquet",
        "data.val_files": inputs / "prompts.parquet",
        "actor_rollout_ref.model.path": inputs / "model",
        "reward.custom_reward_function.path": inputs / "reward.py",
        "trainer.default_local_dir": folder / "checkpoints",
        **(overrides or {}),
    }
    line = [
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        *(f"{key}={value}" for key, value in settings.items()),
    ]
    log = folder / "output.txt"
    for _ in range(2):
        with log.open("w") as output:
            code = subprocess.run(
                line,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                timeout=seconds,
                env=environment(folder, credit, **variables),
            ).returncode
        # On a busy machine gloo sometimes cannot connect two processes that are just starting.
        if code == 0 or "Gloo connectFullMesh failed" not in log.read_text(errors="replace"):
            break
    steps = {}
    if (folder / "log.jsonl").exists():
        entries = [json.loads(each) for each in (folder / "log.jsonl").read_text().splitlines()]
        steps = {entry["step"]: entry["data"] for entry in entries}
    return Run(code, log.read_text(errors="replace"), steps, folder)

"""Start a GRPO run of Qwen3-4B with credit from its own attention.

    python examples/grpo_qwen3.py --tiny
    accelerate launch --config_file fsdp2.yaml examples/grpo_qwen3.py --vllm colocate
    accelerate launch --config_file ddp.yaml examples/grpo_qwen3.py --lora 32 --vllm colocate
    accelerate launch --config_file fsdp2.yaml examples/grpo_qwen3.py --vllm colocate --resume

A script to begin from: data, model, trainer and credit are a few lines each, in `main`. docs/training.md has
the two accelerate configs. `--tiny` runs all of it on a CPU in about a minute, with a random model of a few
thousand parameters and small settings. With `--credit none`, the same run is the baseline that credit has to
beat. Requirements: pip install 'attnprobe[trl]'; for `--lora` also peft, for `--vllm` also vllm, and for
`--task countdown` also reasoning-gym.

The output folder gets `log.jsonl` (a line for each step and each evaluation, with the metrics of credit),
a checkpoint every `--save-every` steps, from which `--resume` continues, and in the end the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from shared import STRATEGIES, TASKS, LogFile
from transformers import AutoTokenizer, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer

from attnprobe import AttnprobeError
from attnprobe.metric_arguments import check_horizon
from attnprobe.rl import attach_credit
from attnprobe.testing.tiny_models import tiny_model, tiny_tokenizer
from attnprobe.testing.tiny_trainers import even_ids

TINY = {
    "steps": 4,
    "batch_size": 4,
    "accumulation": 2,
    "group_size": 4,
    "completion_tokens": 24,
    "eval_every": 2,
    "eval_problems": 4,
    "save_every": 2,
    "horizon": [1, 8],
    "learning_rate": 1e-3,
    "output": Path("grpo-tiny"),
}
"""What `--tiny` sets, unless the command line does."""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny random Qwen3, to see the script run")
    parser.add_argument("--model", default="Qwen/Qwen3-4B", help="a folder or a hub name")
    parser.add_argument("--task", default="arithmetic", choices=list(TASKS))
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters; 0: everything")
    parser.add_argument("--output", type=Path, default=Path("grpo-qwen3"))
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --output")
    parser.add_argument("--seed", type=int, default=0)

    credit = parser.add_argument_group("credit")
    credit.add_argument("--credit", default="coupled", choices=["none", *STRATEGIES])
    credit.add_argument("--amplification", type=float, default=1.5, help="weight of the chosen tokens")
    credit.add_argument("--quantile", type=float, default=0.4, help="share of the tokens that are chosen")
    credit.add_argument("--signs", default="both", choices=["both", "positive", "negative"])
    credit.add_argument("--horizon", type=int, nargs=2, default=[10, 100], metavar=("LOW", "HIGH"))
    credit.add_argument("--reclassify-every", type=int, default=10, help="steps between groupings of heads")

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=500, help="optimizer steps")
    training.add_argument("--batch-size", type=int, default=8, help="completions at a time, on each device")
    training.add_argument("--accumulation", type=int, default=8, help="batches in an optimizer step")
    training.add_argument("--group-size", type=int, default=8, help="completions of one problem")
    training.add_argument("--completion-tokens", type=int, default=1024, help="the longest completion")
    training.add_argument("--learning-rate", type=float, default=1e-6, help="for adapters, about 1e-5")
    training.add_argument("--temperature", type=float, default=1.0)
    training.add_argument("--eval-every", type=int, default=20, help="steps between evaluations; 0: none")
    training.add_argument("--eval-problems", type=int, default=128, help="problems that are not trained on")
    training.add_argument(
        "--save-every", type=int, default=50, help="steps between checkpoints; one is written at the end too"
    )
    training.add_argument("--log-completions", action="store_true", help="show some completions of each step")
    training.add_argument("--report-to", nargs="*", default=[], help="trackers, such as wandb or tensorboard")

    vllm = parser.add_argument_group("generation by vLLM")
    vllm.add_argument("--vllm", choices=["colocate", "server"], help="default: transformers generates")
    vllm.add_argument("--vllm-memory", type=float, default=0.3, help="colocate: its share of a GPU's memory")
    vllm.add_argument("--vllm-url", default="http://localhost:8000", help="server: where it listens")

    if parser.parse_known_args()[0].tiny:
        parser.set_defaults(**TINY)
    options = parser.parse_args()
    try:
        options.horizon = check_horizon(options.horizon)
        options.strategy = None
        if options.credit != "none":
            strategy = STRATEGIES[options.credit]
            options.strategy = strategy(amplification=options.amplification, quantile=options.quantile)
    except AttnprobeError as error:
        parser.error(str(error))
    return options


def checkpoint_of(output: Path, resume: bool) -> str | None:
    """Return the checkpoint to continue from; a run is not written over, and nothing is not resumed."""
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    if resume and last is None:
        raise SystemExit(f"{output} has no checkpoint to resume from: leave --resume out")
    if last is not None and not resume:
        raise SystemExit(
            f"{output} already holds a run: continue it with --resume, or choose another --output"
        )
    return last if resume else None


def load_policy(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """Return a model or its name, its tokenizer, and how the trainer loads it."""
    if options.tiny:
        return tiny_model("qwen3", vocab_size=300, max_position_embeddings=2048), tiny_tokenizer(), {}
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    # In bfloat16 an update of 1e-6 would be rounded away; under adapters the weights do not change.
    return options.model, tokenizer, {"dtype": "bfloat16" if options.lora else "float32"}


def adapters(rank: int) -> Any:
    """Return the config of LoRA's adapters on all linear layers; None for rank 0."""
    if rank == 0:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def config_of(options: argparse.Namespace, loading: dict[str, Any]) -> GRPOConfig:
    """Return TRL's settings."""
    return GRPOConfig(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        num_generations=options.group_size,
        max_completion_length=options.completion_tokens,
        learning_rate=options.learning_rate,
        # The paper does not say; a constant rate is the same however long the run will be.
        lr_scheduler_type="constant",
        temperature=options.temperature,
        beta=0.0,
        eval_strategy="steps" if options.eval_every else "no",
        eval_steps=options.eval_every or None,
        per_device_eval_batch_size=options.batch_size,
        num_generations_eval=1,
        save_strategy="steps",
        save_steps=options.save_every,
        use_vllm=options.vllm is not None,
        vllm_mode=options.vllm or "colocate",
        vllm_gpu_memory_utilization=options.vllm_memory,
        vllm_server_base_url=options.vllm_url if options.vllm == "server" else None,
        # Not the model's own 40,960, for which vLLM would reserve memory.
        vllm_max_model_length=options.completion_tokens + 1024,
        # Qwen3 would otherwise think for thousands of tokens first; other templates ignore it.
        chat_template_kwargs={"enable_thinking": False},
        model_init_kwargs=loading or None,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        log_completions=options.log_completions,
        num_completions_to_print=4,
        report_to=options.report_to,
        seed=options.seed,
    )


def main() -> None:
    """Train, and print the first and last reward."""
    options = arguments()
    checkpoint = checkpoint_of(options.output, options.resume)
    set_seed(options.seed)
    model, tokenizer, loading = load_policy(options)
    size = options.eval_problems + (64 if options.tiny else 20_000)
    problems, rewards = TASKS[options.task](size, options.seed)
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        # A random model has no answer right: without a reward that varies, nothing would be learned.
        reward_funcs=[*rewards, even_ids] if options.tiny else rewards,
        train_dataset=problems.select(range(options.eval_problems, size)),
        eval_dataset=problems.select(range(options.eval_problems)) if options.eval_every else None,
        args=config_of(options, loading),
        peft_config=adapters(options.lora),
        callbacks=[LogFile(options.output / "log.jsonl")],
    )
    if options.strategy is not None:
        attach_credit(
            trainer,
            options.strategy,
            horizon=options.horizon,
            signs=options.signs,
            reclassify_every=options.reclassify_every,
        )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(options.output / "model"))
    found = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    if trainer.accelerator.is_main_process:
        print(f"reward {found[0]:.3f} in the first step, {found[-1]:.3f} in the last: {options.output}")


if __name__ == "__main__":
    main()

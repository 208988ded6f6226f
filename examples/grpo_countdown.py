"""Train a language model on Countdown with GRPO, with or without credit from its own attention.

    python examples/grpo_countdown.py --model tiny --steps 5
    python examples/grpo_countdown.py --credit coupled --steps 20
    python examples/grpo_countdown.py --model Qwen/Qwen3-0.6B --steps 500 --completion-tokens 1024

The problems are reasoning-gym's, by way of shared.py beside this file. `--model smollm2` is the
SmolLM2-135M-Instruct that attnprobe's tests use; it learns the format long before the arithmetic. `--model
tiny` is a random model of a few thousand parameters, to see the script run. Requirements:
pip install 'attnprobe[trl,gguf]' reasoning-gym.

The log (`log.jsonl` in the output folder) has a line for each step: TRL's own metrics, and with credit
those that start with `credit/`.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from shared import STRATEGIES, LogFile, countdown
from transformers import AutoModelForCausalLM, set_seed
from trl import GRPOConfig, GRPOTrainer

from attnprobe.models import load_model
from attnprobe.rl import attach_credit
from attnprobe.testing.tiny_models import tiny_model, tiny_tokenizer


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, a folder, or a hub name")
    parser.add_argument("--credit", default="coupled", choices=["none", *STRATEGIES])
    parser.add_argument("--amplification", type=float, default=1.5, help="weight of the chosen tokens")
    parser.add_argument("--quantile", type=float, default=0.4, help="share of the tokens that are chosen")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="completions in a step, on each device")
    parser.add_argument("--group-size", type=int, default=4, help="completions of one problem")
    parser.add_argument("--completion-tokens", type=int, default=96, help="the longest completion")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("grpo-countdown"))
    return parser.parse_args()


def load_policy(name: str) -> tuple[Any, Any]:
    """Return a model to train, in float32, and its tokenizer."""
    if name == "tiny":
        return tiny_model("llama", vocab_size=300, max_position_embeddings=2048), tiny_tokenizer()
    loaded = load_model(None if name == "smollm2" else name, progress=True)
    # A model loaded from a GGUF file counts as quantized: copy its weights into a new one.
    config = copy.deepcopy(loaded.model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.model.state_dict())
    return model, loaded.tokenizer


def main() -> None:
    """Train, and print the first and last reward."""
    options = arguments()
    log = options.output / "log.jsonl"
    set_seed(options.seed)
    model, tokenizer = load_policy(options.model)
    dataset, rewards = countdown(max(options.steps * options.batch_size, 64), options.seed)
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=rewards,
        train_dataset=dataset,
        args=GRPOConfig(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            num_generations=options.group_size,
            max_completion_length=options.completion_tokens,
            learning_rate=options.learning_rate,
            temperature=options.temperature,
            beta=0.0,
            logging_steps=1,
            bf16=torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            seed=options.seed,
        ),
        callbacks=[LogFile(log)],
    )
    if options.credit != "none":
        strategy = STRATEGIES[options.credit]
        attach_credit(trainer, strategy(amplification=options.amplification, quantile=options.quantile))
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    print(f"reward {steps[0]['reward']:.3f} in the first step, {steps[-1]['reward']:.3f} in the last: {log}")


if __name__ == "__main__":
    main()

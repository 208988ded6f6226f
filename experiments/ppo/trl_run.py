"""The same task with TRL's GRPOTrainer: the same model, problems, rewards and hyper-parameters.

What is left to others: our own run and the comparison (`__main__`).
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

from attnprobe.rl import PPOConfig
from experiments.ppo.task import DIGITS, END, SORT, build_policy, build_problems, reward

WORDS = [*map(str, range(DIGITS)), "=", "<end>"]
"""The text of each id, so that TRL's text prompts become our ids."""


def build_tokenizer() -> Any:
    """Return a tokenizer with one id per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=WORDS[END], pad_token=WORDS[END], padding_side="left"
    )


def train(config: PPOConfig) -> list[dict[str, float]]:
    """Train with GRPOTrainer and return the reward and the seconds of each rollout."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    completions = config.prompts_per_step * config.group_size
    updates = config.epochs * completions // config.minibatch_size
    history: list[dict[str, float]] = []
    problems = build_problems(config.seed)
    dataset = Dataset.from_dict(
        {
            "prompt": [" ".join(WORDS[token] for token in problem["prompt_ids"]) for problem in problems],
            "answer": [problem["answer"] for problem in problems],
        }
    )
    assert problems[0]["prompt_ids"][-1] == SORT

    def judge(completion_ids: list[list[int]], answer: list[list[int]], **_: Any) -> list[float]:
        return reward([{"answer": wanted} for wanted in answer], completion_ids)

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if (state.global_step - 1) % updates == 0:
                history.append({"step": len(history) + 1, "seconds": 0.0})
            history[-1]["seconds"] += time.perf_counter() - self.started

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "reward" in logs:
                history[-1]["reward"] = float(logs["reward"])

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=build_policy(config.seed),
            processing_class=build_tokenizer(),
            reward_funcs=judge,
            train_dataset=dataset,
            callbacks=[Clock()],
            args=GRPOConfig(
                output_dir=folder,
                max_steps=config.steps * updates,
                per_device_train_batch_size=config.minibatch_size,
                steps_per_generation=completions // config.minibatch_size,
                num_iterations=config.epochs,
                num_generations=config.group_size,
                max_completion_length=config.max_new_tokens,
                temperature=config.temperature,
                epsilon=config.clip_coef,
                beta=config.kl_coef,
                entropy_coef=config.ent_coef,
                learning_rate=config.learning_rate,
                lr_scheduler_type="constant",
                max_grad_norm=config.max_grad_norm,
                weight_decay=0.0,
                optim="adamw_torch",  # not the fused one: the same as ours
                loss_type="bnpo",  # a mean over the tokens of a minibatch, like ours
                scale_rewards="group",
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                disable_tqdm=True,
                seed=config.seed,
            ),
        )
        trainer.train()
    return history

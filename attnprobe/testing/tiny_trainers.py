"""Tiny TRL trainers on tiny random models: whole training steps in a fraction of a second.

They generate, score and update as large ones do, on prompts of different lengths, with a reward that
varies within a completion group. Tests of the trainers call `tiny_trainer`. What is left to others: models
(tiny_models), and what is tested.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from attnprobe.testing.tiny_models import tiny_model, tiny_tokenizer

PROMPTS = ("Read.", "What the model reads", "The", "model: what?", "Read the model.", "reads what it reads")


def even_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Reward the share of even token ids in a completion.

    >>> even_ids([[2, 4, 5, 7]])
    [0.5]
    """
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def tiny_trainer(
    trainer_class: Any,
    output_dir: Any,
    *,
    model: Any = None,
    reward: Any = even_ids,
    peft_config: Any = None,
    options: dict[str, Any] | None = None,
    **config: Any,
) -> Any:
    """Return a trainer of a TRL class for a tiny model on the CPU; it logs and saves nothing.

    `config` goes to the class's own config, `options` to the trainer. By default a step is a batch of 4
    completions of up to 12 tokens, in completion groups of 2.
    """
    from datasets import Dataset
    from transformers import set_seed

    set_seed(0)
    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 12,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 0,
        "beta": 0.0,
        **config,
    }
    model = model if model is not None else tiny_model("llama", vocab_size=300)
    if settings["beta"]:
        # The trainer loads its reference model by the name of the policy.
        folder = Path(output_dir) / "policy"
        model.save_pretrained(folder)
        model.config._name_or_path = str(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    return trainer_class(
        model=model,
        reward_funcs=reward,
        args=_config_of(trainer_class)(**settings),
        train_dataset=Dataset.from_dict({"prompt": list(PROMPTS) * 4}),
        processing_class=tokenizer,
        peft_config=peft_config,
        **(options or {}),
    )


def _config_of(trainer_class: Any) -> Any:
    """Return the config class that is defined beside a trainer class or one of its bases."""
    for base in trainer_class.__mro__:
        package = sys.modules.get(base.__module__.rpartition(".")[0])
        config = getattr(package, base.__name__.replace("Trainer", "Config"), None)
        if base.__name__.endswith("Trainer") and config is not None:
            return config
    raise TypeError(f"{trainer_class.__name__} is not a trainer of trl")

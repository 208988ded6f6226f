"""A second model: a tiny one, trained here in minutes on other problems of the same generator.

    python -m experiments.rhythm.train
    python -m experiments.rhythm --model experiments/rhythm/cache/tiny-llama

It has seen nothing but these problems and their worked solutions, so it helps to tell what part of the
rhythm needs a general language model and what part appears in any transformer that reasons in steps. What is
left to others: the problems (problems) and the measurements (the other steps).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from attnprobe.progress import progress_bar
from experiments.rhythm.problems import Problem, training_problems

HERE = Path(__file__).parent
END = "<end>"


def make_tokenizer(texts: list[str], vocabulary: int = 1024) -> Any:
    """Return a byte-level BPE tokenizer with single digits, trained on texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def make_model(vocabulary: int, seed: int = 0) -> Any:
    """Return a new model: six layers of four heads, about 1.3 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def text_of(problem: Problem, solution: str) -> str:
    """Return a problem with its worked solution, as the model should write it."""
    steps = solution.split("####")[0].strip()
    return f"{problem.plain_prompt} {steps}\nThe answer is \\boxed{{{problem.answer}}}.{END}"


def batches(sequences: list[list[int]], size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of ids and labels endlessly: sequences in random order, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(sequences), generator=generator).tolist()
        for begin in range(0, len(order) - size + 1, size):
            chosen = [sequences[i] for i in order[begin : begin + size]]
            width = max(map(len, chosen))
            ids = torch.tensor([each + [0] * (width - len(each)) for each in chosen])
            labels = torch.tensor([each + [-100] * (width - len(each)) for each in chosen])
            yield ids, labels


def train(model: Any, sequences: list[list[int]], *, steps: int, size: int, rate: float) -> float:
    """Train a model, and return the mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    feed = batches(sequences, size, seed=0)
    with progress_bar("training", steps, shown=True) as advance:
        for step in range(steps):
            warmup = min(1.0, (step + 1) / 50)
            for group in optimizer.param_groups:
                group["lr"] = rate * warmup * (0.55 + 0.45 * math.cos(math.pi * step / steps))
            ids, labels = next(feed)
            loss = model(ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            advance()
            if step % 50 == 49:
                print(f"step {step + 1}: loss {sum(losses[-50:]) / 50:.3f}", flush=True)
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def main() -> None:
    """Train and save the tiny model with its tokenizer."""
    parser = argparse.ArgumentParser(prog="python -m experiments.rhythm.train", description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE / "cache" / "tiny-llama")
    parser.add_argument("--problems", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began = time.monotonic()
    texts = [text_of(problem, solution) for problem, solution in training_problems(options.problems)]
    tokenizer = make_tokenizer(texts)
    sequences = [tokenizer(text)["input_ids"][:320] for text in texts]
    model = make_model(len(tokenizer))
    loss = train(model, sequences, steps=options.steps, size=options.batch_size, rate=3e-3)
    model.eval().save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count:,} parameters, final loss {loss:.3f}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()

"""What each of two processes does for test_ranks: a pass and two updates, with credit and by hand.

    torchrun --nproc_per_node 2 two_ranks.py MODEL OUTPUT

Each process has half of the rows; in another rollout, the second has nothing but rows that fill the batch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import engines
import torch
from torch import distributed
from verl.utils import tensordict_utils

from attnprobe.errors import TrainerError
from attnprobe.rl.verl.engine import FIELD, CreditEngine
from attnprobe.rl.verl.rows import jagged

ADVANTAGES = torch.tensor([1.0, -0.7, 0.4, -1.2])


def half(rank: int, *, only_filling: bool = False) -> Any:
    """Return a process's rows: the even or the odd ones."""
    rows = engines.make_rows(padding=8)
    numbers = range(rank, 8, 2) if not only_filling or rank == 0 else range(8, 12)
    return tensordict_utils.index_select_tensor_dict(rows, list(numbers))


def updated(engine: Any, rows: Any) -> dict[str, torch.Tensor]:
    for _ in range(2):
        engines.update(engine, rows, engines.make_loss())
    return engines.parameters(engine)


def main(model: Path, output: Path) -> None:
    engine = engines.make_engine(CreditEngine, model)
    rank = distributed.get_rank()
    plain = engines.make_engine(engines.PlainEngine, model)
    sharded = all(hasattr(each, "full_tensor") for each in engine.module.parameters())

    mixed = engines.log_probs(engine, half(rank, only_filling=True))
    engine = engines.make_engine(CreditEngine, model)
    rows = half(rank)
    found = engines.log_probs(engine, rows)
    rows = engines.with_fields(rows, found, ADVANTAGES * (1 - 2 * rank))
    by_hand = rows.copy()
    by_hand["advantages"] = jagged(
        [a * gamma for a, gamma in zip(rows["advantages"].unbind(), found[FIELD].unbind(), strict=True)]
    )
    metrics = engines.update(engine, rows, engines.make_loss())
    engines.update(engine, rows, engines.make_loss())
    actual, expected = engines.parameters(engine), updated(plain, by_hand)

    engine.save_checkpoint(str(output / "checkpoint"), global_step=1)
    other = engines.make_engine(CreditEngine, model)
    other.load_checkpoint(str(output / "checkpoint"))
    try:
        engines.make_engine(CreditEngine, model, ulysses_sequence_parallel_size=2)
        refused = ""
    except TrainerError as error:
        refused = str(error)
    torch.save(
        {
            "gamma": list(found[FIELD].unbind()),
            "mixed": list(mixed[FIELD].unbind()),
            "grouping": engine._credit.state_dict()["grouping"],
            "restored": other._credit.state_dict()["grouping"],
            "same": all(torch.equal(actual[name], expected[name]) for name in expected),
            "metrics": {name: value for name, value in metrics.items() if "credit/" in name},
            "sharded": sharded,
            "refused": refused,
        },
        output / f"rank{rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

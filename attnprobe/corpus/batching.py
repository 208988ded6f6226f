"""Which rows of a window run together: of similar length, within a budget of tokens.

The scorer calls `micro_batches`. What is left to others: what fits together (batch_run), and running them
(scorer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnprobe.adapters.base import Adapter
from attnprobe.batch_run import MEMORY_BUDGET, TOKEN_BUDGET, similar_lengths_together
from attnprobe.corpus.rows import Row
from attnprobe.validation import IntLike, whole_number

_ACCELERATOR_TOKENS = 8 * TOKEN_BUDGET


@dataclass(frozen=True)
class Budget:
    """How much runs at a time.

    Attributes:
        tokens: how many tokens, padding included; at least one row is run.
        memory: roughly how many bytes their activations may take, and the logits that are held at once.
    """

    tokens: int = TOKEN_BUDGET
    memory: int = MEMORY_BUDGET

    @staticmethod
    def of(adapter: Adapter, tokens: IntLike | None = None, memory: IntLike | None = None) -> Budget:
        """Return a budget; what is not given follows from the device.

        A processor is busy with 4,096 tokens. An accelerator gets 32,768, and a quarter of its free memory.

        Raises:
            ParameterError: budgets that are not whole numbers of at least 1.
        """
        on_accelerator = adapter.device.type == "cuda"
        if tokens is None:
            tokens = _ACCELERATOR_TOKENS if on_accelerator else TOKEN_BUDGET
        if memory is None:
            memory = _free_memory(adapter) // 4 if on_accelerator else MEMORY_BUDGET
        return Budget(
            whole_number(tokens, "token_budget", minimum=1),
            whole_number(memory, "memory_budget", minimum=1),
        )


def _free_memory(adapter: Adapter) -> int:
    import torch

    free, _ = torch.cuda.mem_get_info(adapter.device)
    return max(free, 4)


def micro_batches(rows: Sequence[Row], adapter: Adapter, budget: Budget, *, entropy: bool) -> list[list[int]]:
    """Return the places of the rows that run together: the shortest first, rejected ones left out.

    >>> from attnprobe import adapter_for
    >>> from attnprobe.testing.tiny_models import tiny_model
    >>> rows = [Row(i, response=(1,) * length) for i, length in enumerate([3, 9, 3, 9])]
    >>> micro_batches(rows, adapter_for(tiny_model("llama")), Budget(tokens=20), entropy=False)
    [[0, 2], [1, 3]]
    """
    scored = [place for place, row in enumerate(rows) if row.rejected is None]
    together = similar_lengths_together(
        [rows[place].length for place in scored],
        adapter,
        tokens=budget.tokens,
        memory=budget.memory,
        answers=[len(rows[place].response) for place in scored] if entropy else None,
    )
    return [[scored[number] for number in part] for part in together]

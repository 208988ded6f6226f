"""Which rows of a window run together: of similar length, within a budget of tokens.

The scorer calls `micro_batches`. `measure` forms such batches too, but over a batch that it is given whole;
here the longest row of a window must not decide how many short ones run together. What is left to others:
running them (scorer).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from attnprobe.adapters.base import Adapter
from attnprobe.batch_run import MEMORY_BUDGET, TOKEN_BUDGET
from attnprobe.corpus.rows import Row
from attnprobe.validation import IntLike, whole_number

MOST_PADDING = 0.05
"""No row is added to others if more than this share of them would then be padding, ..."""

LEAST_BUSY = 0.125
"""... unless they hold less than this share of the token budget: small batches cost more than padding."""

_ACCELERATOR_TOKENS = 8 * TOKEN_BUDGET


@dataclass(frozen=True)
class Budget:
    """How much runs at a time.

    Attributes:
        tokens: how many tokens, padding included; at least one row is run.
        memory: roughly how many bytes their activations and logits may take.
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
    by_regime: dict[Hashable, list[int]] = {}
    scored = [place for place, row in enumerate(rows) if row.rejected is None]
    for place in sorted(scored, key=lambda place: rows[place].length):
        by_regime.setdefault(adapter.regime(rows[place].length), []).append(place)
    together: list[list[int]] = []
    for places in by_regime.values():
        part: list[int] = []
        answer = tokens = 0
        for place in places:
            # The next one is the longest so far: all are padded to it.
            width, count = rows[place].length, len(part) + 1
            answer = max(answer, len(rows[place].response))
            each = adapter.activation_bytes * width
            if entropy:
                # Logits are computed for response tokens only, in the model's dtype: at most four bytes.
                each += 4 * adapter.vocabulary_size * answer
            padding = 1 - (tokens + width) / (count * width)
            is_full = count * width > budget.tokens or count * each > budget.memory
            if part and (is_full or (padding > MOST_PADDING and tokens >= LEAST_BUSY * budget.tokens)):
                together.append(part)
                part, answer, tokens = [], len(rows[place].response), 0
            part.append(place)
            tokens += width
        together.append(part)
    return together

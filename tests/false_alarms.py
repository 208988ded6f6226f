"""Count false alarms of the output check over many drawn calls: `python -m tests.false_alarms [count]`.

Ten thousand take a few minutes. It prints each call that was refused although nothing is wrong with it, and
fails if there is one.
"""

from __future__ import annotations

import sys

import torch

from attnprobe.adapters.output_check import check_against_output
from attnprobe.errors import IncompleteRunError
from tests.drawn_calls import draw


def main(count: int) -> int:
    """Check calls drawn from the seeds below `count`; return how many were refused."""
    refused = 0
    for seed in range(count):
        # One in a hundred is long.
        drawn = draw(seed, longest=4096 if seed % 100 == 0 else 512)
        try:
            check_against_output(*drawn.call(), "a drawn call")
        except IncompleteRunError as error:
            refused += 1
            print(f"{drawn.description}\n    {error}")
    print(f"{refused} false alarms in {count} drawn calls")
    return refused


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(bool(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)))

"""The table of families and backends: how each backend reads each family, tried on tiny models.

    python -m attnprobe.testing.families                  # the table, as Markdown
    python -m attnprobe.testing.families docs/backends.md # the same, put between the marks of a file
    python -m attnprobe.testing.families --differences    # the largest difference between two backends

Every cell is tried: a model of the family is put into the backend and run, and the kind of attention that is
observed is recorded. What is left to others: whether the numbers are right (conformance).
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnprobe.adapters import adapter_for
from attnprobe.adapters.base import Value
from attnprobe.attention.factored import FactoredAttention
from attnprobe.batch import TokenBatch
from attnprobe.errors import IncompleteRunError, UnsupportedModelError
from attnprobe.measurement import measure
from attnprobe.probe import Probe, attach
from attnprobe.suppression import suppress_attention
from attnprobe.testing.backends import BACKENDS
from attnprobe.testing.tiny_models import FAMILIES, REFUSED, TRAITS, VOCABULARY, tiny_model

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"

_TITLES = {"transformers": "transformers", "transformer_lens": "TransformerLens", "nnsight": "nnsight"}


class _Kinds(Probe):
    """Records how the attention of each layer was read."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()

    def observe(self, site: str, layer: int | None, value: Value, batch: TokenBatch) -> None:
        self.kinds.add("factored" if isinstance(value, FactoredAttention) else "dense")


def _batch() -> TokenBatch:
    ids = torch.randint(1, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    return TokenBatch.from_ids(ids, response_start=6)


def _cell(family: str, backend: str) -> str:
    """Return how a family's attention is read in a backend, or why it is not."""
    try:
        model = BACKENDS[backend](tiny_model(family))
        adapter = adapter_for(model)
    except UnsupportedModelError as refusal:
        return f"refused: {str(refusal).partition(':')[0]}"
    probe = _Kinds()
    with attach(adapter, probe):
        adapter.forward(_batch())
    return " and ".join(sorted(probe.kinds))


def _row(family: str) -> tuple[str, ...]:
    adapter = adapter_for(tiny_model(family))
    count = len(adapter.layers) + len(adapter.skipped_layers)
    layers = "all" if not adapter.skipped_layers else f"{len(adapter.layers)} of {count}"
    try:
        with suppress_attention(adapter, keys=[0]):
            suppression = "yes"
    except UnsupportedModelError:
        suppression = "no"
    refused = ", ".join(f"`{site}`" for site in adapter.refused_sites) or "none"
    cells = [_cell(family, backend) for backend in BACKENDS]
    return (f"`{family}`", TRAITS[family], layers, *cells, suppression, refused)


def _reason(family: str) -> str:
    """Return why a family is refused, in the words of the error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            measure(tiny_model(family), _batch())
    except (UnsupportedModelError, IncompleteRunError) as refusal:
        return str(refusal)
    raise AssertionError(f"{family} should be refused, but is read")


def families_table() -> str:
    """Return the table as Markdown, with a line for each family, and after it the refused families."""
    titles = (
        "family",
        "what is particular",
        "layers read",
        *_TITLES.values(),
        "suppression",
        "refused sites",
    )
    rows = [titles, tuple("---" for _ in titles), *(_row(family) for family in FAMILIES)]
    refused = [("family", "why it is refused"), ("---", "---")]
    refused += [(f"`{family}`", _reason(family)) for family in REFUSED]
    return "\n\n".join("\n".join(f"| {' | '.join(row)} |" for row in part) for part in (rows, refused))


def largest_differences() -> dict[str, tuple[float, str]]:
    """Return, for each statistic, the largest difference between two backends, and its family.

    Over all families, in float32; differences in span and WAAD are in tokens.
    """
    largest = dict.fromkeys(("span", "waad", "fai", "entropy"), (0.0, "-"))
    for family in FAMILIES:
        results: list[Any] = []
        for wrap in BACKENDS.values():
            try:
                results.append(measure(wrap(tiny_model(family)), _batch(), horizon=(2, 6)))
            except UnsupportedModelError:
                continue
        for name, (worst, _) in list(largest.items()):
            values: list[Tensor] = [getattr(result, name).nan_to_num() for result in results]
            difference = max(float((a - b).abs().max()) for a in values for b in values)
            if difference > worst:
                largest[name] = (difference, family)
    return largest


def _quietly() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def main() -> None:
    """Print the table, put it into a file, or print the differences."""
    parser = argparse.ArgumentParser(description=families_table.__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="put the table into this file, between its marks")
    parser.add_argument("--differences", action="store_true", help="print the largest differences instead")
    arguments = parser.parse_args()
    _quietly()
    if arguments.differences:
        for name, (difference, family) in largest_differences().items():
            print(f"{name}: {difference:.1e} ({family})")
        return
    table = families_table()
    if arguments.file is None:
        print(table)
        return
    text = arguments.file.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{arguments.file} has no {BEGIN} and {END} to put the table between")
    arguments.file.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

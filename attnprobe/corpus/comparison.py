"""Comparing two corpora: before and after training, right and wrong answers; differences with intervals.

Users call `compare`, and `attnprobe corpus compare` prints it. What is left to others: the quantities
(quantities) and the bootstrap (analysis.bootstrap).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.analysis.bootstrap import (
    Estimate,
    bootstrap_weights,
    check_resampling,
    divide,
    percentile_estimate,
)
from attnprobe.analysis.summary import Summary
from attnprobe.corpus.quantities import BLOCKS, QUANTITIES, block_sums
from attnprobe.corpus.reading import CorpusScores, reason_for_no_rows
from attnprobe.errors import ResultError
from attnprobe.validation import FloatLike, IntLike, instance, truth


@dataclass(frozen=True, eq=False, repr=False)
class CorpusComparison(Summary):
    """How two corpora differ.

    Attributes:
        first, second: each quantity in the first and in the second corpus, with its interval.
        difference: second minus first, with its interval.
        rows: how many rows each has.
        paired: whether rows with the same identity were resampled together.
        confidence: the share of resamples that the intervals hold.
    """

    first: dict[str, Estimate]
    second: dict[str, Estimate]
    difference: dict[str, Estimate]
    rows: tuple[int, int]
    paired: bool
    confidence: float = 0.95

    def _headline(self) -> str:
        paired = ", paired" if self.paired else ""
        return f"{self.rows[0]} and {self.rows[1]} rows{paired}, {self.confidence:.0%} intervals"

    def _shown(self) -> dict[str, Any]:
        names = list(self.difference)
        columns: dict[str, Any] = {"quantity": [QUANTITIES[name] for name in names]}
        for title in ("first", "second", "difference"):
            columns[title] = [getattr(self, title)[name] for name in names]
        return columns

    def _table(self) -> dict[str, Any]:
        """Return a line for each quantity: its estimates with their limits."""
        columns: dict[str, Any] = {"quantity": list(self.difference)}
        for title in ("first", "second", "difference"):
            estimates = getattr(self, title).values()
            columns[title] = [each.value for each in estimates]
            columns[f"{title}_low"] = [each.low for each in estimates]
            columns[f"{title}_high"] = [each.high for each in estimates]
        return columns


def compare(
    first: CorpusScores,
    second: CorpusScores,
    *,
    paired: bool = False,
    resamples: IntLike = 2000,
    confidence: FloatLike = 0.95,
    seed: IntLike = 0,
) -> CorpusComparison:
    """Compare two corpora, or two parts of one: `compare(scores.where("ok", 0), scores.where("ok", 1))`.

    Args:
        first, second: the scores, from `load_scores`.
        paired: whether rows of the same id (or, without ids, of the same number) belong together, such as the
            answers to one problem before and after training. Rows that only one of them has are left out.
        resamples, confidence, seed: of the bootstrap over rows.

    Scores of different models compare what each does with its own head groups; score both with saved groups
    to compare the same heads.

    Raises:
        ParameterError: anything but scores, or a bootstrap that makes no sense.
        ResultError: a corpus without scored rows, different windows, horizons, peaks or alignments, or, if
            paired, no common row or a row that occurs twice.
    """
    for name, scores in (("first", first), ("second", second)):
        instance(scores, CorpusScores, name, "load_scores returns them")
    truth(paired, "paired")
    resamples, confidence, seed = check_resampling(resamples, confidence, seed)
    for name in ("window", "horizon", "align", "peak_quantile", "lookback"):
        ours, theirs = (scores.manifest["settings"][name] for scores in (first, second))
        if ours != theirs:
            raise ResultError(f"the two corpora were scored with different {name}: {ours} and {theirs}")
    if paired:
        block = _common_blocks(first, second)
        sums = [block_sums(scores, block) for scores in (first, second)]
    else:
        sums = [block_sums(scores) for scores in (first, second)]
    if 0 in (sums[0].rows, sums[1].rows):
        empty = next(each for each, found in zip((first, second), sums, strict=True) if found.rows == 0)
        raise ResultError(
            f"there is nothing to compare in {sums[0].rows} and {sums[1].rows} rows: "
            f"{reason_for_no_rows(empty)}"
        )
    weights = [
        bootstrap_weights(len(each.above), resamples, seed if paired else seed + place)
        for place, each in enumerate(sums)
    ]
    estimates: dict[str, list[Estimate]] = {}
    for name in QUANTITIES:
        (above, below), (above_2, below_2) = (each.of(name) for each in sums)
        if not (bool(below.any()) and bool(below_2.any())):
            continue
        of_first, of_second = _resampled(weights[0], above, below), _resampled(weights[1], above_2, below_2)
        values = [float(divide(a.sum(), b.sum())) for a, b in ((above, below), (above_2, below_2))]
        estimates[name] = [
            percentile_estimate(values[0], of_first, confidence),
            percentile_estimate(values[1], of_second, confidence),
            percentile_estimate(values[1] - values[0], of_second - of_first, confidence),
        ]
    return CorpusComparison(
        {name: each[0] for name, each in estimates.items()},
        {name: each[1] for name, each in estimates.items()},
        {name: each[2] for name, each in estimates.items()},
        (sums[0].rows, sums[1].rows),
        paired,
        confidence,
    )


def _resampled(
    weights: Float[Tensor, "resample block"], above: Float[Tensor, " block"], below: Float[Tensor, " block"]
) -> Float[Tensor, " resample"]:
    return divide(weights @ above, weights @ below)


def _common_blocks(first: CorpusScores, second: CorpusScores) -> Any:
    """Return a function that puts rows that belong together into the same block."""
    known: list[list[Any]] = []
    for scores in (first, second):
        keys = [key for table in scores.tables(["row", "id"]) for key in _keys(table)]
        if len(set(keys)) < len(keys):
            twice = Counter(keys).most_common(1)[0][0]
            raise ResultError(f"rows cannot be paired: {twice} occurs more than once in {scores.folder}")
        known.append(keys)
    also = set(known[1])
    shared = [key for key in known[0] if key in also]
    if not shared:
        raise ResultError("rows cannot be paired: the two corpora have no row in common")
    block = {key: place % BLOCKS for place, key in enumerate(shared)}
    return lambda table, before: torch.tensor([block.get(key, -1) for key in _keys(table)])


def _keys(table: Any) -> list[Any]:
    """Return what identifies each row: its id or, without one, its number."""
    pairs = zip(table["row"].to_pylist(), table["id"].to_pylist(), strict=True)
    return [number if name is None else name for number, name in pairs]

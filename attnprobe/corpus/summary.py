"""What a corpus is like: spans, shares, couplings with their nulls, frequent anchors and preplans, stability.

Users call `summarize`; `attnprobe corpus summary` prints the result and writes its page. What is left to
others: the quantities (quantities), couplings and stability (analysis), and the page (page).
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from attnprobe.analysis.agreement import GroupStability, stability_of
from attnprobe.analysis.bootstrap import Estimate, check_resampling, divide, ratio_estimate
from attnprobe.analysis.coupling_results import Couplings
from attnprobe.analysis.couplings import couplings
from attnprobe.analysis.summary import Summary
from attnprobe.corpus.folder import read_ledger
from attnprobe.corpus.quantities import QUANTITIES, BlockSums, block_sums
from attnprobe.corpus.reading import CorpusScores, condition, reason_for_no_rows
from attnprobe.corpus.schema import padded_column, scores_of
from attnprobe.errors import ResultError
from attnprobe.provenance import Provenance
from attnprobe.rhythm import near_preplans
from attnprobe.scores import TokenScores
from attnprobe.texts import token_texts
from attnprobe.validation import FloatLike, IntLike, instance, whole_number


@dataclass(frozen=True)
class FrequentToken:
    """A token that is often a peak.

    Attributes:
        token_id, text: the token; its text is empty if no tokenizer was given.
        count: how often it is a peak.
        share: its share of all peaks.
        lift: how much more often it is a peak than an average token, minus 1, as the lift of a coupling is;
            0: as often.
    """

    token_id: int
    text: str
    count: int
    share: float
    lift: float


@dataclass(frozen=True)
class NotableRow:
    """An answer that is worth a look: one with many anchors at a preplan.

    Attributes:
        row, id: which row of the input it is.
        tokens, anchors, pairs: how many tokens and anchors it has, and anchors at a preplan.
    """

    row: int
    id: str | None
    tokens: int
    anchors: int
    pairs: int


@dataclass(frozen=True, eq=False, repr=False)
class CorpusSummary(Summary):
    """What a corpus is like.

    Attributes:
        rows, rejected: how many rows were scored, and how many could not be.
        row_count: how many rows the input has, blank lines included.
        where: the values of kept fields that the rows were chosen by; () for all rows.
        is_complete: whether the run is complete.
        confidence: the share of resamples that the intervals hold.
        tokens: how many response tokens were scored.
        quantities: the means over the corpus, each with its bootstrap interval over rows.
        couplings: the three couplings by null: "position" moves peaks anywhere in their answer, "token" among
            tokens of the same id. Over a sample of rows; empty if no row has a peak.
        coupled_rows: how many rows the couplings are over.
        preplans, anchors: the tokens that are most often one.
        stability: how the head groups would have come out with other rows; None without the spans of heads.
        notable: answers with the most anchors at a preplan.
        provenance: what the scores were computed from.
    """

    rows: int
    rejected: int
    row_count: int
    tokens: int
    quantities: dict[str, Estimate]
    couplings: dict[str, Couplings]
    coupled_rows: int
    preplans: tuple[FrequentToken, ...]
    anchors: tuple[FrequentToken, ...]
    stability: GroupStability | None
    notable: tuple[NotableRow, ...]
    provenance: Provenance = Provenance()  # noqa: RUF009 (frozen)
    where: tuple[tuple[str, Any], ...] = ()
    is_complete: bool = True
    confidence: float = 0.95

    def counts(self) -> str:
        """Return in words how many rows and tokens it is over."""
        chosen = f" where {condition(self.where)}" if self.where else ""
        incomplete = "" if self.is_complete else "; the run is not complete"
        return (
            f"{self.rows} of {self.row_count} rows{chosen}, {self.rejected} rejected{incomplete}; "
            f"{self.tokens} response tokens"
        )

    def _headline(self) -> str:
        return f"{self.counts()}, {self.provenance}"

    def _table(self) -> dict[str, Any]:
        """Return a line for each quantity: its name, what it is a mean of, its value and limits."""
        estimates = self.quantities.values()
        return {
            "quantity": list(self.quantities),
            "mean of": [QUANTITIES[name] for name in self.quantities],
            "value": [each.value for each in estimates],
            "low": [each.low for each in estimates],
            "high": [each.high for each in estimates],
        }


def summarize(
    scores: CorpusScores,
    *,
    tokenizer: Any = None,
    top: IntLike = 15,
    sample: IntLike = 1000,
    draws: IntLike = 200,
    resamples: IntLike = 1000,
    confidence: FloatLike = 0.95,
    seed: IntLike = 0,
) -> CorpusSummary:
    """Summarise the scores of a corpus, a shard at a time.

    Args:
        scores: from `load_scores`; of all rows, or of those that `where` chooses.
        tokenizer: provides the texts of frequent tokens.
        top: how many frequent tokens and notable answers to list.
        sample: over how many rows, drawn at random, the couplings are measured: their nulls keep every draw
            of every row.
        draws: how often the nulls move the peaks.
        resamples, confidence, seed: of the bootstraps, the sample and the nulls.

    Raises:
        ParameterError: anything but scores, or numbers that make no sense.
        ResultError: no row was scored.
    """
    instance(scores, CorpusScores, "scores", "load_scores returns them")
    top, sample = whole_number(top, "top", minimum=1), whole_number(sample, "sample", minimum=1)
    draws = whole_number(draws, "draws", minimum=1)
    resamples, confidence, seed = check_resampling(resamples, confidence, seed)
    total = len(scores)
    if total == 0:
        raise ResultError(reason_for_no_rows(scores))
    counts = _Counts(
        scores.provenance, set(random.Random(seed).sample(range(total), min(sample, total))), top
    )
    sums = block_sums(scores, seen=counts.add)
    quantities = {}
    for name in QUANTITIES:
        above, below = sums.of(name)
        if bool(below.any()):
            quantities[name] = ratio_estimate(
                above, below, resamples=resamples, confidence=confidence, seed=seed
            )
    found: dict[str, Couplings] = {}
    if counts.drawn:
        for null in ("position", "token"):
            found[null] = couplings(
                counts.drawn,
                align=scores.provenance.align,
                null=null,
                draws=draws,
                resamples=resamples,
                confidence=confidence,
                seed=seed,
            )
    return CorpusSummary(
        rows=sums.rows,
        rejected=_rejected(scores),
        row_count=scores.row_count,
        tokens=sum(counts.all.values()),
        quantities=quantities,
        couplings=found,
        coupled_rows=min(sample, total),
        preplans=counts.frequent(counts.preplans, tokenizer),
        anchors=counts.frequent(counts.anchors, tokenizer),
        stability=_stability(sums, scores),
        notable=tuple(counts.notable),
        provenance=scores.provenance,
        where=scores.kept,
        is_complete=scores.is_complete,
        confidence=confidence,
    )


def _rejected(scores: CorpusScores) -> int:
    """Return how many of the rows could not be scored."""
    if not scores.kept:
        return sum(entry.rejected for entry in read_ledger(scores.folder))
    every = scores.tables(["rejected"], rejected=True)
    return sum(len(table) - table["rejected"].null_count for table in every)


class _Counts:
    """Counts tokens and keeps the sampled and the notable rows, a shard at a time."""

    def __init__(self, provenance: Provenance, sample: set[int], top: int) -> None:
        self.all: Counter[int] = Counter()
        self.preplans: Counter[int] = Counter()
        self.anchors: Counter[int] = Counter()
        self.drawn: list[TokenScores] = []
        self.notable: list[NotableRow] = []
        self._provenance, self._sample, self._top = provenance, sample, top
        self._before = 0

    def add(self, table: Any) -> None:
        """Count a shard."""
        scores = scores_of(table, self._provenance)
        assert scores is not None
        assert scores.input_ids is not None
        masks = [scores.response_mask]
        for name in ("preplan", "anchor"):
            mask = padded_column(table, name)
            assert mask is not None
            masks.append(mask.bool())
        for counter, mask in zip((self.all, self.preplans, self.anchors), masks, strict=True):
            ids, numbers = scores.input_ids[mask].unique(return_counts=True)
            counter.update(dict(zip(ids.tolist(), numbers.tolist(), strict=True)))
        chosen = [i for i in range(table.num_rows) if self._before + i in self._sample]
        if chosen:
            self.drawn.append(scores.select(chosen, trim=True))
        self._before += table.num_rows
        inside, preplan, anchor = masks
        pairs = (anchor & near_preplans(preplan, inside, 1)).sum(1)
        names = table["row"].to_pylist(), table["id"].to_pylist()
        each = zip(*names, inside.sum(1).tolist(), anchor.sum(1).tolist(), pairs.tolist(), strict=True)
        self.notable += [NotableRow(*values) for values in each]
        self.notable = sorted(self.notable, key=lambda row: (-row.pairs, row.row))[: self._top]

    def frequent(self, peaks: Counter[int], tokenizer: Any) -> tuple[FrequentToken, ...]:
        """Return the tokens that are most often a peak; of equally frequent ones, the lower id."""
        total, everywhere = sum(peaks.values()), sum(self.all.values())
        found = []
        for token, count in sorted(peaks.items(), key=lambda item: (-item[1], item[0]))[: self._top]:
            text = "" if tokenizer is None else "".join(token_texts(tokenizer, [token]))
            share = count / total
            found.append(FrequentToken(token, text, count, share, share / (self.all[token] / everywhere) - 1))
        return tuple(found)


def _stability(sums: BlockSums, scores: CorpusScores) -> GroupStability | None:
    """Return how stable a grouping by span is over the rows; over blocks of them, if there are many."""
    if sums.span_totals is None or sums.span_counts is None or len(sums.span_totals) < 2:
        return None
    layers = scores.provenance.layers
    spans = divide(sums.span_totals, sums.span_counts).reshape(len(sums.span_totals), len(layers), -1)
    return stability_of(
        spans,
        layers=layers,
        model_name=scores.provenance.model_name,
        # Saved groups have their own share, whatever the settings say.
        quantile=_quantile(scores),
        resamples=200,
    )


def _quantile(scores: CorpusScores) -> float:
    own = scores.groups.quantile
    return float(scores.manifest["settings"]["head_quantile"]) if own is None else own

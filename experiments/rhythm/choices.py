"""The choices that the couplings are computed under: which heads, which layers, which horizon.

Each gives its own token scores, all from the same statistics. "main" makes the paper's choices; every other
one changes one of them. `raw` stores the scores of all. What is left to others: measuring (measure), and
choices that need no other scores, such as k or the definition of a peak (estimates).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import attnprobe
from experiments.rhythm.measure import Measured

RECEIVERS = 0.074
"""The share of the heads that are receivers: 20 of SmolLM2's 270, the number in arXiv 2506.19143."""

THIRDS = ("bottom third", "middle third", "top third")

TESTED = ("main", "without the first token")
"""The choices whose p-values are adjusted together: 3 couplings, 6 nulls, 2 choices."""

RANDOM_HEADS = (*TESTED, *THIRDS)
"""The choices under which the groups are also replaced by random heads."""


def groups_of(measured: Measured) -> dict[str, tuple[attnprobe.HeadStatistics, attnprobe.HeadGroups]]:
    """Return the statistics and head groups of each choice that groups the heads over all answers."""
    end, near = (measured.statistics[name] for name in ("end", "near"))
    main = classify(end)
    by_sentence = dataclasses.replace(end, **_receivers_of(near))
    found = {
        "main": (end, main),
        "without the first token": (end, classify(end, span="ignoring")),
        "horizon [10, 100]": (near, main),
        "receivers by Gini": (end, classify(end, selectivity="gini")),
        "receivers by sentence": (end, classify(by_sentence)),
    }
    for name in (*THIRDS, "middle"):
        part = end.at_layers(name)
        found["five middle layers" if name == "middle" else name] = (
            part,
            classify(part),
        )
    return found


def receiver_count(heads: int) -> int:
    """Return how many of so many heads are receivers."""
    return max(1, round(RECEIVERS * heads))


def classify(statistics: attnprobe.HeadStatistics, **options: Any) -> attnprobe.HeadGroups:
    """Return head groups, with the study's share of receivers."""
    count = receiver_count(len(statistics.layers) * statistics.head_count)
    return attnprobe.classify_heads(statistics, receivers=count, **options)


def _receivers_of(statistics: attnprobe.HeadStatistics) -> dict[str, Any]:
    """Return what statistics say about receivers."""
    names = ("receiver_kurtosis", "receiver_gini", "receiver_level", "sentence_receivers")
    return {name: getattr(statistics, name) for name in names}


def scores_of(measured: Measured) -> Iterator[tuple[str, attnprobe.TokenScores]]:
    """Yield the token scores under each choice."""
    for name, (statistics, heads) in groups_of(measured).items():
        yield name, attnprobe.score_tokens(statistics, heads)
    end = measured.statistics["end"]
    yield "all heads", attnprobe.score_tokens(end, "all")
    alone = [end.select(example) for example in range(end.span.shape[0])]
    parts = [attnprobe.score_tokens(part, classify(part)) for part in alone]
    # Heads differ from answer to answer, so the joined provenance names none.
    of_all = dataclasses.replace(parts[0].provenance, heads={})
    yield (
        "heads ranked per answer",
        attnprobe.TokenScores.concatenate(dataclasses.replace(part, provenance=of_all) for part in parts),
    )

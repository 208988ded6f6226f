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

RECEIVERS = 20
"""How many receiver heads there are, as in arXiv 2506.19143."""

THIRDS = ("bottom third", "middle third", "top third")

TESTED = ("main", "without the first token")
"""The choices whose p-values are adjusted together: 3 couplings, 6 nulls, 2 choices."""

RANDOM_HEADS = (*TESTED, *THIRDS)
"""The choices under which the groups are also replaced by random heads."""


def groups_of(measured: Measured) -> dict[str, tuple[attnprobe.HeadStatistics, attnprobe.HeadGroups]]:
    """Return the statistics and head groups of each choice that groups the heads over all answers."""
    end, near = (measured.statistics[name] for name in ("end", "near"))
    main = attnprobe.classify_heads(end, receivers=RECEIVERS)
    # 20 receivers are 7% of SmolLM2's 270 heads, but most of the heads of a tiny model.
    few = max(1, round(0.074 * end.span.shape[1] * end.span.shape[2]))
    by_sentence = dataclasses.replace(end, **_receivers_of(near))
    found = {
        "main": (end, main),
        "without the first token": (
            end,
            attnprobe.classify_heads(end, receivers=RECEIVERS, span="ignoring"),
        ),
        "horizon [10, 100]": (near, main),
        "few receivers": (end, attnprobe.classify_heads(end, receivers=few)),
        "receivers by Gini": (
            end,
            attnprobe.classify_heads(end, receivers=RECEIVERS, selectivity="gini"),
        ),
        "receivers by sentence": (
            end,
            attnprobe.classify_heads(by_sentence, receivers=RECEIVERS),
        ),
    }
    for name in (*THIRDS, "middle"):
        part = end.at_layers(name)
        found["five middle layers" if name == "middle" else name] = (
            part,
            attnprobe.classify_heads(part, receivers=RECEIVERS),
        )
    return found


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
    parts = [
        attnprobe.score_tokens(part, attnprobe.classify_heads(part, receivers=RECEIVERS)) for part in alone
    ]
    # Heads differ from answer to answer, so the joined provenance names none.
    of_all = dataclasses.replace(parts[0].provenance, heads={})
    yield (
        "heads ranked per answer",
        attnprobe.TokenScores.concatenate(dataclasses.replace(part, provenance=of_all) for part in parts),
    )

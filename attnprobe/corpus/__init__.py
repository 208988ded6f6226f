"""From one answer to a corpus: scoring files of rollouts, on one machine or on an engine for many.

`score` writes a folder of scores that survives interruptions. What is left to others: scoring one batch that
is in memory (measurement, scores).
"""

from attnprobe.corpus.rows import Columns
from attnprobe.corpus.run import CorpusRun, score
from attnprobe.corpus.settings import CorpusSettings

__all__ = [
    "Columns",
    "CorpusRun",
    "CorpusSettings",
    "score",
]

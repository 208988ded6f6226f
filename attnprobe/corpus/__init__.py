"""From one answer to a corpus: scoring files of rollouts, on one machine or on an engine for many.

    attnprobe.corpus.score("rollouts.jsonl", "scores", model=model, tokenizer=tokenizer)
    scores = attnprobe.load_scores("scores")
    attnprobe.corpus.summarize(scores)

`score` writes a folder of scores that survives interruptions. What is left to others: scoring one batch that
is in memory (measurement, scores).
"""

from attnprobe.corpus.answer import report_row
from attnprobe.corpus.comparison import CorpusComparison, compare
from attnprobe.corpus.page import save_page, summary_page
from attnprobe.corpus.quantities import QUANTITIES
from attnprobe.corpus.reading import CorpusScores, load_scores
from attnprobe.corpus.rows import Columns
from attnprobe.corpus.run import CorpusRun, score
from attnprobe.corpus.settings import CorpusSettings
from attnprobe.corpus.stages import RowScorer, score_with_ray
from attnprobe.corpus.summary import CorpusSummary, summarize

__all__ = [
    "QUANTITIES",
    "Columns",
    "CorpusComparison",
    "CorpusRun",
    "CorpusScores",
    "CorpusSettings",
    "CorpusSummary",
    "RowScorer",
    "compare",
    "load_scores",
    "report_row",
    "save_page",
    "score",
    "score_with_ray",
    "summarize",
    "summary_page",
]

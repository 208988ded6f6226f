"""The HTML report: one self-contained page that shows what was measured on one response.

    attnprobe.Report(batch, statistics, heads, scores, rhythm).save("report.html")

`checks` checks that the results fit together, and `document` renders the page; `response` gathers what
belongs to each token; `tokens`, `figures` and `maps` draw. What is left to others: every number (the report
reads results, never a model), and the choice of a response to show.
"""

from attnprobe.report.document import Report

__all__ = ["Report"]

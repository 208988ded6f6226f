"""The HTML report: one self-contained page that shows what was measured on one response, or on several.

    attnprobe.Report(batch, statistics, heads, scores, rhythm).save("report.html")
    attnprobe.Reports([before, after], compare=(0, 1)).save("both.html")

`checks` checks that the results fit together; `response` gathers what belongs to each token, `reads` and
`maps` what is kept of the maps; `entry` packs it for the page, which `page` puts together from the template
and from the styles and scripts in `assets`. What is left to others: every number (the report reads results,
never a model), and the choice of responses to show.
"""

from attnprobe.report.collection import Reports
from attnprobe.report.document import Report

__all__ = ["Report", "Reports"]

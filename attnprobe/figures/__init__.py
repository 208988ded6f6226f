"""Figures for a paper, drawn with matplotlib from the results: `attnprobe.figures.rhythm(scores, rhythm)`.

Each function returns a matplotlib Figure that is one column wide (3.25 in) and can be saved as PDF or SVG, in
which text stays text. The numbers are those of the results; colours can be told apart by colour-blind
readers, and in grey. pyplot and the global settings of matplotlib are left alone; its font family is taken
from there, so that figures match a paper's text: `matplotlib.rcParams["font.family"] = "serif"`. In a
notebook, the figures show themselves.

`curves` draws scores over a response, `grid` heads, `written` the coloured text, and `attention` maps;
`reading` checks that results belong together, and `paper` holds the look. What is left to others: every
number (the results), and pages that can be queried (report).
"""

from attnprobe.figures.attention import head_map, maps
from attnprobe.figures.curves import rhythm
from attnprobe.figures.grid import heads
from attnprobe.figures.written import tokens

__all__ = ["head_map", "heads", "maps", "rhythm", "tokens"]

"""What the commands print: tables of heads and pairs, and the coloured answer, for a terminal.

Nothing that a model wrote reaches the terminal as a control sequence or as markup. What is left to others:
where it is printed (commands).
"""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.style import Style
from rich.table import Table
from rich.text import Text

from attnprobe.colours import SCORE_LOOKS, clipped_range, shares
from attnprobe.report.visible_text import visible

# For preplans, anchors and line breaks; in plain ASCII where a terminal can show no more.
_MARKS = ("\u25be", "\u25c6", "\u21b5")
_PLAIN_MARKS = ("^", "*", "")
_SWATCHES = 5


def heads_table(groups: Any, top: int = 10) -> Table:
    """Return the most typical heads of each group."""
    table = Table(title="Heads, by mean attention span", title_justify="left")
    for title in ("most local", "span", "most global", "span", "receivers", "kurtosis"):
        table.add_column(title, justify="left" if title.startswith(("most", "rec")) else "right")
    columns = []
    for group, value in (("local", "span"), ("global", "span"), ("receiver", "receiver_kurtosis")):
        numbers = getattr(groups, value)
        cells = []
        for layer, head in groups.pairs(group)[:top] if numbers is not None else ():
            number = float(numbers[groups.layers.index(layer), head])
            cells.append((f"L{layer} H{head}", f"{number:.1f}"))
        columns.append(cells)
    for line in zip_longest(*columns, fillvalue=("", "")):
        table.add_row(*(text for cell in line for text in cell))
    return table


def pairs_table(batch: Any, scores: Any, rhythm: Any, most: int = 12) -> Table:
    """Return a table of the strongest anchors with their preplans, in the order of the text."""
    pairs = rhythm.pairs()
    strongest = sorted(sorted(pairs, key=lambda pair: -float(scores.fai[0, pair[1]]))[:most])
    anchors, preplans = int(rhythm.anchor.sum()), int(rhythm.preplan.sum())
    title = f"{preplans} preplans, {anchors} anchors, {len(pairs)} of them at a preplan"
    if len(pairs) > most:
        title += f"; the {most} strongest:"
    table = Table(title=title, title_justify="left")
    for name in ("preplan", "anchor", "WAAD", "FAI", "in"):
        table.add_column(name, justify="right" if name in ("WAAD", "FAI") else "left")
    texts = batch.texts[0]
    for preplan, anchor in strongest:
        context = "".join(texts[max(preplan - 4, 0) : anchor + 5])
        table.add_row(
            escape(repr(texts[preplan])),
            escape(repr(texts[anchor])),
            f"{float(scores.waad[0, preplan]):.2f}",
            f"{float(scores.fai[0, anchor]):.4f}",
            escape(harmless(" ".join(context.split()))),
        )
    return table


def coloured_answer(batch: Any, scores: Any, rhythm: Any, colour_by: str, console: Console) -> Text:
    """Return the answer with its preplans and anchors marked, coloured by a score, and what that means.

    The marks stay where there are no colours, as in a pipe or with NO_COLOR.
    """
    preplan_mark, anchor_mark, line_break = _PLAIN_MARKS if console.options.ascii_only else _MARKS
    columns = scores.response_mask[0].nonzero()[:, 0].tolist()
    values = getattr(scores, colour_by)[0].double()[columns].tolist()
    found = Text()
    for column, share in zip(columns, shares(values), strict=True):
        text = harmless(batch.texts[0][column])
        marks = preplan_mark * bool(rhythm.preplan[0, column]) + anchor_mark * bool(rhythm.anchor[0, column])
        word = text.lstrip(" ")
        # A mark belongs to the word, not to the space before it; and a line break's colour needs a place.
        shown = text[: len(text) - len(word)] + marks + word.replace("\n", f"{line_break}\n")
        for i, part in enumerate(shown.split("\n")):
            found.append("\n" if i else "")
            found.append(part, _style(colour_by, share))
    return found


def legend(scores: Any, colour_by: str, console: Console) -> Text:
    """Return what the marks and colours of `coloured_answer` mean."""
    preplan_mark, anchor_mark, _ = _PLAIN_MARKS if console.options.ascii_only else _MARKS
    found = Text(f"{preplan_mark} preplan  {anchor_mark} anchor")
    low, high = clipped_range(getattr(scores, colour_by)[0].double().tolist())
    if console.color_system is None or console.no_color or math.isnan(low):
        return found
    shown = SCORE_LOOKS[colour_by]
    found.append(f"  {shown.label}: {low:.3g} ")
    for i in range(_SWATCHES):
        found.append("  ", _style(colour_by, i / (_SWATCHES - 1)))
    return found.append(f" {high:.3g} {shown.unit}; no colour: undefined")


def _style(score: str, share: float) -> Style | None:
    if math.isnan(share):
        return None
    red, green, blue = SCORE_LOOKS[score].at(share)
    return Style(color="#000000", bgcolor=f"#{red:02x}{green:02x}{blue:02x}")


def harmless(text: str) -> str:
    """Return a text without characters that a terminal would obey, each as a symbol or its code.

    >>> harmless("so\\x1b[31m\\x9b") == "so\\u241b[31m\\u27e8009B\\u27e9"
    True
    """
    shown = (f"\u27e8{ord(c):04X}\u27e9" if "\x80" <= c < "\xa0" else c for c in visible(text))
    return "".join(shown).replace("\r\n", "\n").replace("\r", "\n")

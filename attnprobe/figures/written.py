"""The answer as text, each token's background coloured by a score (Fig. 9 of arXiv 2510.13554v2).

Users call `tokens`. The text is laid out here, in points: matplotlib breaks no lines, and a token's colour
has to end where the next one begins. What is left to others: the colours (colours) and the look (paper).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from attnprobe.batch import TokenBatch
from attnprobe.colours import SCORE_LOOKS, clipped_range, shares
from attnprobe.errors import ParameterError, ResultError
from attnprobe.figures.paper import TEXT_SIZE, WIDTH, FigureLike, import_matplotlib, look, new_figure
from attnprobe.figures.reading import Within, floats, read_scores, shown_columns
from attnprobe.report.visible_text import on_one_line, visible
from attnprobe.rhythm import Rhythm
from attnprobe.scores import TokenScores, check_same_tokens
from attnprobe.validation import IntLike, brief, choice, instance

if TYPE_CHECKING:
    ScoreNames: TypeAlias = str | Sequence[str]
else:
    ScoreNames = Any

# In points, from one line to the next, and what a token's colour fills of it: between them is room for marks.
_LINE, _FILLED = 15.0, 9.6
_HEADING, _BAR, _MARGIN = 13.0, 30.0, 3.0
_MARKS = {"preplan": "v", "anchor": "D"}
# Characters without width, and the joiners, which between letters change how these are drawn.
_WIDTHLESS, _JOINERS = "\u200b\u2060\ufeff\u00ad", "\u200c\u200d"
# `visible` has pictures for control characters, which few fonts have.
_CONTROLS = {chr(0x2400 + code): f"\u27e8{code:02X}\u27e9" for code in range(0x20)} | {
    "\u2421": "\u27e87F\u27e9"
}
# Tried for characters that the font lacks: they are no part of matplotlib, and may not be installed.
_FALLBACKS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Microsoft YaHei",
    "Hiragino Sans",
    "Arial Unicode MS",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "Noto Emoji",
)


@dataclass(frozen=True)
class _Placed:
    """A token, or a part of one that is longer than a line: where it stands, in points from the top left."""

    token: int
    text: str
    left: float
    width: float
    line: int


def tokens(
    scores: TokenScores,
    rhythm: Rhythm | None = None,
    *,
    score: ScoreNames = "waad",
    example: IntLike = 0,
    within: Within = None,
    batch: Any = None,
) -> FigureLike:
    """Draw the answer, each token's background coloured by a score, from its 5th to its 95th percentile.

    Line breaks are shown as a symbol. Tokens whose score is undefined are hatched. Texts are drawn as they
    are: nothing in them is taken for a formula.

    Args:
        scores: from `score_tokens`.
        rhythm: from `find_rhythm`: preplans have a triangle above them, anchors a diamond below; None: no
        marks. score: "waad", "fai", "receiver_fai" or "entropy", or several of them, one below the other.
        example: which example to draw. within: which of its response tokens: `(first, stop)`, or `(first,
        None)` to the end; None: all. batch: the batch with the texts, if the scores have none.

    Raises:
        ParameterError: a score that there is not, or that was not measured; an example that there is not; a
            part without tokens. ResultError: a rhythm or batch of other tokens, no texts, or an empty
            response. MissingDependencyError: matplotlib is not installed.

    >>> import torch, attnprobe
    >>> waad = torch.tensor([[1.0, 3.0, 2.0]])
    >>> mask = torch.ones(1, 3, dtype=torch.bool)
    >>> scores = attnprobe.TokenScores(waad, waad, None, mask, texts=(("So", " x", " = $5"),))
    >>> figure = attnprobe.figures.tokens(scores)
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['So', ' x', ' = $5']
    """
    example = read_scores(scores, rhythm, example)
    names = _score_names(scores, score)
    columns = shown_columns(scores.response_mask, example, within)
    texts = [_shown(text) for text in _texts(scores, batch, example, columns)]
    import_matplotlib()
    room = 72 * WIDTH - 2 * _MARGIN
    with look():
        font = _font()
        placed = list(_laid_out(texts, room, font))
        lines = placed[-1].line + 1
        panel = _HEADING + lines * _LINE
        height = len(names) * (panel + _BAR) + _MARGIN
        # Constrained layout would scale the text's width, but not its letters.
        figure = new_figure(height / 72, layout="none")
        for i, name in enumerate(names):
            top = height - i * (panel + _BAR)
            values = floats(getattr(scores, name), example, columns)
            axes = _panel(figure, top - panel, panel, height)
            heading = SCORE_LOOKS[name].label
            axes.set_title(heading, loc="left", y=1 - 10 / panel, pad=0)
            _write(axes, placed, values, name, font)
            if rhythm is not None:
                _mark(axes, placed, rhythm, example, columns)
            _add_bar(figure, name, values, (top - panel - 9) / height, height)
    return figure


def _score_names(scores: TokenScores, score: ScoreNames) -> list[str]:
    names: list[Any] = list(score) if isinstance(score, list | tuple) else [score]
    if not names:
        raise ParameterError("score must be a score's name, or several; got none")
    for name in names:
        choice(name, "score", tuple(SCORE_LOOKS))
        if getattr(scores, name) is None:
            known = [each for each in SCORE_LOOKS if getattr(scores, each) is not None]
            raise ParameterError(f"these scores have no {name}; they have {', '.join(known)}")
    return names


def _texts(scores: TokenScores, batch: Any, example: int, columns: list[int]) -> list[str]:
    texts = scores.texts
    if batch is not None:
        batch = instance(batch, TokenBatch, "batch")
        check_same_tokens(batch, scores, "the scores")
        texts = texts or batch.texts
    if texts is None:
        raise ResultError(
            "the scores have no texts to draw: measure a batch with texts (TokenBatch.from_text, or "
            "from_ids(..., tokenizer=...)), or pass batch=; got batch=" + brief(batch)
        )
    return [texts[example][column] for column in columns]


def _shown(text: str) -> str:
    """Return a token's text as it is drawn: on one line, and with codes for what has no width or no glyph."""
    line = on_one_line(visible(text)).replace("\t", "\u21e5")
    hidden = _WIDTHLESS if line.strip(_JOINERS) else _WIDTHLESS + _JOINERS
    return "".join(_CONTROLS.get(c, f"\u27e8{ord(c):04X}\u27e9" if c in hidden else c) for c in line)


def _laid_out(texts: list[str], room: float, font: Any) -> Iterator[_Placed]:
    """Break texts into lines: before a word, and after a line break."""
    left, line = 0.0, 0
    for word in _words(texts):
        parts = [
            (token, part, _text_width(part, font))
            for token, text in word
            for part in _fitting(text, room, font)
        ]
        if left and left + sum(width for _, _, width in parts) > room:
            left, line = 0.0, line + 1
        for token, part, width in parts:
            if left and left + width > room:
                left, line = 0.0, line + 1
            yield _Placed(token, part, left, width, line)
            left += width
        if word[-1][1].endswith("\u21b5"):
            left, line = 0.0, line + 1


def _words(texts: list[str]) -> Iterator[list[tuple[int, str]]]:
    """Yield runs of tokens, as (number, text), between which a line may be broken."""
    word: list[tuple[int, str]] = []
    for token, text in enumerate(texts):
        if word and (text[:1].isspace() or word[-1][1].endswith("\u21b5")):
            yield word
            word = []
        word.append((token, text))
    if word:
        yield word


def _fitting(text: str, room: float, font: Any) -> Iterator[str]:
    """Yield a text in parts that fit on a line each."""
    while (width := _text_width(text, font)) > room and len(text) > 1:
        count = max(1, int(len(text) * room / width) - 1)
        while count > 1 and _text_width(text[:count], font) > room:
            count -= 1
        yield text[:count]
        text = text[count:]
    yield text


def _text_width(text: str, font: Any) -> float:
    """Return the width of a text, in points."""
    from matplotlib.textpath import text_to_path

    with warnings.catch_warnings():
        # Of glyphs that the font lacks: drawing warns of them.
        warnings.simplefilter("ignore", UserWarning)
        width: float = text_to_path.get_text_width_height_descent(text, font, False)[0]
    return width


def _font() -> Any:
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties

    family = [*rcParams["font.family"], *(name for name in _FALLBACKS if name in _installed())]
    return FontProperties(family=list(dict.fromkeys(family)), size=TEXT_SIZE)


@cache
def _installed() -> frozenset[str]:
    from matplotlib.font_manager import fontManager

    return frozenset(fontManager.get_font_names())


def _panel(figure: Any, bottom: float, height: float, whole: float) -> Any:
    """Return axes over the width of the figure, in whose data coordinates a unit is a point."""
    axes = figure.add_axes(
        (_MARGIN / (72 * WIDTH), bottom / whole, 1 - 2 * _MARGIN / (72 * WIDTH), height / whole)
    )
    axes.set_xlim(0, 72 * WIDTH - 2 * _MARGIN)
    axes.set_ylim(height, 0)
    axes.axis("off")
    return axes


def _middle(line: int) -> float:
    """Return how far the middle of a line of text is below the top of its panel, in points."""
    return _HEADING + (line + 0.5) * _LINE


def _write(axes: Any, placed: list[_Placed], values: list[float], name: str, font: Any) -> None:
    from matplotlib.patches import Rectangle

    parts, shown = shares(values), SCORE_LOOKS[name]
    for each in placed:
        share = parts[each.token]
        looks: dict[str, Any] = {
            "facecolor": "none",
            "hatch": "//////",
            "edgecolor": "#dddddd",
            "linewidth": 0,
        }
        if not math.isnan(share):
            looks = {"facecolor": [part / 255 for part in shown.at(share)], "linewidth": 0}
        corner = each.left, _middle(each.line) - _FILLED / 2
        axes.add_patch(Rectangle(corner, each.width, _FILLED, **looks))
        axes.text(
            each.left,
            _middle(each.line) + 0.32 * TEXT_SIZE,
            each.text,
            fontproperties=font,
            color="black",
            va="baseline",
            parse_math=False,
            usetex=False,
        )


def _mark(axes: Any, placed: list[_Placed], rhythm: Rhythm, example: int, columns: list[int]) -> None:
    # Of a token that was broken, the first part has the mark.
    first = {each.token: each for each in reversed(placed)}
    for (name, marker), side in zip(_MARKS.items(), (-1, 1), strict=True):
        peaks = getattr(rhythm, name)[example]
        found = [first[i] for i, column in enumerate(columns) if bool(peaks[column]) and i in first]
        axes.plot(
            [each.left + each.width / 2 for each in found],
            [_middle(each.line) + side * (_FILLED / 2 + 1.6) for each in found],
            linestyle="none",
            marker=marker,
            markersize=2.6 if marker == "D" else 3.4,
            markeredgewidth=0,
            color=SCORE_LOOKS["waad" if name == "preplan" else "fai"].line,
            label=name,
            clip_on=False,
        )
    axes.legend(
        loc="upper right",
        bbox_to_anchor=(1, 1),
        ncols=2,
        borderaxespad=0,
        borderpad=0,
        markerscale=1.3,
    )


def _add_bar(figure: Any, name: str, values: list[float], bottom: float, whole: float) -> None:
    """Draw the ramp with what its ends mean."""
    matplotlib = import_matplotlib()
    low, high = clipped_range(values)
    if math.isnan(low) or low == high:
        return
    shown = SCORE_LOOKS[name]
    ramp = [[part / 255 for part in colour] for colour in shown.ramp]
    colours = matplotlib.colors.LinearSegmentedColormap.from_list(name, ramp)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(low, high), colours)
    axes = figure.add_axes((_MARGIN / (72 * WIDTH), bottom, 0.5, 5 / whole))
    bar = figure.colorbar(scale, cax=axes, orientation="horizontal", ticks=[low, high])
    bar.ax.set_xticklabels([f"{low:.3g}", f"{high:.3g}"])
    bar.outline.set_linewidth(0.4)
    axes.tick_params(length=0, pad=1.5)
    for label, side in zip(bar.ax.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)
    figure.text(0.56, bottom, f"{shown.label} ({shown.unit})", fontsize=TEXT_SIZE, va="bottom")

"""What results show in a notebook: pictures, coloured answers and small tables, at a glance.

Jupyter, marimo and others call `_repr_html_` of a result, which calls one of these. What they return carries
its own styles and has no ids, so that it changes nothing else on the page and can be shown twice; pictures
are images within it. It stays under 300 kB, whatever the result's size. Without matplotlib there are no
pictures. What is left to others: drawing (figures), and the page that can be queried (report).
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from attnprobe.colours import SCORE_LOOKS, shares
from attnprobe.errors import AttnprobeError

_MOST_SHOWN = 5
# Of the coloured texts, all together; a token takes about 150.
_MOST_CHARACTERS = 140_000
_PREPLAN, _ANCHOR = "\u25be", "\u25c6"
_WIDTH = 560


def scores_display(scores: Any, title: str, table: Callable[[], str]) -> str:
    """Return the first response's curves, and responses coloured by WAAD and FAI; a table without texts."""

    def curves() -> Any:
        from attnprobe import figures

        return figures.rhythm(scores, example=_first_with_response(scores.response_mask))

    picture = _picture(curves, "WAAD, FAI and what else was measured over the response's tokens")
    if scores.texts is None:
        return _page(picture, table())
    note = "background: WAAD, line below: FAI; point at a token for its numbers"
    return _page(
        f"<p>{html.escape(f'{title}; {note}')}</p>",
        picture,
        *_responses(scores.texts, scores.response_mask, lambda example: _by_scores(scores, example)),
    )


def rhythm_display(rhythm: Any, table: str) -> str:
    """Return how many preplans and anchors there are, and the responses with these marked."""
    if rhythm.texts is None or rhythm.response_mask is None:
        return _page(table)
    note = f"{_PREPLAN} preplan, {_ANCHOR} anchor; underlined: dominated anchors and their intros"
    return _page(
        table,
        f"<p>{html.escape(note)}</p>",
        *_responses(rhythm.texts, rhythm.response_mask, lambda example: _by_roles(rhythm, example)),
    )


def heads_display(groups: Any, table: str) -> str:
    """Return the span of every head as a picture, with the groups marked, and the most typical heads."""

    def grid() -> Any:
        from attnprobe import figures

        return figures.heads(groups)

    return _page(_picture(grid, "the mean span of every head, layers across, with the groups marked"), table)


def statistics_display(statistics: Any, table: str) -> str:
    """Return the mean span of every head as a picture, and what was measured."""
    if statistics.span is None:
        return _page(table)

    def grid() -> Any:
        from attnprobe.figures.grid import span_grid

        return span_grid(statistics.span.double().nanmean(0), statistics.layers, {})

    return _page(table, _picture(grid, "the mean span of every head, layers across"))


def maps_display(maps: Any, table: str) -> str:
    """Return the maps of the first response as pictures, and their sizes."""

    def pictures() -> Any:
        from attnprobe import figures

        return figures.maps(maps)

    return _page(_picture(pictures, "the mean maps of the local and of the global heads"), table)


def _page(*parts: str) -> str:
    """Return parts one below the other."""
    return f"<div>{''.join(parts)}</div>"


def _picture(draw: Callable[[], Any], description: str) -> str:
    """Return a figure as an image; nothing if it cannot be drawn, such as without matplotlib."""
    from attnprobe.figures.paper import png

    try:
        image = base64.b64encode(_with_palette(png(draw(), 160))).decode()
    except AttnprobeError:
        return ""
    # An image, not SVG elements: those bring styles and ids that reach into the rest of the page.
    return (
        f'<img src="data:image/png;base64,{image}" alt="{html.escape(description)}" '
        f'style="width:{_WIDTH}px;max-width:100%">'
    )


def _with_palette(image: bytes) -> bytes:
    """Return a PNG image with 128 colours, which is a third of the size."""
    from PIL import Image  # matplotlib needs it, too

    stream = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").quantize(128).save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _first_with_response(mask: Tensor) -> int:
    found = mask.any(-1).nonzero()
    return int(found[0, 0]) if len(found) else 0


def _responses(
    texts: Sequence[Sequence[str]], mask: Tensor, spans: Callable[[int], Iterator[str]]
) -> Iterator[str]:
    """Yield a paragraph for each of the first responses, and one that says what was left out."""
    room = _MOST_CHARACTERS
    for example in range(min(len(texts), _MOST_SHOWN)):
        shown, count = [], int(mask[example].sum())
        for span in spans(example):
            room -= len(span)
            if room < 0:
                break
            shown.append(span)
        left = f" and {count - len(shown):,} more tokens" if len(shown) < count else ""
        # Dark on light, also where a notebook is light on dark: the colours are made for it.
        look = "line-height:2;background:#fff;color:#111;padding:0.4em;overflow-wrap:anywhere"
        yield f'<p style="{look}">{"".join(shown)}{left}</p>'
    if len(texts) > _MOST_SHOWN:
        yield f"<p>and {len(texts) - _MOST_SHOWN} more examples</p>"


def _by_scores(scores: Any, example: int) -> Iterator[str]:
    """Yield the tokens of a response, coloured by WAAD, underlined by FAI."""
    columns = scores.response_mask[example].nonzero()[:, 0].tolist()
    measured = {name: getattr(scores, name) for name in SCORE_LOOKS if getattr(scores, name) is not None}
    values = {name: each[example].double().cpu()[columns].tolist() for name, each in measured.items()}
    waad, fai = shares(values["waad"]), shares(values["fai"])
    for i, column in enumerate(columns):
        styles = []
        if not math.isnan(waad[i]):
            styles.append(f"background:{_hex('waad', waad[i])}")
        if not math.isnan(fai[i]):
            styles.append(f"border-bottom:3px solid {_hex('fai', fai[i])}")
        numbers = ", ".join(f"{SCORE_LOOKS[name].label} {each[i]:.3g}" for name, each in values.items())
        yield _span(scores.texts[example][column], ";".join(styles), f"column {column}: {numbers}")


def _by_roles(rhythm: Any, example: int) -> Iterator[str]:
    """Yield the tokens of a response, preplans and anchors marked."""
    columns = rhythm.response_mask[example].nonzero()[:, 0].tolist()
    names = ("preplan", "anchor", "dominated", "intro")
    masks = {name: getattr(rhythm, name)[example].cpu()[columns].tolist() for name in names}
    for i, column in enumerate(columns):
        roles = [name for name in names if masks[name][i]]
        marks = _PREPLAN * masks["preplan"][i] + _ANCHOR * masks["anchor"][i]
        styles = []
        if marks:
            styles.append(f"background:{_hex('waad' if masks['preplan'][i] else 'fai', 0.6)}")
        if masks["dominated"][i] or masks["intro"][i]:
            styles.append("text-decoration:underline")
        told = f"column {column}: {', '.join(roles)}" if roles else f"column {column}"
        yield _span(rhythm.texts[example][column], ";".join(styles), told, marks)


def _span(text: str, style: str, title: str, marks: str = "") -> str:
    # A mark belongs to the word, not to the space before it.
    word = text.lstrip(" ")
    shown = html.escape(text[: len(text) - len(word)] + marks + word).replace("\n", "\u21b5<br>")
    return f'<span style="{style}" title="{html.escape(title)}">{shown}</span>'


def _hex(score: str, share: float) -> str:
    return "#" + "".join(f"{part:02x}" for part in SCORE_LOOKS[score].at(share))

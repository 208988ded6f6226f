"""One response of a batch as a list of tokens, each with everything that is known about it.

`Report` reads its response here. Results are tensors over a whole batch; a page shows one response, token by
token. `read_response` gathers the tokens, and `coupled_pairs` the preplans and anchors that belong together.
What is left to others: whether the results fit together (checks) and how things look (tokens, figures, page).
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

from torch import Tensor

from attnprobe.batch import TokenBatch
from attnprobe.rhythm import Rhythm
from attnprobe.scores import TokenScores
from attnprobe.texts import with_markers

_NEWLINES = re.compile(r"\r\n|\r|\n")
# The controls that embed, override or isolate a writing direction. Plain direction marks stay.
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_LONG_RUN = 8
_CONTEXT_BEFORE = 4
_CONTEXT_AFTER = 3


@dataclass(frozen=True)
class ResponseToken:
    """One token of a response; scores are NaN if undefined or not measured."""

    column: int
    text: str
    waad: float
    fai: float
    receiver_fai: float
    entropy: float
    preplan: bool
    anchor: bool
    dominated: bool
    intro: bool

    @property
    def label(self) -> str:
        """The text on one line, with line breaks shown as a symbol, for hover boxes and tables."""
        return on_one_line(self.text)


@dataclass(frozen=True)
class Context:
    """A token with the text around it, on one line."""

    before: str
    token: ResponseToken
    after: str


@dataclass(frozen=True)
class CoupledPair:
    """A preplan, the anchor that follows or coincides with it, and the intro of a dominated anchor."""

    preplan: Context
    anchor: Context
    intro: ResponseToken | None

    @property
    def distance(self) -> int:
        """The distance from preplan to anchor, in tokens."""
        return self.anchor.token.column - self.preplan.token.column


def read_response(
    batch: TokenBatch, scores: TokenScores, rhythm: Rhythm, example: int
) -> tuple[ResponseToken, ...]:
    """Return the response tokens of one example; without texts, their ids serve as texts."""
    columns = batch.response_mask[example].nonzero()[:, 0].tolist()
    shown = _texts_of(batch, example)
    texts = [visible(shown[column]) for column in columns]
    waad, fai, receiver_fai, entropy = (
        _floats(getattr(scores, name), example, columns)
        for name in ("waad", "fai", "receiver_fai", "entropy")
    )
    preplan, anchor, dominated, intro = (
        getattr(rhythm, name)[example].tolist() for name in ("preplan", "anchor", "dominated", "intro")
    )
    return tuple(
        ResponseToken(
            column=column,
            text=texts[i],
            waad=waad[i],
            fai=fai[i],
            receiver_fai=receiver_fai[i],
            entropy=entropy[i],
            preplan=preplan[column],
            anchor=anchor[column],
            dominated=dominated[column],
            intro=intro[column],
        )
        for i, column in enumerate(columns)
    )


def coupled_pairs(tokens: tuple[ResponseToken, ...], rhythm: Rhythm, example: int) -> tuple[CoupledPair, ...]:
    """Return the preplan-anchor pairs of one response, in order."""
    place = {token.column: i for i, token in enumerate(tokens)}
    pairs = []
    for preplan, anchor in rhythm.pairs(example):
        # Only a rhythm made by hand has pairs outside the response; there is no token to show for them.
        if preplan in place and anchor in place:
            intro = _intro(tokens, place[anchor], rhythm, example)
            pairs.append(
                CoupledPair(_context(tokens, place[preplan]), _context(tokens, place[anchor]), intro)
            )
    return tuple(pairs)


def prompt_text(batch: TokenBatch, example: int) -> str | None:
    """Return the text before the response; None without texts, or if examples are packed."""
    if batch.texts is None or batch.segment_ids is not None:
        return None
    start = int(batch.response_mask[example].nonzero()[0, 0])
    real = batch.attention_mask[example].tolist()
    texts = _texts_of(batch, example)
    text = "".join(texts[column] for column in range(start) if real[column])
    return visible(text) or None


def _texts_of(batch: TokenBatch, example: int) -> list[str]:
    """Return the text of each token, or else its id; hundreds of an image's tokens are shown once."""
    ids = batch.input_ids[example].tolist()
    if batch.texts is not None:
        return with_markers(ids, batch.texts[example], {})
    shown = []
    for token, run in itertools.groupby(ids):
        count = len(list(run))
        # Without a tokenizer it is not known what they stand for.
        repeated = [f"{token}\u00d7{count} ", *[""] * (count - 1)]
        shown += repeated if count >= _LONG_RUN else [f"{token} "] * count
    return shown


def visible(text: str) -> str:
    """Return a text with symbols for characters that a page cannot hold, or that would rearrange it.

    Line breaks and tabs stay.

    >>> visible("\\x00") == "\\u2400"
    True
    """
    return "".join(_visible_character(character) for character in text)


def on_one_line(text: str) -> str:
    """Return a text with its line breaks as symbols.

    >>> on_one_line("so\\n\\n") == "so\\u21b5\\u21b5"
    True
    """
    return _NEWLINES.sub("\u21b5", text)


def _visible_character(character: str) -> str:
    code = ord(character)
    if code < 0x20 and character not in "\n\r\t":
        # Unicode has a picture of each control character.
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if character in _REORDERING:
        # One such token would reorder the text of all tokens after it.
        return f"\u27e8{code:04X}\u27e9"
    # A lone surrogate cannot be encoded; a tokenizer should not produce one, but a page must not fail on it.
    return "\ufffd" if 0xD800 <= code <= 0xDFFF else character


def _floats(values: Tensor | None, example: int, columns: list[int]) -> list[float]:
    if values is None:
        return [math.nan] * len(columns)
    found: list[float] = values[example, columns].detach().float().cpu().tolist()
    return found


def _context(tokens: tuple[ResponseToken, ...], place: int) -> Context:
    before = tokens[max(0, place - _CONTEXT_BEFORE) : place]
    after = tokens[place + 1 : place + 1 + _CONTEXT_AFTER]
    return Context(
        "".join(token.label for token in before), tokens[place], "".join(token.label for token in after)
    )


def _intro(
    tokens: tuple[ResponseToken, ...], place: int, rhythm: Rhythm, example: int
) -> ResponseToken | None:
    """Return the token that opened the chunk of a dominated anchor, as `dominated_anchors` chose it."""
    if not tokens[place].dominated:
        return None
    # Rhythm stores intros as a set of tokens: an anchor's own intro is the one with the largest change of
    # WAAD within its lookback, not across a gap; among equal ones, the latest.
    column = tokens[place].column
    before = [
        token
        for distance, token in enumerate(reversed(tokens[max(0, place - rhythm.lookback) : place]), 1)
        if token.column == column - distance and token.intro
    ]
    delta = rhythm.delta[example]
    return max(before, key=lambda token: (float(delta[token.column]), token.column), default=None)

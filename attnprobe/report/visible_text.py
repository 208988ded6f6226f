"""Texts made visible: characters that a page cannot hold, that have no width, or that would rearrange it.

The report and the page of a corpus show every text of a model through `visible`. `byte_marks` says what
stands for tokens that are only part of a character. What is left to others: escaping (the template, and the
page's own script, which writes texts as texts).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_NEWLINES = re.compile(r"\r\n|\r|\n")
# The controls that embed, override or isolate a writing direction: one would rearrange the text of all tokens
# after it.
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Marks of direction change the order of the characters beside them, which is right: they stay, and are shown.
_DIRECTION_MARKS = frozenset("\u200e\u200f\u061c")
# Between two visible characters these two shape emoji and letters, and belong to the text.
_JOINERS = frozenset("\u200c\u200d")
_INVISIBLE = frozenset(
    "\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b\u2028\u2029\u2060\u2061\u2062\u2063\u2064\u206a\u206b"
    "\u206c\u206d\u206e\u206f\u3164\ufeff\uffa0\ufff9\ufffa\ufffb"
)


def visible(text: str) -> str:
    """Return a text with symbols for characters that a page cannot hold or show, or that would rearrange it.

    Line breaks and tabs stay, and so do joiners between two visible characters, as in emoji and Persian.

    >>> visible("\\x00") == "\\u2400", visible("a\\u200b") == "a\\u27e8200B\\u27e9"
    (True, True)
    """
    return "".join(_visible_character(text, i) for i in range(len(text)))


def on_one_line(text: str) -> str:
    """Return a text with its line breaks as symbols.

    >>> on_one_line("so\\n\\n") == "so\\u21b5\\u21b5"
    True
    """
    return _NEWLINES.sub("\u21b5", text)


def byte_marks(texts: Sequence[str], known: Sequence[bytes | None] = ()) -> dict[int, str]:
    """Return what to show for tokens that hold only bytes of a character, by their place.

    The text of a character belongs to its first token, and those of the others are empty. `known` are the
    bytes of each token, from `token_bytes`. Without them, where a character has as many tokens as bytes, the
    byte of each is known; elsewhere only that it is a part.

    >>> byte_marks(["\u00e9", "", "a"]) == {1: "\u27e8A9\u27e9"}
    True
    """
    marks: dict[int, str] = {}
    begin = 0
    while begin < len(texts):
        end = begin + 1
        while end < len(texts) and not texts[end]:
            end += 1
        # A replacement character stands for bytes that are not known.
        raw = texts[begin][-1:].replace("\ufffd", "").encode("utf-8", "surrogatepass")
        # A single byte has no parts: the tokens after it are empty for another reason, as those of an image.
        if 1 < end - begin <= len(raw):
            exact = end - begin == len(raw)
            for i in range(begin + 1, end):
                marks[i] = _hexadecimal(raw[i - begin : i - begin + 1]) if exact else "\u27e8\u2026\u27e9"
        begin = end
    for i, own in enumerate(known):
        # The first byte of whatever is no character by itself lies above ASCII.
        if own and own[0] >= 0x80 and not texts[i].replace("\ufffd", ""):
            marks[i] = _hexadecimal(own)
    return marks


def _hexadecimal(raw: bytes) -> str:
    return f"\u27e8{raw.hex(' ').upper()}\u27e9"


def _visible_character(text: str, place: int) -> str:
    character = text[place]
    code = ord(character)
    if code < 0x20 and character not in "\n\r\t":
        # Unicode has a picture of each control character.
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if 0xD800 <= code <= 0xDFFF:
        # A lone surrogate cannot be encoded; a tokenizer should not produce one, but a page must not fail on
        # it.
        return "\ufffd"
    if character in _DIRECTION_MARKS:
        return f"{_named(code)}{character}"
    if character in _JOINERS:
        return character if 0 < place < len(text) - 1 else _named(code)
    if _is_selector(code):
        return character if place else _named(code)
    hidden = character in _REORDERING or character in _INVISIBLE or 0x80 <= code < 0xA0
    return _named(code) if hidden or 0xE0000 <= code < 0xE0080 else character


def _is_selector(code: int) -> bool:
    """Whether a character chooses how the one before it looks."""
    return 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF


def _named(code: int) -> str:
    return f"\u27e8{code:04X}\u27e9"

r"""Classes of tokens: line ends, punctuation, numbers, function words and so on.

Attention rests on some kinds of tokens whatever they say (App. B.11 of arXiv 2510.13554v2 names punctuation
and line breaks). `couplings(null="class")` therefore compares tokens with others of their class only, and
calls `token_class`, or a function of the user's own. What is left to others: which words are content
(content_words).
"""

from __future__ import annotations

from typing import Literal, get_args

from attnprobe.analysis.content_words import FUNCTION_WORDS
from attnprobe.validation import instance

TokenClass = Literal[
    "line end", "space", "punctuation", "number", "mathematics", "function word", "content word", "word part"
]

TOKEN_CLASSES: tuple[TokenClass, ...] = get_args(TokenClass)

_PUNCTUATION = frozenset(".,;:!?…\"'`“”‘’()[]-–—。，、！？")


def token_class(text: str) -> TokenClass:
    r"""Return the class of a token, from its text alone.

    - "line end": it contains a line break, whatever else it contains.
    - "space": only white space, or nothing at all.
    - "number": digits, with or without a point or comma.
    - "function word", "content word": letters that start a word, as the space before them or a capital letter
      says. "word part": letters without either, which usually continue a word.
    - "punctuation": only marks of prose. "mathematics": everything else, such as `+`, `$`, `\` or `{`.

    Raises:
        ParameterError: something that is not text.

    >>> [token_class(text) for text in (".\n\n", " ", " the", " apples", "ing", "12", ").")]
    ['line end', 'space', 'function word', 'content word', 'word part', 'number', 'punctuation']
    """
    instance(text, str, "text")
    if "\n" in text or "\r" in text:
        return "line end"
    bare = text.strip()
    if not bare:
        return "space"
    if any(character.isdigit() for character in bare) and not any(c.isalpha() for c in bare):
        return "number" if all(c.isdigit() or c in ".," for c in bare) else "mathematics"
    if any(character.isalpha() for character in bare):
        if bare.startswith("\\"):
            return "mathematics"
        starts = text[0].isspace() or bare[0].isupper()
        if not starts:
            return "word part"
        return "function word" if bare.lower().replace("’", "'") in FUNCTION_WORDS else "content word"
    return "punctuation" if all(character in _PUNCTUATION for character in bare) else "mathematics"

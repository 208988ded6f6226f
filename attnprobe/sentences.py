r"""The sentences of a response, in texts that reason with numbers and LaTeX.

`split_sentences` cuts a text, and `sentence_ids` says which sentence each token belongs to. The
rules are those that mathematical text needs: "3.14", "e.g.", "1. First", `\boxed{3. 5}` and `$x. y$` are
not cut; the end of a line always cuts. `split_as_thought_anchors` has the rules of the scripts of Thought
Anchors instead, to reproduce their numbers. `measure(..., receiver=SentenceReceivers(...))` and the analyses
of sentences call them. What is left to others: the attention between sentences (metrics, receivers).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from attnprobe.batch import TokenBatch
from attnprobe.errors import BatchError
from attnprobe.validation import IntField, choice, instance, whole_number

Splitting = Literal["sentences", "thought_anchors"]
"""How a response is cut: by `split_sentences`, or by `split_as_thought_anchors`."""


@dataclass(frozen=True)
class SentenceReceivers:
    """How receiver heads are found by sentence: `measure(..., receiver=SentenceReceivers(...))`.

    `receiver="sentence"` is short for the defaults. What Thought Anchors' own scripts do (arXiv 2506.19143)
    is `SentenceReceivers(splitting="thought_anchors")`, with `layers=range(1, L)`: they leave out layer 0.

    Attributes:
        min_distance: pairs of sentences closer than this are left out.
        minimum_sentences: responses with fewer have no kurtosis; None: `min_distance + 4`, which gives four
            sentences a score.
        splitting: how the response is cut.

    Raises:
        ParameterError: a distance or number below 1, or an unknown splitting.

    >>> SentenceReceivers(min_distance=0)
    Traceback (most recent call last):
    attnprobe.errors.ParameterError: min_distance must be a whole number, at least 1; got 0
    """

    min_distance: IntField = 4
    minimum_sentences: IntField | None = None
    splitting: Splitting = "sentences"

    def __post_init__(self) -> None:
        """Check the options, and keep them as plain numbers."""
        object.__setattr__(self, "min_distance", whole_number(self.min_distance, "min_distance", minimum=1))
        if self.minimum_sentences is not None:
            least = whole_number(self.minimum_sentences, "minimum_sentences", minimum=1)
            object.__setattr__(self, "minimum_sentences", least)
        choice(self.splitting, "splitting", get_args(Splitting))


_NEVER_LAST = "e.g i.e cf vs viz mr mrs ms dr prof mt rev hon sr jr approx resp incl dept capt sgt w.r.t s.t"
_NUMBERED = "no nos fig figs eq eqs sec ch ex thm lem prop cor def vol p pp art"
_SOMETIMES_LAST = "etc al a.m p.m u.s u.k e.u inc ltd co corp st ft oz lb lbs sq hr hrs min mins secs yr yrs"
# No sentence ends here, whatever comes next.
_ABBREVIATIONS = frozenset(_NEVER_LAST.split())
# No sentence ends here if a number comes next: "No. 5", but "No. It is 5."
_BEFORE_NUMBERS = frozenset(_NUMBERED.split())
# A sentence ends here if a capital letter comes next.
_UNITS_AND_ENDINGS = frozenset(_SOMETIMES_LAST.split())
# Spans inside which nothing is cut. A dollar sign opens mathematics only if a character follows it directly,
# and closes it only directly after one and not before a digit: "$5 and $10" is money.
_WHOLE = re.compile(
    r"\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|\\begin\{(?P<env>[a-z]+\*?)\}.+?\\end\{(?P=env)\}"
    r"|(?<![\\$])\$(?=[^\s$])[^$\n]*?(?<=[^\s\\])\$(?![\d$])",
    re.DOTALL,
)
_BRACED = re.compile(r"\\[A-Za-z]+\s*\{")
_STOP = re.compile(r"[.!?…]+[\"'”’)\]}*_]*(?=\s|$)|[。！？]+|\n+")
_WORD_BEFORE = re.compile(r"[A-Za-z][A-Za-z.]*$")
_ENUMERATOR = re.compile(
    r"(?:^|\n)[\s>*#_-]*(?:\(?(?:step|case|part|question|example)\s+)?\(?(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,4})[.)]+[*_]*$",
    re.IGNORECASE,
)


def split_sentences(text: str) -> list[tuple[int, int]]:
    r"""Return the sentences of a text as `(start, end)` offsets, which together cover all of it.

    A sentence ends after ".", "!" or "?" (and closing quotes or brackets) before white space, and at the end
    of a line. It does not end inside a number, mathematics or a braced LaTeX argument; after an
    abbreviation, an initial, or the number of a list item ("1.", "a)", "Step 2."); nor before a word in lower
    case. Spaces and lines without a letter or digit belong to the sentence before them.

    >>> text = r"So x = 3.5, e.g. half of 7. Then \boxed{3.5}."
    >>> [text[start:end] for start, end in split_sentences(text)]
    ['So x = 3.5, e.g. half of 7. ', 'Then \\boxed{3.5}.']
    """
    instance(text, str, "text")
    whole = _whole_spans(text)
    cuts = []
    for match in _STOP.finditer(text):
        if any(start < match.start() < end for start, end in whole):
            continue
        end = match.end()
        if "\n" not in match.group() and not _ends_sentence(text, match.start(), end):
            continue
        while end < len(text) and text[end].isspace():
            end += 1
        cuts.append(end)
    sentences: list[tuple[int, int]] = []
    start = 0
    for cut in [*cuts, len(text)]:
        if cut <= start:
            continue
        if any(character.isalnum() for character in text[start:cut]) or not sentences:
            sentences.append((start, cut))
        else:
            sentences[-1] = (sentences[-1][0], cut)
        start = cut
    return _with_leading_marks(text, sentences)


def _with_leading_marks(text: str, sentences: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join a first piece without a letter or digit to the sentence after it."""
    if len(sentences) > 1 and not any(c.isalnum() for c in text[slice(*sentences[0])]):
        return [(sentences[0][0], sentences[1][1]), *sentences[2:]]
    return sentences


def _whole_spans(text: str) -> list[tuple[int, int]]:
    """Return the spans of mathematics and of braced LaTeX arguments."""
    spans = [match.span() for match in _WHOLE.finditer(text)]
    for match in _BRACED.finditer(text):
        depth = 0
        for place in range(match.end() - 1, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                spans.append((match.start(), place + 1))
                break
    return spans


def _ends_sentence(text: str, stop: int, end: int) -> bool:
    """Whether the stop at `text[stop:end]` ends a sentence."""
    mark = text[stop]
    if mark in "。！？":
        return True
    following = text[end:].lstrip()
    if mark in "!?":
        return not _goes_on(following)
    if _ENUMERATOR.search(text[text.rfind("\n", 0, stop) + 1 : end]):
        return False
    before = _WORD_BEFORE.search(text[:stop])
    if before is not None and not text.startswith("..", stop):
        word = before.group().lower()
        numbered = following[:1].isdigit()
        if word in _ABBREVIATIONS or (word in _BEFORE_NUMBERS and numbered):
            return False
        if _is_initial(before.group(), text[: before.start()]):
            return False
        if word in _UNITS_AND_ENDINGS:
            return not (numbered or following[:1].islower())
    return not _goes_on(following)


def _is_initial(word: str, before: str) -> bool:
    """Whether a capital letter stands for a name: after a name or title, or alone at the start.

    "Mr. J. Smith" and "John F. Kennedy" go on; "through the point P." is a complete sentence.
    """
    if len(word) != 1 or not word.isupper() or word == "I":
        return False
    earlier = before.split()
    return not earlier or (earlier[-1][0].isupper() and earlier[-1].strip(".").isalpha())


def _goes_on(following: str) -> bool:
    """Whether text after a full stop goes on in lower case; a lone variable may start a sentence."""
    word = re.match(r"[a-z]+", following)
    return word is not None and (len(word.group()) > 1 or word.group() == "a")


# The shortest piece that is left alone, in characters.
_SHORTEST = 10


def split_as_thought_anchors(text: str) -> list[tuple[int, int]]:
    r"""Return the sentences of a text as the scripts of Thought Anchors cut it (arXiv 2506.19143).

    A piece ends after ".", "?" or "!" before a space or the end of a line, wherever that stands ("e.g. this"
    is cut), and at blank lines, but not at the end of a line alone. Pieces shorter than ten characters join
    the next one, or a last one the one before. What comes after the last such end is dropped: since nothing
    follows the end of a text, that is always its last sentence. White space between pieces belongs to none.

    >>> text = "First, add 3 and 4.\nThen we have 7\n\nNo. So it is 14. The answer is 14."
    >>> [text[start:end] for start, end in split_as_thought_anchors(text)]
    ['First, add 3 and 4.', 'Then we have 7', 'No. So it is 14.']
    """
    instance(text, str, "text")
    pieces: list[tuple[int, int]] = []
    start = 0
    for match in re.finditer(r"[.?!](?=[ \n])|\n(?=\n)|\r\n(?=\r\n)", text.rstrip()):
        piece = text[start : match.end()]
        if piece.strip():
            begin = start + len(piece) - len(piece.lstrip())
            pieces.append((begin, begin + len(piece.strip())))
            start = match.end()
    merged: list[tuple[int, int]] = []
    # A short piece that waits for the next one: where it starts, and how long it is.
    waiting: tuple[int, int] | None = None
    for begin, end in pieces:
        length = end - begin
        if waiting is not None:
            # The scripts join pieces by one space, whatever stands between them.
            begin, length = waiting[0], waiting[1] + 1 + length
        waiting = (begin, length) if length < _SHORTEST else None
        if waiting is None:
            merged.append((begin, end))
    if waiting is not None:
        first = merged.pop()[0] if merged else waiting[0]
        merged.append((first, pieces[-1][1]))
    return merged


def sentence_ids(batch: TokenBatch, splitting: Splitting = "sentences") -> Int[Tensor, "batch token"]:
    """Return the sentence of each response token, numbered from 0 in each response; -1 elsewhere.

    A token belongs to the sentence that contains its first character that is not white space or, if it is
    all white space, its first character. A gap in the response ends a sentence.

    Args:
        batch: with texts.
        splitting: "sentences", as `split_sentences` does, which leaves out no token; or "thought_anchors", as
            `split_as_thought_anchors` does, where some tokens belong to no sentence, above all the last ones.

    Raises:
        BatchError: a batch without texts, or with packed examples.
        ParameterError: an unknown splitting, or something that is no batch.

    >>> from dataclasses import replace
    >>> batch = TokenBatch.from_ids([[5, 6, 7, 8]], response_start=1)
    >>> sentence_ids(replace(batch, texts=(("Q", "Yes.", " It", " is."),)))
    tensor([[-1,  0,  1,  1]])
    """
    instance(batch, TokenBatch, "batch")
    choice(splitting, "splitting", get_args(Splitting))
    if batch.texts is None:
        raise BatchError("sentences need the tokens' texts: build the batch with tokenizer=...")
    if batch.segment_ids is not None:
        raise BatchError("examples are packed: take batch.sequences()[0], with one sequence in each example")
    ids = torch.full(batch.input_ids.shape, -1, dtype=torch.long)
    for example, mask in enumerate(batch.response_mask):
        count = 0
        for columns in _runs(mask.nonzero()[:, 0].tolist()):
            pieces = [batch.texts[example][column] for column in columns]
            numbers = torch.tensor(_sentence_of_each(pieces, splitting))
            ids[example, columns] = numbers.where(numbers < 0, numbers + count)
            count += max(0, int(numbers.max()) + 1)
    return ids.to(batch.input_ids.device)


def _runs(columns: list[int]) -> list[list[int]]:
    """Split ascending columns into runs without gaps."""
    runs: list[list[int]] = []
    for column in columns:
        if runs and column == runs[-1][-1] + 1:
            runs[-1].append(column)
        else:
            runs.append([column])
    return runs


def _sentence_of_each(pieces: list[str], splitting: Splitting) -> list[int]:
    """Return the sentence of each token of a text without gaps, numbered from 0; -1 for none."""
    text = "".join(pieces)
    if splitting == "sentences":
        # Tokens without a character may stand at the end, or make up the text.
        spans = [*split_sentences(text)[:-1], (0, len(text) + 1)]
    else:
        spans = split_as_thought_anchors(text)
    numbers: list[int] = []
    sentence, begin = 0, 0
    for piece in pieces:
        blank = len(piece) - len(piece.lstrip())
        place = begin + (blank if blank < len(piece) else 0)
        while sentence < len(spans) and place >= spans[sentence][1]:
            sentence += 1
        inside = sentence < len(spans) and place >= spans[sentence][0]
        numbers.append(sentence if inside else -1)
        begin += len(piece)
    return numbers

r"""Content words of a text, and how much of them two texts share (Eq. 11 of arXiv 2510.13554v2).

A content word is a number, or a word of letters that is not a function word of English. Numbers are
compared by value as written, without thousands separators: "1,000" is "1000", and "0.50" is "0.5". Words
are compared in lower case, without possessive "'s". LaTeX commands such as `\frac` are not words, but the
text in their braces counts. Words are not stemmed: "apple" and "apples" differ, which lowers all overlaps
alike.

`perturb` compares continuations with this. What is left to others: which texts are compared (perturbation).
"""

from __future__ import annotations

import re

# Articles, pronouns, prepositions, conjunctions, auxiliaries and other words of closed classes. "Not"
# and number words are content: they change what a solution says.
_FUNCTION_WORDS = """
a an the this that these those each every some any such own same other another
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself
she her hers herself it its itself they them their theirs themselves one's
who whom whose which what where when why how there here
of in on at by for with about against between into through during before after above below to from
up down out off over under again further then once per via upon within without toward towards
and or but nor so yet if because as until while than though although since unless whether either
neither both
am is are was were be been being have has had having do does did doing done can could will would
shall should may might must let ought
just only also too very more most less least much many few now still even ever already thus hence
therefore however
i'm you're we're they're it's that's let's there's i've you've we've they've i'd you'd he'd she'd
we'd they'd i'll you'll he'll she'll we'll they'll he's she's
s t d ll m re ve
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())

_WORD = re.compile(r"\d[\d,]*(?:\.\d+)?|[^\W\d_]+(?:['’][^\W\d_]+)*")
_COMMAND = re.compile(r"\\[A-Za-z]+")


def content_words(text: str) -> frozenset[str]:
    r"""Return the content words of a text.

    >>> sorted(content_words(r"So the total is \boxed{1,050} apples."))
    ['1050', 'apples', 'total']
    """
    found = set()
    for match in _WORD.finditer(_COMMAND.sub(" ", text)):
        word = match.group().lower().replace("’", "'")
        if word[0].isdigit():
            word = word.replace(",", "")
            if "." in word:
                word = word.rstrip("0").rstrip(".")
            found.add(word)
            continue
        if word in FUNCTION_WORDS:
            continue
        word = word.removesuffix("'s")
        if word not in FUNCTION_WORDS:
            found.add(word)
    return frozenset(found)


def content_overlap(first: str, second: str) -> float:
    """Return the Jaccard overlap of the content words of two texts, in `[0, 1]`.

    The overlap of two texts without any content words is 1.

    >>> content_overlap("Tom has 3 apples", "Tom had 3 pears")
    0.5
    """
    ours, theirs = content_words(first), content_words(second)
    if not ours and not theirs:
        return 1.0
    return len(ours & theirs) / len(ours | theirs)

"""One response of a batch as a list of tokens, each with everything that is known about it.

`Report` reads its response here. Results are tensors over a whole batch; a page shows one response, token by
token. `read_response` gathers the tokens, `coupled_pairs` the preplans and anchors that belong together, and
`influence_rows` how many rows each token's FAI is a mean over. What is left to others: whether the results
fit together (checks), what is packed into the page (entry), and how things look (assets).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from torch import Tensor

from attnprobe.batch import TokenBatch
from attnprobe.head_statistics import HeadStatistics
from attnprobe.reductions import Horizon, rows_in_horizon
from attnprobe.report.visible_text import on_one_line, visible
from attnprobe.rhythm import Rhythm
from attnprobe.scores import TokenScores
from attnprobe.texts import with_markers

_LONG_RUN = 8
ENOUGH_ROWS = 10
"""An FAI that is a mean over fewer rows says more about these rows than about the token."""


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
        """The text on one line, with line breaks shown as a symbol, for tables."""
        return on_one_line(self.text)


@dataclass(frozen=True)
class CoupledPair:
    """A preplan, the anchor that follows or coincides with it, and the intro of a dominated anchor."""

    preplan: ResponseToken
    anchor: ResponseToken
    intro: ResponseToken | None

    @property
    def distance(self) -> int:
        """The distance from preplan to anchor, in tokens."""
        return self.anchor.column - self.preplan.column


def read_response(
    batch: TokenBatch, scores: TokenScores, rhythm: Rhythm, example: int
) -> tuple[ResponseToken, ...]:
    """Return the response tokens of one example; without texts, their ids serve as texts."""
    columns = batch.response_mask[example].nonzero()[:, 0].tolist()
    shown = shown_texts(batch, example)
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
            pairs.append(CoupledPair(tokens[place[preplan]], tokens[place[anchor]], intro))
    return tuple(pairs)


def influence_rows(batch: TokenBatch, statistics: HeadStatistics, example: int) -> Tensor | None:
    """Return over how many rows the FAI of each column is a mean (`H(s)` in Eq. 10 of arXiv 2510.13554v2).

    None if they are rows of a segment that the batch does not have.
    """
    name = statistics.influence_rows
    if name not in ("response", "prompt", "first", *batch.segment_names):
        return None
    return rows_in_horizon(batch.segment(name)[example, None].cpu(), *statistics.horizon, None)[0]


def enough_rows(horizon: Horizon) -> int:
    """Return how many rows an FAI should be a mean over: ten, or all of a shorter horizon.

    >>> enough_rows((10, 100)), enough_rows((1, 4))
    (10, 4)
    """
    low, high = horizon
    return ENOUGH_ROWS if high is None else min(ENOUGH_ROWS, high - low + 1)


def prompt_text(batch: TokenBatch, example: int) -> str | None:
    """Return the text before the response; None without texts, or if examples are packed."""
    if batch.texts is None or batch.segment_ids is not None:
        return None
    start = int(batch.response_mask[example].nonzero()[0, 0])
    real = batch.attention_mask[example].tolist()
    texts = shown_texts(batch, example)
    text = "".join(texts[column] for column in range(start) if real[column])
    return visible(text) or None


def shown_texts(batch: TokenBatch, example: int) -> list[str]:
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


def _floats(values: Tensor | None, example: int, columns: list[int]) -> list[float]:
    if values is None:
        return [math.nan] * len(columns)
    found: list[float] = values[example, columns].detach().float().cpu().tolist()
    return found


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

"""CorpusSettings: how a corpus is scored; everything that changes a number, and nothing else.

`score` and the stages of other engines take one. It is written into the output, so that a run is only
continued with the settings that it was begun with. What is left to others: the input and its columns
(sources, rows), which heads (grouping), and how much runs at a time (batching).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

from attnprobe.adapters.base import Layers
from attnprobe.errors import ParameterError
from attnprobe.heads import SpanKind, check_shares
from attnprobe.metric_arguments import HorizonLike, check_horizon, check_window
from attnprobe.provenance import Align
from attnprobe.rhythm import check_lookback, check_quantile
from attnprobe.validation import (
    BoolField,
    FloatField,
    IntField,
    brief,
    choice,
    truth,
    whole_number,
    whole_numbers,
)


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """How a corpus is scored.

    Attributes:
        layers, window, horizon: as for `measure`.
        entropy: whether to compute token entropy; without it the last layer's logits are not computed.
        receivers: whether to find receiver heads and score by them too: one more pass over the attention,
            while heads are grouped.
        head_quantile, head_span: the share of heads in each group, and by which span they are ranked, as for
            `classify_heads`.
        peak_quantile, lookback: of preplans and anchors, as for `find_rhythm`.
        align: which token a row of attention describes, as for `score_tokens`.
        head_values: whether to keep the span of every head, and its share on the first token, for each row.
        credit: a strategy of `attnprobe.rl`, whose weights are kept as gamma; None: no gamma.
        chat: whether a prompt that is a text is put into the chat template, as a user's turn.
        longest: rows of more tokens are rejected; None: those with more than the model was made for.

    Raises:
        ParameterError: any of them is invalid.

    >>> CorpusSettings(window=5).describe()["window"]
    5
    """

    layers: Layers = "all"
    window: IntField = 10
    horizon: HorizonLike = (10, 100)
    entropy: BoolField = True
    receivers: BoolField = False
    head_quantile: FloatField = 0.3
    head_span: SpanKind = "plain"
    peak_quantile: FloatField = 0.4
    lookback: IntField = 3
    align: Align = "token"
    head_values: BoolField = True
    credit: Any = None
    chat: BoolField = False
    longest: IntField | None = None

    def __post_init__(self) -> None:
        """Check every setting, and keep it in its plain form."""
        layers = self.layers if isinstance(self.layers, str) else tuple(whole_numbers(self.layers, "layers"))
        checked: dict[str, Any] = {
            "layers": layers,
            "window": check_window(self.window),
            "horizon": check_horizon(self.horizon),
            "head_quantile": check_shares(self.head_quantile, 1)[0],
            "head_span": choice(self.head_span, "head_span", get_args(SpanKind)),
            "peak_quantile": check_quantile(self.peak_quantile),
            "lookback": check_lookback(self.lookback),
            "align": choice(self.align, "align", get_args(Align)),
            "longest": None if self.longest is None else whole_number(self.longest, "longest", minimum=1),
        }
        for name in ("entropy", "receivers", "head_values", "chat"):
            checked[name] = truth(getattr(self, name), name)
        if self.credit is not None and (not callable(self.credit) or isinstance(self.credit, type)):
            raise ParameterError(
                f"credit must be a strategy such as CoupledRhythmCredit(); got {brief(self.credit)}"
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON can hold them; a strategy is described by its repr."""
        told = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        told["credit"] = None if self.credit is None else repr(self.credit)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}

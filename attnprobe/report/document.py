"""The Report: results in, one self-contained HTML file out.

Users make one and save it; in a notebook it displays itself. What is left to others: numbers (the results),
several reports on one page (collection), the page's data (entry), and the page itself (page).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from attnprobe.batch import BatchLike, TokenBatch
from attnprobe.head_groups import HeadGroups
from attnprobe.head_statistics import HeadStatistics
from attnprobe.maps import GroupMaps
from attnprobe.report.checks import check_results_fit, check_weights
from attnprobe.report.entry import Shown, entry_data, shown_model_name
from attnprobe.report.page import Page, page_html, page_template
from attnprobe.rhythm import Rhythm
from attnprobe.scores import TokenScores
from attnprobe.texts import token_bytes
from attnprobe.validation import ArrayLike, IntLike, instance, whole_number

if TYPE_CHECKING:
    WeightsLike: TypeAlias = Mapping[str, ArrayLike]
else:
    WeightsLike = Any


class Report(Page):
    """A page that shows what was measured on one response of a batch.

    Args:
        batch: the tokens, as for `measure`. The page shows texts if the batch or the statistics have them
            (from a tokenizer: `TokenBatch.from_text`, `from_ids(..., tokenizer=...)`), otherwise token ids.
        statistics: what `measure` returned for the batch.
        heads: the head groups that the scores are of.
        scores: the token scores of the batch.
        rhythm: the peaks of the scores.
        maps: the maps of the example, from `group_maps`, or of all examples; None leaves the maps out, and
            where each token looks.
        example: which example of the batch to show.
        title: the page's heading.
        prompt: the prompt as text; default: the batch's own text before the response, if it has texts.
        notes: your own text, shown below the heading.
        weights: the weights gamma `[batch, token]` that strategies of credit give the tokens, by name:
            `{"coupled": CoupledRhythmCredit()(scores)}`. The text can be coloured by each.
        tokenizer: with it, tokens that are only part of a character are shown as their bytes; without it,
            only where these follow from the character.

    Raises:
        BatchError: something that is not a batch, or not a tokenizer.
        ParameterError: an example that the batch does not have, weights that do not fit the batch, or
            anything else in place of a result.
        ResultError: results of other tokens, examples, models, windows, horizons, layers or heads.
    """

    def __init__(
        self,
        batch: BatchLike,
        statistics: HeadStatistics,
        heads: HeadGroups,
        scores: TokenScores,
        rhythm: Rhythm,
        maps: GroupMaps | None = None,
        *,
        example: IntLike = 0,
        title: str = "Attention report",
        prompt: str | None = None,
        notes: str | None = None,
        weights: WeightsLike | None = None,
        tokenizer: Any = None,
    ) -> None:
        batch = TokenBatch.of(batch)
        self.statistics: HeadStatistics = instance(
            statistics, HeadStatistics, "statistics", "measure returns them"
        )
        self.heads: HeadGroups = instance(heads, HeadGroups, "heads", "classify_heads returns them")
        self.scores: TokenScores = instance(scores, TokenScores, "scores", "score_tokens returns them")
        self.rhythm: Rhythm = instance(rhythm, Rhythm, "rhythm", "find_rhythm returns it")
        self.maps: GroupMaps | None = None
        if maps is not None:
            self.maps = instance(maps, GroupMaps, "maps", "group_maps returns them")
        self.example = whole_number(example, "example", maximum=batch.batch_size - 1)
        self.title: str = instance(title, str, "title")
        self.prompt: str | None = prompt if prompt is None else instance(prompt, str, "prompt")
        self.notes: str | None = notes if notes is None else instance(notes, str, "notes")
        check_results_fit(batch, statistics, heads, scores, rhythm, maps, self.example)
        self.weights: dict[str, Tensor] = check_weights(weights, batch, self.example)
        self.tokenizer = tokenizer
        if tokenizer is not None:
            token_bytes(tokenizer, [])
        self.batch = batch if batch.texts is not None else replace(batch, texts=statistics.texts)

    def __repr__(self) -> str:
        count = int(self.batch.response_mask[self.example].sum())
        told = [
            f"example {self.example} of {self.batch.batch_size}",
            f"{count} response tokens",
            shown_model_name(self.statistics.model_name),
            "without maps" if self.maps is None else "with maps",
        ]
        return f"Report({', '.join(told)})"

    def html(self) -> str:
        """Return the page.

        Raises:
            MissingDependencyError: jinja2 is not installed.
        """
        check_dependencies()
        return page_html(self.title, [self.entry()])

    def entry(self) -> dict[str, Any]:
        """Return the report's data, as a page holds them; `Reports` puts several on one page."""
        return entry_data(
            Shown(
                self.batch,
                self.statistics,
                self.heads,
                self.scores,
                self.rhythm,
                self.maps,
                self.weights,
                self.example,
                self.title,
                self.prompt,
                self.notes,
                self.tokenizer,
            )
        )


def check_dependencies() -> None:
    """Check that what a page needs is installed, before doing the work that it will show.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    page_template()

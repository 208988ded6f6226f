"""The Report: results in, one self-contained HTML file out.

Users make one and save it; in a notebook it displays itself. The page opens offline: plotly.js, figures and
styles are part of it, and its content security policy lets a browser run only the scripts written here, and
fetch nothing. What is left to others: numbers (the results), pictures (tokens, figures, maps), words and
markup (page.html.jinja).
"""

from __future__ import annotations

import base64
import hashlib
import math
from dataclasses import replace
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from attnprobe.batch import BatchLike, TokenBatch
from attnprobe.errors import MissingDependencyError
from attnprobe.head_groups import Group, HeadGroups
from attnprobe.head_statistics import HeadStatistics
from attnprobe.maps import GroupMaps
from attnprobe.provenance import ranges
from attnprobe.report import tokens as coloured
from attnprobe.report.checks import check_results_fit, maps_entry
from attnprobe.report.figures import curves_figure, group_names, heads_figure, response_curves
from attnprobe.report.maps import MOST_CELLS, maps_figure
from attnprobe.report.plotting import figure_json, import_plotly, plotly_source
from attnprobe.report.response import (
    CoupledPair,
    ResponseToken,
    coupled_pairs,
    prompt_text,
    read_response,
    visible,
)
from attnprobe.results import html_table
from attnprobe.rhythm import Rhythm
from attnprobe.scores import TokenScores
from attnprobe.storage import write_atomically
from attnprobe.validation import IntLike, instance, whole_number
from attnprobe.version import __version__

_HEADS_LISTED = 10

# Draws every figure of the page, each from the JSON block before it. The buttons are listed, since plotly's
# default selection includes one that sends the figure to a server.
_DRAWING_SCRIPT = """\
const settings = {
  responsive: true,
  displaylogo: false,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};
for (const element of document.querySelectorAll("[data-figure]")) {
  const figure = JSON.parse(document.getElementById(element.dataset.figure).textContent);
  Plotly.newPlot(element, figure.data, figure.layout, settings);
}
"""


class Report:
    """A page that shows what was measured on one response of a batch.

    Args:
        batch: the tokens, as for `measure`. The page shows texts if the batch or the statistics have them
            (from a tokenizer: `TokenBatch.from_text`, `from_ids(..., tokenizer=...)`), otherwise token ids.
        statistics: what `measure` returned for the batch.
        heads: the head groups that the scores are of.
        scores: the token scores of the batch.
        rhythm: the peaks of the scores.
        maps: the maps of the example, from `group_maps`, or of all examples; None leaves the maps out.
        example: which example of the batch to show.
        title: the page's heading.
        prompt: the prompt as text; default: the batch's own text before the response, if it has texts.
        notes: your own text, shown below the heading.

    Raises:
        BatchError: something that is not a batch.
        ParameterError: an example that the batch does not have, or anything else in place of a result.
        ResultError: results of other tokens, models, windows, horizons, layers or heads.
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
        self.batch = batch if batch.texts is not None else replace(batch, texts=statistics.texts)

    def __repr__(self) -> str:
        count = int(self.batch.response_mask[self.example].sum())
        told = [
            f"example {self.example} of {self.batch.batch_size}",
            f"{count} response tokens",
            _shown_model_name(self.statistics.model_name),
            "without maps" if self.maps is None else "with maps",
        ]
        return f"Report({', '.join(told)})"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the page, in a frame that lets its scripts run and nothing else."""
        try:
            page = self.html()
        except MissingDependencyError as error:
            return html_table(repr(self), ("", ""), [("cannot be shown", str(error))])
        return (
            f'<iframe srcdoc="{escape(page)}" sandbox="allow-scripts allow-downloads" '
            f'title="{escape(self.title)}" style="width: 100%; height: 800px; border: 0"></iframe>'
        )

    def save(self, path: str | Path) -> Path:
        """Write the page as one HTML file, completely or not at all, and return its path.

        Raises:
            MissingDependencyError: jinja2 or plotly is not installed.
            ResultError: a path that cannot be written.
        """
        return write_atomically(path, self.html().encode())

    def html(self) -> str:
        """Return the page.

        Raises:
            MissingDependencyError: jinja2 or plotly is not installed.
        """
        template = _template()
        tokens = read_response(self.batch, self.scores, self.rhythm, self.example)
        pairs = coupled_pairs(tokens, self.rhythm, self.example)
        plotly = plotly_source()
        scripts = [plotly, _DRAWING_SCRIPT]
        page: str = template.render(
            title=visible(self.title),
            notes=visible(self.notes or ""),
            prompt=visible(self.prompt) if self.prompt is not None else prompt_text(self.batch, self.example),
            version=__version__,
            facts=self._facts(),
            counts=_counts(tokens, pairs),
            texts=self._coloured_texts(tokens),
            has_texts=self.batch.texts is not None,
            has_entropy=self.scores.entropy is not None,
            has_receiver=self.scores.receiver_fai is not None,
            fai_missing=all(math.isnan(token.fai) for token in tokens),
            horizon=self.statistics.horizon,
            window=self.statistics.window,
            lookback=self.rhythm.lookback,
            pairs=pairs,
            head_tables=[self._head_table("local"), self._head_table("global")],
            map_block=self._map_block(),
            figures=self._figures(tokens, pairs),
            plotly=plotly,
            drawing_script=_DRAWING_SCRIPT,
            policy=_content_security_policy(scripts),
        )
        return page

    def _figures(
        self, tokens: tuple[ResponseToken, ...], pairs: tuple[CoupledPair, ...]
    ) -> dict[str, str | None]:
        """Return the figures as JSON that is safe in a script element."""
        curves = response_curves(
            tokens,
            has_receiver=self.scores.receiver_fai is not None,
            has_entropy=self.scores.entropy is not None,
        )
        maps = self._maps_of_example()
        return {
            "curves": figure_json(curves_figure(tokens, pairs, curves)),
            "heads": figure_json(heads_figure(self.heads)),
            "maps": None if maps is None else figure_json(maps_figure(maps, tokens)),
        }

    def _facts(self) -> dict[str, str]:
        """Return the facts about the run that the top of the page lists, by name."""
        statistics, heads = self.statistics, self.heads
        low, high = statistics.horizon
        facts = {
            "Model": _shown_model_name(statistics.model_name),
            "Layers measured": f"{len(statistics.layers)}: {ranges(statistics.layers)}",
        }
        if statistics.skipped_layers:
            facts["Layers without attention"] = ranges(statistics.skipped_layers)
        count, most = int((~heads.span.isnan()).sum()), heads.span.shape[1]
        uneven = "" if count == most * len(heads.layers) else "up to "
        groups = f"{int(heads.local_heads.sum())} local, {int(heads.global_heads.sum())} global"
        if heads.receiver_heads is not None:
            groups += f", {int(heads.receiver_heads.sum())} receivers"
        return facts | {
            "Heads measured": f"{count} ({uneven}{most} in a layer): {groups}",
            "WAAD window": f"{statistics.window} tokens",
            "FAI horizon": f"{low} to {high} tokens later" if high else f"{low} tokens later to the end",
            "Peaks": f"among the top {self.rhythm.quantile:.0%} of a score",
            "Lookback": f"an anchor follows its preplan within {self.rhythm.lookback} tokens",
            "Response": f"example {self.example} of a batch of {self.batch.batch_size}",
        }

    def _coloured_texts(self, tokens: tuple[ResponseToken, ...]) -> list[coloured.ColouredText]:
        """Return the response coloured by WAAD, and by FAI."""
        hovers = []
        preplans = {anchor: preplan for preplan, anchor in self.rhythm.pairs(self.example)}
        for token in tokens:
            scores = {"WAAD": token.waad, "FAI": token.fai}
            if self.scores.receiver_fai is not None:
                scores["FAI of receiver heads"] = token.receiver_fai
            if self.scores.entropy is not None:
                scores["entropy (nats)"] = token.entropy
            hovers.append(coloured.hover_text(token, scores, preplans.get(token.column)))
        return [
            coloured.coloured_text(
                tokens,
                lambda token: token.waad,
                name="WAAD",
                description="how far back the local heads look at this token",
                scale=coloured.WAAD_SCALE,
                hovers=hovers,
            ),
            coloured.coloured_text(
                tokens,
                lambda token: token.fai,
                name="FAI",
                description="how much later tokens read this token through the global heads",
                scale=coloured.FAI_SCALE,
                hovers=hovers,
            ),
        ]

    def _head_table(self, group: Group) -> dict[str, Any]:
        """Return the most typical heads of a group, one line of a table for each."""
        index = {layer: i for i, layer in enumerate(self.heads.layers)}
        kurtosis = self.heads.receiver_kurtosis
        lines = []
        for layer, head in self.heads.pairs(group)[:_HEADS_LISTED]:
            place = index[layer], head
            lines.append(
                {
                    "layer": layer,
                    "head": head,
                    "span": f"{float(self.heads.span[place]):.3g}",
                    "kurtosis": None if kurtosis is None else f"{float(kurtosis[place]):.3g}",
                    "receiver": "receiver" in group_names(self.heads, *place),
                }
            )
        return {"group": group, "lines": lines, "has_kurtosis": kurtosis is not None}

    def _maps_of_example(self) -> GroupMaps | None:
        """Return the maps of the example alone, without the padding of shorter responses."""
        if self.maps is None:
            return None
        return self.maps.select(maps_entry(self.maps, self.batch, self.example), trim=True)

    def _map_block(self) -> int:
        """Return how many tokens a cell of the maps covers."""
        maps = self._maps_of_example()
        return 1 if maps is None else math.ceil(maps.columns.shape[1] / MOST_CELLS)


def check_dependencies() -> None:
    """Check that what a page needs is installed, before doing the work that it will show.

    Raises:
        MissingDependencyError: jinja2 or plotly is not installed.
    """
    _template()
    import_plotly()


def _template() -> Any:
    """Return the page's template, or raise `MissingDependencyError` with what to install."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError("a report needs jinja2: pip install 'attnprobe[report]'") from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["score"] = coloured.format_score
    text = resources.files("attnprobe.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text)


def _content_security_policy(scripts: list[str]) -> str:
    """Return a policy that allows these scripts by their hashes, inline styles, and no fetching.

    Escaping already keeps hostile tokens from becoming markup; this is a second line of defence.
    """
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    # Plotly draws heatmaps as data URLs, and offers a figure for download as a blob.
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"


def _shown_model_name(name: str) -> str:
    """Return a model's name; for a model loaded from a folder, only the folder's own name.

    A report is made to be shared, and should not reveal paths on someone's disk.
    """
    if not name:
        return "unnamed"
    return Path(name).name if Path(name).is_absolute() else name


def _counts(tokens: tuple[ResponseToken, ...], pairs: tuple[CoupledPair, ...]) -> dict[str, int]:
    """Return what the page shows at a glance, by name."""
    return {
        "response tokens": len(tokens),
        "preplans": sum(token.preplan for token in tokens),
        "anchors": sum(token.anchor for token in tokens),
        "anchors with a preplan": len(pairs),
        "dominated anchors": sum(token.dominated for token in tokens),
    }

"""The page of a corpus: its summary as one HTML file, with links to the reports of single answers.

`attnprobe corpus summary` writes it. It holds no script and fetches nothing. What is left to others: the
numbers (summary), and the report of an answer (report).
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from attnprobe.corpus.summary import CorpusSummary
from attnprobe.errors import MissingDependencyError
from attnprobe.report.visible_text import visible
from attnprobe.storage import PathLike, as_path, write_atomically
from attnprobe.version import __version__


def report_path(folder: Path, row: int) -> Path:
    """Return where the report of a row is, if there is one."""
    return folder / "reports" / f"{row}.html"


def summary_page(summary: CorpusSummary, folder: PathLike, title: str = "A corpus of answers") -> str:
    """Return the page of a summary.

    Notable answers link to their reports, where the folder of scores has them: `attnprobe corpus report`
    writes one.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError("a page needs jinja2: pip install 'attnprobe[report]'") from error
    place = as_path(folder)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = visible
    text = resources.files("attnprobe.corpus").joinpath("page.html.jinja").read_text(encoding="utf-8")
    page: str = environment.from_string(text).render(
        title=title,
        summary=summary,
        quantities=zip(*summary._table().values(), strict=True),
        links={
            each.row: f"reports/{each.row}.html"
            for each in summary.notable
            if report_path(place, each.row).is_file()
        },
        folder=place.name,
        version=__version__,
    )
    return page


def save_page(summary: CorpusSummary, folder: PathLike, title: str = "A corpus of answers") -> Path:
    """Write the page of a summary as `summary.html` into the folder of its scores, and return its path.

    Raises:
        MissingDependencyError: jinja2 is not installed.
        ResultError: it cannot be written.
    """
    return write_atomically(as_path(folder) / "summary.html", summary_page(summary, folder, title).encode())

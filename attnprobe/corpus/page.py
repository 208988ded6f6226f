"""The page of a corpus: its summary as one HTML file, with links to the reports of single answers.

`attnprobe corpus summary` writes it. It holds no script and fetches nothing. What is left to others: the
numbers (summary), and the report of an answer (report).
"""

from __future__ import annotations

import json
import re
import shlex
import zlib
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

    It links to the reports that the folder of scores has now: `attnprobe corpus report` writes one.

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
        reports=sorted(int(file.stem) for file in place.glob("reports/*.html") if file.stem.isdecimal()),
        folder=shlex.quote(place.resolve().name),
        version=__version__,
    )
    return page


def save_page(summary: CorpusSummary, folder: PathLike, title: str = "A corpus of answers") -> Path:
    """Write the page of a summary into the folder of its scores, and return its path.

    It is `summary.html`. The page of some rows, chosen with `where`, has a name of its own.

    Raises:
        MissingDependencyError: jinja2 is not installed.
        ResultError: it cannot be written.
    """
    name = "-".join(["summary", *(f"{field}-{json.dumps(value)}" for field, value in summary.where)])
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", name)[:80]
    if plain != name:
        plain += f"-{zlib.crc32(name.encode()):08x}"
    return write_atomically(as_path(folder) / f"{plain}.html", summary_page(summary, folder, title).encode())

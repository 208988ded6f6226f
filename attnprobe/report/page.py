"""The page around the entries: one self-contained HTML file with its styles, its script, and nothing fetched.

`Report` and `Reports` are pages, and call `page_html`. The styles and the script lie in assets/, in files
that each have one purpose; they are put into the page in the order of `SCRIPTS`, without a build step. The
page's content security policy lets a browser run only this script, and fetch nothing. What is left to others:
the entries (entry), words and markup (page.html.jinja), and everything that is drawn (assets).
"""

from __future__ import annotations

import base64
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from attnprobe.errors import MissingDependencyError
from attnprobe.report.packing import safe_json
from attnprobe.report.visible_text import visible
from attnprobe.results import html_table
from attnprobe.storage import PathLike, write_atomically
from attnprobe.version import __version__

SCRIPTS = (
    "numbers.js",
    "data.js",
    "scores.js",
    "colours.js",
    "selection.js",
    "tooltip.js",
    "text.js",
    "links.js",
    "details.js",
    "canvas.js",
    "curves.js",
    "heads.js",
    "head_table.js",
    "maps.js",
    "pairs.js",
    "find.js",
    "align.js",
    "compare.js",
    "print.js",
    "main.js",
)
"""The files of the page's script, in order: what a file needs when it is read stands before it."""


class Page(ABC):
    """What is shown as one page: in a browser, and in a notebook."""

    title: str

    @abstractmethod
    def html(self) -> str:
        """Return the page."""

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the page, in a frame that lets its script run and nothing else."""
        try:
            return page_frame(self.html(), self.title)
        except MissingDependencyError as error:
            return html_table(repr(self), ("", ""), [("cannot be shown", str(error))])

    def save(self, path: PathLike) -> Path:
        """Write the page as one HTML file, completely or not at all, and return its path.

        Raises:
            MissingDependencyError: jinja2 is not installed.
            ResultError: a path that cannot be written.
        """
        return write_atomically(path, self.html().encode())


def page_html(
    title: str,
    entries: Sequence[dict[str, Any]],
    compare: tuple[int, int] | None = None,
    *,
    is_collection: bool = False,
) -> str:
    """Return a page with these entries; `compare` opens it with two of them side by side.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    script = page_script()
    page: str = page_template().render(
        title=visible(title),
        names=[entry["title"] for entry in entries],
        lines=[entry["line"] for entry in entries],
        blocks=[safe_json(entry) for entry in entries],
        settings=safe_json({"compare": compare, "isCollection": is_collection}),
        styles=asset("page.css"),
        script=script,
        policy=_content_security_policy(script),
        version=__version__,
    )
    return page


def page_template() -> Any:
    """Return the page's template, or raise `MissingDependencyError` with what to install."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError("a report needs jinja2: pip install 'attnprobe[report]'") from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = resources.files("attnprobe.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text)


@lru_cache(maxsize=1)
def page_script() -> str:
    """Return the page's script: all its files, in a scope of their own."""
    return "\n".join(["(() => {", '"use strict";', *(asset(name) for name in SCRIPTS), "})();"])


def asset(name: str) -> str:
    """Return a file of the page's styles or script."""
    return resources.files("attnprobe.report").joinpath("assets", name).read_text(encoding="utf-8")


def page_frame(page: str, title: str) -> str:
    """Return what a notebook shows: a page, in a frame that lets its script run and nothing else."""
    return (
        f'<iframe srcdoc="{escape(page)}" sandbox="allow-scripts allow-downloads" '
        f'title="{escape(title)}" style="width: 100%; height: 800px; border: 0"></iframe>'
    )


def _content_security_policy(script: str) -> str:
    """Return a policy that allows this script by its hash, inline styles, and no fetching.

    Texts are written as texts, which already keeps hostile ones from becoming markup; this is a second line
    of defence.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'"

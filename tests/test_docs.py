"""The README and the docs: their examples run, and their links lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if _BLOCK.search(p.read_text())], ids=name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch) -> None:
    """All examples of a page, one after the other as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    module = f"examples_of_{page.stem}".replace("-", "_").lower()
    namespace: dict[str, object] = {"__name__": module}
    # Dataclasses and others look their module up.
    monkeypatch.setitem(sys.modules, module, type(sys)(module))
    for block in _BLOCK.finditer(page.read_text()):
        line = page.read_text()[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block.group(1), str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in _LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(ROOT / link).resolve() for link in _LINK.findall((ROOT / "README.md").read_text())}
    unlinked = [name(page) for page in PAGES if page.resolve() not in linked and page.name != "README.md"]
    assert unlinked == []


def test_every_command_is_documented() -> None:
    from attnprobe.cli import app

    page = (ROOT / "docs" / "command-line.md").read_text()
    names = [command.callback.__name__ for command in app.registered_commands]
    assert sorted(names) == ["doctor", "heads", "report", "score"]
    assert [n for n in names if f"attnprobe {n}" not in page] == []


def test_every_option_is_documented() -> None:
    from typer.main import get_command

    from attnprobe.cli import app

    page = (ROOT / "docs" / "command-line.md").read_text()
    command: Any = get_command(app)
    options = {
        option
        for name in ("report", "heads", "score")
        for parameter in command.commands[name].params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert {"--prompt-file", "--no-chat", "-o", "--color-by"} <= options
    assert sorted(option for option in options - {"--help", "-h"} if f"`{option}" not in page) == []

"""The tutorial notebook: it is committed without outputs, runs from top to bottom, and shows pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOK = DOCS / "tutorial.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_it_is_committed_without_outputs() -> None:
    assert [cell for cell in cells("code") if cell["outputs"] or cell["execution_count"] is not None] == []
    ids = [cell["id"] for kind in ("code", "markdown") for cell in cells(kind)]
    assert len(set(ids)) == len(ids)


def test_its_links_lead_somewhere() -> None:
    text = "".join("".join(cell["source"]) for cell in cells("markdown"))
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    assert links
    assert [link for link in links if not (DOCS / link).exists()] == []


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: Any) -> None:
    """In IPython, which Jupyter runs too: every result is shown in a form of its own, not as its repr.

    With the model that other tests have loaded: loading takes longer than all the rest.
    """
    interactive = pytest.importorskip(
        "IPython.core.interactiveshell", reason="the notebook group has IPython"
    )
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setattr("attnprobe.models.load_model", lambda: smollm2)
    monkeypatch.chdir(tmp_path)
    shell = interactive.InteractiveShell()
    shell.history_manager.enabled = False
    shown = []
    for cell in cells("code"):
        found = shell.run_cell("".join(cell["source"]), store_history=False)
        found.raise_error()
        if found.result is not None and not isinstance(found.result, str):
            data, _ = shell.display_formatter.format(found.result)
            assert data.keys() & {"text/html", "image/png"}, f"{type(found.result).__name__} is not shown"
            shown.append(data)
    kinds = [type(value).__name__ for value in shell.user_ns.values()]
    assert {"HeadStatistics", "HeadGroups", "TokenScores", "Rhythm", "Report"} <= set(kinds)
    pictures = [data for data in shown if "image/png" in data or "<img" in data.get("text/html", "")]
    assert len(pictures) >= 6
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "rhythm.pdf").read_bytes().startswith(b"%PDF")

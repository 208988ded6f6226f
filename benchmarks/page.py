"""The table of docs/performance.md, written from a run's records, so that no number there is typed by hand.

A full run of `cost` calls this. What is left to others: measuring (cost), what the lines mean (subjects), and
the words around the table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cost_model import counted_ratio
from benchmarks.subjects import SUBJECTS

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
_COLUMNS = (
    "tokens",
    "layers",
    "what",
    "time",
    "range",
    "counted",
    "peak",
    "held",
    "above the loaded model",
)


def markdown(machine: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """Return the records as a markdown table, under a line that says where they were measured."""
    rounds = dict.fromkeys(f"{r['rounds']} at {r['tokens']} tokens in {r['layers']} layers" for r in records)
    lines = [
        f"{machine['cores']} cores ({machine['processor']}), torch {machine['torch']}, {machine['threads']} "
        f"{'thread' if machine['threads'] == 1 else 'threads'}. Rounds: {', '.join(rounds)}.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"| {' | '.join('---' for _ in _COLUMNS)} |",
    ]
    return "\n".join([*lines, *map(_line, records)])


def _line(record: dict[str, Any]) -> str:
    name, tokens, layers = record["subject"], record["tokens"], record["layers"]
    above = f"{(record['held_bytes'] - record['loaded_bytes']) / 2**20:,.0f} MB"
    if name == "plain":
        cells = [f"*plain pass: {record['seconds']:.2f} s*", "1", "", "1", "1", "1", above]
    else:
        low, high = record["time_ratio_range"]
        counted = counted_ratio(name, tokens, layers)
        cells = [
            SUBJECTS[name].meaning,
            f"**{record['time_ratio']:.2f}x**",
            f"{low:.2f} to {high:.2f}",
            "" if counted is None else f"{counted:.2f}x",
            f"{record['peak_ratio']:.2f}x",
            f"{record['held_ratio']:.2f}x",
            above,
        ]
    return f"| {' | '.join([str(tokens), str(layers), *cells])} |"


def replaced(text: str, table: str) -> str:
    """Return a page's text with a new table between its two markers.

    Raises:
        ValueError: a page without the markers, or with several.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"the page needs {BEGIN} and {END}, once each and in this order")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table}\n{END}{after}"

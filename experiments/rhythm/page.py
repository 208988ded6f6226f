"""Every number again from the committed raw data, and the page that states them.

    python -m experiments.rhythm.page

For each model in the results folder this writes `summary.json` with every estimate, and the figure of the
couplings; then it fills the template `page.md`, whose numbers are all placeholders, and writes
docs/results/rhythm.md. No model is run. What is left to others: the numbers (estimates) and figures that need
a model (figures, which the experiment's own command draws).
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from experiments.rhythm import estimates, figures, raw

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent.parent / "docs" / "results" / "rhythm.md"
MODELS = {"smol": "SmolLM2-135M-Instruct", "tiny": "tiny-llama"}

PAPER = {
    "entropy_at_preplans": {"random": 0.2386, "observed": 0.3608, "lift": 0.512},
    "receiver_at_global": {"random": 0.2241, "observed": 0.6084, "lift": 1.715},
    "anchor_after_preplan": {"random": 0.3687, "observed": 0.5253, "lift": 0.425},
}
"""Table 2 of arXiv 2510.13554v2; the first lift is that of its own numbers (printed: 51.97%)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute all estimates, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.rhythm.page", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the raw data are")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    options = parser.parse_args(arguments)
    for name in MODELS.values():
        folder = options.results / name
        summary = summarise(folder)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        figures.couplings_figure(summary["choices"], PAPER, folder / "couplings.png")
        print(f"{name}: {summary['answers']} answers")
    options.page.write_text(render(read_summaries(options.results)), encoding="utf-8")


def summarise(folder: Path, *, draws: int = raw.DRAWS) -> dict[str, Any]:
    """Return all estimates for one model."""
    return estimates.estimate(raw.read(folder), draws=draws) | raw.of_responses(folder)


def read_summaries(results: Path = RESULTS) -> dict[str, Any]:
    """Return the estimates of all models as they were stored."""
    return {
        short: json.loads((results / name / "summary.json").read_text(encoding="utf-8"))
        for short, name in MODELS.items()
    }


def render(summaries: dict[str, Any]) -> str:
    """Return the page, with all numbers filled in; a number that does not exist is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters |= {"lift": lift, "share": share, "number": number, "percent": percent, "p": p_value}
    template = environment.get_template("page.md")
    page = template.render(paper=PAPER, nulls=estimates.MOVED, holds=holds, **summaries)
    blocks = re.split(r"\n\s*\n", page.strip())
    return "\n\n".join(map(_reflowed, blocks)) + "\n"


def _reflowed(block: str) -> str:
    """Return a block of Markdown with its lines as long as elsewhere in the docs, whatever was filled in."""
    if block.lstrip("\n").startswith(("|", "#", "!", "    ")):
        return "\n".join(line.rstrip() for line in block.strip("\n").split("\n"))
    parts = re.split(r"\n(?=- )", block.strip())
    width: dict[str, Any] = {"width": 120, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(
        textwrap.fill(
            " ".join(part.split()), subsequent_indent="  " if part.startswith("- ") else "", **width
        )
        for part in parts
    )


def holds(claim: bool) -> None:
    """Check that a claim of the page holds; the template calls this beside each sentence.

    Raises:
        AssertionError: the numbers no longer bear the sentence out: it must be rewritten.
    """
    if not claim:
        raise AssertionError("a claim of the page no longer holds: rewrite the sentence beside this call")


def lift(value: Sequence[float] | float) -> str:
    """Return a lift, with its interval if it has one.

    >>> lift([0.124, 0.09, 0.157]), lift(-0.02)
    ('+12.4% [+9.0, +15.7]', '-2.0%')
    """
    if isinstance(value, int | float):
        return f"{100 * value:+.1f}%"
    middle, low, high = (100 * part for part in value)
    return f"{middle:+.1f}% [{low:+.1f}, {high:+.1f}]"


def share(value: Sequence[float]) -> str:
    """Return a share with its interval.

    >>> share([0.435, 0.41, 0.46])
    '43.5% [41.0, 46.0]'
    """
    middle, low, high = (100 * part for part in value)
    return f"{middle:.1f}% [{low:.1f}, {high:.1f}]"


def number(value: Sequence[float] | float, digits: int = 3) -> str:
    """Return a number, with its interval if it has one.

    >>> number(1.52), number([1.52, 1.447, 1.606], 2)
    ('1.520', '1.52 [1.45, 1.61]')
    """
    if isinstance(value, int | float):
        return f"{value:.{digits}f}"
    middle, low, high = (f"{part:.{digits}f}" for part in value)
    return f"{middle} [{low}, {high}]"


def percent(value: float, digits: int = 1) -> str:
    """Return a share without an interval.

    >>> percent(0.534)
    '53.4%'
    """
    return f"{100 * value:.{digits}f}%"


def p_value(value: float) -> str:
    """Return a p-value to the precision that matters.

    >>> p_value(0.0005), p_value(0.018), p_value(1.0)
    ('0.0005', '0.018', '1')
    """
    return f"{value:.1g}" if value < 0.001 else f"{value:.2g}"


if __name__ == "__main__":
    main()

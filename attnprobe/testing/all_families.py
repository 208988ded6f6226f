"""Every causal family: what attnprobe does with each causal language model of transformers, in a table.

    python -m attnprobe.testing.all_families                            # try all; print the table
    python -m attnprobe.testing.all_families --output docs/families.md  # the same, into the page
    python -m attnprobe.testing.all_families llama gemma2               # these only, with every check

`make families` runs the second. Each family gives a line of JSON in a results file, whatever happens in it.
What is left to others: the models (family_models), and the checks (family_checks).
"""

from __future__ import annotations

import argparse
import json
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from attnprobe.testing.family_checks import check_family
from attnprobe.testing.family_models import build_family, causal_families
from attnprobe.testing.family_report import FamilyReport, Outcome
from attnprobe.testing.tiny_models import TRAITS

__all__ = [
    "build_family",
    "causal_families",
    "check_families",
    "check_family",
    "families_table",
    "family_row",
    "first_sentence",
    "summary",
]

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"

_TITLES = (
    "family",
    "what is particular",
    "layers read",
    "transformers",
    "`measure`, `attach`",
    "`generate`",
    "bitwise",
    "suppression",
    "TransformerLens",
    "nnsight",
    "refused sites",
)


def families_table(reports: Iterable[FamilyReport]) -> str:
    """Return the table as Markdown: a line for each family that is read, then those that are not."""
    reports = list(reports)
    read = [_TITLES, *(family_row(report) for report in reports if report.status not in _UNREAD)]
    parts = [_markdown(read)]
    for status, title in _UNREAD.items():
        rows = [
            (f"`{report.name}`", first_sentence(report.reason))
            for report in reports
            if report.status == status
        ]
        if rows:
            parts.append(_markdown([("family", title), *rows]))
    return "\n\n".join(parts)


_UNREAD = {"refused": "why it is refused", "not built": "why it cannot be tried"}


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def family_row(report: FamilyReport) -> tuple[str, ...]:
    """Return the cells of a family that is read."""
    outcomes = report.outcomes
    depth = len(report.layers) + len(report.skipped_layers)
    reading = [outcome for title, outcome in outcomes.items() if title.startswith(("measure", "attach"))]
    generating = [outcome for title, outcome in outcomes.items() if title.startswith("generate")]
    return (
        f"`{report.name}`",
        TRAITS.get(report.name, ""),
        "all" if not report.skipped_layers else f"{len(report.layers)} of {depth}",
        report.status,
        _numbers(reading),
        _numbers(generating),
        "yes" if report.is_bitwise else report.changes[0],
        _suppression(outcomes.get("suppression")),
        _cell(outcomes.get("transformer_lens")),
        _cell(outcomes.get("nnsight")),
        ", ".join(f"`{site}`" for site in report.refused_sites) or "none",
    )


def _numbers(outcomes: Sequence[Outcome]) -> str:
    """Return what several comparisons of numbers say together."""
    wrong = [outcome for outcome in outcomes if outcome.kind in ("wrong", "error")]
    if wrong:
        return f"WRONG: {first_sentence(wrong[0].note)}"
    said = []
    if any(outcome.note == "as each row alone" for outcome in outcomes):
        said.append("as each row alone")
    if any(outcome.note.startswith("as each row alone,") for outcome in outcomes):
        said.append("as each row alone, in the rows that the model computes")
    if any(outcome.note.startswith("as the model") for outcome in outcomes):
        said.append("as the call, where the model itself depends on padding or cache")
    refused = [f"refused: {first_sentence(o.note)}" for o in outcomes if o.kind == "refused"]
    said += ["several rows refused"] if said and len(refused) == 1 and "cache" in refused[0] else refused
    said += ["not comparable in some calls" for o in outcomes if o.kind == "model"]
    return "; ".join(dict.fromkeys(said))


def _suppression(outcome: Outcome | None) -> str:
    """Return whether attention can be suppressed; it cannot where no attention function is called."""
    return "no" if outcome is not None and outcome.kind == "refused" else _cell(outcome)


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return "not tried"
    if outcome.kind == "good":
        return re.sub(r"\d+e(-\d+)", _rounded_up, outcome.note)
    words = {"refused": "refused", "model": "not possible"}.get(outcome.kind, outcome.kind.upper())
    return f"{words}: {first_sentence(outcome.note)}"


def _rounded_up(number: re.Match[str]) -> str:
    """Return a small number as a limit, since its digits differ from machine to machine."""
    return f"less than 1e{int(number[1]) + 1:03d}"


def first_sentence(reason: str) -> str:
    """Return the first sentence of a reason.

    >>> first_sentence("it is an encoder: it looks ahead. attnprobe reads causal models")
    'it is an encoder: it looks ahead'
    """
    return re.split(r"[.;] |: its output differs|: Unsupported", reason)[0].rstrip(".")


def summary(reports: Sequence[FamilyReport]) -> str:
    """Return how many families ended how, in a line."""
    count = Counter(report.status for report in reports)
    read = [report for report in reports if report.reads and report.status not in _UNREAD]
    largest = max(
        (
            (o.difference, report.name)
            for report in read
            for o in report.outcomes.values()
            if o.kind == "good" and o.difference
        ),
        default=(0.0, "-"),
    )
    changed = [report.name for report in read if not report.is_bitwise]
    return (
        f"{len(reports)} families: {len(reports) - count['not built']} built, {count['factored']} factored, "
        f"{count['dense']} dense, {count['refused']} refused, "
        f"{len(read) - len(changed)} of {len(read)} bitwise "
        f"(not {', '.join(changed) or 'none'}), {count['WRONG']} wrong, {count['ERROR']} errors; the largest "
        f"difference from eager maps is {largest[0]:.0e} ({largest[1]})"
    )


def check_families(names: Sequence[str], results: Path | None = None) -> list[FamilyReport]:
    """Try families one after the other, writing a line of JSON for each."""
    reports = []
    if results is not None:
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text("", encoding="utf-8")
    for name in names:
        start = time.perf_counter()
        report = check_family(name)
        print(f"{name}: {report.status} ({time.perf_counter() - start:.1f} s)", flush=True)
        if results is not None:
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(report.as_json()) + "\n")
        reports.append(report)
    return reports


def main() -> None:
    """Try families, and print the table or put it into a page."""
    parser = argparse.ArgumentParser(description=check_families.__doc__)
    parser.add_argument("names", nargs="*", help="families; default: all that transformers knows")
    parser.add_argument("--output", type=Path, help="put the table into this page, between its marks")
    parser.add_argument(
        "--results", type=Path, default=Path("build/families.jsonl"), help="the lines of JSON"
    )
    arguments = parser.parse_args()
    _quietly()
    reports = check_families(arguments.names or causal_families(), arguments.results)
    if arguments.names:
        for report in reports:
            for title, outcome in report.outcomes.items():
                print(
                    f"{report.name:24} {title:16} {outcome.kind:8} {outcome.difference or 0:.0e}",
                    outcome.note,
                )
    table = f"{families_table(reports)}\n\n{summary(reports)}."
    if arguments.output is None:
        print(table)
    else:
        _put_into(arguments.output, table)
        print(summary(reports))


def _put_into(page: Path, table: str) -> None:
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{page} has no {BEGIN} and {END} to put the table between")
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def _quietly() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()

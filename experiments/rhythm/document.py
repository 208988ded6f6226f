"""Writing results to files: raw numbers as Parquet, all estimates as JSON, tables as Markdown.

The command calls this last. What is left to others: the numbers (tables) and what they mean
(docs/results/rhythm.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

import attnprobe
from attnprobe.analysis.couplings import NAMES

PAPER = {
    "entropy_at_preplans": {"random": 0.2386, "observed": 0.3608, "lift": 0.5197},
    "receiver_at_global": {"random": 0.2241, "observed": 0.6084, "lift": 1.7149},
    "anchor_after_preplan": {"random": 0.3687, "observed": 0.5253, "lift": 0.4247},
}
"""Table 2 of arXiv 2510.13554v2."""

PAPER_PERTURBATION = {"highest": 0.534, "lowest": 0.631, "lower_share": 0.8714}
"""Table 1 of arXiv 2510.13554v2."""

_TITLES = {
    "entropy_at_preplans": "entropy at WAAD peaks, nats",
    "receiver_at_global": "receiver peaks that are global peaks",
    "anchor_after_preplan": "FAI peaks at or after WAAD peaks",
}


def write_tokens(
    problems: Sequence[int], batch: attnprobe.TokenBatch, scores: dict[str, attnprobe.TokenScores], path: Path
) -> None:
    """Write the scores of every response token, with its position in the response."""
    table = scores["end"].to_pandas(batch)
    # Answers too short for sentences have no receiver heads in the near setting.
    near = scores["near"].to_pandas().reindex(columns=["fai", "receiver_fai"])
    table["fai_near"], table["receiver_fai_near"] = near["fai"], near["receiver_fai"]
    table["response_position"] = table.groupby("example").cumcount()
    scored = table.select_dtypes("float").columns
    table[scored] = table[scored].astype("float32")
    _with_problems(table, problems).to_parquet(path, compression="zstd")


def write_perturbations(problems: Sequence[int], perturbations: attnprobe.Perturbations, path: Path) -> None:
    """Write the overlaps of every continuation, without its text."""
    table = perturbations.to_pandas().drop(columns="continuation")
    _with_problems(table, problems).to_parquet(path, compression="zstd")


def _with_problems(table: pandas.DataFrame, problems: Sequence[int]) -> pandas.DataFrame:
    """Return a table with problem numbers in place of example numbers."""
    numbers = [problems[example] for example in table["example"]]
    return table.assign(example=numbers).rename(columns={"example": "problem"})


def write_lines(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the lines of a table of numbers."""
    pandas.DataFrame(list(lines)).to_parquet(path, compression="zstd")


def write_summary(summary: dict[str, Any], folder: Path) -> None:
    """Write all estimates, and the tables that show them."""
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (folder / "tables.md").write_text("\n".join(_tables(summary)) + "\n", encoding="utf-8")


def _tables(summary: dict[str, Any]) -> list[str]:
    lines = [f"# {summary['model']}", "", f"{summary['answers']} answers, {summary['tokens']} tokens.", ""]
    lines += ["## Table 2", "", *_table_2(summary["couplings"]), ""]
    lines += ["## Lifts when one choice changes", "", *_sensitivity(summary["couplings"]), ""]
    following = summary["following_without_coincidence"]
    lines += [
        "FAI peaks that coincide with no WAAD peak and follow one within three tokens: "
        f"{_share(following['observed'])}, shuffled {100 * following['random']:.1f}%, "
        f"lift {_lift(following['lift'])}.",
        "",
    ]
    if "perturbation" in summary:
        lines += ["## Table 1", "", *_table_1(summary["perturbation"]), ""]
    if "suppression" in summary:
        lines += ["## Knock-out", "", *_suppression(summary["suppression"]), ""]
    lines += ["## Groups of heads", ""]
    for name, value in summary["groups"].items():
        parts = value if isinstance(value, dict) else {"": value}
        told = (f"{part} {_plain(number)}".strip() for part, number in parts.items())
        lines.append(f"- {name}: {', '.join(told)}")
    return lines


def _plain(value: float | Sequence[float]) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else _number(value)


def _table_2(tables: dict[str, Any]) -> list[str]:
    lines = [
        "| coupling | paper: random, observed, lift | random | observed | lift | p | peaks |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in NAMES:
        line, paper = tables["as in the paper"][name], PAPER[name]
        share = name != "entropy_at_preplans"
        show = (lambda x: f"{100 * x:.1f}%") if share else (lambda x: f"{x:.3f}")
        observed = _share(line["observed"]) if share else _number(line["observed"])
        lines.append(
            f"| {_TITLES[name]} | {show(paper['random'])}, {show(paper['observed'])}, "
            f"{100 * paper['lift']:+.0f}% | {show(line['random'])} | {observed} | {_lift(line['lift'])} | "
            f"{line['p_value']:.3f} | {line['peaks']} |"
        )
    return lines


def _sensitivity(tables: dict[str, Any]) -> list[str]:
    lines = [
        "| choice | " + " | ".join(_TITLES[name] for name in NAMES) + " |",
        "| --- | --- | --- | --- |",
    ]
    for case, line in tables.items():
        lines.append(f"| {case} | " + " | ".join(_lift(line[name]["lift"]) for name in NAMES) + " |")
    return lines


def _table_1(table: dict[str, Any]) -> list[str]:
    paper = PAPER_PERTURBATION
    lines = [
        "| compared with | highest FAI | lowest FAI | difference | lower at highest | at equal position |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| paper | {paper['highest']} | {paper['lowest']} | {paper['highest'] - paper['lowest']:.3f} | "
        f"{100 * paper['lower_share']:.1f}% | |",
    ]
    for reference, name in (("response", "the response"), ("greedy", "its greedy continuation")):
        line = table[reference]
        lines.append(
            f"| {name} (n = {line['responses']}) | {_number(line['highest'])} | {_number(line['lowest'])} | "
            f"{_number(line['difference'])} | {_share(line['lower_share'])} | "
            f"{_number(line['at_equal_position'])} |"
        )
    places = (table[f"relative_position_{kind}"] for kind in ("highest", "lowest"))
    lines += [
        "",
        f"The token itself, forced: {_number(table['own_token'])}. Mean relative position of the highest "
        f"and lowest FAI: {', '.join(_number(place) for place in places)}.",
    ]
    return lines


def _suppression(table: dict[str, Any]) -> list[str]:
    return [
        f"Divergence of later predictions, nats, without the token of highest FAI: "
        f"{_number(table['highest'])}, "
        f"of lowest {_number(table['lowest'])}: ratio {_number(table['ratio'])}, higher in "
        f"{_share(table['higher_share'])} of {table['answers']} answers. Rank correlation of FAI and "
        f"divergence over {table['drawn_tokens']} drawn tokens: {table['rank_correlation']:.2f}; "
        f"{table['rank_correlation_without_position']:.2f} at equal position.",
    ]


def _number(estimate: Sequence[float]) -> str:
    value, low, high = estimate
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _share(estimate: Sequence[float]) -> str:
    value, low, high = (100 * number for number in estimate)
    return f"{value:.1f}% [{low:.1f}, {high:.1f}]"


def _lift(estimate: Sequence[float]) -> str:
    value, low, high = (100 * number for number in estimate)
    return f"{value:+.1f}% [{low:+.1f}, {high:+.1f}]"

"""The benchmark's figures on the page: ratios from times, rows from records, and only between the marks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.cost import ratios_to_plain
from benchmarks.page import BEGIN, END, PAGE, markdown, replaced

MACHINE = {"cores": 2, "processor": "x86_64", "torch": "2.13.0", "threads": 2}


def record(subject: str, **changes) -> dict:
    return {
        "subject": subject,
        "tokens": 2048,
        "layers": 30,
        "rounds": 5,
        "seconds": 4.184,
        "time_ratio": 1.076,
        "time_ratio_range": [1.04, 1.146],
        "loaded_bytes": 100 * 2**20,
        "peak_bytes": 300 * 2**20,
        "held_bytes": 1324 * 2**20,
        "peak_ratio": 1.043,
        "held_ratio": 1.02,
    } | changes


def test_a_ratio_is_to_the_plain_passes_around_it() -> None:
    """On a machine that slows down evenly, a pass in the middle of its round has the ratio 1."""
    assert ratios_to_plain([1.5, 2.5], [1.0, 2.0, 3.0]) == [1.0, 1.0]
    with pytest.raises(ValueError, match="zip"):
        ratios_to_plain([1.5], [1.0])


def test_records_become_rows() -> None:
    text = markdown(MACHINE, [record("plain"), record("measure"), record("eager maps", tokens=512)])
    first, _, header, rule, plain, ours, maps = text.splitlines()
    assert "2 cores (x86_64), torch 2.13.0, 2 threads" in first
    assert "5 at 2048 tokens in 30 layers, 5 at 512 tokens in 30 layers" in first
    assert header.count("|") == rule.count("|") == plain.count("|") == ours.count("|") == maps.count("|")
    assert plain.startswith("| 2048 | 30 | *plain pass: 4.18 s* | 1 |")
    expected = "| **1.08x** | 1.04 to 1.15 | 1.01x | 1.04x | 1.02x | 1,224 MB |"
    assert ours == f"| 2048 | 30 | span, WAAD, FAI[10,100] of all heads {expected}"
    # Nothing is counted for those who store maps.
    assert "|  | 1.04x |" in maps


def test_only_what_is_between_the_marks_changes() -> None:
    assert replaced(f"a\n{BEGIN}\nold\n{END}\nb\n", "new") == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    page = PAGE.read_text()
    assert replaced(replaced(page, "x"), "y").split(END)[1] == page.split(END)[1]


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{END}"])
def test_a_page_without_marks_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="once each and in this order"):
        replaced(text, "new")


def test_the_benchmark_for_gpus_runs(tmp_path: Path) -> None:
    """On the CPU, with a tiny model: what it needs of a GPU is a device and its name."""
    gpu.run(device="cpu", tokens="", rounds=0, small=True, seconds=600.0, output=tmp_path)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"]["device"].startswith("CPU")
    assert [record["subject"] for record in found["records"]] == ["plain", *gpu.MEANINGS] * 2
    page = (tmp_path / "gpu.md").read_text()
    assert all(meaning in page for meaning in gpu.MEANINGS.values())

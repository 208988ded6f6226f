"""What importing attnprobe loads, and that the package is what it says."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources

import pytest

import attnprobe

HEAVY = (
    "transformer_lens",
    "nnsight",
    "trl",
    "plotly",
    "matplotlib",
    "jinja2",
    "pandas",
    "hypothesis",
    "gguf",
    "accelerate",
)


@pytest.mark.parametrize(
    "code",
    ["import attnprobe", "import attnprobe, attnprobe.adapters, attnprobe.cli, attnprobe.rl"],
)
def test_importing_loads_nothing_heavy(code: str) -> None:
    """Optional backends, trainers and plotting load when they are used."""
    check = f"import sys; {code}; print([m for m in {HEAVY!r} + ('transformers',) if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    assert sorted(set(attnprobe.__all__)) == sorted(attnprobe.__all__)
    assert [name for name in attnprobe.__all__ if not hasattr(attnprobe, name)] == []


def test_the_package_is_typed() -> None:
    assert resources.files("attnprobe").joinpath("py.typed").is_file()

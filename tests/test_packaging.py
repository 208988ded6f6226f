"""What is built: the wheel holds the package with its types and template, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder with wheel and sdist, built by the project's own backend, without the network."""
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_holds_the_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    wanted = {"attnprobe/py.typed", "attnprobe/report/page.html.jinja", "attnprobe/rl/__init__.py"}
    page = ROOT / "attnprobe/report/assets"
    wanted |= {path.relative_to(ROOT).as_posix() for path in page.iterdir()}
    assert "attnprobe/report/assets/main.js" in wanted
    assert wanted <= set(names)
    inside = {path.relative_to(ROOT).as_posix() for path in (ROOT / "attnprobe").rglob("*.py")}
    # The command and the plug-in for verl lie beside the package: they have something to say before it is, or
    # if it cannot be, imported.
    beside = {"attnprobe_command.py", "attnprobe_verl.py"}
    assert {name for name in names if name.endswith(".py")} == inside | beside
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"attnprobe"} | beside


def test_the_wheel_names_what_it_needs(built: Path) -> None:
    """Base dependencies and extras; none of the backends is a base dependency."""
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (place,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    lines = archive.read(place).decode().splitlines()
    needs = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    base = {need.partition(">")[0].partition("<")[0] for need in needs if "extra ==" not in need}
    assert base == {
        "torch",
        "einops",
        "transformers",
        "jaxtyping",
        "safetensors",
        "msgspec",
        "numpy",
        "typer",
        "rich",
        "packaging",
    }
    extras = {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra")}
    assert {"transformer-lens", "nnsight", "trl", "verl", "report", "figures", "all"} <= extras
    assert "License-Expression: Apache-2.0" in lines


def test_the_sdist_can_be_tested(built: Path) -> None:
    """Whoever has the sdist has the tests, the docs and the commands too."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "Makefile",
        "constraints.txt",
        "constraints-oldest.txt",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "tests/conftest.py",
        "attnprobe/report/assets/page.css",
        "attnprobe/report/assets/main.js",
    }
    assert wanted <= names
    assert "docs/metrics.md" in names

"""How verl loads the plug-in: whatever would train without credit silently stops the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import runs

IMPORT = "import sys, verl; print('attnprobe.rl' in sys.modules)"


def load(folder: Path, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Import verl as each process of a run does."""
    nothing = {"VERL_PLATFORM": None, "VERL_USE_EXTERNAL_MODULES": None, "VERL_FILE_LOGGER_PATH": None}
    return subprocess.run(
        [sys.executable, "-c", IMPORT],
        env=runs.environment(folder, None, **(nothing | variables)),
        capture_output=True,
        text=True,
    )


def test_without_credit_nothing_is_loaded(tmp_path: Path) -> None:
    done = load(tmp_path, VERL_ENGINE_VENDOR="nvidia")
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"VERL_ENGINE_VENDOR": "atnprobe"}, "VERL_ENGINE_VENDOR is 'atnprobe'"),
        ({"ATTNPROBE_CREDIT": "{}"}, "VERL_ENGINE_VENDOR is not set"),
        ({"VERL_USE_EXTERNAL_MODULES": "attnprobe.rl.verl"}, "VERL_ENGINE_VENDOR is not set"),
        (
            {"VERL_ENGINE_VENDOR": "attnprobe", "ATTNPROBE_CREDIT": '{"horizont": [1, 4]}'},
            "has no option 'horizont'",
        ),
    ],
)
def test_mistakes_end_the_process(tmp_path: Path, variables: dict[str, str], said: str) -> None:
    """verl itself swallows what a plug-in raises, or takes another engine."""
    done = load(tmp_path, **variables)
    assert done.returncode != 0
    assert said in done.stderr


def test_a_plugin_that_cannot_be_loaded_ends_the_process(tmp_path: Path) -> None:
    """As with a library that is missing or broken in the environment of the workers."""
    (tmp_path / "jaxtyping.py").write_text("raise ImportError('broken')\n")
    path = {"PYTHONPATH": f"{tmp_path}:{runs.ROOT}"}
    done = load(tmp_path, VERL_ENGINE_VENDOR="attnprobe", **path)
    assert done.returncode != 0
    assert "its plug-in for verl cannot be loaded, and verl would train without credit" in done.stderr
    # Without credit, that is none of verl's business.
    assert load(tmp_path, VERL_ENGINE_VENDOR="nvidia", **path).returncode == 0

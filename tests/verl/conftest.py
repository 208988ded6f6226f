"""Tests of verl, in an environment of their own (`make test-verl`); without verl, none is collected."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs

from attnprobe.adapters.versions import installed_version

# What the tests use is no test, and some of it must not be imported before `engines` has prepared that.
collect_ignore = ["cpu_rig", "engines.py", "runs.py", "two_ranks.py"]
# Not by importing verl: this folder has its name.
if installed_version("verl") is None:
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the tiny model, the prompts and the reward of all runs."""
    folder = tmp_path_factory.mktemp("inputs")
    runs.make_inputs(folder)
    return folder

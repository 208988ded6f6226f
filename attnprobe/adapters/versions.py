"""Which versions of other libraries attnprobe reads, and what is said about any others.

Their internals are read, and these change between versions. So the range of each library is the one that
the whole test suite was run over, from `make test-oldest` to `make test-newest`. The adapters and the TRL
trainers call `check_versions` when they are given something to read, and `attnprobe doctor` shows the ranges.
What is left to others: which versions are installed for the tests (constraints-oldest.txt,
constraints-newest.txt).
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable
from functools import lru_cache

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from attnprobe.errors import AttnprobeError, UnsupportedModelError

SUPPORTED = {
    "torch": ">=2.13,<2.15",
    "transformers": ">=5.9,<5.25",
    "transformer-lens": ">=4.3,<4.4",
    "nnsight": ">=0.8,<0.9",
    "peft": ">=0.21,<0.22",
    "trl": ">=1.8,<1.17",
}
"""The versions that the tests were run with, by the name of the distribution.

A test holds pyproject.toml and both files of constraints to this table. Reading the ranges from attnprobe's
own metadata was rejected: a source tree that is used without an installation has none, and an editable one
keeps those of the day on which it was installed.
"""


def installed_version(package: str) -> str | None:
    """Return the installed version of a distribution; None if it is not installed.

    >>> installed_version("no-such-library") is None
    True
    """
    return _asked(importlib.metadata.version, package)


@lru_cache(maxsize=32)
def _asked(version: Callable[[str], str], package: str) -> str | None:
    # Remembered, since a file is read to find out, and every measurement asks.
    try:
        return version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=32)
def is_tested(package: str, installed: str) -> bool:
    """Return whether a version lies in the range that was tested.

    >>> is_tested("nnsight", "0.8.1"), is_tested("nnsight", "0.7"), is_tested("nnsight", "0.9")
    (True, False, False)
    """
    return SpecifierSet(SUPPORTED[package]).contains(installed, prereleases=True)


@lru_cache(maxsize=32)
def refusal(package: str, installed: str) -> str | None:
    """Return why a version is not read at all, in one sentence; None for one that is.

    Older versions than those tested are known not to work. Newer ones are read, with a warning: most of them
    will work, and refusing them would hold up everybody on the day of each release. If what is read has
    changed its meaning, the check of each layer's output finds that out.

    >>> refusal("nnsight", "0.9.0") is None
    True
    >>> print(refusal("nnsight", "0.7.0"))
    nnsight 0.7.0 is installed, but attnprobe reads nnsight>=0.8,<0.9: pip install "nnsight>=0.8,<0.9"
    """
    needed = f"{package}{SUPPORTED[package]}"
    oldest = next(part.version for part in SpecifierSet(SUPPORTED[package]) if part.operator == ">=")
    if Version(installed) >= Version(oldest):
        return None
    return f'{package} {installed} is installed, but attnprobe reads {needed}: pip install "{needed}"'


def check_versions(*packages: str, error: type[AttnprobeError] = UnsupportedModelError) -> None:
    """Check the installed versions of packages; one that is not installed as a distribution passes.

    A newer version than those tested gives a `UserWarning`.

    Raises:
        AttnprobeError: of the given class, for a version that attnprobe does not read; the message names the
            installed version, the range, and what to install.

    >>> check_versions("torch", "transformers")
    """
    for package in packages:
        installed = installed_version(package)
        if installed is None:
            continue
        refused = refusal(package, installed)
        if refused is not None:
            raise error(refused)
        if not is_tested(package, installed):
            needed = f"{package}{SUPPORTED[package]}"
            warnings.warn(
                f"{package} {installed} is newer than the versions that attnprobe was tested with, {needed}: "
                f'if something fails, pip install "{needed}"',
                stacklevel=2,
            )

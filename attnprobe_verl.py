"""The plug-in that verl finds by itself, through the entry point `verl.plugins`, in each of its processes.

If credit is asked for, it loads `attnprobe.rl.verl`; otherwise it does nothing. verl swallows whatever error
a plug-in raises, and would then train without credit and say nothing. So every error becomes a `SystemExit`,
which is not swallowed. That goes for errors of the package attnprobe itself, such as a missing library, and
this module therefore lies beside the package. What is left to others: everything else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches


def is_asked_for(environment: Mapping[str, str]) -> bool:
    """Return whether environment variables ask for credit, be it with a typing mistake.

    >>> is_asked_for({"VERL_ENGINE_VENDOR": "attnprobe"}), is_asked_for({"VERL_ENGINE_VENDOR": "atnprobe"})
    (True, True)
    >>> is_asked_for({"VERL_ENGINE_VENDOR": "nvidia"}), is_asked_for({"ATTNPROBE_CREDIT": "{}"})
    (False, True)
    """
    vendor = environment.get("VERL_ENGINE_VENDOR", "").strip().lower()
    return "ATTNPROBE_CREDIT" in environment or bool(get_close_matches(vendor, ["attnprobe"], cutoff=0.7))


if is_asked_for(os.environ):
    try:
        import attnprobe.rl.verl  # noqa: F401
    except Exception as error:
        raise SystemExit(
            "attnprobe was asked for credit (VERL_ENGINE_VENDOR, ATTNPROBE_CREDIT), but its plug-in for verl "
            f"cannot be loaded, and verl would train without credit: {type(error).__name__}: {error}"
        ) from error

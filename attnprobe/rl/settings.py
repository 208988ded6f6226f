"""What the weights of a run depend on, as text, and the options that others pass on to `RolloutCredit`.

A checkpoint stores the settings, so that a run is not resumed with others. `RolloutCredit` and the reference
PPO call this. What is left to others: what is done with them (rollout_credit, ppo).
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from attnprobe.errors import ParameterError, ResultError
from attnprobe.rl.credit import Credit
from attnprobe.rl.grouping import Groups
from attnprobe.validation import brief


def settings_of(credit: Credit) -> dict[str, str]:
    """Return a strategy and its parameters as text.

    >>> from attnprobe.rl import RandomCredit
    >>> settings_of(RandomCredit(seed=3))["credit.seed"]
    '3'
    """
    kind = credit if inspect.isroutine(credit) else type(credit)
    found = {"credit": kind.__qualname__}
    if dataclasses.is_dataclass(credit):
        found |= {
            f"credit.{each.name}": told(getattr(credit, each.name)) for each in dataclasses.fields(credit)
        }
    return found


def told(value: Any) -> str:
    """Return a value as text that is the same in every process.

    >>> told(len), told(0.5)
    ('len', '0.5')
    """
    # The repr of a function is its address, which differs in the process that resumes.
    return str(value.__qualname__) if inspect.isroutine(value) else repr(value)


def digest(heads: Groups) -> str:
    """Return the heads that were given, as a short text."""
    listed = json.dumps([sorted(heads[group].heads) for group in ("local", "global")])
    return f"given, {hashlib.blake2b(listed.encode(), digest_size=6).hexdigest()}"


def check_same_settings(stored: Any, ours: Mapping[str, str]) -> None:
    """Check that a checkpoint was written with our settings.

    Raises:
        ResultError: it was not; the message says which settings differ.
    """
    if not isinstance(stored, Mapping):
        raise ResultError(f"the settings of credit must be texts by name; got {brief(stored)}")
    differ = sorted(name for name in {*stored, *ours} if stored.get(name) != ours.get(name))
    if differ:
        listed = ", ".join(f"{name} {stored.get(name)} (now {ours.get(name)})" for name in differ)
        raise ResultError(f"the checkpoint was written with other settings of credit: {listed}")


def check_options(options: Any, taker: Callable[..., Any], name: str) -> dict[str, Any]:
    """Return options as a dict, after checking that a function takes them as keyword arguments.

    None stands for no options.

    Raises:
        ParameterError: anything but a mapping, or names that the function does not take.

    >>> from attnprobe.rl import RolloutCredit
    >>> check_options({"window": 5}, RolloutCredit, "credit_options")
    {'window': 5}
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise ParameterError(f"{name} must be a mapping from names to values; got {brief(options)}")
    parameters = inspect.signature(taker).parameters.values()
    known = [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    if unknown := [option for option in options if option not in known]:
        raise ParameterError(f"{name} can have {', '.join(known)}; got {', '.join(map(repr, unknown))}")
    return dict(options)

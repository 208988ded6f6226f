"""The options of credit in a run of verl: JSON in an environment variable, checked before anything is run.

verl has no place for options of an engine that is not its own, so they come in `ATTNPROBE_CREDIT`. Each
process reads them when it loads the plug-in, so that a mistake ends a run in its first seconds. What is left
to others: what the options mean (`RolloutCredit`, the strategies), and the engine (engine).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from attnprobe.errors import ParameterError, TrainerError
from attnprobe.rl import schedules
from attnprobe.rl.baselines import EntropyCredit, EntropySelection, RandomCredit
from attnprobe.rl.continuous import ContinuousCredit
from attnprobe.rl.credit import CoupledRhythmCredit, Credit, GlobalAnchorCredit, LocalChunkCredit
from attnprobe.validation import brief

VENDOR = "attnprobe"
"""The value of `VERL_ENGINE_VENDOR` that turns credit on."""

CREDIT_VARIABLE = "ATTNPROBE_CREDIT"
"""The environment variable with the options."""

STRATEGIES: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        CoupledRhythmCredit,
        LocalChunkCredit,
        GlobalAnchorCredit,
        ContinuousCredit,
        EntropyCredit,
        EntropySelection,
        RandomCredit,
    )
}

ROLLOUT_OPTIONS = ("layers", "heads", "reclassify_every", "window", "horizon", "signs", "schedule")
"""The options of `RolloutCredit` that make sense here: verl decides about batches and processes."""

SCHEDULES: dict[str, Callable[..., Any]] = {"warmup": schedules.warmup, "decay": schedules.decay}


@dataclass(frozen=True)
class CreditOptions:
    """What a run asks for.

    Attributes:
        credit: the strategy.
        arguments: keyword arguments of `RolloutCredit`.
    """

    credit: Credit
    arguments: dict[str, Any]


def check_environment(environment: Mapping[str, str]) -> None:
    """Check that environment variables turn credit on, and that the options can be read.

    Raises:
        TrainerError: another engine would be used.
        ParameterError: options that make no sense.

    >>> check_environment({"VERL_ENGINE_VENDOR": "attnprobe"})
    >>> check_environment({"VERL_ENGINE_VENDOR": "atnprobe"})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    attnprobe.errors.TrainerError: credit is asked for, but VERL_ENGINE_VENDOR is 'atnprobe': verl would...
    """
    vendor = environment.get("VERL_ENGINE_VENDOR")
    if vendor != VENDOR:
        found = "not set" if vendor is None else repr(vendor)
        raise TrainerError(
            f"credit is asked for, but VERL_ENGINE_VENDOR is {found}: verl would take an engine without "
            f"credit, and say nothing; set VERL_ENGINE_VENDOR={VENDOR}, or leave attnprobe out"
        )
    read_options(environment.get(CREDIT_VARIABLE, ""))


def read_options(text: str) -> CreditOptions:
    """Return the options that JSON says: a strategy, its parameters, and those of `RolloutCredit`.

    "strategy" is a name of one of our strategies, or `"module:name"` for one of your own, which may be any
    callable. "schedule" is such as `{"warmup": 100}`, `{"decay": {"steps": 100, "to": 0.5}}`, or
    `"module:name"`.

    Raises:
        ParameterError: no JSON object, an unknown name, or a value that makes no sense.

    >>> options = read_options('{"strategy": "GlobalAnchorCredit", "quantile": 0.3, "signs": "positive"}')
    >>> options.credit.quantile, options.arguments
    (0.3, {'signs': 'positive'})
    >>> read_options('{"quantil": 0.3}')  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    attnprobe.errors.ParameterError: ATTNPROBE_CREDIT has no option 'quantil'; it can have strategy, layers...
    """
    try:
        options = json.loads(text) if text.strip() else {}
    except json.JSONDecodeError as error:
        raise ParameterError(f"{CREDIT_VARIABLE} must be JSON; got {brief(text)}: {error}") from None
    if not isinstance(options, dict):
        raise ParameterError(f"{CREDIT_VARIABLE} must be a JSON object of options; got {brief(text)}")
    name = options.pop("strategy", "CoupledRhythmCredit")
    own = {key: options.pop(key) for key in ROLLOUT_OPTIONS if key in options}
    credit = _strategy(name, options)
    if "heads" in own:
        own["heads"] = _heads(own["heads"])
    if "horizon" in own and isinstance(own["horizon"], list):
        own["horizon"] = tuple(own["horizon"])
    if own.get("schedule") is not None:
        own["schedule"] = _schedule(own["schedule"])
    return CreditOptions(credit, own)


def _strategy(name: Any, parameters: dict[str, Any]) -> Credit:
    """Return a strategy with its parameters, which are what is left of the options."""
    if isinstance(name, str) and ":" in name:
        found = _imported(name, "strategy")
        if isinstance(found, type):
            found = _called(found, parameters, name)
        elif parameters:
            raise ParameterError(_unknown(next(iter(parameters)), name, ()))
        own: Credit = found
        return own
    if not isinstance(name, str) or name not in STRATEGIES:
        raise ParameterError(
            f"the strategy of {CREDIT_VARIABLE} must be one of {', '.join(STRATEGIES)}, or 'module:name' for "
            f"your own; got {brief(name)}"
        )
    known = tuple(each.name for each in dataclasses.fields(STRATEGIES[name]))
    for parameter in parameters:
        if parameter not in known:
            raise ParameterError(_unknown(parameter, name, known))
    return STRATEGIES[name](**parameters)  # type: ignore[no-any-return]


def _unknown(option: str, strategy: str, known: tuple[str, ...]) -> str:
    ours = ", ".join(("strategy", *ROLLOUT_OPTIONS))
    more = f" and, for {strategy}, {', '.join(known)}" if known else f"; {strategy} takes no parameters"
    return f"{CREDIT_VARIABLE} has no option {option!r}; it can have {ours}{more}"


def _schedule(value: Any) -> Callable[[int], float]:
    """Return a schedule such as `{"warmup": 100}` or `"module:name"`."""
    if isinstance(value, str) and ":" in value:
        return _imported(value, "schedule")  # type: ignore[no-any-return]
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in SCHEDULES:
        raise ParameterError(
            f'the schedule of {CREDIT_VARIABLE} must be such as {{"warmup": 100}} or '
            f'{{"decay": {{"steps": 100, "begin": 50, "to": 0.5}}}}, or "module:name" for your own; '
            f"got {brief(value)}"
        )
    ((name, parameters),) = value.items()
    given = parameters if isinstance(parameters, dict) else {"steps": parameters}
    return _called(SCHEDULES[name], given, name)  # type: ignore[no-any-return]


def _heads(value: Any) -> Any:
    """Return heads as `RolloutCredit` takes them: JSON has lists where it wants pairs `(layer, head)`."""
    if isinstance(value, dict):
        return {group: _heads(heads) for group, heads in value.items()}
    if isinstance(value, list):
        return [tuple(head) if isinstance(head, list) else head for head in value]
    return value


def _imported(path: str, what: str) -> Any:
    """Return the callable that `"module:name"` names."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        told = f"the {what} {path!r} of {CREDIT_VARIABLE} cannot be imported: {error}"
        raise ParameterError(told) from error
    if not callable(found):
        raise ParameterError(f"the {what} {path!r} of {CREDIT_VARIABLE} must be callable; got {brief(found)}")
    return found


def _called(maker: Callable[..., Any], parameters: dict[str, Any], name: str) -> Any:
    try:
        return maker(**parameters)
    except TypeError as error:
        raise ParameterError(f"{CREDIT_VARIABLE}: {name} cannot be made of {parameters}: {error}") from None

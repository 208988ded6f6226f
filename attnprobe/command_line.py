"""What all commands share: where they print, wrong usage, interruptions, quiet libraries, loading a model.

`attnprobe.cli` and `attnprobe.corpus.commands` call these. Results go to standard output, everything else to
standard error; progress is shown only if that is a terminal. What is left to others: the commands themselves.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from attnprobe.errors import AttnprobeError, AttnprobeWarning, MissingDependencyError, ParameterError

out, err = Console(), Console(stderr=True)

AUTO = "auto"


def shows_progress() -> bool:
    """Whether progress is shown: if standard error is a terminal."""
    return sys.stderr.isatty()


def say(text: str) -> None:
    """Tell what is being done, on standard error, if that is a terminal."""
    if shows_progress():
        err.print(text)


@contextmanager
def usage(option: str) -> Iterator[None]:
    """Turn an error about an option's value into wrong usage, which exits with 2 and names the option.

    A missing package is no wrong usage, and stays what it is.
    """
    try:
        yield
    except MissingDependencyError:
        raise
    except AttnprobeError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


@contextmanager
def interruptible() -> Iterator[list[str]]:
    """Say what was kept if a command is interrupted, and exit with 130; commands add to the list.

    >>> with interruptible() as kept:
    ...     kept.append("the page at page.html")
    """
    kept: list[str] = []
    try:
        yield kept
    except KeyboardInterrupt:
        told = f"kept: {'; '.join(kept)}" if kept else "nothing was written"
        err.print(f"interrupted; {escape(told)}", soft_wrap=True, highlight=False)
        raise typer.Exit(130) from None


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep other libraries' bars, log lines and warnings from the terminal; a warning of ours is one line."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", AttnprobeWarning)
        warnings.showwarning = _show_warning
        yield


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    from attnprobe.heads import REMEDY

    # Users of the command line call no function.
    told = str(message).replace(REMEDY, "--head-span ignoring")
    err.print(f"[yellow]warning:[/] {escape(told)}", highlight=False, soft_wrap=True)


def parse_horizon(text: str) -> tuple[int, int | None]:
    """Return FAI's horizon from "10,100", or "10,end" to the end of the response; "10-100" and "10-" serve
    too.

    Raises:
        ParameterError: anything else.

    >>> parse_horizon("10,100"), parse_horizon("10,end")
    ((10, 100), (10, None))
    """
    from attnprobe.metric_arguments import check_horizon

    low, _, high = text.replace("-", ",").partition(",")
    high = high.strip()
    to_end = high == "end" or (not high and text.rstrip().endswith("-"))
    if not low.strip().isdecimal() or not (high.isdecimal() or to_end):
        raise ParameterError(f'a horizon must be such as "10,100", or "10,end"; got {text!r}')
    low_number, high_number = check_horizon((int(low), None if to_end else int(high)))
    return low_number, high_number


def check_place(device: str, dtype: str | None) -> tuple[Any, Any]:
    """Return where a model is to run, and in which dtype; None for that of its checkpoint, here and there.

    "auto" means a GPU if there is one; and on a GPU the checkpoint's dtype, on a CPU float32.

    Raises:
        typer.BadParameter: a device or dtype that cannot be used.
    """
    import torch

    from attnprobe.models import check_device, check_dtype

    if device == AUTO:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with usage("--device"):
        place = check_device(device)
    if dtype is None or (dtype == AUTO and place.type != "cpu"):
        return place, None
    with usage("--dtype"):
        return place, torch.float32 if dtype == AUTO else check_dtype(dtype)

"""What the commands of a corpus share: where they print, and how they tell of wrong usage and of warnings.

The commands (commands, reading_commands) use it. What is left to others: what is printed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from attnprobe.errors import AttnprobeWarning, ParameterError

out, err = Console(), Console(stderr=True)


class ScoresByDefault(TyperGroup):
    """Commands of which `score` is meant where the first word names none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `score` before an input."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["score", *args]
        return list(super().parse_args(ctx, args))

    def invoke(self, ctx: Any) -> Any:
        """Run a command: arguments that make no sense are wrong usage, with its exit code, 2."""
        with _warnings_as_lines():
            try:
                return super().invoke(ctx)
            except ParameterError as error:
                raise typer.BadParameter(str(error)) from error


class PlainHelp(TyperCommand):
    """A command with so many options that a table of them would cut off their names."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help as plain text."""
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)


def usual_device() -> str:
    """Return where a model runs unless the user says otherwise, and keep the libraries that load it quiet."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print our own warnings as one line each, without the path and line of our source."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Any, category: Any, *place: Any) -> None:
            if issubclass(category, AttnprobeWarning):
                err.print(f"[yellow]warning:[/] {escape(str(message))}", highlight=False, soft_wrap=True)
            else:
                others(message, category, *place)

        # Python's own hook for this: a filter can only drop warnings.
        warnings.showwarning = cast(Any, show)
        yield

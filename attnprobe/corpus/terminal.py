"""How the commands of a corpus are found, and how their help is written.

The commands (commands) use it. What is left to others: what all commands share (command_line).
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from attnprobe.errors import ParameterError


class ScoresByDefault(TyperGroup):
    """Commands of which `score` is meant where the first word names none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `score` before an input."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["score", *args]
        return list(super().parse_args(ctx, args))

    def invoke(self, ctx: Any) -> Any:
        """Run a command: arguments that make no sense are wrong usage, with its exit code, 2."""
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

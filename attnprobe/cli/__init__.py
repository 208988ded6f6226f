"""The command line: `attnprobe report`, `heads`, `score`, `doctor`, and `corpus` with commands of its own.

A thin layer over the library: it loads, calls and prints. `commands` are the commands, `options` what they
are asked, checked before anything is loaded; `reading` loads a model and measures an answer; `shown` makes
tables and coloured text for a terminal. Exit codes: 0 done, 1 an error that the message explains, 2 wrong
usage, 3 done but for rejected rows of a corpus, 130 interrupted. What is left to others: everything that
computes something.
"""

import sys
from typing import Any

import typer
from rich.markup import escape

from attnprobe.cli.commands import app
from attnprobe.command_line import err
from attnprobe.errors import AttnprobeError

__all__ = ["app", "main"]

# typer exports only this one of the classes that it raises for wrong usage.
_UsageError: Any = typer.BadParameter.__base__


def main() -> None:
    """Run the command line; errors that the user can act on are one line, without a traceback."""
    try:
        code = app(standalone_mode=False)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            command = getattr(error.ctx, "command_path", "attnprobe")
            _complain(f"{error.format_message()} (see {command} --help)")
        sys.exit(error.exit_code)
    except AttnprobeError as error:
        _complain(str(error))
        sys.exit(1)
    except typer.Abort:
        raise KeyboardInterrupt from None
    if isinstance(code, int) and code:
        sys.exit(code)


def _complain(message: str) -> None:
    err.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)

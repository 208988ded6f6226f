"""The commands `report`, `heads`, `score` and `doctor`: they check what was asked, call the library, and
print.

`attnprobe.cli.main` runs them. What is left to others: their common options (options), tables and coloured
text (shown), and the commands of `corpus` (attnprobe.corpus.commands).
"""

from __future__ import annotations

import warnings
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from attnprobe.cli.options import (
    Asked,
    GroupsOption,
    HorizonOption,
    WindowOption,
    with_common_options,
)
from attnprobe.cli.reading import read
from attnprobe.cli.shown import coloured_answer, harmless, heads_table, legend, pairs_table
from attnprobe.command_line import (
    err,
    interruptible,
    out,
    parse_horizon,
    quiet_libraries,
    say,
    shows_progress,
    usage,
)
from attnprobe.corpus.commands import app as corpus
from attnprobe.errors import AttnprobeError, ParameterError
from attnprobe.validation import choice
from attnprobe.version import __version__

app = typer.Typer(
    help="Read a language model's attention and show the rhythm of its reasoning.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(corpus, name="corpus")

DEFAULT_PAGE = Path("attnprobe-report.html")
_COLOURS = ("waad", "fai", "entropy")


@app.command()
@with_common_options
def report(
    asked: Asked,
    groups: GroupsOption = None,
    window: WindowOption = 10,
    horizon: HorizonOption = "10,100",
    lookback: Annotated[
        int,
        typer.Option(
            min=1,
            help="Within how many tokens an anchor follows its preplan.",
            rich_help_panel="Measuring",
        ),
    ] = 3,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The HTML file to write.", show_default=str(DEFAULT_PAGE)),
    ] = None,
    title: Annotated[
        str | None,
        typer.Option(help="The page's heading.", show_default="the rhythm of the model's reasoning"),
    ] = None,
    notes: Annotated[
        str | None, typer.Option(help="Your own text, below the heading.", show_default=False)
    ] = None,
    open_page: Annotated[
        bool, typer.Option("--open", help="Open the page in the browser afterwards.")
    ] = False,
    text: Annotated[
        bool, typer.Option("--text", help="Print the coloured answer here, instead of writing a page.")
    ] = False,
    color_by: Annotated[
        str | None,
        typer.Option(help="With --text: colour by waad, fai or entropy.", show_default="waad"),
    ] = None,
) -> None:
    """Write a page that shows the reasoning rhythm of an answer; without options, a built-in demo."""
    from attnprobe.report.document import check_dependencies
    from attnprobe.storage import check_writable

    _check_text_options(
        text, color_by, {"--output": output, "--title": title, "--notes": notes, "--open": open_page or None}
    )
    path = output or DEFAULT_PAGE
    with usage("--horizon"):
        parsed_horizon = parse_horizon(horizon)
    if not text:
        with usage("--output"):
            check_writable(path)
        check_dependencies()
    with interruptible() as kept:
        checked = asked.check(groups=groups, window=window, horizon=parsed_horizon)
        say("Loading libraries ...")
        with quiet_libraries():
            import attnprobe
            from attnprobe.rl import CoupledRhythmCredit, GlobalAnchorCredit, LocalChunkCredit

            reading = read(checked)
            scores = attnprobe.score_tokens(reading.statistics, reading.heads)
            rhythm = attnprobe.find_rhythm(scores, lookback=lookback)
            if text:
                _print_coloured(reading, scores, rhythm, color_by or "waad")
                return
            maps = attnprobe.group_maps(
                reading.model, reading.batch, reading.heads, progress=shows_progress()
            )
            strategies = {
                "local chunk": LocalChunkCredit(),
                "global anchor": GlobalAnchorCredit(),
                "coupled rhythm": CoupledRhythmCredit(),
            }
            with warnings.catch_warnings():
                # Short answers have too few peaks for weights, which nobody asked for.
                warnings.simplefilter("ignore")
                weights = {name: strategy(scores) for name, strategy in strategies.items()}
            page = attnprobe.Report(
                reading.batch,
                reading.statistics,
                reading.heads,
                scores,
                rhythm,
                maps.to("cpu"),
                title=f"The reasoning rhythm of {reading.name}" if title is None else title,
                prompt=checked.prompt,
                notes=notes,
                weights=weights,
                tokenizer=reading.tokenizer,
            )
            page.save(path)
        kept.append(f"the page at {path}")
        out.print(f"\n[bold]{escape(reading.name)}[/] answered:\n")
        out.print(escape(harmless(reading.answer.strip())), highlight=False)
        out.print()
        out.print(heads_table(reading.heads))
        out.print(pairs_table(reading.batch, scores, rhythm))
        out.print(f"Report: [bold]{escape(str(path))}[/]", soft_wrap=True)
        if open_page and not webbrowser.open(path.resolve().as_uri()):
            err.print("There is no browser to open the page in", soft_wrap=True)


@app.command()
@with_common_options
def heads(
    asked: Asked,
    top: Annotated[int, typer.Option(min=1, help="How many heads of each group to list.")] = 10,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write all heads to a .csv, .json or .safetensors file."),
    ] = None,
) -> None:
    """List the most local, most global and receiver heads of a model over an answer."""
    if output is not None:
        _check_table_path(output)
    with interruptible() as kept:
        checked = asked.check()
        say("Loading libraries ...")
        with quiet_libraries():
            reading = read(checked)
        if output is not None:
            _write_table(reading.heads, reading.heads.to_pandas, output)
            kept.append(f"the heads in {output}")
        out.print(heads_table(reading.heads, top))
        if output is not None:
            out.print(f"All heads: [bold]{escape(str(output))}[/]", soft_wrap=True)


@app.command()
@with_common_options
def score(
    asked: Asked,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .csv, .json or .safetensors file to write.")
    ] = Path("attnprobe-scores.csv"),
    groups: GroupsOption = None,
    window: WindowOption = 10,
    horizon: HorizonOption = "10,100",
) -> None:
    """Write WAAD, FAI and entropy of every token of an answer to a file."""
    _check_table_path(output)
    with usage("--horizon"):
        parsed_horizon = parse_horizon(horizon)
    with interruptible() as kept:
        checked = asked.check(groups=groups, window=window, horizon=parsed_horizon)
        say("Loading libraries ...")
        with quiet_libraries():
            import attnprobe

            reading = read(checked)
            scores = attnprobe.score_tokens(reading.statistics, reading.heads)
        _write_table(scores, lambda: scores.to_pandas(reading.batch), output)
        kept.append(f"the scores in {output}")
        count = int(scores.response_mask.sum())
        out.print(f"Scores of {count} tokens: [bold]{escape(str(output))}[/]", soft_wrap=True)


@app.command()
def doctor() -> None:
    """Show versions, which optional packages import, and which attention implementations run here."""
    from attnprobe import doctor as checks

    with interruptible(), quiet_libraries():
        out.print(checks.version_table())
        out.print(checks.backend_table())
        table, works = checks.implementation_table()
        out.print(table)
    if not works:
        raise AttnprobeError("no attention implementation can be read here: reinstall torch and transformers")


@app.callback(invoke_without_command=True)
def about(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Read a language model's attention and show the rhythm of its reasoning."""
    if version:
        out.print(__version__, highlight=False)
        raise typer.Exit


def _check_text_options(text: bool, color_by: str | None, of_page: dict[str, Any]) -> None:
    """Refuse options of the page with --text, and those of --text without it."""
    if not text:
        if color_by is not None:
            raise typer.BadParameter("it colours what --text prints: add --text", param_hint="--color-by")
        return
    for option, given in of_page.items():
        if given is not None:
            raise typer.BadParameter("with --text no page is written: leave one out", param_hint=option)
    with usage("--color-by"):
        choice(color_by or "waad", "the colour", _COLOURS)


def _print_coloured(reading: Any, scores: Any, rhythm: Any, colour_by: str) -> None:
    out.print(coloured_answer(reading.batch, scores, rhythm, colour_by, out), overflow="fold")
    out.print()
    out.print(legend(scores, colour_by, out))
    out.print(pairs_table(reading.batch, scores, rhythm))


def _check_table_path(output: Path) -> None:
    """Check that a result can be written there, before doing the work."""
    from attnprobe.storage import check_writable, import_pandas

    with usage("--output"):
        if output.suffix not in (".csv", ".json", ".safetensors"):
            raise ParameterError(f"the file must end in .csv, .json or .safetensors, got {output}")
        check_writable(output)
    if output.suffix != ".safetensors":
        import_pandas()


def _write_table(result: Any, table: Callable[[], Any], output: Path) -> None:
    """Write a result: in full, for attnprobe to load, or as a table, for other programs."""
    from attnprobe.storage import write_atomically

    if output.suffix == ".safetensors":
        result.save(output)
        return
    frame = table()
    text = frame.to_csv(index=False) if output.suffix == ".csv" else frame.to_json(orient="records", indent=1)
    write_atomically(output, text.encode())

"""The commands that read scores: `attnprobe corpus summary`, `compare` and `report`.

The command line adds them by way of commands. What is left to others: everything that computes something, and
the command that writes scores (commands).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from attnprobe.command_line import AUTO, check_place, err, interruptible, out, quiet_libraries, say, usage
from attnprobe.errors import ParameterError

ScoresArgument = Annotated[Path, typer.Argument(help="A folder of scores.")]


def summary(
    scores: ScoresArgument,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Whose tokenizer gives the texts of tokens.", show_default="that of the scores' model"
        ),
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="Only rows whose kept field has a value: correct=true.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many frequent tokens to list.")] = 15,
    sample: Annotated[int, typer.Option(min=1, help="Over how many rows to measure couplings.")] = 1000,
) -> None:
    """Summarise a folder of scores as a table, and as the page summary.html in it.

    With --where, the page has a name of its own.
    """
    from attnprobe import corpus

    with _reads_scores(scores), usage("--where"):
        opened = _chosen(corpus.load_scores(scores), where)
    with interruptible(), quiet_libraries():
        found = corpus.summarize(opened, tokenizer=_tokenizer(tokenizer, opened), top=top, sample=sample)
    out.print(escape(found.counts()), soft_wrap=True)
    told = f"with {found.confidence:.0%} intervals"
    table = Table(title=f"Means over the corpus, {told}", title_justify="left")
    for title in ("mean", "value", "low", "high"):
        table.add_column(title, justify="left" if title == "mean" else "right")
    lines = found.to_arrow().to_pylist()
    for line in lines:
        table.add_row(line["mean of"], *(f"{line[name]:.4g}" for name in ("value", "low", "high")))
    out.print(table)
    table = Table(title=f"Couplings, over {found.coupled_rows} rows", title_justify="left")
    for title in ("coupling", "null", "observed", "by chance", "lift", "p"):
        table.add_column(title)
    for null, measured in found.couplings.items():
        for line in measured.to_arrow().to_pylist():
            numbers = (f"{line[name]:.3g}" for name in ("observed", "null", "lift", "p_value"))
            table.add_row(line["coupling"].replace("_", " "), null, *numbers)
    out.print(table)
    for title, tokens in (("preplans", found.preplans), ("anchors", found.anchors)):
        table = Table(title=f"Most frequent {title}", title_justify="left")
        for name in ("token", "id", "times", "share", "lift"):
            table.add_column(name, justify="left" if name == "token" else "right")
        for token in tokens:
            shown = escape(repr(token.text)) if token.text else ""
            cells = (f"{token.token_id}", f"{token.count}", f"{token.share:.1%}", f"{token.lift:.2f}")
            table.add_row(shown, *cells)
        out.print(table)
    if found.stability is not None:
        kept = ", ".join(f"{group} {overlap.value:.0%}" for group, overlap in found.stability.overlap.items())
        out.print(f"Over other rows of this kind, so much of each head group would stay: {kept}")
    page = corpus.save_page(found, scores, f"The answers of {found.provenance.model_name}")
    out.print(f"Page: [bold]{escape(str(page))}[/]", soft_wrap=True)


def compare(
    first: ScoresArgument,
    second: Annotated[
        Path | None, typer.Argument(help="Another folder of scores.", show_default=False)
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="Compare rows by a kept field that is true or false.", show_default=False),
    ] = None,
    paired: Annotated[bool, typer.Option("--paired", help="Rows of the same id belong together.")] = False,
) -> None:
    """Show how two corpora differ, or the rows of one whose kept field is false and true."""
    from attnprobe import corpus

    if second is None and by is None:
        raise typer.BadParameter(
            "name a second folder, or a field with --by, to compare with", param_hint="SECOND"
        )
    if second is not None and by is not None:
        raise typer.BadParameter("name either a second folder or a field with --by, not both")
    with _reads_scores(first):
        scores = corpus.load_scores(first)
    if by is not None:
        with usage("--by"):
            pair = scores.where(by, False), scores.where(by, True)
    else:
        assert second is not None
        with _reads_scores(second):
            pair = scores, corpus.load_scores(second)
    with interruptible():
        found = corpus.compare(*pair, paired=paired)
    table = Table(title=f"{found.rows[0]} and {found.rows[1]} rows", title_justify="left")
    names = ("first", "second") if by is None else (f"{by} is false", f"{by} is true")
    for title in ("mean", *names, "difference", f"its {found.confidence:.0%} interval"):
        table.add_column(title, justify="left" if title == "mean" else "right")
    for line in found.to_arrow().to_pylist():
        values = (f"{line[name]:.4g}" for name in ("first", "second", "difference"))
        interval = f"{line['difference_low']:.4g} to {line['difference_high']:.4g}"
        table.add_row(corpus.QUANTITIES[line["quantity"]], *values, interval)
    out.print(table)


def report(
    scores: ScoresArgument,
    row: Annotated[int, typer.Argument(min=0, help="The number of a row of the input.")],
    model: Annotated[
        str | None,
        typer.Option(help="A hub name, a folder or a GGUF file.", show_default="that of the scores"),
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="The input.", show_default="where it was when it was scored")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where the model runs.", show_default="cuda, if there is one")
    ] = None,
) -> None:
    """Write the report of one answer, for which the model runs again; `summary` then links to it."""
    from attnprobe import corpus
    from attnprobe.models import model_name

    with _reads_scores(scores):
        opened = corpus.load_scores(scores)
    if model is not None:
        with usage("--model"):
            model_name(model)
    with interruptible(), quiet_libraries():
        place, _ = check_place(device or AUTO, None)
        say("Loading libraries ...")
        page = corpus.report_row(opened, row, model=model, source=source, device=place)
    out.print(f"Report: [bold]{escape(str(page))}[/]", soft_wrap=True)


@contextmanager
def _reads_scores(folder: Path) -> Iterator[None]:
    """Take a folder that holds no scores for wrong usage."""
    if folder.is_dir():
        yield
        return
    with usage("SCORES"):
        yield


def _tokenizer(name: str | None, scores: Any) -> Any:
    """Load the tokenizer of a model; without a name, None if that of the scores' model is not there."""
    from attnprobe.corpus.loading import tokenizer_of_scores
    from attnprobe.errors import ModelLoadError
    from attnprobe.models import load_tokenizer

    try:
        return tokenizer_of_scores(scores.manifest) if name is None else load_tokenizer(name)
    except ModelLoadError:
        if name is not None:
            raise
        err.print("The tokenizer is not here: tokens are shown as ids. Name it with --tokenizer")
        return None


def _chosen(scores: Any, where: list[str] | None) -> Any:
    """Return the scores of rows whose kept fields have values, each given as field=value."""
    for condition in where or ():
        field, equals, text = condition.partition("=")
        if not equals:
            raise ParameterError(f"it must be field=value; got {condition!r}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        scores = scores.where(field, value)
    return scores

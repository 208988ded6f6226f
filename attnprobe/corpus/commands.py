"""The commands `attnprobe corpus ...`: score a corpus, summarise it, compare two, report on one answer.

The command line (cli) adds them. `attnprobe corpus FILE ...` is short for `attnprobe corpus score FILE ...`.
Exit codes are those of the command line, and 3: all rows are done, but some were rejected. What is left to
others: everything that computes something.
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
from typer.core import TyperGroup

from attnprobe.command_line import (
    AUTO,
    check_place,
    err,
    interruptible,
    out,
    parse_horizon,
    quiet_libraries,
    say,
    shows_progress,
    usage,
)
from attnprobe.errors import ParameterError, ResultError

REJECTED = 3
"""The exit code if all rows are done, but some of them could not be scored."""


class _ScoresByDefault(TyperGroup):
    """Takes the first word for an input where it names no command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["score", *args]
        return list(super().parse_args(ctx, args))


app = typer.Typer(
    cls=_ScoresByDefault,
    help="Score a corpus of answers, and read the scores: attnprobe corpus rollouts.jsonl --output scores/",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ScoresArgument = Annotated[Path, typer.Argument(help="A folder of scores.")]
ModelOption = Annotated[
    str | None,
    typer.Option(help="A hub name, a folder or a GGUF file.", show_default="the packaged SmolLM2"),
]
_CREDITS = {"local": "LocalChunkCredit", "global": "GlobalAnchorCredit", "coupled": "CoupledRhythmCredit"}


@app.command()
def score(
    source: Annotated[Path, typer.Argument(help="A .jsonl or .parquet file, or a folder of rows.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder of scores to write or continue.")
    ],
    model: ModelOption = None,
    groups: Annotated[
        str,
        typer.Option(
            help='Whose heads: "corpus" groups them over all rows first, a number over so many rows; or the '
            "file of saved groups."
        ),
    ] = "corpus",
    prompt_column: Annotated[str, typer.Option(help="The field of the prompt.")] = "prompt",
    response_column: Annotated[str, typer.Option(help="The field of the response.")] = "response",
    messages_column: Annotated[str, typer.Option(help="The field of a chat.")] = "messages",
    prompt_ids_column: Annotated[str, typer.Option(help="The field of the prompt's ids.")] = "prompt_ids",
    response_ids_column: Annotated[
        str, typer.Option(help="The field of the response's ids.")
    ] = "response_ids",
    id_column: Annotated[str, typer.Option(help="The field that identifies a row.")] = "id",
    keep: Annotated[
        list[str] | None, typer.Option(help="A field to keep with the scores; may be repeated.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put prompts that are texts into the chat template.")
    ] = False,
    layers: Annotated[
        str, typer.Option(help='"all", "middle", "top third", or numbers such as 0,4,8-11.')
    ] = "all",
    window: Annotated[int, typer.Option(min=1, help="WAAD's window, in tokens.")] = 10,
    horizon: Annotated[str, typer.Option(help="FAI's horizon, in tokens; 10- runs to the end.")] = "10-100",
    entropy: Annotated[bool, typer.Option(help="Compute the entropy of tokens.")] = True,
    receivers: Annotated[bool, typer.Option("--receivers", help="Score by receiver heads too.")] = False,
    quantile: Annotated[
        float, typer.Option(help="The share of heads in the local and the global group.")
    ] = 0.3,
    credit: Annotated[
        str | None, typer.Option(help="Keep gamma: local, global or coupled.", show_default=False)
    ] = None,
    longest: Annotated[
        int | None,
        typer.Option(min=1, help="Reject rows of more tokens.", show_default="the model's context"),
    ] = None,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="How many rows a shard holds.")] = 512,
    token_budget: Annotated[
        int | None,
        typer.Option(min=1, help="How many tokens to run at a time.", show_default="by the device"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where the model runs.", show_default="cuda, if there is one")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Its numbers: float32, bfloat16 or float16.", show_default="as saved")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the rows that heads are grouped over.")] = 0,
    ray_workers: Annotated[
        int | None,
        typer.Option(min=1, help="Run on a Ray cluster, with so many workers.", show_default=False),
    ] = None,
    cpus_per_worker: Annotated[float, typer.Option(min=0.0, help="What Ray reserves for each.")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(min=0.0, help="What Ray reserves for each.")] = 0,
    groups_only: Annotated[
        bool, typer.Option("--groups-only", help="Stop when the heads are grouped.")
    ] = False,
) -> None:
    """Score every row of a corpus; the same command continues a run that was interrupted.

    Exit code 3: all rows are done, but some were rejected; rejected.jsonl says why.
    """
    from attnprobe import corpus
    from attnprobe.heads import check_shares
    from attnprobe.layer_selection import parse_layers
    from attnprobe.models import model_name

    with usage("SOURCE"):
        if not source.exists():
            raise ResultError(f"there is no input at {source}")
    with usage("--layers"):
        chosen_layers = parse_layers(layers)
    with usage("--horizon"):
        chosen_horizon = parse_horizon(horizon)
    with usage("--credit"):
        chosen_credit = _credit(credit)
    with usage("--quantile"):
        check_shares(quantile, receivers=1)
    if ray_workers is not None and (groups_only or dtype is not None):
        told = "--groups-only and --dtype do not go with --ray-workers"
        raise typer.BadParameter(told, param_hint="--ray-workers")
    with usage("--model"):
        model_name(model)
    settings = corpus.CorpusSettings(
        layers=chosen_layers,
        window=window,
        horizon=chosen_horizon,
        entropy=entropy,
        receivers=receivers,
        head_quantile=quantile,
        credit=chosen_credit,
        chat=chat,
        longest=longest,
    )
    columns = corpus.Columns(
        prompt=prompt_column,
        response=response_column,
        messages=messages_column,
        prompt_ids=prompt_ids_column,
        response_ids=response_ids_column,
        id=id_column,
        keep=keep or (),
    )
    options: dict[str, Any] = {
        "groups": int(groups) if groups.isdecimal() else groups,
        "settings": settings,
        "columns": columns,
        "rows_per_shard": rows_per_shard,
        "token_budget": token_budget,
        "seed": seed,
        "progress": shows_progress(),
    }
    with interruptible() as kept, quiet_libraries():
        kept.append(f"what is in {output}; the same command continues")
        if ray_workers is not None:
            found = corpus.score_with_ray(
                source,
                output,
                model=model,
                workers=ray_workers,
                cpus_per_worker=cpus_per_worker,
                gpus_per_worker=gpus_per_worker,
                device=device,
                **options,
            )
        else:
            place, kind = check_place(device or AUTO, dtype)
            say("Loading libraries ...")
            loaded = _loaded(model, place, kind)
            found = corpus.score(
                source,
                output,
                model=loaded.model,
                tokenizer=loaded.tokenizer,
                groups_only=groups_only,
                **options,
            )
    if groups_only:
        out.print(f"Head groups: [bold]{escape(str(output / 'groups.safetensors'))}[/]")
        return
    out.print(
        f"{found.rows} rows, {found.continued} of them from an earlier run, {found.rejected} rejected; "
        f"{found.tokens} tokens, {found.padding_share:.1%} padding: [bold]{escape(str(output))}[/]",
        soft_wrap=True,
    )
    if found.rejected:
        out.print(f"Rejected: [bold]{escape(str(output / 'rejected.jsonl'))}[/]", soft_wrap=True)
        raise typer.Exit(REJECTED)


@app.command()
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
    """Summarise a folder of scores as a table, and as the page summary.html in it."""
    from attnprobe import corpus

    with _reads_scores(scores), usage("--where"):
        opened = _chosen(corpus.load_scores(scores), where)
    with interruptible(), quiet_libraries():
        found = corpus.summarize(opened, tokenizer=_tokenizer(tokenizer, opened), top=top, sample=sample)
    incomplete = "" if opened.is_complete else "; the run is not complete"
    rows = f"{found.rows} of {found.row_count} rows, {found.rejected} rejected{incomplete}"
    out.print(f"{rows}; {found.tokens} response tokens", soft_wrap=True)
    table = Table(title="Means over the corpus", title_justify="left")
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


@app.command()
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

    if (second is None) == (by is None):
        raise typer.BadParameter(
            "name a second folder, or a field with --by, to compare with", param_hint="SECOND"
        )
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
    for title in ("mean", *names, "difference", "interval"):
        table.add_column(title, justify="left" if title == "mean" else "right")
    for line in found.to_arrow().to_pylist():
        values = (f"{line[name]:.4g}" for name in ("first", "second", "difference"))
        interval = f"{line['difference_low']:.4g} to {line['difference_high']:.4g}"
        table.add_row(corpus.QUANTITIES[line["quantity"]], *values, interval)
    out.print(table)


@app.command()
def report(
    scores: ScoresArgument,
    row: Annotated[int, typer.Argument(min=0, help="The number of a row of the input.")],
    model: ModelOption = None,
    source: Annotated[
        Path | None, typer.Option(help="The input.", show_default="where it was when it was scored")
    ] = None,
) -> None:
    """Write the report of one answer, to which the summary's page then links; its model is run again."""
    from attnprobe import corpus
    from attnprobe.models import model_name

    with _reads_scores(scores):
        opened = corpus.load_scores(scores)
    with usage("--model"):
        model_name(model)
    with interruptible(), quiet_libraries():
        say("Loading libraries ...")
        loaded = _loaded(model, *check_place(AUTO, None))
        page = corpus.report_row(opened, row, model=loaded.model, tokenizer=loaded.tokenizer, source=source)
    out.print(f"Report: [bold]{escape(str(page))}[/]", soft_wrap=True)


def _credit(name: str | None) -> Any:
    if name is None:
        return None
    if name not in _CREDITS:
        raise ParameterError(f"it must be {', '.join(_CREDITS)}; got {name!r}")
    from attnprobe import rl

    return getattr(rl, _CREDITS[name])()


@contextmanager
def _reads_scores(folder: Path) -> Iterator[None]:
    """Take a folder that holds no scores for wrong usage."""
    if folder.is_dir():
        yield
        return
    with usage("SCORES"):
        yield


def _loaded(name: str | None, place: Any, dtype: Any) -> Any:
    """Load a model, and put it where it is to run."""
    from attnprobe.models import load_model

    return load_model(name, device=place, dtype=dtype, progress=shows_progress())


def _tokenizer(name: str | None, scores: Any) -> Any:
    """Load the tokenizer of a model; without a name, None if that of the scores' model is not there."""
    from attnprobe.errors import ModelLoadError
    from attnprobe.models import PACKAGED_MODEL, load_tokenizer

    known = scores.manifest["model"]["name"]
    try:
        return load_tokenizer(name if name is not None else None if known == PACKAGED_MODEL else known)
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

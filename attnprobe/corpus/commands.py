"""The commands `attnprobe corpus ...`: score a corpus, summarise it, compare two, report on one answer.

The command line (cli) adds them. `attnprobe corpus FILE ...` is short for `attnprobe corpus score FILE ...`.
Exit codes are those of the command line, and 3: all rows are done, but some were rejected. What is left to
others: the commands that read scores (reading_commands), and everything that computes something.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.markup import escape

from attnprobe.command_line import (
    AUTO,
    check_place,
    interruptible,
    out,
    parse_horizon,
    quiet_libraries,
    say,
    shows_progress,
    usage,
)
from attnprobe.corpus import reading_commands
from attnprobe.corpus.terminal import PlainHelp, ScoresByDefault
from attnprobe.errors import ParameterError, ResultError

REJECTED = 3
"""The exit code if all rows are done, but some of them could not be scored."""

app = typer.Typer(
    cls=ScoresByDefault,
    help="Score a corpus of answers, and read the scores. Where the first word is no command, it is an input "
    "to score: attnprobe corpus rollouts.jsonl --output scores/",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_CREDITS = {"local": "LocalChunkCredit", "global": "GlobalAnchorCredit", "coupled": "CoupledRhythmCredit"}


@app.command(cls=PlainHelp)
def score(
    source: Annotated[Path, typer.Argument(help="A .jsonl or .parquet file, or a folder of rows.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder of scores to write or continue.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="A hub name, a folder or a GGUF file.", show_default="the packaged SmolLM2"),
    ] = None,
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
    head_span: Annotated[
        str,
        typer.Option(help='How heads are ranked: by their "plain" span, or "ignoring" the first token.'),
    ] = "plain",
    head_values: Annotated[bool, typer.Option(help="Keep the span of every head for each row.")] = True,
    peak_quantile: Annotated[
        float, typer.Option(help="The share of tokens that may be preplans, and anchors.")
    ] = 0.4,
    lookback: Annotated[int, typer.Option(min=1, help="How many tokens a preplan may lie before.")] = 3,
    align: Annotated[
        str,
        typer.Option(help='Which token a row of attention describes: its own "token", or the "prediction".'),
    ] = "token",
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
    from attnprobe.corpus.folder import read_ledger
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
    with usage("--groups"):
        chosen_groups = _groups(groups)
    if ray_workers is not None and groups_only:
        raise typer.BadParameter("--groups-only does not go with it", param_hint="--ray-workers")
    with usage("--model"):
        model_name(model)
    settings = corpus.CorpusSettings(
        layers=chosen_layers,
        window=window,
        horizon=chosen_horizon,
        entropy=entropy,
        receivers=receivers,
        head_quantile=quantile,
        head_span=cast(Any, head_span),
        head_values=head_values,
        peak_quantile=peak_quantile,
        lookback=lookback,
        align=cast(Any, align),
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
        "groups": chosen_groups,
        "settings": settings,
        "columns": columns,
        "rows_per_shard": rows_per_shard,
        "token_budget": token_budget,
        "seed": seed,
        "model": model,
        "progress": shows_progress(),
    }
    with interruptible() as kept, quiet_libraries():
        try:
            if ray_workers is not None:
                found = corpus.score_with_ray(
                    source,
                    output,
                    workers=ray_workers,
                    cpus_per_worker=cpus_per_worker,
                    gpus_per_worker=gpus_per_worker,
                    device=device,
                    dtype=dtype,
                    **options,
                )
            else:
                place, kind = check_place(device or AUTO, dtype)
                say("Loading libraries ...")
                found = corpus.score(
                    source, output, device=place, dtype=kind, groups_only=groups_only, **options
                )
        except KeyboardInterrupt:
            rows = sum(entry.rows for entry in read_ledger(output))
            kept.append(f"{rows} finished rows in {output}; the same command continues")
            raise
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


for command in (reading_commands.summary, reading_commands.compare, reading_commands.report):
    app.command()(command)


def _groups(text: str) -> str | int:
    try:
        return int(text)
    except ValueError:
        if text == "corpus" or Path(text).is_file():
            return text
    raise ParameterError(
        'it must be "corpus", a number of rows (at least 2), or the file of saved groups; there is no '
        f"file {text}"
    )


def _credit(name: str | None) -> Any:
    if name is None:
        return None
    if name not in _CREDITS:
        raise ParameterError(f"it must be {', '.join(_CREDITS)}; got {name!r}")
    from attnprobe import rl

    return getattr(rl, _CREDITS[name])()

"""The command line: `attnprobe report`, `heads`, `score`, `doctor`, and `corpus` with commands of its own.

A thin layer over the library: it loads, calls and prints. Exit codes: 0 done, 1 an error that the message
explains, 2 wrong usage, 3 done but for rejected rows of a corpus, 130 interrupted. What is left to others:
everything that computes something.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attnprobe.adapters.base import resolve_layers
from attnprobe.corpus.commands import app as corpus
from attnprobe.errors import AttnprobeError, BatchError, ParameterError
from attnprobe.layer_selection import parse_layers
from attnprobe.validation import real_number, whole_number
from attnprobe.version import __version__

app = typer.Typer(
    help="Read a language model's attention and show the rhythm of its reasoning.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(corpus, name="corpus")
out, err = Console(), Console(stderr=True)

DEMO_SYSTEM = r"Please reason step by step, and put your final answer within \boxed{}."
DEMO_PROMPT = (
    "Ben buys 4 notebooks for 3 dollars each and 2 pens for 2 dollars each. He pays with a 20 dollar "
    "bill. How much change does he get?"
)

ModelOption = Annotated[
    str | None,
    typer.Option(help="A hub name, a folder or a GGUF file.", show_default="the packaged SmolLM2"),
]
PromptOption = Annotated[str, typer.Option(help="What to ask.", show_default="a built-in word problem")]
SystemOption = Annotated[
    str | None, typer.Option(help="The system message, in a chat.", show_default="reason step by step")
]
ResponseOption = Annotated[
    str | None, typer.Option(help="Read this answer instead of generating one.", show_default=False)
]
ChatOption = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Use the chat template.", show_default="if there is one"),
]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="The longest answer to generate.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")]
SeedOption = Annotated[int, typer.Option(help="Seed of sampling.")]
LayersOption = Annotated[str, typer.Option(help='"all", "middle", "top third", or numbers such as 0,4,8-11.')]
QuantileOption = Annotated[float, typer.Option(help="The share of heads in the local and the global group.")]


@dataclass(frozen=True)
class _Reading:
    """What `report`, `heads` and `score` work on: a model, its answer, and what its heads did."""

    model: Any
    name: str
    batch: Any
    statistics: Any
    heads: Any
    answer: str


def _read(
    model: str | None,
    prompt: str,
    system: str | None,
    response: str | None,
    chat: bool | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    layers: str,
    quantile: float,
) -> _Reading:
    """Load the model, get an answer, and measure it."""
    from attnprobe.heads import check_shares

    chosen = parse_layers(layers)
    check_shares(quantile, receivers=1)
    real_number(temperature, "--temperature", minimum=0, below=float("inf"))
    whole_number(seed, "--seed", minimum=-(2**63), maximum=2**63 - 1)
    if response is not None and not response.strip():
        raise BatchError("the response is empty: there is no token to describe")
    err.print("Loading libraries ...")
    # Only our own progress bars; tqdm reads this when it is first imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    import transformers

    import attnprobe
    from attnprobe import models

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loaded = models.load_model(model, progress=True)
    # Report anything wrong with the model or the layers before generating an answer.
    resolve_layers(chosen, attnprobe.adapter_for(loaded.model))
    ids = models.prompt_ids(loaded, prompt, system=system, chat=chat)
    if response is None:
        answer = models.generate_response(
            loaded,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            progress=True,
        )
    else:
        answer = list(loaded.tokenizer(response, add_special_tokens=False)["input_ids"])
    batch = attnprobe.TokenBatch.from_ids([ids + answer], response_start=len(ids), tokenizer=loaded.tokenizer)
    statistics = attnprobe.measure(loaded.model, batch, layers=chosen, receiver=True, progress=True)
    heads = attnprobe.classify_heads(statistics, quantile=quantile)
    return _Reading(loaded.model, loaded.name, batch, statistics, heads, loaded.tokenizer.decode(answer))


@app.command()
def report(
    model: ModelOption = None,
    prompt: PromptOption = DEMO_PROMPT,
    system: SystemOption = DEMO_SYSTEM,
    response: ResponseOption = None,
    chat: ChatOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    layers: LayersOption = "all",
    quantile: QuantileOption = 0.3,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path(
        "attnprobe-report.html"
    ),
) -> None:
    """Write a page that shows the reasoning rhythm of an answer; without options, a built-in demo."""
    from attnprobe.report.document import check_dependencies
    from attnprobe.storage import check_writable

    check_writable(output)
    check_dependencies()
    reading = _read(
        model, prompt, system, response, chat, max_new_tokens, temperature, seed, layers, quantile
    )
    import attnprobe

    scores = attnprobe.score_tokens(reading.statistics, reading.heads)
    rhythm = attnprobe.find_rhythm(scores)
    maps = attnprobe.group_maps(reading.model, reading.batch, reading.heads, progress=True)
    page = attnprobe.Report(
        reading.batch,
        reading.statistics,
        reading.heads,
        scores,
        rhythm,
        maps,
        title=f"The reasoning rhythm of {reading.name}",
        prompt=prompt,
    )
    page.save(output)
    out.print(f"\n[bold]{escape(reading.name)}[/] answered:\n")
    out.print(escape(reading.answer.strip()), highlight=False)
    out.print()
    out.print(_typical_heads(reading.heads))
    out.print(_pairs(reading.batch, scores, rhythm))
    out.print(f"Report: [bold]{escape(str(output))}[/]")


@app.command()
def heads(
    model: ModelOption = None,
    prompt: PromptOption = DEMO_PROMPT,
    system: SystemOption = DEMO_SYSTEM,
    response: ResponseOption = None,
    chat: ChatOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    layers: LayersOption = "all",
    quantile: QuantileOption = 0.3,
    top: Annotated[int, typer.Option(min=1, help="How many heads of each group to list.")] = 10,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write all heads to a .csv, .json or .safetensors file."),
    ] = None,
) -> None:
    """List the most local, most global and receiver heads of a model over an answer."""
    if output is not None:
        _check_table_path(output)
    reading = _read(
        model, prompt, system, response, chat, max_new_tokens, temperature, seed, layers, quantile
    )
    out.print(_typical_heads(reading.heads, top))
    if output is not None:
        _write_table(reading.heads, reading.heads.to_pandas, output)
        out.print(f"All heads: [bold]{escape(str(output))}[/]")


@app.command()
def score(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .csv, .json or .safetensors file to write.")
    ] = Path("attnprobe-scores.csv"),
    groups: Annotated[
        Path | None,
        typer.Option(help="Head groups saved by `heads -o`; default: those of this answer."),
    ] = None,
    model: ModelOption = None,
    prompt: PromptOption = DEMO_PROMPT,
    system: SystemOption = DEMO_SYSTEM,
    response: ResponseOption = None,
    chat: ChatOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    layers: LayersOption = "all",
    quantile: QuantileOption = 0.3,
) -> None:
    """Write WAAD, FAI and entropy of every token of an answer to a file."""
    from attnprobe.head_groups import HeadGroups

    _check_table_path(output)
    saved = None if groups is None else HeadGroups.load(groups)
    reading = _read(
        model, prompt, system, response, chat, max_new_tokens, temperature, seed, layers, quantile
    )
    import attnprobe

    scores = attnprobe.score_tokens(reading.statistics, saved or reading.heads)
    _write_table(scores, lambda: scores.to_pandas(reading.batch), output)
    count = int(scores.response_mask.sum())
    out.print(f"Scores of {count} tokens: [bold]{escape(str(output))}[/]")


@app.command()
def doctor() -> None:
    """Show versions, which optional packages import, and which attention implementations run here."""
    from attnprobe import doctor as checks

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


def _typical_heads(groups: Any, top: int = 10) -> Table:
    table = Table(title="Heads, by mean attention span", title_justify="left")
    for title in ("most local", "span", "most global", "span", "receivers", "kurtosis"):
        table.add_column(title, justify="left" if title.startswith(("most", "rec")) else "right")
    columns = []
    for group, value in (("local", "span"), ("global", "span"), ("receiver", "receiver_kurtosis")):
        cells = []
        for layer, head in groups.pairs(group)[:top]:
            number = float(getattr(groups, value)[groups.layers.index(layer), head])
            cells.append((f"L{layer} H{head}", f"{number:.1f}"))
        columns.append(cells)
    for line in zip_longest(*columns, fillvalue=("", "")):
        table.add_row(*(text for cell in line for text in cell))
    return table


def _pairs(batch: Any, scores: Any, rhythm: Any, most: int = 12) -> Table:
    """Return a table of the strongest anchors with their preplans, in the order of the text."""
    pairs = rhythm.pairs()
    strongest = sorted(sorted(pairs, key=lambda pair: -float(scores.fai[0, pair[1]]))[:most])
    anchors, preplans = int(rhythm.anchor.sum()), int(rhythm.preplan.sum())
    title = f"{preplans} preplans, {anchors} anchors, {len(pairs)} of them at a preplan"
    if len(pairs) > most:
        title += f"; the {most} strongest:"
    table = Table(title=title, title_justify="left")
    for name in ("preplan", "anchor", "WAAD", "FAI", "in"):
        table.add_column(name, justify="right" if name in ("WAAD", "FAI") else "left")
    texts = batch.texts[0]
    for preplan, anchor in strongest:
        context = "".join(texts[max(preplan - 4, 0) : anchor + 5])
        table.add_row(
            escape(repr(texts[preplan])),
            escape(repr(texts[anchor])),
            f"{float(scores.waad[0, preplan]):.2f}",
            f"{float(scores.fai[0, anchor]):.4f}",
            escape(" ".join(context.split())),
        )
    return table


def _check_table_path(output: Path) -> None:
    """Check that a result can be written there, before doing the work."""
    from attnprobe.storage import check_writable, import_pandas

    if output.suffix not in (".csv", ".json", ".safetensors"):
        raise ParameterError(f"--output must end in .csv, .json or .safetensors, got {output}")
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


def main() -> None:
    """Run the command line; errors that the user can act on are one line, without a traceback."""
    try:
        app()
    except AttnprobeError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)

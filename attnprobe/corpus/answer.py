"""The report of a single answer of a corpus: the row is read from the input and measured again.

`attnprobe corpus report` calls `report_row`, and the page of the corpus links to what it writes. What is left
to others: the report itself (report) and the page (page).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnprobe.adapters import adapter_for
from attnprobe.batch import TokenBatch
from attnprobe.corpus.fingerprints import model_fingerprint
from attnprobe.corpus.folder import check_same
from attnprobe.corpus.loading import model_and_tokenizer, model_of_scores
from attnprobe.corpus.page import report_path
from attnprobe.corpus.reading import CorpusScores
from attnprobe.corpus.rows import Columns, RowReader
from attnprobe.corpus.sources import open_source
from attnprobe.errors import ParameterError, ResultError
from attnprobe.measurement import group_maps, measure
from attnprobe.models import DeviceLike
from attnprobe.report import Report
from attnprobe.rhythm import find_rhythm
from attnprobe.scores import score_tokens
from attnprobe.storage import PathLike
from attnprobe.validation import IntLike, instance, whole_number

_NAME_THE_INPUT = "Name the input that the scores are of: --source, or source=..."


def report_row(
    scores: CorpusScores,
    row: IntLike,
    *,
    model: Any = None,
    tokenizer: Any = None,
    source: PathLike | None = None,
    device: DeviceLike | None = None,
) -> Path:
    """Write the report of one row as `reports/ROW.html` into the folder of scores, and return its path.

    Args:
        scores: from `load_scores`.
        row: the number of the row in the input.
        model, tokenizer: with which the corpus was scored; None: loaded from where they came.
        source: the input, if it is no longer where it was.
        device: where a model that is loaded here runs, as for `load_model`.

    Raises:
        ParameterError: a row that the input does not have.
        ResultError: another input or model than the scores are of, or a row that cannot be scored.
        ModelLoadError: a model that cannot be loaded.
    """
    instance(scores, CorpusScores, "scores", "load_scores returns them")
    known = scores.manifest
    number = whole_number(row, "row", maximum=scores.row_count - 1)
    try:
        opened = open_source(known["source"] if source is None else source, known["rows_per_shard"])
    except ResultError as error:
        raise ResultError(f"{error}. {_NAME_THE_INPUT}") from error
    # Before the model is loaded.
    check_same(scores.folder, known, {"input": opened.files}, _NAME_THE_INPUT)
    if model is None:
        model, found = model_of_scores(known, device)
        tokenizer = found if tokenizer is None else tokenizer
    else:
        model, tokenizer = model_and_tokenizer(model, tokenizer, device=device)
    adapter = adapter_for(model)
    asked = {"input": opened.files, "model": model_fingerprint(model, adapter)}
    check_same(scores.folder, known, asked, "Name the model that the scores are of")
    settings = known["settings"]
    reader = RowReader.of(
        model,
        adapter,
        tokenizer,
        Columns(**known["columns"]),
        chat=settings["chat"],
        longest=settings["longest"],
    )
    raw = [each for each in opened.window(number // opened.rows_per_window) if each.number == number]
    if not raw:
        raise ParameterError(f"row {number} of the input is a blank line")
    (read,) = reader.read(raw)
    if read.rejected is not None:
        raise ResultError(f"row {number} cannot be scored: {read.rejected}")
    ids = [[*read.prompt, *read.response]]
    batch = TokenBatch.from_ids(ids, response_start=len(read.prompt), tokenizer=tokenizer)
    groups = scores.groups
    statistics = measure(
        adapter,
        batch,
        layers=groups.layers,
        window=settings["window"],
        horizon=settings["horizon"],
        entropy=settings["entropy"],
    )
    token_scores = score_tokens(statistics, groups, align=settings["align"])
    rhythm = find_rhythm(token_scores, quantile=settings["peak_quantile"], lookback=settings["lookback"])
    page = Report(
        batch,
        statistics,
        groups,
        token_scores,
        rhythm,
        group_maps(adapter, batch, groups),
        title=f"Row {number}" if read.id is None else f"Row {number}: {read.id}",
        notes=f"One answer of {scores.folder.name}, by the head groups of the whole corpus.",
        tokenizer=tokenizer,
    )
    path = report_path(scores.folder, number)
    path.parent.mkdir(exist_ok=True)
    return page.save(path)

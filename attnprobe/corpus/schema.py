"""The table of scores: one row for each response; its columns, their types, and its version.

The scorer builds tables with `score_table`; shards, Ray and `datasets` carry them; `scores_of` turns them
back into `TokenScores` for the analyses. docs/corpus.md describes the columns for readers in other languages.
What is left to others: computing the scores (scorer) and the files (folder).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch

from attnprobe.corpus.rows import Row
from attnprobe.provenance import Provenance
from attnprobe.scores import TokenScores
from attnprobe.storage import import_pyarrow

SCHEMA_VERSION = 1
"""Raised when a column is renamed, removed, or changes its meaning; a new column does not raise it."""

TOKEN_COLUMNS = ("waad", "fai", "entropy", "receiver_fai", "gamma")
"""A number for each response token, float32; NaN where undefined. Some may not have been measured."""

MASK_COLUMNS = ("preplan", "anchor")
"""A truth value for each response token."""

HEAD_COLUMNS = ("span", "first_token_share")
"""A number for each head of each measured layer, layer by layer, float32."""

_METADATA = b"attnprobe"


def table_schema(provenance: Mapping[str, Any] | None = None) -> Any:
    """Return the Arrow schema of the table; all columns are there, whatever was measured."""
    arrow = import_pyarrow()
    numbers, masks = arrow.list_(arrow.float32()), arrow.list_(arrow.bool_())
    columns = [
        arrow.field("row", arrow.int64()),
        arrow.field("id", arrow.string()),
        arrow.field("kept", arrow.string()),
        arrow.field("rejected", arrow.string()),
        arrow.field("prompt_tokens", arrow.int32()),
        arrow.field("tokens", arrow.list_(arrow.int32())),
        *(arrow.field(name, numbers) for name in TOKEN_COLUMNS),
        *(arrow.field(name, masks) for name in MASK_COLUMNS),
        *(arrow.field(name, numbers) for name in HEAD_COLUMNS),
    ]
    told = {"schema": SCHEMA_VERSION, **(provenance or {})}
    return arrow.schema(columns, metadata={_METADATA: json.dumps(told)})


def score_table(rows: Sequence[Row], found: Mapping[int, Mapping[str, Any]], schema: Any) -> Any:
    """Return the table of rows: with what was found for each, by its place, or with why it was rejected."""
    arrow = import_pyarrow()
    columns: list[Any] = [
        arrow.array([row.number for row in rows], arrow.int64()),
        arrow.array([row.id for row in rows], arrow.string()),
        arrow.array([row.kept for row in rows], arrow.string()),
        arrow.array([row.rejected for row in rows], arrow.string()),
    ]
    scored = [place in found for place in range(len(rows))]
    counts = [len(row.prompt) if is_scored else None for row, is_scored in zip(rows, scored, strict=True)]
    columns.append(arrow.array(counts, arrow.int32()))
    tokens = [
        numpy.asarray(row.response, dtype=numpy.int32) if is_scored else None
        for row, is_scored in zip(rows, scored, strict=True)
    ]
    columns.append(_lists(tokens, numpy.int32))
    for names, kind in (
        (TOKEN_COLUMNS, numpy.float32),
        (MASK_COLUMNS, numpy.bool_),
        (HEAD_COLUMNS, numpy.float32),
    ):
        for name in names:
            values = [found.get(place, {}).get(name) for place in range(len(rows))]
            columns.append(_lists(values, kind))
    return arrow.Table.from_arrays(columns, schema=schema)


def _lists(values: Sequence[Any], kind: Any) -> Any:
    """Return a column of lists from arrays; None makes a null."""
    arrow = import_pyarrow()
    lengths = [0 if value is None else len(value) for value in values]
    offsets = numpy.zeros(len(values) + 1, dtype=numpy.int32)
    numpy.cumsum(lengths, out=offsets[1:])
    present = [value for value in values if value is not None]
    flat = numpy.concatenate(present).astype(kind, copy=False) if present else numpy.zeros(0, dtype=kind)
    missing = arrow.array([value is None for value in values], arrow.bool_())
    return arrow.ListArray.from_arrays(arrow.array(offsets), arrow.array(flat), mask=missing)


def metadata_of(schema: Any) -> dict[str, Any]:
    """Return what a table's schema says of how it was made; empty if it is none of ours."""
    found = (schema.metadata or {}).get(_METADATA)
    told = {} if found is None else json.loads(found)
    return told if isinstance(told, dict) else {}


def scores_of(table: Any, provenance: Provenance | None = None) -> TokenScores | None:
    """Return the scores of a table's rows as `TokenScores`, responses only; None if no row was scored.

    Example `i` is the i-th row that was scored.
    """
    from pyarrow import compute

    table = table.filter(compute.is_null(table["rejected"]))
    if table.num_rows == 0:
        return None
    ids = padded_column(table, "tokens")
    assert ids is not None
    lengths = torch.from_numpy(_lengths(table["tokens"]))
    inside = torch.arange(ids.shape[1]) < lengths[:, None]
    waad, fai = padded_column(table, "waad"), padded_column(table, "fai")
    assert waad is not None
    assert fai is not None
    return TokenScores(
        waad=waad,
        fai=fai,
        entropy=padded_column(table, "entropy"),
        response_mask=inside,
        receiver_fai=padded_column(table, "receiver_fai"),
        input_ids=ids.long(),
        provenance=provenance or Provenance(),
    )


def padded_column(table: Any, name: str) -> torch.Tensor | None:
    """Return a column of lists as `[row, place]`, padded with NaN, 0 or False; None if it was not measured.

    Rows without a list are padding throughout.
    """
    column = table[name].combine_chunks()
    if column.null_count == len(column):
        return None
    lengths = _lengths(column)
    flat = column.flatten().to_numpy(zero_copy_only=False)
    fill: Any = numpy.nan if flat.dtype.kind == "f" else 0
    out = numpy.full((len(lengths), max(1, int(lengths.max()))), fill, dtype=flat.dtype)
    out[numpy.arange(out.shape[1]) < lengths[:, None]] = flat
    return torch.from_numpy(out)


def _lengths(column: Any) -> Any:
    from pyarrow import compute

    lengths = compute.list_value_length(column)
    return lengths.fill_null(0).to_numpy(zero_copy_only=False).astype(numpy.int64)

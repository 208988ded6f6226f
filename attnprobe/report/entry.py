"""One example as the data of an entry of the page: everything that its views show, ready for JSON.

`Report` calls `entry_data`, and assets/data.js reads it when the entry is opened. Token scores are exact;
scores of all heads and maps are rounded (packing, maps), and the page says so. What is left to others:
whether the results fit together (checks), and the page around the entries (page).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnprobe.batch import TokenBatch
from attnprobe.head_groups import HeadGroups
from attnprobe.head_statistics import HeadStatistics
from attnprobe.maps import GroupMaps
from attnprobe.provenance import ranges
from attnprobe.report.checks import maps_entry
from attnprobe.report.maps import map_data
from attnprobe.report.packing import floats, packed, rounded_heads
from attnprobe.report.reads import reads_of
from attnprobe.report.response import (
    CoupledPair,
    ResponseToken,
    coupled_pairs,
    enough_rows,
    influence_rows,
    prompt_text,
    read_response,
)
from attnprobe.report.visible_text import byte_marks, visible
from attnprobe.rhythm import Rhythm
from attnprobe.scores import TokenScores
from attnprobe.texts import token_bytes

_FLAGS = ("preplan", "anchor", "dominated", "intro")
_GROUPS = ("local_heads", "global_heads", "receiver_heads")


@dataclass(frozen=True)
class Shown:
    """The results of one example, which were checked to belong together."""

    batch: TokenBatch
    statistics: HeadStatistics
    heads: HeadGroups
    scores: TokenScores
    rhythm: Rhythm
    maps: GroupMaps | None
    weights: Mapping[str, Tensor]
    example: int
    title: str
    prompt: str | None
    notes: str | None
    tokenizer: Any = None


def entry_data(shown: Shown) -> dict[str, Any]:
    """Return the data of one entry."""
    tokens = read_response(shown.batch, shown.scores, shown.rhythm, shown.example)
    pairs = coupled_pairs(tokens, shown.rhythm, shown.example)
    columns = [token.column for token in tokens]
    rows = influence_rows(shown.batch, shown.statistics, shown.example)
    place = {column: i for i, column in enumerate(columns)}
    ids = shown.batch.input_ids[shown.example, columns].tolist()
    known = [] if shown.tokenizer is None else token_bytes(shown.tokenizer, ids)
    marks = byte_marks([token.text for token in tokens], known)
    # What stands for a fragment is no text, and is not searched.
    texts = ["" if i in marks else token.text for i, token in enumerate(tokens)]
    own_prompt = prompt_text(shown.batch, shown.example)
    return {
        "title": visible(shown.title),
        "notes": visible(shown.notes or ""),
        "prompt": (own_prompt if shown.prompt is None else visible(shown.prompt)) or "",
        "line": _line(shown, tokens, pairs),
        "facts": [list(fact) for fact in _facts(shown).items()],
        "window": shown.statistics.window,
        "horizon": list(shown.statistics.horizon),
        "lookback": shown.rhythm.lookback,
        "enoughRows": enough_rows(shown.statistics.horizon),
        "hasTexts": shown.batch.texts is not None,
        "texts": texts,
        "marks": {str(i): mark for i, mark in marks.items()},
        "columns": packed(torch.tensor(columns), "i4"),
        "ids": packed(ids, "i4"),
        "rows": None if rows is None else packed(rows[columns], "i4"),
        "flags": packed(_flags(tokens), "u1"),
        "preplanOf": packed(_links(pairs, place, "preplan"), "i4"),
        "introOf": packed(_links(pairs, place, "intro"), "i4"),
        "scores": _scores(shown, columns),
        "heads": _heads(shown, columns),
        **_maps(shown, place),
    }


def _flags(tokens: tuple[ResponseToken, ...]) -> Tensor:
    """Return the roles of each token, a bit for each."""
    return torch.tensor(
        [sum(bool(getattr(token, name)) << bit for bit, name in enumerate(_FLAGS)) for token in tokens]
    )


def _links(pairs: tuple[CoupledPair, ...], place: dict[int, int], name: str) -> Tensor:
    """Return the place of each anchor's preplan or intro among the response's tokens; -1 without one."""
    links = torch.full((len(place),), -1)
    for pair in pairs:
        token: ResponseToken | None = getattr(pair, name)
        if token is not None:
            links[place[pair.anchor.column]] = place[token.column]
    return links


def _scores(shown: Shown, columns: list[int]) -> list[dict[str, Any]]:
    """Return the scores by which the text can be coloured, exactly as they are."""
    scores, example = shown.scores, shown.example
    unit = "" if not shown.statistics.value_weighted else "units of the residual stream"
    # In float64, so that the mean does not depend on the order in which heads are summed.
    everyone = shown.statistics.fai[example].double().flatten(0, 1).nanmean(0)
    found: list[tuple[str, str, str, str, Tensor | None]] = [
        ("waad", "WAAD", "how far back the local heads look", "tokens", scores.waad[example]),
        ("fai", "FAI", "how much later tokens read it through the global heads", unit, scores.fai[example]),
        (
            "receivers",
            "FAI of receivers",
            "how much later tokens read it through the receiver heads",
            unit,
            None if scores.receiver_fai is None else scores.receiver_fai[example],
        ),
        ("all", "FAI of all heads", "how much later tokens read it through all heads", unit, everyone),
        (
            "entropy",
            "entropy",
            "how undecided the model was before it wrote the token",
            "nats",
            None if scores.entropy is None else scores.entropy[example],
        ),
    ]
    found += [
        (
            f"gamma{i}",
            f"γ {visible(name)}",
            "by how much training weighs the token's advantage",
            "",
            of[example],
        )
        for i, (name, of) in enumerate(shown.weights.items())
    ]
    return [
        {
            "key": key,
            "name": name,
            "about": about,
            "unit": unit,
            "values": packed(floats(values[columns]), "f4"),
        }
        for key, name, about, unit, values in found
        if values is not None
    ]


def _heads(shown: Shown, columns: list[int]) -> dict[str, Any]:
    """Return what is known about each head: once for all tokens, and rounded for each."""
    heads, statistics = shown.heads, shown.statistics
    index = [statistics.layers.index(layer) for layer in heads.layers]
    groups = torch.zeros(heads.span.shape, dtype=torch.uint8)
    for bit, name in enumerate(_GROUPS):
        mask = getattr(heads, name)
        if mask is not None:
            groups += mask.cpu().to(torch.uint8) << bit
    first = None
    if "first" in statistics.share_on and "response" in statistics.share_from:
        first = packed(floats(statistics.share("first")[shown.example, index]), "f4")
    kurtosis, gini = (
        None if values is None else packed(floats(values), "f4")
        for values in (heads.receiver_kurtosis, heads.receiver_gini)
    )
    waad, fai = (
        floats(values[shown.example, index][..., columns]).flatten(0, 1)
        for values in (statistics.waad, statistics.fai)
    )
    return {
        "layers": list(heads.layers),
        "count": heads.head_count,
        "span": packed(floats(heads.span), "f4"),
        "kurtosis": kurtosis,
        "gini": gini,
        "first": first,
        "groups": packed(groups, "u1"),
        "waad": rounded_heads(waad),
        "fai": rounded_heads(fai, is_heavy_tailed=True),
    }


def _maps(shown: Shown, place: dict[int, int]) -> dict[str, Any]:
    """Return the maps of the example alone, without the padding of shorter responses, and its reads."""
    if shown.maps is None:
        return {"maps": None, "reads": None}
    maps = shown.maps.select(maps_entry(shown.maps, shown.batch, shown.example), trim=True)
    tokens = [place[column] for column in maps.columns_of(0)]
    return {"maps": map_data(maps, tokens), "reads": reads_of(maps, tokens, len(place))}


def shown_model_name(name: str) -> str:
    """Return a model's name; for a model loaded from a folder, only the folder's own name.

    A report is made to be shared, and should not reveal paths on someone's disk.
    """
    if not name:
        return "unnamed"
    return Path(name).name if Path(name).is_absolute() else name


def _line(shown: Shown, tokens: tuple[ResponseToken, ...], pairs: tuple[CoupledPair, ...]) -> str:
    """Return the facts that a reader needs at once, on one line."""
    heads = shown.heads
    peaks = {"preplan": sum(t.preplan for t in tokens), "anchor": sum(t.anchor for t in tokens)}
    counted = [f"{count} {name}{'' if count == 1 else 's'}" for name, count in peaks.items()]
    return " · ".join(
        [
            visible(shown_model_name(shown.statistics.model_name)),
            f"{len(tokens)} token{'' if len(tokens) == 1 else 's'}",
            f"{len(heads.layers)} × {heads.head_count} heads",
            *counted,
            f"{len(pairs)} in pairs",
        ]
    )


def _facts(shown: Shown) -> dict[str, str]:
    """Return all facts about the run, by name."""
    statistics, heads = shown.statistics, shown.heads
    low, high = statistics.horizon
    facts = {
        "Model": visible(shown_model_name(statistics.model_name)),
        "Layers measured": f"{len(statistics.layers)}: {ranges(statistics.layers)}",
    }
    if statistics.skipped_layers:
        facts["Layers without attention"] = ranges(statistics.skipped_layers)
    count, most = int((~heads.span.isnan()).sum()), heads.span.shape[1]
    uneven = "" if count == most * len(heads.layers) else "up to "
    groups = f"{int(heads.local_heads.sum())} local, {int(heads.global_heads.sum())} global"
    if heads.receiver_heads is not None:
        groups += f", {int(heads.receiver_heads.sum())} receivers"
    facts |= {
        "Heads measured": f"{count} ({uneven}{most} in a layer): {groups}",
        "WAAD window": f"{statistics.window} tokens",
        "FAI horizon": f"{low} to {high} tokens later" if high else f"{low} tokens later to the end",
        "Peaks": f"among the top {shown.rhythm.quantile:.0%} of a score",
        "Lookback": f"an anchor follows its preplan within {shown.rhythm.lookback} tokens",
        "Response": f"example {shown.example} of a batch of {shown.batch.batch_size}",
    }
    if statistics.influence_rows != "response":
        facts["FAI counts the rows of"] = statistics.influence_rows
    if statistics.value_weighted:
        facts["FAI weighs"] = "attention by the norms of values"
    if shown.scores.provenance.align == "prediction":
        facts["WAAD describes"] = "the row that produced each token"
    return facts

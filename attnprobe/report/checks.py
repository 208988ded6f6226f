"""Whether results belong together: the same tokens, example, model, window, horizon, layers and heads.

A report of results that do not belong together would show numbers next to the wrong tokens, or attribute them
to the wrong model and heads. `Report` calls `check_results_fit` when it is made, and `check_weights`. Names,
ids and columns are compared here; whether the numbers themselves follow from one another, `agreement` checks.
What is left to others: whether each result is valid in itself (the results' own modules).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attnprobe.batch import TokenBatch
from attnprobe.errors import ParameterError, ResultError
from attnprobe.head_groups import HeadGroups
from attnprobe.head_statistics import HeadStatistics
from attnprobe.maps import GroupMaps
from attnprobe.provenance import Provenance
from attnprobe.report.agreement import check_map_numbers, check_rhythm_numbers, check_score_numbers
from attnprobe.rhythm import Rhythm
from attnprobe.scores import TokenScores, check_same_tokens
from attnprobe.validation import as_float_tensor, brief


def check_results_fit(
    batch: TokenBatch,
    statistics: HeadStatistics,
    heads: HeadGroups,
    scores: TokenScores,
    rhythm: Rhythm,
    maps: GroupMaps | None,
    example: int,
) -> None:
    """Check that results describe the same batch, and that they were computed from one another.

    Raises:
        ResultError: results of other tokens, responses, models, windows, horizons, layers or heads.
    """
    if not bool(batch.response_mask[example].any()):
        raise ResultError(f"example {example} has an empty response: there is no token to show")
    named: dict[str, Any] = {"statistics": statistics, "scores": scores, "rhythm": rhythm}
    _check_shapes(batch, named)
    for name, result in named.items():
        if result.response_mask is not None:
            check_same_tokens(batch, result, f"the {name}")
            check_response(batch, result.response_mask, f"the {name}", example)
    _check_heads(statistics, heads)
    measured = Provenance(
        statistics.model_name,
        statistics.layers,
        statistics.window,
        statistics.horizon,
        _heads_of(heads),
        influence_rows=statistics.influence_rows,
        value_weighted=statistics.value_weighted,
    )
    check_provenance(measured, scores.provenance, "scores", "the statistics and head groups")
    # Scores that were made by hand know nothing of what the rhythm may know.
    check_provenance(measured, rhythm.provenance, "rhythm", "the statistics and head groups")
    check_provenance(scores.provenance, rhythm.provenance, "rhythm", "the scores")
    check_score_numbers(statistics, scores, example)
    check_rhythm_numbers(scores, rhythm, example)
    if maps is not None:
        _check_maps(batch, maps, example)
        check_provenance(measured, maps.provenance, "maps", "the statistics and head groups")
        check_map_numbers(maps.select(maps_entry(maps, batch, example)), statistics, scores, example)


def check_weights(weights: Any, batch: TokenBatch, example: int) -> dict[str, Tensor]:
    """Return the weights of strategies by name.

    Raises:
        ParameterError: something that is no mapping from names to `[batch, token]`, or weights that are
            undefined, infinite or negative on a token of the response.
    """
    if weights is None:
        return {}
    hint = 'pass them by name, such as {"coupled": CoupledRhythmCredit()(scores)}'
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) and name for name in weights):
        raise ParameterError(f"weights must be a mapping from names to gamma; got {brief(weights)}: {hint}")
    checked = {}
    for name, values in weights.items():
        gamma = as_float_tensor(values, f"weights[{name!r}]")
        if gamma.shape != batch.input_ids.shape:
            raise ParameterError(
                f"weights[{name!r}] must be [batch, token] = {list(batch.input_ids.shape)}, as the batch; "
                f"got {list(gamma.shape)}"
            )
        inside = batch.response_mask[example].to(gamma.device)
        own = gamma[example]
        wrong = ((~own.isfinite() | (own < 0)) & inside).nonzero()[:, 0].tolist()
        if wrong:
            raise ParameterError(
                f"weights[{name!r}] must be finite and not negative; they are {float(own[wrong[0]]):.3g} in "
                f"column {wrong[0]} of example {example}, and wrong in {len(wrong)} columns of its response"
            )
        checked[name] = gamma
    return checked


def maps_entry(maps: GroupMaps, batch: TokenBatch, example: int) -> int:
    """Return the index of an example in the maps, which are of that example alone or of the whole batch.

    Raises:
        ResultError: maps of any other number of examples.
    """
    count = maps.columns.shape[0]
    if count not in (1, batch.batch_size):
        raise ResultError(
            f"the maps are of {count} examples, the batch of {batch.batch_size}: pass those of example "
            f"{example}, group_maps(..., example={example}), or of all"
        )
    return example if count == batch.batch_size else 0


def _check_shapes(batch: TokenBatch, results: dict[str, Any]) -> None:
    """Check that all results per token have the shape of the batch."""
    sizes = {name: _token_shape(result) for name, result in {"batch": batch, **results}.items()}
    if any(size != sizes["batch"] for size in sizes.values()):
        raise ResultError(f"these results are not of the same batch: their [example, token] are {sizes}")


def _token_shape(result: Any) -> list[int]:
    # A rhythm that was made by hand may have no response mask.
    mask: Tensor = result.preplan if isinstance(result, Rhythm) else result.response_mask
    return list(mask.shape)


def check_response(batch: TokenBatch, mask: Tensor, name: str, example: int) -> None:
    """Check that a result describes the same tokens of the example as the batch."""
    ours, theirs = batch.response_mask[example].cpu(), mask[example].cpu()
    if bool((theirs != ours).any()):
        raise ResultError(
            f"{name} describe {int(theirs.sum())} response tokens of example {example}, from column "
            f"{_first(theirs)}; the batch has {int(ours.sum())}, from column {_first(ours)}"
        )


def _check_heads(statistics: HeadStatistics, heads: HeadGroups) -> None:
    """Check that head groups are of the statistics' model, layers and heads."""
    heads.check_fits(statistics.layers, statistics.head_count, statistics.model_name)
    if bool(heads.span.isnan().all()):
        raise ResultError("no head has a defined span: there is nothing to show")


def _heads_of(heads: HeadGroups) -> dict[str, tuple[tuple[int, int, float], ...]]:
    found = {"local": heads.local.heads, "global": heads.global_.heads}
    return found if heads.receiver_heads is None else {**found, "receiver": heads.receiver.heads}


def check_provenance(expected: Provenance, found: Provenance, name: str, source: str) -> None:
    """Check that a result was computed from what is shown with it, as far as both are known."""
    for field in ("model_name", "layers", "window", "horizon", "influence_rows", "value_weighted"):
        ours, theirs = getattr(expected, field), getattr(found, field)
        # Maps are of the layers that their heads are in, of all rows, and of plain attention.
        if field in ("layers", "influence_rows", "value_weighted") and name == "maps":
            continue
        if ours not in ("", None, ()) and theirs not in ("", None, ()) and ours != theirs:
            raise ResultError(f"the {name} are of {field}={theirs}, {source} of {field}={ours}")
    for group in expected.heads.keys() & found.heads.keys():
        ours, theirs = set(expected.heads[group]), set(found.heads[group])
        if ours != theirs:
            some = sorted((layer, head) for layer, head, _ in ours ^ theirs)
            raise ResultError(
                f"the {name} are of other {group} heads than {source}: {len(theirs)} and {len(ours)} heads, "
                f"which differ in (layer, head) {brief(some)}"
            )


def _check_maps(batch: TokenBatch, maps: GroupMaps, example: int) -> None:
    """Check that maps are of tokens of the example's response."""
    entry = maps_entry(maps, batch, example)
    columns = maps.columns_of(entry)
    inside = set(batch.response_mask[example].nonzero()[:, 0].tolist())
    hint = f"pass group_maps(..., example={example})"
    if not columns or not inside.issuperset(columns) or sorted(set(columns)) != columns:
        raise ResultError(
            f"the maps are of columns {_range(columns)}, but the response of example {example} is in "
            f"columns {_range(sorted(inside))}: {hint}"
        )
    if maps.input_ids is None:
        return
    theirs = maps.input_ids[entry, : len(columns)].tolist()
    ours = batch.input_ids[example, columns].tolist()
    for column, their_id, our_id in zip(columns, theirs, ours, strict=True):
        if their_id != our_id:
            raise ResultError(
                f"the maps are of other tokens than example {example}: in column {column} they have id "
                f"{their_id}, the batch has {our_id}: {hint}"
            )


def _range(columns: list[int]) -> str:
    return f"{columns[0]}..{columns[-1]}" if columns else "none"


def _first(mask: Tensor) -> str:
    found = mask.nonzero()[:, 0].tolist()
    return str(found[0]) if found else "none"

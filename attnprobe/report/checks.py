"""Whether results belong together: the same batch, the same response, the same layers and heads.

A report of results that do not fit would show numbers beside the wrong tokens. What is left to others:
whether each result is right in itself (the results' own modules).
"""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor

from attnprobe.batch import TokenBatch
from attnprobe.errors import ParameterError, ResultError
from attnprobe.head_statistics import HeadStatistics
from attnprobe.heads import HeadGroups
from attnprobe.maps import GroupMaps
from attnprobe.rhythm import Rhythm
from attnprobe.scores import TokenScores


def check_results_fit(
    batch: TokenBatch,
    statistics: HeadStatistics,
    heads: HeadGroups,
    scores: TokenScores,
    rhythm: Rhythm,
    maps: GroupMaps | None,
    example: int,
) -> None:
    """Check that results describe one batch, and that it has the example.

    Raises:
        ParameterError: an example that the batch does not have.
        ResultError: results of other shapes, responses, layers or heads.
    """
    if isinstance(example, bool) or not isinstance(example, int) or not 0 <= example < batch.batch_size:
        raise ParameterError(f"example must be in 0..{batch.batch_size - 1}, got {example!r}")
    _check_tokens(batch, statistics, scores, rhythm)
    _check_responses(batch, statistics, scores, example)
    _check_heads(statistics, heads)
    if maps is not None:
        _check_maps(batch, maps, example)


def _check_tokens(batch: TokenBatch, statistics: HeadStatistics, scores: TokenScores, rhythm: Rhythm) -> None:
    """Check that all results per token have the shape of the batch."""
    shapes = {
        "batch": list(batch.input_ids.shape),
        "statistics": list(statistics.response_mask.shape),
        "scores": list(scores.waad.shape),
        "rhythm": list(rhythm.preplan.shape),
    }
    if any(shape != shapes["batch"] for shape in shapes.values()):
        raise ResultError(f"these results are not of one batch: their [batch, token] are {shapes}")
    masks = ("preplan", "anchor", "anchor_preplan", "dominated", "intro", "delta")
    inside = {name: list(getattr(rhythm, name).shape) for name in masks}
    if any(shape != shapes["batch"] for shape in inside.values()):
        raise ResultError(f"the parts of the rhythm must all be {shapes['batch']}, got {inside}")
    if batch.texts is not None:
        texts = [len(row) for row in batch.texts]
        if texts != [batch.token_count] * batch.batch_size:
            raise ResultError(f"the batch is {shapes['batch']}, but its texts number {texts} tokens a row")


def _check_responses(
    batch: TokenBatch, statistics: HeadStatistics, scores: TokenScores, example: int
) -> None:
    """Check that results describe the same tokens of the example."""
    ours = batch.response_mask[example].cpu()
    if not bool(ours.any()):
        raise ResultError(f"example {example} has an empty response: there is no token to show")
    for name, result in (("statistics", statistics), ("scores", scores)):
        theirs = result.response_mask[example].cpu()
        if bool((theirs != ours).any()):
            raise ResultError(
                f"the {name} describe {int(theirs.sum())} response tokens of example {example}, "
                f"from column {_first(theirs)}; the batch has {int(ours.sum())}, from column {_first(ours)}"
            )


def _check_heads(statistics: HeadStatistics, heads: HeadGroups) -> None:
    """Check that statistics and head groups are of the same layers and heads."""
    heads.check_fits(statistics.layers, statistics.head_count, statistics.model_name)
    named = {"local_heads": heads.local_heads, "global_heads": heads.global_heads, "span": heads.span}
    if heads.receiver_heads is not None:
        named["receiver_heads"] = heads.receiver_heads
    if heads.receiver_kurtosis is not None:
        named["receiver_kurtosis"] = heads.receiver_kurtosis
    shapes = {name: list(value.shape) for name, value in named.items()}
    wanted = [len(heads.layers), heads.span.shape[1]]
    if any(shape != wanted for shape in shapes.values()):
        raise ResultError(f"the head groups of {len(heads.layers)} layers must be {wanted}, got {shapes}")
    measured = [statistics.waad.shape[1], statistics.head_count]
    if measured != wanted:
        raise ResultError(
            f"the statistics name {len(statistics.layers)} layers, but their WAAD is of {measured}"
        )
    if bool(heads.span.isnan().all()):
        raise ResultError("no head has a defined span: there is nothing to show")


def _check_maps(batch: TokenBatch, maps: GroupMaps, example: int) -> None:
    """Check that maps are of tokens of the example's response."""
    shapes = {"local_map": list(maps.local_map.shape), "global_map": list(maps.global_map.shape)}
    if any(shape != [len(maps.columns)] * 2 for shape in shapes.values()) or not maps.columns:
        raise ResultError(f"maps of {len(maps.columns)} tokens must have as many rows and keys, got {shapes}")
    columns = set(batch.response_mask[example].nonzero()[:, 0].tolist())
    if not columns.issuperset(maps.columns):
        raise ResultError(
            f"the maps are of columns {min(maps.columns)}..{max(maps.columns)}, but the response of example "
            f"{example} stands in columns {min(columns)}..{max(columns)}: pass group_maps(..., "
            f"example={example})"
        )


def _first(mask: Bool[Tensor, " token"]) -> str:
    found = mask.nonzero()[:, 0].tolist()
    return str(found[0]) if found else "none"

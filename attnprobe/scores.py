"""TokenScores: one number a token, from the statistics of a group of heads.

WAAD is the mean over local heads, FAI over global heads (Def. 4.1 of arXiv 2510.13554): both are
linear in attention, so this equals the metric of the group's mean map. What is left to others: peaks and
what they mean (rhythm), and weights for training (rl).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnprobe.batch import TokenBatch
from attnprobe.errors import ResultError
from attnprobe.head_statistics import HeadStatistics
from attnprobe.heads import HeadGroups
from attnprobe.storage import import_pandas, load_result, save_result

if TYPE_CHECKING:
    import pandas

_TENSORS = ("waad", "fai", "entropy", "response_mask", "receiver_fai", "segment_ids")


@dataclass(frozen=True)
class TokenScores:
    """Scores of each token; NaN where undefined. It can be built by hand.

    Attributes:
        waad: windowed average attention distance of the local heads, in tokens.
        fai: future attention influence of the global heads.
        entropy: of the distribution that each token was sampled from, in nats; None if not measured.
        response_mask: the tokens that are scored.
        receiver_fai: future attention influence of the receiver heads; None where they are unknown.
        segment_ids: in packed rows, which sequence of the row a token belongs to; else None.

    Raises:
        ResultError: scores whose shapes differ.
    """

    waad: Float[Tensor, "batch token"]
    fai: Float[Tensor, "batch token"]
    entropy: Float[Tensor, "batch token"] | None
    response_mask: Bool[Tensor, "batch token"]
    receiver_fai: Float[Tensor, "batch token"] | None = None
    segment_ids: Int[Tensor, "batch token"] | None = None

    def __post_init__(self) -> None:
        shapes = {name: list(value.shape) for name in _TENSORS if (value := getattr(self, name)) is not None}
        if len({tuple(shape) for shape in shapes.values()}) != 1 or len(shapes["waad"]) != 2:
            raise ResultError(f"scores must all be [batch, token], got {shapes}")

    def save(self, path: str | Path) -> Path:
        """Save as one safetensors file with JSON metadata, and return its path.

        Raises:
            ResultError: a place that cannot be written.
        """
        return save_result(path, "TokenScores", {name: getattr(self, name) for name in _TENSORS}, {})

    @staticmethod
    def load(path: str | Path) -> TokenScores:
        """Load what `save` wrote.

        Raises:
            ResultError: a file that is missing, damaged, or holds something else.
        """
        tensors, _ = load_result(path, "TokenScores", ("waad", "fai", "response_mask"))
        return TokenScores(**{name: tensors.get(name) for name in _TENSORS})  # type: ignore[arg-type]

    def to_pandas(self, batch: TokenBatch | None = None) -> pandas.DataFrame:
        """Return a table with a row for each response token; a batch adds ids and texts.

        Raises:
            MissingDependencyError: pandas is not installed.
            ResultError: a batch of another shape.
        """
        frame = import_pandas()
        if batch is not None and batch.input_ids.shape != self.waad.shape:
            raise ResultError(
                f"the batch is {list(batch.input_ids.shape)}, the scores {list(self.waad.shape)}"
            )
        place = self.response_mask.nonzero()
        row, token = place[:, 0], place[:, 1]
        columns: dict[str, object] = {"response": row.cpu().numpy(), "token": token.cpu().numpy()}
        if batch is not None:
            columns["id"] = batch.input_ids[row.cpu(), token.cpu()].cpu().numpy()
            if batch.texts is not None:
                columns["text"] = [batch.texts[i][j] for i, j in place.tolist()]
        for name in ("waad", "fai", "receiver_fai", "entropy"):
            values = getattr(self, name)
            if values is not None:
                columns[name] = values[row, token].cpu().numpy()
        table: pandas.DataFrame = frame.DataFrame(columns)
        return table


def score_tokens(statistics: HeadStatistics, heads: HeadGroups) -> TokenScores:
    """Return the scores of each token: the statistics' means over head groups.

    The groups may come from another batch of the same model.

    Raises:
        ResultError: groups of other layers, heads or models than the statistics.
    """
    heads.check_fits(statistics)
    receivers = heads.receiver_heads
    return TokenScores(
        waad=_group_mean(statistics.waad, heads.local_heads),
        fai=_group_mean(statistics.fai, heads.global_heads),
        entropy=statistics.entropy,
        response_mask=statistics.response_mask,
        receiver_fai=None if receivers is None else _group_mean(statistics.fai, receivers),
        segment_ids=statistics.segment_ids,
    )


def _group_mean(
    values: Float[Tensor, "batch layer head token"], heads: Bool[Tensor, "layer head"]
) -> Float[Tensor, "batch token"]:
    chosen = values[:, heads.to(values.device)]
    if chosen.shape[1] == 0:
        return torch.full_like(values[:, 0, 0], torch.nan)
    return chosen.mean(1)

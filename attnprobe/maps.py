"""GroupMaps: the mean attention maps of head groups over responses, for pictures.

`attnprobe.group_maps` makes them, and the report draws them. No other result holds maps, which take memory
quadratic in the tokens: make them for a few responses that are worth a picture. What is left to others:
running a model for them (measurement), pooling and drawing (report).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attnprobe.displays import maps_display
from attnprobe.errors import AttnprobeError, ResultError
from attnprobe.provenance import Provenance
from attnprobe.results import Result, table_column
from attnprobe.validation import IntLike, whole_number


@dataclass(frozen=True, eq=False, repr=False)
class GroupMaps(Result):
    """The mean attention maps of head groups over responses (Eq. 8 of arXiv 2510.13554v2).

    Attributes:
        local_map, global_map: attention among the response's tokens, in `[0, 1]`.
        columns: the positions of these tokens in the caller's batch; -1 after the end of a shorter response.
        input_ids: the ids of these tokens; None where they are not known.
        provenance: the model, layers and heads that the maps were computed from.
        local_prompt_share, global_prompt_share: the share of each response token's attention, in `[0, 1]`,
            that goes to the tokens of its sequence before the first response token: a mean over the group, as
            the maps are. Tokens between the parts of a response with gaps count neither here nor in the maps.
            None in files of older versions.
        local_first_share, global_first_share: the share that goes to the first token of the sequence, which
            is part of the prompt if there is one. None likewise.

    A row of a map and its prompt share sum to 1 for a response without gaps; to less where the model's
    softmax has a sink (gpt-oss), which takes attention that goes to no token. All of these are NaN after the
    end of a shorter response.

    Raises:
        ResultError: maps that are not square, or tensors of other dtypes or shapes than these.
    """

    local_map: Float[Tensor, "batch query key"]
    global_map: Float[Tensor, "batch query key"]
    columns: Int[Tensor, "batch query"]
    input_ids: Int[Tensor, "batch query"] | None = None
    provenance: Provenance = Provenance()  # noqa: RUF009 (frozen)
    local_prompt_share: Float[Tensor, "batch query"] | None = None
    global_prompt_share: Float[Tensor, "batch query"] | None = None
    local_first_share: Float[Tensor, "batch query"] | None = None
    global_first_share: Float[Tensor, "batch query"] | None = None

    def _check(self, error: type[AttnprobeError] = ResultError) -> None:
        super()._check(error)
        if self.local_map.shape[1] != self.local_map.shape[2]:
            raise error(f"maps must have as many queries as keys; got {list(self.local_map.shape)}")

    def _used(self) -> Tensor:
        return self.columns >= 0

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the maps of the first response, and the sizes of all."""
        return maps_display(self, super()._repr_html_())

    def columns_of(self, example: IntLike) -> list[int]:
        """Return the positions of one response in the caller's batch, in order.

        Raises:
            ParameterError: an example that does not exist.
        """
        count = self.columns.shape[0]
        example = whole_number(example, "example", minimum=-count, maximum=count - 1)
        return [column for column in self.columns[example].tolist() if column >= 0]

    def _table(self) -> dict[str, Any]:
        """Return a line for each pair of tokens: example, position (the query), key_position and the maps.

        The shares of a query are the same on all of its lines.
        """
        real = self.columns >= 0
        causal = torch.ones_like(self.local_map[0], dtype=torch.bool).tril()
        place = (real[:, :, None] & real[:, None] & causal).nonzero()
        columns: dict[str, Any] = {
            "example": place[:, 0].cpu().numpy(),
            "position": table_column(self.columns, place[:, :2]),
            "key_position": table_column(self.columns, place[:, ::2]),
        }
        if self.input_ids is not None:
            columns["token_id"] = table_column(self.input_ids, place[:, :2])
        for name in ("local_map", "global_map"):
            columns[name] = table_column(getattr(self, name), place)
        for name in ("local_prompt_share", "global_prompt_share", "local_first_share", "global_first_share"):
            if (share := getattr(self, name)) is not None:
                columns[name] = table_column(share, place[:, :2])
        return columns

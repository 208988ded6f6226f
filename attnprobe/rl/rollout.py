"""`Rollout`: what a policy wrote for some prompts, from whatever layout a trainer keeps it in.

Inside, prompts are padded left and completions right. `Rollout.from_sequences` takes rows of prompt and
completion in one piece, `from_packed` rows that hold several of them, `from_lists` lists of ids;
`scatter` and `gather` carry values between a trainer's own layout and `[completion, token]`. Trainers,
`measure_rollout` and `RolloutCredit` use it. What is left to others: measuring (scoring), and the weights
(rollout_credit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from attnprobe.batch import TokenBatch
from attnprobe.errors import BatchError, ParameterError
from attnprobe.layout import check_padding, packed_segments
from attnprobe.validation import ArrayLike, FloatField, as_mask, as_tensor

_AXES = "completion, token"


@dataclass(frozen=True, init=False)
class Rollout:
    """Prompts with the completions that a policy sampled for them; lists and arrays become tensors.

    Attributes:
        prompt_ids, prompt_mask: padded left.
        completion_ids, completion_mask: padded right; a completion may be fully masked, as trainers mask
            truncated ones.
        tool_mask: False where a tool wrote, True where the policy did; None if there are no tools.
        places: where each token of the completions is in the trainer's own layout, counted through its rows;
            -1 on padding. None: the layout is that of prompts and completions, side by side.
        shape: the trainer's own layout, `(row, position)`.

    Raises:
        BatchError: ids that are negative or not whole numbers, shapes that do not match, or masks that hold
            anything but 0 and 1.

    >>> rollout = Rollout([[5, 6]], [[1, 1]], [[7, 8, 9]], [[1, 1, 1]], tool_mask=[[1, 0, 1]])
    >>> rollout.response_mask
    tensor([[ True, False,  True]])
    """

    prompt_ids: Int[Tensor, "completion prompt"]
    prompt_mask: Bool[Tensor, "completion prompt"]
    completion_ids: Int[Tensor, "completion token"]
    completion_mask: Bool[Tensor, "completion token"]
    tool_mask: Bool[Tensor, "completion token"] | None = None
    places: Int[Tensor, "completion token"] | None = None
    shape: tuple[int, int] | None = None

    def __init__(
        self,
        prompt_ids: ArrayLike,
        prompt_mask: ArrayLike,
        completion_ids: ArrayLike,
        completion_mask: ArrayLike,
        tool_mask: ArrayLike | None = None,
    ) -> None:
        prompts = _token_ids(prompt_ids, "prompt_ids")
        completions = _token_ids(completion_ids, "completion_ids")
        if prompts.shape[0] != completions.shape[0]:
            raise BatchError(
                f"there must be a prompt for each completion; got {prompts.shape[0]} prompts and "
                f"{completions.shape[0]} completions"
            )
        if completions.numel() == 0:
            raise BatchError(f"the completions {list(completions.shape)} have no tokens to be scored")
        # A frozen dataclass with its own __init__, since it takes lists and arrays but stores tensors.
        for name, value in (
            ("prompt_ids", prompts),
            ("prompt_mask", _mask_of(prompts, prompt_mask, "prompt_mask")),
            ("completion_ids", completions),
            ("completion_mask", _mask_of(completions, completion_mask, "completion_mask")),
            ("tool_mask", None if tool_mask is None else _mask_of(completions, tool_mask, "tool_mask")),
        ):
            object.__setattr__(self, name, value)

    # ---- from other layouts -------------------------------------------------------------------

    @staticmethod
    def from_sequences(
        input_ids: ArrayLike, attention_mask: ArrayLike | None = None, *, response_mask: ArrayLike
    ) -> Rollout:
        """Return the rollout of rows that hold a prompt and its completion in one piece, padded on any side.

        The prompt ends before the row's first response token. What follows is the completion; tokens of it
        that are not response were written by a tool. A row without any response token is a completion that
        is fully masked.

        Args:
            input_ids: `[row, position]`.
            attention_mask: `[row, position]`, 1 for tokens that are no padding; None: all.
            response_mask: `[row, position]`, 1 for tokens that the policy wrote.

        Raises:
            BatchError: shapes that do not match, padding in the middle of a row, or padding in the response.

        >>> ids, response = [[5, 6, 7, 8], [0, 5, 6, 7]], [[0, 0, 1, 1], [0, 0, 0, 1]]
        >>> rollout = Rollout.from_sequences(ids, [[1, 1, 1, 1], [0, 1, 1, 1]], response_mask=response)
        >>> rollout.completion_ids.tolist(), rollout.completion_mask.int().tolist()
        ([[7, 8], [7, 0]], [[1, 1], [1, 0]])
        >>> rollout.scatter(torch.full((2, 2), 2.0))
        tensor([[1., 1., 2., 2.],
                [1., 1., 1., 2.]])
        """
        ids = _token_ids(input_ids, "input_ids", "row, position")
        real = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None:
            real = _mask_of(ids, attention_mask, "attention_mask", "row, position")
        check_padding(real)
        own = _response_of(ids, response_mask, real)
        columns = [each.nonzero()[:, 0] for each in real]
        width = ids.shape[1]
        return _assembled(ids, own, [row * width + column for row, column in enumerate(columns)])

    @staticmethod
    def from_packed(
        input_ids: ArrayLike,
        position_ids: ArrayLike,
        *,
        response_mask: ArrayLike,
        attention_mask: ArrayLike | None = None,
    ) -> Rollout:
        """Return the rollout of rows that pack several sequences each, one completion for each sequence.

        Completions are in the order in which their sequences stand in the rows. Prompts end as in
        `from_sequences`.

        Args:
            input_ids: `[row, position]`, or `[position]`.
            position_ids: `[row, position]`, or `[position]`; they start at 0 again in each sequence.
            response_mask: `[row, position]`, or `[position]`, 1 for tokens that the policy wrote.
            attention_mask: `[row, position]`, or `[position]`, 0 for padding at the end of a row, which would
                count as further sequences; None: there is none.

        Raises:
            BatchError: shapes that do not match, padding in the middle of a row or in the response, or
                positions that do not start at 0.

        >>> rollout = Rollout.from_packed(
        ...     [[5, 6, 7, 3, 4]], [[0, 1, 2, 0, 1]], response_mask=[[0, 1, 1, 0, 1]]
        ... )
        >>> rollout.completion_ids.tolist(), rollout.places.tolist()
        ([[6, 7], [4, 0]], [[1, 2], [4, -1]])
        """
        ids = as_tensor(input_ids, "input_ids", BatchError)
        ids = _token_ids(ids[None] if ids.ndim == 1 else ids, "input_ids", "row, position")
        real = torch.ones_like(ids, dtype=torch.bool)
        if attention_mask is not None:
            real = _mask_of(ids, attention_mask, "attention_mask", "row, position")
            check_padding(real)
        numbers = packed_segments(as_tensor(position_ids, "position_ids", BatchError), real)
        own = _response_of(ids, response_mask, real)
        # Numbers start at 0 in each row.
        numbers = numbers + (torch.arange(len(ids), device=ids.device) * ids.shape[1])[:, None]
        _, counts = numbers[real].unique_consecutive(return_counts=True)
        every = torch.arange(ids.numel(), device=ids.device)[real.flatten()]
        return _assembled(ids, own, list(every.split(counts.tolist())))

    @staticmethod
    def from_lists(
        prompts: Sequence[ArrayLike],
        completions: Sequence[ArrayLike],
        tool_masks: Sequence[ArrayLike] | None = None,
    ) -> Rollout:
        """Return the rollout of prompts and completions of different lengths, each a list of ids.

        Args:
            prompts, completions: a list or tensor of ids for each completion; it may be empty.
            tool_masks: for each completion, 0 where a tool wrote and 1 where the policy did.

        Raises:
            BatchError: different numbers of them, entries that are no lists of ids, or no token at all.

        >>> rollout = Rollout.from_lists([[5, 6], [5]], [[7], [7, 8]])
        >>> rollout.prompt_ids.tolist(), rollout.completion_ids.tolist()
        ([[5, 6], [0, 5]], [[7, 0], [7, 8]])
        >>> [each.tolist() for each in rollout.per_completion(rollout.completion_ids)]
        [[7], [7, 8]]
        """
        asked, written = _rows(prompts, "prompts"), _rows(completions, "completions")
        if len(asked) != len(written):
            raise BatchError(
                f"there must be a prompt for each completion; got {len(asked)} prompts and {len(written)} "
                "completions"
            )
        if not written:
            raise BatchError("there are no completions")
        own = None
        if tool_masks is not None:
            own = _rows(tool_masks, "tool_masks")
            lengths = [[len(each) for each in rows] for rows in (own, written)]
            if lengths[0] != lengths[1]:
                raise BatchError(f"tool_masks must be as long as completions, {lengths[1]}; got {lengths[0]}")
        prompt_ids = _padded([row.flip(0) for row in asked], 0).flip(1)
        prompt_mask = _padded([torch.ones_like(row) for row in asked], 0).flip(1)
        return Rollout(
            prompt_ids,
            prompt_mask,
            _padded(written, 0),
            _padded([torch.ones_like(row) for row in written], 0),
            None if own is None else _padded(own, 0),
        )

    # ---- to other layouts ---------------------------------------------------------------------

    def scatter(
        self, values: Shaped[Tensor, "completion token"], fill: FloatField = 1.0
    ) -> Shaped[Tensor, "row position"]:
        """Return values of the completions' tokens in the trainer's own layout; `fill` everywhere else.

        Without another layout, that is prompts and completions side by side.

        Raises:
            ParameterError: values of another shape.
        """
        self._check(values, tuple(self.completion_ids.shape), _AXES)
        if self.places is None:
            return torch.cat([values.new_full(self.prompt_ids.shape, fill), values], dim=1)
        assert self.shape is not None
        inside = self.places >= 0
        out = values.new_full((self.shape[0] * self.shape[1],), fill)
        out[self.places[inside].to(out.device)] = values[inside.to(values.device)]
        return out.view(self.shape)

    def gather(
        self, values: Shaped[Tensor, "row position"], fill: FloatField = 0.0
    ) -> Shaped[Tensor, "completion token"]:
        """Return values in the trainer's own layout, such as advantages, as those of the completions' tokens.

        `fill` stands on padding.

        Raises:
            ParameterError: values of another shape.

        >>> rollout = Rollout.from_sequences([[5, 6, 7]], response_mask=[[0, 1, 1]])
        >>> rollout.gather(torch.tensor([[0.0, 0.5, 2.0]]))
        tensor([[0.5000, 2.0000]])
        """
        if self.places is None:
            width = self.prompt_ids.shape[1]
            self._check(values, (len(self.prompt_ids), width + self.completion_ids.shape[1]), "row, position")
            return values[:, width:].masked_fill(~self.completion_mask.to(values.device), fill)
        assert self.shape is not None
        self._check(values, self.shape, "row, position")
        places = self.places.to(values.device)
        return values.flatten()[places.clamp(min=0)].masked_fill(places < 0, fill)

    def per_completion(
        self, values: Shaped[Tensor, "completion token"]
    ) -> list[Shaped[Tensor, " own_token"]]:
        """Return values of the completions' tokens as a tensor for each completion, without padding.

        Raises:
            ParameterError: values of another shape.
        """
        self._check(values, tuple(self.completion_ids.shape), _AXES)
        return [row[mask] for row, mask in zip(values, self.completion_mask.to(values.device), strict=True)]

    @staticmethod
    def _check(values: Any, shape: tuple[int, ...], axes: str) -> None:
        if not isinstance(values, Tensor) or tuple(values.shape) != shape:
            found = list(values.shape) if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise ParameterError(f"the values must be a tensor [{axes}] = {list(shape)}; got {found}")

    # ---- what is read ---------------------------------------------------------------------------

    @property
    def response_mask(self) -> Bool[Tensor, "completion token"]:
        """Which tokens the policy wrote itself and is trained on: neither padding nor tool output."""
        return self.completion_mask if self.tool_mask is None else self.completion_mask & self.tool_mask

    def select(self, completions: ArrayLike) -> Rollout:
        """Return some of the completions, chosen by a mask `[completion]`; their width stays the same.

        Raises:
            BatchError: a mask of another length, or one that holds anything but 0 and 1.
        """
        chosen = as_mask(
            completions,
            "completions",
            tuple(self.completion_ids.shape[:1]),
            axes="completion",
            device=self.completion_ids.device,
            error=BatchError,
        )
        part = Rollout(
            self.prompt_ids[chosen],
            self.prompt_mask[chosen],
            self.completion_ids[chosen],
            self.completion_mask[chosen],
            None if self.tool_mask is None else self.tool_mask[chosen],
        )
        return part if self.places is None else part._placed(self.places[chosen], self.shape)

    def batch(self) -> TokenBatch:
        """Return prompts and completions as a batch whose response is what the policy wrote itself.

        The policy reads what a tool wrote, but that does not count in FAI and span. A fully masked
        completion is given one token, so that every process of a sharded run makes the same number of
        forward passes.

        Raises:
            BatchError: prompts that are not padded on the left, or completions not padded on the right.
        """
        real, own = self.completion_mask.clone(), self.response_mask.clone()
        for mask in (real, own):
            mask[:, 0] |= ~mask.any(-1)
        return TokenBatch.from_ids(
            torch.cat([self.prompt_ids, self.completion_ids], dim=1),
            torch.cat([self.prompt_mask, real], dim=1),
            response_mask=torch.cat([torch.zeros_like(self.prompt_mask), own], dim=1),
        )

    def _placed(self, places: Tensor, shape: tuple[int, int] | None) -> Rollout:
        object.__setattr__(self, "places", places)
        object.__setattr__(self, "shape", shape)
        return self


def _assembled(ids: Tensor, own: Tensor, sequences: list[Tensor]) -> Rollout:
    """Return the rollout of sequences, each given by the places of its tokens in the rows."""
    flat_ids, flat_own = ids.flatten(), own.flatten()
    prompts, completions = [], []
    for place in sequences:
        written = flat_own[place].nonzero()[:, 0]
        # Without a response, the last token stands for a completion that is masked.
        start = int(written[0]) if len(written) else len(place) - 1
        prompts.append(place[:start])
        completions.append(place[start:])
    before, places = _padded([row.flip(0) for row in prompts], -1).flip(1), _padded(completions, -1)
    mask = places >= 0
    return Rollout(
        flat_ids[before.clamp(min=0)].masked_fill(before < 0, 0),
        before >= 0,
        flat_ids[places.clamp(min=0)].masked_fill(~mask, 0),
        mask,
        flat_own[places.clamp(min=0)] | ~mask,
    )._placed(places, (ids.shape[0], ids.shape[1]))


def _response_of(ids: Tensor, response_mask: Any, real: Tensor) -> Bool[Tensor, "row position"]:
    """Return which tokens the policy wrote, none of which may be padding."""
    own = _mask_of(ids, response_mask, "response_mask", "row, position")
    outside = own & ~real
    if bool(outside.any()):
        raise BatchError(
            f"response_mask marks padding at [row, position] = {outside.nonzero()[0].tolist()}: it may mark "
            "only tokens that attention_mask keeps"
        )
    return own


def _rows(rows: Any, name: str) -> list[Tensor]:
    """Return lists of whole numbers as one-dimensional tensors; they may be empty."""
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise BatchError(
            f"{name} must be a list with an entry for each completion; got {type(rows).__name__}"
        )
    found = []
    for number, row in enumerate(rows):
        ids = as_tensor(row, f"{name}[{number}]", BatchError)
        if ids.ndim != 1:
            raise BatchError(f"{name}[{number}] must be a list of whole numbers; got {list(ids.shape)}")
        # An empty list has no dtype of its own.
        found.append(ids if ids.numel() else ids.long())
    return found


def _padded(rows: list[Tensor], fill: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def _token_ids(value: Any, name: str, axes: str = _AXES) -> Int[Tensor, "completion token"]:
    ids = as_tensor(value, name, BatchError)
    if ids.ndim != 2:
        raise BatchError(f"{name} must be [{axes}]; got {list(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise BatchError(f"{name} must be whole numbers; got {str(ids.dtype).removeprefix('torch.')}")
    if ids.numel() and int(ids.min()) < 0:
        raise BatchError(f"{name} must not be negative, not even on padding; got {int(ids.min())}")
    return ids


def _mask_of(ids: Tensor, mask: Any, name: str, axes: str = _AXES) -> Bool[Tensor, "completion token"]:
    return as_mask(mask, name, tuple(ids.shape), axes=axes, device=ids.device, error=BatchError)

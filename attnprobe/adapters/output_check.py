"""The check of what was read from an attention call against the model's own attention output.

A family, or a user's own attention function, may do something that its call does not say: another scale, a
soft cap, a sink, a window. `OutputCheck` therefore computes a few rows of the output from what was read, and
compares them with the model's. A reading makes one and shows it every call.

Rounding makes them differ too, by an amount that depends on the dtype, the scores and the values. So each
entry of the output has a bound of its own: how far can rounding change the scores, then the probabilities,
then the output? A fixed tolerance cannot do this: large enough for bfloat16 and large scores, it lets
anything pass. In 16 bits, where this bound leaves room for small errors, a second test asks whether the
differences have a direction: rounding makes an output neither hotter (as if all scores were larger) nor
heavier.

What is left to others: reading the call (attention_call), which rows are checked (checked_rows), what
rounding can do to them (rounding), and what happens after an error (reading).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.adapters.attention_call import AttentionCall, without_autocast
from attnprobe.adapters.checked_rows import Rows, mixed
from attnprobe.adapters.rounding import SINGLE, Rounding, probability_change, rounded_outputs
from attnprobe.attention.checks import judge_later
from attnprobe.attention.factored import FactoredAttention
from attnprobe.errors import IncompleteRunError

_STEP = 32
"""While single tokens are generated, the first call of a layer is checked, and then one in this many."""

_UNDECIDED = 100.0
"""If rounding can make a row's denominator this much larger, any key may win, and the row says nothing."""

_SUSPICIOUS = 0.8
"""How large the direction of the differences must be to be looked into; ordinary inputs give 0.5 or less."""


class OutputCheck:
    """Compares calls with what was read from them: every call of several queries, some of single ones."""

    def __init__(self) -> None:
        # For each attention module, how many single queries came since its last call of several.
        self._single: dict[int, int] = {}
        self._count = 0

    def check(self, attention: FactoredAttention, call: AttentionCall, where: str) -> None:
        """Check a call; `where` names its layer and model.

        In a step of generation, a check would cost a good part of the attention itself, so most steps are
        left out. What a layer does to its attention does not change from step to step, windows aside, which
        is why the check is repeated at all.

        Raises:
            IncompleteRunError: the output is not what was read from the call.
        """
        if attention.query_count > 1:
            self._single.pop(id(call.module), None)
        else:
            count = self._single.get(id(call.module), 0)
            self._single[id(call.module)] = count + 1
            if count % _STEP:
                return
        check_against_output(attention, call, where, self._count)
        self._count += 1


def check_against_output(
    attention: FactoredAttention, call: AttentionCall, where: str, number: int = 0
) -> None:
    """Check that some rows of the attention give the model's own attention output.

    They are evenly spaced, and others for each `number`: the layers of a pass cover more rows together.
    Where scores are so large that rounding decides which key wins (in bfloat16 from about a hundred on), any
    mixture of the values is possible, and a row says nothing: it passes. So does padding, which sees nothing.

    Raises:
        IncompleteRunError: they do not.
    """
    assert call.output is not None
    with torch.no_grad(), without_autocast(call.query.device):
        rounding = Rounding.of_call(call)
        rows = Rows.of_call(attention, call, number)
        actual = call.output.detach()[:, rows.queries].transpose(1, 2).to(rows.output.dtype)
        refused = partial(_unknown, where, sorted(call.options))
        if actual.shape != rows.output.shape:
            raise refused(
                f"is {list(call.output.shape)}, which does not fit values of {list(call.value.shape)}"
            )
        change, growth = probability_change(rows, rounding)
        bound = mixed(change, rows.value.abs())
        bound += (rounding.unit * rows.output.abs()).add_(rounding.smallest)
        # Where nothing is seen, implementations disagree: NaN, zeros, or a mean of all values.
        mute = growth > _UNDECIDED
        if rows.unseeing is not None:
            mute |= rows.unseeing
        difference = (actual - rows.output).masked_fill_(mute, 0.0)
        sums = (attention.log_sum_exp()[:, :, rows.queries, None] - rows.log_sum_exp).masked_fill_(mute, 0.0)
        sums_bound = growth.log_().add_(rows.log_sum_exp.abs(), alpha=4 * SINGLE)
        sums_bound += rounding.exponential + 4 * SINGLE
        numbers = [(difference.abs() / bound).amax(), (sums.abs() / sums_bound).amax(), sums.abs().amax()]
        directions: list[_Direction] = []
        if rounding.dtype.itemsize == 2:
            directions = _directions(rows, rounding, change, difference)
        numbers += [direction.found.abs().amax() for direction in directions]
        place = partial(_place, rows.queries, attention.query_count)
        kept = None
        if directions:
            # As they were given: the copies in float32 take twice the memory.
            value = call.value[:, :, : attention.key_count].detach()
            kept = replace(rows, key=attention.scores.key, value=value)

        def judge(found: list[float]) -> None:
            excess, sums_excess, largest, *along = found
            if not excess <= 1.0:
                raise refused(_largest(difference, bound, rounding, place))
            if not sums_excess <= 1.0:
                raise refused(
                    f"comes with log-sum-exps that differ by {largest:.3g} from those of its query, key and "
                    f"mask ({sums_excess:.3g} times what rounding explains)"
                )
            for direction, size in zip(directions, along, strict=True):
                if kept is not None and size > _SUSPICIOUS:
                    what = _explained(direction, kept, rounding)
                    if what is not None:
                        raise refused(what)

        held = sum(tensor.nbytes for tensor in (difference, bound))
        if kept is not None:
            held += sum(part.nbytes for part in (kept.key, kept.value, kept.score, kept.probability))
        judge_later(numbers, judge, held)


# ---- whether the differences have a direction -------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Direction:
    """A direction that rounding does not prefer, and how far the differences go along it.

    Attributes:
        meaning: what an output that goes along it looks like.
        allowed: how many times what rounding gives is too much.
        weighted: the direction, with each entry divided by how far rounding can change it.
        length: its length, for each head.
        found: how far the differences go along it, for each head.
    """

    meaning: str
    allowed: float
    weighted: Float[Tensor, "batch head row value_d"]
    length: Float[Tensor, " head"]
    found: Float[Tensor, " head"]

    @staticmethod
    def of(
        direction: Float[Tensor, "batch head row value_d"],
        weight: Float[Tensor, "batch head row value_d"],
        difference: Float[Tensor, "batch head row value_d"],
        meaning: str,
        allowed: float,
    ) -> _Direction:
        weighted = direction * weight
        length = (weighted * direction).sum((0, 2, 3)).sqrt().clamp(min=1e-30)
        found = (difference * weighted).sum((0, 2, 3)) / length
        return _Direction(meaning, allowed, weighted, length, found)

    def along(self, differences: Float[Tensor, "batch head row value_d"]) -> Float[Tensor, " head"]:
        """Return how far other differences go along it."""
        return (differences * self.weighted).sum((0, 2, 3)) / self.length


def _directions(
    rows: Rows,
    rounding: Rounding,
    change: Float[Tensor, "batch head row key"],
    difference: Float[Tensor, "batch head row value_d"],
) -> list[_Direction]:
    """Return whether the differences make the output hotter or heavier."""
    # Rows whose probabilities may change altogether say nothing about a direction.
    square = change.square()
    spread = mixed(square, rows.value.square())
    spread += square.sum(-1, keepdim=True) * rows.output.square()
    spread += (rounding.unit * rows.output).square() + rounding.smallest
    counted = change.sum(-1, keepdim=True) < 4.0
    if rows.unseeing is not None:
        counted &= ~rows.unseeing
    weight = counted / spread
    unseen = rows.score == -torch.inf
    mean = (rows.probability * rows.score.masked_fill(unseen, 0.0)).sum(-1, keepdim=True)
    centred = rows.probability * (rows.score - mean).masked_fill_(unseen, 0.0)
    hotter = mixed(centred, rows.value) - rows.output * centred.sum(-1, keepdim=True)
    # Alike roundings of nearly equal scores make an output heavier more easily than hotter, and kernels
    # differ in them.
    return [
        _Direction.of(hotter, weight, difference, "as if its scores were", 3.0),
        _Direction.of(rows.output, weight, difference, "as if its values were", 5.0),
    ]


def _explained(direction: _Direction, rows: Rows, rounding: Rounding) -> str | None:
    """Return what is wrong with an output that goes far along a direction; None if rounding explains it.

    Rounding errors of different keys usually cancel in these sums, but not always: keys with equal scores are
    rounded alike. So the rows are computed once more with rounding, as attention is usually computed; the sum
    is an error only if rounding does not give such a sum.
    """
    found = direction.found
    rounded = []
    for output in rounded_outputs(rows, rounding):
        error = output - rows.output
        if rows.unseeing is not None:
            error.masked_fill_(rows.unseeing, 0.0)
        rounded.append(direction.along(error).nan_to_num())
    usual, nearest, largest = torch.stack(
        [
            torch.stack([each.abs().amax() for each in rounded]).amax(),
            torch.stack([(found - each).abs().amax() for each in rounded]).amin(),
            found.abs().amax(),
        ]
    ).tolist()
    if nearest <= _SUSPICIOUS or largest <= direction.allowed * usual:
        return None
    head = int(found.abs().argmax())
    factor = 1 + float(found[head] / direction.length[head])
    return (
        f"is not what its query, key and mask give: in head {head} it is {direction.meaning} {factor:.4g} "
        f"times as large, {largest / max(usual, 1e-3):.3g} times what rounding to {_name(rounding.dtype)} "
        "explains"
    )


# ---- what an error says -----------------------------------------------------------------------


def _largest(
    difference: Tensor, bound: Tensor, rounding: Rounding, place: Callable[[int, int, int], str]
) -> str:
    """Describe the entry that is farthest beyond its bound."""
    ratio = (difference.abs() / bound).nan_to_num(torch.inf)
    worst = torch.unravel_index(ratio.argmax(), ratio.shape)
    batch, head, row, _ = (int(index) for index in worst)
    return (
        f"differs by {float(difference[worst].abs()):.3g} from what its query, key and mask give, where "
        f"rounding to {_name(rounding.dtype)} explains {float(bound[worst]):.3g} (at "
        f"{place(batch, head, row)})"
    )


def _place(queries: slice | Tensor, query_count: int, batch: int, head: int, row: int) -> str:
    number = list(range(query_count))[queries][row] if isinstance(queries, slice) else int(queries[row])
    return f"batch {batch}, head {head}, query {number}"


def _unknown(where: str, options: list[str], what: str) -> IncompleteRunError:
    return IncompleteRunError(
        f"{where} does something to its attention that attnprobe does not know: its output {what}. Options "
        f"of the call: {options}. This pass was discarded"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

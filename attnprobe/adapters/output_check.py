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

import torch
from jaxtyping import Float
from torch import Tensor

from attnprobe.adapters.attention_call import AttentionCall
from attnprobe.adapters.checked_rows import Rows, mixed
from attnprobe.adapters.rounding import SINGLE, Rounding, probability_change, rounded_outputs
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
    with torch.no_grad(), torch.autocast(call.query.device.type, enabled=False):
        rounding = Rounding.of_call(call)
        rows = Rows.of_call(attention, call, number)
        actual = call.output.detach()[:, rows.queries].transpose(1, 2).to(rows.output.dtype)
        if actual.shape != rows.output.shape:
            raise _unknown(
                where,
                call,
                f"is {list(call.output.shape)}, which does not fit values of {list(call.value.shape)}",
            )
        change, growth = probability_change(rows, rounding)
        bound = mixed(change, rows.value.abs()) + rounding.unit * rows.output.abs() + rounding.smallest
        # Where nothing is seen, implementations disagree: NaN, zeros, or a mean of all values.
        mute = ~rows.seeing | (growth > _UNDECIDED)
        difference = (actual - rows.output).masked_fill_(mute, 0.0)
        sums = (attention.log_sum_exp()[:, :, rows.queries, None] - rows.log_sum_exp).masked_fill_(mute, 0.0)
        sums_bound = growth.log() + rounding.exponential + 4 * SINGLE * (1.0 + rows.log_sum_exp.abs())
        excess, sums_excess = torch.stack(
            [(difference.abs() / bound).amax(), (sums.abs() / sums_bound).amax()]
        ).tolist()
        if not excess <= 1.0:
            raise _unknown(where, call, _largest(difference, bound, rows, rounding))
        if not sums_excess <= 1.0:
            raise _unknown(
                where,
                call,
                f"comes with log-sum-exps that differ by {float(sums.abs().max()):.3g} from those of its "
                f"query, key and mask ({sums_excess:.3g} times what rounding explains)",
            )
        if rounding.dtype.itemsize == 2:
            _check_direction(rows, rounding, change, difference, call, where)


# ---- whether the differences have a direction -------------------------------------------------


def _check_direction(
    rows: Rows,
    rounding: Rounding,
    change: Float[Tensor, "batch head row key"],
    difference: Float[Tensor, "batch head row value_d"],
    call: AttentionCall,
    where: str,
) -> None:
    """Check that the differences do not make the output hotter or heavier.

    Rounding errors of different keys usually cancel in these sums, but not always: keys with equal scores are
    rounded alike. So if a sum is large, the rows are computed once more with rounding, as attention is
    usually computed; the sum is an error only if rounding does not give such a sum.

    Raises:
        IncompleteRunError: they do.
    """
    # Rows whose probabilities may change altogether say nothing about a direction.
    spread = mixed(change.square(), rows.value.square())
    spread += change.square().sum(-1, keepdim=True) * rows.output.square()
    spread += (rounding.unit * rows.output).square() + rounding.smallest
    weight = (rows.seeing & (change.sum(-1, keepdim=True) < 4.0)) / spread
    mean = (rows.probability * rows.score.masked_fill(rows.score == -torch.inf, 0.0)).sum(-1, keepdim=True)
    centred = rows.probability * (rows.score - mean).masked_fill_(rows.score == -torch.inf, 0.0)
    hotter = mixed(centred, rows.value) - rows.output * centred.sum(-1, keepdim=True)
    # How many times what rounding gives is too much: alike roundings of nearly equal scores make an output
    # heavier more easily than hotter, and kernels differ in them.
    for direction, meaning, allowed in (
        (hotter, "as if its scores were", 3.0),
        (rows.output, "as if its values were", 5.0),
    ):
        weighted = direction * weight
        length = (weighted * direction).sum((0, 2, 3)).sqrt().clamp(min=1e-30)  # [head]

        def along(differences: Tensor) -> Tensor:
            return (differences * weighted).sum((0, 2, 3)) / length  # noqa: B023

        found = along(difference)
        if float(found.abs().max()) <= _SUSPICIOUS:
            continue
        rounded = [
            along((output - rows.output).masked_fill_(~rows.seeing, 0.0)).nan_to_num()
            for output in rounded_outputs(rows, rounding)
        ]
        usual = max(float(each.abs().max()) for each in rounded)
        nearest = min(float((found - each).abs().max()) for each in rounded)
        if nearest > _SUSPICIOUS and float(found.abs().max()) > allowed * usual:
            head = int(found.abs().argmax())
            factor = 1 + float(found[head] / length[head])
            raise _unknown(
                where,
                call,
                f"is not what its query, key and mask give: in head {head} it is {meaning} {factor:.4g} "
                f"times as large, {float(found.abs().max()) / max(usual, 1e-3):.3g} times what rounding to "
                f"{_name(rounding.dtype)} explains",
            )


# ---- what an error says -----------------------------------------------------------------------


def _largest(difference: Tensor, bound: Tensor, rows: Rows, rounding: Rounding) -> str:
    """Describe the entry that is farthest beyond its bound."""
    ratio = (difference.abs() / bound).nan_to_num(torch.inf)
    place = torch.unravel_index(ratio.argmax(), ratio.shape)
    batch, head, row, _ = (int(index) for index in place)
    numbers = torch.arange(rows.scores.query.shape[2], device=difference.device)[rows.queries].tolist()
    return (
        f"differs by {float(difference[place].abs()):.3g} from what its query, key and mask give, where "
        f"rounding to {_name(rounding.dtype)} explains {float(bound[place]):.3g} (at batch {batch}, "
        f"head {head}, query {numbers[row]})"
    )


def _unknown(where: str, call: AttentionCall, what: str) -> IncompleteRunError:
    return IncompleteRunError(
        f"{where} does something to its attention that attnprobe does not know: its output {what}. Options "
        f"of the call: {sorted(call.options)}. This pass was discarded"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

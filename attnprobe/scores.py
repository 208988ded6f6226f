"""TokenScores: one number for each token, from the statistics of a group of heads.

WAAD is the mean over local heads, FAI over global heads (Def. 4.1 of arXiv 2510.13554v2): both are
linear in attention, so this equals the metric of the group's mean map. Users, `rl` and the command line call
`score_tokens`. What is left to others: peaks and what they mean (rhythm), and weights for
training (rl).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnprobe.batch import TokenBatch
from attnprobe.displays import scores_display
from attnprobe.errors import ParameterError, ResultError
from attnprobe.head_groups import GroupsLike, head_groups
from attnprobe.head_selection import HeadSelection, HeadsLike
from attnprobe.head_statistics import HeadStatistics
from attnprobe.layout import token_columns
from attnprobe.provenance import Align, Provenance
from attnprobe.results import Result, table_column
from attnprobe.validation import choice, instance


@dataclass(frozen=True, eq=False, repr=False)
class TokenScores(Result):
    """The scores of each token; NaN where undefined. Scores can also be built by hand.

    Attributes:
        waad: windowed average attention distance of the local heads, in tokens.
        fai: future attention influence of the global heads, in `[0, 1]` unless it is weighted by values.
        entropy: that of the distribution that each token was sampled from, in nats; None if not measured.
        response_mask: the tokens that are scored.
        receiver_fai: future attention influence of the receiver heads; None if they are not known.
        segment_ids: in packed examples, which sequence each token belongs to; else None.
        input_ids, texts: the tokens, as in the batch; None where they are not known.
        provenance: the model, layers, window, horizon and heads that the scores were computed from.

    Raises:
        ResultError: tensors of other dtypes or shapes than these.
    """

    waad: Float[Tensor, "batch token"]
    fai: Float[Tensor, "batch token"]
    entropy: Float[Tensor, "batch token"] | None
    response_mask: Bool[Tensor, "batch token"]
    receiver_fai: Float[Tensor, "batch token"] | None = None
    segment_ids: Int[Tensor, "batch token"] | None = None
    input_ids: Int[Tensor, "batch token"] | None = None
    texts: tuple[tuple[str, ...], ...] | None = None
    provenance: Provenance = Provenance()  # noqa: RUF009 (frozen)

    _FILL: ClassVar[dict[str, Any]] = {"input_ids": 0}

    def _table(self, batch: TokenBatch | None = None) -> dict[str, Any]:
        """Return a line for each response token; a batch adds ids and texts if the scores have none.

        Raises:
            ResultError: a batch of another shape, or of other tokens.
        """
        place = self.response_mask.nonzero()
        columns = known_tokens(place, self, batch, "the scores")
        for name in ("waad", "fai", "receiver_fai", "entropy"):
            values = getattr(self, name)
            if values is not None:
                columns[name] = table_column(values, place)
        return columns

    def _repr_html_(self) -> str:
        """Return what a notebook shows: curves, and the responses coloured by WAAD and FAI."""
        return scores_display(self, f"TokenScores({self._headline()})", super()._repr_html_)


def known_tokens(
    place: Int[Tensor, "place 2"], result: Any, batch: TokenBatch | None, name: str
) -> dict[str, Any]:
    """Return the token columns of a result's table: as it knows them, or as a batch of the same tokens does.

    Raises:
        ParameterError: something that is no batch.
        ResultError: a batch of another shape, or of other tokens.
    """
    if batch is None:
        return token_columns(place, result.input_ids, result.texts)
    instance(batch, TokenBatch, "batch")
    check_same_tokens(batch, result, name)
    return token_columns(place, batch.input_ids, batch.texts)


def check_same_tokens(batch: TokenBatch, result: Any, name: str) -> None:
    """Check that a result describes the tokens of a batch.

    Raises:
        ResultError: another shape, or other token ids.
    """
    shape = next(value.shape for each, value in result._tensors() if each.axes == ("batch", "token"))
    if batch.input_ids.shape != shape:
        raise ResultError(f"the batch is {list(batch.input_ids.shape)}, {name} {list(shape)}")
    if result.input_ids is None:
        return
    ours, theirs = batch.input_ids.cpu(), result.input_ids.cpu()
    differs = (ours != theirs) & batch.attention_mask.cpu()
    if bool(differs.any()):
        example, position = differs.nonzero()[0].tolist()
        raise ResultError(
            f"{name} are of other tokens than the batch: at position {position} of example {example} they "
            f"have id {int(theirs[example, position])}, the batch has {int(ours[example, position])}"
        )


def score_tokens(
    statistics: HeadStatistics,
    heads: GroupsLike | None = None,
    *,
    local_heads: HeadsLike | None = None,
    global_heads: HeadsLike | None = None,
    receiver_heads: HeadsLike | None = None,
    align: Align = "token",
) -> TokenScores:
    """Return the scores of each token: means of the statistics over head groups.

    Args:
        statistics: from `measure` or a `HeadStatisticsProbe`.
        heads: the groups, found on this or another batch of the same model; a dictionary of selections by
            group; or one selection, such as "all", for both WAAD and FAI.
        local_heads, global_heads, receiver_heads: your own selections, in any form that `HeadSelection.of`
            accepts, with or without weights; they replace those in `heads`. Where layers differ in their
            number of heads, those that a layer does not have are left out of the mean.
        align: which token a row of attention describes. "token": row t describes token t, as in the paper.
            "prediction": row t describes token t + 1, which it produced. WAAD moves by one; FAI, which
            belongs to columns, stays.

    Raises:
        ParameterError: heads that do not exist, or a group without heads.
        ResultError: groups of other layers, another number of heads, or another model than the statistics.

    >>> from attnprobe import TokenBatch, measure
    >>> from attnprobe.testing.tiny_models import tiny_model
    >>> batch = TokenBatch.from_ids(torch.arange(1, 17)[None], response_start=4)
    >>> score_tokens(measure(tiny_model("llama"), batch), "all").waad.shape
    torch.Size([1, 16])
    """
    instance(statistics, HeadStatistics, "statistics", "measure returns them")
    groups = head_groups(
        heads,
        layers=statistics.layers,
        head_count=statistics.head_count,
        model_name=statistics.model_name,
        local=local_heads,
        receiver=receiver_heads,
        **{"global": global_heads},
    )
    choice(align, "align", get_args(Align))
    weights = {name: _weights(selection, statistics, name) for name, selection in groups.items()}
    waad = _mean_over(statistics.waad, weights["local"])
    if align == "prediction":
        waad = described_by_prediction(waad, statistics.response_mask)
    receivers = weights.get("receiver")
    return TokenScores(
        waad=waad,
        fai=_mean_over(statistics.fai, weights["global"]),
        entropy=statistics.entropy,
        response_mask=statistics.response_mask,
        receiver_fai=None if receivers is None else _mean_over(statistics.fai, receivers),
        segment_ids=statistics.segment_ids,
        input_ids=statistics.input_ids,
        texts=statistics.texts,
        provenance=Provenance(
            model_name=statistics.model_name,
            layers=statistics.layers,
            window=statistics.window,
            horizon=statistics.horizon,
            heads={str(group): tuple(sorted(selection.heads)) for group, selection in groups.items()},
            align=align,
            influence_rows=statistics.influence_rows,
            value_weighted=statistics.value_weighted,
        ),
    )


def _weights(heads: HeadSelection, statistics: HeadStatistics, group: str) -> Float[Tensor, "layer head"]:
    """Return the weight of each head; 0 where a layer does not have it.

    Raises:
        ParameterError: none of the heads exists in its layer.
    """
    weights = heads.weights(statistics.layers, statistics.head_count).to(statistics.waad.device)
    inside = statistics.response_mask.to(weights.device)
    # A head that a layer does not have is NaN everywhere.
    missing = statistics.waad.isnan().all(-1).all(0) & inside.any()
    weights = weights.masked_fill(missing, 0.0)
    if not bool(weights.any()):
        raise ParameterError(f"{group}_heads are heads that their layers do not have: {heads}")
    return weights


def _mean_over(
    values: Float[Tensor, "batch layer head token"], weights: Float[Tensor, "layer head"]
) -> Float[Tensor, "batch token"]:
    """Return the weighted mean over the heads that have a weight."""
    chosen, weight = values[:, weights > 0], weights[weights > 0]  # [batch, chosen head, token]
    if bool((weight == weight[0]).all()):
        return chosen.mean(1)
    share = (weight.double() / weight.double().sum()).to(values.dtype)
    return (chosen * share[:, None]).sum(1)


def described_by_prediction(
    values: Float[Tensor, "batch token"], response_mask: Bool[Tensor, "batch token"]
) -> Float[Tensor, "batch token"]:
    """Return each row's value at the token that the row produced: one column to the right.

    NaN for the first token of a response, and for the first after a gap: the row that produced it is not
    response, and was not measured.

    >>> described_by_prediction(torch.tensor([[1.0, 2.0]]), torch.ones(1, 2, dtype=torch.bool))
    tensor([[nan, 1.]])
    """
    moved = torch.full_like(values, torch.nan)
    moved[:, 1:] = values[:, :-1]
    return moved.masked_fill(~response_mask.to(values.device), torch.nan)


def aligned_waad(scores: TokenScores, align: Align) -> Float[Tensor, "batch token"]:
    """Return WAAD in an alignment, whichever one the scores have.

    Raises:
        ParameterError: an unknown alignment, or "token" for scores that already describe predictions.
    """
    choice(align, "align", get_args(Align))
    # Half precision has no median, and its rounding would make different changes equal.
    waad = scores.waad.to(torch.promote_types(scores.waad.dtype, torch.float32))
    waad = waad.masked_fill(~scores.response_mask.to(waad.device), torch.nan)
    if align == scores.provenance.align:
        return waad
    if align == "token":
        raise ParameterError('these scores have align="prediction": score_tokens(..., align="token")')
    return described_by_prediction(waad, scores.response_mask)

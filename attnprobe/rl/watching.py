"""Reading the log-probability pass that a trainer runs over its rollout anyway, in place of one of our own.

`RolloutCredit.watching` opens a block, in which the trainer runs its pass: in micro-batches of any size and
order, padded or packed. Sequences are recognised by their token ids, so nothing needs to be known of how the
trainer sorts them. What is left to others: attaching (probe), the statistics of one pass (statistics_probe),
and the weights (rollout_credit).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attnprobe.adapters.base import Adapter, Value
from attnprobe.batch import TokenBatch
from attnprobe.errors import ResultError
from attnprobe.head_statistics import HeadStatistics
from attnprobe.probe import Attachment, Probe
from attnprobe.provenance import Provenance
from attnprobe.rl.grouping import Groups
from attnprobe.rl.rollout import Rollout
from attnprobe.rl.weighed import WeighedRollout
from attnprobe.scores import TokenScores, score_tokens
from attnprobe.statistics_probe import HeadStatisticsProbe
from attnprobe.validation import ArrayLike


class RolloutProbe(Probe):
    """Computes the statistics of a rollout's completions in whatever passes it is shown them.

    Sequences that are not in the rollout, such as rows that a trainer adds to fill a batch, are left out.

    Args:
        rollout: the prompts, and what the policy wrote.
        window: WAAD's window, in tokens.
        horizon: FAI's horizon `(low, high)`, in tokens.
        span: whether to compute span.
        groups: head groups, if they are known: only the scores under them are kept of each pass, since the
            statistics of all heads over a whole rollout are many times as large.

    Raises:
        ParameterError: an invalid window or horizon.
    """

    def __init__(
        self, rollout: Rollout, *, window: int, horizon: Any, span: bool, groups: Groups | None
    ) -> None:
        self._rollout, self._groups = rollout, groups
        self._inner = HeadStatisticsProbe(
            window=window, horizon=horizon, span=span, entropy=False, share_on=(), span_ignores=()
        )
        self.sites = self._inner.sites
        self._starts = rollout.prompt_mask.sum(-1).tolist()
        self._own = [mask.cpu() for mask in rollout.per_completion(rollout.response_mask)]
        # Equal sequences have equal statistics, but may differ in what a tool wrote: each is found once.
        self._waiting: dict[tuple[int, ...], list[int]] = defaultdict(list)
        prompts = zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
        completions = rollout.per_completion(rollout.completion_ids)
        for number, ((ids, mask), written) in enumerate(zip(prompts, completions, strict=True)):
            if bool(self._own[number].any()):
                self._waiting[(*ids[mask].tolist(), *written.tolist())].append(number)
        self._found: dict[int, HeadStatistics | TokenScores] = {}
        self._known = {ids: len(numbers) for ids, numbers in self._waiting.items()}
        self._pass: list[tuple[int, int]] = []
        self._batch: TokenBatch | None = None

    @property
    def knows_groups(self) -> bool:
        """Whether scores are kept, rather than the statistics of all heads."""
        return self._groups is not None

    def begin(self, batch: TokenBatch) -> None:
        """Find the rollout's sequences in a pass that is about to start."""
        self.abort()
        sequences, layout = batch.sequences()
        places = zip(layout.source.tolist(), layout.start.tolist(), layout.length.tolist(), strict=True)
        own = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        taken: dict[tuple[int, ...], int] = defaultdict(int)
        for order, ((row, start, length), ids) in enumerate(
            zip(places, sequences.input_ids.tolist(), strict=True)
        ):
            key = tuple(ids[:length])
            if key not in self._known:
                continue
            if taken[key] == len(self._waiting[key]):
                raise ResultError(
                    f"the passes hold a sequence of {length} tokens more often than the rollout, which has "
                    f"it {self._known[key]} times: open the block around one pass over the rollout only"
                )
            number = self._waiting[key][taken[key]]
            taken[key] += 1
            first = start + self._starts[number]
            own[row, first : start + length] = self._own[number]
            self._pass.append((number, order))
        self._batch = replace(batch, response_mask=own.to(batch.input_ids.device))
        self._inner.begin(self._batch)

    def observe(self, site: str, layer: int | None, value: Value, batch: TokenBatch) -> None:
        """Reduce one layer's attention."""
        assert self._batch is not None
        if self._pass:
            self._inner.observe(site, layer, value, self._batch)

    def end(self, batch: TokenBatch) -> None:
        """Keep what the complete pass says of the rollout's completions."""
        assert self._batch is not None
        if self._pass:
            self._inner.end(self._batch)
            self._keep(self._inner.result(), batch)
        self._inner.reset()
        for numbers in self._waiting.values():
            numbers[:] = [number for number in numbers if number not in self._found]
        self.abort()

    def abort(self) -> None:
        """Forget the pass that is under way."""
        self._pass, self._batch = [], None
        self._inner.abort()

    def _keep(self, statistics: HeadStatistics, batch: TokenBatch) -> None:
        """Take the completions' columns out of the statistics of a pass, padded or packed."""
        _, layout = batch.sequences()
        ranks = _ranks_with_response(layout.source.tolist(), {order for _, order in self._pass})
        for number, order in self._pass:
            row, start = int(layout.source[order]), int(layout.start[order]) + self._starts[number]
            columns = slice(start, int(layout.start[order]) + int(layout.length[order]))
            span = statistics.span
            if statistics.sequence_span is not None:
                span = statistics.sequence_span[..., ranks[order]]
            part = HeadStatistics(
                span=None if span is None else span[row : row + 1],
                # Copies: a view would keep the whole micro-batch in memory.
                waad=statistics.waad[row : row + 1, ..., columns].clone(),
                fai=statistics.fai[row : row + 1, ..., columns].clone(),
                entropy=None,
                receiver_kurtosis=None,
                response_mask=statistics.response_mask[row : row + 1, columns],
                layers=statistics.layers,
                window=statistics.window,
                horizon=statistics.horizon,
            )
            self._found[number] = part if self._groups is None else score_tokens(part, self._groups)

    def scores(self) -> TokenScores:
        """Return the scores of the rollout's completions under the given head groups.

        Raises:
            ResultError: some completions were in no pass.
        """
        self._check_complete()
        rollout, known = self._rollout, next(iter(self._found.values()), None)
        own = rollout.response_mask
        waad, fai = (torch.full(own.shape, torch.nan, device=own.device) for _ in range(2))
        for number, part in self._found.items():
            count = part.waad.shape[-1]
            waad[number, :count], fai[number, :count] = part.waad[0], part.fai[0]
        provenance = known.provenance if isinstance(known, TokenScores) else Provenance()
        outside = ~own
        return TokenScores(
            waad.masked_fill(outside, torch.nan),
            fai.masked_fill(outside, torch.nan),
            None,
            own,
            input_ids=rollout.completion_ids,
            provenance=provenance,
        )

    def statistics(self, adapter: Adapter, layers: tuple[int, ...]) -> HeadStatistics:
        """Return the statistics of the rollout's completions, as `measure_rollout` does.

        They are NaN if the policy wrote nothing at all, as in a process that was given only rows of filling.

        Raises:
            ResultError: some completions were in no pass.
        """
        self._check_complete()
        rollout = self._rollout
        found = {number: part for number, part in self._found.items() if isinstance(part, HeadStatistics)}
        rows, width = rollout.completion_ids.shape
        known = next(iter(found.values())).waad if found else None
        device = adapter.device if known is None else known.device
        own = rollout.response_mask.to(device)
        each = (len(layers), (adapter.head_count or 1) if known is None else known.shape[2])
        waad, fai = (torch.full((rows, *each, width), torch.nan, device=device) for _ in range(2))
        span = torch.full((rows, *each), torch.nan, device=device) if self._inner.span else None
        for number, part in found.items():
            count = part.waad.shape[-1]
            waad[number, ..., :count], fai[number, ..., :count] = part.waad[0], part.fai[0]
            if span is not None:
                assert part.span is not None
                span[number] = part.span[0]
        outside = ~own[:, None, None]
        return HeadStatistics(
            span=span,
            waad=waad.masked_fill(outside, torch.nan),
            fai=fai.masked_fill(outside, torch.nan),
            entropy=None,
            receiver_kurtosis=None,
            response_mask=own,
            layers=layers,
            window=self._inner.window,
            horizon=self._inner.horizon,
            input_ids=rollout.completion_ids.to(device),
            model_name=adapter.model_name,
        )

    def _check_complete(self) -> None:
        missing = sorted(number for numbers in self._waiting.values() for number in numbers)
        if missing:
            raise ResultError(
                f"{len(missing)} of {len(self._own)} completions were in no pass, the first of them number "
                f"{missing[0]}: run the pass inside the block, over whole sequences (prompt and completion "
                "to its last token), with the attention mask that says what is padding"
            )


class Watched:
    """What `RolloutCredit.watching` gives: the weights of a rollout, once the trainer's pass has run.

    Attributes:
        rollout: the prompts, and what the policy wrote.
        step: the step of the run.
    """

    def __init__(
        self,
        rollout: Rollout,
        step: int,
        weigh: Callable[..., WeighedRollout],
        probe: RolloutProbe | None = None,
        attached: Attachment | None = None,
    ) -> None:
        self.rollout, self.step = rollout, step
        self._weigh, self._probe, self._attached = weigh, probe, attached

    def weigh(
        self, advantages: ArrayLike | None = None, *, entropy: ArrayLike | None = None
    ) -> Float[Tensor, "completion token"]:
        """Return gamma as `RolloutCredit.weigh` does; without advantages, as long as they are not known.

        Raises:
            ResultError: some completions were in no pass; and what `RolloutCredit.weigh` raises.
        """
        return self.weigh_with_scores(advantages, entropy=entropy).gamma

    def weigh_with_scores(
        self, advantages: ArrayLike | None = None, *, entropy: ArrayLike | None = None
    ) -> WeighedRollout:
        """Return gamma as `weigh` does, with the scores that it was computed from, and metrics."""
        read: dict[str, Any] = {}
        if self._probe is not None and self._attached is not None:
            if self._probe.knows_groups:
                read["scores"] = self._probe.scores()
            else:
                read["statistics"] = self._probe.statistics(self._attached.adapter, self._attached.layers)
        return self._weigh(self.rollout, advantages, self.step, entropy=entropy, **read)


def _ranks_with_response(sources: list[int], with_response: set[int]) -> dict[int, int]:
    """Return the place of each sequence among those of its row that have a response."""
    ranks: dict[int, int] = {}
    counts: dict[int, int] = defaultdict(int)
    for order, row in enumerate(sources):
        if order in with_response:
            ranks[order] = counts[row]
            counts[row] += 1
    return ranks


def draws_at_random(module: nn.Module) -> bool:
    """Return whether a module leaves something out at random in its mode: dropout, or a router's jitter.

    >>> draws_at_random(nn.Dropout(0.1)), draws_at_random(nn.Dropout(0.1).eval())
    (True, False)
    """
    if not module.training:
        return False
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any(
        isinstance(value, float) and value > 0
        for name, value in vars(module).items()
        if "dropout" in name or "jitter" in name
    )

"""What attnprobe does with one family of causal language models, tried on a tiny model and compared.

`check_family` reads the model in every way that a user can (measure, attach around padded calls and around
generate, suppression, the other backends). Each check ends in an `Outcome`: as it should be, refused with a
reason, impossible for the model itself, a wrong number, or an error that is not attnprobe's. The table of
families and its tests call it. What is left to others: the model, its calls and the oracle (family_cases),
and the table (families).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnprobe import metrics
from attnprobe.adapters import adapter_for
from attnprobe.adapters.base import Value
from attnprobe.attention.factored import FactoredAttention
from attnprobe.attention.operator import Attention
from attnprobe.batch import TokenBatch
from attnprobe.errors import AttnprobeError
from attnprobe.head_statistics import HeadStatistics
from attnprobe.measurement import measure
from attnprobe.probe import Probe, attach
from attnprobe.statistics_probe import HeadStatisticsProbe
from attnprobe.suppression import suppress_attention
from attnprobe.testing.all_families import build_family
from attnprobe.testing.backends import in_nnsight, in_transformer_lens, run_in_trace
from attnprobe.testing.family_cases import (
    RESPONSE,
    SETTINGS,
    TOLERANCE,
    Call,
    FamilyCase,
    ModelFailed,
    Rows,
    described,
    gap,
    without_attnprobe,
)
from attnprobe.testing.family_report import BITWISE, FamilyReport, Outcome

SIDES = ("none", "left", "right")


def check_family(name: str, *, backends: bool = True) -> FamilyReport:
    """Try everything with a family's tiny model, and report it; nothing is raised.

    Args:
        name: one of `causal_families()`.
        backends: whether to try TransformerLens and nnsight too.

    >>> check_family("mamba").reason
    'MambaForCausalLM has no attention layer that can be found: there is nothing to read'
    """
    report = FamilyReport(name)
    try:
        case = FamilyCase(name)
    except AttnprobeError as refusal:
        report.reason = str(refusal)
        return report
    except Exception as error:  # Whatever the family's own classes raise.
        report.reason = described(error)
        return report
    report.model_class = type(case.model).__name__
    try:
        adapter = adapter_for(case.model)
    except AttnprobeError as refusal:
        report.reason = str(refusal)
        return report
    except Exception as error:  # A fault of ours, to be shown in the table.
        report.outcomes["adapter"] = Outcome("error", described(error))
        return report
    report.reads, report.layers, report.skipped_layers = adapter.reads, adapter.layers, adapter.skipped_layers
    report.refused_sites = dict(adapter.refused_sites)
    case.layers = adapter.layers
    for title, check in (_CHECKS | (_BACKENDS if backends else {})).items():
        report.outcomes[title] = _outcome(partial(check, case))
    if report.status == "refused":
        stopped = [outcome.note for outcome in report.outcomes.values() if outcome.kind == "refused"]
        report.reason = (stopped or [report.outcomes["measure"].note])[0]
    return report


def _outcome(check: Callable[[], Outcome]) -> Outcome:
    try:
        return check()
    except AttnprobeError as refusal:
        return Outcome("refused", str(refusal))
    except ModelFailed as failure:
        return Outcome("model", str(failure))
    except Exception as error:  # A fault of ours, to be shown in the table.
        return Outcome("error", described(error))


class _Maps(Probe):
    """Keeps whole maps, and how they were read."""

    def __init__(self) -> None:
        self.maps: dict[int, Tensor] = {}
        self.kinds: set[str] = set()

    @property
    def kind(self) -> str:
        """How the layers were read."""
        return " and ".join(sorted(self.kinds))

    def observe(self, site: str, layer: int | None, value: Value, batch: TokenBatch) -> None:
        assert isinstance(value, Attention)
        assert layer is not None
        self.kinds.add("factored" if isinstance(value, FactoredAttention) else "dense")
        self.maps[layer] = value.rows(torch.arange(value.query_count))


def _statistics() -> HeadStatisticsProbe:
    return HeadStatisticsProbe(receiver=True, entropy=False, **SETTINGS)


# ---- numbers ----------------------------------------------------------------------------------


def _compared(
    case: FamilyCase,
    found: HeadStatistics,
    rows: Rows,
    own: Tensor | None = None,
    generated: bool = False,
    instead: Callable[[Tensor, int], list[Tensor]] | None = None,
) -> Outcome:
    """Compare the statistics of rows with the metrics of their eager maps.

    Args:
        case: the family.
        found: the statistics, of all rows.
        rows: the rows' tokens and columns.
        own: the model's logits in the call that was read, `[row, column, vocabulary]`.
        generated: whether `own` are those of the last columns only.
        instead: gives the eager maps of a row (by its columns and number) in that very call: the ones to
            agree with if the model itself gives other logits there than for each row on its own.
    """
    alone = itself = 0.0
    for index, (ids, columns) in enumerate(rows):
        maps, logits = case.alone(ids)
        partly = generated and case.skips_rows
        alone = max(alone, case.difference(found, index, columns, maps, partly=partly))
        if own is not None:
            # In generate, the logits begin with those of the prompt's last column.
            known = columns >= (columns[-1] + 1 - own.shape[1] if generated else 0)
            first = int(columns[known][0]) if generated else 0
            itself = max(itself, gap(own[index, columns[known] - first], logits[known]))
    if alone <= TOLERANCE:
        rest = ", for the rows that the model computes" if generated and case.skips_rows else ""
        return Outcome("good", f"as each row alone{rest}", alone)
    if itself <= TOLERANCE or instead is None:
        return Outcome(
            "wrong", f"not as each row alone; the model's own logits differ by {itself:.1g}", alone
        )
    together = 0.0
    for index, (_, columns) in enumerate(rows):
        together = max(together, case.difference(found, index, columns, instead(columns, index)))
    if together <= TOLERANCE:
        note = f"as the model in this call, whose logits are not those of each row alone, by {itself:.1g}"
        return Outcome("good", note, together)
    note = f"not as each row alone ({alone:.2g}), nor as the call, whose own logits differ by {itself:.1g}"
    return Outcome("wrong", note, together)


def _measure(case: FamilyCase) -> Outcome:
    """`measure` gives the metrics of each row's own maps, and the entropy of its own logits."""
    with without_attnprobe("a call"):
        case.run(case.call("right"))
    outcome = _measured(case, case.model)
    if outcome.kind != "good":
        return outcome
    entropy = measure(case.model, _batch(case), span=False, **SETTINGS).entropy
    assert entropy is not None
    for index, row in enumerate(case.rows):
        logits = case.alone(row)[1][RESPONSE - 1 : -1]
        off = gap(entropy[index, RESPONSE : len(row)], metrics.distribution_entropy(logits))
        if off > TOLERANCE:
            return Outcome("wrong", "entropy is not that of each row's own logits", off)
    return outcome


def _batch(case: FamilyCase) -> TokenBatch:
    call = case.call("right")
    return TokenBatch.from_ids(call["input_ids"], call["attention_mask"], response_start=RESPONSE)


def _measured(case: FamilyCase, wrapped: Any) -> Outcome:
    found = measure(wrapped, _batch(case), receiver=True, entropy=False, **SETTINGS)
    return _compared(case, found, [(row, torch.arange(len(row))) for row in case.rows])


def _attached(side: str, case: FamilyCase) -> Outcome:
    """`attach` around a padded call gives the metrics of each row's own maps."""
    call = case.call(side)
    rows, response = case.rows_of(call)
    with without_attnprobe("a padded call"):
        own = case.run(call).logits
    probe = _statistics()
    with attach(case.model, probe, response_mask=response):
        case.run(call)
    return _compared(case, probe.result(), rows, own, instead=partial(case.in_call, call))


def _generated(padded: bool, case: FamilyCase) -> Outcome:
    """`attach` around `generate` with a cache gives the metrics of each finished row's own maps."""
    prompt = case.prompt(padded=padded)
    case.generated(prompt)
    probe = _statistics()
    with attach(case.model, probe, response_mask=case.rows_of(prompt)[1]):
        generated = case.generate(prompt)
    rows = case.rows_of(case.whole(prompt, generated.sequences))[0]
    own = torch.stack(generated.logits, dim=1)
    # Without a cache (MPT), each step is a pass over the whole sequence, with a result of its own.
    found = probe.result().select(slice(-len(rows), None))
    return _compared(case, found, rows, own, True, partial(case.while_generating, prompt))


# ---- what must not change ---------------------------------------------------------------------


def _logits(side: str, case: FamilyCase) -> Outcome:
    """The logits are bitwise the same with and without a probe, under each implementation."""
    call = case.call(side)
    eager_too = case.model.config._attn_implementation != "eager"
    for model in [case.model, case.eager] if eager_too else [case.model]:
        with without_attnprobe("a padded call"):
            before = case.run(call, model).logits
        with attach(model, _Maps()):
            during = case.run(call, model).logits
        if not torch.equal(before, during):
            if not torch.equal(before, case.run(call, model).logits):
                raise ModelFailed("the model gives other logits each time")
            name = model.config._attn_implementation
            return Outcome("wrong", f"the logits change under {name}", gap(during, before))
    return Outcome("good", BITWISE)


def _text(case: FamilyCase) -> Outcome:
    """Greedy text, and the logits it was chosen by, are the same with and without a probe."""
    # Of several rows in a cache, dense attention cannot be followed.
    prompt = case.prompt(padded=adapter_for(case.model).reads == "factored")
    before = case.generated(prompt)
    with attach(case.model, _Maps()):
        during = case.generate(prompt)
    if _same_text(before, during):
        return Outcome("good", BITWISE)
    if not _same_text(before, case.generate(prompt)):
        raise ModelFailed("the model generates other logits each time")
    off = gap(torch.stack(during.logits), torch.stack(before.logits))
    same = torch.equal(before.sequences, during.sequences)
    return Outcome("wrong", "the logits change while generating" if same else "the text changes", off)


def _same_text(first: Any, second: Any) -> bool:
    """Whether two calls of generate gave the same tokens, and bitwise the same logits."""
    same_logits = torch.equal(torch.stack(first.logits), torch.stack(second.logits))
    return torch.equal(first.sequences, second.sequences) and same_logits


# ---- suppression ------------------------------------------------------------------------------

_QUERY = 20
"""The query of the suppressed pair."""


def _suppression(case: FamilyCase) -> Outcome:
    """Suppressing a pair moves its query and perhaps later tokens, by the same amount in every call."""
    prompt = case.prompt(padded=False)
    width = prompt["input_ids"].shape[1]
    # A key that the query does see: windows and sparse attention hide most.
    key = int(case.alone(prompt["input_ids"][0])[0][0][0, :, _QUERY, :_QUERY].mean(0).argmax())
    pairs = [(_QUERY, key)]
    with without_attnprobe("a call"):
        before = case.run(prompt).logits
    with suppress_attention(case.model, pairs=pairs):
        after = case.run(prompt).logits
    moved = gap(after[:, _QUERY], before[:, _QUERY])
    if moved < 1e-5:
        return Outcome("wrong", "the suppressed query does not move", moved)
    gaps = {"earlier tokens move": gap(after[:, :_QUERY], before[:, :_QUERY])}
    if "logits_to_keep" in case.arguments:
        with suppress_attention(case.model, pairs=pairs):
            kept = case.run(prompt, logits_to_keep=width - _QUERY).logits
        gaps["other logits if only the last are kept"] = gap(kept, after[:, _QUERY:])
    gaps["the other keys do not share the suppressed probability"] = _shared(case, prompt, key)
    plain = case.generated(prompt)
    whole = case.whole(prompt, plain.sequences)
    with without_attnprobe("a call"):
        itself = gap(torch.stack(plain.logits, 1), case.run(whole).logits[:, width - 1 :])
    if itself <= TOLERANCE:
        with suppress_attention(case.model, pairs=pairs):
            generated = case.generate(prompt)
            logits = case.run(case.whole(prompt, generated.sequences)).logits[:, width - 1 :]
        gaps["generate is suppressed differently from a single call"] = gap(
            torch.stack(generated.logits, 1), logits
        )
    worst = max(gaps, key=lambda title: gaps[title])
    wrong = gaps[worst] > TOLERANCE
    return Outcome("wrong" if wrong else "good", worst if wrong else "yes", gaps[worst])


def _shared(case: FamilyCase, call: Call, key: int) -> float:
    """Return how far the first layer's map is from the old one with the pair removed."""
    layer = case.layers[0]
    before, after = _Maps(), _Maps()
    with attach(case.model, before, layers=[layer]):
        case.run(call)
    with (
        suppress_attention(case.model, layers=[layer], pairs=[(_QUERY, key)]),
        attach(case.model, after, layers=[layer]),
    ):
        case.run(call)
    # Multiplied, not divided: where one key has nearly all of a row, the quotient would be mostly rounding.
    expected, found = before.maps[layer].clone(), after.maps[layer].clone()
    expected[:, :, _QUERY, key] = 0
    found[:, :, _QUERY] *= 1 - before.maps[layer][:, :, _QUERY, key, None]
    return gap(found, expected)


# ---- the other backends -----------------------------------------------------------------------


def _transformer_lens(case: FamilyCase) -> Outcome:
    """TransformerLens: `measure` gives the same; its logits may change by rounding."""
    model = build_family(case.name)
    with without_attnprobe("the bridge"):
        bridge = in_transformer_lens(model)
    ids = case.call("none")["input_ids"]
    with without_attnprobe("the bridge"), torch.no_grad():
        before = bridge(ids)
    probe = _Maps()
    with torch.no_grad(), attach(bridge, probe):
        change = gap(bridge(ids), before)
    outcome = _measured(case, bridge)
    if outcome.kind != "good":
        return outcome
    if change > TOLERANCE:
        return Outcome("wrong", "the bridge's logits change", change)
    moved = "bitwise" if change == 0 else f"logits move by {change:.0e}"
    return Outcome("good", f"{probe.kind}, {moved}", outcome.difference)


def _nnsight(case: FamilyCase) -> Outcome:
    """nnsight: `measure` gives the same, and logits are bitwise the same."""
    wrapper = in_nnsight(build_family(case.name))
    call = case.call("left")
    with without_attnprobe("a trace"), torch.no_grad():
        before = _traced_logits(wrapper, call)
    probe = _Maps()
    with torch.no_grad(), attach(wrapper, probe):
        during = _traced_logits(wrapper, call)
    if not torch.equal(before, during):
        return Outcome("wrong", "the logits change", gap(during, before))
    outcome = _measured(case, wrapper)
    if outcome.kind != "good":
        return outcome
    return Outcome("good", f"{probe.kind}, {BITWISE}", outcome.difference)


def _traced_logits(wrapper: Any, call: Call) -> Tensor:
    """Return the logits of a trace, which a hook of torch sees."""
    kept: list[Tensor] = []
    handle = wrapper._module.register_forward_hook(lambda module, args, output: kept.append(output.logits))
    try:
        arguments = dict(call)
        run_in_trace(wrapper, arguments.pop("input_ids"), **arguments)
    finally:
        handle.remove()
    return kept[-1]


Check = Callable[[FamilyCase], Outcome]

_CHECKS: dict[str, Check] = {
    "measure": _measure,
    **{f"attach {side}": partial(_attached, side) for side in SIDES},
    "generate one": partial(_generated, False),
    "generate left": partial(_generated, True),
    **{f"logits {side}": partial(_logits, side) for side in SIDES},
    "text": _text,
    "suppression": _suppression,
}
_BACKENDS: dict[str, Check] = {"transformer_lens": _transformer_lens, "nnsight": _nnsight}

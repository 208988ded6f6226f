"""What attnprobe does with one family of causal language models, tried on a tiny model and compared.

`check_family` reads the model in every way a user can (measure, attach around padded calls and around
generate, suppression, the other backends) and compares each number with the metrics of the maps that eager
attention returns for each row on its own. Each check ends in an `Outcome`: as it should be, refused with a
reason, impossible for the model itself, a wrong number, or an error that is not attnprobe's. The table of
families and its tests call it. What is left to others: the models (all_families), and the table (families).
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from attnprobe import metrics
from attnprobe.adapters import adapter_for
from attnprobe.adapters.base import Value
from attnprobe.attention.factored import FactoredAttention
from attnprobe.attention.operator import Attention
from attnprobe.batch import TokenBatch
from attnprobe.errors import AttnprobeError
from attnprobe.head_statistics import HeadStatistics, HeadStatisticsProbe
from attnprobe.measurement import measure
from attnprobe.probe import Probe, attach
from attnprobe.suppression import suppress_attention
from attnprobe.testing.all_families import VOCABULARY, build_family
from attnprobe.testing.backends import in_nnsight, in_transformer_lens, run_in_trace

LENGTHS = (40, 29)
"""The tokens of the two rows, all longer than the windows, blocks and budgets of the models."""
RESPONSE = 9
"""The first response token of each row."""
NEW_TOKENS = 6
SETTINGS: dict[str, Any] = {"window": 4, "horizon": (2, 9)}
STATISTICS = ("span", "waad", "fai", "receiver_kurtosis")
TOLERANCE = 2e-3
"""The largest difference that counts as rounding; a wrong mask or position makes one of 0.05 and more."""

Kind = Literal["good", "refused", "model", "wrong", "error"]


@dataclass(frozen=True)
class Outcome:
    """How one check ended.

    Attributes:
        kind: "good"; "refused" (attnprobe says why); "model" (the model itself cannot do it, without
            attnprobe too); "wrong" (a number or an output is not what it must be); "error" (an exception
            that is not attnprobe's).
        note: what was found, in a few words.
        difference: the largest difference that was found, if the check compares numbers.
    """

    kind: Kind
    note: str = ""
    difference: float | None = None


@dataclass
class FamilyReport:
    """What was found about one family."""

    name: str
    model_class: str = ""
    reads: str = ""
    layers: tuple[int, ...] = ()
    skipped_layers: tuple[int, ...] = ()
    refused_sites: dict[str, str] = field(default_factory=dict)
    implementation: str = ""
    reason: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """The family's status: "factored", "dense", "refused", "not built", "WRONG" or "ERROR"."""
        kinds = {outcome.kind for outcome in self.outcomes.values()}
        if "error" in kinds:
            return "ERROR"
        if "wrong" in kinds:
            return "WRONG"
        if self.reads and any(self.outcomes[name].kind == "good" for name in _READING & set(self.outcomes)):
            return self.reads
        return "refused" if self.reads or self.model_class else "not built"

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {"status": self.status, **asdict(self)}


_READING = {"measure", "attach none", "attach left", "attach right"}
_SIDES = ("none", "left", "right")


def check_family(name: str, *, backends: bool = True) -> FamilyReport:
    """Try everything with a family's tiny model, and report it; nothing is raised.

    Args:
        name: one of `causal_families()`.
        backends: whether to try TransformerLens and nnsight too.
    """
    report = FamilyReport(name)
    try:
        model = build_family(name)
    except Exception as error:  # Whatever the family's own classes raise.
        report.reason = _said(error)
        return report
    report.model_class = type(model).__name__
    report.implementation = model.config._attn_implementation
    try:
        adapter = adapter_for(model)
    except AttnprobeError as refusal:
        report.reason = str(refusal)
        return report
    except Exception as error:  # A fault of ours, to be shown in the table.
        report.outcomes["adapter"] = Outcome("error", _said(error))
        return report
    report.layers, report.skipped_layers = adapter.layers, adapter.skipped_layers
    report.refused_sites = dict(adapter.refused_sites)
    report.reads = adapter.reads
    case = _Case(name, model)
    checks: dict[str, Callable[[], Outcome]] = {
        "measure": case.measure,
        **{f"attach {side}": (lambda side=side: case.attach(side)) for side in _SIDES},
        **{f"logits {side}": (lambda side=side: case.logits(side)) for side in _SIDES},
        "text": case.text,
        "generate one": lambda: case.generate(padded=False),
        "generate left": lambda: case.generate(padded=True),
        "suppression": case.suppression,
    }
    if backends:
        checks |= {"transformer_lens": case.transformer_lens, "nnsight": case.nnsight}
    for title, check in checks.items():
        report.outcomes[title] = _outcome(check)
    if report.status == "refused":
        report.reason = next(o.note for o in report.outcomes.values() if o.kind in ("refused", "model"))
    return report


class _ModelFailed(Exception):
    """The model itself cannot do what a check asks of it, without attnprobe too."""


def _outcome(check: Callable[[], Outcome]) -> Outcome:
    try:
        return check()
    except AttnprobeError as refusal:
        return Outcome("refused", str(refusal))
    except _ModelFailed as failure:
        return Outcome("model", str(failure))
    except Exception as error:  # A fault of ours, to be shown in the table.
        return Outcome("error", _said(error))


def _said(error: Exception) -> str:
    """Return an exception's type, message and place."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {message} ({Path(place.filename).name}:{place.lineno})"


@contextmanager
def _plain(what: str) -> Iterator[None]:
    """Run the model without attnprobe: whatever fails here is not attnprobe's fault."""
    try:
        yield
    except Exception as error:  # The family's own.
        raise _ModelFailed(f"{what} fails by itself: {_said(error)}") from error


# ---- a family's models and inputs -------------------------------------------------------------


class _Case:
    """A family's model, a copy of it with eager attention, and two rows of tokens."""

    def __init__(self, name: str, model: Any) -> None:
        self.name = name
        self.model = model
        self.model_layers = adapter_for(model).layers
        generator = torch.Generator().manual_seed(1)
        self.rows = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
        self._eager: Any = None
        self._maps: dict[tuple[int, ...], tuple[list[Tensor], Tensor]] = {}

    @property
    def eager(self) -> Any:
        """The same weights with eager attention."""
        if self._eager is None:
            self._eager = build_family(self.name, "eager")
            self._eager.load_state_dict(self.model.state_dict())
        return self._eager

    def call(self, side: str) -> dict[str, Tensor]:
        """Return the arguments of a call of both rows, padded on a side, as a careful user passes them.

        Without padding, the second row's length is that of both.
        """
        width = min(LENGTHS) if side == "none" else max(LENGTHS)
        ids = torch.zeros(len(self.rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(self.rows):
            length = min(len(row), width)
            start = width - length if side == "left" else 0
            ids[index, start : start + length] = row[:length]
            mask[index, start : start + length] = 1
        return self._with_positions({"input_ids": ids, "attention_mask": mask})

    def _with_positions(self, call: dict[str, Tensor]) -> dict[str, Tensor]:
        if "position_ids" in inspect.signature(type(self.model).forward).parameters:
            call["position_ids"] = (call["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return call

    @torch.no_grad()
    def run(self, call: dict[str, Tensor], model: Any = None, **more: Any) -> Any:
        return (self.model if model is None else model)(**call, **more)

    @torch.no_grad()
    def maps_alone(self, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the eager maps of one row on its own, of the layers that are read, and its logits."""
        key = tuple(ids.tolist())
        if key not in self._maps:
            with _plain("eager attention"):
                call = self._with_positions({"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])})
                output = self.run(call, self.eager, output_attentions=True)
            self._maps[key] = self._of_layers(output), output.logits[0]
        return self._maps[key]

    def _of_layers(self, output: Any) -> list[Tensor]:
        """Return the maps of an output that belong to the layers that are read."""
        given = list(getattr(output, "attentions", None) or ())
        found = [m for m in given if isinstance(m, Tensor) and m.ndim == 4]
        if len(given) > len(self.model_layers) and len(given) > max(self.model_layers):
            found = [given[layer] for layer in self.model_layers]
        if len(found) != len(self.model_layers):
            raise _ModelFailed(
                f"eager attention returns {len(found)} maps for {len(self.model_layers)} layers with attention"
            )
        return found

    # ---- numbers ------------------------------------------------------------------------------

    def compare(
        self,
        found: HeadStatistics,
        rows: list[tuple[Tensor, Tensor]],
        call: dict[str, Tensor] | None = None,
        logits: Tensor | None = None,
    ) -> Outcome:
        """Compare statistics with the metrics of eager maps.

        Args:
            found: the statistics of all rows.
            rows: for each row, its tokens and their columns in `found`.
            call: the call that they were read in; if the model itself gives other logits there than for
                each row on its own, the maps of that call are the ones to agree with.
            logits: the model's logits in that call.
        """
        alone = 0.0
        itself = 0.0
        for index, (ids, columns) in enumerate(rows):
            maps, own_logits = self.maps_alone(ids)
            alone = max(alone, _difference(found, index, columns, maps))
            if logits is not None:
                itself = max(itself, _gap(logits[index, columns], own_logits))
        if alone <= TOLERANCE:
            return Outcome("good", "as each row alone", alone)
        if call is not None and itself > TOLERANCE:
            with _plain("eager attention"):
                output = self.run(call, self.eager, output_attentions=True)
            together = 0.0
            for index, (_, columns) in enumerate(rows):
                cut = [m[index : index + 1, :, columns][..., columns] for m in self._of_layers(output)]
                together = max(together, _difference(found, index, columns, cut))
            if together <= TOLERANCE:
                note = f"as the call; the model itself depends on padding (logits by {itself:.1g})"
                return Outcome("good", note, together)
            note = f"not as each row alone ({alone:.2g}), nor as the call; the logits differ by {itself:.1g}"
            return Outcome("wrong", note, together)
        return Outcome("wrong", f"not as each row alone; the model's own logits differ by {itself:.1g}", alone)

    def measure(self) -> Outcome:
        """`measure` gives the metrics of each row's own maps."""
        call = self.call("right")
        batch = TokenBatch.from_ids(call["input_ids"], call["attention_mask"], response_start=RESPONSE)
        found = measure(self.model, batch, receiver=True, entropy=False, **SETTINGS)
        outcome = self.compare(found, [(row, torch.arange(len(row))) for row in self.rows])
        if outcome.kind != "good":
            return outcome
        entropy = measure(self.model, batch, span=False, **SETTINGS).entropy
        assert entropy is not None
        for index, row in enumerate(self.rows):
            logits = self.maps_alone(row)[1][RESPONSE - 1 : -1]
            gap = _gap(entropy[index, RESPONSE : len(row)], metrics.distribution_entropy(logits))
            if gap > TOLERANCE:
                return Outcome("wrong", "entropy is not that of each row's own logits", gap)
        return outcome

    def attach(self, side: str) -> Outcome:
        """`attach` around a padded call gives the metrics of each row's own maps."""
        call = self.call(side)
        with _plain("a padded call"):
            logits = self.run(call).logits
        rows, response = self._rows_of(call)
        probe = HeadStatisticsProbe(receiver=True, entropy=False, **SETTINGS)
        with attach(self.model, probe, response_mask=response):
            self.run(call)
        return self.compare(probe.result(), rows, call, logits)

    def _rows_of(self, call: dict[str, Tensor]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Return each row's tokens and columns in a call, and the response mask."""
        mask = call["attention_mask"].bool()
        rows = []
        for ids, real in zip(call["input_ids"], mask, strict=True):
            columns = real.nonzero()[:, 0]
            rows.append((ids[columns], columns))
        return rows, mask & (mask.cumsum(-1) > RESPONSE)

    def generate(self, *, padded: bool) -> Outcome:
        """`attach` around `generate` with a cache gives the metrics of each finished row's own maps."""
        call = self._prompt(padded)
        rows, response = self._rows_of(call)
        with _plain("generate"):
            self._generated(call)
        probe = HeadStatisticsProbe(receiver=True, entropy=False, **SETTINGS)
        with attach(self.model, probe, response_mask=response):
            sequences = self._generated(call).sequences
        # The last token is never run through the model.
        ids = sequences[:, :-1]
        mask = torch.cat([call["attention_mask"], torch.ones_like(ids[:, call["input_ids"].shape[1] :])], -1)
        whole = self._with_positions({"input_ids": ids, "attention_mask": mask})
        rows = self._rows_of(whole)[0]
        with _plain("a padded call"):
            logits = self.run(whole).logits
        return self.compare(probe.result(), rows, whole, logits)

    def _prompt(self, padded: bool) -> dict[str, Tensor]:
        call = self.call("left") if padded else {n: v[:1] for n, v in self.call("none").items()}
        return {name: call[name] for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def _generated(self, call: dict[str, Tensor]) -> Any:
        return self.model.generate(
            **call,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )

    # ---- what must not change -----------------------------------------------------------------

    def logits(self, side: str) -> Outcome:
        """The logits are bitwise the same with and without a probe, under every implementation."""
        call = self.call(side)
        models = [self.model]
        if self.model.config._attn_implementation != "eager":
            models.append(self.eager)
        for model in models:
            with _plain("a padded call"):
                before = self.run(call, model).logits
            with attach(model, HeadStatisticsProbe(**SETTINGS)):
                during = self.run(call, model).logits
            if not torch.equal(before, during):
                name = model.config._attn_implementation
                return Outcome("wrong", f"logits change under {name}", _gap(before, during))
        return Outcome("good", "bitwise")

    def text(self) -> Outcome:
        """Greedy text, and the logits it was chosen by, are the same with and without a probe."""
        call = self._prompt(padded=True)
        with _plain("generate"):
            before = self._generated(call)
        with attach(self.model, _Kinds()):
            during = self._generated(call)
        if not torch.equal(before.sequences, during.sequences):
            return Outcome("wrong", "the text changes")
        if not all(torch.equal(a, b) for a, b in zip(before.logits, during.logits, strict=True)):
            return Outcome("wrong", "the logits change while generating")
        return Outcome("good", "bitwise")

    # ---- suppression --------------------------------------------------------------------------

    def suppression(self) -> Outcome:
        """Suppressing a pair moves its query and perhaps later tokens, by the same amount in every call."""
        call = self._prompt(padded=False)
        query, key = 20, 18
        width = call["input_ids"].shape[1]
        with _plain("a call"):
            before = self.run(call).logits
        with suppress_attention(self.model, pairs=[(query, key)]):
            after = self.run(call).logits
        earlier = _gap(before[:, :query], after[:, :query])
        if earlier > TOLERANCE:
            return Outcome("wrong", "earlier tokens move", earlier)
        moved = float((before - after)[:, query].abs().max())
        if moved < 1e-5:
            return Outcome("wrong", "the suppressed query does not move", moved)
        worst = earlier
        if "logits_to_keep" in inspect.signature(type(self.model).forward).parameters:
            with suppress_attention(self.model, pairs=[(query, key)]):
                kept = self.run(call, logits_to_keep=width - query).logits
            worst = max(worst, _gap(after[:, query:], kept))
            if worst > TOLERANCE:
                return Outcome("wrong", "other logits if only the last are kept", worst)
        worst = max(worst, self._suppressed_map(call, query, key))
        if worst > TOLERANCE:
            return Outcome("wrong", "the other keys do not share the suppressed probability", worst)
        with _plain("generate"):
            self._generated(call)
        with suppress_attention(self.model, pairs=[(query, key)]):
            generated = self._generated(call)
            ids = generated.sequences[:, :-1]
            whole = self.run(self._with_positions({"input_ids": ids, "attention_mask": torch.ones_like(ids)})).logits
        worst = max(worst, _gap(whole[:, width - 1 :], torch.stack(generated.logits, 1)))
        if worst > TOLERANCE:
            return Outcome("wrong", "generate is suppressed differently from a single call", worst)
        return Outcome("good", "yes", worst)

    def _suppressed_map(self, call: dict[str, Tensor], query: int, key: int) -> float:
        """Return how far the first layer's map is from the old one with a pair removed."""
        layer = self.model_layers[0]
        before, after = _Kinds(), _Kinds()
        with attach(self.model, before, layers=[layer]):
            self.run(call)
        with suppress_attention(self.model, layers=[layer], pairs=[(query, key)]):
            with attach(self.model, after, layers=[layer]):
                self.run(call)
        expected = before.maps[layer].clone()
        expected[:, :, query] /= 1 - expected[:, :, query, key, None]
        expected[:, :, query, key] = 0
        return _gap(expected, after.maps[layer])

    # ---- the other backends -------------------------------------------------------------------

    def transformer_lens(self) -> Outcome:
        """TransformerLens, if it knows the family: `measure` gives the same, and logits do not change."""
        with _plain("the bridge"):
            bridge = _or_refusal(in_transformer_lens, build_family(self.name))
        call = self.call("none")
        ids = call["input_ids"]
        with _plain("the bridge"), torch.no_grad():
            before = bridge(ids)
        with torch.no_grad(), attach(bridge, _Kinds()):
            during = bridge(ids)
        change = _gap(before, during)
        outcome = self._measured(bridge)
        if outcome.kind == "good" and change > TOLERANCE:
            return Outcome("wrong", "the bridge's logits change", change)
        note = "bitwise" if change == 0 else f"logits to {change:.0e}"
        return Outcome(outcome.kind, note if outcome.kind == "good" else outcome.note, outcome.difference)

    def nnsight(self) -> Outcome:
        """In nnsight: `measure` gives the same, and logits are bitwise the same."""
        wrapper = in_nnsight(build_family(self.name))
        call = self.call("left")
        with _plain("a trace"), torch.no_grad():
            before = _traced_logits(wrapper, call)
        with torch.no_grad(), attach(wrapper, _Kinds()):
            during = _traced_logits(wrapper, call)
        if not torch.equal(before, during):
            return Outcome("wrong", "the logits change", _gap(before, during))
        outcome = self._measured(wrapper)
        return Outcome(outcome.kind, outcome.note.replace("as each row alone", "bitwise"), outcome.difference)

    def _measured(self, wrapped: Any) -> Outcome:
        call = self.call("right")
        batch = TokenBatch.from_ids(call["input_ids"], call["attention_mask"], response_start=RESPONSE)
        found = measure(wrapped, batch, receiver=True, entropy=False, **SETTINGS)
        return self.compare(found, [(row, torch.arange(len(row))) for row in self.rows])


def _or_refusal(wrap: Callable[[Any], Any], model: Any) -> Any:
    """Wrap a model; a refusal of ours is passed on as what it is."""
    try:
        return wrap(model)
    except AttnprobeError as refusal:
        raise _ModelFailed(str(refusal)) from refusal


def _traced_logits(wrapper: Any, call: dict[str, Tensor]) -> Tensor:
    """Return the logits of a trace, taken by a hook of torch."""
    kept: list[Tensor] = []
    handle = wrapper._module.register_forward_hook(lambda module, args, output: kept.append(output.logits))
    try:
        arguments = dict(call)
        run_in_trace(wrapper, arguments.pop("input_ids"), **arguments)
    finally:
        handle.remove()
    return kept[-1]


class _Kinds(Probe):
    """Keeps whole maps, and how they were read."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()
        self.maps: dict[int, Tensor] = {}

    def observe(self, site: str, layer: int | None, value: Value, batch: TokenBatch) -> None:
        assert isinstance(value, Attention)
        assert layer is not None
        self.kinds.add("factored" if isinstance(value, FactoredAttention) else "dense")
        self.maps[layer] = value.rows(torch.arange(value.query_count))


# ---- comparing --------------------------------------------------------------------------------


def _gap(first: Tensor, second: Tensor) -> float:
    """Return the largest difference relative to the scale of the numbers; infinity if NaNs differ."""
    if first.shape != second.shape or not torch.equal(first.isnan(), second.isnan()):
        return float("inf")
    first, second = first.nan_to_num(), second.nan_to_num()
    scale = max(1.0, float(second.abs().max())) if second.numel() else 1.0
    return float((first - second).abs().max()) / scale if second.numel() else 0.0


def _difference(found: HeadStatistics, example: int, columns: Tensor, maps: list[Tensor]) -> float:
    """Return the largest difference between statistics of an example and the metrics of its maps."""
    worst = 0.0
    response = torch.arange(len(columns))[None] >= RESPONSE
    for index, pattern in enumerate(maps):
        pattern = pattern.float()
        expected = {
            "span": metrics.mean_attention_distance(pattern, response),
            "waad": metrics.windowed_attention_distance(pattern, response, SETTINGS["window"]),
            "fai": metrics.future_attention_influence(pattern, response, SETTINGS["horizon"]),
            "receiver_kurtosis": metrics.receiver_kurtosis(pattern, response),
        }
        for name in STATISTICS:
            value = getattr(found, name)[example, index, : pattern.shape[1]]
            value = value[:, columns] if name in ("waad", "fai") else value
            worst = max(worst, _gap(value, expected[name][0]))
    return worst

"""The conformance suite of adapters: what every backend must do, as one line of pytest.

    from attnprobe.testing.conformance import conformance_test

    test_my_backend = conformance_test(MyWrapper)

gives a test for every family, side of padding and dtype: the same weights, read directly through
transformers, determine what the wrapped model must show. The oracle for attention is the maps that eager
attention returns; that for the other sites is the transformers adapter, whose own tests compare it with
hooks on named modules. What is left to others: tests of what is particular to a backend.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnprobe import metrics
from attnprobe.adapters import LAYER_SITES, adapter_for
from attnprobe.adapters.base import Value
from attnprobe.attention.operator import Attention
from attnprobe.batch import TokenBatch
from attnprobe.errors import UnsupportedModelError
from attnprobe.head_statistics import HeadStatistics
from attnprobe.measurement import measure
from attnprobe.probe import Probe, attach
from attnprobe.statistics_probe import HeadStatisticsProbe
from attnprobe.suppression import suppress_attention
from attnprobe.testing.tiny_models import FAMILIES, VOCABULARY, tiny_model

SIDES = ("left", "right")
DTYPES = (torch.float32, torch.bfloat16)

Wrap = Callable[[Any], Any]
Run = Callable[..., Any]

_TENSOR_SITES = tuple(site for site in LAYER_SITES if site not in ("attention", "value_norms"))
_TOKENS, _PADDING, _RESPONSE = 20, 5, 7


def run_directly(model: Any, input_ids: Tensor, **arguments: Any) -> Any:
    """Call a wrapped model with the token ids first and the rest by name."""
    return model(input_ids, **arguments)


def conformance_test(
    wrap: Wrap, *, run: Run = run_directly, families: Iterable[str] = tuple(FAMILIES)
) -> Callable[..., None]:
    """Return a pytest test of what every adapter must do.

    Args:
        wrap: makes the backend's model from a transformers model; an adapter must be registered for it.
        run: `run(wrapped, input_ids, **arguments)`, how a user of the backend runs a forward pass, with
            `attention_mask` and, where the family has them, `position_ids`; default: calling it.
        families: names from `attnprobe.testing.tiny_models.FAMILIES`.

    A family that `wrap` or the adapter refuses with `UnsupportedModelError` is skipped, with its reason.
    """
    import pytest

    @pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
    @pytest.mark.parametrize("side", SIDES)
    @pytest.mark.parametrize("family", list(families))
    def test(family: str, side: str, dtype: torch.dtype) -> None:
        try:
            case = _prepared(wrap, family, side, dtype, run)
        except UnsupportedModelError as refusal:
            pytest.skip(str(refusal))
        _check(case)

    return test


def check_conformance(
    wrap: Wrap,
    family: str,
    *,
    side: str = "left",
    dtype: torch.dtype = torch.float32,
    run: Run = run_directly,
) -> None:
    """Check an adapter on a tiny random model of one family, padded on one side.

    Raises:
        AssertionError: the adapter does not do what it must.
        UnsupportedModelError: the family is refused.
    """
    _check(_prepared(wrap, family, side, dtype, run))


# ---- a case -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """A wrapped model, the same weights unwrapped, and a padded call of two examples.

    `eager` has those weights too, and gives maps; `whole` says whether all checks are made.
    """

    wrapped: Any
    reference: Any
    eager: Any
    run: Run
    arguments: dict[str, Tensor]
    real: Tensor
    precise: bool
    whole: bool

    @property
    def plain_of_wrapped(self) -> Any:
        """The transformers model inside the wrapped one, or the wrapped one itself."""
        return getattr(adapter_for(self.wrapped), "model", self.wrapped)

    def call_wrapped(self, examples: slice = slice(None), columns: Tensor | None = None) -> None:
        with torch.no_grad():
            arguments = {name: value[examples] for name, value in self.arguments.items()}
            if columns is not None:
                arguments = {name: value[:, columns] for name, value in arguments.items()}
            self.run(self.wrapped, arguments.pop("input_ids"), **arguments)

    def call_reference(self) -> None:
        with torch.no_grad():
            self.reference(**self.arguments)


def _prepared(wrap: Wrap, family: str, side: str, dtype: torch.dtype, run: Run) -> _Case:
    """Return a case of two sequences, the first padded on a side, as a careful user would pass them."""
    reference, eager = _references(family, dtype)
    wrapped = wrap(tiny_model(family).to(dtype))
    adapter_for(wrapped)
    ids = torch.randint(1, VOCABULARY, (2, _TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, _TOKENS, dtype=torch.long)
    mask[0, slice(0, _PADDING) if side == "left" else slice(_TOKENS - _PADDING, _TOKENS)] = 0
    call = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(type(reference).forward).parameters:
        call["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    precise = dtype == torch.float32
    return _Case(wrapped, reference, eager, run, call, mask.bool(), precise, precise and side == SIDES[0])


@lru_cache(maxsize=4)
def _references(family: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return a family's model as it is by default, and with eager attention."""
    return tiny_model(family).to(dtype), tiny_model(family, implementation="eager").to(dtype)


def _eager(model: Any, **arguments: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the maps that the layers with attention return under eager attention, and the logits."""
    with torch.no_grad():
        output = model(**arguments, output_attentions=True)
    # Some hybrids return something for their other layers too; others return nothing.
    layers = adapter_for(model).layers
    if len(output.attentions) > len(layers):
        return [output.attentions[layer] for layer in layers], output.logits
    return list(output.attentions), output.logits


class _Collect(Probe):
    """Keeps the values at some sites, with whole patterns, and may replace them."""

    def __init__(self, *sites: str, change: Callable[[Tensor], Tensor] | None = None) -> None:
        self.sites = frozenset(sites)
        self.values: dict[tuple[str, int | None], Tensor] = {}
        self._change = change

    def observe(self, site: str, layer: int | None, value: Value, batch: TokenBatch) -> Tensor | None:
        if isinstance(value, Attention):
            rows = value.rows(torch.arange(value.query_count))
            example = torch.arange(value.batch_size)
            key = (example + value.key_count // 2) % value.key_count
            torch.testing.assert_close(value.column(key), rows[example, :, :, key], rtol=0, atol=1e-5)
            self.values[site, layer] = rows
            return None
        self.values[site, layer] = value.detach().clone()
        return None if self._change is None or site == "logits" else self._change(value)


# ---- the checks -------------------------------------------------------------------------------


def _check(case: _Case) -> None:
    # Some backends add hooks of their own when a model runs for the first time.
    case.call_wrapped()
    before = model_state(case.plain_of_wrapped)
    _check_layers(case)
    _check_patterns(case)
    _check_examples_alone(case)
    _check_measure(case)
    if case.whole:
        _check_value_norms(case)
        _check_tensor_sites(case)
        _check_suppression(case)
    _check_failing_probe(case)
    assert_same_state(before, model_state(case.plain_of_wrapped))


def _check_layers(case: _Case) -> None:
    adapter, reference = adapter_for(case.wrapped), adapter_for(case.reference)
    for name in ("layers", "skipped_layers", "vocabulary_size", "context_length", "refused_sites"):
        assert getattr(adapter, name) == getattr(reference, name), name


def _check_patterns(case: _Case) -> None:
    """The patterns of the user's own padded call are those that eager attention returns."""
    maps = _eager(case.eager, **case.arguments)[0]
    probe = _Collect("attention")
    with attach(case.wrapped, probe) as attached:
        case.call_wrapped()
    assert len(maps) == len(attached.layers) == len(probe.values)
    for layer, expected in zip(attached.layers, maps, strict=True):
        real = case.real[:, None, :, None]
        found = probe.values["attention", layer] * real
        if case.precise:
            torch.testing.assert_close(found, expected.float() * real, rtol=0, atol=2e-5)
        elif layer == attached.layers[0] == 0:
            # Later layers drift with the rounding of activations, which differs between implementations.
            torch.testing.assert_close(found, expected.float() * real, rtol=0, atol=3e-2)
        assert float(found.sum(-1).max()) < 1 + 1e-2


def _statistics(case: _Case, examples: slice, columns: Tensor | None, start: Tensor) -> HeadStatistics:
    probe = HeadStatisticsProbe(window=4, horizon=(2, 6), receiver=True, entropy=False)
    width = case.real.shape[1] if columns is None else len(columns)
    response = torch.arange(width) >= start[examples, None]
    with attach(case.wrapped, probe, response_mask=response):
        case.call_wrapped(examples, columns)
    return probe.result()


def _check_examples_alone(case: _Case) -> None:
    """Each example of the padded batch gives what it gives alone, in the user's own calls."""
    first = case.real.int().argmax(-1)
    together = _statistics(case, slice(None), None, first + _RESPONSE)
    precise = case.precise
    # In bfloat16 the sums of a larger batch round differently, and later layers drift.
    layers = slice(None) if precise else slice(0, 1)
    tolerance = 2e-4 if precise else 0.3
    for example in range(case.real.shape[0]):
        kept = case.real[example].nonzero()[:, 0]
        alone = _statistics(case, slice(example, example + 1), kept, torch.full_like(first, _RESPONSE))
        names = (
            "span",
            "waad",
            "fai",
            *(("receiver_kurtosis", "span_ignoring", "shares") if precise else ()),
        )
        for name in names:
            found, expected = getattr(together, name)[example, layers], getattr(alone, name)[0, layers]
            if name in ("waad", "fai"):
                padding = (~case.real[example]).nonzero()[:, 0]
                assert bool(found[..., padding].isnan().all()), name
                found = found[..., kept]
            torch.testing.assert_close(found, expected, equal_nan=True, rtol=tolerance, atol=tolerance)


def _check_measure(case: _Case) -> None:
    """`measure` gives the metrics of the maps that eager attention returns, and the right entropy."""
    ids = case.arguments["input_ids"]
    batch = TokenBatch.from_ids(ids, response_start=_RESPONSE)
    measured = measure(case.wrapped, batch, window=4, horizon=(2, 6), share_on=("first", "prompt"))
    prompt, first = batch.segment("prompt"), batch.segment("first")
    assert measured.waad.dtype == torch.float32
    assert measured.layers == adapter_for(case.reference).layers
    if not case.precise:
        return
    maps, logits = _eager(case.eager, input_ids=ids)
    for index, pattern in enumerate(maps):
        expected = {
            "span": metrics.mean_attention_distance(pattern, batch.response_mask),
            "waad": metrics.windowed_attention_distance(pattern, batch.response_mask, 4),
            "fai": metrics.future_attention_influence(pattern, batch.response_mask, (2, 6)),
            "span_ignoring": metrics.mean_attention_distance_ignoring(pattern, first, batch.response_mask),
        }
        for name, values in expected.items():
            found = getattr(measured, name)[:, index]
            torch.testing.assert_close(found, values, equal_nan=True, rtol=2e-4, atol=2e-4)
        for name, keys in (("first", first), ("prompt", prompt)):
            share = metrics.attention_share(pattern, keys, batch.response_mask)
            torch.testing.assert_close(
                measured.share(name)[:, index], share, equal_nan=True, rtol=0, atol=1e-4
            )
    entropy = metrics.token_entropy(logits, batch.response_mask)
    torch.testing.assert_close(measured.entropy, entropy, equal_nan=True, rtol=2e-4, atol=2e-4)


def _check_value_norms(case: _Case) -> None:
    """FAI weighted by values is what it is in transformers, or is refused."""
    batch = TokenBatch.from_ids(case.arguments["input_ids"], response_start=_RESPONSE)
    asked: dict[str, Any] = {"horizon": (2, 6), "entropy": False, "value_weighted": True}
    try:
        found = measure(case.wrapped, batch, **asked)
    except UnsupportedModelError as refusal:
        # A backend may read densely what transformers shows whole.
        if adapter_for(case.wrapped).reads == "dense":
            return
        try:
            measure(case.reference, batch, **asked)
        except UnsupportedModelError as expected:
            assert str(refusal) == str(expected)  # noqa: PT017 - a check, not a pytest test
            return
        raise
    expected_fai = measure(case.reference, batch, **asked).fai
    torch.testing.assert_close(found.fai, expected_fai, equal_nan=True, rtol=2e-4, atol=2e-4)


def _check_tensor_sites(case: _Case) -> None:
    """Tensor sites hold what they hold in transformers, and replacing them has the same effect."""
    adapter = adapter_for(case.wrapped)
    layer = adapter.layers[len(adapter.layers) // 2]
    sites = [site for site in _TENSOR_SITES if site not in adapter.refused_sites]
    found, expected = _Collect(*sites, "logits"), _Collect(*sites, "logits")
    with attach(case.wrapped, found), attach(case.reference, expected):
        case.call_wrapped()
        case.call_reference()
    assert found.values.keys() == expected.values.keys()
    for key, values in expected.values.items():
        _assert_close(found.values[key], values, case.real, str(key))
    for site in sites:
        change = _Collect(site, "logits", change=lambda value: value.flip(-1) * 0.5)
        plain_change = _Collect(site, "logits", change=lambda value: value.flip(-1) * 0.5)
        with (
            attach(case.wrapped, change, layers=[layer]),
            attach(case.reference, plain_change, layers=[layer]),
        ):
            case.call_wrapped()
            case.call_reference()
        logits, plain = change.values["logits", None], plain_change.values["logits", None]
        _assert_close(logits, plain, case.real, f"logits after a change of {site}")
        assert float((logits - found.values["logits", None])[case.real].abs().max()) > 1e-3, site
    for site, reason in adapter.refused_sites.items():
        try:
            with attach(case.wrapped, _Collect(site)):
                raise AssertionError(f"{site} should be refused ({reason}), but was attached")
        except UnsupportedModelError as refusal:
            assert reason in str(refusal)  # noqa: PT017 - a check, not a pytest test


def _check_suppression(case: _Case) -> None:
    """Suppressing attention has the same effect on the logits as in transformers, or is refused."""
    adapter = adapter_for(case.wrapped)
    if adapter.reads == "dense":
        return
    layer = adapter.layers[-1]
    try:
        with suppress_attention(case.wrapped, layers=[layer]):
            pass
    except UnsupportedModelError:
        return
    unchanged = _Collect("logits")
    with attach(case.wrapped, unchanged):
        case.call_wrapped()
    for chosen in (
        {"keys": [8]},
        {"pairs": [(12, 12), (15, 9)], "heads": [1]},
        {"layers": [layer], "heads": [0, 2]},
    ):
        found, expected = _Collect("logits"), _Collect("logits")
        with suppress_attention(case.wrapped, **chosen), attach(case.wrapped, found):
            case.call_wrapped()
        with suppress_attention(case.reference, **chosen), attach(case.reference, expected):
            case.call_reference()
        logits = found.values["logits", None]
        _assert_close(logits, expected.values["logits", None], case.real, f"logits without {chosen}")
        assert float((logits - unchanged.values["logits", None])[case.real].abs().max()) > 1e-4, chosen


def _check_failing_probe(case: _Case) -> None:
    """An error inside a probe reaches the caller, and the next pass works."""

    class Failing(Probe):
        def observe(self, site: str, layer: int | None, value: Value, batch: TokenBatch) -> None:
            raise KeyError("an error of the probe")

    try:
        with attach(case.wrapped, Failing()):
            case.call_wrapped()
    except KeyError as error:
        assert "an error of the probe" in str(error)  # noqa: PT017 - as above
    else:
        raise AssertionError("an error inside a probe was swallowed")
    case.call_wrapped()


def _assert_close(found: Tensor, expected: Tensor, real: Tensor, name: str) -> None:
    assert found.shape == expected.shape, name
    scale = float(expected[real].abs().max())
    torch.testing.assert_close(
        found[real],
        expected[real],
        rtol=1e-4,
        atol=1e-4 * max(scale, 1.0),
        msg=lambda text: f"{name}: {text}",
    )


# ---- the model stays as it was ----------------------------------------------------------------


def model_state(model: Any) -> dict[str, Any]:
    """Return everything about a model that reading it could change."""
    modules = dict(model.named_modules())
    configs = {name: getattr(module, "config", None) for name, module in modules.items()}
    return {
        "class": type(model),
        "classes": {name: type(module) for name, module in modules.items()},
        "implementation": {
            name: getattr(config, "_attn_implementation_internal", None) for name, config in configs.items()
        },
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in modules.items()
        },
        "mode": {name: module.training for name, module in modules.items()},
        "forward": {name: vars(module).get("forward") for name, module in modules.items()},
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Check that two results of `model_state` are equal.

    Raises:
        AssertionError: they are not; the message names what differs.
    """
    for name in before:
        assert before[name].keys() == after[name].keys() if isinstance(before[name], dict) else True, name
        if name == "weights":
            changed = [key for key, value in before[name].items() if not torch.equal(value, after[name][key])]
            assert not changed, changed
        else:
            assert before[name] == after[name], name

"""The conformance suite of adapters: what every backend must do, as one line of pytest.

    from attnprobe.testing.conformance import conformance_test

    test_my_backend = conformance_test(MyWrapper)

gives a test for every family, side of padding and dtype: the same weights, read directly through
transformers, determine what the wrapped model must show. The oracle for attention is the maps that eager
attention returns; that for the other sites is the transformers adapter, whose own tests compare it with
hooks on named modules. What is left to others: the models and calls of a test (conformance_cases), whether a
model is as it was (model_state), and tests of what is particular to a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from attnprobe import metrics
from attnprobe.adapters import LAYER_SITES, adapter_for
from attnprobe.adapters.base import Value
from attnprobe.batch import TokenBatch
from attnprobe.errors import UnsupportedModelError
from attnprobe.head_statistics import HeadStatistics
from attnprobe.measurement import measure
from attnprobe.probe import Probe, attach
from attnprobe.statistics_probe import HeadStatisticsProbe
from attnprobe.suppression import suppress_attention
from attnprobe.testing.conformance_cases import (
    DTYPES,
    RESPONSE,
    SIDES,
    Case,
    Collect,
    Run,
    Wrap,
    eager_maps,
    prepared_case,
)
from attnprobe.testing.model_state import assert_same_state, model_state
from attnprobe.testing.tiny_models import FAMILIES

_TENSOR_SITES = tuple(site for site in LAYER_SITES if site not in ("attention", "value_norms"))


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
            case = prepared_case(wrap, family, side, dtype, run)
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
    _check(prepared_case(wrap, family, side, dtype, run))


# ---- the checks -------------------------------------------------------------------------------


def _check(case: Case) -> None:
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


def _check_layers(case: Case) -> None:
    adapter, reference = adapter_for(case.wrapped), adapter_for(case.reference)
    for name in ("layers", "skipped_layers", "vocabulary_size", "context_length", "refused_sites"):
        assert getattr(adapter, name) == getattr(reference, name), name


def _check_patterns(case: Case) -> None:
    """The patterns of the user's own padded call are those that eager attention returns."""
    maps = eager_maps(case.eager, **case.arguments)[0]
    probe = Collect("attention")
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


def _statistics(case: Case, examples: slice, columns: Tensor | None, start: Tensor) -> HeadStatistics:
    probe = HeadStatisticsProbe(window=4, horizon=(2, 6), receiver=True, entropy=False)
    width = case.real.shape[1] if columns is None else len(columns)
    response = torch.arange(width) >= start[examples, None]
    with attach(case.wrapped, probe, response_mask=response):
        case.call_wrapped(examples, columns)
    return probe.result()


def _check_examples_alone(case: Case) -> None:
    """Each example of the padded batch gives what it gives alone, in the user's own calls."""
    first = case.real.int().argmax(-1)
    together = _statistics(case, slice(None), None, first + RESPONSE)
    precise = case.precise
    # In bfloat16 the sums of a larger batch round differently, and later layers drift.
    layers = slice(None) if precise else slice(0, 1)
    tolerance = 2e-4 if precise else 0.3
    for example in range(case.real.shape[0]):
        kept = case.real[example].nonzero()[:, 0]
        alone = _statistics(case, slice(example, example + 1), kept, torch.full_like(first, RESPONSE))
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


def _check_measure(case: Case) -> None:
    """`measure` gives the metrics of the maps that eager attention returns, and the right entropy."""
    ids = case.arguments["input_ids"]
    batch = TokenBatch.from_ids(ids, response_start=RESPONSE)
    measured = measure(case.wrapped, batch, window=4, horizon=(2, 6), share_on=("first", "prompt"))
    prompt, first = batch.segment("prompt"), batch.segment("first")
    assert measured.waad.dtype == torch.float32
    assert measured.layers == adapter_for(case.reference).layers
    if not case.precise:
        return
    maps, logits = eager_maps(case.eager, input_ids=ids)
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


def _check_value_norms(case: Case) -> None:
    """FAI weighted by values is what it is in transformers, or is refused."""
    batch = TokenBatch.from_ids(case.arguments["input_ids"], response_start=RESPONSE)
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


def _check_tensor_sites(case: Case) -> None:
    """Tensor sites hold what they hold in transformers, and replacing them has the same effect."""
    adapter = adapter_for(case.wrapped)
    layer = adapter.layers[len(adapter.layers) // 2]
    sites = [site for site in _TENSOR_SITES if site not in adapter.refused_sites]
    found, expected = Collect(*sites, "logits"), Collect(*sites, "logits")
    with attach(case.wrapped, found), attach(case.reference, expected):
        case.call_wrapped()
        case.call_reference()
    assert found.values.keys() == expected.values.keys()
    for key, values in expected.values.items():
        _assert_close(found.values[key], values, case.real, str(key))
    for site in sites:
        change = Collect(site, "logits", change=lambda value: value.flip(-1) * 0.5)
        plain_change = Collect(site, "logits", change=lambda value: value.flip(-1) * 0.5)
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
            with attach(case.wrapped, Collect(site)):
                raise AssertionError(f"{site} should be refused ({reason}), but was attached")
        except UnsupportedModelError as refusal:
            assert reason in str(refusal)  # noqa: PT017 - a check, not a pytest test


def _check_suppression(case: Case) -> None:
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
    unchanged = Collect("logits")
    with attach(case.wrapped, unchanged):
        case.call_wrapped()
    for chosen in (
        {"keys": [8]},
        {"pairs": [(12, 12), (15, 9)], "heads": [1]},
        {"layers": [layer], "heads": [0, 2]},
    ):
        found, expected = Collect("logits"), Collect("logits")
        with suppress_attention(case.wrapped, **chosen), attach(case.wrapped, found):
            case.call_wrapped()
        with suppress_attention(case.reference, **chosen), attach(case.reference, expected):
            case.call_reference()
        logits = found.values["logits", None]
        _assert_close(logits, expected.values["logits", None], case.real, f"logits without {chosen}")
        assert float((logits - unchanged.values["logits", None])[case.real].abs().max()) > 1e-4, chosen


def _check_failing_probe(case: Case) -> None:
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

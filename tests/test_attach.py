"""What `attach` takes: probes, layers and masks in any usual form, checked when it is called."""

from __future__ import annotations

import gc
import warnings
from contextlib import ExitStack

import numpy
import pytest
import torch

import attnprobe
from attnprobe.adapters import adapter_for
from attnprobe.adapters.base import resolve_layers
from attnprobe.errors import AttnprobeError, ParameterError
from attnprobe.testing.model_state import assert_same_state, model_state
from attnprobe.testing.tiny_models import tiny_model

IDS = torch.arange(1, 9).view(2, 4)


class Probe(attnprobe.Probe):
    """Keeps the response mask of each pass."""

    def __init__(self) -> None:
        self.masks: list[torch.Tensor] = []

    def observe(self, site, layer, value, batch) -> None:
        pass

    def end(self, batch) -> None:
        self.masks.append(batch.response_mask)


class NamesOneSite(Probe):
    sites = "attention"


class HasNoSites:
    def begin(self, batch) -> None: ...
    def observe(self, site, layer, value, batch) -> None: ...
    def end(self, batch) -> None: ...
    def abort(self) -> None: ...


@pytest.mark.parametrize(
    ("probes", "message"),
    [
        ((), "at least one probe"),
        ((attnprobe.HeadStatisticsProbe,), r"HeadStatisticsProbe is a class.*HeadStatisticsProbe\(\.\.\.\)"),
        (([Probe()],), "one by one.*not a list"),
        ((Probe(), (Probe(),)), "one by one.*not a tuple"),
        (("attention",), "got 'attention', a str, which has no begin"),
        ((None,), "got None, a NoneType"),
        ((HasNoSites(),), "a HasNoSites, which has no sites"),
        ((NamesOneSite(),), "NamesOneSite must be a set of names.*got 'attention'"),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_what_is_not_a_probe_is_refused_at_the_call(probes: tuple, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        attnprobe.attach(tiny_model("llama"), *probes)


@pytest.mark.usefixtures("as_users_call")
def test_anything_with_the_methods_of_a_probe_is_one() -> None:
    class Own(HasNoSites):
        sites = ("attention",)

    with attnprobe.attach(tiny_model("llama"), Own()) as attached:
        assert attached.layers == (0, 1, 2)


# ---- layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", (0, 1, 2)),
        (1, (1,)),
        (numpy.int64(1), (1,)),
        (torch.tensor(1), (1,)),
        (range(2), (0, 1)),
        ([2, 0, 2], (0, 2)),
        ((1, 2), (1, 2)),
        ({2, 1}, (1, 2)),
        ([numpy.int64(2), torch.tensor(0)], (0, 2)),
        (numpy.array([0, 2]), (0, 2)),
        (numpy.array(2), (2,)),
        (torch.tensor([2, 1]), (1, 2)),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_layers_come_in_any_usual_form(layers, expected: tuple[int, ...]) -> None:
    chosen = resolve_layers(layers, adapter_for(tiny_model("llama")))
    assert chosen == expected
    assert all(type(layer) is int for layer in chosen)


@pytest.mark.parametrize(
    ("layers", "got"),
    [
        ("x", "'x'"),
        (None, "None"),
        (True, "True"),
        ([True, False], "True"),
        (torch.tensor([True, False, True]), "True"),
        (1.0, "1.0"),
        ([0, 1.5], "1.5"),
        (torch.ones(2), "1.0"),
        (numpy.ones((2, 2), dtype=int), r".*int64 array \[2, 2\]"),
        (torch.ones(1, 1, dtype=torch.long), r".*int64 tensor \[1, 1\]"),
        ([[0], [1]], r"\[0\]"),
        ([0, "1"], "'1'"),
        ([0, None], "None"),
        (-1, "-1"),
        ([0, -1], "-1"),
        ([], "none"),
        (range(0), "none"),
        ({0: 1}, "{0: 1}"),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_what_is_no_layer_is_refused_at_the_call(layers, got: str) -> None:
    with pytest.raises(ParameterError, match=rf"layers .*all.*middle.* got {got}"):
        attnprobe.attach(tiny_model("llama"), Probe(), layers=layers)


# ---- the response mask --------------------------------------------------------------------------

MASK = [[0, 1, 1, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    "mask",
    [
        MASK,
        torch.tensor(MASK),
        torch.tensor(MASK).bool(),
        torch.tensor(MASK).float(),
        torch.tensor(MASK, dtype=torch.uint8),
        numpy.array(MASK),
        numpy.array(MASK, dtype=bool),
        [[bool(entry) for entry in row] for row in MASK],
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_a_response_mask_comes_in_any_usual_form(mask) -> None:
    model, probe = tiny_model("llama"), Probe()
    with attnprobe.attach(model, probe, response_mask=mask), torch.no_grad():
        model(IDS)
    assert torch.equal(probe.masks[0], torch.tensor(MASK).bool())


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        ([[0.0, float("nan")]], "nan"),
        ([[0.5, 1.0]], "0.5"),
        ([[0, 2]], "2"),
        ([[0, -1]], "-1"),
        ("mask", "'mask'"),
        ([[0, 1], [1]], r"\[\[0, 1\], \[1\]\]"),
        (torch.ones(1, 2, 3), r"\[1, 2, 3\]"),
        (1, r"\[\]"),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_a_mask_of_other_numbers_is_refused_at_the_call(mask, got: str) -> None:
    with pytest.raises(ParameterError, match=rf"response_mask.* got {got}"):
        attnprobe.attach(tiny_model("llama"), Probe(), response_mask=mask)


# ---- without `with` -----------------------------------------------------------------------------


def test_a_forgotten_with_is_told() -> None:
    """Nothing is attached before the block opens: whoever forgets it would get no numbers, and no error."""
    model, probe = tiny_model("llama"), Probe()
    before = model_state(model)
    attached = attnprobe.attach(model, probe)
    assert_same_state(before, model_state(model))
    with torch.no_grad():
        model(IDS)
    assert probe.masks == []
    for name in ("layers", "adapter", "skipped_layers"):
        with pytest.raises(AttnprobeError, match=rf"no {name}.*with attach\(\.\.\.\) as"):
            getattr(attached, name)
    assert not hasattr(attached, "anything")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        del attached
        gc.collect()
    assert ["never opened" in str(warning.message) for warning in told] == [True]


def test_a_block_opens_once() -> None:
    model, probe = tiny_model("llama"), Probe()
    block = attnprobe.attach(model, probe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ExitStack() as stack, torch.no_grad():
            assert stack.enter_context(block).layers == (0, 1, 2)
            model(IDS)
        assert len(probe.masks) == 1
        with pytest.raises(AttnprobeError, match=r"attach\(\.\.\.\) was opened before"), block:
            pass
        del block
        gc.collect()

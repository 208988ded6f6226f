"""The transformers adapter conforms, and the suite catches adapters that do not."""

from __future__ import annotations

import pytest
import torch

import attnprobe
from attnprobe.adapters.transformers import TransformersAdapter
from attnprobe.attention.operator import DenseAttention
from attnprobe.errors import IncompleteRunError
from attnprobe.testing.backends import in_transformers
from attnprobe.testing.conformance import check_conformance, conformance_test

test_transformers = conformance_test(in_transformers)


class Wrapper:
    """A stand-in for a third party's model class, around a transformers model."""

    def __init__(self, model) -> None:
        self.model = model

    def __call__(self, input_ids, **arguments):
        return self.model(input_ids, **arguments)


class WrapperAdapter(TransformersAdapter):
    backend = "mine"

    def __init__(self, wrapper: Wrapper) -> None:
        super().__init__(wrapper.model)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch):
    """Register adapters for as long as a test lasts."""
    from attnprobe import adapters

    monkeypatch.setattr(adapters, "_adapters", dict(adapters._adapters))

    def registered(adapter) -> None:
        attnprobe.register_adapter(f"{__name__.partition('.')[0]}.Wrapper", adapter)

    return registered


@pytest.mark.parametrize("family", ["llama", "qwen3_next", "bloom"])
def test_a_third_party_adapter_passes(family: str, register) -> None:
    register(WrapperAdapter)
    check_conformance(Wrapper, family)


class Shifted(WrapperAdapter):
    """Shows every pattern with its heads in another order."""

    def observed(self, observer, sites, layers):
        return super().observed(_Changing(observer, self), sites, layers)

    def change(self, site, layer, value):
        if isinstance(value, attnprobe.Attention):
            return DenseAttention(value.rows(torch.arange(value.query_count)).flip(1))
        return value


class Deaf(WrapperAdapter):
    """Does not put anything in a site's place."""

    def observed(self, observer, sites, layers):
        return super().observed(_Changing(observer, self, replaces=False), sites, layers)

    def change(self, site, layer, value):
        return value


class Swapped(WrapperAdapter):
    """Shows a layer's output at the feed-forward module's site."""

    def observed(self, observer, sites, layers):
        return super().observed(_Changing(observer, self), sites, layers)

    def change(self, site, layer, value):
        return value * 1.01 if site == "mlp_output" else value


class Leaky(WrapperAdapter):
    """Leaves a hook behind."""

    def observed(self, observer, sites, layers):
        self.model.register_forward_hook(lambda *_: None)
        return super().observed(observer, sites, layers)


class Incomplete(WrapperAdapter):
    """Watches a layer less than it was asked for."""

    def observed(self, observer, sites, layers):
        return super().observed(observer, sites, layers[1:])


class _Changing:
    """An observer that is told something else."""

    def __init__(self, observer, adapter, replaces: bool = True) -> None:
        self._observer, self._adapter, self._replaces = observer, adapter, replaces

    def begin(self, batch, cached, cache=None) -> None:
        self._observer.begin(batch, cached, cache)

    def skip(self, site) -> None:
        self._observer.skip(site)

    def observe(self, site, layer, value):
        replaced = self._observer.observe(site, layer, self._adapter.change(site, layer, value))
        return replaced if self._replaces else None

    def end(self) -> None:
        self._observer.end()

    def abort(self) -> None:
        self._observer.abort()


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Shifted, "Tensor-likes are not close"),
        (Deaf, "logits after a change of layer_input"),
        (Swapped, "mlp_output"),
        (Leaky, "hooks"),
    ],
)
def test_an_adapter_with_a_fault_fails(adapter, message: str, register) -> None:
    register(adapter)
    with pytest.raises(AssertionError, match=message):
        check_conformance(Wrapper, "llama")


def test_an_adapter_that_misses_a_layer_fails(register) -> None:
    register(Incomplete)
    with pytest.raises(IncompleteRunError, match=r"layers \[0\] were silent .* through mine"):
        check_conformance(Wrapper, "llama")


def test_a_backend_that_cannot_suppress_says_so(register) -> None:
    from attnprobe.adapters import Adapter
    from attnprobe.testing.tiny_models import tiny_model

    class Plain(WrapperAdapter):
        suppressed = Adapter.suppressed

    register(Plain)
    with (
        pytest.raises(attnprobe.UnsupportedModelError, match="the mine adapter cannot suppress attention"),
        attnprobe.suppress_attention(Wrapper(tiny_model("llama")), keys=[1]),
    ):
        pass

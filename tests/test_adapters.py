"""Choosing an adapter by class, registering others, and models that several threads share."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import attnprobe
from attnprobe import adapters
from attnprobe.adapters import adapter_for
from attnprobe.adapters.base import display_name, evaluation_mode
from attnprobe.adapters.transformers import TransformersAdapter
from attnprobe.errors import AttnprobeError, ParameterError
from attnprobe.testing.backends import BACKENDS
from attnprobe.testing.model_state import assert_same_state, model_state
from attnprobe.testing.tiny_models import tiny_model

PACKAGE = __name__.partition(".")[0]


class Wrapper:
    def __init__(self, model) -> None:
        self.model = model


class Special(Wrapper):
    pass


def unwrapping(wrapper: Wrapper) -> TransformersAdapter:
    return TransformersAdapter(wrapper.model)


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers ends with it."""
    monkeypatch.setattr(adapters, "_adapters", dict(adapters._adapters))


@pytest.mark.parametrize("adapter", [unwrapping, f"{PACKAGE}:unwrapping"])
def test_a_registered_adapter_is_used_for_subclasses_too(adapter) -> None:
    attnprobe.register_adapter(f"{PACKAGE}.Wrapper", adapter)
    batch = attnprobe.TokenBatch.from_ids([[1, 2, 3, 4]])
    expected = attnprobe.measure(tiny_model("llama"), batch)
    for wrapper in (Wrapper, Special):
        assert torch.equal(attnprobe.measure(wrapper(tiny_model("llama")), batch).span, expected.span)


def test_the_nearest_class_counts() -> None:
    class Own(TransformersAdapter):
        backend = "special"

    attnprobe.register_adapter(f"{PACKAGE}.Wrapper", unwrapping)
    attnprobe.register_adapter(f"{PACKAGE}.Special", lambda wrapper: Own(wrapper.model))
    assert adapter_for(Special(tiny_model("llama"))).backend == "special"
    assert adapter_for(Wrapper(tiny_model("llama"))).backend == "transformers"


def test_an_adapter_is_returned_as_it_is() -> None:
    adapter = adapter_for(tiny_model("llama"))
    assert adapter_for(adapter) is adapter


@pytest.mark.parametrize(
    ("model_class", "adapter", "message"),
    [
        ("Wrapper", unwrapping, r"\"package\.ClassName\".*got 'Wrapper'"),
        ("package.module.Wrapper", unwrapping, "top-level package only"),
        ("package.Wrapper", "package.MyAdapter", "\"module:name\"; got 'package.MyAdapter'"),
        ("package.Wrapper", 3, "a class, a function or a name; got 3"),
    ],
)
@pytest.mark.usefixtures("as_users_call")
def test_registrations_of_another_form_are_refused(model_class, adapter, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        attnprobe.register_adapter(model_class, adapter)


def test_what_is_registered_must_exist_and_be_an_adapter() -> None:
    attnprobe.register_adapter(f"{PACKAGE}.Wrapper", "no_such_module:MyAdapter")
    with pytest.raises(AttnprobeError, match=r"no_such_module:MyAdapter cannot be imported: No module"):
        adapter_for(Wrapper(None))
    attnprobe.register_adapter(f"{PACKAGE}.Wrapper", lambda wrapper: wrapper.model)
    with pytest.raises(AttnprobeError, match="registered for Wrapper gave a dict, not an Adapter"):
        adapter_for(Wrapper({}))


def test_an_entry_point_is_found(tmp_path: Path) -> None:
    """An installed package adds its adapter without being imported before a model of it is there."""
    (tmp_path / "my_backend.py").write_text(
        "from attnprobe.adapters.transformers import TransformersAdapter\n"
        "class Wrapper:\n"
        "    def __init__(self, model): self.model = model\n"
        "class MyAdapter(TransformersAdapter):\n"
        "    backend = 'mine'\n"
        "    def __init__(self, wrapper): super().__init__(wrapper.model)\n"
    )
    information = tmp_path / "my_backend-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: my-backend\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[attnprobe.adapters]\nmy_backend.Wrapper = my_backend:MyAdapter\n"
    )
    code = (
        "import sys, attnprobe\n"
        "from attnprobe.testing.tiny_models import tiny_model\n"
        "model = tiny_model('llama')\n"
        "assert attnprobe.adapter_for(model).backend == 'transformers'\n"
        "assert 'my_backend' not in sys.modules\n"
        "from my_backend import Wrapper\n"
        "print(attnprobe.adapter_for(Wrapper(model)).backend)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert found.stdout.strip() == "mine"


def test_choosing_an_adapter_imports_no_backend() -> None:
    code = (
        "import sys, attnprobe\n"
        "from attnprobe.testing.tiny_models import tiny_model\n"
        "attnprobe.measure(tiny_model('llama'), attnprobe.TokenBatch.from_ids([[1, 2, 3]]))\n"
        "print([name for name in ('transformer_lens', 'nnsight') if name in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# ---- a model's name and mode --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("organisation/model", "organisation/model"),
        ("/home/someone/models/tiny", "tiny"),
        ("/home/someone/models/tiny/", "tiny"),
        ("runs/step-10", "step-10"),
        ("./runs/not-there-yet", "not-there-yet"),
        ("~/models/tiny", "tiny"),
        ("/", "LlamaForCausalLM"),
        ("", "LlamaForCausalLM"),
        (None, "LlamaForCausalLM"),
    ],
)
def test_a_model_is_never_shown_by_a_path(
    name: str | None, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results travel to other machines, where a path means nothing and says too much."""
    (tmp_path / "runs" / "step-10").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    model.config._name_or_path = name
    assert display_name(model) == shown
    assert adapter_for(model).model_name == shown


def test_every_module_gets_its_own_mode_back() -> None:
    """Also where a part was in another mode than the whole, and after an error."""
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    inside: list[bool] = []

    def failing() -> None:
        with evaluation_mode(model.modules()):
            inside.extend(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert inside == [False] * len(before)
    assert [module.training for module in model.modules()] == before


# ---- threads ------------------------------------------------------------------------------------


def test_contexts_of_two_threads_may_close_in_any_order() -> None:
    """The attention implementation comes back when the last of them closes, not before."""
    model = tiny_model("llama")
    before = model_state(model)
    first_open, second_open = threading.Event(), threading.Event()
    probe = attnprobe.HeadStatisticsProbe(entropy=False)

    def first() -> None:
        with attnprobe.attach(model, attnprobe.HeadStatisticsProbe(entropy=False)):
            first_open.set()
            second_open.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    first_open.wait(10)
    with torch.no_grad(), attnprobe.attach(model, probe):
        second_open.set()
        thread.join()
        model(torch.tensor([[1, 2, 3]]))
    assert probe.result().span.shape == (1, 3, 4)
    assert_same_state(before, model_state(model))


def test_a_pass_of_another_thread_is_not_taken_for_ones_own() -> None:
    """Whoever comes second into a model that is being watched gets an error, not the other's numbers."""
    model = tiny_model("llama")
    errors = []

    def other() -> None:
        try:
            attnprobe.measure(model, attnprobe.TokenBatch.from_ids([[1, 2, 3]]))
        except AttnprobeError as error:
            errors.append(str(error))

    with torch.no_grad(), attnprobe.attach(model, attnprobe.HeadStatisticsProbe()) as _:
        model(torch.tensor([[1, 2]]))
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        model(torch.tensor([[1, 2]]))
    assert len(errors) == 1
    assert "runs in two threads" in errors[0]
    attnprobe.measure(model, attnprobe.TokenBatch.from_ids([[1, 2, 3]]))


# ---- a real model -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_backends_agree_on_a_real_model(smollm2) -> None:
    """SmolLM2 through every backend: the same statistics, to float precision."""
    text = "A farmer has 12 apples. She gives 5 away, and buys 3 more. So she has 12 - 5 + 3 = 10 apples."
    ids = smollm2.tokenizer(text, return_tensors="pt")["input_ids"]
    batch = attnprobe.TokenBatch.from_ids(ids, response_start=8)
    results = {}
    for name, wrap in BACKENDS.items():
        # A bridge changes the model that it is put around.
        wrapped = wrap(copy.deepcopy(smollm2.model))
        results[name] = attnprobe.measure(wrapped, batch, layers="middle", horizon=(2, 8))
        del wrapped
    expected = results.pop("transformers")
    for name, result in results.items():
        for field in ("span", "waad", "fai", "entropy"):
            torch.testing.assert_close(
                getattr(result, field),
                getattr(expected, field),
                rtol=1e-4,
                atol=1e-4,
                equal_nan=True,
                msg=lambda message, name=name, field=field: f"{name}, {field}: {message}",
            )

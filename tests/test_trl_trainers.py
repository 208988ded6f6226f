"""All trainers of trl, experimental ones too: to which credit can be attached, and why not to the others.

They are found by walking through the package, so that a new version's new trainers are found as well.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
import trl
from trl import GRPOTrainer, RLOOTrainer

from attnprobe import TrainerError
from attnprobe.rl import CoupledRhythmCredit, attach_credit
from attnprobe.testing.tiny_models import tiny_model
from attnprobe.testing.tiny_trainers import tiny_trainer

HORIZON = (1, 4)
CREDIT = CoupledRhythmCredit(amplification=3.0)
SUPPORTED = (GRPOTrainer, RLOOTrainer)
# All but the first two in older versions only.
ROUTES = {
    "GMPOTrainer": "gradient",
    "GRPOTrainer": "advantages",  # GSPO with the gradients of tokens
    "DPPOTrainer": "advantages",
    "GRPOWithReplayBufferTrainer": "advantages",
    "MiniLLMTrainer": "gradient",
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@cache
def trainers() -> dict[str, type]:
    """Return the trainers that can be imported here, by module and name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import trl.experimental as experimental

        modules = [trl.trainer]
        for info in pkgutil.iter_modules(experimental.__path__, "trl.experimental."):
            try:
                modules.append(importlib.import_module(info.name))
            except ImportError:  # It needs a package that is not installed.
                continue
        found = {}
        for module in modules:
            for name in dir(module):
                each = getattr(module, name, None) if name.endswith("Trainer") else None
                if inspect.isclass(each) and each.__module__.startswith("trl."):
                    found[f"{each.__module__}.{name}"] = each
    return found


def test_every_other_trainer_is_refused_with_a_reason(as_users_call) -> None:
    others = {name: each for name, each in trainers().items() if not issubclass(each, SUPPORTED)}
    assert {"SFTTrainer", "DPOTrainer", "A2POTrainer"} <= {each.__name__ for each in others.values()}
    for name, each in others.items():
        with pytest.raises(TrainerError) as caught:
            attach_credit(each.__new__(each), CREDIT)
        _, colon, why = str(caught.value).partition(f"{each.__name__}: ")
        assert colon, f"{name} is refused without a reason"
        assert len(why) > 10


@pytest.mark.parametrize(
    "name", sorted(name for name, each in trainers().items() if issubclass(each, SUPPORTED))
)
def test_credit_changes_what_a_supported_trainer_learns(name, tmp_path) -> None:
    """With an amplification of 1 nothing changes, and with 3 something does."""
    trainer_class, ends = trainers()[name], []
    for amplification in (None, 1.0, 3.0):
        options = {}
        if trainer_class.__name__ == "MiniLLMTrainer":
            options["teacher_model"] = tiny_model("llama", vocab_size=300)
        trainer = tiny_trainer(trainer_class, tmp_path, options=options)
        if amplification is not None:
            credit = CoupledRhythmCredit(amplification=amplification)
            handle = attach_credit(trainer, credit, horizon=HORIZON)
            expected = "gradient" if trainer_class is RLOOTrainer else ROUTES[trainer_class.__name__]
            assert handle.route == expected
        trainer.train()
        ends.append([p.detach().clone() for p in trainer.model.parameters()])
    stock, ones, more = ends
    assert all(torch.equal(a, b) for a, b in zip(stock, ones, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(stock, more, strict=True))


def test_the_documentation_names_them_all() -> None:
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    missing = {each.__name__ for each in trainers().values() if f"`{each.__name__}`" not in page}
    assert missing == set()

"""What a checkpoint of a PPO run holds, and the check that a resumed run is still the same run.

`PPO.train` calls `state_of` to save and `restore` to resume. Resuming with another setting, strategy, end
token or model is refused, since the result would be neither the old run nor a new one. What is left to
others: where and when files are written (run_folder, algorithm).
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from attnprobe.adapters.base import display_name
from attnprobe.errors import ResultError
from attnprobe.rl.scoring import bare_policy

FREE = ("steps", "checkpoint_every")
"""Settings that a resumed run may change: it is still the same run, only longer or saved more often."""


def state_of(ppo: Any) -> dict[str, Any]:
    """Return everything that the next step of a `PPO` depends on."""
    return {
        "step": ppo.step,
        "identity": identity_of(ppo),
        "model": ppo.model.state_dict(),
        "reference": None if ppo.reference is None else ppo.reference.state_dict(),
        "optimizer": ppo.optimizer.state_dict(),
        "generator": ppo.generator.get_state(),
        "grouping": None if ppo.credit is None else ppo.credit.grouping.attributes(),
    }


def restore(ppo: Any, state: dict[str, Any]) -> None:
    """Make a `PPO` continue from what `state_of` returned.

    Raises:
        ResultError: a state of a run with different settings, credit, end tokens or model; it says which.
    """
    if missing := [name for name in state_of(ppo) if name not in state]:
        raise ResultError(
            f"the checkpoint has no {', '.join(missing)}: another version of attnprobe wrote it"
        )
    saved, ours = state["identity"], identity_of(ppo)
    if differing := [name for name in {**saved, **ours} if saved.get(name) != ours.get(name)]:
        told = ", ".join(f"{name}={saved.get(name)} (not {ours.get(name)})" for name in sorted(differing))
        raise ResultError(f"the run to resume has {told}: use the same, or start another run")
    ppo.step = state["step"]
    ppo.model.load_state_dict(state["model"])
    ppo.optimizer.load_state_dict(state["optimizer"])
    ppo.generator.set_state(state["generator"])
    if ppo.reference is not None:
        ppo.reference.load_state_dict(state["reference"])
    if ppo.credit is not None:
        ppo.credit.grouping.restore(state["grouping"])


def identity_of(ppo: Any) -> dict[str, str]:
    """Return what identifies a `PPO` run, as text by name."""
    config = {name: repr(value) for name, value in dataclasses.asdict(ppo.config).items() if name not in FREE}
    credit = {"credit": "None"} if ppo.credit is None else ppo.credit.settings()
    policy = bare_policy(ppo.model.policy)
    shapes = [(name, tuple(value.shape)) for name, value in ppo.model.state_dict().items()]
    digest = hashlib.blake2b(repr(shapes).encode(), digest_size=6).hexdigest()
    return {
        **config,
        **credit,
        "ends": repr(sorted(ppo.ends)),
        "model": f"{type(policy).__name__} {display_name(policy)}",
        "parameters": f"{len(shapes)} tensors, shapes {digest}",
    }

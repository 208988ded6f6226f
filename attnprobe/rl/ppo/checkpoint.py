"""What a checkpoint of a PPO run holds, and the check that a resumed run is still the same run.

`PPO.train` calls `state_of` to save and `restore` to resume. Resuming with another setting, strategy, end
token, problem or model is refused, since the result would be neither the old run nor a new one. What is left
to others: what makes a run the same (identity), and where and when files are written (run_folder,
algorithm).
"""

from __future__ import annotations

from typing import Any

from attnprobe.errors import ResultError
from attnprobe.rl.ppo.identity import differences


def state_of(ppo: Any) -> dict[str, Any]:
    """Return everything that the next step of a `PPO` depends on."""
    return {
        "step": ppo.step,
        "identity": ppo.identity,
        "model": ppo.model.state_dict(),
        "reference": None if ppo.reference is None else ppo.reference.state_dict(),
        "optimizer": ppo.optimizer.state_dict(),
        "generator": ppo.generator.get_state(),
        "credit": None if ppo.credit is None else ppo.credit.state_dict(),
    }


def restore(ppo: Any, state: dict[str, Any]) -> None:
    """Make a `PPO` continue from what `state_of` returned.

    Raises:
        ResultError: a state of a run with different settings, credit, end tokens, problems or model; it says
            what differs.
    """
    missing = [name for name in state_of(ppo) if name not in state]
    missing += [name for name in ppo.identity if "identity" in state and name not in state["identity"]]
    if missing:
        raise ResultError(
            f"the checkpoint has no {', '.join(missing)}: another version of attnprobe wrote it"
        )
    if told := differences(state["identity"], ppo.identity):
        raise ResultError(
            f"the run to resume has {', '.join(told)}: use the same, or start another run in another folder"
        )
    ppo.step = state["step"]
    ppo.model.load_state_dict(state["model"])
    ppo.optimizer.load_state_dict(state["optimizer"])
    ppo.generator.set_state(state["generator"])
    if ppo.reference is not None:
        ppo.reference.load_state_dict(state["reference"])
    if ppo.credit is not None:
        ppo.credit.load_state_dict(state["credit"])

"""An engine that writes what it was given and what came of it to files, so that a test can do it again.

It takes the place of `CreditEngine` if `ATTNPROBE_RIG_RECORD` names a folder. The test that reads the files
says what has to be equal.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from verl.workers.engine.base import EngineRegistry

from attnprobe.rl.verl.engine import CreditEngine

FOLDER = "ATTNPROBE_RIG_RECORD"


class RecordingEngine(CreditEngine):
    """Writes each update: its rows and loss before, and the parameters after."""

    def initialize(self) -> None:
        super().initialize()
        self._updates = 0
        if not self.engine_config.forward_only:
            self._write(
                "configs",
                {
                    name: getattr(self, name)
                    for name in ("model_config", "engine_config", "optimizer_config", "checkpoint_config")
                },
            )

    def infer_batch(self, data: Any, loss_function: Any = None) -> Any:
        output = super().infer_batch(data, loss_function)
        if self._credit is not None and not self._adapter_is_off and self._rollouts == 1:
            self._write(
                "rollout", {"rows": data, "groups": self._credit.groups, "found": output["model_output"]}
            )
        return output

    def train_batch(self, data: Any, loss_function: Any) -> Any:
        before = {"rows": data.copy(), "loss": loss_function}
        output = super().train_batch(data, loss_function)
        state = self.module.state_dict()
        whole = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in state.items()
        }
        self._write(
            f"update{self._updates}", before | {"after": {key: v.clone() for key, v in whole.items()}}
        )
        self._updates += 1
        return output

    def _write(self, name: str, content: Any) -> None:
        torch.save(content, Path(os.environ[FOLDER], f"{name}-rank{self.rank}.pt"))


def register() -> None:
    """Put the engine in the place of `CreditEngine`."""
    EngineRegistry._engines["language_model"]["fsdp2"][("cpu", "attnprobe")] = RecordingEngine

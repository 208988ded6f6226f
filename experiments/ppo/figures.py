"""Learning curves as a picture, for both commands. What is left to others: the runs (`__main__`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from experiments.ppo.task import CHANCE

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = {"gae": "#1f6fad", "group": "#008a6e", "trl": "#c8590c"}
LABELS = {"gae": "PPO, value head and GAE", "group": "PPO, groups (Eq. 6)", "trl": "TRL, GRPOTrainer"}


def draw_curves(runs: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the reward of each run over its steps: thin lines for the seeds, a thick one for their mean."""
    figure, axis = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for name in dict.fromkeys(run["name"] for run in runs):
        curves = [run["reward"] for run in runs if run["name"] == name]
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        steps = range(1, len(mean) + 1)
        for curve in curves:
            axis.plot(steps, curve, color=COLOURS[name], linewidth=0.6, alpha=0.5)
        axis.plot(
            steps, mean, color=COLOURS[name], linewidth=2, label=f"{LABELS[name]} ({len(curves)} seeds)"
        )
    axis.axhline(CHANCE, color="#6b6b6b", linestyle=":", label="a policy that draws at random")
    axis.axhline(0.9, color="#6b6b6b", linestyle="--", linewidth=0.8)
    axis.set_xlabel("step")
    axis.set_ylabel("mean reward (at most 1)")
    axis.set_ylim(0, 1.02)
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right", fontsize=8)
    axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

"""Does the reference PPO learn, and how does it compare with TRL's GRPOTrainer?

    python -m experiments.ppo learn      # three seeds, GAE and groups: about 15 minutes on two cores
    python -m experiments.ppo compare    # three seeds, ours and TRL's in turn: about as long again

Both write what each run did (JSON) and a picture of the curves. Finished runs are kept, so that an
interruption costs at most one run. What is left to others: the task (task), TRL's side (trl_run), pictures
(figures).
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from attnprobe.rl import PPO, PPOConfig
from experiments.ppo import figures, trl_run
from experiments.ppo.task import LENGTH, build_policy, build_problems, reward

RESULTS = Path(__file__).parent / "results"
STEPS, SEEDS = 150, 3
LAST = 10
"""A run's final reward is the mean over this many last steps."""

SETTINGS: dict[str, dict[str, Any]] = {
    "gae": {
        "estimator": "gae",
        "prompts_per_step": 512,
        "group_size": 1,
        "epochs": 2,
        "vf_coef": 5.0,  # rewards vary little: with 0.5, learning takes half as many steps again
    },
    "group": {"estimator": "group", "prompts_per_step": 64, "group_size": 8, "epochs": 1},
}
"""512 completions per step with either estimator."""

app = typer.Typer(add_completion=False, help=__doc__)
out = Console()

Steps = Annotated[int, typer.Option(help="Steps of a run.")]
Seeds = Annotated[int, typer.Option(help="Runs of each kind.")]
Output = Annotated[Path, typer.Option(help="The folder for results.")]


def config_of(name: str, steps: int, seed: int) -> PPOConfig:
    """Return the hyper-parameters; those in `SETTINGS` depend on the estimator."""
    return PPOConfig(
        steps=steps,
        minibatch_size=128,
        max_new_tokens=LENGTH + 1,
        learning_rate=3e-4,
        ent_coef=0.05,
        seed=seed,
        **SETTINGS[name],
    )


def train(config: PPOConfig) -> list[dict[str, Any]]:
    """Train with our own PPO and return the metrics of each step."""
    return PPO(build_policy(config.seed), build_problems(config.seed), reward, config).train(progress=True)


@app.command()
def learn(steps: Steps = STEPS, seeds: Seeds = SEEDS, output: Output = RESULTS) -> None:
    """Train with both estimators, from random weights."""
    runs = [
        kept(output, name, f"{name}-{seed}", train, config_of(name, steps, seed))
        for seed in range(seeds)
        for name in SETTINGS
    ]
    out.print(table(runs))
    figures.draw_curves(runs, f"Sorting {LENGTH} digits, a million parameters", output / "learn.png")


@app.command()
def compare(steps: Steps = STEPS, seeds: Seeds = SEEDS, output: Output = RESULTS) -> None:
    """Train with groups, ours and TRL's in turn, so that both run under the same conditions."""
    runs = []
    for seed in range(seeds):
        config = config_of("group", steps, seed)
        runs.append(kept(output, "group", f"compare-group-{seed}", train, config))
        runs.append(kept(output, "trl", f"compare-trl-{seed}", trl_run.train, config))
    out.print(table(runs))
    ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in zip(runs[::2], runs[1::2], strict=True)]
    out.print(f"seconds per step, ours / TRL's: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    figures.draw_curves(runs, "The same run by this PPO and by TRL", output / "compare.png")


def kept(
    output: Path, name: str, key: str, run: Callable[[PPOConfig], list[dict[str, Any]]], config: PPOConfig
) -> dict[str, Any]:
    """Return what a run did, from its file if it was already done with these settings."""
    path = output / f"{key}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    settings = dataclasses.asdict(config)
    if found.get("config") != settings:
        history = run(config)
        found = {
            "name": name,
            "threads": torch.get_num_threads(),
            "seconds": statistics.median(entry["seconds"] for entry in history),
            "reward": [round(entry["reward"], 4) for entry in history],
            "config": settings,
        }
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found) + "\n")
    return found


def table(runs: list[dict[str, Any]]) -> Table:
    """Return a table of where each run began and ended."""
    shown = Table()
    for column in (
        "run",
        "first reward",
        f"mean of the last {LAST}",
        "first step above 0.9",
        "seconds per step",
    ):
        shown.add_column(column, justify="right" if column != "run" else "left")
    for run in runs:
        curve = run["reward"]
        above = next((str(step) for step, value in enumerate(curve, 1) if value > 0.9), "never")
        final = statistics.mean(curve[-LAST:])
        shown.add_row(run["name"], f"{curve[0]:.3f}", f"{final:.3f}", above, f"{run['seconds']:.2f}")
    return shown


if __name__ == "__main__":
    app()

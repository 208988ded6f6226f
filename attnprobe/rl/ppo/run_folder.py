"""RunFolder: what a training run leaves on disk, written so that an interruption loses nothing.

`PPO.train` opens one for each run. `metrics.jsonl` has a line for each step, written immediately; TensorBoard
gets the same numbers if it is installed. `checkpoint.pt` is always replaced as a whole. What is left to
others: what is logged (algorithm) and what a checkpoint holds (checkpoint).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from attnprobe.errors import ParameterError, ResultError
from attnprobe.validation import brief


class RunFolder:
    """A folder for one run; with `None`, nothing is written.

    Args:
        folder: its path; it is created if it does not exist.
        resume: whether to continue from the folder's checkpoint, if it has one. Lines of steps after the
            checkpoint, which are run again, move to `metrics.dropped.jsonl`.

    Attributes:
        history: the metrics of the steps up to the checkpoint.
        state: what the checkpoint holds; None if the run starts from the beginning.

    Raises:
        ParameterError: a folder that is not a path.
        ResultError: a folder that cannot be created, one that already holds a run without `resume`, or a
            damaged checkpoint.
    """

    def __init__(self, folder: str | Path | None, *, resume: bool = False) -> None:
        self.history: list[dict[str, Any]] = []
        self.state: dict[str, Any] | None = None
        checked = check_folder(folder)
        self._folder = None if checked is None else Path(checked)
        self._board: Any = None
        if self._folder is None:
            if resume:
                raise ResultError("a run without a folder cannot be resumed: give it one")
            return
        self._metrics, self._checkpoint = self._folder / "metrics.jsonl", self._folder / "checkpoint.pt"
        if not resume and (self._metrics.exists() or self._checkpoint.exists()):
            raise ResultError(
                f"{self._folder} already holds a run: resume it (resume=True), or choose another folder"
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultError(f"cannot create {self._folder}: {error}") from error
        if resume:
            self._take_up()
        self._board = _summary_writer(self._folder, len(self.history))

    def _take_up(self) -> None:
        step = 0
        if self._checkpoint.exists():
            try:
                self.state = torch.load(self._checkpoint, weights_only=True, map_location="cpu")
                step = self.state["step"]
            except Exception as error:
                raise ResultError(
                    f"{self._checkpoint} cannot be read ({type(error).__name__}: {error}): remove it to "
                    "start from the beginning"
                ) from error
        lines = self._metrics.read_text().splitlines(keepends=True) if self._metrics.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
                later = entry["step"] > step
            except (ValueError, TypeError, KeyError):
                break  # A line that was cut off when the process ended.
            if later:
                break
            self.history.append(entry)
        kept, dropped = lines[: len(self.history)], lines[len(self.history) :]
        if dropped:
            with self._metrics.with_name("metrics.dropped.jsonl").open("a") as file:
                file.writelines(dropped)
            _replace(self._metrics, lambda path: path.write_text("".join(kept)))

    def log(self, metrics: dict[str, Any]) -> None:
        """Write the metrics of a step: `step`, and finite numbers or None."""
        if self._folder is None:
            return
        with self._metrics.open("a") as file:
            file.write(json.dumps(metrics, allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in metrics.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, metrics["step"])
            self._board.flush()

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint; `state` has an entry "step" and only what `weights_only=True` loads."""
        if self._folder is not None:
            _replace(self._checkpoint, lambda path: torch.save(state, path))

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._board is not None:
            self._board.close()


def check_folder(folder: Any) -> str | Path | None:
    """Return a folder's path, or None if nothing is to be written.

    Raises:
        ParameterError: something else.
    """
    if folder is None or isinstance(folder, str | Path):
        return folder
    raise ParameterError(f"folder must be a path, or None to write nothing; got {brief(folder)}")


@contextmanager
def finish_step_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Postpone Ctrl-C: yield a function that says whether it was pressed; a second press stops at once.

    >>> with finish_step_on_interrupt() as interrupted:
    ...     interrupted()
    False
    """
    pressed = threading.Event()
    # Only the main thread receives signals.
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def postpone(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()
        print("finishing this step; press Ctrl-C again to stop at once", file=sys.stderr)

    signal.signal(signal.SIGINT, postpone)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a new file next to this one, and put it in its place in one operation."""
    beside = path.with_name(path.name + ".new")
    write(beside)
    os.replace(beside, path)


def _summary_writer(folder: Path, steps: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=steps + 1)

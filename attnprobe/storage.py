"""Saving and loading results: one safetensors file, with the metadata as JSON in its header.

Results save and load themselves with these. A file is written under a temporary name in the same folder and
renamed when complete, so that a failure never leaves half a file or destroys an older one. What is left to
others: which tensors and which metadata make up a result (the results' own modules).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from attnprobe.errors import AttnprobeError, MissingDependencyError, ResultError
from attnprobe.validation import brief
from attnprobe.version import __version__

if TYPE_CHECKING:
    PathLike: TypeAlias = str | os.PathLike[str]
else:
    # Under run-time type checking, a wrong path must still reach the check that explains it.
    PathLike = Any

_KEY = "attnprobe"
TEMPORARY = ".attnprobe-"
"""How the names of files begin that are not complete yet."""


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that determine a result."""
    import transformers

    return {
        "attnprobe": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_atomically(path: PathLike, content: bytes) -> Path:
    """Write a file completely or not at all, and return its path.

    Raises:
        ResultError: a folder that does not exist or cannot be written.
    """
    path = as_path(path)
    check_writable(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        # mkstemp makes a private file; give it the mode of an ordinary new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ResultError(f"cannot write {path}: {error.strerror}") from error
        raise
    return path


def check_writable(path: PathLike) -> None:
    """Check that a file can be written there, before doing the work whose result it will hold.

    Raises:
        ResultError: a folder that does not exist or cannot be written, or a path that is a folder.
    """
    path = as_path(path)
    try:
        if path.is_dir():
            raise ResultError(f"cannot write {path}: it is a folder; name a file")
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=TEMPORARY):
            pass
    except OSError as error:
        raise ResultError(f"cannot write to the folder {path.parent}: {error.strerror}") from error


def save_result(
    path: PathLike, kind: str, tensors: dict[str, Tensor | None], settings: dict[str, Any]
) -> Path:
    """Save the tensors of a result that are not None, with its settings, as one safetensors file.

    Raises:
        ResultError: a path that cannot be written.
    """
    import msgspec

    # Copies: safetensors refuses tensors that share memory, as scores of identical groups may.
    present = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
        if tensor is not None
    }
    header = {
        "kind": kind,
        "versions": library_versions(),
        "settings": msgspec.to_builtins(settings),
        "tensors": _described(present),
    }
    try:
        content = to_bytes(present, metadata={_KEY: json.dumps(header)})
    except SafetensorError as error:
        raise ResultError(f"cannot save {kind} as a safetensors file: {error}. Save parts of it") from error
    return write_atomically(path, content)


def _described(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return the dtype and shape of each tensor, as text."""
    return {name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in tensors.items()}


def load_result(
    path: PathLike,
    kind: str,
    needed: Sequence[str],
    types: dict[str, Any],
    added_later: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a result of one kind: its tensors, the `needed` ones included, and its settings of given types.

    `added_later` says, as JSON does, what settings are that files of older versions lack.

    Raises:
        ResultError: a file that is missing or damaged, or that holds something else.
    """
    import msgspec

    path = as_path(path)
    try:
        if not path.is_file():
            raise ResultError(f"there is no result at {path}")
        with safe_open(path, framework="pt") as stream:
            header = json.loads((stream.metadata() or {}).get(_KEY, "{}"))
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except ResultError:
        raise
    except (SafetensorError, ValueError, OSError) as error:
        raise ResultError(f"{path} is not a readable safetensors file: {error}") from error
    if not isinstance(header, dict):
        header = {}
    if header.get("kind") != kind:
        raise ResultError(f"{path} holds {header.get('kind', 'something else')}, not {kind}")
    settings = header.get("settings")
    if not isinstance(settings, dict):
        raise ResultError(f"{path} is damaged: it lacks the settings of {kind}")
    settings = {**added_later, **settings}
    missing = [name for name in needed if name not in tensors]
    missing += [name for name in types if name not in settings]
    if missing:
        raise ResultError(f"{path} is damaged: it lacks {', '.join(missing)}")
    # What was written, so that a file that was changed in a consistent way is found out too.
    saved, found = header.get("tensors", {}), _described(tensors)
    if not isinstance(saved, dict) or any(found.get(name) != was for name, was in saved.items()):
        raise ResultError(f"{path} is damaged: its tensors were saved as {saved}, but they are {found}")
    try:
        converted = {name: msgspec.convert(settings[name], wanted) for name, wanted in types.items()}
    except msgspec.ValidationError as error:
        raise ResultError(f"{path} is damaged: {error}") from error
    return tensors, converted


def as_path(
    path: Any, expected: str = "a file is named by a str or a Path", error: type[AttnprobeError] = ResultError
) -> Path:
    """Return a path, or raise an error for anything else."""
    if isinstance(path, str | os.PathLike):
        name = os.fspath(path)
        if isinstance(name, str) and name and "\0" not in name:
            return Path(name)
    raise error(f"{expected}; got {brief(path)}")


def import_pandas() -> Any:
    """Return the pandas module, or raise `MissingDependencyError` with what to install."""
    try:
        import pandas
    except ImportError as error:
        raise MissingDependencyError("tables need pandas: pip install 'attnprobe[report]'") from error
    return pandas


def import_pyarrow() -> Any:
    """Return the pyarrow module, or raise `MissingDependencyError` with what to install."""
    try:
        import pyarrow
    except ImportError as error:
        raise MissingDependencyError("arrow tables need pyarrow: pip install 'attnprobe[report]'") from error
    return pyarrow

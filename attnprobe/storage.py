"""Saving and loading results: one safetensors file, with the metadata as JSON in its header.

A result is written to a temporary file beside its place and moved there when complete, so that a
failure never leaves half a file or destroys an older one. What is left to others: which tensors and
which metadata make up a result (the results' own modules).
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from attnprobe.errors import MissingDependencyError, ResultError
from attnprobe.version import __version__

_KEY = "attnprobe"


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that determine a result."""
    import transformers

    return {
        "attnprobe": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_atomically(path: str | Path, content: bytes) -> Path:
    """Write a file completely or not at all, and return its path.

    Raises:
        ResultError: a folder that does not exist or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise ResultError(f"cannot write {path}: it is a folder; name a file")
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ResultError(f"cannot write to the folder {path.parent}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        # mkstemp makes a private file; a result has the mode that an ordinary new file would have.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        os.unlink(temporary)
        raise ResultError(f"cannot write {path}: {error.strerror}") from error
    return path


def save_result(
    path: str | Path, kind: str, tensors: dict[str, Tensor | None], metadata: dict[str, Any]
) -> Path:
    """Save the tensors of a result that are not None, with its metadata, as one safetensors file.

    Raises:
        ResultError: a place that cannot be written.
    """
    present = {
        name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None
    }
    header = {"kind": kind, "versions": library_versions(), **metadata}
    return write_atomically(path, to_bytes(present, metadata={_KEY: json.dumps(header)}))


def load_result(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the tensors and metadata of a result of that kind.

    Raises:
        ResultError: a file that is missing, damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ResultError(f"there is no result at {path}")
    try:
        with safe_open(path, framework="pt") as stream:
            header = json.loads((stream.metadata() or {}).get(_KEY, "{}"))
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ResultError(f"{path} is not a readable safetensors file: {error}") from error
    if header.get("kind") != kind:
        raise ResultError(f"{path} holds {header.get('kind', 'something else')}, not {kind}")
    return tensors, header


def import_pandas() -> Any:
    """Return the pandas module, or raise `MissingDependencyError` with what to install."""
    try:
        import pandas
    except ImportError as error:
        raise MissingDependencyError("tables need pandas: pip install 'attnprobe[report]'") from error
    return pandas

"""The model and the tokenizer of a corpus: loaded for a run, and found again for a report or a summary.

`score`, the stages of other engines, `report_row` and the commands call this. What is left to others: loading
a model from wherever it is stored (models) and whether it is the same one (fingerprints).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from attnprobe.errors import ModelLoadError
from attnprobe.models import (
    DTYPES,
    PACKAGED_MODEL,
    DeviceLike,
    DtypeLike,
    check_device,
    check_dtype,
    load_model,
    load_tokenizer,
)


def check_place(device: DeviceLike | None, dtype: DtypeLike | None) -> None:
    """Check where a model is to run, and in which numbers, before it is loaded; None is not checked.

    Raises:
        ParameterError: numbers of another kind, or a device that there is not.

    >>> check_place("cpu", "bfloat16")
    """
    if device is not None:
        check_device(device)
    if dtype is not None:
        check_dtype(dtype)


def model_and_tokenizer(
    model: Any,
    tokenizer: Any = None,
    *,
    device: DeviceLike | None = None,
    dtype: DtypeLike | None = None,
    progress: bool = False,
) -> tuple[Any, Any]:
    """Return a model and its tokenizer, loaded from a path or a name if they have to be.

    A model without a tokenizer will do: rows of ids need none. `device` and `dtype` are of a model that is
    loaded here; one that was given stays as it is.

    Raises:
        ParameterError: a device or numbers that there are not.
        ModelLoadError: a model that cannot be loaded.
    """
    if not (model is None or isinstance(model, str | Path)):
        return model, tokenizer
    if tokenizer is None:
        with suppress(ModelLoadError):
            tokenizer = load_tokenizer(model)
    loaded = load_model(model, device=device, dtype=dtype, with_tokenizer=False, progress=progress)
    return loaded.model, tokenizer


def source_of(model: Any) -> str:
    """Return from where a model can be loaded again: a path, a name, or "" if that is not known.

    >>> source_of(None), source_of("Qwen/Qwen3-4B")
    ('SmolLM2-135M-Instruct', 'Qwen/Qwen3-4B')
    """
    if model is None:
        return PACKAGED_MODEL
    if not isinstance(model, str | Path):
        model = getattr(getattr(model, "config", None), "_name_or_path", None) or ""
    return str(Path(model).absolute()) if model and Path(model).exists() else str(model)


def model_of_scores(manifest: Mapping[str, Any], device: DeviceLike | None = None) -> tuple[Any, Any]:
    """Return the model and the tokenizer that scores are of, loaded from where they came.

    Raises:
        ModelLoadError: they are not there any more, or it was never known where.
    """
    dtype = manifest["model"].get("dtype")
    try:
        return model_and_tokenizer(
            _known_source(manifest), device=device, dtype=dtype if dtype in DTYPES else None
        )
    except ModelLoadError as error:
        raise ModelLoadError(
            f"{error}. Name the model that the scores are of (--model, or model=...)"
        ) from error


def tokenizer_of_scores(manifest: Mapping[str, Any]) -> Any:
    """Return the tokenizer of the model that scores are of.

    Raises:
        ModelLoadError: it is not there any more.
    """
    return load_tokenizer(_known_source(manifest))


def _known_source(manifest: Mapping[str, Any]) -> str | None:
    """Return what `load_model` takes."""
    known = manifest.get("model_source") or manifest["model"]["name"]
    if not known:
        raise ModelLoadError("it is not known from where the model of these scores was loaded")
    return None if known == PACKAGED_MODEL else str(known)

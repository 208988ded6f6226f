"""Checks of what users pass in, each written once: numbers, choices, masks, tensors, and types of objects.

Every public entry point calls these where a value enters, before any work is done. Each check returns the
value in the one form that the rest of the library uses (a Python int, a boolean tensor, ...), so that
lists, numpy arrays, numpy numbers and tensors are all accepted, and raises an `AttnprobeError` that says
what was expected and what was given. What is left to others: checks of one kind of value, such as windows
and horizons (metrics), layers (adapters.base) and heads (head_selection).
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attnprobe.errors import AttnprobeError, ParameterError

ErrorClass = type[AttnprobeError]

if TYPE_CHECKING:
    import numpy

    ArrayLike: TypeAlias = Tensor | numpy.ndarray[Any, Any] | Sequence[Any] | range
    IntLike: TypeAlias = int | numpy.integer[Any] | Tensor
    FloatLike: TypeAlias = float | IntLike | numpy.floating[Any]
    # Fields of dataclasses whose __post_init__ checks what it is given and stores a plain number.
    IntField: TypeAlias = int
    FloatField: TypeAlias = float
    BoolField: TypeAlias = bool
else:
    # Under run-time type checking, as in our tests, a wrong value must reach the check that explains it,
    # not be rejected before.
    ArrayLike = IntLike = FloatLike = IntField = FloatField = BoolField = Any


def is_array(value: Any) -> bool:
    """Whether a value is a numpy array or a numpy number."""
    return type(value).__module__ == "numpy" and hasattr(value, "ndim")


def _article(word: str) -> str:
    return "an" if word[0].lower() in "aeio" else "a"


def brief(value: Any, longest: int = 80) -> str:
    """Return a value as shown in error messages: its shape if it is a tensor, else a short repr.

    >>> brief(torch.zeros(2, 3)), brief("x" * 100, longest=10)
    ('a float32 tensor [2, 3]', "'xxxxxx...")
    """
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        if value.is_nested:
            return f"a nested {kind} tensor"
        if value.ndim or value.is_meta:
            return f"{_article(kind)} {kind} tensor {list(value.shape)}"
        return f"{_article(kind)} {kind} tensor of {value.item()}"
    if is_array(value) and value.ndim:
        return f"{_article(str(value.dtype))} {value.dtype} array {list(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    try:
        text = repr(value)
    except Exception:  # Someone else's failing repr must not hide what was wrong.
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def whole_number(
    value: Any,
    name: str,
    *,
    minimum: int | None = 0,
    maximum: int | None = None,
    error: ErrorClass = ParameterError,
) -> int:
    """Return a whole number within limits as an int; neither a bool nor 2.0 counts as one.

    >>> whole_number(torch.tensor(3), "steps", minimum=1)
    3
    >>> whole_number(0, "steps", minimum=1)
    Traceback (most recent call last):
    attnprobe.errors.ParameterError: steps must be a whole number, at least 1; got 0
    """
    number = _index(value)
    low = number is None or (minimum is not None and number < minimum)
    if low or (maximum is not None and number is not None and number > maximum):
        limits = []
        if minimum is not None and maximum is not None:
            limits.append(f"in {minimum}..{maximum}")
        elif minimum is not None:
            limits.append(f"at least {minimum}")
        elif maximum is not None:
            limits.append(f"at most {maximum}")
        raise error(f"{name} must be {', '.join(['a whole number', *limits])}; got {brief(value)}")
    assert number is not None
    return number


def _index(value: Any) -> int | None:
    """Return a whole number of Python, numpy or torch as an int; None for anything else."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and (value.dtype == torch.bool or value.ndim)):
        return None
    if is_array(value) and value.ndim:
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def real_number(
    value: Any,
    name: str,
    *,
    above: FloatLike | None = None,
    minimum: FloatLike | None = None,
    below: FloatLike | None = None,
    maximum: FloatLike | None = None,
    error: ErrorClass = ParameterError,
) -> float:
    """Return a number within limits as a float; NaN is never within limits, infinity only without a bound.

    >>> real_number(1, "quantile", above=0, maximum=1)
    1.0
    >>> real_number(float("nan"), "quantile", above=0, maximum=1)
    Traceback (most recent call last):
    attnprobe.errors.ParameterError: quantile must be a number in (0, 1]; got nan
    """
    number = _float(value)
    inside = (
        number is not None
        and number == number
        and (above is None or number > above)
        and (minimum is None or number >= minimum)
        and (below is None or number < below)
        and (maximum is None or number <= maximum)
    )
    if not inside or number is None:
        raise error(f"{name} must be a number{_limits(above, minimum, below, maximum)}; got {brief(value)}")
    return number


def _float(value: Any) -> float | None:
    is_scalar = not getattr(value, "ndim", 0)
    if (
        isinstance(value, bool | str | bytes)
        or not is_scalar
        or str(getattr(value, "dtype", "")).endswith("bool")
    ):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _limits(
    above: FloatLike | None, minimum: FloatLike | None, below: FloatLike | None, maximum: FloatLike | None
) -> str:
    low = f"({above:g}" if above is not None else f"[{minimum:g}" if minimum is not None else None
    high = f"{below:g})" if below is not None else f"{maximum:g}]" if maximum is not None else None
    if low is not None and high is not None:
        return f" in {low}, {high}"
    if low is not None:
        return f" above {above:g}" if above is not None else f", at least {minimum:g}"
    if high is not None:
        return f" below {below:g}" if below is not None else f", at most {maximum:g}"
    return ""


def choice(value: Any, name: str, options: Collection[str], error: ErrorClass = ParameterError) -> str:
    """Return a value after checking that it is one of the options.

    >>> choice("tokens", "align", ("token", "prediction"))
    Traceback (most recent call last):
    attnprobe.errors.ParameterError: align must be "token" or "prediction"; got 'tokens'
    """
    if not isinstance(value, str) or value not in options:
        words = [f'"{option}"' for option in options]
        listed = " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
        raise error(f"{name} must be {listed}; got {brief(value)}")
    return value


def truth(value: Any, name: str, error: ErrorClass = ParameterError) -> bool:
    """Return a bool; 0, 1 and strings are not accepted.

    >>> truth("yes", "span")
    Traceback (most recent call last):
    attnprobe.errors.ParameterError: span must be True or False; got 'yes'
    """
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise error(f"{name} must be True or False; got {brief(value)}")


def instance(
    value: Any, kind: type[Any], name: str, hint: str = "", error: ErrorClass = ParameterError
) -> Any:
    """Return a value after checking its class; `hint` says where to get one.

    >>> instance("x", int, "count", "len() returns one")
    Traceback (most recent call last):
    attnprobe.errors.ParameterError: count must be an int (len() returns one); got 'x'
    """
    if isinstance(value, kind):
        return value
    article = _article(kind.__name__)
    source = f" ({hint})" if hint else ""
    found = value if isinstance(value, type | str | Tensor) else type(value)
    told = (
        f"{_article(type(value).__name__)} {type(value).__name__}" if found is type(value) else brief(value)
    )
    raise error(f"{name} must be {article} {kind.__name__}{source}; got {told}")


def _is_numbers(value: Any) -> bool:
    return isinstance(value, Tensor) or is_array(value)


def as_tensor(value: Any, name: str, error: ErrorClass = ParameterError) -> Tensor:
    """Return a tensor, a numpy array, or (nested) lists of numbers as a tensor.

    >>> as_tensor(range(3), "ids")
    tensor([0, 1, 2])
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_nested or value.is_meta or value.is_quantized:
            kind = str(value.layout).removeprefix("torch.")
            raise error(f"{name} must be a dense tensor of numbers; got a {kind} one on {value.device}")
        return value
    if is_array(value) and any(stride < 0 for stride in value.strides):
        value = value.copy()  # Torch does not accept reversed views.
    if hasattr(value, "__array__") or isinstance(value, list | tuple | range | int | float):
        try:
            if isinstance(value, list | tuple) and value and all(_is_numbers(part) for part in value):
                return torch.stack([torch.as_tensor(part) for part in value])
            return torch.as_tensor(list(value) if isinstance(value, range) else value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            pass
    raise error(f"{name} must be a tensor, an array or lists of numbers of equal length; got {brief(value)}")


def as_float_tensor(
    value: Any,
    name: str,
    shape: tuple[int, ...] | None = None,
    *,
    axes: str = "example, token",
    error: ErrorClass = ParameterError,
) -> Float[Tensor, "..."]:
    """Return numbers as a tensor of floats; whole numbers are converted.

    >>> as_float_tensor([[1, 2]], "gamma", (1, 2))
    tensor([[1., 2.]])
    >>> as_float_tensor([1, 2], "gamma", (1, 2), axes="completion, token")
    Traceback (most recent call last):
    attnprobe.errors.ParameterError: gamma must be [completion, token] = [1, 2]; got [2]
    """
    numbers = as_tensor(value, name, error)
    if numbers.dtype == torch.bool or numbers.is_complex():
        raise error(f"{name} must hold real numbers; got {brief(numbers)}")
    if shape is not None and tuple(numbers.shape) != tuple(shape):
        raise error(f"{name} must be [{axes}] = {list(shape)}; got {list(numbers.shape)}")
    return numbers if numbers.is_floating_point() else numbers.to(torch.get_default_dtype())


def as_mask(
    value: Any,
    name: str,
    shape: tuple[int, ...] | None = None,
    *,
    axes: str = "example, token",
    device: torch.device | None = None,
    error: ErrorClass = ParameterError,
) -> Bool[Tensor, "..."]:
    """Return a mask as a boolean tensor; it may hold only False and True, or 0 and 1.

    A missing first axis of size 1 is added.

    >>> as_mask([0, 1, 1], "mask", (1, 3)).tolist()
    [[False, True, True]]
    >>> as_mask([0.5, 1.0], "mask")
    Traceback (most recent call last):
    attnprobe.errors.ParameterError: mask must hold 0 and 1 (or False and True) only; got 0.5
    """
    mask = as_tensor(value, name, error)
    if shape is not None:
        if mask.ndim == len(shape) - 1 and shape[0] == 1:
            mask = mask[None]
        if tuple(mask.shape) != tuple(shape):
            raise error(f"{name} must be [{axes}] = {list(shape)}; got {list(mask.shape)}")
    if mask.dtype != torch.bool:
        strange = (mask != 0) & (mask != 1)
        if bool(strange.any()):
            raise error(
                f"{name} must hold 0 and 1 (or False and True) only; got {mask[strange].flatten()[0].item()}"
            )
    return mask.to(device=device, dtype=torch.bool)


def whole_numbers(
    value: Any, name: str, *, minimum: int = 0, maximum: int | None = None, error: ErrorClass = ParameterError
) -> list[int]:
    """Return one or more whole numbers: an int, a range, a list, a set, an array or a tensor of them.

    >>> whole_numbers(range(2, 4), "layers"), whole_numbers(torch.tensor(7), "layers")
    ([2, 3], [7])
    """
    single = _index(value)
    if single is not None:
        return [whole_number(single, name, minimum=minimum, maximum=maximum, error=error)]
    parts: Any = value
    if _is_numbers(value):
        if value.ndim != 1:
            raise error(f"{name} must be one or more whole numbers; got {brief(value)}")
        parts = value.tolist()
    elif isinstance(value, str | bytes | dict) or not hasattr(value, "__iter__"):
        raise error(f"{name} must be one or more whole numbers; got {brief(value)}")
    numbers = list(parts)
    if not numbers:
        raise error(f"{name} must be one or more whole numbers; got none")
    return [whole_number(number, name, minimum=minimum, maximum=maximum, error=error) for number in numbers]


def finite(value: Tensor, name: str, axes: str, error: ErrorClass = ParameterError) -> Tensor:
    """Return a tensor after checking that it is finite; the error says where it first is not."""
    wrong = ~torch.isfinite(value)
    if bool(wrong.any()):
        where = wrong.nonzero()[0].tolist()
        raise error(f"{name} is {float(value[tuple(where)])} at [{axes}] = {where}")
    return value

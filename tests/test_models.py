"""Loading models and letting them answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnprobe.errors import BatchError, ModelLoadError, ParameterError
from attnprobe.models import LoadedModel, generate_response, load_model, model_name, prompt_ids
from attnprobe.testing.tiny_models import tiny_model, tiny_tokenizer
from tests.refusals import refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model, as `save_pretrained` writes it."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama", vocab_size=300).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder)


def test_a_folder_is_loaded(loaded: LoadedModel) -> None:
    assert loaded.name == "tiny-llama"
    assert not loaded.model.training
    assert loaded.tokenizer.decode(loaded.tokenizer("Read it")["input_ids"]) == "Read it"


def test_a_model_runs_where_and_in_the_numbers_that_were_asked_for(folder: Path) -> None:
    half = load_model(folder, device="cpu", dtype="bfloat16").model
    assert (half.dtype, half.device.type) == (torch.bfloat16, "cpu")
    assert model_name(folder) == "tiny-llama"


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"device": "abacus"}, "abacus"),
        ({"device": "meta"}, "meta"),
        ({"device": "cuda:77"}, "cuda:77"),
        ({"device": 1.5}, "1.5"),
        ({"dtype": "int8"}, "int8"),
        ({"dtype": torch.int64}, "int64"),
    ],
)
def test_devices_and_dtypes_that_there_are_not_are_refused(options: dict[str, Any], told: str) -> None:
    """Before anything is loaded: the path does not exist."""
    refused(lambda: load_model("/nowhere", **options), told, error=ParameterError)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("nowhere.gguf", "nowhere"):
        refused(lambda name=name: load_model(tmp_path / name), tmp_path / name, error=ModelLoadError)
        refused(lambda name=name: model_name(tmp_path / name), tmp_path / name, error=ModelLoadError)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("source", ["", 5, 1.5, [], {}, b"gpt2", True, torch.nn.Linear(2, 2)])
def test_what_is_no_source_is_refused(source: object) -> None:
    refused(lambda: load_model(source), "model", error=ParameterError)


def test_a_corrupt_file_is_named(tmp_path: Path, folder: Path) -> None:
    wrong, cut = tmp_path / "wrong.gguf", tmp_path / "cut.gguf"
    wrong.write_bytes(b"not a model")
    refused(lambda: load_model(wrong), wrong, "GGUF", error=ModelLoadError)
    cut.write_bytes(b"GGUF" + bytes(20))
    refused(lambda: load_model(cut), cut, error=ModelLoadError)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(
            content[: len(content) // 2] if file.suffix == ".safetensors" else content
        )
    refused(lambda: load_model(broken), broken, error=ModelLoadError)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    refused(lambda: load_model(tmp_path), tmp_path, "config.json", error=ModelLoadError)


def test_an_unknown_name_is_named() -> None:
    """Without a network, a hub name that is not cached is an error of ours."""
    refused(lambda: load_model("nobody/nothing"), "nobody/nothing", error=ModelLoadError)


def test_prompts_go_through_the_chat_template(loaded: LoadedModel) -> None:
    chat = loaded.tokenizer.decode(prompt_ids(loaded, "Hello", system="Be brief", chat=None))
    assert chat == "<turn>system\nBe brief<end><turn>user\nHello<end><turn>assistant"
    plain = loaded.tokenizer.decode(prompt_ids(loaded, "Hello", system="Be brief", chat=False))
    assert plain == "Hello"


def test_a_chat_without_a_template_is_refused(loaded: LoadedModel) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    plain = LoadedModel(loaded.model, tokenizer, "plain")
    assert tokenizer.decode(prompt_ids(plain, "Hello", system=None, chat=None)) == "Hello"
    chat = lambda: prompt_ids(plain, "Hello", system=None, chat=True)  # noqa: E731
    refused(chat, "plain", "chat template", error=BatchError)


def test_an_empty_prompt_is_refused(loaded: LoadedModel) -> None:
    refused(lambda: prompt_ids(loaded, " \n", system=None, chat=None), "prompt", "empty", error=BatchError)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    "wrong", [{"prompt": 5}, {"prompt": None}, {"system": 5}, {"chat": "yes"}, {"chat": 1}]
)
def test_what_is_no_prompt_is_refused(loaded: LoadedModel, wrong: dict) -> None:
    arguments = {"prompt": "Hello", "system": None, "chat": None} | wrong
    refused(lambda: prompt_ids(loaded, **arguments), *wrong, error=ParameterError)


def test_answers_repeat_with_the_seed(loaded: LoadedModel) -> None:
    prompt = prompt_ids(loaded, "Read", system=None, chat=None)
    state = torch.random.get_rng_state()

    def answer(seed: int, temperature: float) -> list[int]:
        return generate_response(loaded, prompt, max_new_tokens=12, temperature=temperature, seed=seed)

    assert answer(1, 5.0) == answer(1, 5.0)
    assert answer(1, 5.0) != answer(2, 5.0)
    assert answer(1, 0.0) == answer(2, 0.0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_greedy_answer_is_the_most_likely_one(loaded: LoadedModel) -> None:
    prompt = prompt_ids(loaded, "Read", system=None, chat=False)
    answer = generate_response(loaded, prompt, max_new_tokens=5)
    ids = list(prompt)
    for token in answer:
        with torch.no_grad():
            assert token == int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


@pytest.mark.parametrize(
    ("changes", "facts", "error"),
    [
        ({"prompt": [1, 2, 3], "max_new_tokens": 254}, ["3", "254", "tiny-llama", "256"], BatchError),
        ({"max_new_tokens": 0}, ["max_new_tokens", "0"], ParameterError),
        ({"max_new_tokens": 2.5}, ["max_new_tokens", "2.5"], ParameterError),
        ({"max_new_tokens": True}, ["max_new_tokens", "True"], ParameterError),
        ({"temperature": -0.5}, ["temperature", "-0.5"], ParameterError),
        ({"temperature": float("nan")}, ["temperature", "nan"], ParameterError),
        ({"temperature": float("inf")}, ["temperature", "inf"], ParameterError),
        ({"temperature": "hot"}, ["temperature", "'hot'"], ParameterError),
        ({"seed": 0.5}, ["seed", "0.5"], ParameterError),
        ({"seed": 2**64}, ["seed"], ParameterError),
        ({"prompt": "Read"}, ["prompt", "'Read'"], ParameterError),
        ({"prompt": []}, ["prompt"], ParameterError),
        ({"prompt": [1.5]}, ["prompt", "1.5"], ParameterError),
        ({"prompt": torch.ones(1, 2).long()}, ["prompt", "[1, 2]"], ParameterError),
    ],
)
def test_generation_that_cannot_be_is_refused(
    loaded: LoadedModel, changes: dict, facts: list[str], error: type[Exception]
) -> None:
    arguments = {"prompt": [1]} | changes
    refused(lambda: generate_response(loaded, **arguments), *facts, error=error)


def test_a_prompt_may_be_an_array(loaded: LoadedModel) -> None:
    expected = generate_response(loaded, [5, 6, 7], max_new_tokens=3)
    for prompt in (torch.tensor([5, 6, 7]), np.array([5, 6, 7]), range(5, 8)):
        assert generate_response(loaded, prompt, max_new_tokens=np.int64(3)) == expected

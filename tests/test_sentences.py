"""Splitting a response into sentences: what mathematical text asks for, and which token is where."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnprobe
from attnprobe import BatchError, ParameterError, TokenBatch
from attnprobe.sentences import sentence_ids, split_as_thought_anchors, split_sentences
from attnprobe.testing.tiny_models import tiny_tokenizer
from tests.refusals import refused


def pieces(text: str) -> list[str]:
    return [text[start:end].strip() for start, end in split_sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He has 3. She has 4.", ["He has 3.", "She has 4."]),
        ("That is 3.14 in all. Good.", ["That is 3.14 in all.", "Good."]),
        ("About 1,000.50 dollars", ["About 1,000.50 dollars"]),
        ("Fruit, e.g. apples, i.e. two. Done.", ["Fruit, e.g. apples, i.e. two.", "Done."]),
        ("Mr. J. Smith met John F. Kennedy. They left.", ["Mr. J. Smith met John F. Kennedy.", "They left."]),
        ("Take the point P. Then stop.", ["Take the point P.", "Then stop."]),
        ("So did I. Then we left.", ["So did I.", "Then we left."]),
        ("See Eq. 5 and No. 7. No. It is 5.", ["See Eq. 5 and No. 7.", "No.", "It is 5."]),
        ("At 5 p.m. on Monday. At 6 p.m. He left.", ["At 5 p.m. on Monday.", "At 6 p.m.", "He left."]),
        ("It took 60 sec. Then it ended.", ["It took 60 sec.", "Then it ended."]),
        ("Apples, pears, etc. He ate.", ["Apples, pears, etc.", "He ate."]),
        ("Wait... what? No! Yes.", ["Wait... what?", "No!", "Yes."]),
        ('"Is it?" he asked. (It was.) Yes.', ['"Is it?" he asked.', "(It was.)", "Yes."]),
        ("x = 3. y is 4.", ["x = 3.", "y is 4."]),
        ("First. 5 more.", ["First.", "5 more."]),
        ("所以是5。然后呢？好。", ["所以是5。", "然后呢？", "好。"]),
    ],
)
def test_prose(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"So the answer is \boxed{3. 5}. Good.", [r"So the answer is \boxed{3. 5}.", "Good."]),
        (r"So \boxed{\frac{1. }{2}}. Good.", [r"So \boxed{\frac{1. }{2}}.", "Good."]),
        ("Let $x. y$ be. Then $a$ holds.", ["Let $x. y$ be.", "Then $a$ holds."]),
        ("He pays $5. Then $10. In all $15.", ["He pays $5.", "Then $10.", "In all $15."]),
        ("Thus\n\\[\nx = 5. \ny = 6\n\\]\nEnd.", ["Thus", "\\[\nx = 5. \ny = 6\n\\]", "End."]),
        ("$$a. \n b$$ holds. Good.", ["$$a. \n b$$ holds.", "Good."]),
        (
            "\\begin{align*}a. \n b\\end{align*}\nGood.",
            ["\\begin{align*}a. \n b\\end{align*}", "Good."],
        ),
        (r"By \(x. y\) we see. Good.", [r"By \(x. y\) we see.", "Good."]),
        (r"An open \boxed{3. Then on.", [r"An open \boxed{3.", "Then on."]),
    ],
)
def test_mathematics(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1. Add: 2.\n2. Take: 7 = 14\n\nDone.", ["1. Add: 2.", "2. Take: 7 = 14", "Done."]),
        ("Step 1. We add.\nStep 2: no.", ["Step 1. We add.", "Step 2: no."]),
        ("**Step 1.** We add. It is 5.", ["**Step 1.** We add.", "It is 5."]),
        ("a) Three.\n(b) Four.\niv. Five.", ["a) Three.", "(b) Four.", "iv. Five."]),
        ("- one\n* two\n---\n# Three", ["- one", "* two\n---", "# Three"]),
        ("\n\n**Answer:** 5", ["**Answer:** 5"]),
        ("...\nSo it is.", ["...\nSo it is."]),
    ],
)
def test_lists_and_lines(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("wrong", [5, None, b"text", ["text"]])
def test_what_is_no_text_is_refused(wrong: object) -> None:
    refused(lambda: split_sentences(wrong), "text", error=ParameterError)


TEXTS = st.text(alphabet="ab1. \n?$\\{}()*eEgMr", max_size=60)


@given(text=TEXTS)
def test_sentences_cover_a_text(text: str) -> None:
    spans = split_sentences(text)
    assert "".join(text[start:end] for start, end in spans) == text
    if any(character.isalnum() for character in text):
        assert all(any(c.isalnum() for c in text[start:end]) for start, end in spans)


@given(integers=st.lists(st.integers(0, 99), min_size=1, max_size=5), fraction=st.integers(1, 99))
def test_a_decimal_point_ends_nothing(integers: list[int], fraction: int) -> None:
    text = " ".join(f"The value is {whole}.{fraction} here." for whole in integers)
    assert len(split_sentences(text)) == len(integers)


@given(text=TEXTS.filter(bool), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=60))
def test_a_token_belongs_to_the_sentence_of_its_first_character(text: str, sizes: list[int]) -> None:
    tokens, begin = [], 0
    for size in sizes:
        tokens.append(text[begin : begin + size])
        begin += size
    tokens.append(text[begin:])
    count = len(tokens)
    batch = TokenBatch(
        torch.zeros(1, count + 1, dtype=torch.long),
        torch.ones(1, count + 1, dtype=torch.bool),
        torch.arange(count + 1)[None] > 0,
        texts=(("A prompt. ", *tokens),),
    )
    ids = sentence_ids(batch)[0].tolist()
    assert ids[0] == -1
    spans, begin = split_sentences(text), 0
    for token, found in zip(tokens, ids[1:], strict=True):
        visible = token.lstrip()
        place = begin + (len(token) - len(visible) if visible else 0)
        holding = [i for i, (start, end) in enumerate(spans) if start <= place < end]
        assert found == (holding[0] if holding else len(spans) - 1)
        begin += len(token)


def slow_thought_anchors(text: str) -> list[str]:
    """Character by character: pieces without white space, short ones merged."""
    text = text.strip()
    pieces, current = [], ""
    for place, character in enumerate(text):
        current += character
        blank = text.startswith("\n\n", place) or text.startswith("\r\n\r\n", place)
        stop = character in ".?!" and text[place + 1 : place + 2] in (" ", "\n")
        if (blank or stop) and current.strip():
            pieces.append(current.strip())
            current = ""
    merged = []
    while pieces:
        piece = pieces.pop(0)
        while len(piece) < 10 and pieces:
            piece = f"{piece} {pieces.pop(0)}"
        if len(piece) < 10 and merged:
            piece = f"{merged.pop()} {piece}"
        merged.append(piece)
    return ["".join(piece.split()) for piece in merged]


ANCHORED = st.lists(
    st.sampled_from(["a", "so", "number", "anchors", ".", "?", " ", "  ", "\n", "\n\n", "\r\n"]), max_size=40
).map("".join)


@given(text=ANCHORED)
def test_thought_anchors_are_cut_as_in_their_scripts(text: str) -> None:
    spans = split_as_thought_anchors(text)
    assert ["".join(text[start:end].split()) for start, end in spans] == slow_thought_anchors(text)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


@pytest.mark.usefixtures("as_users_call")
def test_tokens_between_and_after_thought_anchors_belong_to_none() -> None:
    pieces = ["Prompt", "We add 3", " and 4.", "\n", "Then it", "\n", "is seven", "\n\n", " So 14."]
    batch = batch_of_pieces(pieces, [False, *[True] * 8])
    assert sentence_ids(batch, "thought_anchors").tolist() == [[-1, 0, 0, -1, 1, 1, 1, -1, -1]]
    assert sentence_ids(batch).tolist() == [[-1, 0, 0, 0, 1, 1, 2, 2, 3]]
    refused(lambda: sentence_ids(batch, "lines"), "splitting", "'lines'", error=ParameterError)


def test_sentences_do_not_depend_on_padding_or_neighbours() -> None:
    tokenizer = tiny_tokenizer()
    texts = ["One is 1. Two is 2.\nThree.", "Just this"]
    batch = TokenBatch.from_text(tokenizer, ["Say: ", "Go on: "], texts)
    together = sentence_ids(batch)
    for row, text in enumerate(texts):
        alone = TokenBatch.from_text(tokenizer, [["Say: ", "Go on: "][row]], [text])
        length = alone.token_count
        assert torch.equal(together[row, :length], sentence_ids(alone)[0])
        assert bool((together[row, length:] == -1).all())
    assert int(together[0].max()) == 2


def batch_of_pieces(pieces: list[str], response: list[bool]) -> TokenBatch:
    count = len(pieces)
    return TokenBatch(
        torch.zeros(1, count, dtype=torch.long),
        torch.ones(1, count, dtype=torch.bool),
        torch.tensor([response]),
        texts=(tuple(pieces),),
    )


def test_a_gap_ends_a_sentence() -> None:
    """What stands in between, such as a tool's output, has no sentence and joins none."""
    pieces = ["Call", " it", "<tool>", "4. So.", "</tool>", " and", " so", ". It", " is."]
    response = [True, True, False, False, False, True, True, True, True]
    ids = sentence_ids(batch_of_pieces(pieces, response))
    assert ids.tolist() == [[0, 0, -1, -1, -1, 1, 1, 1, 2]]


@given(
    turns=st.lists(st.lists(TEXTS.filter(bool), min_size=1, max_size=6), min_size=1, max_size=4),
    between=st.integers(1, 3),
)
def test_parts_between_gaps_have_the_sentences_of_each_alone(turns: list[list[str]], between: int) -> None:
    """Counted on from part to part."""
    pieces, response, expected, count = [], [], [], 0
    for turn in turns:
        alone = sentence_ids(batch_of_pieces(turn, [True] * len(turn)))[0].tolist()
        pieces += [*turn, *["Tool. Says."] * between]
        response += [True] * len(turn) + [False] * between
        expected += [number + count for number in alone] + [-1] * between
        count += alone[-1] + 1
    assert [expected] == sentence_ids(batch_of_pieces(pieces, response)).tolist()


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    "batch", ["text", None, 5, {"input_ids": [[1]]}, torch.ones(1, 2).long(), TokenBatch]
)
def test_what_is_no_batch_is_refused(batch: object) -> None:
    refused(lambda: sentence_ids(batch), "batch", "TokenBatch", error=ParameterError)


def test_texts_and_rows_of_one_response_are_needed() -> None:
    refused(lambda: sentence_ids(TokenBatch.from_ids([[1, 2, 3]])), "tokenizer", error=BatchError)
    packed = TokenBatch.from_ids(
        torch.tensor([[1, 2, 3, 4]]),
        position_ids=torch.tensor([[0, 1, 0, 1]]),
        tokenizer=tiny_tokenizer(),
    )
    refused(lambda: sentence_ids(packed), "packed", "sequences", error=BatchError)
    rows, _ = packed.sequences()
    assert attnprobe.sentence_ids(rows).shape == (2, 2)

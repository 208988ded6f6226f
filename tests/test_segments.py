"""Named segments of tokens: what they can be given as, and what a batch does with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnprobe import BatchError, ParameterError, TokenBatch
from attnprobe.errors import AttnprobeError
from tests.refusals import refused

TEXTS = (("Q", "<think>", " 2", "</think>", " 4"), ("Q", " no", " plan", "", ""))


@st.composite
def batches(draw: st.DrawFn) -> TokenBatch:
    """Batches padded on either side, some of them packed, whose ids are all different."""
    examples, width = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    ids = torch.arange(1, 1 + examples * width).view(examples, width)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    real = torch.zeros(examples, width, dtype=torch.bool)
    positions = torch.zeros_like(ids)
    packed = draw(st.booleans())
    for i in range(examples):
        start = draw(st.integers(0, width - 1))
        stop = draw(st.integers(start + 1, width))
        real[i, start:stop] = True
        border = draw(st.integers(start, stop - 1)) if packed else start
        positions[i, start:stop] = torch.arange(stop - start)
        positions[i, border:stop] = torch.arange(stop - border)
    named = {
        name: (torch.rand(examples, width, generator=generator) < 0.5) & real for name in ("plan", "answer")
    }
    response = (torch.rand(examples, width, generator=generator) < 0.5) & real
    response |= real & (real.cumsum(-1) == 1)
    kept = {"position_ids": positions} if packed else {}
    return TokenBatch.from_ids(ids, real, response_mask=response, segments=named, **kept)


def marked(batch: TokenBatch, name: str) -> list[list[int]]:
    """The ids of the tokens in a segment, by example."""
    return [row[mask].tolist() for row, mask in zip(batch.input_ids, batch.segment(name), strict=True)]


ALL = ("plan", "answer", "prompt", "response", "first")


@given(batch=batches(), seed=st.integers(0, 99))
def test_segments_go_wherever_their_tokens_go(batch: TokenBatch, seed: int) -> None:
    """Selecting, cutting columns, joining, and laying out as sequences keep each token's segments."""
    generator = torch.Generator().manual_seed(seed)
    ids = batch.input_ids
    chosen = torch.randperm(len(ids), generator=generator).tolist()
    for name in ALL:
        expected = marked(batch, name)
        assert marked(batch.select(chosen, trim=True), name) == [expected[i] for i in chosen]
        if batch.segment_ids is None:
            joined = TokenBatch.concatenate([batch, batch.select([0], trim=True)])
            assert marked(joined, name) == [*expected, expected[0]]
        if batch.token_count > 1 and name != "first":
            cut = batch.at_columns(slice(1, None))
            assert marked(cut, name) == [
                [each for each in row if each != first]
                for row, first in zip(expected, ids[:, 0].tolist(), strict=True)
            ]
        sequences, _ = batch.sequences()
        left = {each for row in marked(sequences, name) for each in row}
        measured = set(sequences.input_ids[sequences.attention_mask].tolist())
        assert left == {each for row in expected for each in row} & measured
        assert not bool((sequences.segment(name) & ~sequences.attention_mask).any())
    assert TokenBatch.concatenate([batch]) == batch
    assert batch.with_segments({name: batch.segment(name) for name in ("plan", "answer")}) == batch


@given(batch=batches())
def test_built_in_segments_are_what_they_say(batch: TokenBatch) -> None:
    prompt, response, first = (batch.segment(name) for name in ("prompt", "response", "first"))
    assert torch.equal(prompt | response, batch.attention_mask)
    assert not bool((prompt & response).any())
    for example in range(batch.batch_size):
        columns = batch.attention_mask[example].nonzero()[:, 0].tolist()
        numbers = [0] * len(columns)
        if batch.segment_ids is not None:
            numbers = batch.segment_ids[example, columns].tolist()
        begins = {number: column for column, number in reversed(list(zip(columns, numbers, strict=True)))}
        assert first[example].nonzero()[:, 0].tolist() == sorted(begins.values())


def test_a_segment_is_a_mask_slices_or_an_expression() -> None:
    ids = [[5, 6, 7, 8, 9], [5, 6, 7]]
    batch = TokenBatch.from_ids(
        ids,
        segments={
            "ragged": [[0, 1, 1, 0, 0], [0, 0, 1]],
            "columns": slice(1, 4),
            "each": [slice(0, 2), [slice(0, 1), slice(2, 9)]],
        },
    )
    assert marked(batch, "ragged") == [[6, 7], [7]]
    assert marked(batch, "columns") == [[6, 7, 8], [6, 7]]
    assert marked(batch, "each") == [[5, 6], [5, 7]]
    assert TokenBatch.of({"input_ids": ids, "segments": {"plan": slice(1)}}).segment_names == ("plan",)
    with_texts = TokenBatch(batch.input_ids, batch.attention_mask, batch.response_mask, texts=TEXTS)
    thought = with_texts.with_segments({"plan": re.compile("<think>.*?</think>|an$")})
    assert marked(thought, "plan") == [[6, 7, 8], [7]]
    replaced = thought.with_segments({"plan": torch.zeros(2, 5), "answer": slice(4, 5)})
    assert marked(replaced, "plan") == [[], []]
    assert marked(replaced, "answer") == [[9], []]


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (slice(50, 60), "marks none of the 2 columns"),
        (slice(2, 1), "marks none"),
        (re.compile(b"x"), "bytes"),
    ],
)
def test_a_segment_of_nothing_is_refused(segment, message: str) -> None:
    batch = TokenBatch.from_ids([[5, 6]])
    with pytest.raises(BatchError, match=message):
        batch.with_segments({"plan": segment})


def test_rollouts_have_segments_in_the_columns_of_the_whole() -> None:
    batch = TokenBatch.from_rollout(
        [[0, 5]], [[0, 1]], [[6, 7, 0]], [[1, 1, 0]], segments={"plan": [[0, 1, 1, 0, 0]]}
    )
    assert marked(batch, "plan") == [[5, 6]]
    assert "segment_names=('plan',)" in repr(batch)


def test_a_name_that_a_part_lacks_is_empty_there(tmp_path: Path) -> None:
    one, two = TokenBatch.from_ids([[5, 6]], segments={"plan": slice(1)}), TokenBatch.from_ids([[7, 8, 9]])
    three = TokenBatch.from_ids([[4]], segments={"answer": slice(1), "plan": slice(1)})
    joined = TokenBatch.concatenate([one, two, three])
    assert joined.segment_names == ("plan", "answer")
    assert marked(joined, "plan") == [[5], [], [4]]
    assert marked(joined, "answer") == [[], [], [4]]
    assert TokenBatch.load(joined.save(tmp_path / "batch.safetensors")) == joined
    assert joined.to("cpu") == joined
    assert joined != joined.with_segments({"plan": torch.zeros(3, 3)})


WRONG: dict[str, Any] = {
    "built in": {"first": slice(1)},
    "padding": {"plan": [[1, 1, 1], [1, 1, 1]]},
    "shape": {"plan": [[1, 1]]},
    "values": {"plan": torch.full((2, 3), 0.5)},
    "examples": {"plan": [slice(1)]},
    "mixed": {"plan": [slice(1), 3]},
    "slice": {"plan": slice("a", "b")},
    "no texts": {"plan": re.compile("a")},
    "no name": {"": slice(1)},
    "not a name": {5: slice(1)},
    "no mapping": [slice(1)],
}


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_segment_is_refused(name: str) -> None:
    refused(lambda: TokenBatch.from_ids([[5, 6, 7], [5, 6]], segments=WRONG[name]), error=BatchError)


@pytest.mark.usefixtures("as_users_call")
def test_a_segment_that_is_not_there_is_named() -> None:
    batch = TokenBatch.from_ids([[5, 6]], segments={"plan": slice(1)})
    refused(lambda: batch.segment("answer"), "answer", "plan", "first", error=ParameterError)
    mask: Tensor = torch.ones(1, 1, 2, dtype=torch.bool)
    for names in (("first",), (), ("a", "b"), ("",)):
        refused(
            lambda n=names: TokenBatch(
                batch.input_ids, batch.attention_mask, batch.response_mask, segments=mask, segment_names=n
            ),
            error=AttnprobeError,
        )

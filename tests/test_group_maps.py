"""Maps of head groups and their shares, against means over eager maps, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from refusals import refused
from torch import Tensor

import attnprobe
from attnprobe import GroupMaps, ParameterError, TokenBatch
from attnprobe.testing.tiny_models import VOCABULARY, tiny_model
from attnprobe.testing.tiny_vision import image_inputs, tiny_vision_model

HEADS: dict[str, Any] = {
    "local": {(0, 1): 0.5, (1, 2): 2.0, (2, 0): 1.0},
    # One head is in both groups, and no local head shares its layer with the last.
    "global": [(0, 1), (1, 0), (1, 3)],
}
FAMILIES = ("llama", "mistral", "qwen2", "gemma2", "gpt_oss", "gpt2", "bloom")
LENGTHS, STARTS = (21, 30, 26), (6, 9, 0)
SHARES = ("prompt_share", "first_share")


def batch_of(side: str) -> TokenBatch:
    """Three examples of different lengths: the second answers in two parts, the third without a prompt."""
    tokens = max(LENGTHS)
    ids = torch.randint(1, VOCABULARY, (3, tokens), generator=torch.Generator().manual_seed(5))
    real = torch.stack([torch.arange(tokens) < length for length in LENGTHS])
    response = torch.stack([torch.arange(tokens) >= start for start in STARTS]) & real
    response[1, 15:19] = False
    if side == "left":
        real, response = (
            real.flip(1),
            torch.stack([row.roll(tokens - length) for row, length in zip(response, LENGTHS, strict=True)]),
        )
    return TokenBatch.from_ids(ids, real, response_mask=response)


def expected_of(patterns: list[Tensor], tokens: list[int], first: int, group: str) -> dict[str, Tensor]:
    """The definitions, head by head in float64; patterns are `[head, query, key]`, one for each layer."""
    selection = HEADS[group]
    weights = selection if isinstance(selection, dict) else dict.fromkeys(selection, 1.0)
    mean = sum(weight * patterns[layer][head].double() for (layer, head), weight in weights.items())
    mean = mean / sum(weights.values())
    return {
        "map": mean[tokens][:, tokens],
        "prompt_share": mean[tokens, : tokens[0]].sum(-1),
        "first_share": mean[tokens, first],
    }


def check(maps: GroupMaps, place: int, patterns: list[Tensor], tokens: list[int], first: int) -> None:
    """Check one response of some maps; NaN after its end."""
    count = len(tokens)
    assert maps.columns_of(place) == tokens
    for group in ("local", "global"):
        for name, values in expected_of(patterns, tokens, first, group).items():
            found = getattr(maps, f"{group}_{name}")[place]
            inside = (slice(0, count),) * values.ndim
            torch.testing.assert_close(found[inside].double(), values, rtol=0, atol=1e-5)
            assert bool(found[count:].isnan().all())
            assert float(found[inside].min()) >= 0
            assert float(found[inside].max()) <= 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_and_shares_are_means_over_eager_maps(family: str, side: str) -> None:
    """Windows, soft caps, sinks, grouped queries and maps read densely; padding, gaps and no prompt."""
    batch, eager = batch_of(side), tiny_model(family, implementation="eager")
    maps = attnprobe.group_maps(tiny_model(family), batch, HEADS, example=None)
    for example in range(3):
        real = batch.attention_mask[example].nonzero()[:, 0]
        with torch.no_grad():
            attentions = eager(
                batch.input_ids[example : example + 1, real], output_attentions=True
            ).attentions
        first = int(real[0])
        patterns = [torch.nn.functional.pad(each[0], (first, 0, first, 0)) for each in attentions]
        check(maps, example, patterns, batch.response_mask[example].nonzero()[:, 0].tolist(), first)
    for group in ("local", "global"):
        total = getattr(maps, f"{group}_map")[0].nan_to_num().sum(-1)
        total = (total + getattr(maps, f"{group}_prompt_share")[0])[: LENGTHS[0] - STARTS[0]]
        if family == "gpt_oss":
            assert float(total.max()) < 0.9999
        else:
            torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


@pytest.mark.parametrize("token_budget", [None, 1, 60])
def test_several_maps_are_those_of_each(token_budget: int | None) -> None:
    """In the caller's order, whichever run together."""
    model, batch = tiny_model("llama"), batch_of("left")
    alone = [attnprobe.group_maps(model, batch, HEADS, example=example) for example in range(3)]
    for examples in ([2, 0], [1], torch.tensor([0, 1, 2]), None, [1, 1]):
        found = attnprobe.group_maps(model, batch, HEADS, example=examples, token_budget=token_budget)
        numbers = range(3) if examples is None else list(examples)
        expected = GroupMaps.concatenate([alone[int(number)] for number in numbers])
        assert torch.equal(found.columns, expected.columns)
        assert torch.equal(found.input_ids, expected.input_ids)
        assert found.provenance == expected.provenance
        for name in ("map", *SHARES):
            for group in ("local", "global"):
                ours, theirs = (getattr(each, f"{group}_{name}") for each in (found, expected))
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_maps_beside_an_image() -> None:
    """All examples run together, padding on the left included, and are given in the order asked for."""
    inputs = image_inputs("qwen2_5_vl", padding=3)
    mask = inputs["attention_mask"].bool().clone()
    mask[:, :12] = False
    maps = attnprobe.group_maps(
        tiny_vision_model("qwen2_5_vl"),
        {**inputs, "response_mask": mask},
        {"local": [(0, 1)], "global": [(1, 2)]},
        example=[1, 0],
    )
    eager = tiny_vision_model("qwen2_5_vl", implementation="eager")
    with torch.no_grad():
        attentions = eager(**inputs, output_attentions=True).attentions
    for place, example in enumerate([1, 0]):
        tokens = mask[example].nonzero()[:, 0].tolist()
        first = int(inputs["attention_mask"][example].argmax())
        row = attentions[1][example, 2].double()
        count = len(tokens)
        for name, expected in (
            ("map", row[tokens][:, tokens]),
            ("prompt_share", row[tokens, first : tokens[0]].sum(-1)),
            ("first_share", row[tokens, first]),
        ):
            found = getattr(maps, f"global_{name}")[place]
            inside = (slice(0, count),) * expected.ndim
            torch.testing.assert_close(found[inside].double(), expected, rtol=1e-4, atol=1e-5)


def test_long_answers_take_many_tiles() -> None:
    """Some of whose blocks hold prompt and response, and some a window."""
    tokens, start = 700, 230
    ids = torch.randint(1, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(6))
    settings: dict[str, Any] = {"max_position_embeddings": 1024}
    for family, changes in (("llama", {}), ("mistral", {"sliding_window": 150})):
        model = tiny_model(family, **settings, **changes)
        maps = attnprobe.group_maps(model, TokenBatch.from_ids(ids, response_start=start), HEADS)
        with torch.no_grad():
            eager = tiny_model(family, implementation="eager", **settings, **changes)
            patterns = [each[0] for each in eager(ids, output_attentions=True).attentions]
        check(maps, 0, patterns, list(range(start, tokens)), 0)


def test_older_files_have_no_shares(tmp_path: Any) -> None:
    """And results with and without them are not joined."""
    maps = attnprobe.group_maps(tiny_model("llama"), batch_of("right"), HEADS, example=[0, 1])
    names = [f"{group}_{share}" for group in ("local", "global") for share in SHARES]
    older = replace(maps, **dict.fromkeys(names))
    assert GroupMaps.load(older.save(tmp_path / "older")) == older
    assert GroupMaps.load(maps.save(tmp_path / "maps")) == maps
    assert "local_prompt_share" not in older.to_pandas()
    trimmed = maps.select(0, trim=True)
    assert trimmed.local_prompt_share.shape == (1, 15)
    refused(lambda: GroupMaps.concatenate([maps, older]), "share", error=attnprobe.ResultError)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("example", [3, -1, [0, 3], [], "all", True, [True, False, True], 0.5, [[0, 1]]])
def test_examples_that_are_none_are_refused(example: Any) -> None:
    model, batch = tiny_model("llama"), batch_of("right")
    refused(
        lambda: attnprobe.group_maps(model, batch, HEADS, example=example), "example", error=ParameterError
    )


def test_packed_examples_are_named() -> None:
    """The one that packs several sequences, not the others."""
    positions = [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]]
    batch = TokenBatch.from_ids(torch.randint(1, 9, (2, 6)), position_ids=torch.tensor(positions))
    model = tiny_model("llama")
    assert attnprobe.group_maps(model, batch, HEADS, example=0).columns_of(0) == list(range(6))
    refused(
        lambda: attnprobe.group_maps(model, batch, HEADS, example=None),
        "example 1 packs 2 sequences",
        error=ParameterError,
    )

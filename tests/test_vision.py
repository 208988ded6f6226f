"""Vision-language models: images are part of the text that is read, or are refused with the reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from refusals import refused
from transformers import BatchFeature

import attnprobe
from attnprobe import TokenBatch, metrics
from attnprobe.errors import BatchError, ParameterError, UnsupportedModelError
from attnprobe.report.response import read_response
from attnprobe.testing.tiny_vision import (
    IMAGE_TOKEN,
    MUTUAL_FAMILIES,
    VISION_FAMILIES,
    image_inputs,
    tiny_vision_model,
)

SETTINGS: dict[str, Any] = {"window": 4, "horizon": (2, 6)}


def responses(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = inputs["attention_mask"].bool().clone()
    mask[:, :12] = False
    return mask


def eager_maps(family: str, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The maps of the model's own text decoder, in float64 from here on; padding queries see nothing."""
    model = tiny_vision_model(family, implementation="eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    real = inputs["attention_mask"].bool()[:, None, :, None]
    return [pattern.double().masked_fill(~real, 0.0) for pattern in maps]


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_measuring_a_processors_output_gives_the_numbers_of_the_eager_maps(family: str, padding: int) -> None:
    inputs = image_inputs(family, padding=padding)
    mask = responses(inputs)
    given = BatchFeature({**inputs, "response_mask": mask})
    found = attnprobe.measure(tiny_vision_model(family), given, **SETTINGS)
    for place, pattern in enumerate(eager_maps(family, inputs)):
        expected = {
            "span": metrics.mean_attention_distance(pattern, mask),
            "fai": metrics.future_attention_influence(pattern, mask, horizon=(2, 6)),
            "waad": metrics.windowed_attention_distance(pattern, window=4).masked_fill(
                ~mask[:, None], torch.nan
            ),
        }
        for name, values in expected.items():
            ours = getattr(found, name)[:, place].double()
            torch.testing.assert_close(ours, values, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_measuring_is_attaching_around_the_models_own_call(family: str) -> None:
    """Everything counts as response here, so that the first tokens, which nothing predicts, do too."""
    model, inputs = tiny_vision_model(family), image_inputs(family, padding=3)
    real = inputs["attention_mask"]
    probe = attnprobe.HeadStatisticsProbe(**SETTINGS)
    with torch.no_grad(), attnprobe.attach(model, probe, response_mask=real):
        model(**inputs)
    theirs, ours = probe.result(), attnprobe.measure(model, inputs, **SETTINGS)
    assert torch.equal(theirs.response_mask, ours.response_mask)
    for name in ("span", "waad", "fai", "entropy"):
        torch.testing.assert_close(
            getattr(theirs, name), getattr(ours, name), rtol=1e-4, atol=1e-4, equal_nan=True
        )


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_maps_of_a_chosen_example(family: str) -> None:
    inputs = image_inputs(family, padding=3)
    batch = TokenBatch.of({**inputs, "response_mask": responses(inputs)})
    maps = attnprobe.group_maps(
        tiny_vision_model(family), batch, local_heads=[(0, 1)], global_heads=[(1, 2), (1, 3)], example=1
    )
    eager = eager_maps(family, inputs)
    assert maps.columns_of(0) == list(range(12, 27))
    torch.testing.assert_close(maps.local_map[0].double(), eager[0][1, 1, 12:, 12:], rtol=1e-4, atol=1e-5)
    mean = eager[1][1, 2:4, 12:, 12:].mean(0)
    torch.testing.assert_close(maps.global_map[0].double(), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_generation_under_way_is_not_disturbed(family: str) -> None:
    """These models keep the offset of their positions after an image in an attribute."""
    model, inputs = tiny_vision_model(family), image_inputs(family)
    flipped = {name: inputs[name].flip(1) for name in ("input_ids", "mm_token_type_ids")}
    with torch.no_grad():
        model(**inputs)
        before = model.model.rope_deltas.clone()
        attnprobe.measure(model, {**inputs, **flipped})
    assert torch.equal(before, model.model.rope_deltas)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_generating_after_an_image(family: str) -> None:
    """The cache of a generation with an image gives the numbers of one pass over the finished text."""
    model, inputs = tiny_vision_model(family), image_inputs(family)
    probe = attnprobe.HeadStatisticsProbe(**SETTINGS)
    nothing = torch.zeros_like(inputs["attention_mask"])
    with attnprobe.attach(model, probe, response_mask=nothing):
        out = model.generate(**inputs, max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0)
    grown = probe.result()
    finished = {**inputs, "input_ids": out[:, :-1], "attention_mask": torch.ones_like(out[:, :-1])}
    if "mm_token_type_ids" in inputs:
        finished["mm_token_type_ids"] = (out[:, :-1] == IMAGE_TOKEN).int()
    whole = attnprobe.measure(model, {**finished, "response_mask": grown.response_mask}, **SETTINGS)
    for name in ("span", "waad", "fai", "entropy"):
        torch.testing.assert_close(
            getattr(grown, name), getattr(whole, name), rtol=1e-3, atol=1e-3, equal_nan=True
        )


def test_a_report_shows_an_image_once() -> None:
    """With a tokenizer as a marker, without one as an id with its count, and never token by token."""

    class Named:
        def decode(self, ids: list[int], **options: Any) -> str:
            return "".join("<|image_pad|>" if token == IMAGE_TOKEN else f" w{token}" for token in ids)

    inputs = image_inputs("llava")
    inputs["input_ids"][:, 12:22] = IMAGE_TOKEN
    inputs["pixel_values"] = inputs["pixel_values"][:1].expand(7, -1, -1, -1)
    model = tiny_vision_model("llava")
    for named in (True, False):
        batch = TokenBatch.of(inputs, tokenizer=Named() if named else None)
        assert batch.model_inputs is not None
        statistics = attnprobe.measure(model, batch, horizon=(1, 8))
        heads = attnprobe.classify_heads(statistics)
        scores = attnprobe.score_tokens(statistics, heads)
        rhythm = attnprobe.find_rhythm(scores)
        tokens = read_response(batch, scores, rhythm, 0)
        page = attnprobe.Report(batch, statistics, heads, scores, rhythm).html()
        texts = [token.text for token in tokens]
        if named:
            assert texts[5:9] == texts[12:16] == ["<image>", "", "", ""]
            assert "image_pad" not in page
        else:
            assert texts[12:22] == [f"{IMAGE_TOKEN}\u00d710 ", *[""] * 9]
            assert texts[22] == f"{int(inputs['input_ids'][0, 22])} "


# ---- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*VISION_FAMILIES, "gemma3"])
def test_image_tokens_without_pixels_are_refused(family: str) -> None:
    model, inputs = tiny_vision_model(family), image_inputs(family)
    ids = inputs["input_ids"]
    facts = ("8 image tokens", IMAGE_TOKEN, "pixels")
    refused(lambda: attnprobe.measure(model, ids), *facts, error=BatchError)
    refused(
        lambda: attnprobe.group_maps(model, ids, local_heads=[0], global_heads=[1]),
        "4 image",
        error=BatchError,
    )
    refused(lambda: attnprobe.knockout_divergence(model, ids, ids > 0), *facts, error=BatchError)
    attnprobe.measure(model, ids.masked_fill(ids == IMAGE_TOKEN, 5))


@pytest.mark.parametrize("family", MUTUAL_FAMILIES)
def test_images_whose_tokens_see_each_other_are_refused(family: str) -> None:
    model, inputs = tiny_vision_model(family), image_inputs(family)
    facts = ("tokens of an image", "see each other")
    refused(lambda: attnprobe.measure(model, inputs), *facts, error=UnsupportedModelError)

    def attached() -> None:
        with torch.no_grad(), attnprobe.attach(model, attnprobe.HeadStatisticsProbe()):
            model(**inputs)

    refused(attached, *facts, error=UnsupportedModelError)


def test_inputs_of_another_model_are_refused() -> None:
    model = tiny_vision_model("llava")
    refused(
        lambda: attnprobe.measure(model, image_inputs("qwen2_vl")),
        "image_grid_thw",
        "another",
        error=BatchError,
    )
    fewer = image_inputs("llava")
    fewer["pixel_values"] = fewer["pixel_values"][:1]
    refused(lambda: attnprobe.measure(model, fewer), "cannot run these inputs", error=BatchError)


def test_a_batch_with_images_is_not_taken_apart() -> None:
    """Which rows of the pixels belong to which example only the model knows."""
    inputs = image_inputs("qwen2_vl")
    batch = TokenBatch.of(inputs)
    assert batch.model_inputs is not None
    assert list(batch.model_inputs) == ["pixel_values", "image_grid_thw", "mm_token_type_ids"]
    assert "pixel_values: float32 [32, 48]" in repr(batch)
    assert batch.select([0, 1]) == batch == batch.to("cpu")
    assert batch != replace(batch, model_inputs=None)
    refused(lambda: batch.select(0), "pixel_values", "select", error=BatchError)
    refused(lambda: batch.select([1, 0]), "pixel_values", error=BatchError)
    refused(lambda: batch.at_columns(slice(4, None)), "pixel_values", error=BatchError)
    refused(lambda: batch.sequences(), "pixel_values", error=BatchError)
    refused(lambda: batch.save("nowhere"), "pixel_values", "save", error=BatchError)
    refused(lambda: TokenBatch.concatenate([batch, batch]), "pixel_values", "join", error=BatchError)
    refused(
        lambda: attnprobe.measure(tiny_vision_model("qwen2_vl"), batch, batch_size=1),
        "pixel_values",
        "whole",
        error=ParameterError,
    )
    refused(
        lambda: attnprobe.knockout_divergence(tiny_vision_model("qwen2_vl"), batch, batch.response_mask),
        "pixel_values",
        error=BatchError,
    )


def test_positions_of_a_processor_are_passed_on() -> None:
    """Those in an image have three axes; packed ones cannot be run as they are."""
    inputs = image_inputs("qwen2_vl")
    own = torch.arange(27).expand(3, 2, -1)
    model = tiny_vision_model("qwen2_vl")
    given = attnprobe.measure(model, {**inputs, "position_ids": own})
    assert not torch.allclose(given.span, attnprobe.measure(model, inputs).span, atol=1e-3)
    packed = torch.cat([torch.arange(13), torch.arange(14)]).expand(2, -1)
    refused(lambda: TokenBatch.of({**inputs, "position_ids": packed}), "packed", error=BatchError)


def test_types_that_mark_an_image_need_it() -> None:
    ids = torch.ones(1, 4, dtype=torch.long)
    refused(
        lambda: TokenBatch.of({"input_ids": ids, "mm_token_type_ids": ids}), "pixel_values", error=BatchError
    )
    assert TokenBatch.of({"input_ids": ids, "mm_token_type_ids": ids * 0}).model_inputs is None

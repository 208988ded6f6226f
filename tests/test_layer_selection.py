"""Names for layers: the five of a third that the paper measures, and whole thirds."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnprobe
from attnprobe.errors import ParameterError
from attnprobe.layer_selection import LAYER_NAMES, named_layers
from attnprobe.testing.tiny_models import tiny_model


@given(st.sets(st.integers(0, 90), min_size=3).map(lambda found: tuple(sorted(found))))
def test_thirds_share_out_all_layers(available: tuple[int, ...]) -> None:
    thirds = [named_layers(f"{third} third", available) for third in ("bottom", "middle", "top")]
    assert sum(thirds, ()) == available
    assert max(map(len, thirds)) - min(map(len, thirds)) <= 1


@given(st.integers(1, 100), st.sampled_from(("bottom", "middle", "top")))
def test_the_five_of_a_third_are_evenly_spaced_in_it(count: int, name: str) -> None:
    chosen = named_layers(name, tuple(range(count)))
    third = ("bottom", "middle", "top").index(name)
    assert chosen[0] == third * count // 3
    assert chosen[-1] == min((third + 1) * count // 3, count - 1)
    assert len(chosen) == min(5, chosen[-1] - chosen[0] + 1)
    steps = [after - before for before, after in itertools.pairwise(chosen)]
    assert not steps or max(steps) - min(steps) <= 1


def test_the_papers_layers_are_those_of_its_definition() -> None:
    # Qwen3-4B has 36 layers: floor(36 / 3) to floor(2 * 36 / 3).
    assert named_layers("middle", tuple(range(36))) == (12, 15, 18, 21, 24)


def test_names_mean_the_same_for_a_model_and_for_what_was_measured() -> None:
    model = tiny_model("llama", num_hidden_layers=7)
    batch = attnprobe.TokenBatch.from_ids(torch.arange(1, 21)[None], response_start=4)
    whole = attnprobe.measure(model, batch, horizon=(1, 4))
    for name in LAYER_NAMES:
        part = attnprobe.measure(model, batch, layers=name, horizon=(1, 4), entropy=False)
        chosen = whole.at_layers(name)
        assert chosen.layers == part.layers
        torch.testing.assert_close(chosen.span, part.span)


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("last", 9, "'all', 'bottom', .* got 'last'"),
        ("top third", 2, "'top third' needs at least three layers .* there are 2"),
    ],
)
def test_names_without_a_meaning_are_refused(name: str, count: int, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        named_layers(name, tuple(range(count)))

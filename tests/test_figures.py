"""Figures for a paper: what is drawn is what was measured, and nothing else is touched."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import pytest
import torch
from matplotlib.figure import Figure

import attnprobe
from attnprobe import figures
from attnprobe.colours import SCORE_LOOKS
from attnprobe.errors import MissingDependencyError, ParameterError, ResultError
from attnprobe.figures.attention import pooled_map
from attnprobe.figures.paper import WIDTH
from attnprobe.maps import GroupMaps
from attnprobe.rhythm import find_peaks
from attnprobe.testing.tiny_models import tiny_model

PROMPT, COUNT = 5, 40
HOSTILE = ("So", " $x_1$", "\\frac{1}{2}", " a_b^c", " %#&~{}", " שלום", "\u200b", "\n", "\x1b[31m", "<b>")
NAMES = ("waad", "fai", "receiver_fai", "entropy")


def make_scores(texts: tuple[str, ...] | None = None, count: int = COUNT, **changes: Any) -> Any:
    """Return scores of two responses after a prompt; the last tokens have no FAI."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, PROMPT + count)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[:, :PROMPT] = False
    values = {name: torch.rand(shape, generator=generator).masked_fill(~mask, math.nan) for name in NAMES}
    values["fai"][:, -8:] = math.nan
    known = (("p",) * PROMPT + texts,) * 2 if texts is not None else None
    ids = torch.randint(5, 99, shape, generator=generator)
    scores = attnprobe.TokenScores(response_mask=mask, texts=known, input_ids=ids, **values)
    return dataclasses.replace(scores, **changes)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    model = tiny_model("llama")
    batch = attnprobe.TokenBatch.from_ids(torch.randint(1, 60, (2, 60)), response_start=12)
    statistics = attnprobe.measure(model, batch, receiver=True)
    groups = attnprobe.classify_heads(statistics, receivers=2)
    return {"model": model, "batch": batch, "statistics": statistics, "groups": groups}


def line(axes: Any, label: str) -> tuple[list[float], list[float]]:
    """Return the data of the line with a label."""
    (found,) = [each for each in axes.lines if each.get_label() == label]
    return list(found.get_xdata()), list(found.get_ydata())


# ---- the rhythm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("within", [None, (7, 30), (31, None)])
def test_curves_and_peaks_are_those_of_the_results(within: Any) -> None:
    scores = make_scores()
    rhythm = attnprobe.find_rhythm(scores)
    figure = figures.rhythm(scores, rhythm, example=1, within=within)
    first, stop = within or (0, None)
    shown = slice(PROMPT + first, None if stop is None else PROMPT + stop)
    marks = {"waad": "preplan", "fai": "anchor", "receiver_fai": "peak of receivers", "entropy": None}
    receivers = find_peaks(scores.receiver_fai, quantile=rhythm.quantile)
    masks = {"preplan": rhythm.preplan, "anchor": rhythm.anchor, "peak of receivers": receivers}
    for axes, name in zip(figure.axes, NAMES, strict=True):
        values = getattr(scores, name)[1]
        places, drawn = line(axes, "_curve")
        assert places == list(range(first, stop or COUNT))
        assert numpy.array_equal(drawn, values[shown].double().numpy(), equal_nan=True)
        assert SCORE_LOOKS[name].unit in axes.get_ylabel()
        label = marks[name]
        if label is None:
            continue
        expected = [p for p in range(first, stop or COUNT) if masks[label][1, PROMPT + p]]
        if not expected:
            assert label not in axes.get_legend_handles_labels()[1]
            continue
        places, drawn = line(axes, label)
        assert places == expected
        assert drawn == [float(values[PROMPT + p]) for p in expected]
    assert figure.axes[-1].get_xlabel() == "response token"


def test_a_gap_breaks_the_curves_and_what_is_undefined_is_hatched() -> None:
    scores = make_scores()
    mask = scores.response_mask.clone()
    mask[:, PROMPT + 10 : PROMPT + 13] = False
    scores = dataclasses.replace(scores, response_mask=mask)
    waad, fai = figures.rhythm(scores).axes[:2]
    places, values = line(waad, "_curve")
    assert places == [*range(11), *range(13, COUNT)]
    assert [place for place, value in zip(places, values, strict=True) if math.isnan(value)] == [10]
    assert [each.get_hatch() for each in fai.collections] == ["//////"]
    (stretch,) = [each for each in fai.collections[0].get_paths() if each.get_extents().x1 > 20]
    assert stretch.get_extents().x0 == COUNT - 8.5


def test_an_influence_over_few_rows_stands_apart_and_sets_no_scale(measured: dict[str, Any]) -> None:
    """With the horizon (10, 100), tokens 10 to 18 before the end have fewer than ten rows after them."""
    scores = attnprobe.score_tokens(measured["statistics"], measured["groups"])
    fai = scores.fai.clone()
    fai[0, 45] = 100.0
    changed = dataclasses.replace(scores, fai=fai)
    rhythm = attnprobe.find_rhythm(changed)
    assert bool(rhythm.anchor[0, 45])
    panel = figures.rhythm(changed, rhythm).axes[1]
    places, values = line(panel, "_curve")
    assert [place for place, value in zip(places, values, strict=True) if not math.isnan(value)][-1] == 28
    dotted = dict(zip(*line(panel, "_few rows"), strict=True))
    assert dotted[33] == 100.0
    assert panel.get_ylim()[1] < 2 * float(fai[0, 12:41].nan_to_num().max())
    hollow = [each for each in panel.lines if each.get_label() == "anchor, few rows"]
    assert 33 in list(hollow[0].get_xdata())
    assert hollow[0].get_markerfacecolor() == "white"


def test_a_rhythm_of_other_weights_is_refused(measured: dict[str, Any]) -> None:
    """Two checkpoints of one name, as before and after training."""
    trained = copy.deepcopy(measured["model"])
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    scores = attnprobe.score_tokens(measured["statistics"], measured["groups"])
    later = attnprobe.score_tokens(attnprobe.measure(trained, measured["batch"]), measured["groups"])
    for draw in (figures.rhythm, figures.tokens):
        with pytest.raises(ResultError, match="rhythm is of other scores"):
            draw(scores, attnprobe.find_rhythm(later))


def test_scores_that_are_undefined_everywhere_are_said_to_be() -> None:
    scores = make_scores()
    scores = dataclasses.replace(scores, fai=torch.full_like(scores.fai, math.nan), entropy=None)
    figure = figures.rhythm(scores, attnprobe.find_rhythm(scores))
    assert len(figure.axes) == 3
    assert [text.get_text() for text in figure.axes[1].texts] == ["undefined"]


def test_weighted_influence_has_another_unit() -> None:
    provenance = attnprobe.Provenance(value_weighted=True)
    figure = figures.rhythm(make_scores(provenance=provenance))
    assert "residual units" in figure.axes[1].get_ylabel()
    assert "tokens" in figure.axes[0].get_ylabel()


# ---- heads and maps -------------------------------------------------------------------------------


def test_the_grid_shows_the_spans_and_marks_the_groups(measured: dict[str, Any]) -> None:
    groups = measured["groups"]
    span = groups.span.clone()
    span[1, 2] = math.nan
    figure = figures.heads(dataclasses.replace(groups, span=span))
    axes, bar = figure.axes
    drawn = axes.images[0].get_array()
    assert numpy.array_equal(drawn.filled(math.nan), span.T.double().numpy(), equal_nan=True)
    for name in ("local", "global", "receiver"):
        places = {(int(x), int(y)) for x, y in zip(*line(axes, name), strict=True)}
        assert places == {(layer, head) for layer, head in groups.mask(name).nonzero().tolist()}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "head")
    assert bar.get_ylabel() == "mean span (tokens)"


def test_layers_are_numbered_as_in_the_model(measured: dict[str, Any]) -> None:
    groups = attnprobe.classify_heads(measured["statistics"].at_layers([0, 2]), receivers=1)
    axes = figures.heads(groups).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "2"]


@pytest.mark.parametrize(("example", "within"), [(0, None), (1, (10, 31))])
def test_maps_are_those_of_the_groups(measured: dict[str, Any], example: int, within: Any) -> None:
    maps = GroupMaps.concatenate(
        attnprobe.group_maps(measured["model"], measured["batch"], measured["groups"], example=i)
        for i in range(2)
    )
    figure = figures.maps(maps, example=example, within=within)
    first, stop = within or (0, 48)
    for axes, whole in zip(figure.axes, (maps.local_map, maps.global_map), strict=False):
        expected = whole[example, first:stop, first:stop].masked_fill(
            torch.ones(stop - first, stop - first).triu(1).bool(), math.nan
        )
        drawn = axes.images[0].get_array().filled(math.nan)
        assert numpy.array_equal(drawn, expected.numpy(), equal_nan=True)
        assert list(axes.images[0].get_extent()) == [first - 0.5, stop - 0.5, stop - 0.5, first - 0.5]
        assert axes.get_xlabel() == "key (response token)"
    assert figure.axes[0].get_ylabel() == "query (response token)"
    assert figure.axes[2].get_xlabel() == "attention"


def test_the_map_of_a_head_is_that_head_alone(measured: dict[str, Any]) -> None:
    model, batch = measured["model"], measured["batch"]
    axes = figures.head_map(model, batch, 2, 1, example=1).axes[0]
    expected = attnprobe.group_maps(model, batch, [(2, 1)], example=1).local_map[0]
    drawn = axes.images[0].get_array().filled(0.0)
    assert numpy.array_equal(drawn, expected.tril().numpy())
    assert axes.get_title() == "L2H1"
    with pytest.raises(ParameterError, match="9"):
        figures.head_map(model, batch, 9, 0)


def test_a_long_map_is_pooled_to_the_largest_of_each_block() -> None:
    whole = torch.rand(1100, 1100, generator=torch.Generator().manual_seed(0)).tril()
    axes = figures.maps(GroupMaps(whole[None], whole[None], torch.arange(1100)[None])).axes[0]
    assert len(axes.images[0].get_array()) == 367
    cell = pooled_map(whole, 3)[100, 20]
    assert float(cell) == float(whole[300:303, 60:63].max())


# ---- text -----------------------------------------------------------------------------------------


def test_hostile_texts_are_drawn_as_they_are(tmp_path: Path) -> None:
    """Neither mathtext nor TeX sees them; what has no shape gets a symbol or its code."""
    scores = make_scores(HOSTILE * 4)
    with matplotlib.rc_context({"text.usetex": True}):
        figure = figures.tokens(scores, attnprobe.find_rhythm(scores))
    drawn = figure.axes[0].texts
    assert not any(text.get_usetex() or text.get_parse_math() for text in drawn)
    shown = ("⟨200B⟩", "↵", "⟨1B⟩[31m")
    expected = [*HOSTILE[:6], *shown, "<b>"]
    assert [text.get_text() for text in drawn] == expected * 4
    # As XML, since SVG keeps text as text.
    figure.savefig(tmp_path / "text.svg")
    written = (tmp_path / "text.svg").read_text(encoding="utf-8")
    assert "$x_1$" in written
    assert "\\frac{1}{2}" in written
    assert "&lt;b&gt;" in written


def test_tokens_have_the_colours_of_their_score_and_lie_side_by_side() -> None:
    scores = make_scores(tuple(f" word{i}" for i in range(COUNT)))
    rhythm = attnprobe.find_rhythm(scores)
    axes = figures.tokens(scores, rhythm, score="fai", within=(3, COUNT)).axes[0]
    values = scores.fai[0, PROMPT + 3 :]
    assert len(axes.patches) == len(axes.texts) == COUNT - 3
    defined = [i for i in range(COUNT - 3) if not math.isnan(values[i])]
    assert [i for i in range(COUNT - 3) if axes.patches[i].get_hatch() is None] == defined
    by_value = sorted(defined, key=lambda i: float(values[i]))
    redness = [axes.patches[i].get_facecolor()[0] for i in by_value]
    assert redness == sorted(redness, reverse=True)
    assert redness[0] > redness[-1]
    room = axes.get_xlim()[1]
    for before, after in zip(axes.patches, axes.patches[1:], strict=False):
        end = before.get_x() + before.get_width()
        assert end <= room
        next_line = after.get_y() > before.get_y()
        assert after.get_x() == (0 if next_line else pytest.approx(end))
    anchors, _ = line(axes, "anchor")
    assert len(anchors) == int(rhythm.anchor[0, PROMPT + 3 :].sum())


def test_a_token_longer_than_a_line_is_broken_and_several_scores_stand_below_each_other() -> None:
    scores = make_scores(("x" * 300, *["y"] * (COUNT - 1)))
    figure = figures.tokens(scores, score=("waad", "entropy"))
    panels = [axes for axes in figure.axes if axes.texts]
    assert [axes.get_title(loc="left") for axes in panels] == ["WAAD", "entropy"]
    for axes in panels:
        text = "".join(text.get_text() for text in axes.texts)
        assert text == "x" * 300 + "y" * (COUNT - 1)
        assert all(patch.get_x() + patch.get_width() <= axes.get_xlim()[1] for patch in axes.patches)


# ---- all figures ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(measured: dict[str, Any]) -> dict[str, Any]:
    scores = make_scores(HOSTILE * 4)
    rhythm = attnprobe.find_rhythm(scores)
    before, axes = dict(matplotlib.rcParams), sys.modules.get("matplotlib.pyplot")
    maps = attnprobe.group_maps(measured["model"], measured["batch"], measured["groups"])
    made = {
        "rhythm": figures.rhythm(scores, rhythm),
        "heads": figures.heads(measured["groups"]),
        "tokens": figures.tokens(scores, rhythm),
        "maps": figures.maps(maps),
        "head_map": figures.head_map(measured["model"], measured["batch"], 0, 3),
    }
    assert dict(matplotlib.rcParams) == before
    assert sys.modules.get("matplotlib.pyplot") is axes
    return made


@pytest.mark.parametrize("name", figures.__all__)
def test_figures_are_a_column_wide_and_can_be_saved_copied_and_shown(
    drawn: dict[str, Any], name: str, tmp_path: Path
) -> None:
    figure = drawn[name]
    assert isinstance(figure, Figure)
    assert figure.get_figwidth() == WIDTH == 3.25
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the font lacks
        for ending in ("pdf", "svg"):
            figure.savefig(tmp_path / f"figure.{ending}")
        image = figure._repr_png_()
        again = pickle.loads(pickle.dumps(figure))
    assert dict(matplotlib.rcParams) == before
    # TrueType, which journals accept, and not type 3.
    content = (tmp_path / "figure.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert b"/Type3" not in content
    assert b"TrueType" in content or b"/CIDFontType2" in content
    assert "<text" in (tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert image.startswith(b"\x89PNG")
    assert type(again) is type(figure)
    assert len(copy.copy(figure).axes) == len(figure.axes)
    labels = [label for axes in figure.axes for label in axes.get_xticklabels()]
    sizes = [label.get_fontsize() for label in labels if label.get_text()]
    assert all(7 <= size <= 8 for size in sizes)


def test_figures_can_be_drawn_into_axes_of_a_larger_one(measured: dict[str, Any]) -> None:
    figure = Figure()
    axes = figure.subplots(2, 3).flat
    scores = make_scores()
    assert figures.rhythm(scores, axes=list(axes)[:4]) is figure
    assert figures.heads(measured["groups"], axes=axes[4]) is figure
    assert axes[4].images
    with pytest.raises(ParameterError, match="4 of matplotlib's axes"):
        figures.rhythm(scores, axes=axes[0])


def test_without_matplotlib_it_is_said_what_to_install(
    measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a notebook shows what it can."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    scores = make_scores(HOSTILE * 4)
    for call in (
        lambda: figures.rhythm(scores),
        lambda: figures.heads(measured["groups"]),
        lambda: figures.tokens(scores),
        lambda: figures.head_map(measured["model"], measured["batch"], 0, 0),
    ):
        with pytest.raises(MissingDependencyError, match=r"attnprobe\[figures\]"):
            call()
    for result in (scores, measured["groups"], measured["statistics"]):
        shown = result._repr_html_()
        assert "<img" not in shown
        assert "<table" in shown or "<span" in shown


@pytest.mark.parametrize("name", ["tokens", "responses", "ids", "provenance"])
def test_results_that_do_not_belong_together_are_refused(name: str) -> None:
    scores = make_scores(("a",) * COUNT)
    rhythm = attnprobe.find_rhythm(scores)
    if name == "tokens":
        with pytest.raises(ResultError, match=r"\[example, token\]"):
            figures.tokens(make_scores(("a",) * 30, count=30), rhythm)
    elif name == "responses":
        mask = scores.response_mask.clone()
        mask[0, PROMPT] = False
        with pytest.raises(ResultError, match="response tokens"):
            figures.rhythm(scores, dataclasses.replace(rhythm, response_mask=mask))
    elif name == "ids":
        with pytest.raises(ResultError, match="other tokens"):
            figures.rhythm(scores, dataclasses.replace(rhythm, input_ids=scores.input_ids + 1))
    else:
        mine, other = attnprobe.Provenance("a"), attnprobe.Provenance("b")
        with pytest.raises(ResultError, match="model_name"):
            figures.rhythm(
                dataclasses.replace(scores, provenance=mine), dataclasses.replace(rhythm, provenance=other)
            )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"example": 2}, "example"),
        ({"within": (40, None)}, "none of the 40"),
        ({"within": 5}, "within must be"),
        ({"score": "weight"}, "score"),
        ({"score": ()}, "several"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ParameterError, match=told):
        figures.tokens(make_scores(("a",) * COUNT), **options)


def test_scores_without_texts_take_those_of_the_batch() -> None:
    scores = make_scores()
    with pytest.raises(ResultError, match="no texts"):
        figures.tokens(scores)
    batch = attnprobe.TokenBatch.from_ids(scores.input_ids, response_start=PROMPT)
    batch = dataclasses.replace(batch, texts=(tuple(" t" for _ in range(PROMPT + COUNT)),) * 2)
    assert len(figures.tokens(scores, batch=batch).axes[0].texts) == COUNT
    with pytest.raises(ParameterError, match="receiver_fai"):
        figures.tokens(dataclasses.replace(scores, receiver_fai=None), score="receiver_fai", batch=batch)

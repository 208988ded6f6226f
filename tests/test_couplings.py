"""Couplings against a reference that goes peak by peak, with what each part of a result says."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnprobe import (
    AttnprobeError,
    Coupling,
    Couplings,
    ParameterError,
    Provenance,
    ResultError,
    TokenScores,
)
from attnprobe import couplings as measure_couplings
from attnprobe.analysis.couplings import NAMES
from attnprobe.rhythm import find_peaks, top_quantile
from attnprobe.scores import described_by_prediction
from attnprobe.storage import load_result, save_result

NAN = math.nan
FAST = {"draws": 20, "resamples": 20}


@st.composite
def scored_problems(draw: st.DrawFn) -> TokenScores:
    """Scores of a few responses: a prompt before, padding behind, perhaps gaps; FAI undefined at the end."""
    batch, tokens = draw(st.integers(1, 4)), draw(st.integers(6, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    values = {}
    for name in ("waad", "fai", "entropy", "receiver_fai"):
        values[name] = torch.randn(batch, tokens, generator=generator, dtype=torch.float64).abs()
    for row in range(batch):
        start = draw(st.integers(0, tokens - 4))
        stop = draw(st.integers(start + 1, tokens))
        mask[row, start:stop] = True
        for gap in draw(st.lists(st.integers(start, stop - 1), max_size=2)):
            # The first token always stays: a response has at least one.
            mask[row, max(gap, start + 1) : gap + draw(st.integers(1, 3))] = False
        late = max(start, stop - 3)
        values["fai"][row, late:] = NAN
        values["receiver_fai"][row, late:] = NAN
    values = {name: value.masked_fill(~mask, NAN) for name, value in values.items()}
    return TokenScores(**values, response_mask=mask)


def slow_couplings(
    scores: TokenScores, align: str, quantile: float, lookback: int, definition: str
) -> dict[str, tuple[list[float], list[int], list[float]]]:
    """For each coupling and problem: the sum over peaks, their number, the mean over where they could be."""
    find = top_quantile if definition == "top" else (lambda v, q: find_peaks(v, quantile=q))

    def could_be(values: torch.Tensor, t: int) -> bool:
        """A local maximum has a defined neighbour on either side."""
        around = [t] if definition == "top" else [t - 1, t, t + 1]
        return all(0 <= u < len(values) and not math.isnan(values[u]) for u in around)

    waad = scores.waad
    if align == "prediction":
        moved = [[NAN, *row[:-1]] for row in waad.tolist()]
        waad = torch.tensor(moved, dtype=torch.float64)
        waad[~scores.response_mask] = NAN
    preplan, anchor = find(waad, quantile), find(scores.fai, quantile)
    receiver = find(scores.receiver_fai, quantile)
    found: dict[str, tuple[list[float], list[int], list[float]]] = {name: ([], [], []) for name in NAMES}
    for row in range(waad.shape[0]):
        tokens = range(waad.shape[1])
        fai = [t for t in tokens if could_be(scores.fai[row], t)]
        near = {t: float(follows(preplan[row], scores.response_mask[row], t, lookback)) for t in tokens}
        cases = {
            "entropy_at_preplans": (
                {t: float(scores.entropy[row, t]) for t in tokens},
                preplan[row],
                [t for t in tokens if could_be(waad[row], t)],
            ),
            "receiver_at_global": ({t: float(anchor[row, t]) for t in tokens}, receiver[row], fai),
            "anchor_after_preplan": (near, anchor[row], fai),
        }
        for name, (value, peaks, eligible) in cases.items():
            at = [t for t in eligible if peaks[t]]
            found[name][0].append(sum(value[t] for t in at))
            found[name][1].append(len(at))
            found[name][2].append(sum(value[t] for t in eligible) / len(eligible) if eligible else 0.0)
    return found


def follows(preplan: torch.Tensor, mask: torch.Tensor, token: int, lookback: int) -> bool:
    """Whether a preplan stands at a token or within `lookback` before it, not across a gap."""
    for place in range(token, max(-1, token - lookback - 1), -1):
        if not mask[place]:
            return False
        if preplan[place]:
            return True
    return False


@given(
    scores=scored_problems(),
    align=st.sampled_from(["token", "prediction"]),
    percent=st.sampled_from([20, 40, 100]),
    lookback=st.integers(0, 4),
    definition=st.sampled_from(["maxima", "top"]),
)
def test_couplings_are_as_defined(
    scores: TokenScores, align: str, percent: int, lookback: int, definition: str
) -> None:
    quantile = percent / 100
    result = measure_couplings(
        scores, align=align, quantile=quantile, lookback=lookback, peaks=definition, **FAST
    )
    for name, (sums, peaks, means) in slow_couplings(scores, align, quantile, lookback, definition).items():
        coupling = getattr(result, name)
        assert coupling.peaks.tolist() == peaks
        assert coupling.observed_sum.tolist() == pytest.approx(sums)
        total = sum(peaks)
        expected = sum(sums) / total if total else NAN
        assert coupling.observed.value == pytest.approx(expected, nan_ok=True)
        anywhere = [number * mean for number, mean in zip(peaks, means, strict=True)]
        assert coupling.null_sum.tolist() == pytest.approx(anywhere)
        assert coupling.position_sum.tolist() == pytest.approx(anywhere)
        random = sum(anywhere)
        assert coupling.null.value == pytest.approx(random / total if total else NAN, nan_ok=True)
        lift = sum(sums) / random - 1 if random else NAN
        assert coupling.lift.value == pytest.approx(lift, nan_ok=True)
        assert coupling.position_lift.value == pytest.approx(lift, nan_ok=True)
        assert 0 < coupling.p_value <= 1 if total else math.isnan(coupling.p_value)


def test_a_rotation_keeps_the_distances_of_peaks() -> None:
    """Peaks two apart see a value that alternates all or never; shuffled, they see half of it."""
    saw = torch.tensor([[0.0, 1.0] * 10])
    scores = TokenScores(saw, saw, saw, torch.ones(1, 20, dtype=torch.bool))
    rotated = measure_couplings(scores, null="rotate", quantile=1.0, draws=200, resamples=2)
    assert rotated.entropy_at_preplans is not None
    assert rotated.entropy_at_preplans.p_value == pytest.approx(0.5, abs=0.12)
    shuffled = measure_couplings(scores, quantile=1.0, draws=200, resamples=2)
    assert shuffled.entropy_at_preplans is not None
    assert shuffled.entropy_at_preplans.p_value < 0.05


def test_scores_without_relation_have_no_lift() -> None:
    generator = torch.Generator().manual_seed(0)
    waad, fai, entropy, receiver = torch.rand(4, 60, 100, generator=generator).unbind(0)
    scores = TokenScores(waad, fai, entropy, torch.ones(60, 100, dtype=torch.bool), receiver_fai=receiver)
    result = measure_couplings(scores, draws=200, resamples=200)
    for name in NAMES:
        coupling = getattr(result, name)
        assert abs(coupling.lift.value) < 0.05
        assert 0.01 < coupling.p_value < 0.99
        assert coupling.lift.low < coupling.lift.value < coupling.lift.high


@given(scores=scored_problems(), seed=st.integers(0, 5))
def test_batches_one_after_the_other_are_one_data_set(scores: TokenScores, seed: int) -> None:
    whole = measure_couplings(scores, seed=seed, **FAST)
    parts = (scores.select(example) for example in range(scores.waad.shape[0]))
    assert measure_couplings(parts, seed=seed, **FAST) == whole


@given(scores=scored_problems(), seed=st.integers(0, 5))
def test_what_stands_in_a_gap_does_not_count(scores: TokenScores, seed: int) -> None:
    """Whatever a hand-made score says outside the response."""
    filled = {
        name: torch.where(scores.response_mask, getattr(scores, name), 7.0 + torch.arange(100).fmod(5)[:n])
        for name in ("waad", "fai", "entropy", "receiver_fai")
        for n in (scores.waad.shape[1],)
    }
    again = dataclasses.replace(scores, **filled)
    assert measure_couplings(again, seed=seed, **FAST) == measure_couplings(scores, seed=seed, **FAST)


def test_no_anchor_follows_a_preplan_across_a_gap() -> None:
    waad = torch.tensor([[0.0, 3.0, 1.0, NAN, 0.4, 0.3, 0.2]])
    fai = torch.tensor([[0.3, 0.2, 0.1, NAN, 0.1, 0.9, 0.2]])
    whole = torch.ones(1, 7, dtype=torch.bool)
    gapped = whole.clone()
    gapped[0, 3] = False
    found = {}
    for name, mask in (("whole", whole), ("gapped", gapped)):
        scores = TokenScores(waad.nan_to_num(0.5), fai.nan_to_num(0.0), None, mask)
        result = measure_couplings(scores, quantile=0.2, lookback=4, **FAST).anchor_after_preplan
        found[name] = (float(result.observed_sum), float(result.peaks))
    assert found == {"whole": (1.0, 1.0), "gapped": (0.0, 1.0)}


@given(scores=scored_problems(), left=st.integers(0, 4), right=st.integers(0, 4))
def test_padding_changes_nothing(scores: TokenScores, left: int, right: int) -> None:
    padded = TokenScores(
        **{
            name: torch.nn.functional.pad(getattr(scores, name), (left, right), value=NAN)
            for name in ("waad", "fai", "entropy", "receiver_fai")
        },
        response_mask=torch.nn.functional.pad(scores.response_mask, (left, right)),
    )
    assert measure_couplings(padded, **FAST) == measure_couplings(scores, **FAST)


def test_the_same_seed_gives_the_same_result() -> None:
    torch.manual_seed(0)
    values = torch.rand(3, 40)
    scores = TokenScores(values, values.flip(-1), values.flip(0), torch.ones(3, 40, dtype=torch.bool))
    first, again, other = (measure_couplings(scores, seed=seed, **FAST) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first.anchor_after_preplan.null.low != other.anchor_after_preplan.null.low


def test_a_row_describes_the_token_that_it_produced() -> None:
    values = torch.tensor([[NAN, 1.0, 2.0, 3.0, NAN]])
    mask = torch.tensor([[False, True, True, True, False]])
    moved = described_by_prediction(values, mask)
    torch.testing.assert_close(moved, torch.tensor([[NAN, NAN, 1.0, 2.0, NAN]]), equal_nan=True)


def test_what_was_not_measured_is_none() -> None:
    values = torch.rand(2, 30)
    mask = torch.ones(2, 30, dtype=torch.bool)
    result = measure_couplings(TokenScores(values, values, None, mask), **FAST)
    assert result.entropy_at_preplans is None
    assert result.receiver_at_global is None
    assert list(result.to_pandas()["coupling"]) == ["anchor_after_preplan"]


@pytest.mark.parametrize("with_entropy", [True, False])
def test_couplings_come_back_as_they_were_saved(tmp_path: Path, with_entropy: bool) -> None:
    values = torch.rand(2, 30)
    mask = torch.ones(2, 30, dtype=torch.bool)
    provenance = Provenance("a/model", (3, 4), 10, (10, None), {"local": ((3, 0, 1.0),)})
    scores = TokenScores(values, values, values if with_entropy else None, mask, provenance=provenance)
    result = measure_couplings(scores, **FAST)
    loaded = Couplings.load(result.save(tmp_path / "couplings.safetensors"))
    assert loaded == result
    assert loaded.provenance == provenance
    one = Coupling.load(result.anchor_after_preplan.save(tmp_path / "one.safetensors"))
    assert one == result.anchor_after_preplan


def test_undefined_numbers_are_equal_and_come_back(tmp_path: Path) -> None:
    """Scores without a peak: no mean, no lift."""
    nothing = torch.full((2, 8), NAN)
    scores = TokenScores(nothing, nothing, nothing, torch.ones(2, 8, dtype=torch.bool))
    result = measure_couplings(scores, **FAST)
    assert math.isnan(result.anchor_after_preplan.observed.value)
    assert result == measure_couplings(scores, **FAST)
    assert result == Couplings.load(result.save(tmp_path / "couplings.safetensors"))


@pytest.mark.usefixtures("as_users_call")
def test_other_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = save_result(tmp_path / "x.safetensors", "Rhythm", {"a": torch.zeros(1)}, {})
    with pytest.raises(ResultError, match=r"Rhythm.*Couplings"):
        Couplings.load(path)
    values = torch.rand(2, 30)
    result = measure_couplings(TokenScores(values, values, None, values > 0), **FAST)
    types = {"parameters": dict[str, Any], "provenance": dict[str, Any], "couplings": dict[str, Any]}
    tensors, settings = load_result(result.save(path), "Couplings", (), types)
    name = "anchor_after_preplan.peaks"
    damaged = [
        ({**tensors, name: tensors[name][:1]}, settings, "peaks"),
        ({**tensors, name: tensors[name].long()}, settings, "peaks"),
        ({key: value for key, value in tensors.items() if key != name}, settings, "peaks"),
        (tensors, {**settings, "couplings": {}}, "anchor_after_preplan"),
        (tensors, {**settings, "couplings": {"anchor_after_preplan": {"null": "x"}}}, "null"),
        (tensors, {**settings, "parameters": {"seed": None}}, "parameters"),
    ]
    for parts, said, named in damaged:
        save_result(path, "Couplings", parts, said)
        with pytest.raises(ResultError, match=named if named != "parameters" else "damaged"):
            Couplings.load(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ResultError, match=r"x\.safetensors"):
        Couplings.load(path)


def test_a_result_shows_its_table_and_what_it_was_computed_from() -> None:
    values = torch.rand(2, 30)
    provenance = Provenance("a/model", (3, 4), 10, (10, None))
    scores = TokenScores(values, values, values, values > 0, provenance=provenance)
    result = measure_couplings(scores, **FAST)
    assert len(repr(result)) < 800
    for told in ("entropy_at_preplans", "anchor_after_preplan", "a/model", "(10, None)", "quantile=0.4"):
        assert told in repr(result)
        assert told in result._repr_html_()
    assert "receiver_at_global" not in repr(result)
    assert len(repr(result.anchor_after_preplan)) < 200
    problems = result.anchor_after_preplan.to_pandas()
    assert problems["peaks"].tolist() == result.anchor_after_preplan.peaks.tolist()
    assert result.to_arrow().column_names == list(result.to_pandas().columns)


def test_the_table_has_a_line_for_each_coupling() -> None:
    values = torch.rand(2, 30)
    mask = torch.ones(2, 30, dtype=torch.bool)
    result = measure_couplings(TokenScores(values, values, values, mask, receiver_fai=values), **FAST)
    table = result.to_pandas()
    assert list(table["coupling"]) == list(NAMES)
    assert table["observed"].tolist() == [getattr(result, name).observed.value for name in NAMES]
    assert bool((table["lift_low"] <= table["lift_high"]).all())


SCORES = TokenScores(torch.rand(1, 9), torch.rand(1, 9), None, torch.ones(1, 9, dtype=torch.bool))


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("align", ["row", None, 1]),
        ("peaks", ["all", ["top"]]),
        ("null", ["none", True, None]),
        ("classes", [None, "class"]),
        ("quantile", [0.0, 1.1, "0.4", None, NAN, True]),
        ("lookback", [-1, True, 1.5, "3", None, [1]]),
        ("draws", [0, 2.0, "many", None, True]),
        ("resamples", [0, -3, None]),
        ("confidence", [0.0, 1.0, NAN, "0.9"]),
        ("seed", [-1, 0.5, None, 2**70]),
    ],
)
def test_parameters_that_make_no_sense_are_refused(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ParameterError, match=f"{name}.*got"):
            measure_couplings(SCORES, **{name: value})


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    plain = measure_couplings(SCORES, quantile=0.5, lookback=2, seed=1, **FAST)
    fancy = {"draws": np.int64(20), "resamples": torch.tensor(20)}
    assert plain == measure_couplings(SCORES, quantile=np.float64(0.5), lookback=np.int32(2), seed=1, **fancy)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    "wrong", [None, "scores", 3, SCORES.waad, vars(SCORES), TokenScores, [None], [SCORES, "x"]]
)
def test_what_is_no_scores_is_refused(wrong: Any) -> None:
    with pytest.raises(AttnprobeError, match="TokenScores"):
        measure_couplings(wrong)


def test_packed_rows_and_no_rows_are_refused() -> None:
    packed = dataclasses.replace(SCORES, segment_ids=torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ParameterError, match="packed"):
        measure_couplings(packed)
    with pytest.raises(ParameterError, match=r"problem.* none"):
        measure_couplings([])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_name", "b/model"),
        ("layers", (1,)),
        ("window", 5),
        ("horizon", (10, 50)),
        ("align", "prediction"),
    ],
)
def test_scores_that_were_measured_otherwise_are_not_pooled(name: str, value: Any) -> None:
    of = Provenance("a/model", (3, 4), 10, (10, None), {"local": ((3, 0, 1.0),)})
    other = dataclasses.replace(of, **{name: value})
    parts = [dataclasses.replace(SCORES, provenance=each) for each in (of, other)]
    align = {"align": "prediction"} if name == "align" else {}
    with pytest.raises(ResultError, match=name):
        measure_couplings(parts, **align, **FAST)


def test_heads_may_be_ranked_for_each_response() -> None:
    parts = [
        dataclasses.replace(SCORES, provenance=Provenance("m", heads={"local": ((0, head, 1.0),)}))
        for head in range(2)
    ]
    assert measure_couplings(parts, **FAST).provenance == Provenance("m")
    assert measure_couplings(parts[:1], **FAST).provenance == parts[0].provenance


def test_scores_that_were_moved_already_are_not_moved_again() -> None:
    moved = dataclasses.replace(
        SCORES,
        waad=described_by_prediction(SCORES.waad, SCORES.response_mask),
        provenance=Provenance(align="prediction"),
    )
    late, early = (measure_couplings(each, align="prediction", **FAST) for each in (moved, SCORES))
    assert late.anchor_after_preplan == early.anchor_after_preplan
    with pytest.raises(ParameterError, match="align"):
        measure_couplings(moved, align="token")


def test_lifts_are_those_of_the_table() -> None:
    """The paper's own figures: (0.3608 - 0.2386) / 0.2386 is a lift of 51%; its rounding is its own."""
    assert float(Fraction("0.3608") / Fraction("0.2386") - 1) == pytest.approx(0.5197, abs=0.01)

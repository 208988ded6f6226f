"""Divergence under attention knock-out, against models run by hand, and knock-out at chosen positions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import attnprobe
from attnprobe import AttnprobeError, ParameterError, ResultError, TokenBatch, knockout, knockout_divergence
from attnprobe.analysis.agreement import rank_correlation
from attnprobe.analysis.chosen_positions import choose_positions
from attnprobe.analysis.knockout import ResponseRuns
from attnprobe.analysis.knockout_trials import Knockout, Knockouts, KnockoutSummary
from attnprobe.analysis.weighted import weighted_rank_correlation
from attnprobe.testing.reference import dense_pattern
from attnprobe.testing.tiny_models import tiny_model


def batch_of(side: str) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 99, (count,), generator=generator).tolist() for count in (14, 9)]
    right = TokenBatch.from_ids(rows, response_start=3)
    if side == "right":
        return right
    shifts = [int((~row).sum()) for row in right.attention_mask]
    moved = [
        torch.stack([row.roll(by) for row, by in zip(part, shifts, strict=True)])
        for part in (right.input_ids, right.attention_mask, right.response_mask)
    ]
    return TokenBatch.from_ids(moved[0], moved[1], response_mask=moved[2])


def slow_divergence(model, ids: torch.Tensor, key: int, rows: list[int]) -> float:
    """One sequence, one key, with an additive mask in which later rows do not see it."""
    count = len(ids)
    seen = torch.ones(count, count, dtype=torch.bool).tril()
    seen[key + 1 :, key] = False
    mask = torch.zeros(1, 1, count, count).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        own = model(ids[None]).logits[0].double().log_softmax(-1)
        other = model(ids[None], attention_mask=mask).logits[0].double().log_softmax(-1)
    terms = [float((own[t].exp() * (own[t] - other[t])).sum()) for t in rows]
    return sum(terms) / len(terms) if terms else math.nan


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("horizon", [(1, None), (2, 4)])
def test_divergence_is_that_of_a_run_without_the_key(side: str, horizon: tuple) -> None:
    model = tiny_model("llama")
    eager = tiny_model("llama", implementation="eager")
    batch = batch_of(side)
    asked = batch.response_mask.clone()
    actual = knockout_divergence(model, batch, asked, horizon=horizon, batch_size=3)
    low, high = horizon
    for row in range(2):
        start = int(batch.attention_mask[row].nonzero()[0])
        ids = batch.input_ids[row][batch.attention_mask[row]]
        for key in range(3, len(ids)):
            rows = [t for t in range(3, len(ids)) if t >= key + low and (high is None or t <= key + high)]
            expected = slow_divergence(eager, ids, key, rows)
            assert float(actual[row, start + key]) == pytest.approx(expected, rel=1e-3, abs=1e-5, nan_ok=True)
    assert bool(actual[~batch.response_mask].isnan().all())


def test_only_what_was_asked_about_is_measured() -> None:
    model, batch = tiny_model("llama"), batch_of("right")
    asked = torch.zeros_like(batch.response_mask)
    asked[0, [1, 5, 7]] = True
    some = knockout_divergence(model, batch, asked, horizon=(1, None))
    assert (~some.isnan()).nonzero().tolist() == [[0, 5], [0, 7]]
    every = knockout_divergence(model, batch, batch.response_mask, horizon=(1, None), batch_size=1)
    torch.testing.assert_close(some[0, [5, 7]], every[0, [5, 7]], rtol=1e-4, atol=1e-6)
    assert bool((every[~every.isnan()] >= 0).all())


def test_copies_of_a_long_text_run_in_smaller_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default as many run together as fit into the budgets; here, two copies of the longer text."""
    model, batch = tiny_model("llama"), batch_of("right")
    longest = int(batch.attention_mask.sum(-1).max())
    every = knockout_divergence(model, batch, batch.response_mask, horizon=(1, None))
    monkeypatch.setattr("attnprobe.analysis.knockout.TOKEN_BUDGET", 2 * longest)
    together: list[int] = []
    with model.register_forward_pre_hook(
        lambda module, args, kwargs: together.append(len(kwargs["input_ids"])), with_kwargs=True
    ):
        parts = knockout_divergence(model, batch, batch.response_mask, horizon=(1, None))
    assert max(together) >= 2
    assert max(together) * int(batch.attention_mask.sum(-1).min()) <= 2 * longest
    torch.testing.assert_close(parts, every, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_fewer_heads_are_less_of_a_loss_than_none() -> None:
    """Suppressing in no layer that reads the token changes nothing; the model is left as it was."""
    model, batch = tiny_model("llama"), batch_of("right")
    before = model(batch.input_ids).logits
    asked = batch.response_mask
    last = knockout_divergence(model, batch, asked, horizon=(1, None), layers=[2], heads=[0])
    every = knockout_divergence(model, batch, asked, horizon=(1, None))
    assert float(last.nansum()) < float(every.nansum())
    assert torch.equal(model(batch.input_ids).logits, before)


def test_heads_come_in_every_form_and_batches_too() -> None:
    model, batch = tiny_model("llama"), batch_of("right")
    horizon = (1, None)
    groups = attnprobe.classify_heads(attnprobe.measure(model, batch))
    pairs = groups.pairs("global")
    expected = knockout_divergence(model, batch, batch.response_mask, horizon=horizon, heads=pairs)
    by_layer = {i: [head for layer, head in pairs if layer == i] for i, _ in pairs}
    for heads in (groups["global"], groups.global_heads, by_layer, set(pairs), dict.fromkeys(pairs, 2.0)):
        again = knockout_divergence(model, batch, batch.response_mask, horizon=horizon, heads=heads)
        torch.testing.assert_close(again, expected, equal_nan=True)
    everywhere, by_default = (
        knockout_divergence(model, batch, batch.response_mask, horizon=horizon, **options)
        for options in ({"heads": "all"}, {})
    )
    torch.testing.assert_close(everywhere, by_default, rtol=1e-4, atol=1e-6, equal_nan=True)
    names = ("input_ids", "attention_mask", "response_mask")
    lists = {name: getattr(batch, name).long().tolist() for name in names}
    again = knockout_divergence(
        model, lists, lists["response_mask"], horizon=horizon, heads=pairs, batch_size=np.int64(4)
    )
    torch.testing.assert_close(again, expected, equal_nan=True)


def test_rows_in_a_gap_do_not_count() -> None:
    """What stands between two parts of a response is read, but what it predicts is not asked about."""
    model, whole = tiny_model("llama"), batch_of("right").select(0)
    mask = whole.response_mask.clone()
    mask[0, 7:9] = False
    gapped = TokenBatch.from_ids(whole.input_ids, whole.attention_mask, response_mask=mask)
    actual = knockout_divergence(model, gapped, mask, horizon=(1, None))
    eager = tiny_model("llama", implementation="eager")
    for key in (3, 6, 9):
        rows = [row for row in range(3, 14) if row > key and mask[0, row]]
        expected = slow_divergence(eager, whole.input_ids[0], key, rows)
        assert float(actual[0, key]) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert bool(actual[0, 7:9].isnan().all())


# ---- values ---------------------------------------------------------------------------------------


def slow_value_divergence(family: str, ids: torch.Tensor, key: int, rows: list[int]) -> float:
    """One sequence, one key, with attention written out, which loses the key's value in later rows."""
    eager = tiny_model(family, implementation="eager")

    def attend(module, query, key_states, value, mask, scaling=None, **options):
        pattern = dense_pattern(
            query,
            key_states,
            scaling=scaling,
            mask=mask,
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
        )
        if lost:
            pattern[:, :, key + 1 :, key] = 0.0
        groups = query.shape[1] // value.shape[1]
        mixed = pattern @ value.double().repeat_interleave(groups, 1)
        return mixed.transpose(1, 2).to(query.dtype).contiguous(), None

    logs = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(transformers.AttentionInterface, "get_interface", lambda *_: attend)
        for lost in (False, True):  # noqa: B007 (attend reads it)
            logs.append(eager(ids[None]).logits[0].double().log_softmax(-1))
    own, other = logs
    return float(torch.stack([(own[t].exp() * (own[t] - other[t])).sum() for t in rows]).mean())


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_divergence_without_a_value_is_that_of_a_run_without_it(family: str) -> None:
    """Grouped queries, soft caps, sinks, and latent attention, whose values are narrower than its keys."""
    model, batch = tiny_model(family), batch_of("left")
    asked = torch.zeros_like(batch.response_mask)
    asked[0, [4, 9]] = asked[1, 10] = True
    actual = knockout_divergence(model, batch, asked, horizon=(1, None), mode="value", batch_size=2)
    for row, column in asked.nonzero().tolist():
        start = int(batch.attention_mask[row].nonzero()[0])
        ids = batch.input_ids[row][batch.attention_mask[row]]
        key = column - start
        rows = [t for t in range(3, len(ids)) if t > key]
        expected = slow_value_divergence(family, ids, key, rows)
        assert float(actual[row, column]) == pytest.approx(expected, rel=2e-3, abs=1e-6)
        assert expected > 1e-5


# ---- knock-out at chosen positions ------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"horizon": (2, None), "min_remaining": 3, "seed": 5}


@pytest.fixture(scope="module")
def done() -> tuple:
    model, batch = tiny_model("llama"), batch_of("right")
    statistics = attnprobe.measure(model, batch, horizon=(1, None))
    scores = attnprobe.score_tokens(statistics, "all")
    return model, batch, scores, knockout(model, batch, scores, **OPTIONS)


def test_knockouts_are_divergences_at_chosen_positions(done: tuple) -> None:
    model, batch, scores, result = done
    expected = []
    for example in range(2):
        for kind, column in choose_positions(batch, scores, example, 1, 3, drawn=1, seed=5):
            expected += [(example, kind, column, mode) for mode in ("mask", "value")]
    assert [(t.example, t.kind, t.position, t.mode) for t in result.trials] == expected
    divergences = {
        mode: knockout_divergence(model, batch, batch.response_mask, horizon=(2, None), mode=mode)
        for mode in ("mask", "value")
    }
    for trial in result.trials:
        found = divergences[trial.mode][trial.example, trial.position]
        assert trial.divergence == pytest.approx(float(found), rel=1e-3, abs=1e-6)
        assert trial.fai == float(scores.fai[trial.example, trial.position])
        assert trial.position == 3 + trial.response_position
    assert result.provenance == scores.provenance
    assert result.parameters["horizon"] == [2, None]


def test_knockouts_do_not_depend_on_the_batch(done: tuple) -> None:
    model, _, _, result = done
    batch = batch_of("left")
    statistics = attnprobe.measure(model, batch, horizon=(1, None))
    scores = attnprobe.score_tokens(statistics, "all").select(1)
    moved = knockout(model, batch.select(1), scores, batch_size=1, **OPTIONS)
    expected = [trial for trial in result.trials if trial.example == 1]
    for ours, theirs in zip(moved.trials, expected, strict=True):
        assert ours.key == theirs.key
        assert ours.divergence == pytest.approx(theirs.divergence, rel=1e-3, abs=1e-6)


def test_a_file_of_knockouts_grows(done: tuple, tmp_path: Path) -> None:
    """By responses, drawn positions and modes; what it holds is not run again."""
    model, batch, scores, result = done
    path = tmp_path / "knockouts.jsonl"
    some = {**OPTIONS, "drawn": 0, "modes": ["mask"]}
    knockout(model, batch.select(1), scores.select(1), path=path, **some)
    assert len(Knockouts.load(path).trials) == 2
    grown = knockout(model, batch, scores, path=path, **OPTIONS)
    assert [trial.key for trial in grown.trials] == [trial.key for trial in result.trials]
    loaded = Knockouts.load(path)
    assert set(loaded.trials) == set(grown.trials)
    assert loaded.is_complete
    assert loaded == Knockouts.load(loaded.save(tmp_path / "again.jsonl"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResponseRuns, "prepare", lambda *_: pytest.fail("all of it was done before"))
        assert knockout(model, batch, scores, path=path, **OPTIONS) == grown
    for other in (some, {**OPTIONS, "seed": 6}, {**OPTIONS, "horizon": (2, 5)}):
        with pytest.raises(ResultError, match="another path"):
            knockout(model, batch, scores, path=path, **other)
    with pytest.raises(ResultError, match=r"Knockouts.*Perturbations"):
        attnprobe.Perturbations.load(path)


def test_knockouts_are_a_result(done: tuple, tmp_path: Path) -> None:
    _, _, _, result = done
    table = result.to_pandas()
    assert len(table) == 2 * 3 * 2
    assert set(table["mode"]) == {"mask", "value"}
    assert "6 " in repr(result)
    summary = result.summary("value", resamples=20)
    assert summary == KnockoutSummary.load(summary.save(tmp_path / "summary.safetensors"))
    assert "partial_correlation" in repr(summary)
    assert math.isnan(summary.rank_correlation.value)


VALUES = st.integers(0, 5).map(lambda value: value / 5)


@settings(max_examples=50)
@given(
    responses=st.lists(
        st.tuples(VALUES, VALUES, st.lists(st.tuples(VALUES, VALUES, st.integers(0, 9)), max_size=4)),
        min_size=1,
        max_size=6,
    )
)
def test_the_summary_has_means_medians_and_rank_correlations(responses: list[tuple]) -> None:
    trials = []
    for example, (highest, lowest, drawn) in enumerate(responses):
        lines = [("highest", 1.0, 0, highest), ("lowest", 0.0, 0, lowest)]
        lines += [("drawn", fai, place, divergence) for fai, divergence, place in drawn]
        for kind, fai, place, divergence in lines:
            trials.append(Knockout(example, "", kind, place, place, 10, fai, "mask", divergence))
            trials.append(Knockout(example, "", kind, place, place, 10, fai, "value", 7.0))
    summary = Knockouts(tuple(trials), {}).summary(resamples=2)
    highest, lowest = np.array([line[:2] for line in responses]).T
    of_drawn = np.array([np.mean([d for _, d, _ in line[2]]) for line in responses if line[2]])
    with_drawn = np.array([line[0] for line in responses if line[2]])
    tokens = np.array([token for line in responses for token in line[2]]).reshape(-1, 3)
    expected = {
        "highest": highest.mean(),
        "lowest": lowest.mean(),
        "highest_median": np.median(highest),
        "lowest_median": np.median(lowest),
        "ratio_to_lowest": highest.mean() / lowest.mean() if lowest.any() else math.nan,
        "above_lowest": ((highest > lowest) + (highest == lowest) / 2).mean(),
    }
    if len(of_drawn):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(with_drawn == of_drawn, 1.0, with_drawn / of_drawn)
        expected |= {
            "drawn": of_drawn.mean(),
            "drawn_median": np.median(of_drawn),
            "median_ratio_to_drawn": np.median(ratios),
            "above_drawn": ((with_drawn > of_drawn) + (with_drawn == of_drawn) / 2).mean(),
        }
    assert (summary.responses, summary.drawn_tokens) == (len(highest), len(tokens))
    if len(tokens) >= 3:
        fai, divergence, place = (pandas.Series(column).rank() for column in tokens.T)
        with np.errstate(invalid="ignore"):
            raw, a, b = (
                float(np.corrcoef(*pair)[0, 1])
                for pair in ((fai, divergence), (fai, place), (divergence, place))
            )
            spread = (1 - a**2) * (1 - b**2)
            expected["rank_correlation"] = raw
            expected["partial_correlation"] = (raw - a * b) / spread**0.5 if spread > 1e-9 else math.nan
    actual = {name: getattr(summary, name).value for name in expected}
    assert actual == pytest.approx(expected, nan_ok=True, abs=1e-9)


@given(data=st.data(), count=st.integers(3, 8))
def test_weighted_correlations_are_those_of_repeated_pairs(data: st.DataObject, count: int) -> None:
    values = st.lists(st.integers(0, 3).map(float), min_size=count, max_size=count)
    first, second = (torch.tensor(data.draw(values)).double() for _ in range(2))
    repeats = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
    assume(repeats.sum() > 1)
    found = float(weighted_rank_correlation(first, second, repeats[None].double()))
    expected = rank_correlation(first.repeat_interleave(repeats), second.repeat_interleave(repeats))
    assert found == pytest.approx(expected, nan_ok=True, abs=1e-9)


@pytest.mark.usefixtures("as_users_call")
def test_knockouts_that_make_no_sense_are_refused(done: tuple) -> None:
    model, batch, scores, result = done
    wrong: dict[str, list[Any]] = {
        "positions": [0, 2.5, None],
        "drawn": [-1, "1"],
        "seed": [-1, None],
        "modes": ["zero", [], None, ["mask", 3], {"mask": 1}],
        "horizon": [(5, 2), "near"],
        "min_remaining": [0],
        "batch_size": [0],
        "progress": ["yes"],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ParameterError, match=name):
                knockout(model, batch, scores, **{**OPTIONS, name: value})
    with pytest.raises(ParameterError, match=r"no response.*\b50\b"):
        knockout(model, batch, scores, min_remaining=50)
    with pytest.raises(ResultError, match="Mistral"):
        knockout(tiny_model("mistral"), batch, scores, **OPTIONS)
    with pytest.raises(ParameterError, match=r'mode="value".*0 trials'):
        Knockouts(tuple(t for t in result.trials if t.mode == "mask"), {}).summary("value")
    with pytest.raises(ParameterError, match="mode"):
        result.summary("zero")
    with pytest.raises(ParameterError, match=r"clusters.*example 1"):
        result.summary(clusters=[0])


WRONG: dict[str, list[Any]] = {
    "tokens": [None, "all", 3, torch.ones(2, 3), torch.full((2, 14), 0.5), torch.full((2, 14), math.nan)],
    "batch_size": [0, 2.5, "8", True],
    "horizon": [(5, 2), 10, "near", None],
    "heads": [[7], "some", [(0, 9)], {9: [0]}, 1.5, []],
    "batch": ["text", None, 3, torch.full((2, 14), 10**6)],
    "progress": ["yes", 1],
    "mode": ["zero", None],
}


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("name", list(WRONG))
def test_parameters_that_make_no_sense_are_refused(name: str) -> None:
    batch = batch_of("right")
    arguments = {"model": tiny_model("llama"), "batch": batch, "tokens": batch.response_mask}
    for wrong in WRONG[name]:
        with pytest.raises(AttnprobeError, match=r"\w{3}"):
            knockout_divergence(**{**arguments, name: wrong})


def test_messages_have_the_facts() -> None:
    model, batch = tiny_model("llama"), batch_of("right")
    with pytest.raises(ParameterError, match=r"tokens.*\[2, 14\].*\[2, 3\]"):
        knockout_divergence(model, batch, batch.response_mask[:, :3])
    with pytest.raises(ParameterError, match=r"heads.*\(0, 7\).*0\.\.3"):
        knockout_divergence(model, batch, batch.response_mask, heads=[7])
    other = tiny_model("mistral")
    groups = attnprobe.classify_heads(attnprobe.measure(other, batch))
    with pytest.raises(ParameterError, match=r"Mistral.*Llama"):
        knockout_divergence(model, batch, batch.response_mask, heads=groups["local"])
    packed = TokenBatch.from_ids(
        torch.ones(1, 4, dtype=torch.long), position_ids=torch.tensor([[0, 1, 0, 1]])
    )
    with pytest.raises(ParameterError, match="packed"):
        knockout_divergence(model, packed, packed.response_mask)


def test_a_horizon_beyond_the_text_is_the_text() -> None:
    model = tiny_model("llama")
    batch = attnprobe.TokenBatch.from_ids([list(range(1, 13))], response_start=4)
    asked = torch.zeros(1, 12, dtype=torch.bool)
    asked[0, 6] = True
    whole = attnprobe.knockout_divergence(model, batch, asked, horizon=(1, None))
    for far in (12, 10**9, 10**30):
        found = attnprobe.knockout_divergence(model, batch, asked, horizon=(1, far))
        assert torch.equal(found.nan_to_num(-1), whole.nan_to_num(-1))
    none = attnprobe.knockout_divergence(model, batch, asked, horizon=(10**30, None))
    assert bool(none.isnan().all())

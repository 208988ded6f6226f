"""What a training loop of one's own needs: trials of its loss, schedules, checkpoints, budgets, metrics."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnprobe
from attnprobe import ParameterError, ResultError
from attnprobe.rl import (
    CoupledRhythmCredit,
    GlobalAnchorCredit,
    RandomCredit,
    Rollout,
    RolloutCredit,
    decay,
    honours_weights,
    measure_rollout,
    warmup,
)
from attnprobe.testing.tiny_models import tiny_model

HORIZON = (1, 4)


# ---- the trial of a loss --------------------------------------------------------------------------


def reduced(lost, mask):
    return (lost * mask).sum() / mask.sum()


def clipped(log_probs, old, advantages, mask):
    ratio = (log_probs - old).exp()
    return reduced(torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)), mask)


def with_kl(log_probs, old, advantages, mask):
    return clipped(log_probs, old, advantages, mask) + 0.1 * reduced((log_probs - old).square(), mask)


def reinforce(log_probs, old, advantages, mask):
    return reduced(-advantages * log_probs, mask)


def by_sequence(log_probs, old, advantages, mask):
    """GSPO: one ratio for each completion."""
    ratio = (((log_probs - old) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)).exp()
    return reduced(-advantages * ratio, mask)


def one_for_each(log_probs, old, advantages, mask):
    """RLOO: one advantage for each completion."""
    return -(((log_probs - old) * mask).sum(-1).exp() * advantages).mean()


def whitened(log_probs, old, advantages, mask):
    inside = advantages[mask.bool()]
    return clipped(log_probs, old, (advantages - inside.mean()) / (inside.std() + 1e-6), mask)


def normalised(log_probs, old, advantages, mask):
    """As `whitened`, but 0 / 0 where all advantages are equal."""
    return reinforce(log_probs, old, (advantages - advantages.mean()) / advantages.std(), mask)


def normalised_with_kl(log_probs, old, advantages, mask):
    return normalised(log_probs, old, advantages, mask) + 0.1 * reduced((log_probs - old).square(), mask)


def in_half_precision(log_probs, old, advantages, mask):
    half = log_probs.bfloat16() * advantages.bfloat16() * mask.bfloat16()
    return -half.sum() / mask.bfloat16().sum()


def one_is_enough(log_probs, old, advantages, mask):
    assert bool((advantages == advantages[:, :1]).all()), "one advantage per completion"
    return reinforce(log_probs, old, advantages, mask)


def masks_in_place(log_probs, old, advantages, mask):
    return -(log_probs.masked_fill_(mask == 0, 0.0) * advantages).sum()


def signs_only(log_probs, old, advantages, mask):
    return clipped(log_probs, old, advantages.sign(), mask)


@pytest.mark.parametrize(
    ("loss", "advantages", "gradient"),
    [
        (clipped, True, True),
        (reinforce, True, True),
        (with_kl, True, False),
        (by_sequence, False, True),
        (one_for_each, False, True),
        (whitened, False, True),
        (signs_only, False, True),
        (normalised, False, True),
        (normalised_with_kl, False, False),
        (in_half_precision, True, True),
        (one_is_enough, False, True),
        (masks_in_place, True, True),
    ],
)
def test_a_loss_is_tried_out(loss, advantages: bool, gradient: bool) -> None:
    with torch.no_grad():
        verdict = honours_weights(loss)
    assert bool(verdict) == (verdict.advantages is None) == advantages, verdict
    assert (verdict.gradient is None) == gradient, verdict


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("loss", "told"),
    [
        ("clipped", "callable"),
        (lambda a, b, c, d: a.mean(), "does not depend on the advantages"),
        (lambda a, b, c, d: c.mean(), "does not depend on the log-probabilities"),
        (lambda a, b, c, d: a * c, r"scalar, not a float32 tensor \[3, 5\]"),
        (lambda a, b: a.mean(), "TypeError"),
        (lambda a, b, c, d: (a * c * torch.rand(())).sum(), "between two equal calls"),
        (lambda a, b, c, d: (a * c).sum() / 0, "it is -inf"),
    ],
)
def test_a_loss_that_cannot_be_tried_out(loss, told: str) -> None:
    with pytest.raises(ParameterError, match=told):
        honours_weights(loss)


# ---- schedules and checkpoints ----------------------------------------------------------------------


def rollout_of(lengths=((3, 14), (5, 8), (2, 14)), seed: int = 0) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    rows = [[torch.randint(1, 99, (n,), generator=generator) for n in pair] for pair in lengths]
    return Rollout.from_lists([row[0] for row in rows], [row[1] for row in rows])


def test_a_schedule_scales_the_bonus() -> None:
    model, rollout, advantages = tiny_model("llama"), rollout_of(), [1.0, -1.0, 2.0]

    def gamma_at(step, schedule):
        credit = RolloutCredit(model, CoupledRhythmCredit(), horizon=HORIZON, schedule=schedule)
        return credit.weigh(rollout, advantages, step)

    full = gamma_at(0, None)
    for schedule, step, factor in (
        (warmup(4), 0, 0.0),
        (warmup(4), 1, 0.25),
        (warmup(4), 9, 1.0),
        (decay(10, begin=5, to=0.5), 10, 0.75),
        (lambda step: step / 3, 6, 2.0),
    ):
        torch.testing.assert_close(gamma_at(step, schedule), 1 + factor * (full - 1))
    for wrong in (lambda step: -1.0, lambda step: float("nan"), lambda step: "half"):
        with pytest.raises(ParameterError, match="factor at step 0"):
            gamma_at(0, wrong)


def test_without_a_bonus_nothing_is_measured() -> None:
    credit = RolloutCredit(
        tiny_model("llama"), CoupledRhythmCredit(), heads="all", horizon=HORIZON, schedule=warmup(4)
    )
    assert bool((credit.weigh(rollout_of(), [1.0] * 3, 0) == 1).all())
    assert credit.last.metrics["credit/measured_rows"] == 0
    assert credit.last.scores is None


@pytest.mark.usefixtures("as_users_call")
def test_a_run_goes_on_with_its_own_state_only() -> None:
    model, rollout = tiny_model("llama"), rollout_of()
    first = RolloutCredit(model, CoupledRhythmCredit(), horizon=HORIZON)
    first.weigh(rollout, [1.0, -1.0, 1.0], 0)
    state = first.state_dict()
    again = RolloutCredit(model, CoupledRhythmCredit(), horizon=HORIZON)
    again.load_state_dict(state)
    assert again.grouping.saved_groups == first.grouping.saved_groups
    assert not again.regroups_at(9)
    assert again.regroups_at(10)
    for strategy, options, differs in (
        (CoupledRhythmCredit(alpha=0.25), {}, "credit.alpha 0.5 .now 0.25."),
        (RandomCredit(), {}, "credit CoupledRhythmCredit .now RandomCredit."),
        (CoupledRhythmCredit(), {"signs": "positive"}, "signs"),
        (CoupledRhythmCredit(), {"horizon": (2, 5)}, "horizon"),
        (CoupledRhythmCredit(), {"schedule": warmup(3)}, "schedule None"),
    ):
        other = RolloutCredit(model, strategy, **{"horizon": HORIZON, **options})
        with pytest.raises(ResultError, match=differs):
            other.load_state_dict(state)
    for damaged in (
        None,
        {},
        {"grouping": {}, "settings": state["settings"]},
        {**state, "settings": 3},
        {**state, "grouping": {**state["grouping"], "grouped_at": "x"}},
        {**state, "grouping": {**state["grouping"], "grouped_at": -4}},
        {**state, "grouping": {**state["grouping"], "saved_groups": 3}},
    ):
        with pytest.raises(ResultError):
            again.load_state_dict(damaged)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"schedule": 0.5}, "schedule must be a callable"),
        ({"schedule": warmup}, "warmup returns one"),
        ({"root": "model"}, "root must be the module"),
        ({"token_budget": 0}, "token_budget"),
        ({"group": "world"}, "group must be a process group"),
    ],
)
def test_options_that_make_no_sense(options, told: str) -> None:
    with pytest.raises(ParameterError, match=told):
        RolloutCredit(tiny_model("llama"), CoupledRhythmCredit(), horizon=HORIZON, **options).weigh(
            rollout_of(), [1.0] * 3, 0
        )


@pytest.mark.usefixtures("as_users_call")
def test_statistics_of_something_else_are_refused() -> None:
    model, rollout = tiny_model("llama"), rollout_of()
    credit = RolloutCredit(model, CoupledRhythmCredit(), horizon=HORIZON)
    good = {"layers": list(credit.layers), "horizon": HORIZON}
    own = measure_rollout(model, rollout, **good)
    torch.testing.assert_close(
        credit.weigh(rollout, [1.0] * 3, 0, statistics=own), credit.weigh(rollout, [1.0] * 3, 1)
    )
    fresh = RolloutCredit(model, CoupledRhythmCredit(), horizon=HORIZON)
    for statistics, told in (
        (measure_rollout(model, rollout, layers=[0], horizon=HORIZON), "layers"),
        (measure_rollout(model, rollout, layers=good["layers"], horizon=(2, 5)), "horizon"),
        (measure_rollout(model, rollout, **good, window=3), "window"),
        (measure_rollout(model, rollout, **good, span=False), "no span"),
        (measure_rollout(model, rollout_of(((2, 14),)), **good), "1 completions, but the rollout has 3"),
        ("own", "what was measured must be"),
    ):
        with pytest.raises(ParameterError, match=told):
            fresh.weigh(rollout, [1.0] * 3, 0, statistics=statistics)


@pytest.mark.usefixtures("as_users_call")
def test_scores_that_are_known_are_not_measured_again() -> None:
    model, rollout = tiny_model("llama"), rollout_of()
    credit = RolloutCredit(model, CoupledRhythmCredit(), horizon=HORIZON)
    gamma = credit.weigh(rollout, [1.0, -1.0, 2.0], 0)
    scores, passes = credit.last.scores, Widths()
    with attnprobe.attach(model, passes):
        torch.testing.assert_close(credit.weigh(rollout, [1.0, -1.0, 2.0], 1, scores=scores), gamma)
    assert passes.shapes == []
    for step, wrong, told in (
        (10, scores, "classified at this step"),
        (1, scores.select([0]), "must be"),
        (1, "x", "score_rollout"),
    ):
        with pytest.raises(ParameterError, match=told):
            credit.weigh(rollout, [1.0, -1.0, 2.0], step, scores=wrong)


def test_statistics_of_no_more_than_a_pass_are_held() -> None:
    """Of 12 completions, 2 at a time: what is alive between passes are scores, once heads are grouped."""
    model, rollout = tiny_model("llama"), rollout_of([(3, 14)] * 12)
    credit = RolloutCredit(model, CoupledRhythmCredit(), horizon=HORIZON, batch_size=2)
    credit.weigh(rollout, [1.0] * 12, 0)
    alive: list[int] = []

    class Alive(attnprobe.Probe):
        def observe(self, site, layer, value, batch) -> None:
            gc.collect()
            held = [each for each in gc.get_objects() if type(each) is attnprobe.HeadStatistics]
            alive.append(sum(len(each.waad) for each in held))

    before = sum(len(e.waad) for e in gc.get_objects() if type(e) is attnprobe.HeadStatistics)
    with attnprobe.attach(model, Alive(), layers=[1]):
        credit.weigh(rollout, [1.0] * 12, 1)
    assert len(alive) == 6
    assert max(alive) - before <= 2


# ---- budgets ------------------------------------------------------------------------------------------


class Widths(attnprobe.Probe):
    """Keeps how many sequences run together, and how wide they are padded."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []

    def observe(self, site, layer, value, batch) -> None:
        if layer == 0:
            self.shapes.append(tuple(batch.input_ids.shape))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 80))
def test_a_token_budget_holds_padding_too(lengths: list[int], budget: int) -> None:
    model = tiny_model("llama")
    rollout = rollout_of([(2, length) for length in lengths])
    probe = Widths()
    with attnprobe.attach(model, probe):
        parts = measure_rollout(model, rollout, layers=[0], horizon=HORIZON, token_budget=budget)
    whole = measure_rollout(model, rollout, layers=[0], horizon=HORIZON, batch_size=len(lengths))
    for rows, width in probe.shapes:
        assert rows == 1 or rows * width <= budget
    assert sum(rows for rows, _ in probe.shapes) == len(lengths)
    for name in ("waad", "fai", "span"):
        torch.testing.assert_close(
            getattr(parts, name), getattr(whole, name), equal_nan=True, atol=1e-4, rtol=1e-4
        )


def test_by_default_short_sequences_are_not_padded_to_long_ones() -> None:
    model = tiny_model("llama", max_position_embeddings=8192)
    batch = attnprobe.TokenBatch.from_ids([[5] * n for n in (3000, 10, 20, 1500, 15)])
    probe = Widths()
    with attnprobe.attach(model, probe):
        attnprobe.measure(model, batch, layers=[0], entropy=False, horizon=HORIZON)
    assert probe.shapes == [(3, 20), (1, 1500), (1, 3000)]


# ---- metrics --------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_weights_that_were_applied() -> None:
    model, rollout = tiny_model("llama"), rollout_of()
    credit = RolloutCredit(model, GlobalAnchorCredit(), horizon=(3, 6), signs="positive", reclassify_every=2)
    advantages = torch.tensor([1.0, -2.0, 0.0])
    gamma = credit.weigh(rollout, advantages, 0)
    own = rollout.response_mask
    metrics = credit.last.metrics
    assert metrics["credit/gamma_mean"] == pytest.approx(float(gamma[0][own[0]].mean()))
    assert metrics["credit/amplified_share"] == pytest.approx(float((gamma[0] > 1)[own[0]].float().mean()))
    assert metrics["credit/applied_mean"] == pytest.approx(float(gamma[own].mean()))
    change = (advantages[:, None] * (gamma - 1))[own].mean()
    assert metrics["credit/advantage_change"] == pytest.approx(float(change), rel=1e-5)
    assert float(change) > 0
    assert metrics["credit/measured_rows"] == 3
    # The last three tokens of each completion have no token that is three away.
    assert metrics["credit/without_fai_share"] == pytest.approx(9 / int(own.sum()))
    assert metrics["credit/regrouped"] == 1
    assert metrics["credit/regrouped_heads"] != metrics["credit/regrouped_heads"], "there were none before"
    credit.weigh(rollout, advantages, 1)
    assert credit.last.metrics["credit/measured_rows"] == 1
    assert credit.last.metrics["credit/regrouped"] == 0
    scores = credit.last.scores
    assert bool(scores.waad[1:].isnan().all())
    assert bool(scores.waad[0][own[0]].isfinite().all())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before = credit.groups
    credit.weigh(rollout, advantages, 2)
    after = credit.groups
    moved = (before.local_heads != after.local_heads) | (before.global_heads != after.global_heads)
    assert credit.last.metrics["credit/regrouped_heads"] == int(moved.sum()) > 0

"""Credit in verl, as far as it can be tested without verl: options, the plug-in, and rows.

`make test-verl` runs the other tests, in tests/verl.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnprobe.errors import ParameterError, TrainerError
from attnprobe.rl import ContinuousCredit, CoupledRhythmCredit, RolloutCredit
from attnprobe.rl.verl.options import ROLLOUT_OPTIONS, STRATEGIES, check_environment, read_options
from attnprobe.rl.verl.rows import jagged, rollout_of
from attnprobe.testing.tiny_models import tiny_model

ROOT = Path(__file__).parent.parent


def constant_credit(scores: Any) -> torch.Tensor:
    """A strategy of one's own."""
    return torch.full(scores.waad.shape, 2.0)


def test_defaults_are_those_of_the_library() -> None:
    for text in ("", " ", "{}"):
        options = read_options(text)
        assert (options.credit, options.arguments) == (CoupledRhythmCredit(), {})


def test_options_are_those_of_the_strategy_and_of_rollout_credit() -> None:
    options = read_options(
        json.dumps(
            {
                "strategy": "ContinuousCredit",
                "amplification": 2,
                "score": "waad",
                "heads": {"local": [[1, 0]], "global": [[1, 1]]},
                "horizon": [1, 4],
                "schedule": {"decay": {"steps": 10, "to": 0.5}},
            }
        )
    )
    assert options.credit == ContinuousCredit(amplification=2, score="waad")
    credit = RolloutCredit(tiny_model("llama"), options.credit, **options.arguments)
    assert credit.horizon == (1, 4)
    assert credit.layers == (1,)
    assert [credit.schedule(step) for step in (0, 5, 20)] == [1.0, 0.75, 0.5]
    assert read_options('{"schedule": {"warmup": 4}}').arguments["schedule"](1) == 0.25


def test_every_option_and_strategy_is_one_of_ours() -> None:
    for name in STRATEGIES:
        read_options(json.dumps({"strategy": name}))
    annotations = RolloutCredit.__init__.__annotations__
    assert set(ROLLOUT_OPTIONS) <= set(annotations)


def test_a_strategy_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    options = read_options('{"strategy": "test_verl_options:constant_credit", "signs": "positive"}')
    assert options.credit.__name__ == "constant_credit"
    assert options.arguments == {"signs": "positive"}
    with pytest.raises(ParameterError, match=r"has no option 'quantile'.* takes no parameters"):
        read_options('{"strategy": "test_verl_options:constant_credit", "quantile": 0.3}')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "must be JSON"),
        ("[1]", "must be a JSON object"),
        ('{"strategy": "CoupledRythmCredit"}', "must be one of CoupledRhythmCredit, .* 'CoupledRythmCredit'"),
        ('{"strategy": 3}', "must be one of"),
        ('{"strategy": "no_such_module:credit"}', "cannot be imported"),
        ('{"strategy": "json:__name__"}', "must be callable"),
        ('{"quantil": 0.3}', "has no option 'quantil'"),
        ('{"strategy": "RandomCredit", "select": "top"}', "has no option 'select'"),
        ('{"batch_size": 3}', "has no option 'batch_size'"),
        ('{"quantile": 3}', "quantile"),
        ('{"schedule": {"warmup": {"step": 3}}}', "warmup cannot be made"),
        ('{"schedule": {"warm": 3}}', "must be such as"),
        ('{"schedule": 3}', "must be such as"),
    ],
)
def test_mistakes_are_refused(text: str, said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        read_options(text)
    with pytest.raises(ParameterError, match=said):
        check_environment({"VERL_ENGINE_VENDOR": "attnprobe", "ATTNPROBE_CREDIT": text})


@pytest.mark.parametrize("vendor", [None, "", "atnprobe", "Attnprobe", "nvidia"])
def test_another_engine_is_refused(vendor: str | None) -> None:
    environment = {} if vendor is None else {"VERL_ENGINE_VENDOR": vendor}
    with pytest.raises(TrainerError, match="set VERL_ENGINE_VENDOR=attnprobe"):
        check_environment(environment)


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, False),
        ({"VERL_ENGINE_VENDOR": "metax"}, False),
        ({"VERL_ENGINE_VENDOR": "attnprobe"}, True),
        ({"VERL_ENGINE_VENDOR": "atn-probe"}, True),
        ({"VERL_ENGINE_VENDOR": "ATTNPROBE"}, True),
        ({"ATTNPROBE_CREDIT": ""}, True),
    ],
)
def test_the_plugin_knows_when_it_is_asked(environment: dict[str, str], asked: bool) -> None:
    """Otherwise it loads nothing, whatever else is installed."""
    code = "import sys, attnprobe_verl, os; print(attnprobe_verl.is_asked_for(eval(sys.argv[1])))"
    code += "; assert 'attnprobe' not in sys.modules"
    found = subprocess.run(
        [sys.executable, "-c", code, repr(environment)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert found.stdout.strip() == str(asked)


def test_rows_that_fill_a_batch_have_no_response() -> None:
    rows = {
        "prompts": jagged([torch.tensor([5, 6]), torch.zeros(4, dtype=torch.long)]),
        "responses": jagged([torch.tensor([7, 8, 9]), torch.tensor([0])]),
        "response_mask": jagged([torch.tensor([1, 0, 1]), torch.tensor([0])]),
    }
    rollout = rollout_of(rows)
    assert rollout.prompt_ids.tolist() == [[0, 0, 5, 6], [0, 0, 0, 0]]
    assert rollout.response_mask.tolist() == [[True, False, True], [False, False, False]]
    with pytest.raises(TrainerError, match=r"set trainer\.use_v1=True"):
        rollout_of({name: torch.ones(1, 2, dtype=torch.long) for name in rows})

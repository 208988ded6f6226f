"""Every causal family of transformers: the models, the checks, a sample of families, and the page about them.

The sample holds each kind of attention that has its own way to go wrong, and families from all over the
alphabet. All of them take some minutes: `make families`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from attnprobe import AttnprobeError, UnsupportedModelError
from attnprobe.testing import family_checks, family_sizes
from attnprobe.testing.all_families import BEGIN, END, families_table, family_row, first_sentence, summary
from attnprobe.testing.family_cases import LENGTHS, FamilyCase, ModelFailed
from attnprobe.testing.family_checks import check_family
from attnprobe.testing.family_models import build_family, causal_families, family_config
from attnprobe.testing.family_report import FamilyReport, Outcome
from attnprobe.testing.family_sizes import WINDOW

pytestmark = pytest.mark.filterwarnings("ignore")

IS_PAGES_VERSION = transformers.__version__.startswith("5.23.")
"""Whether docs/families.md and the recipes are about the families of the installed transformers."""

of_the_page = pytest.mark.skipif(not IS_PAGES_VERSION, reason="docs/families.md is about transformers 5.23")

SPECIAL = {
    "sinks": ("gpt_oss", "granite_swa"),
    "soft cap": ("gemma2",),
    "top-k": ("deepseek_v32", "glm_moe_dsa", "minimax_m3_vl_text", "qwen4_exp_text", "doge"),
    "shared keys, sliced hidden states": ("gemma3n_text", "gemma4_text"),
    "chunks": ("llama4_text",),
    "latent attention": ("deepseek_v3", "kimi_linear"),
    "hybrid": ("jamba", "qwen3_next", "falcon_h1", "recurrent_gemma", "nemotron_h"),
    "learned positions": ("gpt2", "opt"),
    "dense": ("bloom", "falcon"),
    "settings by layer": ("dots3_note_text",),
    "position bias": ("inkling_text",),
    "compressed keys": ("deepseek_v4",),
    "two maps in a layer": ("diffllama",),
    "prompts before the text": ("cpmant",),
    "maps in another order": ("xlnet",),
    "cross-attention": ("mllama",),
    "decoders of encoder-decoders": ("bart", "trocr", "prophetnet"),
    "towers": ("phi4_multimodal",),
    "head called decoder": ("modernbert-decoder",),
    "sliding cache, other mask": ("moshi",),
}
REFUSED = {"deepseek_v4", "diffllama", "cpmant", "xlnet", "prophetnet"}
_REST = [name for name in causal_families() if name not in {n for names in SPECIAL.values() for n in names}]
SAMPLE = [*(name for names in SPECIAL.values() for name in names), *_REST[3::8]]


def lacking(name: str) -> Any:
    """Return a family's name, as a test to skip if the installed transformers does not have it."""
    reason = f"transformers {transformers.__version__} has no {name}"
    return name if name in causal_families() else pytest.param(name, marks=pytest.mark.skip(reason=reason))


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("name", [lacking(name) for name in SAMPLE])
def test_a_family_is_read_right_or_refused(name: str) -> None:
    """No number is wrong, no exception is another library's, and reading changes no bit."""
    report = check_family(name, backends=False)
    wrong = {title: o for title, o in report.outcomes.items() if o.kind in ("wrong", "error")}
    assert not wrong
    assert report.status != "refused" or len(report.reason) > 15
    assert report.is_bitwise
    # Other versions compute some families in another way.
    if IS_PAGES_VERSION and any(name in names for names in SPECIAL.values()):
        assert (report.status == "refused") == (name in REFUSED)


# ---- the models ---------------------------------------------------------------------------------


def test_all_families_of_the_library_are_listed() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert causal_families() == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if not IS_PAGES_VERSION:
        return
    known = set(causal_families())
    for table in (family_sizes.OWN_SETTINGS, family_sizes.FACTORS, family_sizes.NOT_ALONE):
        assert set(table) <= known


def test_a_family_is_the_same_each_time_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = build_family("qwen3"), build_family("qwen3", "eager")
    assert torch.equal(before, torch.get_rng_state())
    assert second.config._attn_implementation == "eager"
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    other_seed = build_family("qwen3", seed=1)
    assert not torch.equal(next(first.parameters()), next(other_seed.parameters()))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("gemma3_text", {"sliding_attention", "full_attention"}),
        ("llama4_text", {"chunked_attention", "full_attention"}),
        ("qwen3_next", {"linear_attention", "full_attention"}),
        ("minimax_m3_vl_text", {"minimax_m3_sparse", "full_attention"}),
        ("laguna", {"sliding_attention", "full_attention"}),
        ("granitemoehybrid", {"linear_attention", "full_attention"}),
    ],
)
def test_a_family_has_each_kind_of_its_layers(name: str, kinds: set[str]) -> None:
    if name not in causal_families():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    assert set(family_config(name).layer_types) == kinds


def test_sequences_are_longer_than_windows_and_budgets() -> None:
    assert min(LENGTHS) > 3 * WINDOW
    assert family_config("mistral").sliding_window == WINDOW
    assert family_config("glm_moe_dsa").index_topk == WINDOW
    assert family_config("gemma4_text").num_kv_shared_layers == 2


def test_maps_are_uneven() -> None:
    """Otherwise a wrong mask or position would not show."""
    case = FamilyCase("llama")
    case.layers = (0, 1, 2, 3)
    maps, _ = case.alone(case.rows[0])
    for pattern in maps:
        largest = pattern[:, :, 10:].amax(-1).mean()
        assert 0.15 < float(largest) < 0.9


def test_families_that_cannot_be_run_alone_say_why() -> None:
    with pytest.raises(UnsupportedModelError, match="codes"):
        build_family("musicgen")
    report = check_family("gemma4_assistant")
    assert report.status == "not built"
    assert "another model" in report.reason


# ---- the checks ---------------------------------------------------------------------------------


def _case(name: str = "llama") -> FamilyCase:
    case = FamilyCase(name)
    case.layers = tuple(range(4))
    return case


@pytest.mark.parametrize("title", ["measure", "attach left", "generate one", "generate left"])
def test_the_checks_see_other_weights(title: str) -> None:
    case = _case()
    with torch.no_grad():
        case.eager.model.layers[2].self_attn.q_proj.weight.mul_(1.1)
    outcome = family_checks._CHECKS[title](case)
    assert outcome.kind == "wrong"
    assert outcome.difference is not None
    assert outcome.difference > 0.01


def test_the_checks_see_another_window() -> None:
    case = _case("mistral")
    case.eager.config.sliding_window = WINDOW + 1
    assert family_checks._CHECKS["measure"](case).kind == "wrong"


def test_an_exception_ends_one_check_only() -> None:
    def failing(case: FamilyCase) -> Outcome:
        raise KeyError("x")

    assert family_checks._outcome(lambda: failing(_case())).kind == "error"

    def refusing(case: FamilyCase) -> Outcome:
        raise AttnprobeError("because")

    assert family_checks._outcome(lambda: refusing(_case())) == Outcome("refused", "because")

    def unable(case: FamilyCase) -> Outcome:
        raise ModelFailed("it cannot")

    assert family_checks._outcome(lambda: unable(_case())).kind == "model"


def test_the_worst_outcome_is_the_status() -> None:
    report = FamilyReport("x", "X", reads="factored", outcomes={"measure": Outcome("good")})
    assert report.status == "factored"
    report.outcomes["text"] = Outcome("wrong")
    assert report.status == "WRONG"
    assert not report.is_bitwise
    report.outcomes["attach left"] = Outcome("error")
    assert report.status == "ERROR"
    assert FamilyReport("x").status == "not built"
    assert FamilyReport("x", "X", outcomes={"measure": Outcome("refused")}).status == "refused"
    assert "1 errors" in summary([report])


# ---- the page -----------------------------------------------------------------------------------


def _page() -> str:
    page = Path(__file__).parent.parent / "docs" / "families.md"
    return page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


@of_the_page
def test_the_page_names_every_family_once() -> None:
    names = re.findall(r"^\| `([^`]+)` \|", _page(), flags=re.MULTILINE)
    assert sorted(names) == causal_families()
    assert not re.search("WRONG:|ERROR", _page())


@of_the_page
@pytest.mark.parametrize("name", ["llama", "bloom", "qwen3_next", "granite_swa"])
def test_the_page_is_what_the_command_gives(name: str) -> None:
    row = f"| {' | '.join(family_row(check_family(name)))} |"
    assert row in _page(), "run: make families"


def test_the_page_gives_the_reason_of_a_refusal() -> None:
    reason = first_sentence(check_family("mamba").reason)
    assert f"| `mamba` | {reason} |" in _page()
    assert reason in families_table([check_family("mamba")])

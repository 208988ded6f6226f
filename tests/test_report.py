"""The report: one page that holds everything, loads nothing, and holds of every token what the results say.

What a browser makes of a page is tested in test_report_browser.
"""

from __future__ import annotations

import base64
import builtins
import dataclasses
import hashlib
import json
import math
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import attnprobe
from attnprobe.errors import (
    AttnprobeError,
    BatchError,
    MissingDependencyError,
    ParameterError,
    ResultError,
)
from attnprobe.maps import GroupMaps
from attnprobe.report import Report, Reports
from attnprobe.report.maps import DECADES, pool_map
from attnprobe.report.packing import rounded_heads
from attnprobe.report.page import SCRIPTS, page_script
from attnprobe.report.reads import strongest_readers, strongest_reads
from attnprobe.report.response import coupled_pairs, influence_rows, read_response
from attnprobe.report.visible_text import byte_marks, visible
from tests.report_results import HOSTILE, make_maps, make_results


class Page(HTMLParser):
    """What a browser would make of a page without running its script: its elements, scripts and texts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.texts: dict[str, str] = {}
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag in ("meta", "br", "img", "link", "input"):
            return
        self._open.append((tag, attributes))
        if tag == "script":
            self.scripts.append((attributes, ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1][0] == tag, f"</{tag}> closes {self._open[-1]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data
            return
        for tag, attributes in self._open:
            name = str(attributes.get("id") or tag)
            self.texts[name] = self.texts.get(name, "") + data

    def entry(self, number: int = 0) -> dict[str, Any]:
        """Return the data of an entry from its block of JSON."""
        (text,) = [text for attributes, text in self.scripts if attributes.get("id") == f"entry-{number}"]
        entry: dict[str, Any] = json.loads(text)
        return entry


def numbers(packed: str, dtype: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(packed), f"<{dtype}")


def inflated(packed: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8)


def score(entry: dict[str, Any], key: str) -> np.ndarray[Any, Any]:
    (found,) = [each for each in entry["scores"] if each["key"] == key]
    return numbers(found["values"], "f4")


def facts(entry: dict[str, Any]) -> dict[str, str]:
    return dict(entry["facts"])


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny random model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def measured(model: Any) -> dict[str, Any]:
    """The results of a model, as a user gets them."""
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :5] = 0
    ids = torch.randint(3, 90, (2, 60), generator=torch.Generator().manual_seed(4))
    batch = attnprobe.TokenBatch.from_ids(ids, mask, response_start=20)
    statistics = attnprobe.measure(model, batch, layers=[0, 2], receiver=True)
    heads = attnprobe.classify_heads(statistics, receivers=3)
    scores = attnprobe.score_tokens(statistics, heads)
    return {
        "batch": batch,
        "statistics": statistics,
        "heads": heads,
        "scores": scores,
        "rhythm": attnprobe.find_rhythm(scores),
        "maps": attnprobe.group_maps(model, batch, heads, example=1),
    }


# ---- the page as a whole ----------------------------------------------------------------------------


def test_a_page_of_a_measured_model_has_all_sections(measured: dict[str, Any], tmp_path: Path) -> None:
    path = Report(**measured, example=1, title="A title", notes="A note").save(tmp_path / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    sections = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    assert sections == ["answer", "curves", "pairs", "heads", "maps"]
    tags = {tag for tag, _ in page.elements}
    assert {"header", "main", "aside", "footer"} <= tags
    assert "nav" not in tags
    assert "How to read this page" in page.texts["guide"]
    entry = page.entry()
    ids = measured["batch"].input_ids[1, 20:].tolist()
    assert [f"{token} " for token in ids] == entry["texts"]
    assert list(range(20, 60)) == numbers(entry["columns"], "i4").tolist()
    assert ids == numbers(entry["ids"], "i4").tolist()
    assert (entry["title"], entry["notes"], entry["prompt"]) == ("A title", "A note", "")


def test_nothing_is_fetched_and_only_our_script_may_run(measured: dict[str, Any]) -> None:
    html = Report(**measured, example=1).html()
    page = Page(html)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"link", "img", "iframe", "object", "base", "form", "a"}
    for _, attributes in page.elements:
        assert not attributes.keys() & {"src", "href", "srcset", "onload", "onerror"}
    (styles,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert "url(" not in styles
    assert "@import" not in styles
    (policy,) = [
        str(attributes["content"])
        for tag, attributes in page.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy.partition("style-src")[0]
    (script,) = [text for attributes, text in page.scripts if not attributes]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    # No way from a text to markup or to code, whatever the text.
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|fetch\(", script
    )


def test_every_file_of_the_script_is_in_it_and_within_its_limits() -> None:
    folder = Path(attnprobe.__file__).parent / "report" / "assets"
    assert sorted(SCRIPTS) == sorted(path.name for path in folder.glob("*.js"))
    for name in SCRIPTS:
        text = (folder / name).read_text(encoding="utf-8")
        assert text in page_script()
        assert text.startswith("// ")
        assert len(text.splitlines()) <= 400


def test_the_entry_names_what_was_measured() -> None:
    results = make_results()
    statistics = dataclasses.replace(results["statistics"], skipped_layers=(0, 1), horizon=(10, None))
    told = facts(Page(Report(**results | {"statistics": statistics}).html()).entry())
    assert told == {
        "Model": "a/model",
        "Layers measured": "2: 3-4",
        "Layers without attention": "0-1",
        "Heads measured": "8 (4 in a layer): 2 local, 2 global, 2 receivers",
        "WAAD window": "10 tokens",
        "FAI horizon": "10 tokens later to the end",
        "Peaks": "among the top 40% of a score",
        "Lookback": "an anchor follows its preplan within 3 tokens",
        "Response": "example 0 of a batch of 2",
    }


def test_where_a_model_lies_on_a_disk_is_not_told() -> None:
    results = make_results()
    for name in ("statistics", "heads"):
        results[name] = dataclasses.replace(results[name], model_name="/home/someone/models/tiny")
    html = Report(**results).html()
    assert facts(Page(html).entry())["Model"] == "tiny"
    assert "someone" not in html


def test_the_prompt_is_the_given_one_or_the_batchs_own() -> None:
    results = make_results(("yes", " no"))
    assert Page(Report(**results).html()).entry()["prompt"] == "Say <i>so\nab"
    assert Page(Report(**results, prompt="Another").html()).entry()["prompt"] == "Another"
    assert Page(Report(**make_results()).html()).entry()["prompt"] == ""


def test_saving_returns_the_path_and_replaces_an_older_page(tmp_path: Path) -> None:
    report = Report(**make_results())
    path = tmp_path / "page.html"
    path.write_text("old")
    assert path == report.save(str(path))
    assert report.html() == path.read_text(encoding="utf-8")
    assert [path] == list(tmp_path.iterdir())


# ---- hostile tokens ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile_page() -> Page:
    results = make_results(HOSTILE * 3)
    for name in ("statistics", "heads"):
        results[name] = dataclasses.replace(results[name], model_name="<script>alert(4)</script>")
    report = Report(
        **results,
        maps=make_maps(len(HOSTILE) * 3),
        title="</title><script>alert(5)</script>",
        notes="</style><script>alert(6)</script>",
        prompt="</details><script>alert(7)</script>",
        weights={"</script><script>alert(8)</script>": torch.ones(results["batch"].input_ids.shape)},
    )
    return Page(report.html().encode().decode())


def test_hostile_texts_add_no_element(hostile_page: Page) -> None:
    harmless = make_results(("word",) * len(HOSTILE) * 3)
    expected = Page(Report(**harmless, maps=make_maps(len(HOSTILE) * 3), notes="n", prompt="p").html())
    kinds = [attributes.get("type") for attributes, _ in hostile_page.scripts]
    assert ["application/json"] * 2 + [None] == kinds
    assert [tag for tag, _ in expected.elements] == [tag for tag, _ in hostile_page.elements]
    assert all(not name.startswith("on") for _, attributes in hostile_page.elements for name in attributes)
    assert expected.scripts[-1] == hostile_page.scripts[-1]


def test_hostile_texts_are_data_that_no_markup_can_leave(hostile_page: Page) -> None:
    for attributes, text in hostile_page.scripts:
        if attributes.get("type") == "application/json":
            assert not set("<>&") & set(text)
    shown = [*HOSTILE[:7], "⟨202E⟩right", "\u2400", "\ufffd", "", "é⟨2028⟩"]
    assert shown * 3 == hostile_page.entry()["texts"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\u200b", "⟨200B⟩"),
        ("pass\u200bword", "pass⟨200B⟩word"),
        ("\ufeff", "⟨FEFF⟩"),
        ("\u00ad", "⟨00AD⟩"),
        ("\u200d", "⟨200D⟩"),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),
        ("\u2764\ufe0f", "\u2764\ufe0f"),
        ("\ufe0f", "⟨FE0F⟩"),
        ("\u200f", "⟨200F⟩\u200f"),
        ("\u2067x\u2069", "⟨2067⟩x⟨2069⟩"),
        ("\U000e0041", "⟨E0041⟩"),
        ("\x7f\x1b", "\u2421\u241b"),
        ("\u05e9\u05dc\u05d5\u05dd", "\u05e9\u05dc\u05d5\u05dd"),
    ],
)
def test_what_has_no_width_is_made_visible(text: str, shown: str) -> None:
    assert shown == visible(text)


def test_bytes_of_a_character_are_named_where_they_are_known() -> None:
    assert byte_marks(["a", "\u4e2d", "", "", "b"]) == {2: "⟨B8⟩", 3: "⟨AD⟩"}
    assert byte_marks(["\U0001f642", "", "x", "\u00e9", ""]) == {1: "⟨…⟩", 4: "⟨A9⟩"}
    # An image's tokens, and more empty tokens than the character has bytes, are something else.
    assert byte_marks(["<image>", "", "", "\u00e9", "", "", ""]) == {}


def test_a_tokenizer_names_the_bytes_of_every_fragment() -> None:
    """Of characters in fewer tokens than bytes, and of bytes that are no character."""
    texts = ("x", "\U0001f642", "", "\ufffd", " cat", "")
    known = [b"x", b"\xf0\x9f", b"\x99\x82", b"\xe4", b" cat", None]
    assert byte_marks(texts, known) == {2: "⟨99 82⟩", 3: "⟨E4⟩"}

    class Tokenizer:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return ["x", "\u00f0\u0141", "\u013b\u0124", "<0xE4>", "\u2581cat", "<pad>"][: len(ids)]

    entry = Page(Report(**make_results(texts), tokenizer=Tokenizer()).html()).entry()
    assert entry["marks"] == {"2": "⟨99 82⟩", "3": "⟨E4⟩"}
    assert entry["texts"] == ["x", "\U0001f642", "", "", " cat", ""]
    with pytest.raises(BatchError, match="tokenizer"):
        Report(**make_results(), tokenizer="text")


# ---- every number is that of the results ------------------------------------------------------------


def test_token_scores_are_exact(measured: dict[str, Any]) -> None:
    gamma = torch.rand(measured["batch"].input_ids.shape, dtype=torch.float64)
    entry = Page(Report(**measured, example=1, weights={"coupled": gamma}).html()).entry()
    scores, statistics = measured["scores"], measured["statistics"]
    expected = {
        "waad": scores.waad[1, 20:],
        "fai": scores.fai[1, 20:],
        "receivers": scores.receiver_fai[1, 20:],
        "all": statistics.fai[1, :, :, 20:].double().flatten(0, 1).mean(0).float(),
        "entropy": scores.entropy[1, 20:],
        "gamma0": gamma[1, 20:].float(),
    }
    assert list(expected) == [each["key"] for each in entry["scores"]]
    for key, values in expected.items():
        np.testing.assert_array_equal(score(entry, key), values.numpy())
    flags = numbers(entry["flags"], "u1")
    for bit, name in enumerate(("preplan", "anchor", "dominated", "intro")):
        assert getattr(measured["rhythm"], name)[1, 20:].tolist() == (flags >> bit & 1).astype(bool).tolist()
    preplans = numbers(entry["preplanOf"], "i4")
    pairs = [(int(preplans[i]) + 20, i + 20) for i in range(40) if preplans[i] >= 0]
    assert measured["rhythm"].pairs(1) == pairs


@pytest.mark.parametrize("horizon", [(10, 100), (10, None), (1, 4), (0, 7)])
def test_rows_of_fai_are_counted(horizon: tuple[int, int | None]) -> None:
    """Against the horizon as Eq. 10 has it, in a response with a gap."""
    results = make_results(length=30)
    mask = results["batch"].response_mask.clone()
    mask[:, 20:23] = False
    batch = dataclasses.replace(results["batch"], response_mask=mask)
    statistics = dataclasses.replace(results["statistics"], response_mask=mask, horizon=horizon)
    columns = mask[0].nonzero()[:, 0].tolist()
    low, high = horizon
    found = influence_rows(batch, statistics, 0)
    assert found is not None
    for s in columns:
        last = len(mask[0]) if high is None else s + high
        assert sum(s + low <= t <= last for t in columns) == int(found[s])


def test_fai_is_defined_where_there_are_rows(model: Any) -> None:
    """As a model's own measurement has it, in responses with a gap and with padding on the left."""
    padded = torch.ones(2, 40, dtype=torch.long)
    padded[1, :5] = 0
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[:, 10:20] = mask[:, 24:] = True
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(5))
    batch = attnprobe.TokenBatch.from_ids(ids, padded, response_mask=mask)
    statistics = attnprobe.measure(model, batch, horizon=(2, 5))
    heads = attnprobe.classify_heads(statistics)
    scores = attnprobe.score_tokens(statistics, heads)
    for example in (0, 1):
        rows = influence_rows(batch, statistics, example)
        assert rows is not None
        assert torch.equal(rows[mask[example]] > 0, ~scores.fai[example, mask[example]].isnan())
        maps = attnprobe.group_maps(model, batch, heads, example=example)
        Report(batch, statistics, heads, scores, attnprobe.find_rhythm(scores), maps, example=example)


def test_rows_of_another_segment_are_counted_where_the_batch_knows_it() -> None:
    results = make_results()
    statistics = dataclasses.replace(results["statistics"], influence_rows="answer")
    assert influence_rows(results["batch"], statistics, 0) is None
    batch = results["batch"].with_segments({"answer": slice(40, 42)})
    found = influence_rows(batch, statistics, 0)
    assert found is not None
    assert found[[6, 30, 31, 32]].tolist() == [2, 2, 1, 0]


@pytest.mark.parametrize(("heads", "bits"), [(12, 8), (40_000, 4)])
def test_scores_of_heads_are_rounded_by_no_more_than_half_a_step(heads: int, bits: int) -> None:
    values = torch.rand(heads, 39, generator=torch.Generator().manual_seed(0)).pow(4)
    values[:, -3:] = torch.nan
    values[1] = torch.nan
    values[2, :-3] = 0.25
    for is_root in (False, True):
        packed = rounded_heads(values, is_heavy_tailed=is_root)
        assert bits == packed["bits"]
        codes = inflated(packed["codes"]).reshape(heads, -1)
        if bits == 4:
            codes = np.stack([codes & 15, codes >> 4], -1).reshape(heads, -1)[:, :39]
        low, high = (numbers(packed[name], "f4")[:, None] for name in ("low", "high"))
        levels = 2**bits - 2
        scaled = np.where(codes == levels + 1, np.nan, low + (high - low) * codes / levels)
        exact = values.sqrt().numpy() if is_root else values.numpy()
        np.testing.assert_array_equal(np.isnan(exact), np.isnan(scaled))
        assert np.nanmax(np.abs(scaled - exact) - (high - low) / levels / 2) < 1e-6


def test_what_is_known_of_heads(measured: dict[str, Any]) -> None:
    entry = Page(Report(**measured, example=1).html()).entry()["heads"]
    heads, statistics = measured["heads"], measured["statistics"]
    assert (entry["layers"], entry["count"]) == ([0, 2], 4)
    for name, expected in (
        ("span", heads.span),
        ("kurtosis", heads.receiver_kurtosis),
        ("first", statistics.share("first")[1]),
    ):
        np.testing.assert_array_equal(numbers(entry[name], "f4"), expected.flatten().float().numpy())
    groups = numbers(entry["groups"], "u1")
    for bit, name in enumerate(("local_heads", "global_heads", "receiver_heads")):
        assert getattr(heads, name).flatten().tolist() == (groups >> bit & 1).astype(bool).tolist()


def slow_links(attention: torch.Tensor, kind: str) -> list[list[tuple[int, float]]]:
    """The eight strongest, by sorting every pair of tokens."""
    values = attention.tolist()
    found = []
    for i in range(len(values)):
        others = range(i) if kind == "reads" else range(i + 1, len(values))
        pairs = [(other, values[i][other] if kind == "reads" else values[other][i]) for other in others]
        pairs = [pair for pair in pairs if pair[1] > 0]
        found.append(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:8])
    return found


def test_reads_and_readers_are_the_eight_strongest_of_the_map() -> None:
    results = make_results(length=40)
    maps = make_maps(40)
    entry = Page(Report(**results, maps=maps).html()).entry()["reads"]
    for group in ("local", "global"):
        attention = getattr(maps, f"{group}_map")[0]
        for kind in ("reads", "readers"):
            packed = entry[group][kind]
            token, share = (
                numbers(packed["token"], packed["dtype"]).reshape(40, 8),
                numbers(packed["share"], "f4"),
            )
            for i, expected in enumerate(slow_links(attention, kind)):
                shares = share.reshape(40, 8)[i]
                assert expected == list(zip(token[i].tolist(), shares.tolist(), strict=True))[: len(expected)]
                assert np.isnan(shares[len(expected) :]).all()
        assert entry[group]["isRest"]
        np.testing.assert_allclose(numbers(entry[group]["prompt"], "f4"), 1 - attention.sum(1), atol=1e-6)
        np.testing.assert_array_equal(numbers(entry[group]["self"], "f4"), attention.diagonal())
        assert entry[group]["first"] is None


def test_equal_shares_are_in_the_order_of_the_tokens() -> None:
    reads, _ = strongest_reads(torch.full((6, 6), 0.1), 3)
    assert reads[5].tolist()[0] == min(reads[5].tolist())
    assert sorted(reads[3].tolist()) == [0, 1, 2]
    readers, shares = strongest_readers(torch.zeros(3, 3))
    assert bool((readers == -1).all())
    assert bool(shares.isnan().all())


def test_maps_are_stored_once_and_rounded_by_little() -> None:
    maps = make_maps(40)
    entry = Page(Report(**make_results(), maps=maps).html()).entry()["maps"]
    assert (entry["cells"], entry["block"]) == (40, 1)
    row, column = np.tril_indices(40)
    for group in ("local", "global"):
        codes = inflated(entry[group])
        assert len(codes) == 40 * 41 // 2
        exact = getattr(maps, f"{group}_map")[0].numpy()[row, column]
        stored = entry["high"] * 10 ** (DECADES * ((codes.astype(float) - 1) / 254 - 1))
        kept = codes > 0
        np.testing.assert_allclose(stored[kept], exact[kept], rtol=10 ** (DECADES / 254 / 2) - 1 + 1e-6)
        assert (exact[~kept] < entry["high"] * 10**-DECADES * 1.0001).all()


def test_a_long_map_is_pooled_to_the_largest_of_each_block() -> None:
    pattern = torch.rand(7, 7, generator=torch.Generator().manual_seed(2)).tril()
    pooled = pool_map(pattern, 3)
    assert pooled.block == 3
    for query in range(3):
        for key in range(query + 1):
            block = pattern[3 * query : 3 * query + 3, 3 * key : 3 * key + 3]
            assert float(block.max()) == float(pooled.values[query, key])
    assert bool(pooled.values.triu(1)[0, 1:].isnan().all())
    entry = Page(Report(**make_results(length=600), maps=make_maps(600)).html()).entry()["maps"]
    assert (entry["cells"], entry["block"]) == (300, 2)


# ---- what is undefined or was not measured ----------------------------------------------------------


def test_a_page_without_receivers_entropy_texts_and_maps() -> None:
    results = make_results()
    results["scores"] = dataclasses.replace(results["scores"], entropy=None, receiver_fai=None)
    results["heads"] = dataclasses.replace(results["heads"], receiver_heads=None, receiver_kurtosis=None)
    entry = Page(Report(**results).html()).entry()
    assert ["waad", "fai", "all"] == [each["key"] for each in entry["scores"]]
    assert entry["maps"] is entry["reads"] is entry["heads"]["kurtosis"] is entry["heads"]["first"] is None
    assert not entry["hasTexts"]


def test_all_tokens_undefined_or_one_token_still_make_a_page() -> None:
    results = make_results()
    nothing = torch.full_like(results["scores"].waad, math.nan)
    results["scores"] = dataclasses.replace(results["scores"], waad=nothing, fai=nothing, entropy=nothing)
    results["rhythm"] = attnprobe.find_rhythm(results["scores"])
    assert np.isnan(score(Page(Report(**results).html()).entry(), "waad")).all()
    entry = Page(Report(**make_results(("one",)), maps=make_maps(1)).html()).entry()
    assert (entry["texts"], entry["maps"]["cells"]) == (["one"], 1)


def test_heads_that_a_layer_does_not_have_are_left_blank() -> None:
    results = make_results()
    span = results["statistics"].span.clone()
    span[:, 1, 3] = math.nan
    results["statistics"] = dataclasses.replace(results["statistics"], span=span)
    results["heads"] = attnprobe.classify_heads(results["statistics"])
    entry = Page(Report(**results).html()).entry()
    assert np.isnan(numbers(entry["heads"]["span"], "f4")).tolist() == [False] * 7 + [True]
    assert facts(entry)["Heads measured"].startswith("7 (up to 4 in a layer)")


# ---- pairs ------------------------------------------------------------------------------------------


def test_pairs_and_their_intros_are_those_of_the_rhythm() -> None:
    results = make_results(length=200)
    batch, scores, rhythm = results["batch"], results["scores"], results["rhythm"]
    pairs = coupled_pairs(read_response(batch, scores, rhythm, 1), rhythm, 1)
    assert rhythm.pairs(1) == [(pair.preplan.column, pair.anchor.column) for pair in pairs]
    with_intro = [pair for pair in pairs if pair.anchor.dominated]
    assert with_intro
    for pair in with_intro:
        anchor = pair.anchor.column
        window = rhythm.delta[1, anchor - rhythm.lookback : anchor].nan_to_num(-1)
        assert pair.intro is not None
        assert anchor - rhythm.lookback + int(window.argmax()) == pair.intro.column
    assert all(pair.intro is None for pair in pairs if not pair.anchor.dominated)


def test_an_intro_does_not_lie_across_a_gap() -> None:
    """One column of something else between the intro of another anchor and this one."""
    results = make_results(length=12)
    mask = results["batch"].response_mask.clone()
    mask[:, 12] = False
    batch = dataclasses.replace(results["batch"], response_mask=mask)
    flags = {
        name: torch.zeros_like(mask).index_fill(1, torch.tensor(columns), True)
        for name, columns in {
            "preplan": [11, 14],
            "anchor": [14],
            "dominated": [14],
            "intro": [11, 13],
        }.items()
    }
    rhythm = dataclasses.replace(
        results["rhythm"],
        **flags,
        anchor_preplan=torch.where(flags["anchor"], 14, -1),
        delta=torch.ones(mask.shape).index_fill(1, torch.tensor([11]), 9.0),
    )
    scores = dataclasses.replace(results["scores"], response_mask=mask)
    (pair,) = coupled_pairs(read_response(batch, scores, rhythm, 0), rhythm, 0)
    assert pair.intro is not None
    assert pair.intro.column == 13


# ---- results that were measured --------------------------------------------------------------------


@pytest.mark.parametrize("example", [0, 1])
def test_maps_are_of_one_example_or_of_all(model: Any, measured: dict[str, Any], example: int) -> None:
    """And a report of what was selected is that of the same example."""
    one, other = (
        attnprobe.group_maps(model, measured["batch"], measured["heads"], example=which)
        for which in (example, 1 - example)
    )
    both = GroupMaps.concatenate([one, other] if example == 0 else [other, one])
    results = {name: value for name, value in measured.items() if name != "maps"}
    pages = [Report(**results, maps=maps, example=np.int64(example)).html() for maps in (one, both)]
    assert pages[0] == pages[1]
    selected = {
        name: value if name == "heads" else value.select(example)
        for name, value in {**results, "maps": both}.items()
    }
    alone, whole = Page(Report(**selected).html()).entry(), Page(pages[0]).entry()
    assert {name for name in whole if whole[name] != alone[name]} <= {"facts"}
    with pytest.raises(ResultError, match="other tokens than example"):
        Report(**results, maps=other, example=example)


def test_a_batch_may_be_given_as_ids_and_gets_the_texts_of_the_statistics() -> None:
    results = make_results(("so", " it", " is") * 5)
    texts = results["batch"].texts
    results["statistics"] = dataclasses.replace(results["statistics"], texts=texts)
    names = ("input_ids", "attention_mask", "response_mask")
    given = {name: getattr(results["batch"], name).tolist() for name in names}
    entry = Page(Report(**{**results, "batch": given}).html()).entry()
    assert entry["texts"] == ["so", " it", " is"] * 5


def test_in_a_notebook_a_report_is_its_page(measured: dict[str, Any]) -> None:
    report = Report(**measured, example=1, title='A "title"')
    assert repr(report) == "Report(example 1 of 2, 40 response tokens, LlamaForCausalLM, with maps)"
    for shown in (report, Reports([report], title='A "title"')):
        frame = Page(shown._repr_html_())
        ((tag, attributes),) = frame.elements
        assert tag == "iframe"
        assert attributes["srcdoc"] == shown.html()
        assert attributes["title"] == 'A "title"'
        assert "allow-same-origin" not in str(attributes["sandbox"])


# ---- several reports on one page ---------------------------------------------------------------------


def test_several_reports_on_one_page(tmp_path: Path) -> None:
    first, second = Report(**make_results(), title="A"), Report(**make_results(("x",) * 20), title="<B>")
    reports = Reports((each for each in (first, second)), title="Both", compare=(1, np.int64(0)))
    assert (len(reports), reports[1], reports[-2]) == (2, second, first)
    assert [first, second] == list(reports)
    page = Page(reports.save(tmp_path / "both.html").read_text(encoding="utf-8"))
    assert page.texts["h1"] == "Both"
    assert page.texts["entries"].split() == ["A", "<B>"]
    assert [first.entry(), second.entry()] == [page.entry(0), page.entry(1)]
    (settings,) = [text for attributes, text in page.scripts if attributes.get("id") == "settings"]
    assert json.loads(settings) == {"compare": [1, 0], "isCollection": True}
    # A report is a page with one entry, through the same code.
    alone = Page(first.html())
    assert alone.entry() == page.entry(0)
    assert alone.scripts[-1] == page.scripts[-1]


# ---- errors -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_call")
class TestErrors:
    @pytest.mark.parametrize("example", [2, -1, True, "0", None, 0.0, [0]])
    def test_an_example_that_the_batch_does_not_have(self, example: Any) -> None:
        with pytest.raises(ParameterError, match=r"example.*0\.\.1.*got"):
            Report(**make_results(), example=example)

    @pytest.mark.parametrize("name", ["batch", "statistics", "heads", "scores", "rhythm", "maps", "title"])
    @pytest.mark.parametrize("wrong", [3, "text", {}, torch.ones(2, 2), GroupMaps, object()])
    def test_something_else_in_place_of_a_result(self, name: str, wrong: Any) -> None:
        if name == "title" and wrong == "text":
            return
        with pytest.raises(AttnprobeError, match="input_ids|tokenizer|tensor" if name == "batch" else name):
            Report(**{**make_results(), name: wrong})

    @pytest.mark.parametrize("name", ["prompt", "notes"])
    def test_what_is_no_text(self, name: str) -> None:
        with pytest.raises(ParameterError, match=name):
            Report(**make_results(), **{name: 3})

    def test_results_that_were_exchanged(self) -> None:
        results = make_results()
        for name, other in (("statistics", "scores"), ("scores", "rhythm"), ("rhythm", "statistics")):
            with pytest.raises(ParameterError, match=f"{name}.*{type(results[other]).__name__}"):
                Report(**{**results, name: results[other]})

    def test_results_of_another_batch(self) -> None:
        other = make_results(length=30)
        for name in ("statistics", "scores", "rhythm"):
            with pytest.raises(ResultError, match=rf"'batch': \[2, 46\].*'{name}': \[2, 36\]"):
                Report(**make_results(**{name: other[name]}))

    @pytest.mark.parametrize("name", ["statistics", "scores", "rhythm"])
    def test_results_of_other_tokens(self, name: str) -> None:
        results = make_results()
        ids = results["batch"].input_ids.clone()
        ids[0, 9] = 1234
        results[name] = dataclasses.replace(results[name], input_ids=ids)
        with pytest.raises(ResultError, match=f"{name}.*9.*example 0.*1234"):
            Report(**results)

    @pytest.mark.parametrize("name", ["statistics", "scores", "rhythm"])
    def test_results_of_another_response(self, name: str) -> None:
        results = make_results()
        mask = results["scores"].response_mask.clone()
        mask[0, :8] = False
        results[name] = dataclasses.replace(results[name], response_mask=mask)
        with pytest.raises(ResultError, match=f"{name}.*38.*example 0.*column 8.*40.*column 6"):
            Report(**results)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("model_name", "b/other"),
            ("layers", (9,)),
            ("window", 5),
            ("horizon", (10, None)),
            ("heads", {"local": ((3, 0, 1.0), (3, 1, 1.0))}),
        ],
    )
    @pytest.mark.parametrize("name", ["scores", "rhythm", "maps"])
    def test_results_that_were_computed_from_others(self, name: str, field: str, value: Any) -> None:
        results = make_results()
        scores = attnprobe.score_tokens(results["statistics"], results["heads"])
        # Without their last row, maps do not hold all that FAI is a mean over, and only names are compared.
        maps = make_maps(40).at_columns(slice(0, 39))
        results |= {"scores": scores, "rhythm": attnprobe.find_rhythm(scores), "maps": maps}
        Report(**results)
        of = scores.provenance if name != "maps" else attnprobe.Provenance()
        changed = dataclasses.replace(of, **{field: value})
        results[name] = dataclasses.replace(results[name], provenance=changed)
        if (name, field) == ("maps", "layers"):
            Report(**results)
            return
        told = "b/other" if field == "model_name" else "local" if field == "heads" else field
        with pytest.raises(ResultError, match=f"{name}.*{told}"):
            Report(**results)

    def test_what_is_not_known_is_not_compared(self) -> None:
        """Results that were made by hand say nothing of tokens and models."""
        results = make_results()
        results["rhythm"] = dataclasses.replace(results["rhythm"], response_mask=None)
        statistics = dataclasses.replace(results["statistics"], model_name="")
        assert Report(**{**results, "statistics": statistics}).html()

    def test_heads_of_other_layers_or_models(self) -> None:
        other = make_results(layers=3)
        with pytest.raises(ResultError, match=r"a/model.*3-5.*3-4"):
            Report(**make_results(heads=other["heads"]))
        heads = dataclasses.replace(make_results()["heads"], model_name="b/other")
        with pytest.raises(ResultError, match=r"b/other.*a/model"):
            Report(**make_results(heads=heads))

    def test_heads_without_any_span(self) -> None:
        heads = make_results()["heads"]
        heads = dataclasses.replace(heads, span=torch.full_like(heads.span, math.nan))
        with pytest.raises(ResultError, match="span"):
            Report(**make_results(heads=heads))

    def test_maps_of_another_response(self) -> None:
        with pytest.raises(ResultError, match=r"6\.\.55.*example 0.*6\.\.45"):
            Report(**make_results(), maps=make_maps(50))
        maps = dataclasses.replace(make_maps(5), input_ids=torch.tensor([[1, 2, 3, 4, 5]]))
        with pytest.raises(ResultError, match=r"maps.*column 6.*\b1\b"):
            Report(**make_results(), maps=maps)
        three = GroupMaps.concatenate([make_maps(5)] * 3)
        with pytest.raises(ResultError, match=r"maps.*\b3\b.*\b2\b"):
            Report(**make_results(), maps=three)

    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(ResultError, match="missing"):
            Report(**make_results()).save(tmp_path / "missing" / "report.html")
        with pytest.raises(ResultError, match="folder"):
            Report(**make_results()).save(tmp_path)

    def test_a_missing_dependency(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        real = builtins.__import__

        def without(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.split(".")[0] == "jinja2":
                raise ImportError(name)
            return real(name, *args, **kwargs)

        report = Report(**make_results())
        monkeypatch.setattr(builtins, "__import__", without)
        for shown in (report, Reports([report])):
            with pytest.raises(MissingDependencyError, match=r"jinja2: pip install 'attnprobe\[report\]'"):
                shown.save(tmp_path / "report.html")
            assert not list(tmp_path.iterdir())
            assert "jinja2" in shown._repr_html_()

    def test_maps_of_another_prompt_checkpoint_or_answer(self) -> None:
        """Their columns, and even their ids, may be the same: their numbers are not."""
        maps = make_maps(40)
        Report(**make_results(), maps=maps)
        other = dataclasses.replace(maps, global_map=maps.global_map.flip(2).tril())
        with pytest.raises(ResultError, match=r"maps are of another answer.*example 0.*FAI.*of 30 tokens"):
            Report(**make_results(), maps=other)
        Report(**make_results(), maps=other.at_columns(slice(0, 39)))

    @pytest.mark.parametrize("name", ["waad", "fai", "entropy"])
    def test_scores_that_do_not_follow_from_the_statistics(self, measured: dict[str, Any], name: str) -> None:
        """Of the same model, tokens and heads by all that they say of themselves."""
        results = {key: value for key, value in measured.items() if key != "maps"}
        scores = results["scores"]
        wrong = dataclasses.replace(scores, **{name: 1.2 * getattr(scores, name)})
        told = name if name == "entropy" else name.upper()
        with pytest.raises(ResultError, match=f"scores are of other statistics.*example 1.*{told}"):
            Report(**{**results, "scores": wrong, "rhythm": attnprobe.find_rhythm(wrong)}, example=1)

    def test_a_rhythm_of_other_scores(self) -> None:
        results = make_results()
        other = dataclasses.replace(results["scores"], waad=results["scores"].waad.roll(3, 1))
        results["rhythm"] = attnprobe.find_rhythm(other)
        with pytest.raises(ResultError, match=r"rhythm is of other scores.*changes of WAAD"):
            Report(**results)

    @pytest.mark.parametrize(
        ("field", "value"), [("model_name", "b/other"), ("window", 5), ("horizon", (10, None))]
    )
    def test_a_rhythm_of_another_measurement_than_hand_made_scores_can_tell(
        self, field: str, value: Any
    ) -> None:
        results = make_results()
        provenance = attnprobe.Provenance(**{field: value})
        results["rhythm"] = dataclasses.replace(results["rhythm"], provenance=provenance)
        with pytest.raises(ResultError, match=f"rhythm.*{field}.*the statistics"):
            Report(**results)

    @pytest.mark.parametrize(
        ("weights", "told"),
        [
            ({"a": torch.ones(2, 3)}, r"weights\['a'\].*\[2, 46\].*\[2, 3\]"),
            (
                {"a": torch.full((2, 46), math.nan)},
                r"weights\['a'\].*nan in column 6 of example 0.*40 columns",
            ),
            ({"a": torch.full((2, 46), -0.5)}, r"weights\['a'\].*-0.5 in column 6 of example 0.*40 columns"),
            ({"a": "text"}, r"weights\['a'\]"),
            ({3: torch.ones(2, 46)}, "mapping"),
            (torch.ones(2, 46), "mapping"),
            ({"": torch.ones(2, 46)}, "mapping"),
        ],
    )
    def test_weights_that_do_not_fit(self, weights: Any, told: str) -> None:
        with pytest.raises(ParameterError, match=told):
            Report(**make_results(), weights=weights)

    def test_reports_that_are_none(self) -> None:
        report = Report(**make_results())
        for wrong in ([], report, 3, [report, 3], "text", None):
            with pytest.raises(ParameterError, match="report"):
                Reports(wrong)
        for pair in ((0, 2), (0, 0), (0,), 3, (0, -1), "01"):
            with pytest.raises(ParameterError, match="compare"):
                Reports([report, report], compare=pair)
        with pytest.raises(ParameterError, match="title"):
            Reports([report], title=3)
        with pytest.raises(ParameterError, match="number"):
            Reports([report])[1]

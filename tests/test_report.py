"""The report: one page that holds everything, loads nothing, and shows any token as text."""

from __future__ import annotations

import base64
import builtins
import dataclasses
import hashlib
import json
import math
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import attnprobe
from attnprobe.errors import AttnprobeError, MissingDependencyError, ParameterError, ResultError
from attnprobe.maps import GroupMaps
from attnprobe.report import Report
from attnprobe.report.maps import pool_map
from attnprobe.report.response import coupled_pairs, read_response
from attnprobe.report.tokens import FAI_SCALE, WAAD_SCALE

PROMPT = 6
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "\n\n",
    "\"' onmouseover='alert(3)",
    "<b>bold</b> & <!-- ",
    "{{ 7 * 7 }}${x}",
    "%{y} <br>",
    "\u202eright",
    "\x00",
    "\ud800",
    "",
    "é\u2028",
)


class Page(HTMLParser):
    """What a browser would make of a page: its elements, their texts, and the text of the body."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.texts: dict[str, str] = {}
        self.token_texts: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag in ("meta", "br", "img", "link"):
            return
        self._open.append((tag, attributes))
        if tag == "script":
            self.scripts.append((attributes, ""))
        if "token" in (attributes.get("class") or "").split():
            self.token_texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1][0] == tag, f"</{tag}> closes {self._open[-1]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data
            return
        for _, attributes in self._open:
            if attributes.get("id"):
                name = str(attributes["id"])
                self.texts[name] = self.texts.get(name, "") + data
            if "token" in (attributes.get("class") or "").split():
                self.token_texts[-1] += data

    def figure(self, name: str) -> dict[str, Any]:
        """Return a figure from its JSON block."""
        (text,) = [text for attributes, text in self.scripts if attributes.get("id") == f"figure-{name}"]
        figure: dict[str, Any] = json.loads(text)
        return figure


def make_results(
    texts: tuple[str, ...] | None = None, *, length: int = 40, layers: int = 2, **changes: Any
) -> dict[str, Any]:
    """Return results of two hand-made responses of `length` tokens after a prompt of six."""
    generator = torch.Generator().manual_seed(0)
    length = len(texts) if texts is not None else length
    shape = (2, PROMPT + length)
    batch = attnprobe.TokenBatch.from_ids(
        torch.randint(5, 90, shape, generator=generator), response_start=PROMPT
    )
    if texts is not None:
        prompt = ("Say", " <i>", "so", "\n", "a", "b")
        batch = dataclasses.replace(batch, texts=(prompt + texts,) * 2)
    per_token = [torch.rand(shape, generator=generator) for _ in range(4)]
    waad, fai, entropy, receiver_fai = (
        values.masked_fill(~batch.response_mask, math.nan) for values in per_token
    )
    fai[:, -10:] = math.nan
    scores = attnprobe.TokenScores(5 * waad, fai, entropy, batch.response_mask, receiver_fai)
    statistics = attnprobe.HeadStatistics(
        span=20 * torch.rand(2, layers, 4, generator=generator),
        waad=torch.zeros(2, layers, 4, shape[1]),
        fai=torch.zeros(2, layers, 4, shape[1]),
        entropy=entropy,
        receiver_kurtosis=torch.rand(2, layers, 4, generator=generator),
        response_mask=batch.response_mask,
        layers=tuple(range(3, 3 + layers)),
        model_name="a/model",
    )
    return {
        "batch": batch,
        "statistics": statistics,
        "heads": attnprobe.classify_heads(statistics, receivers=2),
        "scores": scores,
        "rhythm": attnprobe.find_rhythm(scores),
    } | changes


def make_maps(length: int) -> GroupMaps:
    pattern = torch.rand(1, length, length, generator=torch.Generator().manual_seed(1)).tril()
    return GroupMaps(pattern, pattern / 2, torch.arange(PROMPT, PROMPT + length)[None])


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
    batch = attnprobe.TokenBatch.from_ids(torch.randint(3, 90, (2, 60)), mask, response_start=20)
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
    assert sections == ["response", "curves", "pairs", "heads", "maps"]
    drawn = [attributes["data-figure"] for _, attributes in page.elements if "data-figure" in attributes]
    assert drawn == ["figure-curves", "figure-heads", "figure-maps"]
    assert "How to read this page" in page.texts["guide"]
    ids = measured["batch"].input_ids[1, 20:].tolist()
    assert [f"{token} " for token in ids] * 2 == page.token_texts


def test_nothing_is_fetched_and_only_our_scripts_may_run(measured: dict[str, Any]) -> None:
    page = Page(Report(**measured, example=1).html())
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"link", "img", "iframe", "object", "base", "form", "a"}
    for _, attributes in page.elements:
        assert not attributes.keys() & {"src", "href", "srcset", "onload", "onerror"}
    (styles,) = re.findall(r"<style>(.*?)</style>", Report(**measured, example=1).html(), re.DOTALL)
    assert "url(" not in styles
    assert "@import" not in styles
    (policy,) = [
        str(attributes["content"])
        for tag, attributes in page.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    for attributes, text in page.scripts:
        if attributes.get("type") != "application/json":
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy


def test_the_head_names_what_was_measured() -> None:
    results = make_results()
    statistics = dataclasses.replace(results["statistics"], skipped_layers=(0, 1), horizon=(10, None))
    html = Report(**results | {"statistics": statistics}).html()
    for shown in (
        "<dd>a/model</dd>",
        "<dd>2: 3-4</dd>",
        "<dd>0-1</dd>",
        "<dd>8 (4 in a layer): 2 local, 2 global, 2 receivers</dd>",
        "<dd>10 tokens</dd>",
        "<dd>10 tokens later to the end</dd>",
        "<dd>among the top 40% of a score</dd>",
        "<dd>an anchor follows its preplan within 3 tokens</dd>",
    ):
        assert shown in html


def test_where_a_model_lies_on_a_disk_is_not_told() -> None:
    results = make_results()
    for name in ("statistics", "heads"):
        results[name] = dataclasses.replace(results[name], model_name="/home/someone/models/tiny")
    html = Report(**results).html()
    assert "<dd>tiny</dd>" in html
    assert "someone" not in html


def test_the_prompt_is_the_given_one_or_the_batchs_own() -> None:
    results = make_results(("yes", " no"))
    assert "Say <i>so\nab" in Page(Report(**results).html()).texts["prompt"]
    assert "Another" in Page(Report(**results, prompt="Another").html()).texts["prompt"]
    assert "prompt" not in Page(Report(**make_results()).html()).texts


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
    )
    page = Page(report.html().encode().decode())
    assert page.figure("curves")["data"]
    return page


def test_hostile_texts_add_no_element(hostile_page: Page) -> None:
    harmless = make_results(("word",) * len(HOSTILE) * 3)
    expected = Page(Report(**harmless, maps=make_maps(len(HOSTILE) * 3), notes="n", prompt="p").html())
    kinds = [attributes.get("type") for attributes, _ in hostile_page.scripts]
    assert ["application/json"] * 3 + [None, None] == kinds
    assert {tag for tag, _ in expected.elements} == {tag for tag, _ in hostile_page.elements}
    assert all(not name.startswith("on") for _, attributes in hostile_page.elements for name in attributes)
    assert [text for attributes, text in expected.scripts if not attributes] == [
        text for attributes, text in hostile_page.scripts if not attributes
    ]


def test_tokens_appear_as_the_text_that_they_are(hostile_page: Page) -> None:
    shown = [*HOSTILE[:7], "⟨202E⟩right", "\u2400", "\ufffd", *HOSTILE[10:]]
    assert shown * 6 == hostile_page.token_texts
    titles = [str(a["title"]) for tag, a in hostile_page.elements if tag == "span" and "title" in a]
    assert "column 6: “<script>alert(1)</script>”" in titles[0]
    assert "“↵↵”" in titles[2]


def test_tokens_in_figures_are_escaped_for_html_and_for_plotly(hostile_page: Page) -> None:
    for attributes, text in hostile_page.scripts:
        if attributes.get("type") == "application/json":
            assert not set("<>&") & set(text)
    texts = hostile_page.figure("curves")["data"][0]["text"]
    assert texts[0] == "“&lt;script&gt;alert(1)&lt;/script&gt;”"
    labels = hostile_page.figure("maps")["data"][0]["x"]
    assert labels[4] == "10 “&lt;b&gt;bold&lt;/b&gt; &amp; &lt;!-- ”"
    assert len(labels) == len(set(labels))


def test_line_breaks_stand_apart_from_the_rest_of_a_token() -> None:
    html = Report(**make_results((".\n\n", "So"))).html()
    assert '>.<span class="break">\n\n</span></span>' in html


# ---- what is undefined or was not measured ----------------------------------------------------------


def test_a_page_without_receivers_entropy_texts_and_maps_says_so() -> None:
    results = make_results()
    results["scores"] = dataclasses.replace(results["scores"], entropy=None, receiver_fai=None)
    results["heads"] = dataclasses.replace(results["heads"], receiver_heads=None, receiver_kurtosis=None)
    page = Page(Report(**results).html())
    assert "Entropy was not measured" in page.texts["curves"]
    assert "No maps were given" in page.texts["maps"]
    assert "token ids are shown" in page.texts["response"]
    assert "kurtosis" not in page.texts["local-heads"]
    names = [trace.get("name") for trace in page.figure("curves")["data"]]
    assert {"WAAD", "FAI"} <= set(names)
    assert not {"FAI of receiver heads", "entropy (nats)"} & set(names)


def test_a_response_too_short_for_fai_has_no_anchor_and_no_pair() -> None:
    page = Page(Report(**make_results(("a", "b", "c", "d")), maps=make_maps(4)).html())
    assert "No token of this response has a defined FAI" in page.texts["text-fai"]
    assert "No token has a defined FAI" in page.texts["curves"]
    assert "no anchor at a preplan" in page.texts["pairs"]
    (note,) = page.figure("curves")["layout"]["annotations"]
    assert note["text"] == "FAI: no token has a defined value"


def test_a_token_without_a_value_has_no_colour() -> None:
    results = make_results(("a",) * 20)
    styles = [
        attributes.get("style")
        for _, attributes in Page(Report(**results).html()).elements
        if "token" in (attributes.get("class") or "").split()
    ]
    waad, fai = styles[:20], styles[20:]
    assert all(waad)
    assert [None] * 10 == fai[10:]
    assert all(fai[:10])


def test_all_tokens_undefined_or_one_token_still_make_a_page() -> None:
    results = make_results()
    nothing = torch.full_like(results["scores"].waad, math.nan)
    results["scores"] = dataclasses.replace(results["scores"], waad=nothing, fai=nothing, entropy=nothing)
    results["rhythm"] = attnprobe.find_rhythm(results["scores"])
    page = Page(Report(**results).html())
    assert "No token of this response has a defined WAAD" in page.texts["text-waad"]
    assert Page(Report(**make_results(("one",)), maps=make_maps(1)).html()).token_texts == ["one"] * 2


def test_heads_that_a_layer_does_not_have_are_left_blank() -> None:
    results = make_results()
    span = results["statistics"].span.clone()
    span[:, 1, 3] = math.nan
    results["statistics"] = dataclasses.replace(results["statistics"], span=span)
    results["heads"] = attnprobe.classify_heads(results["statistics"])
    page = Page(Report(**results).html())
    assert page.figure("heads")["data"][0]["z"][3][1] is None
    assert "7 (up to 4 in a layer)" in Report(**results).html()


def test_the_parts_of_a_response_with_gaps_are_set_apart() -> None:
    results = make_results(("a",) * 20)
    mask = results["batch"].response_mask.clone()
    mask[:, 12:15] = False
    results["batch"] = dataclasses.replace(results["batch"], response_mask=mask)
    for name in ("statistics", "scores"):
        results[name] = dataclasses.replace(results[name], response_mask=mask)
    results["rhythm"] = attnprobe.find_rhythm(results["scores"])
    page = Page(Report(**results).html())
    assert page.texts["text-waad"].count("⋯") == 1
    curve = page.figure("curves")["data"][-1]
    assert None in curve["y"]


# ---- what the parts show ----------------------------------------------------------------------------


def test_pairs_and_their_intros_are_those_of_the_rhythm() -> None:
    results = make_results(length=200)
    batch, scores, rhythm = results["batch"], results["scores"], results["rhythm"]
    pairs = coupled_pairs(read_response(batch, scores, rhythm, 1), rhythm, 1)
    assert rhythm.pairs(1) == [(pair.preplan.token.column, pair.anchor.token.column) for pair in pairs]
    with_intro = [pair for pair in pairs if pair.anchor.token.dominated]
    assert with_intro
    for pair in with_intro:
        anchor = pair.anchor.token.column
        window = rhythm.delta[1, anchor - rhythm.lookback : anchor].nan_to_num(-1)
        assert pair.intro is not None
        assert anchor - rhythm.lookback + int(window.argmax()) == pair.intro.column
    assert all(pair.intro is None for pair in pairs if not pair.anchor.token.dominated)


def test_peaks_and_pairs_are_marked_on_the_curves() -> None:
    results = make_results(length=80)
    rhythm = results["rhythm"]
    traces = {trace["name"]: trace for trace in Page(Report(**results).html()).figure("curves")["data"][1:]}
    assert rhythm.preplan[0].nonzero()[:, 0].tolist() == traces["preplan (peak of WAAD)"]["x"]
    assert rhythm.anchor[0].nonzero()[:, 0].tolist() == traces["anchor (peak of FAI)"]["x"]
    centres = [(preplan + anchor) / 2 for preplan, anchor in rhythm.pairs(0)]
    assert centres == traces["preplan and its anchor"]["x"]


def test_head_tables_list_the_ten_most_typical_heads() -> None:
    results = make_results(layers=12)
    page = Page(Report(**results).html())
    for group in ("local", "global"):
        rows = re.findall(r"^(\d+)\s+(\d+)\s+[\d.]+\s", page.texts[f"{group}-heads"], re.MULTILINE)
        expected = results["heads"].pairs(group)[:10]
        assert expected == [(int(layer), int(head)) for layer, head in rows]


def test_a_long_map_is_pooled_to_the_largest_of_each_block() -> None:
    pattern = torch.rand(7, 7, generator=torch.Generator().manual_seed(2)).tril()
    pooled = pool_map(pattern, 3)
    assert pooled.block == 3
    for query in range(3):
        for key in range(query + 1):
            block = pattern[3 * query : 3 * query + 3, 3 * key : 3 * key + 3]
            assert float(block.max()) == float(pooled.values[query, key])
    assert bool(pooled.values.triu(1)[0, 1:].isnan().all())


def test_a_page_says_that_its_maps_are_pooled() -> None:
    page = Page(Report(**make_results(length=600), maps=make_maps(600)).html())
    assert "each cell stands for 2 \N{MULTIPLICATION SIGN} 2 tokens" in page.texts["maps"]
    local = page.figure("maps")["data"][0]
    assert len(local["x"]) == 300
    assert local["x"][0].startswith("6-7 ")
    values = base64.b64decode(local["customdata"]["bdata"])
    (first,) = struct.unpack("f", values[:4])
    assert first == pytest.approx(float(make_maps(600).local_map[0, :2, :2].max()))


def test_text_on_every_colour_is_readable_and_no_colour_repeats() -> None:
    """Contrast as WCAG defines it; the ramps fall in lightness, so that hue carries nothing."""
    for scale in (WAAD_SCALE, FAI_SCALE):
        lightness = [_luminance(scale.at(i / 20)) for i in range(21)]
        assert sorted(lightness, reverse=True) == lightness
        assert (min(lightness) + 0.05) / (_luminance("#14171a") + 0.05) >= 5


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


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
    alone = Page(Report(**selected).html())
    assert alone.figure("maps") == Page(pages[0]).figure("maps")
    assert alone.token_texts == Page(pages[0]).token_texts


def test_a_batch_may_be_given_as_ids_and_gets_the_texts_of_the_statistics() -> None:
    results = make_results(("so", " it", " is") * 5)
    texts = results["batch"].texts
    results["statistics"] = dataclasses.replace(results["statistics"], texts=texts)
    names = ("input_ids", "attention_mask", "response_mask")
    given = {name: getattr(results["batch"], name).tolist() for name in names}
    assert Page(Report(**{**results, "batch": given}).html()).token_texts == ["so", " it", " is"] * 10


def test_in_a_notebook_a_report_is_its_page(measured: dict[str, Any]) -> None:
    report = Report(**measured, example=1, title='A "title"')
    assert repr(report) == "Report(example 1 of 2, 40 response tokens, LlamaForCausalLM, with maps)"
    frame = Page(report._repr_html_())
    ((tag, attributes),) = frame.elements
    assert tag == "iframe"
    assert attributes["srcdoc"] == report.html()
    assert attributes["title"] == 'A "title"'
    assert "allow-same-origin" not in str(attributes["sandbox"])


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
        results |= {"scores": scores, "rhythm": attnprobe.find_rhythm(scores), "maps": make_maps(40)}
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

    @pytest.mark.parametrize("missing", ["jinja2", "plotly"])
    def test_a_missing_dependency(
        self, missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        real = builtins.__import__

        def without(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.split(".")[0] == missing:
                raise ImportError(name)
            return real(name, *args, **kwargs)

        report = Report(**make_results())
        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(
            MissingDependencyError, match=rf"needs {missing}: pip install 'attnprobe\[report\]'"
        ):
            report.save(tmp_path / "report.html")
        assert not list(tmp_path.iterdir())
        assert missing in report._repr_html_()

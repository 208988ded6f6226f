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

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import attnprobe
from attnprobe.errors import MissingDependencyError, ParameterError, ResultError
from attnprobe.maps import GroupMaps
from attnprobe.report import Report
from attnprobe.report.document import ranges
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
    pattern = torch.rand(length, length, generator=torch.Generator().manual_seed(1)).tril()
    columns = tuple(range(PROMPT, PROMPT + length))
    return GroupMaps(pattern, pattern / 2, columns)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """The results of a tiny random model, as a user gets them."""
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
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
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


def test_packed_responses_are_set_apart() -> None:
    results = make_results(("a",) * 20)
    mask = results["batch"].response_mask.clone()
    mask[:, 12:15] = False
    results["batch"] = dataclasses.replace(results["batch"], response_mask=mask)
    for name in ("statistics", "scores"):
        results[name] = dataclasses.replace(results[name], response_mask=mask)
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
    assert first == pytest.approx(float(make_maps(600).local_map[:2, :2].max()))


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


def test_ranges_of_layers() -> None:
    assert ranges((4,)) == "4"
    assert ranges((0, 1, 3, 5, 6, 7)) == "0-1, 3, 5-7"


# ---- errors -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_call")
class TestErrors:
    @pytest.mark.parametrize("example", [2, -1, True, "0"])
    def test_an_example_that_the_batch_does_not_have(self, example: Any) -> None:
        with pytest.raises(ParameterError, match=r"example must be in 0\.\.1, got"):
            Report(**make_results(), example=example)

    def test_results_of_another_batch(self) -> None:
        other = make_results(length=30)
        with pytest.raises(ResultError, match=r"not of one batch.*'batch': \[2, 46\].*'scores': \[2, 36\]"):
            Report(**make_results(scores=other["scores"]))
        with pytest.raises(ResultError, match=r"'rhythm': \[2, 36\]"):
            Report(**make_results(rhythm=other["rhythm"]))

    def test_scores_of_other_tokens(self) -> None:
        results = make_results()
        mask = results["scores"].response_mask.clone()
        mask[0, :8] = False
        results["scores"] = dataclasses.replace(results["scores"], response_mask=mask)
        with pytest.raises(
            ResultError, match="scores describe 38 response tokens of example 0, from column 8"
        ):
            Report(**results)

    def test_heads_of_other_layers_or_shapes(self) -> None:
        other = make_results(layers=3)
        with pytest.raises(ResultError, match=r"made for a/model with layers \[3, 4, 5\] of 4 heads"):
            Report(**make_results(heads=other["heads"]))
        heads = dataclasses.replace(make_results()["heads"], local_heads=torch.ones(2, 3, dtype=torch.bool))
        with pytest.raises(ResultError, match=r"must be \[2, 4\], got \{'local_heads': \[2, 3\]"):
            Report(**make_results(heads=heads))

    def test_statistics_that_name_other_layers_than_they_hold(self) -> None:
        results = make_results()
        results["statistics"] = dataclasses.replace(results["statistics"], waad=torch.ones(2, 5, 4, 3))
        with pytest.raises(ResultError, match=r"name 2 layers, but their WAAD is of \[5, 4\]"):
            Report(**results)

    def test_heads_without_any_span(self) -> None:
        heads = make_results()["heads"]
        heads = dataclasses.replace(heads, span=torch.full_like(heads.span, math.nan))
        with pytest.raises(ResultError, match="no head has a defined span"):
            Report(**make_results(heads=heads))

    def test_texts_that_do_not_fit_the_tokens(self) -> None:
        results = make_results(("a", "b"))
        results["batch"] = dataclasses.replace(results["batch"], texts=(("a",), ("b",)))
        with pytest.raises(ResultError, match=r"batch is \[2, 8\], but its texts number \[1, 1\]"):
            Report(**results)

    def test_maps_of_another_response_or_shape(self) -> None:
        with pytest.raises(ResultError, match=r"columns 6\.\.55, but the response of example 0 .* 6\.\.45"):
            Report(**make_results(), maps=make_maps(50))
        maps = dataclasses.replace(make_maps(5), local_map=torch.ones(4, 4))
        with pytest.raises(ResultError, match=r"maps of 5 tokens .*'local_map': \[4, 4\]"):
            Report(**make_results(), maps=maps)

    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(ResultError, match="cannot write to the folder"):
            Report(**make_results()).save(tmp_path / "missing" / "report.html")
        with pytest.raises(ResultError, match="it is a folder"):
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

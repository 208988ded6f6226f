"""The report in a browser: it says of every token exactly what the results say, and every view follows.

Headless Chromium, driven by playwright; skipped where either is missing. What the page holds is tested in
test_report; here is what it shows.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attnprobe
from attnprobe.colours import clipped_range
from attnprobe.report import Report, Reports
from attnprobe.testing.tiny_models import tiny_model
from tests.report_results import HOSTILE, PROMPT, make_maps, make_results

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

WORDS = ("So", " the", " total", " cost", " is", " 8", ".\n\n", "Ben", " pays", " with", " a", " bill", ",")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Sixty tokens with texts: the FAI of the last twenty is a mean over few rows, or undefined."""
    made = make_results((WORDS * 5)[:60], layers=3)
    # An anchor over seven rows, in spite of what the maps say: a few tokens may differ.
    fai = made["scores"].fai.clone()
    fai[:, PROMPT + 43] = 0.5
    made["scores"] = dataclasses.replace(made["scores"], fai=fai)
    made["rhythm"] = attnprobe.find_rhythm(made["scores"])
    gamma = torch.rand(made["batch"].input_ids.shape, generator=torch.Generator().manual_seed(7))
    return made | {"maps": make_maps(60), "weights": {"coupled": 1 + gamma}}


@pytest.fixture(scope="module")
def saved(results: dict[str, Any], folder: Path) -> Path:
    return Report(**results, title="Sixty tokens").save(folder / "sixty.html")


class View:
    """A page that was opened, and what went wrong on it."""

    def __init__(self, browser: Any, path: Path, address: str = "", **options: Any) -> None:
        options = {"viewport": {"width": 1280, "height": 800}, **options}
        self.page = browser.new_page(**options)
        self.problems: list[str] = []
        self.page.on(
            "console", lambda message: message.type == "error" and self.problems.append(message.text)
        )
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append("dialog"), dialog.dismiss()))
        self.page.goto(f"{path.as_uri()}{address}")
        self.settle()

    def settle(self) -> None:
        """Wait for what is drawn below the first screen."""
        until(self.page, "performance.getEntriesByName('attnprobe-ready').length > 0")
        until(self.page, "document.querySelector('#heads-figure .scale') !== null")
        self.page.evaluate("new Promise(requestAnimationFrame)")

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *error: Any) -> None:
        self.page.close()
        assert self.problems == [] or error[0] is not None


def until(page: Any, condition: str) -> None:
    """Wait until a condition holds; playwright's own waiting would need a looser content security policy."""
    for _ in range(400):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(10)
    raise AssertionError(f"this never came true: {condition}")


def written(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.3g}"


def rows_left(place: int, count: int) -> int:
    return max(0, count - 1 - (place + 10) + 1)


def expected_lines(results: dict[str, Any], place: int) -> list[str]:
    """What a tooltip must say of a token, from the results alone."""
    scores, column = results["scores"], PROMPT + place
    count = int(results["batch"].response_mask[0].sum())
    rows = rows_left(place, count)
    few = f" (mean over {rows} row{'s' if rows > 1 else ''})" if 0 < rows < 10 else ""

    def influence(value: float) -> str:
        return written(value) + ("" if math.isnan(value) else few)

    everyone = float(results["statistics"].fai[0, :, :, column].double().mean().float())
    lines = [
        f"WAAD: {written(float(scores.waad[0, column]))}",
        f"FAI: {influence(float(scores.fai[0, column]))}",
        f"FAI of receivers: {influence(float(scores.receiver_fai[0, column]))}",
        f"FAI of all heads: {influence(everyone)}",
        f"entropy: {written(float(scores.entropy[0, column]))}",
        f"γ coupled: {written(float(results['weights']['coupled'][0, column]))}",
    ]
    roles = [
        n for n in ("preplan", "anchor", "dominated", "intro") if getattr(results["rhythm"], n)[0, column]
    ]
    if roles:
        lines.append(", ".join(roles))
    preplan = int(results["rhythm"].anchor_preplan[0, column])
    if preplan not in (-1, column):
        lines.append(f"belongs to the preplan in column {preplan}")
    return lines


MAPS_ARE_DRAWN = "document.querySelector('#maps-figure + .legend .scale') !== null"

SELECTED = """() => ({
  text: document.querySelector(".token.selected")?.dataset.column,
  panel: document.querySelector(".chosen .soft")?.textContent.trim(),
  curves: document.querySelector("#curves .over").getAttribute("aria-valuenow"),
  maps: document.querySelector("#maps .over").getAttribute("aria-valuenow"),
  address: location.hash,
})"""


def selected(page: Any) -> int:
    """Return the selected column, on which all views must agree."""
    found = page.evaluate(SELECTED)
    column = int(found["text"])
    assert found["panel"] == f"column {column}"
    assert int(found["curves"]) == int(found["maps"]) == column
    assert f"t={column}" in found["address"]
    return column


# ---- every token -------------------------------------------------------------------------------------


def test_every_token_says_what_the_results_say(browser: Any, saved: Path, results: dict[str, Any]) -> None:
    """Point at each in the text, and at its place in the curves; read the panel of each."""
    with View(browser, saved) as page:
        right = 0
        for place, token in enumerate(page.query_selector_all("#panes .token")):
            page.evaluate("each => each.scrollIntoView({ block: 'nearest' })", token)
            box = page.evaluate("each => each.getClientRects()[0].toJSON()", token)
            page.mouse.move(box["x"] + min(4, box["width"] / 2), box["y"] + box["height"] / 2)
            lines = page.inner_text("#tooltip").split("\n")
            assert lines[0].startswith(f"column {PROMPT + place}: ")
            right += lines[1:] == expected_lines(results, place)
        assert right == 60
        box = page.query_selector("#curves .over").bounding_box()
        width = box["width"] - 60
        for place in range(60):
            page.mouse.move(box["x"] + 50 + (place + 0.5) / 60 * width, box["y"] + 30 + 3 * place)
            lines = page.inner_text("#tooltip").split("\n")
            assert lines[0].startswith(f"column {PROMPT + place}: ")
            assert lines[1:] == expected_lines(results, place)
        page.focus("#panes .token")
        for place in range(60):
            shown = page.evaluate(
                "Array.from(document.querySelectorAll('#numbers dd b'), each => each.textContent)"
            )
            expected = [line.split(": ")[1].split(" (")[0] for line in expected_lines(results, place)[:6]]
            assert expected == shown
            assert selected(page) == PROMPT + place
            page.keyboard.press("ArrowRight")


def test_numbers_are_written_as_python_writes_them(browser: Any, folder: Path) -> None:
    """Ties, carries, and the borders at which an exponent begins."""
    hard = [2.125, 2.375, 9.995, 0.125, 1e-4, 9.9995e-5, 999.5, 998.5, 1000, 1e21, 3e-39, 0.0, 123456, 0.5]
    generator = torch.Generator().manual_seed(3)
    drawn = (
        torch.rand(26, generator=generator) * 10 ** torch.randint(-9, 6, (26,), generator=generator)
    ).tolist()
    results = make_results(length=40)
    entropy = torch.full((2, 46), math.nan)
    entropy[:, PROMPT:] = torch.tensor(hard + drawn)
    for name in ("scores", "statistics"):
        results[name] = dataclasses.replace(results[name], entropy=entropy)
    with View(browser, Report(**results).save(folder / "numbers.html")) as page:
        page.focus("#panes .token")
        for value in entropy[0, PROMPT:].tolist():
            assert page.text_content('#numbers [data-score="entropy"] b') == f"{value:.3g}"
            page.keyboard.press("ArrowRight")


def test_a_tiny_models_page_shows_its_own_numbers(browser: Any, folder: Path) -> None:
    model = tiny_model("llama")
    ids = torch.randint(3, 90, (1, 60), generator=torch.Generator().manual_seed(0))
    batch = attnprobe.TokenBatch.from_ids(ids, response_start=20)
    statistics = attnprobe.measure(model, batch, receiver=True, horizon=(2, 20))
    heads = attnprobe.classify_heads(statistics)
    scores = attnprobe.score_tokens(statistics, heads)
    maps = attnprobe.group_maps(model, batch, heads)
    report = Report(batch, statistics, heads, scores, attnprobe.find_rhythm(scores), maps)
    column = 41
    with View(browser, report.save(folder / "tiny.html"), f"#t={column}&head=L1H2&score=head-fai") as page:
        assert selected(page) == column
        shown = {
            key: page.text_content(f'#numbers [data-score="{key}"] b')
            for key in ("waad", "fai", "head-waad", "head-fai")
        }
        assert shown["waad"] == f"{float(scores.waad[0, column]):.3g}"
        assert shown["fai"] == f"{float(scores.fai[0, column]):.3g}"
        for key, values in (("head-waad", statistics.waad), ("head-fai", statistics.fai)):
            own = values[0, 1, 2, 20:]
            scaled = own.sqrt() if key == "head-fai" else own
            defined = scaled[~scaled.isnan()]
            step = float(defined.max() - defined.min()) / 254
            assert shown[key].startswith("≈ ")
            value = float(shown[key][2:])
            stored = math.sqrt(value) if key == "head-fai" else value
            assert abs(stored - float(scaled[column - 20])) < 0.51 * step + 0.006 * stored
        first = float(statistics.share("first")[0, 1, 2])
        line = page.text_content("#head-line")
        assert line.startswith("L1H2 (layer 1, head 2): mean span ")
        assert f"{float(heads.span[1, 2]):.3g} tokens" in line
        assert f"{100 * first:.1f}% of its attention on the first token" in line or first >= 0.0995
        inside = (maps.columns[0] == column).nonzero().item()
        shares = maps.global_map[0, inside, :inside]
        best = int(shares.argmax()) + 20
        assert page.get_attribute("#links .reads .token-button", "title") == f"column {best}"


# ---- one selection -----------------------------------------------------------------------------------


def test_a_selection_is_followed_everywhere(browser: Any, saved: Path, results: dict[str, Any]) -> None:
    with View(browser, saved) as page:
        page.click('#panes .token[data-column="14"]')
        assert selected(page) == 14
        box = page.query_selector("#curves .over").bounding_box()
        page.mouse.click(box["x"] + 50 + 30.5 / 60 * (box["width"] - 60), box["y"] + 40)
        assert selected(page) == PROMPT + 30
        page.eval_on_selector("#maps", "each => each.scrollIntoView()")
        until(page, MAPS_ARE_DRAWN)
        box = page.query_selector("#maps .over").bounding_box()
        size = box["width"] - 48
        page.mouse.move(box["x"] + 44 + 20.5 / 60 * size, box["y"] + 2 + 47.5 / 60 * size)
        lines = page.inner_text("#tooltip").split("\n")
        assert lines[0].startswith(f"query: column {PROMPT + 47} ")
        assert lines[1].startswith(f"key: column {PROMPT + 20} ")
        exact = float(results["maps"].local_map[0, 47, 20])
        assert float(lines[2].removeprefix("attention ≈ ")) == pytest.approx(exact, rel=0.03)
        page.mouse.click(box["x"] + 44 + 20.5 / 60 * size, box["y"] + 2 + 47.5 / 60 * size)
        assert selected(page) == PROMPT + 47
        told = page.eval_on_selector_all(
            "#pairs tr[data-anchor]",
            "all => all.map(each => [Number(each.dataset.anchor), each.textContent])",
        )
        assert [PROMPT + place for place, _ in told] == [anchor for _, anchor in results["rhythm"].pairs(0)]
        for place, text in told:
            assert ("mean over" in text) == (0 < rows_left(place, 60) < 10)
        preplan, anchor = results["rhythm"].pairs(0)[2]
        page.click(f'#pairs tr[data-anchor="{anchor - PROMPT}"] td.context:nth-child(5) button')
        assert selected(page) == anchor
        assert page.query_selector(f'#pairs tr.selected[data-preplan="{preplan - PROMPT}"]')


def test_a_link_restores_what_was_shown(browser: Any, saved: Path) -> None:
    with View(browser, saved, "#t=20&score=entropy&scale=rank&head=L4H1") as page:
        assert selected(page) == 20
        assert page.get_attribute('#scores [data-score="entropy"]', "aria-checked") == "true"
        assert page.input_value("#scale") == "rank"
        assert page.input_value("#head") == "L4H1"
        address = page.evaluate("location.hash")
    with View(browser, saved, address) as page:
        assert page.evaluate("location.hash") == address
        page.evaluate("location.hash = '#t=33'")
        until(page, "document.querySelector('.token.selected')?.dataset.column === '33'")
        assert selected(page) == 33


def test_the_keyboard_reaches_every_token(browser: Any, saved: Path) -> None:
    with View(browser, saved) as page:
        assert page.eval_on_selector_all('#panes [tabindex="0"]', "all => all.length") == 1
        page.focus('#panes .token[tabindex="0"]')
        for key, column in (("ArrowRight", 7), ("End", 65), ("ArrowLeft", 64), ("Home", 6), ("ArrowLeft", 6)):
            page.keyboard.press(key)
            assert selected(page) == column
            assert page.evaluate("document.activeElement.dataset.column") == str(column)
        page.keyboard.press("ArrowDown")
        tops = page.eval_on_selector_all(".token", "all => all.map(each => each.getClientRects()[0].top)")
        below = selected(page) - PROMPT
        assert tops[below] > tops[0]
        page.keyboard.press("Escape")
        assert page.query_selector(".token.selected") is None
        assert page.evaluate("location.hash") == ""
        page.focus("#curves .over")
        page.keyboard.press("ArrowRight")
        assert selected(page) == 6
        assert "WAAD: " in page.get_attribute("#curves .over", "aria-valuetext")


def test_search_and_peaks(browser: Any, saved: Path, results: dict[str, Any]) -> None:
    rhythm = results["rhythm"]
    with View(browser, saved) as page:
        page.keyboard.press("/")
        page.keyboard.type("THE total")
        matches = [PROMPT + 1 + 13 * k for k in range(5)]
        assert page.text_content("#found") == "1 of 5"
        assert selected(page) == matches[0]
        for expected in [*matches[1:], matches[0]]:
            page.keyboard.press("Enter")
            assert selected(page) == expected
        page.keyboard.press("Shift+Enter")
        assert selected(page) == matches[-1]
        page.keyboard.press("Escape")
        page.keyboard.press("Escape")
        preplans = rhythm.preplan[0].nonzero()[:, 0].tolist()
        found = []
        for _ in preplans:
            page.keyboard.press("p")
            found.append(selected(page))
        assert preplans == found
        anchors = rhythm.anchor[0].nonzero()[:, 0].tolist()
        sound = [column for column in anchors if rows_left(column - PROMPT, 60) >= 10]
        assert len(sound) < len(anchors)
        page.keyboard.press("Escape")
        found = []
        for _ in sound:
            page.click("#anchor-next")
            found.append(selected(page))
        assert sound == found
        page.check("#few")
        page.click("#anchor-next")
        assert selected(page) == anchors[len(sound)]


# ---- reads, heads, scores ----------------------------------------------------------------------------


def test_arcs_are_the_eight_strongest_of_the_map(browser: Any, saved: Path, results: dict[str, Any]) -> None:
    with View(browser, saved, "#t=46") as page:
        for group in ("global", "local"):
            page.click(f'#links [data-group="{group}"]')
            attention = getattr(results["maps"], f"{group}_map")[0]
            reads = attention[40, :40].topk(8)
            readers = attention[41:, 40].topk(8)
            arcs = page.eval_on_selector_all(".arcs path", "all => all.map(each => each.dataset.token)")
            assert [*reads.indices.tolist(), *(readers.indices + 41).tolist()] == [int(each) for each in arcs]
            shown = page.eval_on_selector_all("#links .share", "all => all.map(each => each.textContent)")
            for text, share in zip(shown, [*reads.values.tolist(), *readers.values.tolist()], strict=True):
                assert float(text.strip("%")) == pytest.approx(
                    100 * share, abs=0.051 if share < 0.0995 else 0.51
                )
            rest = 100 * (1 - float(attention[40].sum()))
            assert page.text_content(".shares").startswith(f"{round(rest)}% outside the response")
        page.click("#links ol.reads .token-button")
        assert selected(page) == PROMPT + int(results["maps"].local_map[0, 40, :40].argmax())


def test_exact_shares_of_newer_maps_are_told(browser: Any, folder: Path, results: dict[str, Any]) -> None:
    """Maps that know the shares on the prompt and on the first token; without maps, how to get them."""
    maps = results["maps"]
    names = [f"{group}_{target}_share" for group in ("local", "global") for target in ("prompt", "first")]
    if not all(hasattr(maps, name) for name in names):
        pytest.skip("these maps have no shares")
    shares = {name: torch.full((1, 60), 0.1 + 0.2 * k) for k, name in enumerate(names)}
    report = Report(**{**results, "maps": dataclasses.replace(maps, **shares)})
    with View(browser, report.save(folder / "shares.html"), "#t=20") as page:
        assert page.text_content(".shares").startswith("50% to the prompt (70% to the first token), ")


def test_picking_a_head_shows_its_own_scores(browser: Any, saved: Path, results: dict[str, Any]) -> None:
    with View(browser, saved) as page:
        page.fill("#head", "l4h3")
        page.press("#head", "Enter")
        until(page, "document.getElementById('head-line').textContent.startsWith('L4H3')")
        assert page.get_attribute('#scores [data-score="head-waad"]', "aria-checked") == "true"
        own = results["statistics"].waad[0, 1, 3, PROMPT:]
        step = float(own.max() - own.min()) / 254
        page.focus("#panes .token")
        for place in range(12):
            text = page.text_content('#numbers [data-score="head-waad"] b')
            assert abs(float(text.removeprefix("≈ ")) - float(own[place])) <= 0.51 * step + 0.006
            page.keyboard.press("ArrowRight")
        canvas = page.query_selector("#heads-figure canvas")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        page.mouse.move(box["x"] + 50 + 2.5 * 26, box["y"] + 4 + 0.5 * 26)
        assert page.inner_text("#tooltip").startswith("L5H0\n")
        page.mouse.click(box["x"] + 50 + 2.5 * 26, box["y"] + 4 + 0.5 * 26)
        until(page, "document.getElementById('head').value === 'L5H0'")
        page.fill("#head", "L99H0")
        page.press("#head", "Enter")
        assert page.get_attribute("#head", "aria-invalid") == "true"
        page.click("#head-clear")
        until(page, "document.getElementById('head-line').hidden")
        assert page.query_selector('#scores [data-score="head-waad"]') is None


def test_all_heads_can_be_sorted(browser: Any, saved: Path, results: dict[str, Any]) -> None:
    span = results["heads"].span
    with View(browser, saved) as page:
        assert page.query_selector("#head-table table") is None
        page.click("#head-table summary")
        page.click('#head-table [data-sort="span"]')
        assert page.get_attribute('#head-table th:has([data-sort="span"])', "aria-sort") == "descending"
        order = page.eval_on_selector_all(
            "#head-table tr[data-head]", "all => all.map(each => each.dataset.head)"
        )
        assert span.flatten().argsort(descending=True).tolist() == [int(head) for head in order]
        page.click(f'#head-table tr[data-head="{order[0]}"] button')
        name = f"L{3 + int(order[0]) // 4}H{int(order[0]) % 4}"
        until(page, f"document.getElementById('head').value === '{name}'")


def test_colours_are_those_of_the_chosen_score(browser: Any, saved: Path, results: dict[str, Any]) -> None:
    """Stronger is darker, between the 5th and 95th percentile of what is a mean over enough rows."""
    fai = results["scores"].fai[0, PROMPT:]
    sound = [float(value) for place, value in enumerate(fai) if rows_left(place, 60) >= 10]
    low, high = clipped_range(sound)
    with View(browser, saved) as page:
        page.click('#scores [data-score="fai"]')
        assert f"≤ {low:.3g}" in page.text_content("#panes .legend")
        assert f"≥ {high:.3g}" in page.text_content("#panes .legend")
        for scale in ("linear", "rank"):
            page.select_option("#scale", scale)
            colours = token_colours(page)
            for place in range(60):
                is_few = 0 < rows_left(place, 60) < 10
                assert (colours[place]["background"] is None) == (rows_left(place, 60) < 10)
                assert ("few" in colours[place]["classes"]) == is_few
            order = sorted(range(len(sound)), key=lambda place: sound[place])
            tones = [luminance(colours[place]["background"]) for place in order]
            assert sorted(tones, reverse=True) == tones
        page.select_option("#beside", "gamma0")
        assert page.eval_on_selector_all("#panes .text", "all => all.length") == 2
        page.click(".pane:nth-child(2) .token:nth-child(3)")
        assert page.eval_on_selector_all(".token.selected", "all => all.length") == 2


# ---- how it looks ------------------------------------------------------------------------------------


TOKEN_COLOURS = """() => {
  const of = (colour) => colour.match(/[\\d.]+/g).map(Number);
  return Array.from(document.querySelectorAll("#panes .pane:first-child .token"), (each) => {
    const style = getComputedStyle(each), background = of(style.backgroundColor);
    const isClear = background.length === 4 && background[3] === 0;
    return { classes: each.className, ink: of(style.color).slice(0, 3),
      background: isClear ? null : background.slice(0, 3) };
  });
}"""


def token_colours(page: Any) -> list[dict[str, Any]]:
    """Return the computed colours of each token of the first text."""
    found: list[dict[str, Any]] = page.evaluate(TOKEN_COLOURS)
    return found


def luminance(channels: list[float]) -> float:
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: list[float], second: list[float]) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


HATCHES = {"light": [185, 192, 199], "dark": [77, 85, 93]}
PAGES = {"light": [255, 255, 255], "dark": [21, 24, 27]}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_token_can_be_read_and_the_strongest_stands_out(
    browser: Any, saved: Path, results: dict[str, Any], scheme: str
) -> None:
    """Contrast as WCAG defines it, of every token by every score; on hatches too."""
    with View(browser, saved, "#head=L3H0", color_scheme=scheme) as page:
        keys = page.eval_on_selector_all("#scores button", "all => all.map(each => each.dataset.score)")
        assert len(keys) == 8
        for key in keys:
            page.click(f'#scores [data-score="{key}"]')
            colours = token_colours(page)
            for each in colours:
                behind = each["background"] or PAGES[scheme]
                assert contrast(each["ink"], behind) >= 4.5
                if "few" in each["classes"]:
                    assert contrast(each["ink"], HATCHES[scheme]) >= 4.5
            if key == "waad":
                waad = results["scores"].waad[0, PROMPT:]
                strongest, weakest = int(waad.argmax()), int(waad.argmin())
                outstanding = contrast(colours[strongest]["background"], PAGES[scheme])
                assert outstanding > 2 * contrast(colours[weakest]["background"], PAGES[scheme])
        dim = page.evaluate("""() => Array.from(document.querySelectorAll("p, li, dt, dd, h1, h2, h3, label, "
          + "summary, footer, td, th, button, small"))
          .filter((each) => each.offsetParent && !each.closest(".text")).map((each) => {
            let behind = each, colour;
            const of = (text) => text.match(/[\\d.]+/g).map(Number);
            do { colour = of(getComputedStyle(behind).backgroundColor); behind = behind.parentElement; }
            while (behind && colour.length === 4 && colour[3] === 0);
            return [each.tagName, of(getComputedStyle(each).color).slice(0, 3), colour.slice(0, 3)];
          })""")
        assert len(dim) > 50
        assert [each for each in dim if contrast(each[1], each[2]) < 4.5] == []


def test_the_first_screen_holds_the_answer_and_its_curves(browser: Any, saved: Path) -> None:
    with View(browser, saved) as page:
        for selector in ("h1", "#line", "#panes .text", "#curves canvas", "#details"):
            box = page.query_selector(selector).bounding_box()
            assert box["y"] >= 0
            assert box["y"] + box["height"] <= 800 + (0 if selector != "#curves canvas" else 24)
        assert page.query_selector("#panes .text").bounding_box()["height"] >= 170
        assert page.eval_on_selector_all("details[open]", "all => all.length") == 0


@pytest.mark.parametrize("width", [390, 768])
def test_a_small_screen_does_not_scroll_sideways(browser: Any, saved: Path, width: int) -> None:
    options = {"viewport": {"width": width, "height": 800}, "has_touch": True, "is_mobile": True}
    with View(browser, saved, "#t=30&head=L3H1", **options) as page:
        for opened in ("#guide", "#prompt", "#facts", "#head-table"):
            page.click(f"{opened} summary")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.query_selector("#maps canvas").bounding_box()
        assert box["height"] == pytest.approx(box["width"] - 44 - 4 + 38, abs=1)
        page.tap('#panes .token[data-column="12"]')
        assert selected(page) == 12


def test_on_paper_nothing_is_cut(browser: Any, saved: Path) -> None:
    with View(browser, saved, "#t=30", color_scheme="dark") as page:
        page.set_viewport_size({"width": 718, "height": 1000})
        page.emulate_media(media="print", color_scheme="dark")
        until(page, "document.getElementById('prompt').open")
        assert page.evaluate("document.documentElement.scrollWidth") <= 718
        for selector in ("#panes .text", "#pairs .scrolled", "#details"):
            assert page.eval_on_selector(selector, "each => each.scrollHeight <= each.clientHeight + 1"), (
                selector
            )
        for canvas in page.query_selector_all("#curves canvas, #maps canvas, #heads-figure > canvas"):
            box = canvas.bounding_box()
            assert box["x"] + box["width"] <= 718
            drawn = page.evaluate("each => each.width / each.height", canvas)
            assert drawn == pytest.approx(box["width"] / box["height"], rel=0.02)
        assert page.is_visible("#prompt .plain-text")
        assert not page.is_visible("#tools")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        # The light ramp, though the screen is dark: the weakest is nearly white.
        tones = [luminance(each["background"]) for each in token_colours(page) if each["background"]]
        assert max(tones) > 0.9
        page.emulate_media(media="screen")
        until(page, "!document.getElementById('prompt').open")
        assert len(page.pdf(format="A4")) > 10_000


def test_a_change_of_scheme_draws_everything_again(browser: Any, saved: Path) -> None:
    pixel = "document.querySelector('#maps canvas').getContext('2d').getImageData(48, 200, 1, 1).data.join()"
    with View(browser, saved) as page:
        before = token_colours(page)[0], page.evaluate(pixel)
        page.emulate_media(color_scheme="dark")
        until(page, f"{pixel} !== '{before[1]}'")
        assert token_colours(page)[0] != before[0]


# ---- texts -------------------------------------------------------------------------------------------


def test_hostile_texts_execute_nothing(browser: Any, folder: Path) -> None:
    """And each is shown as the text that it is, in the text, the panel, and the tooltip."""
    results = make_results(HOSTILE * 3)
    for name in ("statistics", "heads"):
        results[name] = dataclasses.replace(results[name], model_name="<img src=x onerror=alert(4)>")
    texts = {name: f"</script><script>alert('{name}')</script>" for name in ("title", "notes", "prompt")}
    report = Report(**results, maps=make_maps(36), **texts)
    shown = [*HOSTILE[:7], "⟨202E⟩right", "\u2400", "\ufffd", "", "é⟨2028⟩"]
    for path in (
        report.save(folder / "hostile.html"),
        Reports([report] * 2, compare=(0, 1)).save(folder / "two.html"),
    ):
        with View(browser, path) as page:
            found = page.eval_on_selector_all("#panes .token", "all => all.map(each => each.textContent)")
            assert shown * 3 == found
            page.focus("#panes .token")
            for text in shown:
                panel = page.text_content("#numbers .quoted")
                expected = text.replace("\n", "↵") or "(empty)"
                assert panel.replace("␣", " ") == expected
                page.keyboard.press("ArrowRight")
            assert page.text_content("#notes") == texts["notes"]
            assert page.evaluate("document.querySelectorAll('img, b.bold').length") == 0


def test_hidden_and_foreign_texts_are_visible(browser: Any, folder: Path) -> None:
    """No width, bytes of a character, right to left, spaces, an image's tokens, and no text at all."""
    texts = ("\u200b", "\u4e2d", "", "", "\u05e9\u05dc", "\u05d5\u05dd", "  x", "<image>", *[""] * 9, "end")
    results = make_results(texts)
    with View(browser, Report(**results).save(folder / "texts.html"), "#t=6") as page:
        found = page.eval_on_selector_all(
            "#panes .token", "all => all.map(each => each.textContent || each.dataset.mark)"
        )
        assert found == ["⟨200B⟩", "\u4e2d", "⟨B8⟩", "⟨AD⟩", *texts[4:8], *["·"] * 9, "end"]
        widths = page.eval_on_selector_all("#panes .token", "all => all.map(each => each.offsetWidth)")
        assert min(widths) > 2
        labels = []
        for _ in range(7):
            labels.append(page.text_content("#numbers .quoted"))
            page.keyboard.press("ArrowRight")
        assert labels == ["⟨200B⟩", "\u4e2d", "⟨B8⟩", "⟨AD⟩", "\u05e9\u05dc", "\u05d5\u05dd", "␣␣x"]
        boxes = page.eval_on_selector_all("#panes .token", "all => all.map(each => each.offsetLeft)")
        # The second token of the Hebrew word stands to the left of the first.
        assert boxes[5] < boxes[4]


def test_what_was_not_measured_is_said(browser: Any, folder: Path) -> None:
    results = make_results(length=19)
    results["scores"] = dataclasses.replace(results["scores"], entropy=None, receiver_fai=None)
    results["heads"] = dataclasses.replace(results["heads"], receiver_heads=None, receiver_kurtosis=None)
    with View(browser, Report(**results).save(folder / "less.html"), "#t=8") as page:
        assert "group_maps" in page.inner_text("#maps")
        assert "group_maps" in page.text_content("#links")
        assert "token ids are shown" in page.text_content("#line")
        assert page.query_selector(".arcs") is None
        page.click('#scores [data-score="fai"]')
        assert "No token has FAI over 10 rows or more" in page.text_content("#panes .legend")
    short = make_results(("a", "b", "c", "d")) | {"maps": make_maps(4)}
    with View(browser, Report(**short).save(folder / "short.html"), "#t=8&score=fai") as page:
        assert "No token has a defined FAI" in page.text_content("#panes .legend")
        assert "no anchor at a preplan" in page.text_content("#pairs")
        assert page.text_content('#numbers [data-score="fai"] b') == "undefined"
    one = make_results(("one",)) | {"maps": make_maps(1)}
    with View(browser, Report(**one).save(folder / "one.html")) as page:
        page.keyboard.press("ArrowRight")
        assert selected(page) == PROMPT


def test_in_a_notebooks_frame_it_works_as_well(browser: Any, results: dict[str, Any]) -> None:
    """Where it has no address of its own, and may not touch the page around it."""
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    shown = Report(**results)._repr_html_()
    page.set_content(f"<!DOCTYPE html><body>{shown}{shown}</body>")
    for frame in page.frames[1:]:
        until(frame, "document.querySelector('#heads-figure .scale') !== null")
        frame.click('#panes .token[data-column="20"]')
        assert frame.text_content(".chosen .soft").strip() == "column 20"
    assert len(page.frames) == 3
    page.close()
    assert problems == []


# ---- several reports ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Two answers: the second lacks two tokens of the first, and has one of its own."""
    first = make_results(length=60, seed=1)
    second = make_results(length=59, seed=2)
    ids = first["batch"].input_ids
    shared = torch.cat([ids[:, :20], ids[:, 22:40], torch.full((2, 1), 4), ids[:, 40:]], 1)
    mask = torch.ones(2, 65, dtype=torch.bool)
    second["batch"] = attnprobe.TokenBatch.from_ids(shared, mask, response_start=PROMPT)
    for name, results in (("A", first), ("B", second)):
        texts = tuple(tuple(f" w{token}" for token in row) for row in results["batch"].input_ids.tolist())
        results["batch"] = dataclasses.replace(results["batch"], texts=texts)
        results["title"] = f"Answer {name}"
    reports = [Report(**each) for each in (first, second)]
    path = Reports(reports, title="Two answers", compare=(0, 1)).save(folder / "pair.html")
    return path, [first, second]


def test_entries_are_listed_and_opened(browser: Any, pair: tuple[Path, list[dict[str, Any]]]) -> None:
    path, (first, second) = pair
    with View(browser, path) as page:
        assert page.eval_on_selector_all("#entries button", "all => all.map(each => each.textContent)") == [
            "Answer A",
            "Answer B",
        ]
        assert page.text_content("h1") == "Two answers"
        page.click("#entries button >> nth=1")
        page.click('#panes .token[data-column="30"]')
        assert (
            page.text_content('#numbers [data-score="waad"] b')
            == f"{float(second['scores'].waad[0, 30]):.3g}"
        )
        assert page.evaluate("location.hash") == "#e=1&t=30"
        page.click("#entries button >> nth=0")
        assert page.query_selector(".token.selected") is None
        page.click('#panes .token[data-column="30"]')
        assert (
            page.text_content('#numbers [data-score="waad"] b') == f"{float(first['scores'].waad[0, 30]):.3g}"
        )
    with View(browser, path, "#e=1&t=44") as page:
        assert page.get_attribute("#entries button >> nth=1", "aria-current") == "true"
        assert page.get_attribute(".token.selected >> nth=0", "data-column") == "44"


def slow_pairs(first: list[int], second: list[int]) -> int:
    """The length of the longest common subsequence, by the textbook's table."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_a_comparison_tells_what_was_gained_and_lost(
    browser: Any, pair: tuple[Path, list[dict[str, Any]]]
) -> None:
    path, (first, second) = pair
    ids = [each["batch"].input_ids[0, PROMPT:].tolist() for each in (first, second)]
    with View(browser, path) as page:
        common = slow_pairs(*ids)
        assert common >= 58
        assert page.text_content("#compare-summary") == (
            f"{common} tokens in both; {60 - common} only in A, {59 - common} only in B."
        )
        assert page.eval_on_selector_all("#compare-text .only-a", "all => all.length") == 60 - common
        rows = page.eval_on_selector_all(
            "#compare-peaks tr[data-change]",
            "all => all.map(each => [each.dataset.change, each.dataset.kind,"
            " ...Array.from(each.cells).slice(3).map(cell => cell.textContent)])",
        )
        # Columns of A that B has too, by where they are in B.
        moved = (
            {c: c for c in range(PROMPT, 20)}
            | {c: c - 2 for c in range(22, 40)}
            | {c: c - 1 for c in range(40, 66)}
        )
        back = {b: a for a, b in moved.items()}
        expected = set()
        for kind in ("preplan", "anchor"):
            in_a, in_b = (
                set(getattr(each["rhythm"], kind)[0].nonzero()[:, 0].tolist()) for each in (first, second)
            )
            expected |= {
                ("gained", kind, str(back.get(b, "–")), str(b)) for b in in_b if back.get(b) not in in_a
            }
            expected |= {
                ("lost", kind, str(a), str(moved.get(a, "–"))) for a in in_a if moved.get(a) not in in_b
            }
        assert expected == {tuple(row) for row in rows}
        assert len(rows) == len(expected)
        marked = page.eval_on_selector_all(
            "#compare-text .both",
            "all => all.map(each => [each.dataset.column, /gained|lost/.test(each.className)])",
        )
        changed_columns = {row[3] for row in rows if row[2] != "–" and row[3] != "–"}
        assert changed_columns == {column for column, is_marked in marked if is_marked}
        changed = page.eval_on_selector_all(
            "#compare-heads tr[data-head]", "all => all.map(each => each.dataset.head)"
        )
        groups = [
            torch.stack([each["heads"].local_heads, each["heads"].global_heads, each["heads"].receiver_heads])
            for each in (first, second)
        ]
        assert (groups[0] != groups[1]).any(0).flatten().nonzero()[:, 0].tolist() == [int(h) for h in changed]
        page.select_option("#compare-score", "entropy")
        span = page.query_selector("#compare-text .both >> nth=20")
        span.hover()
        lines = page.inner_text("#tooltip").split("\n")
        a, b = 28, 26
        entropies = float(first["scores"].entropy[0, a]), float(second["scores"].entropy[0, b])
        assert lines[1] == f"A, column {a}: entropy {entropies[0]:.3g}"
        assert lines[2] == f"B, column {b}: entropy {entropies[1]:.3g}"
        assert float(lines[3].removeprefix("difference: ")) == pytest.approx(
            entropies[1] - entropies[0], rel=0.01
        )
        page.select_option("#compare-b", "0")
        assert "60 tokens in both; 0 only in A" in page.text_content("#compare-summary")
        assert page.is_hidden("#tooltip")
        assert page.evaluate("location.hash") == "#compare=0,0,entropy"
        page.select_option("#beside", "entropy")
        address = page.evaluate("location.hash")
    with View(browser, path, address=address) as page:
        chosen = [page.input_value(f"#compare-{name}") for name in ("a", "b", "score")]
        assert chosen == ["0", "0", "entropy"]
        assert page.input_value("#beside") == "entropy"
        assert page.eval_on_selector_all("#panes .pane", "all => all.length") == 2


@pytest.mark.parametrize("seed", range(2))
def test_an_alignment_is_as_long_as_can_be(browser: Any, folder: Path, seed: int) -> None:
    """Answers of few different tokens, where many alignments compete."""
    reports, ids = [], []
    for part in range(2):
        results = make_results(length=30 + 5 * part, seed=10 * seed + part)
        batch = results["batch"]
        results["batch"] = dataclasses.replace(batch, input_ids=batch.input_ids % 4)
        ids.append(results["batch"].input_ids[0, PROMPT:].tolist())
        reports.append(Report(**results))
    path = Reports(reports, compare=(0, 1)).save(folder / f"align{seed}.html")
    with View(browser, path) as page:
        assert page.text_content("#compare-summary").startswith(f"{slow_pairs(*ids)} tokens in both;")

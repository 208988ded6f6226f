"""How large a report is, and how soon a browser can use it, by the length of the answer and its heads.

    python -m benchmarks.report_page                 # all sizes; a few minutes
    python -m benchmarks.report_page --keep pages/   # and keep the pages

The results are made up: their numbers have the spread of real ones, which decides how well they compress.
"Ready" is the time from the start of navigation until the page has set its mark, the median of five loads in
a headless Chromium; frames are those of scrolling through the text.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import attnprobe
from attnprobe.report.agreement import influence_of_map

SIZES = (
    # tokens, layers, heads
    (161, 30, 9),
    (256, 30, 9),
    (1024, 28, 16),
    (4096, 28, 16),
    (4096, 36, 32),
)
PROMPT = 32
WORDS = (
    *("the", "of", "to", "and", "in", "is", "that", "we", "so", "total", "cost", "each", "dollars", "pens"),
    *("then", "buys", "pays", "gets", "change", "find", "calculate", "add", "number", "problem", "check"),
)


def made_up(tokens: int, layers: int, heads: int, seed: int = 0) -> dict[str, Any]:
    """Return the arguments of `Report` for an answer with maps, after a short prompt."""
    draw = torch.Generator().manual_seed(seed)
    count = PROMPT + tokens
    ids = torch.randint(0, len(WORDS), (1, count), generator=draw)
    texts = [f" {WORDS[i]}" for i in ids[0].tolist()]
    for end in range(PROMPT + 14, count, 23):
        texts[end] = ".\n\n" if end % 3 else ","
    batch = attnprobe.TokenBatch.from_ids(ids, response_start=PROMPT)
    batch = attnprobe.TokenBatch(ids, batch.attention_mask, batch.response_mask, texts=(tuple(texts),))
    inside = batch.response_mask[:, None, None]
    waad = 10 * torch.rand(1, layers, heads, count, generator=draw).sqrt()
    fai = torch.rand(1, layers, heads, count, generator=draw).pow(6) / 20
    fai[..., -10:] = torch.nan
    measured = attnprobe.HeadStatistics(
        span=100 * torch.rand(1, layers, heads, generator=draw).pow(3),
        waad=waad.masked_fill(~inside, torch.nan),
        fai=fai.masked_fill(~inside, torch.nan),
        entropy=torch.rand(1, count, generator=draw).pow(4).masked_fill(~batch.response_mask, torch.nan),
        receiver_kurtosis=40 * torch.rand(1, layers, heads, generator=draw).pow(4),
        response_mask=batch.response_mask,
        layers=tuple(range(layers)),
        model_name="made-up",
        input_ids=ids,
        shares=torch.rand(1, layers, heads, 1, 1, generator=draw),
        share_from=("response",),
        share_on=("first",),
    )
    local, global_ = (_map(tokens, decay, draw) for decay in (0.3, 0.002))
    scored_fai = torch.full((1, count), torch.nan)
    every = torch.ones(tokens, dtype=torch.bool)
    scored_fai[0, PROMPT:] = influence_of_map(global_, every, measured.horizon).float()
    scores = attnprobe.TokenScores(
        waad=measured.waad[0, :2].mean((0, 1))[None],
        fai=scored_fai,
        entropy=measured.entropy,
        response_mask=batch.response_mask,
        receiver_fai=measured.fai[0, -2:].mean((0, 1))[None],
        input_ids=ids,
    )
    maps = attnprobe.GroupMaps(
        local[None], global_[None], torch.arange(PROMPT, count)[None], input_ids=ids[:, PROMPT:]
    )
    return {
        "batch": batch,
        "statistics": measured,
        "heads": attnprobe.classify_heads(measured, receivers=20),
        "scores": scores,
        "rhythm": attnprobe.find_rhythm(scores),
        "maps": maps,
        "title": f"{tokens} tokens, {layers} x {heads} heads",
    }


def _map(tokens: int, decay: float, draw: torch.Generator) -> torch.Tensor:
    """Return a map whose rows fade with the distance, with a few columns that many rows read."""
    place = torch.arange(tokens)
    distance = (place[:, None] - place).clamp(min=0).float()
    weight = torch.rand(tokens, tokens, generator=draw).pow(3) * torch.exp(-decay * distance)
    weight *= 1 + 30 * torch.rand(tokens, generator=draw).pow(12)
    weight = weight.tril()
    return 0.7 * weight / weight.sum(1, keepdim=True)


def measure_page(browser: Any, path: Path, repeats: int = 5) -> tuple[float, float, float]:
    """Return the median time until the page is ready, and the median and longest frame, all in ms."""
    ready: list[float] = []
    frames: list[float] = []
    for _ in range(repeats):
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(path.as_uri(), wait_until="load")
        ready.append(page.evaluate("performance.getEntriesByName('attnprobe-ready')[0].startTime"))
        page.wait_for_timeout(300)
        frames += page.evaluate(_SCROLL)
        page.close()
    return statistics.median(ready), statistics.median(frames), max(frames)


_SCROLL = """async () => {
  const box = document.querySelector(".text");
  const frame = () => new Promise(requestAnimationFrame);
  const took = [];
  let last = await frame();
  for (let k = 0; k < 40; k++) {
    box.scrollTop += 120;
    const now = await frame();
    took.push(now - last);
    last = now;
  }
  return took;
}"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="a folder for the pages")
    parser.add_argument("--browser", default="/usr/bin/chromium", help="the browser's program")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    print("| tokens | heads | size (MB) | made in (s) | ready (s) | frame, longest (ms) |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=options.browser, args=["--no-sandbox", "--disable-gpu"]
        )
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for tokens, layers, heads in SIZES:
            report = attnprobe.Report(**made_up(tokens, layers, heads))
            start = time.perf_counter()
            path = report.save((folder / f"report-{tokens}-{layers}x{heads}.html").resolve())
            took = time.perf_counter() - start
            ready, frame, longest = measure_page(browser, path)
            size = path.stat().st_size / 1e6
            print(
                f"| {tokens:,} | {layers} × {heads} | {size:.2f} | {took:.1f} | {ready / 1000:.2f} "
                f"| {frame:.0f}, {longest:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

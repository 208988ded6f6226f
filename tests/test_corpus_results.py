"""Reading the scores of a corpus, its summary and page, comparing two, and the commands."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attnprobe
from attnprobe import (
    AttnprobeWarning,
    MissingDependencyError,
    ParameterError,
    ResultError,
    classify_heads,
    couplings,
)
from attnprobe.analysis.agreement import stability_of
from attnprobe.cli import main
from attnprobe.corpus import (
    Columns,
    CorpusSettings,
    CorpusSummary,
    compare,
    report_row,
    save_page,
    score,
    summarize,
    summary_page,
)
from attnprobe.corpus import quantities as sums
from attnprobe.corpus.folder import write_shard
from attnprobe.testing.tiny_models import tiny_model, tiny_tokenizer
from tests.corpus_input import rows, scored_by_hand, write_lines

pytest.importorskip("pyarrow")
pytest.importorskip("pandas")

SETTINGS = CorpusSettings(horizon=(2, 20), receivers=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=300)


@pytest.fixture(scope="module")
def place(model, tmp_path_factory) -> Path:
    """A folder with an input of which one row is bad, a model, and the scores."""
    folder = tmp_path_factory.mktemp("results")
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    source = write_lines(folder / "in.jsonl", [*rows(25), b"<script>"])
    score(
        source, folder / "scores", model=model, tokenizer=tiny_tokenizer(), settings=SETTINGS,
        columns=Columns(keep="ok"), rows_per_shard=10,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def by_hand(model) -> list[dict[str, Any]]:
    return scored_by_hand(model, rows(25), SETTINGS)


def test_scores_are_read_as_tables(place: Path) -> None:
    """All, without the rejected, some columns, some rows; and while the run is under way."""
    scores = attnprobe.load_scores(place / "scores")
    assert (len(scores), scores.row_count, scores.is_complete) == (25, 26, True)
    assert scores.to_arrow(rejected=True).num_rows == 26
    assert scores.to_pandas("row")["row"].tolist() == list(range(25))
    assert scores.where("ok", True).to_arrow(["id"])["id"].to_pylist() == [f"r{i}" for i in range(0, 25, 3)]
    assert len(scores.where("ok", True).where("ok", False)) == 0
    assert [part.waad.shape[0] for part in scores.batches()] == [10, 10, 5]
    assert scores.provenance == next(scores.batches()).provenance
    assert {name: len(heads) for name, heads in scores.provenance.heads.items()} == {
        "local": 3, "global": 3, "receiver": 12,
    }  # fmt: skip
    assert scores.groups.layers == (0, 1, 2)
    for wrong, told in ((["waads"], "no column 'waads'"), ("token", "no column 'token'")):
        with pytest.raises(ParameterError, match=told):
            scores.to_arrow(wrong)
    with pytest.raises(ParameterError, match="'right' was not kept; there are ok"):
        scores.where("right", 1)


@pytest.mark.parametrize("library", ["polars", "duckdb"])
def test_scores_are_read_lazily_by_others(place: Path, library: str) -> None:
    scores = attnprobe.load_scores(place / "scores")
    read = getattr(scores, f"to_{library}")
    try:
        __import__(library)
    except ImportError:
        with pytest.raises(MissingDependencyError, match=library):
            read()
        return
    with pytest.raises(ParameterError, match=f"to_{library} gives all rows"):
        getattr(scores.where("ok", True), f"to_{library}")()
    counted = read().select("row").collect().height if library == "polars" else len(read().fetchall())
    assert counted == 26


def test_a_folder_that_is_none_or_damaged_is_refused(place: Path, tmp_path: Path) -> None:
    for wrong in (tmp_path, tmp_path / "none", place / "in.jsonl"):
        with pytest.raises(ResultError, match="no folder of scores"):
            attnprobe.load_scores(wrong)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ResultError, match="damaged"):
        attnprobe.load_scores(tmp_path)
    (tmp_path / "manifest.json").write_text((place / "scores/manifest.json").read_text())
    empty = attnprobe.load_scores(tmp_path)
    assert (len(empty), empty.is_complete, empty.to_arrow(["row"]).num_rows) == (0, False, 0)
    with pytest.raises(ResultError, match="holds no finished shard yet"):
        summarize(empty)
    (tmp_path / "ledger.jsonl").write_text((place / "scores/ledger.jsonl").read_text())
    with pytest.raises(ResultError, match=r"00000\.parquet cannot be read: run `attnprobe corpus` again"):
        len(empty)
    with pytest.raises(ResultError, match="ok is 7; ok is false"):
        summarize(attnprobe.load_scores(place / "scores").where("ok", 7))


def mean_of(parts: list[torch.Tensor]) -> float:
    return float(torch.cat([part.double().flatten() for part in parts]).nanmean())


def test_a_summary_is_of_all_rows(place: Path, by_hand: list[dict[str, Any]]) -> None:
    """Every quantity, recomputed by hand from rows that were measured by themselves."""
    scores = attnprobe.load_scores(place / "scores")
    found = summarize(scores, tokenizer=tiny_tokenizer(), draws=20, resamples=50)
    assert (found.rows, found.rejected, found.row_count) == (25, 1, 26)
    lengths = [len(row["waad"]) for row in by_hand]
    heads = {
        name: [(layer * 4 + head) for layer, head, _ in group]
        for name, group in scores.provenance.heads.items()
    }
    expected = {
        "response_tokens": sum(lengths) / 25,
        **{name: mean_of([row[name] for row in by_hand]) for name in ("waad", "fai", "entropy")},
        **{f"{name}_share": mean_of([row[name] for row in by_hand]) for name in ("preplan", "anchor")},
        "entropy_at_preplans": mean_of([row["entropy"][row["preplan"]] for row in by_hand]),
    }
    for group in ("local", "global"):
        expected[f"{group}_span"] = mean_of([row["span"][heads[group]].mean()[None] for row in by_hand])
        expected[f"{group}_first_share"] = mean_of(
            [row["first_token_share"][heads[group]].mean()[None] for row in by_hand]
        )
    for name, value in expected.items():
        assert found.quantities[name].value == pytest.approx(value, rel=1e-5), name
        assert found.quantities[name].low < value < found.quantities[name].high
    own = couplings(list(scores.batches()), draws=20, resamples=50)
    assert found.coupled_rows == 25
    assert found.couplings["position"] == own
    assert found.quantities["anchor_after_preplan"].value == pytest.approx(
        own.anchor_after_preplan.observed.value
    )
    assert found.couplings["token"].parameters["null"] == "token"
    anchors: dict[int, int] = {}
    for row, line in zip(rows(25), by_hand, strict=True):
        for token, is_anchor in zip(row["response_ids"], line["anchor"].tolist(), strict=True):
            anchors[token] = anchors.get(token, 0) + is_anchor
    assert found.tokens == sum(lengths)
    assert found.anchors[0].count == max(anchors.values())
    for token in found.anchors:
        assert anchors[token.token_id] == token.count
        assert token.text == tiny_tokenizer().decode([token.token_id])
    spans = torch.stack([row["span"] for row in by_hand]).reshape(25, 3, 4)
    stability = stability_of(spans, layers=(0, 1, 2), resamples=200)
    assert found.stability is not None
    assert found.stability.overlap == stability.overlap
    assert found.notable[0].pairs == max(row.pairs for row in found.notable)
    assert "25 of 26 rows" in repr(found)
    assert found.to_pandas()["quantity"].tolist() == list(found.quantities)


def test_stability_is_that_of_the_groups_that_were_used(model, place: Path, tmp_path: Path) -> None:
    """Saved groups have a share of heads of their own, whatever the settings' default is."""
    statistics = (attnprobe.measure(model, row["response_ids"]) for row in rows(4))
    groups = classify_heads(statistics, quantile=0.1)
    source = write_lines(tmp_path / "in.jsonl", rows(4))
    score(source, tmp_path / "out", model=model, groups=groups)
    scores = attnprobe.load_scores(tmp_path / "out")
    spans = torch.tensor(scores.to_arrow(["span"])["span"].to_pylist()).reshape(4, 3, 4)
    own = stability_of(spans, layers=(0, 1, 2), quantile=0.1, resamples=200)
    found = summarize(scores, draws=2, resamples=5).stability
    assert found is not None
    assert found.overlap == own.overlap
    assert found.overlap != stability_of(spans, layers=(0, 1, 2), resamples=200).overlap


def test_many_rows_share_blocks(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are the same as with a block for each row; only intervals are of blocks."""
    scores = attnprobe.load_scores(place / "scores")
    whole = summarize(scores, draws=5, resamples=20)
    monkeypatch.setattr(sums, "BLOCKS", 4)
    blocks = summarize(scores, draws=5, resamples=20)
    for name, estimate in whole.quantities.items():
        assert blocks.quantities[name].value == pytest.approx(estimate.value)
    assert blocks.stability is not None
    assert blocks.stability.responses == 4


def test_two_parts_are_compared(place: Path, by_hand: list[dict[str, Any]]) -> None:
    scores = attnprobe.load_scores(place / "scores")
    found = compare(scores.where("ok", False), scores.where("ok", True), resamples=200)
    assert found.rows == (16, 9)
    right, wrong = (
        [row["waad"] for i, row in enumerate(by_hand) if (i % 3 == 0) is ok] for ok in (True, False)
    )
    difference = found.difference["waad"]
    assert difference.value == pytest.approx(mean_of(right) - mean_of(wrong), rel=1e-4)
    assert difference.low < difference.value < difference.high
    assert found.to_arrow().num_rows == len(found.difference)
    assert "difference" in repr(found)


def test_pairs_are_compared_as_pairs(model, place: Path, tmp_path: Path) -> None:
    """Rows are found by their id, in any order; the same scores do not differ at all."""
    scores = attnprobe.load_scores(place / "scores")
    moved = list(reversed(rows(25)))[:20]
    options: dict[str, Any] = {"model": model, "settings": SETTINGS, "groups": scores.groups}
    score(write_lines(tmp_path / "in.jsonl", moved), tmp_path / "scores", **options)
    other = attnprobe.load_scores(tmp_path / "scores")
    found = compare(scores, other, paired=True, resamples=50)
    assert found.rows == (20, 20)
    assert max(abs(limit) for each in found.difference.values() for limit in each) < 1e-5
    apart = compare(scores, other, resamples=50)
    assert apart.rows == (25, 20)
    assert apart.difference["waad"].high > 1e-3
    twice = write_lines(tmp_path / "twice.jsonl", rows(3) + rows(3))
    score(twice, tmp_path / "twice", **options)
    with pytest.raises(ResultError, match="r0 occurs more than once"):
        compare(scores, attnprobe.load_scores(tmp_path / "twice"), paired=True)
    none = [{key: value for key, value in row.items() if key != "id"} for row in rows(2)]
    score(write_lines(tmp_path / "none.jsonl", none), tmp_path / "none", **options)
    with pytest.raises(ResultError, match="no row in common"):
        compare(scores, attnprobe.load_scores(tmp_path / "none"), paired=True)
    settings = CorpusSettings(horizon=(2, 21))
    score(write_lines(tmp_path / "in.jsonl", moved), tmp_path / "wide", model=model, settings=settings)
    with pytest.raises(ResultError, match=r"different horizon: \[2, 20\] and \[2, 21\]"):
        compare(scores, attnprobe.load_scores(tmp_path / "wide"))
    with pytest.raises(ResultError, match="0 and 25 rows"):
        compare(scores.where("ok", 7), scores)


def test_the_page_is_harmless_and_links_to_reports(model, place: Path) -> None:
    pytest.importorskip("jinja2")
    scores = attnprobe.load_scores(place / "scores")
    found = summarize(scores, tokenizer=tiny_tokenizer(), draws=5, resamples=20)
    row = found.notable[0].row
    before = summary_page(found, place / "scores", "<b>bold</b>")
    assert "<b>bold" not in before
    assert f"attnprobe corpus report scores {row}" in before
    assert f'href="reports/{row}.html"' not in before
    written = report_row(scores, row, model=model, tokenizer=tiny_tokenizer())
    assert written == place / f"scores/reports/{row}.html"
    assert f"Row {row}: r{row}" in written.read_text()
    saved = save_page(found, place / "scores").read_text()
    assert f'href="reports/{row}.html"' in saved
    assert "<script" not in saved
    assert "All intervals on this page are 95% intervals" in saved
    # A row that is not listed is linked too, and the command can be typed wherever the folder is.
    few = dataclasses.replace(found, notable=found.notable[1:])
    (place / "my scores/reports").mkdir(parents=True)
    (place / f"my scores/reports/{row}.html").touch()
    page = html.unescape(save_page(few, place / "my scores").read_text())
    assert f'Reports of other rows: <a href="reports/{row}.html">{row}</a>' in page
    assert f"attnprobe corpus report 'my scores' {found.notable[1].row}<" in page
    with pytest.raises(ResultError, match="cannot be scored: not JSON"):
        report_row(scores, 25, model=model)
    with pytest.raises(ResultError, match=r"model\.weights"):
        report_row(scores, 1, model=tiny_model("llama", vocab_size=300, seed=1))
    with pytest.raises(ParameterError, match="row"):
        report_row(scores, 26, model=model)


def test_the_lift_of_a_token_is_that_of_a_coupling(place: Path, by_hand: list[dict[str, Any]]) -> None:
    """Observed over chance, minus 1: 0 for a token that is a peak as often as any."""
    found = summarize(attnprobe.load_scores(place / "scores"), draws=2, resamples=5)
    ids = torch.tensor([token for row in rows(25) for token in row["response_ids"]])
    peaks = torch.cat([line["anchor"] for line in by_hand])
    for token in found.anchors:
        is_it = ids == token.token_id
        chance = float(peaks.double().mean())
        assert token.lift == pytest.approx(float(peaks[is_it].double().mean()) / chance - 1)


def test_a_summary_of_little_is_still_one(model, tmp_path: Path) -> None:
    """One short row, without entropy or the spans of heads: what is not known is left out."""
    source = write_lines(tmp_path / "in.jsonl", [{"prompt_ids": [1], "response_ids": [2, 3]}])
    settings = CorpusSettings(entropy=False, head_values=False)
    with pytest.warns(AttnprobeWarning, match="--head-span ignoring"):
        score(source, tmp_path / "scores", model=model, settings=settings)
    found: CorpusSummary = summarize(attnprobe.load_scores(tmp_path / "scores"), draws=2, resamples=5)
    assert found.stability is None
    assert set(found.quantities) == {"response_tokens", "waad", "preplan_share", "anchor_share"}
    assert found.anchors == ()
    pytest.importorskip("jinja2")
    assert "were not kept" in summary_page(found, tmp_path / "scores")


# ---- the commands ---------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `attnprobe corpus` with some words; return its exit code and what it printed."""

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["attnprobe", "corpus", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


def test_a_corpus_is_scored_from_the_command_line(command: Any, place: Path, tmp_path: Path) -> None:
    """The exit code tells of rejected rows; the same command continues; a change is refused."""
    words = (
        place / "in.jsonl", "--model", place / "model", "-o", tmp_path / "scores", "--horizon", "2-20",
        "--rows-per-shard", 10, "--keep", "ok", "--credit", "coupled", "--receivers", "--groups", 20,
    )  # fmt: skip
    code, told = command(*words, "--groups-only")
    assert (code, "Head groups" in told) == (0, True)
    code, told = command(*words)
    assert code == 3
    assert "26 rows, 0 of them from an earlier run, 1 rejected" in " ".join(told.split())
    assert json.loads((tmp_path / "scores/rejected.jsonl").read_text())["row"] == 25
    code, told = command("score", *words)
    assert (code, "26 of them from an earlier run" in " ".join(told.split())) == (3, True)
    code, told = command(*words, "--window", 5)
    assert code == 1
    assert "settings.window was 10, and is now 5" in " ".join(told.split())
    # The model is the one that the scores were made with.
    code, told = command("report", tmp_path / "scores", 3)
    assert code == 0
    code, told = command("summary", tmp_path / "scores", "--where", "ok=true")
    assert code == 0
    for part in ("9 of 26 rows where ok is true, 0 rejected; ", "WAAD of a token", "anchor after preplan",
                 "with 95% intervals", "summary-ok-true.html"):  # fmt: skip
        assert part in told
    assert "9 of 26 rows where ok is true" in (tmp_path / "scores/summary-ok-true.html").read_text()
    assert not (tmp_path / "scores/summary.html").exists()
    code, told = command("compare", tmp_path / "scores", "--by", "ok")
    assert (code, "ok is false" in told) == (0, True)
    code, told = command("compare", tmp_path / "scores", place / "scores", "--paired")
    assert (code, "25 and 25 rows" in told) == (0, True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("compare", "scores"), "--by"),
        (("compare", "scores", "scores", "--by", "ok"), "not both"),
        (("report", "scores", "99"), "row must be"),
        (("summary", "nowhere"), "no folder of scores"),
        (("nowhere.jsonl", "-o", "out"), "no input at nowhere.jsonl"),
        (("in.jsonl", "-o", "out", "--groups", "nofile"), "there is no file nofile"),
        (("in.jsonl", "-o", "out", "--groups", "-3"), "a number of rows (at least 2)"),
        (("in.jsonl", "-o", "out", "--quantile", "2"), "quantile"),
        (("in.jsonl", "-o", "out", "--keep", "oke"), "no row of the input has the field 'oke'"),
        (("in.jsonl", "-o", "out", "--layers", "some"), "layers must be"),
        (("in.jsonl", "-o", "out", "--horizon", "10"), "--horizon: a horizon must be"),
        (("in.jsonl", "-o", "out", "--credit", "much"), "--credit: it must be"),
        (("in.jsonl", "-o", "out", "--dtype", "float8", "--model", "model"), "--dtype: dtype must be"),
        (
            ("in.jsonl", "-o", "out", "--device", "abacus", "--model", "model"),
            "--device: the device 'abacus'",
        ),
        (("in.jsonl", "-o", "out", "--ray-workers", "2", "--groups-only"), "does not go with"),
        (("summary", "scores", "--where", "ok"), "field=value"),
    ],
)
def test_wrong_words_are_explained(
    command: Any, place: Path, monkeypatch: pytest.MonkeyPatch, words: Any, told: str
) -> None:
    """With the exit code of wrong usage, and before a model is loaded."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("attnprobe.corpus.loading.load_model", None)
    code, printed = command(*words)
    assert code == 2
    assert told in " ".join(printed.split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("report", "scores", "1", "--source", "other.jsonl"), "input[0].crc32"),
        (("report", "scores", "1", "--source", "none.jsonl"), "Name the input that the scores are of"),
        (("in.jsonl", "-o", "scores", "--window", "5"), "settings.window was 10, and is now 5"),
        (("summary", "scores", "--where", "ok=True"), 'ok is "True"; ok is false (16 rows), true (9 rows)'),
        (("compare", "other", "--by", "name"), 'where name is false; name is "a" (2 rows)'),
    ],
)
def test_what_cannot_be_done_is_explained(
    command: Any, place: Path, model: Any, monkeypatch: pytest.MonkeyPatch, words: Any, told: str
) -> None:
    """Before a model is loaded, too."""
    monkeypatch.chdir(place)
    if not (place / "other").exists():
        write_lines(place / "other.jsonl", [{**row, "name": "a"} for row in rows(2)])
        columns = Columns(keep="name")
        score("other.jsonl", "other", model=model, groups=attnprobe.load_scores("scores").groups,
              settings=CorpusSettings(), columns=columns)  # fmt: skip
    monkeypatch.setattr("attnprobe.corpus.loading.load_model", None)
    code, printed = command(*words)
    assert code == 1
    assert told in " ".join(printed.split())


def test_an_interrupted_command_says_what_is_kept(
    command: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And warnings are one line, without a place in our source."""
    windows = iter(range(2))

    def strike(*arguments: Any) -> Any:
        if next(windows, None) is None:
            raise KeyboardInterrupt
        return write_shard(*arguments)

    monkeypatch.setattr("attnprobe.corpus.run.write_shard", strike)
    words = (place / "in.jsonl", "-o", tmp_path / "scores", "--model", place / "model", "--rows-per-shard", 5)
    code, told = command(*words)
    assert code == 130
    assert "interrupted; kept: 10 finished rows in" in " ".join(told.split())
    monkeypatch.undo()
    (tmp_path / "scores/shards/00001.parquet").unlink()
    code, told = command(*words)
    assert code == 3
    assert "scores, shard 1 is damaged or missing, and will be scored again" in " ".join(told.split())
    assert "warning: " in told
    assert "folder.py" not in told


def test_no_option_is_cut_off_in_the_help(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((80, 24)))
    _, told = command("score", "--help")
    assert all(f"--{name} " in told for name in ("response-ids-column", "cpus-per-worker", "peak-quantile"))
    _, told = command("--help")
    assert "no command, it is an input to score" in " ".join(told.replace("│", "").split())

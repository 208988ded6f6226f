"""The command line: what a person types, sees and gets."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from attnprobe import HeadGroups, TokenScores
from attnprobe.cli import main
from attnprobe.errors import ParameterError
from attnprobe.layer_selection import parse_layers
from attnprobe.testing.tiny_models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama", vocab_size=300).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; returns exit code, output and errors."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["attnprobe", *words])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_report_of_an_answer(run, model: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    code, out, _ = run(
        "report", "--model", model, "--prompt", "Read this", "--max-new-tokens", "60", "-o", str(path)
    )
    assert code == 0
    assert "tiny-llama answered:" in out
    assert "most local" in out
    page = path.read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "Read this" in page


def test_report_of_a_given_response(run, model: str, tmp_path: Path) -> None:
    """A response with markup in it stays text, in the page and in the terminal."""
    path = tmp_path / "page.html"
    hostile = "<script>alert(1)</script> [bold]and[/bold] " + "word by word " * 8
    code, out, _ = run(
        "report", "--model", model, "--prompt", "Q", "--response", hostile, "--no-chat", "-o", str(path)
    )
    assert code == 0
    assert "[bold]and[/bold]" in out
    assert "<script>alert(1)" not in path.read_text()


@pytest.mark.parametrize("ending", ["csv", "json", "safetensors"])
def test_heads_are_written(run, model: str, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"heads.{ending}"
    code, out, _ = run(
        "heads", "--model", model, "--prompt", "Q", "--response", "word by word " * 8,
        "--layers", "0,2", "--top", "2", "-o", str(path),
    )  # fmt: skip
    assert code == 0
    assert "most global" in out
    if ending == "csv":
        lines = path.read_text().splitlines()
        assert lines[0] == "layer,head,span,receiver_kurtosis,receiver_gini,local,global,receiver"
        assert len(lines) == 1 + 2 * 4
    elif ending == "json":
        assert {row["layer"] for row in json.loads(path.read_text())} == {0, 2}
    else:
        assert HeadGroups.load(path).layers == (0, 2)


@pytest.mark.parametrize("ending", ["csv", "json", "safetensors"])
def test_scores_are_written(run, model: str, tmp_path: Path, ending: str) -> None:
    """By the groups of the answer itself, or by saved ones of another answer."""
    groups, path = tmp_path / "groups.safetensors", tmp_path / f"scores.{ending}"
    words = ["--model", model, "--prompt", "Q", "--layers", "0,2"]
    assert run("heads", *words, "--response", "another answer " * 8, "-o", str(groups))[0] == 0
    words += ["--response", "word by word " * 8, "-o", str(path)]
    code, out, _ = run("score", *words, "--groups", str(groups))
    assert code == 0
    if ending == "safetensors":
        count = int(TokenScores.load(path).response_mask.sum())
    elif ending == "json":
        rows = json.loads(path.read_text())
        assert "".join(row["text"] for row in rows) == "word by word " * 8
        count = len(rows)
    else:
        lines = path.read_text().splitlines()
        assert lines[0] == "example,position,token_id,text,waad,fai,receiver_fai,entropy"
        by_saved_groups = path.read_text()
        assert run("score", *words)[0] == 0
        assert path.read_text() != by_saved_groups
        count = len(lines) - 1
    assert f"Scores of {count} tokens" in out


def test_groups_of_other_layers_are_refused(run, model: str, tmp_path: Path) -> None:
    """Before the model is loaded if the layers are numbers, and with it if they are a name."""
    groups, path = tmp_path / "groups.safetensors", tmp_path / "scores.csv"
    words = ["--model", model, "--prompt", "Q", "--response", "word by word " * 8]
    assert run("heads", *words, "--layers", "0,2", "-o", str(groups))[0] == 0
    for layers, expected in (("1,2", 2), ("bottom third", 1)):
        code, _, err = run("score", *words, "--layers", layers, "--groups", str(groups), "-o", str(path))
        assert code == expected
        told = err.replace("\n", " ")
        assert all(fact in told for fact in ("tiny-llama", "layers 0, 2", "do not fit"))
        assert not path.exists()
    # Groups of some of the layers can be used where all were measured.
    assert run("score", *words, "--groups", str(groups), "-o", str(path))[0] == 0
    # Those of another model cannot.
    named = dataclasses.replace(HeadGroups.load(groups), model_name="another")
    named.save(groups)
    assert run("report", *words, "--groups", str(groups), "-o", str(path))[0] == 2


def test_doctor_tries_everything(run) -> None:
    code, out, _ = run("doctor")
    assert code == 0
    assert "transformers" in out
    assert "eager" in out
    assert "reads correctly" in out
    assert "misreads" not in out


def test_version(run) -> None:
    import attnprobe

    assert run("--version")[:2] == (0, attnprobe.__version__ + "\n")


# ---- options --------------------------------------------------------------------------------------


def test_window_horizon_lookback_groups_and_page_options_arrive(run, model: str, tmp_path: Path) -> None:
    groups, path = tmp_path / "groups.safetensors", tmp_path / "page.html"
    words = ["--model", model, "--prompt", "Q", "--response", "word by word " * 8, "--device", "cpu"]
    assert run("heads", *words, "--quantile", "0.1", "-o", str(groups))[0] == 0
    words += ["--groups", str(groups), "--window", "7", "--horizon"]
    code, out, _ = run(
        "report", *words, "3,end", "--lookback", "2", "--title", "A <title>", "--notes", "A note",
        "-o", str(path),
    )  # fmt: skip
    assert code == 0
    page = path.read_text()
    assert all(text in page for text in ("A &lt;title&gt;", "A note"))
    assert str(path) in out
    scores = tmp_path / "scores.safetensors"
    assert run("score", *words, "3,9", "-o", str(scores))[0] == 0
    provenance = TokenScores.load(scores).provenance
    assert (provenance.window, provenance.horizon) == (7, (3, 9))
    assert {len(heads) for heads in provenance.heads.values()} == {1, 12}


def test_prompt_and_response_come_from_files_or_standard_input(
    run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line break that ends a file is no part of its text."""
    prompt, scores = tmp_path / "prompt.txt", tmp_path / "scores.safetensors"
    prompt.write_bytes("Wie? \n\u00e4\r\n".encode())
    answer = b"word\n" * 12
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(answer)))
    words = ["--model", model, "--no-chat", "-o", str(scores)]
    code, _, _ = run("score", *words, "--prompt-file", str(prompt), "--response-file", "-")
    assert code == 0
    found = TokenScores.load(scores)
    assert found.texts is not None
    inside = found.response_mask[0].tolist()
    text = "".join(found.texts[0])
    response = "".join(t for t, is_in in zip(found.texts[0], inside, strict=True) if is_in)
    assert response == answer.decode()[:-1]
    assert text.removesuffix(response).endswith("Wie? \n\u00e4")


def test_another_dtype_gives_other_numbers(run, model: str, tmp_path: Path) -> None:
    words = ["score", "--model", model, "--response", "word by word " * 8, "-o"]
    found = []
    for dtype in ("auto", "float32", "bfloat16"):
        path = tmp_path / f"{dtype}.safetensors"
        assert run(*words, str(path), "--dtype", dtype)[0] == 0
        found.append(TokenScores.load(path).waad)
    assert torch.equal(found[0][:, -9:], found[1][:, -9:])
    assert not torch.equal(found[0][:, -9:], found[2][:, -9:])


def test_the_page_is_opened_if_asked(run, model: str, tmp_path: Path, monkeypatch) -> None:
    """In the browser of the environment; without one, a line says so."""
    path, opened = tmp_path / "a page.html", tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o700)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    monkeypatch.setattr("webbrowser._tryorder", None)
    words = ["--model", model, "--response", "word by word " * 8, "-o", str(path)]
    assert run("report", *words, "--open")[0] == 0
    assert opened.read_text() == f"file://{tmp_path}/a%20page.html\n"


def test_the_coloured_answer_in_the_terminal(run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without colours in a pipe, and with them where they are wanted; marks and texts are the same."""
    hostile = "\x1b[31mred\x9b [bold]and[/bold] " + "word by word " * 8
    words = ["report", "--text", "--model", model, "--prompt", "Q", "--response", hostile, "--color-by"]
    monkeypatch.setattr("attnprobe.cli.commands.out", Console(width=60))
    shown = {}
    for colour in ("waad", "fai", "entropy"):
        code, out, err = run(*words, colour)
        assert (code, err) == (0, "")
        assert "\x1b" not in out
        assert "\x9b" not in out
        unmarked = out.replace("\u25be", "").replace("\u25c6", "")
        assert unmarked.startswith("\u241b[31mred\u27e8009B\u27e9 [bold]and[/bold] word")
        assert "\u25be preplan  \u25c6 anchor" in out
        assert all(len(line) <= 60 for line in out.splitlines())
        shown[colour] = out
    assert shown["waad"] == shown["fai"] == shown["entropy"]
    told = re.search(r"(\d+) preplans, (\d+) anchors", shown["waad"])
    assert told is not None
    answer = shown["waad"].split("\u25be preplan")[0]
    assert (answer.count("\u25be"), answer.count("\u25c6")) == tuple(map(int, told.groups()))

    coloured = {}
    for colour in ("waad", "fai"):
        console = Console(force_terminal=True, color_system="truecolor", width=60)
        monkeypatch.setattr("attnprobe.cli.commands.out", console)
        code, coloured[colour], _ = run(*words, colour)
        assert code == 0
        assert "48;2;" in coloured[colour]
        plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured[colour])
        assert "no colour: undefined" in " ".join(plain.split())
        assert plain.split("\u25be preplan")[0].split() == answer.split()
    assert coloured["waad"] != coloured["fai"]


# ---- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["report", "--model", "/nowhere/model.gguf"], ["--model", "/nowhere/model.gguf"]),
        (["report", "--model", "/nowhere/model"], ["/nowhere/model", "folder"]),
        (["report", "-o", "/nowhere/page.html"], ["--output", "/nowhere"]),
        (["report", "-o", "/"], ["/", "folder"]),
        (["report", "--response", " "], ["--response", "empty"]),
        (["report", "--prompt", ""], ["--prompt", "empty"]),
        (["report", "--layers", "two"], ["--layers", "all", "middle", "two"]),
        (["heads", "--quantile", "0.9"], ["--quantile", "0.5", "0.9"]),
        (["heads", "--temperature", "inf"], ["--temperature", "inf"]),
        (["heads", "--seed", str(2**70)], ["--seed", str(2**70)]),
        (["heads", "--device", "abacus"], ["--device", "abacus"]),
        (["heads", "--device", "cuda:77"], ["--device", "cuda:77"]),
        (["heads", "--dtype", "int8"], ["--dtype", "bfloat16", "int8"]),
        (["score", "--horizon", "10"], ["--horizon", "10,100", "10,end"]),
        (["score", "--horizon", "9,5"], ["--horizon", "(9, 5)"]),
        (["report", "--window", "0"], ["--window"]),
        (["report", "--lookback", "0"], ["--lookback"]),
        (["score", "-o", "scores.xlsx"], [".csv", ".json", ".safetensors", "scores.xlsx"]),
        (["score", "--groups", "/nowhere/groups.safetensors"], ["--groups", "/nowhere/groups.safetensors"]),
        (["heads", "-o", "heads.xlsx"], [".csv", ".json", ".safetensors", "heads.xlsx"]),
        (["heads", "--prompt", "a", "--prompt-file", "b"], ["--prompt", "--prompt-file", "give one"]),
        (["heads", "--response-file", "/nowhere/a.txt"], ["--response-file", "/nowhere/a.txt"]),
        (["heads", "--prompt-file", "-", "--response-file", "-"], ["standard input"]),
        (["report", "--text", "-o", "page.html"], ["--output", "--text"]),
        (["report", "--text", "--title", ""], ["--title", "--text"]),
        (["report", "--text", "--open"], ["--open", "--text"]),
        (["report", "--text", "--color-by", "span"], ["--color-by", "waad", "span"]),
        (["report", "--color-by", "fai"], ["--color-by", "--text"]),
        (
            ["report", "--response", "a", "--max-new-tokens", "5"],
            ["--max-new-tokens", "nothing is generated"],
        ),
        (["score", "--response", "a", "--temperature", "0.7"], ["--temperature", "nothing is generated"]),
        (["heads", "--head-span", "far"], ["--head-span", "plain", "ignoring"]),
        (["report", "--nonsense"], ["--nonsense", "attnprobe report --help"]),
    ],
)
def test_wrong_usage_is_explained_before_the_work(
    run, model: str, words: list[str], facts: list[str]
) -> None:
    """Exit code 2, one line on standard error that names the option, no traceback."""
    code, out, err = run(*words, *([] if "--model" in words else ["--model", model]))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(fact in err for fact in facts)


def test_mistakes_are_explained_when_the_model_is_there(run, model: str, tmp_path: Path) -> None:
    """What only the model can say is an error of its own, not wrong usage."""
    path = tmp_path / "page.html"
    for words, facts in (
        (["--layers", "7"], ("[7]", "tiny-llama")),
        (["--max-new-tokens", "100000"], ("context",)),
    ):
        code, out, err = run("report", "--model", model, *words, "-o", str(path))
        assert (code, out) == (1, "")
        assert all(fact in err for fact in facts), err
        assert not path.exists()


def test_only_ours_is_printed(run, model: str, tmp_path: Path) -> None:
    """No bars, log lines or warnings of other libraries; progress only in a terminal."""
    path = tmp_path / "scores.csv"
    words = ["score", "--model", model, "--response", "word by word " * 8, "-o", str(path)]
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert out.startswith("Scores of")


@pytest.mark.parametrize(
    ("where", "options", "told"),
    [
        ("attnprobe.models.load_model", [], "nothing was written"),
        ("attnprobe.measure", [], "nothing was written"),
        ("attnprobe.Report.save", [], "nothing was written"),
        ("webbrowser.open", ["--open"], "kept: the page at"),
    ],
)
def test_an_interruption_says_what_was_kept(
    run, model: str, tmp_path: Path, monkeypatch, where: str, options: list[str], told: str
) -> None:
    """Exit code 130, a line, no traceback."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    path = tmp_path / "page.html"
    words = ["report", "--model", model, "--response", "word by word " * 8, "-o", str(path), *options]
    code, _, err = run(*words)
    assert code == 130
    assert f"interrupted; {told}" in err
    assert path.exists() == ("kept" in told)


@pytest.mark.parametrize(
    ("text", "layers"), [("all", "all"), ("middle", "middle"), ("3", [3]), ("0, 4-6", [0, 4, 5, 6])]
)
def test_layers(text: str, layers) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "1.5"])
def test_layers_that_are_none(text: str) -> None:
    with pytest.raises(ParameterError, match="layers"):
        parse_layers(text)


def test_it_runs_as_a_program() -> None:
    """As the installed command, outside the tests' process; an interruption is understood from the start."""
    program = [sys.executable, "-c", "import attnprobe_command; attnprobe_command.main()"]
    done = subprocess.run(
        [*program, "report", "--model", "/nowhere.gguf"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: Invalid value for --model: there is no model file at /nowhere.gguf")
    begun = subprocess.Popen([*program, "report"], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    # Long before torch is imported.
    time.sleep(0.3)
    begun.send_signal(signal.SIGINT)
    _, told = begun.communicate(timeout=60)
    if begun.returncode != -signal.SIGINT:  # Python itself was still starting.
        assert (begun.returncode, told) == (130, "interrupted; nothing was written\n")

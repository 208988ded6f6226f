"""The command line: what a person types, sees and gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnprobe import HeadGroups, TokenScores
from attnprobe.cli import main, parse_layers
from attnprobe.errors import ParameterError
from attnprobe.testing.tiny_models import tiny_model, tiny_tokenizer


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
    groups, path = tmp_path / "groups.safetensors", tmp_path / "scores.csv"
    words = ["--model", model, "--prompt", "Q", "--response", "word by word " * 8]
    assert run("heads", *words, "--layers", "0,2", "-o", str(groups))[0] == 0
    code, _, err = run("score", *words, "--layers", "1,2", "--groups", str(groups), "-o", str(path))
    assert code == 1
    told = err.replace("\n", " ")
    assert all(fact in told for fact in ("tiny-llama", "layers 0, 2", "layers 1-2"))
    assert not path.exists()
    # Groups of some of the layers can be used where all were measured.
    assert run("score", *words, "--groups", str(groups), "-o", str(path))[0] == 0


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


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["report", "--model", "/nowhere/model.gguf"], ["/nowhere/model.gguf"]),
        (["report", "--model", "/nowhere/model"], ["/nowhere/model", "folder"]),
        (["report", "-o", "/nowhere/page.html"], ["/nowhere"]),
        (["report", "-o", "/"], ["/", "folder"]),
        (["report", "--response", " "], ["response", "empty"]),
        (["report", "--layers", "two"], ["layers", "all", "middle", "two"]),
        (["heads", "--quantile", "0.9"], ["quantile", "0.5", "0.9"]),
        (["heads", "--temperature", "inf"], ["temperature", "inf"]),
        (["heads", "--seed", str(2**70)], ["seed", str(2**70)]),
        (["score", "-o", "scores.xlsx"], [".csv", ".json", ".safetensors", "scores.xlsx"]),
        (["score", "--groups", "/nowhere/groups.safetensors"], ["/nowhere/groups.safetensors"]),
        (["heads", "-o", "heads.xlsx"], [".csv", ".json", ".safetensors", "heads.xlsx"]),
    ],
)
def test_mistakes_are_explained_before_the_work(run, words: list[str], facts: list[str]) -> None:
    """Exit code 1, one line on standard error, no traceback."""
    code, out, err = run(*words)
    assert code == 1
    assert out == ""
    assert err.startswith("error: ") or "\nerror: " in err
    assert all(fact in err.replace("\n", " ") for fact in facts)
    assert "Traceback" not in err
    assert "Loading" not in err or "--model" in words


def test_mistakes_are_explained_when_the_model_is_there(run, model: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    code, _, err = run("report", "--model", model, "--layers", "7", "-o", str(path))
    assert code == 1
    assert "[7]" in err
    assert "tiny-llama" in err
    assert not path.exists()


def test_wrong_usage_exits_with_two(run) -> None:
    assert run("report", "--nonsense")[0] == 2
    assert run("report", "--max-new-tokens", "0")[0] == 2


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
    """The installed script, with nothing of the tests' own process."""
    script = Path(sys.executable).parent / "attnprobe"
    done = subprocess.run(
        [script, "report", "--model", "/nowhere.gguf"], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") or "error: there is no model" in done.stderr

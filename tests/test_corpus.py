"""Scoring a corpus: what is read, what is rejected, and that the scores are those of each row by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnprobe
from attnprobe import HeadGroups, ModelLoadError, ParameterError, ResultError, adapter_for, classify_heads
from attnprobe.batch_run import LEAST_BUSY, MOST_PADDING
from attnprobe.corpus import Columns, CorpusSettings, RowScorer, report_row, score
from attnprobe.corpus.batching import Budget, micro_batches
from attnprobe.corpus.rows import Row
from attnprobe.corpus.sources import open_source
from attnprobe.rl import CoupledRhythmCredit
from attnprobe.testing.tiny_models import tiny_model, tiny_tokenizer
from tests.corpus_input import BAD_LINES, SETTINGS, rows, scored_by_hand, write_lines

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=300)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def lines_of(folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Return all rows of a folder of scores."""
    lines: list[dict[str, Any]] = attnprobe.load_scores(folder).to_arrow(**options).to_pylist()
    return lines


def assert_scored(lines: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for line, hand in zip(lines, expected, strict=True):
        for name, values in hand.items():
            if values is None:
                assert line[name] is None
            else:
                found = torch.tensor(line[name], dtype=values.dtype)
                torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


@pytest.mark.parametrize("receivers", [False, True])
def test_scores_are_those_of_each_row_by_itself(model, tmp_path: Path, receivers: bool) -> None:
    """Whatever runs together, and by the heads of all rows: the first pass keeps only sums."""
    corpus = rows(23)
    settings = CorpusSettings(horizon=(2, 20), receivers=receivers, credit=CoupledRhythmCredit())
    run = score(
        write_lines(tmp_path / "in.jsonl", corpus), tmp_path / "out", model=model, settings=settings,
        rows_per_shard=10, token_budget=100,
    )  # fmt: skip
    assert (run.rows, run.rejected, run.continued) == (23, 0, 0)
    assert run.tokens == sum(len(row["prompt_ids"]) + len(row["response_ids"]) for row in corpus)
    lines = lines_of(tmp_path / "out")
    assert [line["row"] for line in lines] == list(range(23))
    assert [line["id"] for line in lines] == [row["id"] for row in corpus]
    assert [line["tokens"] for line in lines] == [row["response_ids"] for row in corpus]
    assert_scored(lines, scored_by_hand(model, corpus, settings))
    assert all(len(line["gamma"]) == len(line["tokens"]) for line in lines)
    assert max(max(line["gamma"]) for line in lines) > 1


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen3_next"])
def test_other_families_are_scored_too(family: str, tmp_path: Path) -> None:
    """Windows, sinks, and layers without attention."""
    corpus = [
        {**row, **{key: [t % 90 + 1 for t in row[key]] for key in ("prompt_ids", "response_ids")}}
        for row in rows(5)
    ]
    other = tiny_model(family)
    score(write_lines(tmp_path / "in.jsonl", corpus), tmp_path / "out", model=other, settings=SETTINGS)
    assert_scored(lines_of(tmp_path / "out"), scored_by_hand(other, corpus, SETTINGS))


def test_bad_rows_are_rejected_with_their_reason(model, tokenizer, tmp_path: Path, capsys) -> None:
    """Each in the midst of good ones, which are scored; blank lines are no rows."""
    good = {"prompt": "Read", "response": "what the model reads"}
    lines = [part for bad in BAD_LINES for part in (good, b"  ", bad)]
    run = score(
        write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out", model=model, tokenizer=tokenizer,
        settings=SETTINGS, rows_per_shard=7, progress=True,
    )  # fmt: skip
    assert capsys.readouterr().err.count(f" {len(lines)}/{len(lines)} ") == 2
    assert (run.rows, run.rejected) == (2 * len(BAD_LINES), len(BAD_LINES))
    rejected = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [line["row"] for line in rejected] == list(range(2, 3 * len(BAD_LINES), 3))
    for line, reason in zip(rejected, BAD_LINES.values(), strict=True):
        assert line["reason"].startswith(reason), line
    everything = lines_of(tmp_path / "out", rejected=True)
    assert [line["row"] for line in everything if line["rejected"] is None] == list(
        range(0, 3 * len(BAD_LINES), 3)
    )
    first, *others = (torch.tensor(line["waad"]) for line in everything if line["rejected"] is None)
    assert all(torch.allclose(first, other, atol=1e-6) for other in others)


def test_rows_that_the_model_cannot_read_are_rejected_one_by_one(tmp_path: Path) -> None:
    """A token whose embedding is not finite spoils its own row only."""
    broken = tiny_model("llama", vocab_size=300)
    with torch.no_grad():
        broken.get_input_embeddings().weight[299] = torch.nan
    corpus = rows(6)
    corpus[2]["response_ids"][1] = 299
    run = score(write_lines(tmp_path / "in.jsonl", corpus), tmp_path / "out", model=broken, settings=SETTINGS)
    assert run.rejected == 1
    (line,) = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "r2"
    assert "the model cannot read it" in json.loads(line)["reason"]
    del corpus[2]
    assert_scored(lines_of(tmp_path / "out"), scored_by_hand(broken, corpus, SETTINGS))


def test_rows_that_do_not_fit_into_memory_run_in_halves(tmp_path: Path) -> None:
    """The last resort where an estimate was too low; a row that does not fit alone is rejected."""
    small = tiny_model("llama", vocab_size=300)
    longest = 50

    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].numel() > longest:
            raise torch.OutOfMemoryError("out of memory")

    corpus = rows(8)
    corpus[5]["response_ids"] = [1] * 60
    small.model.register_forward_pre_hook(refuse, with_kwargs=True)
    run = score(write_lines(tmp_path / "in.jsonl", corpus), tmp_path / "out", model=small, settings=SETTINGS)
    assert [json.loads(x)["row"] for x in (run.folder / "rejected.jsonl").read_text().splitlines()] == [5]
    del corpus[5]
    small.model._forward_pre_hooks.clear()
    small.model._forward_pre_hooks_with_kwargs.clear()
    assert_scored(lines_of(tmp_path / "out"), scored_by_hand(small, corpus, SETTINGS))


def test_all_forms_of_a_row_have_the_same_scores(model, tokenizer, tmp_path: Path) -> None:
    """Text, turns, chats and ids, under any names, in JSON lines, Parquet and a saved data set."""
    import pyarrow
    from pyarrow import parquet

    turns = [{"role": "user", "content": "Read"}]
    answer = "what the model reads"
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = {
        "p": tokenizer(prompt, add_special_tokens=False)["input_ids"],
        "r": tokenizer(answer, add_special_tokens=False)["input_ids"],
    }
    forms = [
        ([{"prompt": prompt, "response": answer}], {}, {}),
        ([{"prompt": turns, "response": answer}], {}, {}),
        ([{"prompt": turns, "response": [{"role": "assistant", "content": answer}]}], {}, {}),
        ([{"chat": turns, "text": answer}], {"messages": "chat", "response": "text"}, {}),
        ([{"messages": [*turns, {"role": "assistant", "content": answer}]}], {}, {}),
        ([ids], {"prompt_ids": "p", "response_ids": "r"}, {}),
        ([{"prompt": "Read", "response": answer}], {}, {"chat": True}),
    ]
    found = []
    for number, (corpus, names, options) in enumerate(forms):
        place = tmp_path / str(number)
        table = pyarrow.Table.from_pylist(corpus * 3)
        parquet.write_table(table, place.with_suffix(".parquet"), row_group_size=2)
        (tmp_path / f"set{number}").mkdir()
        with pyarrow.ipc.new_stream(str(tmp_path / f"set{number}/data.arrow"), table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
        state = json.dumps({"_data_files": [{"filename": "data.arrow"}]})
        (tmp_path / f"set{number}/state.json").write_text(state)
        write_lines(place.with_suffix(".jsonl"), corpus * 3)
        inputs = [place.with_suffix(".jsonl"), place.with_suffix(".parquet"), tmp_path / f"set{number}"]
        for source in inputs if number in (0, 4, 5) else inputs[:1]:
            settings = CorpusSettings(horizon=(2, 20), **options)
            score(
                source, f"{place}-{source.suffix}", model=model, tokenizer=tokenizer, settings=settings,
                columns=Columns(**names), rows_per_shard=2,
            )  # fmt: skip
            found += [lines_of(Path(f"{place}-{source.suffix}"))]
    assert len(found) == 13
    assert all(str(lines) == str(found[0]) for lines in found)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 20])
def test_windows_may_be_read_in_any_order(tmp_path: Path, size: int) -> None:
    """And over the ends of files and of row groups."""
    import pyarrow
    from pyarrow import parquet

    numbers = [{"n": number} for number in range(11)]
    for index, part in enumerate((numbers[:4], numbers[4:5], numbers[5:])):
        for kind in ("lines", "tables"):
            (tmp_path / kind).mkdir(exist_ok=True)
        write_lines(tmp_path / f"lines/{index}.jsonl", part)
        parquet.write_table(
            pyarrow.Table.from_pylist(part), tmp_path / f"tables/{index}.parquet", row_group_size=2
        )
    for kind in ("lines", "tables"):
        source = open_source(tmp_path / kind, size)
        assert source.row_count == 11
        for order in (range(source.window_count), reversed(range(source.window_count)), [0, 0]):
            for window in order:
                expected = numbers[window * size : (window + 1) * size]
                read = source.window(window)
                assert [row.values for row in read] == expected
                assert [row.number for row in read] == [row["n"] for row in expected]


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    """As `datasets` itself writes it, in several files; all of its splits together are refused."""
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list([{"n": number, "text": "é"} for number in range(11)])
    saved.filter(lambda row: row["n"] != 4).save_to_disk(tmp_path / "set", num_shards=3)
    source = open_source(tmp_path / "set", 4)
    assert [row.values["n"] for w in range(3) for row in source.window(w)] == [0, 1, 2, 3, *range(5, 11)]
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ResultError, match="several splits: name the folder of one of test, train"):
        open_source(tmp_path / "splits")


def test_an_input_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/dataset_dict.json").write_text("{}")
    for name, told in (
        ("empty.jsonl", "has no rows"),
        ("missing.jsonl", "there is no input"),
        ("broken.parquet", "damaged"),
        ("splits", "several splits"),
        (".", "no .jsonl|must be"),
        ("table.csv", "there is no input"),
    ):
        if name == ".":
            (tmp_path / "nothing").mkdir()
            name, told = "nothing", "holds no .jsonl"
        with pytest.raises(ResultError, match=told):
            open_source(tmp_path / name)


def test_no_file_of_a_folder_is_left_out_in_silence(tmp_path: Path) -> None:
    """Whatever would not be read is named; what is clearly no rows may lie there, and marks are no rows."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_lines(folder / "a.jsonl", [b'\xef\xbb\xbf{"n": 0}', b"\xef\xbb\xbf", {"n": 1}])
    write_lines(folder / "b.JSONL", [{"n": 2}])
    write_lines(folder / "c.ndjson", [{"n": 3}])
    (folder / "scores").mkdir()
    for name in ("README.md", ".gitattributes", "_SUCCESS", "scores/.lock"):
        (folder / name).touch()
    assert [row.values for row in open_source(folder, 10).window(0)] == [{"n": n} for n in range(4)]
    for name, told in (
        ("d.parquet", r"several kinds \(a.jsonl, d.parquet\)"),
        ("d.jsonl.gz", r"holds d.jsonl.gz, which would not be read"),
        ("d.json", r"holds d.json, which"),
        ("more/d.jsonl", r"holds more, which"),
        ("more.jsonl/d.jsonl", r"holds more.jsonl, which"),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
        with pytest.raises(ResultError, match=told):
            open_source(folder)
        (folder / name).unlink()
        if "/" in name:
            (folder / name).parent.rmdir()


@pytest.mark.parametrize("groups", ["corpus", 2])
def test_a_run_that_read_no_row_says_why_and_may_be_begun_anew(
    model, tokenizer, tmp_path: Path, groups: Any
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"question": "Read", "answer": "what it reads"}] * 3)
    options: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "groups": groups}
    with pytest.raises(
        ResultError, match=r"no row could be read, .* row \d: missing field: prompt; the row has"
    ):
        score(source, tmp_path / "out", **options)
    columns = Columns(prompt="question", response="answer")
    assert score(source, tmp_path / "out", columns=columns, **options).rows == 3
    with pytest.raises(ResultError, match=r"columns\.prompt"):
        score(source, tmp_path / "out", **options)


@pytest.mark.parametrize(
    "columns", [{"keep": ["ok", "corect"]}, {"id": "corect"}, {"response_ids": "corect"}]
)
def test_a_field_that_no_row_has_is_refused_before_anything_is_loaded(tmp_path: Path, columns: Any) -> None:
    """One that some row has, however late, is not."""
    lines = [{"n": number} for number in range(5)]
    source = write_lines(tmp_path / "in.jsonl", lines)
    with pytest.raises(ParameterError, match=r"has the field 'corect.*'; there are n"):
        score(source, tmp_path / "out", model="no model", columns=Columns(**columns), rows_per_shard=2)
    source = write_lines(tmp_path / "in.jsonl", [*lines, {"corect": 1, "ok": None}])
    with pytest.raises(ModelLoadError):
        score(source, tmp_path / "out", model="./no model", columns=Columns(**columns), rows_per_shard=2)


def test_rows_of_ids_need_no_tokenizer(model, tmp_path: Path) -> None:
    """Nor does a model that is saved without one; the report of a row finds it again."""
    model.save_pretrained(tmp_path / "model")
    source = write_lines(tmp_path / "in.jsonl", rows(3))
    folder = score(source, tmp_path / "out", model=tmp_path / "model", dtype="bfloat16").folder
    assert report_row(attnprobe.load_scores(folder), 1).is_file()
    text = write_lines(tmp_path / "text.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(ParameterError, match="or a model that is saved with one"):
        score(text, tmp_path / "text", model=tmp_path / "model")


def test_what_identifies_a_row_is_a_text_or_a_number(model, tmp_path: Path) -> None:
    """And what is kept is JSON that every reader takes."""
    names: list[Any] = ["a", 7, 7.5, None, float("nan"), True, [1], {"a": 1}]
    lines = [
        {"id": name, "prompt_ids": [1], "response_ids": [2, 3], "n": [float("nan"), {"x": name}]}
        for name in names
    ]
    source = write_lines(tmp_path / "in.jsonl", lines)
    score(source, tmp_path / "out", model=model, settings=SETTINGS, columns=Columns(keep="n"))
    found = lines_of(tmp_path / "out", rejected=True)
    assert [line["id"] for line in found] == ["a", "7", "7.5", *[None] * 5]
    assert [line["rejected"] is None for line in found] == [True] * 5 + [False] * 3
    assert found[5]["rejected"] == "wrong type: id must be a text or a number; got True"
    assert "NaN" not in "".join(line["kept"] for line in found)
    assert json.loads(found[1]["kept"]) == {"n": [None, {"x": 7}]}


def test_groups_may_be_given_saved_or_of_a_sample(model, tmp_path: Path) -> None:
    corpus = rows(12)
    source = write_lines(tmp_path / "in.jsonl", corpus)

    def run(name: str, **options: Any) -> HeadGroups:
        return score(
            source, tmp_path / name, model=model, settings=SETTINGS, rows_per_shard=5, **options
        ).groups

    whole = run("corpus")
    statistics = (attnprobe.measure(model, [row["prompt_ids"] + row["response_ids"]]) for row in corpus)
    assert whole.quantile == classify_heads(statistics).quantile
    assert run("sample of all", groups=100) == whole
    sample = run("sample", groups=4, seed=1)
    assert (tmp_path / "sample/stability.safetensors").is_file()
    assert not bool((sample.span == whole.span).all())
    saved = run("saved", groups=sample.save(tmp_path / "groups.safetensors"))
    assert saved == sample == run("given", groups=sample)
    assert str(lines_of(tmp_path / "saved")) == str(lines_of(tmp_path / "given"))
    only = run("only", groups_only=True)
    assert only == whole
    assert lines_of(tmp_path / "only") == []
    assert run("only") == whole
    assert str(lines_of(tmp_path / "only")) == str(lines_of(tmp_path / "corpus"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"receivers": True}, "receivers are asked for, but the groups have none"),
        ({"layers": [0]}, r"layers are \[0\], but those of the groups are \[0, 1\]"),
        ({"head_quantile": 0.1}, "head_quantile is 0.1, but that of the groups is 0.25"),
        ({"head_span": "ignoring"}, "made by plain spans"),
    ],
)
def test_settings_that_saved_groups_contradict_are_refused(
    model, tmp_path: Path, settings: Any, told: str
) -> None:
    """Whatever asks for another grouping is not passed over: in a run and in a stage."""
    statistics = attnprobe.measure(model, rows(1)[0]["response_ids"], layers=[0, 1])
    groups = classify_heads(statistics, quantile=0.25)
    source = write_lines(tmp_path / "in.jsonl", rows(2))
    with pytest.raises(ParameterError, match=told):
        score(source, tmp_path / "out", model=model, groups=groups, settings=CorpusSettings(**settings))
    stage = RowScorer(model, groups, settings=CorpusSettings(**settings))
    with pytest.raises(ParameterError, match=told):
        stage({"prompt_ids": [[1]], "response_ids": [[2, 3]]})
    agreed = CorpusSettings(layers=[0, 1], head_quantile=0.25)
    score(source, tmp_path / "out", model=model, groups=groups, settings=agreed)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"groups": 1}, 'groups must be "corpus"'),
        ({"groups": None}, 'groups must be "corpus"'),
        ({"rows_per_shard": 0}, "rows_per_shard"),
        ({"token_budget": 0}, "token_budget"),
        ({"settings": {"window": 3}}, "settings"),
        ({"columns": "prompt"}, "columns"),
    ],
)
def test_wrong_arguments_are_refused(model, tmp_path: Path, options: Any, told: str, as_users_call) -> None:
    source = write_lines(tmp_path / "in.jsonl", rows(2))
    with pytest.raises(ParameterError, match=told):
        score(source, tmp_path / "out", model=model, **options)
    assert not (tmp_path / "out").exists()


def test_rows_of_text_need_a_tokenizer(model, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(ParameterError, match="need a tokenizer"):
        score(source, tmp_path / "out", model=model)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 100)), min_size=1, max_size=60),
    st.integers(1, 400),
)
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: Any, tokens: int) -> None:
    """And no more padding than is allowed, in all that are not small."""
    corpus = [Row(i, prompt=(1,) * p, response=(1,) * r) for i, (p, r) in enumerate(lengths)]
    corpus.append(Row(len(corpus), rejected="bad"))
    together = micro_batches(corpus, ADAPTER, Budget(tokens=tokens), entropy=True)
    assert sorted(place for part in together for place in part) == list(range(len(lengths)))
    for part in together:
        widths = [corpus[place].length for place in part]
        assert len(part) == 1 or max(widths) * len(part) <= tokens
        assert widths == sorted(widths)
        if sum(widths[:-1]) >= LEAST_BUSY * tokens:
            assert sum(widths) >= (1 - MOST_PADDING) * max(widths) * len(part) - 1e-9


ADAPTER = adapter_for(tiny_model("llama", vocab_size=300))


def test_one_long_row_does_not_shrink_all_batches() -> None:
    """The memory of a batch is that of its own longest row, not of the window's."""
    corpus = [Row(i, response=(1,) * length) for i, length in enumerate([10] * 40 + [200])]
    each = ADAPTER.activation_bytes + 4 * ADAPTER.vocabulary_size
    together = micro_batches(corpus, ADAPTER, Budget(memory=250 * each), entropy=True)
    assert [len(part) for part in together] == [25, 15, 1]

"""The raw data of the study, which is committed: small, and enough for every number on the page.

`write` makes the files after the model has run, and `read` gives them back as what the estimates need,
without a model. What is left to others: running models (measure, __main__), and the numbers (estimates).

- `responses.jsonl`: the answers, as text and ids.
- `answers.parquet`: a line for each measured answer: its problem, the template of the problem, its length.
- `tokens.parquet`: a line for each response token: its scores under every choice of heads.
- `heads.parquet`: a line for each answer and head: what heads are ranked by.
- `random_heads.parquet`: a line for each draw of random heads: the couplings under it.
- `perturbations.parquet`: a line for each continuation, without its text.
- `knockouts.parquet`: a line for each token that was knocked out.
- `knockout_fai.parquet`: the FAI of the drawn ones for all heads, and for each draw of random heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pandas
import torch

import attnprobe
from attnprobe.analysis.coupling_results import NAMES
from attnprobe.analysis.knockout_trials import Knockout
from attnprobe.analysis.random_heads import RandomHeads
from attnprobe.analysis.trials import Continuation, Trial
from attnprobe.progress import progress_bar
from experiments.rhythm.choices import RANDOM_HEADS, groups_of, scores_of
from experiments.rhythm.measure import Measured
from experiments.rhythm.problems import template_of
from experiments.rhythm.records import read_records

DRAWS = 2000
"""How many times peaks are moved, and heads drawn."""

FAI_DRAWS = 200
"""How many groups of random heads the FAI of knocked-out tokens is compared with."""

_SCORES = ("waad", "fai", "receiver_fai")


# ---- writing ----------------------------------------------------------------------------------------


def write(measured: Measured, folder: Path, *, draws: int = DRAWS) -> None:
    """Write what can be known from the statistics of the heads."""
    _write(_answers(measured), folder / "answers.parquet")
    _write(_tokens(measured), folder / "tokens.parquet")
    _write(_heads(measured), folder / "heads.parquet")
    _write(_random_heads(measured, draws), folder / "random_heads.parquet")


def write_trials(
    problems: Sequence[int], trials: attnprobe.Perturbations | attnprobe.Knockouts, path: Path
) -> None:
    """Write perturbations, or knock-outs, without the texts of continuations."""
    table = trials.to_pandas().drop(columns="continuation", errors="ignore")
    table["problem"] = [problems[example] for example in table.pop("example")]
    _write(table, path)


def write_knockout_fai(
    measured: Measured, knockouts: attnprobe.Knockouts, path: Path, *, draws: int = FAI_DRAWS
) -> None:
    """Write the FAI of the drawn tokens for all heads, and for random heads as many as are global.

    The draw -1 stands for all heads.
    """
    statistics, heads = groups_of(measured)["main"]
    random_heads = RandomHeads.draw(
        statistics, {"local": heads.local, "global": heads.global_}, draws, seed=0
    )
    everyone = attnprobe.score_tokens(statistics, "all").fai
    places: dict[int, list[tuple[int, int]]] = {}
    for trial in knockouts.trials:
        if trial.kind == "drawn" and trial.mode == knockouts.trials[0].mode:
            places.setdefault(trial.example, []).append((trial.position, trial.response_position))
    tables = []
    for example, tokens in places.items():
        drawn = torch.cat([scores.fai for scores in random_heads.scores(statistics, example)])
        whole = torch.cat([everyone[example][None].cpu().double(), drawn])
        for position, response_position in tokens:
            table = pandas.DataFrame({"draw": range(-1, draws), "fai": whole[:, position].numpy()})
            tables.append(
                table.assign(problem=measured.problems[example], response_position=response_position)
            )
    _write(pandas.concat(tables, ignore_index=True), path)


def _write(table: pandas.DataFrame, path: Path) -> None:
    scored = table.select_dtypes("float64").columns
    table[scored] = table[scored].astype("float32")
    table.to_parquet(path, compression="zstd", index=False)


def _answers(measured: Measured) -> pandas.DataFrame:
    return pandas.DataFrame(
        {
            "problem": measured.problems,
            "template": [template_of(problem) for problem in measured.problems],
            "tokens": measured.batch.response_mask.sum(-1).numpy(),
        }
    )


def _tokens(measured: Measured) -> pandas.DataFrame:
    place = measured.batch.response_mask.nonzero()
    problems = numpy.array(measured.problems)
    columns: dict[str, Any] = {}
    for choice, scores in scores_of(measured):
        if choice == "main":
            table = scores.to_pandas(measured.batch)
            columns["problem"] = problems[table["example"]]
            columns["response_position"] = table.groupby("example").cumcount()
            columns |= {name: table[name] for name in ("position", "token_id", "text", "entropy")}
        for name in _SCORES:
            values = getattr(scores, name)
            if values is None:
                continue
            found = values[place[:, 0], place[:, 1]].float().numpy()
            known = columns.get(f"main.{name}")
            # What is the same as under the main choice is stored once.
            if known is None or not numpy.array_equal(found, known, equal_nan=True):
                columns[f"{choice}.{name}"] = found
    return pandas.DataFrame(columns)


def _heads(measured: Measured) -> pandas.DataFrame:
    end, near = measured.statistics["end"], measured.statistics["near"]
    measures = {
        "span": end.span,
        "span_ignoring": end.span_ignoring,
        "share_on_first": end.share("first"),
        "receiver_kurtosis": end.receiver_kurtosis,
        "receiver_gini": end.receiver_gini,
        "sentence_kurtosis": near.receiver_kurtosis,
    }
    place = torch.ones_like(end.span).nonzero()
    example, layer, head = place.unbind(1)
    columns: dict[str, Any] = {
        "problem": numpy.array(measured.problems)[example.numpy()],
        "layer": torch.tensor(end.layers)[layer].numpy(),
        "head": head.numpy(),
    }
    for name, values in measures.items():
        columns[name] = values[example, layer, head].float().numpy()
    return pandas.DataFrame(columns)


def _random_heads(measured: Measured, draws: int) -> pandas.DataFrame:
    tables = []
    chosen = {name: found for name, found in groups_of(measured).items() if name in RANDOM_HEADS}
    with progress_bar("drawing heads", len(chosen), shown=True) as advance:
        for choice, (statistics, heads) in chosen.items():
            result = attnprobe.couplings(statistics, heads, null="heads", draws=draws)
            for name in NAMES:
                coupling = getattr(result, name)
                tables.append(
                    pandas.DataFrame(
                        {
                            "choice": choice,
                            "coupling": name,
                            "draw": range(draws),
                            "value": coupling.null_values.numpy(),
                            "position_lift": coupling.null_position_lifts.numpy(),
                        }
                    )
                )
            advance()
    return pandas.concat(tables, ignore_index=True)


# ---- reading ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """The raw data of one model; the answers are numbered in the order of `answers`."""

    answers: pandas.DataFrame
    tokens: pandas.DataFrame
    heads: pandas.DataFrame
    random_heads: pandas.DataFrame
    perturbations: attnprobe.Perturbations
    knockouts: attnprobe.Knockouts
    knockout_fai: pandas.DataFrame

    @property
    def templates(self) -> list[int]:
        """The template of each answer's problem."""
        return [int(template) for template in self.answers["template"]]

    def scores(self, choice: str = "main") -> attnprobe.TokenScores:
        """Return the token scores of all answers under a choice, without their prompts."""
        example, position = self._place()
        shape = (len(self.answers), int(position.max()) + 1)

        def spread(column: str, fill: float = torch.nan) -> torch.Tensor:
            values = torch.full(shape, fill)
            values[example, position] = torch.tensor(self.tokens[column].to_numpy(), dtype=values.dtype)
            return values

        columns = {name: f"{choice}.{name}" for name in _SCORES}
        known = {
            name: column if column in self.tokens else f"main.{name}" for name, column in columns.items()
        }
        ids = torch.zeros(shape, dtype=torch.long)
        ids[example, position] = torch.tensor(self.tokens["token_id"].to_numpy())
        texts = [[""] * shape[1] for _ in range(shape[0])]
        for row, column, text in zip(example.tolist(), position.tolist(), self.tokens["text"], strict=True):
            texts[row][column] = text
        inside = torch.zeros(shape, dtype=torch.bool)
        inside[example, position] = True
        return attnprobe.TokenScores(
            waad=spread(known["waad"]),
            fai=spread(known["fai"]),
            entropy=spread("entropy"),
            receiver_fai=spread(known["receiver_fai"]),
            response_mask=inside,
            input_ids=ids,
            texts=tuple(map(tuple, texts)),
        )

    def head_values(self, name: str) -> torch.Tensor:
        """Return what heads are ranked by, `[answer, layer, head]`."""
        shape = (len(self.answers), self.heads["layer"].nunique(), self.heads["head"].nunique())
        return torch.tensor(self.heads[name].to_numpy()).reshape(shape)

    def _place(self) -> tuple[torch.Tensor, torch.Tensor]:
        number = {problem: index for index, problem in enumerate(self.answers["problem"])}
        example = torch.tensor([number[problem] for problem in self.tokens["problem"]])
        return example, torch.tensor(self.tokens["response_position"].to_numpy())


def read(folder: Path) -> Raw:
    """Return the raw data of one model."""
    names = ("answers", "tokens", "heads", "random_heads", "knockout_fai")
    tables = {name: pandas.read_parquet(folder / f"{name}.parquet") for name in names}
    number = {problem: index for index, problem in enumerate(tables["answers"]["problem"])}
    return Raw(
        **tables,
        perturbations=_perturbations(pandas.read_parquet(folder / "perturbations.parquet"), number),
        knockouts=_knockouts(pandas.read_parquet(folder / "knockouts.parquet"), number),
    )


def of_responses(folder: Path) -> dict[str, Any]:
    """Return what the answers themselves say: how many there are, and how many are right."""
    records = read_records(folder / "responses.jsonl")
    return {"asked": len(records), "right": sum(record["right"] for record in records)}


def _perturbations(table: pandas.DataFrame, number: dict[int, int]) -> attnprobe.Perturbations:
    trials = []
    for (problem, kind, position), lines in table.groupby(["problem", "kind", "position"], sort=False):
        lines = lines.sort_values("rank")
        continuations = [
            Continuation(
                token=int(line["token_id"]),
                probability=float(line["probability"]),
                text="",
                overlap=float(line["overlap"]),
                greedy_overlap=float(line["greedy_overlap"]),
            )
            for _, line in lines.iterrows()
        ]
        first = lines.iloc[0]
        trials.append(
            Trial(
                example=number[problem],
                digest=str(problem),
                kind=kind,
                position=int(position),
                response_position=int(first["response_position"]),
                length=int(first["length"]),
                fai=float(first["fai"]),
                token=continuations[0].token,
                own=continuations[0],
                others=tuple(continuations[1:]),
            )
        )
    return attnprobe.Perturbations(tuple(trials), {})


def _knockouts(table: pandas.DataFrame, number: dict[int, int]) -> attnprobe.Knockouts:
    trials = tuple(
        Knockout(
            example=number[line["problem"]],
            digest=str(line["problem"]),
            kind=line["kind"],
            position=int(line["position"]),
            response_position=int(line["response_position"]),
            length=int(line["length"]),
            fai=float(line["fai"]),
            mode=line["mode"],
            divergence=float(line["divergence"]),
        )
        for _, line in table.iterrows()
    )
    return attnprobe.Knockouts(trials, {})

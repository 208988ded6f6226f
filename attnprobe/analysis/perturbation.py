"""What happens when a token is replaced: the perturbation of Table 1 of arXiv 2510.13554.

At a response's positions of highest and of lowest FAI, the likeliest other tokens are forced, one after
the other, and the model goes on greedily from each. If a token is an anchor, replacing it should change
more of what follows. What is left to others: FAI (scores), and what makes two texts alike
(content_words).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from attnprobe.analysis.bootstrap import Estimate, ratio_estimate
from attnprobe.analysis.content_words import content_overlap
from attnprobe.analysis.forced_tokens import check_generates, force_tokens
from attnprobe.batch import TokenBatch
from attnprobe.errors import ParameterError, ResultError
from attnprobe.progress import progress_bar
from attnprobe.scores import TokenScores
from attnprobe.storage import check_writable, import_pandas, library_versions, write_atomically

if TYPE_CHECKING:
    import pandas

Kind = Literal["highest", "lowest"]
Reference = Literal["response", "greedy"]


@dataclass(frozen=True)
class Rollout:
    """What the model wrote after a forced token.

    Attributes:
        token: the forced token's id.
        probability: what the model gave it there, at temperature 1.
        text: the greedy continuation, without the forced token.
        overlap: of its content words with those of the response's own continuation, in `[0, 1]`.
        greedy_overlap: with those of the greedy continuation of the response's own token.
    """

    token: int
    probability: float
    text: str
    overlap: float
    greedy_overlap: float


@dataclass(frozen=True)
class Trial:
    """One position of one response, with the tokens that were forced there.

    Attributes:
        example: the row of the batch.
        digest: of the row's token ids: what tells one text from another in a file of trials.
        kind: whether the position's FAI is among the highest or the lowest.
        position: where in the response, from 0.
        length: of the response, in tokens.
        fai: at the position.
        token: the response's own token there.
        own: the rollout of that token: how far a greedy continuation is from the sampled one.
        rollouts: those of the other candidates, the likeliest first.
    """

    example: int
    digest: str
    kind: Kind
    position: int
    length: int
    fai: float
    token: int
    own: Rollout
    rollouts: tuple[Rollout, ...]

    def overlap(self, reference: Reference = "response") -> float:
        """Return the mean overlap over the rollouts of the other candidates."""
        name = "overlap" if reference == "response" else "greedy_overlap"
        total: float = sum(getattr(rollout, name) for rollout in self.rollouts)
        return total / len(self.rollouts)


@dataclass(frozen=True)
class PerturbationSummary:
    """Table 1 of arXiv 2510.13554: mean overlaps, with bootstrap intervals over responses.

    Attributes:
        highest, lowest: the mean overlap after a token of highest, of lowest FAI was replaced.
        difference: highest less lowest; below 0 if anchors matter more.
        lower_share: the share of responses whose overlap is lower at the highest FAI; ties count half.
        responses: how many have positions of both kinds.
    """

    highest: Estimate
    lowest: Estimate
    difference: Estimate
    lower_share: Estimate
    responses: int


@dataclass(frozen=True)
class Perturbations:
    """The trials of a batch, and what they were made with."""

    trials: tuple[Trial, ...]
    parameters: dict[str, Any]

    def summary(
        self,
        reference: Reference = "response",
        *,
        resamples: int = 2000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> PerturbationSummary:
        """Compare the positions of highest with those of lowest FAI, response by response.

        `reference` is what rollouts are compared with: the response's own continuation, as in the paper,
        or the greedy continuation of the response's own token, which leaves out the difference between
        greedy and sampled text.

        Raises:
            ParameterError: an unknown reference, or no response with positions of both kinds.
        """
        if reference not in ("response", "greedy"):
            raise ParameterError(f'reference is "response" or "greedy", got {reference!r}')
        found: dict[int, dict[str, list[float]]] = {}
        for trial in self.trials:
            of_kind = found.setdefault(trial.example, {}).setdefault(trial.kind, [])
            of_kind.append(trial.overlap(reference))
        pairs = [
            (sum(kinds["highest"]) / len(kinds["highest"]), sum(kinds["lowest"]) / len(kinds["lowest"]))
            for kinds in found.values()
            if len(kinds) == 2
        ]
        if not pairs:
            raise ParameterError("no response has trials at both its highest and its lowest FAI")
        highest, lowest = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
        lower = (highest < lowest).double() + 0.5 * (highest == lowest).double()

        def mean(values: Tensor) -> Estimate:
            options: dict[str, Any] = {"resamples": resamples, "confidence": confidence, "seed": seed}
            return ratio_estimate(values, torch.ones_like(values), **options)

        return PerturbationSummary(
            mean(highest), mean(lowest), mean(highest - lowest), mean(lower), len(pairs)
        )

    def to_pandas(self) -> pandas.DataFrame:
        """Return a table with a row for each rollout; that of the response's own token has rank 0.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        frame = import_pandas()
        rows = []
        for trial in self.trials:
            place = {name: getattr(trial, name) for name in ("example", "kind", "position", "length", "fai")}
            for rank, rollout in enumerate((trial.own, *trial.rollouts)):
                rows.append({**place, "rank": rank, **asdict(rollout)})
        table: pandas.DataFrame = frame.DataFrame(rows)
        return table

    def save(self, path: str | Path) -> Path:
        """Save as JSON lines, the form in which `perturb` keeps unfinished work; return the path.

        Raises:
            ResultError: a place that cannot be written.
        """
        lines = [_header(self.parameters), *(json.dumps(asdict(trial)) for trial in self.trials)]
        return write_atomically(path, "".join(f"{line}\n" for line in lines).encode())

    @staticmethod
    def load(path: str | Path) -> Perturbations:
        """Load what `save` wrote, or what an interrupted `perturb` left.

        Raises:
            ResultError: a file that is missing, damaged, or holds something else.
        """
        path = Path(path)
        if not path.is_file():
            raise ResultError(f"there is no result at {path}")
        parameters, trials = _read(path)
        return Perturbations(tuple(trials), parameters)


def perturb(
    model: Any,
    tokenizer: Any,
    batch: TokenBatch,
    scores: TokenScores,
    *,
    candidates: int = 10,
    positions: int = 1,
    max_new_tokens: int = 100,
    min_remaining: int = 10,
    path: str | Path | None = None,
    progress: bool = False,
) -> Perturbations:
    """Replace tokens of highest and of lowest FAI, and compare what the model writes then.

    Table 1 of arXiv 2510.13554. All rollouts of a position run together, from one key/value cache of
    the text before it.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer: overlaps are of words.
        batch: prompts and responses, one of each a row.
        scores: of that batch; positions are chosen by `scores.fai`, where it is defined.
        candidates: how many other tokens are forced at a position, the likeliest first.
        positions: how many positions of each kind a response gives; those of equal FAI: the earliest.
        max_new_tokens: rollouts are as long as the rest of the response, but no longer than this.
        min_remaining: positions with fewer response tokens after them are not chosen.
        path: a JSON-lines file to which each trial is written when it is done. Trials that it holds
            already, of the same model, parameters, text and position, are not run again: an interrupted
            run goes on, and a batch may grow.
        progress: whether to show a progress bar.

    Greedy rollouts need no seed: the same call gives the same result.

    Raises:
        ParameterError: counts below 1, scores of another shape, packed rows, or no position to choose.
        ResultError: a path that holds something else, or cannot be written.
        UnsupportedModelError: a model that cannot generate.
    """
    counts = {
        "candidates": candidates,
        "positions": positions,
        "max_new_tokens": max_new_tokens,
        "min_remaining": min_remaining,
    }
    _check(batch, scores, counts)
    parameters: dict[str, Any] = {**counts, "model": check_generates(model)}
    chosen = [
        (row, kind, column)
        for row in range(batch.batch_size)
        for kind, column in choose_positions(batch, scores, row, positions, min_remaining)
    ]
    if not chosen:
        raise ParameterError(
            "no response has two positions with a defined FAI and at least "
            f"{min_remaining} tokens after them: responses are too short"
        )
    done = _resume(path, parameters)
    trials = []
    with progress_bar("perturbing", len(chosen), shown=progress) as advance:
        for row, kind, column in chosen:
            start = int(batch.response_mask[row].nonzero()[0])
            trial = done.get((_digest(batch, row), kind, column - start))
            if trial is None:
                trial = _try(model, tokenizer, batch, scores, (row, kind, column), parameters)
                if path is not None:
                    _append(path, trial)
            trials.append(replace(trial, example=row))
            advance()
    return Perturbations(tuple(trials), parameters)


def choose_positions(
    batch: TokenBatch, scores: TokenScores, row: int, positions: int = 1, min_remaining: int = 10
) -> list[tuple[Kind, int]]:
    """Return the columns of highest and of lowest FAI of one response; none if there are too few."""
    inside = batch.response_mask[row].nonzero()[:, 0]
    fai = scores.fai[row].cpu()
    column = torch.arange(fai.shape[0])
    remaining = int(inside[-1]) - column
    allowed = (~fai.isnan()) & (remaining >= min_remaining)
    columns = allowed.nonzero()[:, 0]
    if len(columns) < 2 * positions:
        return []
    ascending = columns[fai[columns].argsort(stable=True)]
    descending = columns[(-fai[columns]).argsort(stable=True)]
    highest: list[tuple[Kind, int]] = [("highest", int(c)) for c in descending[:positions]]
    lowest: list[tuple[Kind, int]] = [("lowest", int(c)) for c in ascending[:positions]]
    return highest + lowest


def _try(
    model: Any,
    tokenizer: Any,
    batch: TokenBatch,
    scores: TokenScores,
    where: tuple[int, Kind, int],
    parameters: dict[str, Any],
) -> Trial:
    """Force the candidates at one position, and compare their rollouts."""
    row, kind, column = where
    first = int(batch.attention_mask[row].nonzero()[0])
    inside = batch.response_mask[row].nonzero()[:, 0]
    begin, end = int(inside[0]), int(inside[-1]) + 1
    token = int(batch.input_ids[row, column])
    length = min(parameters["max_new_tokens"], end - column - 1)
    after = batch.input_ids[row, column + 1 : column + 1 + length].tolist()
    before = batch.input_ids[row, first:column]
    forced = force_tokens(model, before, token, parameters["candidates"], length)
    texts = [_decode(tokenizer, continuation) for continuation in forced.continuations]
    response_text = _decode(tokenizer, after)
    rollouts = [
        Rollout(
            token=other,
            probability=probability,
            text=text,
            overlap=content_overlap(text, response_text),
            greedy_overlap=content_overlap(text, texts[0]),
        )
        for other, probability, text in zip(forced.tokens, forced.probabilities, texts, strict=True)
    ]
    return Trial(
        example=row,
        digest=_digest(batch, row),
        kind=kind,
        position=column - begin,
        length=end - begin,
        fai=float(scores.fai[row, column]),
        token=token,
        own=rollouts[0],
        rollouts=tuple(rollouts[1:]),
    )


def _check(batch: TokenBatch, scores: TokenScores, counts: dict[str, int]) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ParameterError(f"{name} is a whole number, at least 1; got {value!r}")
    if scores.fai.shape != batch.input_ids.shape:
        raise ParameterError(
            f"the scores are {list(scores.fai.shape)}, the batch {list(batch.input_ids.shape)}: they must "
            "be of the same tokens"
        )
    if batch.segment_ids is not None:
        raise ParameterError("rows are packed: put each response in a row of its own to perturb it")


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


# ---- unfinished work --------------------------------------------------------------------------------

_KIND = "Perturbations"


def _header(parameters: dict[str, Any]) -> str:
    return json.dumps({"kind": _KIND, "versions": library_versions(), "parameters": parameters})


def _read(path: Path) -> tuple[dict[str, Any], list[Trial]]:
    """Return the parameters and trials of a file; a last line that was interrupted does not count."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        header = json.loads(lines[0])
        if header.get("kind") != _KIND:
            raise ResultError(f"{path} holds {header.get('kind', 'something else')}, not {_KIND}")
        return header["parameters"], [_trial(json.loads(line)) for line in lines[1:]]
    except (IndexError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ResultError(f"{path} holds no trials that can be read: {error}") from error


def _trial(record: dict[str, Any]) -> Trial:
    own, rollouts = record.pop("own"), record.pop("rollouts")
    return Trial(**record, own=Rollout(**own), rollouts=tuple(Rollout(**rollout) for rollout in rollouts))


def _resume(path: str | Path | None, parameters: dict[str, Any]) -> dict[tuple[str, str, int], Trial]:
    """Return the trials that a file holds already, and leave it ready for more."""
    if path is None:
        return {}
    path = Path(path)
    check_writable(path)
    if not path.exists():
        write_atomically(path, f"{_header(parameters)}\n".encode())
        return {}
    theirs, trials = _read(path)
    if theirs != parameters:
        raise ResultError(
            f"{path} holds trials made with {theirs}, not with {parameters}: choose another path, or "
            "remove it"
        )
    # Written anew, so that a line that was interrupted is gone.
    Perturbations(tuple(trials), theirs).save(path)
    return {(trial.digest, trial.kind, trial.position): trial for trial in trials}


def _append(path: str | Path, trial: Trial) -> None:
    with Path(path).open("a", encoding="utf-8") as stream:
        stream.write(f"{json.dumps(asdict(trial))}\n")


def _digest(batch: TokenBatch, row: int) -> str:
    """Return what tells one text from another."""
    ids = batch.input_ids[row][batch.attention_mask[row]].tolist()
    begin = int(batch.response_mask[row].sum())
    return hashlib.sha256(json.dumps([ids, begin]).encode()).hexdigest()[:16]

"""Scoring on other engines: a stage for Ray Data, a function for `datasets.map`, and a whole corpus on Ray.

`RowScorer` scores whatever rows an engine hands it, in any order. `score_with_ray` writes the folder that
`score` writes: Ray hands out the numbers of windows, and each worker writes its shard. Distribution, retries
and spilling are Ray's; whether a shard is written once or, after a worker was killed, twice, its rows are
there once. What is left to others: scoring (scorer), the folder (folder), and one machine (run).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from attnprobe.adapters import adapter_for
from attnprobe.corpus.bar import corpus_bar
from attnprobe.corpus.batching import Budget
from attnprobe.corpus.fingerprints import groups_fingerprint
from attnprobe.corpus.folder import ShardEntry, check_same, open_folder, read_manifest, write_shard
from attnprobe.corpus.grouping import check_given
from attnprobe.corpus.loading import model_and_tokenizer
from attnprobe.corpus.rows import Columns, RowReader, check_named
from attnprobe.corpus.run import CorpusRun, Plan, run_of, score
from attnprobe.corpus.schema import table_schema
from attnprobe.corpus.scorer import Scorer
from attnprobe.corpus.settings import CorpusSettings
from attnprobe.corpus.sources import rows_of_table
from attnprobe.errors import AttnprobeError, MissingDependencyError, ParameterError
from attnprobe.head_groups import HeadGroups
from attnprobe.storage import PathLike, as_path, import_pyarrow
from attnprobe.validation import FloatLike, IntLike, brief, instance, real_number, whole_number


class RowScorer:
    """Scores tables of rows: a callable class for `map_batches`, and a function for `datasets.map`.

        ds.map_batches(RowScorer, fn_constructor_kwargs={"model": "...", "groups": "groups.safetensors"},
                       batch_format="pyarrow", batch_size=512, compute=ActorPoolStrategy(size=8), num_gpus=1)
        scorer = RowScorer("...", "groups.safetensors")
        ds.map(scorer, batched=True, batch_size=512, remove_columns=ds.column_names,
               features=scorer.features, new_fingerprint="scores")

    It takes an Arrow table or a dictionary of lists, and returns the same, with the columns of the schema and
    a line for each row, in order; a row that could not be scored has its reason in `rejected`. `row` is the
    input's column of this name, or null. Rows that are handed over together run together, sorted by length,
    so hand over some hundreds at a time.

    Args:
        model, tokenizer: as for `score`. A path or a name is loaded when the first rows come, in the process
            that gets them.
        groups: the head groups, or the file of some, such as those of `score(..., groups_only=True)`.
        settings, columns, token_budget, memory_budget: as for `score`.
        device: where to put a model that is loaded here, such as "cuda"; None: where it is.

    Raises:
        ParameterError: arguments that make no sense.
        ResultError: a file that holds no groups.
    """

    def __init__(
        self,
        model: Any = None,
        groups: HeadGroups | PathLike | None = None,
        *,
        tokenizer: Any = None,
        settings: CorpusSettings | None = None,
        columns: Columns | None = None,
        token_budget: IntLike | None = None,
        memory_budget: IntLike | None = None,
        device: str | None = None,
    ) -> None:
        if groups is None:
            raise ParameterError(
                "a stage needs the head groups before the first row comes: groups=..., such as "
                "score(..., groups_only=True) writes"
            )
        self._groups = groups if isinstance(groups, HeadGroups) else HeadGroups.load(groups)
        self._settings = instance(settings or CorpusSettings(), CorpusSettings, "settings")
        self._columns = instance(columns or Columns(), Columns, "columns")
        self._model, self._tokenizer, self._device = model, tokenizer, device
        self._budgets = token_budget, memory_budget
        self._ready: tuple[RowReader, Scorer] | None = None

    def __call__(self, rows: Any) -> Any:
        """Return the scores of rows, in the form in which they came."""
        arrow = import_pyarrow()
        is_mapping = isinstance(rows, Mapping)
        table = _table_of(rows) if is_mapping else rows
        if not isinstance(table, arrow.Table):
            raise ParameterError(
                "rows must come as Arrow tables or dictionaries of lists: "
                'map_batches(..., batch_format="pyarrow")'
            )
        columns = self._columns
        named = [*columns.keep, *([columns.id] if columns.id != Columns().id else [])]
        check_named(named, table.column_names, "no row that was handed over")
        if self._ready is None:
            self._ready = self._prepared()
        reader, scorer = self._ready
        found = scorer.score(reader.read(rows_of_table(table)), self._groups).table
        return found.to_pydict() if is_mapping else found

    @property
    def features(self) -> Any:
        """The types of the columns, for `datasets.map(..., features=scorer.features)`.

        Without them, `datasets` takes the types from the first rows, and fails when a later one has a value
        where these had none.

        Raises:
            MissingDependencyError: datasets is not installed.
        """
        try:
            import datasets
        except ImportError as error:
            raise MissingDependencyError("features need datasets: pip install datasets") from error
        return datasets.Features.from_arrow_schema(table_schema())

    def __getstate__(self) -> dict[str, Any]:
        """Leave a loaded model behind: another process loads its own."""
        return {**self.__dict__, "_ready": None}

    def _prepared(self) -> tuple[RowReader, Scorer]:
        one_thread_in_a_fork()
        model, tokenizer = model_and_tokenizer(self._model, self._tokenizer, device=self._device)
        adapter = adapter_for(model)
        settings = self._settings
        check_given(self._groups, settings, adapter)
        return (
            RowReader.of(
                model, adapter, tokenizer, self._columns, chat=settings.chat, longest=settings.longest
            ),
            Scorer(adapter, settings, Budget.of(adapter, *self._budgets)),
        )


def _table_of(rows: Mapping[str, Any]) -> Any:
    """Return a dictionary of lists as a table.

    Raises:
        ParameterError: a single row, or lists of several lengths.
    """
    arrow = import_pyarrow()
    single = [name for name, values in rows.items() if isinstance(values, str | bytes | Mapping)]
    single += [name for name, values in rows.items() if not hasattr(values, "__len__")]
    if not single:
        with suppress(arrow.ArrowException):
            return arrow.table({name: list(values) for name, values in rows.items()})
    raise ParameterError(
        "rows must come as lists with a value for each row: map(..., batched=True). "
        + (
            f"{single[0]} is {brief(rows[single[0]])}"
            if single
            else "These lists differ in length or in type"
        )
    )


def one_thread_in_a_fork() -> None:
    """Let torch use one thread in a process that another one has forked.

    `datasets.map(num_proc=2)` would hang: the threads that torch had in the parent are not there any more.
    """
    import multiprocessing

    import torch

    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)


def score_with_ray(
    source: PathLike,
    output: PathLike,
    *,
    model: Any = None,
    workers: IntLike = 2,
    cpus_per_worker: FloatLike = 1,
    gpus_per_worker: FloatLike = 0,
    device: str | None = None,
    progress: bool = False,
    **options: Any,
) -> CorpusRun:
    """Score a corpus on a Ray cluster, into the same folder, with the same shards, as `score`.

    The cluster that `ray.init` or the environment names is used; without one, a local one is started. Source
    and output must be at the same path on all its machines, such as on a network file system. Heads are
    grouped by one worker before the others begin, so pass saved groups or a number of rows: "corpus" would
    run all rows through one worker first.

    Args:
        source, output: as for `score`.
        model: as for `score`; a path or a name, which each worker loads.
        workers: how many workers there are.
        cpus_per_worker, gpus_per_worker: what Ray reserves for each; parts of a GPU share it.
        device: where workers put the model; default: "cuda" if they have a GPU.
        progress: whether to show a progress bar.
        options: any other argument of `score`.

    Raises:
        MissingDependencyError: Ray is not installed.
        ParameterError: workers that would leave no processor for Ray's own tasks, which would wait forever.
        AttnprobeError: what `score` raises.
    """
    ray = _import_ray()
    workers = whole_number(workers, "workers", minimum=1)
    cpus = real_number(cpus_per_worker, "cpus_per_worker", minimum=0, below=float("inf"))
    gpus = real_number(gpus_per_worker, "gpus_per_worker", minimum=0, below=float("inf"))
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    check_room(ray.cluster_resources(), workers, cpus, gpus)
    options |= {"model": model, "device": device or ("cuda" if gpus else None)}
    place = as_path(output, "the output is a folder, named by a path").absolute()
    arguments = {"source": str(as_path(source).absolute()), "output": str(place), "options": options}
    # Where the workers run, so that the machine that this runs on needs neither the memory nor the GPU.
    preparing = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=3)(_prepare)
    with _errors_of_workers(ray):
        ray.get(preparing.remote(**arguments))
    with open_folder(place) as folder:
        folder.begin(read_manifest(place))
        groups = HeadGroups.load(folder.groups_path)
        folder.find_finished(groups_fingerprint(groups))
        continued = sum(entry.rows for entry in folder.entries)
        windows = -(-folder.manifest["row_count"] // folder.manifest["rows_per_shard"])
        todo = [{"window": n} for n in range(windows) if not folder.is_finished(n)]
        if todo:
            written = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
                _WindowScorer,
                fn_constructor_kwargs=arguments,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(workers, len(todo))),
                num_cpus=cpus,
                num_gpus=gpus,
            )
            rows = folder.manifest["row_count"]
            finished = sum(folder.rows_of(entry.shard) for entry in folder.entries)
            with (
                _errors_of_workers(ray),
                corpus_bar("scoring", rows, shown=progress, finished=finished) as advance,
            ):
                for line in written.iter_rows():
                    entry = ShardEntry(**line)
                    folder.enter(entry)
                    advance(folder.rows_of(entry.shard), entry.tokens)
        return run_of(folder, groups, continued)


def check_room(resources: Mapping[str, float], workers: int, cpus: FloatLike, gpus: FloatLike) -> None:
    """Check that a cluster has room for workers and for Ray's own tasks, which would else wait forever.

    Raises:
        ParameterError: it has not.

    >>> check_room({"CPU": 2.0}, workers=2, cpus=1, gpus=0)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    attnprobe.errors.ParameterError: 2 workers of 1 CPUs leave 0 of 2 CPUs of the cluster, but Ray needs 1...
    """
    for kind, each, spare in (("CPU", cpus, 1), ("GPU", gpus, 0)):
        there = resources.get(kind, 0.0)
        left = there - workers * each
        if left < spare - 1e-9:
            needs = f"but Ray needs {spare} for its own tasks, and" if spare else "and"
            raise ParameterError(
                f"{workers} workers of {each:g} {kind}s leave {left:g} of {there:g} {kind}s of the cluster, "
                f"{needs} would wait forever: use fewer workers, or a smaller part of a {kind} for each"
            )


def _prepare(source: str, output: str, options: dict[str, Any]) -> None:
    """Begin the folder and group the heads, in a worker."""
    score(source, output, groups_only=True, **options)


_LOADING = ("model", "tokenizer", "device", "dtype")
"""Which arguments of `score` are of the model."""


class _WindowScorer:
    """Scores windows in a worker, and writes their shards."""

    def __init__(self, source: str, output: str, options: dict[str, Any]) -> None:
        options = dict(options)
        loading = {name: options.pop(name) for name in _LOADING if name in options}
        self._job = Plan.of(source, **options).job(**loading)
        self._folder = as_path(output)
        check_same(self._folder, read_manifest(self._folder), self._job.manifest)
        self._groups = HeadGroups.load(self._folder / "groups.safetensors")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (window,) = batch["window"].tolist()
        scored = self._job.scorer.score(self._job.rows(window), self._groups)
        entry = write_shard(self._folder, window, scored, groups_fingerprint(self._groups))
        return {name: [value] for name, value in asdict(entry).items()}


@contextmanager
def _errors_of_workers(ray: Any) -> Iterator[None]:
    """Raise an error of ours that ended a worker as if it had been raised here."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None and (not isinstance(cause, AttnprobeError) or hasattr(cause, "cause")):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
            raise
        raise cause from error


def _import_ray() -> Any:
    """Return the ray module, or raise `MissingDependencyError` with what to install."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependencyError("this needs Ray Data: pip install 'attnprobe[ray]'") from error
    return ray

"""Training text: sources to tables of items, or to a stream of items.

An item is one draw. In a pair table (query, positive, optional negatives) it is a row; in an n-way
table (id, lang, text) it is an id, all of whose texts are translations of each other, of which two
are drawn as query and positive; in a table of single texts it is a text.
roles.py knows which column is what.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import config
from ..config import strict
from ..config.choices import BadRows
from ..runtime import cache
from ..runtime.errors import printable
from ..runtime.files import read_json, read_yaml, save_array
from . import tables
from .formats import bounds, data_sets, layouts, paths, readers
from .formats.layouts import SINGLE, Corpus, Item, Report
from .formats.readers import Names, Row
from .formats.roles import Roles
from .tables import MIN_SCORE, Table

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 4  # of the files that `_save` writes
NO_IN_BATCH = "no_in_batch_neg"  # in the names of FlagEmbedding's files of classes
BIG = 2**26  # bytes of files from which on a source is stored as Arrow instead of held as a list
YAML = (".yaml", ".yml")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@functools.cache
def cldr_tables() -> "tuple[pa.Table, pa.Table]":
    """Return the built-in text (training pairs, held-out n-way table), built once a process."""
    from . import cldr

    return cldr.build()


# ---- the sources of a run ----


def all_of(run: config.Run) -> list[config.Source]:
    """Return a run's sources: the entries of `data`, then `sources`."""
    plain = (config.Source(path=path, columns=run.columns, header=run.header) for path in run.data)
    return [*plain, *run.sources]


def expand(run: config.Run) -> config.Run:
    """Return the run with the mixtures among `data` replaced by their sources, in `sources`.

    A mixture is a .json or .yaml file of one object, {"sources": [{"path": .., ..}, ..]}, each
    entry with the fields of `config.Source`. Relative paths are relative to the mixture.

    Raises:
        ValueError: invalid JSON or YAML (by line), a key that repeats, an unknown key (with near
            ones), a wrong type or value.
    """
    plain, listed = [], list(run.sources)
    for entry in run.data:
        mixture = _mixture(Path(entry)) if entry.endswith((".json", *YAML)) else None
        if mixture is None:
            plain.append(entry)
        else:
            listed += mixture
    return replace(run, data=tuple(plain), sources=tuple(listed))


def _mixture(path: Path) -> list[config.Source] | None:
    """Return the sources of a mixture, or None for a data file, whose first line is a row."""
    if not path.is_file():
        # `read` reports the missing file.
        return None
    whole = read_yaml(path) if path.suffix in YAML else _object_of(path)
    if whole is None:
        return None
    if not isinstance(whole, dict) or not isinstance(whole.get("sources"), list):
        got = ", ".join(map(str, whole)) if isinstance(whole, dict) else type(whole).__name__
        raise ValueError(f'{path}: expected {{"sources": [..]}}, got {got}')
    if odd := sorted(map(str, whole.keys() - {"sources"})):
        raise ValueError(f"{path}: no such key {odd[0]!r}{strict.near(odd[0], ['sources'])}")
    if not whole["sources"]:
        raise ValueError(f"{path}: sources: expected at least one, got none")
    return [_listed(entry, path, i) for i, entry in enumerate(whole["sources"])]


def _object_of(path: Path) -> Any:
    """Return the object of a mixture's file, or None if its first line is a row, or begins rows."""
    if path.stat().st_size > bounds.LINE:
        return None
    with path.open("rb") as file:
        head = next((line for line in file if line.strip()), b"")
    if head.lstrip().startswith(b"["):
        return None
    try:
        first = json.loads(head)
        if not isinstance(first, dict) or "sources" not in first and len(first) > 1:
            return None
    except (ValueError, RecursionError):
        # The first line may begin an object over several lines.
        pass
    return read_json(path)


def _listed(entry: Any, mixture: Path, i: int) -> config.Source:
    where = f"{mixture}: sources[{i}]"
    if isinstance(entry, dict) and not isinstance(entry.get("path", ""), str):
        raise ValueError(f"{where}: path: expected str, got {entry['path']!r}")
    if isinstance(entry, dict) and not entry.get("path"):
        raise ValueError(f"{where}: path: expected one, got none")
    source: config.Source = strict.from_dict(config.Source, entry, where)
    beside = str(mixture.parent / source.path)
    exists = Path(beside).exists() or paths.parallel_files(beside)
    if source.path != "cldr" and (exists or paths.suffix_of(Path(beside)) in paths.SUFFIXES):
        source = replace(source, path=beside)
    if source.corpus:
        source = replace(source, corpus=str(mixture.parent / source.corpus))
    return source


def tables_of(
    data: Sequence[str],
    bad_rows: BadRows = "error",
    columns: config.Columns | None = None,
    header: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> list[Table]:
    """Return the tables of entries of `Run.data`, mixtures too, for commands that read all of them.

    Args:
        say: gets a line a table, on what was understood of it.

    Raises:
        ValueError: a stream, whose end is unknown; as `expand` and `read`.
    """
    run = config.Run(data=tuple(data), columns=columns or config.Columns(), header=header)
    sources = all_of(expand(run))
    if streams := [source.path for source in sources if source.streaming]:
        raise ValueError(f"data: expected stored sources, got streams: {', '.join(streams)}")
    parts = [part for source in sources for part in read(source, bad_rows=bad_rows)]
    for table, report in parts:
        say(printable(f"{table.name}: {tables.describe(table, report)}"))
    return [table for table, _ in parts]


def task_of(source: config.Source) -> str:
    """Return the task of a stream, one of `config.TASKS`, from its first rows.

    Raises:
        ValueError: parts of different tasks; as `read`.
    """
    tasks = sorted({part.open(source)[1] for part in _parts(source)})
    if len(tasks) > 1:
        raise ValueError(f"{source.path}: expected one task of a stream, got {', '.join(tasks)}")
    return tasks[0]


def has_teacher_scores(source: config.Source) -> bool:
    """Return whether a stream has columns of a teacher's scores."""
    return any(part.open(source)[0].negative_scores for part in _parts(source))


def describe_stream(source: config.Source) -> str:
    """Return what `tables.describe` says of a table, as far as the first rows of a stream tell."""
    roles = "; ".join(part.open(source)[0].describe() for part in _parts(source))
    rows = f"{source.rows} rows as declared" if source.rows else "rows not declared"
    return f"streamed, {rows}, {task_of(source)}; {roles}"


def is_local(source: config.Source) -> bool:
    """Return whether a source is on this machine, and has an end."""
    return Path(source.path).exists() or bool(paths.parallel_files(source.path))


# ---- the parts of a source ----


@dataclass(frozen=True)
class _Part:
    """A part of a source that becomes one table: a file or its shards, parallel files, a data set,
    the built-in text. roles: of parallel files, whose names say them.
    """

    name: str
    where: str
    rows: Callable[[Names], Iterator[Row]]
    files: list[Path] = field(default_factory=list)
    roles: Roles | None = None

    def open(self, source: config.Source) -> tuple[Roles, str, Iterator[Row]]:
        """Return the roles of the columns, the task, and the rows."""
        if self.roles:
            return self.roles, self._task(source.task, self.roles), self.rows(None)
        try:
            roles, task, rows = layouts.open_rows(self.rows, source.columns, source.task)
        except ValueError as error:
            reason = str(error)
            raise ValueError(
                reason if reason.startswith(self.where) else f"{self.where}: {reason}"
            ) from None
        return roles, self._task(task, roles), rows

    def _task(self, task: str, roles: Roles) -> str:
        if roles.single:
            if task != "auto":
                raise ValueError(f"{self.where}: task: expected auto for single texts, got {task}")
            return SINGLE
        if roles.nway and task not in ("auto", "retrieval", "bitext"):
            raise ValueError(
                f"{self.where}: task: expected retrieval or bitext for an n-way table, got {task}"
            )
        if task != "auto":
            return task
        if NO_IN_BATCH in self.where:
            return "classification"
        return "bitext" if roles.nway or roles.languages else "retrieval"


def _parts(source: config.Source) -> list[_Part]:
    path = Path(source.path)
    if source.path == "cldr":
        return [_Part(source.name or "cldr", "cldr", _built_in)]
    if _is_data_set(source):
        return [_data_set(source)]
    if path.exists():
        groups = paths.shards(paths.files_of(source.path))
        return [_files(name, files, source, len(groups) == 1) for name, files in groups.items()]
    if by_code := paths.parallel_files(source.path):
        lines = functools.partial(_parallel, by_code, source.path)
        codes = tuple(by_code)
        two = Roles(*codes, languages=codes) if len(codes) == 2 else None
        files = list(by_code.values())
        return [_Part(source.name or path.name, source.path, lines, files, two)]
    if paths.suffix_of(path) in paths.SUFFIXES or not HUB_ID.fullmatch(source.path):
        raise ValueError(
            f"data: expected a file, directory, `name` of parallel files or hub id, got "
            f"{source.path}, which does not exist"
        )
    return [_data_set(source)]


def _is_data_set(source: config.Source) -> bool:
    """Return whether the path is a directory that `datasets` reads."""
    path = Path(source.path)
    return data_sets.is_saved(path) or (
        path.is_dir() and bool(source.subset or data_sets.is_clone(path))
    )


def files_of(source: config.Source) -> list[Path]:
    """Return the files that a source and its corpus consist of; a Hub's data set has none."""
    path = Path(source.path)
    if _is_data_set(source):
        files = sorted(file for file in path.rglob("*") if file.is_file())
    elif path.exists():
        files = paths.files_of(source.path)
    else:
        files = list(paths.parallel_files(source.path).values())
    return [*files, *([Path(source.corpus)] if source.corpus else [])]


def _built_in(names: Names) -> Iterator[Row]:
    return ((f"cldr:{i}", row) for i, row in enumerate(cldr_tables()[0].to_pylist(), 1))


def _parallel(files: dict[str, Path], where: str, names: Names) -> Iterator[Row]:
    return readers.of_parallel(files, where)


def _files(name: str, files: list[Path], source: config.Source, alone: bool) -> _Part:
    if source.name:
        name = source.name if alone else f"{source.name}/{name}"

    def rows(names: Names) -> Iterator[Row]:
        for file in files:
            yield from readers.of_file(file, names, header=source.header)

    where = str(files[0]) if len(files) == 1 else f"{files[0]} .. {files[-1].name}"
    return _Part(name, where, rows, files)


def _data_set(source: config.Source) -> _Part:
    data = data_sets.load(source.path, source.subset, source.split, source.streaming)
    name = "-".join(filter(None, (Path(source.path).name, source.subset)))
    # A stream has no files: text that is not on disk is not stored either.
    files = [Path(file["filename"]) for file in getattr(data, "cache_files", [])]
    rows = functools.partial(data_sets.rows_of, data, source.path)
    return _Part(source.name or name, source.path, rows, files)


# ---- a source as tables ----


def read(
    source: config.Source,
    *,
    bad_rows: BadRows = "error",
    held_out: AbstractSet[str] = frozenset(),
) -> list[tuple[Table, Report]]:
    """Read a whole source: one table for each file of a directory, one for any other source.

    Left out and counted are repeated pairs, pairs of a score below 0.8 (except for task sts), texts
    of the evaluation with their pairs, and items beyond `source.cap` a table, drawn at random but
    always the same. Scores are 0..1; if one is above 1 by more than rounding, all of the table are
    0..5 and divided by 5.

    Sources of 64 MiB of files or more are not held in memory: their texts are cleaned once into an
    Arrow file of the cache, whose key digests the files' contents and the options, and
    memory-mapped. Rows are streamed either way, and a text is known by 63 bits of its hash.

    Args:
        bad_rows: error: the first malformed row raises. skip: bad rows are counted and listed.
        held_out: texts, normalised (readers.normalise), that must not be trained on.

    Raises:
        ValueError: a missing path, an unknown layout, a malformed row (with file, line, column), a
            task that does not fit, or no items left.
    """
    return [_read(part, source, bad_rows, held_out) for part in _parts(source)]


def _read(
    part: _Part, source: config.Source, bad_rows: BadRows, held_out: AbstractSet[str]
) -> tuple[Table, Report]:
    make = functools.partial(_make, part, source, bad_rows, held_out)
    files = part.files + ([Path(source.corpus)] if source.corpus else [])
    if sum(map(paths.bytes_of, files)) < BIG:
        table, report = make(None)
    else:
        # A mistake in the first rows is answered before all bytes are read for the key.
        part.open(source)
        told = (json.dumps(asdict(source.columns)), source.header, source.prompt_format)
        options = (source.path, source.subset, source.split, source.task, source.cap, *told)
        key = cache.digest(VERSION, part.name, bad_rows, sorted(held_out), *options, files=files)
        save = lambda home: _save(*make(home), home)  # noqa: E731
        table, report = cache.cached("text", key, save, _open, part.where)
    return replace(table, source=source), report


def _make(
    part: _Part,
    source: config.Source,
    bad_rows: BadRows,
    held_out: AbstractSet[str],
    directory: Path | None,
) -> tuple[Table, Report]:
    """Return a part's table, with its texts in a list or in texts.arrow of a directory."""
    report = Report(part.name, skip=bad_rows == "skip")
    roles, task, rows = part.open(source)
    report.roles = roles.describe()
    options = (source.cap, held_out, directory)
    if source.corpus and (roles.nway or roles.single):
        raise ValueError(f"{part.where}: corpus: expected pairs of ids, got {roles.describe()}")
    if roles.nway:
        texts = layouts.nway_rows(rows, roles, report)
        table = tables.nway_table(part.name, texts, report, *options)
    elif roles.single:
        single = layouts.single_texts(rows, roles, report)
        table = tables.text_table(part.name, single, report, *options)
    else:
        corpus = Corpus(source.corpus) if source.corpus else None
        pairs = layouts.items(rows, roles, report, task, corpus, prompt_format=source.prompt_format)
        try:
            table = tables.pair_table(part.name, pairs, report, task, *options)
        except tables.ScaleError as error:
            raise ValueError(f"{part.where}: {roles.score}: {error}") from None
    report.items = len(table)
    tables.check_items(part.where, report, roles)
    return replace(table, task=task), report


def _save(table: Table, report: Report, directory: Path) -> None:
    save_array(directory / "ids.npy", table.ids)
    save_array(directory / "starts.npy", table.starts)
    if table.scores is not None:
        save_array(directory / "scores.npy", table.scores)
    if table.teacher_scores is not None:
        save_array(directory / "teacher_scores.npy", table.teacher_scores)
    about = {"name": table.name, "nway": table.nway, "task": table.task, "report": asdict(report)}
    (directory / "about.json").write_text(json.dumps(about) + "\n", encoding="utf-8")


def _open(directory: Path) -> tuple[Table, Report]:
    about = read_json(directory / "about.json")
    arrays = {
        name: np.load(path, mmap_mode="r")
        for name in ("ids", "starts", "scores", "teacher_scores")
        if (path := directory / f"{name}.npy").is_file()
    }
    texts = tables.StoredTexts(directory / "texts.arrow")
    table = Table(about["name"], about["nway"], texts, task=about["task"], **arrays)
    return table, Report(**about["report"])


# ---- a source as a stream ----


def items(
    source: config.Source,
    *,
    bad_rows: BadRows = "error",
    held_out: AbstractSet[str] = frozenset(),
    report: Report | None = None,
) -> Iterator[Item]:
    """Yield the pairs of a source as they come, for streaming.

    They are the items of `read`, except that duplicates stay and scores have to be 0..1, because
    only the whole source would show them.

    Args:
        report: counts what becomes of the rows while they are read.

    Raises:
        ValueError: a missing path, an n-way table, a cap, a malformed row (unless skipped), or no
            items at the end.
    """
    if source.cap:
        raise ValueError(f"source {source.path}: cap: expected 0 for a stream, got {source.cap}")
    report = report or Report(source.name or source.path)
    report.skip = bad_rows == "skip"
    corpus = Corpus(source.corpus) if source.corpus else None
    for part in _parts(source):
        roles, task, rows = part.open(source)
        if roles.nway or roles.single:
            what = "an n-way table" if roles.nway else "single texts"
            raise ValueError(f"{part.where}: expected pairs for a stream, got {what}")
        report.roles = roles.describe()
        for item in layouts.items(rows, roles, report, task, corpus, 1, source.prompt_format):
            if tables.overlaps(item.texts, held_out):
                report.held_out += len(item.texts)
            elif task != "sts" and item.score is not None and item.score < MIN_SCORE:
                report.by_score += 1
            else:
                report.items += 1
                yield item
    tables.check_items(source.path, report, Roles())

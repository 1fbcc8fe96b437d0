"""Training text: sources to tables of items, in whatever of the known layouts they come.

An item is what is drawn. Of a pair table (query, positive, optional negatives) it is a row; of an
n-way table (id, lang, text) it is an id, all of whose texts are translations of each other, and two
of them are drawn as query and positive. layouts.py has the layouts.
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .. import config
from ..config import strict
from ..config.choices import BadRows
from ..runtime import cache
from ..runtime.files import read_json
from . import cldr
from .cldr import normalise
from .formats import layouts, readers
from .formats.layouts import Corpus, Item, Layout, Report
from .formats.readers import Row
from .tables import MIN_SCORE, Table, _nothing, _nway, _pairs, _Part

VERSION = 2  # of what is stored of a source
BIG = 2**26  # bytes of files from which on a source is stored as Arrow instead of held as a list
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@functools.cache
def cldr_tables() -> tuple[pa.Table, pa.Table]:
    """The built-in text (train pairs, held-out n-way table), built once a process."""
    return cldr.build()


# ---- sources as they are named ----


def of(path: str) -> config.Source:
    """A plain entry of `Run.data` as a source."""
    return config.Source(path=path)


def expand(run: config.Run) -> config.Run:
    """The run with the mixtures among `data` replaced by what they list, in `sources`.

    A mixture is a .json file that holds one object, {"sources": [{"path": .., ..}, ..]}, each with
    the fields of `config.Source`. Relative paths in it are relative to it.

    Raises:
        ValueError: not json (by line), an unknown key (with near ones), a wrong type or value.
    """
    plain, found = [], list(run.sources)
    for entry in run.data:
        mixed = _mixture(Path(entry)) if entry.endswith(".json") else None
        if mixed is None:
            plain.append(entry)
        else:
            found += mixed
    return replace(run, data=tuple(plain), sources=tuple(found))


def _mixture(path: Path) -> list[config.Source] | None:
    """What a mixture lists; None for a data file, whose first line is a row."""
    if not path.is_file():
        return None  # reading says so
    with path.open("rb") as file:
        head = next((line for line in file if line.strip()), b"")
    try:
        first = json.loads(head)
        if not isinstance(first, dict) or "sources" not in first and len(first) > 1:
            return None
    except ValueError:
        pass  # an object over several lines
    whole = read_json(path)
    if not isinstance(whole, dict) or not isinstance(whole.get("sources"), list):
        got = ", ".join(whole) if isinstance(whole, dict) else type(whole).__name__
        raise ValueError(f'{path}: expected {{"sources": [..]}}, got {got}')
    if odd := sorted(whole.keys() - {"sources"}):
        raise ValueError(f"{path}: no such key {odd[0]!r}{strict.near(odd[0], ['sources'])}")
    if not whole["sources"]:
        raise ValueError(f"{path}: sources: expected at least one, got none")
    return [_listed(entry, path, i) for i, entry in enumerate(whole["sources"])]


def _listed(entry: Any, mixture: Path, i: int) -> config.Source:
    where = f"{mixture}: sources[{i}]"
    if isinstance(entry, dict) and not isinstance(entry.get("path", ""), str):
        raise ValueError(f"{where}: path: expected str, got {entry['path']!r}")
    if isinstance(entry, dict) and not entry.get("path"):
        raise ValueError(f"{where}: path: expected one, got none")
    try:
        source: config.Source = strict.from_dict(config.Source, entry, where)
    except ValueError as error:  # of a value out of its range, which knows no file
        reason = str(error)
        raise ValueError(reason if where in reason else f"{where}: {reason}") from None
    beside = str(mixture.parent / source.path)
    here = Path(beside).exists() or readers.parallel_files(beside)
    if source.path != "cldr" and (here or Path(beside).suffix in readers.SUFFIXES):
        source = replace(source, path=beside)
    if source.corpus:
        source = replace(source, corpus=str(mixture.parent / source.corpus))
    return source


def _parts(source: config.Source) -> list[_Part]:
    path = Path(source.path)
    if source.path == "cldr":
        pairs = cldr_tables()[0]
        return [_Part(source.name or "cldr", "cldr", lambda: _arrow_rows(pairs))]
    if readers.is_data_set(path) or path.is_dir() and source.subset:
        return [_data_set(source)]
    if path.exists():
        files = readers.files_of(source.path)
        return [_file(file, source, alone=len(files) == 1) for file in files]
    if by_code := readers.parallel_files(source.path):
        codes, files = list(by_code), list(by_code.values())
        lines = functools.partial(readers.of_parallel, by_code, source.path)
        two = Layout(codes[0], codes[1], ()) if len(codes) == 2 else None
        return [_Part(source.name or path.name, source.path, lines, files, True, two)]
    if path.suffix in readers.SUFFIXES or not HUB_ID.fullmatch(source.path):
        raise ValueError(
            f"data: expected a file, directory, `name` of parallel files or hub id, got "
            f"{source.path}, which does not exist"
        )
    return [_data_set(source)]


def _arrow_rows(table: pa.Table) -> Iterator[Row]:
    return ((f"cldr:{i}", row) for i, row in enumerate(table.to_pylist(), 1))


def _file(file: Path, source: config.Source, alone: bool) -> _Part:
    name = file.stem if not source.name else source.name
    if source.name and not alone:
        name = f"{source.name}/{file.stem}"
    read_it = functools.partial(readers.of_file, file, layouts.worth_reading)
    return _Part(name, str(file), read_it, [file])


def _data_set(source: config.Source) -> _Part:
    found = readers.data_set(source.path, source.subset, source.split, source.streaming)
    name = "-".join(filter(None, (Path(source.path).name, source.subset)))
    # Of a stream there are none: what is not on disk is not stored either.
    files = [Path(file["filename"]) for file in getattr(found, "cache_files", [])]
    read_it = functools.partial(readers.of_data_set, found, source.path, layouts.worth_reading)
    return _Part(source.name or name, source.path, read_it, files)


def read(
    source: config.Source,
    *,
    bad_rows: BadRows = "error",
    held_out: AbstractSet[str] = frozenset(),
) -> list[tuple[Table, Report]]:
    """A source as a whole: one table a file of a directory, one of anything else.

    Left out, and counted: pairs that had been there before, pairs of a score under 0.8 (but of task
    sts), texts of the evaluation with their pairs, and what is beyond `source.cap`, which is the
    most items of each table, drawn at random but always the same.

    Scores are 0..1; if one is above 1, all of that table are taken as 0..5 and divided by 5.

    Sources of 64 MiB of files or more are not held in memory: their texts are cleaned once into an
    Arrow file of the cache (stored.py), under a key of the files' contents and the options, and
    memory-mapped. In either case rows stream through, and a text is known by 63 bits of its hash.

    Args:
        bad_rows: error: the first malformed row is an error. skip: it is counted and listed.
        held_out: texts, normalised (cldr.normalise), that are not to be trained on.

    Raises:
        ValueError: nothing there, an unknown layout, a malformed row (with file, line, column), a
            task that does not fit, or nothing left.
    """
    return [_read(part, source, bad_rows, held_out) for part in _parts(source)]


def _read(
    part: _Part, source: config.Source, bad_rows: BadRows, held_out: AbstractSet[str]
) -> tuple[Table, Report]:
    make = functools.partial(_make, part, source, bad_rows, held_out)
    files = part.files + ([Path(source.corpus)] if source.corpus else [])
    if sum(file.stat().st_size for file in files if file.is_file()) < BIG:
        table, report = make(None)
    else:
        said = (source.path, source.subset, source.split, source.task, source.cap)
        notes = (VERSION, part.name, bad_rows, sorted(held_out), *said)
        key = cache.digest(*notes, files=files)
        table, report = cache.cached("text", key, lambda where: _save(*make(where), where), _open)
    return replace(table, source=source), report


def _save(table: Table, report: Report, directory: Path) -> None:
    """Beside the texts, which are there."""
    np.save(directory / "ids.npy", table.ids)
    np.save(directory / "starts.npy", table.starts)
    if table.scores is not None:
        np.save(directory / "scores.npy", table.scores)
    about = {"name": table.name, "nway": table.nway, "task": table.task, "report": asdict(report)}
    (directory / "about.json").write_text(json.dumps(about) + "\n", encoding="utf-8")


def _open(directory: Path) -> tuple[Table, Report]:
    about = json.loads((directory / "about.json").read_text(encoding="utf-8"))
    ids, starts = (np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("ids", "starts"))
    scores = None
    if (directory / "scores.npy").is_file():
        scores = np.load(directory / "scores.npy", mmap_mode="r")
    texts = cache.Texts(directory / "texts.arrow")
    table = Table(about["name"], about["nway"], texts, ids, starts)
    return replace(table, task=about["task"], scores=scores), Report(**about["report"])


def tables_of(data: Sequence[str], bad_rows: BadRows = "error") -> list[Table]:
    """What entries of `Run.data` name, mixtures too, for commands that go through all of it.

    Raises:
        ValueError: a stream, which has no end that is known; as `expand` and `read`.
    """
    run = expand(config.Run(data=tuple(data)))
    listed = [*map(of, run.data), *run.sources]
    if streamed := [source.path for source in listed if source.streaming]:
        raise ValueError(f"data: expected stored sources, got streams: {', '.join(streamed)}")
    return [table for source in listed for table, _ in read(source, bad_rows=bad_rows)]


def items(
    source: config.Source,
    *,
    bad_rows: BadRows = "error",
    held_out: AbstractSet[str] = frozenset(),
    report: Report | None = None,
) -> Iterator[Item]:
    """The pairs of a source one by one, as they come, for streaming; what `read` keeps, less what
    takes all of it to know: duplicates stay, and scores have to be 0..1.

    Args:
        held_out: normalised texts; a pair with one of them is left out.
        report: counts what becomes of the rows, while they are read.

    Raises:
        ValueError: nothing there, an n-way table, a cap, a malformed row (unless skipped), nothing
            left at the end.
    """
    if source.cap:
        raise ValueError(f"source {source.path}: cap: expected 0 of a stream, got {source.cap}")
    report = report or Report(source.name or source.path)
    report.skip = bad_rows == "skip"
    corpus = Corpus(source.corpus) if source.corpus else None
    for part in _parts(source):
        layout, found = _opened(part)
        if isinstance(layout, str):
            raise ValueError(f"{part.where}: expected pairs for a stream, got an n-way table")
        task = _task(source, part, nway=False)
        for item in layouts.items(found, layout, report, task, corpus, most=1):
            texts = [item.query, item.positive, *item.negatives]
            if held_out and any(normalise(text) in held_out for text in texts):
                report.held_out += len(texts)
            elif task != "sts" and item.score is not None and item.score < MIN_SCORE:
                report.by_score += 1
            else:
                report.items += 1
                yield item
    if not report.items:
        raise _nothing(source.path, report, nway=False)


def _opened(part: _Part) -> tuple[Layout | str | None, Iterator[Row]]:
    return (part.layout, part.rows()) if part.layout else layouts.recognised(part.rows())


def _task(source: config.Source, part: _Part, nway: bool) -> str:
    if source.task == "auto":
        return "bitext" if nway or part.parallel else "retrieval"
    if nway and source.task not in ("retrieval", "bitext"):
        raise ValueError(
            f"{part.where}: task: expected retrieval or bitext for an n-way table, "
            f"got {source.task}"
        )
    return source.task


# ---- items to tables ----


def _make(
    part: _Part,
    source: config.Source,
    bad_rows: BadRows,
    held_out: AbstractSet[str],
    directory: Path | None,
) -> tuple[Table, Report]:
    """The table of a part, its texts a list, or in texts.arrow of a directory."""
    report = Report(part.name, skip=bad_rows == "skip")
    layout, found = _opened(part)
    nway = isinstance(layout, str)
    task = _task(source, part, nway)
    if isinstance(layout, str):
        if source.corpus:
            raise ValueError(f"{part.where}: corpus: expected none for an n-way table, got one")
        table = _nway(part, found, report, source.cap, held_out, directory)
    else:
        corpus = Corpus(source.corpus) if source.corpus else None
        valid = layouts.items(found, layout, report, task, corpus)
        table = _pairs(part, valid, report, task, source.cap, held_out, directory)
    report.items = len(table)
    return replace(table, task=task), report

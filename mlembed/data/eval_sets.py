"""Evaluation data sets, read from the layouts in which they are published.

    cldr                       the texts that `make train` holds out of its built-in text
    tatoeba.xxx-eng.{xxx,eng}  a directory of line-aligned pairs, like LASER's (`Bitext`)
    id, lang, text             a table, every language against English (`Bitext`)
    en, sw                     a table of two languages, whose codes name the columns (`Bitext`)
    sentence1, sentence2, score    a table, also by other names of a pair and its score (`STS`)
    queries.jsonl, corpus.jsonl, qrels/SPLIT.tsv   a directory in BEIR's format (`Retrieval`)
    queries/, corpus/, qrels/  a directory in NanoBEIR's format, a table in each (`Retrieval`)
    xx-en.{dev,training,test}.{xx,en,gold}         a directory in BUCC's format (`Mining`)
    un.xx-yy.{xx,yy}, pool.yy  a directory: translations to find in a pool (`Pool`)

All files may be compressed. Malformed rows of tables and of BEIR's files can be left out, which is
a warning; files that are aligned line by line have to be whole.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Columns
from ..config.choices import BadRows
from . import sources
from .eval_tasks import STS, Bitext, Mining, Part, Pool, Retrieval, Side, Task
from .formats import beir, layouts, paths, readers
from .formats.bounds import shown
from .formats.layouts import Report
from .formats.roles import Roles, as_number

PIVOTS = ("en", "eng", "eng_Latn", "eng-Latn")  # codes of the language that others are matched with
UN = re.compile(r"un\.([^.-]+)-([^.-]+)\.([^.-]+)")
TATOEBA = re.compile(r"tatoeba\.([^.]+)-eng\.([^.]+)")
BUCC = re.compile(r"([^.-]+-[^.-]+)\.(dev|training|test)\.([^.-]+)")


# ---- which layout ----


def read_all(sources: Sequence[str], bad_rows: BadRows = "error") -> list[Task]:
    """Return all tasks of all sources.

    Args:
        bad_rows: error: the first malformed row raises. skip: such rows are left out with a
            warning.

    Raises:
        ValueError: two tasks of one name, whose scores would overwrite each other; as `read`.
    """
    tasks = [task for source in sources for task in read(source, bad_rows)]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"eval: expected distinct file or directory names, got {', '.join(names)}")
    return tasks


def read(source: str, bad_rows: BadRows = "error") -> list[Task]:
    """Return the tasks of a source: `cldr`, a directory or file of one of the layouts above, a
    directory of such files and of BEIR's directories, or one split, DIRECTORY/qrels/SPLIT.tsv.

    Raises:
        ValueError: the source does not exist, its layout is unknown, sides differ in length, or a
            row is malformed.
    """
    if source == "cldr":
        return [nway("cldr", sources.cldr_tables()[1].to_pylist())]
    path = Path(source)
    if path.is_dir():
        return _directory(path, bad_rows)
    if path.parent.name == "qrels" and path.is_file():
        return [retrieval(path.parents[1], beir.split_of(path), bad_rows)]
    (path,) = paths.files_of(source)
    return [_table(path, bad_rows)]


def _report(name: str, bad_rows: BadRows) -> Report:
    return Report(name, skip=bad_rows == "skip")


def _warn(report: Report) -> None:
    """Warn of the rows that were left out."""
    if report.bad:
        warnings.warn(
            f"{report.name}: {report.bad} bad rows left out, first {report.bad_rows[0]}",
            stacklevel=3,
        )


def _table(path: Path, bad_rows: BadRows) -> Task:
    """Return the task of a file of rows: scored pairs, translations by id or by column."""
    try:
        read = partial(readers.of_file, path)
        roles, _, rows = layouts.open_rows(read, Columns(), evaluation=True)
    except ValueError as error:
        reason = str(error)
        raise ValueError(reason if reason.startswith(str(path)) else f"{path}: {reason}") from None
    name = paths.stem_of(path)
    report = _report(name, bad_rows)
    if not roles.columns():
        for _ in readers.strict(rows):
            break
        raise ValueError(f"{path}: expected rows, found none")
    if roles.score:
        return _sts(path, roles, rows, report)
    if roles.nway:
        records = list(layouts.nway_rows(rows, roles, report))
    elif roles.languages:
        records = [
            {"id": where, "lang": lang, "text": str(row[lang])}
            for where, row, _ in layouts.valid(rows, report, dict)
            for lang in roles.languages
            if readers.is_text(row.get(lang))
        ]
    else:
        raise ValueError(
            f"{path}: expected pairs with a score, columns id, lang, text, or two columns named by "
            f"codes of languages, got {roles.describe()}"
        )
    if not records:
        raise ValueError(f"{path}: expected rows, found none{report.first_bad}")
    task = nway(name, records, report)
    _warn(report)
    return task


def _directory(path: Path, bad_rows: BadRows) -> list[Task]:
    names = paths.by_plain_name(path)
    if any(map(TATOEBA.fullmatch, names)):
        return [tatoeba(path)]
    if names.keys() & {"corpus.jsonl", "queries.jsonl"} or beir.has_tables(path):
        return [retrieval(path, bad_rows=bad_rows)]
    if any(map(UN.fullmatch, names)):
        return [pool(path)]
    if any(map(BUCC.fullmatch, names)):
        return [mining(path)]
    files = [
        p for p in names.values() if paths.suffix_of(p) in paths.SUFFIXES or (p / "qrels").is_dir()
    ]
    if not files:
        listed = ", ".join(paths.SUFFIXES)
        raise ValueError(
            f"eval: expected tatoeba.*, un.*, xx-en.dev.*, corpus.jsonl or {listed} in {path}, "
            "found none"
        )
    return [task for file in files for task in read(str(file), bad_rows)]


def _aligned(files: dict[str, Path], directory: Path, *names: str) -> tuple[list[str], list[str]]:
    """Return the lines of two files of a directory."""
    for name, other in (names, names[::-1]):
        if name not in files:
            raise ValueError(f"{directory / other}: expected {name} beside it, found none")
    first, second = (files[name] for name in names)
    a, b = list(readers.plain_lines(first)), list(readers.plain_lines(second))
    if len(a) != len(b) or not a:
        raise ValueError(
            f"{first}: expected as many lines as {second.name}, at least one, "
            f"got {len(a)} and {len(b)}"
        )
    return a, b


# ---- bitext ----


def nway(name: str, records: Iterable[dict[str, Any]], report: Report | None = None) -> Bitext:
    """Return a task of every language against English, or against the language of most texts.

    Args:
        records: rows {id, lang, text [, kind]}. report: decides what becomes of a second text of
            one id, language and kind; without it that is an error.

    Raises:
        ValueError: such a text; no ids are shared.
    """
    task, report = Bitext(name), report or Report(name)
    places: dict[tuple[str, str, str], int] = {}
    for record in records:
        kind, lang, key = record.get("kind") or "", record["lang"], record["id"]
        if (kind, lang, key) in places:
            got = f"another of {shown(key)} in {lang}"
            reason = f"expected one text of an id and language, got {got}"
            report.add_bad_row(name, reason)
            continue
        places[kind, lang, key] = len(task.texts)
        task.texts.append(record["text"])
    pivot = next((p for p in PIVOTS if any(lang == p for _, lang, _ in places)), None)
    if pivot is None:
        counts = Counter(lang for _, lang, _ in sorted(places))
        pivot = counts.most_common(1)[0][0]
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for (kind, lang, key), row in places.items():
        if lang != pivot and (kind, pivot, key) in places:
            pairs.setdefault((lang, kind), []).append((row, places[kind, pivot, key]))
    for group, rows in sorted(pairs.items()):
        a, b = np.array(rows).T
        task.groups[group] = (a, b)
    if not task.groups:
        raise ValueError(f"{name}: expected ids shared with {pivot}, found none")
    return task


def tatoeba(directory: Path) -> Bitext:
    """Read files tatoeba.xxx-eng.xxx and tatoeba.xxx-eng.eng, translations line by line."""
    task, files = Bitext(directory.name, tatoeba=True), paths.by_plain_name(directory)
    for match in filter(None, map(TATOEBA.fullmatch, files)):
        if match[2] != "eng":
            continue
        lang = match[1]
        names = f"tatoeba.{lang}-eng.{lang}", match[0]
        a, b = _aligned(files, directory, *names)
        first, n = len(task.texts), len(a)
        task.texts += a + b
        task.groups[lang, ""] = (first + np.arange(n), first + n + np.arange(n))
    if not task.groups:
        raise ValueError(f"{directory}: expected tatoeba.xxx-eng.eng, found none")
    return task


# ---- scored pairs ----


def _sts(path: Path, roles: Roles, rows: Iterator[readers.Row], report: Report) -> STS:
    """Return the scored pairs of a table; an empty cell is an empty text."""

    def parse(row: dict[str, Any]) -> tuple[str, str, float]:
        score = as_number(row.get(roles.score))
        if score is None or not math.isfinite(score):
            raise ValueError(f"{roles.score}: expected a number, got {shown(row.get(roles.score))}")
        pair = row.get(roles.query), row.get(roles.positive)
        for column, text in zip((roles.query, roles.positive), pair, strict=True):
            if not isinstance(text, str | None):
                raise ValueError(f"{column}: expected text, got {shown(text)}")
        return pair[0] or "", pair[1] or "", score

    parsed = [pair for _, _, pair in layouts.valid(rows, report, parse)]
    if not parsed:
        raise ValueError(f"{path}: expected rows, found none{report.first_bad}")
    _warn(report)
    texts = [text for *pair, _ in parsed for text in pair]
    return STS(report.name, texts, np.array([score for *_, score in parsed]))


# ---- mining ----


def mining(directory: Path) -> Mining:
    """Read BUCC's files: xx-en.SPLIT.xx and xx-en.SPLIT.en with lines of id TAB text, and
    xx-en.SPLIT.gold with lines of id TAB id.

    The threshold is tuned on dev, or else on training. Test is reported if its gold exists;
    otherwise training, if it did not tune the threshold; otherwise the split that did.

    Raises:
        ValueError: a language without gold, a malformed line, two texts of one id, gold of an
            unknown id.
    """
    task, files = Mining(directory.name), paths.by_plain_name(directory)
    matches = [m for name in files if (m := BUCC.fullmatch(name))]
    for pair in sorted({m[1] for m in matches}):
        gold = {m[2] for m in matches if (m[1], m[3]) == (pair, "gold")}
        with_gold = [split for split in ("dev", "training", "test") if split in gold]
        if not with_gold or with_gold == ["test"]:
            raise ValueError(
                f"{directory}: expected {pair}.dev.gold or {pair}.training.gold, found none"
            )
        tuned = with_gold[0]
        reported = "test" if "test" in with_gold else with_gold[-1]
        parts = {
            split: _part(task, files, pair, split) for split in dict.fromkeys((tuned, reported))
        }
        lang = pair.removesuffix("-en")
        task.parts[lang] = parts[tuned], parts[reported]
        task.splits[lang] = tuned, reported
    return task


def _part(task: Mining, files: dict[str, Path], pair: str, split: str) -> Part:
    places, slices = [], []
    gold_file = files[f"{pair}.{split}.gold"]
    for side in pair.split("-"):
        name = f"{pair}.{split}.{side}"
        if (path := files.get(name)) is None:
            raise ValueError(f"{gold_file.parent}: expected {name}, found none")
        first, place = len(task.texts), dict[str, int]()
        for where, (key, text) in beir.cells(path, ("id", "text")):
            if key in place:
                raise ValueError(f"{where}: id: expected a new one, got {shown(key)} again")
            place[key] = len(place)
            task.texts.append(text)
        places.append(place)
        slices.append(slice(first, len(task.texts)))
    gold = []
    for where, keys in beir.cells(gold_file, ("id", "id")):
        for key, place, side in zip(keys, places, pair.split("-"), strict=True):
            if key not in place:
                got = shown(key)
                raise ValueError(f"{where}: expected an id of {pair}.{split}.{side}, got {got}")
        gold.append([place[key] for key, place in zip(keys, places, strict=True)])
    if not gold:
        raise ValueError(f"{gold_file}: expected lines, found none")
    return Part(slices[0], slices[1], np.unique(np.array(gold, dtype=np.int64), axis=0))


# ---- a pool ----


def pool(directory: Path) -> Pool:
    """Read files un.xx-yy.xx and un.xx-yy.yy, translations line by line, and pool.yy if it exists.

    Raises:
        ValueError: a side is missing or differs in length.
    """
    sides: dict[str, Side] = {}
    files = paths.by_plain_name(directory)
    for match in filter(None, map(UN.fullmatch, files)):
        start, target, side = match.groups()
        if side not in (start, target):
            raise ValueError(f"{directory / match[0]}: expected .{start} or .{target} at its end")
        names = [f"un.{start}-{target}.{code}" for code in (start, target)]
        aligned = _aligned(files, directory, *names)
        if side == target:
            if target in sides:
                raise ValueError(
                    f"{directory / names[0]}: expected one file towards {target}, got another"
                )
            sides[target] = Side(*aligned, files.get(f"pool.{target}"))
    return Pool(directory.name, sides)


# ---- retrieval ----


def retrieval(directory: Path, split: str = "", bad_rows: BadRows = "error") -> Retrieval:
    """Read BEIR's queries.jsonl, corpus.jsonl and qrels/SPLIT.tsv, or NanoBEIR's (beir.py).

    Args:
        split: by default test, or the only split. bad_rows: with skip, malformed rows, second rows
            of an id, and judgements of unknown queries and documents are left out.

    Raises:
        ValueError: a file is missing, such rows, judgements of unknown documents only.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    questions, corpus = (beir.file_of(directory, kind) for kind in ("queries", "corpus"))
    path = beir.choose_split(directory, split)
    report, left_out = _report(directory.name, bad_rows), set[int]()
    queries = dict(beir.by_id(questions, report, set()))
    place = {key: row for row, (key, _) in enumerate(beir.by_id(corpus, report, left_out))}
    ids = list(place)
    grades = beir.judgements(path, queries, place, report)
    _warn(report)
    judged_queries = [key for key in queries if key in grades]
    judged = [
        [row, document, grade]
        for row, key in enumerate(judged_queries)
        for document, grade in sorted(grades[key].items())
    ]
    order_N = np.empty(len(ids), dtype=np.int64)
    order_N[pc.sort_indices(pa.array(ids, pa.large_string())).to_numpy()] = np.arange(len(ids))
    return Retrieval(
        f"{directory.name}-{split}" if split else directory.name,
        [queries[key] for key in judged_queries],
        corpus,
        order_N,
        np.array(judged, np.int64),
        np.array([place.get(key, -1) for key in judged_queries], dtype=np.int64),
        frozenset(left_out),
    )

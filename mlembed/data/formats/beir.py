"""Read BEIR's files: queries.jsonl and corpus.jsonl (_id, text [, title]), qrels/SPLIT.tsv.

All may be compressed, and judgements may be a table of rows too (qrels/SPLIT.jsonl), as in the
repositories of the Hub. Those of NanoBEIR have a folder of one table for each: queries/, corpus/
and qrels/, where a judgement without a score means 1.
"""

import re
import warnings
from collections.abc import Collection, Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from . import paths, readers, roles
from .bounds import shown
from .layouts import Report

QRELS = ("query-id", "corpus-id", "score")
RUNNING = re.compile(r"-\d{5}-of-\d{5}$")


def titled(title: str, text: str) -> str:
    """Return the passage that BEIR and MTEB encode: title and text, without outer white space."""
    return f"{title} {text}".strip() if title else text.strip()


def _document(row: dict[str, Any] | ValueError) -> tuple[str, str, str]:
    """Return (id, title, text) of a row. A text may be empty, but not missing."""
    if isinstance(row, ValueError):
        raise row
    key, text, title = readers.id_text(row.get("_id")), row.get("text"), row.get("title") or ""
    for name, value in (("_id", key), ("title", title), ("text", text)):
        if not isinstance(value, str) or readers.SURROGATE.search(value):
            raise ValueError(f"{name}: expected text, got {shown(value)}")
    return key, str(title), str(text)


def documents(
    path: Path, left_out: AbstractSet[int] = frozenset()
) -> Iterator[tuple[str, str, str]]:
    """Yield (id, title, text) of a file that `by_id` has read.

    Args:
        left_out: numbers of rows, from 0, to leave out.
    """
    for number, (where, row) in enumerate(readers.of_file(path)):
        if number not in left_out:
            try:
                yield _document(row)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None


def by_id(path: Path, report: Report, left_out: set[int]) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of a file of queries or documents.

    Args:
        report: decides what becomes of malformed rows and of second rows of an id. left_out: gets
            the numbers of those that are left out, from 0.

    Raises:
        ValueError: such a row, unless the report skips them.
    """
    known = set[str]()
    for number, (where, row) in enumerate(readers.of_file(path)):
        try:
            key, _, text = _document(row)
            if key in known:
                raise ValueError(f"_id: expected a new one, got {shown(key)} again")
        except ValueError as error:
            report.add_bad_row(where, str(error))
            left_out.add(number)
            continue
        known.add(key)
        yield key, text


def has_tables(directory: Path) -> bool:
    """Return whether a directory has NanoBEIR's three folders."""
    return all((directory / name).is_dir() for name in ("queries", "corpus", "qrels"))


def file_of(directory: Path, kind: str) -> Path:
    """Return the file of `queries` or `corpus` in a directory.

    Raises:
        ValueError: there is none, or a folder of several.
    """
    if file := paths.by_plain_name(directory).get(f"{kind}.jsonl"):
        return file
    folder = directory / kind
    files = [file for file in sorted(folder.glob("*")) if paths.is_data(file)]
    if not files:
        raise ValueError(f"{directory}: expected {kind}.jsonl, found none")
    if len(files) > 1:
        raise ValueError(f"{folder}: expected one file, got {len(files)}, first {files[0].name}")
    return files[0]


def split_of(path: Path) -> str:
    """Return `test` of test.tsv, and `train` of train-00000-of-00001.parquet."""
    return RUNNING.sub("", paths.stem_of(path))


def choose_split(directory: Path, split: str) -> Path:
    """Return the judgements of `split` or, if that is "", of test or the only split.

    Raises:
        ValueError: the split does not exist, or there are several and none is test.
    """
    files: dict[str, Path] = {}
    for path in sorted((directory / "qrels").glob("*")):
        if paths.suffix_of(path) not in (".tsv", ".jsonl", ".parquet"):
            continue
        if (other := files.setdefault(split_of(path), path)) != path:
            got = f"{other.name} and {path.name}"
            raise ValueError(f"{path.parent}: expected one file of a split, got {got}")
    splits = list(files)
    chosen = split or ("test" if "test" in splits else splits[0] if len(splits) == 1 else "")
    if chosen not in splits:
        got = ", ".join(splits) or "none"
        raise ValueError(
            f"{directory}: expected qrels/test.tsv, or one other (name it: "
            f"{directory}/qrels/SPLIT.tsv), got {got}"
        )
    return files[chosen]


def cells(path: Path, names: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Yield (file:line, cells) of lines with one cell for each name, split by tabs."""
    for where, line in readers.strict(readers.lines(path)):
        row = line.split("\t", len(names) - 1)
        if len(row) != len(names):
            raise ValueError(f"{where}: expected {' TAB '.join(names)}, got {line[:80]!r}")
        yield where, row


def _rows(path: Path) -> Iterator[tuple[str, list[Any] | ValueError]]:
    """Yield (file:line, cells) of BEIR's three columns with a header, or of TREC's four, query 0
    document grade, without one, or of a table with BEIR's columns.
    """
    if paths.suffix_of(path) != ".tsv":
        for where, values in readers.of_file(path):
            if isinstance(values, ValueError):
                yield where, values
            else:
                values.setdefault(QRELS[2], 1 if paths.suffix_of(path) == ".parquet" else None)
                yield where, [values.get(name) for name in QRELS]
        return
    for number, (where, line) in enumerate(readers.lines(path)):
        if isinstance(line, ValueError):
            yield where, line
            continue
        row = line.split("\t") if "\t" in line else line.split()
        if len(row) == 4:
            row = [row[0], *row[2:]]
        elif not number and tuple(row) == QRELS:
            continue
        if not number and len(row) == 3 and roles.as_number(row[2]) is None:
            raise ValueError(f"{where}: expected the header {', '.join(QRELS)}, got {row}")
        yield where, row


def _judgement(row: list[Any] | ValueError) -> tuple[str, str, int]:
    """Return (query, document, grade) of a row's cells. A grade like 1.0 is a whole number."""
    if isinstance(row, ValueError):
        raise row
    if len(row) != 3:
        raise ValueError(f"expected {' TAB '.join(QRELS)}, got {' '.join(row)[:80]!r}")
    query, document = map(readers.id_text, row[:2])
    for name, value in zip(QRELS, (query, document), strict=False):
        if not readers.is_text(value):
            raise ValueError(f"{name}: expected an id, got {shown(value)}")
    grade = roles.as_number(row[2])
    if grade is None or not abs(grade) < 2**31 or grade != int(grade):
        raise ValueError(f"score: expected an integer, got {shown(row[2])}")
    return query, document, int(grade)


def judgements(
    path: Path, queries: Collection[str], place: dict[str, int], report: Report
) -> dict[str, dict[int, int]]:
    """Return {query id: {row of a document: grade}}.

    Judged documents that are missing from the corpus, as in ArguAna, get the rows after it in
    `place` and a warning: nothing can find them, as in BEIR and MTEB. If bad rows are skipped,
    these judgements are left out, and a query has a document of the corpus to find.

    Args:
        queries: their ids. place: {id: row} of the corpus; ids of missing documents are added.
        report: decides what becomes of bad rows.

    Raises:
        ValueError: no judgement of a corpus document; unless bad rows are skipped, a malformed
            line, an unknown query, a pair that is judged twice and differently.
    """
    grades: dict[str, dict[int, int]] = {}
    N = len(place)
    for where, row in _rows(path):
        try:
            query, document, grade = _judgement(row)
            if query not in queries:
                raise ValueError(f"query-id: expected an id of the queries, got {shown(query)}")
            if report.skip and document not in place:
                got = shown(document)
                raise ValueError(f"corpus-id: expected an id of the corpus, got {got}")
            earlier = grades.get(query, {}).get(place.get(document, -1), grade)
            if earlier != grade:
                raise ValueError(
                    f"score: expected the earlier {earlier} of {shown(query)} and "
                    f"{shown(document)}, got {grade}"
                )
        except ValueError as error:
            report.add_bad_row(where, str(error))
        else:
            grades.setdefault(query, {})[place.setdefault(document, len(place))] = grade
    if not grades:
        raise ValueError(f"{path}: expected judgements, found none{report.first_bad}")
    missing = list(place)[N:]
    if all(row >= N for of_query in grades.values() for row in of_query):
        raise ValueError(f"{path}: corpus-id: expected ids of the corpus, got {missing[0]!r} ..")
    if missing:
        warnings.warn(
            f"{path}: {len(missing)} judged documents are missing from the corpus and cannot be "
            f"found, first {missing[0]!r}; --bad-rows skip leaves their judgements out",
            stacklevel=2,
        )
    return grades

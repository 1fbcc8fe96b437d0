"""Read BEIR's files: queries.jsonl and corpus.jsonl (_id, text [, title]), qrels/SPLIT.tsv."""

import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

from . import readers, roles

QRELS = ("query-id", "corpus-id", "score")


def documents(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Yield (file:line, id, title, text) of a .jsonl file. A text may be empty, but not missing.

    Raises:
        ValueError: a malformed line.
    """
    for where, row in readers.strict(readers.of_file(path)):
        key, text = readers.id_text(row.get("_id")), row.get("text")
        title = row.get("title") or ""
        for name, value in (("_id", key), ("title", title), ("text", text)):
            if not isinstance(value, str) or readers.SURROGATE.search(value):
                raise ValueError(f"{where}: {name}: expected text, got {value!r}")
        yield where, key, str(title), str(text)


def titled(title: str, text: str) -> str:
    """Return the passage that BEIR and MTEB encode: title and text, without outer white space."""
    return f"{title} {text}".strip() if title else text.strip()


def by_id(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of a .jsonl file. ValueError: a malformed line, or two rows of one id."""
    known = set[str]()
    for where, key, _, text in documents(path):
        if key in known:
            raise ValueError(f"{where}: _id: expected a new one, got {key!r} again")
        known.add(key)
        yield key, text


def choose_split(directory: Path, split: str) -> Path:
    """Return the judgements of `split` or, if that is "", of test or the only split.

    Raises:
        ValueError: the split does not exist, or there are several and none is test.
    """
    splits = sorted(p.stem for p in (directory / "qrels").glob("*.tsv"))
    chosen = split or ("test" if "test" in splits else splits[0] if len(splits) == 1 else "")
    if chosen not in splits:
        got = ", ".join(splits) or "none"
        raise ValueError(
            f"{directory}: expected qrels/test.tsv, or one other (name it: "
            f"{directory}/qrels/SPLIT.tsv), got {got}"
        )
    return directory / "qrels" / f"{chosen}.tsv"


def cells(path: Path, names: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Yield (file:line, cells) of lines with one cell for each name, split by tabs."""
    for where, line in readers.strict(readers.lines(path)):
        row = line.split("\t", len(names) - 1)
        if len(row) != len(names):
            raise ValueError(f"{where}: expected {' TAB '.join(names)}, got {line[:80]!r}")
        yield where, row


def _judged(path: Path) -> Iterator[tuple[str, str, str, int]]:
    """Yield (file:line, query, document, grade) of BEIR's three columns with a header, or of TREC's
    four, query 0 document grade, without one. A grade like 1.0 is a whole number.
    """
    for number, (where, line) in enumerate(readers.strict(readers.lines(path))):
        row = line.split("\t") if "\t" in line else line.split()
        if len(row) == 4:
            row = [row[0], *row[2:]]
        elif not number and tuple(row) == QRELS:
            continue
        if not number and len(row) == 3 and roles.as_number(row[2]) is None:
            raise ValueError(f"{where}: expected the header {', '.join(QRELS)}, got {row}")
        if len(row) != 3:
            raise ValueError(f"{where}: expected {' TAB '.join(QRELS)}, got {line[:80]!r}")
        grade = roles.as_number(row[2])
        if grade is None or not abs(grade) < 2**31 or grade != int(grade):
            raise ValueError(f"{where}: score: expected an integer, got {row[2]!r}")
        yield where, row[0], row[1], int(grade)


def judgements(
    path: Path, queries: Collection[str], place: dict[str, int]
) -> dict[str, dict[int, int]]:
    """Return {query id: {row of a document: grade}}.

    Judged documents that are missing from the corpus, as in ArguAna, get the rows after it in
    `place` and a warning: nothing can find them, as in BEIR and MTEB.

    Args:
        queries: their ids. place: {id: row} of the corpus; ids of missing documents are added.

    Raises:
        ValueError: a malformed line, an unknown query, a pair that is judged twice and differently,
            or no judgement of a corpus document.
    """
    grades: dict[str, dict[int, int]] = {}
    N = len(place)
    for where, query, document, grade in _judged(path):
        if query not in queries:
            raise ValueError(f"{where}: query-id: expected an id of queries.jsonl, got {query!r}")
        of_query, row = grades.setdefault(query, {}), place.setdefault(document, len(place))
        if of_query.setdefault(row, grade) != grade:
            raise ValueError(
                f"{where}: score: expected the earlier {of_query[row]} of {query!r} and "
                f"{document!r}, got {grade}"
            )
    if not grades:
        raise ValueError(f"{path}: expected judgements, found none")
    missing = list(place)[N:]
    if all(row >= N for of_query in grades.values() for row in of_query):
        raise ValueError(f"{path}: corpus-id: expected ids of corpus.jsonl, got {missing[0]!r} ..")
    if missing:
        warnings.warn(
            f"{path}: {len(missing)} judged documents are missing from corpus.jsonl and cannot be "
            f"found, first {missing[0]!r}",
            stacklevel=2,
        )
    return grades

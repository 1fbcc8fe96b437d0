"""Read BEIR's files: queries.jsonl and corpus.jsonl (_id, text [, title]), qrels/SPLIT.tsv."""

import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

from . import readers

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


def judgements(
    path: Path, queries: Collection[str], place: dict[str, int]
) -> dict[str, dict[int, int]]:
    """Return {query id: {row of a document: grade}}.

    Judged documents that are missing from the corpus, as in ArguAna, get the rows after it in
    `place` and a warning: nothing can find them, as in BEIR and MTEB.

    Args:
        queries: their ids. place: {id: row} of the corpus; ids of missing documents are added.

    Raises:
        ValueError: a malformed line, an unknown query, or no judgement of a corpus document.
    """
    grades: dict[str, dict[int, int]] = {}
    N = len(place)
    for number, (where, row) in enumerate(cells(path, QRELS)):
        if not number:
            if tuple(row) != QRELS:
                raise ValueError(f"{where}: expected the header {', '.join(QRELS)}, got {row}")
            continue
        query, document, grade = row
        if query not in queries:
            raise ValueError(f"{where}: query-id: expected an id of queries.jsonl, got {query!r}")
        try:
            grades.setdefault(query, {})[place.setdefault(document, len(place))] = int(grade)
        except ValueError:
            raise ValueError(f"{where}: score: expected an integer, got {grade!r}") from None
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

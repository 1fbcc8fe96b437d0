"""Rows to items, whatever their columns are called; each mistake by the row and the column.

Layouts of pairs, by their columns:

    query, positive [, negatives, score]           ours; negatives are lists
    anchor, positive | query, answer | question, answer | sentence1, sentence2
    [, negative | negative_1 ..] [, score | similarity_score | label]   sentence-transformers
    two or three columns of text of other names    the same by position: anchor, positive, negative
    query, pos, neg [, prompt]                     FlagEmbedding: lists; an item for each positive
    query, passage [, negative_1 ..]               F2LLM-v2

With `source.corpus` the columns of positives and negatives hold ids of documents. A prompt of a
row's own is FlagEmbedding's only, before its query; other prompts are the source's.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from . import readers
from .readers import SCORES, Row, is_text

SHOWN = 50  # bad rows that a report lists; all are counted
PEEK = 1000  # rows in which a layout has to show itself
CHUNK = 8192  # documents of a corpus that become Arrow at once


@dataclass
class Report:
    """What became of a source's rows."""

    name: str
    skip: bool = False
    """Whether bad rows are left out; otherwise the first is an error."""
    rows: int = 0
    items: int = 0
    bad: int = 0
    bad_rows: list[str] = field(default_factory=list)
    """The first of them, as file:line: column: expected .., got .."""
    held_out: int = 0
    """Texts that went because evaluation uses them, or another text of their pair."""
    duplicates: int = 0
    """Pairs, or texts of an n-way table's id and language, that had been there before."""
    by_score: int = 0
    alone: int = 0
    """Texts of an n-way table whose id has no other."""
    by_cap: int = 0
    languages: dict[str, int] = field(default_factory=dict)
    """Texts of valid rows by language, of those rows that name theirs; duplicates included."""

    def said_in(self, *languages: Any) -> None:
        """Count a text of each of these languages; what is no text names none."""
        for language in filter(is_text, languages):
            self.languages[language] = self.languages.get(language, 0) + 1

    def leave_out(self, where: str, reason: str) -> None:
        """Count a bad row. ValueError where they are refused."""
        if not self.skip:
            raise ValueError(f"{where}: {reason}")
        self.bad += 1
        if len(self.bad_rows) < SHOWN:
            self.bad_rows.append(f"{where}: {reason}")


@dataclass(frozen=True)
class Item:
    """A validated row of pairs."""

    query: str
    positive: str
    negatives: list[str]
    score: float | None
    where: str


# ---- layouts ----


@dataclass(frozen=True)
class Layout:
    query: str
    positive: str
    scores: tuple[str, ...] = ("score",)
    third: str = ""  # a negative, by position

    @property
    def lists(self) -> bool:
        return self.positive == "pos"


_PAIRS = (
    Layout("query", "positive"),
    Layout("query", "pos", ()),
    Layout("query", "passage"),
    *(
        Layout(*names, SCORES)
        for names in (
            ("anchor", "positive"),
            ("query", "answer"),
            ("question", "answer"),
            ("sentence1", "sentence2"),
        )
    ),
)
_IDS = ("id", "verse_id")
_KNOWN = {name for layout in _PAIRS for name in (layout.query, layout.positive)}
_KNOWN |= {*_IDS, "lang", "text", "negatives", "neg", "negative"}
_LANGUAGES = ("query_lang", "positive_lang")
_OPTIONAL = (*SCORES, "negatives", "neg", "negative", "prompt", "kind", *_LANGUAGES)


def _layout(names: Sequence[str], texts: Sequence[str]) -> Layout | str | None:
    """The layout of columns, those in `texts` holding text: of pairs, the id's column of an n-way
    table, or none."""
    for layout in _PAIRS:
        if layout.query in names and layout.positive in names:
            return layout
    for name in _IDS:
        if {name, "lang", "text"} <= set(names):
            return name
    unknown = [name for name in names if name not in SCORES]
    if len(unknown) in (2, 3) and not _KNOWN & set(unknown) and set(unknown) <= set(texts):
        return Layout(unknown[0], unknown[1], SCORES, *unknown[2:])
    return None


def worth_reading(names: list[str]) -> list[str]:
    """Of the columns of a file: all that its layout uses."""
    layout = _layout(names, names)
    if layout is None:
        return names
    used = {layout, "lang", "text"} if isinstance(layout, str) else set()
    if isinstance(layout, Layout):
        used = {layout.query, layout.positive, layout.third}
    return [n for n in names if n in used or n in _OPTIONAL or n.startswith("negative_")]


def recognised(found: Iterator[Row]) -> tuple[Layout | str | None, Iterator[Row]]:
    """The layout of the first row that has one, and all rows."""
    head: list[Row] = []
    for where, row in found:
        head.append((where, row))
        if isinstance(row, dict):
            layout = _layout(list(row), [n for n, value in row.items() if isinstance(value, str)])
            if layout is not None:
                return layout, chain(head, found)
        if len(head) == PEEK:
            break
    return None, chain(head, found)


def _unknown(row: dict[str, Any]) -> str:
    return (
        "expected columns query, positive [, negatives, score], id, lang, text, or a layout that "
        f"the documentation lists, got {', '.join(map(str, row)) or 'none'}"
    )


# ---- rows to items ----


class Corpus:
    """Documents by their ids, from a file with _id, doc_id, docid or id, text [and title]: a title
    comes before its text, as BEIR's do. The texts are held as Arrow.

    Raises:
        ValueError: no such file, a malformed row, two documents of one id.
    """

    def __init__(self, path: str) -> None:
        if not Path(path).is_file():
            raise ValueError(f"corpus: expected a file, got {path}, which does not exist")
        self.path, self.place = path, dict[str, int]()
        self.column = pa.chunked_array(self._chunks(), pa.large_string())

    def _chunks(self) -> Iterator[pa.Array]:
        some: list[str] = []
        for (file,) in [readers.files_of(self.path)]:
            for where, row in readers.of_file(file):
                if isinstance(row, str):
                    raise ValueError(f"{where}: {row}")
                name = next((n for n in ("_id", "doc_id", "docid", "id") if n in row), "_id")
                key, text, title = _id(row.get(name)), row.get("text"), row.get("title")
                for column, value in ((name, key), ("text", text)):
                    if not is_text(value):
                        raise ValueError(f"{where}: {column}: expected text, got {value!r}")
                if key in self.place:
                    raise ValueError(f"{where}: {name}: expected a new id, got {key!r} again")
                self.place[key] = len(self.place)
                some.append(f"{title} {text}" if is_text(title) else str(text))
                if len(some) == CHUNK:
                    yield pa.array(some, pa.large_string())
                    some = []
        yield pa.array(some, pa.large_string())

    def text(self, key: Any, column: str) -> str:
        place = self.place.get(_id(key)) if isinstance(key, str | int) else None
        if place is None:
            raise ValueError(f"{column}: expected an id of {self.path}, got {key!r}")
        return self.column[place].as_py()


def _id(value: Any) -> Any:
    """Ids that are integers count as their digits."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _text(row: dict[str, Any], column: str, corpus: Corpus | None = None) -> str:
    value = row.get(column)
    if corpus is not None:
        return corpus.text(value, column)
    if not is_text(value):
        raise ValueError(f"{column}: expected text, got {value!r}")
    return str(value)


def _list(row: dict[str, Any], column: str, corpus: Corpus | None) -> list[str]:
    values = row.get(column)
    values = [] if values is None else values
    if not isinstance(values, list) or not (corpus or all(map(is_text, values))):
        raise ValueError(f"{column}: expected a list of texts, got {values!r}")
    return [corpus.text(value, column) for value in values] if corpus else values


def _negatives(row: dict[str, Any], layout: Layout, corpus: Corpus | None) -> list[str]:
    """Lists, then single columns, then negative_1 .., which may end early but not have a gap."""
    found = []
    for name in ("negatives", "neg"):
        if row.get(name) is not None:
            found += _list(row, name, corpus)
    for name in ("negative", layout.third):
        if name and row.get(name) is not None:
            found.append(_text(row, name, corpus))
    numbers = sorted(
        int(name[9:])
        for name, value in row.items()
        if name.startswith("negative_") and name[9:].isdecimal() and value is not None
    )
    for place, number in enumerate(numbers, 1):
        if number != place:
            raise ValueError(f"negative_{place}: expected text, as negative_{number} is, got None")
        found.append(_text(row, f"negative_{number}", corpus))
    return found


def _score(row: dict[str, Any], layout: Layout, most: float) -> float | None:
    for name in layout.scores:
        value = row.get(name)
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= most:
            scale = "0..1 or, all of the source, 0..5" if most == 5 else "0..1"
            raise ValueError(f"{name}: expected a number {scale}, got {value!r}")
        return float(value)
    return None


def items(
    found: Iterable[Row],
    layout: Layout | None,
    report: Report,
    task: str,
    corpus: Corpus | None,
    most: float = 5,
) -> Iterator[Item]:
    """Valid items, scores in 0..most as they stand."""
    for where, row in found:
        report.rows += 1
        try:
            if isinstance(row, str):
                raise ValueError(row)
            if layout is None:
                raise ValueError(_unknown(row))
            query = _text(row, layout.query)
            if layout.lists and row.get("prompt") is not None:
                query = _text(row, "prompt") + query
            if layout.lists:
                positives = _list(row, layout.positive, corpus)
            else:
                positives = [_text(row, layout.positive, corpus)]
            if not positives:
                raise ValueError(f"{layout.positive}: expected a list of texts, got []")
            negatives = _negatives(row, layout, corpus)
            if task in ("clustering", "classification") and not negatives:
                raise ValueError(f"negatives: expected at least one for {task}, got none")
            score = _score(row, layout, most)
            if task == "sts" and score is None:
                raise ValueError("score: expected a number for sts, got None")
        except ValueError as error:
            report.leave_out(where, str(error))
            continue
        report.said_in(row.get("query_lang"), *[row.get("positive_lang")] * len(positives))
        for positive in positives:
            yield Item(query, positive, negatives, score, where)


def nway_rows(found: Iterable[Row], report: Report) -> Iterator[dict[str, str]]:
    """Valid rows {id, lang, text [, kind]} of an n-way table."""
    for where, row in found:
        report.rows += 1
        try:
            if isinstance(row, str):
                raise ValueError(row)
            name = "verse_id" if "verse_id" in row and "id" not in row else "id"
            row[name] = _id(row.get(name))
            valid = {
                n: _text(row, c) for n, c in (("id", name), ("lang", "lang"), ("text", "text"))
            }
        except ValueError as error:
            report.leave_out(where, str(error))
            continue
        report.said_in(valid["lang"])
        yield valid | ({"kind": row["kind"]} if is_text(row.get("kind")) else {})

"""Turn rows with columns of many names into items; errors name the row and the column.

Layouts of pairs, by their columns:

    query, positive [, negatives, score]           ours; negatives are lists
    anchor, positive | query, answer | question, answer | sentence1, sentence2
    [, negative | negative_1 ..] [, score | similarity_score | label]   sentence-transformers
    two or three columns of text of other names    by position: anchor, positive, negative
    query, pos, neg [, prompt]                     FlagEmbedding: lists; an item for each positive
    query, passage [, negative_1 ..]               F2LLM-v2

With `source.corpus` the columns of positives and negatives hold ids of documents. Only rows of
FlagEmbedding have a prompt, put before the query; other prompts are the source's.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import readers
from .readers import SCORES, Row, T, id_text, is_text

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN = 50  # bad rows that a report lists; it counts all
PEEK = 1000  # rows among which one has to show the layout
CHUNK = 8192  # documents of a corpus that become Arrow at once


@dataclass
class Report:
    """Counts of a source's rows, and of those that were left out."""

    name: str
    skip: bool = False
    """Whether bad rows are left out; otherwise the first is an error."""
    rows: int = 0
    items: int = 0
    bad: int = 0
    bad_rows: list[str] = field(default_factory=list)
    """The first bad rows, as file:line: column: expected .., got .."""
    held_out: int = 0
    """Texts left out because evaluation uses them, or another text of their pair."""
    duplicates: int = 0
    """Pairs that occurred before, or texts of an n-way table's id and language."""
    by_score: int = 0
    alone: int = 0
    """Texts of an n-way table whose id has no other text."""
    by_cap: int = 0
    languages: dict[str, int] = field(default_factory=dict)
    """Texts of valid rows by language, of rows that name it; duplicates included."""

    def count_languages(self, *languages: Any) -> None:
        """Count one text of each language; a value that is not text names none."""
        for language in filter(is_text, languages):
            self.languages[language] = self.languages.get(language, 0) + 1

    def add_bad_row(self, where: str, reason: str) -> None:
        """Count a bad row, or raise ValueError unless `skip`."""
        if not self.skip:
            raise ValueError(f"{where}: {reason}")
        self.bad += 1
        if len(self.bad_rows) < SHOWN:
            self.bad_rows.append(f"{where}: {reason}")


@dataclass(frozen=True)
class Item:
    """A validated row of pairs; score None where the row has none."""

    query: str
    positive: str
    negatives: list[str]
    score: float | None
    where: str

    @property
    def texts(self) -> list[str]:
        """The query, the positive, the negatives."""
        return [self.query, self.positive, *self.negatives]


# ---- layouts ----


@dataclass(frozen=True)
class Layout:
    """Names of the columns of pairs. third: a negative, recognised by its position."""

    query: str
    positive: str
    scores: tuple[str, ...] = ("score",)
    third: str = ""

    @property
    def lists(self) -> bool:
        """Whether positives are lists, as in FlagEmbedding's layout."""
        return self.positive == "pos"


_PAIRS = (
    Layout("query", "positive"),
    Layout("query", "pos", ()),
    Layout("query", "passage"),
    Layout("anchor", "positive", SCORES),
    Layout("query", "answer", SCORES),
    Layout("question", "answer", SCORES),
    Layout("sentence1", "sentence2", SCORES),
)
_IDS = ("id", "verse_id")
_KNOWN = {name for layout in _PAIRS for name in (layout.query, layout.positive)}
_KNOWN |= {*_IDS, "lang", "text", "negatives", "neg", "negative"}
_LANGUAGES = ("query_lang", "positive_lang")
_OPTIONAL = (*SCORES, "negatives", "neg", "negative", "prompt", "kind", *_LANGUAGES)


def _layout(names: Sequence[str], texts: Sequence[str]) -> Layout | str | None:
    """Return a layout of pairs, the id column of an n-way table, or None for unknown columns.

    texts: the columns that hold text.
    """
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


def used_columns(names: list[str]) -> list[str]:
    """Return the columns of a file that its layout uses, or all if the layout is unknown."""
    layout = _layout(names, names)
    if layout is None:
        return names
    used = {layout, "lang", "text"} if isinstance(layout, str) else set()
    if isinstance(layout, Layout):
        used = {layout.query, layout.positive, layout.third}
    return [n for n in names if n in used or n in _OPTIONAL or n.startswith("negative_")]


def recognise(rows: Iterator[Row]) -> tuple[Layout | str | None, Iterator[Row]]:
    """Return the layout of the first row that shows one, and all rows."""
    head: list[Row] = []
    for where, row in rows:
        head.append((where, row))
        if isinstance(row, dict):
            layout = _layout(list(row), [n for n, value in row.items() if isinstance(value, str)])
            if layout is not None:
                return layout, chain(head, rows)
        if len(head) == PEEK:
            break
    return None, chain(head, rows)


# ---- rows to items ----


class Corpus:
    """Documents by id, from a file with _id, doc_id, docid or id, text [and title]. A title comes
    before its text, as in BEIR. The texts are held as Arrow.

    Raises:
        ValueError: the file does not exist, a row is malformed, two documents have one id.
    """

    def __init__(self, path: str) -> None:
        if not Path(path).is_file():
            raise ValueError(f"corpus: expected a file, got {path}, which does not exist")
        import pyarrow as pa

        self.path, self.place = path, dict[str, int]()
        self.column = pa.chunked_array(self._chunks(), pa.large_string())

    def _chunks(self) -> "Iterator[pa.Array]":
        import pyarrow as pa

        chunk: list[str] = []
        (file,) = readers.files_of(self.path)
        for where, row in readers.strict(readers.of_file(file)):
            name = next((n for n in ("_id", "doc_id", "docid", "id") if n in row), "_id")
            key, text, title = id_text(row.get(name)), row.get("text"), row.get("title")
            for column, value in ((name, key), ("text", text)):
                if not is_text(value):
                    raise ValueError(f"{where}: {column}: expected text, got {value!r}")
            if key in self.place:
                raise ValueError(f"{where}: {name}: expected a new id, got {key!r} again")
            self.place[key] = len(self.place)
            chunk.append(f"{title} {text}" if is_text(title) else str(text))
            if len(chunk) == CHUNK:
                yield pa.array(chunk, pa.large_string())
                chunk = []
        yield pa.array(chunk, pa.large_string())

    def text(self, key: Any, column: str) -> str:
        """Return the document of an id. ValueError, with the column: an unknown id."""
        place = self.place.get(id_text(key)) if isinstance(key, str | int) else None
        if place is None:
            raise ValueError(f"{column}: expected an id of {self.path}, got {key!r}")
        return self.column[place].as_py()


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
    """Return lists, then single columns, then negative_1 .., which may end early without a gap."""
    negatives = []
    for name in ("negatives", "neg"):
        if row.get(name) is not None:
            negatives += _list(row, name, corpus)
    for name in ("negative", layout.third):
        if name and row.get(name) is not None:
            negatives.append(_text(row, name, corpus))
    numbers = sorted(
        int(name[9:])
        for name, value in row.items()
        if name.startswith("negative_") and name[9:].isdecimal() and value is not None
    )
    for place, number in enumerate(numbers, 1):
        if number != place:
            raise ValueError(f"negative_{place}: expected text before negative_{number}, got None")
        negatives.append(_text(row, f"negative_{number}", corpus))
    return negatives


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


def _pair(
    row: dict[str, Any], layout: Layout | None, task: str, corpus: Corpus | None, most: float
) -> tuple[str, list[str], list[str], float | None]:
    """Return the query, the positives, the negatives and the score of a row."""
    if layout is None:
        raise ValueError(
            "expected columns query, positive [, negatives, score], id, lang, text, or a layout "
            f"that the documentation lists, got {', '.join(map(str, row)) or 'none'}"
        )
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
    return query, positives, negatives, score


def _valid(
    rows: Iterable[Row], report: Report, parse: Callable[[dict[str, Any]], T]
) -> Iterator[tuple[str, dict[str, Any], T]]:
    """Yield (location, row, parsed row) of the valid rows, and count all of them."""
    for where, row in rows:
        report.rows += 1
        try:
            if isinstance(row, ValueError):
                raise row
            parsed = parse(row)
        except ValueError as error:
            report.add_bad_row(where, str(error))
        else:
            yield where, row, parsed


def items(
    rows: Iterable[Row],
    layout: Layout | None,
    report: Report,
    task: str,
    corpus: Corpus | None,
    most: float = 5,
) -> Iterator[Item]:
    """Yield the valid items of rows of pairs, with scores in 0..most as the rows give them."""
    parse = partial(_pair, layout=layout, task=task, corpus=corpus, most=most)
    for where, row, (query, positives, negatives, score) in _valid(rows, report, parse):
        report.count_languages(row.get("query_lang"), *[row.get("positive_lang")] * len(positives))
        for positive in positives:
            yield Item(query, positive, negatives, score, where)


def _nway_row(row: dict[str, Any]) -> dict[str, str]:
    name = "verse_id" if "verse_id" in row and "id" not in row else "id"
    row[name] = id_text(row.get(name))
    columns = {"id": name, "lang": "lang", "text": "text"}
    texts = {field: _text(row, column) for field, column in columns.items()}
    return texts | ({"kind": row["kind"]} if is_text(row.get("kind")) else {})


def nway_rows(rows: Iterable[Row], report: Report) -> Iterator[dict[str, str]]:
    """Yield the valid rows of an n-way table, {id, lang, text [, kind]}."""
    for _, _, texts in _valid(rows, report, _nway_row):
        report.count_languages(texts["lang"])
        yield texts

"""Turn rows into items, by the roles of their columns; errors name the row and the column.

With `source.corpus` the columns of positives and negatives hold ids of documents. A row's own
prompt, or the source's, comes before the query.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import Columns
from . import bounds, paths, readers, roles
from .bounds import shown
from .readers import Names, Row, T, id_text, is_text
from .roles import Roles

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN = 50  # bad rows that a report lists; it counts all
PEEK = 1000  # rows that show the columns of a source
CHUNK = 8192  # documents of a corpus that become Arrow at once
ROUNDING = 0.01  # by which a score may lie outside of its scale, whose end it then is
SINGLE = "texts"  # the task of a source of single texts, which have no contrastive loss
TASKS = {  # FlagEmbedding's types of rows
    "normal": "retrieval",
    "only_1neg": "retrieval",
    "symmetric_sts": "retrieval",
    "symmetric_class": "classification",
    "symmetric_clustering": "clustering",
}


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
    """Pairs or single texts that occurred before, or texts of an n-way id and language."""
    by_score: int = 0
    by_label: int = 0
    """Rows of another value of the column that tells pairs apart."""
    alone: int = 0
    """Texts of an n-way table whose id has no other text."""
    by_cap: int = 0
    roles: str = ""
    """Columns by role, and those that are unused."""
    scale: str = ""
    """Scale of the scores, 0..1 or 0..5; "" without scores."""
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

    @property
    def first_bad(self) -> str:
        """The end of an error's message: how many rows are bad, and the first; "" for none."""
        return f"; {self.bad} bad rows, first {self.bad_rows[0]}" if self.bad else ""


@dataclass(frozen=True)
class Item:
    """A validated row of pairs; score None where the row has none.

    teacher_scores: a teacher's scores of the positive and the negatives, NaN for a text without a
    score; None if the source has no columns of scores.
    """

    query: str
    positive: str
    negatives: list[str]
    score: float | None
    where: str
    teacher_scores: tuple[float, ...] | None = None

    @property
    def texts(self) -> list[str]:
        """The query, the positive, the negatives."""
        return [self.query, self.positive, *self.negatives]


# ---- the columns of a source ----


def open_rows(
    read: Callable[[Names], Iterator[Row]],
    columns: Columns,
    task: str = "auto",
    evaluation: bool = False,
) -> tuple[Roles, str, Iterator[Row]]:
    """Return the roles of a source's columns, its task, and its rows.

    Args:
        read: yields the rows from the first one on, with these columns or all. columns: what the
            user has settled. task: one of `config.TASKS`, or auto, which FlagEmbedding's `type`
            settles. evaluation: as of `roles.recognise`.

    Raises:
        ValueError: as `roles.recognise`; types of several tasks.
    """
    known = set(Roles(**columns.to_roles()).columns())
    head = _first_rows(read(None))
    if not head:
        return Roles(), task, read(None)
    rows = [inner for row in head for inner in roles.unwrap(row, 0, known)]
    found = roles.recognise(rows, columns, task, evaluation)
    if found.type and task == "auto":
        task = _task_of([row.get(found.type) for row in rows])
    outer = dict.fromkeys(name for row in head for name in row)
    used = set(found.columns()) | ({"translation", "set"} - known)
    return found, task, _unwrapped(read([name for name in outer if name in used]), known)


def _first_rows(rows: Iterator[Row]) -> list[dict[str, Any]]:
    """Return the valid rows among the first PEEK, or fewer if they are long."""
    head, room = [], bounds.LINE
    for _, row in islice(rows, PEEK):
        if isinstance(row, dict):
            head.append(row)
            room -= len(str(row))
        if room < 0:
            break
    return head


def _unwrapped(rows: Iterator[Row], known: set[str]) -> Iterator[Row]:
    for number, (where, row) in enumerate(rows, 1):
        if isinstance(row, ValueError):
            yield where, row
            continue
        for inner in roles.unwrap(row, number, known):
            yield where, inner


def _task_of(types: list[Any]) -> str:
    named = sorted({str(value) for value in types if value is not None})
    tasks = {TASKS.get(name, "") for name in named}
    if len(tasks) > 1 or "" in tasks:
        raise ValueError(
            f"type: expected one of {', '.join(TASKS)} in all rows, got {', '.join(named)}; the "
            "key task of a mixture settles it"
        )
    return tasks.pop() if tasks else "auto"


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
        (file,) = paths.files_of(self.path)
        for where, row in readers.strict(readers.of_file(file)):
            name = next((n for n in ("_id", "doc_id", "docid", "id") if n in row), "_id")
            key, text, title = id_text(row.get(name)), row.get("text"), row.get("title")
            for column, value in ((name, key), ("text", text)):
                if not is_text(value):
                    raise ValueError(f"{where}: {column}: expected text, got {shown(value)}")
            if key in self.place:
                raise ValueError(f"{where}: {name}: expected a new id, got {shown(key)} again")
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
            raise ValueError(f"{column}: expected an id of {self.path}, got {shown(key)}")
        return self.column[place].as_py()


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if not is_text(value):
        raise ValueError(f"{column}: expected text, got {shown(value)}")
    return str(value)


def _texts(row: dict[str, Any], column: str, corpus: Corpus | None) -> list[str]:
    """Return the texts of a cell: one, or a list of texts or of {text [, title]}; [] for None."""
    value = row.get(column)
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    if corpus is not None:
        return [corpus.text(key, column) for key in values]
    texts = [str(item) if is_text(item) else roles.text_of(item) for item in values]
    if not all(texts):
        kind = "a list of texts" if isinstance(value, list) else "text"
        raise ValueError(f"{column}: expected {kind}, got {shown(value)}")
    return texts


def _score(row: dict[str, Any], column: str, most: float) -> float | None:
    """Return the score of a row, at most ROUNDING outside of 0..most; None without one."""
    value = row.get(column) if column else None
    if value is None:
        return None
    number = roles.as_number(value)
    if number is None or not -ROUNDING <= number <= most + ROUNDING:
        scale = "0..1 or, all of the source, 0..5" if most == 5 else "0..1"
        raise ValueError(f"{column}: expected a number {scale}, got {shown(value)}")
    return number


def _teacher_scores(row: dict[str, Any], column: str, count: int) -> list[float]:
    """Return a teacher's scores of `count` texts, which are a number or a list; NaN for None."""
    value = row.get(column)
    if value is None:
        return [math.nan] * count
    values = value if isinstance(value, list) else [value]
    numbers = [math.nan if one is None else roles.as_number(one) for one in values]
    if any(number is None or math.isinf(number) for number in numbers):
        raise ValueError(f"{column}: expected finite numbers, got {shown(value)}")
    if len(numbers) != count:
        raise ValueError(f"{column}: expected {count} scores, one a text, got {len(numbers)}")
    return [float(number) for number in numbers if number is not None]


def _check_new(row: dict[str, Any], known: set[str]) -> None:
    """Raise ValueError for a column with a name of a role that the first rows did not have."""
    for name in row.keys() - known:
        if roles.suggests_role(name):
            raise ValueError(f"{name}: expected a column of the first {PEEK} rows, got a new one")


@dataclass(frozen=True)
class _Pairs:
    """Parses rows of pairs. most: end of the scale of scores. prompt_format: see config.Source."""

    roles: Roles
    task: str
    corpus: Corpus | None
    most: float
    prompt_format: str
    known: set[str]

    def parse(
        self, row: dict[str, Any]
    ) -> tuple[str, list[str], list[str], float | None, list[float]] | None:
        """Return the query, positives, negatives, score, and a teacher's scores of positives, then
        negatives, [] if the source has no columns of them; None for no pair.
        """
        names = self.roles
        _check_new(row, self.known)
        if names.label:
            column, _, wanted = names.label.partition("=")
            number, value = roles.as_number(wanted), row.get(column)
            same = str(value) == wanted or number is not None and roles.as_number(value) == number
            if not same:
                return None
        query = _text(row, names.query)
        prompt = row.get(names.prompt) if names.prompt else None
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"{names.prompt}: expected text, got {shown(prompt)}")
        if prompt:
            before, between, after = self.prompt_format.split("{}")
            query = f"{before}{prompt}{between}{query}{after}"
        positives = _texts(row, names.positive, self.corpus)
        if not positives:
            raise ValueError(
                f"{names.positive}: expected text, got {shown(row.get(names.positive))}"
            )
        negatives = [
            text for column in names.negatives for text in _texts(row, column, self.corpus)
        ]
        if self.task in ("clustering", "classification") and not negatives:
            raise ValueError(f"negatives: expected at least one for {self.task}, got none")
        score = _score(row, names.score, self.most)
        if self.task == "sts" and score is None:
            raise ValueError("score: expected a number for sts, got None")
        teacher_scores: list[float] = []
        if names.positive_scores:
            teacher_scores = _teacher_scores(row, names.positive_scores, len(positives))
            teacher_scores += _teacher_scores(row, names.negative_scores, len(negatives))
        return query, positives, negatives, score, teacher_scores


def valid(
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
    found: Roles,
    report: Report,
    task: str,
    corpus: Corpus | None,
    most: float = 5,
    prompt_format: str = "{}{}",
) -> Iterator[Item]:
    """Yield the valid items of rows of pairs, with scores in 0..most as the rows give them."""
    known = {*found.columns(), *found.unused}
    pairs = _Pairs(found, task, corpus, most, prompt_format, known)
    for where, row, parsed in valid(rows, report, pairs.parse):
        if parsed is None:
            report.by_label += 1
            continue
        query, positives, negatives, score, teacher_scores = parsed
        source, target = found.languages or (
            row.get(found.query_lang), row.get(found.positive_lang)
        )  # fmt: skip
        report.count_languages(source, *[target] * len(positives))
        of_negatives = teacher_scores[len(positives) :]
        for i, positive in enumerate(positives):
            scores = (teacher_scores[i], *of_negatives) if teacher_scores else None
            yield Item(query, positive, negatives, score, where, scores)


def _nway_row(row: dict[str, Any], found: Roles) -> dict[str, str]:
    cells = row | {found.id: id_text(row.get(found.id))}
    columns = {"id": found.id, "lang": found.lang, "text": found.text}
    texts = {role: _text(cells, column) for role, column in columns.items()}
    kind = row.get(found.kind) if found.kind else None
    return texts | ({"kind": str(kind)} if is_text(kind) else {})


def nway_rows(rows: Iterable[Row], found: Roles, report: Report) -> Iterator[dict[str, str]]:
    """Yield the valid rows of an n-way table, {id, lang, text [, kind]}."""
    for _, _, texts in valid(rows, report, partial(_nway_row, found=found)):
        report.count_languages(texts["lang"])
        yield texts


def _single_text(row: dict[str, Any], found: Roles) -> str:
    text, title = _text(row, found.text), row.get(found.title) if found.title else None
    return f"{title} {text}" if is_text(title) else text


def single_texts(rows: Iterable[Row], found: Roles, report: Report) -> Iterator[str]:
    """Yield the valid texts of a source of single texts, each after its title, if it has one."""
    for _, _, text in valid(rows, report, partial(_single_text, found=found)):
        yield text

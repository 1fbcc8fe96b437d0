"""What to score, read from the layouts in which it is published.

    cldr                       what `make train` holds out of its built-in text
    tatoeba.xxx-eng.{xxx,eng}  a directory of line-aligned pairs, as LASER has them (`Bitext`)
    id, lang, text             a table, every language against English (`Bitext`)
    sentence1, sentence2, score    a csv file (`STS`)
    queries.jsonl, corpus.jsonl, qrels/SPLIT.tsv   a directory, as BEIR has them (`Retrieval`)
    xx-en.{dev,training,test}.{xx,en,gold}         a directory, as BUCC has them (`Mining`)
    un.xx-yy.{xx,yy}, pool.yy  a directory: translations to be found in a pool (`Pool`)

Every task has a name and `texts`: all text in it, which is not trained on.
"""

import csv
import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from . import sources
from .formats import layouts, readers

PIVOTS = ("en", "eng", "eng_Latn", "eng-Latn")  # what each language is matched with
UN = re.compile(r"un\.([^.-]+)-([^.-]+)\.([^.-]+)")
BUCC = re.compile(r"([^.-]+-[^.-]+)\.(dev|training|test)\.([^.-]+)")


@dataclass
class Bitext:
    """Groups of aligned texts: (language, kind) -> rows of `texts` on either side.

    tatoeba: whether the languages are those of LASER's files, whose means over sets of languages
    are published.
    """

    name: str
    texts: list[str] = field(default_factory=list)
    groups: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    tatoeba: bool = False


@dataclass
class STS:
    """Scored pairs: pair i is texts[2 i], texts[2 i + 1]."""

    name: str
    texts: list[str]
    scores: np.ndarray


@dataclass(frozen=True)
class Part:
    """One split of one language: rows of `texts` of either side, and which rows of the one side are
    translations of which of the other: int64 [pairs, 2]."""

    source: slice
    target: slice
    gold: np.ndarray


@dataclass
class Mining:
    """For each language the part on which a threshold is tuned and the part that is reported, which
    are one where there is gold for one only. splits: their names."""

    name: str
    texts: list[str] = field(default_factory=list)
    parts: dict[str, tuple[Part, Part]] = field(default_factory=dict)
    splits: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """Texts of one language and their translations, to be found among these and a pool's lines."""

    queries: list[str]
    answers: list[str]
    pool: Path | None

    def others(self) -> Iterator[str]:
        """Lines of the pool. One that is an answer's text is that answer, and left out."""
        known = set(self.answers)
        return (line for line in lines(self.pool) if line not in known) if self.pool else iter(())


class Again:
    """Texts that are read from disk each time they are gone through."""

    def __init__(self, tasks_texts: Any, count: int) -> None:
        self._texts, self._count = tasks_texts, count

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts())

    def __len__(self) -> int:
        return self._count


@dataclass
class Pool:
    """By target language, texts whose translations are to be found in a pool."""

    name: str
    sides: dict[str, Side]
    texts: Again = field(init=False)

    def __post_init__(self) -> None:
        self.texts = Again(self._texts, sum(1 for _ in self._texts()))

    def _texts(self) -> Iterator[str]:
        for side in self.sides.values():
            yield from side.queries
            yield from side.answers
            yield from side.others()


@dataclass
class Retrieval:
    """Queries, documents on disk, and judgements of pairs of them.

    queries: those that have judgements. order_N: int64, each document's place among all by id
    (what breaks ties). judged: int64 [judgements, 3] of query, document, relevance, by rising
    query and document; judged documents that the corpus lacks are N, N + 1, ..
    own_Q: int64, the document of a query's own id, or -1: no answer (ArguAna's queries are in its
    corpus).
    """

    name: str
    queries: list[str]
    corpus: Path
    order_N: np.ndarray
    judged: np.ndarray
    own_Q: np.ndarray
    texts: Again = field(init=False)

    def __post_init__(self) -> None:
        self.texts = Again(self._texts, sum(1 for _ in self._texts()))

    def documents(self) -> Iterator[str]:
        """Title and text of each, as they are encoded."""
        return (_titled(title, text) for _, _, title, text in _documents(self.corpus))

    def _texts(self) -> Iterator[str]:
        yield from self.queries
        for _, _, title, text in _documents(self.corpus):
            yield _titled(title, text)
            if title:  # without it, it is the same passage
                yield text


Task = Bitext | STS | Mining | Pool | Retrieval

# ---- which layout ----


def read_all(sources: Sequence[str]) -> list[Task]:
    """All tasks of all sources. ValueError for two of one name: their scores would be one."""
    tasks = [task for source in sources for task in read(source)]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"eval: expected distinct file or directory names, got {', '.join(names)}")
    return tasks


def read(source: str) -> list[Task]:
    """`cldr`, a directory or file of one of the layouts above, a directory of such files and of
    BEIR's directories, or one split of these: DIRECTORY/qrels/SPLIT.tsv.

    Raises:
        ValueError: nothing there, an unknown layout, sides of unequal length, a malformed row.
    """
    if source == "cldr":
        return [nway("cldr", sources.cldr_tables()[1].to_pylist())]
    path = Path(source)
    if path.is_dir():
        return _directory(path)
    if path.suffix == ".csv" and path.is_file():
        return [sts(path)]
    if path.suffix == ".tsv" and path.parent.name == "qrels" and path.is_file():
        return [retrieval(path.parents[1], path.stem)]
    (path,) = readers.files_of(source)
    layout, found = layouts.recognised(readers.of_file(path, layouts.worth_reading))
    if isinstance(layout, layouts.Layout):
        raise ValueError(f"{path}: expected an n-way table with columns id, lang, text")
    records = list(layouts.nway_rows(found, layouts.Report(path.stem)))
    if not records:
        raise ValueError(f"{path}: expected rows, found none")
    return [nway(path.stem, records)]


def _directory(path: Path) -> list[Task]:
    if any(path.glob("tatoeba.*-*.*")):
        return [tatoeba(path)]
    if (path / "corpus.jsonl").is_file() or (path / "queries.jsonl").is_file():
        return [retrieval(path)]
    names = [p.name for p in path.iterdir()]
    if any(map(UN.fullmatch, names)):
        return [pool(path)]
    if any(map(BUCC.fullmatch, names)):
        return [mining(path)]
    files = sorted(
        p
        for p in path.iterdir()
        if p.suffix in (".csv", ".parquet", ".jsonl") or (p / "corpus.jsonl").is_file()
    )
    if not files:
        raise ValueError(
            "eval: expected tatoeba.*, un.*, xx-en.dev.*, corpus.jsonl, .csv, .parquet or .jsonl "
            f"in {path}, found none"
        )
    return [scored for file in files for scored in read(str(file))]


# ---- lines ----


def lines(path: Path) -> Iterator[str]:
    """Lines of a text file, read as they are asked for. Not splitlines: Unicode's other separators
    occur inside sentences. ValueError where it is not UTF-8."""
    at = 0
    with path.open("rb") as file:
        for line in file:
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = at + error.start
                raise ValueError(f"{path}: not UTF-8 at byte {byte}: {error.reason}") from None
            text = text.removesuffix("\n").removesuffix("\r")
            yield text if at else text.removeprefix("\ufeff")
            at += len(line)


def _aligned(first: Path, second: Path) -> tuple[list[str], list[str]]:
    a, b = list(lines(first)), list(lines(second))
    if len(a) != len(b) or not a:
        raise ValueError(
            f"{first}: expected as many lines as {second.name}, more than none, "
            f"got {len(a)} and {len(b)}"
        )
    return a, b


def _cells(path: Path, expected: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(file:line, cells) of a file of as many cells a line, split by tabs."""
    for number, line in enumerate(lines(path), 1):
        cells = line.split("\t", len(expected) - 1)
        if len(cells) != len(expected):
            what = " TAB ".join(expected)
            raise ValueError(f"{path}:{number}: expected {what}, got {line[:80]!r}")
        yield f"{path}:{number}", cells


# ---- bitext ----


def nway(name: str, records: Iterable[dict[str, Any]]) -> Bitext:
    """Every language against English, kind by kind. ValueError without English, or for two texts
    of one id and language."""
    found = Bitext(name)
    where: dict[tuple[str, str, str], int] = {}
    for record in records:
        kind, lang, key = record.get("kind") or "", record["lang"], record["id"]
        if (kind, lang, key) in where:
            raise ValueError(
                f"{name}: expected one text of an id and language, got another of {key!r} in {lang}"
            )
        where[kind, lang, key] = len(found.texts)
        found.texts.append(record["text"])
    pivot = next((p for p in PIVOTS if any(lang == p for _, lang, _ in where)), None)
    if pivot is None:
        raise ValueError(f"{name}: expected English ({', '.join(PIVOTS)}) among the languages")
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for (kind, lang, key), row in where.items():
        if lang != pivot and (kind, pivot, key) in where:
            pairs.setdefault((lang, kind), []).append((row, where[kind, pivot, key]))
    for group, rows_of_group in sorted(pairs.items()):
        a, b = np.array(rows_of_group).T
        found.groups[group] = (a, b)
    if not found.groups:
        raise ValueError(f"{name}: expected ids shared with {pivot}, found none")
    return found


def tatoeba(directory: Path) -> Bitext:
    """Files tatoeba.xxx-eng.xxx and tatoeba.xxx-eng.eng, line by line translations."""
    found = Bitext(directory.name, tatoeba=True)
    for english in sorted(directory.glob("tatoeba.*-eng.eng")):
        lang = english.name.split(".")[1].removesuffix("-eng")
        other = english.with_name(f"tatoeba.{lang}-eng.{lang}")
        if not other.is_file():
            raise ValueError(f"{english}: expected {other.name} beside it, found none")
        sides = _aligned(other, english)
        first, n = len(found.texts), len(sides[0])
        found.texts += sides[0] + sides[1]
        found.groups[lang, ""] = (first + np.arange(n), first + n + np.arange(n))
    if not found.groups:
        raise ValueError(f"{directory}: expected tatoeba.xxx-eng.eng, found none")
    return found


# ---- scored pairs ----


def sts(path: Path) -> STS:
    """csv with columns sentence1, sentence2, score."""
    texts, scores = [], []
    try:
        content = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}: {error.reason}") from None
    for number, row in _csv(path, content.removeprefix("\ufeff")):
        try:
            pair, score = [row["sentence1"], row["sentence2"]], float(row["score"])
        except KeyError as error:
            raise ValueError(
                f"{path}: expected columns sentence1, sentence2, score, no {error}"
            ) from None
        except (TypeError, ValueError):
            raise ValueError(
                f"{path}:{number}: score: expected a number, got {row['score']!r}"
            ) from None
        if None in pair or not math.isfinite(score):
            raise ValueError(
                f"{path}:{number}: sentence1, sentence2, score: expected two texts "
                f"and a number, got {pair[0]!r}, {pair[1]!r}, {score}"
            )
        texts += pair
        scores.append(score)
    if not scores:
        raise ValueError(f"{path}: expected rows, found none")
    return STS(path.stem, texts, np.array(scores))


def _csv(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row), of texts as long as they may be."""
    csv.field_size_limit(2**31 - 1)  # as rows.py does
    reader = csv.DictReader(io.StringIO(content, newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not csv: {error}") from None


# ---- mining ----


def mining(directory: Path) -> Mining:
    """BUCC's files xx-en.SPLIT.xx and xx-en.SPLIT.en, lines of id TAB text, with xx-en.SPLIT.gold,
    lines of id TAB id. A threshold is tuned on dev, else on training; test is reported if its gold
    is there, else training, if it is not what was tuned on, else that.

    Raises:
        ValueError: a language without gold, a malformed line, an id twice, gold of no such id.
    """
    found = Mining(directory.name)
    matches = [m for p in sorted(directory.iterdir()) if (m := BUCC.fullmatch(p.name))]
    for pair in sorted({m[1] for m in matches}):
        with_gold = [s for s in ("dev", "training", "test") if _bucc(directory, pair, s, "gold")]
        if not with_gold or with_gold == ["test"]:
            raise ValueError(
                f"{directory}: expected {pair}.dev.gold or {pair}.training.gold, found none"
            )
        tuned = with_gold[0]
        reported = "test" if "test" in with_gold else with_gold[-1]
        parts = {split: _part(found, directory, pair, split) for split in {tuned, reported}}
        lang = pair.removesuffix("-en")
        found.parts[lang] = parts[tuned], parts[reported]
        found.splits[lang] = tuned, reported
    return found


def _bucc(directory: Path, pair: str, split: str, what: str) -> Path | None:
    path = directory / f"{pair}.{split}.{what}"
    return path if path.is_file() else None


def _part(task: Mining, directory: Path, pair: str, split: str) -> Part:
    places, slices = [], []
    for side in pair.split("-"):
        path = _bucc(directory, pair, split, side)
        if path is None:
            raise ValueError(f"{directory}: expected {pair}.{split}.{side}, found none")
        first, place = len(task.texts), dict[str, int]()
        for where, (key, text) in _cells(path, ("id", "text")):
            if key in place:
                raise ValueError(f"{where}: id: expected a new one, got {key!r} again")
            place[key] = len(place)
            task.texts.append(text)
        places.append(place)
        slices.append(slice(first, len(task.texts)))
    path, gold = directory / f"{pair}.{split}.gold", []
    for where, keys in _cells(path, ("id", "id")):
        for key, place, side in zip(keys, places, pair.split("-"), strict=True):
            if key not in place:
                raise ValueError(f"{where}: expected an id of {pair}.{split}.{side}, got {key!r}")
        gold.append([place[key] for key, place in zip(keys, places, strict=True)])
    if not gold:
        raise ValueError(f"{path}: expected lines, found none")
    source, target = slices
    return Part(source, target, np.unique(np.array(gold, dtype=np.int64), axis=0))


# ---- a pool ----


def pool(directory: Path) -> Pool:
    """Files un.xx-yy.xx and un.xx-yy.yy, line by line translations, with pool.yy or without.

    Raises:
        ValueError: a side that is missing or of another length.
    """
    sides: dict[str, Side] = {}
    for match in filter(None, map(UN.fullmatch, sorted(p.name for p in directory.iterdir()))):
        start, target, side = match.groups()
        if side not in (start, target):
            raise ValueError(f"{directory / match[0]}: expected .{start} or .{target} at its end")
        paths = [directory / f"un.{start}-{target}.{code}" for code in (start, target)]
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{directory / match[0]}: expected {path.name} beside it")
        if side == target:
            if target in sides:
                raise ValueError(f"{paths[0]}: expected one file towards {target}, got another")
            among = directory / f"pool.{target}"
            sides[target] = Side(*_aligned(*paths), among if among.is_file() else None)
    return Pool(directory.name, sides)


# ---- retrieval ----


def retrieval(directory: Path, split: str = "") -> Retrieval:
    """BEIR's queries.jsonl (_id, text), corpus.jsonl (_id, text, maybe title) and qrels/SPLIT.tsv
    (query-id, corpus-id, score, with a header); without a split it is test, or the only one.

    Judged documents that are not in the corpus, as ArguAna has some, are said in a warning and are
    never found, as in BEIR and MTEB.

    Raises:
        ValueError: a missing file, a malformed line, an id twice, judgements of queries that are
            not there or of no document that is, several splits and none of them test.
    """
    for name in ("queries.jsonl", "corpus.jsonl"):
        if not (directory / name).is_file():
            raise ValueError(f"{directory}: expected {name}, found none")
    splits = sorted(p.stem for p in (directory / "qrels").glob("*.tsv"))
    chosen = split or ("test" if "test" in splits else splits[0] if len(splits) == 1 else "")
    if chosen not in splits:
        got = ", ".join(splits) or "none"
        raise ValueError(
            f"{directory}: expected qrels/test.tsv, or one other (name it: "
            f"{directory}/qrels/SPLIT.tsv), got {got}"
        )
    queries = {}
    for where, key, _, text in _documents(directory / "queries.jsonl"):
        if key in queries:
            raise ValueError(f"{where}: _id: expected a new one, got {key!r} again")
        queries[key] = text
    ids = [key for _, key, _, _ in _documents(directory / "corpus.jsonl")]
    place = {key: row for row, key in enumerate(ids)}
    if len(place) < len(ids):
        seen = set[str]()
        for where, key, _, _ in _documents(directory / "corpus.jsonl"):
            if key in seen:
                raise ValueError(f"{where}: _id: expected a new one, got {key!r} again")
            seen.add(key)
    path = directory / "qrels" / f"{chosen}.tsv"
    grades = _judgements(path, queries, place)  # place has what the corpus lacks, too, behind it
    judged_queries = [key for key in queries if key in grades]
    judged = [
        [row, document, grade]
        for row, key in enumerate(judged_queries)
        for document, grade in sorted(grades[key].items())
    ]
    order_N = np.empty(len(ids), dtype=np.int64)
    order_N[pc.sort_indices(pa.array(ids, pa.large_string())).to_numpy()] = np.arange(len(ids))
    name = f"{directory.name}-{split}" if split else directory.name
    texts = [queries[key] for key in judged_queries]
    own_Q = np.array([place.get(key, -1) for key in judged_queries], dtype=np.int64)
    corpus = directory / "corpus.jsonl"
    return Retrieval(name, texts, corpus, order_N, np.array(judged, np.int64), own_Q)


def _documents(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """(file:line, id, title, text) of a .jsonl file. A text may be empty, not missing."""
    for where, row in readers.of_file(path):
        if isinstance(row, str):
            raise ValueError(f"{where}: {row}")
        key: Any = row.get("_id")
        key = str(key) if isinstance(key, int) and not isinstance(key, bool) else key
        title, text = row.get("title") or "", row.get("text")
        for name, value in (("_id", key), ("title", title), ("text", text)):
            if not isinstance(value, str) or readers.SURROGATE.search(value):
                raise ValueError(f"{where}: {name}: expected text, got {value!r}")
        yield where, key, str(title), str(text)


def _titled(title: str, text: str) -> str:
    """As BEIR and MTEB join them."""
    return f"{title} {text}".strip() if title else text.strip()


def _judgements(path: Path, queries: Any, place: dict[str, int]) -> dict[str, dict[int, int]]:
    """Query id -> row of a document -> grade. Documents that have no place get one behind all.

    Raises:
        ValueError: a malformed line, a query that is not there, no document that is.
    """
    grades: dict[str, dict[int, int]] = {}
    N = len(place)
    columns = ("query-id", "corpus-id", "score")
    for number, (where, cells) in enumerate(_cells(path, columns)):
        if not number:
            if tuple(cells) != columns:
                raise ValueError(f"{where}: expected the header {', '.join(columns)}, got {cells}")
            continue
        query, document, grade = cells
        if query not in queries:
            raise ValueError(f"{where}: query-id: expected an id of queries.jsonl, got {query!r}")
        try:
            grades.setdefault(query, {})[place.setdefault(document, len(place))] = int(grade)
        except ValueError:
            raise ValueError(f"{where}: score: expected an integer, got {grade!r}") from None
    if not grades:
        raise ValueError(f"{path}: expected judgements, found none")
    lacking = list(place)[N:]
    if all(row >= N for of_query in grades.values() for row in of_query):
        raise ValueError(f"{path}: corpus-id: expected ids of corpus.jsonl, got {lacking[0]!r} ..")
    if lacking:
        warnings.warn(
            f"{path}: judged documents that corpus.jsonl lacks, and nothing can find: "
            f"{len(lacking)}, first {lacking[0]!r}",
            stacklevel=2,
        )
    return grades

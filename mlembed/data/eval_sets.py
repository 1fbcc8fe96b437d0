"""Evaluation data sets, read from the layouts in which they are published.

    cldr                       the texts that `make train` holds out of its built-in text
    tatoeba.xxx-eng.{xxx,eng}  a directory of line-aligned pairs, like LASER's (`Bitext`)
    id, lang, text             a table, every language against English (`Bitext`)
    en, sw                     a table of two languages, whose codes name the columns (`Bitext`)
    sentence1, sentence2, score    a table, also by other names of a pair and its score (`STS`)
    queries.jsonl, corpus.jsonl, qrels/SPLIT.tsv   a directory in BEIR's format (`Retrieval`)
    xx-en.{dev,training,test}.{xx,en,gold}         a directory in BUCC's format (`Mining`)
    un.xx-yy.{xx,yy}, pool.yy  a directory: translations to find in a pool (`Pool`)

Every task has a name and `texts`, all text in it, on which nothing may be trained.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Columns
from . import sources
from .formats import beir, layouts, paths, readers
from .formats.roles import Roles, as_number

PIVOTS = ("en", "eng", "eng_Latn", "eng-Latn")  # codes of the language that others are matched with
UN = re.compile(r"un\.([^.-]+)-([^.-]+)\.([^.-]+)")
BUCC = re.compile(r"([^.-]+-[^.-]+)\.(dev|training|test)\.([^.-]+)")


class Reread:
    """Texts that are read from disk each time they are iterated."""

    def __init__(self, read: Callable[[], Iterator[str]]) -> None:
        self._read, self._count = read, sum(1 for _ in read())

    def __iter__(self) -> Iterator[str]:
        return self._read()

    def __len__(self) -> int:
        return self._count


@dataclass
class Bitext:
    """Groups of aligned texts: (language, kind) -> int64 rows of `texts` on either side.

    tatoeba: whether the languages are those of LASER's files, for which means over sets of
    languages are published.
    """

    name: str
    texts: list[str] = field(default_factory=list)
    groups: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    tatoeba: bool = False


@dataclass
class STS:
    """Scored pairs: pair i is texts[2 i], texts[2 i + 1], its score scores[i] (fp64)."""

    name: str
    texts: list[str]
    scores: np.ndarray


@dataclass(frozen=True)
class Part:
    """One split of one language: rows of `texts` on either side, and gold, int64 [pairs, 2], which
    lists the pairs of rows within source and target that are translations.
    """

    source: slice
    target: slice
    gold: np.ndarray


@dataclass
class Mining:
    """For each language the part that tunes a threshold and the part that is reported, which are
    the same if only one has gold. splits: the names of both.
    """

    name: str
    texts: list[str] = field(default_factory=list)
    parts: dict[str, tuple[Part, Part]] = field(default_factory=dict)
    splits: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """Texts of one language and their translations, to be found among all of these and the lines of
    a pool.
    """

    queries: list[str]
    answers: list[str]
    pool: Path | None

    def others(self) -> Iterator[str]:
        """Yield the lines of the pool, without lines that equal an answer."""
        known = set(self.answers)
        return (line for line in _lines(self.pool) if line not in known) if self.pool else iter(())


@dataclass
class Pool:
    """Texts by target language whose translations are to be found in a pool."""

    name: str
    sides: dict[str, Side]
    texts: Reread = field(init=False)

    def __post_init__(self) -> None:
        self.texts = Reread(self._texts)

    def _texts(self) -> Iterator[str]:
        for side in self.sides.values():
            yield from side.queries
            yield from side.answers
            yield from side.others()


@dataclass
class Retrieval:
    """Queries, documents on disk, and judgements of pairs of them.

    queries: those that have judgements. order_N: int64, each document's position when all are
    sorted by id, which breaks ties. judged: int64 [judgements, 3] of query, document, relevance, by
    rising query and document; judged documents that the corpus lacks are N, N + 1, ..
    own_Q: int64, the document of a query's own id, or -1. It is not an answer (ArguAna's queries
    are in its corpus).
    """

    name: str
    queries: list[str]
    corpus: Path
    order_N: np.ndarray
    judged: np.ndarray
    own_Q: np.ndarray
    texts: Reread = field(init=False)

    def __post_init__(self) -> None:
        self.texts = Reread(self._texts)

    def documents(self) -> Iterator[str]:
        """Yield the documents as they are encoded: title and text."""
        return (beir.titled(title, text) for *_, title, text in beir.documents(self.corpus))

    def _texts(self) -> Iterator[str]:
        yield from self.queries
        for *_, title, text in beir.documents(self.corpus):
            yield beir.titled(title, text)
            if title:  # The passage may also occur without its title.
                yield text


Task = Bitext | STS | Mining | Pool | Retrieval

# ---- which layout ----


def read_all(sources: Sequence[str]) -> list[Task]:
    """Return all tasks of all sources.

    Raises:
        ValueError: two tasks of one name, whose scores would overwrite each other; as `read`.
    """
    tasks = [task for source in sources for task in read(source)]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"eval: expected distinct file or directory names, got {', '.join(names)}")
    return tasks


def read(source: str) -> list[Task]:
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
        return _directory(path)
    if path.suffix == ".tsv" and path.parent.name == "qrels" and path.is_file():
        return [retrieval(path.parents[1], path.stem)]
    (path,) = paths.files_of(source)
    return [_table(path)]


def _table(path: Path) -> Task:
    """Return the task of a file of rows: scored pairs, translations by id or by column."""
    try:
        read = partial(readers.of_file, path)
        roles, _, rows = layouts.open_rows(read, Columns(), evaluation=True)
    except ValueError as error:
        reason = str(error)
        raise ValueError(reason if reason.startswith(str(path)) else f"{path}: {reason}") from None
    name = paths.stem_of(path)
    if not roles.columns():
        for _ in readers.strict(rows):
            break
        raise ValueError(f"{path}: expected rows, found none")
    if roles.score:
        return _sts(name, path, roles, rows)
    if roles.nway:
        records = list(layouts.nway_rows(rows, roles, layouts.Report(name)))
    elif roles.languages:
        records = [
            {"id": where, "lang": lang, "text": str(row[lang])}
            for where, row in readers.strict(rows)
            for lang in roles.languages
            if readers.is_text(row.get(lang))
        ]
    else:
        raise ValueError(
            f"{path}: expected pairs with a score, columns id, lang, text, or two columns named by "
            f"codes of languages, got {roles.describe()}"
        )
    if not records:
        raise ValueError(f"{path}: expected rows, found none")
    return nway(name, records)


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
        if paths.suffix_of(p) in paths.SUFFIXES or (p / "corpus.jsonl").is_file()
    )
    if not files:
        listed = ", ".join(paths.SUFFIXES)
        raise ValueError(
            f"eval: expected tatoeba.*, un.*, xx-en.dev.*, corpus.jsonl or {listed} in {path}, "
            "found none"
        )
    return [task for file in files for task in read(str(file))]


def _lines(path: Path) -> Iterator[str]:
    return (line for _, line in readers.strict(readers.lines(path)))


def _aligned(first: Path, second: Path) -> tuple[list[str], list[str]]:
    for path, other in ((first, second), (second, first)):
        if not path.is_file():
            raise ValueError(f"{other}: expected {path.name} beside it, found none")
    a, b = list(_lines(first)), list(_lines(second))
    if len(a) != len(b) or not a:
        raise ValueError(
            f"{first}: expected as many lines as {second.name}, at least one, "
            f"got {len(a)} and {len(b)}"
        )
    return a, b


# ---- bitext ----


def nway(name: str, records: Iterable[dict[str, Any]]) -> Bitext:
    """Return a task of every language against English, or against the language of most texts.

    Args:
        records: rows {id, lang, text [, kind]}.

    Raises:
        ValueError: two texts of one id, language and kind; no ids are shared.
    """
    task = Bitext(name)
    places: dict[tuple[str, str, str], int] = {}
    for record in records:
        kind, lang, key = record.get("kind") or "", record["lang"], record["id"]
        if (kind, lang, key) in places:
            raise ValueError(
                f"{name}: expected one text of an id and language, got another of {key!r} in {lang}"
            )
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
    task = Bitext(directory.name, tatoeba=True)
    for english in sorted(directory.glob("tatoeba.*-eng.eng")):
        lang = english.name.split(".")[1].removesuffix("-eng")
        a, b = _aligned(english.with_name(f"tatoeba.{lang}-eng.{lang}"), english)
        first, n = len(task.texts), len(a)
        task.texts += a + b
        task.groups[lang, ""] = (first + np.arange(n), first + n + np.arange(n))
    if not task.groups:
        raise ValueError(f"{directory}: expected tatoeba.xxx-eng.eng, found none")
    return task


# ---- scored pairs ----


def _sts(name: str, path: Path, roles: Roles, rows: Iterator[readers.Row]) -> STS:
    """Return the scored pairs of a table; an empty cell is an empty text."""
    texts, scores = list[str](), list[float]()
    for where, row in readers.strict(rows):
        score = as_number(row.get(roles.score))
        if score is None or not math.isfinite(score):
            got = row.get(roles.score)
            raise ValueError(f"{where}: {roles.score}: expected a number, got {got!r}")
        for column in (roles.query, roles.positive):
            text = row.get(column)
            if not isinstance(text, str | None):
                raise ValueError(f"{where}: {column}: expected text, got {text!r}")
            texts.append(text or "")
        scores.append(score)
    if not scores:
        raise ValueError(f"{path}: expected rows, found none")
    return STS(name, texts, np.array(scores))


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
    task = Mining(directory.name)
    matches = [m for p in sorted(directory.iterdir()) if (m := BUCC.fullmatch(p.name))]
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
            split: _part(task, directory, pair, split) for split in dict.fromkeys((tuned, reported))
        }
        lang = pair.removesuffix("-en")
        task.parts[lang] = parts[tuned], parts[reported]
        task.splits[lang] = tuned, reported
    return task


def _part(task: Mining, directory: Path, pair: str, split: str) -> Part:
    places, slices = [], []
    for side in pair.split("-"):
        path = directory / f"{pair}.{split}.{side}"
        if not path.is_file():
            raise ValueError(f"{directory}: expected {path.name}, found none")
        first, place = len(task.texts), dict[str, int]()
        for where, (key, text) in beir.cells(path, ("id", "text")):
            if key in place:
                raise ValueError(f"{where}: id: expected a new one, got {key!r} again")
            place[key] = len(place)
            task.texts.append(text)
        places.append(place)
        slices.append(slice(first, len(task.texts)))
    path, gold = directory / f"{pair}.{split}.gold", []
    for where, keys in beir.cells(path, ("id", "id")):
        for key, place, side in zip(keys, places, pair.split("-"), strict=True):
            if key not in place:
                raise ValueError(f"{where}: expected an id of {pair}.{split}.{side}, got {key!r}")
        gold.append([place[key] for key, place in zip(keys, places, strict=True)])
    if not gold:
        raise ValueError(f"{path}: expected lines, found none")
    return Part(slices[0], slices[1], np.unique(np.array(gold, dtype=np.int64), axis=0))


# ---- a pool ----


def pool(directory: Path) -> Pool:
    """Read files un.xx-yy.xx and un.xx-yy.yy, translations line by line, and pool.yy if it exists.

    Raises:
        ValueError: a side is missing or differs in length.
    """
    sides: dict[str, Side] = {}
    for match in filter(None, map(UN.fullmatch, sorted(p.name for p in directory.iterdir()))):
        start, target, side = match.groups()
        if side not in (start, target):
            raise ValueError(f"{directory / match[0]}: expected .{start} or .{target} at its end")
        first, second = (directory / f"un.{start}-{target}.{code}" for code in (start, target))
        aligned = _aligned(first, second)
        if side == target:
            if target in sides:
                raise ValueError(f"{first}: expected one file towards {target}, got another")
            among = directory / f"pool.{target}"
            sides[target] = Side(*aligned, among if among.is_file() else None)
    return Pool(directory.name, sides)


# ---- retrieval ----


def retrieval(directory: Path, split: str = "") -> Retrieval:
    """Read BEIR's queries.jsonl, corpus.jsonl and qrels/SPLIT.tsv (beir.py).

    Args:
        split: by default test, or the only split.

    Raises:
        ValueError: a file is missing, a line is malformed, two rows have one id, judgements of
            unknown queries or of unknown documents only.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    for name in ("queries.jsonl", "corpus.jsonl"):
        if not (directory / name).is_file():
            raise ValueError(f"{directory}: expected {name}, found none")
    corpus, path = directory / "corpus.jsonl", beir.choose_split(directory, split)
    queries = dict(beir.by_id(directory / "queries.jsonl"))
    place = {key: row for row, (key, _) in enumerate(beir.by_id(corpus))}
    ids = list(place)
    grades = beir.judgements(path, queries, place)
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
    )

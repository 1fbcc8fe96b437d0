"""Tables of training text: items, their texts, and which texts count as the same."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from .. import config
from ..runtime.cache import digest
from .formats.layouts import ROUNDING, SINGLE, Item, Report
from .formats.readers import normalise
from .formats.roles import Roles

MIN_SCORE = 0.8  # a scored pair counts as a positive from 4 of 5 on (F2LLM, arXiv 2510.02294)
CHUNK = 8192  # texts that are read or written at once
LONG = 2**24  # characters of texts that are written at once
SPOOL = "spool.arrow"  # all texts of a table, before it is known which stay


@dataclass(frozen=True)
class Table:
    """One source as text. Item i owns texts[starts[i]:starts[i + 1]].

    The texts of a pair are the query, the positive, then any hard negatives; the texts of an n-way
    item are translations of each other; a single text is an item by itself. Texts with equal ids
    are never each other's negatives.

    texts: a list, or memory-mapped. ids: int64 [texts]. starts: int64 [items + 1]. task: one of
    `config.TASKS`, or SINGLE. scores: fp32 [items] in 0..1, of task sts, else None.
    teacher_scores: a teacher's scores of each text with its item's query, fp32 [texts], NaN for
    queries and texts without a score; None for a source without scores.
    """

    name: str
    nway: bool
    texts: Sequence[str]
    ids: np.ndarray
    starts: np.ndarray
    source: config.Source = config.Source(path="text")
    task: str = "retrieval"
    scores: np.ndarray | None = None
    teacher_scores: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def single(self) -> bool:
        """Whether items are single texts."""
        return self.task == SINGLE

    @property
    def either(self) -> bool:
        """Whether any text may be drawn as a query or as a document."""
        return self.nway or self.single

    @cached_property
    def scored(self) -> int:
        """Number of items whose positive and at least one negative have a teacher's scores."""
        if self.teacher_scores is None or not len(self):
            return 0
        known = np.isfinite(self.teacher_scores)
        counts = np.add.reduceat(known, self.starts[:-1], dtype=np.int64)
        return int((known[self.starts[:-1] + 1] & (counts > 1)).sum())

    @cached_property
    def texts_sha256(self) -> str:
        """Digest of the texts in their order."""
        total = hashlib.sha256()
        for _ in hashed(self.texts, total):
            pass
        return total.hexdigest()

    @cached_property
    def sha256(self) -> str:
        """Digest of the items: all that a batch takes from a table, but for the source's options.

        The name and format of files do not count.
        """
        given = [values for values in (self.scores, self.teacher_scores) if values is not None]
        arrays = [self.starts, self.ids, *given]
        return digest(self.nway, self.texts_sha256, arrays=map(np.ascontiguousarray, arrays))


def hashed(texts: Iterable[str], total: "hashlib._Hash") -> Iterator[list[str]]:
    """Yield the texts, CHUNK at a time, and add their lengths and bytes to a hash."""
    texts = iter(texts)
    while chunk := list(islice(texts, CHUNK)):
        content = [text.encode("utf-8", "surrogatepass") for text in chunk]
        total.update(np.array([len(one) for one in content], dtype=np.int64).tobytes())
        total.update(b"".join(content))
        yield chunk


# ---- texts on disk ----


class StoredTexts(Sequence[str]):
    """Texts of an Arrow file that `TextWriter` wrote, memory-mapped in each process."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.path = path
        with pa.memory_map(str(path)) as file:
            self.column = pa.ipc.open_file(file).read_all().column(0)

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredTexts, (self.path,)

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return self.column[row].to_pylist()
        return self.column[int(row)].as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self.column.chunks:
            yield from chunk.to_pylist()


class TextWriter:
    """Writes texts to an Arrow file, CHUNK at a time, or fewer if they are long."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.path, self.buffer, self.room = path, list[str](), LONG
        self.file = pa.ipc.new_file(str(path), pa.schema([("text", pa.large_string())]))

    def extend(self, texts: Iterable[str]) -> None:
        """Append texts."""
        for text in texts:
            self.buffer.append(text)
            self.room -= len(text)
            if len(self.buffer) == CHUNK or self.room < 0:
                self._write()

    def _write(self) -> None:
        import pyarrow as pa

        column = pa.array(self.buffer, pa.large_string())
        self.file.write_batch(pa.record_batch([column], names=["text"]))
        self.buffer, self.room = [], LONG

    def close(self) -> StoredTexts:
        """Finish the file and map it."""
        if self.buffer:
            self._write()
        self.file.close()
        return StoredTexts(self.path)


def _buffer(directory: Path | None) -> list[str] | TextWriter:
    return TextWriter(directory / SPOOL) if directory else []


def _selected(texts: list[str] | TextWriter, rows: np.ndarray) -> Sequence[str]:
    """Return the texts of `rows` in their order; those of a spool go to texts.arrow next to it."""
    if isinstance(texts, list):
        return [texts[row] for row in rows.tolist()]
    spool = texts.close()
    writer = TextWriter(spool.path.with_name("texts.arrow"))
    # Row by row, as Arrow's take would copy all texts into one array first, each time.
    writer.extend(spool[row] for row in rows.tolist())
    spool.path.unlink()
    return writer.close()


# ---- which texts are the same ----


def text_id(*parts: str) -> int:
    """Return a 63-bit id of a text, equal in every process and on every machine."""
    digest = hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def linked(numbers: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return ids, int64 [texts], that are equal for all texts that pairs link, also by other pairs.

    Two queries with the same positive, or two positives of the same query (a name in two
    languages, two passages that answer), would be false negatives of each other. A group's id is
    the number of its first text.

    Args:
        numbers: int64 [texts] of a pair table, equal for equal texts. starts: int64 [items + 1].
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    _, first, place = np.unique(numbers, return_index=True, return_inverse=True)
    queries, positives = place[starts[:-1]], place[starts[:-1] + 1]
    links = coo_array((np.ones(len(queries)), (queries, positives)), shape=(len(first),) * 2)
    groups, group = connected_components(links, directed=False)
    earliest = np.full(groups, len(numbers))
    np.minimum.at(earliest, group, first)
    return numbers[earliest][group][place]


def overlaps(texts: Iterable[str], held_out: AbstractSet[str]) -> bool:
    """Return whether one of the texts, normalised, is held out."""
    return bool(held_out) and any(normalise(text) in held_out for text in texts)


# ---- items to tables ----


def pair_table(
    name: str,
    items: Iterator[Item],
    report: Report,
    task: str,
    cap: int,
    held_out: AbstractSet[str],
    directory: Path | None,
) -> Table:
    """Return the table of a source of pairs, empty if none is left.

    Args:
        report: counts what is left out. cap: maximum number of items, 0 for all. held_out:
            normalised texts that must not be trained on. directory: where texts are stored, else
            they are held in memory.
    """
    texts = _buffer(directory)
    numbers, sizes, pairs, scores = array("q"), array("q"), array("q"), array("d")
    teacher_scores = array("f")
    for item in items:
        if overlaps(item.texts, held_out):
            report.held_out += len(item.texts)
            continue
        ids = [text_id(text) for text in item.texts]
        texts.extend(item.texts)
        numbers.extend(ids)
        sizes.append(len(ids))
        pairs.append(text_id(f"{ids[0]} {ids[1]}"))
        scores.append(np.nan if item.score is None else item.score)
        if item.teacher_scores is not None:
            teacher_scores.extend((np.nan, *item.teacher_scores))
    number, size, score = (np.array(values) for values in (numbers, sizes, scores))
    score = _scaled(score, report)
    valid = _first_of_equals(pairs)
    report.duplicates = int((~valid).sum())
    if task != "sts":
        # The comparison is False for NaN, a missing score.
        low = valid & (score < MIN_SCORE)
        report.by_score = int(low.sum())
        valid &= ~low
    valid = _capped(valid, cap, name, report)
    rows = np.flatnonzero(np.repeat(valid, size))
    starts = np.concatenate([[0], np.cumsum(size[valid])])
    ids_of_rows = linked(number[rows], starts) if len(rows) else number[rows]
    table = Table(name, False, _selected(texts, rows), ids_of_rows, starts)
    if teacher_scores:
        table = replace(table, teacher_scores=np.array(teacher_scores)[rows])
    return replace(table, scores=score[valid].astype(np.float32)) if task == "sts" else table


def nway_table(
    name: str,
    rows: Iterator[dict[str, str]],
    report: Report,
    cap: int,
    held_out: AbstractSet[str],
    directory: Path | None,
) -> Table:
    """Return the table of an n-way source; arguments as of `pair_table`, rows {id, lang, text}."""
    texts = _buffer(directory)
    keys, entries = array("q"), array("q")
    for row in rows:
        if overlaps([row["text"]], held_out):
            report.held_out += 1
            continue
        texts.extend([row["text"]])
        keys.append(text_id(name, row["id"]))
        entries.append(text_id(row["id"], row["lang"], row["text"]))
    valid = _first_of_equals(entries)
    report.duplicates = int((~valid).sum())
    key, first, group = np.unique(np.array(keys), return_index=True, return_inverse=True)
    # Ids keep the order in which they come.
    order = np.argsort(first)
    key, group = key[order], np.argsort(order)[group]
    count = np.bincount(group[valid], minlength=len(key))
    report.alone = int((count == 1).sum())
    several = _capped(count > 1, cap, name, report)
    valid &= several[group]
    chosen = np.flatnonzero(valid)[np.argsort(group[valid], kind="stable")]
    size = count[several]
    starts = np.concatenate([[0], np.cumsum(size)])
    return Table(name, True, _selected(texts, chosen), np.repeat(key[several], size), starts)


def text_table(
    name: str,
    given: Iterator[str],
    report: Report,
    cap: int,
    held_out: AbstractSet[str],
    directory: Path | None,
) -> Table:
    """Return the table of a source of single texts; arguments as of `pair_table`."""
    texts, numbers = _buffer(directory), array("q")
    for text in given:
        if overlaps([text], held_out):
            report.held_out += 1
            continue
        texts.extend([text])
        numbers.append(text_id(text))
    valid = _first_of_equals(numbers)
    report.duplicates = int((~valid).sum())
    rows = np.flatnonzero(_capped(valid, cap, name, report))
    ids = np.array(numbers)[rows]
    return Table(name, False, _selected(texts, rows), ids, np.arange(len(rows) + 1), task=SINGLE)


class ScaleError(ValueError):
    """Scores whose scale is unknown; the message lacks their file and column."""


def _scaled(score: np.ndarray, report: Report) -> np.ndarray:
    """Return scores, fp64 [pairs], NaN for a missing one, as 0..1; the report gets their scale.

    Raises:
        ScaleError: the largest is above 1, but so low that 0..5 cannot be the scale either.
    """
    largest = float(np.nanmax(score)) if np.isfinite(score).any() else 0.0
    if 1 + ROUNDING < largest < 2:
        raise ScaleError(f"expected scores 0..1 or 0..5, got at most {largest:.3g}")
    if np.isfinite(score).any():
        report.scale = "0..5" if largest > 1 + ROUNDING else "0..1"
    return np.clip(score / 5 if report.scale == "0..5" else score, 0, 1)


def _first_of_equals(values: array) -> np.ndarray:
    """Return bool [values], True where a value occurs for the first time."""
    first = np.zeros(len(values), dtype=bool)
    first[np.unique(np.array(values), return_index=True)[1]] = True
    return first


def _capped(valid: np.ndarray, cap: int, name: str, report: Report) -> np.ndarray:
    """Return `valid` with at most `cap` True, drawn from a seed that depends on the name alone."""
    places = np.flatnonzero(valid)
    report.by_cap = max(0, len(places) - cap) if cap else 0
    if not report.by_cap:
        return valid
    capped = np.zeros_like(valid)
    capped[np.random.default_rng([0, text_id(name)]).choice(places, cap, replace=False)] = True
    return capped


def check_items(where: str, report: Report, roles: Roles) -> None:
    """Raise ValueError, with the likely reason, if a source has no items."""
    if report.items:
        return
    wanted = "rows"
    if report.bad < report.rows:
        wanted = "texts" if roles.single else "pairs"
        wanted = "ids with two texts or more" if roles.nway else wanted
    if report.by_score:
        wanted = f"pairs with a score of {MIN_SCORE} or more"
    elif report.held_out:
        wanted += " without texts of the evaluation"
    raise ValueError(f"{where}: expected {wanted}, found none{report.first_bad}")


def check_teaches(table: Table, negatives: bool = True, alone: bool = False) -> None:
    """Check that a contrastive loss of a table is not always zero.

    Texts of equal ids are never each other's negatives, so texts of one id have none.

    Args:
        negatives: whether hard negatives are drawn, if the table has any.
        alone: whether a batch is one item, and no memory bank has others.

    Raises:
        ValueError: all texts are of one group, all scores are equal, or an item is alone and has no
            hard negatives.
    """
    where = f"source {table.name}"
    hard = negatives and not table.nway and bool((np.diff(table.starts) > 2).any())
    if alone and not hard:
        raise ValueError(
            f"batch_size: expected 2 or more for {where}, which has no hard negatives, got 1"
        )
    # A query has the id of its positive.
    groups = table.ids if hard else table.ids[table.starts[:-1]]
    what = "ids" if table.nway else "groups of linked texts"
    if table.task in ("clustering", "classification"):
        # Their negatives are a query's own, which every row has.
        return
    if table.scores is not None:
        groups, what = table.scores, "different scores"
    if (groups == groups[0]).all():
        raise ValueError(f"{where}: expected two {what} or more, got one")


# ---- what was understood ----


def describe(table: Table, report: Report) -> str:
    """Return one line: counts, task, columns by role, unused columns, what is left out and why."""
    kind = "n-way ids" if table.nway else "pairs"
    counts = f"{len(table)} {kind}, {len(table.texts)} texts, {table.task}"
    if table.single:
        counts = f"{len(table)} single texts, for distillation alone"
    scale = f"; scores {report.scale}" if report.scale else ""
    teacher_scores = (
        "" if table.teacher_scores is None else f"; a teacher's scores of {table.scored} pairs"
    )
    return f"{counts}; {report.roles}{scale}{teacher_scores}{left_out(report)}"


def left_out(report: Report) -> str:
    """Return how many rows of a source are not trained on, by reason; "" for none."""
    counts = {
        "bad rows": report.bad,
        "texts of the evaluation": report.held_out,
        "duplicates": report.duplicates,
        f"scored below {MIN_SCORE}": report.by_score,
        "of another label": report.by_label,
        "without a translation": report.alone,
        "beyond the cap": report.by_cap,
    }
    parts = [f"{count} {reason}" for reason, count in counts.items() if count]
    return f"; left out: {', '.join(parts)}" if parts else ""

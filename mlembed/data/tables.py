"""Tables of training text: items, their texts, and which of them count as the same."""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .. import config
from ..runtime import cache
from .cldr import normalise
from .formats import layouts
from .formats.layouts import Item, Layout, Report
from .formats.readers import Row

MIN_SCORE = 0.8  # a scored pair counts as a positive from 4 of 5 on (F2LLM, arXiv 2510.02294)
SPOOL = "spool.arrow"  # texts before it is known which stay


@dataclass(frozen=True)
class Table:
    """One source as text. Item i owns texts[starts[i]:starts[i + 1]].

    Of a pair table these are the query, the positive, then any hard negatives; of an n-way table,
    translations. Texts with equal `ids` are never each other's negatives.
    """

    name: str
    nway: bool
    texts: Sequence[str]  # a list, or memory-mapped
    ids: np.ndarray  # int64 [texts]
    starts: np.ndarray  # int64 [items + 1]
    source: config.Source = config.Source(path="text")
    task: str = "retrieval"  # one of config.TASKS
    scores: np.ndarray | None = None  # float32 [items] in 0..1, of task sts

    def __len__(self) -> int:
        return len(self.starts) - 1


def text_id(*parts: str) -> int:
    """A 63-bit id of a text, the same in every process and on every machine."""
    digest = hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


# ---- reading ----


@dataclass(frozen=True)
class _Part:
    """What becomes one table: a file, parallel files, a data set, the built-in text."""

    name: str
    where: str
    rows: Callable[[], Iterator[Row]]
    files: list[Path] = field(default_factory=list)
    parallel: bool = False
    layout: Layout | None = None  # where it needs no recognising


def _pairs(
    part: _Part,
    found: Iterator[Item],
    report: Report,
    task: str,
    cap: int,
    held_out: AbstractSet[str],
    directory: Path | None,
) -> Table:
    texts: list[str] | cache.Writer = cache.Writer(directory / SPOOL) if directory else []
    numbers, sizes, pairs, scores = array("q"), array("q"), array("q"), array("d")
    for item in found:
        parts = [item.query, item.positive, *item.negatives]
        if held_out and any(normalise(text) in held_out for text in parts):
            report.held_out += len(parts)
            continue
        own = [text_id(text) for text in parts]
        texts.extend(parts)
        numbers.extend(own)
        sizes.append(len(parts))
        pairs.append(text_id(f"{own[0]} {own[1]}"))
        scores.append(np.nan if item.score is None else item.score)
    number, size, score = (np.array(values) for values in (numbers, sizes, scores))
    if (score > 1).any():
        score = score / 5
    kept = _new(pairs)
    report.duplicates = int((~kept).sum())
    if task != "sts":
        low = kept & (score < MIN_SCORE)  # which a missing one, NaN, is not
        report.by_score = int(low.sum())
        kept &= ~low
    kept = _capped(kept, cap, part.name, report)
    if not kept.any():
        raise _nothing(part.where, report, nway=False)
    rows_kept = np.flatnonzero(np.repeat(kept, size))
    starts = np.concatenate([[0], np.cumsum(size[kept])])
    ids = linked(number[rows_kept], starts)
    table = Table(part.name, False, _selected(texts, rows_kept), ids, starts)
    return replace(table, scores=score[kept].astype(np.float32)) if task == "sts" else table


def _nway(
    part: _Part,
    found: Iterator[Row],
    report: Report,
    cap: int,
    held_out: AbstractSet[str],
    directory: Path | None,
) -> Table:
    texts: list[str] | cache.Writer = cache.Writer(directory / SPOOL) if directory else []
    keys, whole = array("q"), array("q")
    for row in layouts.nway_rows(found, report):
        if held_out and normalise(row["text"]) in held_out:
            report.held_out += 1
            continue
        texts.extend([row["text"]])
        keys.append(text_id(part.name, row["id"]))
        whole.append(text_id(row["id"], row["lang"], row["text"]))
    kept = _new(whole)
    report.duplicates = int((~kept).sum())
    key, first, group = np.unique(np.array(keys), return_index=True, return_inverse=True)
    order = np.argsort(first)  # ids in the order in which they come
    key, group = key[order], np.argsort(order)[group]
    count = np.bincount(group[kept], minlength=len(key))
    report.alone = int((count == 1).sum())
    several = _capped(count > 1, cap, part.name, report)
    if not several.any():
        raise _nothing(part.where, report, nway=True)
    kept &= several[group]
    rows_kept = np.flatnonzero(kept)[np.argsort(group[kept], kind="stable")]
    size = count[several]
    starts = np.concatenate([[0], np.cumsum(size)])
    ids = np.repeat(key[several], size)
    return Table(part.name, True, _selected(texts, rows_kept), ids, starts)


def _new(values: array) -> np.ndarray:
    """Which values had not been there before -> bool [values]."""
    new = np.zeros(len(values), dtype=bool)
    new[np.unique(np.array(values), return_index=True)[1]] = True
    return new


def _capped(kept: np.ndarray, cap: int, name: str, report: Report) -> np.ndarray:
    """At most `cap` of what is kept: a function of these and the name alone."""
    places = np.flatnonzero(kept)
    report.by_cap = max(0, len(places) - cap) if cap else 0
    if not report.by_cap:
        return kept
    capped = np.zeros_like(kept)
    capped[np.random.default_rng([0, text_id(name)]).choice(places, cap, replace=False)] = True
    return capped


def _selected(texts: list[str] | cache.Writer, kept: np.ndarray) -> Sequence[str]:
    """The texts of these rows, in their order; of a spool, in texts.arrow beside it."""
    if isinstance(texts, list):
        return [texts[row] for row in kept.tolist()]
    spool = texts.close()
    chosen = cache.Writer(spool.path.with_name("texts.arrow"))
    for begin in range(0, len(kept), cache.CHUNK):
        # One by one: Arrow's take would copy all texts into one array first, each time.
        chosen.extend([spool[row] for row in kept[begin : begin + cache.CHUNK].tolist()])
    spool.path.unlink()
    return chosen.close()


def linked(numbers: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Ids of the texts of a pair table, equal for all that pairs link, directly or by others.

    Two queries with the same positive, or two positives of the same query (a name in two
    languages, two passages that answer), would be false negatives of each other. A group's id is
    the number of the first of its texts.

    Args:
        numbers: int64 [texts], equal for equal texts.
    """
    _, first, place = np.unique(numbers, return_index=True, return_inverse=True)
    queries, positives = place[starts[:-1]], place[starts[:-1] + 1]
    links = coo_array((np.ones(len(queries)), (queries, positives)), shape=(len(first),) * 2)
    groups, group = connected_components(links, directed=False)
    earliest = np.full(groups, len(numbers))
    np.minimum.at(earliest, group, first)
    return numbers[earliest][group][place]


def _nothing(where: str, report: Report, nway: bool) -> ValueError:
    """Why a source has no items."""
    wanted = "rows"
    if report.bad < report.rows:
        wanted = "ids with two texts or more" if nway else "pairs"
    if report.by_score:
        wanted = f"pairs with a score of {MIN_SCORE} or more"
    elif report.held_out:
        wanted += " without texts of the evaluation"
    first = f"; {report.bad} bad ones, first {report.bad_rows[0]}" if report.bad else ""
    return ValueError(f"{where}: expected {wanted}, found none{first}")

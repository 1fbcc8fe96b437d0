"""Training text: files to tables, tables to an order of batches that is a function of a seed.

A table's items are what is drawn. Of a pair table (query, positive, optional negatives) an item is
a row; of an n-way table (id, lang, text) it is an id, all of whose texts are translations of each
other, and two of them are drawn as query and positive.

A batch comes from one source. Which source, which items and which of their texts depend on (seed,
batch number) alone: there is no position to save, and every process can draw the whole batch and
keep its share, so that runs of any number of processes see the same data.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from . import cldr, config, depth
from .cldr import normalise
from .distributed import World
from .pack import Batch, collate
from .tokenizer import tokenize

MIN_SCORE = 0.8  # a scored pair counts as a positive from 4 of 5 on (F2LLM, arXiv 2510.02294)
PAIR = ("query", "positive")
NWAY = ("id", "lang", "text")
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Table:
    """One source as text. Item i owns texts[starts[i]:starts[i + 1]].

    Of a pair table these are the query, the positive, then any hard negatives; of an n-way table,
    translations. Texts with equal `ids` are never each other's negatives.
    """

    name: str
    nway: bool
    texts: list[str]
    ids: np.ndarray  # int64 [texts]
    starts: np.ndarray  # int64 [items + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1


@functools.cache
def cldr_tables() -> tuple[pa.Table, pa.Table]:
    """The built-in text (train pairs, held-out n-way table), built once a process."""
    return cldr.build()


def text_id(*parts: str) -> int:
    """A 63-bit id of a text, the same in every process and on every machine."""
    digest = hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


# ---- files to tables ----


def read(source: str) -> list[Table]:
    """`cldr`, a .jsonl or .parquet file, or a directory of them -> one Table a file.

    Raises:
        ValueError: nothing there, no usable columns, a malformed row (with file and line), no rows.
    """
    if source == "cldr":
        return [_pairs("cldr", "cldr", cldr_tables()[0].to_pylist())]
    return [_table(path) for path in files_of(source)]


def files_of(source: str) -> list[Path]:
    """The data files of a path: itself, or what a directory holds, sorted."""
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".jsonl", ".parquet"))
        if not files:
            raise ValueError(f"data: expected .jsonl or .parquet files in {source}, found none")
        return files
    if not path.is_file():
        raise ValueError(f"data: expected a file or directory, got {source}, which does not exist")
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"data: expected .jsonl or .parquet, got {source}")
    return [path]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """All rows of a file, which have the columns of a pair table or all of an n-way table.

    Raises:
        ValueError: other columns, no rows, or the first malformed row, as file:line (for parquet
            the row number) and the reason.
    """
    rows: list[dict[str, Any]] = []
    required: tuple[str, ...] = ()
    for number, row in (_jsonl_rows if path.suffix == ".jsonl" else _parquet_rows)(path):
        required = required or _layout(row, f"{path}:{number}")
        for name in required:
            value = row.get(name)
            row[name] = str(value) if name == "id" and isinstance(value, int) else value
            if not is_text(row[name]):
                raise ValueError(f"{path}:{number}: {name}: expected text, got {value!r}")
        score = row.get("score")
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise ValueError(f"{path}:{number}: score: expected a number 0..1, got {score!r}")
        negatives = row.get("negatives") or []
        if not isinstance(negatives, list) or not all(map(is_text, negatives)):
            raise ValueError(
                f"{path}:{number}: negatives: expected a list of texts, got {negatives!r}"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: expected rows, found none")
    return rows


def is_text(value: Any) -> bool:
    """A string with something in it, all of it Unicode (json may hold half a surrogate pair)."""
    return isinstance(value, str) and bool(value.strip()) and not SURROGATE.search(value)


def _layout(row: dict[str, Any], where: str) -> tuple[str, ...]:
    for columns in (PAIR, NWAY):
        if row.keys() >= set(columns):
            return columns
    raise ValueError(
        f"{where}: expected columns {', '.join(PAIR)} [, negatives, score] or {', '.join(NWAY)}, "
        f"got {', '.join(row) or 'none'}"
    )


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line.decode("utf-8")) if line.strip() else None
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8: {error.reason}") from None
            except ValueError as error:  # also of numbers with more digits than Python reads
                raise ValueError(f"{path}:{number}: not json: {error}") from None
            if row is None and not line.strip():
                continue
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: expected an object, got {type(row).__name__}")
            yield number, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not parquet: {str(error).splitlines()[0]}") from None
    if "verse_id" in table.column_names and "id" not in table.column_names:
        names = ["id" if name == "verse_id" else name for name in table.column_names]
        table = table.rename_columns(names)
    _layout(dict.fromkeys(table.column_names), f"{path}:1")
    kept = [c for c in (*PAIR, *NWAY, "negatives", "score", "kind") if c in table.column_names]
    yield from enumerate(table.select(kept).to_pylist(), 1)


def _table(path: Path) -> Table:
    rows = rows_of(path)
    make = _pairs if "query" in rows[0] and "positive" in rows[0] else _nway
    return make(path.stem, str(path), rows)


def _pairs(name: str, where: str, rows: list[dict[str, Any]]) -> Table:
    texts: list[str] = []
    starts = [0]
    for row in rows:
        score = row.get("score")
        if score is not None and score < MIN_SCORE:
            continue
        texts += [row["query"], row["positive"], *(row.get("negatives") or [])]
        starts.append(len(texts))
    if not texts:
        raise ValueError(f"{where}: expected pairs with a score of {MIN_SCORE} or more, found none")
    return Table(name, False, texts, _linked(texts, np.array(starts)), np.array(starts))


def _linked(texts: list[str], starts: np.ndarray) -> np.ndarray:
    """Ids of the texts of a pair table, equal for all that pairs link, directly or by others.

    Two queries with the same positive, or two positives of the same query (a name in two
    languages, two passages that answer), would be false negatives of each other.
    """
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    number = np.array([place[text] for text in texts])
    queries, positives = number[starts[:-1]], number[starts[:-1] + 1]
    links = coo_array((np.ones(len(queries)), (queries, positives)), shape=(len(place),) * 2)
    _, group = connected_components(links, directed=False)
    _, first = np.unique(group, return_index=True)
    distinct = list(place)
    id_of_group = np.array([text_id(distinct[i]) for i in first])
    return id_of_group[group[number]]


def _nway(name: str, where: str, rows: list[dict[str, Any]]) -> Table:
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row["text"])
    groups = {key: texts for key, texts in groups.items() if len(texts) > 1}
    if not groups:
        raise ValueError(f"{where}: expected ids with two texts or more, found none")
    sizes = [len(texts) for texts in groups.values()]
    ids = np.array([text_id(name, key) for key in groups])
    texts = [text for group in groups.values() for text in group]
    return Table(name, True, texts, np.repeat(ids, sizes), np.cumsum([0, *sizes]))


def without(table: Table, held_out: set[str]) -> tuple[Table | None, int]:
    """The table less every text that evaluation uses, and how many texts went.

    A pair goes as a whole; of an n-way item only the text goes, unless a single one remains.
    """
    kept: list[int] = []
    starts = [0]
    for begin, end in zip(table.starts[:-1].tolist(), table.starts[1:].tolist(), strict=True):
        clean = [row for row in range(begin, end) if normalise(table.texts[row]) not in held_out]
        if len(clean) == end - begin or (table.nway and len(clean) > 1):
            kept += clean
            starts.append(len(kept))
    if not kept:
        return None, len(table.texts)
    texts = [table.texts[row] for row in kept]
    clean_table = Table(table.name, table.nway, texts, table.ids[kept], np.array(starts))
    return clean_table, len(table.texts) - len(kept)


# ---- tables to batches ----


@functools.lru_cache(maxsize=64)
def permutation(seed: int, source: int, epoch: int, items: int) -> np.ndarray:
    """Each epoch of a source is a permutation of its items."""
    return np.random.default_rng([seed, 3, source, epoch]).permutation(items)


class Batches(Dataset[Batch]):
    """Micro-batches 0, 1, .. of a run, each a function of its number (see the module's docstring).

    Texts are tokenised once, on construction, and held as flat int32 arrays.
    """

    def __init__(
        self, tables: Sequence[Table], tokenizer: Tokenizer, run: config.Run, world: World
    ) -> None:
        if run.batch_size % world.size:
            raise ValueError(
                f"batch_size: expected a multiple of {world.size} processes, got {run.batch_size}"
            )
        self.tables, self.world, self.run = tables, world, run
        self.tokens, self.offsets = [], []
        for table in tables:
            ids = tokenize(tokenizer, table.texts, run.max_length)
            self.tokens.append(np.concatenate(ids))
            self.offsets.append(np.cumsum([0, *map(len, ids)]))
        # An n-way table of many languages holds more than its ids: as many pairs as texts / 2.
        sizes = [len(t.texts) / 2 if t.nway else len(t) for t in tables]
        p = np.array(sizes) ** run.source_alpha
        total = run.steps * run.gradient_accumulation_steps
        rng = np.random.default_rng([run.seed, 2])
        self.order = rng.choice(len(tables), size=total, p=p / p.sum())
        # How often the batch's source was drawn before: where in the source its items begin.
        self.turn = np.zeros(total, dtype=np.int64)
        for source in range(len(tables)):
            drawn = self.order == source
            self.turn[drawn] = np.arange(drawn.sum())

    def __len__(self) -> int:
        return len(self.order)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """How often each token occurs in the training text -> int64 [vocab_size]."""
        counts = [np.bincount(tokens, minlength=vocab_size) for tokens in self.tokens]
        return np.sum(counts, axis=0)

    def _items(self, number: int) -> np.ndarray:
        source = int(self.order[number])
        at = self.turn[number] * self.run.batch_size + np.arange(self.run.batch_size)
        n = len(self.tables[source])
        epochs, places = np.divmod(at, n)
        orders = {e: permutation(self.run.seed, source, e, n) for e in set(epochs.tolist())}
        return np.array([orders[e][i] for e, i in zip(epochs.tolist(), places, strict=True)])

    def _rows(self, table: Table, item: int, rng: np.random.Generator) -> list[int]:
        """Row numbers of an item's query, positive and hard negatives."""
        begin, end = int(table.starts[item]), int(table.starts[item + 1])
        if table.nway:
            first, second = rng.choice(end - begin, size=2, replace=False)
            return [begin + int(first), begin + int(second)]
        stored = np.arange(begin + 2, end)
        k = min(self.run.loss.num_negatives, len(stored))
        negatives = rng.choice(stored, size=k, replace=False).tolist() if k else []
        return [begin, begin + 1, *negatives]

    def __getitem__(self, number: int) -> Batch:
        source = int(self.order[number])
        table, run = self.tables[source], self.run
        tokens, offsets = self.tokens[source], self.offsets[source]
        rng = np.random.default_rng([run.seed, 4, number])
        groups = [self._rows(table, int(item), rng) for item in self._items(number)]
        lengths = np.array([(offsets[np.add(rows, 1)] - offsets[rows]).sum() for rows in groups])
        depth_rng = np.random.default_rng([run.seed, 5, number])
        last, texts = run.model.num_hidden_layers, sum(map(len, groups))
        step = number // run.gradient_accumulation_steps
        depths = depth.drawn(lengths, run.depth, last, depth_rng, self.world.size)
        return collate(
            groups,
            lambda row: tokens[offsets[row] : offsets[row + 1]],
            table.ids,
            depths,
            depth.runs(texts, run.depth, last, step, run.steps, depth_rng),
            rank=self.world.rank,
            size=self.world.size,
            max_tokens=run.pack_tokens,
            source=table.name,
        )

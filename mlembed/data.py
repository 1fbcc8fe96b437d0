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
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from . import cldr, config
from .distributed import World
from .pack import PackedBatch, pack
from .tokenizer import tokenize

MIN_SCORE = 0.8  # a scored pair counts as a positive from 4 of 5 on (F2LLM, arXiv 2510.02294)
PAIR = ("query", "positive")
NWAY = ("id", "lang", "text")


@dataclass(frozen=True)
class Table:
    """One source as text. Item i owns texts[starts[i]:starts[i + 1]].

    Of a pair table these are the query, the positive, then any hard negatives; of an n-way table,
    translations. Items with equal `ids` are never each other's negatives.
    """

    name: str
    nway: bool
    texts: list[str]
    starts: np.ndarray  # int64 [items + 1]
    ids: np.ndarray  # int64 [items]

    def __len__(self) -> int:
        return len(self.ids)


@functools.cache
def cldr_tables(seed: int = 0) -> tuple[pa.Table, pa.Table]:
    """The built-in text (train pairs, held-out n-way table), built once a process."""
    return cldr.build(seed)


def normalise(text: str) -> str:
    """What makes two texts count as the same when training text is kept clear of evaluation."""
    return unicodedata.normalize("NFKC", text).casefold().strip()


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
        # A source a kind: dates among dates, not among countries, make negatives that teach.
        kinds: dict[str, list[dict[str, Any]]] = {}
        for row in cldr_tables()[0].to_pylist():
            kinds.setdefault(row["kind"], []).append(row)
        return [_pairs(f"cldr/{kind}", "cldr", rows) for kind, rows in sorted(kinds.items())]
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
            if not isinstance(row[name], str) or not row[name].strip():
                raise ValueError(f"{path}:{number}: {name}: expected text, got {value!r}")
        score = row.get("score")
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise ValueError(f"{path}:{number}: score: expected a number 0..1, got {score!r}")
        negatives = row.get("negatives") or []
        if not isinstance(negatives, list) or not all(
            isinstance(text, str) and text.strip() for text in negatives
        ):
            raise ValueError(
                f"{path}:{number}: negatives: expected a list of texts, got {negatives!r}"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: expected rows, found none")
    return rows


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
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not json: {error.msg}") from None
            if row is None and not line.strip():
                continue
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: expected an object, got {type(row).__name__}")
            yield number, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not parquet: {str(error).splitlines()[0]}") from None
    if "verse_id" in table.column_names and "id" not in table.column_names:
        names = ["id" if name == "verse_id" else name for name in table.column_names]
        table = table.rename_columns(names)
    kept = [c for c in (*PAIR, *NWAY, "negatives", "score", "kind") if c in table.column_names]
    yield from enumerate(table.select(kept).to_pylist(), 1)


def _table(path: Path) -> Table:
    rows = rows_of(path)
    make = _pairs if "query" in rows[0] and "positive" in rows[0] else _nway
    return make(path.stem, str(path), rows)


def _pairs(name: str, where: str, rows: list[dict[str, Any]]) -> Table:
    texts: list[str] = []
    starts, ids = [0], []
    for row in rows:
        score = row.get("score")
        if score is not None and score < MIN_SCORE:
            continue
        texts += [row["query"], row["positive"], *(row.get("negatives") or [])]
        starts.append(len(texts))
        ids.append(text_id(row["positive"]))
    if not ids:
        raise ValueError(f"{where}: expected pairs with a score of {MIN_SCORE} or more, found none")
    return Table(name, False, texts, np.array(starts), np.array(ids))


def _nway(name: str, where: str, rows: list[dict[str, Any]]) -> Table:
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row["text"])
    groups = {key: texts for key, texts in groups.items() if len(texts) > 1}
    if not groups:
        raise ValueError(f"{where}: expected ids with two texts or more, found none")
    ends = np.cumsum([len(texts) for texts in groups.values()])
    return Table(
        name,
        True,
        [text for texts in groups.values() for text in texts],
        np.concatenate([[0], ends]),
        np.array([text_id(name, key) for key in groups]),
    )


def without(table: Table, held_out: set[str]) -> tuple[Table | None, int]:
    """The table less every text that evaluation uses, and how many texts went.

    A pair goes as a whole; of an n-way item only the text goes, unless a single one remains.
    """
    texts: list[str] = []
    starts, ids = [0], []
    for item, (begin, end) in enumerate(zip(table.starts[:-1], table.starts[1:], strict=True)):
        group = table.texts[begin:end]
        clean = [text for text in group if normalise(text) not in held_out]
        kept = clean if len(clean) == len(group) or (table.nway and len(clean) > 1) else []
        if kept:
            texts += kept
            starts.append(len(texts))
            ids.append(table.ids[item])
    dropped = len(table.texts) - len(texts)
    if not ids:
        return None, dropped
    return Table(table.name, table.nway, texts, np.array(starts), np.array(ids)), dropped


# ---- tables to batches ----


@dataclass(frozen=True)
class Batch:
    """One process's share of a micro-batch, and what it must know of the others'.

    packed: its queries, then its positives, then its hard negatives.
    pair_ids: int64 [pairs of all processes]. doc_ids: int64 [documents of all processes], process
    by process its positives, then its negatives. doc_sizes: documents of each process.
    """

    packed: PackedBatch
    pair_ids: Tensor
    doc_ids: Tensor
    doc_sizes: tuple[int, ...]
    source: str


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
        self.tables, self.world, self.seed = tables, world, run.seed
        self.batch_size, self.num_negatives = run.batch_size, run.loss.num_negatives
        self.tokens, self.offsets = [], []
        for table in tables:
            ids = tokenize(tokenizer, table.texts, run.max_length)
            self.tokens.append(np.concatenate(ids))
            self.offsets.append(np.cumsum([0, *map(len, ids)]))
        sizes = np.array([len(table) for table in tables], dtype=float)
        p = sizes**run.source_alpha
        total = run.steps * run.gradient_accumulation_steps
        rng = np.random.default_rng([run.seed, 2])
        self.order = rng.choice(len(tables), size=total, p=p / p.sum())
        # How often the batch's source was drawn before: where in the source its items begin.
        self.turn = np.zeros(total, dtype=np.int64)
        for source in range(len(tables)):
            drawn = self.order == source
            self.turn[drawn] = np.arange(drawn.sum())
        self._permutation = functools.lru_cache(maxsize=2 * len(tables))(self._permute)

    def __len__(self) -> int:
        return len(self.order)

    def _permute(self, source: int, epoch: int) -> np.ndarray:
        """Each epoch of a source is a permutation of its items."""
        return np.random.default_rng([self.seed, 3, source, epoch]).permutation(
            len(self.tables[source])
        )

    def _items(self, number: int) -> np.ndarray:
        source = int(self.order[number])
        at = self.turn[number] * self.batch_size + np.arange(self.batch_size)
        epochs, places = np.divmod(at, len(self.tables[source]))
        return np.array(
            [self._permutation(source, int(e))[i] for e, i in zip(epochs, places, strict=True)]
        )

    def _rows(
        self, table: Table, item: int, rng: np.random.Generator
    ) -> tuple[int, int, list[int]]:
        """Row numbers of an item's query, positive and hard negatives."""
        begin, end = int(table.starts[item]), int(table.starts[item + 1])
        if table.nway:
            first, second = rng.choice(end - begin, size=2, replace=False)
            return begin + int(first), begin + int(second), []
        stored = np.arange(begin + 2, end)
        k = min(self.num_negatives, len(stored))
        return begin, begin + 1, rng.choice(stored, size=k, replace=False).tolist() if k else []

    def __getitem__(self, number: int) -> Batch:
        source = int(self.order[number])
        table = self.tables[source]
        rng = np.random.default_rng([self.seed, 4, number])
        items = self._items(number)
        drawn = [self._rows(table, int(item), rng) for item in items]
        share = self.batch_size // self.world.size
        rows: list[int] = []
        doc_ids: list[int] = []
        doc_sizes = []
        for rank in range(self.world.size):
            mine = slice(rank * share, (rank + 1) * share)
            queries, positives, lists = zip(*drawn[mine], strict=True)
            negatives = [row for negative in lists for row in negative]
            doc_ids += table.ids[items[mine]].tolist()
            doc_ids += [text_id(table.texts[row]) for row in negatives]
            doc_sizes.append(share + len(negatives))
            if rank == self.world.rank:
                rows = [*queries, *positives, *negatives]
        tokens, offsets = self.tokens[source], self.offsets[source]
        return Batch(
            pack([tokens[offsets[row] : offsets[row + 1]] for row in rows]),
            torch.from_numpy(table.ids[items]),
            torch.tensor(doc_ids),
            tuple(doc_sizes),
            table.name,
        )

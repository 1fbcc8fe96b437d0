"""Tables to an order of batches that is a function of a seed.

A batch comes from one source. Which source, which of its items and which of their texts depend on
(seed, batch number) alone: there is no position to save, and every process draws the whole batch
and keeps its share, so that runs of any number of processes, and of loader workers, see the same
data. sources.py reads what tables hold, tokens.py tokenises them, streams.py has sources that are
read as they come.

Letters: B items of a micro-batch, K negatives of an item.
"""

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from .. import config
from ..runtime.distributed import World
from . import depth
from .collate import Batch, collate
from .streams import Stream, name_of
from .tables import Table
from .tokens import Tokens, tokenised

# First numbers of seeds: an order, permutations, and each batch's texts and depths.
ORDER, ITEMS, TEXTS, DEPTHS = 2, 3, 4, 5


class VectorLookup(Protocol):
    """Vectors of texts that a teacher encoded before training."""

    def vectors(self, texts: Sequence[str], queries: int = 0) -> np.ndarray:
        """Return fp32 [N, width]; the first `queries` texts are queries, the rest documents."""


# ---- which source ----


def sizes_of(
    run: config.Run, tables: Sequence[Table], streams: Sequence[config.Source] = ()
) -> list[float]:
    """How many items each source has, tables first.

    An n-way table of many languages holds more than its ids: as many pairs as texts / 2. A stream
    has as many as it says.

    Raises:
        ValueError: a stream that does not say.
    """
    for source in streams:
        if not source.rows:
            raise ValueError(
                f"source {source.path}: rows: expected how many the stream has, for epochs or "
                f"sampling {run.sampling}, got 0"
            )
    sizes = [len(table.texts) / 2 if table.nway else len(table) for table in tables]
    return [*sizes, *(float(source.rows) for source in streams)]


def steps_of(
    run: config.Run, tables: Sequence[Table], streams: Sequence[config.Source] = ()
) -> int:
    """Optimiser steps of a run: `steps` or, with `epochs` e, ceil(e n / (B accumulated batches))
    of n items in all.

    Raises:
        ValueError: `epochs` of a stream that does not say how many rows it has.
    """
    if not run.epochs:
        return run.steps
    total = sum(sizes_of(run, tables, streams))
    return math.ceil(run.epochs * total / (run.batch_size * run.gradient_accumulation_steps))


def source_order(
    run: config.Run, tables: Sequence[Table], streams: Sequence[config.Source], total: int
) -> np.ndarray:
    """The source of each of `total` batches, tables first -> int64 [total].

    alpha: p_i ~ n_i^alpha (GTE, arXiv 2308.03281). weights: p_i ~ the source's weight; what one
    source has in several files shares it, in proportion to their items. exhaust: all batches of all
    sources, ceil(n_i / B) each, in a random order, then again in another (ML-Embed's released
    code). The first batches of a longer run are those of a shorter one.

    Raises:
        ValueError: a stream without `rows` where they count; weights that are all 0.
    """
    if run.sampling == "exhaust":
        counts = [math.ceil(n / run.batch_size) for n in sizes_of(run, tables, streams)]
        each = np.repeat(np.arange(len(counts)), counts)
        rounds = [
            np.random.default_rng([run.seed, ORDER, round]).permutation(each)
            for round in range(math.ceil(total / len(each)))
        ]
        return np.concatenate(rounds)[:total]
    if run.sampling == "alpha":
        p = np.array(sizes_of(run, tables, streams)) ** run.source_alpha
    else:
        p = np.array(_weights(run, tables, streams))
        if not p.sum() > 0:
            raise ValueError("sources: expected weights of which one is above 0, got all 0")
    rng = np.random.default_rng([run.seed, ORDER])
    return rng.choice(len(p), size=total, p=p / p.sum())


def _weights(
    run: config.Run, tables: Sequence[Table], streams: Sequence[config.Source]
) -> list[float]:
    items: dict[config.Source, float] = {}
    sizes = sizes_of(run, tables)
    for table, size in zip(tables, sizes, strict=True):
        items[table.source] = items.get(table.source, 0.0) + size
    of_tables = [
        table.source.weight * size / items[table.source]
        for table, size in zip(tables, sizes, strict=True)
    ]
    return of_tables + [source.weight for source in streams]


# ---- which items, which of their texts ----


def permutation(seed: int, source: int, epoch: int, items: int) -> np.ndarray:
    """Each epoch of a source is a permutation of its items -> int32 or int64 [items]."""
    numbers = np.arange(items, dtype=np.int32 if items < 2**31 else np.int64)
    return np.random.default_rng([seed, ITEMS, source, epoch]).permutation(numbers)


def num_negatives(loss: config.Loss, source: config.Source, task: str) -> int:
    """How many hard negatives an item of a source has at most: its own number, or its task's.

    Raises:
        ValueError: none for clustering or classification, whose loss is of nothing else.
    """
    by_task = {
        "clustering": loss.clustering_negatives,
        "classification": loss.classification_negatives,
        "sts": 0,
    }
    given = source.num_negatives >= 0
    count = source.num_negatives if given else by_task.get(task, loss.num_negatives)
    if task in ("clustering", "classification") and not count:
        key = f"source {source.path}: num_negatives" if given else f"loss.{task}_negatives"
        raise ValueError(f"{key}: expected 1 or more for {task}, got 0")
    return count


def some_of(count_B: np.ndarray, K: int, rng: np.random.Generator) -> np.ndarray:
    """K different numbers below each count, in random order -> int64 [B, K], -1 behind the last of
    rows whose count is less.

    The j-th draw is of the count - j that are left, and becomes the number itself by going past
    those that are not, from the least on: B K^2 / 2 comparisons, however large the counts.
    """
    drawn = np.full((len(count_B), K), -1, dtype=np.int64)
    gone = np.empty((len(count_B), 0), dtype=np.int64)  # rising
    for j in range(min(K, int(count_B.max(initial=0)))):
        pick = rng.integers(0, np.maximum(count_B - j, 1))
        for at in gone.T:
            pick += pick >= at
        drawn[:, j] = np.where(count_B > j, pick, -1)
        gone = np.sort(np.column_stack([gone, pick]), axis=1)
    return drawn


def drawn_rows(
    nway: bool, begin_B: np.ndarray, end_B: np.ndarray, K: int, rng: np.random.Generator
) -> list[list[int]]:
    """Rows of each item's query, positive and at most K hard negatives, of texts begin..end.

    Of an n-way item two different texts, in either order; of a pair its first two and some others.
    """
    if nway:
        rows = begin_B[:, None] + some_of(end_B - begin_B, 2, rng)
        return rows.tolist()
    negatives = some_of(end_B - begin_B - 2, K, rng)
    rows = begin_B[:, None] + np.column_stack([np.tile([0, 1], (len(begin_B), 1)), negatives + 2])
    counts = 2 + (negatives >= 0).sum(1)
    if (counts == rows.shape[1]).all():
        return rows.tolist()
    return [row[:n] for row, n in zip(rows.tolist(), counts.tolist(), strict=True)]


# ---- batches ----


class Batches(Dataset[Batch]):
    """Micro-batches 0, 1, .. of a run, each a function of its number (see the module's docstring).

    Sources are the tables, then the streams. Tables are tokenised on construction, or their tokens
    found where they are kept; streams as they come.

    order: int64 [micro-batches], each one's source. names: of the sources. truncated: texts of each
    table that were longer than `max_length`.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        tokenizer: Tokenizer,
        run: config.Run,
        world: World,
        *,
        streams: Sequence[config.Source] = (),
        teacher: VectorLookup | None = None,
        held_out: AbstractSet[str] = frozenset(),
    ) -> None:
        """
        Args:
            streams: sources that are read as they come. held_out: normalised texts that they are
                read without; tables are without them already.
            teacher: its vectors, for `Batch.teacher_ND`.

        Raises:
            ValueError: no sources; a batch that processes cannot share alike; as `source_order` and
                `num_negatives`.
        """
        if run.batch_size % world.size:
            raise ValueError(
                f"batch_size: expected a multiple of {world.size} processes, got {run.batch_size}"
            )
        if not tables and not streams:
            raise ValueError("data: expected at least one source, got none")
        self.tables, self.world, self.run, self.teacher = tables, world, run, teacher
        self.streams = [
            Stream(source, run.seed, len(tables) + i, run.bad_rows, held_out)
            for i, source in enumerate(streams)
        ]
        self.tokenizer = tokenizer
        self.tokens: list[Tokens] = [
            tokenised(table, tokenizer, run.max_length, world.main) for table in tables
        ]
        self.truncated = [tokens.truncated for tokens in self.tokens]
        self.names = [table.name for table in tables] + [name_of(source) for source in streams]
        self.negatives = [num_negatives(run.loss, table.source, table.task) for table in tables]
        self.negatives += [num_negatives(run.loss, s.source, s.task) for s in self.streams]
        self.order = source_order(run, tables, streams, run.steps * run.gradient_accumulation_steps)
        self.permutations: dict[int, tuple[int, np.ndarray]] = {}  # epoch and items of each table
        # How often the batch's source was drawn before: where in the source its items begin.
        self.turn = np.zeros(len(self.order), dtype=np.int64)
        for source in range(len(self.names)):
            drawn = self.order == source
            self.turn[drawn] = np.arange(drawn.sum())

    def __len__(self) -> int:
        return len(self.order)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """How often each token occurs in the tables -> int64 [vocab_size].

        Raises:
            ValueError: no tables: nobody has read the streams yet.
        """
        if not self.tokens:
            raise ValueError(
                "init_factors: expected uniform where all sources are streams, got frequency"
            )
        counts = [np.bincount(tokens.flat, minlength=vocab_size) for tokens in self.tokens]
        return np.sum(counts, axis=0)

    def __getitem__(self, number: int) -> Batch:
        source = int(self.order[number])
        if source < len(self.tables):
            return self._of_table(number, source)
        return self._of_stream(number, source)

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        """Of each table the last one is kept, 4 bytes an item."""
        if self.permutations.get(source, (-1,))[0] != epoch:
            items = len(self.tables[source])
            self.permutations[source] = epoch, permutation(self.run.seed, source, epoch, items)
        return self.permutations[source][1]

    def _of_table(self, number: int, source: int) -> Batch:
        table, tokens = self.tables[source], self.tokens[source]
        at = self.turn[number] * self.run.batch_size + np.arange(self.run.batch_size)
        epochs, places = np.divmod(at, len(table))
        items_B = np.empty_like(at)
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            items_B[now] = self._permutation(source, epoch)[places[now]]
        bounds = table.starts[items_B], table.starts[items_B + 1]
        rng = np.random.default_rng([self.run.seed, TEXTS, number])
        groups = drawn_rows(table.nway, *bounds, self.negatives[source], rng)
        scores = None if table.scores is None else table.scores[items_B]
        batch = self._collated(
            number, groups, tokens.flat, tokens.offsets, table.ids, table.source, table.task, scores
        )
        return self._taught(batch, table.texts)

    def _of_stream(self, number: int, source: int) -> Batch:
        """Its items come with all their negatives; only those that are drawn are tokenised."""
        stream = self.streams[source - len(self.tables)]
        B, K = self.run.batch_size, self.negatives[source]
        items, ids = stream.items(int(self.turn[number]) * B, B)
        ends = np.cumsum([2 + len(item.negatives) for item in items])
        rng = np.random.default_rng([self.run.seed, TEXTS, number])
        drawn = drawn_rows(False, np.concatenate([[0], ends[:-1]]), ends, K, rng)
        every = [text for item in items for text in (item.query, item.positive, *item.negatives)]
        rows = [row for group in drawn for row in group]
        texts = [every[row] for row in rows]
        sizes = [len(group) for group in drawn]
        firsts = np.cumsum(sizes) - sizes
        groups = [list(range(a, a + n)) for a, n in zip(firsts.tolist(), sizes, strict=True)]
        flat, offsets = stream.tokenised(texts, firsts, self.tokenizer, self.run.max_length)
        scores = None
        if stream.task == "sts":
            scores = np.array([item.score for item in items], dtype=np.float32)
        batch = self._collated(
            number, groups, flat, offsets, ids[rows], stream.source, stream.task, scores
        )
        return self._taught(batch, texts)

    def _collated(
        self,
        number: int,
        groups: list[list[int]],
        flat: np.ndarray,
        offsets: np.ndarray,
        ids: np.ndarray,
        source: config.Source,
        task: str,
        scores: np.ndarray | None,
    ) -> Batch:
        run = self.run
        # Plain arrays: each slice of a memory map would be one again, ten times as slowly.
        flat, offsets, ids = np.asarray(flat), np.asarray(offsets), np.asarray(ids)
        rows = np.array([row for group in groups for row in group])
        sizes = np.array([len(group) for group in groups])
        lengths = offsets[rows + 1] - offsets[rows]
        of_groups = np.add.reduceat(lengths, np.cumsum(sizes) - sizes)
        rng = np.random.default_rng([run.seed, DEPTHS, number])
        last = run.model.num_hidden_layers
        depths = depth.draw_depths(of_groups, run.depth, last, rng, self.world.size)
        return collate(
            groups,
            lambda row: flat[offsets[row] : offsets[row + 1]],
            ids,
            depths,
            depth.draw_runs(len(rows), run.depth, last, rng),
            rank=self.world.rank,
            size=self.world.size,
            max_tokens=run.pack_tokens,
            source=self.names[int(self.order[number])],
            task=task,
            temperature=source.temperature,
            scores=scores,
        )

    def _taught(self, batch: Batch, texts: Sequence[str]) -> Batch:
        """With what distillation needs: the texts, or a teacher's vectors of them."""
        if not self.run.distill.teacher and self.teacher is None:
            return batch
        own = [texts[row] for row in batch.rows.tolist()]
        if self.teacher is not None:
            vectors = self.teacher.vectors(own, queries=len(batch.target))
            batch = replace(batch, teacher_ND=torch.from_numpy(vectors))
        return replace(batch, texts=tuple(own)) if self.run.distill.teacher else batch

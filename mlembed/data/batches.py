"""Draw batches from tables and streams, in an order that is a function of a seed.

A batch comes from one source. Its source, items and texts depend on (seed, batch number) alone: a
resumed run has no position to restore, and every process draws the whole batch and keeps its share,
so runs with any number of processes and loader workers see the same data.

Letters: B items of a micro-batch, K negatives of an item.
"""

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from .. import config
from ..runtime.distributed import World
from . import depth
from .collate import Batch, collate
from .formats.layouts import SINGLE
from .streams import Stream, name_of
from .tables import Table
from .tokenizer import shortened
from .tokens import Tokens, tokenise

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
    """Return the number of items of each source, tables first.

    An n-way table of many languages holds more than its ids: it counts half its texts, like single
    texts, two of which make a group. A stream's number is its `rows`.

    Raises:
        ValueError: a stream without `rows`.
    """
    for source in streams:
        if not source.rows:
            raise ValueError(
                f"source {source.path}: rows: expected the stream's number of rows, for epochs or "
                f"sampling {run.sampling}, got 0"
            )
    sizes = [len(table.texts) / 2 if table.either else len(table) for table in tables]
    return [*sizes, *(float(source.rows) for source in streams)]


def steps_of(
    run: config.Run, tables: Sequence[Table], streams: Sequence[config.Source] = ()
) -> int:
    """Return the optimiser steps of a run: `steps` or, for e epochs of n items in all, ceil(e n /
    (B accumulated batches)). ValueError: epochs of a stream without `rows`.
    """
    if not run.epochs:
        return run.steps
    total = sum(sizes_of(run, tables, streams))
    return math.ceil(run.epochs * total / (run.batch_size * run.gradient_accumulation_steps))


def source_order(
    run: config.Run, tables: Sequence[Table], streams: Sequence[config.Source], total: int
) -> np.ndarray:
    """Return the source of each of `total` batches, tables first: int64 [total].

    alpha: p_i ~ n_i^alpha (GTE, arXiv 2308.03281). weights: p_i ~ the source's weight, which its
    files share in proportion to their items. exhaust: all batches of all sources, ceil(n_i / B)
    each, in a random order, then in another (ML-Embed's released code). A longer run begins with
    the batches of a shorter run.

    Raises:
        ValueError: a stream without `rows` if they count; weights that are all 0.
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
        p = np.array(weights_of(run, tables, streams))
        if not p.sum() > 0:
            raise ValueError("sources: expected a weight above 0, got only 0")
    rng = np.random.default_rng([run.seed, ORDER])
    return rng.choice(len(p), size=total, p=p / p.sum())


def weights_of(
    run: config.Run, tables: Sequence[Table], streams: Sequence[config.Source]
) -> list[float]:
    """Return the weight of each table, which shares that of its source, then of each stream."""
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
    """Return the order of a source's items in an epoch, int32 or int64 [items]."""
    numbers = np.arange(items, dtype=np.int32 if items < 2**31 else np.int64)
    return np.random.default_rng([seed, ITEMS, source, epoch]).permutation(numbers)


def num_negatives(loss: config.Loss, source: config.Source, task: str) -> int:
    """Return the maximum number of hard negatives of an item: the source's own, or its task's.

    Raises:
        ValueError: 0 for clustering or classification, whose loss is of negatives alone.
    """
    by_task = {
        "clustering": loss.clustering_negatives,
        "classification": loss.classification_negatives,
        "sts": 0,
        SINGLE: 0,
    }
    given = source.num_negatives >= 0
    count = source.num_negatives if given else by_task.get(task, loss.num_negatives)
    if task in ("clustering", "classification") and not count:
        key = f"source {source.path}: num_negatives" if given else f"loss.{task}_negatives"
        raise ValueError(f"{key}: expected 1 or more for {task}, got 0")
    return count


def draw_distinct(count_B: np.ndarray, K: int, rng: np.random.Generator) -> np.ndarray:
    """Return K distinct numbers below each count, in random order: int64 [B, K], -1 at the end of
    rows whose count is less.

    The j-th draw is from count - j numbers, and becomes one of those that are left by stepping past
    the numbers drawn before it, in rising order: B K^2 / 2 comparisons, however large the counts.
    """
    numbers = np.full((len(count_B), K), -1, dtype=np.int64)
    before = np.empty((len(count_B), 0), dtype=np.int64)  # rising in each row
    for j in range(min(K, int(count_B.max(initial=0)))):
        pick = rng.integers(0, np.maximum(count_B - j, 1))
        for at in before.T:
            pick += pick >= at
        numbers[:, j] = np.where(count_B > j, pick, -1)
        before = np.sort(np.column_stack([before, pick]), axis=1)
    return numbers


def draw_rows(
    nway: bool, begin_B: np.ndarray, end_B: np.ndarray, K: int, rng: np.random.Generator
) -> list[list[int]]:
    """Return rows of each item's query, positive and at most K hard negatives.

    An item's texts are rows begin to end. An n-way item gives two distinct texts, in either order;
    a pair its first two texts and some of the others.
    """
    if nway:
        rows = begin_B[:, None] + draw_distinct(end_B - begin_B, 2, rng)
        return rows.tolist()
    negatives = draw_distinct(end_B - begin_B - 2, K, rng)
    rows = begin_B[:, None] + np.column_stack([np.tile([0, 1], (len(begin_B), 1)), negatives + 2])
    counts = 2 + (negatives >= 0).sum(1)
    return [row[:n] for row, n in zip(rows.tolist(), counts.tolist(), strict=True)]


def _longer(table: Table, tokens: Tokens, most: int) -> int:
    """Return how many queries of pairs have more tokens than `most`; none if that is 0."""
    if table.either or not most:
        return 0
    queries = table.starts[:-1]
    return int((tokens.offsets[queries + 1] - tokens.offsets[queries] > most).sum())


# ---- batches ----


class Batches(Dataset[Batch]):
    """Micro-batches 0, 1, .. of a run, each a function of its number (see the module's docstring).

    Sources are the tables, then the streams. Tables are tokenised on construction, or their tokens
    read from the cache; streams are tokenised as they come.

    order: int64 [micro-batches], the source of each. names: of the sources. truncated: texts of
    each table that were longer than `max_length`. short: queries of each table of pairs that are
    cut to `query_max_length`.
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
        """Args:
            streams: sources that are read as they come. held_out: normalised texts that streams
                leave out; tables are without them already.
            teacher: the vectors of `Batch.teacher_ND`.

        Raises:
            ValueError: no sources; a batch size that the number of processes does not divide; as
                `source_order` and `num_negatives`.
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
            tokenise(table, tokenizer, run.max_length, world.main) for table in tables
        ]
        self.truncated = [tokens.truncated for tokens in self.tokens]
        self.short = [
            _longer(table, tokens, run.query_max_length)
            for table, tokens in zip(tables, self.tokens, strict=True)
        ]
        self.names = [table.name for table in tables] + [name_of(source) for source in streams]
        self.negatives = [num_negatives(run.loss, table.source, table.task) for table in tables]
        self.negatives += [num_negatives(run.loss, s.source, s.task) for s in self.streams]
        self.order = source_order(run, tables, streams, run.steps * run.gradient_accumulation_steps)
        # The last epoch of each table and its permutation, 4 bytes an item.
        self.permutations: dict[int, tuple[int, np.ndarray]] = {}
        # How often a batch's source was drawn before, which tells where in the source it begins.
        self.turn = np.zeros(len(self.order), dtype=np.int64)
        for source in range(len(self.names)):
            of_source = self.order == source
            self.turn[of_source] = np.arange(of_source.sum())

    def __len__(self) -> int:
        return len(self.order)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """Return how often each token occurs in the tables, as the run draws them.

        A table weighs by its share of the micro-batches. The sum is the number of tokens of all
        tables, or 0 if none of them is drawn: float64 [vocab_size].

        Raises:
            ValueError: no tables; streams are not read in advance.
        """
        if not self.tokens:
            raise ValueError(
                "init_factors: expected uniform if all sources are streams, got frequency"
            )
        drawn = np.bincount(self.order, minlength=len(self.names))
        counts, total = np.zeros(vocab_size), 0
        for tokens, batches in zip(self.tokens, drawn, strict=False):
            texts = max(1, len(tokens.offsets) - 1)
            counts += batches / texts * np.bincount(tokens.flat, minlength=vocab_size)
            total += len(tokens.flat)
        return counts * (total / counts.sum()) if counts.any() else counts

    def __getitem__(self, number: int) -> Batch:
        source = int(self.order[number])
        if source < len(self.tables):
            return self._from_table(number, source)
        return self._from_stream(number, source)

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        if self.permutations.get(source, (-1,))[0] != epoch:
            items = len(self.tables[source])
            self.permutations[source] = epoch, permutation(self.run.seed, source, epoch, items)
        return self.permutations[source][1]

    def _from_table(self, number: int, source: int) -> Batch:
        table, tokens = self.tables[source], self.tokens[source]
        count = self.run.batch_size * (2 if table.single else 1)
        at = self.turn[number] * count + np.arange(count)
        epochs, places = np.divmod(at, len(table))
        items_B = np.empty_like(at)
        for epoch in np.unique(epochs).tolist():
            of_epoch = epochs == epoch
            items_B[of_epoch] = self._permutation(source, epoch)[places[of_epoch]]
        if table.single:
            groups = items_B.reshape(-1, 2).tolist()
            return self._collate(number, groups, tokens, table.ids, table, table.texts, None, None)
        bounds = table.starts[items_B], table.starts[items_B + 1]
        rng = np.random.default_rng([self.run.seed, TEXTS, number])
        groups = draw_rows(table.nway, *bounds, self.negatives[source], rng)
        scores = None if table.scores is None else table.scores[items_B]
        scored = scores, table.teacher_scores
        return self._collate(number, groups, tokens, table.ids, table, table.texts, *scored)

    def _from_stream(self, number: int, source: int) -> Batch:
        """Tokenise only the negatives that are drawn."""
        stream = self.streams[source - len(self.tables)]
        B, K = self.run.batch_size, self.negatives[source]
        items, ids = stream.items(int(self.turn[number]) * B, B)
        bounds = np.cumsum([0, *(len(item.texts) for item in items)])
        rng = np.random.default_rng([self.run.seed, TEXTS, number])
        draws = draw_rows(False, bounds[:-1], bounds[1:], K, rng)
        every = [text for item in items for text in item.texts]
        rows = [row for draw in draws for row in draw]
        texts = [every[row] for row in rows]
        bounds = np.cumsum([0, *map(len, draws)])
        groups = [list(range(begin, end)) for begin, end in pairwise(bounds.tolist())]
        tokens = stream.tokenise(texts, bounds[:-1], self.tokenizer, self.run.max_length)
        scores = None
        if stream.task == "sts":
            scores = np.array([item.score for item in items], dtype=np.float32)
        teacher_scores = None
        if all(item.teacher_scores is not None for item in items):
            every_score = [
                score for item in items for score in (np.nan, *(item.teacher_scores or ()))
            ]
            teacher_scores = np.array(every_score, dtype=np.float32)[rows]
        return self._collate(
            number, groups, tokens, ids[rows], stream, texts, scores, teacher_scores
        )

    def _collate(
        self,
        number: int,
        groups: list[list[int]],
        tokens: Tokens,
        ids: np.ndarray,
        source: Table | Stream,
        texts: Sequence[str],
        scores: np.ndarray | None,
        teacher_scores: np.ndarray | None,
    ) -> Batch:
        """Collate groups of rows of `texts`, whose tokens are `tokens`."""
        run = self.run
        # Slices of a memory map are memory maps again and ten times as slow as plain arrays.
        flat, offsets, ids = map(np.asarray, (tokens.flat, tokens.offsets, ids))
        rows = np.array([row for group in groups for row in group])
        sizes = np.array([len(group) for group in groups])
        lengths = offsets[rows + 1] - offsets[rows]
        # The texts of a group of single texts have no roles.
        limit = 0 if source.task == SINGLE else run.query_max_length
        queries = {group[0] for group in groups} if limit else set()
        if limit:
            of_queries = np.cumsum(sizes) - sizes
            lengths[of_queries] = np.minimum(lengths[of_queries], limit)

        def ids_of(row: int) -> np.ndarray:
            own = flat[offsets[row] : offsets[row + 1]]
            return shortened(own, limit) if row in queries else own

        of_groups = np.add.reduceat(lengths, np.cumsum(sizes) - sizes)
        rng = np.random.default_rng([run.seed, DEPTHS, number])
        last = run.model.num_hidden_layers
        depths = depth.draw_depths(of_groups, run.depth, last, rng, self.world.size)
        batch = collate(
            groups,
            ids_of,
            ids,
            depths,
            depth.draw_runs(len(rows), run.depth, last, rng),
            rank=self.world.rank,
            size=self.world.size,
            max_tokens=run.pack_tokens,
            source=self.names[int(self.order[number])],
            task=source.task,
            temperature=source.source.temperature,
            scores=scores,
            teacher_scores=None
            if teacher_scores is None or not run.distill.scores
            else np.asarray(teacher_scores),
        )
        if not run.distill.teacher and self.teacher is None:
            return batch
        batch_texts = [texts[row] for row in batch.rows.tolist()]
        if self.teacher is not None:
            vectors = self.teacher.vectors(batch_texts, queries=len(batch.target))
            batch = replace(batch, teacher_ND=torch.from_numpy(vectors))
        return replace(batch, texts=tuple(batch_texts)) if run.distill.teacher else batch

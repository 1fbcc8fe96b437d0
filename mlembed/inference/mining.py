"""Mine hard negatives for pairs: documents that a model finds near a query, but not too near.

Candidates of a query are the `top` nearest of all documents: all positives and stored negatives of
the data or, with a corpus, its texts and all positives. Then, in this order,

1. texts that pairs link to the query, directly or through other texts (`tables.linked`), go: its
   positives in every row of the data, its own text, and every text that training would leave out
   as a false negative;
2. with `rescore`, the candidates are scored and ranked again at full depth, width and rank: a
   shallow exit, a narrow prefix or a small rank makes the shortlist, the whole model decides; with
   a cross-encoder, it scores and ranks candidates and positives, as numbers of 0 to 1;
3. ranks 1..skip go;
4. candidates too near the positive go: with s the query's score with its positive, the lowest if it
   has several, a negative scores at most s - |s| relative_margin, at most s - absolute_margin, and
   at most max_score (positive-aware mining, NV-Retriever, arXiv 2407.15831: TopK-PercPos at 95 %,
   TopK-MarginPos);
5. `negatives` of the remaining candidates are chosen, the nearest or at random.

sentence-transformers' `mine_hard_negatives` does the same with three differences: it knows
positives only by their rows, skips ranks after step 4, and looks at some more candidates if other
queries have several positives. F2LLM (arXiv 2510.02294) mines with
--top 100 --skip 5 --relative-margin 0.05 --max-score 0.8 --negatives 24 --short discard.

Document vectors are held once, at the shortlist's width; queries pass in blocks.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..config.mining import Options
from ..data.formats import layouts
from ..data.formats.readers import normalise
from ..data.tables import Table, linked, text_id
from ..runtime import files
from . import search
from .cross_encoder import CrossEncoder
from .encoder import Encoder
from .search import CHUNK

# The most candidates, and the most queries, of a block of queries.
BLOCK = 2**20
QUERIES = 2**13
REASONS = ("linked", "skip", "relative_margin", "absolute_margin", "max_score")
# Tasks whose negatives are documents of other queries.
TASKS = ("retrieval", "bitext")


@dataclass
class Report:
    """Counts of a run. ranks: sum of the chosen negatives' ranks, from 1, among candidates."""

    documents: int = 0
    pairs: int = 0
    queries: int = 0
    full: int = 0
    """Queries with all the negatives that were asked for."""
    none: int = 0
    discarded: int = 0
    """Queries left out because they had fewer."""
    negatives: int = 0
    ranks: float = 0.0
    left_out: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    """Candidates that were not chosen, by the first reason that applied."""

    def __str__(self) -> str:
        mean = f"{self.ranks / self.negatives:.1f}" if self.negatives else "none"
        gone = ", ".join(f"{name} {count}" for name, count in self.left_out.items())
        return (
            f"{self.queries} queries of {self.pairs} pairs, {self.documents} documents\n"
            f"{self.full} with all negatives, {self.none} with none, {self.discarded} discarded\n"
            f"{self.negatives} negatives of mean rank {mean}; candidates left out: {gone}"
        )


# ---- queries and documents ----


@dataclass(frozen=True)
class MiningTexts:
    """Distinct queries, distinct documents, and the pairs between them.

    pairs: int64 [P, 2], query and document, by query, in the data's order. starts: int64
    [queries + 1], where the pairs of each query begin. query_groups, document_groups: int64, equal
    for texts that pairs link; texts that differ in case or white space alone count as one.
    """

    queries: "TextColumns"
    documents: "TextColumns"
    pairs: np.ndarray
    starts: np.ndarray
    query_groups: np.ndarray
    document_groups: np.ndarray

    def positives(self, query: int) -> np.ndarray:
        """Return the documents of a query's pairs."""
        return self.pairs[self.starts[query] : self.starts[query + 1], 1]


@dataclass(frozen=True)
class TextColumns(Sequence[str]):
    """Texts in columns of tables, looked up when they are needed.

    prefixes: the prompt of each column. place: int64 [N, 2], column and row of each text.
    """

    columns: Sequence[Sequence[str]]
    prefixes: Sequence[str]
    place: np.ndarray

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, i: Any) -> Any:
        column, row = self.place[i].tolist()
        return self.columns[column][row]

    def prompted(self, some: Sequence[int] | np.ndarray) -> list[str]:
        """Return texts with their prompts."""
        return [self.prefixes[self.place[i, 0]] + self[i] for i in some]


def gather(tables: Sequence[Table], corpus: Sequence[str] | None = None) -> MiningTexts:
    """Gather the queries and documents of pair tables.

    Args:
        corpus: documents to mine from, with the positives, instead of stored negatives. They get
            the prompt of the tables' documents.

    Raises:
        ValueError: an n-way table, a task without such negatives, document prompts that differ.
    """
    for table in tables:
        if table.nway or table.task not in TASKS:
            what = "an n-way table of translations" if table.nway else f"task {table.task}"
            what = "single texts" if table.single else what
            raise ValueError(
                f"data: expected pairs of a query and a document (task {' or '.join(TASKS)}), got "
                f"{what}, {table.name}"
            )
    prompts = sorted({table.source.document_prompt for table in tables})
    if len(prompts) != 1:
        raise ValueError(f"data: expected one document_prompt, got {prompts}")
    ids = [np.array([text_id(text) for text in t.texts], np.int64) for t in tables]
    # A positive in another spelling must not become a negative.
    spelt = [np.array([text_id(normalise(text)) for text in t.texts], np.int64) for t in tables]
    linked_ids = np.concatenate(
        [
            np.stack([of[t.starts[:-1]], of[t.starts[:-1] + 1]], axis=1)
            for t, of in zip(tables, spelt, strict=True)
        ]
    ).ravel()
    links = linked(linked_ids, np.arange(0, linked_ids.size + 1, 2))
    group_of = dict(zip(linked_ids.tolist(), links.tolist(), strict=True))
    columns: list[Sequence[str]] = [table.texts for table in tables]
    queries, documents = _Distinct(), _Distinct()
    pairs = []
    for i, (table, of) in enumerate(zip(tables, ids, strict=True)):
        first = table.starts[:-1]
        for row in first.tolist():
            query = queries.add(int(of[row]), i, row)
            pairs.append((query, documents.add(int(of[row + 1]), i, row + 1)))
        if corpus is None:
            negatives = np.setdiff1d(np.arange(len(of)), np.concatenate([first, first + 1]))
            for row in negatives.tolist():
                documents.add(int(of[row]), i, row)
    if corpus is not None:
        ids.append(np.array([text_id(text) for text in corpus], np.int64))
        spelt.append(np.array([text_id(normalise(text)) for text in corpus], np.int64))
        for row, one in enumerate(ids[-1].tolist()):
            documents.add(one, len(columns), row)
        columns.append(corpus)
    by_query = np.array(pairs, dtype=np.int64)
    by_query = by_query[np.argsort(by_query[:, 0], kind="stable")]
    counts = np.bincount(by_query[:, 0], minlength=len(queries.place))
    before = [table.source.prompt for table in tables] + [""]
    return MiningTexts(
        TextColumns(columns, before, np.array(queries.place)),
        TextColumns(columns, prompts * len(columns), np.array(documents.place)),
        by_query,
        np.concatenate([[0], counts.cumsum()]),
        np.array([group_of[int(spelt[i][row])] for i, row in queries.place], np.int64),
        # A text in no pair is a group by itself, under its own id.
        np.array(
            [group_of.get(one := int(spelt[i][row]), one) for i, row in documents.place], np.int64
        ),
    )


class _Distinct:
    """Texts by id, numbered in the order in which they first occur."""

    def __init__(self) -> None:
        self.number: dict[int, int] = {}
        self.place: list[tuple[int, int]] = []

    def add(self, text: int, column: int, row: int) -> int:
        number = self.number.setdefault(text, len(self.place))
        if number == len(self.place):
            self.place.append((column, row))
        return number


# ---- mining ----


@dataclass(frozen=True)
class Mined:
    """The negatives of a query, nearest first.

    documents, ranks: int64 [n]; ranks count from 1 among the candidates. scores: fp32 [n].
    positive_scores: fp32, of the query's pairs. left_out: number of other candidates by reason.
    """

    query: int
    documents: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray
    positive_scores: np.ndarray
    left_out: dict[str, int]


def mine(
    encoder: Encoder,
    texts: MiningTexts,
    options: Options,
    directory: Path | None = None,
    progress: bool = False,
    cross: CrossEncoder | None = None,
) -> Iterator[Mined]:
    """Yield the negatives of every query, in order.

    Args:
        directory: place of the file of full vectors, if `options.rescore`. cross: scores the
            candidates again, without prompts.

    Raises:
        ValueError: options out of range, a dim, exit or rank that the model lacks.
    """
    options.check()
    size = options.dim, options.exit, options.rank
    documents, width = texts.documents, encoder.full_size(size)[0]
    vectors_ND = np.empty((len(documents), width), dtype=np.float32)
    starts = range(0, len(documents), CHUNK)
    for begin in tqdm(starts, desc="documents", disable=not progress, leave=False):
        rows = np.arange(begin, min(begin + CHUNK, len(documents)))
        vectors_ND[rows] = encoder.encode(documents.prompted(rows), *size, prompt="")
    full = None
    if options.rescore:
        full = search.LazyVectors(
            lambda rows: encoder.encode(documents.prompted(rows), prompt=""),
            len(documents),
            encoder.full_size()[0],
            directory,
        )
    with tqdm(total=len(texts.queries), desc="queries", disable=not progress, leave=False) as bar:
        for block, most in blocks(texts, options.top):
            yield from _mine_block(encoder, texts, options, vectors_ND, full, block, most, cross)
            bar.update(len(block))


def blocks(texts: MiningTexts, top: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield blocks of queries, int64, and how many documents to search for each, so that at least
    `top` of them are not linked to the query: at most BLOCK documents in all, or one query.
    """
    groups, sizes = np.unique(texts.document_groups, return_counts=True)
    # Every query has a positive, so one of the documents' groups is its own.
    needed = top + sizes[np.searchsorted(groups, texts.query_groups)]
    needed = np.minimum(needed, len(texts.documents))
    begin = 0
    while begin < len(needed):
        widest = np.maximum.accumulate(needed[begin : begin + QUERIES])
        fits = widest * np.arange(1, len(widest) + 1) <= BLOCK
        count = max(1, int(fits.sum()))
        yield np.arange(begin, begin + count), int(widest[count - 1])
        begin += count


def _mine_block(
    encoder: Encoder,
    texts: MiningTexts,
    options: Options,
    vectors_ND: np.ndarray,
    full: search.LazyVectors | None,
    block: np.ndarray,
    most: int,
    cross: CrossEncoder | None,
) -> Iterator[Mined]:
    queries = texts.queries.prompted(block)
    size = options.dim, options.exit, options.rank
    vectors_QD = encoder.encode(queries, *size, prompt="")
    found = search.nearest(torch.from_numpy(vectors_QD), torch.from_numpy(vectors_ND), most)
    scores_QC, rows_QC = (side.numpy() for side in found)
    linked_QC = texts.document_groups[rows_QC] == texts.query_groups[block, None]
    candidates = [
        (scores[~of_query][: options.top], rows[~of_query][: options.top])
        for scores, rows, of_query in zip(scores_QC, rows_QC, linked_QC, strict=True)
    ]
    positives = [texts.positives(query) for query in block.tolist()]
    if full is not None:
        full.ensure_encoded(np.concatenate([*(rows for _, rows in candidates), *positives]))
        vectors_QD, vectors_ND = encoder.encode(queries, prompt=""), full.vectors_ND
    for query, vector_D, (scores, rows), own, of_query in zip(
        block.tolist(), vectors_QD, candidates, positives, linked_QC, strict=True
    ):
        if full is not None:
            scores = vectors_ND[rows] @ vector_D
            order = search.rank_again(scores, rows, options.top)
            scores, rows = scores[order], rows[order]
        own_scores = vectors_ND[own] @ vector_D
        if cross is not None:
            some = [(texts.queries[query], texts.documents[row]) for row in (*rows, *own)]
            scores, own_scores = np.split(cross.scores(some, sigmoid=True), [len(rows)])
            order = search.rank_again(scores, rows, options.top)
            scores, rows = scores[order], rows[order]
        chosen, left_out = select_negatives(scores, float(own_scores.min()), options, query)
        left_out["linked"] = int(of_query.sum())
        yield Mined(query, rows[chosen], scores[chosen], chosen + 1, own_scores, left_out)


def select_negatives(
    scores: np.ndarray, positive: float, options: Options, query: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Choose a query's negatives from its candidates (steps 3 to 5).

    Args:
        scores: the candidates' scores, falling. positive: the lowest score of its positives.
        query: its number; a random pick depends on it and on the seed only.

    Returns:
        places of the chosen candidates, rising, and the number of others by the first reason that
        applied.
    """
    bounds = {
        "relative_margin": positive - abs(positive) * options.relative_margin,
        "absolute_margin": positive - options.absolute_margin,
        "max_score": options.max_score,
    }
    left = np.arange(len(scores)) >= options.skip
    left_out = {"skip": int((~left).sum())}
    for name, bound in bounds.items():
        # Rounding makes a cosine 1.0000001.
        near = np.minimum(scores, 1) > bound
        left_out[name] = int((near & left).sum())
        left &= ~near
    chosen = np.flatnonzero(left)
    if options.pick == "random" and len(chosen) > options.negatives:
        generator = np.random.default_rng([options.seed, query])
        chosen = np.sort(generator.choice(chosen, options.negatives, replace=False))
    return chosen[: options.negatives], left_out


# ---- to a file ----


def write(
    encoder: Encoder,
    texts: MiningTexts,
    options: Options,
    out: Path,
    progress: bool = False,
    cross: CrossEncoder | None = None,
) -> Report:
    """Write a row {query, positive, negatives, positive_score, negative_scores} for every pair,
    without prompts, to `out`, atomically.

    Raises:
        ValueError: `out` exists or is not a .jsonl file; the errors of `mine`.
    """
    options.check()
    if out.suffix != ".jsonl":
        raise ValueError(f"out: expected a .jsonl file, got {out}")
    report = Report(len(texts.documents), len(texts.pairs), len(texts.queries))
    with files.atomic_file(out) as partial, partial.open("w", encoding="utf-8") as file:
        for mined in mine(encoder, texts, options, partial.parent, progress, cross):
            if _count(report, mined, options):
                file.writelines(_rows(texts, mined))
    return report


def _count(report: Report, mined: Mined, options: Options) -> bool:
    """Count a query into the report; return whether its rows are written."""
    many = len(mined.documents)
    for name, count in mined.left_out.items():
        report.left_out[name] += count
    report.full += many == options.negatives
    report.none += not many
    if many < options.negatives and options.short == "discard":
        report.discarded += 1
        return False
    report.negatives += many
    report.ranks += float(mined.ranks.sum())
    return True


def _rows(texts: MiningTexts, mined: Mined) -> Iterator[str]:
    negatives = [texts.documents[document] for document in mined.documents.tolist()]
    scores = [round(score, 6) for score in mined.scores.tolist()]
    positives = texts.positives(mined.query).tolist()
    for document, score in zip(positives, mined.positive_scores.tolist(), strict=True):
        row = {
            "query": texts.queries[mined.query],
            "positive": texts.documents[document],
            "negatives": negatives,
            "positive_score": round(score, 6),
            "negative_scores": scores,
        }
        yield json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Column(Sequence[str]):
    """The texts of a corpus as a sequence of strings."""

    corpus: layouts.Corpus

    def __len__(self) -> int:
        return len(self.corpus.column)

    def __getitem__(self, row: Any) -> Any:
        return self.corpus.column[row].as_py()

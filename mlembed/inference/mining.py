"""Hard negatives for pairs: documents that a model finds near a query, but not too near.

Candidates of a query are the `top` nearest of all documents: all positives and stored negatives of
the data or, where a corpus is given, its texts and all positives. Then, in this order,

1. none is a text that pairs link to the query, directly or by others (`sources.linked`): its own
   positives in any of the data's rows, its own text, and whatever would be a false negative in
   training, which leaves such texts out as well;
2. with `rescore`, the candidates are scored anew at full depth, width and rank, and ranked by that:
   a shallow exit, a narrow prefix or a small rank makes the shortlist, all of the model decides;
3. ranks 1..skip go;
4. what is too near the positive goes: with s the query's score with its positive, the lowest if it
   has several, a negative has at most s - |s| relative_margin, at most s - absolute_margin, and at
   most max_score (positive-aware mining, NV-Retriever, arXiv 2407.15831: TopK-PercPos at 95 %,
   TopK-MarginPos);
5. `negatives` of the rest are taken, the nearest or at random.

sentence-transformers' `mine_hard_negatives` does the same but for three things: it knows positives
only by their rows, skips ranks of what step 4 leaves, and looks at some candidates more where other
queries have several positives. F2LLM (arXiv 2510.02294) mines by
--top 100 --skip 5 --relative-margin 0.05 --max-score 0.8 --negatives 24 --short discard.

The search is exact (inner products of unit vectors, faiss). Document vectors are held once, at the
shortlist's width; queries pass in blocks.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from ..config.mining import Options
from ..data.formats import layouts
from ..data.tables import Table, linked, text_id
from ..runtime import files
from .encoder import Encoder

BLOCK = 2**20  # candidates of the queries of a block together, and
QUERIES = 2**13  # these at most
DOCUMENTS = 2**15  # documents encoded at once
REASONS = ("linked", "skip", "relative_margin", "absolute_margin", "max_score")
TASKS = ("retrieval", "bitext")  # whose negatives are other queries' documents


@dataclass
class Report:
    """Counts of a run. ranks: of the negatives taken, from 1 on, among a query's candidates."""

    documents: int = 0
    pairs: int = 0
    queries: int = 0
    full: int = 0
    """Queries that got as many negatives as were asked for."""
    none: int = 0
    discarded: int = 0
    """Queries left out for having fewer."""
    negatives: int = 0
    ranks: float = 0.0
    left_out: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    """Candidates by why they were none; each by the first reason that it meets."""

    def __str__(self) -> str:
        mean = f"{self.ranks / self.negatives:.1f}" if self.negatives else "none"
        gone = ", ".join(f"{name} {count}" for name, count in self.left_out.items())
        return (
            f"{self.queries} queries of {self.pairs} pairs, {self.documents} documents\n"
            f"{self.full} got all their negatives, {self.none} none, {self.discarded} discarded\n"
            f"{self.negatives} negatives of mean rank {mean}; candidates left out: {gone}"
        )


# ---- what there is ----


@dataclass(frozen=True)
class Texts:
    """Distinct queries, distinct documents, and the pairs of them.

    queries, documents: (table, row) of each, the first place where it is. pairs: int64 [P, 2],
    query and document, by query, in the data's order. starts: int64 [queries + 1], its pairs.
    query_groups, document_groups: int64, equal for texts that pairs link.
    """

    queries: "Places"
    documents: "Places"
    pairs: np.ndarray
    starts: np.ndarray
    query_groups: np.ndarray
    document_groups: np.ndarray


@dataclass(frozen=True)
class Places(Sequence[str]):
    """Texts that stand in tables, looked up as they are asked for; before each its prefix."""

    columns: Sequence[Sequence[str]]
    prefixes: Sequence[str]
    at: np.ndarray  # int64 [N, 2]

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        column, row = self.at[i].tolist()
        return self.columns[column][row]

    def prompted(self, some: Sequence[int] | np.ndarray) -> list[str]:
        return [self.prefixes[self.at[i, 0]] + self[i] for i in some]


def gather(tables: Sequence[Table], corpus: Sequence[str] | None = None) -> Texts:
    """The queries and documents of pair tables; with a corpus, whose prompt is that of the tables'
    documents, its texts and the positives are the documents.

    Raises:
        ValueError: an n-way table, a task that has no such negatives, document prompts that
            differ (a document has one vector).
    """
    for table in tables:
        if table.nway or table.task not in TASKS:
            what = "an n-way table of translations" if table.nway else f"task {table.task}"
            raise ValueError(
                f"data: expected pairs of a query and a document (task {' or '.join(TASKS)}), got "
                f"{what}, {table.name}"
            )
    prompts = sorted({table.source.document_prompt for table in tables})
    if len(prompts) != 1:
        raise ValueError(f"data: expected one document_prompt, got {prompts}")
    numbers = [np.array([text_id(text) for text in t.texts], np.int64) for t in tables]
    every = np.concatenate([_pairs_of(*both) for both in zip(tables, numbers, strict=True)])
    links = linked(every.ravel(), np.arange(0, every.size + 1, 2))
    group_of = dict(zip(every.ravel().tolist(), links.tolist(), strict=True))
    columns: list[Sequence[str]] = [table.texts for table in tables]
    queries, documents = _Distinct(), _Distinct()
    pairs = []
    for i, (table, number) in enumerate(zip(tables, numbers, strict=True)):
        role = np.full(len(number), 2)
        role[table.starts[:-1]] = 0
        role[table.starts[:-1] + 1] = 1
        for row in np.flatnonzero(role == 0).tolist():
            query = queries.add(int(number[row]), i, row)
            pairs.append((query, documents.add(int(number[row + 1]), i, row + 1)))
        if corpus is None:
            for row in np.flatnonzero(role == 2).tolist():
                documents.add(int(number[row]), i, row)
    if corpus is not None:
        for row, text in enumerate(corpus):
            documents.add(text_id(text), len(columns), row)
        columns.append(corpus)
    found = np.array(pairs, dtype=np.int64)
    found = found[np.argsort(found[:, 0], kind="stable")]
    counts = np.bincount(found[:, 0], minlength=len(queries.at))
    before = [table.source.prompt for table in tables] + [""]
    return Texts(
        Places(columns, before, np.array(queries.at)),
        Places(columns, prompts * len(columns), np.array(documents.at)),
        found,
        np.concatenate([[0], counts.cumsum()]),
        np.array([group_of[number] for number in queries.place], np.int64),
        # A text of no pair is linked to none; its own number is no group's but its own.
        np.array([group_of.get(number, number) for number in documents.place], np.int64),
    )


def _pairs_of(table: Table, numbers: np.ndarray) -> np.ndarray:
    """int64 [items, 2]: numbers of query and positive."""
    return np.stack([numbers[table.starts[:-1]], numbers[table.starts[:-1] + 1]], axis=1)


class _Distinct:
    """Texts by number, in the order in which they first come."""

    def __init__(self) -> None:
        self.place: dict[int, int] = {}
        self.at: list[tuple[int, int]] = []

    def add(self, number: int, column: int, row: int) -> int:
        place = self.place.setdefault(number, len(self.at))
        if place == len(self.at):
            self.at.append((column, row))
        return place


# ---- mining ----


@dataclass
class Deep:
    """Unit vectors of documents at full size, each computed when it is first asked for, kept in a
    sparse file."""

    encoder: Encoder
    documents: Places
    vectors_ND: np.ndarray  # float32, a file in memory's place
    there: np.ndarray  # bool [N]

    @staticmethod
    def of(encoder: Encoder, documents: Places, directory: Path) -> "Deep":
        shape = len(documents), encoder.model.cfg.hidden_size
        file = np.memmap(directory / "documents", dtype=np.float32, mode="w+", shape=shape)
        return Deep(encoder, documents, file, np.zeros(len(documents), dtype=bool))

    def want(self, places: np.ndarray) -> None:
        """See to it that these are there."""
        new = np.unique(places)
        new = new[~self.there[new]]
        for begin in range(0, len(new), DOCUMENTS):
            some = new[begin : begin + DOCUMENTS]
            self.vectors_ND[some] = self.encoder.encode(self.documents.prompted(some))
            self.there[some] = True


@dataclass(frozen=True)
class Mined:
    """A query's negatives, nearest first, by their places among the documents, with scores and with
    ranks, from 1 on, among its candidates; the scores of its pairs; what was left out, and why."""

    query: int
    places: np.ndarray  # int64 [n]
    scores: np.ndarray  # float32 [n]
    ranks: np.ndarray  # int64 [n]
    positives: np.ndarray  # float32 [pairs of the query]
    left_out: dict[str, int]


def mine(
    encoder: Encoder, texts: Texts, options: Options, work: Path, progress: bool = False
) -> Iterator[Mined]:
    """Negatives of every query, in their order.

    Args:
        work: a directory for vectors of full size, where it rescores.

    Raises:
        ValueError: options out of range, a dim, exit or rank that the model lacks.
    """
    options.check()
    size = options.dim, options.exit, options.rank
    encoder.model.cfg.check(*size)
    index = faiss.IndexFlatIP(options.dim or encoder.model.cfg.hidden_size)
    starts = range(0, len(texts.documents), DOCUMENTS)
    for begin in tqdm(starts, desc="documents", disable=not progress, leave=False):
        some = np.arange(begin, min(begin + DOCUMENTS, len(texts.documents)))
        index.add(encoder.encode(texts.documents.prompted(some), *size))
    deep = Deep.of(encoder, texts.documents, work) if options.rescore else None
    with tqdm(total=len(texts.queries), desc="queries", disable=not progress, leave=False) as bar:
        for block, most in blocks(texts, options.top):
            yield from _mine_block(encoder, texts, options, index, deep, block, most)
            bar.update(len(block))


def blocks(texts: Texts, top: int) -> Iterator[tuple[np.ndarray, int]]:
    """Queries, int64, in blocks, and how many documents have to be found for each, so that `top` of
    them are not linked to any of the block: together BLOCK documents at most, or one query's."""
    groups, sizes = np.unique(texts.document_groups, return_counts=True)
    # Every query has a positive, so its group is among the documents'.
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
    texts: Texts,
    options: Options,
    index: Any,
    deep: Deep | None,
    block: np.ndarray,
    most: int,
) -> Iterator[Mined]:
    words = texts.queries.prompted(block)
    vectors_QD = encoder.encode(words, options.dim, options.exit, options.rank)
    scores_QC, places_QC = index.search(vectors_QD, most)
    linked_QC = texts.document_groups[places_QC] == texts.query_groups[block, None]
    found = []
    for scores, places, related in zip(scores_QC, places_QC, linked_QC, strict=True):
        found.append(_nearest(scores[~related], places[~related], options.top))
    own = [texts.pairs[slice(*texts.starts[query : query + 2]), 1] for query in block.tolist()]
    if deep is not None:
        deep.want(np.concatenate([*(places for _, places in found), *own]))
        vectors_QD = encoder.encode(words)
    for query, vector_D, (scores, places), positives, related in zip(
        block.tolist(), vectors_QD, found, own, linked_QC, strict=True
    ):
        if deep is None:
            of_positives = index.reconstruct_batch(positives) @ vector_D
        else:
            of_positives = deep.vectors_ND[positives] @ vector_D
            scores, places = _nearest(deep.vectors_ND[places] @ vector_D, places, options.top)
        kept, left_out = taken(scores, float(of_positives.min()), options, query)
        left_out["linked"] = int(related.sum())
        yield Mined(query, places[kept], scores[kept], kept + 1, of_positives, left_out)


def _nearest(scores: np.ndarray, places: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The `top` highest, falling; of equal scores the first document."""
    order = np.lexsort((places, -scores))[:top]
    return scores[order], places[order]


def taken(
    scores: np.ndarray, positive: float, options: Options, query: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Steps 3 to 5: which of a query's candidates become its negatives, rising, and counts of the
    others by the first reason that they meet.

    Args:
        scores: of the candidates, falling. positive: the lowest of its positives.
        query: its number, which a random pick depends on, and nothing else but the seed.
    """
    bounds = {
        "relative_margin": positive - abs(positive) * options.relative_margin,
        "absolute_margin": positive - options.absolute_margin,
        "max_score": options.max_score,
    }
    left = np.arange(len(scores)) >= options.skip
    left_out = {"skip": int((~left).sum())}
    for name, bound in bounds.items():
        near = np.minimum(scores, 1) > bound  # rounding makes a cosine 1.0000001
        left_out[name] = int((near & left).sum())
        left &= ~near
    kept = np.flatnonzero(left)
    if options.pick == "random" and len(kept) > options.negatives:
        draw = np.random.default_rng([options.seed, query])
        kept = np.sort(draw.choice(kept, options.negatives, replace=False))
    return kept[: options.negatives], left_out


# ---- to a file ----


def write(
    encoder: Encoder, texts: Texts, options: Options, out: Path, progress: bool = False
) -> Report:
    """A row {query, positive, negatives, positive_score, negative_scores} for every pair, without
    prompts, into `out`, which appears when it is whole.

    Raises:
        ValueError: `out` exists or is no .jsonl file; as `mine`.
    """
    options.check()
    if out.suffix != ".jsonl":
        raise ValueError(f"out: expected a .jsonl file, got {out}")
    report = Report(len(texts.documents), len(texts.pairs), len(texts.queries))
    with files.atomic_file(out) as partial, partial.open("w", encoding="utf-8") as file:
        for mined in mine(encoder, texts, options, partial.parent, progress):
            if _count(report, mined, options):
                file.writelines(_rows(texts, mined))
    return report


def _count(report: Report, mined: Mined, options: Options) -> bool:
    """Into the report; -> whether the query is kept."""
    many = len(mined.places)
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


def _rows(texts: Texts, mined: Mined) -> Iterator[str]:
    negatives = [texts.documents[place] for place in mined.places.tolist()]
    scores = [round(score, 6) for score in mined.scores.tolist()]
    pairs = texts.pairs[slice(*texts.starts[mined.query : mined.query + 2]), 1]
    for place, score in zip(pairs.tolist(), mined.positives.tolist(), strict=True):
        row = {
            "query": texts.queries[mined.query],
            "positive": texts.documents[place],
            "negatives": negatives,
            "positive_score": round(score, 6),
            "negative_scores": scores,
        }
        yield json.dumps(row, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Column(Sequence[str]):
    """The texts of a corpus, one by one."""

    corpus: layouts.Corpus

    def __len__(self) -> int:
        return len(self.corpus.column)

    def __getitem__(self, row: Any) -> Any:
        return self.corpus.column[row].as_py()

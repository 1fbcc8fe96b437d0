"""Write sample files, and read tables and batches back as plain texts."""

import dataclasses
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from factories import write_jsonl as jsonl  # noqa: F401

from mlembed import config
from mlembed.data import sources

PAIRS = [
    {"query": "one", "positive": "eins"},
    {"query": "two", "positive": "zwei", "negatives": ["drei", "vier"]},
    {"query": "zwei", "positive": "two", "negatives": []},
    {"query": "2", "positive": "zwei", "negatives": None},
]
PAIR_ITEMS = [["one", "eins"], ["two", "zwei", "drei", "vier"], ["zwei", "two"], ["2", "zwei"]]


def parquet(path, rows=(), **columns):
    pq.write_table(pa.table(columns) if columns else pa.Table.from_pylist(rows), path)
    return str(path)


def source(path, **fields):
    return config.Source(path=str(path), **fields)


def reports(path, bad_rows="error", held_out=frozenset(), **fields):
    """Return (table, report) of each part of a source, given its fields."""
    return sources.read(source(path, **fields), bad_rows=bad_rows, held_out=held_out)


def read(path, *arguments, **fields):
    """Return the items and the report of a source of one part."""
    ((table, report),) = reports(path, *arguments, **fields)
    return items(table), report


def mistake(path, *arguments, **fields):
    """Return the message of the error that reading a source raises."""
    with pytest.raises(ValueError) as caught:
        read(path, *arguments, **fields)
    return str(caught.value)


def table_of(path, *arguments, **fields):
    ((table, _),) = reports(path, *arguments, **fields)
    return table


def items(table):
    bounds = itertools.pairwise(table.starts.tolist())
    return [table.texts[begin:end] for begin, end in bounds]


def same_table(a, b):
    """Assert that two tables are equal but for their sources."""
    assert (a.name, a.nway, a.task) == (b.name, b.nway, b.task)
    assert list(a.texts) == list(b.texts)
    for name in ("ids", "starts", "scores"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None and y is None) or (x.dtype == y.dtype and x.tolist() == y.tolist())


def batch_texts(batch, tokenizer):
    """Return a batch's texts in the order of `rows`: queries, positives, negatives."""
    texts = []
    for packed in batch.packs:
        bounds = packed.cu_seqlens
        # Texts of one depth stand by length, shortest first.
        assert torch.equal(bounds.diff(), bounds.diff().sort().values)
        texts += [
            tokenizer.decode(packed.ids_T[begin:end].tolist())
            for begin, end in itertools.pairwise(bounds.tolist())
        ]
    assert sorted(batch.place.tolist()) == list(range(len(texts)))
    return [texts[i] for i in batch.place]


def equal(a, b):
    """Return whether two batches, packs or values are equal in every field, bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if dataclasses.is_dataclass(a):
        return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return a == b


# ---- BEIR's files ----

CORPUS = [
    {"_id": "d1", "title": "The sea", "text": "is wet."},
    {"_id": "d10", "title": "", "text": " the sun \n"},
    {"_id": 2, "text": "the moon"},
    {"_id": "é", "title": "only a title", "text": ""},
]
QUERIES = [{"_id": f"q{i}", "text": text} for i, text in enumerate(["sea? ", "sun?", "moon?"])]
HEADER = "query-id\tcorpus-id\tscore\n"
QRELS = HEADER + "q2\t2\t1\nq0\td10\t0\nq0\td1\t2\nq2\té\t-1\n"


def beir(path, corpus=CORPUS, queries=QUERIES, **splits):
    (path / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    for split, content in (splits or {"test": QRELS}).items():
        (path / "qrels" / f"{split}.tsv").write_text(content, encoding="utf-8")
    return path

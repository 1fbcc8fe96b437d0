"""The same pairs in every layout and file format are the same table."""

import csv
import gzip
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mlembed.data import sources, tables
from tests.data.samples import items, parquet, source

N = 200
TEXTS = [
    (f"question {i}, “odd”", f'answer {i}: "so\' it, is"', f"no {i}", f"nor {i}") for i in range(N)
]
PLAIN = {"url": "http://x", "note": "y"}  # Nothing uses them.


def passage(text):
    return {"docid": "1", "title": "", "text": text}


# Layouts of a row, by query, positive and two negatives, and whether a cell is a list or an object.
LAYOUTS = {
    "query, positive, negatives": (
        lambda q, p, *n: {"query": q, "positive": p, "negatives": n}, True
    ),
    "anchor, positive, negative_1 ..": (
        lambda q, p, *n: {"anchor": q, "positive": p, "negative_1": n[0], "negative_2": n[1]}, False
    ),
    "question, answer, neg_0 ..": (
        lambda q, p, *n: {"question": q, "answer": p, "neg_0": n[0], "neg_1": n[1]}, False
    ),
    "query, document, hard_negatives": (
        lambda q, p, *n: {"query": q, "document": p, "hard_negatives": n}, True
    ),
    "query, response, rejected_response": (
        lambda q, p, *n: {"query": q, "response": p, "rejected_response": n}, True
    ),
    "query, passage, negative_1 ..": (
        lambda q, p, *n: {"query": q, "passage": p, "negative_1": n[0], "negative_2": n[1]}, False
    ),
    "FlagEmbedding": (lambda q, p, *n: {"query": q, "pos": [p], "neg": n, "prompt": ""}, True),
    "tevatron": (
        lambda q, p, *n: {
            "query_id": "1",
            "query": q,
            "positive_passages": [passage(p)],
            "negative_passages": [passage(text) for text in n],
        },
        True,
    ),
    "set of pairs": (lambda q, p, *n: {"set": {"query": q, "pos": [p], "neg": n}}, True),
}  # fmt: skip


def tabular(rows, delimiter):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def written(path, rows):
    """Write rows as the name says."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        return parquet(path, rows)
    text = {
        "jsonl": lambda: "".join(json.dumps(row) + "\n" for row in rows),
        "json": lambda: json.dumps(rows, indent=1),
        "csv": lambda: tabular(rows, ","),
        "tsv": lambda: tabular(rows, "\t"),
    }[name.rpartition(".")[2]]()
    data = text.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = pa.compress(data, "zstd", asbytes=True)
    path.write_bytes(data)
    return str(path)


def read(path, **fields):
    ((table, report),) = sources.read(source(path, **fields))
    return table, report


def digest(path):
    """Return all that a run learns of a file."""
    try:
        table, report = read(path)
    except ValueError as error:
        return str(error)
    scores = None if table.scores is None else table.scores.tolist()
    return items(table), table.ids.tolist(), table.task, scores, report.languages, report.scale


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    ["p.jsonl", "p.json", "p.parquet", "p.csv", "p.tsv", "p.jsonl.gz", "p.tsv.zst", "p.csv.gz"],
)
def test_every_layout_and_format(layout, name, tmp_path):
    make, nested = LAYOUTS[layout]
    if nested and name[2:5] in ("csv", "tsv"):
        pytest.skip("a cell of this layout is a list")
    table, report = read(written(tmp_path / name, [make(*texts) | PLAIN for texts in TEXTS]))
    assert items(table) == [list(texts) for texts in TEXTS] and report.bad == 0
    numbers = np.array([tables.text_id(text) for texts in TEXTS for text in texts])
    assert table.name == "p" and (table.ids == tables.linked(numbers, table.starts)).all()


ROWS = {
    "pairs": {"query": "q", "positive": "p", "negatives": ["n"], "score": 0.9, "prompt": "x: "}
    | {"query_lang": "en", "positive_lang": "de"} | PLAIN,
    "flag": {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1], "type": "normal"},
    "tevatron": {"query": "q", "positive_passages": [passage("p")], "query_id": "7"},
    "languages": {"en": "q", "sw": "p", "id": "3"},
    "single texts": {"_id": "1", "title": "t", "text": "u"} | PLAIN,
    "nway": {"id": "1", "lang": "en", "text": "t", "kind": "k"} | PLAIN,
}  # fmt: skip
OTHER = {
    "score": 0.5, "type": "symmetric_class", "pos_scores": [2], "negatives": ["m"], "neg": ["m"],
    "pos": ["o"], "positive_passages": [passage("o")],
}  # fmt: skip


@pytest.mark.parametrize("layout", ROWS)
def test_named_columns_count_and_unused_ones_do_not(layout, tmp_path):
    """Named and unused columns together are the header."""
    row = ROWS[layout]
    rows = [row, row | ({"lang": "de", "text": "u"} if layout == "nway" else {})]
    path = written(tmp_path / "p.jsonl", rows)
    before = digest(path)
    ((found, _, _),) = [part.open(source(path)) for part in sources._parts(source(path))]
    assert {*found.columns(), *found.unused} == set(row)
    for column in row:
        changed = [rows[0] | {column: OTHER.get(column, "z")}, *rows[1:]]
        if column == "type":
            changed = [one | {column: OTHER[column]} for one in rows]
        after = digest(written(tmp_path / "p.jsonl", changed))
        assert (after != before) == (column in found.columns()), column


def test_table_of_the_documentation():
    """Each row is the first line of a file, and what is understood of that file."""
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]*\| `(.*)` \| (.*; unused: .*) \|$", page, re.M)
    files = sorted((Path(__file__).parents[1] / "files").iterdir())
    first = {path.read_text(encoding="utf-8").splitlines()[0]: path for path in files}
    assert len(first) == len(files) == len(rows) and first.keys() == {line for line, _ in rows}
    for line, understood in rows:
        table, report = read(first[line])
        assert report.roles == understood and len(table) and report.bad == 0

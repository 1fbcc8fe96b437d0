"""Items to tables: ids, scores, and what is left out."""

import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from mlembed.data import tables
from mlembed.data.cldr import normalise
from mlembed.data.tables import text_id
from tests.data.samples import (
    PAIR_ITEMS,
    PAIRS,
    items,
    jsonl,
    parquet,
    read,
    reports,
    same_table,
    table_of,
)


def pairs_of(names, rows):
    return [dict(zip(names, row, strict=True)) for row in rows]


# ---- digests ----


def test_digest_is_of_the_items(tmp_path):
    texts = [f"text {i}" for i in range(tables.CHUNK + 5)]
    count = len(texts)
    table = tables.Table("a", False, texts, np.arange(count), np.arange(0, count + 1, 3))
    scored = replace(table, scores=np.linspace(0, 1, len(table), dtype=np.float32))
    changed = [
        replace(table, texts=[*texts[:-1], "another"]),
        replace(table, texts=["text 0t", "ext 1", *texts[2:]]),
        replace(table, ids=table.ids // 2),
        replace(table, starts=table.starts + (table.starts > 0)),
        replace(table, nway=True),
        scored,
        replace(scored, scores=scored.scores / 2),
    ]
    assert len({one.sha256 for one in (table, *changed)}) == 1 + len(changed)
    writer = tables.TextWriter(tmp_path / "texts.arrow")
    for begin in range(0, count, 1000):
        writer.extend(texts[begin : begin + 1000])
    assert replace(table, name="b", texts=writer.close()).sha256 == table.sha256


# ---- pair tables ----


def test_pairs(tmp_path):
    table = table_of(jsonl(tmp_path / "p.jsonl", PAIRS))
    assert table.name == "p" and not table.nway and len(table) == 4
    assert items(table) == PAIR_ITEMS
    assert table.starts.dtype == table.ids.dtype == np.int64
    # one eins | two zwei drei vier | zwei two | 2 zwei: "zwei" and "two" link three pairs.
    assert set(table.ids[[2, 3, 6, 7, 8, 9]]) == {text_id("two")}
    assert table.ids[[0, 1]].tolist() == [text_id("one")] * 2
    assert table.ids[[4, 5]].tolist() == [text_id("drei"), text_id("vier")]
    columns = {name: [row.get(name) for row in PAIRS] for name in ("positive", "query")}
    columns["negatives"] = pa.array([r.get("negatives") for r in PAIRS], pa.list_(pa.string()))
    path = parquet(tmp_path / "q.parquet", **columns, other=[None] * 4)
    same_table(table_of(path, name="p"), table)


def test_negative_that_is_a_positive_elsewhere(tmp_path):
    rows = [
        {"query": "q", "positive": "a", "negatives": ["b", "c"]},
        {"query": "q", "positive": "b"},
        {"query": "r", "positive": "c"},
    ]
    table = table_of(jsonl(tmp_path / "p.jsonl", rows))
    of = dict(zip(table.texts, table.ids.tolist(), strict=True))
    assert of["q"] == of["a"] == of["b"] != of["c"] == of["r"]


@pytest.mark.parametrize(
    ("scores", "rows", "by_score"),
    [([0.79, 0.8, 1, None, 0.0], [1, 2, 3], 2), ([5, 4, 3.99, 1.0, None, 0.9], [0, 1, 4], 3)],
)
def test_minimum_score(scores, rows, by_score, tmp_path):
    """On either scale: a score above 1 anywhere makes all of them 0..5."""
    pairs = [{"query": f"q{i}", "positive": f"p{i}", "score": s} for i, s in enumerate(scores)]
    found, report = read(jsonl(tmp_path / "s.jsonl", pairs))
    assert [item[0] for item in found] == [f"q{i}" for i in rows] and report.by_score == by_score
    with pytest.raises(ValueError, match=r"low\.jsonl: expected pairs with a score of 0\.8"):
        read(jsonl(tmp_path / "low.jsonl", [{"query": "q", "positive": "p", "score": 0.79}]))


# ---- n-way tables ----


def test_nway(tmp_path):
    rows = [("a", "en", "sea"), ("b", "en", "alone"), (7, "en", "seven"), ("a", "de", "Meer")]
    rows += [("7", "de", "sieben"), ("a", "fr", "mer")]
    table = table_of(jsonl(tmp_path / "n.jsonl", pairs_of(("id", "lang", "text"), rows)))
    assert table.nway and items(table) == [["sea", "Meer", "mer"], ["seven", "sieben"]]
    assert table.ids.tolist() == [text_id("n", "a")] * 3 + [text_id("n", "7")] * 2


@pytest.mark.parametrize("column", ["id", "verse_id"])
def test_nway_parquet(column, tmp_path):
    columns = {column: [1, 2, 1, 2], "lang": list("eedd"), "text": ["a", "b", "c", "d"]}
    table = table_of(parquet(tmp_path / "n.parquet", **columns))
    assert table.nway and items(table) == [["a", "c"], ["b", "d"]]


def test_nway_without_translations(tmp_path):
    rows = [{"id": i, "lang": "en", "text": "x"} for i in range(3)]
    with pytest.raises(ValueError, match=r"n\.jsonl: expected ids with two texts or more"):
        read(jsonl(tmp_path / "n.jsonl", rows))


# ---- tasks, scores ----


def test_tasks(tmp_path):
    plain = jsonl(tmp_path / "p.jsonl", PAIRS)
    rows = [{"id": "1", "lang": lang, "text": lang} for lang in ("en", "de")]
    nway = jsonl(tmp_path / "n.jsonl", rows)
    assert table_of(plain).task == "retrieval" and table_of(nway).task == "bitext"
    assert table_of(plain, task="bitext").task == "bitext"
    assert table_of(nway, task="retrieval").task == "retrieval"
    for task in ("sts", "clustering", "classification"):
        with pytest.raises(ValueError, match=rf"n\.jsonl: task: expected .* got {task}"):
            read(nway, task=task)
    with pytest.raises(ValueError, match=r"p\.jsonl:1: score: expected a number for sts, got None"):
        read(plain, task="sts")


@pytest.mark.parametrize("task", ["clustering", "classification"])
def test_tasks_that_need_negatives(task, tmp_path):
    rows = [{"query": "a", "positive": "b", "negatives": ["c"]}, {"query": "d", "positive": "e"}]
    path = jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(ValueError, match=rf"p\.jsonl:2: negatives: .* for {task}, got none"):
        read(path, task=task)
    found, report = read(path, "skip", task=task)
    assert found == [["a", "b", "c"]] and report.bad == 1


@pytest.mark.parametrize("most, scores", [(1, [0.25, 0.0, 1.0, 0.5]), (5, [2.5, 0, 0.75, 0.5])])
def test_scores_of_sts(most, scores, tmp_path):
    rows = [{"sentence1": f"{i}", "sentence2": "b", "score": s} for i, s in enumerate(scores)]
    table = table_of(jsonl(tmp_path / "s.jsonl", rows), task="sts")
    assert len(table) == 4 and table.scores.dtype == np.float32
    assert table.scores == pytest.approx([s / most for s in scores])
    assert table_of(jsonl(tmp_path / "p.jsonl", PAIRS)).scores is None


# ---- what is left out ----


def test_duplicate_pairs(tmp_path):
    rows = [("a", "b"), ("a", "c"), ("a", "b"), ("b", "a"), ("A", "b"), ("a ", "b"), ("b", "a")]
    found, report = read(jsonl(tmp_path / "p.jsonl", pairs_of(("query", "positive"), rows)))
    assert found == [["a", "b"], ["a", "c"], ["b", "a"], ["A", "b"], ["a ", "b"]]
    assert (report.rows, report.items, report.duplicates) == (7, 5, 2)


def test_duplicate_rows_of_nway_tables(tmp_path):
    rows = [("1", "en", "a"), ("1", "de", "a"), ("1", "en", "a"), *[("2", "en", "b")] * 2]
    found, report = read(jsonl(tmp_path / "n.jsonl", pairs_of(("id", "lang", "text"), rows)))
    assert found == [["a", "a"]]
    assert (report.duplicates, report.alone, report.items) == (2, 1, 1)


@pytest.mark.parametrize("nway", [False, True])
def test_cap(nway, tmp_path):
    """The cap applies to what is left, chooses the same items each time, and others by name."""
    if nway:
        rows = [{"id": i, "lang": x, "text": f"{i}{x}"} for x in "ab" for i in range(200)]
        rows += [{"id": i, "lang": "a", "text": f"{i}a"} for i in range(200, 300)]
    else:
        rows = [{"query": f"{i}", "positive": f"{i}p"} for i in range(200)] * 2
        rows += [{"query": f"{i}", "positive": "p", "score": 0.1} for i in range(100)]
    path = jsonl(tmp_path / "p.jsonl", rows)
    (whole, _), (some, report) = read(path), read(path, cap=50)
    assert len(whole) == 200 and len(some) == report.items == 50 and report.by_cap == 150
    places = [whole.index(item) for item in some]
    assert places == sorted(places) and places != list(range(50))
    assert 20 < np.mean(places) < 180
    assert read(path, cap=50)[0] == some != read(path, cap=50, name="other")[0]
    assert read(path, cap=200)[0] == whole == read(path, cap=999)[0]


def test_held_out_texts_of_pairs(tmp_path):
    """A held-out text takes its pair along."""
    rows = [
        {"query": "Sea", "positive": "Meer"},
        {"query": "clean", "positive": "sauber", "negatives": ["dirty", " MEER "]},
        {"query": "a", "positive": "b", "negatives": ["c"]},
        {"query": "ﬁ", "positive": "x"},
    ]
    held_out = {normalise("meer"), normalise("FI")}
    ((table, report),) = reports(jsonl(tmp_path / "p.jsonl", rows), held_out=held_out)
    assert items(table) == [["a", "b", "c"]] and report.held_out == 8
    assert table.ids.tolist() == [text_id("a"), text_id("a"), text_id("c")]


def test_held_out_texts_of_nway_items(tmp_path):
    texts = {"1": ["a", "b", "c"], "2": ["d", "a"], "3": ["e", "f"]}
    rows = [{"id": k, "lang": t, "text": t} for k, ts in texts.items() for t in ts]
    ((table, report),) = reports(jsonl(tmp_path / "n.jsonl", rows), held_out={"a"})
    assert items(table) == [["b", "c"], ["e", "f"]]
    assert (report.held_out, report.alone) == (2, 1)
    assert table.ids.tolist() == [text_id("n", "1")] * 2 + [text_id("n", "3")] * 2


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_no_items_left(bad_rows, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", PAIRS[:2])
    with pytest.raises(ValueError, match=r"p\.jsonl: expected pairs without texts of the eval"):
        read(path, bad_rows, held_out={"eins", "two"})
    assert len(read(path, held_out={"other"})[0]) == 2
    (tmp_path / "b.jsonl").write_text('{"query": "a", "positive": ""}\n[]\n')
    with pytest.raises(ValueError, match=r"found none; 2 bad rows, first .*b\.jsonl:1: pos"):
        read(tmp_path / "b.jsonl", "skip")


# ---- texts on disk ----

TEXTS = [f"text {i} é" * (i % 5) for i in range(50)]


@pytest.mark.parametrize("chunk", [1, 7, 50, 8192])
def test_stored_texts_are_a_list(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "CHUNK", chunk)
    writer = tables.TextWriter(tmp_path / "texts.arrow")
    for begin in range(0, 50, 4):
        writer.extend(TEXTS[begin : begin + 4])
    texts = writer.close()
    assert len(texts) == 50 and list(texts) == TEXTS
    assert [texts[i] for i in range(-50, 50)] == TEXTS + TEXTS
    for some in (slice(3, 17), slice(None), slice(40, 99), slice(7, 7), slice(None, None, 9)):
        assert texts[some] == TEXTS[some]
    with pytest.raises(IndexError):
        texts[50]
    sent = pickle.dumps(texts)
    assert len(sent) < 500 and list(pickle.loads(sent)) == TEXTS
    texts = tables.TextWriter(tmp_path / "empty.arrow").close()
    assert len(texts) == 0 and list(texts) == []

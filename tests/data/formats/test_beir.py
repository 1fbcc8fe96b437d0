"""BEIR's files: what they hold, every mistake with its place, and rows that are left out."""

import numpy as np
import pytest

from mlembed.data import eval_sets
from mlembed.data.formats.beir import judgements
from mlembed.data.formats.layouts import Report
from tests.data.samples import CORPUS, HEADER, QRELS, QUERIES, beir, jsonl, parquet


def read(path):
    return eval_sets.read(str(path))


def test_beir(tmp_path):
    (task,) = read(beir(tmp_path / "b"))
    assert task.name == "b"
    assert task.queries == ["sea? ", "moon?"]  # the other query has no judgements
    documents = ["The sea is wet.", "the sun", "the moon", "only a title"]
    assert list(task.documents()) == documents
    assert task.order_N.tolist() == [1, 2, 0, 3]  # "2" < "d1" < "d10" < "é"
    assert task.judged.tolist() == [[0, 0, 2], [0, 1, 0], [1, 2, 1], [1, 3, -1]]
    # A titled passage is held out of training with its title and without.
    texts = [*task.queries, documents[0], "is wet.", *documents[1:], ""]
    assert sorted(task.texts) == sorted(texts) and len(task.texts) == len(texts)


def test_splits_of_beir(tmp_path):
    other = HEADER + "q1\td10\t1\n"
    path = beir(tmp_path / "b", test=QRELS, train=other)
    assert read(path)[0].queries == ["sea? ", "moon?"]
    (task,) = read(path / "qrels" / "train.tsv")
    assert (task.name, task.queries) == ("b-train", ["sun?"])
    assert read(beir(tmp_path / "one", dev=other))[0].queries == ["sun?"]
    two = beir(tmp_path / "two", dev=QRELS, train=other)
    with pytest.raises(ValueError, match=r"expected qrels/test\.tsv, or one other .* got dev, tra"):
        read(two)
    # A directory of them, next to files.
    (tmp_path / "s.csv").write_text("sentence1,sentence2,score\na,b,1\n")
    (two / "qrels" / "dev.tsv").unlink()
    assert [task.name for task in read(tmp_path)] == ["b", "one", "s", "two"]


@pytest.mark.parametrize(
    "what, message",
    [
        (dict(corpus=["{"]), r"corpus\.jsonl:1: invalid JSON"),
        (dict(corpus=[{"text": "x"}]), r"corpus\.jsonl:1: _id: expected text, got None"),
        (dict(corpus=[*CORPUS, {"_id": "z"}]), r"corpus\.jsonl:5: text: expected text, got None"),
        (dict(corpus=[{"_id": "z", "title": 3, "text": ""}]), r":1: title: expected text, got 3"),
        (dict(corpus=[{"_id": "z", "text": "\ud83d"}]), r"corpus\.jsonl:1: text: expected text"),
        (dict(corpus=[*CORPUS, CORPUS[1]]), r"corpus\.jsonl:5: _id: .* new one, got 'd10' again"),
        (dict(queries=[*QUERIES, QUERIES[0]]), r"queries\.jsonl:4: _id: .* got 'q0' again"),
        (dict(queries=QUERIES[:2]), r"test\.tsv:2: query-id: .* id of the queries, got 'q2'"),
        (dict(corpus=CORPUS[1:2], test=QRELS[:32]), r"test\.tsv: corpus-id: .* got '2' \.\."),
        (dict(test=QRELS + "q1\td1\n"), r"test\.tsv:6: expected query-id TAB corpus-id TAB score"),
        (dict(test=QRELS + "q1\td1\thigh\n"), r"test\.tsv:6: score: expected an integer, got 'hi"),
        (
            dict(test="q1\td1\tone\n"),
            r"test\.tsv:1: expected the header query-id, corpus-id, score",
        ),
        (dict(test=HEADER), r"test\.tsv: expected judgements, found none"),
    ],
)
def test_beir_errors(what, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(beir(tmp_path / "b", **what))


def test_judged_documents_that_the_corpus_lacks(tmp_path):
    """ArguAna has such documents: a warning, and they cannot be found."""
    path = beir(tmp_path / "b", corpus=CORPUS[:3])
    words = r"test\.tsv: 1 judged documents are missing from the corpus .* first 'é'"
    with pytest.warns(UserWarning, match=words):
        (task,) = read(path)
    assert task.judged.tolist() == [[0, 0, 2], [0, 1, 0], [1, 2, 1], [1, 3, -1]]
    assert len(task.order_N) == 3


def test_documents_with_the_id_of_a_query(tmp_path):
    (task,) = read(beir(tmp_path / "b", corpus=[*CORPUS, {"_id": "q2", "text": "x"}]))
    assert task.own_Q.tolist() == [-1, 4]


def test_missing_files_of_beir(tmp_path):
    for name in ("corpus", "queries"):
        path = beir(tmp_path / name)
        (path / f"{name}.jsonl").unlink()
        with pytest.raises(ValueError, match=rf"expected {name}\.jsonl, found none"):
            read(path)
    path = beir(tmp_path / "qrels")
    (path / "qrels" / "test.tsv").unlink()
    with pytest.raises(ValueError, match=r"expected qrels/test\.tsv.*got none"):
        read(path)


@pytest.mark.parametrize(
    "lines",
    [
        "query-id\tcorpus-id\tscore\nq1\td1\t1.0\nq1\td2\t0\nq1\td1\t1\n",
        "q1\td1\t1\nq1\td2\t0\n",
        "q1 0 d1 1\nq1 0 d2 0\n",
        "q1\t0\td1\t1\nq1\t0\td2\t0\n",
    ],
)
def test_forms_of_judgements(lines, tmp_path):
    (tmp_path / "t.tsv").write_text(lines)
    found = judgements(tmp_path / "t.tsv", {"q1"}, {"d1": 0, "d2": 1}, Report("t"))
    assert found == {"q1": {0: 1, 1: 0}}


def test_conflicting_judgements(tmp_path):
    (tmp_path / "t.tsv").write_text("q1 0 d1 1\nq1 0 d1 0\n")
    with pytest.raises(ValueError, match=r"t\.tsv:2: score: expected the earlier 1 of 'q1' and"):
        judgements(tmp_path / "t.tsv", {"q1"}, {"d1": 0}, Report("t"))


def test_bad_rows_of_beir(tmp_path):
    """Every kind of them, each counted; those of the corpus are left out at every reading."""
    corpus = ["{", CORPUS[0], {"_id": "z"}, CORPUS[1], CORPUS[1] | {"text": "other"}, *CORPUS[2:]]
    queries = [*QUERIES, QUERIES[0] | {"text": "again"}, {"text": "no id"}]
    more = "q7\t2\t1\nq1\tnone\t1\nq0\td1\t1\nq0\td1\nq1\td1\tx\n"
    path = beir(tmp_path / "b", corpus, queries, test=QRELS + more)
    with pytest.raises(ValueError, match=r"queries\.jsonl:4: _id"):
        read(path)
    with pytest.warns(UserWarning, match=r"b: 10 bad rows left out, first .*queries\.jsonl:4: _id"):
        (task,) = eval_sets.read(str(path), "skip")
    (whole,) = read(beir(tmp_path / "whole"))
    assert list(task.documents()) == list(whole.documents()) == list(task.documents())
    assert sorted(task.texts) == sorted(whole.texts) and task.queries == whole.queries
    assert (task.judged == whole.judged).all() and (task.order_N == whole.order_N).all()


def test_judgements_of_missing_documents_are_left_out(tmp_path):
    path = beir(tmp_path / "b", corpus=CORPUS[:2])
    with pytest.warns(UserWarning, match=r"2 bad rows left out, .*corpus-id: .* got '2'"):
        (task,) = eval_sets.read(str(path), "skip")
    assert task.queries == ["sea? "] and task.judged.tolist() == [[0, 0, 2], [0, 1, 0]]
    none = beir(tmp_path / "none", corpus=CORPUS[1:2], test=QRELS[:32])
    with pytest.raises(ValueError, match=r"judgements, found none; 1 bad rows, first .*:2"):
        eval_sets.read(str(none), "skip")


def test_judgements_in_a_table(tmp_path):
    path = beir(tmp_path / "b")
    rows = [line.split("\t") for line in QRELS.splitlines()[1:]]
    names = HEADER.strip().split("\t")
    table = [dict(zip(names, (q, d, int(g)), strict=True)) for q, d, g in rows]
    (want,) = read(path)
    (path / "qrels" / "test.tsv").unlink()
    jsonl(path / "qrels" / "test.jsonl", table)
    assert (read(path)[0].judged == want.judged).all()
    jsonl(path / "qrels" / "test.jsonl", [*table, {"query-id": "q1", "score": 1}])
    with pytest.raises(ValueError, match=r"test\.jsonl:5: corpus-id: expected an id, got None"):
        read(path)


# ---- NanoBEIR's folders ----


def nano(path, score=False, parts=("train-00000-of-00001",)):
    """Write NanoBEIR's layout as the Hub has it, a table in each folder, ids as text."""
    pairs = [("q2", "2", 1), ("q0", "d1", 1)]
    judged = [
        {"query-id": q, "corpus-id": d, **({"score": n} if score else {})} for q, d, n in pairs
    ]
    corpus = [{"_id": str(row["_id"]), "text": row["text"]} for row in CORPUS]
    for name, rows in (("corpus", corpus), ("queries", QUERIES), ("qrels", judged)):
        (path / name).mkdir(parents=True)
        for part in parts if name == "qrels" else parts[:1]:
            parquet(path / name / f"{part}.parquet", rows)
    return path


@pytest.mark.parametrize("score", [False, True])
def test_nanobeir(tmp_path, score):
    """Its judgements have no score and mean 1; all else is as in BEIR's files."""
    (task,) = read(nano(tmp_path / "NanoSea", score))
    corpus = [{"_id": row["_id"], "text": row["text"]} for row in CORPUS]
    (other,) = read(beir(tmp_path / "b", corpus, test=HEADER + "q2\t2\t1\nq0\td1\t1\n"))
    assert task.name == "NanoSea" and task.queries == other.queries == ["sea? ", "moon?"]
    assert list(task.documents()) == list(other.documents())
    for field in ("judged", "order_N"):
        np.testing.assert_array_equal(getattr(task, field), getattr(other, field))
    named = read(tmp_path / "NanoSea" / "qrels" / "train-00000-of-00001.parquet")
    assert [one.name for one in named] == ["NanoSea-train"]


def test_folder_of_nanobeir(tmp_path):
    for name in ("NanoSea", "NanoSun"):
        nano(tmp_path / "nano" / name)
    assert [task.name for task in read(tmp_path / "nano")] == ["NanoSea", "NanoSun"]


def test_nanobeir_errors(tmp_path):
    two = nano(tmp_path / "two", parts=("train-00000-of-00002", "train-00001-of-00002"))
    with pytest.raises(ValueError, match="qrels: expected one file of a split, got train-00000"):
        read(two)
    path = nano(tmp_path / "more")
    parquet(path / "corpus" / "more.parquet", [{"_id": "x", "text": "y"}])
    with pytest.raises(ValueError, match="corpus: expected one file, got 2, first more.parquet"):
        read(path)
    for file in (path / "corpus").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="expected corpus.jsonl, found none"):
        read(path)
    # A file of lines has to say the score of each judgement.
    path = beir(tmp_path / "b")
    (path / "qrels" / "test.tsv").unlink()
    jsonl(path / "qrels" / "test.jsonl", [{"query-id": "q2", "corpus-id": "2"}])
    with pytest.raises(ValueError, match="score: expected an integer, got None"):
        read(path)

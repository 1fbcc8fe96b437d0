"""Layouts of other libraries are the tables that ours are, and every mistake is told by its row and
column, refused or skipped."""

import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlembed import config
from mlembed.data import sources
from mlembed.data.formats import layouts


def read(path, bad_rows="error", **fields):
    ((table, report),) = sources.read(config.Source(path=str(path), **fields), bad_rows=bad_rows)
    bounds = itertools.pairwise(table.starts.tolist())
    return [table.texts[begin:end] for begin, end in bounds], report


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


# ---- known layouts ----


@pytest.mark.parametrize(
    "row, want",
    [
        ({"query": "a", "positive": "b"}, ["a", "b"]),
        ({"positive": "b", "query": "a", "negatives": ["c", "d"], "x": 1}, ["a", "b", "c", "d"]),
        ({"anchor": "a", "positive": "b"}, ["a", "b"]),
        ({"anchor": "a", "positive": "b", "negative": "c"}, ["a", "b", "c"]),
        ({"negative": "c", "positive": "b", "anchor": "a", "label": 0.9}, ["a", "b", "c"]),
        (
            {"anchor": "a", "positive": "b", "negative_2": "d", "negative_1": "c"},
            ["a", "b", "c", "d"],
        ),
        ({"query": "a", "answer": "b"}, ["a", "b"]),
        ({"answer": "b", "question": "a"}, ["a", "b"]),
        ({"sentence1": "a", "sentence2": "b", "score": 1}, ["a", "b"]),
        ({"sentence1": "a", "sentence2": "b", "similarity_score": 0.8}, ["a", "b"]),
        ({"sentence2": "b", "sentence1": "a", "label": 1}, ["a", "b"]),
        # By position: anchor, positive, negative, as sentence-transformers reads any names.
        ({"Frage": "a", "Antwort": "b"}, ["a", "b"]),
        ({"Frage": "a", "Antwort": "b", "falsch": "c"}, ["a", "b", "c"]),
        ({"label": 1, "Frage": "a", "scores": 1, "Antwort": "b"}, ["a", "b"]),
        # F2LLM-v2: up to 24.
        (
            {"query": "a", "passage": "b"} | {f"negative_{i}": f"n{i}" for i in range(24, 0, -1)},
            ["a", "b", *(f"n{i}" for i in range(1, 25))],
        ),
        ({"query": "a", "passage": "b", "negative_1": "c", "negative_2": None}, ["a", "b", "c"]),
        # FlagEmbedding
        (
            {
                "query": "a",
                "pos": ["b"],
                "neg": ["c", "d"],
                "pos_scores": [7],
                "neg_scores": [1, 2],
            },
            ["a", "b", "c", "d"],
        ),
        ({"query": "a", "pos": ["b"], "neg": [], "prompt": "find: "}, ["find: a", "b"]),
        ({"query": "a", "pos": ["b"], "prompt": None, "type": "x", "id": 3}, ["a", "b"]),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_row_of_each_layout(row, want, suffix, tmp_path):
    path = tmp_path / f"p.{suffix}"
    if suffix == "jsonl":
        jsonl(path, [row])
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    items, report = read(path)
    assert items == [want] and (report.rows, report.items) == (1, 1)


def test_several_positives_are_several_items_and_no_negatives_of_each_other(tmp_path):
    rows = [{"query": "a", "pos": ["b", "c"], "neg": ["d"]}, {"query": "e", "pos": ["f"]}]
    path = jsonl(tmp_path / "f.jsonl", rows)
    items, report = read(path)
    assert items == [["a", "b", "d"], ["a", "c", "d"], ["e", "f"]]
    assert (report.rows, report.items) == (2, 3)
    ((table, _),) = sources.read(sources.of(path))
    by_text = dict(zip(table.texts, table.ids.tolist(), strict=True))
    assert by_text["a"] == by_text["b"] == by_text["c"] != by_text["d"]


def test_csv_layouts(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('sentence1,sentence2,score\n"a, ""b""\nc",d,0.9\ne,f,0.7\ng,h,\n')
    assert read(path)[0] == [['a, "b"\nc', "d"], ["g", "h"]]
    assert len(read(path, task="sts", bad_rows="skip")[0]) == 2
    path = tmp_path / "q.tsv"
    path.write_text("anchor\tpositive\tnegative_1\tnegative_2\na\tb\tc\t\ne\tf\t\t\n")
    assert read(path)[0] == [["a", "b", "c"], ["e", "f"]]


@pytest.mark.parametrize(
    "names",
    [
        ["query"],
        ["query", "text"],  # a name of ours in another's place is no unknown name
        ["id", "text"],
        ["anchr", "positive"],
        ["a"],
        ["a", "b", "c", "d"],
    ],
)
def test_unknown_columns_are_listed(names, tmp_path):
    row = dict.fromkeys(names, "x")
    jsonl(tmp_path / "u.jsonl", [row])
    parquet(tmp_path / "u.parquet", **{name: ["x"] for name in names})
    (tmp_path / "u.csv").write_text(",".join(names) + "\n" + ",".join("x" * len(names)) + "\n")
    for suffix, number in (("jsonl", 1), ("parquet", 1), ("csv", 2)):
        with pytest.raises(ValueError) as caught:
            read(tmp_path / f"u.{suffix}")
        assert f"u.{suffix}:{number}: expected columns query, positive" in str(caught.value)
        assert f"got {', '.join(names)}" in str(caught.value)


def test_numbers_are_no_text_by_position(tmp_path):
    with pytest.raises(ValueError, match="expected columns query, positive"):
        read(jsonl(tmp_path / "u.jsonl", [{"a": "x", "b": 3}]))
    with pytest.raises(ValueError, match=r"u\.parquet:1: expected columns query, positive"):
        read(parquet(tmp_path / "u.parquet", a=["x"], b=[3]))


# ---- a corpus ----


def corpus(path, key="_id"):
    rows = [
        {key: "d1", "text": "one", "title": "First"},
        {key: "d2", "text": "two", "title": ""},
        {key: 3, "text": "three"},
    ]
    return jsonl(path / "corpus.jsonl", rows)


@pytest.mark.parametrize("key", ["_id", "doc_id", "docid", "id"])
@pytest.mark.parametrize("chunk", [1, 8192])
def test_documents_by_id(key, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "CHUNK", chunk)
    rows = [
        {"query": "a", "positive": "d1", "negatives": ["d2", 3]},
        {"query": "b", "positive": 3, "negative_1": "d1"},
    ]
    path = jsonl(tmp_path / "p.jsonl", rows)
    items, _ = read(path, corpus=corpus(tmp_path, key))
    assert items == [["a", "First one", "two", "three"], ["b", "three", "First one"]]
    path = jsonl(tmp_path / "f.jsonl", [{"query": "a", "pos": ["d1", "3"], "neg": ["d2"]}])
    items, _ = read(path, corpus=corpus(tmp_path, key))
    assert items == [["a", "First one", "two"], ["a", "three", "two"]]


@pytest.mark.parametrize(
    "row, words",
    [
        ({"query": "a", "positive": "d4"}, "positive: expected an id of .*jsonl, got 'd4'"),
        ({"query": "a", "positive": None}, "positive: expected an id of .*, got None"),
        ({"query": "a", "positive": True}, "positive: expected an id of .*, got True"),
        ({"query": "a", "positive": "d1", "negatives": ["d2", "x"]}, "negatives: .* got 'x'"),
        ({"query": "a", "positive": "d1", "negatives": [["d2"]]}, "negatives: .* got .'d2'"),
        ({"query": "a", "positive": "d1", "negative_1": "x"}, "negative_1: expected an id"),
    ],
)
def test_ids_that_the_corpus_lacks(row, words, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"query": "q", "positive": "d2"}, row])
    with pytest.raises(ValueError, match=rf"p\.jsonl:2: {words}"):
        read(path, corpus=corpus(tmp_path))
    items, report = read(path, "skip", corpus=corpus(tmp_path))
    assert items == [["q", "two"]] and report.bad == 1


@pytest.mark.parametrize(
    "lines, words",
    [
        (
            '{"_id": "1", "text": "a"}\n{"_id": 1, "text": "b"}',
            ":2: _id: expected a new id, got '1'",
        ),
        ('{"_id": "1"}', ":1: text: expected text, got None"),
        ('{"text": "a"}', ":1: _id: expected text, got None"),
        ('{"_id": "1", "text": " "}', ":1: text: expected text"),
        ("[]", ":1: expected an object"),
    ],
)
def test_malformed_corpora(lines, words, tmp_path):
    (tmp_path / "corpus.jsonl").write_text(lines)
    path = jsonl(tmp_path / "p.jsonl", [{"query": "q", "positive": "1"}])
    with pytest.raises(ValueError, match=rf"corpus\.jsonl{words}"):
        read(path, corpus=str(tmp_path / "corpus.jsonl"))
    with pytest.raises(ValueError, match=r"corpus: expected a file, got .*none\.jsonl"):
        read(path, corpus=str(tmp_path / "none.jsonl"))


def test_a_changed_corpus_is_another_table(tmp_path, monkeypatch):
    """Also where what was read of the rows is kept."""
    monkeypatch.setattr(sources, "BIG", 0)
    monkeypatch.setenv("MLEMBED_CACHE", str(tmp_path / "cache"))
    path = jsonl(tmp_path / "p.jsonl", [{"query": "a", "positive": "d2"}])
    documents = corpus(tmp_path)
    assert read(path, corpus=documents)[0] == [["a", "two"]]
    jsonl(tmp_path / "corpus.jsonl", [{"_id": "d2", "text": "other"}])
    assert read(path, corpus=documents)[0] == [["a", "other"]]


def test_an_nway_table_has_no_corpus(tmp_path):
    path = jsonl(tmp_path / "n.jsonl", [{"id": "1", "lang": "en", "text": "a"}])
    with pytest.raises(ValueError, match=r"n\.jsonl: corpus: expected none for an n-way table"):
        read(path, corpus=corpus(tmp_path))


# ---- malformed rows ----

GOOD = b'{"query": "a", "positive": "b"}'


@pytest.mark.parametrize(
    "line, words",
    [
        (b'{"query": "a", "positive": ', "not json"),
        (b"query,positive", "not json"),
        (b'{"query": "\xff\xfe", "positive": "b"}', "not UTF-8"),
        (b'["a", "b"]', "expected an object, got list"),
        (b"3", "expected an object, got int"),
        (b"null", "expected an object, got NoneType"),
        (b'{"query": "a"}', "positive: expected text, got None"),
        (b'{"query": "a", "positive": ""}', "positive: expected text, got ''"),
        (b'{"query": " \\t", "positive": "b"}', "query: expected text"),
        (b'{"query": 3, "positive": "b"}', "query: expected text, got 3"),
        (b'{"query": ["a"], "positive": "b"}', "query: expected text"),
        (b'{"query": "a", "positive": "b", "negatives": "c"}', "negatives: expected a list"),
        (b'{"query": "a", "positive": "b", "negatives": ["c", ""]}', "negatives: expected a list"),
        (b'{"query": "a", "positive": "b", "negatives": ["c", 3]}', "negatives: expected a list"),
        (b'{"query": "a", "positive": "b", "negatives": {"c": 1}}', "negatives: expected a list"),
        (b'{"query": "a", "positive": "b", "score": "0.9"}', "score"),
        (b'{"query": "a", "positive": "b", "score": [1]}', "score"),
        # json may hold half a surrogate pair, which is no text and no tokenizer takes it.
        (b'{"query": "\\ud83d", "positive": "b"}', "query"),
        (b'{"query": "a", "positive": "b", "negatives": ["\\ud83d"]}', "negatives"),
        (b'{"query": ' + b"1" * 5000 + b', "positive": "b"}', ""),  # more digits than Python reads
    ],
)
def test_malformed_pair_rows_are_named_by_line(line, words, tmp_path):
    (tmp_path / "p.jsonl").write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD + b"\n")
    with pytest.raises(ValueError) as caught:
        read(str(tmp_path / "p.jsonl"))
    assert f"{tmp_path}/p.jsonl:3: " in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize(
    "line, words",
    [
        ({"id": "1", "lang": "de"}, "text: expected text, got None"),
        ({"id": "1", "lang": "de", "text": "\n"}, "text: expected text"),
        ({"id": None, "lang": "de", "text": "a"}, "id: expected text, got None"),
        ({"id": 1.5, "lang": "de", "text": "a"}, "id: expected text, got 1.5"),
        ({"id": "1", "lang": 3, "text": "a"}, "lang: expected text, got 3"),
        ({"query": "a", "positive": "b"}, "id: expected text, got None"),
    ],
)
def test_malformed_nway_rows_are_named_by_line(line, words, tmp_path):
    path = jsonl(tmp_path / "n.jsonl", [{"id": "1", "lang": "en", "text": "a"}, line])
    with pytest.raises(ValueError) as caught:
        read(path)
    assert f"{path}:2: " in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize(
    "columns, words",
    [
        (dict(query=["a", None], positive=["b", "c"]), "query: expected text, got None"),
        (dict(query=["a", ""], positive=["b", "c"]), "query: expected text, got ''"),
        (dict(query=["a", "b"], positive=["b", "c"], score=["1", "x"]), "score"),
        (dict(query=["a", "b"], positive=["b", "c"], negatives=[None, ["d", None]]), "negatives"),
        (dict(id=[1, None], lang=["a", "b"], text=["b", "c"]), "id: expected text, got None"),
    ],
)
def test_malformed_parquet_rows_are_named_by_row(columns, words, tmp_path):
    path = parquet(tmp_path / "p.parquet", **columns)
    with pytest.raises(ValueError) as caught:
        read(path)
    row = 1 if words == "score" else 2  # a text as a score is wrong from the first row on
    assert f"{path}:{row}: " in str(caught.value) and words in str(caught.value)


# What is wrong with one row, by layout; every kind in every format that can hold it.
GOOD_PAIR = {"anchor": "a", "positive": "b", "negative_1": "c", "negative_2": "d"}
BAD_PAIRS = [
    ({"positive": None}, "positive: expected text, got None"),
    ({"anchor": " "}, "anchor: expected text, got ' '"),
    ({"negative_1": None}, "negative_1: expected text, as negative_2 is, got None"),
    ({"negative_2": " "}, "negative_2: expected text, got ' '"),
    ({"score": 7}, "score: expected a number 0..1 or, all of the source, 0..5, got 7"),
    ({"score": -0.5}, "score: expected a number"),
    ({"score": float("nan")}, "score: expected a number"),
]


@pytest.mark.parametrize("change, words", BAD_PAIRS)
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_bad_rows_are_refused_or_skipped(change, words, suffix, tmp_path):
    good = GOOD_PAIR | {"score": 0.9}
    rows = [good, good | {"anchor": "x"} | change, good | {"anchor": "y"}]
    path = tmp_path / f"p.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([r | {"score": float(r["score"])} for r in rows]), path)
    elif suffix == "jsonl":
        jsonl(path, rows)
    else:
        lines = [list(good), *([str("" if v is None else v) for v in r.values()] for r in rows)]
        path.write_text("".join("\t,"[suffix == "csv"].join(line) + "\n" for line in lines))
    number = 3 if suffix in ("csv", "tsv") else 2
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:{number}: {words}")
    items, report = read(path, "skip")
    assert [item[0] for item in items] == ["a", "y"]
    assert (report.rows, report.bad, report.items) == (3, 1, 2)
    assert len(report.bad_rows) == 1 and report.bad_rows[0].startswith(f"{path}:{number}: {words}")


@pytest.mark.parametrize(
    "line, words",
    [
        ({"query": "a", "pos": []}, "pos: expected a list of texts, got []"),
        ({"query": "a", "pos": None}, "pos: expected a list of texts, got []"),
        ({"query": "a", "pos": "b"}, "pos: expected a list of texts, got 'b'"),
        ({"query": "a", "pos": ["b", None]}, "pos: expected a list of texts, got ['b', None]"),
        ({"query": "a", "pos": ["b"], "neg": [""]}, "neg: expected a list of texts, got ['']"),
        ({"query": "a", "pos": ["b"], "prompt": 3}, "prompt: expected text, got 3"),
    ],
)
def test_malformed_rows_of_flagembedding(line, words, tmp_path):
    path = jsonl(tmp_path / "f.jsonl", [{"query": "q", "pos": ["p"]}, line])
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(caught.value) == f"{path}:2: {words}"


def test_bad_rows_are_all_counted_and_some_listed(tmp_path):
    rows = [{"query": "a"}] * 5 + [{"query": "a", "positive": "b"}] + [{"query": "a"}] * 95
    items, report = read(jsonl(tmp_path / "p.jsonl", rows), "skip")
    assert items == [["a", "b"]] and report.bad == 100 and len(report.bad_rows) == layouts.SHOWN
    assert report.bad_rows[0] == f"{tmp_path}/p.jsonl:1: positive: expected text, got None"


def test_the_first_row_may_be_a_bad_one(tmp_path):
    (tmp_path / "p.jsonl").write_text('nonsense\n{"query": "a"}\n{"query": "a", "answer": "b"}\n')
    items, report = read(tmp_path / "p.jsonl", "skip")
    assert items == [["a", "b"]] and report.bad == 2
    with pytest.raises(ValueError, match=r"p\.jsonl:1: not json"):
        read(tmp_path / "p.jsonl")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_languages_that_rows_name_are_counted(suffix, tmp_path):
    """Also where a file of more columns than are used is read by those that are."""
    pairs = [
        {"query": f"q{i}", "positive": f"p{i}", "query_lang": "eng", "positive_lang": lang, "x": 1}
        for i, lang in enumerate(["deu", "deu", "", "fra"])
    ]
    nway = [{"id": i // 2, "lang": "ab"[i % 2], "text": f"t{i}", "x": 1} for i in range(5)]
    nway += [nway[0]]  # there before, and still a row
    for name, found, want in (
        ("p", pairs, {"eng": 4, "deu": 2, "fra": 1}),
        ("n", nway, {"a": 4, "b": 2}),
    ):
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(found), path)
        else:
            path.write_text("\n".join(map(json.dumps, found)))
        ((_, report),) = sources.read(sources.of(str(path)))
        assert report.languages == want


def test_languages_of_several_positives(tmp_path):
    row = {"query": "q", "pos": ["a", "b"], "query_lang": "x", "positive_lang": "y"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    ((_, report),) = sources.read(sources.of(str(tmp_path / "p.jsonl")))
    assert report.languages == {"x": 1, "y": 2}

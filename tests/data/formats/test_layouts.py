"""Layouts of other libraries give our tables, and each mistake names its row and column."""

import json

import pytest

from mlembed.data import sources
from mlembed.data.formats import layouts
from tests.data.formats.test_every_form import written
from tests.data.samples import jsonl, mistake, parquet, read, reports, table_of

# ---- known layouts ----


@pytest.mark.parametrize(
    "row, want",
    [
        ({"positive": "b", "query": "a", "negatives": ["c", "d"], "x": 1}, "abcd"),
        ({"negative": "c", "positive": "b", "anchor": "a", "label": 0.9}, "abc"),
        ({"answer": "b", "query": "a"}, "ab"),
        ({"sentence1": "a", "sentence2": "b", "score": 1}, "ab"),
        ({"sentence1": "a", "sentence2": "b", "similarity_score": 0.8}, "ab"),
        ({"sentence2": "b", "sentence1": "a", "label": 0.9}, "ab"),
        ({"query": "a", "passage": "b", "negative_1": "c", "negative_2": None}, "abc"),
        # FlagEmbedding
        ({"query": "a", "pos": ["b"], "neg": ["c"], "pos_scores": [7], "prompt": None}, "abc"),
        ({"query": "a", "pos": ["b"], "neg": [], "prompt": "find: ", "id": 3}, ["find: a", "b"]),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_each_layout(row, want, suffix, tmp_path):
    items, report = read(written(tmp_path / f"p.{suffix}", [row]))
    assert items == [list(want)] and (report.rows, report.items) == (1, 1)


def test_several_positives(tmp_path):
    """They are several items, and not negatives of each other."""
    rows = [{"query": "a", "pos": ["b", "c"], "neg": ["d"]}, {"query": "e", "pos": ["f"]}]
    path = jsonl(tmp_path / "f.jsonl", rows)
    items, report = read(path)
    assert items == [["a", "b", "d"], ["a", "c", "d"], ["e", "f"]]
    assert (report.rows, report.items) == (2, 3)
    table = table_of(path)
    ids = dict(zip(table.texts, table.ids.tolist(), strict=True))
    assert ids["a"] == ids["b"] == ids["c"] != ids["d"]


def test_csv_layouts(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('sentence1,sentence2,score\n"a, ""b""\nc",d,0.9\ne,f,0.7\ng,h,\n')
    assert read(path)[0] == [['a, "b"\nc', "d"], ["g", "h"]]
    assert len(read(path, "skip", task="sts")[0]) == 2
    path = tmp_path / "q.tsv"
    path.write_text("anchor\tpositive\tnegative_1\tnegative_2\na\tb\tc\t\ne\tf\t\t\n")
    assert read(path)[0] == [["a", "b", "c"], ["e", "f"]]


@pytest.mark.parametrize("names", [["query", "text"], ["anchr", "positive"]])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_unknown_columns(names, suffix, tmp_path):
    path = written(tmp_path / f"u.{suffix}", [dict.fromkeys(names, "x")])
    message = mistake(path)
    assert f"u.{suffix}: expected columns query, positive" in message
    assert f"got {', '.join(names)}" in message


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
    items, _ = read(jsonl(tmp_path / "p.jsonl", rows), corpus=corpus(tmp_path, key))
    assert items == [["a", "First one", "two", "three"], ["b", "three", "First one"]]
    path = jsonl(tmp_path / "f.jsonl", [{"query": "a", "pos": ["d1", "3"], "neg": ["d2"]}])
    items, _ = read(path, corpus=corpus(tmp_path, key))
    assert items == [["a", "First one", "two"], ["a", "three", "two"]]


@pytest.mark.parametrize(
    "row, words",
    [
        ({"positive": "d4"}, "positive: expected an id of .*jsonl, got 'd4'"),
        ({"positive": None}, "positive: expected text, got None"),
        ({"positive": True}, "positive: expected an id of .*, got True"),
        ({"positive": "d1", "negatives": ["d2", "x"]}, "negatives: .* got 'x'"),
        ({"positive": "d1", "negatives": [["d2"]]}, "negatives: .* got .'d2'"),
        ({"positive": "d1", "negative_1": "x"}, "negative_1: expected an id"),
    ],
)
def test_unknown_document_ids(row, words, tmp_path):
    rows = [{"query": "q", "positive": "d2"}, {"query": "a"} | row]
    path = jsonl(tmp_path / "p.jsonl", rows)
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
    assert f"corpus.jsonl{words}" in mistake(path, corpus=str(tmp_path / "corpus.jsonl"))


def test_corpora_that_cannot_be_used(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"query": "q", "positive": "1"}])
    assert "corpus: expected a file, got none.jsonl" in mistake(path, corpus="none.jsonl")
    path = jsonl(tmp_path / "n.jsonl", [{"id": "1", "lang": "en", "text": "a"}])
    words = "n.jsonl: corpus: expected pairs of ids, got id=id lang=lang"
    assert words in mistake(path, corpus=corpus(tmp_path))


def test_changed_corpus(tmp_path, monkeypatch):
    """A stored table is made again when its corpus changes."""
    monkeypatch.setattr(sources, "BIG", 0)
    monkeypatch.setenv("MLEMBED_CACHE", str(tmp_path / "cache"))
    path = jsonl(tmp_path / "p.jsonl", [{"query": "a", "positive": "d2"}])
    documents = corpus(tmp_path)
    assert read(path, corpus=documents)[0] == [["a", "two"]]
    jsonl(tmp_path / "corpus.jsonl", [{"_id": "d2", "text": "other"}])
    assert read(path, corpus=documents)[0] == [["a", "other"]]


# ---- malformed rows ----


PAIR = '{"query": "a", "positive": "b", '
# Two sound rows of each layout.
GOOD = {
    "pairs": [{"query": "a", "positive": "b"}, {"query": "c", "positive": "d"}],
    "nway": [{"id": "1", "lang": "en", "text": "a"}, {"id": "1", "lang": "fr", "text": "b"}],
    "flag": [{"query": "a", "pos": ["b"]}, {"query": "c", "pos": ["d"]}],
}


@pytest.mark.parametrize(
    "layout, line, words",
    [
        ("pairs", PAIR, "invalid JSON"),
        ("pairs", PAIR + '"x": ' + "1" * 5000 + "}", "invalid JSON"),  # too many digits
        ("pairs", "[" * 100_000, "invalid JSON"),
        ("pairs", b'{"query": "\xff\xfe", "positive": "b"}', "expected UTF-8, got byte 0xff at 11"),
        ("pairs", '["a", "b"]', "query: expected text, got None"),
        ("pairs", "null", "expected an object or a list of texts, got NoneType"),
        ("pairs", '{"query": "a"}', "positive: expected text, got None"),
        ("pairs", '{"query": " \\t", "positive": "b"}', "query: expected text"),
        ("pairs", '{"query": 3, "positive": "b"}', "query: expected text, got 3"),
        # JSON may hold half a surrogate pair, which is not text and which tokenizers reject.
        ("pairs", '{"query": "\\ud83d", "positive": "b"}', "query"),
        ("pairs", PAIR + '"negatives": ["\\ud83d"]}', "negatives: expected a list"),
        ("pairs", PAIR + '"negatives": ["c", 3]}', "negatives: expected a list"),
        ("pairs", PAIR + '"negatives": {"c": 1}}', "negatives: expected text, got {'c': 1}"),
        ("pairs", PAIR + '"score": "high"}', "score: expected a number"),
        ("pairs", PAIR + '"score": [1]}', "score"),
        ("nway", '{"id": "1", "lang": "de"}', "text: expected text, got None"),
        ("nway", '{"id": "1", "lang": "de", "text": "\\n"}', "text: expected text"),
        ("nway", '{"id": null, "lang": "de", "text": "a"}', "id: expected text, got None"),
        ("nway", '{"id": 1.5, "lang": "de", "text": "a"}', "id: expected text, got 1.5"),
        ("nway", '{"id": "1", "lang": 3, "text": "a"}', "lang: expected text, got 3"),
        ("flag", '{"query": "a", "pos": []}', "pos: expected text, got []"),
        ("flag", '{"query": "a", "pos": null}', "pos: expected text, got None"),
        ("flag", '{"query": "a", "pos": ["b", null]}', "pos: expected a list of texts, got ['b', "),
        ("flag", '{"query": "a", "pos": ["b"], "neg": [""]}', "neg: expected a list of texts, got"),
        ("flag", '{"query": "a", "pos": ["b"], "prompt": 3}', "prompt: expected text, got 3"),
    ],
)
def test_malformed_rows(layout, line, words, tmp_path):
    path = tmp_path / "p.jsonl"
    good = [json.dumps(row).encode() for row in GOOD[layout]]
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join([good[0], b"", line, good[1]]))
    assert mistake(path).startswith(f"{path}:3: {words}")
    _, report = read(path, "skip")
    assert (report.rows, report.bad) == (3, 1)


@pytest.mark.parametrize(
    "columns, row, words",
    [
        (dict(query=["a", None], positive=["b", "c"]), 2, "query: expected text, got None"),
        (dict(query=["a", ""], positive=["b", "c"]), 2, "query: expected text, got ''"),
        (dict(query=["a", "b"], positive=["b", "c"], score=["1", "x"]), 2, "score"),
        (dict(query=["a"] * 2, positive=["b", "c"], negatives=[None, ["d", None]]), 2, "negatives"),
        (dict(id=[1, None], lang=["a", "b"], text=["b", "c"]), 2, "id: expected text, got None"),
    ],
)
def test_malformed_parquet_rows(columns, row, words, tmp_path):
    path = parquet(tmp_path / "p.parquet", **columns)
    assert mistake(path).startswith(f"{path}:{row}: {words}")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"positive": None}, "positive: expected text, got None"),
        ({"anchor": " "}, "anchor: expected text, got ' '"),
        ({"negative_2": " "}, "negative_2: expected text, got ' '"),
        ({"score": 7.0}, "score: expected a number 0..1 or, all of the source, 0..5, got "),
        ({"score": -0.5}, "score: expected a number"),
        ({"score": float("nan")}, "score: expected a number"),
    ],
)
@pytest.mark.parametrize("suffix, number", [("jsonl", 2), ("csv", 3), ("tsv", 3), ("parquet", 2)])
def test_bad_rows_raise_or_are_skipped(change, words, suffix, number, tmp_path):
    good = {"anchor": "a", "positive": "b", "negative_1": "c", "negative_2": "d", "score": 0.9}
    rows = [good, good | {"anchor": "x"} | change, good | {"anchor": "y"}]
    path = written(tmp_path / f"p.{suffix}", rows)
    assert mistake(path).startswith(f"{path}:{number}: {words}")
    items, report = read(path, "skip")
    assert [item[0] for item in items] == ["a", "y"]
    assert (report.rows, report.bad, report.items) == (3, 1, 2)
    assert len(report.bad_rows) == 1 and report.bad_rows[0].startswith(f"{path}:{number}: {words}")


def test_listed_bad_rows(tmp_path):
    rows = [{"query": "a"}] * 5 + [{"query": "a", "positive": "b"}] + [{"query": "a"}] * 95
    items, report = read(jsonl(tmp_path / "p.jsonl", rows), "skip")
    assert items == [["a", "b"]] and report.bad == 100 and len(report.bad_rows) == layouts.SHOWN
    assert report.bad_rows[0] == f"{tmp_path}/p.jsonl:1: positive: expected text, got None"


def test_bad_first_row(tmp_path):
    (tmp_path / "p.jsonl").write_text('nonsense\n{"query": "a"}\n{"query": "a", "answer": "b"}\n')
    items, report = read(tmp_path / "p.jsonl", "skip")
    assert items == [["a", "b"]] and report.bad == 2


# ---- languages ----


PAIRS = [
    {"query": f"q{i}", "positive": f"p{i}", "query_lang": "eng", "positive_lang": lang, "x": 1}
    for i, lang in enumerate(["deu", "deu", "", "fra"])
]
NWAY = [{"id": i // 2, "lang": "ab"[i % 2], "text": f"t{i}", "x": 1} for i in range(5)]
SEVERAL = {"query": "q", "pos": ["a", "b"], "query_lang": "x", "positive_lang": "y"}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "rows, want",
    [
        (PAIRS, {"eng": 4, "deu": 2, "fra": 1}),
        ([*NWAY, NWAY[0]], {"a": 4, "b": 2}),  # a duplicate is still a row
        ([SEVERAL], {"x": 1, "y": 2}),
    ],
    ids=["pairs", "nway", "several positives"],
)
def test_languages_of_rows(rows, want, suffix, tmp_path):
    """Counted also where only the used columns of a file are read."""
    ((_, report),) = reports(written(tmp_path / f"p.{suffix}", rows))
    assert report.languages == want

"""Files to tables: real files, and each mistake in them by file and line."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mlembed import data
from mlembed.data import text_id

CPU = torch.device("cpu")
SHARED = Path(__file__).parents[1].parent / "shared" / "data" / "train"


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def items(table):
    bounds = zip(table.starts[:-1], table.starts[1:], strict=True)
    return [table.texts[begin:end] for begin, end in bounds]


# ---- pair tables ----

PAIRS = [
    {"query": "one", "positive": "eins"},
    {"query": "two", "positive": "zwei", "negatives": ["drei", "vier"]},
    {"query": "zwei", "positive": "two", "negatives": []},
    {"query": "2", "positive": "zwei", "negatives": None},
]
WANT = [["one", "eins"], ["two", "zwei", "drei", "vier"], ["zwei", "two"], ["2", "zwei"]]


def test_pairs_jsonl(tmp_path):
    (table,) = data.read(jsonl(tmp_path / "p.jsonl", PAIRS))
    assert table.name == "p" and not table.nway and len(table) == 4
    assert items(table) == WANT
    assert table.starts.dtype == table.ids.dtype == np.int64
    # one eins | two zwei drei vier | zwei two | 2 zwei: three pairs are linked by "zwei" and "two"
    linked = [table.ids[i] for i in (2, 3, 6, 7, 8, 9)]
    assert set(linked) == {text_id("two")}  # never each other's negatives
    alone = table.ids[[0, 4, 5]].tolist()
    assert alone == [text_id("one"), text_id("drei"), text_id("vier")]
    assert table.ids[1] == table.ids[0]


def test_a_negative_that_is_a_positive_elsewhere_is_known_as_such(tmp_path):
    rows = [
        {"query": "q", "positive": "a", "negatives": ["b", "c"]},
        {"query": "q", "positive": "b"},
        {"query": "r", "positive": "c"},
    ]
    (table,) = data.read(jsonl(tmp_path / "p.jsonl", rows))
    of = dict(zip(table.texts, table.ids.tolist(), strict=True))
    assert of["q"] == of["a"] == of["b"] != of["c"] == of["r"]


def test_pairs_parquet_is_the_same_table(tmp_path):
    (a,) = data.read(jsonl(tmp_path / "p.jsonl", PAIRS))
    columns = {name: [row.get(name) for row in PAIRS] for name in ("positive", "query")}
    columns["negatives"] = pa.array([r.get("negatives") for r in PAIRS], pa.list_(pa.string()))
    columns["other"] = [None] * 4
    (b,) = data.read(parquet(tmp_path / "p.parquet", **columns))
    assert (a.texts, a.ids.tolist()) == (b.texts, b.ids.tolist())
    assert a.starts.tolist() == b.starts.tolist()


def test_any_script_line_end_and_blank_line(tmp_path):
    lines = [
        '{"query": "ሰላም", "positive": "👋 \\u00e9"}',
        "",
        '{"positive": "b\\nc", "query": " a "}',
    ]
    (tmp_path / "p.jsonl").write_bytes("\r\n".join(lines).encode())
    (table,) = data.read(str(tmp_path / "p.jsonl"))
    assert items(table) == [["ሰላም", "👋 é"], [" a ", "b\nc"]]


def test_score_threshold(tmp_path):
    scores = [0.79, 0.8, 1, None, 0.0]
    rows = [{"query": f"q{i}", "positive": f"p{i}", "score": s} for i, s in enumerate(scores)]
    (table,) = data.read(jsonl(tmp_path / "s.jsonl", rows))
    assert [item[0] for item in items(table)] == ["q1", "q2", "q3"]
    with pytest.raises(ValueError, match=r"low\.jsonl: expected pairs with a score of 0\.8"):
        data.read(jsonl(tmp_path / "low.jsonl", rows[:1]))


# ---- n-way tables ----


def test_nway(tmp_path):
    rows = [
        {"id": "a", "lang": "en", "text": "sea"},
        {"id": "b", "lang": "en", "text": "alone"},
        {"id": 7, "lang": "en", "text": "seven"},
        {"id": "a", "lang": "de", "text": "Meer"},
        {"id": "7", "lang": "de", "text": "sieben"},
        {"id": "a", "lang": "fr", "text": "mer"},
    ]
    (table,) = data.read(jsonl(tmp_path / "n.jsonl", rows))
    assert table.nway and items(table) == [["sea", "Meer", "mer"], ["seven", "sieben"]]
    assert table.ids.tolist() == [text_id("n", "a")] * 3 + [text_id("n", "7")] * 2


@pytest.mark.parametrize("column", ["id", "verse_id"])
def test_nway_parquet(column, tmp_path):
    columns = {column: [1, 2, 1, 2], "lang": list("eedd"), "text": ["a", "b", "c", "d"]}
    (table,) = data.read(parquet(tmp_path / "n.parquet", **columns))
    assert table.nway and items(table) == [["a", "c"], ["b", "d"]]


def test_nway_without_translations(tmp_path):
    rows = [{"id": i, "lang": "en", "text": "x"} for i in range(3)]
    with pytest.raises(ValueError, match=r"n\.jsonl: expected ids with two texts or more"):
        data.read(jsonl(tmp_path / "n.jsonl", rows))


# ---- directories ----


def test_a_directory_is_its_files_in_order(tmp_path):
    jsonl(tmp_path / "b.jsonl", PAIRS)
    parquet(tmp_path / "a.parquet", query=["x"], positive=["y"])
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / "sub").mkdir()
    assert [table.name for table in data.read(str(tmp_path))] == ["a", "b"]


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="none.jsonl, which does not exist"):
        data.read(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"expected \.jsonl or \.parquet files .* found none"):
        data.read(str(tmp_path))
    (tmp_path / "a.txt").write_text("{}")
    with pytest.raises(ValueError, match=r"expected \.jsonl or \.parquet, got .*a\.txt"):
        data.read(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_jsonl(content, tmp_path):
    (tmp_path / "e.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"e\.jsonl: expected rows, found none"):
        data.read(str(tmp_path / "e.jsonl"))


def test_empty_and_broken_parquet(tmp_path):
    nothing = pa.array([], pa.string())
    with pytest.raises(ValueError, match=r"e\.parquet: expected rows, found none"):
        data.read(parquet(tmp_path / "e.parquet", query=nothing, positive=nothing))
    for content in (b"", b"PAR1", b'{"query": "a", "positive": "b"}\n'):
        (tmp_path / "x.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.parquet"):
            data.read(str(tmp_path / "x.parquet"))


def test_damaged_parquet(tmp_path):
    """A sound footer over damaged pages: what a broken download or disk leaves."""
    path = tmp_path / "x.parquet"
    parquet(path, query=["a"] * 500, positive=[f"b{i}" for i in range(500)])
    whole = path.read_bytes()
    path.write_bytes(whole[:20] + b"\0" * 200 + whole[220:])
    with pytest.raises(ValueError, match=r"x\.parquet"):
        data.read(str(path))


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
        data.read(str(tmp_path / "p.jsonl"))
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
        data.read(path)
    assert f"{path}:2: " in str(caught.value) and words in str(caught.value)


def test_unknown_columns_are_listed(tmp_path):
    jsonl(tmp_path / "u.jsonl", [{"anchor": "a", "positive": "b"}])
    parquet(tmp_path / "u.parquet", anchor=["a"], positive=["b"])
    for path in (tmp_path / "u.jsonl", tmp_path / "u.parquet"):
        with pytest.raises(ValueError) as caught:
            data.read(str(path))
        assert f"{path}:1: expected columns query, positive" in str(caught.value)
        assert "got anchor, positive" in str(caught.value)


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
        data.read(path)
    row = 1 if words == "score" else 2  # a text as a score is wrong from the first row on
    assert f"{path}:{row}: " in str(caught.value) and words in str(caught.value)


# ---- keeping evaluation out ----


def test_without_drops_whole_pairs(tmp_path):
    rows = [
        {"query": "Sea", "positive": "Meer"},
        {"query": "clean", "positive": "sauber", "negatives": ["dirty", " MEER "]},
        {"query": "a", "positive": "b", "negatives": ["c"]},
        {"query": "ﬁ", "positive": "x"},
    ]
    (table,) = data.read(jsonl(tmp_path / "p.jsonl", rows))
    clean, dropped = data.without(table, {data.normalise("meer"), data.normalise("FI")})
    assert items(clean) == [["a", "b", "c"]] and dropped == 8
    assert clean.ids.tolist() == [text_id("a"), text_id("a"), text_id("c")]
    assert (clean.name, clean.nway) == ("p", False)


def test_without_drops_texts_of_nway_items(tmp_path):
    texts = {"1": ["a", "b", "c"], "2": ["d", "a"], "3": ["e", "f"]}
    rows = [{"id": k, "lang": t, "text": t} for k, ts in texts.items() for t in ts]
    (table,) = data.read(jsonl(tmp_path / "n.jsonl", rows))
    clean, dropped = data.without(table, {"a"})
    assert items(clean) == [["b", "c"], ["e", "f"]] and dropped == 3
    assert clean.ids.tolist() == [text_id("n", "1")] * 2 + [text_id("n", "3")] * 2


def test_without_may_leave_nothing_or_everything(tmp_path):
    (table,) = data.read(jsonl(tmp_path / "p.jsonl", PAIRS[:2]))
    gone, dropped = data.without(table, {"eins", "two"})
    assert gone is None and dropped == len(table.texts)
    same, dropped = data.without(table, {"other"})
    assert dropped == 0 and same.texts == table.texts
    assert same.ids.tolist() == table.ids.tolist()


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data beside the repository")
def test_every_shared_file_reads():
    tables = data.read(str(SHARED))
    assert len(tables) == len([*SHARED.glob("*.parquet"), *SHARED.glob("*.jsonl")])
    for table in tables:
        assert len(table) > 0 and len(table.texts) >= 2 * len(table), table.name
        assert table.starts[-1] == len(table.texts) and (np.diff(table.starts) >= 2).all()

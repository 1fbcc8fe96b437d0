"""Formats of files, their mistakes by line, parallel files, data sets, texts to encode."""

import io
import json
import os
import re
import sys
import threading
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlembed.data import sources
from mlembed.data.formats import beir, readers
from mlembed.data.formats.text_reader import TextReader, windows
from tests.data.samples import items, jsonl, mistake, parquet, read, reports, source, table_of


def test_is_text():
    assert readers.is_text("a") and readers.is_text(" \U0001f44b ")
    for odd in ("", " \t\n\u3000", "\ud83d", "a\udc00", None, 3, b"a", ["a"], np.str_("")):
        assert not readers.is_text(odd)


# ---- csv, tsv ----


def test_csv(tmp_path):
    """RFC 4180: quotes, line ends in cells, CRLF; a byte order mark, blank lines, separators."""
    content = '\ufeffquery,positive,x\r\n"a\r\nb","c ""d"", e",\r\n\r\nf\u2028g,h\x0ci,3'
    (tmp_path / "p.csv").write_bytes(content.encode())
    assert read(tmp_path / "p.csv")[0] == [["a\r\nb", 'c "d", e'], ["f\u2028g", "h\x0ci"]]
    (tmp_path / "p.tsv").write_text('query\tpositive\na,b\t"c\td"\n')
    assert read(tmp_path / "p.tsv")[0] == [["a,b", "c\td"]]
    long = "x" * 300_000  # more than the csv module takes by default
    (tmp_path / "p.csv").write_text(f"query,positive\na,{long}\n")
    assert read(tmp_path / "p.csv")[0] == [["a", long]]
    (tmp_path / "n.csv").write_text("id,lang,text\n1,en,a\n2,en,b\n1,de,c\n")
    ((table, report),) = reports(tmp_path / "n.csv")
    assert table.nway and items(table) == [["a", "c"]] and report.alone == 1


@pytest.mark.parametrize(
    "line, words",
    [
        (b"a", "expected 2 cells (query, positive), got 1"),
        (b"a,b,c", "expected 2 cells (query, positive), got 3"),
        (b"a,", "positive: expected text, got None"),
        (b"a, ", "positive: expected text, got ' '"),
        (b'"a"b,c', "not csv: "),
        (b"a,\xff\xfe", "positive: expected UTF-8, got "),
        (b"a,\xed\xa0\xbd", "positive: expected UTF-8, got "),  # half a surrogate pair as bytes
    ],
)
def test_malformed_csv_rows(line, words, tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(b'query,positive\n"q\n1",p\n' + line + b"\nq2,p\n")
    assert mistake(path).startswith(f"{path}:4: {words}")
    found, report = read(path, "skip")
    assert found == [["q\n1", "p"], ["q2", "p"]] and (report.bad, report.rows) == (1, 3)


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
@pytest.mark.parametrize("header", ["query,query,positive", "query,,positive", " ,b"])
def test_malformed_headers(header, bad_rows, tmp_path):
    (tmp_path / "p.csv").write_text(header + "\na,b,c\n")
    assert "p.csv:1: header: expected distinct names" in mistake(tmp_path / "p.csv", bad_rows)


def test_open_quote_takes_the_rest(tmp_path):
    (tmp_path / "p.csv").write_text('query,positive\na,b\n"c,d\ne,f\n')
    assert "p.csv:3: not csv: " in mistake(tmp_path / "p.csv")
    found, report = read(tmp_path / "p.csv", "skip")
    assert found == [["a", "b"]] and report.bad == 1


@pytest.mark.parametrize(
    "name, content",
    [("p.csv", ""), ("p.csv", "query,positive\n"), ("p.csv", "\n\n"), ("p.tsv", ""),
     ("p.jsonl", ""), ("p.jsonl", "\n \n")],
)  # fmt: skip
@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_empty_files(name, content, bad_rows, tmp_path):
    (tmp_path / name).write_text(content)
    assert f"{name}: expected rows, found none" in mistake(tmp_path / name, bad_rows)


# ---- json, parquet ----


def test_byte_order_mark_of_json(tmp_path):
    (tmp_path / "p.json").write_bytes(b'\xef\xbb\xbf{"query": "a", "positive": "b"}\n')
    assert read(tmp_path / "p.json")[0] == [["a", "b"]]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), "str")])
def test_parquet_by_row_groups(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MANY", 7)
    texts = {name: pa.array([f"{name}{i}" for i in range(50)]).cast(kind) for name in "qp"}
    table = pa.table({"query": texts["q"], "positive": texts["p"], "other": [b"\xff"] * 50})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=11)
    assert read(tmp_path / "p.parquet")[0] == [[f"q{i}", f"p{i}"] for i in range(50)]


@pytest.mark.parametrize("nested", [False, True])
def test_invalid_utf8_in_parquet(nested, tmp_path):
    """Arrow takes any bytes as text when a caller asks for it."""
    odd = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    columns = {"query": odd, "positive": ["x", "y", "z"]}
    if nested:
        negatives = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), odd)
        columns = {"query": ["a", "b", "c"], "positive": ["x", "y", "z"], "negatives": negatives}
    path = parquet(tmp_path / "p.parquet", **columns)
    assert "p.parquet:2: expected UTF-8, got byte 0xff at 0" in mistake(path)
    found, report = read(path, "skip")
    assert [item[:2] for item in found] == [["a", "x"], ["c", "z"]] and report.bad == 1


# ---- parallel files ----


def parallel(path, **texts):
    for code, content in texts.items():
        (path / f"talk.{code}").write_bytes(content)
    return path / "talk"


def test_two_parallel_files_are_pairs(tmp_path):
    """Any languages, also Indonesian, whose code `id` is the name of a column."""
    english = "\ufeffsea\none\u2028 \n".encode()
    name = parallel(tmp_path, id=b"laut\r\nsatu\n", en=english)
    ((table, report),) = reports(name)
    assert items(table) == [["sea", "laut"], ["one\u2028 ", "satu"]]
    assert (table.name, table.nway, table.task, report.rows) == ("talk", False, "bitext", 2)
    assert table_of(name, task="retrieval").task == "retrieval"


def test_more_parallel_files_are_an_nway_table(tmp_path):
    name = parallel(tmp_path, en=b"sea\none", de=b"Meer\neins\n", sr_Latn=b"more\njedan\n")
    for suffix in ("csv", "jsonl"):  # other files next to them
        (tmp_path / f"talk.{suffix}").write_text("{}")
    (tmp_path / "talk.longer").write_text("x")
    ((table, report),) = reports(name)
    assert table.nway and table.task == "bitext" and report.rows == 6
    assert items(table) == [["Meer", "sea", "more"], ["eins", "one", "jedan"]]


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_parallel_files_of_unequal_length(bad_rows, tmp_path):
    name = parallel(tmp_path, en=b"sea\none\n", de=b"Meer\neins\nzwei\n")
    words = "talk: expected as many lines in each file, got 3 in talk.de, 2 in talk.en"
    assert words in mistake(name, bad_rows)
    parallel(tmp_path, fr=b"mer\n")
    assert "3 in talk.de, 2 in talk.en, 1 in talk.fr" in mistake(name, bad_rows)


@pytest.mark.parametrize(
    "line, words", [(b"", "expected text, got ''"), (b"\xff", "expected UTF-8, got byte 0xff at 0")]
)
def test_bad_lines_of_parallel_files(line, words, tmp_path):
    name = parallel(tmp_path, en=b"sea\none\ntwo\n", de=b"Meer\n" + line + b"\nzwei\n")
    assert mistake(name) == f"{name}:2: de: {words}"
    found, report = read(name, "skip")
    assert found == [["Meer", "sea"], ["zwei", "two"]] and report.bad == 1
    parallel(tmp_path, fr=b"mer\nun\ndeux\n")
    assert "talk.de:2: text: " in mistake(name)
    found, report = read(name, "skip")  # Only the bad text is left out.
    assert found == [["Meer", "sea", "mer"], ["zwei", "two", "deux"], ["one", "un"]]


def test_one_file_is_not_parallel(tmp_path):
    assert "talk, which does not exist" in mistake(parallel(tmp_path, en=b"sea\n"))


# ---- data sets ----

ROWS = {"anchor": [f"a{i}" for i in range(30)], "positive": [f"p{i}" for i in range(30)]}
WANT = [list(pair) for pair in zip(*ROWS.values(), strict=True)]


@pytest.mark.parametrize("big", [False, True])
def test_saved_data_set(big, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MANY", 7)
    monkeypatch.setenv("MLEMBED_CACHE", str(tmp_path / "cache"))
    if big:
        monkeypatch.setattr(sources, "BIG", 0)
    datasets.Dataset.from_dict(ROWS | {"id": list(range(30))}).save_to_disk(tmp_path / "one")
    found, report = read(tmp_path / "one")
    assert found == WANT and report.name == "one"
    whole = datasets.Dataset.from_dict(ROWS)
    two = {"train": whole, "dev": whole.select(range(3, 9))}
    datasets.DatasetDict(two).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two")[0] == WANT
    assert read(tmp_path / "two", split="dev")[0] == WANT[3:9]
    words = "two: split: expected one of train, dev, got test"
    assert words in mistake(tmp_path / "two", split="test")


def test_bad_rows_and_stream_of_a_saved_data_set(tmp_path):
    texts = ROWS["anchor"][:3] + [None, *ROWS["anchor"][4:]]
    datasets.Dataset.from_dict(ROWS | {"anchor": texts}).save_to_disk(tmp_path / "one")
    assert "one:4: anchor: expected text, got None" in mistake(tmp_path / "one")
    found, report = read(tmp_path / "one", "skip")
    assert len(found) == 29 and report.bad == 1
    stream = list(sources.items(source(tmp_path / "one", streaming=True), bad_rows="skip"))
    assert [[item.query, item.positive] for item in stream] == found
    assert stream[4].where == f"{tmp_path}/one:6"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A directory laid out as a data set of the hub, with two subsets."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    home = tmp_path / "laid_out"
    home.mkdir()
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(20)]
    jsonl(home / "a.jsonl", rows[:12])
    jsonl(home / "b.jsonl", rows[12:])
    (home / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files:\n  - split: train\n    path: a.jsonl\n"
        "- config_name: second\n  data_files:\n  - split: dev\n    path: b.jsonl\n---\n"
    )
    return home


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("subset, split", [("first", "train"), ("second", "dev")])
def test_load_dataset(streaming, subset, split, repository):
    some = source(repository, subset=subset, split=split, streaming=streaming)
    if streaming:
        found = [[item.query, item.positive] for item in sources.items(some)]
    else:
        ((table, _),) = sources.read(some)
        found = items(table)
        assert table.name == f"laid_out-{subset}"
    rows = range(12) if subset == "first" else range(12, 20)
    assert found == [[f"q{i}", f"a{i}"] for i in rows]


@pytest.mark.parametrize("fields", [{"subset": "third"}, {"subset": "first", "split": "dev"}])
def test_load_dataset_errors(fields, repository):
    words = r"data: expected .* got .*laid_out \(subset .*"  # on one line
    assert re.fullmatch(words, mistake(repository, **fields))


@pytest.mark.skipif(not os.environ.get("HF_HUB_OFFLINE"), reason="asks the hub")
@pytest.mark.parametrize("path", ["nobody/nothing", "nothing-of-that-name"])
def test_unknown_hub_ids(path):
    assert re.fullmatch(rf"data: .* that can be loaded, got {path} \(.*", mistake(path))


@pytest.mark.parametrize("path", ["a/b/c", "none.csv", "/no/where", "a b"])
def test_paths_that_cannot_be_hub_ids(path):
    assert f"hub id, got {path}, which does not exist" in mistake(path)


# ---- texts to encode ----


def written(path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"one\n\nthree", ["one", "", "three"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"a\rb\n\r\n", ["a\rb", ""]),  # a carriage return alone does not end a line
        (b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n", ["one", "\ufefftwo"]),  # a mark at the start only
        ("a\u2028b\x85c\x0bd\x0ce\x1df\n".encode(), ["a\u2028b\x85c\x0bd\x0ce\x1df"]),
        (b"\x00\x01\n \t \n", ["\x00\x01", " \t "]),
        ("👩‍👩‍👧\n\ufffd\n".encode(), ["👩‍👩‍👧", "\ufffd"]),
    ],
    ids=range(9),
)
def test_lines(tmp_path, monkeypatch, content, texts):
    reader = TextReader(written(tmp_path / "a.txt", content), invalid="replace")
    assert list(reader) == texts and reader.replaced == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "ascii"))
    assert list(TextReader()) == texts


# Bytes, the first invalid one and its place in the line, the text with U+FFFD, their number.
@pytest.mark.parametrize(
    ("bad", "where", "text", "count"),
    [
        (b"\xff", "0xff at 0", "\ufffd", 1),
        (b"ab\xc3", "0xc3 at 2", "ab\ufffd", 1),
        (b"\xe2\x80 x \xe2\x80", "0xe2 at 0", "\ufffd x \ufffd", 2),
        ("\ufffd".encode() + b"\x80", "0x80 at 3", "\ufffd\ufffd", 1),  # one was there before
        (b"\xed\xa0\xbd", "0xed at 0", "\ufffd\ufffd\ufffd", 3),  # half a surrogate pair
    ],
)
def test_invalid_utf8(tmp_path, bad, where, text, count):
    path = written(tmp_path / "a.txt", b"fine\n" + bad + b"\nfine too\n")
    texts = iter(TextReader(path))
    assert next(texts) == "fine"
    with pytest.raises(ValueError, match=rf"a\.txt:2: expected UTF-8, got byte {where}; --invalid"):
        next(texts)
    reader = TextReader(path, invalid="replace")
    assert list(reader) == ["fine", text, "fine too"] and reader.replaced == count


def test_json_column(tmp_path):
    rows = [{"text": "a", "title": "A"}, {"text": "", "title": "\u2028"}]
    content = "\n\n".join(json.dumps(row) for row in rows).encode()
    path = written(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + content)
    assert list(TextReader(path)) == ["A a", ""]  # like BEIR's documents
    assert list(TextReader(path, "text")) == ["a", ""]
    assert list(TextReader(path, "title")) == ["A", "\u2028"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1]", "expected an object or a list of texts, got list"),
        (b'{"text": null}', "text: expected a string, got none"),
        (b'{"text": 3}', "text: expected a string, got int"),
        (b'{"text": "\\ud83d"}', "text: expected Unicode, got a lone surrogate in '"),
        (b'{"text": "\xff"}', "expected UTF-8, got byte 0xff at 10"),
    ],
)
def test_malformed_json_column(tmp_path, line, message):
    path = written(tmp_path / "a.jsonl", b'{"text": "fine"}\n\n' + line)
    with pytest.raises(ValueError) as caught:
        list(TextReader(path))
    assert f"a.jsonl:3: {message}" in str(caught.value)


def test_replaced_surrogates_of_json(tmp_path):
    path = written(tmp_path / "a.jsonl", b'{"text": "a\\ud83d\\ude00b\\ude00"}\n{"text": "\xff"}')
    reader = TextReader(path, invalid="replace")
    assert list(reader) == ["a😀b\ufffd", "\ufffd"] and reader.replaced == 2


def test_parquet_column(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MANY", 3)
    path = tmp_path / "a.parquet"
    texts = [f"text {i}\n" for i in range(10)]
    table = pa.table({"text": texts, "n": list(range(10)), "null": ["a", None] * 5})
    pq.write_table(table, path, row_group_size=4)
    reader = TextReader(str(path))
    reader.check()
    assert list(reader) == texts
    for column, message in (("n", "1: n: expected a string, got int"),
                            ("null", "2: null: expected a string, got none")):  # fmt: skip
        with pytest.raises(ValueError, match=f"a.parquet:{message}"):
            list(TextReader(str(path), column))
    with pytest.raises(ValueError, match="expected a column 'txt', got text, n, null"):
        TextReader(str(path), "txt").check()
    bad = written(tmp_path / "bad.parquet", b"PAR1, or not")
    with pytest.raises(ValueError, match="bad.parquet: not parquet: "):
        TextReader(bad).check()


def test_replaced_bytes_of_parquet(tmp_path):
    odd = pa.array([b"fine", b"a\xff"]).view(pa.string())
    path = parquet(tmp_path / "a.parquet", text=odd)
    with pytest.raises(ValueError, match="a.parquet:2: expected UTF-8, got byte 0xff at 1"):
        list(TextReader(path))
    reader = TextReader(path, invalid="replace")
    assert list(reader) == ["fine", "a\ufffd"] and reader.replaced == 1


def test_memory_of_parquet(tmp_path):
    texts = [f"{i:06d}" * 50 for i in range(60_000)]
    path = tmp_path / "a.PARQUET"  # the suffix in capitals is the same kind
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False, compression="none")
    size, before = path.stat().st_size, pa.total_allocated_bytes()
    for i, text in enumerate(TextReader(str(path))):
        assert text == texts[i]
        if i % 5000 == 0:
            assert pa.total_allocated_bytes() - before < size / 2
    assert i == 59_999


def test_input_files(tmp_path):
    """A named pipe is a file, a directory is not."""
    os.mkfifo(tmp_path / "a")
    reader = TextReader(str(tmp_path / "a"))
    reader.check()
    threading.Thread(target=(tmp_path / "a").write_bytes, args=(b"one\ntwo\n",)).start()
    assert list(reader) == ["one", "two"]
    with pytest.raises(ValueError, match="input: expected a file, got .*, a directory"):
        TextReader(str(tmp_path)).check()
    with pytest.raises(ValueError, match="input: expected a file, got .*nowhere.txt, which does"):
        TextReader(str(tmp_path / "nowhere.txt")).check()


def test_titles_are_those_of_the_evaluation(tmp_path):
    """BEIR's documents are the same texts for `encode` and for `evaluate`, in every format."""
    rows = [
        {"_id": "1", "title": "The sea", "text": "is wet."},
        {"_id": "2", "title": "", "text": " sun \n"},
        {"_id": "3", "title": "only a title", "text": ""},
    ]
    path = jsonl(tmp_path / "corpus.jsonl", rows)
    want = [beir.titled(title, text) for _, title, text in beir.documents(Path(path))]
    assert list(TextReader(path)) == want
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus.parquet")
    reader = TextReader(str(tmp_path / "corpus.parquet"))
    assert reader.check() == "text=title+text; unused: _id" and list(reader) == want
    (tmp_path / "c.csv").write_text("_id,title,text\n1,The sea,is wet.\n")
    assert list(TextReader(str(tmp_path / "c.csv"))) == want[:1]
    assert TextReader(path, "text").check() == "text=text; unused: _id, title"


def test_windows():
    texts = ["a" * n for n in (3, 3, 3, 9, 1)]
    assert [len(some) for some in windows(texts, 2, 100)] == [2, 2, 1]
    assert [len(some) for some in windows(texts, 9, 7)] == [3, 1, 1]
    with pytest.raises(ValueError, match="text 2: expected a string, got int"):
        list(windows(["a", "b", 3], 2, 9))

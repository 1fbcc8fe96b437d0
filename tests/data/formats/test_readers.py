"""Formats of files, what is wrong with them by line, parallel files and data sets, whole or as
streams."""

import itertools
import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlembed import config
from mlembed.data import sources
from mlembed.data.formats import layouts, readers


def source(path, **fields):
    return config.Source(path=str(path), **fields)


def read(path, bad_rows="error", **fields):
    ((table, report),) = sources.read(source(path, **fields), bad_rows=bad_rows)
    return items(table), report


def items(table):
    bounds = itertools.pairwise(table.starts.tolist())
    return [table.texts[begin:end] for begin, end in bounds]


# ---- csv, tsv ----


def test_csv_as_rfc_4180_has_it(tmp_path):
    """Quotes, line ends in cells, CRLF, a byte order mark, blank lines, other separators."""
    content = '\ufeffquery,positive,x\r\n"a\r\nb","c ""d"", e",\r\n\r\nf\u2028g,h\x0ci,3'
    (tmp_path / "p.csv").write_bytes(content.encode())
    assert read(tmp_path / "p.csv")[0] == [["a\r\nb", 'c "d", e'], ["f\u2028g", "h\x0ci"]]
    (tmp_path / "p.tsv").write_text('query\tpositive\na,b\t"c\td"\n')
    assert read(tmp_path / "p.tsv")[0] == [["a,b", "c\td"]]


def test_csv_holds_long_documents(tmp_path):
    long = "x" * 300_000
    (tmp_path / "p.csv").write_text(f"query,positive\na,{long}\n")
    assert read(tmp_path / "p.csv")[0] == [["a", long]]


def test_csv_nway(tmp_path):
    (tmp_path / "n.csv").write_text("id,lang,text\n1,en,a\n2,en,b\n1,de,c\n")
    ((table, report),) = sources.read(source(tmp_path / "n.csv"))
    assert table.nway and items(table) == [["a", "c"]] and report.alone == 1


@pytest.mark.parametrize(
    "line, words",
    [
        (b"a", "expected 2 cells (query, positive), got 1"),
        (b"a,b,c", "expected 2 cells (query, positive), got 3"),
        (b"a,", "positive: expected text, got None"),
        (b"a, ", "positive: expected text, got ' '"),
        (b'"a"b,c', "not csv: "),
        (b"a,\xff\xfe", "positive: not UTF-8"),
        (b"a,\xed\xa0\xbd", "positive: not UTF-8"),  # half a surrogate pair as bytes
    ],
)
def test_malformed_csv_rows_are_named_by_line(line, words, tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(b'query,positive\n"q\n1",p\n' + line + b"\nq2,p\n")
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:4: {words}")
    found, report = read(path, "skip")
    assert found == [["q\n1", "p"], ["q2", "p"]] and (report.bad, report.rows) == (1, 3)
    assert report.bad_rows[0].startswith(f"{path}:4: {words}")


@pytest.mark.parametrize("header", ["query,query,positive", "query,,positive", " ,b"])
def test_malformed_headers(header, tmp_path):
    (tmp_path / "p.csv").write_text(header + "\na,b,c\n")
    for bad_rows in ("error", "skip"):
        with pytest.raises(ValueError, match=r"p\.csv:1: header: expected distinct names"):
            read(tmp_path / "p.csv", bad_rows)


def test_an_open_quote_takes_the_rest(tmp_path):
    (tmp_path / "p.csv").write_text('query,positive\na,b\n"c,d\ne,f\n')
    with pytest.raises(ValueError, match=r"p\.csv:3: not csv: "):
        read(tmp_path / "p.csv")
    found, report = read(tmp_path / "p.csv", "skip")
    assert found == [["a", "b"]] and report.bad == 1


@pytest.mark.parametrize("content", ["", "query,positive\n", "\n\n"])
@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_empty_csv(content, bad_rows, tmp_path):
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(ValueError, match=r"p\.csv"):
        read(tmp_path / "p.csv", bad_rows)


# ---- json, parquet ----


def test_json_has_an_object_a_line(tmp_path):
    (tmp_path / "p.json").write_bytes(b'\xef\xbb\xbf{"query": "a", "positive": "b"}\n')
    assert read(tmp_path / "p.json")[0] == [["a", "b"]]
    (tmp_path / "q.json").write_text('[{"query": "a", "positive": "b"}]')
    with pytest.raises(ValueError, match=r"q\.json:1: expected an object, got list"):
        read(tmp_path / "q.json")


@pytest.mark.parametrize("line", [b"{", b'"\xff"', b"[]", b"[" * 100_000])
def test_bad_lines_of_jsonl_are_skipped(line, tmp_path):
    good = [b'{"query": "a", "positive": "b"}', b'{"query": "c", "positive": "d"}']
    (tmp_path / "p.jsonl").write_bytes(b"\n".join([good[0], line, good[1]]))
    found, report = read(tmp_path / "p.jsonl", "skip")
    assert found == [["a", "b"], ["c", "d"]] and report.bad == 1
    assert report.bad_rows[0].startswith(f"{tmp_path}/p.jsonl:2: ")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), "str")])
def test_parquet_by_row_groups(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MANY", 7)
    texts = {name: pa.array([f"{name}{i}" for i in range(50)]).cast(kind) for name in "qp"}
    table = pa.table({"query": texts["q"], "positive": texts["p"], "other": [b"\xff"] * 50})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=11)
    want = [[f"q{i}", f"p{i}"] for i in range(50)]
    assert read(tmp_path / "p.parquet")[0] == want


def test_parquet_that_is_not_utf8(tmp_path, monkeypatch):
    """Arrow takes any bytes as text when it is told to."""
    odd = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    table = pa.table({"query": odd, "positive": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"p\.parquet:2: not UTF-8"):
        read(tmp_path / "p.parquet")
    found, report = read(tmp_path / "p.parquet", "skip")
    assert found == [["a", "x"], ["c", "z"]] and report.bad == 1


# ---- parallel files ----


def parallel(path, **texts):
    for code, content in texts.items():
        (path / f"talk.{code}").write_bytes(content)
    return path / "talk"


def test_two_parallel_files_are_pairs(tmp_path):
    """Of any languages, Indonesian too, whose code is the name of a column."""
    name = parallel(tmp_path, id=b"laut\r\nsatu\n", en="sea\none\u2028 \n".encode())
    ((table, report),) = sources.read(source(name))
    assert items(table) == [["sea", "laut"], ["one\u2028 ", "satu"]]
    assert (table.name, table.nway, table.task, report.rows) == ("talk", False, "bitext", 2)
    assert sources.read(source(name, task="retrieval"))[0][0].task == "retrieval"


def test_more_parallel_files_are_an_nway_table(tmp_path):
    name = parallel(tmp_path, en=b"sea\none", de=b"Meer\neins\n", sr_Latn=b"more\njedan\n")
    for suffix in ("csv", "jsonl"):  # beside them, and none of them
        (tmp_path / f"talk.{suffix}").write_text("{}")
    (tmp_path / "talk.longer").write_text("x")
    ((table, report),) = sources.read(source(name))
    assert table.nway and table.task == "bitext" and report.rows == 6
    assert items(table) == [["Meer", "sea", "more"], ["eins", "one", "jedan"]]


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_parallel_files_of_unequal_length(bad_rows, tmp_path):
    name = parallel(tmp_path, en=b"sea\none\n", de=b"Meer\neins\nzwei\n")
    words = r"talk: expected as many lines in each file, got 3 in talk\.de, 2 in talk\.en"
    with pytest.raises(ValueError, match=words):
        read(name, bad_rows)
    parallel(tmp_path, fr=b"mer\n")
    with pytest.raises(ValueError, match=r"3 in talk\.de, 2 in talk\.en, 1 in talk\.fr"):
        read(name, bad_rows)


@pytest.mark.parametrize(
    "line, words", [(b"", "de: expected text, got ''"), (b"\xff", "de: not UTF-8")]
)
def test_bad_lines_of_parallel_files(line, words, tmp_path):
    name = parallel(tmp_path, en=b"sea\none\ntwo\n", de=b"Meer\n" + line + b"\nzwei\n")
    with pytest.raises(ValueError) as caught:
        read(name)
    assert str(caught.value) == f"{name}:2: {words}"
    found, report = read(name, "skip")
    assert found == [["Meer", "sea"], ["zwei", "two"]] and report.bad == 1
    parallel(tmp_path, fr=b"mer\nun\ndeux\n")
    with pytest.raises(ValueError, match=r"talk\.de:2: text: "):
        read(name)
    found, report = read(name, "skip")  # here only the text goes
    assert found == [["Meer", "sea", "mer"], ["zwei", "two", "deux"], ["one", "un"]]


def test_one_file_is_not_parallel(tmp_path):
    name = parallel(tmp_path, en=b"sea\n")
    with pytest.raises(ValueError, match=r"talk, which does not exist"):
        read(name)


# ---- data sets ----

ROWS = {"anchor": [f"a{i}" for i in range(30)], "positive": [f"p{i}" for i in range(30)]}
WANT = [list(pair) for pair in zip(*ROWS.values(), strict=True)]


@pytest.mark.parametrize("big", [False, True])
def test_a_saved_data_set(big, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MANY", 7)
    monkeypatch.setenv("MLEMBED_CACHE", str(tmp_path / "cache"))
    if big:
        monkeypatch.setattr(sources, "BIG", 0)
    datasets.Dataset.from_dict(ROWS | {"id": list(range(30))}).save_to_disk(tmp_path / "one")
    found, report = read(tmp_path / "one")
    assert found == WANT and report.name == "one"
    two = {"train": datasets.Dataset.from_dict(ROWS), "dev": datasets.Dataset.from_dict(ROWS)}
    two["dev"] = two["dev"].select(range(3, 9))
    datasets.DatasetDict(two).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two")[0] == WANT
    assert read(tmp_path / "two", split="dev")[0] == WANT[3:9]
    with pytest.raises(ValueError, match="two: split: expected one of train, dev, got test"):
        read(tmp_path / "two", split="test")


def test_a_saved_data_set_names_bad_rows(tmp_path):
    texts = ROWS["anchor"][:3] + [None, *ROWS["anchor"][4:]]
    datasets.Dataset.from_dict(ROWS | {"anchor": texts}).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=r"one:4: anchor: expected text, got None"):
        read(tmp_path / "one")
    found, report = read(tmp_path / "one", "skip")
    assert len(found) == 29 and report.bad == 1


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A directory laid out as a data set of the hub, with two subsets."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    home = tmp_path / "laid_out"
    home.mkdir()
    lines = [json.dumps({"question": f"q{i}", "answer": f"a{i}"}) + "\n" for i in range(20)]
    (home / "a.jsonl").write_text("".join(lines[:12]))
    (home / "b.jsonl").write_text("".join(lines[12:]))
    (home / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files:\n  - split: train\n    path: a.jsonl\n"
        "- config_name: second\n  data_files:\n  - split: dev\n    path: b.jsonl\n---\n"
    )
    return home


@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset(streaming, repository):
    want = [[f"q{i}", f"a{i}"] for i in range(20)]
    one = source(repository, subset="first", streaming=streaming)
    two = source(repository, subset="second", split="dev", streaming=streaming)
    for some, right, name in ((one, want[:12], "first"), (two, want[12:], "second")):
        if streaming:
            assert [[item.query, item.positive] for item in sources.items(some)] == right
        else:
            ((table, report),) = sources.read(some)
            assert items(table) == right and table.name == f"laid_out-{name}"


@pytest.mark.parametrize("fields", [{"subset": "third"}, {"subset": "first", "split": "dev"}])
def test_load_dataset_says_what_is_wrong_in_a_line(fields, repository):
    with pytest.raises(ValueError, match=r"^data: expected .* got .*laid_out \(subset ") as caught:
        read(repository, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not os.environ.get("HF_HUB_OFFLINE"), reason="asks the hub")
@pytest.mark.parametrize("path", ["nobody/nothing", "nothing-of-that-name"])
def test_a_hub_id_that_is_not_there(path):
    with pytest.raises(ValueError, match=rf"^data: .* that can be loaded, got {path} \(") as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["a/b/c", "none.csv", "/no/where", "a b"])
def test_paths_that_cannot_be_hub_ids(path):
    with pytest.raises(ValueError, match=f"hub id, got {path}, which does not exist"):
        read(path)


# ---- streams ----


def stream(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return source(path, streaming=True)


def test_a_stream_comes_row_by_row(tmp_path, monkeypatch):
    """The second row is not looked at before it is asked for, so its mistake comes then."""
    some = stream(tmp_path / "p.jsonl", [{"query": "a", "pos": ["b", "c"], "neg": ["d"]}, {}])
    found = sources.items(some)
    assert next(found) == layouts.Item("a", "b", ["d"], None, f"{tmp_path}/p.jsonl:1")
    assert next(found).positive == "c"
    with pytest.raises(ValueError, match=r"p\.jsonl:2: query: expected text"):
        next(found)


def test_a_stream_leaves_out_what_a_table_does(tmp_path):
    lines = [{"query": f"q{i}", "positive": f"p{i}", "score": i / 10} for i in range(11)]
    some = stream(tmp_path / "p.jsonl", [*lines, {"query": ""}])
    report = layouts.Report("p")
    found = sources.items(some, bad_rows="skip", held_out={"p9"}, report=report)
    assert [item.query for item in found] == ["q8", "q10"]
    assert (report.rows, report.items, report.bad) == (12, 2, 1)
    assert (report.held_out, report.by_score) == (2, 8)
    ((table, whole),) = sources.read(some, bad_rows="skip", held_out={"p9"})
    assert items(table) == [["q8", "p8"], ["q10", "p10"]]
    assert (whole.held_out, whole.by_score, whole.bad) == (2, 8, 1)


def test_a_stream_of_sts_keeps_its_scores(tmp_path):
    lines = [{"sentence1": f"{i}", "sentence2": "b", "score": i / 4} for i in range(6)]
    some = config.Source(path=stream(tmp_path / "p.jsonl", lines).path, task="sts", streaming=True)
    found = sources.items(some)
    assert [next(found).score for _ in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    with pytest.raises(ValueError, match=r":6: score: expected a number 0\.\.1, got 1\.25"):
        next(found)


def test_streams_of_directories_and_data_sets(tmp_path):
    (tmp_path / "d").mkdir()
    for name in "ba":
        stream(tmp_path / "d" / f"{name}.jsonl", [{"query": name, "positive": "x"}])
    assert [item.query for item in sources.items(source(tmp_path / "d"))] == ["a", "b"]
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "one")
    found = list(sources.items(source(tmp_path / "one", streaming=True)))
    assert [[item.query, item.positive] for item in found] == WANT
    assert found[4].where == f"{tmp_path}/one:5"


def test_what_cannot_be_a_stream(tmp_path):
    some = stream(tmp_path / "n.jsonl", [{"id": "1", "lang": "en", "text": "a"}])
    with pytest.raises(ValueError, match=r"n\.jsonl: expected pairs for a stream, got an n-way"):
        list(sources.items(some))
    pairs = stream(tmp_path / "p.jsonl", [{"query": "a", "positive": "b"}])
    with pytest.raises(ValueError, match=r"p\.jsonl: cap: expected 0 of a stream, got 3"):
        list(sources.items(source(pairs.path, cap=3)))
    with pytest.raises(ValueError, match=r"p\.jsonl: expected pairs without .*, found none"):
        list(sources.items(pairs, held_out={"a"}))
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"e\.jsonl: expected rows, found none"):
        list(sources.items(source(tmp_path / "e.jsonl")))


def test_text_of_any_kind_of_file_is_checked():
    assert readers.is_text("a") and readers.is_text(" \U0001f44b ")
    for odd in ("", " \t\n\u3000", "\ud83d", "a\udc00", None, 3, b"a", ["a"], np.str_("")):
        assert not readers.is_text(odd)

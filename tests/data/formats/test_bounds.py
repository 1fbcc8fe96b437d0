"""Endless files, headers of megabytes and compressed bombs are refused, in bounded memory."""

import gzip
import json
import os
import time
import unicodedata

import numpy as np
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlembed.data.formats import json_array, readers
from tests.data.samples import mistake, read

MIB = 2**20
ROWS = b'{"query": "a", "positive": "b"}\n{"query": "c", "positive": "d"}\n'

# Reads a file's rows, and prints the error and the most memory that it takes, in MiB.
READ = """
import resource, sys
from pathlib import Path
from mlembed.data.formats import readers
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    for _ in readers.strict(readers.of_file(Path(sys.argv[1]))):
        pass
except ValueError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024)
"""


def without_end(path, beginning):
    """Write a file of 10 GB that takes no room."""
    with path.open("wb") as file:
        file.write(beginning)
        file.truncate(10**10)


def gz(path, beginning):
    with gzip.open(path, "wb", 1) as file:
        file.write(beginning)
        for _ in range(66):
            file.write(bytes(MIB))


def repeated(path, text, rows, **options):
    """Write parquet in which each row repeats a text, which is stored once."""
    index = pa.array(np.zeros(rows), pa.int32())
    column = pa.DictionaryArray.from_arrays(index, pa.array([text]))
    pq.write_table(pa.table({"query": column}), path, dictionary_pagesize_limit=2**30, **options)


def one_page(path, _):
    table = pa.table({"query": ["a" * 100 * MIB]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)


LONG = "expected lines of at most 64 MiB, got a longer one"
BOMB = "expected at most 100 times its size when decompressed, got more"
ENDLESS = [
    ("a.jsonl", without_end, ROWS, f":3: {LONG}"),
    ("a.jsonl", without_end, b"", f":1: {LONG}"),
    ("a.json", without_end, b"[", f":1: {LONG}"),
    ("a.json", without_end, b'[{"query": "', ":1: expected rows of at most 64 MiB"),
    ("a.csv", without_end, b"query,positive\na,b\n", f":3: {LONG}"),
    ("a.csv", without_end, b"", f":1: {LONG}"),
    ("a.tsv", without_end, b"query\tpositive\na\tb\n", f":3: {LONG}"),
    ("a.jsonl.gz", gz, ROWS, BOMB),
    ("a.parquet", lambda *args: repeated(*args, 1000), "a" * 10 * MIB, BOMB),
    ("a.parquet", lambda *args: repeated(*args, 2000, compression="zstd"), "a" * MIB, BOMB),
    ("a.parquet", one_page, "", BOMB),
]


@pytest.mark.parametrize("name, write, beginning, message", ENDLESS)
def test_memory_is_bounded(name, write, beginning, message, tmp_path):
    write(tmp_path / name, beginning)
    done = processes.run("-c", READ, tmp_path / name)
    error, memory = done.stdout.splitlines()
    assert f"{name}" in error and message in error
    assert int(memory) < 600


MANY = {f"c{i}": "x" for i in range(1001)}
WIDE = "expected at most 1000 columns, got 1001"
NAME = "expected column names of at most 200 characters, got 'qqqq"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", json.dumps(MANY), f"a.jsonl:1: {WIDE}"),
        ("a.json", json.dumps([MANY]), f"a.json:1: {WIDE}"),
        ("a.csv", ",".join(MANY), f"a.csv:1: header: {WIDE}"),
        ("a.tsv", "\t".join(MANY), f"a.tsv:1: header: {WIDE}"),
        ("a.jsonl", json.dumps({"q" * 10**6: "a"}), f"a.jsonl:1: {NAME}"),
        ("a.csv", "q" * 10**6 + ",positive", f"a.csv:1: header: {NAME}"),
        ("a.jsonl", '{"query": "a", "positive": ' + "[" * 900 + "]" * 900 + "}", "got [[[[[[[...]"),
        ("a.jsonl", json.dumps({"query": {"a": "x" * 10**6}, "positive": "b"}), "got {'a': 'xxx"),
    ],
)
def test_columns_and_messages_are_bounded(name, content, message, tmp_path):
    (tmp_path / name).write_text(content + "\n")
    error = mistake(tmp_path / name)
    assert message in error and len(error) < 500 + len(str(tmp_path))


def test_columns_of_parquet_are_bounded(tmp_path):
    for columns, message in ((MANY, WIDE), ({"q" * 10**6: "a"}, NAME)):
        pq.write_table(pa.table({name: [x] for name, x in columns.items()}), tmp_path / "a.parquet")
        assert f"a.parquet: {message}" in mistake(tmp_path / "a.parquet")


def test_long_rows_are_read(tmp_path):
    """A book with its translations, far below the bound, in each format."""
    texts = ["a " * 10**6, "b" * 3 * 10**6]
    row = dict(zip(("query", "positive"), texts, strict=True))
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "a.json").write_text(json.dumps([row], indent=1))
    (tmp_path / "a.csv").write_text("query,positive\n" + ",".join(texts) + "\n")
    (tmp_path / "a.tsv").write_text("query\tpositive\n" + "\t".join(texts) + "\n")
    pq.write_table(pa.table({name: [text] for name, text in row.items()}), tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        assert read(path)[0] == [texts], path


# ---- JSON arrays ----


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    "text",
    ["[]", " [ ] ", "[\n]", "[1, 23, 456]",
     '[{"a": 1}]', '\ufeff[{"a": "é😀"},\n{"b": [1, "]"]}]\n',
     "[true ,null]", '["a", "\\u00e9", "\\""]'],
)  # fmt: skip
def test_array_is_read_in_parts(text, step, tmp_path, monkeypatch):
    monkeypatch.setattr(json_array, "CHUNK", step)
    (tmp_path / "a").write_text(text)
    with (tmp_path / "a").open("rb") as file:
        assert list(json_array.values(file, "a")) == json.loads(text.removeprefix("\ufeff"))


@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize(
    "text, message",
    [
        (b"[1, 2", "a:2: invalid JSON: expected ',' or ']' after it"),
        (b"[1 2]", "a:1: invalid JSON: expected ',' or ']' after it"),
        (b"[1, ]", "a:2: invalid JSON: Expecting value"),
        (b"[1] x", "a:2: invalid JSON: expected nothing after the array"),
        (b"[", "a:1: invalid JSON: Expecting value"),
        (b"[1, nul]", "a:2: invalid JSON: Expecting value"),
        (b'[1, "a]', "a:2: invalid JSON: Unterminated string"),
        (b'[1, "\xc3\xa9\xff"]', "a: expected UTF-8, got byte 0xff at 7"),
        (b"[" + b"[" * 100_000, "a:1: invalid JSON: maximum recursion depth"),
        (b"[" + b"1" * 5000, "a:1: invalid JSON: Exceeds the limit"),
    ],
)
def test_malformed_array(text, message, step, tmp_path, monkeypatch):
    monkeypatch.setattr(json_array, "CHUNK", step)
    (tmp_path / "a").write_bytes(text)
    with (tmp_path / "a").open("rb") as file, pytest.raises(ValueError) as caught:
        list(json_array.values(file, "a"))
    assert str(caught.value).startswith(message)


def test_large_array_takes_little_memory(tmp_path):
    row = json.dumps({"query": "a" * 1000, "positive": "b"})
    (tmp_path / "a.json").write_text(f"[{','.join([row] * 100_000)}]")
    done = processes.run("-c", READ, tmp_path / "a.json")
    assert int(done.stdout) < 50


# ---- words, pipes ----


def test_normalising_takes_time_by_length():
    marks = "a" + "\u0301\u0316" * 50_000
    start = time.process_time()
    readers.normalise(marks)
    assert time.process_time() - start < 2
    ordinary = "Ｅ\u0301\u00a0e\u0301 ﬁ \u0301\n ª " * 1000
    assert len(ordinary) > readers.LONG
    assert readers.normalise(ordinary) == unicodedata.normalize("NFKC", ordinary).casefold().strip()


def test_pipe_without_end(tmp_path):
    """The command reads 64 MiB of a line that never ends, and says so."""
    os.mkfifo(tmp_path / "a.jsonl")
    code = READ.replace("readers.of_file(", "readers.lines(")
    feed = f"yes | tr -d '\\n' > {tmp_path}/a.jsonl 2> /dev/null"
    with processes.started(["sh", "-c", feed]):
        done = processes.run("-c", code, tmp_path / "a.jsonl")
    error, memory = done.stdout.splitlines()
    assert f"a.jsonl:1: {LONG}" in error and int(memory) < 300

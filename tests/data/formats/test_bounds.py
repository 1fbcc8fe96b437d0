"""Files without an end, headers of megabytes and compressed bombs are refused, in bounded memory."""

import gzip
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlembed.data.formats import bounds, json_array, readers
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
    ("a.jsonl.gz", gz, ROWS, f":3: {LONG}"),
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

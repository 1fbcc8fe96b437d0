"""Texts of files as they are, vectors in fewer bits, and files that are whole or not there."""

import io
import json
import os
import sys
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlembed.data.formats import readers
from mlembed.data.formats.readers import Texts
from mlembed.inference import vector_files
from mlembed.inference.vector_files import Quantiser


def written(path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


# ---- texts ----


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"one\n\nthree", ["one", "", "three"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"a\rb\n\r\n", ["a\rb", ""]),  # a carriage return is no line's end by itself
        (b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n", ["one", "\ufefftwo"]),  # only at the beginning
        ("a\u2028b\x85c\x0bd\x0ce\x1df\n".encode(), ["a\u2028b\x85c\x0bd\x0ce\x1df"]),
        (b"\x00\x01\n \t \n", ["\x00\x01", " \t "]),
        ("👩‍👩‍👧\n\ufffd\n".encode(), ["👩‍👩‍👧", "\ufffd"]),
    ],
    ids=range(9),
)
def test_lines(tmp_path, monkeypatch, content, texts):
    source = Texts(written(tmp_path / "a.txt", content), invalid="replace")
    assert list(source) == texts and source.replaced == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "ascii"))
    assert list(Texts()) == texts


# Bytes, where in the line the first bad one is, what replaces them.
INVALID = [
    (b"\xff", "0xff at 0", "\ufffd", 1),
    (b"ab\xc3", "0xc3 at 2", "ab\ufffd", 1),
    (b"\xe2\x80 x \xe2\x80", "0xe2 at 0", "\ufffd x \ufffd", 2),
    ("\ufffd".encode() + b"\x80", "0x80 at 3", "\ufffd\ufffd", 1),  # that was there is not counted
    (b"\xed\xa0\xbd", "0xed at 0", "\ufffd\ufffd\ufffd", 3),  # half a pair, as some write it
]


@pytest.mark.parametrize(("bad", "where", "text", "count"), INVALID)
def test_what_is_no_utf8(tmp_path, bad, where, text, count):
    path = written(tmp_path / "a.txt", b"fine\n" + bad + b"\nfine too\n")
    found = iter(Texts(path))
    assert next(found) == "fine"
    with pytest.raises(ValueError, match=rf"a\.txt:2: expected UTF-8, got byte {where} of the"):
        next(found)
    source = Texts(path, invalid="replace")
    assert list(source) == ["fine", text, "fine too"] and source.replaced == count


def test_json_lines(tmp_path):
    rows = [{"text": "a", "title": "A"}, {"text": "", "title": "\u2028"}]
    content = "\n\n".join(json.dumps(row) for row in rows).encode()
    path = written(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + content)
    assert list(Texts(path)) == ["a", ""]
    assert list(Texts(path, "title")) == ["A", "\u2028"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1]", "expected an object, got list"),
        (b"{", "expected json, got "),
        (b'{"txt": "a"}', "text: expected a text, got none"),
        (b'{"text": null}', "text: expected a text, got none"),
        (b'{"text": 3}', "text: expected a text, got int"),
        (b'{"text": "\\ud83d"}', "text: expected Unicode, got a lone surrogate in '"),
        (b'{"text": "\xff"}', "expected UTF-8, got byte 0xff at 10 of the line"),
        (b"[" * 100_000, "expected json, got "),
    ],
    ids=range(8),
)
def test_json_lines_that_are_wrong(tmp_path, line, message):
    path = written(tmp_path / "a.jsonl", b'{"text": "fine"}\n\n' + line)
    with pytest.raises(ValueError) as caught:
        list(Texts(path))
    assert f"a.jsonl:3: {message}" in str(caught.value)


def test_half_characters_of_json_are_replaced_where_asked_for(tmp_path):
    path = written(tmp_path / "a.jsonl", b'{"text": "a\\ud83d\\ude00b\\ude00"}\n{"text": "\xff"}')
    source = Texts(path, invalid="replace")
    assert list(source) == ["a😀b\ufffd", "\ufffd"] and source.replaced == 2


def test_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MANY", 3)
    path = tmp_path / "a.parquet"
    texts = [f"text {i}\n" for i in range(10)]
    table = pa.table({"text": texts, "n": list(range(10)), "null": ["a", None] * 5})
    pq.write_table(table, path, row_group_size=4)
    source = Texts(str(path))
    source.check()
    assert list(source) == texts
    for column, message in (("n", "a.parquet:1: n: expected a text, got int"),
                            ("null", "a.parquet:2: null: expected a text, got none")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            list(Texts(str(path), column))
    with pytest.raises(ValueError, match="expected a column 'txt', got text, n, null"):
        Texts(str(path), "txt").check()
    bad = written(tmp_path / "bad.parquet", b"PAR1, or not")
    with pytest.raises(ValueError, match="bad.parquet: not parquet: "):
        Texts(bad).check()
    with pytest.raises(ValueError, match="input: expected a file, got .*nowhere.txt"):
        Texts(str(tmp_path / "nowhere.txt")).check()


def test_parquet_that_is_no_utf8(tmp_path):
    buffers = pa.array([b"fine", b"a\xff"], pa.binary()).buffers()
    texts = pa.StringArray.from_buffers(2, buffers[1], buffers[2])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet:2: expected UTF-8, got byte 0xff at 1"):
        list(Texts(path))
    source = Texts(path, invalid="replace")
    assert list(source) == ["fine", "a\ufffd"] and source.replaced == 1


def test_parquet_of_one_row_group_is_read_bit_by_bit(tmp_path):
    texts = [f"{i:06d}" * 50 for i in range(60_000)]
    path = tmp_path / "a.PARQUET"  # a name in capitals is the same kind
    table = pa.table({"text": texts})
    pq.write_table(table, path, use_dictionary=False, compression="none")
    size, before = path.stat().st_size, pa.total_allocated_bytes()
    for i, text in enumerate(Texts(str(path))):
        assert text == texts[i]
        if i % 5000 == 0:
            assert pa.total_allocated_bytes() - before < size / 2
    assert i == 59_999


def test_parquet_that_is_damaged_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"{i}" * 20 for i in range(20_000)]})
    pq.write_table(table, path, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[1000:3000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet: after row \d+: not parquet: "):
        list(Texts(str(path)))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_named_pipe_is_a_file(tmp_path):
    os.mkfifo(tmp_path / "a")
    source = Texts(str(tmp_path / "a"))
    source.check()
    threading.Thread(target=(tmp_path / "a").write_bytes, args=(b"one\ntwo\n",)).start()
    assert list(source) == ["one", "two"]
    with pytest.raises(ValueError, match="input: expected a file, got "):
        Texts(str(tmp_path)).check()


# ---- fewer bits ----


@pytest.fixture(scope="module")
def some() -> np.ndarray:
    made = np.random.default_rng(0).normal(size=(40, 19)).astype(np.float32)
    made[:, 3] = 0.25  # a dimension without a range
    return made / np.linalg.norm(made, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_steps_between_ranges(some, kind):
    quantise = Quantiser(kind)
    assert quantise.makes_ranges
    first, later = quantise(some[:20]), quantise(some[20:])
    low, high = some[:20].min(0), some[:20].max(0)
    np.testing.assert_array_equal(quantise.ranges, [low, high])
    assert not quantise.makes_ranges and first.dtype == later.dtype == np.dtype(kind)
    offset = 128 if kind == "int8" else 0
    for made, of in ((first, some[:20]), (later, some[20:])):
        steps = made.astype(float) + offset
        assert steps.min() == 0 and steps.max() == 255
        back = low + steps * (high - low) / 255
        inside = (of >= low) & (of <= high)
        assert np.abs(back - of)[inside].max() <= ((high - low) / 255).max() * 1.01
    np.testing.assert_array_equal(Quantiser(kind, quantise.ranges)(some[20:]), later)


def test_signs(some):
    packed = Quantiser("ubinary")(some)
    assert packed.dtype == np.uint8 and packed.shape == (40, 3)
    np.testing.assert_array_equal(np.unpackbits(packed, axis=1, count=19), some > 0)
    signed = Quantiser("binary")(some)
    assert signed.dtype == np.int8
    np.testing.assert_array_equal(signed.astype(int) + 128, packed)


def test_floats(some):
    assert Quantiser()(some) is some
    half = Quantiser("float16")(some)
    assert half.dtype == np.float16 and np.abs(half - some).max() < 1e-3


@pytest.mark.parametrize(
    ("kind", "dtype", "width"),
    [("float32", "f4", 19), ("float16", "f2", 19), ("int8", "i1", 19), ("uint8", "u1", 19)]
    + [("binary", "i1", 3), ("ubinary", "u1", 3)],
)
def test_of_none(some, kind, dtype, width):
    none = Quantiser(kind)(some[:0])
    assert none.shape == (0, width) and none.dtype == dtype == Quantiser(kind)(some).dtype


def test_ranges_that_are_wrong(some, tmp_path):
    with pytest.raises(ValueError, match="ranges: expected them given, or two texts or more"):
        Quantiser("int8")(some[:1])
    with pytest.raises(ValueError, match=r"ranges: expected \[2, 19\], got \[2, 5\]"):
        Quantiser("int8", np.zeros((2, 5), np.float32))(some)
    with pytest.raises(ValueError, match="ranges: expected none, as binary has none"):
        Quantiser("binary", np.zeros((2, 19), np.float32))
    with pytest.raises(ValueError, match="precision: expected one of float32, .*got 'int4'"):
        Quantiser("int4")
    for bad in (np.full((2, 19), np.nan), [[1.0] * 19, [0.0] * 19]):
        with pytest.raises(ValueError, match="ranges: expected finite ones, the least before"):
            Quantiser("int8", bad)
    np.save(tmp_path / "s.npy", np.array([["a"], ["b"]]))
    with pytest.raises(ValueError, match="ranges: expected numbers"):
        vector_files.read_ranges(tmp_path / "s.npy")
    np.save(tmp_path / "r.npy", np.zeros((3, 19)))
    with pytest.raises(ValueError, match=r"ranges: expected \[2, D\], got \(3, 19\)"):
        vector_files.read_ranges(tmp_path / "r.npy")
    np.save(tmp_path / "o.npy", np.array([[{}], [{}]]), allow_pickle=True)
    for name in ("o.npy", "nowhere.npy"):
        with pytest.raises(ValueError, match="ranges: expected an .npy file"):
            vector_files.read_ranges(tmp_path / name)


# ---- files ----


def read(path) -> np.ndarray:
    if path.suffix == ".parquet":
        column = pq.read_table(path)["embedding"].combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(-1, column.type.list_size)
    return np.load(path, mmap_mode="r")


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ""])
@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "ubinary"])
def test_files_read_back(some, tmp_path, suffix, kind):
    made, path = Quantiser(kind)(some), tmp_path / f"out{suffix}"
    with vector_files.writer(path, made.dtype, made.shape[1]) as write:
        for begin, end in ((0, 7), (7, 8), (8, 9), (9, 40)):
            write(made[begin:end])
        assert not path.exists() and len(list(tmp_path.iterdir())) == 1
    back = read(path)
    np.testing.assert_array_equal(back, made)
    assert back.dtype == made.dtype and [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == ".parquet":
        assert pq.ParquetFile(path).num_row_groups == 4


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_file_without_vectors(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    with vector_files.writer(path, np.dtype("f4"), 5):
        pass
    assert read(path).shape == (0, 5)


def test_npy_header_fits_any_count(tmp_path):
    assert len(vector_files._header(np.dtype("f4"), 10**18, 10**6)) == vector_files.HEADER
    with vector_files.writer(tmp_path / "a.npy", np.dtype("u1"), 1) as write:
        write(np.zeros((123_456, 1), np.uint8))
    assert np.load(tmp_path / "a.npy").shape == (123_456, 1)


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_failed_write_leaves_nothing(some, tmp_path, suffix):
    resource = pytest.importorskip("resource")
    path, most = tmp_path / f"out{suffix}", resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(KeyboardInterrupt), vector_files.writer(path, some.dtype, 19) as write:
        write(some)
        raise KeyboardInterrupt
    many = np.tile(some, (100, 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, most[1]))
    try:
        with (
            pytest.raises(ValueError, match="could not be written: .*File too large"),
            vector_files.writer(path, many.dtype, 19) as write,
        ):
            write(many)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert list(tmp_path.iterdir()) == []


def test_files_are_never_overwritten(some, tmp_path):
    path = tmp_path / "out.npy"
    with (
        pytest.raises(ValueError, match="out: expected a new file, got .*out.npy, which exists"),
        vector_files.writer(path, some.dtype, 19) as write,
    ):
        write(some)
        path.write_bytes(b"another's")
    assert path.read_bytes() == b"another's" and len(list(tmp_path.iterdir())) == 1
    written = vector_files.writer(path, some.dtype, 19)
    with pytest.raises(ValueError, match="which exists"), written:
        raise AssertionError("begun")


def test_save_writes_the_ranges_it_made(some, tmp_path):
    quantise, path = Quantiser("uint8"), tmp_path / "out.parquet"
    parts = (quantise(some[i : i + 20]) for i in (0, 20))
    line = vector_files.save(path, parts, quantise, 19)
    assert line.startswith(f"{path}: 40 x 19 uint8, ") and line.endswith(" texts/s")
    ranges = vector_files.read_ranges(vector_files.beside(path))
    np.testing.assert_array_equal(read(path), Quantiser("uint8", ranges)(some))
    other = Quantiser("uint8", ranges)  # given ranges are not written again
    vector_files.save(tmp_path / "b.npy", [other(some)], other, 19)
    assert len(list(tmp_path.iterdir())) == 3

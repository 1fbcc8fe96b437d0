"""Quantised vectors, and files of vectors that are complete or absent."""

import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from mlembed.inference import vector_files
from mlembed.inference.vector_files import Quantiser

# ---- quantising ----


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
def test_empty_vectors(some, kind, dtype, width):
    none = Quantiser(kind)(some[:0])
    assert none.shape == (0, width) and none.dtype == dtype == Quantiser(kind)(some).dtype


def test_wrong_ranges(some, tmp_path):
    with pytest.raises(ValueError, match="ranges: expected given ones, or two texts or more"):
        Quantiser("int8")(some[:1])
    with pytest.raises(ValueError, match=r"ranges: expected \[2, 19\], got \[2, 5\]"):
        Quantiser("int8", np.zeros((2, 5), np.float32))(some)
    with pytest.raises(ValueError, match="ranges: expected none for binary"):
        Quantiser("binary", np.zeros((2, 19), np.float32))
    with pytest.raises(ValueError, match="precision: expected one of float32, .*got 'int4'"):
        Quantiser("int4")
    for bad in (np.full((2, 19), np.nan), [[1.0] * 19, [0.0] * 19]):
        with pytest.raises(ValueError, match="ranges: expected finite numbers"):
            Quantiser("int8", bad)
    np.save(tmp_path / "s.npy", np.array([["a"], ["b"]]))
    with pytest.raises(ValueError, match="ranges: expected numbers"):
        vector_files.read_ranges(tmp_path / "s.npy")
    np.save(tmp_path / "r.npy", np.zeros((3, 19)))
    with pytest.raises(ValueError, match=r"ranges: expected \[2, D\], got \(3, 19\)"):
        vector_files.read_ranges(tmp_path / "r.npy")
    np.save(tmp_path / "o.npy", np.array([[{}], [{}]]), allow_pickle=True)
    os.mkfifo(tmp_path / "pipe.npy")
    for name in ("o.npy", "nowhere.npy", "pipe.npy"):
        with pytest.raises(ValueError, match="ranges: expected an .npy file"):
            vector_files.read_ranges(tmp_path / name)


@pytest.mark.parametrize(
    "shape", [f"(2, {10**12})", "(2, 3" + "0" * 20_000 + ")", "-" * 9000 + "1"]
)
def test_header_of_ranges_claims_too_much(shape, tmp_path):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    size = len(header).to_bytes(4, "little")
    (tmp_path / "r.npy").write_bytes(b"\x93NUMPY\x02\x00" + size + header + bytes(24))
    with pytest.raises(ValueError, match="ranges: expected an .npy file"):
        vector_files.read_ranges(tmp_path / "r.npy")


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

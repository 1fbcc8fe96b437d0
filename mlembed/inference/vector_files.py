"""Quantise vectors, and write them to .npy and .parquet files, atomically."""

import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ..config.choices import Precision
from ..runtime.files import atomic_file, atomic_files, check_regular, save_array

RANGES = "int8_ranges.npy"  # Of an exported model, for its full width.
HEADER = 128  # Bytes of an .npy header with room for any number of rows.

Write = Callable[[np.ndarray], None]


UNIT = 1e-3  # How far the length of a unit vector may be from one.


def check_unit(vectors: np.ndarray, texts: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """Return fp32 vectors [N, D]. texts: their numbers, 0 to N - 1 by default.

    Raises:
        ValueError: vectors that are not of length one, which are NaN, infinite or zero.
    """
    lengths = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~(np.abs(lengths - 1) < UNIT))
    if len(bad):
        number = bad[0] if texts is None else texts[bad[0]]
        raise ValueError(
            f"vectors: expected length one, got {len(bad)} of {len(vectors)} vectors of another "
            f"length, the first of text {number}: {lengths[bad[0]]:.3g}"
        )
    return vectors


# ---- quantising ----


@dataclass
class Quantiser:
    """Convert fp32 vectors [N, D] to `precision`, like sentence-transformers.

    float32 and float16 [N, D] round; int8 and uint8 [N, D] are one of 256 steps between ranges[0]
    and ranges[1]; binary (int8) and ubinary (uint8) [N, ceil(D / 8)] are the packed signs.

    ranges: fp32 [2, D], the least and greatest number of each dimension, for int8 and uint8; by
    default those of the first vectors, which stay for all later ones. Vectors that are compared
    with each other need the same ranges.

    Raises:
        ValueError: an unknown precision; ranges of another shape, not finite, or not rising; fewer
            than two vectors to take ranges from.
    """

    precision: str = "float32"
    ranges: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            listed = ", ".join(get_args(Precision))
            raise ValueError(f"precision: expected one of {listed}, got {self.precision!r}")
        if self.ranges is not None and not self.ranged:
            raise ValueError(f"ranges: expected none for {self.precision}, got some")
        if self.ranges is not None:
            self.ranges = _ranges(self.ranges)

    @property
    def ranged(self) -> bool:
        return self.precision in ("int8", "uint8")

    @property
    def makes_ranges(self) -> bool:
        """Whether the first vectors will set the ranges."""
        return self.ranged and self.ranges is None

    def check(self, width: int) -> None:
        """ValueError if the ranges have another width."""
        if self.ranges is not None and self.ranges.shape[1] != width:
            raise ValueError(f"ranges: expected [2, {width}], got {list(self.ranges.shape)}")

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        self.check(vectors.shape[1])
        if self.precision in ("float32", "float16"):
            return vectors.astype(self.precision, copy=False)
        if self.makes_ranges and len(vectors):
            if len(vectors) < 2:
                raise ValueError(
                    "ranges: expected given ones, or two texts or more to take them from, got "
                    f"{len(vectors)}"
                )
            self.ranges = np.stack([vectors.min(0), vectors.max(0)])
        if not len(vectors):  # Some versions of the library fail on an empty array.
            width = vectors.shape[1] if self.ranged else -(-vectors.shape[1] // 8)
            return np.zeros((0, width), np.uint8 if self.precision.startswith("u") else np.int8)
        # Imported late, as it takes seconds.
        from sentence_transformers import quantize_embeddings

        kind: Any = self.precision
        made = quantize_embeddings(vectors, precision=kind, ranges=self.ranges)
        assert isinstance(made, np.ndarray)
        return made


def model_ranges(model: str, size: tuple[int | None, ...]) -> Path | None:
    """Return the file of ranges of an exported model, None without one or for another size of it.

    A narrower vector is scaled to length one again, and leaves the ranges of the whole.

    Args:
        size: dim, exit and rank that are asked for, None for the model's own.
    """
    path = Path(model) / RANGES
    return path if set(size) == {None} and path.is_file() else None


def read_ranges(path: Path) -> np.ndarray:
    """Read fp32 [2, D] from an .npy file. ValueError for anything else."""
    try:
        check_regular(path)
        # The file is mapped, as a header may claim any number of values.
        ranges = np.load(path, mmap_mode="r", allow_pickle=False)
    # A header nests too deep for the parser in the last two cases.
    except (OSError, ValueError, EOFError, RecursionError, MemoryError) as error:
        raise ValueError(f"ranges: expected an .npy file, got {path}: {error}") from None
    if not isinstance(ranges, np.ndarray):
        raise ValueError("ranges: expected [2, D], got an archive")
    return _ranges(ranges)


def _ranges(value: Any) -> np.ndarray:
    try:
        ranges = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise ValueError("ranges: expected numbers, got something else") from None
    if ranges.ndim != 2 or len(ranges) != 2:
        raise ValueError(f"ranges: expected [2, D], got {ranges.shape}")
    if not (np.isfinite(ranges).all() and (ranges[0] <= ranges[1]).all()):
        raise ValueError("ranges: expected finite numbers with least <= greatest, got others")
    return ranges


# ---- files of vectors ----


def beside(path: Path) -> Path:
    """Return the file of ranges of quantised vectors at `path`."""
    return path.with_name(f"{path.name}.ranges.npy")


def save(path: Path, parts: Iterable[np.ndarray], quantise: Quantiser, width: int) -> str:
    """Write arrays [n, ..] of quantised vectors of `width` numbers to a new file, and the ranges
    that `quantise` took from them to `beside(path)`; return a line that says what was written.

    Raises:
        ValueError: either file exists.
    """
    count, start, makes_ranges = 0, time.perf_counter(), quantise.makes_ranges
    empty = quantise(np.zeros((0, width), np.float32))
    with atomic_files(path) as partial:
        with _plain_writer(partial / path.name, empty.dtype, empty.shape[1]) as write:
            for part in parts:
                write(part)
                count += len(part)
        if makes_ranges and quantise.ranges is not None:
            save_array(partial / beside(path).name, quantise.ranges)
    rate = count / (time.perf_counter() - start)
    return f"{path}: {count} x {empty.shape[1]} {quantise.precision}, {rate:,.0f} texts/s"


@contextmanager
def writer(path: Path, dtype: np.dtype, width: int) -> Iterator[Write]:
    """Yield a function to call with vectors [n, width], any number of times.

    A .parquet file gets a column `embedding` of fixed-size lists, a row group a call; any other
    name is written as .npy, which np.load also maps. If the block fails, no file is left.

    Raises:
        ValueError: `path` exists.
    """
    with atomic_file(path) as partial, _plain_writer(partial, np.dtype(dtype), width) as write:
        yield write


def _plain_writer(path: Path, dtype: np.dtype, width: int) -> AbstractContextManager[Write]:
    """Return the context of `writer` for a file that is not atomic."""
    write_file = _parquet if path.suffix.lower() == ".parquet" else _npy
    return write_file(path, dtype, width)


@contextmanager
def _npy(path: Path, dtype: np.dtype, width: int) -> Iterator[Write]:
    rows = 0
    with path.open("xb") as file:
        file.write(_header(dtype, rows, width))

        def write(vectors: np.ndarray) -> None:
            nonlocal rows
            assert vectors.dtype == dtype and vectors.shape[1:] == (width,)
            # numpy's tofile does not say why it fails.
            file.write(np.ascontiguousarray(vectors).data)
            rows += len(vectors)

        yield write
        file.seek(0)
        file.write(_header(dtype, rows, width))


def _header(dtype: np.dtype, rows: int, width: int) -> bytes:
    """Return a header of version 1.0, padded to HEADER bytes for any number of rows."""
    kind = np.lib.format.dtype_to_descr(dtype)
    shape = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    body = shape.encode("latin1").ljust(HEADER - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body


@contextmanager
def _parquet(path: Path, dtype: np.dtype, width: int) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("embedding", pa.list_(pa.from_numpy_dtype(dtype), width))])
    with pq.ParquetWriter(path, schema) as file:

        def write(vectors: np.ndarray) -> None:
            flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(flat, width)
            file.write_table(pa.Table.from_arrays([column], schema=schema))

        yield write


def print_vectors(vectors: np.ndarray) -> None:
    """Print a line of numbers a vector. BrokenPipeError if the reader has closed the pipe."""
    digits = "%.6f" if vectors.dtype.kind == "f" else "%d"
    for row in vectors.tolist():
        sys.stdout.write(" ".join(digits % x for x in row) + "\n")
    sys.stdout.flush()

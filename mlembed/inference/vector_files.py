"""What is before and behind an encoder: texts from files of any size, vectors in fewer bits, and
files of vectors that are there whole or not at all.

Nothing here holds more than a few thousand rows. A line ends at a line feed alone, or with a
carriage return before it: Unicode's other separators occur inside sentences.
"""

import json
import os
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Precision = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]
HEADER = 128  # bytes of an .npy's, room for any number of rows

Write = Callable[[np.ndarray, list[str]], None]


@dataclass
class TextBuffer:
    """Texts in passing: those since the last `take` are kept, where they are wanted at all."""

    texts: Iterable[str]
    wanted: bool

    def __post_init__(self) -> None:
        self._kept = deque[str]()

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            if self.wanted:
                self._kept.append(text)
            yield text

    def take(self, count: int) -> list[str]:
        return [self._kept.popleft() for _ in range(count)] if self.wanted else []


# ---- fewer bits ----


@dataclass
class Quantiser:
    """fp32 vectors [N, D] -> the same in `precision`, as sentence-transformers quantises.

    float32 as they are, float16 [N, D] rounded; int8 and uint8 [N, D] one of 256 steps between
    ranges[0] and ranges[1]; binary (int8) and ubinary (uint8) [N, ceil(D / 8)] the signs, packed.

    ranges: fp32 [2, D], each dimension's least and greatest. Of int8 and uint8 only; where none are
    given those of the first vectors that come, which are kept for all that come later. Vectors that
    are to be compared need the same ranges.

    Raises:
        ValueError: another precision, ranges of another shape or that are none, or that fewer than
            two vectors would have to give.
    """

    precision: str = "float32"
    ranges: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            listed = ", ".join(get_args(Precision))
            raise ValueError(f"precision: expected one of {listed}, got {self.precision!r}")
        if self.ranges is not None and not self.ranged:
            raise ValueError(f"ranges: expected none, as {self.precision} has none, got some")
        if self.ranges is not None:
            self.ranges = _ranges(self.ranges)

    @property
    def ranged(self) -> bool:
        return self.precision in ("int8", "uint8")

    @property
    def makes_ranges(self) -> bool:
        """Whether they are still to come from the first vectors."""
        return self.ranged and self.ranges is None

    def check(self, width: int) -> None:
        """ValueError where the ranges are of vectors of another width."""
        if self.ranges is not None and self.ranges.shape[1] != width:
            raise ValueError(f"ranges: expected [2, {width}], got {list(self.ranges.shape)}")

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        self.check(vectors.shape[1])
        if self.precision in ("float32", "float16"):
            return vectors.astype(self.precision, copy=False)
        if self.makes_ranges and len(vectors):
            if len(vectors) < 2:
                raise ValueError(
                    "ranges: expected them given, or two texts or more to take them from, "
                    f"got {len(vectors)}"
                )
            self.ranges = np.stack([vectors.min(0), vectors.max(0)])
        if not len(vectors):  # not all versions of the library have a result for none
            width = vectors.shape[1] if self.ranged else -(-vectors.shape[1] // 8)
            return np.zeros((0, width), np.uint8 if self.precision.startswith("u") else np.int8)
        from sentence_transformers import quantize_embeddings  # seconds

        kind: Any = self.precision
        made = quantize_embeddings(vectors, precision=kind, ranges=self.ranges)
        assert isinstance(made, np.ndarray)
        return made


def read_ranges(path: Path) -> np.ndarray:
    """fp32 [2, D] of an .npy file. ValueError for anything else, in one line."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"ranges: expected an .npy file, got {path}: {error}") from None
    if not isinstance(found, np.ndarray):
        raise ValueError("ranges: expected [2, D], got an archive")
    return _ranges(found)


def _ranges(given: Any) -> np.ndarray:
    try:
        ranges = np.asarray(given, np.float32)
    except (TypeError, ValueError):
        raise ValueError("ranges: expected numbers, got something else") from None
    if ranges.ndim != 2 or len(ranges) != 2:
        raise ValueError(f"ranges: expected [2, D], got {ranges.shape}")
    if not (np.isfinite(ranges).all() and (ranges[0] <= ranges[1]).all()):
        raise ValueError("ranges: expected finite ones, the least before the greatest, got others")
    return ranges


# ---- files of vectors ----


def check_new(path: Path) -> None:
    """ValueError where something is in the way, or no directory is there to write to."""
    if path.exists():
        raise ValueError(f"out: expected a new file, got {path}, which exists")
    if not path.parent.is_dir():
        raise ValueError(f"out: expected a directory to write to, got {path.parent}")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` where nothing fails, and goes else.

    Raises:
        ValueError: `path` is there, before or after.
    """
    check_new(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        check_new(path)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def beside(path: Path) -> Path:
    """Where the ranges of quantised vectors at `path` are."""
    return path.with_name(f"{path.name}.ranges.npy")


def save(
    path: Path, parts: Iterable[np.ndarray], texts: TextBuffer, quantise: Quantiser, width: int
) -> str:
    """Arrays [n, ..] of vectors of `width` numbers, as `quantise` has made them, to a new file as
    `written` says; the ranges that it took from them `beside` it -> a line of what is there.

    Raises:
        ValueError: something is at either, or texts are kept for .npy.
    """
    count, start, makes_ranges = 0, time.perf_counter(), quantise.makes_ranges
    none = quantise(np.zeros((0, width), np.float32))
    with written(path, none.dtype, none.shape[1], texts.wanted) as write:
        for part in parts:
            write(part, texts.take(len(part)))
            count += len(part)
        if makes_ranges and quantise.ranges is not None:
            with new_file(beside(path)) as partial, partial.open("xb") as file:
                np.save(file, quantise.ranges)
    rate = count / (time.perf_counter() - start)
    return f"{path}: {count} x {none.shape[1]} {quantise.precision}, {rate:,.0f} texts/s"


def written(
    path: Path, dtype: np.dtype, width: int, texts: bool = False
) -> AbstractContextManager[Write]:
    """Inside, a function to call with vectors [n, width] and their texts, as often as there are.

    .parquet: a column `embedding` of fixed-size lists, a row group a call. .jsonl: objects with
    `embedding`, numbers that read back as the same. Anything else: .npy, which np.load also maps.
    In what is not done the file is not there.

    Args:
        texts: also a column `text` before it, which .npy has not.

    Raises:
        ValueError: something is at `path`, or texts for .npy.
    """
    kinds = {".parquet": _parquet, ".jsonl": _jsonl}
    if texts and path.suffix.lower() not in kinds:
        raise ValueError(f"out: expected .parquet or .jsonl to keep texts, got {path}")
    return kinds.get(path.suffix.lower(), _npy)(path, np.dtype(dtype), width, texts)


@contextmanager
def _npy(path: Path, dtype: np.dtype, width: int, texts: bool) -> Iterator[Write]:
    rows = 0
    with new_file(path) as partial, partial.open("xb") as file:
        file.write(_header(dtype, rows, width))

        def write(vectors: np.ndarray, _: list[str]) -> None:
            nonlocal rows
            assert vectors.dtype == dtype and vectors.shape[1:] == (width,)
            file.write(np.ascontiguousarray(vectors).data)  # tofile says not why it fails
            rows += len(vectors)

        yield write
        file.seek(0)
        file.write(_header(dtype, rows, width))


def _header(dtype: np.dtype, rows: int, width: int) -> bytes:
    """Of version 1.0, padded to the same length whatever the number of rows."""
    kind = np.lib.format.dtype_to_descr(dtype)
    said = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    body = said.encode("latin1").ljust(HEADER - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body


@contextmanager
def _parquet(path: Path, dtype: np.dtype, width: int, texts: bool) -> Iterator[Write]:
    fields = [pa.field("embedding", pa.list_(pa.from_numpy_dtype(dtype), width))]
    if texts:
        fields.insert(0, pa.field("text", pa.string()))
    schema = pa.schema(fields)
    with new_file(path) as partial, pq.ParquetWriter(partial, schema) as writer:

        def write(vectors: np.ndarray, of: list[str]) -> None:
            flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
            columns: list[Any] = [pa.FixedSizeListArray.from_arrays(flat, width)]
            if texts:
                columns.insert(0, pa.array(of, pa.string()))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))

        yield write


@contextmanager
def _jsonl(path: Path, dtype: np.dtype, width: int, texts: bool) -> Iterator[Write]:
    with new_file(path) as partial, partial.open("x", encoding="utf-8", newline="\n") as file:

        def write(vectors: np.ndarray, of: list[str]) -> None:
            for i, numbers in enumerate(listed(vectors)):
                text = f'"text": {json.dumps(of[i], ensure_ascii=False)}, ' if texts else ""
                file.write(f'{{{text}"embedding": [{", ".join(numbers)}]}}\n')

        yield write


def listed(vectors: np.ndarray) -> Iterator[list[str]]:
    """Each row's numbers in so many digits as read back as the same."""
    digits = {"f4": "%.9g", "f2": "%.5g"}.get(vectors.dtype.str[1:], "%d")
    for row in vectors.tolist():
        yield [digits % x for x in row]


def printed(vectors: np.ndarray) -> None:
    """A line of numbers a vector, on standard output. BrokenPipeError where nobody reads it."""
    digits = "%.6f" if vectors.dtype.kind == "f" else "%d"
    for row in vectors.tolist():
        sys.stdout.write(" ".join(digits % x for x in row) + "\n")
    sys.stdout.flush()

"""Files to rows: each row as it comes, with where it stands, or the reason why it is none.

Rows are dictionaries of columns to values, whatever the columns are called (layouts.py knows). A
file is read as a stream: a line, a record or a batch of parquet's at a time.
"""

import contextlib
import csv
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    import datasets


Row = tuple[str, dict[str, Any] | str]  # where; the row, or what is wrong with it
Names = Callable[[list[str]], list[str]]  # which of these columns are worth reading

# Of a directory the first of these kinds that is there. A csv beside parquet describes it.
KINDS = ((".jsonl", ".parquet"), (".csv", ".tsv"), (".json",))
SUFFIXES = tuple(suffix for kind in KINDS for suffix in kind)
SCORES = ("score", "scores", "similarity_score", "label", "labels")
LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]+)*")
SURROGATE = re.compile("[\ud800-\udfff]")
MANY = 4096  # rows of parquet or Arrow at once as Python objects


def is_text(value: Any) -> bool:
    """A string with something in it, all of it Unicode (json may hold half a surrogate pair)."""
    return isinstance(value, str) and bool(value.strip()) and not SURROGATE.search(value)


# ---- what is where ----


def files_of(source: str) -> list[Path]:
    """The data files of a path: itself, or what a directory holds, sorted.

    Of a directory these are its .jsonl and .parquet files; without any, its .csv and .tsv; without
    any, its .json (an object a line). Data files of the other kinds are left out with a warning.

    Raises:
        ValueError: nothing there, or nothing of these kinds.
    """
    path = Path(source)
    listed = ", ".join(SUFFIXES)
    if path.is_dir():
        there = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
        for kind in KINDS:
            files = [p for p in there if p.suffix in kind]
            if files:
                others = [p.name for p in there if p not in files and p.suffix != ".json"]
                if others:
                    warnings.warn(
                        f"{source}: {', '.join(others)} left out, beside {' and '.join(kind)}: "
                        "name a file itself to read it",
                        stacklevel=2,
                    )
                return files
        raise ValueError(f"data: expected {listed} files in {source}, found none")
    if not path.is_file():
        raise ValueError(f"data: expected a file or directory, got {source}, which does not exist")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"data: expected {listed}, got {source}")
    return [path]


def parallel_files(source: str) -> dict[str, Path]:
    """Language code -> file, of two or more files name.xx, name.yy; else nothing."""
    path = Path(source)
    if not path.parent.is_dir() or path.exists() or not path.name:
        return {}
    found = {}
    for other in sorted(path.parent.iterdir()):
        code = other.name.removeprefix(f"{path.name}.")
        plain = code != other.name and LANGUAGE.fullmatch(code) and other.is_file()
        if plain and f".{code}" not in SUFFIXES:
            found[code] = other
    return found if len(found) > 1 else {}


# ---- files ----


def of_file(path: Path, names: Names = list) -> Iterator[Row]:
    """Rows of a .jsonl, .json (lines), .csv, .tsv or .parquet file; `where` is file:line, of
    parquet file:row, both from 1.

    Raises:
        ValueError: a file that is not what its suffix says, as far as it is no matter of a row.
    """
    if path.suffix == ".parquet":
        return _parquet(path, names)
    if path.suffix in (".csv", ".tsv"):
        return _csv(path)
    return _jsonl(path)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield where, f"not UTF-8: {error.reason}"
            except (ValueError, RecursionError) as error:  # also numbers too long for Python
                yield where, f"not json: {error}"
            else:
                got = f"expected an object, got {type(row).__name__}"
                yield where, row if isinstance(row, dict) else got


def _csv(path: Path) -> Iterator[Row]:
    """RFC 4180 with a header; .tsv the same with tabs. An empty cell is None."""
    csv.field_size_limit(2**31 - 1)  # by default, documents over 128 Ki characters are errors
    delimiter = "\t" if path.suffix == ".tsv" else ","
    # Bytes that are not UTF-8 come as lone surrogates, which UTF-8 itself cannot hold.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield where, f"not {path.suffix[1:]}: {error}"
                continue
            if not header:
                header = _header(cells, where)
            elif cells:
                yield where, _record(header, cells)


def _header(cells: list[str], where: str) -> list[str]:
    if not all(map(is_text, cells)) or len(set(cells)) < len(cells):
        raise ValueError(f"{where}: header: expected distinct names of columns, got {cells}")
    return cells


def _record(header: list[str], cells: list[str]) -> dict[str, Any] | str:
    if len(cells) != len(header):
        return f"expected {len(header)} cells ({', '.join(header)}), got {len(cells)}"
    row: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=True):
        if SURROGATE.search(cell):
            return f"{name}: not UTF-8"
        row[name] = cell or None
        if cell and name in SCORES:
            with contextlib.suppress(ValueError):  # it stays a text, which is no score
                row[name] = float(cell)
    return row


def _parquet(path: Path, names: Names) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = names(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=MANY, columns=columns):
                for row in _python(batch):
                    number += 1
                    yield f"{path}:{number}", row
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not parquet: {str(error).splitlines()[0]}") from None


def _python(batch: pa.RecordBatch | pa.Table) -> Iterator[dict[str, Any] | str]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # Arrow does not look: row by row
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield f"not UTF-8: {error.reason}"


# ---- parallel files ----


def of_parallel(files: dict[str, Path], name: str) -> Iterator[Row]:
    """Lines of files that are each other's translations.

    Of two files a row is a line of both, by language code; of more it is one text, {id, lang,
    text} with the line's number as its id, language by language.

    Raises:
        ValueError: files of different numbers of lines.
    """
    counts = {code: sum(1 for _ in _lines(path)) for code, path in files.items()}
    if len(set(counts.values())) > 1:
        got = ", ".join(f"{n} in {files[code].name}" for code, n in counts.items())
        raise ValueError(f"{name}: expected as many lines in each file, got {got}")
    if len(files) == 2:
        sides = zip(*map(_lines, files.values()), strict=True)
        for number, texts in enumerate(sides, 1):
            odd = [c for c, text in zip(files, texts, strict=True) if SURROGATE.search(text)]
            row = dict(zip(files, texts, strict=True))
            yield f"{name}:{number}", f"{odd[0]}: not UTF-8" if odd else row
        return
    for code, path in files.items():
        for number, text in enumerate(_lines(path), 1):
            odd_text = SURROGATE.search(text) is not None
            row = {"id": str(number), "lang": code, "text": text}
            yield f"{path}:{number}", "text: not UTF-8" if odd_text else row


def _lines(path: Path) -> Iterator[str]:
    """Not splitlines: Unicode's other separators occur inside sentences."""
    with path.open("rb") as file:
        for line in file:
            text = line.removesuffix(b"\n").removesuffix(b"\r")
            yield text.decode("utf-8", "surrogateescape")


# ---- data sets of the library `datasets` ----


def is_data_set(path: Path) -> bool:
    """A directory that `save_to_disk` wrote."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def data_set(
    path: str, subset: str, split: str, streaming: bool
) -> "datasets.Dataset | datasets.IterableDataset":
    """A directory of `save_to_disk`, memory-mapped, or what `load_dataset` finds: a hub id, or a
    directory laid out as one. No code of a data set's own is run.

    Raises:
        ValueError: nothing of that name, another subset or split, in one line.
    """
    import datasets  # seconds

    try:
        if not is_data_set(Path(path)):
            return datasets.load_dataset(path, subset or None, split=split, streaming=streaming)
        found = datasets.load_from_disk(path)
    except Exception as error:  # many kinds, of several libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"data: expected a file, a directory or a data set that can be loaded, got {path} "
            f"(subset {subset or 'none'}, split {split}): {reason}"
        ) from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(f"{path}: split: expected one of {', '.join(found)}, got {split}")
        found = found[split]
    return found.to_iterable_dataset() if streaming else found


def of_data_set(
    data: "datasets.Dataset | datasets.IterableDataset", name: str, names: Names = list
) -> Iterator[Row]:
    """Rows of a data set, `where` being name:row from 1."""
    if data.column_names:  # a stream may not know
        data = data.select_columns(names(list(data.column_names)))
    number = 0
    for batch in data.with_format("arrow").iter(batch_size=MANY):
        for row in _python(batch):
            number += 1
            yield f"{name}:{number}", row


MANY = 4096  # rows of parquet at once as Python objects
BUFFER = 2**20  # bytes of parquet at once; else a row group is, which may be the whole file
UNKNOWN = "\ufffd"


# ---- texts ----


@dataclass
class Texts:
    """The texts of a file, in order, as they are read: lines, or a column of .jsonl or .parquet.

    path: "-" is standard input, of lines. column: of .jsonl and .parquet. invalid: of bytes that
    are no UTF-8 "replace" makes U+FFFD, "error" an error. replaced: how many it has made so far.

    A byte order mark at the beginning of a file is no part of its text. An empty line is a text; in
    .jsonl it is none.

    Raises, as it is read:
        ValueError: what is no UTF-8, no json or no text, by file, line and reason.
    """

    path: str = "-"
    column: str = "text"
    invalid: str = "error"
    replaced: int = 0

    def __iter__(self) -> Iterator[str]:
        if self.path == "-":
            return (text for _, text in self._lines(sys.stdin.buffer, "standard input"))
        kinds = {".jsonl": self._jsonl, ".parquet": self._parquet}
        return kinds.get(_kind(Path(self.path)), self._plain)()

    def check(self) -> None:
        """ValueError where there is no such file, or it has no such column, before any work."""
        if self.path == "-":
            return
        path = Path(self.path)
        if not path.exists() or path.is_dir():  # a named pipe, or a shell's <(..), is as good
            raise ValueError(f"input: expected a file, got {self.path}, which is none")
        if _kind(path) == ".parquet":
            with self._open() as file:
                names = file.schema_arrow.names
            if self.column not in names:
                found = ", ".join(names)
                raise ValueError(f"{self.path}: expected a column {self.column!r}, got {found}")

    def _plain(self) -> Iterator[str]:
        with open(self.path, "rb") as file:
            for _, text in self._lines(file, self.path):
                yield text

    def _lines(self, file: BinaryIO, name: str) -> Iterator[tuple[str, str]]:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.endswith(b"\n"):
                line = line[:-1].removesuffix(b"\r")
            where = f"{name}:{number}"
            try:
                yield where, line.decode("utf-8")
            except UnicodeDecodeError as error:
                if self.invalid != "replace":
                    raise ValueError(
                        f"{where}: expected UTF-8, got byte 0x{line[error.start]:02x} at "
                        f"{error.start} of the line; --invalid replace puts U+FFFD there"
                    ) from None
                text = line.decode("utf-8", "replace")
                # UTF-8 synchronises itself: those that were there before are found as bytes.
                self.replaced += text.count(UNKNOWN) - line.count(UNKNOWN.encode())
                yield where, text

    def _jsonl(self) -> Iterator[str]:
        with open(self.path, "rb") as file:
            for where, line in self._lines(file, self.path):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where}: expected json, got {error}") from None
                if not isinstance(row, dict):
                    got = type(row).__name__
                    raise ValueError(f"{where}: expected an object, got {got}")
                yield self._text(row.get(self.column), where)

    def _parquet(self) -> Iterator[str]:
        number = 0
        with self._open() as file:
            batches = file.iter_batches(batch_size=MANY, columns=[self.column])
            while True:
                try:
                    batch = next(batches, None)
                except (pa.ArrowException, OSError) as error:
                    reason = str(error).splitlines()[0]
                    where = f"{self.path}: after row {number}"
                    raise ValueError(f"{where}: not parquet: {reason}") from None
                if batch is None:
                    return
                for value in batch.column(0):
                    number += 1
                    where = f"{self.path}:{number}"
                    try:
                        found = value.as_py()
                    except UnicodeDecodeError as error:  # Arrow does not look
                        found = bytes(value.as_buffer())
                        if self.invalid != "replace":
                            raise ValueError(
                                f"{where}: expected UTF-8, got byte 0x{found[error.start]:02x} at "
                                f"{error.start}; --invalid replace puts U+FFFD there"
                            ) from None
                        text = found.decode("utf-8", "replace")
                        self.replaced += text.count(UNKNOWN) - found.count(UNKNOWN.encode())
                        found = text
                    yield self._text(found, where)

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path, buffer_size=BUFFER, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{self.path}: not parquet: {reason}") from None

    def _text(self, value: Any, where: str) -> str:
        """json's "\\ud83d" is half a character, which no encoding holds."""
        if not isinstance(value, str):
            got = "none" if value is None else type(value).__name__
            raise ValueError(f"{where}: {self.column}: expected a text, got {got}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            if self.invalid != "replace":
                raise ValueError(
                    f"{where}: {self.column}: expected Unicode, got a lone surrogate in "
                    f"{value[:40]!r}; --invalid replace puts U+FFFD there"
                ) from None
            half = [UNKNOWN if "\ud800" <= letter <= "\udfff" else letter for letter in value]
            self.replaced += sum(a != b for a, b in zip(half, value, strict=True))
            return "".join(half)
        return value


def _kind(path: Path) -> str:
    return path.suffix.lower()


def windows(texts: Iterable[str], most: int, characters: int) -> Iterator[list[str]]:
    """Texts as they come, `most` at a time, or fewer, once they have so many characters.

    Raises:
        ValueError: what is no string, by its number from 0.
    """
    some, first, room = list[str](), 0, characters
    for text in texts:
        if not isinstance(text, str):
            got = type(text).__name__
            raise ValueError(f"text {first + len(some)}: expected a string, got {got}")
        some.append(text)
        room -= len(text)
        if len(some) == most or room < 0:
            yield some
            some, first, room = [], first + len(some), characters
    if some:
        yield some

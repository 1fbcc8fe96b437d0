"""Read text files: lines, rows of jsonl, csv, tsv and parquet, parallel files, data sets.

Every reader is a stream of (location, value) or (location, ValueError), where the location is
file:line or, for parquet, file:row, both from 1; `strict` raises the errors. layouts.py knows what
the columns of a row mean.

A line ends at a line feed, alone or after a carriage return, as Unicode's other separators occur
inside sentences. A byte order mark at the beginning of a file is not part of its text.
"""

import contextlib
import csv
import json
import re
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

T = TypeVar("T")
Line = tuple[str, str | ValueError]
Row = tuple[str, dict[str, Any] | ValueError]
"""A location, and either a row by column name or the error that makes it malformed."""
Columns = Callable[[list[str]], list[str]]
"""Picks, of a file's column names, those to read."""

# A directory is read as the first of these kinds that it holds. A csv next to parquet describes it.
KINDS = ((".jsonl", ".parquet"), (".csv", ".tsv"), (".json",))
SUFFIXES = tuple(suffix for kind in KINDS for suffix in kind)
SCORES = ("score", "scores", "similarity_score", "label", "labels")
LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]+)*")
SURROGATE = re.compile("[\ud800-\udfff]")
BOM = b"\xef\xbb\xbf"
UNKNOWN = "\ufffd"
MANY = 4096  # rows of parquet or Arrow that become Python objects at once
BUFFER = 2**20  # bytes of parquet in memory; without it a whole row group is


# ---- valid text ----


def normalise(text: str) -> str:
    """Return the form in which two texts count as the same."""
    return unicodedata.normalize("NFKC", text).casefold().strip()


def is_text(value: Any) -> bool:
    """Return whether `value` is a string of valid Unicode that holds more than white space."""
    return isinstance(value, str) and bool(value.strip()) and not SURROGATE.search(value)


def id_text(value: Any) -> Any:
    """Return an integer id as its digits, and other values as they are."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


@dataclass
class Decoder:
    """Decodes text and treats invalid bytes and characters.

    invalid: "error" raises ValueError, "replace" puts U+FFFD instead. hint: end of the error's
    message. replaced: number of U+FFFD put in so far.
    """

    invalid: str = "error"
    hint: str = ""
    replaced: int = 0

    def decode(self, data: bytes) -> str:
        """Decode UTF-8."""
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            if self.invalid != "replace":
                byte = f"byte 0x{data[error.start]:02x} at {error.start}"
                raise ValueError(f"expected UTF-8, got {byte}{self.hint}") from None
        text = data.decode("utf-8", "replace")
        # UTF-8 synchronises itself, so a U+FFFD of the text itself is still there as bytes.
        self.replaced += text.count(UNKNOWN) - data.count(UNKNOWN.encode())
        return text

    def check(self, text: str, where: str) -> str:
        """Return `text` without lone surrogates, which json can hold ("\\ud83d"), UTF-8 not."""
        if not SURROGATE.search(text):
            return text
        if self.invalid != "replace":
            got = f"a lone surrogate in {text[:40]!r}"
            raise ValueError(f"{where}: expected Unicode, got {got}{self.hint}")
        text, count = SURROGATE.subn(UNKNOWN, text)
        self.replaced += count
        return text


def strict(stream: Iterable[tuple[str, T | ValueError]]) -> Iterator[tuple[str, T]]:
    """Yield a reader's values and raise its first error, with the location in front."""
    for where, value in stream:
        if isinstance(value, ValueError):
            raise ValueError(f"{where}: {value}")
        yield where, value


def _attempt(function: Callable[..., T], *arguments: Any) -> T | ValueError:
    try:
        return function(*arguments)
    except ValueError as error:
        return error


# ---- files by name ----


def files_of(source: str) -> list[Path]:
    """Return the data files of a path: the file itself, or the files of a directory, sorted.

    A directory's files are its .jsonl and .parquet files; without any, its .csv and .tsv files;
    without any, its .json files (an object a line). Data files of the other kinds are left out with
    a warning.

    Raises:
        ValueError: the path does not exist, or holds no data files.
    """
    path = Path(source)
    listed = ", ".join(SUFFIXES)
    if path.is_dir():
        data = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
        for kind in KINDS:
            files = [p for p in data if p.suffix in kind]
            if files:
                others = [p.name for p in data if p not in files and p.suffix != ".json"]
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
    """Return {language code: file} of two or more files name.xx, name.yy, else {}."""
    path = Path(source)
    if not path.parent.is_dir() or path.exists() or not path.name:
        return {}
    files = {}
    for other in sorted(path.parent.iterdir()):
        code = other.name.removeprefix(f"{path.name}.")
        plain = code != other.name and LANGUAGE.fullmatch(code) and other.is_file()
        if plain and f".{code}" not in SUFFIXES:
            files[code] = other
    return files if len(files) > 1 else {}


# ---- lines ----


def lines(path: Path | str, decoder: Decoder | None = None) -> Iterator[Line]:
    """Yield the lines of a file without their ends; a line of invalid UTF-8 is an error."""
    with open(path, "rb") as file:
        yield from _lines(file, str(path), decoder or Decoder())


def _lines(file: BinaryIO, name: str, decoder: Decoder) -> Iterator[Line]:
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(BOM)
        if line.endswith(b"\n"):
            line = line[:-1].removesuffix(b"\r")
        yield f"{name}:{number}", _attempt(decoder.decode, line)


def of_parallel(files: dict[str, Path], name: str) -> Iterator[Row]:
    """Yield rows of files whose lines are translations of each other.

    Of two files a row is a line of both, by language code; of more files it is one text, {id, lang,
    text} with the line's number as its id, language by language.

    Raises:
        ValueError: files of different numbers of lines.
    """
    counts = {code: sum(1 for _ in lines(path)) for code, path in files.items()}
    if len(set(counts.values())) > 1:
        got = ", ".join(f"{n} in {files[code].name}" for code, n in counts.items())
        raise ValueError(f"{name}: expected as many lines in each file, got {got}")
    if len(files) == 2:
        for number, pair in enumerate(zip(*map(lines, files.values()), strict=True), 1):
            row = {code: text for code, (_, text) in zip(files, pair, strict=True)}
            bad = [code for code, text in row.items() if isinstance(text, ValueError)]
            yield f"{name}:{number}", ValueError(f"{bad[0]}: {row[bad[0]]}") if bad else row
        return
    for code, path in files.items():
        for number, (where, text) in enumerate(lines(path), 1):
            if isinstance(text, ValueError):
                yield where, ValueError(f"text: {text}")
            else:
                yield where, {"id": str(number), "lang": code, "text": text}


# ---- rows ----


def of_file(path: Path, columns: Columns = list, decoder: Decoder | None = None) -> Iterator[Row]:
    """Yield the rows of a .jsonl, .json (an object a line), .csv, .tsv or .parquet file.

    Args:
        columns: picks the columns of parquet. decoder: for json and parquet.

    Raises:
        ValueError: the file's content does not match its suffix, or a header has no names.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path, columns, decoder or Decoder())
    if suffix in (".csv", ".tsv"):
        return _csv(path)
    return _jsonl(path, decoder)


def _jsonl(path: Path, decoder: Decoder | None) -> Iterator[Row]:
    for where, line in lines(path, decoder):
        if isinstance(line, ValueError):
            yield where, line
        elif line.strip():
            yield where, _attempt(_object, line)


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    # A number of more than 4300 digits is a plain ValueError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"invalid JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    return row


def _csv(path: Path) -> Iterator[Row]:
    """Yield rows of RFC 4180 with a header, or of the same with tabs. An empty cell is None."""
    # Documents over 128 Ki characters are errors by default.
    csv.field_size_limit(2**31 - 1)
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
                yield where, ValueError(f"not {path.suffix[1:]}: {error}")
                continue
            if header and cells:
                yield where, _attempt(_record, header, cells)
            elif cells:
                header = cells
                if not all(map(is_text, header)) or len(set(header)) < len(header):
                    raise ValueError(f"{where}: header: expected distinct names, got {header}")


def _record(header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(header):
        raise ValueError(f"expected {len(header)} cells ({', '.join(header)}), got {len(cells)}")
    row: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=True):
        if SURROGATE.search(cell):
            raise ValueError(f"{name}: expected UTF-8, got {cell[:40]!r}")
        row[name] = cell or None
        if cell and name in SCORES:
            # A score that is not a number stays text, which is an error later.
            with contextlib.suppress(ValueError):
                row[name] = float(cell)
    return row


def _parquet(path: Path, columns: Columns, decoder: Decoder) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
            names = columns(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=MANY, columns=names):
                for row in _python(batch, decoder):
                    number += 1
                    yield f"{path}:{number}", row
    except (pa.ArrowException, OSError) as error:
        where = f"{path}: after row {number}" if number else path
        raise ValueError(f"{where}: not parquet: {str(error).splitlines()[0]}") from None


def _python(
    batch: "pa.RecordBatch | pa.Table", decoder: Decoder
) -> Iterator[dict[str, Any] | ValueError]:
    try:
        yield from batch.to_pylist()
    # Arrow does not check UTF-8, so the invalid row has to be searched.
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            yield _attempt(_arrow_row, batch.slice(i, 1), decoder)


def _arrow_row(row: "pa.RecordBatch | pa.Table", decoder: Decoder) -> dict[str, Any]:
    values = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            values[name] = column[0].as_py()
        except UnicodeDecodeError as error:
            values[name] = decoder.decode(error.object)
    return values


# ---- data sets of the library `datasets` ----


def is_data_set(path: Path) -> bool:
    """Return whether `save_to_disk` wrote the directory."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def data_set(
    path: str, subset: str, split: str, streaming: bool
) -> "datasets.Dataset | datasets.IterableDataset":
    """Open a directory of `save_to_disk`, memory-mapped, or call `load_dataset` with a hub id or a
    directory in its layout. A data set's own code never runs.

    Raises:
        ValueError: the data set, subset or split does not exist, in one line.
    """
    import datasets  # The import takes seconds.

    try:
        if not is_data_set(Path(path)):
            return datasets.load_dataset(path, subset or None, split=split, streaming=streaming)
        data = datasets.load_from_disk(path)
    # Several libraries raise exceptions of many kinds.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"data: expected a file, a directory or a data set that can be loaded, got {path} "
            f"(subset {subset or 'none'}, split {split}): {reason}"
        ) from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"{path}: split: expected one of {', '.join(data)}, got {split}")
        data = data[split]
    return data.to_iterable_dataset() if streaming else data


def of_data_set(
    data: "datasets.Dataset | datasets.IterableDataset", name: str, columns: Columns = list
) -> Iterator[Row]:
    """Yield the rows of a data set, at name:row from 1."""
    # A stream may not know its columns.
    if data.column_names:
        data = data.select_columns(columns(list(data.column_names)))
    number, decoder = 0, Decoder()
    for batch in data.with_format("arrow").iter(batch_size=MANY):
        for row in _python(batch, decoder):
            number += 1
            yield f"{name}:{number}", row


# ---- texts to encode ----


@dataclass
class TextReader:
    """Texts of a file in order: its lines, or a column of .jsonl or .parquet, read as a stream.

    path: "-" is standard input, read as lines. column: of .jsonl and .parquet. invalid: as in
    `Decoder`. An empty line is a text, but is skipped in .jsonl.

    Raises, while it is read:
        ValueError: invalid UTF-8, json or parquet, or a value that is not a string, by file, line
            and reason.
    """

    path: str = "-"
    column: str = "text"
    invalid: str = "error"

    def __post_init__(self) -> None:
        self._decoder = Decoder(self.invalid, "; --invalid replace puts U+FFFD there")

    @property
    def replaced(self) -> int:
        """Number of U+FFFD put in place of invalid text so far."""
        return self._decoder.replaced

    def __iter__(self) -> Iterator[str]:
        if Path(self.path).suffix.lower() in (".jsonl", ".parquet"):
            rows = of_file(Path(self.path), lambda _: [self.column], self._decoder)
            return (self._text(row.get(self.column), where) for where, row in strict(rows))
        if self.path == "-":
            source = _lines(sys.stdin.buffer, "standard input", self._decoder)
        else:
            source = lines(self.path, self._decoder)
        return (text for _, text in strict(source))

    def check(self) -> None:
        """Raise ValueError if the file or its column does not exist."""
        path = Path(self.path)
        if self.path == "-":
            return
        # A named pipe, like a shell's <(..), exists but is not a regular file.
        if not path.exists() or path.is_dir():
            problem = "a directory" if path.is_dir() else "which does not exist"
            raise ValueError(f"input: expected a file, got {self.path}, {problem}")
        if path.suffix.lower() == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                names = pq.read_schema(path).names
            except (pa.ArrowException, OSError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"{self.path}: not parquet: {reason}") from None
            if self.column not in names:
                got = ", ".join(names)
                raise ValueError(f"{self.path}: expected a column {self.column!r}, got {got}")

    def _text(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            got = "none" if value is None else type(value).__name__
            raise ValueError(f"{where}: {self.column}: expected a string, got {got}")
        return self._decoder.check(value, f"{where}: {self.column}")


def windows(texts: Iterable[str], most: int, characters: int) -> Iterator[list[str]]:
    """Group texts as they come: `most` a window, or fewer if together they exceed `characters`.

    Raises:
        ValueError: a text that is not a string, by its number from 0.
    """
    window, first, room = list[str](), 0, characters
    for text in texts:
        if not isinstance(text, str):
            got = type(text).__name__
            raise ValueError(f"text {first + len(window)}: expected a string, got {got}")
        window.append(text)
        room -= len(text)
        if len(window) == most or room < 0:
            yield window
            window, first, room = [], first + len(window), characters
    if window:
        yield window

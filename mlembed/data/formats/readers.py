"""Read text files: lines, rows of jsonl, json, csv, tsv and parquet, parallel files.

Every reader is a stream of (location, value) or (location, ValueError), where the location is
file:line or, for parquet and JSON arrays, file:row, both from 1; `strict` raises the errors. Lines,
rows and compressed files above the sizes of bounds.py are errors, so that memory is bounded.
roles.py knows what the columns of a row mean.

A line ends at a line feed, alone or after a carriage return, as Unicode's other separators occur
inside sentences. A byte order mark at the beginning of a file is not part of its text. Files named
.gz and .zst are decompressed as they are read.
"""

import contextlib
import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from . import bounds, json_array
from .bounds import shown
from .paths import COMPRESSED, TEXT, suffix_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

T = TypeVar("T")
Line = tuple[str, str | ValueError]
Row = tuple[str, dict[str, Any] | ValueError]
"""A location, and either a row by column name or the error that makes it malformed."""
Names = Sequence[str] | None
"""Columns to read, None for all."""

SURROGATE = re.compile("[\ud800-\udfff]")
BOM = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
UNKNOWN = "\ufffd"
CHUNK = 8192  # bytes of a file that show what it is
MANY = 256  # rows of parquet or Arrow that become Python objects at once
BUFFER = 2**20  # bytes of parquet in memory; without it a whole row group is
WIDE = 2**26  # bytes of the rows of parquet that become Arrow at once
LONG = 10_000  # characters of a text that is normalised in pieces
PIECE = re.compile(r"\S{1,1000}\s*|\s+")
LONGEST_NAME = 40  # characters of a column's name in a header


# ---- valid text ----


def normalise(text: str) -> str:
    """Return the form in which two texts count as the same."""
    if len(text) > LONG:
        # The time of a word grows with the square of its combining marks.
        text = "".join(unicodedata.normalize("NFKC", piece) for piece in PIECE.findall(text))
        return text.casefold().strip()
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


def attempt(function: Callable[..., T], *arguments: Any) -> T | ValueError:
    """Return a function's value, or the ValueError that it raises."""
    try:
        return function(*arguments)
    except ValueError as error:
        return error


# ---- lines ----


def _decompressed(path: Path | str, kind: str) -> io.RawIOBase:
    import pyarrow as pa

    return bounds.Decompressed(pa.input_stream(str(path), compression=kind), path)


@contextlib.contextmanager
def opened(path: Path | str) -> Iterator["io.BufferedReader[Any]"]:
    """Open a file for its decompressed bytes.

    Raises:
        ValueError: UTF-16; compressed bytes that are cut or damaged, also while they are read.
    """
    kind = COMPRESSED.get(Path(path).suffix.lower())
    try:
        # Not `pa.input_stream` for all, as a named pipe cannot be sought.
        plain = _decompressed(path, kind) if kind else io.FileIO(path)
        with io.BufferedReader(plain) as file:
            head = file.peek(2)[:2]
            if head in UTF_16:
                raise ValueError(f"{path}: expected UTF-8, got UTF-16: convert it with iconv")
            yield file
    except OSError as error:
        if not kind:
            raise
        raise ValueError(f"{path}: expected a whole {kind} file: {error}") from None


def lines(path: Path | str, decoder: Decoder | None = None) -> Generator[Line]:
    """Yield the lines of a file without their ends; a line of invalid UTF-8 is an error."""
    with opened(path) as file:
        yield from lines_of(file, str(path), decoder or Decoder())


def lines_of(file: BinaryIO, name: str, decoder: Decoder) -> Iterator[Line]:
    """Yield the lines of an open file, at name:line."""
    for number, line in enumerate(bounds.lines(file, name), 1):
        if number == 1:
            line = line.removeprefix(BOM)
        if line.endswith(b"\n"):
            line = line[:-1].removesuffix(b"\r")
        yield f"{name}:{number}", attempt(decoder.decode, line)


def plain_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file. ValueError: a line of invalid UTF-8."""
    return (line for _, line in strict(lines(path)))


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


def of_file(
    path: Path, names: Names = None, decoder: Decoder | None = None, header: bool = True
) -> Iterator[Row]:
    """Yield the rows of a .jsonl, .json, .csv, .tsv or .parquet file, or {text} of lines of .txt.

    Args:
        names: columns of parquet to read. decoder: for json and parquet. header: whether the first
            row of .csv and .tsv names the columns; otherwise they are "1", "2", ..

    Raises:
        ValueError: the file's content does not match its suffix, or a header is none.
    """
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return _parquet(path, names, decoder or Decoder())
    if suffix in (".csv", ".tsv"):
        return _csv(path, header) if suffix == ".csv" else _tsv(path, header)
    return _texts(path) if suffix == TEXT else _json(path, decoder)


def _texts(path: Path) -> Iterator[Row]:
    """Yield a row of each line that is not empty."""
    for where, line in lines(path):
        if isinstance(line, ValueError):
            yield where, ValueError(f"text: {line}")
        elif line.strip():
            yield where, {"text": line}


def _json(path: Path, decoder: Decoder | None) -> Iterator[Row]:
    """Yield rows of a value a line, or of one array over all lines."""
    with opened(path) as file:
        if json_array.BEGIN.match(file.peek(CHUNK)):
            for number, row in enumerate(json_array.values(file, str(path)), 1):
                yield f"{path}:{number}", attempt(_row, row)
            return
        for where, line in lines_of(file, str(path), decoder or Decoder()):
            if isinstance(line, ValueError):
                yield where, line
            elif line.strip():
                yield where, attempt(_row_of_line, line)


def _row_of_line(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    # A number of more than 4300 digits is a plain ValueError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"invalid JSON: {error}") from None
    return _row(value)


def _row(value: Any) -> dict[str, Any]:
    """Return a JSON value as a row; the columns of a list of texts are "1", "2", .."""
    if isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value):
        return {str(place): text for place, text in enumerate(value, 1)}
    if not isinstance(value, dict):
        raise ValueError(f"expected an object or a list of texts, got {type(value).__name__}")
    bounds.check_names(list(value))
    return value


def _csv(path: Path, header: bool) -> Iterator[Row]:
    """Yield rows of RFC 4180. An empty cell is None."""
    # Documents over 128 Ki characters are errors by default.
    csv.field_size_limit(bounds.LINE)
    with opened(path) as file:
        # Bytes that are not UTF-8 come as lone surrogates, which UTF-8 itself cannot hold.
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        reader = csv.reader(bounds.lines(text, str(path)), strict=True)
        names: list[str] = []
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                reason = str(error)
                if "unexpected end" in reason or "field limit" in reason:
                    reason = "a quote that begins here is not closed"
                yield where, ValueError(f"not csv: {reason}")
                continue
            if not cells:
                continue
            if not names:
                names = column_names(cells, header, where)
                if header:
                    continue
            yield where, attempt(_record, names, cells)


def _tsv(path: Path, header: bool) -> Iterator[Row]:
    """Yield rows of a line each. A quote is a character, unless it encloses a whole cell."""
    names: list[str] = []
    with opened(path) as file:
        for number, data in enumerate(bounds.lines(file, str(path)), 1):
            where = f"{path}:{number}"
            line = data.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
            line = line.removesuffix("\n").removesuffix("\r")
            if not line:
                continue
            cells = [_unquoted(cell) for cell in line.split("\t")]
            if not names:
                names = column_names(cells, header, where)
                if header:
                    continue
            if len(cells) != len(names) and '"' in line:
                with contextlib.suppress(csv.Error):  # A tab within quotes.
                    cells = next(csv.reader([line], delimiter="\t", strict=True))
            yield where, attempt(_record, names, cells)


def _unquoted(cell: str) -> str:
    """Return a cell without quotes that enclose all of it, and with doubled quotes inside single.

    A cell whose inner quotes are not doubled was not quoted by a program, and stays as it is.
    """
    if len(cell) < 2 or not cell.startswith('"') or not cell.endswith('"'):
        return cell
    inner = cell[1:-1].replace('""', "\0")
    return cell if '"' in inner else inner.replace("\0", '"')


def column_names(cells: list[str], header: bool, where: str) -> list[str]:
    """Return the names of columns: the cells of a header, or "1", "2", ..

    The first name may be empty, as pandas writes an index.

    Raises:
        ValueError: names that repeat or are empty, or cells that look like data.
    """
    if not header:
        return [str(place) for place in range(1, len(cells) + 1)]
    if isinstance(error := attempt(bounds.check_names, cells), ValueError):
        raise ValueError(f"{where}: header: {error}")
    names = ["(index)" if not place and not cell else cell for place, cell in enumerate(cells)]
    if not all(map(is_text, names)) or len(set(names)) < len(names):
        raise ValueError(f"{where}: header: expected distinct names, got {shown(cells)}")
    for name in names:
        # Names of columns are short words; texts and ids of a first row are not.
        if name.isdecimal() or len(name) > LONGEST_NAME or len(name.split()) > 3:
            raise ValueError(
                f"{where}: header: expected names of columns, got {name[:LONGEST_NAME]!r}; for a "
                "file without a header set header to false and name columns by number, like "
                "columns.query 1"
            )
    return names


def _record(names: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(names):
        raise ValueError(f"expected {len(names)} cells ({', '.join(names)}), got {len(cells)}")
    for name, cell in zip(names, cells, strict=True):
        if SURROGATE.search(cell):
            raise ValueError(f"{name}: expected UTF-8, got {cell[:40]!r}")
    return {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _parquet(path: Path, names: Names, decoder: Decoder) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, room = 0, bounds.most_bytes(path)
    try:
        with pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
            _check_parquet(file.metadata, path)
            for group in range(file.metadata.num_row_groups):
                many = _rows_at_once(file.metadata.row_group(group))
                for batch in map(_plain, file.iter_batches(many, [group], names)):
                    room -= batch.nbytes
                    if room < 0:
                        raise bounds.too_large(path)
                    for row in from_arrow(batch, decoder):
                        number += 1
                        yield f"{path}:{number}", row
    except (pa.ArrowException, OSError) as error:
        where = f"{path}: after row {number}" if number else path
        raise ValueError(f"{where}: not parquet: {str(error).splitlines()[0]}") from None


def _check_parquet(about: "pq.FileMetaData", path: Path) -> None:
    """Raise ValueError for more columns, or larger parts, than a file of this size can have."""
    try:
        bounds.check_names(about.schema.names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for group in map(about.row_group, range(about.num_row_groups)):
        if group.total_byte_size > bounds.most_bytes(path):
            raise bounds.too_large(path)


def _rows_at_once(group: "pq.RowGroupMetaData") -> int:
    """Return how many rows of a group become Arrow at once.

    A value that a column's dictionary holds once may be in each of them.
    """
    columns = map(group.column, range(group.num_columns))
    longest = max((c.total_uncompressed_size for c in columns if _is_dictionary(c)), default=1)
    return max(1, min(MANY, WIDE // max(1, longest)))


def _plain(batch: "pa.RecordBatch") -> "pa.RecordBatch":
    """Return a batch whose columns repeat the values of their dictionaries."""
    import pyarrow as pa

    kinds = map(pa.types.is_dictionary, batch.schema.types)
    columns = [c.dictionary_decode() if d else c for c, d in zip(batch.columns, kinds, strict=True)]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _is_dictionary(column: "pq.ColumnChunkMetaData") -> bool:
    """Return whether most of a column's bytes are its dictionary."""
    if not column.has_dictionary_page:
        return False
    size = column.data_page_offset - column.dictionary_page_offset
    return 2 * size > column.total_compressed_size


def from_arrow(
    batch: "pa.RecordBatch | pa.Table", decoder: Decoder
) -> Iterator[dict[str, Any] | ValueError]:
    """Yield rows of Arrow's columns; a row of invalid UTF-8 is an error."""
    try:
        yield from batch.to_pylist()
    # Arrow does not check UTF-8, so the invalid row has to be searched.
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            yield attempt(_arrow_row, batch.slice(i, 1), decoder)


def _arrow_row(row: "pa.RecordBatch | pa.Table", decoder: Decoder) -> dict[str, Any]:
    values = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            values[name] = column[0].as_py()
        except UnicodeDecodeError as error:
            values[name] = decoder.decode(error.object)
    return values

"""Read texts to encode: lines, or a column of a table, as a stream."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import readers
from .beir import titled
from .paths import SUFFIXES, suffix_of
from .readers import Decoder


@dataclass
class TextReader:
    """Texts of a file in order: its lines, or a column of a table, read as a stream.

    Tables are .jsonl, .json, .csv, .tsv and .parquet; all files but .parquet may be compressed.

    path: "-" is standard input, read as lines. column: of a table; "" is the column `text`, each
    text after its `title` if rows have one, without outer white space, as BEIR's documents are.
    invalid: as in `Decoder`. An empty line is a text, but is skipped in a table.

    Raises, while it is read:
        ValueError: invalid UTF-8, json, csv or parquet, or a value that is not a string, by file,
            line and reason.
    """

    path: str = "-"
    column: str = ""
    invalid: str = "error"

    def __post_init__(self) -> None:
        self._decoder = Decoder(self.invalid, "; --invalid replace puts U+FFFD there")

    @property
    def replaced(self) -> int:
        """Number of U+FFFD put in place of invalid text so far."""
        return self._decoder.replaced

    @property
    def table(self) -> bool:
        """Whether texts are a column of a table."""
        return suffix_of(Path(self.path)) in SUFFIXES

    @property
    def columns(self) -> list[str]:
        """Columns of a table that are read; the first has to exist."""
        return [self.column] if self.column else ["text", "title"]

    def __iter__(self) -> Iterator[str]:
        if self.table:
            rows = readers.of_file(Path(self.path), self.columns, self._decoder)
            return (self._text(row, where) for where, row in readers.strict(rows))
        if self.path == "-":
            source = readers.lines_of(sys.stdin.buffer, "standard input", self._decoder)
        else:
            source = readers.lines(self.path, self._decoder)
        return (text for _, text in readers.strict(source))

    def check(self) -> str:
        """Return what was understood of the file: its columns, used and unused, "" for lines.

        Raises:
            ValueError: the file or its column does not exist.
        """
        path = Path(self.path)
        if self.path == "-":
            return ""
        # A named pipe, like a shell's <(..), exists but is not a regular file.
        if not path.exists() or path.is_dir():
            problem = "a directory" if path.is_dir() else "which does not exist"
            raise ValueError(f"input: expected a file, got {self.path}, {problem}")
        if not self.table or not path.is_file():
            return ""
        if suffix_of(path) == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                names = pq.read_schema(path).names
            except (pa.ArrowException, OSError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"{self.path}: not parquet: {reason}") from None
        else:
            _, first = next(readers.of_file(path), ("", {}))
            names = list(first) if isinstance(first, dict) else []
        # In .json columns may begin in later rows.
        if self.columns[0] not in names and names and suffix_of(path) not in (".json", ".jsonl"):
            got = ", ".join(names)
            raise ValueError(
                f"{self.path}: expected a column {self.columns[0]!r}, got {got}; --column names it"
            )
        used = [name for name in reversed(self.columns) if name in names]
        unused = ", ".join(name for name in names if name not in used)
        return f"text={'+'.join(used) or self.columns[0]}; unused: {unused or 'none'}"

    def _text(self, row: dict[str, Any], where: str) -> str:
        column, *titles = self.columns
        value = row.get(column)
        if value is None and suffix_of(Path(self.path)) in (".csv", ".tsv"):
            value = ""  # An empty cell is an empty text.
        if not isinstance(value, str):
            got = "none" if value is None else type(value).__name__
            raise ValueError(f"{where}: {column}: expected a string, got {got}")
        if titles and titles[0] in row:
            title = row[titles[0]]
            value = titled(title if isinstance(title, str) else "", value)
        return self._decoder.check(value, f"{where}: {column}")


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

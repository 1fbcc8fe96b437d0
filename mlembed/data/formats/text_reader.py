"""Read texts to encode: lines, or a column of a table, as a stream."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import readers
from .paths import SUFFIXES, suffix_of
from .readers import Decoder


@dataclass
class TextReader:
    """Texts of a file in order: its lines, or a column of a table, read as a stream.

    Tables are .jsonl, .json, .csv, .tsv and .parquet; all files but .parquet may be compressed.

    path: "-" is standard input, read as lines. column: of a table. invalid: as in `Decoder`. An
    empty line is a text, but is skipped in a table.

    Raises, while it is read:
        ValueError: invalid UTF-8, json, csv or parquet, or a value that is not a string, by file,
            line and reason.
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

    @property
    def table(self) -> bool:
        """Whether texts are a column of a table."""
        return suffix_of(Path(self.path)) in SUFFIXES

    def __iter__(self) -> Iterator[str]:
        if self.table:
            rows = readers.of_file(Path(self.path), [self.column], self._decoder)
            return (self._text(row, where) for where, row in readers.strict(rows))
        if self.path == "-":
            source = readers.lines_of(sys.stdin.buffer, "standard input", self._decoder)
        else:
            source = readers.lines(self.path, self._decoder)
        return (text for _, text in readers.strict(source))

    def check(self) -> None:
        """Raise ValueError if the file or its column does not exist."""
        path = Path(self.path)
        if self.path == "-":
            return
        # A named pipe, like a shell's <(..), exists but is not a regular file.
        if not path.exists() or path.is_dir():
            problem = "a directory" if path.is_dir() else "which does not exist"
            raise ValueError(f"input: expected a file, got {self.path}, {problem}")
        if suffix_of(path) in (".csv", ".tsv") and path.is_file():
            _, first = next(readers.of_file(path), ("", {self.column: ""}))
            self._check_column(first if isinstance(first, dict) else {self.column: ""})
        if suffix_of(path) == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                self._check_column(pq.read_schema(path).names)
            except (pa.ArrowException, OSError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"{self.path}: not parquet: {reason}") from None

    def _check_column(self, names: Iterable[str]) -> None:
        if self.column not in names:
            got = ", ".join(names)
            raise ValueError(
                f"{self.path}: expected a column {self.column!r}, got {got}; --column names it"
            )

    def _text(self, row: dict[str, Any], where: str) -> str:
        value = row.get(self.column)
        if value is None and suffix_of(Path(self.path)) in (".csv", ".tsv"):
            value = ""  # An empty cell is an empty text.
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

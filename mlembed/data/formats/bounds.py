"""Bounds on foreign files, so that no line, header or compressed file takes all memory or time."""

import io
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, AnyStr

LINE = 2**26  # Bytes of a line or a row. A book with its hard negatives has a tenth of that.
COLUMNS, NAME = 1000, 200  # Columns of a file, and characters of a column's name.
# A compressed file may hold this number of times its own bytes, and in any case LINE bytes. Text
# holds 3 to 20 times, a file that was made to fill a disk 1000 times or more.
EXPANSION = 100

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 100


def shown(value: Any) -> str:
    """Return a value for a message: its beginning, where it is long or deep."""
    return _REPR.repr(value)


def lines(file: IO[AnyStr], name: str) -> Iterator[AnyStr]:
    """Yield the lines of an open file, with their ends.

    Raises:
        ValueError: a line of more than LINE bytes, or characters of a text file, by name:line.
    """
    number = 0
    while line := file.readline(LINE + 1):
        number += 1
        if len(line) > LINE:
            raise ValueError(
                f"{name}:{number}: expected lines of at most {LINE >> 20} MiB, got a longer one"
            )
        yield line


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for too many columns, or a name that is too long."""
    if len(names) > COLUMNS:
        raise ValueError(f"expected at most {COLUMNS} columns, got {len(names)}")
    for name in names:
        if len(name) > NAME:
            raise ValueError(
                f"expected column names of at most {NAME} characters, got {shown(name)}"
            )


def most_bytes(path: Path | str) -> int:
    """Return how many bytes a compressed file may hold."""
    return max(LINE, EXPANSION * Path(path).stat().st_size)


def too_large(path: Path | str) -> ValueError:
    """Return the error of a file that holds more."""
    return ValueError(
        f"{path}: expected at most {EXPANSION} times its size when decompressed, got more; a file "
        "that is not compressed has no such limit"
    )


class Decompressed(io.RawIOBase):
    """The decompressed bytes of a file.

    Raises, while it is read:
        ValueError: there are more than `most_bytes`.
    """

    def __init__(self, file: Any, path: Path | str) -> None:
        self.file, self.path, self.room = file, path, most_bytes(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = int(self.file.readinto(buffer))
        self.room -= count
        if self.room < 0:
            raise too_large(self.path)
        return count

    def close(self) -> None:
        self.file.close()
        super().close()

"""Read a JSON array value by value, so that memory does not grow with the file."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from .bounds import LINE

CHUNK = 2**20  # bytes read at once
# The beginning of a file: an array of rows, or an array that goes over several lines.
BEGIN = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[(?:\s*[\[{]|[ \t]*\r?\n)")
SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()


class _Text:
    """A file's text, of which text[at:] is in memory and not yet parsed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.read = "", 0, 0

    def more(self) -> bool:
        """Read on. Return False at the end of the file. UnicodeError: invalid UTF-8."""
        data = self.file.read(max(CHUNK, len(self.text) - self.at))
        before = len(self.decoder.getstate()[0])
        try:
            decoded = self.decoder.decode(data, not data)
        except UnicodeDecodeError as error:
            place = self.read - before + error.start
            byte = f"byte 0x{error.object[error.start]:02x} at {place}"
            raise UnicodeError(f"expected UTF-8, got {byte}") from None
        self.read += len(data)
        self.text, self.at = self.text[self.at :] + decoded, 0
        return bool(data)

    def next(self) -> str:
        """Return the next character but white space, "" at the end of the file."""
        while True:
            match = SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def value(self) -> Any:
        """Return the next value. ValueError: invalid JSON, or more than LINE characters."""
        self.next()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                reason = ""
            except json.JSONDecodeError as error:
                reason = error.msg
            # Too deep, or a number of more than 4300 digits.
            except (ValueError, RecursionError) as error:
                raise ValueError(f"invalid JSON: {error}") from None
            if not reason and end < len(self.text):
                self.at = end
                return value
            if len(self.text) - self.at > LINE:
                raise ValueError(f"expected rows of at most {LINE >> 20} MiB, got a longer one")
            # The value may continue, or have failed because it does.
            if not self.more():
                if reason:
                    raise ValueError(f"invalid JSON: {reason}")
                self.at = len(self.text)
                return value


def values(file: BinaryIO, name: str) -> Iterator[Any]:
    """Yield the values of an array from an open file that begins with "[".

    Raises:
        ValueError: invalid UTF-8 or JSON, a value of more than LINE characters, by name:number.
    """
    source, number = _Text(file), 1
    try:
        source.next()
        source.at += 1
        mark = source.next()
        while mark != "]":
            value = source.value()
            if (mark := source.next()) not in (",", "]"):
                raise ValueError("invalid JSON: expected ',' or ']' after it")
            yield value
            number += 1
            if mark == ",":
                source.at += 1
        source.at += 1
        if source.next():
            raise ValueError("invalid JSON: expected nothing after the array, got text")
    except UnicodeError as error:  # It may be in any of the next rows.
        raise ValueError(f"{name}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name}:{number}: {error}") from None

"""One-line errors of commands. Imports no torch, so that mistakes are answered quickly."""

import errno
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError
from tqdm import tqdm

from . import process

# Characters that turn the direction of the text around them.
TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}  # Error numbers of a full disk.


def printable(text: str) -> str:
    """Return text with the characters escaped that would steer a terminal, or turn its line.

    These are control characters, line and paragraph separators, lone surrogates, and overrides of
    the writing direction; the newline, the tab and every other character stay. Escapes are those of
    JSON, so a line of JSON keeps its value.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(char) for char in text)


def _escaped(char: str) -> str:
    odd = unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in TURNS
    return f"\\u{ord(char):04x}" if odd and char not in "\n\t" else char


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an error that a user can cause as one line and exit with status 1.

    Ctrl-C exits with status 130, and a reader of the output that is gone (`| head`) without a line
    with status 141, like a command that SIGPIPE ends. With MLEMBED_TRACEBACK set, errors keep their
    traceback.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        process.check_stopped()
        if isinstance(error, BrokenPipeError) and process.drop_broken_streams():
            sys.exit(141)
        if not is_users(error) or os.environ.get("MLEMBED_TRACEBACK"):
            raise
        print_line(error)
        sys.exit(1)


def is_users(error: BaseException) -> bool:
    """Return whether a user can cause the error, which is then told in one line."""
    return isinstance(error, ValueError | OSError | SafetensorError) or out_of_memory(error)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an allocator, torch's of the device or of the host or Python's, failed."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def print_line(error: BaseException, place: str = "") -> None:
    """Print an error as one line on standard error. place: says where it happened."""
    reason = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        reason = f"{error.filename}: {error.strerror}"
    elif isinstance(error, OSError) and error.errno in FULL:  # Other writers name their file.
        reason = f"standard output: {error.strerror}"
    if out_of_memory(error) and not isinstance(error, ValueError):
        reason = f"memory: out of memory{': ' * bool(reason)}{reason}"
    if not is_users(error):
        reason = f"{type(error).__name__}: {reason}"
    tqdm.write(f"error: {place}{printable(' '.join(reason.split()))}", file=sys.stderr)

"""One-line errors of commands. Imports no torch, so that mistakes are answered quickly."""

import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError
from tqdm import tqdm

# Characters that turn the direction of the text around them.
TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


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

    Ctrl-C exits with status 130. With MLEMBED_TRACEBACK set, errors keep their traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, SafetensorError, MemoryError) as error:
        if os.environ.get("MLEMBED_TRACEBACK"):
            raise
        reason = str(error) or "out of memory"
        if isinstance(error, OSError) and error.filename is not None:
            reason = f"{error.filename}: {error.strerror}"
        tqdm.write(f"error: {printable(' '.join(reason.split()))}", file=sys.stderr)
        sys.exit(1)

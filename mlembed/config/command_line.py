"""Read arguments with tyro, whose mistakes become errors of one line. Imports no torch."""

import contextlib
import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from ..runtime.process import Stopped

TITLES = "Value error|Required options|Unrecognized options|Invalid choice|Missing argument"
NONE_OR = r"no type matching \{None\}\|%s could be instantiated from \["
WHOLE = rf"(?:invalid literal for int\(\) with base 10: |{NONE_OR % 'INT'})"
NUMBER = rf"(?:could not convert string to float: |{NONE_OR % 'FLOAT'})"
# Changes to the text of tyro's box, one after the other.
CHANGES = (
    (rf"^({TITLES}) ", ""),
    (r" (For full helptext|Argument helptext|Got errors:|Are you sure).*", ""),
    (r" Perhaps you meant: (--[\w.-]+).*", r" (near: \1)"),
    (rf"^Error parsing (\S+): {WHOLE}(.*?)\]?\.?$", r"\1: expected a whole number, got \2"),
    (rf"^Error parsing (\S+): {NUMBER}(.*?)\]?\.?$", r"\1: expected a number, got \2"),
    (
        r"^Error parsing (\S+): Could not find valid parse for arguments:",
        r"\1: expected numbers, got",
    ),
    # tyro reports our own ValueErrors, too.
    (r"^Error parsing \w+: ", ""),
)


def read(target: Any, args: Sequence[str], prog: str, **options: Any) -> Any:
    """Return `tyro.cli(target)`.

    Raises:
        ValueError: a mistake in the arguments.
    """
    import tyro  # Benches read shapes where tyro is not installed.

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(target, args=args, prog=prog, **options)
    except SystemExit as end:
        if end.code == 0 or isinstance(end, Stopped):  # --help, or a signal
            raise
        # tyro draws a box around an error.
        text = " ".join(re.sub("[\u2500-\u257f]+|-{3,}", " ", stderr.getvalue()).split())
        for pattern, new in CHANGES:
            text = re.sub(pattern, new, text)
        raise ValueError(text) from None


def call(function: Callable[..., None], args: Sequence[str], prog: str) -> None:
    """Call a command's function with arguments that `read` reads. Raises what both raise."""

    @functools.wraps(function)
    def bound(*values: Any, **named: Any) -> Callable[[], None]:
        return functools.partial(function, *values, **named)

    read(bound, args, prog)()

"""One-line errors of commands. Imports no torch, so that mistakes are answered quickly."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError
from tqdm import tqdm


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an error that a user can cause as one line and exit with status 1.

    Ctrl-C exits with status 130. With MLEMBED_TRACEBACK set, errors keep their traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, SafetensorError) as error:
        if os.environ.get("MLEMBED_TRACEBACK"):
            raise
        reason = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            reason = f"{error.filename}: {error.strerror}"
        tqdm.write(f"error: {' '.join(reason.split())}", file=sys.stderr)
        sys.exit(1)

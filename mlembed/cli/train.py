"""Train a model: checks the arguments, then runs the train.py of this checkout.

mlembed train RECIPE [--key value ..]
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ..runtime.process import SIGNALS
from ..training import arguments

ROOT = Path(__file__).parents[2]  # of a checkout, or of site-packages


def main(args: Sequence[str]) -> None:
    """Replace this process by `python train.py ARGS`.

    Raises:
        ValueError: a mistake in the arguments; an installation without train.py.
    """
    arguments.parse(args)
    script = ROOT / "train.py"
    if not (script.is_file() and (ROOT / "pyproject.toml").is_file()):
        raise ValueError(
            "train: expected an installation from a checkout, which has train.py, got a wheel: "
            "clone the repository, then `pip install -e .`"
        )
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # The script handles a signal that comes now.
    os.execv(sys.executable, [sys.executable, str(script), *args])

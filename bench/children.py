"""Processes that end with the one that started them, also if that one is killed."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from . import ROOT

PR_SET_PDEATHSIG = 1


def start(command: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
    """Start a command as a process group of its own, in the checkout, with text pipes."""
    return subprocess.Popen(
        command, cwd=ROOT, text=True, start_new_session=True, preexec_fn=die_with_parent, **options
    )


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies; elsewhere it may live on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end(process: "subprocess.Popen[str]") -> None:
    """Kill a process and its group: compilers keep its pipe open. Its own groups end with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

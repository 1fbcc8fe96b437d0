"""One process of a group fails: all end soon, and one line says which and why. Real processes."""

import time

import processes
import pytest

from mlembed.runtime.lock import Owner

CODE = """
import os, signal, time, torch
import torch.distributed as dist
from mlembed.runtime import process
from mlembed.runtime.distributed import main_works, world
from mlembed.runtime.errors import one_line_errors

process.begin(saves=True)
with one_line_errors(), world("cpu") as where:
    dist.all_reduce(torch.ones(1))
    if where.rank == 1:
        {fails}
    {other}
"""
# What the other process does meanwhile: waits in a collective, or for the main process's work, or
# works itself, where signals raise or are held.
OTHERS = {
    "collective": "dist.all_reduce(torch.ones(1))",
    "works": "time.sleep(60)",
    "holds": "with process.hold_signals(): time.sleep(60)",
}
FAILURES = {
    "value": ("raise ValueError('expected good text, got bad')", ": expected good text, got bad"),
    "file": ("open('/nowhere')", ": /nowhere: No such file or directory"),
    "memory": ("torch.empty(10**15)", ": memory: out of memory: "),
    "bug": ("raise KeyError('x')", ": KeyError: 'x'"),
}
CASES = [
    ("value", "collective"),
    ("file", "works"),
    ("memory", "holds"),
    ("bug", "collective"),
]


def failed(fails, other, status=1):
    """Return the lines on standard error of a group that fails, and the seconds that it took."""
    processes.run("-c", "")  # starts the warm parent, if it does not run
    began = time.monotonic()
    done = processes.run("-c", CODE.format(fails=fails, other=other), processes=2)
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    return lines, time.monotonic() - began


@pytest.mark.parametrize(("failure", "other"), CASES)
def test_an_error_of_one_process(failure, other):
    fails, reason = FAILURES[failure]
    lines, seconds = failed(fails, OTHERS[other])
    assert lines[0].startswith(f"error: rank 1 on {Owner().host}{reason}")
    if failure == "bug":
        assert lines[1].startswith("Traceback") and lines[-1] == "KeyError: 'x'"
        assert sum(line.startswith("Traceback") for line in lines) == 1
    else:
        assert len(lines) == 1
    assert seconds < 30  # The other process would work for twice as long.


def test_a_process_that_is_killed():
    lines, _ = failed("os.kill(os.getpid(), signal.SIGKILL)", OTHERS["collective"])
    (line,) = lines
    assert line.startswith(f"error: rank 1 on {Owner().host} (process ")
    assert line.endswith(" was killed, most likely for memory")


def test_an_error_of_the_main_process_while_others_wait_for_it():
    wait = "with main_works(where, 'x'): where.main and open('/nowhere')"
    lines, seconds = failed("pass", wait)
    assert lines == [f"error: rank 0 on {Owner().host}: /nowhere: No such file or directory"]
    assert seconds < 30


def test_an_error_of_all_processes_is_told_once():
    lines, _ = failed("pass", "raise ValueError('expected good text, got bad')")
    (line,) = lines
    assert line.endswith(": expected good text, got bad")


def test_a_signal_to_one_process_ends_all():
    lines, _ = failed("os.kill(os.getpid(), signal.SIGTERM)", OTHERS["works"], 130)
    assert lines == [f"rank 1 on {Owner().host}: stopped by a signal"]

"""A killed process of the loader is explained in one line, and no process outlives the run."""

import os
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE

import pytest
from factories import SMALL, small_text
from processes import started

from mlembed.runtime import intact


def in_session(leader):
    """Return the processes of a session by id, with their parents' ids."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(words[3]) == leader and words[0] != "Z":
            found[int(path.parent.name)] = int(words[1])
    return found


def wait_until(true, seconds, what):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.mark.parametrize("victim", ["worker", "server", "main"])
def test_a_killed_process_of_the_loader(tmp_path, victim):
    args = ["tiny", *SMALL, "--data", *small_text(tmp_path), "--output-dir", tmp_path]
    args += ["--steps", 100_000, "--save-every", 5, "--tracker", "none", "--loader-workers", 1]
    args += ["--eval", tmp_path / "dev.jsonl"]
    checkpoints = tmp_path / "tiny" / "checkpoints"
    with started([sys.executable, "train.py", *args], stdout=PIPE, stderr=PIPE) as process:
        wait_until(lambda: list(checkpoints.glob("step_*")), 120, "no checkpoint")
        session = in_session(process.pid)
        (worker,) = (
            pid for pid, parent in session.items() if parent in session.keys() - {process.pid}
        )
        pids = {"worker": worker, "server": session[worker], "main": process.pid}
        os.kill(pids[victim], signal.SIGKILL)
        if victim != "main":
            _, err = process.communicate(timeout=120)
            assert process.returncode == 1
            assert "error: loader: a process that prepares batches was killed" in err
            assert "Traceback" not in err
            assert intact.newest(checkpoints)
        else:
            process.wait()
        # Soon, even on a machine that is busy otherwise.
        wait_until(lambda: not in_session(process.pid), 10, "a process is left")

"""A killed process of the loader is explained in one line, and no process outlives the run."""

import os
import signal
import sys
import time
from subprocess import PIPE

import pytest
from factories import SMALL, small_text
from processes import session, started

from mlembed.runtime import intact


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
        pids = session(process.pid)
        (worker,) = (pid for pid, parent in pids.items() if parent in pids.keys() - {process.pid})
        victims = {"worker": worker, "server": pids[worker], "main": process.pid}
        os.kill(victims[victim], signal.SIGKILL)
        if victim != "main":
            _, err = process.communicate(timeout=120)
            assert process.returncode == 1
            assert "error: loader: a process that prepares batches was killed" in err
            assert "Traceback" not in err
            assert intact.newest(checkpoints)
        else:
            process.wait()
        # Soon, even on a machine that is busy otherwise.
        wait_until(lambda: not session(process.pid), 10, "a process is left")

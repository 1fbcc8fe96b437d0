"""Every kernel as it is launched, compiled ahead of time for sm_90a: what no CPU run can show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[1] / "hopper.py"


def hopper(*args: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", SCRIPT, *args]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_each_kernel_compiles_for_hopper():
    """One launch of each kernel; `make test-toolchains` compiles all of them."""
    done = hopper("--quick", "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert " 23 launches of 23 kernels, 0 violations" in done.stdout


@pytest.mark.slow
def test_every_launch_compiles_for_hopper():
    """Compile what `make test-toolchains` does, with the Triton that is installed."""
    done = hopper()
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]

"""Every kernel as it is launched, compiled ahead of time for sm_90a: what no CPU run can show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[1] / "hopper.py"


def hopper(*args: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", SCRIPT, *args]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_each_kernel_compiles_for_hopper():
    """One launch of each kernel; `make test-toolchains` compiles all of them."""
    done = hopper("--quick", "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert " 24 launches of 24 kernels, 0 violations" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "100"])
def test_each_kernel_compiles_for_the_generations_before_and_after(arch):
    """Kernels spill there as much as a table in tests/hopper.py allows, with Triton 3.7.1."""
    if triton.__version__ != "3.7.1":
        pytest.skip("the table is of Triton 3.7.1")
    done = hopper("--quick", "--arch", arch)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert " 22 launches of 22 kernels, 0 violations" in done.stdout


@pytest.mark.slow
def test_every_launch_compiles_for_hopper():
    """Compile what `make test-toolchains` does, with the Triton that is installed."""
    done = hopper()
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]

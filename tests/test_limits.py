"""Limits of a session in tests/limits.py: its time and its processes."""

import processes
import pytest

LEAK = """
import subprocess, time
def test_leak():
    subprocess.Popen(["sleep", "60"])
    time.sleep(0.2)  # until it has a command line
"""


def session(path, code, *options):
    """Run pytest with our hooks on a file of this code."""
    path.write_text(code)
    ours = "-p", "limits", "-c", processes.ROOT / "pyproject.toml", "--rootdir", path.parent
    return processes.run("-m", "pytest", *ours, *options, path)


@pytest.mark.parametrize("minutes, code", [(0, 1), (10, 0)])
def test_a_session_may_not_take_longer(minutes, code, tmp_path):
    done = session(tmp_path / "test_it.py", "def test(): pass", "--minutes", minutes)
    assert done.returncode == code and "1 passed" in done.stdout, done.stdout + done.stderr
    assert ("expected the tests to take at most 0.0 minutes" in done.stdout) == (code == 1)
    assert done.stdout.splitlines()[-1].endswith("CPU seconds")


def test_a_process_that_outlives_its_tests_is_an_error(tmp_path):
    done = session(tmp_path / "test_it.py", LEAK)
    assert done.returncode == 1 and "1 passed" in done.stdout, done.stdout + done.stderr
    assert "1 error" in done.stdout and "sleep 60" in done.stdout
    assert "expected no process to outlive its tests" in done.stdout

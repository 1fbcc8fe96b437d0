"""Hooks for a whole session of tests: its time and its processes."""

import os
import resource
import signal
import time
from collections.abc import Iterator

import processes
import pytest

STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="fail if the tests take longer than this")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    processes.stop_server()
    if _too_long(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if _too_long(config):
        most = config.getoption("minutes")
        terminalreporter.write_line(f"expected the tests to take at most {most} minutes", red=True)


def _too_long(config: pytest.Config) -> bool:
    """Return whether the session, on the process that prints, has taken longer than allowed."""
    most = config.getoption("minutes")
    if most is None or hasattr(config, "workerinput"):
        return False
    return time.monotonic() - STARTED > 60 * most


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print the processor time of this process and of all that it has started and waited for."""
    if not hasattr(config, "workerinput"):
        usage = [
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        print(f"{sum(u.ru_utime + u.ru_stime for u in usage):.0f} CPU seconds")


@pytest.fixture(autouse=True, scope="module")
def no_child_is_left() -> Iterator[None]:
    """Kill processes that outlive the tests of their file, and fail."""
    before = processes.children()
    yield
    left = {pid: name for pid, name in processes.children().items() if pid not in before}
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"expected no process to outlive its tests, got {left}"

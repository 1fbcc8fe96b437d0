"""One-line errors of commands."""

from pathlib import Path

import processes
import pytest
from safetensors import safe_open

from mlembed.runtime.errors import one_line_errors


def safetensors_error():
    safe_open("/dev/null", "pt")


def os_error():
    Path("/no/such/file").read_text()


@pytest.mark.parametrize(
    "error, message",
    [
        (ValueError("steps: expected\n  more"), "error: steps: expected more"),
        (OSError("disk is gone"), "error: disk is gone"),
        (os_error, "error: /no/such/file: No such file or directory"),
        (safetensors_error, "error: "),
    ],
)
def test_user_errors_are_one_line(error, message, capsys, monkeypatch):
    monkeypatch.delenv("MLEMBED_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as exit, one_line_errors():
        if callable(error):
            error()
        raise error
    assert exit.value.code == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert printed.out == "" and line.startswith(message) and len(line) > len("error: ")


def test_other_errors_pass_through(monkeypatch):
    """Assertions keep their traceback; MLEMBED_TRACEBACK keeps that of every error."""
    with pytest.raises(AssertionError, match="ours"), one_line_errors():
        raise AssertionError("ours")
    monkeypatch.setenv("MLEMBED_TRACEBACK", "1")
    with pytest.raises(ValueError, match="theirs"), one_line_errors():
        raise ValueError("theirs")


def test_ctrl_c_prints_nothing(capsys):
    with pytest.raises(SystemExit) as exit, one_line_errors():
        raise KeyboardInterrupt
    assert exit.value.code == 130 and capsys.readouterr().err == ""


def test_exit_status_of_a_process():
    code = "from mlembed.runtime.errors import one_line_errors\n"
    code += "with one_line_errors(): raise ValueError('a ሰላም\\nb')"
    done = processes.run("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: a ሰላም b\n")

"""One-line errors of commands."""

import json
from pathlib import Path

import processes
import pytest
from safetensors import safe_open

from mlembed.runtime.errors import one_line_errors, printable


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
    code = "from mlembed.runtime.errors import one_line_errors, printable\n"
    code += "with one_line_errors(): raise ValueError('a ሰላም\\nb')"
    done = processes.run("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: a ሰላም b\n")


def test_printable_text():
    """Escapes are for characters that steer a terminal; letters stay, and JSON keeps its value."""
    assert (
        printable("a\x1b[2Jb\r\x9b\x07\u2028\u202e") == r"a\u001b[2Jb\u000d\u009b\u0007\u2028\u202e"
    )
    same = "বুধবার, mi\u200cخواهم 👨\u200d👩 比利时\tа\n"
    assert printable(same) == same
    line = json.dumps({"name": "\x9b\u202e"}, ensure_ascii=False)
    assert json.loads(printable(line)) == json.loads(line)


def test_errors_do_not_steer_the_terminal(capsys):
    with pytest.raises(SystemExit), one_line_errors():
        raise ValueError("name: got \x1b]0;title\x07")
    assert capsys.readouterr().err == "error: name: got \\u001b]0;title\\u0007\n"

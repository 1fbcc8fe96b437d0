"""Signals and standard streams of a command, in real processes that import nothing large."""

import os
import signal
import subprocess
import sys
import time
from subprocess import PIPE

import pytest
from processes import ROOT, started

from mlembed.runtime.process import NAMES

HEAD = "import os, signal, sys, time\nfrom mlembed.runtime import process\n"


def python(code, **options):
    """Start code after `begin`, which prints "ready" first."""
    return started([sys.executable, "-c", HEAD + code], stdout=PIPE, stderr=PIPE, **options)


def signalled(process, *names):
    """Wait for "ready", send signals, and return status and both streams."""
    assert process.stdout.readline() == "ready\n"
    for name in names:
        process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def line(name):
    return f"got {name}, stopping; a second signal stops at once\n"


WAIT = """
process.begin(saves=SAVES)
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    print("cleaned", flush=True)
"""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("saves", [False, True])
def test_a_signal_cleans_up(name, saves):
    with python(WAIT.replace("SAVES", str(saves))) as process:
        status = 130 if saves else 128 + getattr(signal, name)
        assert signalled(process, name) == (status, "cleaned\n", line(name))


def test_a_signal_in_a_callback_is_not_lost():
    """Python swallows what a weak reference's callback raises."""
    code = """
import weakref
process.begin()
class Thing: pass
thing = Thing()
reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
try:
    del thing
    time.sleep(60)
finally:
    print("cleaned", flush=True)
"""
    with python(code) as process:
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (143, "cleaned\n", line("SIGTERM"))


def test_a_second_signal_ends_at_once():
    """Cleaning up takes longer here than anybody waits; signals of one moment are one."""
    slow = WAIT.replace("SAVES", "True").replace("finally:", "finally:\n    time.sleep(60)")
    with python(slow) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == line("SIGTERM")
        time.sleep(1.1)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "") and process.returncode == 130
    both = "signal.pthread_sigmask(signal.SIG_BLOCK, process.SIGNALS)\n"
    both += "for n in (signal.SIGTERM, signal.SIGINT): os.kill(os.getpid(), n)\n"
    both += WAIT.replace("SAVES", "True")  # `begin` unblocks them.
    with python(both) as process:
        out, err = process.communicate(timeout=30)
        assert process.returncode == 130 and err.count("got ") == 1


def test_a_signal_that_is_ignored_stays_ignored():
    """nohup ignores SIGHUP; a background job of a shell ignores Ctrl-C, which ends it even so."""
    begin = "for n in (signal.SIGHUP, signal.SIGINT): signal.signal(n, signal.SIG_IGN)\n"
    code = begin + WAIT.replace("SAVES", "False")
    with python(code) as process:
        assert signalled(process, "SIGHUP", "SIGINT") == (
            130,
            "cleaned\n",
            line("SIGINT"),
        )


HOLD = """
process.begin(saves=True)
with process.hold_signals():
    print("ready", flush=True)
    time.sleep(1)
    print(process.stopping(), flush=True)
    with process.interruptible():
        INSIDE
        print("not interrupted", flush=True)
print("saved", flush=True)
with process.interruptible():
    print("not stopped")
"""


def test_held_signals_are_noted():
    with python(HOLD.replace("INSIDE", "")) as process:
        out = "True\nnot interrupted\nsaved\n"
        assert signalled(process, "SIGUSR1") == (130, out, line("SIGUSR1"))
    with python(HOLD.replace("INSIDE", "signal.raise_signal(signal.SIGTERM)")) as process:
        assert signalled(process) == (130, "False\nsaved\n", line("SIGTERM"))


def test_an_error_that_a_signal_became_is_no_error():
    """Some libraries catch every exception and raise one of their own."""
    code = (
        "from mlembed.runtime.errors import one_line_errors\n"
        "process.begin()\n"
        "with one_line_errors():\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "    except BaseException:\n"
        "        raise ValueError('expected to go on')\n"
    )
    with python(code) as process:
        assert signalled(process, "SIGTERM") == (143, "", line("SIGTERM"))


def test_children_leave_signals_to_their_parent():
    code = """
import subprocess
process.begin()
with process.shield_children():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    print(child.poll())
    child.kill()
"""
    with python(code) as process:
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGTERM)
        assert process.communicate(timeout=30)[0] == "None\n" and process.returncode == 143


# ---- standard streams ----


def test_closed_streams_are_open_and_nobody_elses(tmp_path):
    """A file that is opened later must not get descriptor 1, to which libraries print."""
    code = HEAD + (
        "process.begin()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "print('lost'); print('lost', file=sys.stderr); os.write(1, b'lost')\n"
        "file.write(f'{sys.stdin.read()!r} {file.fileno() > 2}')"
    )
    words = ["sh", "-c", f'exec 0<&- 1>&- 2>&-; exec "{sys.executable}" -c "$1"', "sh", code]
    assert subprocess.run(words, cwd=ROOT).returncode == 0
    assert (tmp_path / "file").read_text() == "'' True"


@pytest.mark.parametrize("arguments", [["--help"], ["encode", "--help"], ["nothing"]])
def test_a_reader_that_is_gone_ends_a_command(arguments):
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "mlembed", *arguments]
    done = subprocess.run(words, cwd=ROOT, stdout=write, stderr=PIPE, text=True)
    os.close(write)
    error = "error: command: expected one of"
    if arguments == ["nothing"]:
        assert done.returncode == 1 and done.stderr.startswith(error)
    else:
        assert (done.returncode, done.stderr) == (141, "")


def test_a_reader_that_is_gone_stops_a_run():
    """A run that saves takes it for SIGHUP, and later output goes nowhere."""
    code = """
process.begin(saves=True)
with process.hold_signals():
    print("ready", flush=True)
    sys.stdin.readline()
    print("lost", flush=True)
    print("lost", flush=True)
    print(process.stopping(), file=sys.stderr)
"""
    with python(code, stdin=PIPE) as process:
        assert process.stdout.readline() == "ready\n"
        process.stdout.close()
        assert process.communicate("\n", timeout=30)[1] == line("SIGHUP") + "True\n"


def test_a_terminal_that_is_closed(tmp_path):
    """Its signal stops the run; what is written to it later is no error."""
    code = HEAD + (
        "process.begin(saves=True)\n"
        "with process.hold_signals():\n"
        "    print('ready', flush=True)\n"
        "    while not process.stopping(): time.sleep(0.01)\n"
        "    time.sleep(0.2)\n"
        "    print('lost', flush=True); print('lost', file=sys.stderr, flush=True)\n"
        f"    open({str(tmp_path / 'file')!r}, 'w').write('saved')"
    )
    leader, follower = os.openpty()
    words = [sys.executable, "-c", code]
    with started(words, stdin=follower, stdout=follower, stderr=follower) as process:
        os.close(follower)
        assert os.read(leader, 5) == b"ready"
        os.close(leader)
        process.send_signal(signal.SIGHUP)
        assert process.wait(30) == 0
    assert (tmp_path / "file").read_text() == "saved"

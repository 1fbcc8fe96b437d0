"""A command as a process: the signals that end it, and its standard streams.

`begin` comes first in a command and imports nothing large, so that a signal is handled from the
start. The first signal raises Stopped, so that `finally` blocks remove files that are half written;
a second one ends the process at once. Inside `hold_signals` the first signal is only noted.
"""

import _thread
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO

# Signals whose default is to end the process, and which people, terminals and schedulers send.
NAMES = "SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU"
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class Stopped(SystemExit):
    """A signal ends the process; `code` is its exit status."""


class _State:
    """State of this process's signals.

    saves: whether the process saves its work, so that any signal ends it with status 130. since,
    number: when the first signal came, in seconds of `time.monotonic`, and which. held: whether
    signals are only noted. raised: whether Stopped was raised, to end the process. quiet: whether
    no line tells of a signal. terminals: standard streams that were terminals at the start.
    """

    saves = False
    since: float | None = None
    number = 0
    held = False
    raised = False
    quiet = False
    terminals: tuple[int, ...] = ()


_state = _State()


def begin(saves: bool = False) -> None:
    """Handle signals, and open standard streams that are closed as /dev/null.

    A signal that was ignored, like SIGHUP under nohup, stays ignored; but for SIGINT, which shells
    ignore in background jobs. Several processes of a group print no line about a signal.

    Args:
        saves: the exit status after a signal is 130, not 128 and the signal's number, and a
            standard stream whose reader is gone counts as SIGHUP, not as an error.
    """
    _state.saves, _state.since, _state.held, _state.raised = saves, None, False, False
    _state.quiet = int(os.environ.get("WORLD_SIZE", 1)) > 1
    for number in SIGNALS:
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            _open_null(fd)
            setattr(sys, name, os.fdopen(fd, "w" if fd else "r", encoding="utf-8", closefd=False))
        elif saves and fd:
            setattr(sys, name, _LastingStream(getattr(sys, name)))
    _state.terminals = tuple(fd for fd in range(3) if os.isatty(fd))
    sys.unraisablehook = _on_swallowed


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _state.since is not None:
        # A terminal and SLURM signal all processes, and torchrun forwards the signal once more.
        if time.monotonic() - _state.since > (2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 1.0):
            os._exit(_status(number))
        return
    _state.since, _state.number = time.monotonic(), number
    if number == getattr(signal, "SIGHUP", None):
        for fd in _state.terminals:  # Writing to a terminal that was closed is an error.
            _open_null(fd)
    if not _state.quiet:
        name = signal.Signals(number).name
        line = f"got {name}, stopping; a second signal stops at once\n"
        # A progress bar leaves the cursor behind itself.
        bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
        with suppress(OSError):  # print() is not safe in a handler that interrupts print().
            os.write(2, ("\n" * bool(bars) + line).encode())
    if not _state.held:
        _raise()


def _on_swallowed(about: Any) -> None:
    """Raise Stopped again a moment later, if it came in a callback that Python lets no error leave.

    A finaliser or a weak reference's callback is one: Python would print the error and go on.
    """
    if not isinstance(about.exc_value, Stopped):
        sys.__unraisablehook__(about)
        return
    _state.since, _state.quiet = None, True
    main = threading.main_thread().ident, _state.number
    threading.Timer(0.01, signal.pthread_kill, main).start()


def _raise() -> NoReturn:
    _state.raised = True
    raise Stopped(_status(_state.number))


def _status(number: int) -> int:
    return 130 if _state.saves else 128 + number


def check_stopped() -> None:
    """Raise Stopped again if it was raised: a library may have raised another error in its place.

    torch.distributed.checkpoint does, for one.
    """
    if _state.raised:
        _raise()


@contextmanager
def hold_signals() -> Iterator[None]:
    """Note a signal in the block instead of raising Stopped; the caller asks `stopping`."""
    before, _state.held = _state.held, True
    try:
        yield
    finally:
        _state.held = before


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a signal end the block. Inside `hold_signals` the program goes on after the block.

    Otherwise a signal that came while signals were held ends the process here.
    """
    held, _state.held = _state.held, False
    try:
        if stopping() and not held:
            _raise()
        yield
    except Stopped:
        if not held:
            raise
        _state.raised = False
    finally:
        _state.held = held


def stopping() -> bool:
    """Return whether a signal has come."""
    return _state.since is not None


def stop() -> None:
    """End this process like a signal does, but without a line; any thread may call it."""
    _state.quiet = True
    if not stopping():
        _thread.interrupt_main(signal.SIGTERM)


@contextmanager
def shield_children() -> Iterator[None]:
    """Block signals for good in processes that start inside, so that their parent ends them.

    A terminal and a scheduler signal all processes of a command, also those that it starts. Signals
    that this process gets meanwhile are delivered after the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- standard streams ----


def _open_null(fd: int) -> None:
    """Make /dev/null the file of a descriptor."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, fd)
    if null != fd:
        os.close(null)
    os.set_inheritable(fd, True)


def drop_broken_streams() -> bool:
    """Send standard streams whose reader is gone to /dev/null; return whether there was one."""
    broken = []
    for fd in (1, 2):
        poll = select.poll()
        poll.register(fd, 0)
        if any(events & select.POLLERR for _, events in poll.poll(0)):
            broken.append(fd)
            _open_null(fd)
    return bool(broken)


class _LastingStream:
    """A standard stream to which writing never fails; a reader that is gone counts as SIGHUP."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._lasting():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lasting():
            self._stream.flush()

    @contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            _open_null(self._stream.fileno())
            if not stopping():
                signal.raise_signal(signal.SIGHUP)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

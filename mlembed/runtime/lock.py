"""One owner of a run's directory, on one machine or on several that share a file system.

`.lock` carries the kernel's lock, which ends with its process, however that ends. `.owner.json`
names the owner; its modification time is a heartbeat, which decides where the kernel's lock cannot:
between machines whose file system does not share locks, and on file systems without locks. The
owner removes both files at its end; a killed owner leaves them behind.
"""

import fcntl
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import files

LOCK, OWNER = ".lock", ".owner.json"
BEAT = 10.0  # Seconds between heartbeats.
STALE = 60.0  # Seconds without a heartbeat after which an owner on another machine is dead.


def _boot() -> str:
    """Return the id that Linux draws when it boots, which containers share, or the host's name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def _namespace() -> int:
    """Return the id of the namespace of process ids; a container has its own."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


@dataclass(frozen=True)
class Owner:
    """A process at work in a directory; by default this one."""

    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)
    since: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))
    boot: str = field(default_factory=_boot)
    namespace: int = field(default_factory=_namespace)

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}"

    def here(self) -> bool:
        """Return whether its ids of processes are this process's, too."""
        return self.boot == _boot() and self.namespace == _namespace()

    def alive(self) -> bool:
        """Return whether its namespace, which is this process's, has a process of its id."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):  # A process of another user.
            pass
        return True

    def seconds_left(self, age: float, locked: bool) -> float:
        """Return the seconds until it counts as dead, 0 if it is dead.

        Args:
            age: seconds since its heartbeat, by the clock of the file system.
            locked: this process has the kernel's lock, so no other process of this machine has it.
        """
        if (locked and self.boot == _boot()) or (self.here() and not self.alive()):
            return 0.0
        # Setting the clock back puts a heartbeat into the future.
        return max(0.0, STALE - abs(age))


class _Busy(Exception):
    """Another process owns the directory.

    left: seconds until its heartbeat is too old, None if it has the kernel's lock.
    """

    def __init__(self, owner: Owner | None, left: float | None = None) -> None:
        self.owner, self.left = owner, left

    def __str__(self) -> str:
        if self.left is None:
            return str(self.owner or "a process that has just begun")
        wait = f"without a heartbeat it counts as dead in {self.left:.0f} s"
        return f"{self.owner or 'an unknown process'}; {wait}"

    @property
    def rebooted(self) -> bool:
        """Whether the owner ran before a reboot of this machine, or runs on another of its name."""
        owner, here = self.owner, Owner()
        return owner is not None and owner.host == here.host and owner.boot != here.boot


@contextmanager
def owned(
    directory: Path, patience: float = 0.0, say: Callable[[str], None] = print
) -> Iterator[Callable[[], None]]:
    """Own a directory until the end of the block; make it if it is missing.

    Yields a function that raises ValueError if the directory has been deleted, or if a process of
    another machine has taken it over since this one sent no heartbeat for a minute. A directory
    that was made here and holds nothing is removed at the end.

    Args:
        patience: seconds to wait for another owner to end; after a reboot a minute at least.
        say: called with a line before it waits.

    Raises:
        ValueError: another process owns the directory, or the disk is full.
        OSError: the directory cannot be written to.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    end, waiting = time.monotonic() + patience, False
    while True:
        try:
            lock, signature = _acquire(directory)
            break
        except _Busy as busy:
            if busy.rebooted and not waiting:
                end = max(end, time.monotonic() + STALE + 1)
            if time.monotonic() >= end:
                raise ValueError(f"expected no run at work in {directory}, got {busy}") from None
            if not waiting:
                say(f"{directory}: waiting for {busy}")
            waiting = True
            time.sleep(1.0)
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(signature, stop), daemon=True)
    thread.start()
    try:
        yield lambda: _check(directory, signature)
    finally:
        stop.set()
        thread.join()
        for file, name in ((signature, OWNER), (lock, LOCK)):
            if _is_at(file, directory / name):
                (directory / name).unlink(missing_ok=True)
        os.close(signature)
        os.close(lock)
        for path in made:
            with suppress(OSError):  # The run has written to it.
                path.rmdir()


def _beat(signature: int, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with suppress(OSError):  # The next beat may arrive.
            os.utime(signature)


def _check(directory: Path, signature: int) -> None:
    """Raise ValueError unless the owner's file is the one that this process wrote."""
    if _is_at(signature, directory / OWNER):
        return
    if (owner := _owner(directory)) is not None:
        raise ValueError(
            f"expected this run to own {directory}, got {owner}, which took it over after "
            f"{STALE:.0f} s without a heartbeat"
        )
    raise ValueError(
        f"{directory}: expected the directory of this run, which was deleted or emptied while the "
        "run was at work"
    )


def _is_at(file: int, path: Path) -> bool:
    """Return whether a path still leads to an open file, whose inode cannot be used again."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def _acquire(directory: Path) -> tuple[int, int]:
    """Return descriptors of the locked `.lock` and of the new `.owner.json`.

    Raises:
        _Busy: another process owns the directory.
    """
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _locked(lock, directory)
            # The last owner may have removed the file between the two lines before.
            if _is_at(lock, directory / LOCK):
                return lock, _sign(directory, lock, locked)
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _locked(lock: int, directory: Path) -> bool:
    """Lock a file; return False if the file system has no locks. Raises _Busy if it is locked."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise _Busy(_owner(directory)) from None
    except OSError:
        return False
    return True


def _sign(directory: Path, lock: int, locked: bool) -> int:
    """Replace the file of a dead owner by this process's, and return its descriptor.

    If two machines replace it at once, the check after the set-up stops the one whose file is gone.

    Raises:
        _Busy: the owner is alive.
    """
    path = directory / OWNER
    with suppress(FileNotFoundError):
        found, owner = path.stat(), _owner(directory)
        os.utime(lock)  # Both times are by the clock of the file system.
        age = os.fstat(lock).st_mtime - found.st_mtime
        left = (owner or Owner(boot="")).seconds_left(age, locked)
        # The file of a process that was killed before it could write is empty.
        if left and (found.st_size or not locked):
            raise _Busy(owner, left)
        path.unlink()
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        raise _Busy(_owner(directory), STALE) from None
    try:
        with files.writing(path):
            os.write(file, f"{json.dumps(asdict(Owner()))}\n".encode())
    except ValueError:
        os.close(file)
        path.unlink(missing_ok=True)
        raise
    return file


def _owner(directory: Path) -> Owner | None:
    """Return the owner that the directory's file names, None if it does not name one."""
    try:
        owner = Owner(**(value := json.loads((directory / OWNER).read_bytes())))
    except (OSError, ValueError, TypeError):
        return None
    numbers = all(isinstance(getattr(owner, name), int) for name in ("pid", "namespace"))
    return owner if numbers and value == asdict(owner) else None

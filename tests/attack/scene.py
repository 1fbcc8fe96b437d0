"""Commands under attack: forks of a process that has imported everything, each in a row's folder.

A `Scene` starts them, notes how each one ended, and lists the faults that no row may have:
tracebacks, more than one line for a mistake, time, memory, processes and files that are left.
"""

import ctypes
import hashlib
import multiprocessing
import os
import re
import resource
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import processes

ROOT = Path(__file__).parents[2]
GRACE = 8.0
"""Seconds in which processes of a command that ended have to end, too."""
SUBREAPER = 36  # of prctl
GIB = 2**30
LIBRARIES = [*processes.LIBRARIES, "transformers.models.xlm_roberta.modeling_xlm_roberta"]
# A refusal may leave the record of who owns a run.
OWNER = re.compile(r"(^|/)\.(lock|owner\.json)$")
DELETED = re.compile(r"(^|/)checkpoints/\.step_[^/]*\.partial(/|$)")
PARTIAL = re.compile(r"(^|/)\.[^/]*partial|(^|/)\.[^/]+\.\w{6,8}(/|$)|\.tmp|\.incomplete")


@dataclass(frozen=True)
class Limits:
    """Time and memory that a command may take, and resources that it lacks."""

    seconds: float = 60.0
    """Processor time. A command that waits for longer than five times that is killed."""
    rss: float = 2.5 * GIB
    """Bytes, with the 0.75 GiB of imports that a fork shares."""
    file_size: int | None = None
    descriptors: int | None = None
    umask: int = 0o022
    closed: tuple[int, ...] = ()
    """Standard streams that are closed at the start."""
    full: tuple[int, ...] = ()
    """Standard streams whose disk is full."""


@dataclass
class Ended:
    """One command that ended. `status` is negative for a signal that killed it."""

    argv: list[str]
    status: int
    out: str
    err: str
    seconds: float
    """Since it began."""
    cpu: float
    """Processor seconds, those of processes that it waited for included."""
    rss: int

    @property
    def errors(self) -> list[str]:
        """The lines of its mistakes."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class Command:
    """A command that runs."""

    def __init__(self, scene: "Scene", pid: int, argv: list[str], io: Path, limits: Limits) -> None:
        self.scene, self.pid, self.argv, self.io, self.limits = scene, pid, argv, io, limits
        self.begun, self.ended = time.monotonic(), None

    def poll(self) -> Ended | None:
        """Return how it ended, None while it runs; a command beyond its time is killed."""
        if self.ended is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            seconds = time.monotonic() - self.begun
            if pid:
                out, err = ((self.io / name).read_bytes().decode(errors="replace") for name in "12")
                code = os.waitstatus_to_exitcode(status)
                rss = usage.ru_maxrss * 1024
                cpu = usage.ru_utime + usage.ru_stime
                self.ended = Ended(self.argv, code, out, err, seconds, cpu, rss)
                self.scene.note(self)
            elif seconds > 5 * self.limits.seconds:
                self.send(signal.SIGKILL)
        return self.ended

    def wait(self) -> Ended:
        """Wait until it ends."""
        while (ended := self.poll()) is None:
            time.sleep(0.003)
        return ended

    def until(self, happened: Callable[[], bool]) -> bool:
        """Wait until something has happened; return False if the command ended before."""
        while not happened():
            if self.poll():
                return False
            time.sleep(0.001)
        return True

    def send(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.ended is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


@dataclass
class Scene:
    """One row's folder `work`, which is the working directory of its commands.

    Args:
        place: a new folder for the row.
        stock: the folder of shared inputs.
    """

    place: Path
    stock: Path
    ended: list[Ended] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    outputs: set[str] = field(default_factory=set)
    """Paths in `work` that commands may make or change."""
    killed: bool = False
    """Whether a command got SIGKILL, after which its temporary files may stay."""
    before: dict[str, str] | None = None

    def __post_init__(self) -> None:
        self.work = self.place / "work"
        for folder in (self.work, self.place / "tmp"):
            folder.mkdir(parents=True)

    def take(self, *names: str) -> Path:
        """Copy shared inputs into the row's folder; return its path of the last one."""
        for name in names:
            source, target = self.stock / name, self.work / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copy2(source, target)
        return self.work / (names or [""])[-1]

    def start(
        self,
        *argv: Any,
        limits: Limits = Limits(),  # noqa: B008
        env: Mapping[str, str] | None = None,
        cold: bool = False,
        stdin: bytes = b"",
        cwd: Path | None = None,
    ) -> Command:
        """Start `python argv..`, in a fork, or as a new interpreter if `cold`."""
        if self.before is None:
            self.before = listing(self.work)
        words = [str(word) for word in argv]
        io = self.place / f"io{len(list(self.place.glob('io*')))}"
        io.mkdir()
        for name in "012":
            (io / name).write_bytes(stdin if name == "0" else b"")
        values = environment(self.stock, self.place / "tmp") | dict(env or {})
        cwd = cwd or self.work
        sys.stdout.flush()
        if not (pid := os.fork()):
            try:
                streams = str(io / "0"), str(io / "1"), str(io / "2")
                fresh()
                what = (limited, limits, words, str(cwd))
                processes._child(streams, values, (cold_start, words, cwd) if cold else what)
            finally:
                os._exit(1)
        return Command(self, pid, words, io, limits)

    def run(self, *argv: Any, **options: Any) -> Ended:
        """Run `python argv..` to its end."""
        return self.start(*argv, **options).wait()

    def check(self, holds: Any, otherwise: str) -> None:
        """Note a fault unless a condition holds."""
        if not holds:
            self.faults.append(otherwise)

    def note(self, command: Command) -> None:
        """Check what every command that ended has to keep to."""
        ended, limits = command.ended, command.limits
        assert ended is not None
        self.ended.append(ended)
        self.check("Traceback (most recent" not in ended.err, f"traceback: {ended.err[-300:]!r}")
        self.check(ended.cpu <= limits.seconds, f"{ended.cpu:.0f} s of processor time")
        self.check(ended.seconds <= 5 * limits.seconds, f"no end within {ended.seconds:.0f} s")
        self.check(ended.rss <= limits.rss, f"{ended.rss / GIB:.1f} GiB")
        if ended.status == 1 and 2 not in limits.closed + limits.full:
            lines = ended.err.splitlines()[-1:]
            one = lines == ended.errors and len(lines) == 1
            # The dry run lists what it refuses on standard output.
            dry = not ended.errors and re.fullmatch(r"\d+ of \d+ sources refused", "".join(lines))
            self.check(one or dry, f"not one last line: {ended.err[-300:]!r}")

    def close(self) -> None:
        """Check what the row's commands have left."""
        self.check(not (left := orphans()), f"processes left: {left}")
        if self.before is not None:
            after = listing(self.work)
            changed = {
                path
                for path in self.before.keys() | after.keys()
                if self.before.get(path) != after.get(path)
            }
            odd = sorted(
                path
                for path in changed
                if not (within(path, self.outputs) or OWNER.search(path))
                # A run cleans what a killed deletion of a checkpoint has left.
                and not (path not in after and DELETED.search(path))
            )
            self.check(not odd, f"changed: {', '.join(odd[:4])}")
            partial = sorted(path for path in changed & after.keys() if PARTIAL.search(path))
            self.check(self.killed or not partial, f"left: {', '.join(partial[:4])}")
        temporary = sorted(path.name for path in (self.place / "tmp").iterdir())
        self.check(self.killed or not temporary, f"left in TMPDIR: {', '.join(temporary[:4])}")


def within(path: str, outputs: set[str]) -> bool:
    """Return whether a path is, holds, or lies in one of the outputs."""
    return any(
        path == name or path.startswith(f"{name}/") or name.startswith(f"{path}/")
        for name in outputs
    )


def environment(stock: Path, tmp: Path) -> dict[str, str]:
    """Return the environment of a command."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / ".path"), str(ROOT)]),
        "TMPDIR": str(tmp),
        "MLEMBED_CACHE": str(stock / "cache"),
        "HOME": str(stock / "home"),
    }


def listing(folder: Path) -> dict[str, str]:
    """Return mode and content (a digest) of everything in a folder, by its path there."""
    marks = {}
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            mode = path.lstat().st_mode
            content = ""
            if stat.S_ISREG(mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            elif stat.S_ISLNK(mode):
                content = os.readlink(path)
            marks[str(path.relative_to(folder))] = f"{mode:o} {content}"
    return marks


def orphans() -> list[str]:
    """Return command lines of processes that commands left behind, and kill them.

    Helpers of multiprocessing end by themselves a moment after their parent, so they have time.
    """
    end = time.monotonic() + GRACE
    while left := list(alive()):
        if time.monotonic() > end:
            names = []
            for pid in left:
                with suppress(OSError):
                    names.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:80])
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return names
        time.sleep(0.02)
    return []


def alive() -> Iterator[int]:
    """Yield children of this process that have not ended; the others are waited for."""
    for task in Path("/proc/self/task").iterdir():
        for pid in map(int, (task / "children").read_text().split()):
            with suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    yield pid


def adopt() -> None:
    """Make orphans of this process's children its own, so that they are seen."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1)
    # The parent stops everything; commands die with the process that started them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---- the child's side ----


def fresh() -> None:
    """Give a fork of the pool's process the state of a new interpreter, which may have children."""
    multiprocessing.current_process()._config["daemon"] = False
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def cold_start(argv: list[str], cwd: Path) -> None:
    """Become a new interpreter."""
    os.chdir(cwd)
    os.execv(sys.executable, [sys.executable, *argv])


def limited(limits: Limits, argv: list[str], cwd: str) -> None:
    """Do what `python argv..` does in a directory, within limits."""
    os.umask(limits.umask)
    # A command that asks for too much must not take the machine down.
    resource.setrlimit(resource.RLIMIT_DATA, (6 * GIB, resource.RLIM_INFINITY))
    if limits.file_size is not None:
        # Python ignores SIGXFSZ, so that a write beyond the limit is an error.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_size, resource.RLIM_INFINITY))
    if limits.descriptors is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits.descriptors,) * 2)
    for number in limits.full:
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)
    for number in limits.closed:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    processes._command(argv, cwd)

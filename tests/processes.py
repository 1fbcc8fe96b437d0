"""Processes for tests, forked from a parent that has imported everything already.

    run("train.py", "tiny", "--steps", "1")     a command, as `python train.py tiny --steps 1`
    run("-m", "mlembed", "encode", run, "a text")  as `python -m mlembed encode ..`
    run("-c", "print(1)")                       as `python -c ..`
    run(.., processes=2)                        the same command in each process of a gloo group
    with forked("train.py", ..) as child:       a command while it runs: pid, streams, exit status
    gloo(2, function, *args)                    what function(where, *args) returns in each process

A fork takes a tenth of a second where a new interpreter spends two to seven on imports. Each child
is otherwise a process of its own: arguments, environment, standard streams, exit status. Tests of
start-up itself, of signals and of kills start real subprocesses, by `started`.
"""

import atexit
import ctypes
import gc
import importlib.util
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
LIBRARIES = [
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "triton",
    "datasets",
    "matplotlib.pyplot",
    "babel",
]
LIBRARIES += ["tensorboard", "torch.utils.tensorboard", "scipy.stats", "sentence_transformers"]
LIBRARIES += ["transformers.models.qwen3.modeling_qwen3", "transformers.models.bert.modeling_bert"]
HELD_UP = "held up"
TIMEOUT = 900.0  # seconds, for a machine that is busy otherwise


# ---- the test's side ----


def run(
    *argv: Any,
    processes: int = 1,
    cwd: str | Path = ROOT,
    env: Mapping[str, str] | None = None,
    input: str | bytes = b"",
    text: bool = True,
    timeout: float = TIMEOUT,
) -> subprocess.CompletedProcess:
    """Run `python argv..` to its end -> exit status, and text (or bytes) of both streams.

    Args:
        argv: a script, "-m" and a module, or "-c" and code, then its arguments.
        processes: how many processes form a gloo group, each with these arguments. Their output is
            joined in order of rank; the exit status is the first that is not 0.

    Raises:
        subprocess.TimeoutExpired: the processes ran longer than `timeout` seconds, and were killed.
    """
    argv = [os.fsdecode(word) if isinstance(word, bytes) else str(word) for word in argv]
    env = dict(os.environ if env is None else env)
    with tempfile.TemporaryDirectory() as folder:
        data = input.encode() if isinstance(input, str) else input
        (Path(folder) / "stdin").write_bytes(data)
        codes = _fork(processes, (_command, argv, str(cwd)), env, Path(folder), timeout)
        out, err = (
            b"".join((Path(folder) / f"{name}{rank}").read_bytes() for rank in range(processes))
            for name in ("stdout", "stderr")
        )
    code = next((code for code in codes if code), 0)
    if text:
        out, err = out.decode(), err.decode()
    return subprocess.CompletedProcess(argv, code, out, err)


def gloo(size: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list:
    """Return what `function(where, *args)` returned in each process of a gloo group, by rank.

    The function is a global one of a test file, which each process loads again; it runs inside
    `distributed.world`. A warning or a traceback in any process is a failure.
    """
    path, name = function.__code__.co_filename, function.__qualname__
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "stdin").touch()
        what = (_function, path, function.__module__, name, args, folder)
        codes = _fork(size, what, dict(os.environ), Path(folder), timeout)
        err = "".join((Path(folder) / f"stderr{rank}").read_text() for rank in range(size))
        assert codes == [0] * size, f"exit statuses {codes}\n{err[-3000:]}"
        for trouble in ("terminate called", "Traceback", "Warning", "is deprecated"):
            assert trouble not in err, err[-3000:]
        results = [Path(folder) / f"result{rank}" for rank in range(size)]
        return [torch.load(result, weights_only=False) for result in results]


@cache
def gloo_once(size: int, function: Callable[..., Any], *args: Any) -> list:
    """Return what `gloo` does, from one group a session: pytest sets a fixture with parameters up
    again whenever the parameter changes from test to test.
    """
    return gloo(size, function, *args)


class Forked:
    """A command while it runs. folder: with files stdout0 and stderr0."""

    def __init__(self, child: Any, folder: Path) -> None:
        self.child, self.folder, self.pid = child, folder, child.pid

    def text(self, name: str = "stdout") -> str:
        path = self.folder / f"{name}0"
        return path.read_text() if path.exists() else ""

    def wait_for(self, line: str, count: int = 1, seconds: float = 120) -> None:
        """Wait until standard output holds `line` as often as `count`."""
        end = time.monotonic() + seconds
        while self.text().count(line) < count:
            assert self.child.is_alive() and time.monotonic() < end, self.text("stderr")[-2000:]
            time.sleep(0.01)

    def status(self, seconds: float = 120) -> int:
        """Wait for the end and return the exit status, negative after an unhandled signal."""
        self.child.join(seconds)
        assert self.child.exitcode is not None, "still running"
        return self.child.exitcode


@contextmanager
def forked(
    *argv: Any,
    slow: Sequence[Any] = (),
    cwd: str | Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> Iterator[Forked]:
    """Start `python argv..`, forked like by `run`, and kill what is left of it at the end.

    Args:
        slow: dotted name of a function, number of a call of it, and seconds that this call takes
            longer; it prints HELD_UP first.
    """
    env = dict(os.environ if env is None else env)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "stdin").touch()
        streams = tuple(str(folder / f) for f in ("stdin", "stdout0", "stderr0"))
        what = (_command, [str(word) for word in argv], str(cwd), *slow)
        child = _server().Process(target=_child, args=(streams, env, what))
        child.start()
        try:
            yield Forked(child, folder)
        finally:
            _kill_session(child.pid)
            child.join()


@contextmanager
def started(command: Sequence[Any], **options: Any) -> Iterator[subprocess.Popen]:
    """Start a real subprocess in a session of its own; kill what is left of it at the end."""
    options = {"cwd": ROOT, "text": True, **options}
    words = [str(word) for word in command]
    process = subprocess.Popen(words, start_new_session=True, preexec_fn=_begin, **options)
    try:
        yield process
    finally:
        _kill_session(process.pid)
        process.communicate()


def session(leader: int) -> dict[int, int]:
    """Return the processes of a session that still run, with the ids of their parents."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, _, its, *_ = path.read_text().rpartition(")")[2].split()
            if int(its) == leader and state != "Z":
                found[int(path.parent.name)] = int(parent)
    return found


def on_path() -> dict[str, str]:
    """Return the environment with this process's import path, for a test file run as a script."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def children() -> dict[int, str]:
    """Return the children of this process with their command lines, but for the warm parent's."""
    ours = {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}
    lists = Path("/proc/self/task").glob("*/children")
    pids = {int(pid) for path in lists for pid in path.read_text().split()} - ours
    return {pid: Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in pids}


def stop_server() -> None:
    """End the warm parent, so that its processor time is counted in that of the tests."""
    forkserver._forkserver._stop()


def _fork(
    size: int, what: tuple, env: dict[str, str], folder: Path, timeout: float
) -> list[int | None]:
    """Run `what` in `size` processes -> exit statuses. One that fails ends the others."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = []
    for rank in range(size):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
        group |= {"TORCHELASTIC_USE_AGENT_STORE": True}
        own = env | ({key: str(value) for key, value in group.items()} if size > 1 else {})
        streams = tuple(str(folder / f) for f in ("stdin", f"stdout{rank}", f"stderr{rank}"))
        children.append(_server().Process(target=_child, args=(streams, own, what)))
    end = time.monotonic() + timeout
    try:
        for child in children:
            child.start()
        running = list(children)
        while running:
            left = end - time.monotonic()
            if left <= 0:
                err = "".join(path.read_text() for path in sorted(folder.glob("stderr*")))
                raise subprocess.TimeoutExpired(str(what[:3]), timeout, stderr=err)
            multiprocessing.connection.wait([child.sentinel for child in running], left)
            running = [child for child in running if child.is_alive()]
            if any(child.exitcode for child in children if child not in running):
                end = min(end, time.monotonic() + 30)  # The others notice, or are ended.
    finally:
        for child in children:
            if child.pid is not None:
                _kill_session(child.pid)
                child.join()
    return [child.exitcode for child in children]


@cache
def _server() -> multiprocessing.context.ForkServerContext:
    """Start the warm parent. It inherits the environment, and imports from our path."""
    context = multiprocessing.get_context("forkserver")
    files = (path.relative_to(ROOT) for path in (ROOT / "mlembed").rglob("[!_]*.py"))
    ours = [".".join(path.with_suffix("").parts) for path in files]
    context.set_forkserver_preload([*LIBRARIES, *sorted(ours), "mlembed_kernels", "train"])
    before = os.environ.get("PYTHONPATH")
    os.environ |= on_path()
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    first = context.Process(target=int)  # which waits for the imports
    first.start()
    first.join()
    return context


def _kill_session(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


# ---- the child's side ----


def _child(streams: tuple[str, str, str], env: dict[str, str], what: tuple) -> None:
    """Become a process as `subprocess` would start it, do what is asked, and exit."""
    gc.freeze()  # Collections would touch, and so copy, all memory that is shared with the parent.
    os.setsid()
    _begin()
    for fd, path in enumerate(streams):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND if fd else os.O_RDONLY
        os.dup2(os.open(path, flags), fd)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    try:
        function, *args = what
        function(*args)
        code: Any = 0
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    # Only the handlers of a true end: to take down a thousand modules costs half a second.
    # tests/test_endings.py has true ends.
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:
            # An interpreter that cannot write its last lines ends with status 120.
            os.write(2, f"Exception ignored in: {stream.name}\n{error}\n".encode())
            code = code or 120
    os._exit(code or 0)


def _command(argv: list[str], cwd: str, slow: str = "", call: int = 0, seconds: float = 0) -> None:
    """Do what `python argv..` does in directory `cwd`, with a function that is slow."""
    os.chdir(cwd)
    if slow:
        _hold_up(slow, call, seconds)
    warnings.filterwarnings("ignore", "'mlembed.* found in sys.modules", RuntimeWarning)
    if argv[0] == "-m":
        sys.argv, sys.path[0:0] = argv[1:], [cwd]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv[0] == "-c":
        sys.argv, sys.path[0:0] = ["-c", *argv[2:]], [cwd]
        sys.modules["__main__"] = ModuleType("__main__")
        exec(argv[1], vars(sys.modules["__main__"]))
    else:
        sys.argv, sys.path[0:0] = argv, [str(Path(argv[0]).resolve().parent)]
        runpy.run_path(argv[0], run_name="__main__")


def _hold_up(function: str, call: int, seconds: float) -> None:
    """Make one call of a function take longer."""
    module, _, name = function.rpartition(".")
    real, calls = getattr(importlib.import_module(module), name), []

    def held_up(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            print(HELD_UP, flush=True)
            time.sleep(seconds)
        return real(*args, **options)

    setattr(sys.modules[module], name, held_up)


def _function(path: str, module: str, name: str, args: tuple, folder: str) -> None:
    """Call a function of a test file inside a group, and save what it returns."""
    from mlembed.runtime.distributed import world

    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, path)
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    with world("cpu") as where:
        result = getattr(sys.modules[module], name)(where, *args)
        torch.save(result, Path(folder) / f"result{where.rank}")
        del result


def _begin() -> None:
    """Ask Linux to kill this process when its parent ends, however it ends.

    Signals that a shell or nohup ignores for the tests get their default action.
    """
    for number in (signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)

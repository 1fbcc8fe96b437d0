"""Run tests against mutants, two at a time, each in a copy of the tree and in a fork of a process
that has imported the libraries but nothing of ours.

Neither mutmut nor cosmic-ray does this job here. mutmut 3.8 leaves decorated functions alone, and
with them every `@triton.jit` kernel. cosmic-ray 8.7 writes its mutants into the working tree and
starts one and the same command for each of them: ten seconds of imports, and all tests.

A mutant is killed by a test that fails, crashes or hangs, if the same test passes on the unmutated
tree in the same way. It survives if all of its tests pass, or those of the first `budget` seconds:
the first case of each test function runs before any second case. Linux only.
"""

import ctypes
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .child import Trial, child
from .operators import Mutant
from .parts import ROOT

SUBREAPER = 36  # of prctl


def copy_tree(root: Path, to: Path) -> None:
    """Copy what git would track, and compile it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)
    if (to / "kernels").is_dir():
        (to / ".path").mkdir()
        (to / ".path/mlembed_kernels").symlink_to("../kernels")
    subprocess.run([sys.executable, "-m", "compileall", "-q", to], check=False)


class Runner:
    """Trials on `workers` processes.

    Args:
        report: called with each mutant and what became of it.
        budget: CPU seconds of a mutant's tests.
        limit: seconds that one test may take.
    """

    def __init__(
        self,
        report: Callable[[Mutant, dict[str, Any]], None],
        budget: float = 60.0,
        limit: float = 120.0,
        workers: int = 2,
        root: Path = ROOT,
    ) -> None:
        self.report, self.budget, self.limit = report, budget, limit
        self.workers, self.root = workers, root
        self.queue: deque[Trial] = deque()
        self.running: dict[int, Trial] = {}
        self.sound: set[str] = set()
        self.broken: set[str] = set()
        self.count = 0

    def run(self, trials: list[Trial]) -> None:
        # Processes that a killed test leaves behind become ours, to be killed.
        ctypes.CDLL(None).prctl(SUBREAPER, 1)
        self.queue.extend(trials)
        with scratch() as self.place:
            copy_tree(self.root, self.place / "tree")
            try:
                while self.queue or self.running:
                    while self.queue and len(self.running) < self.workers:
                        self.start(self.queue.popleft())
                    self.poll()
                    time.sleep(0.05)
            finally:
                for process in self.running:
                    os.kill(process, signal.SIGKILL)
                self.sweep(self.place)

    def start(self, trial: Trial) -> None:
        self.count += 1
        trial.folder, trial.begun = self.place / str(self.count), time.time()
        trial.skip |= self.broken
        shutil.copytree(self.place / "tree", trial.folder / "tree", symlinks=True)
        if not trial.killer:
            path = trial.folder / "tree" / trial.mutant.file
            path.write_text(trial.mutant.apply(trial.source), encoding="utf-8")
            for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
                compiled.unlink()
        sys.stdout.flush()
        if not (process := os.fork()):
            try:
                child(trial, self.budget, self.root)
            except BaseException:
                (trial.folder / "error").write_text(traceback.format_exc())
            finally:
                os._exit(1)
        self.running[process] = trial

    def poll(self) -> None:
        for orphan in set(children()) - self.running.keys():
            os.waitpid(orphan, os.WNOHANG)
        for process, trial in list(self.running.items()):
            done, status = os.waitpid(process, os.WNOHANG)
            # The time of the test that runs, or of collection.
            current = trial.folder / "current"
            since = current.stat().st_mtime if current.exists() else trial.begun
            hangs = time.time() - since > self.limit
            if not done and not hangs:
                continue
            if not done:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            del self.running[process]
            self.sweep(trial.folder)
            if (error := trial.folder / "error").exists():
                raise RuntimeError(error.read_text())
            seconds = round(time.time() - trial.begun, 1)
            if (trial.folder / "verdict").exists() and not hangs:
                verdict = json.loads((trial.folder / "verdict").read_text())
                if verdict["code"] and not verdict["killer"] and verdict["stopped"] == math.inf:
                    raise RuntimeError(f"pytest: {(trial.folder / 'log').read_text()[-2000:]}")
                status = "killed" if verdict["killer"] else "survived"
            else:
                # Before the first test starts, collection is what crashes or hangs.
                at = current.read_text() if current.exists() else trial.tests[0]
                status = "timeout" if hangs else "killed"
                verdict = {"passed": 0, "killer": at, "stopped": math.inf, "cpu": seconds}
            self.finish(trial, {"status": status, **verdict, "seconds": seconds})

    def finish(self, trial: Trial, verdict: dict[str, Any]) -> None:
        if not trial.killer:
            if not verdict["killer"] or verdict["killer"] in self.sound:
                self.report(trial.mutant, verdict)
            else:
                check = Trial(trial.mutant, trial.source, trial.tests, killer=verdict["killer"])
                check.verdict = verdict
                self.queue.appendleft(check)
        elif verdict["status"] == "survived" and verdict["longest"] < self.limit / 2:
            self.sound.add(trial.killer)
            self.report(trial.mutant, trial.verdict)
        else:
            print(
                f"left out, without a mutant it fails or is slow: {trial.killer}", file=sys.stderr
            )
            self.broken.add(trial.killer)
            self.queue.appendleft(Trial(trial.mutant, trial.source, trial.tests))
        shutil.rmtree(trial.folder, ignore_errors=True)

    def sweep(self, folder: Path) -> None:
        """Kill the processes that a trial left behind; theirs become ours in turn."""
        while left := [p for p in set(children()) - self.running.keys() if belongs(p, folder)]:
            for process in left:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)


def belongs(process: int, folder: Path) -> bool:
    """Return whether a process was started by a trial, whose TMPDIR it has, and is still alive."""
    try:
        return f"TMPDIR={folder}".encode() in Path(f"/proc/{process}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return False


def children() -> Iterator[int]:
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):
            yield from map(int, (task / "children").read_text().split())


@contextmanager
def scratch() -> Iterator[Path]:
    folder = tempfile.mkdtemp(prefix="mutation-")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

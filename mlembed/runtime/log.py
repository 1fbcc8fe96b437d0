"""What a run says: header, progress bar, metrics.jsonl, a tracker, and one-line errors."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import files

METRICS = "metrics.jsonl"


def header(device: torch.device) -> str:
    """Commit, versions and device: what a result must be read with."""
    return (
        f"mlembed {commit()} | python {platform.python_version()} | torch {torch.__version__} | "
        f"{device_name(device)}"
    )


def device_name(device: torch.device) -> str:
    """A GPU by its name, a CPU by the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}"


def commit() -> str:
    """The checkout's commit, `+` when it has changes; `unknown` outside one."""
    where = Path(__file__).parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=where, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        dirty = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short", "HEAD") + dirty
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Log:
    """Metrics of one run, on the main process only: `metrics.jsonl` and, by name, a tracker."""

    def __init__(self, directory: Path, main: bool) -> None:
        self.path, self.main = directory / METRICS, main
        self.track: Callable[[Mapping[str, float], int], None] = lambda values, step: None
        self.close: Callable[[], None] = lambda: None

    def open(self, tracker: str, step: int) -> None:
        """Begin to write after `step`: lines that the run will write again go, at 0 all of them.

        Raises:
            ValueError: the tracker's package is not installed.
        """
        if not self.main:
            return
        if self.path.exists():
            kept = [line for line in self.lines() if step and line["step"] <= step]
            files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if tracker != "none":
            self.track, self.close = _tracker(tracker, self.path.parent, step)

    def lines(self) -> list[dict[str, Any]]:
        """What was logged so far; a last line that was cut off by a crash is left out.

        Raises:
            ValueError: another line that is none of ours.
        """
        if not self.path.exists():
            return []
        found = []
        whole = self.path.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(whole, 1):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{self.path}:{number}: expected json, got {error}") from None
        return found

    def metrics(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """One line {"step", "kind", **values}; numbers, also nested ones, go to the tracker."""
        if not self.main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self.track({f"{kind}/{k}": v for k, v in flat(values)}, step)

    def say(self, text: str = "") -> None:
        """Print above the progress bar."""
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


class Stages:
    """Milliseconds of a step by stage. On CUDA they are the device's, between what it had been
    given before and after: nothing waits for it until `take`. A stage inside another is not also
    counted as that one's; what no stage took is `other`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._open, self._spans = device, list[str](), list[tuple[Any, ...]]()
        self.begin()

    def begin(self) -> None:
        """Count from now on."""
        self._spans.clear()
        self._since = time.perf_counter()

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """What runs inside is that stage."""
        outer = self._open[-1] if self._open else None
        self._open.append(name)
        begin = self._now()
        try:
            yield
        finally:
            self._open.pop()
            self._spans.append((name, outer, begin, self._now()))

    def take(self, steps: int) -> dict[str, float]:
        """Of each stage, a step's mean since `begin`, which this is as well."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        total: dict[str, float] = {}
        for name, outer, begin, end in self._spans:
            seconds = self.device.type != "cuda"
            took = 1e3 * (end - begin) if seconds else begin.elapsed_time(end)
            for stage, share in ((name, took), (outer, -took)):
                if stage is not None:
                    total[stage] = total.get(stage, 0.0) + share / steps
        whole = 1e3 * (time.perf_counter() - self._since) / steps
        total["other"] = max(0.0, whole - sum(total.values()))
        self.begin()
        return dict(sorted(total.items()))


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a nested mapping, with slashed names."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield prefix + key, float(value)


def check_tracker(name: str) -> None:
    """ValueError where the package of a tracker is not installed."""
    try:
        if name not in ("tensorboard", "none"):
            __import__(name)
    except ImportError:
        raise ValueError(
            f"tracker: expected {name} to be installed, it is not: pip install {name}"
        ) from None


def _tracker(
    name: str, directory: Path, step: int
) -> tuple[Callable[[Mapping[str, float], int], None], Callable[[], None]]:
    """TensorBoard event files in the run's directory, or wandb / trackio under the run's name."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier file says of later steps is written again, and not to be shown.
        again = step + 1 if step else 0
        writer = SummaryWriter(str(directory / "tensorboard"), purge_step=again)

        def write(values: Mapping[str, float], step: int) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        return write, writer.close
    check_tracker(name)
    module = __import__(name)
    module.init(project="mlembed", name=directory.name)
    return (lambda values, step: module.log(dict(values), step=step)), module.finish

"""Output of a run: header, lines above the progress bar, metrics.jsonl, a tracker, stage times."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import files, profiling
from .errors import printable

METRICS = "metrics.jsonl"
DROPPED = "metrics_dropped.jsonl"  # Lines after the checkpoint that a run resumed from.


def header(device: torch.device) -> str:
    """Return commit, versions and device, for the first line of a run."""
    return (
        f"mlembed {commit()} | python {platform.python_version()} | torch {torch.__version__} | "
        f"{device_name(device)}"
    )


def device_name(device: torch.device) -> str:
    """Return a GPU's name, or a CPU's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}"


def commit() -> str:
    """Return the checkout's commit, with `+` if it has changes, or `unknown` outside of one."""
    where = Path(__file__).parents[2]
    if not (where / "train.py").is_file():  # Installed, maybe into another project's checkout.
        return "unknown"

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=where, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        dirty = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short", "HEAD") + dirty
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Log:
    """Metrics of a run in `metrics.jsonl` and a tracker; only the main process writes.

    check: called before each line; raises ValueError if the run no longer owns its directory.
    """

    def __init__(self, directory: Path, main: bool) -> None:
        self.path, self.main, self.tracker = directory / METRICS, main, "none"
        self.track: Callable[[Mapping[str, float], int], None] = lambda values, step: None
        self.close: Callable[[], None] = lambda: None
        self.check: Callable[[], None] = lambda: None

    def open(self, tracker: str, step: int) -> None:
        """Begin to write after `step`; move later lines, which are written again, to DROPPED.

        Raises:
            ValueError: a line of metrics.jsonl is broken; the tracker's package is not installed.
        """
        if not self.main:
            return
        earlier, later = list[str](), list[str]()
        for line in self.lines():
            some = earlier if step and line["step"] <= step else later
            some.append(json.dumps(line) + "\n")
        if later:
            files.append(self.path.with_name(DROPPED), "".join(later))
            files.flush(self.path.with_name(DROPPED))
        if self.path.exists():
            files.write_text(self.path, "".join(earlier))
        self.tracker = tracker
        if tracker != "none":
            self.track, self.close = _tracker(tracker, self.path.parent, step)

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines logged so far. Raises like the function `lines`."""
        return lines(self.path)

    def flush(self) -> None:
        """Wait until the lines logged so far are on disk."""
        if self.path.exists():
            files.flush(self.path)
            files.flush(self.path.parent)

    def metrics(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Write a line {"step", "kind", **values}; the tracker gets numbers, nested ones too."""
        if not self.main:
            return
        self.check()
        files.append(self.path, json.dumps({"step": step, "kind": kind, **values}) + "\n")
        with files.writing(self.path.with_name(self.tracker)):
            self.track({f"{kind}/{k}": v for k, v in flat(values)}, step)

    def say(self, text: str = "") -> None:
        """Print above the progress bar."""
        if self.main:
            tqdm.write(printable(text), file=sys.stdout)
            sys.stdout.flush()


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, without a last line that a crash cut off.

    Raises:
        ValueError: another line is not JSON, or not an object with a step and a kind.
    """
    if not path.exists():
        return []
    files.check_regular(path)
    values = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: invalid JSON: {error}") from None
        if not (
            isinstance(value, dict)
            and type(value.get("step")) is int
            and isinstance(value.get("kind"), str)
        ):
            got = line[:60].decode(errors="replace")
            raise ValueError(
                f'{path}:{number}: expected an object with a number "step" and a "kind", got {got}'
            )
        values.append(value)
    return values


class Stages:
    """Milliseconds of a step by stage.

    On CUDA the device's events are timed, so nothing waits for it until `take`. The time of an
    inner stage does not count for the outer stage; the rest of the step is `other`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._open, self._spans = device, list[str](), list[tuple[Any, ...]]()
        self.begin()

    def begin(self) -> None:
        """Start counting now."""
        self._spans.clear()
        self._since = time.perf_counter()

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def of(self, name: str, traced: bool = True) -> Iterator[None]:
        """Count the block as the stage `name`. traced: it is also a range of a trace."""
        outer = self._open[-1] if self._open else None
        self._open.append(name)
        begin = self._now()
        try:
            with profiling.span(name) if traced else nullcontext():
                yield
        finally:
            self._open.pop()
            self._spans.append((name, outer, begin, self._now()))

    def take(self, steps: int) -> dict[str, float]:
        """Return the mean per step of each stage since `begin`, and begin again."""
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
    """Yield numbers of a nested mapping with slashed names."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield prefix + key, float(value)


def check_tracker(name: str) -> None:
    """Raise ValueError if the package of a tracker is not installed."""
    try:
        if name not in ("tensorboard", "none"):
            __import__(name)
    except ImportError:
        raise ValueError(f"tracker: {name} is not installed: pip install {name}") from None


def _tracker(
    name: str, directory: Path, step: int
) -> tuple[Callable[[Mapping[str, float], int], None], Callable[[], None]]:
    """Return functions that write and close: TensorBoard's files, wandb, trackio, mlflow."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        # The steps after `step` are written again, so TensorBoard hides those of earlier files.
        purge = step + 1 if step else 0
        writer = SummaryWriter(str(directory / "tensorboard"), purge_step=purge)

        def write(values: Mapping[str, float], step: int) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        return write, writer.close
    check_tracker(name)
    module = __import__(name)
    if name == "mlflow":
        module.set_experiment("mlembed")
        module.start_run(run_name=directory.name)
        return (lambda values, step: module.log_metrics(dict(values), step=step)), module.end_run
    module.init(project="mlembed", name=directory.name)
    return (lambda values, step: module.log(dict(values), step=step)), module.finish

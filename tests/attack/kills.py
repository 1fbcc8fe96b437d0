"""SIGKILL at any instant, and at chosen files: the next try gives the undisturbed result."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from .rows import Row, named, shown
from .scene import Command, Scene
from .stock import INPUTS, RESUME, START, TEXT, WRITERS, output, same_output, same_run, seconds

METRICS = "runs/tiny/metrics.jsonl"
EVENTS = {
    "its directory is there": "runs/tiny",
    "config.json is there": "runs/tiny/config.json",
    "the first checkpoint is written": "runs/tiny/checkpoints/.step_00000002*/*",
    "the first checkpoint is there": "runs/tiny/checkpoints/step_00000002",
    "the third checkpoint is written": "runs/tiny/checkpoints/.step_00000006*/*",
    "the first checkpoint is removed": "runs/tiny/checkpoints/step_00000006",
    "the last checkpoint is written": "runs/tiny/checkpoints/.step_00000012*",
    "the last checkpoint is there": "runs/tiny/checkpoints/step_00000012",
    "the report is written": "runs/tiny/.report*",
    "the report is there": "runs/tiny/report",
    "the model is written": "runs/tiny/.model*/*",
    "the model is there": "runs/tiny/model",
}


def rows(seed: int) -> Iterator[Row]:
    rng = random.Random(seed)
    for i in range(18):
        share = round((i + rng.random()) / 18, 3)
        yield row(f"train after {share:.3f} of its time", partial(train, [share]))
    for _ in range(3):
        shares = [round(rng.uniform(0.1, 0.9), 3) for _ in range(4)]
        label = (
            "train " + ", ".join(f"{share:.2f}" for share in shares) + " into each of four tries"
        )
        yield row(label, partial(train, shares))
    for when, name in EVENTS.items():
        yield row(f"train when {when}", partial(train_at, name))
    yield Row("kills", "a worker of the loader", "1, names the loader, then the same", worker)
    for name in WRITERS:
        for share in (round(rng.uniform(0.2, 0.6), 3), round(rng.uniform(0.6, 1.0), 3)):
            yield row(f"{name} after {share:.3f} of its time", partial(writer, name, share))
        yield row(f"{name} when its output is begun", partial(writer, name, None))


def row(input: str, attack: Callable[[Scene], str]) -> Row:
    return Row("kills", input, "the same when tried again", attack)


def begin(scene: Scene) -> Command:
    """Start the run, or resume it if it has begun."""
    begun = (scene.work / "runs/tiny/config.json").exists()
    return scene.start(*(RESUME if begun else START))


def kill(scene: Scene, command: Command) -> None:
    """Send SIGKILL, and note if it came too late."""
    command.send(signal.SIGKILL)
    command.wait()
    scene.killed = True


def finish(scene: Scene) -> str:
    """Run to the end what was killed, and compare it with an undisturbed run."""
    ended = begin(scene).wait()
    scene.check(ended.status == 0, f"status {ended.status}, expected 0")
    same_run(scene)
    left = [path.name for path in (scene.work / "runs").rglob(".*partial*")]
    scene.check(not left, f"left for ever: {left}")
    return "; ".join(map(shown, scene.ended))


def train(shares: list[float], scene: Scene) -> str:
    """Kill a run at instants after its start, then after each resume."""
    scene.take(*TEXT)
    scene.outputs = {"runs"}
    for share in shares:
        command = begin(scene)
        end = time.monotonic() + share * seconds(scene, "train")
        command.until(lambda end=end: time.monotonic() >= end)
        kill(scene, command)
    return finish(scene)


def train_at(name: str, scene: Scene) -> str:
    """Kill a run when a file appears."""
    scene.take(*TEXT)
    scene.outputs = {"runs"}
    command = begin(scene)
    command.until(appears(scene.work, name))
    kill(scene, command)
    return finish(scene)


def worker(scene: Scene) -> str:
    """Kill the process that prepares batches."""
    scene.take(*TEXT)
    scene.outputs = {"runs"}
    command = scene.start(*START, "--loader-workers", "1")
    command.until((scene.work / "runs/tiny/checkpoints/step_00000002").is_dir)
    for pid in descendants(command.pid):
        with suppress(FileNotFoundError, ProcessLookupError):
            # The workers are forks of a server, which is a fork of the command.
            if not descendants(pid) and "tracker" not in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, signal.SIGKILL)
    named(scene, command.wait(), "loader")
    return finish(scene)


def descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and theirs."""
    with suppress(FileNotFoundError):
        below = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return [one for child in below for one in (child, *descendants(child))]
    return []


def appears(work: Path, name: str) -> Callable[[], bool]:
    """Return a function that says whether a file of this pattern is there."""
    return lambda: next(work.glob(name), None) is not None


def writer(name: str, share: float | None, scene: Scene) -> str:
    """Kill a command that writes, then try it again."""
    scene.take(*INPUTS)
    words = WRITERS[name]
    scene.outputs = {output(name), "out.ranges.npy"}
    command = scene.start(*words)
    end = time.monotonic() + (share or 0) * seconds(scene, name)
    begun = appears(scene.work, ".out*")
    command.until(begun if share is None else lambda: time.monotonic() >= end)
    kill(scene, command)
    whole = (scene.work / output(name)).exists()
    again = scene.run(*words)
    # What the first try has finished is there, whole, and is not written again.
    scene.check(again.status == (1 if whole else 0), f"status {again.status}")
    same_output(scene, name)
    scene.outputs |= {path.name for path in scene.work.glob(".out*")}
    return "; ".join(map(shown, scene.ended))

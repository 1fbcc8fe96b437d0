"""Signals in each phase of a command: saved, cleaned up, documented status."""

import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .kills import EVENTS, appears, begin
from .rows import Row, shown
from .scene import Scene
from .stock import INPUTS, START, TEXT, WRITERS, output, same_output, same_run, seconds

SIGNALS = {name: getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP")}
# Files whose appearance begins a phase.
PHASES = {
    "while it imports": "",
    "in the set-up": EVENTS["its directory is there"],
    "when config.json is there": EVENTS["config.json is there"],
    "in the steps": EVENTS["the first checkpoint is there"],
    "while saving": EVENTS["the third checkpoint is written"],
    "in the last score": EVENTS["the last checkpoint is there"],
    "when the report is there": EVENTS["the report is there"],
    "in the export": EVENTS["the model is written"],
}


def rows(seed: int) -> Iterator[Row]:
    for label, number in SIGNALS.items():
        for phase, when in PHASES.items():
            attack = partial(train, number, when)
            yield Row("signals", f"{label} to train {phase}", "130, then the same", attack)
    for name in WRITERS:
        for label, number in SIGNALS.items():
            for phase in ("midway", "when its output is begun"):
                if label != "SIGHUP" or phase == "midway":
                    attack = partial(writer, name, number, phase == "midway")
                    status = f"{128 + number}, then the same"
                    yield Row("signals", f"{label} to {name} {phase}", status, attack)


def train(number: int, when: str, scene: Scene) -> str:
    """Send a signal to a run, then finish it."""
    scene.take(*TEXT)
    scene.outputs = {"runs"}
    # Forks have imported everything, so a new interpreter is interrupted once it loads torch.
    command = scene.start(*START, cold=not when)
    about = Path(f"/proc/{command.pid}")

    def loading() -> bool:  # Before its exec it is a fork of a process that has loaded torch.
        begun = "train.py" in (about / "cmdline").read_text()
        return begun and "libtorch" in (about / "maps").read_text()

    command.until(appears(scene.work, when) if when else loading)
    command.send(number)
    ended = command.wait()
    # A signal that comes after the last line finds the run finished.
    late = ended.status == 0 and "report runs/tiny" in ended.out
    scene.check(ended.status == 130 or late, f"status {ended.status}, expected 130")
    left = [path.name for path in (scene.work / "runs").rglob(".*partial*")]
    scene.check(not left, f"left: {left}")
    again = begin(scene).wait()
    scene.check(again.status == 0, f"status {again.status}, expected 0")
    same_run(scene)
    return "; ".join(map(shown, scene.ended))


def writer(name: str, number: int, midway: bool, scene: Scene) -> str:
    """Send a signal to a command that writes, then try it again."""
    scene.take(*INPUTS)
    scene.outputs = {output(name), "out.ranges.npy"}
    command = scene.start(*WRITERS[name])
    end = time.monotonic() + seconds(scene, name) / 2
    past = (lambda: time.monotonic() >= end) if midway else appears(scene.work, ".out*")
    command.until(past)
    command.send(number)
    ended = command.wait()
    late = ended.status == 0
    want = 128 + number
    scene.check(ended.status == want or late, f"status {ended.status}, expected {want}")
    left = [path.name for path in scene.work.glob(".out*")]
    scene.check(not left, f"left: {left}")
    if not late:
        scene.run(*WRITERS[name])
    same_output(scene, name)
    return "; ".join(map(shown, scene.ended))

"""Two commands that write to one place at once: one writes, the other refuses by name."""

import random
import time
from collections.abc import Iterator
from functools import partial

from .rows import Row, named, shown
from .scene import Scene
from .stock import (
    INPUTS,
    RESUME,
    START,
    TEXT,
    WRITERS,
    output,
    same_output,
    same_run,
    seconds,
    take_stopped,
)

OTHER = [*START, "--seed", "7"]
TRAINING = {
    "two starts of one seed": (START, START),
    "two starts of two seeds": (START, OTHER),
    "a start and a resume": (START, RESUME),
    "two resumes": (RESUME, RESUME),
}


def rows(seed: int) -> Iterator[Row]:
    rng = random.Random(seed)
    for name, commands in TRAINING.items():
        for i in range(10):
            # From both at once to the second when the first has nearly ended.
            share = round((i + rng.random()) / 10, 3) if i else 0.0
            label = f"{name}, {share:.3f} of a run apart"
            attack = partial(trainings, commands, share)
            yield Row("races", label, "one whole run, 1 for the other", attack)
    for name in WRITERS:
        for i in range(10 if name == "export" else 4):
            share = round((i + rng.random()) / 10, 3) if i else 0.0
            label = f"two of {name}, {share:.3f} of a command apart"
            yield Row(
                "races", label, "one whole output, 1 for the other", partial(two, name, share)
            )


def together(scene: Scene, commands: tuple[list[str], list[str]], apart: float) -> list[int]:
    """Start two commands some seconds apart; return which of them succeeded."""
    first = scene.start(*commands[0])
    first.until(lambda: time.monotonic() - first.begun >= apart)
    running = [first, scene.start(*commands[1])]
    while not all([command.poll() for command in running]):
        time.sleep(0.003)
    return [i for i, command in enumerate(running) if command.wait().status == 0]


def trainings(commands: tuple[list[str], list[str]], share: float, scene: Scene) -> str:
    """Start or resume one run twice."""
    scene.take(*TEXT)
    if commands[0] == RESUME:
        take_stopped(scene)
    scene.outputs = {"runs"}
    won = together(scene, commands, share * seconds(scene, "train"))
    # A resume of a finished run has nothing to do, and succeeds.
    idle = [x for x in scene.ended if x.status == 0 and "nothing to do" in x.out]
    scene.check(len(won) - len(idle) == 1, f"{len(won)} succeeded")
    for ended in scene.ended:
        if ended.status:
            named(scene, ended, "runs/tiny")
    if won:
        same_run(scene, want="other" if won == [1] and commands[1] == OTHER else "tiny")
    return "; ".join(map(shown, scene.ended))


def two(name: str, share: float, scene: Scene) -> str:
    """Run a command that writes twice."""
    scene.take(*INPUTS)
    words = WRITERS[name]
    scene.outputs = {output(name), "out.ranges.npy"}
    won = together(scene, (words, words), share * seconds(scene, name))
    scene.check(len(won) == 1, f"{len(won)} succeeded")
    for ended in scene.ended:
        if ended.status:
            named(scene, ended, "out")
    if won:
        same_output(scene, name)
    return "; ".join(map(shown, scene.ended))

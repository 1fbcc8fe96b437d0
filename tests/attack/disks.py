"""Disks that fill, modes, descriptors, and standard streams that are closed or full."""

import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .kills import begin
from .rows import Row, named, shown
from .scene import Limits, Scene
from .stock import CLI, ENCODE, INPUTS, START, TEXT, WRITERS, output, same_output, same_run

# Bytes of a file at which the disk is full. The largest is above every file but the weights.
SIZES = (0, 1_000, 4_000, 20_000)
STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}
COMMANDS = {"train": START, "encode to stdout": ENCODE, **WRITERS}


def rows(seed: int) -> Iterator[Row]:
    for size in (*SIZES, 40_000, 60_000):
        yield row(f"train, no file above {size} bytes", "1, then the same", partial(train, size))
    for name in WRITERS:
        for size in SIZES:
            yield row(
                f"{name}, no file above {size} bytes", "1, or the same", partial(writer, name, size)
            )
    for name in ("train", *WRITERS):
        for umask in (0o022, 0o002, 0o077):
            yield row(
                f"{name} under umask {umask:03o}", "modes follow it", partial(modes, name, umask)
            )
        for count in (64, 32, 24):
            yield row(
                f"{name} with {count} descriptors", "1, or the same", partial(few, name, count)
            )
    for name in COMMANDS:
        for stream, number in STREAMS.items():
            yield row(
                f"{name}, {stream} closed",
                "documented, no traceback",
                partial(closed, name, number, False),
            )
        for stream in ("stdout", "stderr"):
            yield row(
                f"{name}, {stream} full",
                "documented, no traceback",
                partial(closed, name, STREAMS[stream], True),
            )
    yield row("encode of texts from a closed stdin", "0, nothing", no_texts)
    for name in WRITERS:
        yield row(f"{name} into a file's place", "1, names out", partial(blocked, name, "out/x"))
        yield row(f"{name} into /proc", "1, names /proc", partial(blocked, name, "/proc/out"))
        yield row(
            f"{name} into /dev/full", "1, names /dev/full", partial(blocked, name, "/dev/full")
        )
        yield row(f"{name} onto an old output", "1, names out; unchanged", partial(old, name))
        yield row(f"{name} onto a link to nothing", "1, names out", partial(link, name))


def row(input: str, expected: str, attack) -> Row:  # noqa: ANN001
    return Row("disks", input, expected, attack)


def train(size: int, scene: Scene) -> str:
    """Fill the disk under a run, then try again with room."""
    scene.take(*TEXT)
    scene.outputs = {"runs"}
    ended = scene.run(*START, limits=Limits(file_size=size))
    named(scene, ended)
    scene.check("runs" in "".join(ended.errors), "does not name a file")
    left = [path.name for path in (scene.work / "runs").rglob(".*partial*")]
    scene.check(not left, f"left: {left}")
    again = begin(scene).wait()
    scene.check(again.status == 0, f"then status {again.status}, expected 0")
    same_run(scene)
    return "; ".join(map(shown, scene.ended))


def writer(name: str, size: int, scene: Scene) -> str:
    """Fill the disk under a command, then try again with room."""
    scene.take(*INPUTS)
    ended = scene.run(*WRITERS[name], limits=Limits(file_size=size))
    made = {path.name for path in scene.work.glob("out*")} | {
        p.name for p in scene.work.glob(".out*")
    }
    scene.outputs = {output(name), "out.ranges.npy"}
    if ended.status:
        named(scene, ended, "out")
        scene.check(not made, f"left: {made}")
        scene.run(*WRITERS[name])
    same_output(scene, name)
    return "; ".join(map(shown, scene.ended))


def modes(name: str, umask: int, scene: Scene) -> None:
    """Check the modes of everything that a command writes."""
    scene.take(*(TEXT if name == "train" else INPUTS))
    scene.outputs = {"runs/tiny" if name == "train" else output(name)}
    ended = scene.run(*COMMANDS[name], limits=Limits(umask=umask))
    scene.check(ended.status == 0, f"status {ended.status}, expected 0")
    for top in scene.outputs:
        for path in (scene.work / top, *(scene.work / top).rglob("*")):
            if path.exists():
                mode = stat.S_IMODE(path.stat().st_mode)
                want = (0o777 if path.is_dir() else 0o666) & ~umask
                scene.check(
                    mode == want, f"{path.relative_to(scene.work)}: mode {mode:o}, not {want:o}"
                )


def few(name: str, count: int, scene: Scene) -> None:
    """Run with few descriptors."""
    scene.take(*(TEXT if name == "train" else INPUTS))
    ended = scene.run(*COMMANDS[name], limits=Limits(descriptors=count))
    scene.outputs = {"runs"} if name == "train" else {output(name)} if ended.status == 0 else set()
    if ended.status:
        named(scene, ended)
        line = "".join(ended.errors)
        scene.check("open files" in line, f"does not say why: {line}")
    elif name == "train":
        same_run(scene)
    else:
        same_output(scene, name)


def closed(name: str, number: int, full: bool, scene: Scene) -> None:
    """Run with a standard stream that is closed, or whose disk is full."""
    scene.take(*(TEXT if name == "train" else INPUTS))
    limits = Limits(full=(number,)) if full else Limits(closed=(number,))
    # With texts as arguments nobody reads standard input.
    ended = scene.run(*COMMANDS[name], limits=limits)
    scene.outputs = {"runs"} if name == "train" else {"out", "out.jsonl", "out.npy"}
    # A run takes a stream that cannot be written for a closed terminal: it saves and ends.
    known = (0, 1, 130) if name == "train" else (0, 1, 120, 141)
    scene.check(ended.status in known, f"status {ended.status}, expected one of {known}")
    if ended.status == 0 and name == "train":
        same_run(scene)
    elif ended.status == 0 and name in WRITERS:
        same_output(scene, name)
    if number == 0:
        scene.check(ended.status == 0, f"status {ended.status}, expected 0")


def no_texts(scene: Scene) -> None:
    """Ask for texts of a standard input that is closed, which is one without texts."""
    scene.take("model")
    ended = scene.run(*CLI, "encode", "model", limits=Limits(closed=(0,)))
    scene.check(ended.status == 0 and not ended.out, f"status {ended.status}, {ended.out[:80]!r}")


def words(name: str, out: str) -> list[str]:
    """Return a command of WRITERS with another output."""
    suffix = Path(output(name)).suffix
    return [out + suffix if word == output(name) else word for word in WRITERS[name]]


def blocked(name: str, out: str, scene: Scene) -> None:
    """Write where nothing can be written."""
    scene.take(*INPUTS)
    (scene.work / "out").touch()
    named(scene, scene.run(*words(name, out)), out.partition("/x")[0])


def old(name: str, scene: Scene) -> None:
    """Write where an output is: it stays as it is."""
    scene.take(*INPUTS)
    path = scene.work / output(name)
    if path.suffix:
        path.write_text("old")
    else:
        path.mkdir()
        (path / "old").write_text("old")
    named(scene, scene.run(*WRITERS[name]), path.name)


def link(name: str, scene: Scene) -> None:
    """Write where a link is that leads nowhere."""
    scene.take(*INPUTS)
    (scene.work / output(name)).symlink_to("elsewhere")
    named(scene, scene.run(*WRITERS[name]), output(name))

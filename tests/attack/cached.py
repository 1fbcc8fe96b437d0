"""Entries of the cache that are damaged, poisoned, or left by processes that were killed."""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from .rows import Row, shown
from .scene import Scene
from .stock import CLI, START, TEXT, same_run

# Text above this size is stored in the cache; the texts of the attack are smaller.
SMALL = "import runpy, sys; from mlembed.data import sources; sources.BIG = 1; sys.argv[0:1] = []; "
SMALL += "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
SMALL += "runpy.run_path(sys.argv[0], run_name='__main__')"
STORED = ["-c", SMALL, *START]


def every(cache: Path, pattern: str = "*") -> list[Path]:
    """Return the files of all entries."""
    return [path for path in cache.rglob(pattern) if path.is_file() and "locks" not in path.parts]


def ones(pattern: str, cache: Path) -> None:
    """Overwrite the second half of files, which keep their size."""
    for path in every(cache, pattern):
        content = path.read_bytes()
        path.write_bytes(
            content[: len(content) // 2] + b"\xff" * (len(content) - len(content) // 2)
        )


def flip(pattern: str, cache: Path) -> None:
    for path in every(cache, pattern):
        content = bytearray(path.read_bytes())
        if len(content) < 9:
            continue
        content[-9] ^= 1
        path.write_bytes(content)


def write(pattern: str, content: bytes, cache: Path) -> None:
    for path in every(cache, pattern):
        path.write_bytes(content)


def drop(pattern: str, cache: Path) -> None:
    for path in every(cache, pattern):
        path.unlink()


def as_directories(pattern: str, cache: Path) -> None:
    for path in every(cache, pattern):
        path.unlink()
        path.mkdir()


def as_links(pattern: str, cache: Path) -> None:
    for path in every(cache, pattern):
        path.unlink()
        path.symlink_to("/dev/zero")


def remains(cache: Path) -> None:
    """Leave what killed processes leave: partial entries and locks."""
    for entry in [path.parent for path in every(cache, "whole.json")]:
        partial_ = entry.parent / f".partial-{entry.name}-abcd1234"
        shutil.copytree(entry, partial_ / entry.name, dirs_exist_ok=True)
        os.utime(partial_, (1e9, 1e9))
        shutil.rmtree(entry)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "ids overwritten": partial(ones, "ids*"),
    "texts overwritten": partial(ones, "texts*"),
    "a bit of ids flipped": partial(flip, "ids*"),
    "a bit of texts flipped": partial(flip, "texts*"),
    "a bit of every file flipped": partial(flip, "*"),
    "every .npy overwritten": partial(ones, "*.npy"),
    "whole.json {}": partial(write, "whole.json", b"{}"),
    "whole.json a list": partial(write, "whole.json", b"[]"),
    "whole.json empty": partial(write, "whole.json", b""),
    "whole.json null": partial(write, "whole.json", b"null"),
    "whole.json 100,000 brackets": partial(write, "whole.json", b"[" * 100_000),
    "whole.json invalid UTF-8": partial(write, "whole.json", b'{"\xff": 1}'),
    "whole.json {} and ids missing": lambda cache: (
        write("whole.json", b"{}", cache),
        drop("ids*", cache),
    ),
    "ids missing": partial(drop, "ids*"),
    "whole.json missing": partial(drop, "whole.json"),
    "every file empty": partial(write, "*", b""),
    "every file a directory": partial(as_directories, "*"),
    "every file a link to /dev/zero": partial(as_links, "*"),
    "a pickle for ids": partial(write, "ids*", b"\x80\x04\x8c\x02os\x94."),
    "partial entries of a killed process": remains,
}


def rows(seed: int) -> Iterator[Row]:
    for label, damage in DAMAGE.items():
        yield Row("cache", label, "the same run, rebuilt", partial(trained, damage))
    yield Row("cache", "two runs that build one entry", "two whole runs", two)
    yield Row("cache", "the cache is a file", "the same run, a warning", a_file)
    yield Row(
        "cache", "the cache is in /proc", "the same run, a warning", partial(elsewhere, "/proc/x")
    )
    yield Row(
        "cache",
        "the cache is /dev/full",
        "the same run, a warning",
        partial(elsewhere, "/dev/full"),
    )
    yield Row("cache", "`cache` lists, and clears what is old", "0", command)


def filled(scene: Scene, env: dict[str, str]) -> None:
    """Run once to fill the row's own cache, and remove the run."""
    ended = scene.run(*STORED, env=env)
    scene.check(ended.status == 0, f"status {ended.status}, expected 0")
    scene.check(every(scene.work / "cache"), "the cache is empty")
    shutil.rmtree(scene.work / "runs")


def own(scene: Scene) -> dict[str, str]:
    """Return the environment with a cache in the row's folder."""
    scene.take(*TEXT)
    scene.outputs = {"runs", "cache"}
    return {"MLEMBED_CACHE": str(scene.work / "cache")}


def trained(damage: Callable[[Path], None], scene: Scene) -> str:
    """Damage the cache and train."""
    env = own(scene)
    filled(scene, env)
    damage(scene.work / "cache")
    ended = scene.run(*STORED, env=env)
    scene.check(ended.status == 0, f"status {ended.status}, expected 0")
    same_run(scene)
    left = [path.name for path in (scene.work / "cache").rglob(".partial-*")]
    scene.check(not left, f"left: {left}")
    again = [path for path in every(scene.work / "cache", "whole.json") if path.stat().st_size > 4]
    scene.check(again, "no entry is whole")
    return shown(ended)


def two(scene: Scene) -> None:
    """Run two trainings at once, which share the cache."""
    env = own(scene)
    first = scene.start(*STORED, env=env)
    second = scene.start(*STORED, "--name", "second", env=env)
    for command in (first, second):
        scene.check(command.wait().status == 0, f"status {command.wait().status}, expected 0")
    same_run(scene)
    same_run(scene, "runs/second")


def a_file(scene: Scene) -> None:
    """Train with a cache that is a file."""
    env = own(scene)
    scene.outputs = {"runs"}
    (scene.work / "cache").write_text("a file")
    scene.run(*STORED, env=env)
    scene.check(scene.ended[-1].status == 0, f"status {scene.ended[-1].status}, expected 0")
    same_run(scene)


def elsewhere(place: str, scene: Scene) -> None:
    """Train with a cache that cannot be written."""
    env = own(scene) | {"MLEMBED_CACHE": place}
    scene.run(*STORED, env=env)
    scene.check(scene.ended[-1].status == 0, f"status {scene.ended[-1].status}, expected 0")
    same_run(scene)


def command(scene: Scene) -> None:
    """List the cache, and clear it."""
    env = own(scene)
    filled(scene, env)
    for options in ([], ["--clear"]):
        ended = scene.run(*CLI, "cache", *options, env=env)
        scene.check(ended.status == 0, f"status {ended.status}, expected 0")
    scene.check(not every(scene.work / "cache", "ids*"), "nothing was cleared")

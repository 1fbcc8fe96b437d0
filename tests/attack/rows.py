"""Rows of the attack: an input, what is expected, and the function that tries it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .scene import Ended, Limits, Scene

Prepare = Callable[[Path], Any]
NOTHING = Limits()


@dataclass(frozen=True)
class Row:
    """One attack. `attack` returns what came, or None for how the last command ended."""

    kind: str
    input: str
    expected: str
    attack: Callable[[Scene], str | None]

    @property
    def id(self) -> str:
        """Its kind and input."""
        return f"{self.kind}: {self.input}"


@dataclass(frozen=True)
class Result:
    """Outcome of a row, its faults, and the entries of docs/troubleshooting.md that it met."""

    got: str
    faults: list[str]
    entries: set[str]


def shown(ended: Ended) -> str:
    """Return status and last line of a command."""
    lines = (ended.err if ended.status else ended.out).strip().splitlines()
    return f"{ended.status}: {lines[-1] if lines else ''}"


def named(scene: Scene, ended: Ended, *names: str) -> bool:
    """Check that a command refused, in one line that names everything in `names`.

    Words with a bar between them are alternatives.
    """
    scene.check(ended.status == 1, f"status {ended.status}, expected 1")
    # `exit_weights` and `exit-weights` are the same option.
    # The dry run says on standard output why it refuses a source.
    line = ("".join(ended.errors) or ended.out).replace("_", "-")
    spelt = {name: name.replace("_", "-").split("|") for name in names}
    missing = [name for name, words in spelt.items() if not any(word in line for word in words)]
    scene.check(not missing, f"does not name {', '.join(missing)}")
    return ended.status == 1


def refused(
    kind: str,
    input: str,
    argv: list[str],
    names: tuple[str, ...],
    take: tuple[str, ...] = (),
    prepare: Prepare | None = None,
    limits: Limits = NOTHING,
    **options: Any,
) -> Row:
    """Return a row of a command that has to refuse its input, and to write nothing.

    Args:
        names: words that its one line has to hold.
        take: shared inputs to copy.
        prepare: spoils them.
    """

    def attack(scene: Scene) -> None:
        scene.take(*take)
        if prepare:
            prepare(scene.work)
        named(scene, scene.run(*argv, limits=limits, **options), *names)

    return Row(kind, input, f"1, names {' '.join(names)}", attack)


def harmless(
    kind: str,
    input: str,
    argv: list[str],
    names: tuple[str, ...],
    same: Callable[[Scene], None],
    take: tuple[str, ...],
    prepare: Prepare,
    outputs: tuple[str, ...] = (),
    limits: Limits = NOTHING,
    **options: Any,
) -> Row:
    """Return a row whose command refuses its input by name, or gives what it gives undisturbed."""

    def attack(scene: Scene) -> None:
        scene.take(*take)
        prepare(scene.work)
        ended = scene.run(*argv, limits=limits, **options)
        if ended.status == 0:
            scene.outputs |= set(outputs)
            same(scene)
        else:
            named(scene, ended, *names)

    return Row(kind, input, f"1, names {' '.join(names)}, or the same result", attack)


def same_vectors(scene: Scene) -> None:
    """Check that the last command printed the undisturbed vectors of `ENCODE`."""
    want = (scene.stock / "vectors").read_text()
    scene.check(scene.ended[-1].out == want, "other vectors")

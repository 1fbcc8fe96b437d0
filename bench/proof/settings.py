"""Arguments of the proof, `NAME=VALUE`, and the places of its files. Imports no torch."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mlembed.runtime import files

TUNED = "deu spa rus hin tur swh vie heb ind ell"  # Languages that the recipe was chosen on.


@dataclass(frozen=True)
class Proof:
    """The arguments of `python -m bench proof`.

    model, data, mixture, out: paths. source: a sentence about the model. minutes: training of each
    run. languages: codes of tuning, which no score contains. pairs: most pairs of a language of
    bitext. rank: the small vocabulary rank. recipe, options: of train.py.
    """

    model: str
    data: str
    out: str
    mixture: str = ""
    source: str = ""
    minutes: float = 12.0
    seeds: tuple[int, ...] = (0, 1)
    languages: str = TUNED
    pairs: int = 200
    rank: int = 64
    recipe: str = "elastic"
    options: str = ""

    @property
    def folder(self) -> Path:
        return Path(self.out)

    @property
    def text(self) -> str:
        """Training text: the mixture, or every file of DATA/train/."""
        return self.mixture or str(Path(self.data) / "train")

    def piece(self, name: str) -> Path:
        return self.folder / "pieces" / f"{name}.json"

    def read(self, name: str) -> dict[str, Any]:
        """Return the result of a piece that is done."""
        result: dict[str, Any] = files.read_json(self.piece(name))
        return result

    def without_paths(self, command: list[str]) -> str:
        """Return a command with MODEL, DATA, MIXTURE and OUT instead of their paths."""
        places = ("OUT", self.out), ("MODEL", self.model), ("DATA", self.data)
        text = shlex.join(command)
        for name, path in (("MIXTURE", self.mixture), *places):
            text = text.replace(path, name) if path else text
        return text

    @property
    def command(self) -> str:
        """The command that repeats this proof, with words instead of paths."""
        words = ["MODEL=DIR", "DATA=DIR", "OUT=DIR", *["MIXTURE=FILE"] * bool(self.mixture)]
        for one in fields(Proof):
            value = getattr(self, one.name)
            if one.name not in ("model", "data", "out", "mixture", "source") and (
                value != one.default
            ):
                value = ",".join(map(str, value)) if isinstance(value, tuple) else value
                words.append(f"{one.name.upper()}={value}")
        return self.without_paths(["python", "-m", "bench", "proof", *words])

    @property
    def runs(self) -> Path:
        """Folder of the runs of train.py."""
        return self.folder / "runs"

    def trained(self, model: str) -> Path:
        """Return the directory of a model, of which `cut` and `start` are the source."""
        if model in ("cut", "start"):
            return Path(self.model)
        ours = self.runs / model / "model"
        return self.folder / "models" / model if model.startswith("peer") else ours


def parse(arguments: Sequence[str]) -> Proof:
    """Return the arguments `MODEL=DIR DATA=DIR ..`, with absolute paths.

    Raises:
        ValueError: a name that does not exist or is missing, a value of another type, a DATA or
            MODEL that does not exist.
    """
    names = {one.name.upper(): one for one in fields(Proof)}
    values: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in names or not equals:
            raise ValueError(
                f"argument: expected NAME=VALUE of {', '.join(names)}, got {argument!r}"
            )
        values[names[name].name] = value
    for name in ("model", "data", "out"):
        if not values.get(name):
            raise ValueError(f"{name.upper()}: expected a directory, got none")
    for name in ("pairs", "rank", "minutes"):
        if name in values:
            values[name] = _positive(name, values[name])
    if "seeds" in values:
        seeds = values["seeds"].replace(",", " ").split()
        if not seeds or not all(seed.isdecimal() for seed in seeds):
            raise ValueError(f"SEEDS: expected numbers like 0,1, got {values['seeds']!r}")
        values["seeds"] = tuple(dict.fromkeys(map(int, seeds)))
    for name in ("model", "data", "mixture"):
        if name in values and not Path(values[name]).exists():
            raise ValueError(f"{name.upper()}: expected a path that exists, got {values[name]!r}")
    for name in ("model", "data", "mixture", "out"):
        if values.get(name):
            values[name] = str(Path(values[name]).absolute())
    return Proof(**values)


def _positive(name: str, value: str) -> float:
    kind = float if name == "minutes" else int
    try:
        number = kind(value)
    except ValueError:
        number = 0
    if not number > 0:
        raise ValueError(f"{name.upper()}: expected a number above 0, got {value!r}")
    return number


def check_settings(proof: Proof) -> None:
    """Write the arguments to OUT, or compare them with those of an earlier call.

    Raises:
        ValueError: OUT holds pieces of other arguments; they are named.
    """
    path = proof.folder / "settings.json"
    settings = json.loads(json.dumps(asdict(proof)))
    for name in ("out", "source"):
        del settings[name]
    if not path.exists():
        files.write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    before = files.read_json(path)
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{name.upper()}: expected {before.get(name)!r}, with which {path.parent} was "
                f"begun, got {value!r}: choose another OUT, or delete that folder"
            )

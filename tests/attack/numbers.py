"""Numbers that no option can mean, in every option of every command and every field of a run."""

import dataclasses
import json
import typing
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mlembed import config

from .rows import Row, refused
from .stock import CLI, ENCODE, INPUTS, START, TEXT, TRAIN, WRITERS

NEW = [*START, "--name", "new"]
# Fields of a run in which any whole number has a meaning.
ANY = {"loss.num_negatives"}


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted name and type of every field of a run that is a number or a tuple of them."""
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from leaves(typing.cast(type, kind), f"{prefix}{name}.")
        elif kind in (int, float):
            yield prefix + name, kind
        elif typing.get_origin(kind) is tuple and typing.get_args(kind)[0] in (int, float):
            yield prefix + name, typing.get_args(kind)[0]


def nested(name: str, value: Any) -> dict[str, Any]:
    """Return {"a": {"b": value}} for a.b."""
    head, _, rest = name.partition(".")
    return {head: nested(rest, value) if rest else value}


def write_config(text: str, work: Path) -> None:
    (work / "odd.json").write_text(text)


def config_text(name: str, value: str) -> str:
    """Return a config.json in which one field is a number as it is spelt."""
    return json.dumps(nested(name, "HERE")).replace('"HERE"', value)


def rows(seed: int) -> Iterator[Row]:
    for name, kind in leaves(config.Run):
        option = "--" + name.replace("_", "-")
        for value in ("nan", "inf", "-inf") if kind is float else ("-7", "1e30", "nan"):
            if not (value == "-7" and name in ANY):
                yield option_row(f"train {option} {value}", [*NEW, f"{option}={value}"], name)
        # JSON knows no NaN, but Python reads and writes it.
        value = "NaN" if kind is float else "1e999"
        text = config_text(name, value)
        yield refused(
            "numbers",
            f"config.json {name}: {value}",
            [TRAIN, "odd.json"],
            (f"{leaf(name)}|odd.json",),
            TEXT,
            partial(write_config, text),
        )
    for command, options in COMMANDS.items():
        for words in options:
            yield option_row(f"{command} {words}", [*BASE[command], *words.split()], words[2:])
    for name, value in SOURCES:
        yield refused(
            "numbers",
            f"mixture {name}: {value}",
            [*START, "--data", "mixture.json"],
            (f"{name}|mixture.json",),
            TEXT,
            partial(write_mixture, name, value),
        )


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


def option_row(label: str, argv: list[str], option: str) -> Row:
    """Return a row whose refusal names an option."""
    word = option.split()[0].split("=")[0].rpartition(".")[2]
    return refused("numbers", label, argv, (word,), INPUTS)


def write_mixture(name: str, value: str, work: Path) -> None:
    entry = json.dumps({"path": "pairs.jsonl", name: "HERE"}).replace('"HERE"', value)
    (work / "mixture.json").write_text(f'{{"sources": [{entry}]}}')


SOURCES = [
    (name, value)
    for name in ("weight", "temperature", "cap", "rows", "num_negatives")
    for value in ("NaN", "Infinity", "-3", "1e999", "true", '"1"', "null")
]
BASE = WRITERS | {
    "text": ENCODE,
    "train": NEW,
    "prune": [*CLI, "prune", "model", "out"],
}
COMMANDS = {
    "text": [
        *("--dim 0", "--dim -1", "--dim 33", "--dim 1e3", "--dim nan", f"--dim {2**70}"),
        *("--exit 0", "--exit 3", "--exit nan", "--rank 0", "--rank 17", "--rank nan"),
        *("--max-tokens 0", "--max-tokens -1", "--max-tokens nan"),
    ],
    "export": ["--dim 0", "--dim 33", "--dim nan", "--exit 0", "--exit 3", "--rank 0", "--rank 99"],
    "prune": [
        *("--layers 0", "--layers -1", "--layers 3", "--layers nan", "--width 0", "--width 33"),
        *("--ffn 0", "--ffn 49", "--ffn -1", f"--ffn {2**70}", "--keep-layers 0"),
        *("--keep-layers 3", "--keep-layers 1 1", "--keep-layers 2 1", "--layers 1e0"),
    ],
    "merge": [
        *("--weights nan 1", "--weights inf 1", "--weights -1 2", "--weights 0 0", "--weights 1"),
        *("--method slerp --t nan", "--method slerp --t inf", "--method slerp --t -0.1"),
        *("--method slerp --t 1.1", "--weights 1e308 1e308", "--weights 1e-320 1e-320"),
    ],
    "mine": [
        *("--top 0", "--top -1", "--top nan", "--skip -1", "--negatives 0", "--negatives 9"),
        *("--relative-margin nan", "--relative-margin inf", "--relative-margin -1"),
        *("--absolute-margin nan", "--absolute-margin inf", "--absolute-margin -1"),
        *("--max-score nan", "--max-score 2", "--max-score -2", "--seed -1", f"--seed {2**70}"),
        *("--dim 0", "--dim 33", "--exit 3", "--rank 17"),
    ],
    "evaluate": [
        *("--dim 0", "--dim 33", "--dim 8 8", "--exit 3", "--exit 0", "--rank 0", "--rank 17"),
        *("--shortlist 0", "--shortlist -1", "--shortlist nan", "--funnel nan::"),
        *("--funnel 0::", "--funnel 8:9:", "--funnel 8"),
    ],
    "train": [
        *("--model.exits 2 1", "--model.exits 0 2", "--model.matryoshka-dims 8 8 32"),
        *("--model.ranks 0 8", "--depth.shares nan 0.5", "--depth.shares inf -inf"),
        *("--depth.shares 0.5 0.6", "--loss.custom-exit-weights nan 1", f"--seed {2**70}"),
        *("--loss.exit-weights custom --loss.custom-exit-weights inf 1", "--epochs 1e300"),
        *("--loss.exit-weights custom --loss.custom-exit-weights 0 0", "--epochs 1e-300"),
        *("--optim.lr 1e39", "--optim.lr 0", "--optim.lr -1", "--optim.betas 1 1"),
        *("--optim.betas nan 0.9", "--optim.betas -0.1 0.9", "--optim.eps 0", "--optim.eps -1"),
        *("--loss.temperature 0", "--loss.temperature -1", "--loss.temperature 1e-300"),
        *("--model.rms-norm-eps -1", "--model.rms-norm-eps 0", "--model.rope-theta 0"),
        *("--model.rope-theta -5", "--model.dropout 1", "--model.dropout -0.1"),
        *("--activation-gib -1", "--source-alpha -1e300", "--batch-size 0", "--max-length 1"),
        *("--max-length 513", f"--model.vocab-size {2**40}", "--model.vocab-size 2"),
        *(f"--model.hidden-size {2**30}", f"--model.num-hidden-layers {10**9}"),
        *(f"--model.intermediate-size {2**40}", f"--batch-size {2**62}", f"--pack-tokens {2**70}"),
        *(f"--steps {2**70}", f"--loader-workers {2**20}", f"--loss.memory-bank {2**62}"),
        *(f"--gradient-accumulation-steps {2**62}", "--steps 1e3", "--steps 0", "--steps 1.5"),
    ],
}

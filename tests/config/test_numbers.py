"""Every number of the configuration is finite and in its range, or an error that names it."""

import dataclasses
import json
import re
import typing

import numpy as np
import pytest

from mlembed import config
from mlembed.config import (
    Columns,
    Depth,
    Distill,
    Lora,
    Loss,
    Model,
    Optim,
    Run,
    Source,
    recipes,
    strict,
)
from mlembed.config.mining import Options
from mlembed.training import arguments

# Classes with numbers, what a valid one needs, and the names that errors give to its fields.
CLASSES = {
    Model: ({}, "model."),
    Loss: ({}, "loss."),
    Optim: ({}, "optim."),
    Lora: ({}, "lora."),
    Distill: ({}, "distill."),
    Depth: ({}, "depth."),
    Run: ({}, ""),
    Source: ({"path": "a.jsonl"}, "source a.jsonl: "),
    Options: ({}, ""),
}
NUMBERS = [
    (cls, name, hint, kind, bounds)
    for cls in CLASSES
    for name, hint, kind, bounds in strict.numeric_fields(cls)
]


def check(cls, name, value):
    """Construct a dataclass with one value, and check it."""
    one = cls(**CLASSES[cls][0] | {name: value})
    if cls is Options:
        one.check()


def test_every_class_of_the_configuration_is_listed():
    def nested(cls):
        kinds = [kind for hint in typing.get_type_hints(cls).values()
                 for kind in (hint, *typing.get_args(hint))]  # fmt: skip
        inner = {kind for kind in kinds if dataclasses.is_dataclass(kind)}
        return {cls, *(one for kind in inner for one in nested(kind))}

    assert nested(Run) | {Options} == {*CLASSES, Columns}
    assert len(NUMBERS) > 60 and not strict.numeric_fields(Columns)


def test_a_number_needs_two_bounds():
    for field in (dataclasses.field(default=1), strict.number(1, least=0)):
        cls = dataclasses.make_dataclass("Late", [("late", int, field)])
        with pytest.raises(TypeError, match="Late.late: expected two bounds"):
            strict.check_numbers(cls())


@pytest.mark.parametrize(
    ("cls", "name", "hint", "kind", "bounds"), NUMBERS, ids=lambda x: getattr(x, "__name__", x)
)
def test_number_outside_of_its_bounds_is_an_error(cls, name, hint, kind, bounds):
    several = typing.get_origin(hint) is tuple
    wrong = [True, "3", [1], {}, np.nan, np.inf, -np.inf, 2**70, 10**400, -(2**70), -3]
    wrong += [] if type(None) in typing.get_args(hint) else [None]
    if kind is int:
        wrong += [3.0, 2.5]
    low, high = bounds.items()
    wrong += [low[1]] * (low[0] == "above") + [high[1]] * (high[0] == "below")
    # Several numbers are a tuple, each of which is checked.
    wrong = [(value,) for value in wrong] + [None, 1] if several else wrong
    for value in wrong:
        with pytest.raises(ValueError) as error:
            check(cls, name, value)
        assert re.match(rf"{re.escape(CLASSES[cls][1])}{name}: expected ", str(error.value)), value


@pytest.mark.parametrize(
    "line, message",
    [
        ("--optim.lr inf", "optim.lr: expected at most 10, got inf"),
        ("--optim.lr 1e400", "optim.lr: expected at most 10, got inf"),
        ("--optim.weight-decay nan", "optim.weight_decay: expected 0 or more, got nan"),
        ("--optim.eps inf", "optim.eps: expected at most 1, got inf"),
        ("--loss.temperature inf", "loss.temperature: expected at most 100, got inf"),
        ("--depth.exits 2 4 --depth.shares nan 0.5", "depth.shares: expected 0 or more, got nan"),
        ("--distill.contrastive nan", "distill.contrastive: expected 0 or more, got nan"),
        ("--epochs 1e-300", "epochs: expected 1e-06 or more, got 1e-300"),
        ("--epochs nan", "epochs: expected 0 or more, got nan"),
        ("--epochs inf", "epochs: expected at most 1000000.0, got inf"),
        ("--activation-gib nan", "activation_gib: expected 0 or more, got nan"),
        ("--source-alpha nan", "source_alpha: expected 0 or more, got nan"),
        (f"--seed {2**70}", f"seed: expected less than {2**63}, got {2**70}"),
        ("--model.rms-norm-eps -1", "model.rms_norm_eps: expected 1e-30 or more, got -1.0"),
        ("--model.rope-theta 0", "model.rope_theta: expected 1 or more, got 0.0"),
        ("--loss.matryoshka-weights custom --loss.custom-matryoshka-weights 1 1 1 1 nan",
         "loss.custom_matryoshka_weights: expected 0 or more, got nan"),
        ("--steps 100000000 --gradient-accumulation-steps 1000",
         "steps * gradient_accumulation_steps: expected at most 1000000000, got 100000000000"),
    ],
)  # fmt: skip
def test_command_line(line, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        arguments.parse(["tiny", *line.split()])


@pytest.mark.parametrize(
    "dotted, text, message",
    [
        ("optim.lr", "NaN", "invalid JSON: expected finite numbers, got NaN"),
        ("optim.lr", "1e400", "invalid JSON: expected finite numbers, got 1e400"),
        ("optim.lr", "1e300", "optim.lr: expected at most 10, got 1e+300"),
        ("optim.lr", "-1" + 30 * "0", "optim.lr: expected 1e-12 or more, got -1e+30"),
        ("optim.betas", "[0.9, 1]", "optim.betas: expected less than 1, got 1.0"),
        ("steps", "1e30", "steps: expected int, got 1e+30"),
        ("seed", "-1", "seed: expected 0 or more, got -1"),
    ],
)
def test_file_is_named(dotted, text, message, tmp_path):
    stored = inner = strict.to_dict(recipes.tiny())
    *parts, key = dotted.split(".")
    for part in parts:
        inner = inner[part]
    inner[key] = "PLACE"
    path = tmp_path / "config.json"
    path.write_text(json.dumps(stored).replace('"PLACE"', text))
    with pytest.raises(ValueError) as error:
        config.load(path)
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    "key, text, message",
    [
        ("weight", ".inf", "weight: expected at most 1000000000000.0, got inf"),
        ("weight", "1" + 400 * "0", "weight: expected at most 1000000000000.0, got inf"),
        ("weight", "-1" + 400 * "0", "weight: expected 0 or more, got -inf"),
        ("weight", ".nan", "weight: expected 0 or more, got nan"),
        ("temperature", ".nan", "temperature: expected 0 or more, got nan"),
        ("temperature", "1.0e-9", "temperature: expected 0.0001 or more, got 1e-09"),
        ("cap", "-1", "cap: expected 0 or more, got -1"),
    ],
)
def test_mixture_is_named(key, text, message, tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_text(f"sources:\n  - path: x\n    {key}: {text}\n")
    with pytest.raises(ValueError) as error:
        arguments.parse(["tiny", "--data", str(path)])
    assert str(error.value) == f"{path}: sources[0]: source x: {message}"

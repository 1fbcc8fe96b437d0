"""Weights that no model can have, in every command that reads a model."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .rows import Row, refused
from .scene import Scene
from .stock import ENCODE, START, WRITERS

Q = "layers.0.self_attn.q_proj.weight"
NAMES = (Q, "norm.weight", "layers.1.mlp.down_proj.weight")


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weight: torch.full_like(weight, value)


def one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight.view(-1)[-1] = value
        return weight

    return change


def of(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weight: weight.to(dtype)


CHANGES = {
    "NaN": filled(float("nan")),
    "one NaN": one(float("nan")),
    "one inf": one(float("inf")),
    "one -inf": one(float("-inf")),
    "fp64 1e300": lambda weight: torch.full_like(weight, 1e300, dtype=torch.float64),
    "int32": of(torch.int32),
    "int8": of(torch.int8),
    "bool": of(torch.bool),
    "complex64": of(torch.complex64),
}


def spoil(change: Callable, name: str, work: Path, model: str = "model") -> None:
    """Change one tensor of a model directory."""
    path = work / model / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name].clone()).contiguous()
    save_file(tensors, path, {"format": "pt"})


NEW = [*START, "--name", "new"]
COMMANDS = {
    "encode": ENCODE,
    "encode int8": [*WRITERS["encode"], "--precision", "int8"],
    "encode binary": [*WRITERS["encode"], "--precision", "binary"],
    "mine": WRITERS["mine"],
    "teacher": WRITERS["teacher"],
    "prune": WRITERS["prune"],
    "merge": WRITERS["merge"],
    "evaluate": WRITERS["evaluate"],
    "export": WRITERS["export"],
    "train --init": [*NEW, "--init", "model", "--optim.lr", "2e-5"],
    "train --distill": [*NEW, "--distill.teacher", "model", "--distill.features", "1"],
}
TAKE = ("pairs.jsonl", "nway.jsonl", "dev.jsonl", "texts.txt", "model", "other")


def rows(seed: int) -> Iterator[Row]:
    for command, argv in COMMANDS.items():
        for i, (label, change) in enumerate(CHANGES.items()):
            name = NAMES[i % len(NAMES)]
            yield refused(
                "weights",
                f"{command}, {label} in {name}",
                argv,
                ("model", name.rpartition("layers.")[2]),
                TAKE,
                partial(spoil, change, name),
            )
        zero = partial(spoil, filled(0.0), "norm.weight")
        yield Row("weights", f"{command}, norm.weight 0", "1", partial(zeros, argv, zero))


def zeros(argv: list[str], zero: Callable[[Path], None], scene: Scene) -> None:
    """Try a model whose vectors are all 0, which cannot be of length one."""
    scene.take(*TAKE)
    zero(scene.work)
    # `evaluate` counts such vectors in its report, and ends with status 1.
    scene.outputs = {"out"} if argv == WRITERS["evaluate"] else set()
    scene.run(*argv)
    scene.check(scene.ended[-1].status == 1, f"status {scene.ended[-1].status}, expected 1")

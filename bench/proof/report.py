"""The proof as one JSON object: every number of page and picture, from the pieces that are done."""

import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlembed.runtime import log
from mlembed.runtime.workers import device_of

from ..environment import environment
from . import tasks
from .scoring import LENGTH, TEXTS
from .settings import Proof

COMPETITORS = {
    "ours": "mlembed",
    "cut": "source, cut",
    "start": "mlembed, untrained",
    "peer": "sentence-transformers",
    "corner": "trained alone",
}
README = "README.md"


def report(proof: Proof) -> dict[str, Any]:
    """Return the proof's JSON object; competitors whose pieces are not done are missing."""
    cells = {name: found for name in COMPETITORS if (found := cells_of(proof, name))}
    full = max(cells["cut"], key=lambda cell: (cell["parameters"], cell["dim"]))
    whole = full["score"]
    for cell in (cell for some in cells.values() for cell in some):
        cell["percent"] = 100 * cell["score"] / whole
    device = device_of("auto")
    settings = asdict(proof)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(device),
        "environment": environment(device),
        "source": proof.source or described(Path(proof.model)),
        "command": proof.command,
        "settings": {key: settings[key] for key in SHOWN},
        "measured": {"tokens_a_text": LENGTH, "timed_texts": TEXTS, "megabytes": MEGABYTES},
        "text": proof.read("text") if proof.piece("text").exists() else None,
        "training": training(proof),
        "sizes": {
            name: row
            for name, size in sizes(full, proof.rank).items()
            if (row := {who: one for who, some in cells.items() if (one := at(some, *size))})
        },
        "cells": {
            who: [{k: v for k, v in cell.items() if k not in DETAILS} for cell in some]
            for who, some in cells.items()
        },
    }


SHOWN = "minutes", "seeds", "languages", "pairs", "rank", "recipe", "options"
DETAILS = "points", "scripts", "languages"
MEGABYTES = "weights in fp32, the vocabulary as factors at a rank, without tokenizer"


def sizes(full: dict[str, Any], rank: int) -> dict[str, tuple[int, int, bool]]:
    """Return (dim, exit, whether at the small rank) of the named sizes."""
    D, L = full["dim"], full["exit"]
    half = max(1, L // 2)
    return {
        "full": (D, L, False),
        "half the width": (max(1, D // 2), L, False),
        "half the depth": (D, half, False),
        f"rank {rank}": (D, L, True),
        f"half the depth, rank {rank}": (D, half, True),
    }


def at(cells: list[dict[str, Any]], dim: int, exit: int, small: bool) -> dict[str, Any] | None:
    """Return the cell of a size, None if it is not among the cells."""
    for cell in cells:
        if (cell["dim"], cell["exit"], cell["small"]) == (dim, exit, small):
            return cell
    return None


def cells_of(proof: Proof, who: str) -> list[dict[str, Any]]:
    """Return a competitor's cells, averaged over the seeds whose pieces are done.

    score: mean over seeds of the mean of the four `numbers`. spread: highest minus lowest seed.
    """
    names = (
        [who] if who in ("cut", "start", "corner") else [f"{who}-{seed}" for seed in proof.seeds]
    )
    cells = []
    for part in ("full", "small"):
        done = [f"{name}@{part}" for name in names if proof.piece(f"{name}@{part}").exists()]
        runs = [proof.read(name)["cells"] for name in done]
        for same in zip(*runs, strict=True):
            cells.append(averaged(same) | {"small": part == "small"})
    return cells


def averaged(same: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Return the mean of one size's cells over seeds."""
    points = {
        kind: {name: mean(cell["points"][kind][name] for cell in same) for name in of}
        for kind, of in same[0]["points"].items()
    }
    every = [tasks.score(cell["points"]) for cell in same]
    return {
        **same[0],
        "texts_per_second": mean(cell["texts_per_second"] for cell in same),
        "seeds": len(same),
        "score": mean(every),
        "spread": max(every) - min(every),
        "numbers": tasks.numbers(points),
        "scripts": tasks.bitext(points, "script"),
        "languages": tasks.bitext(points, "name"),
        "points": points,
    }


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


def training(proof: Proof) -> dict[str, Any]:
    """Return what each run took: seconds, steps, tokens, and its command."""
    names = [f"ours-{seed}" for seed in proof.seeds] + ["corner"]
    names += [f"peer-{seed}" for seed in proof.seeds]
    return {name: proof.read(name)["training"] for name in names if proof.piece(name).exists()}


def machine(device: torch.device) -> str:
    """Return the processor or GPU, and the threads of a CPU."""
    name = log.device_name(device)
    if device.type == "cuda":
        return name
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {name}"


def described(model: Path) -> str:
    """Return the first sentence of a directory's README, or its name."""
    path = model / README
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    plain = (line for line in lines if line[:1].isalpha())
    return next(plain, f"the model in {model.name}")

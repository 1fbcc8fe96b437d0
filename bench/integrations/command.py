"""python -m bench integrations: our loss in SentenceTransformerTrainer next to Matryoshka2dLoss.

Each loss trains the same model on the same pairs in a process of its own. Printed are, for each
loss, the held-out loss of some exits and widths by step, and the median time and the peak memory of
a step. --out writes the held-out loss of all exits and widths as JSON.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from mlembed.runtime import files
from mlembed.runtime.errors import one_line_errors

from ..children import end, start
from ..environment import environment
from .settings import LOSSES, Settings


@dataclass(frozen=True)
class Options(Settings):
    """Train with each loss and compare."""

    losses: tuple[str, ...] = LOSSES
    out: Path | None = None
    """File for all numbers."""


def main(arguments: Sequence[str]) -> None:
    """Train with each loss, print the tables, and write the JSON file."""
    with one_line_errors():
        options = tyro.cli(Options, prog="python -m bench integrations", args=list(arguments))
        settings = asdict(options)
        losses, out = settings.pop("losses"), settings.pop("out")
        if unknown := {*losses} - {*LOSSES}:
            raise ValueError(f"losses: expected some of {LOSSES}, got {sorted(unknown)}")
        results = []
        for loss in losses:
            results.append(train(loss, settings))
            print(f"{loss}: {results[-1]['seconds_a_step']} s a step", flush=True)
        print(markdown(results), flush=True)
        if out:
            # Names without their folders, as the file may be published.
            settings |= {name: Path(settings[name]).name for name in ("model", "data")}
            known = {"environment": about(), "settings": settings, "results": results}
            files.write_text(out, json.dumps(known, indent=1) + "\n")


def train(loss: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a process that trains with one loss prints. Its errors are on its stderr."""
    given = json.dumps({"loss": loss, **settings})
    command = [sys.executable, "-m", "bench.integrations.training", given]
    with start(command, stdout=subprocess.PIPE) as process:
        try:
            lines = process.communicate()[0].splitlines()
        finally:
            end(process)
    if process.returncode:
        sys.exit(process.returncode)
    return json.loads(lines[-1])


def about() -> dict[str, Any]:
    """Return versions and the device."""
    import torch

    return environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """Return two tables: held-out losses by step, of some exits and widths, and costs of a step."""
    steps, cells = results[0]["held_out"], [*next(iter(results[0]["held_out"].values()))]
    exits, dims = ([*dict.fromkeys(c.split("_")[i] for c in cells)] for i in (0, 1))
    corners = [f"{e}_{d}" for e in (exits[-1], exits[1]) for d in (dims[-1], dims[0])]
    lines = [["loss", "held-out loss at", *(f"step {step}" for step in steps)]]
    lines += [
        [result["loss"], cell, *(f"{some[cell]:.3f}" for some in result["held_out"].values())]
        for result in results
        for cell in corners
    ]
    costs = [["loss", "seconds a step", "of CPU time", "peak MiB"]]
    names = "seconds_a_step", "cpu_seconds_a_step", "peak_mib"
    costs += [[r["loss"], *(f"{r[name]}" for name in names)] for r in results]
    return "\n\n".join(piped(table) for table in (lines, costs))


def piped(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first line is the header."""
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))

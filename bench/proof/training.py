"""Runs of train.py: our recipe, and our recipe for one corner alone.

The number of steps comes from a few steps whose time is measured. Minutes are wall-clock of the
steps, and of the first layers before them: reading text, set-up and export are not part of them.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlembed import config
from mlembed.inference.encoder import Encoder
from mlembed.modeling import pretrained
from mlembed.publishing.export import write_model
from mlembed.runtime import files, log

from .. import ROOT
from ..children import end, start
from .settings import Proof

TRIAL = 24  # Steps whose time is measured, of which the last half counts.


def ours(proof: Proof, seed: int) -> dict[str, Any]:
    """Train the recipe from the source, with the steps of the first seed."""
    name, first = f"ours-{seed}", proof.seeds[0]
    steps = None if seed == first else proof.read(f"ours-{first}")["training"]["steps"]
    options = ["--init", proof.model, "--seed", str(seed)]
    return train(proof, name, options, 60 * proof.minutes, steps)


def corner(proof: Proof) -> dict[str, Any]:
    """Train half the depth at the small rank and full width.

    It gets the seconds that our run of the first seed took.
    """
    first = f"ours-{proof.seeds[0]}"
    start, exit, width = half_of_source(proof, config.load(proof.runs / first / "config.json"))
    shape = {"exits": exit, "matryoshka-dims": width, "ranks": proof.rank}
    options = [word for key, value in shape.items() for word in (f"--model.{key}", str(value))]
    options += ["--init", str(start), "--distill.teacher", proof.model]
    options += ["--seed", str(proof.seeds[0])]
    seconds = proof.read(first)["training"]["seconds"]
    return train(proof, "corner", options, seconds)


def half_of_source(proof: Proof, run: config.Run) -> tuple[Path, int, int]:
    """Write the layers of the source from which half the depth of our run starts.

    Returns:
        the directory, its depth and its width.
    """
    encoder = Encoder.load(proof.model, "cpu", say=lambda _: None)
    shape, half = encoder.model.cfg, proof.folder / "models" / "half"
    exit = max(1, shape.num_hidden_layers // 2)
    exits = tuple(sorted({exit, shape.num_hidden_layers}))
    if not half.exists():
        cfg = replace(shape, exits=exits, last_layers=run.model.last_layers)
        whole = replace(encoder, model=pretrained.load(proof.model, cfg))
        with files.atomic_directory(half) as partial:
            write_model(partial, whole, cfg.hidden_size, exit, None)
    return half, exit, shape.hidden_size


def train(
    proof: Proof,
    name: str,
    options: list[str],
    seconds: float | None,
    steps: int | None = None,
) -> dict[str, Any]:
    """Train a run to its end, or resume it, and return its time, steps, tokens and command.

    Its checkpoints are removed once its model is written.

    Args:
        options: of train.py, --init among them. seconds: of training, None for the recipe's steps
            or epochs. steps: by default those that fit into the seconds.

    Raises:
        ValueError: train.py failed; its last line.
    """
    directory = proof.runs / name
    saved = directory / "config.json"
    begin = [proof.recipe, "--data", proof.text, "--eval"]
    begin += ["--output-dir", str(proof.runs), "--tracker", "none"]
    begin += [*shlex.split(proof.options), *options]
    again = ["--resume"] if saved.exists() else []
    if not again:
        shutil.rmtree(directory, ignore_errors=True)
    if seconds and again:
        steps = config.load(saved).steps
    elif seconds:
        steps = steps or measured_steps(proof, name, begin, seconds)
    last = ["--name", name, "--keep-checkpoints", "1"]
    if steps:
        last += ["--steps", str(steps), "--log-every", str(max(1, steps // 50))]
        last += ["--save-every", str(max(1, steps // 3))]
    run(proof, name, [*begin, *last, *again])
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    command = proof.without_paths(["python", "train.py", *begin, *last])
    return {"training": trained(directory) | {"command": command}}


def measured_steps(proof: Proof, name: str, arguments: list[str], seconds: float) -> int:
    """Return the steps that fit into the seconds, by the time of a few, and of the first layers."""
    trial = f"{name}-trial"
    shutil.rmtree(proof.runs / trial, ignore_errors=True)
    half = TRIAL // 2
    last = ["--name", trial, "--steps", str(TRIAL), "--log-every", str(half), "--save-every", "0"]
    run(proof, trial, [*arguments, *last], until=TRIAL)
    a_step = window_seconds(train_lines(proof.runs / trial)[-1], half) / half
    a_step += fit_seconds(proof.runs / f"{trial}.log") / TRIAL
    shutil.rmtree(proof.runs / trial, ignore_errors=True)
    return max(1, round(seconds / a_step))


def run(proof: Proof, name: str, arguments: list[str], until: int = 0) -> None:
    """Run train.py, with its output in OUT/runs/NAME.log.

    Args:
        until: end the process once it has logged this step; 0 waits for its end.
    """
    path = proof.runs / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "train.py", *arguments]
    with path.open("a", encoding="utf-8") as output:
        process = start(command, env=environment(proof), stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                if until and any(x["step"] >= until for x in train_lines(proof.runs / name)):
                    return
                time.sleep(0.2)
        finally:
            end(process)
    if process.returncode:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise ValueError(f"{path}: train.py failed: {lines[-1] if lines else 'no output'}")


def environment(proof: Proof) -> dict[str, str]:
    """Return variables with which train.py imports the kernels of this checkout."""
    link = proof.folder / "path" / "mlembed_kernels"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(ROOT / "kernels")
    path = [str(link.parent), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


# ---- what a run logged ----


def train_lines(directory: Path) -> list[dict[str, Any]]:
    return [line for line in log.lines(directory / log.METRICS) if line["kind"] == "train"]


def window_seconds(line: dict[str, Any], steps: int) -> float:
    """Return the seconds of the steps that a line sums up."""
    return steps * sum(line["stage_ms"].values()) / 1e3


def trained(directory: Path) -> dict[str, Any]:
    """Return the seconds, steps and tokens of a finished run, first layers included in seconds."""
    fit = fit_seconds(directory.with_name(f"{directory.name}.log"))
    before, seconds, tokens = 0, 0.0, 0.0
    for line in train_lines(directory):
        took = window_seconds(line, line["step"] - before)
        before = line["step"]
        seconds += took
        tokens += took * line["tokens_per_second"]
    return {"seconds": round(fit + seconds, 1), "steps": before, "tokens": round(tokens)}


def fit_seconds(output: Path) -> float:
    """Return the seconds in which a run's first layers learned before its steps, 0 for none."""
    lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
    fits = [line for line in lines if line.startswith("fit ") and line.endswith(" s")]
    return float(fits[-1].rpartition("; ")[2].removesuffix(" s")) if fits else 0.0

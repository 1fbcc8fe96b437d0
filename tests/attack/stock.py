"""Inputs that rows share, made once: texts, a finished run, models, and undisturbed outputs."""

import csv
import json
import shutil
import signal
from pathlib import Path

from tests import factories

from .scene import ROOT, Ended, Scene

TRAIN = str(ROOT / "train.py")
STEPS = 12
TEXT = ("pairs.jsonl", "nway.jsonl", "dev.jsonl")
SHAPE = [
    *factories.SMALL,
    *("--tracker", "none", "--compile", "off", "--data", "pairs.jsonl", "nway.jsonl"),
    *("--eval", "dev.jsonl", "--save-every", "2", "--loss.num-negatives", "1"),
    *("--model.dropout", "0.1", "--loss.memory-bank", "40", "--steps", str(STEPS)),
]
START = [TRAIN, "tiny", *SHAPE]
RESUME = [*START, "--resume"]
"""Train to the end as `runs/tiny`, and continue."""
CLI = ["-m", "mlembed"]
MINE = ["--top", "8", "--negatives", "4"]
WRITERS = {
    "export": [*CLI, "export", "model", "out"],
    "prune": [*CLI, "prune", "model", "out", "--layers", "1"],
    "merge": [*CLI, "merge", "out", "model", "other"],
    "teacher": [*CLI, "teacher", "model", "out", "--data", "pairs.jsonl"],
    "mine": [*CLI, "mine", "model", "out.jsonl", "--data", "pairs.jsonl", *MINE],
    "encode": [*CLI, "encode", "model", "--input", "texts.txt", "--out", "out.npy"],
    "evaluate": [*CLI, "evaluate", "model", "--data", "dev.jsonl", "--out", "out"],
    "report": [*CLI, "report", "runs/tiny", "--out", "out"],
}
"""Commands that write, each on inputs of `INPUTS`."""
INPUTS = (*TEXT, "texts.txt", "model", "other", "runs/tiny")
ENCODE = [*CLI, "encode", "model", "one two cats", "three", "1 : four owls of the wood"]


def output(name: str) -> str:
    """Return what a command of WRITERS writes."""
    return next(word for word in WRITERS[name] if word.startswith("out"))


def build(stock: Path) -> None:
    """Make all inputs and outputs in a new folder."""
    (stock / "home").mkdir(parents=True)
    factories.small_text(stock)
    (stock / "texts.txt").write_text("".join(f"{i} : one cat of {i}\n" for i in range(200)))
    with (stock / "sts.csv").open("w", newline="") as file:
        rows = [[f"{i} cats", f"{i % 5} cats", i % 6] for i in range(30)]
        csv.writer(file).writerows([["sentence1", "sentence2", "score"], *rows])
    scene = Scene(stock / "scene", stock)
    scene.take(*TEXT, "texts.txt")
    times = {"train": trained(scene.run(*START)).seconds}
    trained(scene.run(*START, "--name", "other", "--seed", "7"))
    narrow = ["--model.hidden-size", "16", "--model.matryoshka-dims", "8", "16"]
    trained(scene.run(*START, "--name", "narrow", *narrow))
    for run, name in (("tiny", "model"), ("other", "other")):
        (scene.work / "runs" / run / "model").rename(stock / name)
        shutil.copytree(stock / name, scene.work / "runs" / run / "model")
    (scene.work / "runs").rename(stock / "runs")
    scene.take(*INPUTS)
    for name, words in WRITERS.items():
        made = scene.work / output(name)
        times[name] = trained(scene.run(*words)).seconds
        made.rename(stock / f"golden_{name}{made.suffix}")
    (stock / "seconds.json").write_text(json.dumps(times))
    shutil.rmtree(scene.work / "runs/tiny")
    command = scene.start(*START)
    command.until((scene.work / "runs/tiny/checkpoints/step_00000006").is_dir)
    command.send(signal.SIGKILL)
    command.wait()
    (scene.work / "runs/tiny").rename(stock / "stopped")
    (stock / "vectors").write_text(trained(scene.run(*ENCODE)).out)


def trained(ended: Ended) -> Ended:
    """Return a command that succeeded."""
    if ended.status:
        raise RuntimeError(f"{' '.join(ended.argv)}: status {ended.status}\n{ended.err[-3000:]}")
    return ended


def seconds(scene: Scene, name: str) -> float:
    """Return how long a training, or a command of WRITERS, took undisturbed."""
    return json.loads((scene.stock / "seconds.json").read_text())[name]


def take_stopped(scene: Scene) -> Path:
    """Copy the run that was killed after its sixth step, as `runs/tiny`, and return it."""
    return shutil.copytree(scene.stock / "stopped", scene.work / "runs/tiny")


def same_run(scene: Scene, run: str = "runs/tiny", want: str = "tiny") -> None:
    """Check that losses, weights and scores of a run are those of an undisturbed one."""
    runs = scene.work / run, scene.stock / "runs" / want
    losses = [json.dumps(factories.loss_trace(path)) for path in runs]
    scene.check(losses[0] == losses[1], "another trace")
    weights, scores = (
        [path / name for path in runs] for name in ("model/model.safetensors", "report/grid.json")
    )
    same = weights[0].is_file() and weights[0].read_bytes() == weights[1].read_bytes()
    scene.check(same, "other weights")
    scene.check(scores[0].is_file() and cells(scores[0]) == cells(scores[1]), "another report")


def cells(path: Path) -> list:
    """Return the scores of a grid.json, without times."""
    return [cell["scores"] for cell in json.loads(path.read_text())["cells"]]


def same_output(scene: Scene, name: str) -> None:
    """Check that what a command of WRITERS wrote is what it writes undisturbed."""
    got = scene.work / output(name)
    want = scene.stock / f"golden_{name}{got.suffix}"
    scene.check(got.exists(), f"no {got.name}")
    if name == "evaluate" and got.exists():
        scene.check(cells(got / "grid.json") == cells(want / "grid.json"), "other scores")
    elif got.is_file():
        scene.check(got.read_bytes() == want.read_bytes(), f"another {got.name}")
    elif got.exists():
        names = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (got, want)]
        scene.check(names[0] == names[1], f"other files: {set(names[0]) ^ set(names[1])}")
        for path in want.rglob("*.safetensors"):
            other = got / path.relative_to(want)
            if other.exists():
                scene.check(other.read_bytes() == path.read_bytes(), f"another {path.name}")

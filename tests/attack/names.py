"""Names of runs, files and options that are paths, commands, or not text."""

import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .rows import Row, named, refused
from .scene import Scene
from .stock import CLI, ENCODE, MINE, START, TEXT, same_run

PATHS = ("../evil", "/tmp/evil", "..", ".", "", "a/b", "a/", "./a", "a/../b", "~/a/b")
CONTROL = {
    "a newline": "a\nb",
    "an escape": "a\x1b[31mb",
    "a carriage return": "a\rb",
    "a tab": "a\tb",
    "a delete": "a\x7fb",
    "a lone byte ff": "a\udcffb",
    "300 letters": "x" * 300,
    "a C1 control": "a\x9bb",
}
PLAIN = (
    "a b",
    "$(touch PWNED)",
    "`touch PWNED`",
    "a;touch PWNED",
    "a'b",
    'a"b',
    "ä ß",
    "-x",
    "a%sb",
    "{0}",
)


def rows(seed: int) -> Iterator[Row]:
    for name in PATHS:
        yield refused(
            "names", f"train --name {name!r}", [*START, f"--name={name}"], ("name",), TEXT
        )
    for label, name in CONTROL.items():
        yield refused(
            "names",
            f"train --name with {label}",
            [*START, f"--name={name}"],
            ("name|config.json",),
            TEXT,
        )
    for name in PLAIN:
        yield Row("names", f"train --name {name!r}", "the same run, quoted", partial(quoted, name))
    for command in ("encode", "export", "prune", "mine", "teacher", "evaluate", "report"):
        for label, path in MISSING.items():
            yield Row(
                "names", f"{command} of {label}", "1, names it", partial(missing, command, path)
            )
    for word in ("--nowhere", "--dimm", "--dim", "--help-me"):
        argv = [*ENCODE, word]
        yield refused("names", f"encode with {word}", argv, (word.strip("-"),), ("model",))
    for argv, word in UNKNOWN:
        yield refused(
            "names", f"mlembed {' '.join(argv)}", [*CLI, *argv], (word,), ("model", "pairs.jsonl")
        )
    for argv, word in TRAIN:
        inputs = (*TEXT, "model") if "model" in argv else TEXT
        yield refused("names", f"train.py {' '.join(argv)}", [START[0], *argv], (word,), inputs)


MISSING = {
    "a name that is not there": "nowhere",
    "a path that is not there": "no/where/at/all",
    "a name with a newline": "no\nwhere",
    "a name with an escape": "no\x1b[2Jwhere",
    "an empty name": "",
    "a name of 5000 letters": "x" * 5000,
    "a path with .. inside": "a/../../b",
    "a url": "https://example.com/a",
}
UNKNOWN = [
    (["traim"], "traim"),
    (["../train"], "../train"),
    (["encode"], "model"),
    (["export", "model"], "export"),
    (["mine", "model", "out.jsonl"], "data"),
    (["data"], "data"),
    (["encode", "model", "a", "--precision", "int3"], "precision"),
    (["encode", "model", "a", "--dtype", "float8"], "dtype"),
    (["encode", "model", "a", "--device", "tpu"], "device"),
    (["encode", "model", "a", "--device", "cuda:99"], "cuda"),
    (["encode", "model", "a", "--out", "v.txt"], "out"),
    (["encode", "model", "a", "--input", "b"], "texts"),
    (["encode", "model", "a", "--prompt-name", "nothere"], "nothere"),
    (["encode", "model", "a", "--precision", "int8"], "ranges"),
    (["export", "model", "out", "--format", "gguf"], "format"),
    (["export", "model", "out", "--private"], "private"),
    (["export", "model", "out", "--push-to-hub", "a b/c"], "a b/c"),
    (["export", "model", "out", "--push-to-hub", "c"], "push-to-hub"),
    (["merge", "out", "model"], "models"),
    (
        [
            "merge",
            "out",
            "model",
            "model",
            "--method",
            "slerp",
            "--t",
            "0.5",
            "--weights",
            "1",
            "1",
        ],
        "t:",
    ),
    (["prune", "model", "out", "--shape", "nowhere"], "shape"),
    (["prune", "model", "out", "--by", "activation"], "data"),
    (["evaluate", "model", "--data", "nowhere"], "nowhere"),
    (["evaluate", "model", "--mteb", "NoSuchTask"], "mteb"),
    (["cache", "--older-than", "old"], "older-than"),
    (["mine", "model", "out.csv", "--data", "pairs.jsonl"], "out"),
    (["prune", "model", "out", "--shape", "ml-embed-80m", "--layers", "1"], "shape"),
    (["encode", "model", "a", "--prompt", "a", "--prompt-name", "query"], "prompt"),
    (["encode", "model", "--input", "nowhere.txt"], "nowhere.txt"),
    (["encode", "model", "a", "--precision", "int8", "--ranges", "nowhere.npy"], "nowhere.npy"),
    (["mine", "model", "out.jsonl", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
]
TRAIN = [
    (["tinny"], "tinny"),
    (["nowhere.json"], "nowhere.json"),
    (["tiny", "--optim.lrr", "1"], "lrr"),
    (["tiny", "--data"], "data"),
    (["tiny", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["tiny", "--data", "nowhere"], "nowhere"),
    (["tiny", "--tokenizer", "/nowhere"], "/nowhere"),
    (["tiny", "--init", "/nowhere"], "/nowhere"),
    (["tiny", "--eval", "nowhere"], "nowhere"),
    (["tiny", "--task", "x"], "task"),
    (["tiny", "--precision", "fp8"], "precision"),
    (["tiny", "--tracker", "nothere"], "tracker"),
    (["tiny", "--resume"], "tiny"),
    (["tiny", "--engine", "fsdp", "--optim.weights", "bf16"], "optim.weights"),
    (["tiny", "--device", "cuda"], "cuda"),
    (["tiny", "--loss.temperature", "x"], "temperature"),
    (["tiny", "--init", "a", "--tokenizer", "b"], "a"),
    (["tiny", "--model.style", "bert"], "model.causal"),
    (["tiny", "--model.style", "bert", "--model.no-causal"], "key-value heads"),
    (["tiny", "--model.pooling", "pooler"], "model.pooling"),
    (["tiny", "--model.head-dim", "7"], "model.head_dim"),
    (["tiny", "--model.num-key-value-heads", "3"], "model.num_key_value_heads"),
    (["tiny", "--model.exits", "1", "2"], "model.exits"),
    (["tiny", "--model.matryoshka-dims", "8"], "model.matryoshka_dims"),
    (["tiny", "--loss.memory-bank", "512", "--loss.ranks", "all"], "loss.ranks"),
    (["tiny", "--depth.exits", "3"], "depth.exits"),
    (["tiny", "--depth.exits", "4", "--depth.shares", "0.5", "0.5"], "depth.shares"),
    (["tiny", "--cpu-offload"], "engine"),
    (["tiny", "--optim.weights", "bf16", "--precision", "fp32"], "precision"),
    (["tiny", "--distill.teacher", "model"], "distill"),
    (["tiny", "--lora.rank", "8"], "init"),
    (["tiny", "--lora.targets", "q_proj"], "lora.rank"),
    (
        ["tiny", "--init", "model", "--optim.lr", "1e-4", "--data", "pairs.jsonl"]
        + ["--eval", "dev.jsonl", "--lora.rank", "2", "--lora.targets", "wq"],
        "lora.targets",
    ),
    (["tiny", "--data", "pairs.jsonl", "pairs.jsonl"], "pairs"),
    (["tiny", "--data", "pairs.jsonl", "--columns.query", "query"], "columns.positive"),
    (
        ["tiny", "--data", "pairs.jsonl", "--columns.query", "a", "--columns.positive", "b"],
        "columns",
    ),
    (["tiny", "--allow-changed", "stepz"], "stepz"),
    (["tiny", "--steps", "1.5"], "steps"),
    (["tiny", "--optim.lr", "x"], "lr"),
]


def quoted(name: str, scene: Scene) -> None:
    """Train under a name that a shell reads in another way, then paste what the run printed."""
    scene.take(*TEXT)
    scene.outputs = {"runs"}
    ended = scene.run(*START, f"--name={name}")
    scene.check(ended.status == 0, f"status {ended.status}, expected 0")
    same_run(scene, f"runs/{name}")
    lines = [
        x.partition("  ")[2].strip()
        for x in ended.out.splitlines()
        if x[:6] in ("encode", "page  ")
    ]
    scene.check(lines, "prints no commands")
    for line in lines:
        words = shlex.split(line)
        scene.check(f"runs/{name}" in words, f"not quoted: {line}")


def missing(command: str, path: str, scene: Scene) -> None:
    """Name a model that is not there; the message is one line of plain text."""
    scene.take(*TEXT)
    argv = {
        "encode": [path, "a"],
        "export": [path, "out"],
        "prune": [path, "out", "--layers", "1"],
        "mine": [path, "out.jsonl", "--data", "pairs.jsonl", *MINE],
        "teacher": [path, "out", "--data", "pairs.jsonl"],
        "evaluate": [path, "--data", "dev.jsonl"],
        "report": [path],
    }[command]
    ended = scene.run(*CLI, command, *argv)
    named(scene, ended)
    line = "".join(ended.errors)
    scene.check(all(letter.isprintable() for letter in line), f"control characters: {line!r}")
    scene.check(len(line) < 6000, f"a line of {len(line)} letters")
    scene.check(
        Path(path).name[:20].isprintable() is False or path[:20] in line or not path,
        "does not name it",
    )

"""Inputs without bounds: words, lines, headers, numbers of rows, compressed bombs."""

import gzip
import json
import random
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from .rows import Row, named, refused
from .scene import GIB, Limits, Scene
from .stock import CLI, START, TEXT

MILLION = 1_000_000
TIGHT = Limits(seconds=60, rss=2.0 * GIB)


def pairs(work: Path, *texts: str) -> None:
    """Write pairs of which the first ones are odd."""
    rows = [{"query": f"{i} cats", "positive": f"{i} dogs of the wood"} for i in range(40)]
    rows[0:0] = [{"query": text, "positive": f"the text {i}"} for i, text in enumerate(texts)]
    (work / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def letters(count: int, alphabet: str) -> str:
    return "".join(random.Random(0).choices(alphabet, k=count))


WORDS = {
    "100,000 equal letters": "a" * 100_000,
    "a million equal letters": "a" * MILLION,
    "a million letters": letters(MILLION, "abcdefghijklmnopqrstuvwxyz"),
    "a million of base64": letters(MILLION, "abcdefghijABCDEFGHIJ0123456789+/"),
    "a million of DNA": letters(MILLION, "ACGT"),
    "a million of CJK": letters(MILLION, "的一是不了人我在有他这中大来上国"),
    "a million combining accents": "e" + "\u0301" * MILLION,
    "a million spaces": " " * MILLION + "x",
    "a million newlines": "\n" * MILLION + "x",
    "a million digits": "7" * MILLION,
    "a million punctuation marks": "!" * MILLION,
    "a million of emoji joined": "👩\u200d" * MILLION,
}


def rows(seed: int) -> Iterator[Row]:
    for label, text in WORDS.items():
        yield row(f"train on a word of {label}", "0, bounded", partial(trained, text))
        yield row(f"encode a text of {label}", "0, bounded", partial(encoded, text))
    for label, argv, names in ENDLESS:
        yield refused("bounds", label, argv, names, ("model", *TEXT), limits=TIGHT)
    for label, (name, make) in BOMBS.items():
        yield row(f"data: {label}", "1, names the file", partial(bomb, name, make, "data"))
        yield row(f"encode: {label}", "1, names the file", partial(bomb, name, make, "encode"))
    yield row("a row of 20,000 negatives", "0, bounded", many_negatives)
    yield row("100,000 columns", "1, names the file", many_columns)
    yield row("a header of a gigabyte in a sparse file", "1, names the file", sparse)


def row(input: str, expected: str, attack: Callable[[Scene], None]) -> Row:
    return Row("bounds", input, expected, attack)


SHORT = ["--data", "odd.jsonl", "--steps", "2", "--loss.memory-bank", "0"]


def trained(text: str, scene: Scene) -> None:
    """Train a tokenizer and a model on text with an odd word."""
    scene.take("dev.jsonl")
    pairs(scene.work, text, f"a {text} b")
    scene.outputs = {"runs"}
    ended = scene.run(*START, *SHORT, limits=TIGHT)
    scene.check(ended.status == 0, f"status {ended.status}, expected 0")


def encoded(text: str, scene: Scene) -> None:
    """Encode an odd text from standard input, with and without a line's end."""
    scene.take("model")
    line = text.replace("\n", " ").encode()
    ended = scene.run(*CLI, "encode", "model", stdin=line + b"\n", limits=TIGHT)
    scene.check(ended.status == 0, f"status {ended.status}, expected 0")
    scene.check(len(ended.out.splitlines()) == 1, f"{len(ended.out.splitlines())} vectors")


ENCODE = [*CLI, "encode", "model", "--input"]
ENDLESS: list[tuple[str, list[str], tuple[str, ...]]] = [
    ("encode --input /dev/zero", [*ENCODE, "/dev/zero"], ("/dev/zero",)),
    ("encode --input /dev/urandom", [*ENCODE, "/dev/urandom"], ("/dev/urandom",)),
    ("train --data /dev/zero", [*START, "--data", "/dev/zero"], ("/dev/zero",)),
    ("train --data /dev/null", [*START, "--data", "/dev/null"], ("/dev/null",)),
    ("data /dev/zero", [*CLI, "data", "/dev/zero"], ("/dev/zero",)),
    ("train --eval /dev/zero", [*START, "--eval", "/dev/zero"], ("/dev/zero",)),
    (
        "evaluate --data /dev/zero",
        [*CLI, "evaluate", "model", "--data", "/dev/zero"],
        ("/dev/zero",),
    ),
    (
        "encode with --ranges /dev/zero",
        [*CLI, "encode", "model", "a", "--precision", "int8", "--ranges", "/dev/zero"],
        ("/dev/zero",),
    ),
    ("train by /dev/zero.json", [START[0], "/dev/zero.json"], ("/dev/zero.json",)),
    ("report /dev/zero", [*CLI, "report", "/dev/zero"], ("/dev/zero",)),
    ("train --tokenizer /dev/zero", [*START, "--tokenizer", "/dev/zero"], ("/dev/zero",)),
    ("train --init /dev/zero", [*START, "--init", "/dev/zero"], ("/dev/zero",)),
]


def stream(path: Path, opening: bytes, block: bytes, blocks: int) -> None:
    """Write a gzip file whose content is much larger than the file, a member for 100 blocks."""
    member = gzip.compress(block * 100, compresslevel=1)
    path.write_bytes(gzip.compress(opening) + member * (blocks // 100))


def zst(path: Path, opening: bytes, block: bytes, blocks: int) -> None:
    import pyarrow as pa

    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(opening)
        for _ in range(blocks):
            file.write(block)


MIB = b"a" * 2**20
BOMBS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "3 GB of one line in a .gz of 13 MB": ("odd.jsonl.gz", lambda p: stream(p, b"", MIB, 3000)),
    "3 GB of one text in a .gz": ("odd.jsonl.gz", lambda p: stream(p, b'{"query": "', MIB, 3000)),
    "3 GB of one line in a .zst": ("odd.jsonl.zst", lambda p: zst(p, b"", MIB, 3000)),
    "3 GB of one cell in a .csv.gz": (
        "odd.csv.gz",
        lambda p: stream(p, b'query,positive\n"', MIB, 3000),
    ),
    "3 GB of one line in a .tsv.gz": (
        "odd.tsv.gz",
        lambda p: stream(p, b"query\tpositive\n", MIB, 3000),
    ),
    "3 GB of one array in a .json.gz": (
        "odd.json.gz",
        lambda p: stream(p, b"[", b"[" * 2**20, 3000),
    ),
}


def bomb(name: str, make: Callable[[Path], None], command: str, scene: Scene) -> None:
    """Read a small file that is a large one."""
    scene.take("model")
    make(scene.work / name)
    argv = [*CLI, "data", name] if command == "data" else [*ENCODE, name, "--column", "query"]
    ended = scene.run(*argv, limits=TIGHT)
    scene.check(ended.status == 1, f"status {ended.status}, expected 1")
    scene.check(name in ended.err + ended.out, "does not name the file")


def many_negatives(scene: Scene) -> None:
    """Train on a row with many negatives."""
    scene.take("dev.jsonl")
    pairs(scene.work)
    row = {"query": "q", "positive": "p", "negatives": [f"n {i}" for i in range(20_000)]}
    with (scene.work / "odd.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    scene.outputs = {"runs"}
    ended = scene.run(*START, *SHORT, limits=TIGHT)
    scene.check(ended.status == 0, f"status {ended.status}, expected 0")


def many_columns(scene: Scene) -> None:
    """Read a table of many columns that name no role."""
    header = ",".join(f"c{i}" for i in range(100_000))
    (scene.work / "odd.csv").write_text(f"{header}\n{header}\n")
    ended = scene.run(*CLI, "data", "odd.csv", limits=TIGHT)
    scene.check(ended.status == 1, f"status {ended.status}, expected 1")
    scene.check(len(ended.err + ended.out) < 20_000, f"{len(ended.err + ended.out)} letters said")


def sparse(scene: Scene) -> None:
    """Read weights whose header claims, and has, a gigabyte."""
    path = scene.take("model") / "model.safetensors"
    path.write_bytes((10**9).to_bytes(8, "little"))
    subprocess.run(["truncate", "-s", str(10**9 + 8), path], check=True)
    scene.before = {}
    ended = scene.run(*CLI, "encode", "model", "a", limits=TIGHT)
    named(scene, ended, "model.safetensors")
    path.unlink()
    scene.before = None

"""Items of `python -m bench gpu`, the most telling first, with the seconds that each may take.

Seconds are predictions for an H200 with 16 cores; no GPU has run them. Their sum fits six calls of
540 s. Each item is a command of its own; `cases` continue where they were stopped.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RESULTS = "results.jsonl"  # measurements of all items, in the folder of a run
START = 60.0  # seconds with which an item that can continue later may begin
MOST = 1.5  # times the prediction: then an item is ended


@dataclass(frozen=True)
class Where:
    """A run: its folder, the folder of compiled kernels, and whether it takes toy shapes."""

    out: Path
    cache: Path
    smoke: bool

    @property
    def results(self) -> Path:
        return self.out / RESULTS


Command = Callable[[Where, float], list[str]]


@dataclass(frozen=True)
class Item:
    """One command.

    command: (where, seconds that are left to it) -> arguments of Python. seconds: prediction.
    after: an item that is to end first. resumes: it continues from its results, so it may be cut.
    tests: a run of pytest, whose failures are a result.
    """

    name: str
    about: str
    seconds: float
    command: Command
    after: str = ""
    resumes: bool = False
    tests: bool = False

    @property
    def least(self) -> float:
        """Return the seconds that have to be left for it to begin."""
        return min(self.seconds, START) if self.resumes else self.seconds

    @property
    def most(self) -> float:
        return MOST * self.seconds


# ---- commands ----


def bench(name: str, *options: str) -> Command:
    def command(where: Where, seconds: float) -> list[str]:
        common = ["--out", str(where.results), "--seconds", f"{max(seconds - 5, 1):.0f}"]
        return ["-m", "bench", name, *options, *common, *["--smoke"] * where.smoke]

    return command


def tests(*patterns: str) -> Command:
    """Run the kernels' tests on all cores, if xdist is installed; a toy run collects them."""

    def command(where: Where, seconds: float) -> list[str]:
        folder = Path("tests/kernels")
        files = [str(path) for pattern in patterns for path in sorted(folder.glob(pattern))]
        options = ["-p", "bench", "-p", "no:cacheprovider"]
        if where.smoke:
            options.append("--collect-only")
        elif importlib.util.find_spec("xdist") is not None:
            options += ["-n", str(min(os.cpu_count() or 1, 8)), "--dist", "worksteal"]
        return ["-m", "pytest", *options, *files]

    return command


def compiling(where: Where, seconds: float) -> list[str]:
    few = ["embed-gate-one-token-bfloat16"] * where.smoke
    return ["-m", "bench", "compile", *few, "--cache", str(where.cache)]


def module(name: str, *options: str) -> Command:
    def command(where: Where, seconds: float) -> list[str]:
        toy = ["--smoke"] * where.smoke
        return ["-m", f"bench.gpu.{name}", *options, "--out", str(where.results), *toy]

    return command


# ---- items ----


def gate(name: str, seconds: float) -> Item:
    about = f"gate of {name}: errors against float64"
    return Item(f"gate-{name}", about, seconds, bench(name, "--part", "gate"))


def cases(item: str, name: str, seconds: float, *names: str) -> Item:
    options = "--part", "cases", "--case", *names
    about = f"{name}: {', '.join(names)}"
    return Item(item, about, seconds, bench(name, *options), f"gate-{name}", resumes=True)


def sweep(name: str, seconds: float) -> Item:
    options = bench(name, "--part", "cases", "--sweep")
    about = f"launch configurations of {name}"
    return Item(f"sweep-{name}", about, seconds, options, f"gate-{name}", resumes=True)


LOSS = "similarity/test_infonce_triton.py", "similarity/test_splits.py"
OTHERS = "attention/test_attention_triton.py", "attention/test_limits.py", "embedding/*_triton.py"
FULL = "short_full", "mid_full", "long_full"
BERT = "short_bert", "mid_bert", "long_bert"
ITEMS = (
    Item("compile", "kernels of all cases, on all cores", 90, compiling),
    Item("tests-loss", "tests of the loss's kernels", 110, tests(*LOSS), tests=True),
    Item("tests-others", "tests of attention and embed", 100, tests(*OTHERS), tests=True),
    gate("infonce", 40),
    gate("attention", 70),
    gate("embed", 40),
    Item("memcheck", "compute-sanitizer on the loss", 90, module("tools", "memcheck"), "compile"),
    cases("reference", "infonce", 90, "reference"),
    Item("counters", "bytes that ncu counts", 50, module("tools", "counters"), "compile"),
    cases("lengths", "attention", 180, "short", "mid", "long"),
    gate("train_step", 200),
    cases("step", "train_step", 140, "step"),
    Item("training", "thirty steps of train.py", 110, module("training"), resumes=False),
    gate("gradcache", 150),
    cases("fit", "gradcache", 90, "fit"),
    gate("encode", 40),
    cases("encode", "encode", 110, "short", "mid"),
    cases("losses", "infonce", 200, "both", "small", "labse", "siglip", "e1", "huge"),
    cases("embed", "embed", 80, "step", "masters", "rank64", "lealla"),
    cases("heads", "attention", 200, "skip", *BERT, *FULL, "skip_short", "very_long"),
    cases("steps", "train_step", 240, "step_skip", "step_nested", "lealla"),
    cases("packs", "gradcache", 140, "peer", "big"),
    sweep("infonce", 150),
    sweep("attention", 180),
    sweep("embed", 80),
)


def python(item: Item, where: Where, seconds: float) -> list[str]:
    """Return the command line of an item, without prompts of the libraries."""
    return [sys.executable, *item.command(where, seconds)]

"""Batches as a training loop gets them: tokens a second of a loader alone, and a step's beside it.

Cases are tables of synthetic text of natural lengths, tokenised and drawn as in training;
`streamed` is a file that is read, shuffled and tokenised as it comes. Modes are numbers of worker
processes; 0 is the loop's own process, which then does nothing else. A row's ms is the time between
two batches (median), its tokens_s all tokens over all time, its own_ms what a batch takes of the
loop's process on the CPU: other work on the machine lengthens that less, and with workers it is
what the loop loses to receiving. With 0 workers there are parts too, where a batch's time goes.

No GPU is needed, and none is used. A target compares two workers, of which each does as much as one
process alone does in seconds of its own, with the step that they have to feed.
"""

import argparse
import cProfile
import json
import os
import pstats
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Subset

from mlembed import config
from mlembed.data import sources, tokenizer
from mlembed.data.batches import Batches
from mlembed.data.collate import Batch
from mlembed.runtime.distributed import World

from . import harness
from .train_step import cases
from .worker import say

TESTS: tuple[str, ...] = ()
BASELINES: tuple[str, ...] = ()
SWEEP: dict[str, str] = {}
WORKER = [sys.executable, "-m", "bench.loader"]
MODES = "0 workers", "1 worker", "4 workers"
WORDS = 30_000  # of the synthetic language, drawn by Zipf's law
# Parts of a batch's time, by the function whose time, with all that it calls, is the part.
PARTS = {
    "draw": "draw_rows",
    "read": "items",
    "tokenise": "tokenise",
    "share out": "even_shares",
    "pack": "pack",
    "of it attention plan": "of@plan",
    "of it token index": "of@token_index",
}


@dataclass(frozen=True)
class Case:
    """pairs: of a batch. words: median, sigma of the log, least and most of a text."""

    name: str
    about: str
    pairs: int
    negatives: int
    words: tuple[float, float, int, int]
    items: int
    step_tokens_s: float
    streamed: bool = False
    seconds: float = 6.0  # of a measurement
    modes: tuple[str, ...] = MODES
    providers: tuple[str, ...] = ("ours",)


# Tokens a second of a step, as predicted for one H200 (bench/LOG.md, train_step).
# Of lealla there is no prediction: its floors, and 30 ms of the launches that the log names.
STEP = 169e3
LEALLA = cases.CASES["lealla"]
FLOORS = sum(cases.floors(LEALLA, harness.TRAIN, 788, 4247).values())
STEP_LEALLA = 1e3 * cases.tokens(LEALLA) / (FLOORS + 30)


CASES = {
    case.name: case
    for case in (
        Case("groups", "512 x (1 + 1 + 7) texts of about 100 tokens, as 0.6B is fine-tuned", 512, 7,
             (82, 0.5, 3, 380), 2048, STEP),
        Case("bitext", "4096 pairs of texts of about 30 tokens, as lealla is trained", 4096, 0,
             (24, 0.5, 2, 90), 16_384, STEP_LEALLA),
        Case("streamed", "groups, from a file that is read as it comes", 512, 7,
             (82, 0.5, 3, 380), 2048, STEP, streamed=True),
    )
}  # fmt: skip


def toy(case: Case) -> Case:
    return replace(case, pairs=4, words=(5, 0.5, 1, 9), items=24, seconds=0.0)


def about(case: Case) -> str:
    return case.about


# ---- synthetic text ----


def words(count: int, seed: int) -> list[str]:
    """Made of syllables; frequent ones are short, as in languages."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    made: dict[str, None] = {}
    while len(made) < count:
        made["".join(rng.choices(syllables, k=1 + len(made).bit_length() // 4))] = None
    return list(made)


def texts(case: Case, count: int, seed: int) -> Iterator[str]:
    """Lengths are lognormal, words are Zipf's."""
    rng = np.random.default_rng(seed)
    known = np.array(words(200 if case.items < 100 else WORDS, 0))
    p = 1 / np.arange(1, len(known) + 1)
    cdf = np.cumsum(p / p.sum())
    median, sigma, least, most = case.words
    for _ in range(count):
        length = int(np.clip(np.exp(rng.normal(np.log(median), sigma)), least, most))
        yield " ".join(known[np.searchsorted(cdf, rng.random(length)).clip(max=len(known) - 1)])


def written(case: Case, path: Path) -> config.Source:
    """The case's items as a file of pairs."""
    each = 2 + case.negatives
    found = texts(case, case.items * each, 1)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(case.items):
            query, positive, *negatives = (next(found) for _ in range(each))
            row = {"query": query, "positive": positive, "negatives": negatives}
            file.write(json.dumps(row) + "\n")
    return config.Source(path=str(path), streaming=case.streamed, rows=case.items)


def learnt(case: Case) -> Tokenizer:
    """Of as many tokens as words: most words are one or two, as with a large vocabulary."""
    small = case.items < 100
    return tokenizer.train(texts(case, 100 if small else 6000, 2), 400 if small else 32_000)


def batches(case: Case, folder: Path) -> Batches:
    """As train.py makes them."""
    source = written(case, folder / f"{case.name}.jsonl")
    run = config.Run(
        batch_size=case.pairs,
        steps=100_000,
        max_length=512,
        pack_tokens=16_384,
        model=config.Model(max_position_embeddings=512),
        loss=config.Loss(num_negatives=case.negatives),
    )
    tables = [] if case.streamed else [table for table, _ in sources.read(source)]
    streams = [source] if case.streamed else []
    world = World(0, 1, torch.device("cpu"))
    return Batches(tables, learnt(case), run, world, streams=streams)


def loader(data: Batches, mode: str) -> DataLoader[Batch]:
    workers = int(mode.split()[0])
    return DataLoader(Subset(data, range(len(data))), batch_size=None, num_workers=workers)


# ---- right, then fast ----


def gate(case: Case, data: Batches) -> Iterator[dict[str, Any]]:
    """With any number of workers the batches are those of one process."""
    want = [sums(data[number]) for number in range(6)]
    for mode in case.modes:
        got = [sums(batch) for _, batch in zip(range(6), loader(data, mode), strict=False)]
        check = f"{case.name}: {mode} give the batches that one process makes"
        yield {"check": check, "dtype": "int64", "ok": got == want}


def sums(batch: Batch) -> list[int]:
    """Enough of a batch to tell it from others."""
    found = [batch.tokens, int(batch.place.sum()), int(batch.doc_ids.sum())]
    return found + [int((pack.ids_T * (1 + pack.pos_T)).sum()) for pack in batch.packs]


def measure(case: Case, data: Batches, mode: str) -> dict[str, Any]:
    """Batches for case.seconds, after those that workers had made before anyone asked."""
    feed = iter(loader(data, mode))
    warm = 2 + 3 * int(mode.split()[0]) if case.seconds else 1
    for _ in range(warm):
        next(feed)
    took, tokens = list[float](), 0
    start, own = time.perf_counter(), time.process_time()
    last = start
    while last - start < case.seconds or len(took) < 2:
        tokens += next(feed).tokens
        now = time.perf_counter()
        took.append((now - last) * 1e3)
        last = now
    p20, ms, p80 = np.percentile(took, [20, 50, 80]).tolist()
    row = {"value": 1.0, "tokens": tokens // len(took), "batches": len(took)}
    if not case.seconds:
        return row
    seconds = last - start
    row |= {"ms": ms, "p20": p20, "p80": p80, "tokens_s": tokens / seconds}
    return row | {"own_ms": (time.process_time() - own) * 1e3 / len(took)}


def parts(data: Batches, count: int) -> dict[str, float]:
    """Milliseconds of a batch by part; under a profiler, which adds to what is called often."""
    profile = cProfile.Profile()
    profile.enable()
    for number in range(count):
        data[number]
    profile.disable()
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    found = {}
    for part, name in PARTS.items():
        function, _, file = name.partition("@")
        seconds = sum(
            times[3]
            for (path, _, called), times in stats.items()
            if called == function and file in Path(path).name
        )
        if seconds:
            found[part] = seconds * 1e3 / count
    return found


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        if row.get("own_ms") and row["mode"] == MODES[0]:
            rate = 2 * row["tokens"] / row["own_ms"] * 1e3
            value = rate / CASES[row["case"]].step_tokens_s
            what = f"{row['case']}: two workers' tokens over the step's"
            found.append({"target": what, "value": value, "limit": ">= 1", "met": value >= 1})
    return found


def table(
    rows: list[dict[str, Any]], mode: str, floors: dict[str, float] | None, baselines: Any
) -> str:
    """A line a mode; of one process alone also where the time goes."""
    lines = []
    if mode == MODES[0]:
        head = ("loader alone", "ms", "p20..p80", "of the loop", "tokens/s", "tokens a batch")
        lines.append("{:12} {:>8} {:>16} {:>12} {:>11} {:>15}".format(*head))
    for row in rows:
        if row["mode"] != mode:
            continue
        if row.get("ms") is None:
            lines.append(f"{mode:12} {row['status']} {row.get('note') or ''}".rstrip())
            continue
        spread = f"{row['p20']:.1f}..{row['p80']:.1f}"
        numbers = f"{row['own_ms']:12.1f} {row['tokens_s']:11,.0f} {row['tokens']:15,}"
        lines.append(f"{mode:12} {row['ms']:8.1f} {spread:>16} {numbers}")
        if row.get("parts"):
            told = ", ".join(f"{part} {ms:.1f}" for part, ms in row["parts"].items())
            lines.append(f"  ms, under a profiler: {told}")
    return "\n".join(lines)


# ---- in a process of its own, as bench/worker.py ----


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.loader", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("stages", nargs="+", help="gate, or a case")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--skip", nargs="*", default=[])
    parser.add_argument("--red", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "This DataLoader will create")  # on fewer cores than 4
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers are the parallelism
    say("environment", **harness.environment(torch.device("cpu")), cpus=os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLEMBED_CACHE"] = folder
        for stage in args.stages:
            if stage == "gate":
                for case in map(toy, CASES.values()):
                    for verdict in gate(case, batches(case, Path(folder))):
                        say("gate", **verdict)
            elif stage in CASES:
                shaped = toy(CASES[stage]) if args.smoke else CASES[stage]
                measured(shaped, Path(folder), args, end)


def measured(case: Case, folder: Path, args: argparse.Namespace, end: float) -> None:
    data = batches(case, folder)
    for mode in case.modes:
        at = {"case": case.name, "provider": "ours", "mode": mode}
        if ":".join((case.name, "ours", mode)) in args.skip:
            continue
        if time.monotonic() > end - 2 * case.seconds:
            say("row", **at, status="skipped", note="no time was left")
            continue
        say("begin", **at)
        try:
            row = measure(case, data, mode)
            if mode == MODES[0] and case.seconds:
                row["parts"] = parts(data, 8)
            say("row", **at, status="ran", green=not args.red, note=None, **row)
        except Exception as error:  # too many open files, a worker that was killed
            say("row", **at, status="failed", note=harness.reason(error))


if __name__ == "__main__":
    main()

"""Batches of the training loader: tokens a second of the loader alone, next to those of a step.

Cases are tables of synthetic text of natural lengths, tokenised and drawn as in training;
`streamed` is a file that is read, shuffled and tokenised on the fly. Modes are numbers of worker
processes; with 0 the loop's own process makes the batches. ms is the median time between two
batches, tokens_s all tokens over all time, own_ms the CPU time of a batch in the loop's process:
other work on the machine lengthens it less, and with workers it is the cost of receiving. With 0
workers `parts` has the time of a batch by function.

The bench uses no GPU. A target compares two workers, each as fast as one process alone in its own
CPU time, with the step that they have to feed.
"""

import cProfile
import json
import os
import pstats
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from .report import Floors, Row, Targets
from .train_step import cases

DEVICES = ("cpu",)
BASELINES: tuple[str, ...] = ()
MODES = "0 workers", "1 worker", "4 workers"
WORDS = 30_000  # of the synthetic language
Words = tuple[float, float, int, int]  # of a text: median, sigma of the log, least, most
# Parts of a batch: the time of a function (of a file) with all that it calls.
PARTS = {
    "draw": "draw_rows",
    "read": "items",
    "tokenise": "tokenise",
    "share out": "even_shares",
    "pack": "pack",
    "of it attention plan": "of@plan",
    "of it token index": "of@token_index",
}


@dataclass(frozen=True, kw_only=True)
class Case(harness.Case):
    """A table. pairs: of a batch. step_tokens_s: of the step that it feeds. seconds: to measure."""

    about: str = ""
    pairs: int = 512
    negatives: int = 7
    words: Words
    items: int
    step_tokens_s: float = 169e3  # of 0.6B on one H200, as predicted (bench/LOG.md, train_step)
    streamed: bool = False
    seconds: float = 6.0
    modes: tuple[str, ...] = MODES

    def toy(self) -> "Case":
        return replace(self, pairs=4, words=(5, 0.5, 1, 9), items=24, seconds=0.0)


def lealla_tokens_s() -> float:
    """Return the rate of LEALLA's step at its floors and 30 ms of launches (bench/LOG.md)."""
    case = cases.CASES["lealla"]
    floors = case.floors(harness.TRAIN, 788, 4247)
    return 1e3 * cases.tokens(case) / (sum(floors.values()) + 30)


GROUPS: Words = 82, 0.5, 3, 380
CASES = {
    "groups": Case(
        name="groups", words=GROUPS, items=2048,
        about="512 x (1 + 1 + 7) texts of about 100 tokens, as 0.6B is fine-tuned",
    ),
    "bitext": Case(
        name="bitext", words=(24, 0.5, 2, 90), items=16_384, pairs=4096, negatives=0,
        step_tokens_s=lealla_tokens_s(),
        about="4096 pairs of texts of about 30 tokens, as lealla is trained",
    ),
    "streamed": Case(
        name="streamed", words=GROUPS, items=2048, streamed=True,
        about="groups, from a file that is read on the fly",
    ),
}  # fmt: skip


# ---- synthetic text ----


def words(count: int, seed: int) -> list[str]:
    """Return words made of syllables; frequent words are short, as in languages."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    made: dict[str, None] = {}
    while len(made) < count:
        made["".join(rng.choices(syllables, k=1 + len(made).bit_length() // 4))] = None
    return list(made)


def texts(case: Case, count: int, seed: int) -> Iterator[str]:
    """Yield texts of lognormal lengths and Zipf's words."""
    rng = np.random.default_rng(seed)
    known = np.array(words(200 if case.items < 100 else WORDS, 0))
    p = 1 / np.arange(1, len(known) + 1)
    cdf = np.cumsum(p / p.sum())
    median, sigma, least, most = case.words
    for _ in range(count):
        length = int(np.clip(np.exp(rng.normal(np.log(median), sigma)), least, most))
        yield " ".join(known[np.searchsorted(cdf, rng.random(length)).clip(max=len(known) - 1)])


def written(case: Case, path: Path) -> config.Source:
    """Write the case's items as a file of pairs."""
    each = 2 + case.negatives
    lines = texts(case, case.items * each, 1)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(case.items):
            query, positive, *negatives = (next(lines) for _ in range(each))
            row = {"query": query, "positive": positive, "negatives": negatives}
            file.write(json.dumps(row) + "\n")
    return config.Source(path=str(path), streaming=case.streamed, rows=case.items)


def learnt(case: Case) -> Tokenizer:
    """Train a tokenizer with as many tokens as words, so that most words are one or two tokens."""
    small = case.items < 100
    return tokenizer.train(texts(case, 100 if small else 6000, 2), 400 if small else 32_000)


def batches(case: Case, folder: Path) -> Batches:
    """Return batches as train.py makes them."""
    source = written(case, folder / f"{case.name}.jsonl")
    run = config.Run(
        batch_size=case.pairs, steps=100_000, max_length=512, pack_tokens=16_384,
        model=config.Model(max_position_embeddings=512),
        loss=config.Loss(num_negatives=case.negatives),
    )  # fmt: skip
    tables = [] if case.streamed else [table for table, _ in sources.read(source)]
    streams = [source] if case.streamed else []
    world = World(0, 1, torch.device("cpu"))
    return Batches(tables, learnt(case), run, world, streams=streams)


def loader(data: Batches, mode: str) -> DataLoader[Batch]:
    workers = int(mode.split()[0])
    return DataLoader(Subset(data, range(len(data))), batch_size=None, num_workers=workers)


@contextmanager
def workshop() -> Iterator[Path]:
    """Set the process up for loaders: one thread, and a folder for files and caches."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "This DataLoader will create")  # on fewer cores than 4
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLEMBED_CACHE"] = folder
        yield Path(folder)


# ---- right or not ----


def gate(device: torch.device, smoke: bool) -> Iterator[dict[str, Any]]:
    with workshop() as folder:
        for case in CASES.values():
            yield from compared(case.toy(), batches(case.toy(), folder))


def compared(case: Case, data: Batches) -> Iterator[dict[str, Any]]:
    """Compare the batches of workers with those of one process."""
    want = [sums(data[number]) for number in range(6)]
    for mode in case.modes:
        got = [sums(batch) for _, batch in zip(range(6), loader(data, mode), strict=False)]
        check = f"{case.name}: {mode} give the batches that one process makes"
        yield {"check": check, "dtype": "int64", "ok": got == want}


def sums(batch: Batch) -> list[int]:
    """Return numbers that tell one batch from another."""
    few = [batch.tokens, int(batch.place.sum()), int(batch.doc_ids.sum())]
    return few + [int((pack.ids_T * (1 + pack.pos_T)).sum()) for pack in batch.packs]


# ---- times ----


def measure(case: Case, data: Batches, mode: str) -> dict[str, Any]:
    """Time batches for case.seconds, after the ones that workers prepare in advance."""
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
    timing = harness.summary(took)
    row = {"value": 1.0, "tokens": tokens // len(took), "batches": len(took)}
    if not case.seconds:
        return row
    seconds = last - start
    row |= {"ms": timing.ms, "p20": timing.p20, "p80": timing.p80, "tokens_s": tokens / seconds}
    return row | {"own_ms": (time.process_time() - own) * 1e3 / len(took)}


def parts(data: Batches, count: int) -> dict[str, float]:
    """Return milliseconds of a batch by part, under a profiler, which slows frequent calls."""
    profile = cProfile.Profile()
    profile.enable()
    for number in range(count):
        data[number]
    profile.disable()
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    took = {}
    for part, name in PARTS.items():
        function, _, file = name.partition("@")
        seconds = sum(
            times[3] for (path, _, called), times in stats.items()
            if called == function and file in Path(path).name
        )  # fmt: skip
        if seconds:
            took[part] = seconds * 1e3 / count
    return took


def rows(case: Case, device: torch.device, end: float, skip: set[str]) -> Iterator[tuple[str, Row]]:
    with workshop() as folder:
        data = batches(case, folder)
        for mode in case.modes:
            at = {"case": case.name, "provider": "ours", "mode": mode}
            if ":".join(at.values()) in skip:
                continue
            if time.monotonic() > end - 2 * case.seconds:
                yield "row", {**at, "status": "skipped", "note": "no time was left"}
                continue
            yield "begin", at
            try:
                row = measure(case, data, mode)
                if mode == MODES[0] and case.seconds:
                    row["parts"] = parts(data, 8)
                yield "row", {**at, "status": "ran", "note": None, **row}
            except Exception as error:
                yield "row", {**at, "status": "failed", "note": harness.reason(error)}


COLUMNS = "of the loop", "tokens/s", "tokens a batch"


def cells(rows: Sequence[Row], row: Row, floors: Floors) -> list[str]:
    return [f"{row['own_ms']:.1f}", f"{row['tokens_s']:,.0f}", f"{row['tokens']:,}"]


def targets(rows: list[Row]) -> list[Row]:
    targets = Targets(rows)
    for name, case in CASES.items():
        if (row := targets.row(name, "ours", MODES[0])) is not None:
            rate = 2 * row["tokens"] / row["own_ms"] * 1e3 / case.step_tokens_s
            targets.add(f"{name}: two workers' tokens over the step's", rate, ">=", 1)
    return targets.listed

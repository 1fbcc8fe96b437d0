"""Attack the product on purpose, and compare what comes with what is documented: `make attack`.

Each row is an input, what is expected, and what came. A row fails if a status, a message or an
output is not the documented one, or if anything is left: a traceback, a partial file, a process.
SEED chooses the instants of kills and the order, N the number of rows, ONLY a kind or a row.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from importlib import import_module
from pathlib import Path

from . import messages
from .rows import Result, Row, shown
from .scene import LIBRARIES, ROOT, Scene, adopt

FAMILIES = [
    "races",
    "kills",
    "interrupts",
    "resume",
    "numbers",
    "weights",
    "directories",
    "disks",
    "cached",
    "bounds",
    "data",
    "names",
]
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make attack", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="chooses instants, order and rows")
    parser.add_argument("--n", type=int, help="number of rows, default all")
    parser.add_argument("--only", help="rows of one kind, or whose kind and input hold this text")
    parser.add_argument("--list", action="store_true", help="print the rows and run none")
    parser.add_argument("--keep", action="store_true", help="keep the inputs, and rows with faults")
    parser.add_argument("--inputs", type=Path, help="inputs that a run with --keep has left")
    parser.add_argument("--workers", type=int, default=2, help="rows that run at once")
    args = parser.parse_args()
    chosen = select(args.seed, args.n, args.only)
    if not chosen:
        parser.error(f"expected a kind ({', '.join(FAMILIES)}) or a part of a row, got {args.only}")
    if args.list:
        print(*(f"{row.id}  ->  {row.expected}" for row in chosen), sep="\n")
        return 0
    warm()
    begun, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="attack-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if args.inputs:
            (folder / "stock").symlink_to(args.inputs.absolute())
        else:
            stock_of(folder)
        results = attacked(chosen, folder, args.workers, args.keep)
    finally:
        if args.keep:
            print(f"inputs and rows with faults: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    unprovoked = messages.unprovoked(results) if not (args.n or args.only) else []
    for entry in unprovoked:
        print(f"docs/troubleshooting.md: no row provokes `{entry}`")
    print(f"{time.monotonic() - begun:.0f} s")
    return close(chosen, results) or min(1, len(unprovoked))


def stock_of(folder: Path) -> None:
    """Build the inputs that rows share."""
    from . import stock

    stock.build(folder / "stock")


def rows(seed: int) -> list[Row]:
    """Return all rows, family by family."""
    families = [import_module(f"tests.attack.{name}") for name in FAMILIES]
    every = [row for family in families for row in family.rows(seed)]
    twice = [id for id, count in Counter(row.id for row in every).items() if count > 1]
    assert not twice, f"expected different rows, got {twice} again"
    return every


def select(seed: int, n: int | None, only: str | None) -> list[Row]:
    """Return the rows of the arguments: for N of them kinds take turns."""
    every = rows(seed)
    if only:
        every = [row for row in every if row.kind == only] or [r for r in every if only in r.id]
    if n is None:
        return every
    by_kind: dict[str, list[Row]] = {}
    for row in every:
        by_kind.setdefault(row.kind, []).append(row)
    rng, places = random.Random(seed), []
    for some in by_kind.values():
        rng.shuffle(some)
        places += [(i + rng.random(), row) for i, row in enumerate(some)]
    return [row for _, row in sorted(places, key=lambda place: place[0])[:n]]


def warm() -> None:
    """Import everything that commands import, so that their forks need not."""
    files = (path.relative_to(ROOT) for path in (ROOT / "mlembed").rglob("[!_]*.py"))
    ours = [".".join(path.with_suffix("").parts) for path in files]
    for name in [*LIBRARIES, *sorted(ours), "mlembed_kernels", "train"]:
        import_module(name)


def attacked(chosen: list[Row], folder: Path, workers: int, keep: bool) -> list[Result]:
    """Run rows, two at a time, and print what came of each."""
    global _todo
    _todo = chosen, folder, keep
    results = []
    print(f"{'kind':12}{'input':60}{'expected':44}{'verdict':9}got", flush=True)
    with multiprocessing.get_context("fork").Pool(workers, adopt) as pool:
        for row, result in zip(chosen, pool.imap(attempt, range(len(chosen))), strict=True):
            verdict = "FAULT" if result.faults else "ok"
            got = " ".join(result.got.split())[:160]
            print(f"{row.kind:12}{row.input:60}{row.expected:44}{verdict:9}{got}", flush=True)
            for fault in result.faults:
                print(f"{'':12}- {fault}")
            results.append(result)
    return results


def attempt(i: int) -> Result:
    """Run a row in a folder of its own, in one of the pool's processes."""
    chosen, folder, keep = _todo
    row, place = chosen[i], folder / f"row{i}"
    scene = Scene(place, folder / "stock")
    try:
        got = row.attack(scene) or shown(scene.ended[-1])
    except Exception:
        got = "the row itself failed"
        scene.faults.append(traceback.format_exc())
    scene.close()
    for line in (line for ended in scene.ended for line in ended.errors):
        scene.check(messages.entries_of(line), f"not in {messages.PAGE}: {line}")
    said = [line for ended in scene.ended for line in (ended.out + ended.err).splitlines()]
    met = {entry for line in said if len(line) < 4000 for entry in messages.entries_of(line)}
    if not (keep and scene.faults):
        shutil.rmtree(place, ignore_errors=True)
    return Result(got, scene.faults, met)


def close(chosen: list[Row], results: list[Result]) -> int:
    """Print counts by kind; return 1 if there is a fault."""
    counts = Counter(row.kind for row in chosen)
    faults = Counter(row.kind for row, r in zip(chosen, results, strict=True) if r.faults)
    print(f"\n{'kind':12}{'rows':>8}{'faults':>8}")
    for kind, count in counts.items():
        print(f"{kind:12}{count:8}{faults[kind]:8}")
    print(f"{len(chosen)} rows, {faults.total()} with a fault")
    return min(1, faults.total())


_todo: tuple[list[Row], Path, bool]

if __name__ == "__main__":
    sys.exit(main())

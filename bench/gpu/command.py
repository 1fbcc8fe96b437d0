"""python -m bench gpu --out DIR: measure what fits, the most telling first, and end in time.

The next call with the same DIR continues where this one stopped; six calls of 540 s run
everything. DIR holds three files, which are easy to fetch and to carry to the next machine:
items.jsonl (states of the items), results.jsonl (all measurements) and log.txt (output of every
item). Kernels come from --cache, which `python -m bench compile` fills beforehand, also on a
machine without a GPU.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .. import report
from ..children import end, start
from ..compiled.precompile import CACHE, card
from ..environment import sources
from . import plan
from .plan import ITEMS, Item, Where
from .state import CUT, DONE, FAILED, State

RESERVE = 5.0  # seconds before the end of a call in which nothing runs
SMOKE = 600.0  # seconds of a toy item, also on a busy machine
LOGGED = 200_000  # characters of an item's output that log.txt keeps, its end


# ---- one item ----


def run(item: Item, where: Where, state: State, seconds: float) -> None:
    """Run an item for at most `seconds`, and record how it ended."""
    limit = SMOKE if where.smoke else min(seconds, item.most)
    state.write(item.name, "begin")
    began = time.monotonic()
    environment = {**os.environ, "TRITON_CACHE_DIR": str(where.cache), "PYTHONUNBUFFERED": "1"}
    if where.smoke:  # Items run side by side, and threads that wait for each other would spin.
        environment["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        command = plan.python(item, where, limit)
        process = start(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        late = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            end(process)
        output.seek(0)
        text = output.read()
    result, note = outcome(item, process.returncode, text)
    if late:
        result, note = CUT, f"not finished in {limit:.0f} s: {note}"
    if result == CUT and not item.resumes and limit == item.most:
        result = FAILED  # It would need as long again.
    took = time.monotonic() - began
    state.write(item.name, result, seconds=round(took, 1), status=process.returncode, note=note)
    with (where.out / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"==== {item.name}: {result}, {took:.0f} s: {note}\n{text[-LOGGED:]}\n")


def outcome(item: Item, status: int, text: str) -> tuple[str, str]:
    """Return how an item ended, and a note: a summary of its result, or its error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no output"]
    if item.tests and status in (0, 1):
        told = [
            line for line in lines if re.search(r"\d (passed|failed|errors?|tests collected)", line)
        ]
        red = [line.split(" - ")[0][7:] for line in lines if line.startswith("FAILED ")]
        return DONE, "; ".join([(told or lines)[-1].strip("= "), *red[:3]])
    try:
        benches = json.loads(lines[-1])["benches"]
    except (ValueError, KeyError, TypeError):
        return (DONE if status == 0 else FAILED), lines[-1][:200]
    (result,) = benches.values()
    words = ["green" if result["green"] else "RED"]
    words += [f"{len(result['failed'])} rows failed"] * bool(result["failed"])
    missed = [t["target"] for t in result["targets"] if not t["met"] and "aim" not in t["limit"]]
    words += [f"missed: {', '.join(missed)}"] * bool(missed)
    if result["environment"] and not result["finished"]:
        return CUT, ", ".join([*words, "no time for all rows"])
    return (DONE if result["environment"] else FAILED), ", ".join(words)


# ---- a call ----


def call(items: Sequence[Item], where: Where, state: State, seconds: float) -> list[str]:
    """Run items until none fits into what is left; return their names."""
    deadline = time.monotonic() + seconds - RESERVE
    ran: list[str] = []
    while (left := deadline - time.monotonic()) > 0:
        item = state.next(items, left, ran)
        if item is None:
            break
        ran.append(item.name)
        print(f"{item.name}: {item.about}", flush=True)
        run(item, where, state, left)
    return ran


def smoke(items: Sequence[Item], where: Where, state: State) -> list[str]:
    """Run all items on toy shapes, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(run, item, where, state, SMOKE) for item in items]
        for future in futures:
            future.result()
    return [item.name for item in items]


def table(items: Sequence[Item], state: State) -> str:
    """Return the items with their states, seconds and notes."""
    lines = [["item", "state", "s", "predicted"]]
    notes = [""]
    for item in items:
        tried = state.of(item.name)
        name = tried.state if state.open(item.name) or tried.state != CUT else "given up"
        took = "-" if tried.seconds is None else f"{tried.seconds:.0f}"
        lines.append([item.name, name, took, f"{item.seconds:.0f}"])
        other = ", other sources" * (tried.state == DONE and tried.sources != state.sources)
        notes.append((tried.note or item.about)[:110] + other)
    rows = zip(report.aligned(lines), notes, strict=True)
    return "\n".join(f"{row}  {note}".rstrip() for row, note in rows)


def remaining(items: Sequence[Item], state: State) -> str:
    left = [item for item in items if state.open(item.name)]
    seconds = sum(item.seconds for item in left)
    return f"{len(items) - len(left)} of {len(items)} items ended, about {seconds:.0f} s are left"


def main(arguments: Sequence[str], items: Sequence[Item] = ITEMS) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, metavar="DIR", help="state, results and log")
    parser.add_argument("--seconds", type=float, default=540.0, help="for this call")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="kernels")
    parser.add_argument("--list", action="store_true", help="what is done and left, run nothing")
    parser.add_argument("--only", nargs="+", default=[], metavar="ITEM")
    parser.add_argument("--again", nargs="+", default=[], metavar="ITEM", help="also if they ended")
    parser.add_argument("--smoke", action="store_true", help="toy shapes, no times, any device")
    args = parser.parse_args(arguments)
    known = [item.name for item in items]
    for name in (*args.only, *args.again):
        if name not in known:
            parser.error(f"item: expected one of {', '.join(known)}, got {name!r}")
    if args.out is None and not args.smoke:
        parser.error("--out: expected a folder, got none")
    if not (args.smoke or args.list) and items is ITEMS and card() is None:
        sys.exit("error: no CUDA device: times need one, --smoke runs anywhere")
    with tempfile.TemporaryDirectory() as toy:
        out = args.out / "smoke" if args.out and args.smoke else args.out or Path(toy)
        out = out.resolve()
        out.mkdir(parents=True, exist_ok=True)
        where, state = Where(out, args.cache.resolve(), args.smoke), State.read(out, sources())
        for name in args.again:
            state.write(name, "again")
        some = [item for item in items if not args.only or item.name in args.only]
        ran: list[str] = []
        if not args.list:
            ran = (
                smoke(some, where, state) if args.smoke else call(some, where, state, args.seconds)
            )
        shown = some if args.list or args.smoke else [item for item in some if item.name in ran]
        print(f"\n{table(shown, state)}\n{remaining(items, state)}", flush=True)
        good = all(state.of(name).state in (DONE, CUT) for name in ran)
        good &= not args.smoke or all(state.of(name).state == DONE for name in ran)
    sys.exit(not good)

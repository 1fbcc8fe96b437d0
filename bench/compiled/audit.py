"""python -m bench audit [CASE...]: what the compiler makes of the kernels, and the bounds of that.

Runs anywhere, without a GPU, with the Triton that is installed. Of every kernel of the benches'
cases: resources, instructions, waits, and for each case the time that tensor units, exponentials,
instruction slots, L2 and memory need on the cards of machines.py. No number is measured.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from .. import ROOT
from .sass import NESTED, OTHER, PRODUCTS

Row = dict[str, Any]
DOCS = ROOT / "docs/kernels.md"


def default_cases(names: Iterable[str]) -> list[str]:
    """Return the cases of the kernels' benches, without those of gates and models."""
    models = "-gate-", "train_step-"
    skipping = "-alone", "-active", "-whole"
    return [
        name for name in names
        if not any(part in name for part in models) and not name.endswith(skipping)
    ]  # fmt: skip


def audit(
    names: Sequence[str], jobs: int | None, arch: int = 90, kernels: Sequence[str] = ()
) -> Row:
    """Compile the launches of these cases; return what JSON files hold.

    kernels: only these, as tables name them.
    """
    import triton

    from . import bench_cases, launches, tables
    from .machines import MACHINES

    launches.keep_compiled()
    launches.prepare()
    known = bench_cases.bench_cases()
    for name in names:
        if name not in known:
            raise ValueError(f"case: expected one of {', '.join(known)}, got {name!r}")
    names = names or default_cases(known)
    FOUND[:] = launches.collect({name: known[name] for name in names})
    if kernels:
        FOUND[:] = [launch for launch in FOUND if tables.short(launch.name) in kernels]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        rows = list(pool.map(partial(compiled, arch=arch), range(len(FOUND))))
    by_key = {launch.key(): row for launch, row in zip(FOUND, rows, strict=True)}
    return {
        "triton": triton.__version__,
        "arch": arch,
        "commit": commit(),
        "machines": {machine.name: machine.__dict__ for machine in MACHINES},
        "kernels": rows,
        "cases": costed(launches.RUNS, by_key) if arch == launches.TARGET.arch else [],
    }


FOUND: list[Any] = []  # launches, before processes are forked, which share them


def compiled(index: int, arch: int) -> Row:
    """Compile a launch; return its row, or a row with `error` instead of counts."""
    from . import machine_code, ttgir

    launch = FOUND[index]
    row: Row = {"kernel": launch.name, "case": launch.case, "index": index}
    try:
        kernel = launch.compile(arch)
        row |= machine_code.machine_code(launch, kernel)
        row["traffic"] = [region.__dict__ for region in ttgir.regions_of(kernel.asm["ttgir"])]
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        row["error"] = next((line for line in lines if "fatal" in line), lines[-1])
    return row


def commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


# ---- costs ----


def costed(runs: Iterable[Any], kernels: dict[str, Row]) -> list[Row]:
    """Return each case's kernels with the costs of all their launches, and bounds in ms."""
    from . import work
    from .machines import MACHINES

    rows: dict[tuple[str, str], Row] = {}
    for run in runs:
        key = run.launch.key()
        kernel = kernels.get(key)
        if kernel is None or "error" in kernel:
            continue
        fresh = {"case": run.case, "kernel": run.launch.name, "index": kernel["index"]}
        fresh |= {"launches": 0, "programs": 0, "cost": {}}
        row = rows.setdefault((run.case, key), fresh)
        row["launches"] += 1
        row["programs"] += run.programs
        try:
            cost = cost_of(run, kernel, work.work_of(run))
        except LookupError as error:  # The kernel is not what its model describes.
            row["unknown"] = str(error)
            continue
        for name, value in cost.items():
            row["cost"][name] = row["cost"].get(name, 0) + value
    by_index = {row["index"]: row for row in kernels.values()}
    for row in rows.values():
        kernel = by_index[row["index"]]
        slots = row["launches"] * MACHINES[0].multiprocessors * kernel["programs"]
        row["waves"] = round(row["programs"] / slots, 2)
        if "unknown" not in row and row["cost"]:
            row["bounds"] = {m.name: m.bounds(row["cost"]) for m in MACHINES}
    return list(rows.values())


def cost_of(run: Any, kernel: Row, work: Any) -> dict[str, float]:
    """Return clocks of a multiprocessor and bytes of a launch.

    Raises:
        LookupError: the compiled kernel has other loops than its model, or there is no model.
    """
    from .machines import H100

    if work is None:
        raise LookupError(f"{kernel['kernel']}: no model of its work")
    cost = dict.fromkeys(("tensor", "exponentials", "issue", "instructions"), 0.0)
    if work.loops is None:
        return {**cost, "l2": work.memory, "memory": work.memory}
    warps, loops = kernel["warps"], list(work.loops)
    for loop, region in zip(loops, of_products(kernel["traffic"]), strict=False):
        if region["rounds"] is not None:
            loop[PRODUCTS] = run.programs * region["rounds"]
    for region, times in rounds(kernel["regions"], loops, run):
        opcodes = region["opcodes"].items()
        cost["instructions"] += times * region["instructions"] * warps
        special = sum(n for name, n in opcodes if name.startswith("MUFU"))
        cost["exponentials"] += times * special * warps * 32 / H100.special
        cost["tensor"] += times * sum(n * clocks(name) for name, n in opcodes) * warps / 4
    cost["issue"] = cost["instructions"] / H100.schedulers
    traffic = rounds(kernel["traffic"], loops, run)
    cost["l2"] = sum(times * (region["read"] + region["written"]) for region, times in traffic)
    return {**cost, "memory": work.memory}


def of_products(regions: Sequence[Row]) -> list[Row]:
    """Return the region of each loop with products that runs at each of its rounds."""
    inside = (row for row in regions if row["loop"] >= 0 and row["always"])
    return [row for row in inside if row["kind"] == PRODUCTS]


def clocks(opcode: str) -> float:
    """Return the clocks of a warpgroup's product: N / 2, m64nNk16 in bf16 as m64nNk8 in tf32."""
    shape = re.match(r"HGMMA\.\d+x(\d+)x", opcode)
    return int(shape[1]) / 2 if shape else 0.0


def rounds(
    regions: Sequence[Row], loops: Sequence[dict[str, float]], run: Any
) -> list[tuple[Row, float]]:
    """Return how often each region runs in a launch, all programs together.

    Loops without products, which only write lists of rows, count as if they never ran. The last
    loops of the model may be code without a loop, which runs once in a program.
    """
    numbers = [region["loop"] for region in of_products(regions)]
    if len(numbers) > len(loops):
        name = run.launch.name
        raise LookupError(
            f"{name}: expected at most {len(loops)} loops with products, got {len(numbers)}"
        )
    found = []
    for region in regions:
        times = float(run.programs)
        if region["loop"] >= 0:
            loop = loops[numbers.index(region["loop"])] if region["loop"] in numbers else {}
            kind = PRODUCTS if region["always"] else region["kind"]
            if kind == OTHER and region["depth"] > 1:
                kind = NESTED
            times = loop.get(kind, loop.get(PRODUCTS, 0.0))
        found.append((region, times))
    return found


def main(arguments: Sequence[str]) -> None:
    from . import tables

    parser = argparse.ArgumentParser(prog="python -m bench audit", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: the kernels' benches")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with an earlier one")
    parser.add_argument("--docs", action="store_true", help="write the tables of docs/kernels.md")
    parser.add_argument("--kernel", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--arch", type=int, choices=(80, 90, 100), default=90)
    args = parser.parse_args(arguments)
    page = DOCS.read_text(encoding="utf-8") if args.docs else ""
    try:
        cases = tables.cases_of(page) if args.docs else args.cases
        found = audit(cases, args.jobs, args.arch, args.kernel)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.json:
        args.json.write_text(json.dumps(found, default=str) + "\n", encoding="utf-8")
    if args.docs:
        DOCS.write_text(tables.filled(page, found), encoding="utf-8")
        return
    if args.against:
        before = json.loads(args.against.read_text(encoding="utf-8"))
        print(tables.comparison(before, found))
        return
    print(tables.report(found))

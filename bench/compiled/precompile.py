"""python -m bench compile: compile every launch of the benches' cases into a folder, in parallel.

With a GPU it compiles for that card, without one for Hopper (sm_90a). Triton takes a kernel from
the folder if TRITON_CACHE_DIR names it and the same Triton (wheel, ptxas, sources of the kernel,
options, specialisation) asks for it; the Python version and the checkout's path do not matter.

A folder may be copied to another machine, or to another path of this one. Triton's entries name
their files by absolute paths, so `moved` rewrites them first; without that every copied entry is a
miss. Only binaries are kept, a tenth of the size or less.

Not in the folder, as it needs the driver or the device: Triton's own C module, the C launcher that
Triton 3.6 compiles for each signature (here in parallel, if there is a GPU; later versions have
none), and all kernels of torch's Inductor.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from .. import ROOT
from ..children import die_with_parent

CACHE = ROOT / ".cache" / "compiled"
CARD = """
import torch
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    print(10 * card.major + card.minor, card.multi_processor_count)
"""


def moved(folder: Path) -> int:
    """Make the entries of a cache name the files next to them; return how many were rewritten.

    Files that an entry names and that are missing (other stages of the compiler) are dropped.
    """
    count = 0
    for group in folder.glob("*/__grp__*.json"):
        try:
            named = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
        except (ValueError, KeyError, TypeError):
            group.unlink()  # a copy that was cut off
            continue
        here = {name: str(group.parent / name) for name in named if (group.parent / name).is_file()}
        if here != named:
            partial = group.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps({"child_paths": here}), encoding="utf-8")
            partial.replace(group)
            count += 1
    return count


def card() -> tuple[int, int] | None:
    """Return the architecture (90) and multiprocessors of this machine's GPU, None without one.

    Another process asks, as this one forks, which CUDA does not survive.
    """
    done = subprocess.run([sys.executable, "-c", CARD], capture_output=True, text=True)
    words = done.stdout.split()
    return (int(words[0]), int(words[1])) if len(words) == 2 else None


# ---- in the processes of the pool, which share what was imported and collected ----

LAUNCHES: list[Any] = []
CASES: dict[str, Any] = {}
ARCH, ON_CARD = 90, False


def compile_launch(index: int) -> list[str]:
    return [problem] if (problem := attempt(LAUNCHES[index])) else []


def compile_case(name: str) -> list[str]:
    """Collect a case and compile what no other case has."""
    from . import launches

    known = {launch.key() for launch in LAUNCHES}
    found = launches.collect({name: CASES[name]})
    problems = (attempt(launch) for launch in found if launch.key() not in known)
    return [problem for problem in problems if problem]


def attempt(launch: Any) -> str | None:
    """Compile a launch; return what went wrong."""
    try:
        kernel = launch.compile(ARCH)
        if ON_CARD:
            build_launcher(launch, kernel)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"{launch.name} of {launch.case}: {lines[-1][:200]}"
    return None


def build_launcher(launch: Any, kernel: Any) -> None:
    """Build the C launcher of a signature, if this Triton has them."""
    driver = importlib.import_module("triton.backends.nvidia.driver")
    if hasattr(driver, "make_launcher"):
        driver.CudaLauncher(launch.source(), kernel.metadata)


# ---- the command ----


def chosen(known: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return the cases of these names or beginnings of names (`infonce`, `attention-short`)."""
    for one in wanted:
        if not any(name == one or name.startswith(f"{one}-") for name in known):
            sys.exit(f"error: case: expected a name or its beginning, of --list, got {one!r}")
    return [
        name
        for name in known
        if not wanted or any(name == one or name.startswith(f"{one}-") for one in wanted)
    ]


def main(arguments: Sequence[str]) -> None:
    global ARCH, ON_CARD
    parser = argparse.ArgumentParser(prog="python -m bench compile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names or their beginnings")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--list", action="store_true", help="list the cases, compile nothing")
    args = parser.parse_args(arguments)
    began = time.monotonic()
    folder: Path = args.cache.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rewritten = moved(folder)
    os.environ |= {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
    os.environ.pop("TRITON_INTERPRET", None)
    have = card()
    ARCH, ON_CARD = have[0] if have else 90, have is not None

    from . import bench_cases, launches

    launches.prepare(*([have[1]] if have else []))
    small, whole = bench_cases.kernel_cases(), dict(bench_cases.step_cases())
    CASES.update({**small, **whole})
    names = chosen(list(CASES), args.cases)
    if args.list:
        print(*names, sep="\n")
        return
    LAUNCHES[:] = launches.collect({name: small[name] for name in names if name in small})
    before = count(folder)
    forked = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(args.jobs, forked, die_with_parent) as pool:
        # Whole models take seconds to collect, so they begin first.
        steps = pool.map(compile_case, [name for name in names if name in whole])
        kernels = pool.map(compile_launch, range(len(LAUNCHES)))
        problems = [problem for found in (*steps, *kernels) for problem in found]
    for source in folder.glob("*/*.source"):  # Half of the size, and not read.
        source.unlink()
    moved(folder)
    for problem in dict.fromkeys(problems):
        print(f"does not compile: {problem}")
    print(
        f"export TRITON_CACHE_DIR={folder}\n"
        f"{len(names)} cases for sm_{ARCH}: {before} kernels were there ({rewritten} moved), "
        f"{count(folder) - before} compiled by {args.jobs} processes, {len(problems)} failed, "
        f"{time.monotonic() - began:.0f} s"
    )
    sys.exit(bool(problems))


def count(folder: Path) -> int:
    return len(list(folder.glob("*/__grp__*.json")))

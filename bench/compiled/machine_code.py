"""Machine code of compiled launches: wgmma, registers, stack, and loops with hazards.

python -m bench.compiled.machine_code [CASE...] -> one JSON object for each specialisation
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton.backends.nvidia

from . import bench_cases, launches
from .launches import Launch

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"


def disassembly(cubin: bytes) -> str:
    return _run_on(cubin, "nvdisasm", "-c")


def _run_on(cubin: bytes, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / tool), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loops(sass: str) -> list[list[str]]:
    """Return the instructions of each loop, from a label to a branch back to it."""
    lines = sass.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_\w+):", line))}
    bodies = []
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*?`\((\.L_\w+)\)", line)
        if branch and labels.get(branch[1], i) < i - 1:
            bodies.append(lines[labels[branch[1]] : i + 1])
    return bodies


def unguarded(loop: Sequence[str]) -> bool:
    """Tell if shared memory is overwritten after a wait for a product, without a barrier.

    Other warps may still read it (Triton issue 11047). The loop is walked twice, as the wait may
    belong to the round before the copy.
    """
    waited = False
    for line in [*loop, *loop]:
        if "WARPGROUP.DEPBAR" in line:
            waited = True
        elif "BAR.SYNC" in line:
            waited = False
        elif "LDGSTS" in line and waited:
            return True
    return False


def machine_code(launch: Launch, kernel: Any) -> dict[str, Any]:
    """Return a compiled launch as a row: its options, and counts of its instructions."""
    ptx, cubin = kernel.asm["ptx"], kernel.asm["cubin"]
    usage = _run_on(cubin, "cuobjdump", "--dump-resource-usage")
    resources = {
        name: int(re.search(rf"{key}:(\d+)", usage)[1])  # type: ignore[index]
        for key, name in (("REG", "registers"), ("STACK", "stack"))
    }
    inner = loops(disassembly(cubin))
    products = [(_count(loop, "HGMMA"), _count(loop, "WARPGROUP.DEPBAR")) for loop in inner]
    constants = launch.arguments()
    return {
        "kernel": launch.name,
        "case": launch.case,
        "constants": {k: v for k, v in constants.items() if k.isupper()},
        "ones": sorted(k for k, v in constants.items() if not k.isupper()),
        "divisible": sorted(launch.divisible()),
        "warps": launch.options.num_warps,
        "stages": launch.options.num_stages,
        "target": re.search(r"\.target (\S+)", ptx)[1],  # type: ignore[index]
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "async_copies": ptx.count("cp.async"),
        "shared": kernel.metadata.shared,
        **resources,
        "spills_in_loops": sum(_count(loop, "STL") + _count(loop, "LDL") for loop in inner),
        # Loops that wait for every product before the next begins.
        "serial_loops": sum(0 < n <= waits for n, waits in products),
        "unguarded_loops": sum(map(unguarded, inner)) if launch.options.num_warps > 4 else 0,
        "hash": kernel.hash,
    }


def _count(lines: Sequence[str], opcode: str) -> int:
    return sum(opcode in line for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.compiled.machine_code")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--list", action="store_true", help="list launches, compile nothing")
    args = parser.parse_args()
    launches.keep_compiled()
    launches.prepare()
    cases = bench_cases.bench_cases()
    for launch in launches.collect({name: cases[name] for name in args.cases or cases}):
        if args.list:
            print(json.dumps({"kernel": launch.name, "case": launch.case, "key": launch.key()}))
        else:
            print(json.dumps(machine_code(launch, launch.compile()), default=str), flush=True)

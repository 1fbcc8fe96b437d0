"""A compiled launch as a row: its options, resources, and what its instructions are.

python -m bench.compiled.machine_code [CASE...] -> one JSON object for each specialisation
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton.backends.nvidia

from . import bench_cases, launches, sass
from .launches import Launch
from .machines import H100

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
TILE = "BM", "BN", "BK", "TOKENS", "HEADS", "BR", "BP"


def disassembly(cubin: bytes) -> str:
    return _run_on(cubin, "nvdisasm", "-c")


def _run_on(code: bytes, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(code)
        file.flush()
        command = [str(TOOLS / tool), *options, file.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout + done.stderr


def serialised(ptx: str, arch: int = 90) -> bool:
    """Tell if ptxas says that it serialises wgmma, as registers are in their way (C7515)."""
    if "wgmma" not in ptx:
        return False
    said = _run_on(ptx.encode(), "ptxas", "-v", f"--gpu-name=sm_{arch}a", "-o", os.devnull)
    return "serialized" in said


def machine_code(launch: Launch, kernel: Any) -> dict[str, Any]:
    """Return a compiled launch as a row: its options, and counts of its instructions."""
    ptx, cubin = kernel.asm["ptx"], kernel.asm["cubin"]
    usage = _run_on(cubin, "cuobjdump", "--dump-resource-usage")
    resources = {
        name: int(re.search(rf"{key}:(\d+)", usage)[1])  # type: ignore[index]
        for key, name in (("REG", "registers"), ("STACK", "stack"))
    }
    code = disassembly(cubin)
    inner = sass.bodies(code)
    products = [(_count(loop, "HGMMA"), _count(loop, "WARPGROUP.DEPBAR")) for loop in inner]
    constants, warps = launch.arguments(), kernel.metadata.num_warps
    programs = H100.programs(warps, resources["registers"], kernel.metadata.shared)
    return {
        "kernel": launch.name,
        "case": launch.case,
        "constants": {k: v for k, v in constants.items() if k.isupper()},
        "ones": sorted(k for k, v in constants.items() if not k.isupper()),
        "divisible": sorted(launch.divisible()),
        "tile": {name: constants[name] for name in TILE if name in constants},
        "warps": warps,
        "stages": launch.options.num_stages,
        "target": re.search(r"\.target (\S+)", ptx)[1],  # type: ignore[index]
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "async_copies": ptx.count("cp.async"),
        "shared": kernel.metadata.shared,
        **resources,
        "programs": programs,  # that a multiprocessor holds at once
        "spills_in_loops": sum(_count(loop, "STL") + _count(loop, "LDL") for loop in inner),
        # Loops that wait for every product before the next begins.
        "serial_loops": sum(0 < n <= waits for n, waits in products),
        "unguarded_loops": sum(map(sass.unguarded, inner)) if warps > 4 else 0,
        "regions": [
            {
                "loop": region.loop,
                "always": region.always,
                "kind": region.kind,
                "instructions": len(region.lines),
                "opcodes": dict(region.opcodes.most_common()),
            }
            for region in sass.regions_of(code)
        ],
        "hash": kernel.hash,
    }


def _count(lines: list[str], opcode: str) -> int:
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

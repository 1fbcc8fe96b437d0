"""A compiled launch as a row: its options, resources, and what its instructions are.

python -m bench.compiled.machine_code [CASE...] -> one JSON object for each specialisation
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton.backends.nvidia
from triton.backends.nvidia.compiler import get_ptxas

from . import bench_cases, launches, sass
from .launches import Launch
from .machines import H100

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
TILE = "BM", "BN", "BK", "TOKENS", "HEADS", "BR", "BP"


def disassembly(kernel: Any) -> str:
    return _kept(kernel, "sass", lambda: _run_on(kernel.asm["cubin"], "nvdisasm", "-c"))


def _kept(kernel: Any, kind: str, make: Callable[[], str]) -> str:
    """Return what a slow tool says of a kernel, kept with the compiled kernels."""
    path = Path(os.environ["TRITON_CACHE_DIR"], "tools", f"{kernel.hash}.{kind}")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{kind}.{os.getpid()}")
        own.write_text(make(), encoding="utf-8")
        own.rename(path)
    return path.read_text(encoding="utf-8")


def _run_on(code: bytes, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(code)
        file.flush()
        command = [str(TOOLS / tool), *options, file.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout + done.stderr


def serialised(kernel: Any) -> bool:
    """Tell if ptxas says that it serialises wgmma (C7515)."""
    ptx = kernel.asm["ptx"]
    if "wgmma" not in ptx:
        return False
    arch = re.search(r"\.target sm_(\d+)(\w*)", ptx)
    assert arch is not None
    tool = get_ptxas(int(arch[1])).path
    options = "-v", f"--gpu-name=sm_{arch[1]}{arch[2]}", "-o", os.devnull
    return "serialized" in _kept(kernel, "log", lambda: _run_on(ptx.encode(), tool, *options))


def machine_code(launch: Launch, kernel: Any) -> dict[str, Any]:
    """Return a compiled launch as a row: its options, and counts of its instructions."""
    ptx, cubin = kernel.asm["ptx"], kernel.asm["cubin"]
    usage = _run_on(cubin, "cuobjdump", "--dump-resource-usage")
    resources = {
        name: int(re.search(rf"{key}:(\d+)", usage)[1])  # type: ignore[index]
        for key, name in (("REG", "registers"), ("STACK", "stack"))
    }
    code = disassembly(kernel)
    inner, regions = sass.bodies(code), sass.regions_of(code)
    in_loops = [region for region in regions if region.loop >= 0]
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
        "spills_in_loops": sum(region.count("STL", "LDL") for region in in_loops),
        # Loops that wait for every instruction of a product before the next begins, which ptxas
        # calls serialised, and loops that leave no product under way at the end of a round.
        "serial_loops": sum(map(sass.serial, inner)),
        "serialised": serialised(kernel),
        "idle_loops": sum(map(sass.idle, in_loops)),
        "unguarded_loops": sum(map(sass.unguarded, inner)) if warps > 4 else 0,
        "regions": [
            {
                "loop": region.loop,
                "always": region.always,
                "depth": region.depth,
                "kind": region.kind,
                "instructions": len(region.lines),
                "opcodes": dict(region.opcodes.most_common()),
            }
            for region in regions
        ],
        "hash": kernel.hash,
    }


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

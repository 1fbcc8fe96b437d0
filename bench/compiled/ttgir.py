"""Bytes that a program's loads and stores move, from Triton's GPU dialect.

A tile is counted once, also if several threads hold the same number: what L2 sees of a program.
"""

import math
import re
from dataclasses import dataclass

from .sass import EXPONENTIALS, OTHER, PRODUCTS

BYTES = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "f16": 2, "bf16": 2, "i16": 2, "i8": 1, "i1": 1}
READS = (
    "tt.load ",
    "ttg.async_copy_global_to_local",
    "async_tma_copy_global_to_local",
    "tt.descriptor_load",
)
WRITES = "tt.store ", "async_tma_copy_local_to_global", "tt.descriptor_store"
# From 0 to a constant, in steps of 1.
CONSTANT = re.compile(r"= %c0\w* to %c(\d+)_i32\w* step %c1_i32")


@dataclass
class Region:
    """Operations that run equally often; `loop` and `kind` as in sass.Region.

    rounds: of the loop, if the compiler knows it.
    """

    loop: int
    always: bool
    depth: int = 0
    kind: str = OTHER
    read: int = 0
    written: int = 0
    rounds: int | None = None


def regions_of(text: str) -> list[Region]:
    """Return the regions in their order; the first is outside of loops."""
    regions = [Region(-1, True)]
    stack, loops = [regions[0]], 0
    for line in text.splitlines():
        line = re.sub(r"\s*loc\(.*", "", line).strip()
        if line.startswith("}"):
            closed = stack.pop() if len(stack) > 1 else stack[0]
            if line.startswith("} else"):
                regions.append(Region(closed.loop, False, closed.depth))
                stack.append(regions[-1])
                continue
        top = stack[-1]
        if "warp_group_dot " in line or "tt.dot " in line or "tc_gen5_mma" in line:
            top.kind = PRODUCTS
        elif "math.exp2" in line and top.kind == OTHER:
            top.kind = EXPONENTIALS
        size = _bytes(line)
        # Copies before a loop are its first ones; the last rounds of the loop copy nothing.
        ahead = top.loop < 0 and "async" in line
        top.read += size * (not ahead and any(op in line for op in READS))
        top.written += size * any(op in line for op in WRITES)
        if not line.endswith("{"):
            continue
        if "scf.for" in line or "scf.while" in line:
            known = CONSTANT.search(line)
            regions.append(Region(loops, True, rounds=int(known[1]) if known else None))
            loops += 1
        elif "scf.if" in line:
            regions.append(Region(top.loop, False, top.depth + 1))
        # Others open the body of a reduction, or of a function.
        stack.append(regions[-1] if "scf." in line else top)
    return regions


def _bytes(line: str) -> int:
    """Return the size of the first tile, or number, that an operation's types name."""
    types = line.rpartition(" : ")[2]
    tile = re.search(r"<((?:\d+x)*)(?:!tt\.ptr<)?(bf16|[fi]\d+)", types)
    if not tile or tile[2] not in BYTES:
        return 0
    return math.prod(int(n) for n in tile[1].split("x") if n) * BYTES[tile[2]]

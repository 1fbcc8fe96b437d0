"""Compile every launch for Hopper (sm_90a), without a GPU, and check that it can be fast and right.

    python tests/hopper.py [CASE...] -> violations, then one line with their number
    python tests/hopper.py --quick --arch 80 -> that kernels compile for an A100, and what spills

Cases are those of the benches (bench/compiled/bench_cases.py) and variants below. A violation that
is known for a version of Triton is a row of EXCEPTIONS. Compiled kernels are kept, so a run that
was stopped continues.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
import triton  # noqa: E402

from bench.compiled import bench_cases, launches, machine_code  # noqa: E402
from bench.compiled.launches import CPU, Launch, empty, train  # noqa: E402

# ---- what is compiled beyond the benches' cases ----

FULL = (8, 16, 32, 64, 128, 256, 512, 1024)
SHAPES = {"1024": FULL, "256": FULL[:6], "896": (*FULL[:7], 896), "plain": (1024,)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADS = (16, 8), (12, 12), (12, 4), (32, 8)
E, N = 7, 16384


def pairwise_lse(dtype: torch.dtype, dims: tuple[int, ...], columns: bool, masks: bool) -> None:
    from mlembed_kernels.similarity.pairwise_lse import pairwise_lse

    x, y = (empty(E, N, dims[-1], dtype=dtype) for _ in "xy")
    options: dict[str, Any] = {"positive": empty(N, dtype=torch.int64)}
    if masks:
        options |= {key: [empty(N, dtype=torch.int64)] for key in ("row_keys", "col_keys")}
        options["ceiling"] = None if columns else empty(E, N, dtype=torch.float32)
    scale = empty(E, len(dims), dtype=torch.float32)

    def function(*xy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = pairwise_lse(*xy, dims=dims, scale=scale, columns=columns, impl="triton", **options)
        return tuple(part for part in parts if part is not None)

    train(function, x, y)


def distill(dtype: torch.dtype, dims: tuple[int, ...], kind: str) -> None:
    from mlembed_kernels.similarity.distill import distill

    teachers = (empty(N, 768, dtype=dtype) for _ in "qc")
    options = dict(zip(("teacher_q", "teacher_c"), teachers, strict=True))
    vectors = (empty(E, N, dims[-1], dtype=dtype) for _ in "qc")
    train(partial(distill, dims=dims, kind=kind, impl="triton", **options), *vectors)


def cosine(dtype: torch.dtype, dims: tuple[int, ...], partners: int) -> None:
    from mlembed_kernels.similarity.cosine import cosine

    x, y = (empty(E, N, *more, dims[-1], dtype=dtype) for more in ((), (partners,)))
    train(partial(cosine, dims=dims, impl="triton"), x, y)


def attention(
    dtype: torch.dtype, heads: tuple[int, int], K: int, causal: bool, skip: bool = False
) -> None:
    """Short, middle and long sequences."""
    from mlembed_kernels import AttentionPlan
    from mlembed_kernels.attention.attention import attention

    plan = AttentionPlan.of(torch.tensor([0, 48, 16, 192, 300, 600]).cumsum(0)).to(CPU)
    qkv = (empty(plan.tokens, H, K, dtype=dtype) for H in (heads[0], heads[1], heads[1]))
    options: dict[str, Any] = {"cu_seqlens": plan.cu_seqlens, "plan": plan, "causal": causal}
    options["active"] = empty(plan.sequences, dtype=torch.bool) if skip else None
    train(partial(attention, impl="triton", **options), *qkv)


def embed(factors: torch.dtype, dtype: torch.dtype, sizes: tuple[int, int, int], rank: int) -> None:
    """Sizes V, R, D. Once all tokens, one of them in several parts, and once few."""
    from mlembed_kernels import TokenIndex
    from mlembed_kernels.embedding.embed import embed

    def function(ids: torch.Tensor, U: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        token_index = lists[ids]
        with torch.autocast("cpu", dtype, enabled=factors != dtype):
            return embed(ids, U, W, rank, impl="triton", token_index=token_index)

    V, R, D = sizes
    several = torch.zeros(48, dtype=torch.int64)
    batches = [torch.cat([several, torch.arange(distinct)]) for distinct in (V, 3)]
    lists = {ids.to(CPU): TokenIndex.of(ids).to(CPU) for ids in batches}
    for ids in lists:
        train(partial(function, ids), empty(V, R, dtype=factors), empty(R, D, dtype=factors))


def variants() -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype, half in DTYPES.items():
        for shape, dims in SHAPES.items():
            for wanted in ("rows", "rows-masks", "both", "both-masks"):
                both, masks = "both" in wanted, "masks" in wanted
                yield f"{shape}-{wanted}-{dtype}", partial(pairwise_lse, half, dims, both, masks)
        for kind in ("mse", "kl"):
            yield f"{kind}-{dtype}", partial(distill, half, FULL, kind)
        for partners in (1, 4):
            yield f"cosine-{partners}-{dtype}", partial(cosine, half, FULL, partners)
        for heads, K, causal in product(HEADS, (32, 64, 96, 128), (True, False)):
            name = f"attention-{heads[0]}-{heads[1]}-{K}{'-causal' * causal}-{dtype}"
            yield name, partial(attention, half, heads, K, causal)
        yield f"attention-skip-{dtype}", partial(attention, half, (16, 8), 128, True, True)
        for masters in (False, True)[: 1 + (dtype != "fp32")]:
            factors, kind = (torch.float32, "masters-") if masters else (half, "")
            for rank in (1, 64, 65, 512):
                sizes = 30_000, 512, 1024
                yield f"embed-{rank}-{kind}{dtype}", partial(embed, factors, half, sizes, rank)
            sizes = 30_001, 65, 131
            yield f"embed-odd-{kind}{dtype}", partial(embed, factors, half, sizes, 65)


# Added to the benches' cases: those that need most registers, each kernel, each dtype.
FEW = (
    *("1024-rows-fp16", "1024-both-masks-bf16", "256-rows-masks-bf16", "256-both-masks-fp32"),
    *("mse-bf16", "kl-fp32", "cosine-1-bf16", "cosine-4-bf16"),
    *("attention-12-12-96-bf16", "attention-12-4-64-fp16", "attention-12-12-64-causal-fp32"),
    *("attention-skip-bf16", "embed-512-fp32", "embed-1-fp16", "embed-odd-fp16", "embed-odd-fp32"),
    "embed-65-masters-bf16",
)
# The first launch of each kernel is taken from these.
QUICK = (
    *("infonce-both", "256-rows-masks-bf16", "cosine-4-bf16"),
    *("attention-mid-ours", "embed-step", "adamw-step"),
)


# ---- what is asserted ----

# Element-wise kernels, and the repair of underflow with its tiles of 32 rows, have no warpgroups.
NO_WGMMA = {
    "_pack_kernel", "_unpack_kernel", "_positive_kernel", "_merge_kernel", "_exact_kernel",
    "_cosine_forward_kernel", "_cosine_backward_kernel",
    "_sum_kernel", "_total_kernel", "_gather_kernel", "_adamw_kernel",
}  # fmt: skip
SHARED = 227 * 1024  # bytes a multiprocessor has


@dataclass(frozen=True)
class Exempt:
    kernel: str
    versions: tuple[str, ...]  # of Triton, () for all
    what: str
    most: int
    reason: str
    only: tuple[str, Any] | None = None  # a constant of the specialisation, and its value


RARE = "runs only where a NaN was found, with the tile of another kernel, whose bits it repeats"
REPAIR = "repairs sums that underflowed, and returns at once where none did"
OUTSIDE = "stored before the loop, loaded after it"
ENDS = "loaded at a prefix's or tile's end, not at every step of the products"
SHARED_BY_TWO = "128 registers, so that two programs share a multiprocessor; " + ENDS
FULL_TILE = "gradients of 128 keys fill 255 registers; a step has 500 instructions"
WAITS = "ptxas waits for each of its products; no GPU has told what that costs"
CHAIN = "each product's result goes through exponentials into the next product"
OLD, BEFORE, NEW = ("3.6.0",), ("3.6.0", "3.7.1"), ("3.9.0",)
FP32, ROWS_ALONE = ("PRECISION", "tf32x3"), ("COLUMNS", False)
EXCEPTIONS = (
    Exempt("_apart_backward_kernel", (), "stack", 128, RARE),
    Exempt("_apart_backward_kernel", (), "spills_in_loops", 64, RARE),
    Exempt("_exact_kernel", (), "stack", 40, REPAIR),
    Exempt("_exact_kernel", NEW, "spills_in_loops", 1, REPAIR),
    Exempt("_narrow_backward_kernel", BEFORE, "stack", 96, OUTSIDE, FP32),
    Exempt("_narrow_backward_kernel", BEFORE, "stack", 16, OUTSIDE),
    Exempt("_narrow_backward_kernel", NEW, "stack", 32, OUTSIDE),
    Exempt("_packed_backward_kernel", OLD, "stack", 8, OUTSIDE),
    Exempt("_packed_backward_kernel", BEFORE, "stack", 16, OUTSIDE, ("SKIP", True)),
    Exempt("_packed_backward_kernel", NEW, "stack", 120, OUTSIDE),
    Exempt("_packed_forward_kernel", NEW, "stack", 32, OUTSIDE),
    Exempt("_keys_backward_kernel", NEW, "stack", 64, FULL_TILE),
    Exempt("_keys_backward_kernel", NEW, "spills_in_loops", 8, FULL_TILE),
    Exempt("_narrow_forward_kernel", NEW, "stack", 24, ENDS),
    Exempt("_narrow_forward_kernel", NEW, "spills_in_loops", 5, ENDS),
    Exempt("_wide_forward_kernel", (), "stack", 80, ENDS),
    Exempt("_wide_forward_kernel", NEW, "spills_in_loops", 4, ENDS),
    Exempt(
        "_wide_forward_kernel", NEW, "spills_in_loops", 5,
        ENDS + ", but for three words in fp32 against a teacher",
        FP32,
    ),
    Exempt("_wide_backward_kernel", NEW, "stack", 24, ENDS),
    Exempt("_wide_backward_kernel", NEW, "spills_in_loops", 5, ENDS),
    Exempt("_wide_backward_kernel", NEW, "stack", 48, SHARED_BY_TWO, ROWS_ALONE),
    Exempt("_wide_backward_kernel", NEW, "spills_in_loops", 11, SHARED_BY_TWO, ROWS_ALONE),
    Exempt("_wide_backward_kernel", BEFORE, "stack", 32, SHARED_BY_TWO, ROWS_ALONE),
    Exempt("_wide_backward_kernel", BEFORE, "spills_in_loops", 2, SHARED_BY_TWO, ROWS_ALONE),
    Exempt("_narrow_backward_kernel", (), "serial_loops", 1, CHAIN),
    Exempt("_project_kernel", (), "serial_loops", 1, WAITS, ("BK", 32)),
    Exempt("_project_kernel", NEW, "stack", 16, OUTSIDE),
    Exempt("_project_kernel", (), "serialised", 1, WAITS, ("BK", 32)),
    Exempt("_narrow_backward_kernel", (), "serialised", 1, CHAIN),
    Exempt("_narrow_forward_kernel", (), "idle_loops", 1, CHAIN),
    Exempt("_narrow_backward_kernel", (), "idle_loops", 1, CHAIN),
    Exempt("_packed_backward_kernel", (), "idle_loops", 1, CHAIN),
    Exempt("_apart_backward_kernel", (), "idle_loops", 1, CHAIN),
    Exempt("_long_forward_kernel", (), "idle_loops", 2, CHAIN),
    Exempt("_queries_backward_kernel", (), "idle_loops", 2, CHAIN),
    Exempt("_keys_backward_kernel", (), "idle_loops", 1, CHAIN),
    Exempt("_project_kernel", (), "idle_loops", 1, WAITS),
    Exempt(
        "_long_forward_kernel", NEW, "unguarded_loops", 2,
        "keys are copied over, whose product was waited for before the last barrier",
    ),
    Exempt(
        "_product_kernel", BEFORE, "unguarded_loops", 1,
        "products read what registers wrote; the tiles that are copied over were read before a "
        "barrier",
        FP32,
    ),
)  # fmt: skip


def most(row: dict[str, Any], what: str) -> int:
    """Return how much of it is allowed."""
    found = [
        one.most for one in EXCEPTIONS
        if (one.kernel, one.what) == (row["kernel"], what)
        and (not one.versions or triton.__version__ in one.versions)
        and (one.only is None or row["constants"].get(one.only[0]) == one.only[1])
    ]  # fmt: skip
    return max(found, default=0)


def violations(row: dict[str, Any]) -> list[str]:
    """Return what is wrong with a compiled launch, in words."""
    found = []
    if row["target"] != "sm_90a":
        found.append(f"target: expected sm_90a, got {row['target']}")
    for what, limit in (("registers", 255), ("shared", SHARED)):
        if row[what] > limit:
            found.append(f"{what}: expected at most {limit}, got {row[what]}")
    for what in ("stack", "spills_in_loops", "unguarded_loops"):
        if row[what] > most(row, what):
            found.append(f"{what}: expected at most {most(row, what)}, got {row[what]}")
    # The smallest tile of fp32's attention has too few rows for a warpgroup.
    if row["kernel"] in NO_WGMMA or row["constants"].get("TOKENS") == 16:
        return found
    if not row["wgmma"] or row["mma"]:
        found.append(f"products: expected wgmma alone, got {row['wgmma']} and {row['mma']} mma")
    if not row["async_copies"] and row["stages"] > 1:
        found.append("copies: expected asynchronous ones, got none")
    # Of fp32's three products some take operands from registers, which waits protect.
    three = row["constants"].get("PRECISION") == "tf32x3"
    for what, got in (
        ("serial_loops", "a wait for each"),
        ("serialised", "a warning of ptxas that it serialises them"),
        ("idle_loops", "rounds that wait for all of theirs"),
    ):
        if row[what] > most(row, what) and not (three and what == "idle_loops"):
            found.append(f"products: expected several under way, got {got}")
    return found


# Bytes of stack with Triton 3.7.1 on cards that the launch options were not chosen for, and bytes
# of shared memory that their multiprocessors have.
SPILLS = {
    80: {
        "_product_kernel": 24, "_project_kernel": 24, "_queries_backward_kernel": 24,
        "_keys_backward_kernel": 56, "_wide_backward_kernel": 184, "_matrix_kernel": 120,
        "_packed_forward_kernel": 664, "_packed_backward_kernel": 2792,
        "_apart_backward_kernel": 9632,
    },
    100: {
        "_wide_forward_kernel": 560, "_packed_forward_kernel": 40, "_packed_backward_kernel": 56,
        "_queries_backward_kernel": 8, "_wide_backward_kernel": 88, "_apart_backward_kernel": 272,
        "_narrow_backward_kernel": 1520, "_narrow_forward_kernel": 648,
    },
}  # fmt: skip
SHARED_OF = {80: 163 * 1024, 100: 227 * 1024}


def elsewhere(row: dict[str, Any], arch: int) -> list[str]:
    """Return what is wrong with a launch that was compiled for another card than Hopper."""
    limits = {"stack": SPILLS[arch].get(row["kernel"], 0), "shared": SHARED_OF[arch]}
    return [
        f"{what}: expected at most {most}, got {row[what]}"
        for what, most in limits.items()
        if row[what] > most
    ]


def judged(launch: Launch, arch: int) -> tuple[dict[str, Any], list[str]]:
    """Return what was compiled and what is wrong with it."""
    try:
        row = machine_code.machine_code(launch, launch.compile(arch))
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "fatal" in line), lines[-1])
        return {"kernel": launch.name, "case": launch.case}, [f"does not compile: {reason}"]
    return row, violations(row) if arch == launches.TARGET.arch else elsewhere(row, arch)


FOUND: list[Launch] = []  # before processes are forked, which share it


def judged_at(index: int, arch: int) -> tuple[dict[str, Any], list[str]]:
    return judged(FOUND[index], arch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="instead of the benches' and some")
    parser.add_argument("--all", action="store_true", help="all variants")
    parser.add_argument("--quick", action="store_true", help="one launch a kernel")
    parser.add_argument("--rows", action="store_true", help="print what was compiled")
    parser.add_argument("--arch", type=int, choices=(80, 90, 100), default=90, help="of the card")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    launches.keep_compiled()
    launches.prepare()
    began = time.monotonic()
    if args.quick:
        known, names = bench_cases.kernel_cases(), QUICK
    else:
        known = bench_cases.bench_cases()
        names = args.cases or (*known, *FEW)
    known.update(variants())
    if args.all:
        names = tuple(known)
    FOUND[:] = launches.collect({name: known[name] for name in names})
    if args.quick:
        FOUND[:] = {launch.name: launch for launch in reversed(FOUND)}.values()
    wrong = 0
    forked = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(args.jobs, forked) as pool:
        for row, found in pool.map(partial(judged_at, arch=args.arch), range(len(FOUND))):
            if args.rows:
                print(row, flush=True)
            for violation in found:
                wrong += 1
                print(f"{row['kernel']} of {row['case']}: {violation}", flush=True)
    print(
        f"triton {triton.__version__}: {len(FOUND)} launches of "
        f"{len({launch.name for launch in FOUND})} kernels, {wrong} violations, "
        f"{time.monotonic() - began:.0f} s"
    )
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()

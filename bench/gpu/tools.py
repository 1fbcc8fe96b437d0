"""Run NVIDIA's tools on the loss's kernels, where they are installed.

    python -m bench.gpu.tools memcheck    compute-sanitizer: accesses out of bounds, then races
    python -m bench.gpu.tools counters    ncu: bytes from memory and from L2, by kernel

Without a tool the same program runs without it, and the result says so. ncu leaves the clocks
alone.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import ROOT
from ..environment import sources
from ..records import append

CUDA, NSIGHT = Path("/usr/local/cuda"), Path("/opt/nvidia/nsight-compute")
METRICS = {
    "ns": "gpu__time_duration.sum",
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "l2": "lts__t_bytes.sum",
    "l2_to_sm": "l1tex__m_xbar2l1tex_read_bytes.sum",
    "instructions": "sm__inst_issued.sum",
}
CASE = "reference"


def found(tool: str) -> str | None:
    """Return the path of a tool, also where it is not on the PATH."""
    folders = CUDA / "bin", CUDA / "compute-sanitizer", *sorted(NSIGHT.glob("*"), reverse=True)
    return shutil.which(tool) or shutil.which(tool, path=os.pathsep.join(map(str, folders)))


def watched(prefix: Sequence[str], what: str, smoke: bool, **env: str) -> tuple[int, str]:
    """Run once.py under a tool -> its exit status, and what both printed."""
    command = [*prefix, sys.executable, "-m", "bench.gpu.once", what, *["--smoke"] * smoke]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


# ---- compute-sanitizer ----


def memcheck(smoke: bool) -> dict[str, Any]:
    """Return the errors that memcheck and racecheck report.

    torch's allocator hands out parts of large blocks, in which an access out of bounds stays
    unseen, so it is switched off.
    """
    if (tool := found("compute-sanitizer")) is None:
        status, text = watched([], "checks", smoke)
        return {"ok": status == 0, "note": "compute-sanitizer is not installed", "text": text}
    record: dict[str, Any] = {"ok": True, "note": "", "text": ""}
    for kind in ("memcheck", "racecheck"):
        status, text = watched(
            [tool, "--tool", kind], "checks", smoke, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )
        errors = reported(text)
        record[kind] = errors
        record["ok"] &= status == 0 and errors == 0
        record["text"] += text
    record["note"] = ", ".join(f"{k}: {record[k]} errors" for k in ("memcheck", "racecheck"))
    return record


def reported(text: str) -> int | None:
    """Return the number of errors in a summary, None without one."""
    counts = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    return sum(map(int, counts)) if counts else None


# ---- ncu ----


def counters(smoke: bool) -> dict[str, Any]:
    """Return bytes and time by kernel of one step, next to the least bytes of the case."""
    from ..infonce.cases import CASES

    least = CASES[CASE].nbytes("fwd+bwd")
    record: dict[str, Any] = {"case": CASE, "least_bytes": least}
    if (tool := found("ncu")) is None:
        status, text = watched([], CASE, smoke)
        return record | {"ok": status == 0, "note": "ncu is not installed", "text": text}
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv"]
    options += ["--print-units", "base", "--metrics", ",".join(METRICS.values())]
    status, text = watched([tool, *options], CASE, smoke)
    kernels = counted(text)
    moved = sum(row.get("read", 0.0) + row.get("written", 0.0) for row in kernels.values())
    note = f"{moved / 1e9:.2f} GB from and to memory, at least {least / 1e9:.2f}"
    ok = status == 0 and bool(kernels)
    lines = text.strip().splitlines() or [""]
    return record | {
        "ok": ok, "note": note if ok else lines[-1][:200], "text": text, "kernels": kernels
    }  # fmt: skip


def counted(text: str) -> dict[str, dict[str, float]]:
    """Sum ncu's metrics by kernel. Its CSV begins at the line of names, after other output."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    names = {metric: name for name, metric in METRICS.items()}
    kernels: dict[str, dict[str, float]] = {}
    seen: dict[str, set[str]] = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        kernel, name = row["Kernel Name"].partition("(")[0], names.get(row["Metric Name"])
        if name is None:
            continue
        value = float(row["Metric Value"].replace(",", ""))
        total = kernels.setdefault(kernel, {})
        total[name] = total.get(name, 0.0) + value
        seen.setdefault(kernel, set()).add(row["ID"])
    for kernel, ids in seen.items():
        kernels[kernel]["launches"] = len(ids)
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tools", description=__doc__)
    parser.add_argument("tool", choices=("memcheck", "counters"))
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    record = {"memcheck": memcheck, "counters": counters}[args.tool](args.smoke)
    print(record.pop("text"))
    if not args.smoke:
        append(args.out, {"bench": args.tool, "kind": args.tool, "sources": sources(), **record})
    print(f"{args.tool}: {'ok' if record['ok'] else 'FAILED'}: {record['note']}".rstrip(": "))
    sys.exit(not record["ok"])


if __name__ == "__main__":
    main()

"""Markdown tables of an audit."""

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def report(found: Row) -> str:
    return "\n\n".join([resources(found["kernels"]), bounds(found)])


def short(name: str) -> str:
    return name.strip("_").removesuffix("_kernel")


def tile(row: Row) -> str:
    return "x".join(str(n) for n in row["tile"].values())


def in_loops(row: Row, prefix: str) -> int:
    regions = [region for region in row["regions"] if region["loop"] >= 0]
    return sum(
        n for region in regions for name, n in region["opcodes"].items() if name.startswith(prefix)
    )


def resources(rows: Iterable[Row]) -> str:
    """Return what each specialisation takes. Instructions are a warp's, of each region of loops."""
    head = "kernel", "case", "tile", "warps, stages", "registers", "stack (loops)", "shared, KiB"
    head += "programs", "wgmma / waits", "EX2", "instructions", "loads"
    lines = []
    for row in rows:
        if "error" in row:
            lines.append([short(row["kernel"]), row["case"], row["error"], *[""] * 9])
            continue
        products = ", ".join(f"{n} / {waits}" for n, waits in row["products_and_waits"]) or "-"
        counts = [r["instructions"] for r in row["regions"] if r["loop"] >= 0]
        counts = [n for n in counts if n > 12]
        loads = {
            name.replace(".E", "").replace(".BYPASS", "")
            for region in row["regions"]
            for name in region["opcodes"]
            if name.startswith(("LDG.", "LDGSTS", "UTMALDG"))
        }
        lines.append([
            short(row["kernel"]), row["case"], tile(row), f"{row['warps']}, {row['stages']}",
            row["registers"], f"{row['stack']} ({row['spills_in_loops']})",
            f"{row['shared'] / 1024:.0f}", row["programs"],
            products + (" serialised" if row["serialised"] else ""),
            in_loops(row, "MUFU.EX2"), " + ".join(map(str, counts)) or "-",
            ", ".join(sorted(loads)),
        ])  # fmt: skip
    return markdown(head, lines)


def bounds(found: Row) -> str:
    """Return the time that each resource allows, and the sum of each kernel's largest."""
    head = (
        "case",
        "kernel",
        "launches",
        "waves",
        "tensor",
        "EX2",
        "issue",
        "L2",
        "memory",
        "GB of L2",
    )
    machine = "H200"
    lines, sums = [], dict[str, float]()
    for row in found["cases"]:
        if "bounds" not in row:
            note = row.get("unknown", "")
            lines.append([row["case"], short(row["kernel"]), row["launches"], note, *[""] * 6])
            continue
        times = row["bounds"][machine]
        most = max(times.values())
        sums[row["case"]] = sums.get(row["case"], 0) + most
        cells = [f"**{x:.3f}**" if x == most else f"{x:.3f}" for x in times.values()]
        lines.append([
            row["case"], short(row["kernel"]), row["launches"], row["waves"], *cells,
            f"{row['cost']['l2'] / 1e9:.2f}",
        ])  # fmt: skip
    table = markdown(head, lines)
    return table + "\n\n" + markdown(["case", "sum"], [[k, f"{v:.3f}"] for k, v in sums.items()])

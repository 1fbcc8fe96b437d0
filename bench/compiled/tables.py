"""Markdown tables of an audit."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
MACHINE = "H200"  # of the table of bounds; JSON has all
SMALL = 12  # instructions of a region that only decides what is next


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def report(found: Row) -> str:
    tables = [resources(found["kernels"])]
    if found["cases"]:
        tables += [bounds(found), sums(found["cases"])]
    return "\n\n".join(tables)


# ---- resources ----


def short(name: str) -> str:
    return name.strip("_").removesuffix("_kernel")


def variant(row: Row) -> str:
    """Return a kernel's name, "swapped" where it computes the other side."""
    constants = row.get("constants", {})
    words = ["swapped"] * bool(constants.get("SWAP")) + ["columns"] * bool(constants.get("COLUMNS"))
    return " ".join([short(row["kernel"]), *words])


def in_loops(row: Row, prefixes: tuple[str, ...]) -> dict[str, int]:
    """Return how often opcodes occur in loops, in all of the kernel if it has none."""
    inside = [region for region in row["regions"] if region["loop"] >= 0] or row["regions"]
    counts: dict[str, int] = {}
    for region in inside:
        for name, n in region["opcodes"].items():
            if name.startswith(prefixes):
                counts[name] = counts.get(name, 0) + n
    return counts


def products(row: Row) -> str:
    """Return wgmma and waits of each loop, or of a kernel without loops: "4 / 1 (1)".

    In brackets: how many groups of products the strictest wait of every round leaves under way.
    """
    texts = []
    for loop in dict.fromkeys(region["loop"] for region in row["regions"]):
        n, waits, left = 0, 0, set[str]()
        for region in row["regions"]:
            for name, count in region["opcodes"].items() if region["loop"] == loop else ():
                n += count * name.startswith("HGMMA")
                if name.startswith("WARPGROUP.DEPBAR"):
                    waits += count
                    left |= {name.split()[1]} if region["always"] else set()
        texts += [f"{n} / {waits}" + (f" ({min(left)})" if left else "")] * bool(n)
    return ", ".join(texts) + " serialised" * row["serialised"] if texts else "-"


def instructions(row: Row) -> str:
    """Return the instructions of each region of the loops: what always runs, then conditions."""
    counts = [region["instructions"] for region in row["regions"] if region["loop"] >= 0]
    large = [str(n) for n in counts if n > SMALL]
    if len(large) > 4:
        return f"{sum(counts)} in {len(counts)} parts"
    return " + ".join(large) or str(row["regions"][0]["instructions"])


def loads(row: Row) -> str:
    counts = in_loops(row, ("LDG.", "LDGSTS", "UTMALDG"))
    named = ((name.replace(".E", "").replace(".BYPASS", ""), n) for name, n in counts.items())
    return ", ".join(f"{n} {name}" for name, n in sorted(named)) or "-"


HEAD = (
    *("kernel", "tile", "warps, stages", "registers", "stack (in loops)", "shared, KiB"),
    *("programs", "wgmma / waits", "EX2", "instructions", "loads"),
)


def resources(rows: Iterable[Row]) -> str:
    """Return what each specialisation takes, counts of one warp. "programs": that an SM holds."""
    return markdown((*HEAD, "case"), ([*resource(row), row["case"]] for row in rows))


def resource(row: Row) -> list[Any]:
    if "error" in row:
        return [variant(row), row["error"], *[""] * (len(HEAD) - 2)]
    return [
        variant(row), "x".join(map(str, row["tile"].values())), f"{row['warps']}, {row['stages']}",
        row["registers"], f"{row['stack']} ({row['spills_in_loops']})",
        f"{row['shared'] / 1024:.0f}", row["programs"], products(row),
        sum(in_loops(row, ("MUFU.EX2",)).values()), instructions(row), loads(row),
    ]  # fmt: skip


# ---- bounds ----

RESOURCES = {
    "tensor": "tensor", "exponentials": "EX2", "issue": "issue", "l2": "L2", "memory": "memory",
}  # fmt: skip
BOUNDS = "case", "kernel", "launches", "waves", *RESOURCES.values()


def bounds(found: Row) -> str:
    """Return the milliseconds that each resource needs; the largest is bold.

    Then what the counters of all launches should say: instructions, and bytes of L2 and memory.
    """
    kernels = {kernel["index"]: kernel for kernel in found["kernels"]}
    head = *BOUNDS, "G instructions", "GB of L2", "GB of memory"
    return markdown(head, (bound(row, kernels[row["index"]]) for row in found["cases"]))


def bound(row: Row, kernel: Row) -> list[Any]:
    known = [row["case"], variant(kernel), row["launches"]]
    if "bounds" not in row:
        return [*known, row.get("unknown", ""), *[""] * (len(RESOURCES) + 3)]
    times = [row["bounds"][MACHINE][name] for name in RESOURCES]
    cells = [f"**{x:.3f}**" if x == max(times) else f"{x:.3f}" for x in times]
    counts = row["cost"]["instructions"], row["cost"]["l2"], row["cost"]["memory"]
    return [*known, row["waves"], *cells, *(f"{n / 1e9:.2f}" if n else "-" for n in counts)]


def largest(row: Row) -> float:
    """Return the largest bound, NaN if the kernel's work is unknown."""
    return float(max(row["bounds"][MACHINE].values())) if "bounds" in row else math.nan


def sums(rows: Iterable[Row]) -> str:
    """Return each case's sum of its kernels' largest bounds."""
    totals: dict[str, float] = {}
    for row in rows:
        totals[row["case"]] = totals.get(row["case"], 0.0) + largest(row)
    return markdown(("case", "ms"), ([case, f"{ms:.3f}"] for case, ms in totals.items()))


# ---- documentation ----

MARKED = re.compile(r"(<!-- audit: (.*?) -->)\n.*?(<!-- end of audit -->)", re.DOTALL)
SHOWN = HEAD[:-1]  # without loads, which make the table too wide


def cases_of(page: str) -> list[str]:
    """Return the cases that the markers of a page name."""
    return [case for _, cases, _ in MARKED.findall(page) for case in cases.split()]


def filled(page: str, found: Row) -> str:
    """Return a page with the tables of its markers' cases."""

    def tables(marked: re.Match[str]) -> str:
        cases = marked[2].split()
        rows = [row for row in found["cases"] if row["case"] in cases]
        wanted = {row["index"] for row in rows}
        kernels = [kernel for kernel in found["kernels"] if kernel["index"] in wanted]
        shown = markdown(SHOWN, (resource(kernel)[: len(SHOWN)] for kernel in kernels))
        body = [shown, bounds({**found, "cases": rows}), sums(rows)]
        return "\n\n".join([marked[1], *body]) + "\n\n" + marked[3]

    return MARKED.sub(tables, page)


# ---- before and after ----


def comparison(before: Row, after: Row) -> str:
    """Return registers, stack, waits and the largest bound of both, by case and kernel.

    Specialisations of a kernel are matched in the order of their launches: their constants change.
    """
    head = "case", "kernel", "registers", "stack (in loops)", "wgmma / waits", "ms", "ratio"
    old, new = by_place(before), by_place(after)
    cases = dict.fromkeys(case for case, *_ in new)
    totals = {case: [0.0, 0.0] for case in cases}
    lines = []
    for place in dict.fromkeys([*old, *new]):
        case, name, _ = place
        if case not in cases:
            continue
        pair = old.get(place), new.get(place)
        sides = [[""] * len(HEAD) if one is None else resource(one[0]) for one in pair]
        cells = [" -> ".join(dict.fromkeys(map(str, x))) for x in zip(*sides, strict=True)]
        ms = [0.0 if one is None else largest(one[1]) for one in pair]
        totals[case] = [total + x for total, x in zip(totals[case], ms, strict=True)]
        lines.append([case, short(name), cells[3], cells[4], cells[7], *change(*ms)])
    lines += [[case, "all", "", "", "", *change(*ms)] for case, ms in totals.items()]
    return markdown(head, lines)


def by_place(found: Row) -> dict[tuple[str, str, int], tuple[Row, Row]]:
    """Return the kernel and its costs by case, name, and number in the case."""
    kernels = {kernel["index"]: kernel for kernel in found["kernels"]}
    places: dict[tuple[str, str, int], tuple[Row, Row]] = {}
    for row in found["cases"]:
        number = 0
        while (row["case"], row["kernel"], number) in places:
            number += 1
        places[row["case"], row["kernel"], number] = kernels[row["index"]], row
    return places


def change(before: float, after: float) -> tuple[str, str]:
    ratio = f"{after / before:.2f}" if before and after == after else "-"
    return f"{before:.3f} -> {after:.3f}", ratio

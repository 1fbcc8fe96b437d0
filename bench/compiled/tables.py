"""Markdown tables of an audit."""

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
MACHINE = "H200"  # of the table of bounds; JSON has all
SMALL = 12  # instructions of a region that only decides what is next


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def report(found: Row) -> str:
    return "\n\n".join([resources(found["kernels"]), bounds(found["cases"]), sums(found["cases"])])


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

    In brackets: the least number of groups of products that a wait leaves under way.
    """
    loops: dict[int, dict[str, int]] = {}
    for region in row["regions"]:
        counts = loops.setdefault(region["loop"], {})
        for name, n in region["opcodes"].items():
            if name.startswith(("HGMMA", "WARPGROUP.DEPBAR")):
                counts[name] = counts.get(name, 0) + n
    texts = []
    for counts in loops.values():
        waits = {name: n for name, n in counts.items() if name.startswith("WARPGROUP.DEPBAR")}
        left = f" ({min(name.split()[1] for name in waits)})" if waits else ""
        n = sum(counts.values()) - sum(waits.values())
        texts += [f"{n} / {sum(waits.values())}{left}"] * bool(n)
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

TIMES = "tensor", "EX2", "issue", "L2", "memory"


def bounds(rows: Iterable[Row]) -> str:
    """Return the milliseconds that each resource needs; the largest is bold."""
    head = "case", "kernel", "launches", "waves", *TIMES, "GB of L2"
    return markdown(head, ([row["case"], *bound(row)] for row in rows))


def bound(row: Row) -> list[Any]:
    name = short(row["kernel"])
    if "bounds" not in row:
        return [name, row["launches"], row.get("unknown", ""), *[""] * (len(TIMES) + 1)]
    times = row["bounds"][MACHINE].values()
    cells = [f"**{x:.3f}**" if x == max(times) else f"{x:.3f}" for x in times]
    return [name, row["launches"], row["waves"], *cells, f"{row['cost']['l2'] / 1e9:.2f}"]


def largest(row: Row) -> float:
    return float(max(row["bounds"][MACHINE].values())) if "bounds" in row else 0.0


def sums(rows: Iterable[Row]) -> str:
    """Return each case's sum of its kernels' largest bounds."""
    totals: dict[str, float] = {}
    for row in rows:
        totals[row["case"]] = totals.get(row["case"], 0.0) + largest(row)
    return markdown(("case", "ms"), ([case, f"{ms:.3f}"] for case, ms in totals.items()))


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
    ratio = f"{after / before:.2f}" if before and after else "-"
    return f"{before:.3f} -> {after:.3f}", ratio

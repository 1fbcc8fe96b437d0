"""What is printed: tables of what was obtained, and nothing of what was not."""

import json
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
COLUMNS = (*("provider", "ms", "p20..p80", "TFLOP/s", "of matmul", "GB/s", "of copy", "peak MiB"),)
ANOTHER = 0.05  # relative: bf16 sums of bf16 losses come within 2 %


def ms_of(rows: Iterable[Row], case: str, mode: str, provider: str) -> float | None:
    for row in rows:
        if (row["case"], row["mode"], row["provider"]) == (case, mode, provider):
            return row.get("ms")
    return None


def ratio(rows: list[Row], row: Row, baseline: str) -> str:
    """How many times faster than a baseline, of a result that is right and whole."""
    base = ms_of(rows, row["case"], row["mode"], baseline)
    if base is None or row.get("value") is None or row["provider"] == baseline or row.get("note"):
        return "-"
    if row.get("green") is False:
        return "red"
    if differs(rows, row):
        return "-"
    return f"{base / row['ms']:.2f}"


def differs(rows: list[Row], row: Row) -> str | None:
    """Whose loss is not eager's computes something else: its time compares to nothing."""
    for other in rows:
        same = (other["case"], other["mode"]) == (row["case"], row["mode"])
        if same and other["provider"] == "eager" and other.get("value") is not None:
            if row.get("value") is None or row["provider"] == "eager":
                return None
            if abs(row["value"] - other["value"]) <= ANOTHER * abs(other["value"]):
                return None
            return f"another loss: {row['value']:.4g}, eager {other['value']:.4g}"
    return None


def cells(rows: list[Row], row: Row, baselines: tuple[str, ...]) -> list[str]:
    if row.get("ms") is None:
        return [row["provider"], row["status"]]
    peak = row.get("peak_mib")
    return [
        row["provider"],
        f"{row['ms']:.3f}",
        f"{row['p20']:.3f}..{row['p80']:.3f}",
        f"{row['tflops']:.0f}",
        f"{row['share']:.1%}",
        f"{row['gbs']:.0f}",
        f"{row['copy_share']:.1%}",
        "-" if peak is None else f"{peak:.0f}",
        *(ratio(rows, row, baseline) for baseline in baselines),
    ]


def aligned(lines: list[list[str]]) -> list[str]:
    """First column to the left, the others to the right; short lines end early."""
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(lines[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=False))
        ).rstrip()
        for line in lines
    ]


def table(
    rows: list[Row], mode: str, floors: dict[str, float] | None, baselines: tuple[str, ...]
) -> str:
    """One case in one mode, with speed-ups against `baselines`; `rows` are the case's."""
    mine = [row for row in rows if row["mode"] == mode]
    lines = aligned(
        [[*COLUMNS, *(f"x {name}" for name in baselines)]]
        + [cells(rows, row, baselines) for row in mine]
    )
    notes = []
    for row in mine:
        for note in (row.get("note"), differs(rows, row)):
            notes += [f"  {row['provider']}: {note}"] if note else []
    if floors is not None:
        told = ", ".join(f"{name} {ms:.2f} ms" for name, ms in floors.items())
        notes.insert(0, f"  floors at the ceilings: {told}")
    return "\n".join([mode, *lines, *notes])


def kernels(row: Row) -> str:
    if row.get("top") is None:
        return f"kernels of ours: {row['status']} {row.get('note', '')}".rstrip()
    lines = [["kernel", "ms", "share", "launches"]]
    for kernel in row["top"]:
        share = kernel["ms"] / row["total_ms"]
        lines.append(
            [
                kernel["kernel"][:60],
                f"{kernel['ms']:.3f}",
                f"{share:.1%}",
                f"{kernel['launches']:g}",
            ]
        )
    return "\n".join([f"ours, fwd+bwd: {row['total_ms']:.2f} ms in kernels", *aligned(lines)])


def stages(row: Row, whole: float | None) -> str:
    """Where a step's time goes; `whole` is how long it takes, with what no kernel fills."""
    if row.get("stages") is None:
        return f"stages of ours: {row['status']} {row.get('note', '')}".rstrip()
    lines = [["stage", "ms", "of the step", "floor, ms", "of its ceiling"]]
    total = sum(stage["ms"] or 0.0 for stage in row["stages"].values())
    lines += [staged(name, whole, **stage) for name, stage in row["stages"].items()]
    if whole is not None and whole > total:
        lines.append(staged("no kernel", whole, whole - total, None))
    known = f", step {whole:.2f} ms" if whole is not None else ""
    other = [f"  other: {', '.join(row['other'])}"] if row["other"] else []
    head = f"ours by stage: {total:.2f} ms in kernels{known}"
    return "\n".join([head, *aligned(lines), *other])


def staged(name: str, whole: float | None, ms: float | None, floor_ms: float | None) -> list[str]:
    floor = "-" if floor_ms is None else f"{floor_ms:.3f}"
    if not ms:
        return [name, "-", "-", floor, "-"]
    share = "-" if whole is None else f"{ms / whole:.1%}"
    return [name, f"{ms:.3f}", share, floor, "-" if floor_ms is None else f"{floor_ms / ms:.1%}"]


def sweep(rows: list[Row]) -> str:
    """Every kernel's configurations, the fastest right one first."""
    lines = [["kernel", "ms", "of what", "configuration"]]
    order = sorted(rows, key=lambda row: (row["kernel"], row.get("ms") or 1e9))
    for row in order:
        config = " ".join(f"{k}={v}" for k, v in row.get("config", {}).items())
        told = f"{row['ms']:.3f}" if row.get("ms") else row["status"]
        wrong = " WRONG" if row.get("right") is False else ""
        note = f"  {row['note'][:80]}" if row.get("note") else ""
        lines.append([row["kernel"], told, row.get("mode", "-"), config + wrong + note])
    return "\n".join(aligned(lines))


def gate(rows: list[Row]) -> str:
    """A line for all that is right, and one for everything that is not."""
    right = sum(row["ok"] for row in rows)
    lines = [f"gate: {right} of {len(rows)} checks right"]
    for row in rows:
        if not row["ok"]:
            parts = {
                k: row[k]
                for k in ("error", "same_bits", "loss", "dq", "dc", "gradients")
                if k in row
            }
            lines.append(f"  RED {row['check']} {row['dtype']}: {json.dumps(parts)[:400]}")
    return "\n".join(lines)


def compact(rows: list[Row]) -> dict[str, Any]:
    """case -> mode -> provider -> median ms, and what has none by its status."""
    found: dict[str, Any] = {}
    for row in rows:
        place = found.setdefault(row["case"], {}).setdefault(row["mode"], {})
        place[row["provider"]] = round(row["ms"], 4) if row.get("ms") else row["status"]
    return found

"""Console tables and targets. Missing measurements stay blank."""

import json
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Floors = dict[str, float] | None
Cells = Callable[[Sequence[Row], Row, Floors], list[str]]
COLUMNS = "TFLOP/s", "of matmul", "GB/s", "of copy", "peak MiB"
ANOTHER = 0.05  # relative: bf16 sums of bf16 losses agree within 2 %
SIGNS = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


class Targets:
    """Targets of a bench, from the rows whose time was measured and whose result is right."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = {
            (row["case"], row["provider"], row["mode"]): row
            for row in rows
            if row.get("ms") and row.get("green") is not False
        }
        self.listed: list[Row] = []

    def row(self, case: str, provider: str, mode: str) -> Row | None:
        return self.rows.get((case, provider, mode))

    def add(self, what: str, value: float, sign: str, limit: float, aim: bool = False) -> None:
        """Compare a value with its limit. aim: more than what is required."""
        bound = f"{'aim ' if aim else ''}{sign} {limit:g}"
        met = SIGNS[sign](value, limit)
        self.listed.append({"target": what, "value": value, "limit": bound, "met": met})


# ---- tables of a case ----


def ms_of(rows: Iterable[Row], case: str, mode: str, provider: str) -> float | None:
    for row in rows:
        if (row["case"], row["mode"], row["provider"]) == (case, mode, provider):
            return row.get("ms")
    return None


def ratio(rows: Sequence[Row], row: Row, baseline: str) -> str:
    """Return how many times faster a row is than a baseline, "-" unless it is right and whole."""
    base = ms_of(rows, row["case"], row["mode"], baseline)
    if base is None or row.get("value") is None or row["provider"] == baseline or row.get("note"):
        return "-"
    if row.get("green") is False:
        return "red"
    if differs(rows, row):
        return "-"
    return f"{base / row['ms']:.2f}"


def differs(rows: Sequence[Row], row: Row) -> str | None:
    """Return both losses if a provider's is not eager's: its time compares to nothing."""
    for other in rows:
        same = (other["case"], other["mode"]) == (row["case"], row["mode"])
        if same and other["provider"] == "eager" and other.get("value") is not None:
            if row.get("value") is None or row["provider"] == "eager":
                return None
            if abs(row["value"] - other["value"]) <= ANOTHER * abs(other["value"]):
                return None
            return f"another loss: {row['value']:.4g}, eager {other['value']:.4g}"
    return None


def cells(rows: Sequence[Row], row: Row, floors: Floors) -> list[str]:
    """Return the text of COLUMNS."""
    peak = row.get("peak_mib")
    rates = f"{row['tflops']:.0f}", f"{row['share']:.1%}"
    copies = f"{row['gbs']:.0f}", f"{row['copy_share']:.1%}"
    return [*rates, *copies, "-" if peak is None else f"{peak:.0f}"]


def gib(mib: float | None) -> str:
    return "-" if mib is None else f"{mib / 1024:.1f}"


def table(
    rows: Sequence[Row],
    mode: str,
    floors: Floors,
    baselines: Sequence[str],
    columns: Sequence[str] = COLUMNS,
    cells: Cells = cells,
) -> str:
    """Return one case in one mode, with speed-ups against `baselines`.

    cells: the text of `columns` for a row that has a time.
    """
    mine = [row for row in rows if row["mode"] == mode]
    lines = [["provider", "ms", "p20..p80", *columns, *(f"x {name}" for name in baselines)]]
    notes = []
    if floors:
        limits = ", ".join(f"{name} {ms:.2f} ms" for name, ms in floors.items())
        notes.append(f"  floors at the ceilings: {limits}")
    for row in mine:
        for note in (row.get("note"), differs(rows, row)):
            notes += [f"  {row['provider']}: {note}"] if note else []
        if row.get("ms") is None:
            lines.append([row["provider"], row["status"]])
            continue
        digits = 3 if row["ms"] < 100 else 1
        ms, p20, p80 = (f"{row[name]:.{digits}f}" for name in ("ms", "p20", "p80"))
        ratios = (ratio(rows, row, baseline) for baseline in baselines)
        lines.append([row["provider"], ms, f"{p20}..{p80}", *cells(rows, row, floors), *ratios])
        if row.get("parts"):
            parts = ", ".join(f"{part} {ms:.1f}" for part, ms in row["parts"].items())
            notes.append(f"  ms, under a profiler: {parts}")
    return "\n".join([mode, *aligned(lines), *notes])


def aligned(lines: list[list[str]]) -> list[str]:
    """Align the first column to the left, the others to the right. Lines may have fewer cells."""
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(lines[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=False))
        ).rstrip()
        for line in lines
    ]


# ---- kernels, stages, sweeps, gates ----


def kernels(row: Row) -> str:
    if row.get("top") is None:
        return f"kernels of ours: {row['status']} {row.get('note', '')}".rstrip()
    lines = [["kernel", "ms", "share", "launches"]]
    for kernel in row["top"]:
        share = f"{kernel['ms'] / row['total_ms']:.1%}"
        name, launches = kernel["kernel"][:60], f"{kernel['launches']:g}"
        lines.append([name, f"{kernel['ms']:.3f}", share, launches])
    return "\n".join([f"ours, fwd+bwd: {row['total_ms']:.2f} ms in kernels", *aligned(lines)])


def stages(row: Row, whole: float | None) -> str:
    """Return the time of a step by stage. whole: ms of the step, also those without a kernel."""
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


def sweep(rows: Sequence[Row]) -> str:
    """Return the configurations of every kernel, the fastest first."""
    lines = [["kernel", "ms", "mode", "configuration"]]
    for row in sorted(rows, key=lambda row: (row["kernel"], row.get("ms") or 1e9)):
        config = " ".join(f"{k}={v}" for k, v in row.get("config", {}).items())
        ms = f"{row['ms']:.3f}" if row.get("ms") else row["status"]
        wrong = " WRONG" if row.get("right") is False else ""
        note = f"  {row['note'][:80]}" if row.get("note") else ""
        lines.append([row["kernel"], ms, row.get("mode", "-"), config + wrong + note])
    return "\n".join(aligned(lines))


def gate(rows: Sequence[Row]) -> str:
    """Return how many checks are right, and a line for each that is not."""
    lines = [f"gate: {sum(row['ok'] for row in rows)} of {len(rows)} checks right"]
    names = "error", "same_bits", "loss", "dq", "dc", "gradients"
    for row in rows:
        if not row["ok"]:
            parts = json.dumps({name: row[name] for name in names if name in row})
            lines.append(f"  RED {row['check']} {row['dtype']}: {parts[:400]}")
    return "\n".join(lines)


def compact(rows: Iterable[Row]) -> dict[str, Any]:
    """Return case -> mode -> provider -> median ms, or the status of a row without a time."""
    medians: dict[str, Any] = {}
    for row in rows:
        place = medians.setdefault(row["case"], {}).setdefault(row["mode"], {})
        place[row["provider"]] = round(row["ms"], 4) if row.get("ms") else row["status"]
    return medians

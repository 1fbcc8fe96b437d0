"""python -m bench compare A B: ratios of two results, row by row, and what got slower.

A and B are results files, or folders of them. Of several rows of one name the last counts. Noise is
half of the range of the middle three fifths of both rows' repetitions, relative to their medians; a
row is slower or faster if its ratio exceeds the noise, and LEAST at the least.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import report
from .records import lines_of

LEAST = 0.01  # relative: clocks alone move a median by as much
Name = tuple[str, str, str, str]  # bench, case, provider or kernel, mode or configuration


@dataclass(frozen=True)
class Compared:
    """A row of both results. ratio: B's milliseconds over A's. verdict: "" within the noise."""

    name: Name
    a: float
    b: float
    noise: float

    @property
    def ratio(self) -> float:
        return self.b / self.a

    @property
    def verdict(self) -> str:
        bound = 1 + max(self.noise, LEAST)
        if self.ratio > bound:
            return "slower"
        return "faster" if self.ratio < 1 / bound else ""


def rows_of(path: Path) -> tuple[dict[Name, dict[str, Any]], dict[str, Any]]:
    """Return the rows that have a time, by name, and the last environment.

    Raises:
        ValueError: the path does not exist, or has no results.
    """
    if not path.exists():
        raise ValueError(f"{path}: expected a results file or a folder of them, got nothing")
    files = [path] if path.is_file() else sorted(path.rglob("*.jsonl"))
    rows: dict[Name, dict[str, Any]] = {}
    environment: dict[str, Any] = {}
    for record in (line for file in files for line in lines_of(file)):
        kind, bench = record.get("kind"), record.get("bench", "")
        if kind == "environment":
            environment = record
        elif kind == "row" and record.get("ms"):
            rows[bench, record["case"], record["provider"], record["mode"]] = record
        elif kind == "sweep" and record.get("ms"):
            config = " ".join(f"{k}={v}" for k, v in record.get("config", {}).items())
            rows[bench, f"sweep {record['case']}", record["kernel"], config] = record
        elif kind == "training" and record.get("ms"):
            rows[bench, "train.py", "ours", "a step"] = record
    if not rows:
        raise ValueError(f"{path}: expected rows with times, got none")
    return rows, environment


def noise_of(row: dict[str, Any]) -> float:
    low, high = row.get("p20", row["ms"]), row.get("p80", row["ms"])
    return float((high - low) / 2 / row["ms"])


def compared(a: dict[Name, dict[str, Any]], b: dict[Name, dict[str, Any]]) -> list[Compared]:
    return [
        Compared(name, a[name]["ms"], b[name]["ms"], noise_of(a[name]) + noise_of(b[name]))
        for name in a
        if name in b
    ]


def table(rows: Sequence[Compared]) -> str:
    lines = [["row", "A, ms", "B, ms", "B / A", "noise", ""]]
    for row in rows:
        name = " ".join(filter(None, row.name))
        times = f"{row.a:.3f}", f"{row.b:.3f}", f"{row.ratio:.3f}", f"{row.noise:.1%}"
        lines.append([name, *times, row.verdict])
    return "\n".join(report.aligned(lines))


def changes(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return how the environments differ, one line each."""
    keys = ("gpu", "torch", "triton", "cuda", "driver, power limit, top SM clock", "sources")
    return [
        f"{key}: {a.get(key)} and {b.get(key)}" for key in keys if a.get(key) != b.get(key)
    ]  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("a", type=Path, metavar="A", help="before: a .jsonl, or a folder of them")
    parser.add_argument("b", type=Path, metavar="B", help="after")
    parser.add_argument("--strict", action="store_true", help="exit status 1 if a row got slower")
    args = parser.parse_args(arguments)
    try:
        (a, from_a), (b, from_b) = rows_of(args.a), rows_of(args.b)
    except ValueError as error:
        parser.error(str(error))
    rows = compared(a, b)
    print(*changes(from_a, from_b), table(rows), sep="\n")
    for name, only in (("A", a.keys() - b.keys()), ("B", b.keys() - a.keys())):
        if only:
            print(f"only in {name}: {', '.join(' '.join(filter(None, n)) for n in sorted(only))}")
    slower = [row for row in rows if row.verdict == "slower"]
    faster = sum(row.verdict == "faster" for row in rows)
    print(f"{len(rows)} rows in both: {faster} faster, {len(slower)} slower beyond the noise")
    for row in sorted(slower, key=lambda row: -row.ratio):
        print(f"slower: {' '.join(filter(None, row.name))}: {row.ratio:.3f}")
    sys.exit(bool(slower) and args.strict)

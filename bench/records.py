"""Results files: one JSON object a line, appended as each measurement ends."""

import datetime
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .environment import sources


def key(record: dict[str, Any]) -> str:
    """Return a measurement's name, for --skip of the worker."""
    if record["kind"] == "row":
        return f"{record['case']}:{record['provider']}:{record['mode']}"
    if record["kind"] == "sweep":
        return f"sweep:{record['kernel']}:{json.dumps(record.get('config'))}"
    return ""


class Kept(NamedTuple):
    """Results of an earlier run: the gate's verdicts, rows by key, ceilings and kernels."""

    gate: list[dict[str, Any]]
    rows: dict[str, dict[str, Any]]
    others: list[dict[str, Any]]


def earlier(out: Path, name: str) -> Kept:
    """Read the results of a bench for the present sources, without rows that lacked time."""
    kept, verdicts, current, present = Kept([], {}, []), list[dict[str, Any]](), False, sources()
    files = [out] if out.suffix == ".jsonl" else sorted(out.glob(f"*-{name}.jsonl"))
    for record in (line for path in files for line in lines_of(path) if line["bench"] == name):
        kind = record["kind"]
        if kind == "environment":
            current = record.get("sources") == present
        elif current and kind == "gate":
            verdicts.append(record)
        elif current and kind == "stage" and record["stages"] == ["gate"]:
            if record["done"]:
                kept.gate[:] = verdicts
            verdicts = []
        elif current and key(record) and record["status"] != "skipped":
            kept.rows[key(record)] = record
        elif current and kind in ("ceilings", "kernels", "stages"):
            kept.others.append(record)
    return kept


def append(path: Path, record: dict[str, Any]) -> None:
    """Append a record with the time: one write, on a line of its own after what a kill cut off."""
    stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = json.dumps({"time": stamp, **record}).encode() + b"\n"
    with path.open("ab+", buffering=0) as file:
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        os.fsync(file.fileno())


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file. A line that a killed process cut off is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def results_file(folder: Path, gpu: str | None, name: str) -> Path:
    """Return <date>-<gpu>-<name>.jsonl in a folder, which is made; a .jsonl stays as it is."""
    if folder.suffix == ".jsonl":
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder
    card = re.sub(r"[^a-z0-9]+", "-", (gpu or "cpu").lower().removeprefix("nvidia ")).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return folder / f"{today}-{card}-{name}.jsonl"
